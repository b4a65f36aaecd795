"""CLIP on emoji: are a third vendor's drawings found by their names, and their names by them?

    python benchmarks/emoji_clip.py               # the whole of it, on two CPU cores
    python benchmarks/emoji_clip.py --summary     # the tables of what is measured so far, Markdown

The preset `emoji_clip` trains on two vendors' drawings and their names. Asked about are a third
vendor's, of which nothing was ever trained on: those of *seen* concepts, which the other two drew
in the training part, and those of *unseen* ones, which are held out for all three. A concept is
what a name says without gender, hair, direction or the members of a family; skin tones are left
out throughout. The sample sets hold emoji out, and a woman's may be held out where a man's is not:
of the 372 held out, 59 of whose concept another was trained on are left out here. There remain
1,480 drawings of 1,337 seen concepts and 313 of as many unseen ones. Four questions, each among all
answers of its set: the caption of an image, the image of a caption, the image's category and
subcategory by their names.

    vim              the preset, trained for longer than the demonstration
    vit              the same with timm's ViT of the same size, for the same CPU time
    vim after mae    vim on an encoder that MAE trained on the same drawings before

Beside them stands what needs no model: the training drawing nearest in pixels, or in its histogram
of colours, gives its caption and its category (a caption is then answered by the image nearest to
its drawings). How coarse both are is chosen between the two training vendors. Of unseen captions
they know nothing, as chance does. The largest class is a category's bar, too.

Rows go to results/emoji_clip.csv as they come; what was cut off goes on where it stopped. `ranks`
has a character a question, the place of the right answer from 1 to 9, x for 10, a dot for worse,
and a space between concepts, which the intervals draw as a whole.
"""

import argparse
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from campaign import costs, fit_seconds, run_jobs
from rows import ORIGIN, append_rows, origin, read_rows, results_parser
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from vim_ssl import save_encoder
from vim_ssl.data import ImageData, open_data
from vim_ssl.data.config import IMAGENET_DATA
from vim_ssl.downstream.zero_shot import class_names, text_classifier
from vim_ssl.evaluation.retrieval import embed_pairs
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.objectives.clip import Clip
from vim_ssl.recipes import clip_pretrain, mim_pretrain
from vim_ssl.training.accelerator import make_accelerator

TABLE, COSTS = "emoji_clip.csv", "emoji_clip_costs.csv"
COLUMNS = (*ORIGIN, "arm", "seed", "concepts", "question", "asked", "answers", "r1", "r5", "r10",
           "grain", "epochs", "mae_seconds", "cpu_seconds", "parameters", "ranks")  # fmt: skip

QUIET = {"threads": 1, "eval_every": 1e9, "log_every": 50, "save_every": 1e9, "trackers": ("none",)}
EPOCHS = 128.0
CLIP = replace(clip_pretrain.emoji_clip(), val="", **QUIET)
STYLES = ("sample:noto-emoji", "sample:twemoji")  # CLIP.data
UNSEEN_STYLE = "sample:fluent-emoji"
MAE = replace(
    mim_pretrain.mae_nano_64(), data=CLIP.data, encoder=CLIP.encoder, model_args=CLIP.model_args,
    warmup_epochs=CLIP.warmup_epochs, workers=0, **QUIET,
)  # fmt: skip
IMAGES = {k: v for k, v in IMAGENET_DATA.items() if k not in ("input_size", "bands")}
VIT = {"patch_size": 16, "img_size": 64, "embed_dim": 153, "depth": 2, "num_heads": 3,
       "pretrained_cfg_overlay": IMAGES}  # fmt: skip
TRAINED = ("vim", "vit", "vim after mae")
BASELINES = ("pixels", "colours", "largest class")
SETS = {"seen": "train", "unseen": "test"}  # -> the split of the unseen style
QUESTIONS = ("caption", "picture", "category", "subcategory")
PLACES = "123456789x."  # of the right answer; the dot is every place from 11 on


# -------------------------------------------------------------------- what is asked


GENDER = re.compile(r"\b(woman and man|(wo)?m[ae]n|person|people|mrs\.|mx|santa)(?!\w)")
ALIKE = {"boy": "child", "girl": "child", "older": "old", "merman": "mermaid",
         "merperson": "mermaid", "prince": "princess", "with crown": "princess"}  # fmt: skip


def concept(caption: str) -> str:
    """What is drawn, whoever is drawn: "woman running: facing right" -> "running"."""
    head, _, rest = caption.lower().partition(":")
    if head in ("flag", "keycap"):
        return f"{head}:{rest}"
    plain = " ".join(GENDER.sub("", head).split()) or "person"
    return ALIKE.get(plain, plain)


@dataclass
class Asked:
    """Images, in the order of their concepts, and what is right about each.

    Attributes:
        data: with captions, one an image.
        captions, concepts: (n) texts.
        labels: "category" and "subcategory" -> (n,) int64.
        names: -> what the classes are called.
    """

    data: ImageData
    captions: list[str]
    concepts: list[str]
    labels: dict[str, Tensor]
    names: dict[str, list[str]]


def ask(spec: str, split: str, concepts: set[str] | None = None, known: bool = True) -> Asked:
    """Images, a name once; of these concepts only, or with ``known=False`` of all others.

    Raises: ValueError if none is left.
    """
    specs = {kind: f"{spec}?split={split}&label={kind}&tones=none" for kind in QUESTIONS[2:]}
    parts = {kind: open_data(spec) for kind, spec in specs.items()}
    data = parts["category"]
    rows = {}  # a caption's concept, the caption, its image
    for i in range(len(data)):
        (caption,) = data.captions(i)
        what = concept(caption)
        if concepts is None or (what in concepts) == known:
            rows.setdefault(caption, (what, caption, i))
    if not rows:
        raise ValueError(f"{spec} ({split}) has no image to ask about.")
    whats, captions, places = zip(*sorted(rows.values()), strict=True)
    return Asked(
        data.subset(places), list(captions), list(whats),
        {kind: torch.tensor(part.labels)[list(places)] for kind, part in parts.items()},
        {kind: class_names(part, "") for kind, part in parts.items()},
    )  # fmt: skip


def trained_on() -> list[Asked]:
    """The training drawings of either vendor."""
    return [ask(spec, "train") for spec in STYLES]


def asked_about(trained: list[Asked]) -> dict[str, Asked]:
    """The third vendor's drawings of seen and of unseen concepts."""
    known = {what for part in trained for what in part.concepts}
    return {name: ask(UNSEEN_STYLE, split, known, name == "seen") for name, split in SETS.items()}


# -------------------------------------------------------------------- how it is answered


def ranks(scores: Tensor, truth: Tensor) -> Tensor:
    """The place, from 1, of each question's right answer: scores (n, m), truth (n,) -> (n,).

    Of equal scores the right one is the last, so that answering everything alike earns nothing.
    """
    own = scores.gather(1, truth[:, None])
    return scores.shape[1] - (scores < own).sum(1)


def model_scores(clip: Clip, part: Asked) -> dict[str, Tensor]:
    """Cosines (questions, answers) for every question."""
    pairs = embed_pairs(clip, part.data)
    if pairs.skipped:
        raise ValueError(f"images of {part.data.name} cannot be read: {pairs.skipped[:3]}")
    captions = pairs.images @ pairs.texts.T
    by_name = {kind: pairs.images @ text_classifier(clip, names, ("{}",)).T
               for kind, names in part.names.items()}  # fmt: skip
    return {"caption": captions, "picture": captions.T, **by_name}


def neighbour_scores(
    asked: Tensor, bank: Tensor, trained: list[Asked], part: Asked
) -> dict[str, Tensor]:
    """What the nearest drawings say: minus the distance to the nearest that has the answer.

    Args:
        asked, bank: features of the images of ``part``, and of all of ``trained``.
    """
    similarity = -torch.cdist(asked, bank)

    def nearest(answers: Tensor, count: int) -> Tensor:
        known = answers >= 0
        best = similarity.new_full((len(asked), count), -torch.inf)
        return best.scatter_reduce(
            1, answers[known].expand(len(asked), -1), similarity[:, known], "amax"
        )

    place = {caption: i for i, caption in enumerate(part.captions)}
    drawn = torch.tensor([place.get(caption, -1) for one in trained for caption in one.captions])
    found = {kind: nearest(labels_of(trained, kind), len(names))
             for kind, names in part.names.items()}  # fmt: skip
    if (drawn >= 0).any():  # of unseen concepts there is no drawing
        captions = nearest(drawn, len(place))
        found |= {"caption": captions, "picture": captions.T}
    return found


def labels_of(parts: list[Asked], kind: str) -> Tensor:
    return torch.cat([part.labels[kind] for part in parts])


def images_of(part: Asked) -> Tensor:
    """(n, 3, 64, 64) in 0..1."""
    images = (part.data[i]["image"].convert("RGB").resize((64, 64)) for i in range(len(part.data)))
    return torch.stack([pil_to_tensor(image) for image in images]).float() / 255


def small(images: Tensor, side: int) -> Tensor:
    """The pixels of smaller images, (n, 3 side side)."""
    return F.adaptive_avg_pool2d(images, side).flatten(1)


def colours(images: Tensor, bins: int) -> Tensor:
    """The square roots of the shares of colours, (n, bins^3): their distance is Hellinger's."""
    level = (images * bins).long().clamp(max=bins - 1)
    cell = ((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]).flatten(1)
    counts = torch.zeros(len(images), bins**3).scatter_add_(1, cell, torch.ones(cell.shape))
    return (counts / cell.shape[1]).sqrt()


FEATURES = {"pixels": (small, (4, 8, 16, 32)), "colours": (colours, (2, 4, 6, 8))}


def baseline(arm: str, trained: list[Asked], asked: dict[str, Asked]):
    """Per set the scores of every question that the arm can answer, and what was chosen."""
    if arm == "largest class":
        return {
            name: {kind: torch.bincount(labels_of(trained, kind), minlength=len(names))
                   .expand(len(part.captions), -1) for kind, names in part.names.items()}
            for name, part in asked.items()
        }, ""  # fmt: skip
    one, other = trained
    features, grains = FEATURES[arm]
    drawn = [images_of(part) for part in trained]

    def across(grain: int) -> int:
        """Captions of the other vendor's drawings that the first's give right."""
        first, second = (features(images, grain) for images in drawn)
        scores = neighbour_scores(second, first, [one], other)
        return int((ranks(scores["caption"], torch.arange(len(other.captions))) == 1).sum())

    grain = max(grains, key=across)
    known = features(torch.cat(drawn), grain)
    found = {name: neighbour_scores(features(images_of(part), grain), known, trained, part)
             for name, part in asked.items()}  # fmt: skip
    return found, grain


# -------------------------------------------------------------------- training


def train(arm: str, seed: int, epochs: float, folder: Path, max_steps: int = 0):
    """Train an arm in ``folder``; returns the model and what it took."""
    config = replace(
        CLIP, seed=seed, epochs=epochs, max_steps=max_steps, output=str(folder / "clip")
    )
    spent: dict = {"epochs": epochs}
    if arm == "vit":
        config = replace(config, encoder="timm:vit_tiny_patch16_224", model_args=VIT)
    if arm == "vim after mae":
        spent["mae_seconds"] = mae(seed, epochs, folder)
        config = replace(config, encoder=str(folder / "encoder"), model_args={})
    accelerator = make_accelerator(config)
    data = clip_pretrain.build_data(config)
    tokenizer = clip_pretrain.build_tokenizer(config, data, accelerator)
    torch.manual_seed(seed)
    encoder = clip_pretrain.build_model(config)
    clip = clip_pretrain.build_objective(config, encoder, tokenizer)
    samples = clip_pretrain.build_samples(config, data, clip, tokenizer)
    seconds = fit_seconds("clip_pretrain", clip, samples, config, accelerator)
    size = sum(p.numel() for p in encoder.parameters())
    return clip.eval(), spent | {"cpu_seconds": seconds, "parameters": size}


def mae(seed: int, epochs: float, folder: Path) -> float:
    """Leave an encoder in ``folder``/encoder; its CPU seconds."""
    config = replace(MAE, seed=seed, epochs=epochs, output=str(folder / "mae"))
    accelerator = make_accelerator(config)
    torch.manual_seed(seed)
    encoder = mim_pretrain.build_model(config)
    objective = mim_pretrain.build_objective(config, encoder)
    _, samples = mim_pretrain.build_data(config, encoder)
    seconds = fit_seconds("mim_pretrain", objective, samples, config, accelerator)
    save_encoder(encoder, folder / "encoder")
    return seconds


def work(out: Path, arm: str, seed: int, epochs: float) -> None:
    """One run and its answers, in a process of its own; appends the rows."""
    torch.set_num_threads(1)
    trained = trained_on()
    asked = asked_about(trained)
    if arm in BASELINES:
        found, grain = baseline(arm, trained, asked)
        spent: dict = {"grain": grain}
    else:
        with tempfile.TemporaryDirectory() as folder:
            clip, spent = train(arm, seed, epochs, Path(folder))
        found = {name: model_scores(clip, part) for name, part in asked.items()}
        spent = {k: round(v, 1) if k.endswith("seconds") else v for k, v in spent.items()}
    common = origin() | {"arm": arm, "seed": seed} | spent
    append_rows(out / TABLE, COLUMNS, [
        common | {"concepts": name, "question": question} | answers(scores, question, asked[name])
        for name, questions in found.items() for question, scores in questions.items()
    ])  # fmt: skip


def answers(scores: Tensor, question: str, part: Asked) -> dict:
    """A question's columns of a row."""
    truth = part.labels.get(question, torch.arange(len(scores)))
    places = ranks(scores, truth)
    marks = (PLACES[min(place, 11) - 1] for place in places.tolist())
    groups = groupby(zip(part.concepts, marks, strict=True), key=lambda pair: pair[0])
    recalls = {f"r{k}": round(100 * float((places <= k).float().mean()), 2) for k in (1, 5, 10)}
    words = ("".join(mark for _, mark in pairs) for _, pairs in groups)
    return {"asked": len(scores), "answers": scores.shape[1], **recalls, "ranks": " ".join(words)}


# -------------------------------------------------------------------- tables


TITLES = {"vim": "Vim", "vit": "ViT, the same CPU time", "vim after mae": "Vim after MAE",
          "pixels": "nearest training drawing, pixels",
          "colours": "nearest training drawing, colours",
          "largest class": "largest class", "chance": "chance"}  # fmt: skip
CELLS = {"caption": (1, 5, 10), "picture": (1, 5, 10), "category": (1,), "subcategory": (1,)}
HEADS = {"caption": "caption of an image", "picture": "image of a caption",
         "category": "category", "subcategory": "subcategory"}  # fmt: skip
AGAINST = (("vim", "pixels"), ("vim", "colours"), ("vim", "largest class"), ("vim", "chance"),
           ("vim", "vit"), ("vim after mae", "vim"))  # fmt: skip


class Results:
    """The rows of the CSV file; of rows that came twice, the last."""

    def __init__(self, rows: list[dict[str, str]]):
        self.rows = {(r["arm"], r["concepts"], r["question"], int(r["seed"])): r for r in rows}

    def of(self, arm: str, concepts: str, question: str) -> list[dict[str, str]]:
        """A row a seed; chance has any arm's."""
        return [row for (a, c, q, _), row in self.rows.items()
                if (c, q) == (concepts, question) and arm in (a, "chance")]  # fmt: skip

    def seeds(self, arm: str) -> set[int]:
        return {seed for (name, _, _, seed) in self.rows if name == arm}

    def figure(
        self, arm: str, concepts: str, question: str, k: int, seeds: set[int] | None = None
    ) -> Metric | None:
        """The share of questions whose answer is among the first k, the mean of these seeds."""
        rows = [row for row in self.of(arm, concepts, question)
                if seeds is None or int(row["seed"]) in seeds]  # fmt: skip
        if not rows:
            return None
        hits = np.stack([_hits(row, k) for row in rows])
        if arm == "chance":
            hits = np.full_like(hits, 100 * min(k / int(rows[0]["answers"]), 1))
        mean = hits.mean(0)
        return Metric(lambda weights: float(weights @ mean / weights.sum()), len(mean))

    def groups(self, concepts: str, question: str) -> list[int]:
        """Which concept each question is about."""
        words = self.of("chance", concepts, question)[0]["ranks"].split()
        return [i for i, word in enumerate(words) for _ in word]


def _hits(row: dict[str, str], k: int) -> np.ndarray:
    """(n,) float64, 100 where the right answer is among the first k."""
    places = np.array([PLACES.index(mark) for mark in row["ranks"].replace(" ", "")])
    return 100.0 * (places < k)


def tables(rows: list[dict[str, str]]) -> str:
    """What every arm took and finds, and differences with their 95 % intervals, in Markdown."""
    found = Results(rows)
    parts = [spent(found)]
    parts += [table(found, name) for name in SETS if found.of("chance", name, "category")]
    return "\n\n".join(parts)


def spent(found: Results) -> str:
    """What the arms' image towers and trainings are, means over the seeds."""
    lines = [
        "| model | parameters of the image tower | seeds | epochs | CPU seconds | of MAE before |",
        "|---|---|---|---|---|---|",
    ]
    for arm in TRAINED:
        if rows := found.of(arm, "seen", "caption"):
            size, epochs, seconds, before = (
                statistics.mean(float(row[column] or 0) for row in rows)
                for column in ("parameters", "epochs", "cpu_seconds", "mae_seconds")
            )
            lines.append(
                f"| {TITLES[arm]} | {size / 1e6:.2f} M | {len(rows)} | {epochs:.1f} | "
                f"{seconds:.0f} | {f'{before:.0f}' if before else ''} |"
            )
    return "\n".join(lines)


def table(found: Results, concepts: str) -> str:
    """Both tables of a set."""
    asked = found.of("chance", concepts, "category")[0]
    number = len(asked["ranks"].split())
    head = [f"{HEADS[q]}, " + ("R@" + " / ".join(map(str, ks)) if len(ks) > 1 else "top-1")
            for q, ks in CELLS.items()]  # fmt: skip
    lines = [f"| {concepts} concepts ({asked['asked']} images of {number}) | "
             + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]  # fmt: skip
    for arm in TITLES:
        cells = [_cell(found, arm, concepts, question) for question in CELLS]
        if any(cells):
            lines.append(f"| {TITLES[arm]} | " + " | ".join(cells) + " |")
    pairs = [(q, k) for q, ks in CELLS.items() for k in (ks[0], ks[-1])[: len(ks)]]
    head = [f"{HEADS[q]}, " + (f"R@{k}" if len(CELLS[q]) > 1 else "top-1") for q, k in pairs]
    lines += ["", "| difference | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for arm, other in AGAINST:
        cells = [_difference(found, arm, other, concepts, q, k) for q, k in pairs]
        if any(cells):
            lines.append(f"| {TITLES[arm]} − {TITLES[other]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: Results, arm: str, concepts: str, question: str) -> str:
    """Figures of one question; of several seeds the first with its standard deviation."""
    rows, parts = found.of(arm, concepts, question), []
    for k in CELLS[question]:
        if (figure := found.figure(arm, concepts, question, k)) is None:
            return ""
        parts.append(f"{figure.value:.1f}")
    if arm in TRAINED and len(rows) > 1:
        parts[0] += f" ± {statistics.stdev(float(row['r1']) for row in rows):.1f}"
    return " / ".join(parts)


def _difference(found: Results, arm: str, other: str, concepts: str, question: str, k: int) -> str:
    # Two trained arms are compared on the seeds that both have.
    shared = found.seeds(arm) & found.seeds(other) if {arm, other} <= set(TRAINED) else None
    ours, theirs = (found.figure(name, concepts, question, k, shared) for name in (arm, other))
    if ours is None or theirs is None:
        return ""
    difference = ours - theirs
    low, high = difference.interval(found.groups(concepts, question))
    return f"{difference.value:+.1f} [{low:+.1f}, {high:+.1f}]"


def main() -> int:
    parser = results_parser(__doc__, f"{TABLE} and {COSTS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    parser.add_argument(
        "--epochs", type=float, default=EPOCHS, help="of the Vim; the ViT has its CPU time"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument(
        "--summary", action="store_true", help="print the tables of the rows, measure nothing"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        arm, seed, epochs = args.one
        work(args.out, arm, int(seed), float(epochs))
        return 0
    if not args.summary:
        try:
            failed = measure(args.out, args.seeds, args.epochs, args.jobs)
        except ValueError as error:
            parser.error(str(error))
        if failed:
            return 1
    rows = read_rows(args.out / TABLE)
    print(tables(rows) if rows else f"There are no rows in {args.out / TABLE} yet.")
    return 0


def measure(out: Path, seeds: list[int], epochs: float, at_once: int) -> int:
    """Run what has no rows yet; how many runs failed.

    Raises: ValueError if the rows are of other epochs.
    """
    torch.set_num_threads(1)
    rows = read_rows(out / TABLE)
    others = {row["epochs"] for row in rows if row["arm"] == "vim"} - {str(epochs)}
    if others:
        raise ValueError(
            f"{out / TABLE} has rows of {', '.join(others)} epochs, asked for are {epochs:g}; "
            "keep to those, or give another --out."
        )
    # A run's rows are complete once the last of them is there.
    done = {(row["arm"], int(row["seed"])) for row in rows
            if (row["concepts"], row["question"]) == ("unseen", QUESTIONS[-1])}  # fmt: skip

    def steps(arm: str, count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return train(arm, 1000, epochs, Path(folder), count)[1]["cpu_seconds"]

    cost = costs(out / COSTS, "emoji", ("vim", "vit"), steps, 12)
    lasts = dict.fromkeys(TRAINED, epochs)
    lasts["vit"] = round(epochs * cost["vim"] / cost["vit"], 2)
    jobs: list[tuple] = [(arm, 0, 0) for arm in BASELINES]
    jobs += [(arm, seed, lasts[arm]) for arm in TRAINED for seed in seeds]
    return run_jobs(__file__, out, [job for job in jobs if job[:2] not in done], at_once)


if __name__ == "__main__":
    sys.exit(main())
