"""Load the fitted model of any run, to predict new images.

>>> model = vim_ssl.load_model("runs/finetune-…")
>>> model.predict("photo.jpg").name
>>> [p.top(3) for p in model.predict(["a.jpg", "b.jpg"])]

file in the run           model
segmentation.safetensors  `Segmentation`: class number of every pixel
detection.safetensors     `Detection`: boxes, classes, scores, masks
clip_config.json          `Clip`: classes by name
slide.safetensors         `SlideClassifier`: classes of whole slides
an encoder with a head    `Classifier`, or `VideoClassifier`
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vim_ssl.checkpoints.loading import load_encoder, made_by, stored_classes
from vim_ssl.data.clips import LoadedVideo, Sampling, Video
from vim_ssl.data.spec import parse_spec
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.extract import encode_views
from vim_ssl.metrics.classification import outputs, predicted, probabilities
from vim_ssl.models.predictor import ClassPrediction, Predictor
from vim_ssl.models.presets import PRESETS
from vim_ssl.models.protocol import Encoder
from vim_ssl.models.video import VideoEncoder
from vim_ssl.objectives.clip import load_clip
from vim_ssl.objectives.zero_shot import imagenet_names
from vim_ssl.tasks import detection, segmentation, slides
from vim_ssl.training.run import RUNS, newest_of
from vim_ssl.utils.files import read_object

# File of a run → the function that loads its model.
LOADERS: dict[str, Callable[..., Any]] = {
    segmentation.FILE: segmentation.load_segmentation,
    detection.FILE: detection.load_detection,
    "clip_config.json": load_clip,
    slides.FILE: slides.load_slide,
}
IMAGENET_CLASSES = 1000


def load_model(source: str | os.PathLike, *, device: str | torch.device | None = None) -> Any:
    """Load the fitted task model of a run, in eval mode.

    Args:
        source: a run directory; for classification also a weights file or Hub id, as in
            `load_encoder`.
        device: device of the model.
    Returns: a model with ``task``, ``classes``, ``encoder``, ``transform`` and ``predict``; see
        `Predictor.predict`.
    Raises: ValueError for a run without a head; the errors of `load_encoder`.
    """
    for file, load in LOADERS.items():
        if (Path(source) / file).is_file():
            return load(source, device=device)
    return load_classifier(source, device=device)


def load_classifier(
    source: str | os.PathLike, *, device: str | torch.device | None = None
) -> "Classifier":
    """Load an encoder with its classification head and class names, in eval mode.

    Args:
        source: a run of finetune, video or supervised_pretrain, its weights file, or a released
            checkpoint; see `load_encoder`.
    Raises: ValueError for an encoder without a head.
    """
    if other := next((file for file in LOADERS if (Path(source) / file).is_file()), None):
        raise ValueError(f"{source} has {other}, so it is no classifier; use vim_ssl.load_model.")
    if source in PRESETS or not stored_classes(source):
        raise ValueError(
            f"{source} has no head that predicts classes, as after pretraining without labels. "
            f"Fine-tune it with vim-ssl finetune --encoder {source} --data LABELLED_IMAGES, and "
            "predict with that run. To evaluate its features as they are: vim-ssl linear-probe."
        )
    encoder = load_encoder(source, num_classes=None, device=device)
    record = made_by(source)
    classes = record.get("classes")
    targets = record.get("targets") or _setting(source, "targets")
    if classes is None:
        classes = _numbered(encoder.num_classes, targets, released=not record)
    if targets is None:
        targets = "ordinal" if encoder.num_classes == len(classes) - 1 else "class"
    if outputs(targets, len(classes)) != encoder.num_classes:
        raise ValueError(
            f"{source} has a head of {encoder.num_classes} outputs, which does not fit its "
            f"{len(classes)} classes ({targets})."
        )
    make = VideoClassifier if encoder.reads_clips else Classifier
    return make(encoder, classes, targets, record.get("data", "")).eval()


def newest_model(root: Path = RUNS) -> Path:
    """Return the run under ``root`` with a task model that was written last. If it is unfinished,
    this is printed.

    Raises: FileNotFoundError if there is none.
    """
    files = [path for file in LOADERS for path in root.glob(f"*/{file}")]
    for path in root.glob("*/encoder.json"):
        with suppress(ValueError, OSError):  # a damaged file of another run
            config = read_object(path, "an encoder").get("config")
            if isinstance(config, dict) and config.get("num_classes"):
                files.append(path)
    if not files:
        raise FileNotFoundError(
            f"No run with a task model under {root.resolve()}; train one with vim-ssl finetune, "
            "segmentation, detection, video, slide or clip-pretrain, or name one with --encoder."
        )
    return newest_of(files)


def _setting(source: str | os.PathLike, key: str) -> Any:
    """Return a setting of a run, or None."""
    path = Path(source)
    file = (path if path.is_dir() else path.parent) / "config.json"
    return read_object(file, "the settings of a run").get(key) if file.is_file() else None


def _numbered(outputs: int, targets: str | None, released: bool) -> list[str]:
    """Return class names for a head whose names are not stored: those of ImageNet for a released
    checkpoint, otherwise numbers."""
    if released and outputs == IMAGENET_CLASSES:
        return imagenet_names()
    return [str(i) for i in range(outputs + (targets == "ordinal"))]


class Classifier(Predictor, nn.Module):
    """An encoder with a classification head, and the names of its classes.

    ``predict`` returns a `ClassPrediction` per image.

    Args:
        encoder: encoder with a head; see `outputs`.
        classes: class names.
        targets: "class", "multi-label" or "ordinal".
        trained_on: spec of the training data.
    """

    task, batched = "classification", True

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str],
        targets: str = "class",
        trained_on: str = "",
    ):
        super().__init__()
        self.encoder, self.classes, self.targets = encoder, list(classes), targets
        self.trained_on, self.transform = trained_on, create_transform(encoder)

    @property
    def config(self) -> dict[str, Any]:
        return {**self.encoder.config, "targets": self.targets}

    def prepare(self, image: Any) -> Tensor:
        return self.transform(image)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, outputs) of normalised images (b, c, h, w), or clips (b, c, t, h, w) or
        (b, clips, c, t, h, w), of which the mean is taken."""
        return encode_views(self.encoder, images)

    @torch.no_grad()
    def predict_prepared(self, inputs: Sequence[Tensor]) -> list[ClassPrediction]:
        images = torch.stack(list(inputs)).to(next(self.parameters()).device)
        logits = self(images).float().cpu()
        rows = probabilities(logits, self.targets).numpy()
        several = self.targets == "multi-label"
        chosen = rows.argmax(1) if several else predicted(logits, self.targets)
        return [
            ClassPrediction(int(index), row, self.classes, self.targets)
            for index, row in zip(chosen, rows, strict=True)
        ]


class VideoClassifier(Classifier):
    """A `Classifier` of videos.

    ``predict`` takes the path of a video or of a folder of frames, frames as an array (t, h, w, 3)
    or a list of images, a `Video`, or a list of these. Frames are sampled as in training.
    """

    @property
    def sampling(self) -> Sampling:
        trained = parse_spec(self.trained_on if self.trained_on.startswith("video:") else "video:x")
        frames = trained.frames or cast(VideoEncoder, self.encoder).frames
        return Sampling(frames, trained.fps, trained.clips or 1)

    def read(self, x: Any) -> list[Any] | None:
        return None if _are_frames(x) else super().read(x)

    def load(self, x: Any) -> Video:
        if isinstance(x, Video):
            return x
        if _are_frames(x):
            return LoadedVideo(list(x), self.sampling)
        if not isinstance(x, str | Path):
            raise TypeError(
                "expected a video: a path, frames (t, h, w, 3) or a list of images, got "
                f"{type(x).__name__}."
            )
        if not Path(x).expanduser().exists():
            raise FileNotFoundError(f"There is no video {str(x)!r} (in {Path.cwd()}).")
        return Video(Path(x).expanduser(), self.sampling)


def _are_frames(x: Any) -> bool:
    """Whether ``x`` is one video in memory: (t, h, w, 3), or a list of images."""
    if isinstance(x, np.ndarray):
        return x.ndim == 4
    first = x[0] if isinstance(x, list | tuple) and x else None
    return isinstance(first, Image.Image) or (isinstance(first, np.ndarray) and first.ndim < 4)
