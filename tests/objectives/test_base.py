"""Objectives by name: those of the library, and those that another package adds."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch import nn

from vim_ssl.objectives import base
from vim_ssl.objectives.base import OBJECTIVES, PretrainObjective, StepOutput, get_objective
from vim_ssl.recipes import mim_pretrain
from vim_ssl.training.run import read_metrics
from vim_ssl.utils import plugins

PLUGIN = """
from vim_ssl.objectives.base import register_objective
register_objective("siamese", "{module}:Siamese")
"""


class Siamese(PretrainObjective):
    """Two crops of an image with alike features."""

    views = "crops"

    def __init__(self, encoder, *, width: int = 8):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.embed_dim, width)

    def forward(self, batch):
        crops = batch["image"]  # (b, 2, c, h, w)
        assert "mask" not in batch
        a, b = self.head(self.encoder(crops.flatten(0, 1))).unflatten(0, (-1, 2)).unbind(1)
        return StepOutput((a - b).square().sum(), len(crops))


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(base, "OBJECTIVES", dict(OBJECTIVES))
    monkeypatch.setattr(mim_pretrain, "OBJECTIVES", base.OBJECTIVES)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package that declares a plugin on the path."""

    def write(name: str, code: str) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{name} = {name}\n")
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_loaded", set())
    return write


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_settings_of_an_objective_are_settings_of_the_recipe(name):
    assert issubclass(get_objective(name), PretrainObjective)
    assert {*get_objective(name).settings, *base.MASK_SETTINGS} <= vars(
        mim_pretrain.Config()
    ).keys()


def test_a_plugins_objective_is_trained_by_its_name(install, tmp_path):
    install("siamese_plugin", PLUGIN.format(module=__name__))
    (tmp_path / "images").mkdir()
    for i in range(6):
        values = np.random.default_rng(i).integers(0, 255, (28, 28), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "images" / f"{i}.png")
    argv = [
        "--preset", "demo", "--data", str(tmp_path / "images"), "--objective", "siamese",
        "--model-args", "depth=1", "embed_dim=16", "--batch-size", "3", "--epochs", "1",
        "--warmup-epochs", "0", "--workers", "0", "--threads", "1", "--log-every", "1",
        "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert mim_pretrain.main([*argv, "--objective-args", "width=4"]) == 0
    assert len(read_metrics(tmp_path / "run")) == 2
    with pytest.raises(ValueError, match=r"objective_args: .*'depth'"):
        mim_pretrain.main([*argv[:-1], str(tmp_path / "b"), "--objective-args", "depth=4"])


def test_an_unknown_objective_is_refused_with_the_near_name(capsys):
    with pytest.raises(SystemExit) as stop:
        mim_pretrain.main(["--objective", "simmin"])
    assert stop.value.code == 2
    assert "unknown objective 'simmin'. Did you mean 'simmim'?" in capsys.readouterr().err


def test_a_plugin_that_fails_is_named(install):
    install("broken_plugin", "raise RuntimeError('no licence')")
    with pytest.raises(ImportError, match=r"plugin 'broken_plugin' .*no licence"):
        get_objective("none such")


def test_a_name_is_registered_once():
    base.register_objective("mine", Siamese)
    base.register_objective("mine", Siamese)
    assert get_objective("mine") is Siamese
    with pytest.raises(ValueError, match="'mae' already exists"):
        base.register_objective("mae", Siamese)


def test_masks_count_as_used_where_a_batch_holds_them():
    config = SimpleNamespace(teacher="ema")
    assert Siamese.used_settings(config) == set()
    assert {*base.MASK_SETTINGS, "norm_pix_loss"} == get_objective("simmim").used_settings(config)
