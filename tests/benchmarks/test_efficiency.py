"""Efficiency: the summary of rows with known laws, and which points are measured again."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def efficiency():
    sys.path.insert(0, str(FOLDER))  # as for a script that is started there
    try:
        spec = importlib.util.spec_from_file_location("efficiency", FOLDER / "efficiency.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["efficiency"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("efficiency", None)


def rows_of(model: str, attention: str, law, **more) -> list[dict[str, str]]:
    """Rows as a CSV file gives them; ``law(tokens)`` gives seconds and MiB."""
    rows = []
    for px in (224, 640, 1024, 1248, 2048):
        tokens = (px // 16) ** 2 + 1
        seconds, mib = law(tokens)
        row = {
            "hardware": "a machine", "device": "cpu", "threads": 1, "batch": 1, "dtype": "float32",
            "task": "features", "state": "measured", "model": model, "attention": attention,
            "pixels": px, "tokens": tokens, "seconds": seconds, "rise_mib": mib, "gflops": 1,
        }  # fmt: skip
        rows.append({k: str(v) for k, v in (row | more).items()})
    return rows


def test_exponents_crossover_and_claim_are_those_of_the_rows(efficiency):
    # Vim linear in tokens; DeiT quadratic, equal at 1025 tokens, 512 px.
    rows = rows_of("vim_tiny", "", lambda t: (t / 1000, t / 100))
    rows += rows_of("deit_tiny", "plain", lambda t: (t**2 / 1025e3, t**2 / 1e4))
    rows += rows_of("deit_tiny", "fused", lambda t: (t / 2000, t / 200))
    text = efficiency.summary(rows)
    assert "Vim-Ti: time grows as tokens^1.00 (target at most 1.1: met)" in text
    assert "Vim-Ti: memory grows as tokens^1.00 (target at most 1.1: met)" in text
    assert "Vim-Ti against DeiT-Ti, plain attention: faster from 512 px on." in text
    assert "Vim-Ti against DeiT-Ti, fused attention: faster at no measured size." in text
    # 6085 tokens: 6085 / 1025 = 5.94 times; 1 - 100 / 6085 = 98.4 %
    assert (
        "plain attention at 1248 px: 5.94 times as fast (claimed 2.8: met), 98.4 % less memory "
        "(claimed 86.8: met)"
    ) in text
    assert "0.50 times as fast (claimed 2.8: not met), -100.0 % less memory" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| DeiT-Ti, plain")]
    assert line.split(" | ")[-2:] == ["2.00", "2.00 |"]


def test_tasks_are_kept_apart_and_a_plot_is_drawn(efficiency, tmp_path):
    rows = rows_of("vim_tiny", "", lambda t: (t, t))
    rows += rows_of("vim_tiny", "", lambda t: (t**1.5, t**1.2), task="step")
    rows += rows_of("deit_tiny", "plain", lambda t: (0, 0), state="too long")
    text = efficiency.summary(rows)
    assert "time grows as tokens^1.00 (target at most 1.1: met)" in text
    assert "time grows as tokens^1.50 (target at most 1.1: not met)" in text
    assert "memory grows as tokens^1.20 (target at most 1.1: not met)" in text
    assert "DeiT" not in text
    efficiency.plot(rows, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_it_goes_on_and_leaves_larger_sizes_of_what_failed_out(efficiency, tmp_path, monkeypatch):
    asked = []

    def measured(point, **limits):
        asked.append((point.model, point.attention, point.pixels))
        if point.attention == "plain" and point.pixels >= 384:
            return {"state": "too large", "tokens": 1}
        return {"state": "measured", "tokens": 1, "seconds": 1.0, "rise_mib": 2.0}

    monkeypatch.setattr(efficiency, "measured", measured)
    args = argparse.Namespace(
        device="cpu", threads=1, batch=1, dtype="float32", seconds=1.0, repeats=1, memory=0,
        models=("vim_tiny", "deit_tiny"), attention=("fused", "plain"),
        tasks=("features",), pixels=(512, 224, 384), out=tmp_path,
    )  # fmt: skip
    efficiency.measure_all(args)
    assert ("deit_tiny", "plain", 384) in asked
    assert ("deit_tiny", "plain", 512) not in asked
    assert [px for model, _, px in asked if model == "vim_tiny"] == [224, 384, 512]
    asked.clear()
    efficiency.measure_all(args)
    assert asked == []  # all of it is there, and what failed is not tried again
    monkeypatch.setattr(efficiency, "origin", lambda: {"hardware": "another machine"})
    efficiency.measure_all(args)
    assert ("vim_tiny", "", 224) in asked
