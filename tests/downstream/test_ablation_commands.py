"""Every row of the table of ablations in docs/pretraining.md, in every command that it names."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from docs_pages import text_of
from PIL import Image

from vim_ssl import cli, load_encoder
from vim_ssl.data import open_data
from vim_ssl.downstream import finetune, knn, linear_probe
from vim_ssl.evaluation.comparison import Comparison
from vim_ssl.recipes import mim_pretrain, supervised_pretrain
from vim_ssl.tasks.classification import build_classifier
from vim_ssl.training.run import read_metrics
from vim_ssl.utils.config import parse

ROW = re.compile(r"^\| ([^|]+) \| `((?:\w+=[\w-]+ ?)+)` \|", re.MULTILINE)
CELLS = {name: args.split() for name, args in ROW.findall(text_of("docs/pretraining.md"))}
SIZE = ["embed_dim=16", "depth=2", "d_state=2"]
PRESET = ["--encoder", "vim_nano_patch8_64"]


def config(module, cell: str, *argv: str):
    words = ["--model-args", *CELLS.get(cell, cell.split()), *SIZE]
    return parse(module.Config, argv=[*PRESET, *argv, *words])


def test_the_table_has_the_papers_rows():
    assert len(CELLS) == 9


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(24):
        path = folder / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("cell", CELLS)
def test_a_row_builds_the_same_encoder_everywhere(cell, photos, tmp_path):
    data = open_data(str(photos))
    encoders = {}
    pretraining = config(mim_pretrain, cell)
    encoders["mim"] = mim_pretrain.build_model(pretraining)
    objective = mim_pretrain.build_objective(pretraining, encoders["mim"])
    mask = torch.arange(64).repeat(2, 1) >= 16
    batch = {"image": torch.randn(2, 3, 64, 64), "mask": mask[:, torch.randperm(64)]}
    objective(batch).loss_sum.backward()
    assert all(p.grad is not None for p in encoders["mim"].parameters() if p.requires_grad)

    supervised = config(supervised_pretrain, cell, "--data", str(photos))
    encoders["supervised"] = build_classifier(
        supervised.encoder, data, supervised, **supervised.model_args
    )
    encoders["finetune"] = finetune.build_encoder(
        config(finetune, cell, "--data", str(photos)), PRESET[1], data
    )
    for name in ("supervised", "finetune"):
        assert encoders[name](batch["image"]).shape == (2, 2)
    frozen = cell.replace("max", "global_pool=max cls_position=none")
    for module in (linear_probe, knn):
        settings = config(module, frozen, "--data", str(photos), "--output", str(tmp_path / "out"))
        comparison = Comparison(module.__name__, settings)
        encoders[module.__name__] = comparison.encoder
        args = settings.model_args
        assert len(settings.readouts) == (1 if "global_pool" in args else 4)
        (tmp_path / "out" / ".evaluation.json").unlink()
    shapes = {
        tuple(sorted((k, v.shape) for k, v in one.state_dict().items() if "head" not in k))
        for one in encoders.values()
    }
    assert len(shapes) == 1
    for key in ("directions", "shared_conv", "divide_out", "cls_position"):
        assert len({one.config[key] for one in encoders.values()}) == 1


def test_a_run_hands_its_blocks_on(photos, tmp_path, capsys):
    run, quick = tmp_path / "run", ["--threads", "1", "--workers", "0"]
    argv = ["mim-pretrain", *PRESET, "--data", str(photos), "--output", str(run), *quick]
    args = ["--model-args", "directions=layer", "cls_position=none", *SIZE]
    size = ["--max-steps", "2", "--batch-size", "4", "--decoder-dim", "16", "--decoder-depth", "1"]
    assert cli.main([*argv, *size, *args]) == 0
    assert all(np.isfinite(row["loss"]) for row in read_metrics(run))
    assert load_encoder(run).directions == "layer"

    probe = ["linear-probe", "--encoder", str(run), "--no-baselines", "--output"]
    assert cli.main([*probe, str(tmp_path / "max"), "--model-args", "global_pool=max"]) == 0
    assert "readout max" in capsys.readouterr().out
    argv = ["finetune", "--encoder", str(run), *quick, "--max-steps", "2", "--batch-size", "4"]
    argv += ["--warmup-epochs", "0", "--output", str(tmp_path / "tuned")]
    assert cli.main([*argv, "--model-args", "global_pool=max-logits"]) == 0
    tuned = load_encoder(tmp_path / "tuned", num_classes=None)
    assert (tuned.directions, tuned.global_pool) == ("layer", "max-logits")


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("linear-probe", ["global_pool=max-logits"], "not a readout of frozen features"),
        ("knn", ["directions=layer", "depth=3"], "depth is 3; use an even one"),
        ("linear-probe", ["direction=layer"], "model_args: .*Did you mean 'directions'"),
        ("linear-probe", ["global_pool=avg", "--readouts", "token"], "pass one of them"),
        ("finetune", ["global_pool=max-logits", *SIZE, "--frozen"], "use global_pool='max', or"),
        ("finetune", ["direction=layer"], "model_args: .*Did you mean 'directions'"),
        ("finetune", ["shared_conv=true", "directions=forward"], "use directions='both' or"),
        ("finetune", ["cls_position=none"], "'token.avg' needs a class token; use 'avg'"),
    ],
    ids=[
        "max-logits",
        "odd",
        "unknown",
        "two-readouts",
        "frozen",
        "unknown-finetune",
        "shared",
        "no-token",
    ],
)
def test_what_has_no_meaning_is_refused(command, words, says, photos, tmp_path, capsys):
    argv = [command, *PRESET, "--data", str(photos), "--output", str(tmp_path / "out")]
    assert cli.main([*argv, "--model-args", *words]) == 2
    assert re.search(says, capsys.readouterr().err)
