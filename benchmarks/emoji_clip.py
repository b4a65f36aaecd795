"""CLIP on emoji: retrieval between a third vendor's drawings and their names.

    python benchmarks/emoji_clip.py               # every arm, on two CPU cores
    python benchmarks/emoji_clip.py --summary     # tables of the rows so far, in Markdown

The preset `emoji_clip` trains on two vendors' drawings and their names. The test images are those
of a third vendor, none of which is used in training: drawings of *seen* concepts, which are in the
training split of the other two, and of *unseen* ones, held out for all three. A concept is a name
without gender, hair, direction or the members of a family; drawings with skin tones are skipped.
The sample sets hold out individual emoji, so a woman may be held out while the man is not: 59 of
the 372 held-out emoji are skipped because their concept was trained on. 1,480 drawings of 1,337
seen concepts and 313 drawings of 313 unseen ones remain. There are four questions, each among all
answers of its set: the caption of an image, the image of a caption, and the image's category and
subcategory by name.

    vim              the preset, trained for longer than the demonstration
    vit              the same with timm's ViT of the same size, for the same CPU time
    vim after mae    vim on an encoder pretrained by MAE on the same drawings

Baselines need no model: the nearest training drawing, by pixels or colour histogram, gives its
caption and category (and for a caption, the image nearest to its drawings). Their resolution is
selected between the two training vendors. They do not apply to unseen captions, for which chance is
the baseline; for categories the largest class is another baseline.

Rows are appended to results/emoji_clip.csv as they come; an interrupted campaign resumes. The
column `ranks` has a character per query: the rank of the right answer from 1 to 9, x for 10, a dot
beyond 10, and a space between concepts, which the intervals resample as a whole.
"""

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
import torch.nn.functional as F
from campaign import costs, fit_seconds, run_jobs
from emoji_tables import RANKS, SETS, TRAINED, tables
from rows import ORIGIN, append_rows, origin, read_rows, results_parser
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from vim_ssl import save_encoder
from vim_ssl.data import ImageData, open_data
from vim_ssl.data.config import IMAGENET_DATA
from vim_ssl.downstream.zero_shot import class_names, text_classifier
from vim_ssl.evaluation.retrieval import embed_pairs
from vim_ssl.objectives.clip import Clip
from vim_ssl.recipes import clip_pretrain, mim_pretrain
from vim_ssl.training.accelerator import make_accelerator

TABLE, COSTS = "emoji_clip.csv", "emoji_clip_costs.csv"
COLUMNS = (*ORIGIN, "arm", "seed", "concepts", "question", "asked", "answers", "r1", "r5", "r10",
           "grain", "epochs", "mae_seconds", "cpu_seconds", "parameters", "ranks")  # fmt: skip

QUIET = {"threads": 1, "eval_every": 1e9, "log_every": 50, "save_every": 1e9, "trackers": ("none",)}
EPOCHS = 128.0
CLIP = replace(clip_pretrain.emoji_clip(), val="", **QUIET)
TRAIN_VENDORS = ("sample:noto-emoji", "sample:twemoji")  # CLIP.data
TEST_VENDOR = "sample:fluent-emoji"
MAE = replace(
    mim_pretrain.cpu_mae(), data=CLIP.data, encoder=CLIP.encoder, model_args=CLIP.model_args,
    warmup_epochs=CLIP.warmup_epochs, workers=0, **QUIET,
)  # fmt: skip
IMAGES = {k: v for k, v in IMAGENET_DATA.items() if k not in ("input_size", "bands")}
VIT = {"patch_size": 16, "img_size": 64, "embed_dim": 153, "depth": 2, "num_heads": 3,
       "pretrained_cfg_overlay": IMAGES}  # fmt: skip
BASELINES = ("pixels", "colours", "largest class")
QUESTIONS = ("caption", "picture", "category", "subcategory")


# -------------------------------------------------------------------- queries


GENDER = re.compile(r"\b(woman and man|(wo)?m[ae]n|person|people|mrs\.|mx|santa)(?!\w)")
ALIKE = {"boy": "child", "girl": "child", "older": "old", "merman": "mermaid",
         "merperson": "mermaid", "prince": "princess", "with crown": "princess"}  # fmt: skip


def concept(caption: str) -> str:
    """Reduce a name to its concept: "woman running: facing right" -> "running"."""
    head, _, rest = caption.lower().partition(":")
    if head in ("flag", "keycap"):
        return f"{head}:{rest}"
    plain = " ".join(GENDER.sub("", head).split()) or "person"
    return ALIKE.get(plain, plain)


@dataclass
class Queries:
    """Images ordered by concept, and the right answers for each.

    Attributes:
        data: images with captions, one per image.
        captions, concepts: n texts.
        labels: "category" and "subcategory" -> (n,) int64.
        names: "category" and "subcategory" -> class names.
    """

    data: ImageData
    captions: list[str]
    concepts: list[str]
    labels: dict[str, Tensor]
    names: dict[str, list[str]]


def queries(spec: str, split: str, concepts: set[str] | None = None, known: bool = True) -> Queries:
    """Return one image per name, only of these concepts, or with ``known=False`` of all others.

    Raises: ValueError if none is left.
    """
    specs = {kind: f"{spec}?split={split}&label={kind}&tones=none" for kind in QUESTIONS[2:]}
    sources = {kind: open_data(spec) for kind, spec in specs.items()}
    data = sources["category"]
    rows = {}  # caption -> (concept, caption, index)
    for i in range(len(data)):
        (caption,) = data.captions(i)
        drawn = concept(caption)
        if concepts is None or (drawn in concepts) == known:
            rows.setdefault(caption, (drawn, caption, i))
    if not rows:
        raise ValueError(f"{spec} ({split}) has no image of the requested concepts.")
    ordered, captions, indices = zip(*sorted(rows.values()), strict=True)
    return Queries(
        data.subset(indices), list(captions), list(ordered),
        {kind: torch.tensor(source.labels)[list(indices)] for kind, source in sources.items()},
        {kind: class_names(source, "") for kind, source in sources.items()},
    )  # fmt: skip


def training_sets() -> list[Queries]:
    """The training drawings of each vendor."""
    return [queries(spec, "train") for spec in TRAIN_VENDORS]


def test_sets(trained: list[Queries]) -> dict[str, Queries]:
    """The third vendor's drawings of seen and of unseen concepts."""
    known = {name for one in trained for name in one.concepts}
    return {
        name: queries(TEST_VENDOR, split, known, name == "seen") for name, split in SETS.items()
    }


# -------------------------------------------------------------------- scores and ranks


def ranks(scores: Tensor, truth: Tensor) -> Tensor:
    """Rank, from 1, of each query's right answer: scores (n, m), truth (n,) -> (n,).

    With equal scores the right answer is ranked last, so that constant scores do not help.
    """
    right = scores.gather(1, truth[:, None])
    return scores.shape[1] - (scores < right).sum(1)


def model_scores(clip: Clip, test: Queries) -> dict[str, Tensor]:
    """Cosines (queries, answers) for every question."""
    pairs = embed_pairs(clip, test.data)
    if pairs.skipped:
        raise ValueError(f"images of {test.data.name} cannot be read: {pairs.skipped[:3]}")
    captions = pairs.images @ pairs.texts.T
    by_name = {kind: pairs.images @ text_classifier(clip, names, ("{}",)).T
               for kind, names in test.names.items()}  # fmt: skip
    return {"caption": captions, "picture": captions.T, **by_name}


def neighbour_scores(
    features: Tensor, bank: Tensor, trained: list[Queries], test: Queries
) -> dict[str, Tensor]:
    """Return minus the distance to the nearest training drawing that has the answer.

    Args:
        features, bank: features of the images of ``test``, and of all images of ``trained``.
    """
    similarity = -torch.cdist(features, bank)

    def nearest(answers: Tensor, count: int) -> Tensor:
        known = answers >= 0
        best = similarity.new_full((len(features), count), -torch.inf)
        return best.scatter_reduce(
            1, answers[known].expand(len(features), -1), similarity[:, known], "amax"
        )

    index = {caption: i for i, caption in enumerate(test.captions)}
    drawn = torch.tensor([index.get(caption, -1) for one in trained for caption in one.captions])
    scores = {kind: nearest(labels_of(trained, kind), len(names))
              for kind, names in test.names.items()}  # fmt: skip
    if (drawn >= 0).any():  # unseen concepts have no training drawing
        captions = nearest(drawn, len(index))
        scores |= {"caption": captions, "picture": captions.T}
    return scores


def labels_of(sets: list[Queries], kind: str) -> Tensor:
    return torch.cat([one.labels[kind] for one in sets])


def images_of(one: Queries) -> Tensor:
    """(n, 3, 64, 64) in 0..1."""
    images = (one.data[i]["image"].convert("RGB").resize((64, 64)) for i in range(len(one.data)))
    return torch.stack([pil_to_tensor(image) for image in images]).float() / 255


def small(images: Tensor, side: int) -> Tensor:
    """Pixels of smaller images, (n, 3 side side)."""
    return F.adaptive_avg_pool2d(images, side).flatten(1)


def colours(images: Tensor, bins: int) -> Tensor:
    """Square roots of a colour histogram, (n, bins^3); their distance is Hellinger's."""
    level = (images * bins).long().clamp(max=bins - 1)
    cell = ((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]).flatten(1)
    counts = torch.zeros(len(images), bins**3).scatter_add_(1, cell, torch.ones(cell.shape))
    return (counts / cell.shape[1]).sqrt()


FEATURES = {"pixels": (small, (4, 8, 16, 32)), "colours": (colours, (2, 4, 6, 8))}


def baseline(arm: str, trained: list[Queries], tests: dict[str, Queries]):
    """Return scores for every set and question that the arm can answer, and the resolution."""
    if arm == "largest class":
        return {
            name: {kind: torch.bincount(labels_of(trained, kind), minlength=len(names))
                   .expand(len(test.captions), -1) for kind, names in test.names.items()}
            for name, test in tests.items()
        }, ""  # fmt: skip
    one, other = trained
    extract, grains = FEATURES[arm]
    images = [images_of(vendor) for vendor in trained]

    def across(grain: int) -> int:
        """Right captions of the second vendor's drawings, given the first vendor's."""
        bank, features = (extract(vendor, grain) for vendor in images)
        scores = neighbour_scores(features, bank, [one], other)
        return int((ranks(scores["caption"], torch.arange(len(other.captions))) == 1).sum())

    grain = max(grains, key=across)
    bank = extract(torch.cat(images), grain)
    return {name: neighbour_scores(extract(images_of(test), grain), bank, trained, test)
            for name, test in tests.items()}, grain  # fmt: skip


# -------------------------------------------------------------------- training


def train(arm: str, seed: int, epochs: float, folder: Path, max_steps: int = 0):
    """Train an arm in ``folder``; return the model and its cost."""
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
    """Pretrain an encoder into ``folder``/encoder; return the CPU seconds."""
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
    """Train and test one arm in this process; append the rows."""
    torch.set_num_threads(1)
    trained = training_sets()
    tests = test_sets(trained)
    if arm in BASELINES:
        scores, grain = baseline(arm, trained, tests)
        spent: dict = {"grain": grain}
    else:
        with tempfile.TemporaryDirectory() as folder:
            clip, spent = train(arm, seed, epochs, Path(folder))
        scores = {name: model_scores(clip, test) for name, test in tests.items()}
        spent = {k: round(v, 1) if k.endswith("seconds") else v for k, v in spent.items()}
    common = origin() | {"arm": arm, "seed": seed} | spent
    append_rows(out / TABLE, COLUMNS, [
        common | {"concepts": name, "question": question} | answers(values, question, tests[name])
        for name, questions in scores.items() for question, values in questions.items()
    ])  # fmt: skip


def answers(scores: Tensor, question: str, test: Queries) -> dict:
    """The columns of a row that one question fills."""
    truth = test.labels.get(question, torch.arange(len(scores)))
    positions = ranks(scores, truth)
    marks = (RANKS[min(rank, 11) - 1] for rank in positions.tolist())
    groups = groupby(zip(test.concepts, marks, strict=True), key=lambda pair: pair[0])
    recalls = {f"r{k}": round(100 * float((positions <= k).float().mean()), 2) for k in (1, 5, 10)}
    words = ("".join(mark for _, mark in pairs) for _, pairs in groups)
    return {"asked": len(scores), "answers": scores.shape[1], **recalls, "ranks": " ".join(words)}


# -------------------------------------------------------------------- campaign


def main() -> int:
    parser = results_parser(__doc__, f"{TABLE} and {COSTS}")
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs")
    add("--epochs", type=float, default=EPOCHS, help="epochs of the Vim; the ViT: same CPU time")
    add("--jobs", type=int, default=2, help="parallel runs, one thread each")
    add("--summary", action="store_true", help="print the tables of the rows, do not measure")
    add("--one", nargs=3, help=argparse.SUPPRESS)
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
    """Run everything without rows; return the number of failed runs.

    Raises: ValueError if there are rows with other epochs.
    """
    torch.set_num_threads(1)
    rows = read_rows(out / TABLE)
    others = {row["epochs"] for row in rows if row["arm"] == "vim"} - {str(epochs)}
    if others:
        raise ValueError(
            f"{out / TABLE} has rows with {', '.join(others)} epochs, but --epochs is {epochs:g}; "
            "keep those epochs or give another --out."
        )
    # The rows of a run are complete once its last row exists.
    done = {(row["arm"], int(row["seed"])) for row in rows
            if (row["concepts"], row["question"]) == ("unseen", QUESTIONS[-1])}  # fmt: skip

    def steps(arm: str, count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return train(arm, 1000, epochs, Path(folder), count)[1]["cpu_seconds"]

    cost = costs(out / COSTS, "emoji", ("vim", "vit"), steps, 12)
    lengths = dict.fromkeys(TRAINED, epochs)
    lengths["vit"] = round(epochs * cost["vim"] / cost["vit"], 2)
    jobs: list[tuple] = [(arm, 0, 0) for arm in BASELINES]
    jobs += [(arm, seed, lengths[arm]) for arm in TRAINED for seed in seeds]
    return run_jobs(__file__, out, [job for job in jobs if job[:2] not in done], at_once)


if __name__ == "__main__":
    sys.exit(main())
