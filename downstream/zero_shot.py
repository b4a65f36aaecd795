"""Zero-shot classification from class names, and retrieval between images and captions.

    python downstream/zero_shot.py                                       # newest run, its pairs
    python downstream/zero_shot.py --encoder RUN --data FOLDER_WITH_CLASSES
    python downstream/zero_shot.py --encoder RUN --data pairs:FOLDER

RUN is a run of clip_pretrain. Labelled images are classified: the embedding of a class is the
normalised mean over several sentences with its name (CLIP, arXiv:2103.00020, section 3.1.4). Images
with captions are evaluated by retrieval in both directions; any caption of an image counts as
correct. The test split is used, otherwise the validation split, unless `?split=` names another.
Metrics and examples are written to a folder in the run, one per data spec, and to its report.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
from torch import Tensor

from vim_ssl.checkpoints.identity import model_hash
from vim_ssl.cli import guarded
from vim_ssl.data import ImageData
from vim_ssl.data.open import open_split
from vim_ssl.data.split import is_known
from vim_ssl.evaluation.extract import Features, extract_features, features_of
from vim_ssl.evaluation.retrieval import PairFeatures, chance, embed_pairs, hits_at_k, nearest
from vim_ssl.evaluation.seen import Exposure, exposure_of_pairs
from vim_ssl.metrics.classification import proportion
from vim_ssl.metrics.ranking import COSINE_TIE, top_k
from vim_ssl.metrics.sentences import Gain, metric_text, result_sentence
from vim_ssl.metrics.titles import measured_on, shows_top5
from vim_ssl.objectives.clip import load_clip
from vim_ssl.objectives.zero_shot import (
    TEMPLATES,
    check_templates,
    class_names,
    text_classifier,
)
from vim_ssl.tasks.runner import finish_run
from vim_ssl.training.folders import claim
from vim_ssl.training.run import newest_run, task_folder, trained_on
from vim_ssl.utils.config import opt, parse, to_dict
from vim_ssl.utils.environment import environment
from vim_ssl.utils.files import optional_output

WAYS = {"image_to_text": "Captions of an image", "text_to_image": "Image of a caption"}
EXAMPLES = 8
SIDE = 96  # maximum side of their images, in pixels
CAPTION = 80  # maximum characters of a caption in the report


@dataclass
class Config:
    """Zero-shot classification and retrieval."""

    encoder: str = opt("", "run of clip_pretrain; default: the newest")
    data: str = opt("", "images with labels or captions; default: the run's val or data")
    templates: tuple[str, ...] = opt(TEMPLATES, "sentences about a class; {} is its name")
    names: str = opt("", "file of class names, one line per class; default: the data's names")
    batch_size: int = opt(128, "images per batch")
    workers: int = opt(0, "data loading processes")
    device: str = opt("", "cpu, cuda …; default: cuda if available")
    output: str = opt("", "folder for metrics.json; default: in the run")

    def __post_init__(self):
        check_templates(self.templates)


def classify(features: Features, classifier: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Return top-1 and top-5 accuracy in per cent with 95 % intervals, and the five best classes
    (n, 5). Classes with equal features count as in random order.

    Images without a label (-1) are skipped.
    """
    known = features.y >= 0
    groups = features.groups and [features.groups[i] for i in known.nonzero()[:, 0]]
    x, y = features.x[known], features.y[known]
    best = nearest(x, classifier, 5)
    hits = top_k(x @ classifier.T, y, (1, 5), tolerance=COSINE_TIE)
    metrics: dict[str, Any] = {"classes": len(classifier), "pictures": int(known.sum())}
    for k, right in zip((1, 5), hits, strict=True):
        metrics |= proportion(right).entries(f"top{k}", groups)
    metrics["chance"] = round(100 / len(classifier), 2)
    return metrics, best


def _above_chance(title: str, metrics: dict[str, Any], key: str, chance: str = "chance") -> str:
    """Say how far a metric is above chance, a constant."""
    expected, bounds = metrics[chance], metrics[f"{key}_ci"]
    interval = bounds and tuple(bound - expected for bound in bounds)
    points, reason = metrics[key] - expected, metrics.get(f"{key}_ci_none", "")
    return result_sentence(
        title, metrics[key], [Gain(f"chance ({expected:g} %)", points, interval, reason)]
    )


def search(pairs: PairFeatures, data: ImageData) -> dict[str, Any]:
    """Return R@1, R@5 and R@10 in both directions with 95 % intervals, and R@1 of chance: of both,
    and the larger one, ``chance_r1``.

    The bootstrap resamples whole groups, including all captions of their images.
    """
    group = dict(zip(data.ids, data.groups or data.ids, strict=True))
    of_images = [group[id] for id in pairs.ids]
    of_texts = [of_images[i] for i in pairs.owner.tolist()]
    metrics: dict[str, Any] = {"pictures": len(pairs.images), "captions": len(pairs.texts)}
    for name, right in hits_at_k(pairs).items():
        groups = of_images if name.startswith("image") else of_texts
        metrics |= proportion(right).entries(name, groups)
    by_chance = {way: round(value, 3) for way, value in chance(pairs).items()}
    metrics |= {f"{way}_chance_r1": value for way, value in by_chance.items()}
    metrics["chance_r1"] = max(by_chance.values())
    return metrics


def write_examples(pairs: PairFeatures, data: ImageData, folder: Path) -> dict[str, Any]:
    """Write a few reduced images to ``folder``.

    Returns: for each image its first caption (``own``), the three nearest captions and which of
        them are its captions (``right``); and the cosines of these images and first captions.
    """
    n = len(pairs.images)
    chosen = sorted({i * n // EXAMPLES for i in range(EXAMPLES)})
    first = [int((pairs.owner == i).nonzero()[0]) for i in chosen]
    matches = nearest(pairs.images[chosen], pairs.texts, 3).tolist()
    cosines = pairs.images[chosen] @ pairs.texts[first].T
    index = {name: position for position, name in enumerate(data.ids)}
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (i, caption, best) in enumerate(zip(chosen, first, matches, strict=True)):
        image = data[index[pairs.ids[i]]]["image"]
        image.thumbnail((SIDE, SIDE))
        image.save(folder / f"{number}.png")
        rows.append({
            "id": pairs.ids[i], "picture": f"{folder.name}/{number}.png",
            "own": _cut(pairs.captions[caption]),
            "nearest": [_cut(pairs.captions[j]) for j in best],
            "right": [pairs.is_caption(i, j) for j in best],
        })  # fmt: skip
    return {"pairs": rows, "cosines": [[round(x, 4) for x in row] for row in cosines.tolist()]}


def _cut(caption: str) -> str:
    return caption if len(caption) <= CAPTION else caption[: CAPTION - 1] + "…"


def run(config: Config) -> dict:
    started = time.perf_counter()
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = config.encoder or newest_run(recipe="clip_pretrain")
    weights = model_hash(source)  # before it is loaded: a training may replace it meanwhile
    clip = load_clip(source, device=device)
    spec = config.data or trained_on(source, "val", "data")
    data = open_split(spec)
    labelled = bool(data.classes) and not data.multi_label and any(map(is_known, data.labels or ()))
    if not labelled and not data.has_captions:
        raise ValueError(
            f"{data.name} ({data.split}) has neither labels nor captions; give data with one label "
            "per image, or with captions."
        )
    print(f"Model {source} · {data.name}: {len(data):,} images", flush=True)
    exposure = exposure_of_pairs(source, spec, data)
    remarks = Exposure(
        len(data), uncompared=exposure.uncompared, unrecorded=exposure.unrecorded
    ).remarks()
    if seen := exposure.pixels:
        which = "these" if seen == len(data) else f"{seen:,} of these {len(data):,}"
        remarks.insert(0, f"The model was trained on {which} images; this is not a test.")
    for remark in remarks:
        print(remark, flush=True)
    loading: dict[str, Any] = {
        "batch_size": config.batch_size, "workers": config.workers, "device": device,
    }  # fmt: skip
    folder = claim(
        Path(config.output or task_folder("zero_shot", source, config.data)), "zero_shot",
        to_dict(config) | {"encoder": str(source)}, named=bool(config.output), weights=weights,
        images={"test": data.fingerprint},
    )  # fmt: skip
    metrics: dict[str, Any] = {
        "task": "zero_shot", "data": data.name, "split": data.split, "encoder": str(source),
        "trained_on": bool(seen), "seen": exposure.record(), "protocol": to_dict(config),
        "weights": weights, "fingerprints": {"test": data.fingerprint},
    }  # fmt: skip
    pairs = embed_pairs(clip, data, **loading) if data.has_captions else None
    if labelled:
        names = class_names(data, config.names)
        if pairs is not None and not pairs.skipped:  # all images are embedded already
            features = features_of(data, pairs.images, range(len(data)), [])
        else:
            features = extract_features(clip.encode_image, data, clip.transform, **loading)
        classifier = text_classifier(clip, names, config.templates)
        metrics["classification"], best = classify(features, classifier)
        metrics["names"], metrics["skipped"] = names, features.skipped
        metrics["named"] = {
            id: [names[i] for i in row[:3]]
            for id, row in zip(features.ids[:EXAMPLES], best.tolist(), strict=False)
        }
        metrics["summary"] = [_above_chance("Zero-shot top-1", metrics["classification"], "top1")]
        metrics["n"] = metrics["classification"]["pictures"]
    if pairs is not None:
        metrics["retrieval"], metrics["skipped"] = search(pairs, data), pairs.skipped
        metrics["n"] = len(pairs.images)
        metrics["summary"] = metrics.get("summary", []) + [
            _above_chance(f"{title}, R@1", metrics["retrieval"], f"{way}_r1", f"{way}_chance_r1")
            for way, title in WAYS.items()
        ]
        with optional_output("the examples"):
            metrics["examples"] = write_examples(pairs, data, folder / "examples")
    metrics["summary"] += remarks
    metrics |= {"seconds": round(time.perf_counter() - started, 1), **environment()}
    return finish_run(
        folder, metrics, lambda m: f"{table(m)}\nWritten: {folder / 'metrics.json'}",
        page=folder.parent,
    )  # fmt: skip


def table(metrics: dict[str, Any]) -> str:
    """Format the metrics."""

    def row(title: str, values: dict[str, Any], names: Sequence[str]) -> str:
        cells = []
        for name in names:
            cells.append(metric_text(values, name, width=5).ljust(24))
        return title.ljust(26) + "".join(cells)

    lines = []
    if result := metrics.get("classification"):
        keys = {"top1": "top-1"}
        if shows_top5(result["classes"]):
            keys["top5"] = "top-5"
        lines += [f"\n{'':26}" + "".join(title.ljust(24) for title in keys.values())]
        title = f"{result['classes']:,} classes by name"
        lines += [row(title, result, tuple(keys)) + f"chance {result['chance']} %"]
        lines += [f"Accuracy, {measured_on(metrics['split'], result['pictures'])}."]
    if result := metrics.get("retrieval"):
        lines += [f"\n{'':26}{'R@1':24}{'R@5':24}{'R@10':24}"]
        for way, title in WAYS.items():
            lines += [row(title, result, [f"{way}_r{k}" for k in (1, 5, 10)])]
        where = measured_on(metrics["split"], result["pictures"])
        lines += [f"Retrieval, {where}, {result['captions']:,} captions; chance at R@1: "
                  f"{result['chance_r1']} %."]  # fmt: skip
    lines += ["95 % interval in brackets.", *metrics["summary"]]
    if skipped := metrics["skipped"]:
        lines += [f"{len(skipped)} images were skipped: {skipped[:3]} …"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
