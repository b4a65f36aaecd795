"""The study's rows as tables in Markdown and as a plot (matplotlib).

    python benchmarks/learning/summary.py               # prints two tables, writes learning.svg

Gains are over the untrained encoder of the same kind and seed: the mean of the differences over the
seeds with Student's 95 % interval. (With a mask token, as in simmim and distill, the same seed
draws other initial weights.)
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `rows`

from rows import markdown_table, read_rows, results_parser

HERE = Path(__file__).parent
METRICS = {"logistic": "linear probe", "knn": "nearest neighbours"}
VIT = "mae on ViT"
BUDGETS = {"time": "equal time", "pictures": "equal images"}
BASELINES = ("untrained", "pixels")  # how their names begin


def names(rows: list[dict], column: str) -> list[str]:
    """Distinct values of a column, in order."""
    return list(dict.fromkeys(row[column] for row in rows))


def values(rows: list[dict], data: str, arm: str, budget: str, metric: str) -> dict[int, float]:
    """Seed -> accuracy in per cent; rows without a budget, or of both, count for each budget."""
    return {
        int(row["seed"]): float(row[metric])
        for row in rows
        if row["data"] == data and row["arm"] == arm and row["budget"] in (budget, "both", "none")
    }


def gain(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float]:
    """Mean of the differences on the common seeds, and half of its 95 % interval."""
    from scipy import stats

    differences = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if len(differences) < 2:
        return sum(differences) / max(len(differences), 1), float("nan")
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), stats.t.ppf(0.975, len(differences) - 1) * error


def table(rows: list[dict]) -> str:
    """One line per arm and budget, with the metrics of every data set."""
    columns = [(data, metric) for data in names(rows, "data") for metric in METRICS]
    lines = []
    for arm in names(rows, "arm"):
        budgets = {row["budget"] for row in rows if row["arm"] == arm}
        for budget in [name for name in BUDGETS if name in budgets] or ["time"]:
            counts = {len(values(rows, data, arm, budget, metric)) for data, metric in columns}
            name = "both" if "both" in budgets else "none"
            if budgets & set(BUDGETS):
                name = BUDGETS[budget]
            cells = [_cell(rows, data, arm, budget, metric) for data, metric in columns]
            lines.append([arm, name, "-".join(map(str, sorted(counts))), *cells])
    heads = [f"{data}, {METRICS[metric]}" for data, metric in columns]
    return markdown_table(["objective", "budget", "seeds", *heads], lines)


def beside_the_vit(rows: list[dict]) -> str:
    """Linear probe of each objective above that of the ViT by MAE, seed by seed."""
    lines = []
    arms = names([row for row in rows if row["budget"] in {"both", *BUDGETS}], "arm")
    for budget, name in BUDGETS.items():
        for arm in arms:
            if arm == VIT:
                continue
            gains = []
            for data in names(rows, "data"):
                ours, theirs = (values(rows, data, a, budget, "logistic") for a in (arm, VIT))
                mean, half = gain(ours, theirs)
                gains.append(f"{mean:+.1f} ± {half:.1f}" if half == half else "")
            if any(gains):
                lines.append([arm, name, *gains])
    head = ["objective above the ViT under mae", "budget", *names(rows, "data")]
    return markdown_table(head, lines)


def untrained(arm: str) -> str:
    """The baseline that has the arm's network."""
    return {"ar": "untrained, forward only", VIT: "untrained ViT"}.get(arm, "untrained")


def _cell(rows: list[dict], data: str, arm: str, budget: str, metric: str) -> str:
    accuracies = values(rows, data, arm, budget, metric)
    if not accuracies:
        return ""
    text = f"{statistics.mean(accuracies.values()):.1f}"
    if arm.startswith(BASELINES):
        return text
    mean, half = gain(accuracies, values(rows, data, untrained(arm), budget, metric))
    return f"{text} ({mean:+.1f}{f' ± {half:.1f}' if half == half else ''})"


def plot(rows: list[dict], path: Path) -> None:
    """Plot gains at equal time: a panel per data set and metric, a dot per seed, a bar the mean."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    datas = names(rows, "data")
    arms = [arm for arm in names(rows, "arm") if not arm.startswith(BASELINES)]
    size = (4.2 * len(datas), 2.6 * len(METRICS))
    canvas, axes = plt.subplots(len(METRICS), len(datas), figsize=size, squeeze=False, sharey=True)
    for line, (metric, name) in zip(axes, METRICS.items(), strict=True):
        for axis, data in zip(line, datas, strict=True):
            for position, arm in enumerate(arms):
                ours = values(rows, data, arm, "time", metric)
                theirs = values(rows, data, untrained(arm), "time", metric)
                dots = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
                if not dots:
                    continue
                mean, half = gain(ours, theirs)
                axis.barh(position, mean, xerr=half, color="#9ecae1", ecolor="#444", height=0.7)
                axis.plot(dots, [position] * len(dots), "k.", markersize=4)
            axis.axvline(0, color="k", linewidth=0.8)
            axis.set_yticks(range(len(arms)), arms)
            axis.set_title(f"{data}: {name}", fontsize=10)
            axis.set_xlabel("points over untrained weights, equal time", fontsize=8)
    axes[0][0].invert_yaxis()
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = results_parser(__doc__, "nothing; learning.csv is read")
    args = parser.parse_args()
    rows = read_rows(args.out / "learning.csv")
    if not rows:
        print(f"There are no rows in {args.out / 'learning.csv'} yet; run study.py.")
        return 1
    print(table(rows), beside_the_vit(rows), sep="\n\n")
    plot(rows, HERE / "learning.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
