"""The claims of the paper: commands that parse, the rule of the states, small measurements."""

import importlib
import json
import math
import os
import shlex
import signal
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from vim_ssl import cli
from vim_ssl.downstream import paper
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.tasks.paper import counted, efficiency, training
from vim_ssl.tasks.paper.campaign import open_jobs, run_jobs
from vim_ssl.tasks.paper.claims import CLAIMS, RECALLED
from vim_ssl.tasks.paper.committed import Arms, Committed
from vim_ssl.tasks.paper.findings import (
    IN_PART,
    NOT_MEASURED,
    NOT_REPRODUCED,
    REPRODUCED,
    Finding,
    combined_state,
)
from vim_ssl.tasks.paper.full import FullSize
from vim_ssl.tasks.paper.measure import Settings
from vim_ssl.tasks.paper.page import page, state_of
from vim_ssl.tasks.paper.rows import COLUMNS, Key, Rows
from vim_ssl.tasks.paper.timed import MEMORY, SECONDS, Efficiency
from vim_ssl.tasks.paper.training import ARMS, DATA, VIT, Above, from_hex, to_hex
from vim_ssl.training.run import stored_or
from vim_ssl.utils.config import parse
from vim_ssl.utils.files import append_rows, read_rows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIELDS = {name: f"/data/{name}" for name in ("imagenet", "coco", "ade20k", "output")}


def settings(command=cli.main, **more) -> Settings:
    known = Settings(("digits",), 1, 30.0, (640,), command, lambda text: None)
    return replace(known, **more)


def rows_in(folder: Path, committed: Path | None = None) -> Rows:
    return Rows(folder / "paper.csv", committed)


# ------------------------------------------------------------------------- the table


def commands() -> dict[str, str]:
    """Every command of the table by a name."""
    lines = {}
    for key, claim in CLAIMS.items():
        if claim.measure is not None and claim.measure.command:
            lines[f"{key}-small"] = claim.measure.command
        if claim.full is not None:
            for i, line in enumerate(claim.full.lines(FIELDS)):
                lines[f"{key}-full-{i}"] = line
    for data in DATA:
        for arm in (*ARMS, VIT):
            words = [*training.arguments(data, arm), *training.SHARED, "--epochs", "0.5"]
            lines[f"{data}-{arm}"] = "vim-ssl " + shlex.join(words)
    return lines


@pytest.mark.parametrize("line", commands().values(), ids=commands().keys())
def test_a_command_has_known_flags_and_values(line):
    first, *words = shlex.split(line)
    if first == "python":
        assert (ROOT / words[0]).is_file()
        return
    module = importlib.import_module(cli.all_commands()[words[0]].module)
    presets = getattr(module, "PRESETS", {})
    default = stored_or(getattr(module, "default_preset", None))
    config = parse(module.Config, presets, words[1:], default_preset=default)
    known = {*signature(VimEncoder).parameters, "num_heads"}  # the last one of timm's ViT
    assert set(getattr(config, "model_args", {})) <= known


def test_processes_are_started_by_a_launcher():
    (line, _) = CLAIMS["coco"].full.lines(FIELDS, "accelerate launch --num_processes 8")
    assert line.startswith(
        "accelerate launch --num_processes 8 -m vim_ssl.recipes.supervised_pretrain --preset "
    )


def test_every_value_says_where_it_is_from():
    for claim in CLAIMS.values():
        assert claim.source or claim.published in ("not in the paper", "none: future work")
        assert claim.measure is not None or claim.full is not None or claim.remark
    recalled = {key for key, claim in CLAIMS.items() if RECALLED in claim.source}
    assert {"coco", "directions-none", "head-mean", "imagenet-base-stride8"} <= recalled
    assert not recalled & {"speed", "memory", "parameters"}


def test_the_ablations_are_the_papers_nine_rows():
    compared = [claim.measure for claim in CLAIMS.values() if isinstance(claim.measure, Above)]
    arms = {arm for above in compared for arm in (above.arm, *above.others)}
    assert arms == {*ARMS, VIT}
    assert len(ARMS) == 8  # bidirectional SSM + conv1d with the mean is a row of both tables


# ------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("bound", "bar", "neutral", "state"),
    [
        (3.0, 2.8, 1.0, REPRODUCED),
        (2.8, 2.8, 1.0, REPRODUCED),
        (2.7, 2.8, 1.0, IN_PART),
        (1.0, 2.8, 1.0, NOT_REPRODUCED),
        (0.1, 0.0, 0.0, REPRODUCED),
        (0.0, 0.0, 0.0, NOT_REPRODUCED),
        (-0.1, 0.0, 0.0, NOT_REPRODUCED),
        (math.nan, 0.0, 0.0, NOT_MEASURED),
    ],
)
def test_the_bound_decides_a_finding(bound, bar, neutral, state):
    assert Finding("", "", bound, bar, neutral).state == state


@pytest.mark.parametrize(
    ("bounds", "state"),
    [
        ([], NOT_MEASURED),
        ([3, 3], REPRODUCED),
        ([3, 2], IN_PART),
        ([3, 0], IN_PART),
        ([2, 0], IN_PART),
        ([0, -1], NOT_REPRODUCED),
        ([3, math.nan], NOT_MEASURED),
    ],
)
def test_findings_combine_to_the_state_of_a_claim(bounds, state):
    findings = [Finding("", "", bound, bar=3, neutral=1) for bound in bounds]
    only_reported = Finding("", "", -5, decides=False)
    assert combined_state([*findings, only_reported]) == state


# ------------------------------------------------------------------------- values from rows


def add_training(rows: Rows, arm: str, seed: int, bits: np.ndarray, budget: str = "30 s") -> None:
    rows.append(Key("training", arm, "digits", str(seed), budget), metric="top-1 %",
                value=100 * bits.mean(), correct=to_hex(bits))  # fmt: skip


def test_bits_survive_a_file():
    for n in (1, 7, 8, 1000):
        bits = np.random.default_rng(n).random(n) < 0.7
        assert (from_hex(to_hex(bits)) == bits).all()


def test_the_interval_has_seeds_and_images(tmp_path):
    """Half of it: the root of the squares of Student's over seeds, with the variance pooled over
    the arms, and of the normal one over images."""
    rows, draw = rows_in(tmp_path), np.random.default_rng(0)
    ours, theirs = draw.random((3, 400)) < 0.8, draw.random((3, 400)) < 0.6
    for seed in range(3):
        add_training(rows, "middle", seed, ours[seed])
        add_training(rows, "mean", seed, theirs[seed])
    add_training(rows, "middle", 0, ~ours[0], "5 s")  # of another budget: not used
    (finding,) = Above("middle", ("mean",)).findings(rows, settings())
    gaps = 100 * (ours.mean(1) - theirs.mean(1))
    each = [(100 * bits.mean(1)).var(ddof=1) for bits in (ours, theirs)]
    variance = sum(max(of_arm, np.mean(each)) for of_arm in each) / 3
    of_seeds = stats.t.ppf(0.975, 4) * variance**0.5
    gap = ours.mean(0) - theirs.mean(0)
    of_images = 1.96 * 100 * gap.std() / 400**0.5
    assert finding.bound == pytest.approx(gaps.mean() - math.hypot(of_seeds, of_images), abs=0.3)
    assert f"{gaps.mean():+.1f} points [" in finding.text
    assert finding.state == REPRODUCED
    assert isinstance(training.accuracy(rows.select(arm="mean")[0]), Metric)


@pytest.mark.parametrize(
    ("requested", "used"), [(5.0, "digits, 5 s"), (12.0, "digits, 12 s"), (30.0, "digits, 12 s")]
)
def test_the_requested_or_longest_budget_is_reported(requested, used, tmp_path):
    rows = rows_in(tmp_path)
    for budget in ("5 s", "12 s"):
        add_training(rows, "middle", 0, np.ones(50, bool), budget)
        add_training(rows, "mean", 0, np.ones(50, bool), budget)
    add_training(rows, "middle", 0, np.ones(50, bool), "30 s")  # nothing to compare it with
    (finding,) = Above("middle", ("mean",)).findings(rows, settings(seconds=requested))
    assert finding.name == used


def test_one_seed_decides_nothing(tmp_path):
    rows = rows_in(tmp_path)
    add_training(rows, "middle", 0, np.ones(50, bool))
    add_training(rows, "mean", 0, np.zeros(50, bool))
    (finding,) = Above("middle", ("mean",)).findings(rows, settings())
    assert finding.state == NOT_MEASURED
    assert finding.text == "+100.0 points one seed, no interval (100.0 against 0.0 %)"


def efficiency_rows(folder: Path, device: str, values: dict[str, tuple[float, float]], px=1248):
    made = [
        {"hardware": "h", "device": device, "threads": 1, "batch": 1, "dtype": "float32",
         "state": "measured", "task": "features", "pixels": px,
         "model": "deit_tiny" if attention else "vim_tiny", "attention": attention,
         "seconds": seconds, "rise_mib": mib}
        for attention, (seconds, mib) in values.items()
    ]  # fmt: skip
    append_rows(folder / "efficiency.csv", list(made[0]), made)


def test_efficiency_is_decided_at_the_papers_size_and_on_a_gpu_if_there_is_one(tmp_path):
    rows = rows_in(tmp_path, tmp_path)
    speed, memory = Efficiency("features", SECONDS, 2.8), Efficiency("features", MEMORY, 86.8)
    efficiency_rows(tmp_path, "cpu", {"": (1, 10), "plain": (9, 90), "fused": (9, 90)}, px=640)
    assert combined_state(speed.findings(rows, settings())) == NOT_MEASURED
    efficiency_rows(tmp_path, "cpu", {"": (1, 10), "plain": (3, 100), "fused": (2, 9)})
    rows = rows_in(tmp_path, tmp_path)
    states = {f.name: f.state for f in speed.findings(rows, settings()) if f.decides}
    assert states == {"cpu, 1248 px, plain attention": REPRODUCED,
                      "cpu, 1248 px, fused attention": IN_PART}  # fmt: skip
    texts = [f.text for f in memory.findings(rows, settings()) if f.decides]
    assert texts == ["90.0 % less (10 against 100 MiB)", "11.1 % more (10 against 9 MiB)"]
    assert combined_state(memory.findings(rows, settings())) == IN_PART
    efficiency_rows(tmp_path, "cuda", {"": (2, 10), "plain": (1, 9), "fused": (1, 9)})
    rows = rows_in(tmp_path, tmp_path)
    assert combined_state(speed.findings(rows, settings())) == NOT_REPRODUCED


def test_other_benchmarks_are_compared_seed_by_seed(tmp_path):
    made = [{"arm": arm, "seed": seed, "value": value}
            for arm, values in (("a", (5, 6, 8)), ("b", (1, 3, 4)), ("base", (2,)))
            for seed, value in enumerate(values)]  # fmt: skip
    append_rows(tmp_path / "x.csv", list(made[0]), made)
    pairs = tuple(Arms(name, {}, "arm", "a", name, "value") for name in ("b", "base"))
    rows = rows_in(tmp_path, tmp_path)
    b, base = Committed("x.csv", pairs, "").findings(rows, settings())
    test = stats.ttest_rel((5, 6, 8), (1, 3, 4)).confidence_interval()
    assert b.bound == pytest.approx(test.low)
    assert base.bound == pytest.approx(stats.ttest_1samp((3, 4, 6), 0).confidence_interval().low)


# ------------------------------------------------------------------------- measurements


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """Images of two classes, and a tiny encoder, instead of the digits."""
    draw = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "images" / ("train" if i < 28 else "test") / f"c{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 120, (32, 32, 3)) + 130 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    data = shlex.quote(str(tmp_path / "images"))
    words = f"--preset cpu_supervised_32 --data {data} --batch-size 8"
    tiny = training.ImageSet(words, "img_size=32 patch_size=8 embed_dim=16 depth=2", "")
    monkeypatch.setitem(training.DATA, "digits", tiny)
    return tmp_path


@pytest.mark.slow
def test_a_training_is_measured_tested_and_read_again(small):
    rows, above = rows_in(small), Above("mean", ("layer",), ("mean", "layer"))
    for arm in above.peers:
        rows.append(Key("cost", arm, "digits"), value=0.1, seconds=0.1, steps=3)
    claim = replace(CLAIMS["directions-layer"], measure=above, full=None)
    few = settings(seconds=0.4)
    run_jobs(open_jobs([claim], rows, few), rows, few)
    chosen = rows.select(measure="training")
    assert [row["arm"] for row in chosen] == ["layer", "mean"]
    for row in chosen:
        assert int(row["steps"]) == 4
        assert f"{1.33333:.5f}"[:5] in row["settings"]
        assert len(from_hex(row["correct"])) == 12
        assert float(row["value"]) == pytest.approx(100 * from_hex(row["correct"]).mean(), abs=0.01)
    assert open_jobs([claim], rows, few) == []
    assert state_of(claim, rows, few) == NOT_MEASURED  # one seed
    assert len(open_jobs([claim], rows, settings(seconds=0.4, seeds=2))) == 2
    assert len(open_jobs([claim], rows, settings(seconds=0.5))) == 2


def fake_training(log: list, at: dict[int, BaseException] | None = None):
    """A command that only writes what a training leaves behind."""

    def command(words) -> int:
        log.append(list(words))
        if error := (at or {}).get(len(log)):
            raise error
        folder = Path(words[words.index("--output") + 1])
        if "--max-steps" in words:  # the cost of a step is the time between two
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
            for _ in range(int(words[words.index("--max-steps") + 1])):
                optimizer.step()
        (folder / "predictions.csv").write_text("label,predicted\na,a\na,b\n")
        state = {"plan": {"epoch_steps": 10}}
        (folder / "state.json").write_text(json.dumps(state))
        return 0

    return command


def test_costs_are_measured_in_turns_before_the_first_training(tmp_path, monkeypatch):
    log: list = []
    spent = iter(range(10_000))
    monkeypatch.setattr(training, "clock", lambda device: next(spent) ** 1.1)
    monkeypatch.setattr(training, "recorded", lambda folder, name: {"epoch_steps": 10})
    rows, two = rows_in(tmp_path), settings(fake_training(log), seeds=2)
    above = Above("middle", ("mean",), ("middle", "mean"))
    claim = replace(CLAIMS["head-mean"], measure=above)
    run_jobs(open_jobs([claim], rows, two), rows, two)
    timed = [words for words in log if "--max-steps" in words]
    arms = ["middle" if "cls_position=middle" in words else "mean" for words in timed]
    assert arms[:4] == ["middle", "mean"] * 2
    assert not any("--max-steps" in words for words in log[len(timed) :])
    assert {row["arm"] for row in rows.select(measure="cost")} == {"middle", "mean"}
    seeds = [row["seed"] for row in rows.select(measure="training")]
    assert seeds == ["0", "0", "1", "1"]  # a comparison of all arms after each seed
    assert rows.select(measure="training")[0]["value"] == "50.0"


def test_a_stopped_campaign_goes_on(tmp_path, monkeypatch):
    log: list = []
    monkeypatch.setattr(training, "recorded", lambda folder, name: {"epoch_steps": 10})
    rows, claim = rows_in(tmp_path), CLAIMS["head-mean"]
    for arm in ARMS:
        rows.append(Key("cost", arm, "digits"), value=1, seconds=1, steps=10)
    stopped = settings(fake_training(log, {2: SystemExit(0)}), seeds=2)
    with pytest.raises(SystemExit):
        run_jobs(open_jobs([claim], rows, stopped), rows, stopped)
    assert len(rows.select(measure="training")) == 1
    with open(tmp_path / "paper.csv", "a") as file:
        file.write("2026-01-01,cut")  # by a kill in a write
    again = rows_in(tmp_path)
    assert len(open_jobs([claim], again, stopped)) == 3
    log.clear()
    full = settings(fake_training(log), seeds=2)
    run_jobs(open_jobs([claim], again, full), again, full)
    assert len(log) == 3
    assert len(again.select(measure="training")) == 4


def test_sigterm_ends_the_command_and_keeps_the_rows(tmp_path, monkeypatch, capsys):
    csv = tmp_path / "paper.csv"
    count = counted.parameters

    def stop(preset: str) -> int:
        if "small" in preset:
            os.kill(os.getpid(), signal.SIGTERM)
        return count(preset)

    monkeypatch.setattr(counted, "parameters", stop)
    before = signal.getsignal(signal.SIGTERM)
    words = ["paper", "--run", "parameters", "--output", str(csv)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert [row["arm"] for row in read_rows(csv)] == ["vim_base_patch16_224"]
    monkeypatch.setattr(counted, "parameters", count)
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "the same command goes on" in out
    assert "tiny: 7,148,008" in out
    assert len(read_rows(csv)) == 5


def test_counted_operations_are_linear(tmp_path, monkeypatch):
    """Those of attention are not."""
    monkeypatch.setattr(counted, "PIXELS", (256, 512, 1024))
    monkeypatch.setattr(counted, "VIM", "vim_nano_patch16_64")
    rows, claim = rows_in(tmp_path), CLAIMS["linear-cost"]
    run_jobs(open_jobs([claim], rows, settings()), rows, settings())
    (finding,) = claim.measure.findings(rows, settings())
    assert 0.99 < -finding.bound < 1.01
    assert finding.state == REPRODUCED


def test_rows_of_a_campaign_stand_alone(tmp_path):
    """Rows of one machine are not completed by committed ones of another."""
    committed, mine = tmp_path / "committed", tmp_path / "mine"
    for seed in range(2):
        for arm in ("middle", "mean"):
            add_training(Rows(committed / "paper.csv"), arm, seed, np.ones(50, bool))
    rows, claim = rows_in(mine, committed), CLAIMS["head-mean"]
    assert state_of(claim, rows, settings()) == NOT_REPRODUCED
    assert len(open_jobs([claim], rows, settings())) == 2
    add_training(rows, "middle", 0, np.ones(50, bool))
    add_training(rows, "mean", 0, np.zeros(50, bool))
    assert state_of(claim, rows, settings()) == NOT_MEASURED  # one seed


def test_a_count_that_rounds_to_another_value_is_not_reproduced(tmp_path):
    rows = rows_in(tmp_path)
    rows.append(Key("parameters", "vim_tiny_patch16_224"), value=7_600_000)
    assert state_of(CLAIMS["parameters"], rows, settings()) == NOT_REPRODUCED


@pytest.mark.parametrize("task", ["step", "dense"])
def test_a_point_has_all_its_values(task, monkeypatch):
    from timm.layers import set_fused_attn, use_fused_attn

    fused, threads = use_fused_attn(), torch.get_num_threads()
    monkeypatch.setitem(efficiency.MODELS, "vim_tiny", "vim_nano_patch16_64")
    monkeypatch.setattr(efficiency, "SHORT", 0.0)
    point = efficiency.Point("cpu", 1, "vim_tiny", "", task, 64, 1, "float32")
    try:
        row = efficiency.measure(point, repeats=1, memory_gb=0)
    finally:
        set_fused_attn(fused)
        torch.set_num_threads(threads)
    assert row["seconds"] > 0
    assert row["images_per_s"] == pytest.approx(1 / row["seconds"], rel=1e-2)
    assert row["peak_mib"] > row["rise_mib"] >= 0
    assert 0.02 < row["gflops"] < 0.1  # 17 tokens x 2 x 0.97 million weights, and the scans


def test_a_dense_head_reads_both_models():
    import timm

    for name in ("vim_nano_patch16_64", "deit_tiny_patch16_224"):
        model = timm.create_model(name, num_classes=0, img_size=64)
        dense = efficiency.WithDenseHead(model).eval()
        assert dense(torch.randn(1, 3, 64, 64)).shape == (1, 150, 16, 16)


# ------------------------------------------------------------------------- full size


def test_full_size_runs_the_commands_and_decides(tmp_path):
    log: list = []

    def command(words) -> int:
        log.append(words)
        folder = Path(words[words.index("--output") + 1])
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"accuracy": 76.06}))
        return 0

    claim, rows = CLAIMS["imagenet-tiny"], rows_in(tmp_path)
    fields = FIELDS | {"output": str(tmp_path / "runs")}
    with pytest.raises(ValueError, match="needs ImageNet-1k and 8 GPUs; give --imagenet FOLDER"):
        claim.full.run(claim.key, rows, settings(command), fields | {"imagenet": ""})
    claim.full.run(claim.key, rows, settings(command), fields)
    assert log[0][:3] == ["supervised-pretrain", "--preset", "vim_tiny_224"]
    assert state_of(claim, rows, settings()) == REPRODUCED  # 76.1 when rounded
    for value, state in ((75.0, IN_PART), (72.0, NOT_REPRODUCED)):
        rows.append(Key("full size", claim.key), value=value)
        assert state_of(claim, rows, settings()) == state


def test_a_command_that_fails_ends_the_full_size(tmp_path):
    full = FullSize(("finetune --data x", "finetune --data y"), "accuracy", 1.0, 0.0, "nothing")
    with pytest.raises(RuntimeError, match="ended with code 2"):
        full.run("k", rows_in(tmp_path), settings(lambda words: 2), FIELDS)


# ------------------------------------------------------------------------- page and command


def test_the_page_is_made_of_the_committed_rows():
    config = paper.Config(output=str(RESULTS / paper.TABLE))
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    remedy = f"vim-ssl paper --output {RESULTS / paper.TABLE} --page docs/paper.md"
    assert page(paper.open_rows(config), paper.make_settings(config)) == text, remedy
    for key in CLAIMS:
        assert f"| `{key}` |" in text


def test_the_committed_rows_have_all_columns():
    rows = read_rows(RESULTS / paper.TABLE)
    assert rows
    assert tuple(rows[0]) == COLUMNS
    for row in rows:
        assert row["date"]
        assert row["hardware"]
        assert row["versions"]
        assert row["commit"]
        assert row["value"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--run", "sped"], "no claim 'sped'. Did you mean 'speed'"),
        (["--data", "letters"], "use digits or emoji"),
        (["--pixels", "100"], "multiples of 16"),
        (["--seeds", "0"], "at least one seed"),
    ],
)
def test_what_has_no_meaning_is_refused(words, says, tmp_path, capsys):
    try:
        code = cli.main(["paper", *words, "--output", str(tmp_path / "a.csv")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert says in capsys.readouterr().err
