"""The study's rows as a table in Markdown and as a plot (matplotlib).

    python benchmarks/learning/summary.py               # prints two tables, writes learning.svg

Gains are over the untrained encoder of the same kind and seed: the mean of the seeds' differences
with Student's 95 % interval. (With a mask token, as in simmim and distill, the same seed draws
other initial weights.)
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import read_rows, results_parser

HERE = Path(__file__).parent
FIGURES = {"logistic": "linear probe", "knn": "nearest neighbours"}
VIT = "mae on ViT"
BUDGETS = {"time": "equal time", "pictures": "equal images"}


def values(rows: list[dict], data: str, arm: str, budget: str, figure: str) -> dict[int, float]:
    """Seed -> accuracy in per cent. What has no budget, or defines both, counts for each."""
    return {
        int(row["seed"]): float(row[figure])
        for row in rows
        if row["data"] == data and row["arm"] == arm and row["budget"] in (budget, "both", "none")
    }


def gain(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float]:
    """The mean of the differences on the seeds both have, and half of its 95 % interval."""
    from scipy import stats

    differences = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if len(differences) < 2:
        return sum(differences) / max(len(differences), 1), float("nan")
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), stats.t.ppf(0.975, len(differences) - 1) * error


def table(rows: list[dict]) -> str:
    """One line an arm and budget, with the figures of every data set."""
    datas = list(dict.fromkeys(row["data"] for row in rows))
    head = [f"{data}, {name}" for data in datas for name in FIGURES.values()]
    lines = [
        "| objective | budget | seeds | " + " | ".join(head) + " |",
        "|---" * (3 + len(head)) + "|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = {row["budget"] for row in rows if row["arm"] == arm}
        for budget in [name for name in BUDGETS if name in own] or ["time"]:
            cells, seeds = [], set()
            for data in datas:
                for figure in FIGURES:
                    found = values(rows, data, arm, budget, figure)
                    seeds.add(len(found))
                    cells.append(_cell(rows, data, arm, budget, figure) if found else "")
            name = BUDGETS[budget] if own & set(BUDGETS) else "both" if "both" in own else "none"
            counts = "-".join(str(n) for n in sorted(seeds))
            lines.append(f"| {arm} | {name} | {counts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beside_the_vit(rows: list[dict]) -> str:
    """How far each objective's linear probe is above the ViT's under MAE, seed by seed."""
    datas = list(dict.fromkeys(row["data"] for row in rows))
    lines = ["| objective above the ViT under mae | budget | " + " | ".join(datas) + " |",
             "|---" * (2 + len(datas)) + "|"]  # fmt: skip
    arms = dict.fromkeys(row["arm"] for row in rows if row["budget"] in {"both", *BUDGETS})
    for budget, name in BUDGETS.items():
        for arm in arms:
            if arm == VIT:
                continue
            gains = []
            for data in datas:
                ours, theirs = (values(rows, data, a, budget, "logistic") for a in (arm, VIT))
                mean, half = gain(ours, theirs)
                gains.append(f"{mean:+.1f} ± {half:.1f}" if half == half else "")
            if any(gains):
                lines.append(f"| {arm} | {name} | " + " | ".join(gains) + " |")
    return "\n".join(lines)


def untrained(arm: str) -> str:
    """The baseline that has the arm's network."""
    return {"ar": "untrained, forward only", VIT: "untrained ViT"}.get(arm, "untrained")


def _cell(rows, data, arm, budget, figure) -> str:
    found = values(rows, data, arm, budget, figure)
    text = f"{statistics.mean(found.values()):.1f}"
    if arm.startswith(("untrained", "pixels")):
        return text
    mean, half = gain(found, values(rows, data, untrained(arm), budget, figure))
    return f"{text} ({mean:+.1f}{f' ± {half:.1f}' if half == half else ''})"


def plot(rows: list[dict], path: Path) -> None:
    """Gains at equal time, a panel a data set and figure, a dot a seed and a bar their mean."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    datas = list(dict.fromkeys(row["data"] for row in rows))
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows)
            if not arm.startswith(("untrained", "pixels"))]  # fmt: skip
    size = (4.2 * len(datas), 2.6 * len(FIGURES))
    figure, axes = plt.subplots(len(FIGURES), len(datas), figsize=size, squeeze=False, sharey=True)
    for line, (key, name) in zip(axes, FIGURES.items(), strict=True):
        for axis, data in zip(line, datas, strict=True):
            for place, arm in enumerate(arms):
                ours = values(rows, data, arm, "time", key)
                theirs = values(rows, data, untrained(arm), "time", key)
                dots = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
                if not dots:
                    continue
                mean, half = gain(ours, theirs)
                axis.barh(place, mean, xerr=half, color="#9ecae1", ecolor="#444", height=0.7)
                axis.plot(dots, [place] * len(dots), "k.", markersize=4)
            axis.axvline(0, color="k", linewidth=0.8)
            axis.set_yticks(range(len(arms)), arms)
            axis.set_title(f"{data}: {name}", fontsize=10)
            axis.set_xlabel("points over untrained weights, equal time", fontsize=8)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = results_parser(__doc__, "nothing; learning.csv is read")
    args = parser.parse_args()
    rows = read_rows(args.out / "learning.csv")
    if not rows:
        print(f"There are no rows in {args.out / 'learning.csv'} yet; study.py makes them.")
        return 1
    print(table(rows), beside_the_vit(rows), sep="\n\n")
    plot(rows, HERE / "learning.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
