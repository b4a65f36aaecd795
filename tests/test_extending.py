"""The examples of docs/extending.md, installed as a package beside vim_ssl, work as it says."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vim_ssl import cli
from vim_ssl.data import open_data
from vim_ssl.kernels import backends, plugins
from vim_ssl.kernels.selective_scan import bi_selective_scan
from vim_ssl.kernels.selective_scan.accuracy import two_way_inputs

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def extras(tmp_path, monkeypatch) -> Path:
    """Install the package of the page for one test; returns the folder that holds it."""
    from vim_ssl.data import registry as data_registry
    from vim_ssl.objectives import base
    from vim_ssl.tasks import registry as task_registry
    from vim_ssl.utils import plugins as library_plugins

    page = PAGE.read_text(encoding="utf-8")
    for name, code in re.findall(r"```python\n# (vim_extras/\S+)\n(.*?)```", page, re.S):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    ((group, lines),) = re.findall(r'entry-points\."(.*?)"\]\n(.*?)```', page, re.S)
    info = tmp_path / "vim_extras-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vim-extras\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines.replace(chr(34), '')}")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for module in (plugins, library_plugins):
        monkeypatch.setattr(module, "_loaded", set(module._loaded))
    tables = [data_registry.SOURCES, data_registry.OPTIONS, data_registry._openers,
              base.OBJECTIVES, task_registry.TASKS, *backends.BACKENDS.values()]  # fmt: skip
    before = [dict(table) for table in tables]
    yield tmp_path
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vim_extras"]:
        del sys.modules[name]
    backends._auto.cache_clear()


def write_images(folder: Path) -> str:
    """32 flat images of 28 px with a little noise, and their classes: dark or bright."""
    draw = np.random.default_rng(0)
    level = draw.integers(40, 200, 32)
    images = level[:, None, None, None] + draw.integers(-9, 9, (32, 28, 28, 3))
    np.save(folder / "images.npy", images.astype(np.uint8))
    np.save(folder / "labels.npy", (level > 120).astype(int))
    return "npy:images.npy"


def test_a_source_opens_its_scheme(extras, capsys):
    spec = write_images(extras)
    data = open_data(f"{spec}?labels=labels.npy&limit=10")
    assert len(data) == 10
    assert data.classes == ["0", "1"]
    assert np.array_equal(np.asarray(data[0]["image"]), np.load("images.npy")[0])
    assert cli.main(["data", "check", spec]) == 0
    with pytest.raises(ValueError, match="label"):
        open_data(f"{spec}?window=1,2")


def test_an_objective_trains_and_a_task_evaluates_its_encoder(extras, capsys):
    spec = write_images(extras)
    argv = ["mim-pretrain", "--data", spec, "--objective", "mean-colour", "--objective-args",
            "hidden=8", "--encoder", "vim_nano_patch4_28", "--model-args", "depth=1",
            "embed_dim=16", "d_state=4", "--epochs", "20", "--warmup-epochs", "1",
            "--batch-size", "8", "--base-lr", "3e-3", "--lr-reference-batch", "8", "--workers", "0",
            "--eval-every", "100", "--log-every", "1", "--crop-scale", "1", "1", "--trackers",
            "none", "--output", "run"]  # fmt: skip
    assert cli.main(argv) == 0
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses[-1] < 0.2 * losses[0]
    assert json.loads(Path("run/config.json").read_text())["objective_args"] == {"hidden": 8}
    assert cli.main(["brightness", "--encoder", "run", "--data", spec, "--output", "out"]) == 0
    assert json.loads(Path("out/metrics.json").read_text())["r2"] > 0.5


def test_a_backend_agrees_with_the_reference(extras):
    inputs = {name: m.double() for name, m in two_way_inputs(2, 5, 3, 4).items()}
    expected = bi_selective_scan(**inputs, backend="reference")
    torch.testing.assert_close(bi_selective_scan(**inputs, backend="loop"), expected)


def test_a_wrong_name_suggests_one_of_the_package(extras, capsys):
    assert cli.main(["brightnes"]) == 2
    assert "Did you mean 'brightness'?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["mim-pretrain", "--objective", "mean-color"])
    assert "Did you mean 'mean-colour'?" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"Did you mean 'npy'\?"):
        open_data("npyy:images.npy")
