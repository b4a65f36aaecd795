"""The page that compares runs: results with paired differences, settings, curves."""

import csv
import json
import re
from pathlib import Path

import pytest

from vim_ssl.cli import main as cli_main
from vim_ssl.report.compare import compare_runs

VOID = ("meta", "link", "img", "br", "line", "polyline", "polygon", "circle")


def make_run(folder: Path, right: list[bool] | None = None, **config) -> Path:
    """A run of two lines, with a linear probe that predicted these images rightly."""
    folder.mkdir(parents=True)
    config = {"recipe": "mim_pretrain", "epochs": 2, "base_lr": 0.1, "seed": 0} | config
    (folder / "config.json").write_text(json.dumps(config | {"output": str(folder)}))
    rows = [
        {"step": s, "epoch": float(s), "loss": 1 / s, "seconds": 60.0 * s, "samples": 10 * s}
        for s in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if right is not None:
        add_probe(folder / "linear_probe", right)
    return folder


def add_probe(folder: Path, right: list[bool], first: int = 0, groups: list[str] | None = None):
    folder.mkdir()
    score = 100 * sum(right) / len(right)
    row = {"features": "pretrained encoder", "logistic": score, "logistic_ci": [1.0, 99.0]}
    (folder / "metrics.json").write_text(json.dumps({"data": "folder:pets", "rows": [row]}))
    with (folder / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "label", "predicted", "group"][: 4 if groups else 3])
        for i, hit in enumerate(right):
            answer = [f"{first + i}.png", "cat", "cat" if hit else "dog"]
            table.writerow([*answer, groups[i]] if groups else answer)


def text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]).split())


WORSE = [i % 2 == 0 for i in range(200)]  # 50 %
BETTER = [i % 4 != 3 for i in range(200)]  # 75 %, and right wherever WORSE is


def test_the_difference_to_the_first_run_is_paired(tmp_path: Path):
    """Independent intervals of 50 and 75 % of 200 would be half as wide again."""
    page = text(compare_runs([make_run(tmp_path / "a", WORSE), make_run(tmp_path / "b", BETTER)]))
    assert "Linear probe, accuracy folder:pets" in page
    low, high = map(float, re.search(r"\+25\.0 \+([\d.]+) to \+([\d.]+)", page).groups())
    assert 17 < low < 25 < high < 33
    assert high - low < 14
    assert "paired on 200 images: the interval excludes 0" in page


def test_equal_predictions_make_no_difference(tmp_path: Path):
    page = text(compare_runs([make_run(tmp_path / name, WORSE) for name in "ab"]))
    assert "+0.0 −1.9 to +1.9 paired on 200 images: no measurable difference" in page


def test_of_four_patients_no_interval_is_claimed(tmp_path: Path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    for run, right in zip(runs, (WORSE, BETTER), strict=True):
        add_probe(run / "linear_probe", right, groups=[str(i // 50) for i in range(200)])
    page = text(compare_runs(runs))
    assert "+25.0 no interval: fewer than 5 groups" in page


def test_groups_of_the_images_widen_the_interval(tmp_path: Path):
    widths = []
    for name, groups in (("single", None), ("groups", [str(i // 40) for i in range(200)])):
        runs = []
        for side, right in (("a", sorted(WORSE)), ("b", sorted(BETTER))):
            runs.append(make_run(tmp_path / name / side))
            add_probe(runs[-1] / "linear_probe", right, groups=groups)
        page = text(compare_runs(runs))
        low, high = map(float, re.search(r"\+25\.0 \+([\d.]+) to \+([\d.]+)", page).groups())
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize("what", ["no-file", "cut-off"])
def test_without_the_same_images_no_interval_is_claimed(tmp_path: Path, what: str):
    first, other = make_run(tmp_path / "a", WORSE), make_run(tmp_path / "b")
    add_probe(other / "linear_probe", BETTER)
    path = other / "linear_probe" / "predictions.csv"
    if what == "no-file":
        path.unlink()
    elif what == "cut-off":
        path.write_text("id,la")
    page = text(compare_runs([first, other]))
    assert "+25.0 no interval: the predictions are absent, or for other test images" in page


def amend(folder: Path, **more):
    """Add entries to the metrics.json of an evaluation."""
    path = folder / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.mark.parametrize("what", ["ids", "number of ids", "fingerprint", "n"])
def test_results_on_other_test_images_are_not_subtracted(tmp_path: Path, what: str):
    runs = [make_run(tmp_path / "a", WORSE), make_run(tmp_path / "b")]
    probes = [run / "linear_probe" for run in runs]
    right = BETTER[:-4] if what == "number of ids" else BETTER
    add_probe(probes[1], right, first=1 if what == "ids" else 0)
    for folder, digest, n in zip(probes, "12", (200, 199), strict=True):
        if what == "fingerprint":
            amend(folder, fingerprints={"test": digest})
        elif what == "n":
            amend(folder, n=n)
            (folder / "predictions.csv").unlink()
    page = text(compare_runs(runs))
    assert "+25.0" not in page
    assert "folder:pets · test images 1 of 2" in page
    assert "b – evaluated on other test images" in page
    assert re.search(r"b 75\.\d % 1.0 – 99.0 the first run was evaluated on other test", page)


def test_two_evaluations_of_one_spec_are_both_compared(tmp_path: Path):
    """The folder had other images later: linear_probe-2 is not a repetition."""
    runs = []
    for name, offset in (("a", 0), ("b", 25)):
        runs.append(make_run(tmp_path / name))
        for folder, right in (("linear_probe", WORSE[: 100 + offset]), ("linear_probe-2", BETTER)):
            add_probe(runs[-1] / folder, right)
            amend(runs[-1] / folder, fingerprints={"test": f"{folder} {offset}"})
    for run in runs:
        amend(run / "linear_probe-2", fingerprints={"test": "same"})
    page = text(compare_runs(runs))
    assert "test images 2 of 3" in page
    assert page.count("paired on 200 images: no measurable difference") == 1


def test_a_difference_is_in_the_metric_of_its_heading(tmp_path: Path):
    """predictions.csv of several labels gives exact matches, and of AUC nothing."""
    runs = [make_run(tmp_path / "a", WORSE), make_run(tmp_path / "b", BETTER)]
    for run, precision, auc in zip(runs, (61.0, 64.5), (0.912, 0.934), strict=True):
        row = {"features": "pretrained encoder", "logistic": precision, "knn": precision + 1}
        amend(run / "linear_probe", figure="mAP", rows=[row])
        (run / "metrics.json").write_text(json.dumps({"data": "d", "top1": precision, "auc": auc}))
        lines = (run / "linear_probe" / "predictions.csv").read_text()
        (run / "predictions.csv").write_text(lines)
    page = text(compare_runs(runs))
    assert "Linear probe, mean average precision folder:pets" in page
    assert "64.5 % +3.5 no interval: not paired" in page
    assert "0.934 +0.022 no interval: not paired" in page
    assert "64.5 % +3.5 no interval: predictions.csv does not give these values" in page
    assert "+25.0" not in page


def test_only_settings_that_differ_are_listed(tmp_path: Path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", base_lr=0.2, mask="tube")]
    page = text(compare_runs(runs)).partition("Settings that differ")[2].partition("Training")[0]
    assert "base_lr 0.1 0.2" in page
    assert "mask – tube" in page
    for equal in ("epochs", "seed", "output"):
        assert equal not in page


def test_curves_of_all_runs_are_on_one_axis_with_a_legend(tmp_path: Path):
    source = compare_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")])
    (svg,) = re.findall(r'<svg viewBox[^>]*aria-label="Loss over steps".*?</svg>', source, re.S)
    assert svg.count("<polyline") == 2
    assert {"c0", "c1"} <= set(re.findall(r"line (c\d)", svg))
    points = re.search(r'data-points="([^"]*)"', svg)[1].replace("&#34;", '"')
    assert [point[2] for point in json.loads(points)][::2] == [
        "a · step 1 · epoch 1 · 1", "b · step 1 · epoch 1 · 1",
    ]  # fmt: skip
    assert 'class="legend"' in source


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path):
    page = text(compare_runs([make_run(tmp_path / name / "run") for name in ("mae", "simmim")]))
    assert "mae/run" in page
    assert "simmim/run" in page


def test_a_run_that_has_hardly_begun_is_compared_all_the_same(tmp_path: Path):
    begun = tmp_path / "b"
    begun.mkdir()
    (begun / "config.json").write_text("{")
    page = text(compare_runs([make_run(tmp_path / "a", WORSE), begun]))
    assert "unfinished" in page
    assert "config.json is empty or damaged" in page
    assert "not evaluated" in page


def test_the_page_asks_nothing_of_the_network_and_is_well_formed(tmp_path: Path):
    source = compare_runs([make_run(tmp_path / "<b>", WORSE), make_run(tmp_path / "b", BETTER)])
    assert "://" not in source
    assert "default-src 'none'" in source
    assert "<b></th>" not in source
    opened = re.findall(r"<([a-z][a-z0-9]*)[\s>]", source.partition("<style>")[0])
    opened += re.findall(r"<([a-z][a-z0-9]*)[\s>]", source.partition("</style>")[2])
    closed = re.findall(r"</([a-z][a-z0-9]*)>", source)
    assert sorted(tag for tag in opened if tag not in VOID) == sorted(
        tag for tag in closed if tag != "style"
    )


def test_the_command_writes_the_page(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        make_run(tmp_path / name)
    assert cli_main(["compare", "a", "b"]) == 0
    assert "Comparison: comparison.html" in capsys.readouterr().out
    assert cli_main(["compare", "a", "b", "--output", "pages/ab.html"]) == 0
    assert "Loss" in Path("pages/ab.html").read_text()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "give two or more"),
        (["a", "a"], "different"),
        (["a", "none"], "not a run directory"),
    ],
)
def test_fewer_than_two_runs_are_refused(tmp_path: Path, names, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    assert cli_main(["compare", *names]) == 2
    assert message in capsys.readouterr().err
    assert not Path("comparison.html").exists()
