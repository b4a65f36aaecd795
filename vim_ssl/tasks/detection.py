"""Detection and instance segmentation: an encoder with heads that find objects, and their losses.

    images -> encoder's last map -> feature pyramid -> proposals -> classes, boxes, masks

The map is the residual stream after the final norm, class tokens taken out. (Upstream's detector
has no class token and no norm there.)
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from vim_ssl.checkpoints.task_models import load_task, save_task
from vim_ssl.data.images import BadImage, clean_image
from vim_ssl.data.transforms.dense import DensePixels, on_canvas
from vim_ssl.metrics.detection import DetectionMetrics
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.models.heads import RCNN, SimpleFeaturePyramid
from vim_ssl.models.heads.rcnn import COARSEST
from vim_ssl.objectives.base import StepOutput
from vim_ssl.utils.drawing import GRID_ROWS, object_grid, overlay_objects
from vim_ssl.utils.names import did_you_mean

HEADS = ("cascade", "rcnn")
FILE = "detection.safetensors"
SHOWN = 0.5  # the least score of what is drawn


class Detection(nn.Module):
    """An encoder and a detector; as an objective, its losses.

    Args:
        encoder: any whose patches lie edge to edge; its classification head is dropped.
        classes: their names.
        head: "cascade" (Cascade Mask R-CNN, three stages) or "rcnn" (Mask R-CNN).
        masks: whether objects get a mask too; training data need outlines then.
        size: side of the square canvas that images are laid on, pixels, a multiple of 64; the
            longer side of an image becomes as long.
        channels: of the pyramid and inside the heads.
        convs, hidden, anchor, samples, score, most: see `RCNN`.
    Batches hold ``image`` (b, c, size, size), normalised, and ``objects``, a list of dicts; see
    `LargeScaleJitter`.
    Raises: ValueError for an unknown head, no class, or a size that does not fit.
    """

    def __init__(
        self,
        encoder: VimEncoder,
        classes: Sequence[str],
        *,
        head: str = "cascade",
        masks: bool = True,
        size: int = 1024,
        channels: int = 256,
        convs: int = 4,
        hidden: int = 1024,
        anchor: int = 32,
        samples: int = 512,
        score: float = 0.05,
        most: int = 100,
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head {head!r} is unknown. {did_you_mean(head, HEADS)}")
        if not classes:
            raise ValueError("there is no class; one is needed.")
        if size < COARSEST or size % COARSEST:
            raise ValueError(
                f"size {size} is no multiple of {COARSEST}, the stride of the coarsest level; use "
                f"{max(round(size / COARSEST), 1) * COARSEST}."
            )
        dim, stride = encoder.embed_dim, cast(int, encoder.feature_info[0]["reduction"])
        if encoder.grid(size, size) != (size // stride, size // stride):
            raise ValueError("the encoder's patches overlap; detection needs them edge to edge.")
        encoder.prune_intermediate_layers(1)  # the last block is kept, the head is not
        self.encoder, self.classes, self.masks, self.size = encoder, list(classes), masks, size
        self.pyramid = SimpleFeaturePyramid(dim, stride, channels)
        self.detector = RCNN(
            channels, len(classes), cascade=head == "cascade", masks=masks, convs=convs,
            hidden=hidden, anchor=anchor, samples=samples, score=score, most=most,
        )  # fmt: skip
        self.pixels = DensePixels(encoder.data_config)
        self.config: dict[str, Any] = {
            "classes": self.classes, "head": head, "masks": masks, "size": size,
            "channels": channels, "convs": convs, "hidden": hidden, "anchor": anchor,
            "samples": samples, "score": score, "most": most,
        }  # fmt: skip

    def found(
        self, images: Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """What `RCNN` finds in images (b, c, size, size), or in training its losses."""
        (last,) = self.encoder.forward_intermediates(images, 1, norm=True, intermediates_only=True)
        return self.detector(images, self.pyramid(last), targets)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        """In training the losses' sum, an average over proposals, so an image weighs as another
        (accumulation and several processes average over micro-batches, as ViTDet's training does);
        in evaluation no loss, but images of what is found.
        """
        images, targets = batch["image"], batch["objects"]
        count = len(images)
        if not self.training:
            found, _ = self.found(images)
            nothing = images.new_zeros(())
            return StepOutput(nothing, count, {}, lambda: self._draw(images, targets, found))
        _, losses = self.found(images, targets)
        return StepOutput(
            torch.stack(list(losses.values())).sum() * count, count,
            {name.removeprefix("loss_"): loss * count for name, loss in losses.items()},
        )  # fmt: skip

    @torch.no_grad()
    def predict(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Find the objects of an image of any size.

        Returns: ``boxes`` float32 (n, 4), left, top, right, bottom in the pixels of the image,
            upright as its EXIF orientation says; ``labels`` int64 (n,), class numbers from 0;
            ``scores`` float32 (n,), falling; and with masks ``masks`` bool (n, h, w), True =
            object.
        Raises: BadImage for what `clean_image` refuses.
        """
        image = clean_image(image)  # upright, before it is asked for its size
        device = next(self.parameters()).device
        canvas, (height, width) = on_canvas(self.pixels, image, self.size)
        found = {k: v.cpu() for k, v in self.found(canvas[None].to(device))[0][0].items()}
        factors = torch.tensor([image.width / width, image.height / height] * 2)
        whole = found["boxes"].float() * factors
        sides = torch.tensor([image.width, image.height] * 2)
        boxes = torch.minimum(whole.clamp(min=0), sides)
        inside = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)  # else it lies beside the image
        answer = {
            "boxes": boxes[inside].numpy(),
            "labels": (found["labels"][inside] - 1).numpy(),
            "scores": found["scores"][inside].float().numpy(),
        }
        if self.masks:
            masks = np.zeros((len(answer["boxes"]), image.height, image.width), bool)
            # Of the whole boxes: a mask belongs to its box, also where that leaves the image.
            likely, corners = found["masks"][inside].float(), whole[inside]
            for i in range(len(masks)):  # one by one: a float for each pixel is much at once
                one = slice(i, i + 1)
                pasted = paste_masks_in_image(
                    likely[one], corners[one], (image.height, image.width)
                )
                masks[i] = pasted[0, 0].numpy() >= 0.5
            answer["masks"] = masks
        return answer

    def _draw(self, images: Tensor, targets: list[dict], found: list[dict]) -> Tensor:
        """(b, 3, h, 2w) in [0, 1]: truth, prediction."""
        mean, std = (
            torch.tensor(self.encoder.data_config[key], device=images.device)[:, None, None]
            for key in ("mean", "std")
        )
        shown = (255 * (images * std + mean).clamp(0, 1)).round().to(torch.uint8).cpu()
        rows = []
        for image, truth, one in zip(shown, targets, found, strict=True):
            sure = {k: v[one["scores"] >= SHOWN] for k, v in one.items() if k != "masks"}
            panels = [
                overlay_objects(image, part["boxes"].cpu(), part["labels"].cpu() - 1, self.classes)
                for part in (truth, sure)
            ]
            rows.append(torch.cat(panels, 2))
        return torch.stack(rows) / 255

    def save(self, folder: str | os.PathLike, record: dict[str, Any] | None = None) -> None:
        """Write the encoder as `save_encoder` does, and the rest beside it; see
        `load_detection`."""
        save_task(self, folder, FILE, record)


def load_detection(folder: str | os.PathLike) -> Detection:
    """The encoder and detector that a detection run has written, in eval mode.

    Raises: FileNotFoundError for a folder without a detector; ValueError for one that does not fit
        the encoder beside it.
    """
    return load_task(Detection, folder, FILE, "detection")


def evaluate(model: Detection, data, folder: Path) -> tuple[dict[str, Any], DetectionMetrics]:
    """Average precision of a model on images with boxes.

    ``results.json`` (what pycocotools' ``loadRes`` takes, with the data's own ids), ``classes.csv``
    and ``predictions.png`` (truth, prediction) go to ``folder``.

    Returns: `DetectionMetrics.compute` with the number of images and those passed over.
    Raises: ValueError if none can be read, or none has an object; ImportError without pycocotools.
    """
    training = model.training
    model.eval()
    scores = DetectionMetrics(data, masks=model.masks and data.has_outlines)
    skipped, rows = [], []
    shown = {i * len(data) // GRID_ROWS for i in range(GRID_ROWS)}
    for i in range(len(data)):
        try:
            item = data[i]
        except BadImage as bad:
            skipped.append(str(bad))
            continue
        found = model.predict(item["image"])
        scores.add(i, found)
        if i in shown:
            sure = {k: v[found["scores"] >= SHOWN] for k, v in found.items()}
            rows.append((item["image"], item, sure))
    model.train(training)
    if len(skipped) == len(data):
        raise ValueError(f"none of the {len(data)} images could be read: {skipped[:3]}")
    figures = {"test": len(data) - len(skipped), **scores.compute(), "skipped": skipped}
    scores.write(folder)
    object_grid(rows, model.classes).save(folder / "predictions.png")
    return figures, scores
