"""What accelerate and its launcher are asked for, and what a run then does."""

from pathlib import Path

import pytest
import torch
from processes import finish, start
from small_run import train

from vim_ssl.objectives.classification import Classification
from vim_ssl.training.accelerator import make_accelerator, unused_settings
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.run import read_metrics


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND", "USE_FSDP"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)


def test_runs_of_one_process_have_each_their_own_precision():
    for precision in ("no", "bf16", "no", "bf16"):
        accelerator = make_accelerator(TrainConfig(precision=precision, threads=1))
        assert accelerator.mixed_precision == precision
        with accelerator.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.parametrize(
    ("variables", "remark"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision bf16 is not used, but --prec"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps 4 is not"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend inductor is not used"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP settings are not used"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "started one process"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, ""),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, ""),
        ({}, ""),
    ],
)  # fmt: skip
def test_settings_of_the_launcher_that_are_not_used_are_named(monkeypatch, variables, remark):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    remarks = unused_settings(TrainConfig(accumulation=2), "NO")
    assert len(remarks) == bool(remark)
    assert remark in "".join(remarks)


@pytest.mark.parametrize("name", ["adahessian", "bnbadamw8bit", "fusedadamw"])
def test_an_optimiser_that_cannot_make_a_step_is_refused_before_the_run(tmp_path, name):
    with pytest.raises(ValueError, match=rf"optimizer '{name}' cannot be used .* such as adamw"):
        train(tmp_path / "run", optimizer=name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 1, "cutmix": 1}])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_any_number_of_images_is_mixed(count, settings):
    """The plan shrinks a batch to the data, so that an even setting may become odd."""

    class Pool(torch.nn.Module):
        num_classes = 3

        def forward(self, images):
            return images.mean((1, 2, 3))[:, None].expand(-1, 3)

    objective = Classification(Pool(), **settings)  # type: ignore[arg-type]
    images = torch.arange(count).float()[:, None, None, None].expand(-1, 3, 8, 8)
    seen = {}
    objective._cross_entropy = lambda logits, soft: seen.update(soft=soft) or logits.sum()
    out = objective({"image": images, "label": torch.arange(count) % 3})
    assert out.weight == len(seen["soft"]) == count
    torch.testing.assert_close(seen["soft"].sum(1), torch.ones(count))
    assert images.unique().numel() == count  # the batch itself is left as it was


PAIR = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from small_run import train
model = train(sys.argv[1], batch_size=8, **eval(sys.argv[3]))
Path(sys.argv[1], "weight").write_text(repr(float(model.weight)))
"""
# The weight changes with the size of a gradient, which an adaptive optimiser or a clip would hide.
PLAIN = {"broken": range(8), "weight_decay": 0.0, "optimizer": "sgd", "clip_grad": None}


def test_two_processes_give_the_weights_of_one_and_count_broken_images_of_both(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    weight = float(train(alone, batch_size=16, **PLAIN).weight)
    ranks = start(2, PAIR, str(together), str(Path(__file__).parents[1]), repr(PLAIN))
    finish(ranks)
    assert float((together / "weight").read_text()) == pytest.approx(weight, rel=1e-6)
    for run in (alone, together):
        assert read_metrics(run)[-1]["skipped"] == 8
