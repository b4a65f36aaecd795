"""Predict new images with the fitted model of a run.

    python downstream/predict.py --data photos/                    # newest run with a task model
    python downstream/predict.py --encoder RUN --data photos/ --output classes.csv
    python downstream/predict.py --encoder RUN --data 'wds:shards/*.tar' --output classes.parquet
    python downstream/predict.py --encoder CLIP_RUN --data photos/ --classes cat dog "polar bear"
    python downstream/predict.py --encoder SEGMENTATION_RUN --data 'geotiff:scenes/' --output out
    python downstream/predict.py --encoder DETECTION_RUN --data photos/ --score 0.3 --output out
    python downstream/predict.py --encoder VIDEO_RUN --data clip.mp4

The run determines the output: classes as a table (.csv, .parquet or .jsonl); a folder of masks and
overlays, as GeoTIFF for rasters and NIfTI for volumes (`MaskWriter`); or a folder with a COCO file
and drawings (`BoxWriter`).

Data are a folder, a file, or any data spec; labels are not needed and not used. A path without a
scheme is read as the training data were, with the same bands, window or frames. All images are
predicted unless ``?split=`` names a split. Broken images are counted and named. After a kill the
same command resumes. For slides, ``--data`` is the folder that embed.py wrote.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vim_ssl import load_model
from vim_ssl.cli import guarded
from vim_ssl.data.bands import check_bands
from vim_ssl.data.inputs import open_new
from vim_ssl.models.protocol import Encoder
from vim_ssl.objectives.zero_shot import TEMPLATES, class_names
from vim_ssl.tasks.detection import MIN_SCORE
from vim_ssl.tasks.models import newest_model
from vim_ssl.tasks.outputs import BoxWriter, MaskWriter
from vim_ssl.tasks.prediction import Predicted, Writer, predict_data
from vim_ssl.tasks.slides import read_slides
from vim_ssl.tasks.tables import FORMATS, TableWriter
from vim_ssl.training.run import task_folder
from vim_ssl.utils.config import check_between, opt, parse
from vim_ssl.utils.distributed import pick_device
from vim_ssl.utils.files import read_text

LISTED = 20  # classes in the printed summary
TABLE = "predictions.csv"


@dataclass
class Config:
    """Predict new images with the model of a run."""

    encoder: str = opt("", "run with a task model; default: the newest")
    data: str = opt("", "images to predict: a folder, a file or a data spec")
    output: str = opt("", "file or folder to write; default: in the run")
    top_k: int = opt(3, "tables: classes with name and probability")
    probabilities: bool = opt(False, "tables: a column per class also for more than 20 classes")
    threshold: float = opt(0.5, "multi-label runs: minimum probability of a label")
    classes: tuple[str, ...] = opt(
        (), "image-text runs: class names, or a file with one per line; default: the data's names"
    )
    texts: tuple[str, ...] = opt((), "image-text runs: whole sentences instead of class names")
    templates: tuple[str, ...] = opt(
        TEMPLATES, "image-text runs: sentences about a class; {} is its name"
    )
    overlays: bool = opt(True, "segmentation, detection: also draw each image with the result")
    score: float = opt(MIN_SCORE, "detection: minimum score of objects that are drawn and counted")
    batch_size: int = opt(32, "images per batch")
    workers: int = opt(0, "data loading processes")
    device: str = opt("", "cpu, cuda …; default: cuda if available")

    def __post_init__(self):
        check_between(self, 1, math.inf, "batch_size")
        check_between(self, 0, 1, "score")


def run(config: Config) -> dict[str, Any]:
    if not config.data:
        raise ValueError("data is empty; give the images to predict: --data FOLDER_OR_FILE.")
    source = config.encoder or str(newest_model())
    model = load_model(source, device=pick_device(config.device))
    data = open_for(model, config.data)
    if model.task == "clip":
        model = name_classes(model, config, data)
    elif config.classes or config.texts:
        raise ValueError(f"{source} has its classes ({_some(model.classes)}); omit --classes.")
    writer = build_writer(model, config, source, data)
    print(f"Model {source}: {model.task}, {len(model.classes):,} classes ({_some(model.classes)})",
          flush=True)  # fmt: skip
    predicted = predict_data(
        model, data, writer, batch_size=config.batch_size, workers=config.workers
    )
    print(summary(predicted))
    if model.task == "classification":
        one = "clip.mp4" if predicted.unit == "videos" else "photo.jpg"
        print(f"From Python: vim_ssl.load_model({source!r}).predict({one!r})")
    return {
        "task": "predict", "output": str(predicted.output), "images": predicted.images,
        "counts": predicted.counts, "skipped": predicted.skipped,
    }  # fmt: skip


def open_for(model: Any, spec: str) -> Any:
    """Open the data and check that the model can read them.

    Raises: ValueError if it cannot; the errors of `open_new`.
    """
    if model.task == "slide":
        if not Path(spec).is_dir():
            raise ValueError(
                "the run classifies slides by the features of their tiles; expected a folder of "
                f"features, got {spec}. Write one with vim-ssl embed --encoder ENCODER "
                "--data slide:SLIDES --output FEATURES, with the encoder of the training slides."
            )
        return read_slides(spec, model.made_of)
    # A model that resizes by the short side has to read whole rasters, at the scale of training.
    overlap = model.window if model.task == "segmentation" and not model.pixels.short_side else 0
    tiles = model.task == "classification"
    data = open_new(spec, model.trained_on, tiles=tiles, overlap=overlap)
    expected = "video" if getattr(model.encoder, "reads_clips", False) else "image"
    if data.kind != expected:
        raise ValueError(
            f"{data.name} has {data.kind}s, but the run was trained on {expected}s; give "
            f"{'video:FOLDER' if expected == 'video' else 'images'}, or another --encoder."
        )
    if isinstance(model.encoder, Encoder):
        model.encoder.for_data(data)
        check_bands(model.encoder, data)
    return data


def name_classes(clip: Any, config: Config, data: Any) -> Any:
    """Return the image-text model with the classes of the config, else those of the data."""
    classes = list(config.classes)
    if len(classes) == 1 and Path(classes[0]).is_file():
        lines = read_text(Path(classes[0])).splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    if not (classes or config.texts):
        if not data.classes:
            raise ValueError(
                "an image-text run needs the classes to choose from: --classes cat dog, "
                "--classes FILE with one per line, or --texts 'a photo of a cat' …"
            )
        classes = class_names(data, "")
    return clip.classifier(classes, texts=config.texts, templates=config.templates)


def build_writer(model: Any, config: Config, source: str, data: Any) -> Writer:
    """Return the writer for the model's task and the output.

    Raises: ValueError for a file as the output of masks or objects.
    """
    folder = task_folder("predict", source, config.data)
    if model.task in ("segmentation", "detection"):
        output = Path(config.output or folder)
        if output.is_file() or output.suffix in FORMATS:
            raise ValueError(
                f"--output is {output}, but {model.task} writes a folder; give a folder."
            )
        if model.task == "segmentation":
            return MaskWriter(output, model, data, overlays=config.overlays)
        return BoxWriter(output, model, data, score=config.score, drawings=config.overlays)
    output = Path(config.output or folder / TABLE)
    if output.is_dir() or not output.suffix:
        output = output / TABLE
    return TableWriter(
        output, model, top_k=config.top_k, all_classes=config.probabilities,
        threshold=config.threshold,
    )  # fmt: skip


def summary(predicted: Predicted) -> str:
    """Return a table of the counts per class, the skipped images, and the written file."""
    total: float = predicted.images  # with several labels an image counts for each of them
    if predicted.unit in (MaskWriter.unit, BoxWriter.unit):
        total = sum(predicted.counts.values())
    most = sorted(predicted.counts.items(), key=lambda item: -item[1])
    width = max([len(name) for name, _ in most[:LISTED]] + [5])
    lines = [f"{'class':{width}}  {predicted.unit:>10}"]
    lines += [f"{name:{width}}  {n:10,} {100 * n / total:6.1f} %" for name, n in most[:LISTED]]
    if len(most) > LISTED:
        lines += [f"and {len(most) - LISTED:,} more classes"]
    if skipped := predicted.skipped:
        reasons = "; ".join(skipped[:3]) + (" …" if len(skipped) > 3 else "")
        lines += [f"{len(skipped):,} could not be read: {reasons}"]
    lines += [f"Written: {predicted.images:,} predictions in {predicted.output}"]
    return "\n".join(lines)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
