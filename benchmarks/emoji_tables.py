"""The rows of `emoji_clip.py` as tables in Markdown; their intervals resample whole concepts."""

import statistics

import numpy as np
from rows import markdown_table

from vim_ssl.metrics.bootstrap import Metric

TITLES = {"vim": "Vim", "vit": "ViT, the same CPU time", "vim after mae": "Vim after MAE",
          "pixels": "nearest training drawing, pixels",
          "colours": "nearest training drawing, colours",
          "largest class": "largest class", "chance": "chance"}  # fmt: skip
TRAINED = ("vim", "vit", "vim after mae")
SETS = {"seen": "train", "unseen": "test"}  # concepts -> split of the test vendor
HEADS = {"caption": "caption of an image", "picture": "image of a caption",
         "category": "category", "subcategory": "subcategory"}  # fmt: skip
CUTOFFS = {"caption": (1, 5, 10), "picture": (1, 5, 10), "category": (1,), "subcategory": (1,)}
COMPARED = (("vim", "pixels"), ("vim", "colours"), ("vim", "largest class"), ("vim", "chance"),
            ("vim", "vit"), ("vim after mae", "vim"))  # fmt: skip
RANKS = "123456789x."  # of the right answer; x is 10, the dot is any lower rank


class Results:
    """The rows of the CSV file; the last one of rows with the same key."""

    def __init__(self, rows: list[dict[str, str]]):
        self.rows = {(r["arm"], r["concepts"], r["question"], int(r["seed"])): r for r in rows}

    def select(self, arm: str, concepts: str, question: str) -> list[dict[str, str]]:
        """One row per seed; the rows of every arm for chance, which needs their sizes alone."""
        return [row for (a, c, q, _), row in self.rows.items()
                if (c, q) == (concepts, question) and arm in (a, "chance")]  # fmt: skip

    def seeds(self, arm: str) -> set[int]:
        return {seed for (name, _, _, seed) in self.rows if name == arm}

    def recall(
        self, arm: str, concepts: str, question: str, k: int, seeds: set[int] | None = None
    ) -> Metric | None:
        """Recall at k, the mean over these seeds (None: all); None without rows."""
        rows = [row for row in self.select(arm, concepts, question)
                if seeds is None or int(row["seed"]) in seeds]  # fmt: skip
        if not rows:
            return None
        hits = np.stack([_hits(row, k) for row in rows])
        if arm == "chance":
            hits = np.full_like(hits, 100 * min(k / int(rows[0]["answers"]), 1))
        mean = hits.mean(0)
        return Metric(lambda weights: float(weights @ mean / weights.sum()), len(mean))

    def groups(self, concepts: str, question: str) -> list[int]:
        """The index of each query's concept."""
        words = self.select("chance", concepts, question)[0]["ranks"].split()
        return [i for i, word in enumerate(words) for _ in word]


def _hits(row: dict[str, str], k: int) -> np.ndarray:
    """(n,) float64, 100 where the right answer is among the first k."""
    ranks = np.array([RANKS.index(mark) for mark in row["ranks"].replace(" ", "")])
    return 100.0 * (ranks < k)


def tables(rows: list[dict[str, str]]) -> str:
    """Cost and recall of every arm, and differences with their 95 % intervals."""
    results = Results(rows)
    sets = [name for name in SETS if results.select("chance", name, "category")]
    return "\n\n".join([_costs(results), *(_recalls(results, name) for name in sets)])


def _costs(results: Results) -> str:
    """Size of the image tower and cost of the training, means over the seeds."""
    head = ("model", "parameters of the image tower", "seeds", "epochs", "CPU seconds",
            "of MAE before")  # fmt: skip
    lines = []
    for arm in TRAINED:
        if rows := results.select(arm, "seen", "caption"):
            size, epochs, seconds, before = (
                statistics.mean(float(row[column] or 0) for row in rows)
                for column in ("parameters", "epochs", "cpu_seconds", "mae_seconds")
            )
            lines.append((TITLES[arm], f"{size / 1e6:.2f} M", str(len(rows)), f"{epochs:.1f}",
                          f"{seconds:.0f}", f"{before:.0f}" if before else ""))  # fmt: skip
    return markdown_table(head, lines)


def _recalls(results: Results, concepts: str) -> str:
    """The table of recalls of a set, and the table of differences."""
    row = results.select("chance", concepts, "category")[0]
    title = f"{concepts} concepts ({row['asked']} images of {len(row['ranks'].split())})"
    head = [title, *(_head(question, ks) for question, ks in CUTOFFS.items())]
    lines = [
        [TITLES[arm], *(_cell(results, arm, concepts, question) for question in CUTOFFS)]
        for arm in TITLES
    ]
    pairs = [(q, k) for q, ks in CUTOFFS.items() for k in (ks[0], ks[-1])[: len(ks)]]
    differences = [
        [
            f"{TITLES[arm]} − {TITLES[other]}",
            *(_difference(results, arm, other, concepts, question, k) for question, k in pairs),
        ]
        for arm, other in COMPARED
    ]
    second = ["difference", *(_head(question, (k,)) for question, k in pairs)]
    return "\n\n".join(
        markdown_table(names, [line for line in cells if any(line[1:])])
        for names, cells in ((head, lines), (second, differences))
    )


def _head(question: str, ks: tuple[int, ...]) -> str:
    recall = "R@" + " / ".join(map(str, ks)) if len(CUTOFFS[question]) > 1 else "top-1"
    return f"{HEADS[question]}, {recall}"


def _cell(results: Results, arm: str, concepts: str, question: str) -> str:
    """Recalls of one question; with several seeds the first has its standard deviation."""
    rows, cells = results.select(arm, concepts, question), []
    for k in CUTOFFS[question]:
        if (recall := results.recall(arm, concepts, question, k)) is None:
            return ""
        cells.append(f"{recall.value:.1f}")
    if arm in TRAINED and len(rows) > 1:
        cells[0] += f" ± {statistics.stdev(float(row['r1']) for row in rows):.1f}"
    return " / ".join(cells)


def _difference(
    results: Results, arm: str, other: str, concepts: str, question: str, k: int
) -> str:
    # Two trained arms are compared on their common seeds.
    seeds = results.seeds(arm) & results.seeds(other) if {arm, other} <= set(TRAINED) else None
    ours, theirs = (results.recall(name, concepts, question, k, seeds) for name in (arm, other))
    if ours is None or theirs is None:
        return ""
    difference = ours - theirs
    bounds = difference.interval(results.groups(concepts, question))
    interval = "none" if bounds is None else f"{bounds[0]:+.1f}, {bounds[1]:+.1f}"
    return f"{difference.value:+.1f} [{interval}]"
