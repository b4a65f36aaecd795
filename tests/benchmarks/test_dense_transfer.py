"""The table of dense transfer: images in ADE20K's layout, and rows as a table."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import masked_splits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dense_transfer():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("dense_transfer")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_images_in_ade20ks_layout_are_the_same(dense_transfer, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder, high, shape in (("images", 256, (8, 6, 3)), ("masks", 3, (8, 6))):
            (tmp_path / "plain" / folder / split).mkdir(parents=True)
            for name in "ab":
                values = rng.integers(high, size=shape, dtype=np.uint8)
                Image.fromarray(values).save(tmp_path / "plain" / folder / split / f"{name}.png")
    (tmp_path / "plain" / "classes.txt").write_text("ground\ntree\nhouse\n")
    spec = f"masks:{tmp_path / 'plain'}"
    written = dense_transfer.as_ade20k(spec, tmp_path / "ade20k")
    for before, after in zip(masked_splits(spec, 0.2, 0), masked_splits(written, 0.2, 0),
                             strict=True):  # fmt: skip
        assert (len(before), after.classes[:3]) == (len(after), before.classes)
        assert len(after.classes) == 150
        for i in range(len(before)):
            assert np.array_equal(before[i]["mask"], after[i]["mask"])
            assert np.array_equal(before[i]["image"], after[i]["image"])


def test_the_table_has_means_of_full_runs(dense_transfer):
    def row(arm: str, value: float, epochs: float = 20) -> dict[str, str]:
        return {"task": "lobes of the brain", "arm": arm, "value": str(value), "train": "68",
                "test": "67", "epochs": str(epochs)}  # fmt: skip

    full = dense_transfer.TASKS["lobes of the brain"].settings["epochs"]
    rows = [row("offline_rgb", 60, full), row("offline_rgb", 62, full), row("untrained", 50, full),
            row("untrained", 1, full + 1)]  # fmt: skip
    head, _, *lines = dense_transfer.summary(rows).splitlines()
    assert head.endswith("| offline_rgb | untrained |")
    assert len(lines) == 1
    assert "drawn by people (AAL) | 68, 67 | 61.0 ± 1.4 | 50.0 |" in lines[0]


def test_a_trial_is_kept_out_of_the_results_however_they_are_spelled(dense_transfer, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dense_transfer, "run_jobs", lambda *_: 0)
    command = ["dense_transfer.py", "--steps", "3", "--out", "benchmarks/results"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as refused:
        dense_transfer.main()
    assert refused.value.code == 2


@pytest.mark.parametrize("steps", [0, 3])
def test_a_trial_is_not_taken_for_the_run_that_it_tries(dense_transfer, monkeypatch, steps):
    script, full = dense_transfer.segmentation, dense_transfer.TASKS["organs in CT"].settings
    monkeypatch.setattr(script, "run", lambda _: {"volume_dice": 50, "train": 1, "test": 1})
    row = dense_transfer.measure("organs in CT", "offline_rgb", 0, steps, None)
    assert row["epochs"] == (0 if steps else full["epochs"])
