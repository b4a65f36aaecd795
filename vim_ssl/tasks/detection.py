"""Detection and instance segmentation: an encoder with a detector, and the losses.

    images -> encoder's last map -> feature pyramid -> proposals -> classes, boxes, masks

The map is the residual stream after the final norm, without class tokens. (Upstream's detector has
no class token and no norm there.)
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from vim_ssl.checkpoints.task_models import load_task, save_task
from vim_ssl.data.transforms.dense import DensePixels, on_canvas
from vim_ssl.data.transforms.image import denormalize
from vim_ssl.metrics.detection import DetectionMetrics
from vim_ssl.models.freezing import Freezable
from vim_ssl.models.heads import RCNN, SimpleFeaturePyramid
from vim_ssl.models.heads.rcnn import COARSEST
from vim_ssl.models.protocol import Encoder
from vim_ssl.objectives.base import StepOutput
from vim_ssl.tasks.dense import DensePredictor, map_strides, predictions
from vim_ssl.utils.drawing import object_grid, overlay_objects
from vim_ssl.utils.files import optional_output
from vim_ssl.utils.names import did_you_mean
from vim_ssl.utils.numbers import REMEDY, require_finite

HEADS = ("cascade", "rcnn")
FILE = "detection.safetensors"
MIN_SCORE = 0.5  # minimum score of an object to be drawn


class Detection(DensePredictor, Freezable):
    """An encoder and a detector; as an objective, its losses.

    Args:
        encoder: any encoder with non-overlapping patches; its classification head is dropped.
        classes: class names.
        head: "cascade" (Cascade Mask R-CNN, three stages) or "rcnn" (Mask R-CNN).
        masks: also predict masks; the training data then need outlines.
        size: side of the square canvas in pixels, a multiple of 64. Images are resized so that the
            longer side has this length.
        channels: width of the pyramid and the heads.
        convs, hidden, anchor, samples, score, most: see `RCNN`.
    Batches hold ``image`` (b, c, size, size), normalised, and ``objects``, a list of dicts; see
    `LargeScaleJitter`.
    Raises: ValueError for an unknown head, no class, a size that does not fit, or patches that
        overlap.
    """

    task = "detection"

    def __init__(
        self,
        encoder: Encoder,
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
            raise ValueError("classes is empty; expected at least one class.")
        if size < COARSEST or size % COARSEST:
            raise ValueError(
                f"size {size} is not a multiple of {COARSEST}, the coarsest level's stride; use "
                f"{max(round(size / COARSEST), 1) * COARSEST}."
            )
        strides = map_strides(encoder)
        if len({*strides}) > 1:
            raise ValueError(
                f"the encoder's maps have strides {', '.join(map(str, strides))}; detection makes "
                "its pyramid from maps of one stride, as of a Vim or a vision transformer."
            )
        dim, stride = encoder.embed_dim, strides[0]
        if encoder.grid(size, size) != (size // stride, size // stride):
            raise ValueError("the encoder's patches overlap; detection needs stride = patch_size.")
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

    def detect(
        self, images: Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections of `RCNN` in images (b, c, size, size), or in training its losses."""
        with self.grad_of(self.encoder):
            (last,) = self.encoder.forward_intermediates(
                images, 1, norm=True, intermediates_only=True
            )
        if not self.training:  # torchvision drops boxes whose score is NaN without a word
            require_finite(last, "the features", REMEDY)
        return self.detector(images, self.pyramid(last), targets)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        """Return the sum of the losses in training; in evaluation no loss, only preview images.

        Each loss is a mean over proposals, and all images have the same weight: accumulation and
        data parallelism average over micro-batches, as in ViTDet.
        """
        images, targets = batch["image"], batch["objects"]
        count = len(images)
        if not self.training:
            detections, _ = self.detect(images)
            no_loss = images.new_zeros(())
            return StepOutput(no_loss, count, {}, lambda: self._draw(images, targets, detections))
        _, losses = self.detect(images, targets)
        return StepOutput(
            torch.stack(list(losses.values())).sum() * count, count,
            {name.removeprefix("loss_"): loss * count for name, loss in losses.items()},
        )  # fmt: skip

    @torch.no_grad()
    def predict_image(self, image: Image.Image | np.ndarray) -> dict[str, np.ndarray]:
        """Detect the objects in an image of any size, or in bands (h, w, bands).

        Returns: ``boxes`` float32 (n, 4), left, top, right, bottom in pixels of the image turned
            upright by its EXIF orientation; ``labels`` int64 (n,), class numbers from 0;
            ``scores`` float32 (n,), descending; with masks also ``masks`` bool (n, h, w), True =
            object.
        Raises: BadImage for images that `clean_image` rejects.
        """
        device = next(self.parameters()).device
        pixels = self.pixels.read(image)  # upright
        rows, columns = pixels.shape[1:]
        canvas, (height, width) = on_canvas(self.pixels, pixels, self.size)
        objects = {k: v.cpu() for k, v in self.detect(canvas[None].to(device))[0][0].items()}
        factors = torch.tensor([columns / width, rows / height] * 2)
        whole = objects["boxes"].float() * factors
        sides = torch.tensor([columns, rows] * 2)
        boxes = torch.minimum(whole.clamp(min=0), sides)
        inside = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)  # the others lie outside the image
        result = {
            "boxes": boxes[inside].numpy(),
            "labels": (objects["labels"][inside] - 1).numpy(),
            "scores": objects["scores"][inside].float().numpy(),
        }
        if self.masks:
            masks = np.zeros((len(result["boxes"]), rows, columns), bool)
            # Use the unclipped boxes: a mask covers its whole box, also outside the image.
            likely, corners = objects["masks"][inside].float(), whole[inside]
            for i in range(len(masks)):  # one by one to save memory: the maps are float
                one = slice(i, i + 1)
                pasted = paste_masks_in_image(likely[one], corners[one], (rows, columns))
                masks[i] = pasted[0, 0].numpy() >= 0.5
            result["masks"] = masks
        return result

    def _draw(self, images: Tensor, targets: list[dict], detections: list[dict]) -> Tensor:
        """Return (b, 3, h, 2w) in [0, 1]: truth, prediction."""
        visible = 255 * denormalize(images, self.encoder.data_config)
        visible = visible.round().to(torch.uint8).cpu()
        rows = []
        for image, truth, objects in zip(visible, targets, detections, strict=True):
            sure = {
                k: v[objects["scores"] >= MIN_SCORE] for k, v in objects.items() if k != "masks"
            }
            panels = [
                overlay_objects(image, one["boxes"].cpu(), one["labels"].cpu() - 1, self.classes)
                for one in (truth, sure)
            ]
            rows.append(torch.cat(panels, 2))
        return torch.stack(rows) / 255

    def save(self, folder: str | os.PathLike, record: dict[str, Any] | None = None) -> None:
        """Write the encoder with `save_encoder`, and the detector next to it, for
        `load_detection`."""
        save_task(self, folder, FILE, record)


def load_detection(
    folder: str | os.PathLike, *, device: str | torch.device | None = None
) -> Detection:
    """Load the encoder and detector of a detection run, in eval mode.

    ``predict`` of an image, or of each in a list, returns `Detection.predict_image`; see
    `Predictor.predict`.

    Raises: FileNotFoundError for a folder without a detector; ValueError if it does not fit the
        encoder in the folder.
    """
    return load_task(Detection, folder, FILE, "detection", device)


def evaluate(model: Detection, data, folder: Path) -> tuple[dict[str, Any], DetectionMetrics]:
    """Evaluate a model on images with boxes: average precision.

    Writes ``results.json`` (for pycocotools' ``loadRes``, with the ids of the data),
    ``classes.csv`` and ``predictions.png`` (truth, prediction) to ``folder``.

    Returns: the metrics of `DetectionMetrics.compute` with the number of images and the
        skipped ones; and the scores.
    Raises: ValueError if no image can be read, or none has an object; ImportError without
        pycocotools.
    """
    scores = DetectionMetrics(data, masks=model.masks and data.has_outlines)
    skipped: list[str] = []
    rows = []
    for i, item, objects, draws in predictions(model, data, skipped):
        scores.add(i, objects)
        if draws:
            sure = {k: v[objects["scores"] >= MIN_SCORE] for k, v in objects.items()}
            rows.append((item["image"], item, sure))
    metrics = {"test": len(data) - len(skipped), **scores.compute(), "skipped": skipped}
    with optional_output("results.json or classes.csv"):
        scores.write(folder)
    with optional_output("predictions.png"):
        object_grid(rows, model.classes).save(folder / "predictions.png")
    return metrics, scores


def compare(scores: DetectionMetrics, train) -> dict[str, Any]:
    """Return the entries of metrics.json about baselines: there is none, because boxes that do not
    depend on the image have an average precision near 0."""
    return {
        "baselines": {},
        "summary": ["Detection has no trivial baseline: constant boxes have an AP near 0."],
    }
