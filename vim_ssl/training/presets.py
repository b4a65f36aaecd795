"""Choose a preset for the user's images and machine, for a recipe that was given none.

no ``data``                  the recipe's demo
a GPU                        its preset for 224-px images
no GPU, images below 48 px   its preset for 32-px images
no GPU                       its preset for 64-px images

The choice needs the sizes of a few images, read from their headers. If the data cannot be opened,
it is the last one, and the recipe reports the error when it opens the data.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vim_ssl.data.clips import still
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import image_size
from vim_ssl.data.loading.streamed import ImageStream, is_remote
from vim_ssl.training.schedule import fitting_batch
from vim_ssl.utils.config import Choice

SAMPLED = 9  # images whose sizes are read
SMALL = 48  # pixels; a 64-px input would enlarge images below this
HOW = "--preset NAME chooses another; --help lists them."


@dataclass(frozen=True)
class Defaults:
    """The default presets of a recipe.

    Attributes:
        demo: without data.
        gpu: for own data with a GPU.
        cpu, cpu_small: for own data without a GPU: for images of ``SMALL`` px or more, and below.
        presets: the recipe's presets by name.
        open: opens the training data for the given values.
    """

    demo: str
    gpu: str
    cpu: str
    cpu_small: str
    presets: dict[str, Callable[[], Any]]
    open: Callable[[dict[str, Any]], ImageData | ImageStream]

    def __call__(self, given: dict[str, Any]) -> Choice:
        """Return the preset for the given values."""
        if "data" not in given:
            reason = (
                f"Preset {self.demo}, as no --data is given; with --data the default is {self.gpu} "
                f"on a GPU, otherwise {self.cpu}, or {self.cpu_small} for images below {SMALL} px."
            )
            return Choice(self.demo, reason)
        if has_gpu():
            return Choice(self.gpu, f"Preset {self.gpu}, as there is a GPU; {HOW}")
        return self.for_cpu(given)

    def for_cpu(self, given: dict[str, Any]) -> Choice:
        """Return the preset for the data of the given values on a machine without a GPU."""
        try:
            data = self.open(given)
        except Exception:  # whatever it is, the recipe opens the data again and reports it
            return Choice(self.cpu)
        side = short_side(data)
        name = self.cpu_small if side is not None and side < SMALL else self.cpu
        reason = f"Preset {name}, as there is no GPU"
        if side is not None:
            reason += f" and the images are about {side} px (shorter side)"
        changes = self._changes(data, self.presets[name](), given)
        if "batch_size" in changes and "batch_size" not in given:
            reason += f", with a batch of {changes['batch_size']}"
        return Choice(name, f"{reason}; {HOW}", changes)

    def _changes(
        self, data: ImageData | ImageStream, preset: Any, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the settings that fit a preset to the data."""
        changes: dict[str, Any] = {}
        if "encoder" in given:  # the preset's arguments are for the preset's encoder
            changes["model_args"] = {}
        if data.is_stream:
            return changes | {"workers": min(preset.workers, len(data.shards))}
        batch = preset.batch_size
        if data.kind == "video":  # about as many tokens as a batch of images
            tubelet = given.get("tubelet", getattr(preset, "tubelet", 1))
            batch = max(batch * tubelet // data.sampling.frames, 2)
        world = int(os.environ.get("WORLD_SIZE", 1))
        batch = fitting_batch(max(len(data) // world, 1), batch)
        return changes if batch == preset.batch_size else changes | {"batch_size": batch}


def has_gpu() -> bool:
    """True if accelerate will train on a CUDA device."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not forced


def short_side(data: ImageData | ImageStream) -> int | None:
    """Return the median shorter side of a few images in pixels; None if no size can be read."""
    sides = sorted(min(size) for size in _sizes(data))
    return sides[len(sides) // 2] if sides else None


def _sizes(data: ImageData | ImageStream) -> Iterator[tuple[int, ...]]:
    """Yield height and width, in either order, of a few images spread evenly; skip broken ones."""
    if data.is_stream:
        if data.shards and not is_remote(data.shards[0].name):
            for _, record in zip(range(SAMPLED), data.records(0), strict=False):
                with contextlib.suppress(ValueError):
                    yield image_size(record["image"])
        return
    count = min(SAMPLED, len(data))
    for i in range(count):
        with contextlib.suppress(ValueError):  # BadImage
            yield _size(data, i * len(data) // count)


def _size(data: ImageData, index: int) -> tuple[int, ...]:
    raw = data.raw(index)
    if isinstance(raw, np.ndarray):
        return raw.shape[:2]
    if isinstance(raw, Image.Image):
        return raw.size
    if data.kind == "image":
        return image_size(raw)
    return still(data[index]["image"]).size
