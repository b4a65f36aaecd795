"""Semantic segmentation: an encoder with a head that classifies every pixel, and the loss.

    images -> encoder's maps after selected blocks -> neck -> head -> logits

The maps are the residual stream after the final norm, without class tokens. (Upstream's Vim-Ti
takes the mixers' outputs without a norm.)
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vim_ssl.checkpoints.task_models import load_task, save_task
from vim_ssl.data.images import BadImage, clean_image
from vim_ssl.data.labels import IGNORE
from vim_ssl.data.sources.geotiff import core_of, write_labels
from vim_ssl.data.transforms.dense import DensePixels
from vim_ssl.data.transforms.image import denormalize
from vim_ssl.metrics.segmentation import SegmentationMetrics
from vim_ssl.metrics.sentences import result_sentence
from vim_ssl.metrics.titles import RESULTS
from vim_ssl.metrics.volumes import VolumeMetrics
from vim_ssl.models.freezing import Freezable
from vim_ssl.models.heads import NORMS, FCNHead, FeatureUpsampling, LinearHead, UPerNet
from vim_ssl.models.protocol import Encoder
from vim_ssl.models.sliding_window import label_pixels
from vim_ssl.objectives.base import StepOutput
from vim_ssl.tasks.dense import DensePredictor, map_strides, predictions
from vim_ssl.utils.drawing import class_colours, mask_grid
from vim_ssl.utils.files import optional_output
from vim_ssl.utils.names import did_you_mean

HEADS = ("upernet", "linear")
FILE = "segmentation.safetensors"
MASKS_READ = 200  # training masks to find the most frequent class
AUXILIARY_LEVEL = 2  # the map at stride 16, as in the paper's configuration


class Segmentation(DensePredictor, Freezable):
    """An encoder and a segmentation head; as an objective, their loss.

    Args:
        encoder: any encoder; blocks above the last tap and the classification head are dropped.
        classes: class names, 2 to 255.
        head: "upernet" (with upsampled maps at strides 4 to 32) or "linear".
        taps: blocks whose maps are read, four for upernet; by default evenly spaced up to the last
            block: 5, 11, 17, 23 of 24. "linear" reads the last block by default.
        channels: width of UPerNet; 0: the encoder's width, as in the paper.
        norm: norm of the head, from `vim_ssl.models.heads.NORMS`.
        auxiliary: weight of the auxiliary head's loss (upernet only).
        dice: weight of the Dice loss, a mean over the classes present in the image.
        short_side, window, slide: for `predict`, in pixels: the short side to resize to (0: no
            resizing), the side of a window, and the stride of windows (0: two thirds of a side).
    Batches hold ``image`` (b, c, h, w), normalised, and ``mask`` (b, h, w) int64, 255 = ignored.
    Raises: ValueError for an unknown head or norm, taps that do not fit, or too few or too many
        classes.
    """

    task = "segmentation"

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str],
        *,
        head: str = "upernet",
        taps: Sequence[int] = (),
        channels: int = 0,
        norm: str = "batch",
        auxiliary: float = 0.4,
        dice: float = 0.0,
        short_side: int = 0,
        window: int = 512,
        slide: int = 0,
    ):
        super().__init__()
        for name, value, known in (("head", head, HEADS), ("norm", norm, NORMS)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown. {did_you_mean(value, known)}")
        if not 2 <= len(classes) <= IGNORE:
            raise ValueError(
                f"got {len(classes)} classes, such as {list(classes[:3])}; expected 2 to {IGNORE}."
            )
        if not 0 <= slide <= window:
            raise ValueError(f"slide {slide} leaves gaps between windows of {window} pixels.")
        encoder.grid(window, window)  # raises if the window is not a whole number of patches
        strides = map_strides(encoder)
        depth, staged = len(strides), len({*strides}) > 1  # a CNN has coarser maps in later stages
        if not taps:
            quarters = [max(round(depth * k / 4) - 1, 0) for k in (1, 2, 3, 4)]
            taps = list(range(depth - 4, depth)) if staged else quarters
            taps = taps if head == "upernet" else taps[-1:]
        if head == "upernet" and len(taps) != 4:
            raise ValueError(f"taps are {list(taps)}; upernet needs exactly four blocks.")
        if staged and len(taps) > 1 and head != "upernet":
            raise ValueError(
                f"taps {list(taps)} have maps of different sizes; head {head} takes one."
            )
        self.taps = encoder.prune_intermediate_layers(list(taps))
        self.encoder, self.classes, self.dice = encoder, list(classes), dice
        widths = [int(encoder.feature_info[tap]["num_chs"]) for tap in self.taps]
        self.auxiliary_weight = auxiliary if head == "upernet" else 0.0
        self.auxiliary: FCNHead | None = None
        self.neck: nn.Module = nn.Identity()
        self.head: nn.Module
        if head == "upernet":
            make = NORMS[norm]
            if not staged:  # a CNN already has maps of strides 4, 8, 16 and 32
                self.neck = FeatureUpsampling(widths[0], strides[0], make)
            self.head = UPerNet(widths, len(classes), channels or widths[-1], norm=make)
            if auxiliary:
                self.auxiliary = FCNHead(widths[AUXILIARY_LEVEL], len(classes), norm=make)
        else:
            self.head = LinearHead(widths, len(classes))
        self.window, self.slide = window, slide or round(2 * window / 3)
        self.pixels = DensePixels(encoder.data_config, short_side)
        self.config: dict[str, Any] = {
            "classes": self.classes, "head": head, "taps": self.taps, "channels": channels,
            "norm": norm, "auxiliary": auxiliary, "dice": dice, "short_side": short_side,
            "window": window, "slide": slide,
        }  # fmt: skip

    def maps(self, images: Tensor) -> list[Tensor]:
        """(b, c, h, w) -> the input of the head: maps (b, d, ·, ·), finest first."""
        blocks = sorted(set(self.taps))
        with self.grad_of(self.encoder):
            maps = self.encoder.forward_intermediates(
                images, blocks, norm=True, intermediates_only=True
            )
        by_block = dict(zip(blocks, maps, strict=True))
        return self.neck([by_block[tap] for tap in self.taps])

    def logits(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, classes, ·, ·), float32, at the resolution of the head."""
        return self.head(self.maps(images)).float()

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the loss, averaged over labelled pixels: an image's weight is its fraction of
        labelled pixels."""
        truth = batch["mask"]
        maps = self.maps(batch["image"])
        logits = _resize_to(truth, self.head(maps))
        loss = self._loss(logits, truth)
        if self.training and self.auxiliary is not None:
            extra = _resize_to(truth, self.auxiliary(maps[AUXILIARY_LEVEL]))
            loss = loss + self.auxiliary_weight * self._loss(extra, truth)
        guess, labelled = logits.argmax(1), truth != IGNORE
        pixels = truth[0].numel()  # so that the weight is roughly the number of images
        hits = (guess == truth).sum() / pixels
        return StepOutput(
            loss, labelled.sum().item() / pixels, {"pixel_accuracy": 100 * hits},
            lambda: self._draw(batch["image"], truth, guess),
        )  # fmt: skip

    def predict_image(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Predict the class of every pixel of an image of any size, or of bands (h, w, bands).

        Memory beyond the image itself does not grow with its size; see `label_pixels`.

        Returns: class numbers, uint8 (h, w), of the image turned upright by its EXIF orientation.
        Raises: BadImage for images that `clean_image` rejects.
        """
        device = next(self.parameters()).device
        if isinstance(image, np.ndarray):
            size = image.shape[:2]
        else:
            image = clean_image(image)  # make it upright before reading its size
            size = image.height, image.width
        labels = label_pixels(
            self.logits, self.pixels.read_resized(image).to(device), size,
            classes=len(self.classes), window=self.window, stride=self.slide,
            prepare=self.pixels.normalise, dtype=torch.uint8,
        )  # fmt: skip
        return labels.cpu().numpy()

    def _loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the sum over labelled pixels divided by the number of pixels of one image."""
        loss = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum")
        if self.dice:
            labelled = (truth != IGNORE).flatten(1).sum(1)  # (b,)
            loss = loss + self.dice * (dice_loss(logits, truth) * labelled).sum()
        return loss / truth[0].numel()

    def _draw(self, images: Tensor, truth: Tensor, guess: Tensor) -> Tensor:
        """Return (b, 3, h, 3w) in [0, 1]: image, truth, prediction."""
        colours = class_colours(len(self.classes)).to(images.device)
        visible = denormalize(images, self.encoder.data_config).expand(-1, 3, -1, -1)
        index = truth.clamp(max=len(self.classes))  # the last colour means ignored
        painted = [colours[x].permute(0, 3, 1, 2) / 255 for x in (index, guess)]
        return torch.cat([visible, *painted], 3)

    def save(self, folder: str | os.PathLike, record: dict[str, Any] | None = None) -> None:
        """Write the encoder with `save_encoder`, and the head next to it, for
        `load_segmentation`."""
        save_task(self, folder, FILE, record)


def load_segmentation(
    folder: str | os.PathLike, *, device: str | torch.device | None = None
) -> Segmentation:
    """Load the encoder and head of a segmentation run, in eval mode.

    ``predict`` of an image, or of each in a list, returns the class number of every pixel, uint8
    (h, w), of the image turned upright by its EXIF orientation; see `Predictor.predict`.

    Raises: FileNotFoundError for a folder without a segmentation head; ValueError if the head does
        not fit the encoder in the folder.
    """
    return load_task(Segmentation, folder, FILE, "segmentation", device)


def evaluate(model: Segmentation, data, folder: Path) -> tuple[dict[str, Any], SegmentationMetrics]:
    """Evaluate a model on images with masks, at the size of the masks.

    Writes ``classes.csv``, ``predictions.csv`` and ``predictions.png`` (image, truth, prediction)
    to ``folder``; for planes of volumes also ``volumes.csv``; for rasters also their predictions as
    georeferenced files in ``predictions/``.

    Returns: the metrics of `SegmentationMetrics.compute` with the number of images and the
        skipped ones, for planes also those of `VolumeMetrics.compute`; and the scores.
    Raises: ValueError if no image can be read, or none has a label.
    """
    scores = SegmentationMetrics(model.classes)
    volumes: VolumeMetrics | None = None
    skipped: list[str] = []
    rows = []
    for _, item, guess, draws in predictions(model, data, skipped):
        scores.add(item["id"], item["mask"], guess, item.get("group"))
        origin = item.get("meta", {})
        if "volume" in origin:
            volumes = volumes or VolumeMetrics(model.classes)
            volumes.add(origin, item["mask"], guess, item.get("group"))
        if "raster" in origin:
            path = folder / "predictions" / origin["name"]
            write_labels(
                path, origin["raster"], origin["core"], core_of(guess, origin), model.classes
            )
        if draws:
            rows.append((model.displayed(item["image"]), item["mask"], guess))
    metrics = {
        "test": len(data) - len(skipped), **scores.compute(), "skipped": skipped,
        "miou_ci_is": "middle 95 % of 1,000 bootstrap resamples of the images, or their groups; "
        "none of fewer than five, or if the resamples do not differ",
    }  # fmt: skip
    if volumes:
        metrics |= volumes.compute()
    with optional_output("the tables"):
        scores.write(folder)
        if volumes:
            volumes.write(folder)
    with optional_output("predictions.png"):
        colours = class_colours(len(model.classes)).numpy()
        mask_grid(rows, model.classes, colours).save(folder / "predictions.png")
    return metrics, scores


def most_frequent_class(train, classes: int) -> int:
    """Return the class with the most pixels in up to `MASKS_READ` evenly spaced training masks."""
    pixels = np.zeros(IGNORE + 1, np.int64)
    for i in range(0, len(train), -(-len(train) // MASKS_READ)):
        with contextlib.suppress(BadImage):
            pixels += np.bincount(train[i]["mask"].ravel(), minlength=IGNORE + 1)
    return int(pixels[:classes].argmax())


def compare(scores: SegmentationMetrics, train) -> dict[str, Any]:
    """Compare with the most frequent class of the training masks, predicted for every pixel.

    Returns: entries of metrics.json: ``baselines``, name -> ``miou`` and ``aacc`` with their
        intervals; and ``summary``, the sentence that compares.
    """
    index = most_frequent_class(train, len(scores.classes))
    name = f"predicting {scores.classes[index]} everywhere"
    other = scores.constant(index)
    values = {key: value for key, value in other.compute().items() if key[:4] in ("miou", "aacc")}
    gain = scores.gain(name, other)
    sentence = result_sentence(RESULTS["miou"].text, scores.miou.value, [gain])
    return {"baselines": {name: values}, "summary": [sentence]}


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return 1 - soft Dice, averaged over the classes in an image; 0 if it has none.

    Args:
        logits: (b, classes, h, w) float32.
        truth: (b, h, w) int64; 255 = ignored.
    Returns: (b,)
    """
    classes = logits.shape[1]
    labelled = truth != IGNORE
    target = F.one_hot(truth.where(labelled, 0), classes).permute(0, 3, 1, 2) * labelled[:, None]
    predicted = logits.softmax(1) * labelled[:, None]
    overlap = (predicted * target).sum((2, 3))  # (b, classes)
    sizes = predicted.sum((2, 3)), target.sum((2, 3))
    present = sizes[1] > 0
    losses = (1 - 2 * overlap / (sizes[0] + sizes[1]).clamp(min=1e-6)) * present
    return losses.sum(1) / present.sum(1).clamp(min=1)


def _resize_to(mask: Tensor, logits: Tensor) -> Tensor:
    return F.interpolate(logits.float(), mask.shape[-2:], mode="bilinear", align_corners=False)
