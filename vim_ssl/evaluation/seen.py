"""What an encoder has seen of the images that it is evaluated on, from the record of its trainings.

trainings_of(source)           the trainings that weights went through
exposure(trainings, test, …)   how many test images they used, and sentences that say so
part_to_evaluate(data, …)      the images that a trained model may be evaluated on
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.checkpoints.files import WEIGHT_SUFFIXES
from vim_ssl.checkpoints.loading import made_by
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.identity import (
    PIXELS,
    UNKNOWN,
    Seen,
    TrainingRecord,
    compare,
    content_keys,
    how_to_compare,
)
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.spec import canonical_split, parse_spec, same_data
from vim_ssl.models.presets import PRESETS
from vim_ssl.training.run import pretrained_on, trained_on
from vim_ssl.utils.files import read_object
from vim_ssl.utils.names import plural

WITHOUT_LABELS = ("mim_pretrain", "clip_pretrain")  # recipes; captions are no labels
CLIP = "clip_config.json"
RECORD_UP_TO = 2**20  # bytes of trainings in the record of embeddings, of 130,000 images


def trainings_of(source: str | Path) -> list[TrainingRecord]:
    """Return the trainings that the weights of ``source`` went through, the last one last.

    A run of an earlier version has one without its images; a preset and a released file have none,
    and timm's weights none that is recorded, unless they are the file of a run.

    Raises: ValueError for a damaged record; the errors of `load_encoder`.
    """
    foreign = str(source).endswith(WEIGHT_SUFFIXES[1:]) and Path(source).exists()
    if foreign or source in PRESETS:
        return []
    clip = Path(source) / CLIP
    if clip.is_file():
        record = read_object(clip, "the settings of an image-text model").get("made_by") or {}
    else:
        record = made_by(source)
    if entries := record.get("trainings"):
        return [TrainingRecord.of_record(entry) for entry in entries]
    if "recipe" in record and record.get("data"):
        recipe = str(record["recipe"])
        return [TrainingRecord(recipe, str(record["data"]), recipe not in WITHOUT_LABELS)]
    return []


@dataclass
class Exposure:
    """What an encoder's trainings used of ``n`` test images, in numbers of images.

    Attributes:
        labels: their labels, masks or boxes were learnt.
        pixels: their pixels were, with or without labels.
        groups: not used, but other images of their groups were.
        copies: an exact copy is among the training images.
        left_out: neither trained on nor held out, or in groups that were trained on; not evaluated.
        uncompared: in memory, while a training is recorded by the bytes of its files.
        unrecorded: trainings that do not record their images, such as on a stream.
    """

    n: int
    labels: int = 0
    pixels: int = 0
    groups: int = 0
    copies: int = 0
    left_out: int = 0
    uncompared: int = 0
    unrecorded: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, seen: Seen, among: np.ndarray | None = None) -> "Exposure":
        """Count what was seen, among the images where a bool array (n,) is True."""
        rows = np.ones(len(seen.labels), bool) if among is None else among
        return cls(
            n=int(rows.sum()), labels=int(seen.labels[rows].sum()),
            pixels=int(seen.pixels[rows].sum()), groups=int(seen.by_group[rows].sum()),
            copies=int(seen.copies[rows].sum()), uncompared=int(seen.uncompared[rows].sum()),
            unrecorded=list(dict.fromkeys(map(_named, seen.unrecorded))),
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Return the entry ``seen`` of metrics.json."""
        return asdict(self)

    def remarks(self, encoder: str = "The encoder") -> list[str]:
        """Return what a reader of the results must know, as sentences; often nothing."""
        unlabelled, of_test = self.pixels - self.labels, f"of these {self.n:,} test images"
        which = "these test images" if unlabelled == self.n else f"{unlabelled:,} {of_test}"
        sentences = (
            (self.labels, f"{encoder} was trained with the labels of {self.labels:,} {of_test}: "
             "this is no test on new images."),
            (self.groups, f"{encoder} was trained on other images of the groups of "
             f"{self.groups:,} {of_test}."),
            (unlabelled, f"Pretraining also read {which}, without their labels."),
            (self.copies, f"{self.copies:,} {of_test} have exact copies among the training "
             "images; ?group=COLUMN keeps copies together."),
            (self.left_out, f"{plural(self.left_out, 'image')} of the data neither trained on nor "
             "held out, or in groups that were trained on: not evaluated."),
            (self.uncompared, f"{self.uncompared:,} {of_test} are in memory and could not be "
             "compared with training images that are recorded by the bytes of their files; "
             "evaluate files."),
            (len(self.unrecorded), "It is not recorded which images were trained on by "
             f"{', '.join(self.unrecorded)}; test images may be among them."),
        )  # fmt: skip
        return [sentence for count, sentence in sentences if count]


def exposure(
    trainings: Sequence[TrainingRecord], test: ImageData, train: ImageData, *, source: str,
    spec: str, split: str,
) -> Exposure:  # fmt: skip
    """Count what earlier trainings used of the test images, and their copies in ``train``.

    Args:
        source, spec, split: if the last training has no record (it ended early, read a stream, or
            is of an earlier version), arguments of `pretrained_on`.
    """
    seen = compare(test, trainings)
    read_all = _reads_all_by_spec(
        seen, trainings, source, spec, lambda: pretrained_on(source, spec, split)
    )
    result = Exposure.of(seen)
    if read_all:
        result.pixels = result.n
    by = how_to_compare(train, test)
    keys, tested = (content_keys(data, by).images for data in (train, test))
    result.copies = int((np.isin(tested, keys) & (tested != UNKNOWN)).sum())
    return result


def exposure_of_pairs(source: str | Path, spec: str, data: ImageData) -> Exposure:
    """Count the images that an image-text model was trained on: by content, or for a run that does
    not record its images by the data spec, all or none."""
    trainings = trainings_of(source)
    seen = compare(data, trainings)
    held_out = canonical_split(data.split) in ("test", "validation")
    read_all = _reads_all_by_spec(seen, trainings, source, spec, lambda: not held_out)
    result = Exposure.of(seen)
    if read_all:
        result.pixels = result.n
    return result


def _reads_all_by_spec(
    seen: Seen, trainings: Sequence[TrainingRecord], source: str | Path, spec: str,
    reads_split: Callable[[], bool],
) -> bool:  # fmt: skip
    """Whether the last training, without labels and without a record, read all test images, as the
    specs say. Other unrecorded trainings, and one on other data, stay in ``seen.unrecorded``.

    Args:
        spec: the data that are tested on; "" for those of the run.
        reads_split: whether a training on the same data read the test split.
    """
    last = trainings[-1] if trainings else None
    if last is not None and (last.by or last.labels):
        return False
    try:
        trained = trained_on(source)
        same = same_data(trained, spec or trained)
    except ValueError:  # weights without a run
        return False
    if same:
        seen.unrecorded = [training for training in seen.unrecorded if training is not last]
    return same and reads_split()


def _named(training: TrainingRecord) -> str:
    return f"{training.recipe} on {training.data}" + ("" if training.labels else " without labels")


def labels_seen(source: str, test: ImageData) -> list[str]:
    """Return remarks on a further encoder that is compared on the same test images."""
    seen = Exposure.of(compare(test, trainings_of(source)))
    return Exposure(
        seen.n, seen.labels, seen.labels, seen.groups, uncompared=seen.uncompared,
        unrecorded=[f"{training} ({source})" for training in seen.unrecorded],
    ).remarks(source)  # fmt: skip


def learnt_by_encoder(source: str, data: ImageData | ImageStream) -> dict[str, Any]:
    """Return what a record of embeddings says of their encoder: its ``trainings``, and if they can
    be compared with the embedded images within seconds, ``seen``; see `remarks_on_features`.

    Images of trainings are left out above `RECORD_UP_TO` bytes.
    """
    trainings = trainings_of(source)
    entries = [training.record() for training in trainings]
    if len(json.dumps(entries)) > RECORD_UP_TO:
        entries = [{key: one[key] for key in ("recipe", "data", "labels")} for one in entries]
    if data.is_stream or how_to_compare(data) != PIXELS:
        return {"trainings": entries}
    return {"trainings": entries, "seen": Exposure.of(compare(data, trainings)).record()}


def remarks_on_features(folder: str | Path) -> list[str]:
    """Return remarks on the encoder of embeddings, on some of which a classifier is tested."""
    record = read_object(Path(folder) / "record.json", "the record of embeddings")
    encoder, tested = f"The encoder of {folder}", "test images may be among them."
    if (entries := record.get("trainings")) is None:
        return [f"It is not recorded what the encoder of {folder} was trained on."]
    trainings = [TrainingRecord.of_record(entry) for entry in entries]
    if (seen := record.get("seen")) is None:
        names = ", ".join(map(_named, trainings))
        return [f"{encoder} was trained by {names}; {tested}"] if names else []
    labels, pixels, n = (int(seen.get(key, 0)) for key in ("labels", "pixels", "n"))
    unknown = ", ".join(map(str, seen.get("unrecorded", ())))
    sentences = (
        (labels, f"{encoder} was trained with the labels of {labels:,} of its {n:,} images; "),
        (pixels - labels, f"Pretraining of this encoder read {pixels - labels:,} of the {n:,} "
         f"images of {folder}, without their labels; "),
        (unknown, f"It is not recorded which images were trained on by {unknown}; "),
    )  # fmt: skip
    return [sentence + tested for count, sentence in sentences if count]


def is_resumed(config: Any) -> bool:
    """Whether the run that ``config`` describes has saved a model and goes on. Ask before it
    saves."""
    run = Path(config.output)
    has_weights = any((run / name).is_file() for name in ("encoder.json", CLIP))
    return bool(config.output) and config.resume == "auto" and has_weights


def earlier_trainings(config: Any, source: str) -> list[TrainingRecord]:
    """Return the trainings before the one that ``config`` describes: those of the run itself if it
    is resumed, else those of the weights that it starts from, and of its teacher."""
    if is_resumed(config):
        return trainings_of(config.output)
    sources = [] if getattr(config, "from_scratch", False) else [source]
    teacher = getattr(config, "teacher", "")
    sources += [teacher] if teacher and Path(teacher).exists() else []
    return [training for name in filter(None, sources) for training in trainings_of(name)]


def record_of(
    earlier: Sequence[TrainingRecord], present: TrainingRecord, resumed: bool = False
) -> list[dict[str, Any]]:
    """Return the entry ``trainings`` of encoder.json.

    Args:
        resumed: the last of the earlier trainings is the present one, as it was saved before.
    """
    if earlier and earlier[-1].recipe == present.recipe:
        last = earlier[-1]
        if resumed and not present.by:
            present = last
        alike = last.same_images(present) if last.by and last.by == present.by else resumed
        earlier = earlier[:-1] if alike else earlier
    return [training.record() for training in (*earlier, present)]


def part_to_evaluate(
    data: Any, spec: str, source: str, redraw: Callable[[str], Sequence[str]]
) -> tuple[Any, str, Exposure]:
    """Return the images to evaluate a trained model on, the name of their split, and what was seen
    of them.

    These are all images of ``data``. But if these have no splits, ``spec`` names none, and some
    were trained on, they are those that were held out, else those that are new.

    Args:
        data: the opened images, or a stream; see `vim_ssl.data.open.open_split`.
        source: the model.
        redraw: the ids that a training on a spec held out, for runs of earlier versions, which do
            not record them.
    Raises: ValueError if no image is left.
    """
    seen = compare(data, trainings_of(source))
    if not (data.is_stream or data.splits or parse_spec(spec).split is not None):
        unrecorded = (t for t in seen.unrecorded if t.labels and same_data(spec, t.data))
        if trained := next(unrecorded, None):
            held_out = set(_drawn_again(source, trained.data, redraw))
            kept = np.array([id in held_out for id in data.ids])
            seen.unrecorded.remove(trained)
        elif seen.labels.any() or seen.by_group.any():
            kept = seen.held_out if seen.held_out.any() else ~seen.labels & ~seen.by_group
        else:
            kept = np.ones(len(data), bool)
        if not kept.any():
            raise ValueError(
                f"the encoder was trained on images of {spec}, and none of its {len(data):,} "
                "images was held out; evaluate other images, or add ?split=all to evaluate these."
            )
        if not kept.all():
            result = Exposure.of(seen, kept)
            if not trained:
                result.left_out = len(data) - result.n - int((seen.labels & ~kept).sum())
            return data.subset(kept.nonzero()[0]), "held out", result
    return data, data.split, Exposure.of(seen)


def _drawn_again(
    source: str, trained: str, redraw: Callable[[str], Sequence[str]]
) -> Sequence[str]:
    """The ids that a run of an earlier version held out, by the settings in its config.json."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{source} was trained on {trained}, but does not record which of these images it held "
            "out. Give its run directory, with config.json, as --encoder; or add ?split=all to "
            "evaluate all images, with those that it was trained on."
        )
    return redraw(trained)
