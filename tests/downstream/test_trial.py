"""A trial in its directory: rows, resume, the test images, and one verdict.

The trainings are replaced by encoders that are written at once, and the clock counts their steps;
one test trains.
"""

import contextlib
import csv
import json
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from docs_pages import blocks, commands
from PIL import Image

import vim_ssl
from vim_ssl import VimEncoder, cli, save_encoder
from vim_ssl.downstream.trial import Config
from vim_ssl.tasks.trial import costs
from vim_ssl.tasks.trial.plan import Job
from vim_ssl.tasks.trial.rows import folder_of
from vim_ssl.tasks.trial.session import Session
from vim_ssl.tasks.trial.splits import Splits
from vim_ssl.tasks.trial.trial import Recipes, run_trial

SIZE = {"img_size": 8, "embed_dim": 8, "depth": 1}
TINY: dict[str, Any] = {
    "encoder": "vim_nano_patch4_28", "model_args": SIZE, "weights": (), "seeds": 2,
    "objectives": ("mae",), "minutes": 60.0,
}  # fmt: skip
STEP, OPENING = 0.5, 1.0  # seconds of the clock


def images(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Noise with a bright bar, whose height is the class."""
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, 90, (n, 8, 8), dtype=np.uint8), np.arange(n) % 3
    for image, label in zip(x, y, strict=True):
        image[2 * label : 2 * label + 2] += 100
    return x, [f"class {label}" for label in y]


def data(seed: int = 1, test: int = 60) -> str:
    return vim_ssl.register_data({"train": images(90, 0), "test": images(test, seed)})


@cache
def saved(seed: int, classes: int) -> str:
    """Folder of an untrained encoder."""
    folder = tempfile.mkdtemp(dir=os.environ["HF_HOME"])  # of the tests
    torch.manual_seed(seed)
    save_encoder(VimEncoder(**SIZE, patch_size=4, in_chans=1, num_classes=classes), folder)
    return folder


@dataclass
class Finished:
    """The result of a training that took no time."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    plan: dict[str, Any]


@dataclass
class Fake:
    """Recipes and their clock.

    Attributes:
        stop_at: the number of the call that is interrupted; 0: none.
        diverging: part of the folder names of jobs that diverge.
        unfit: an objective that the encoder does not support.
    """

    stop_at: int = 0
    unfit: str = ""
    diverging: str = ""
    seconds: float = 0.0
    calls: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        return self.seconds

    @property
    def recipes(self) -> Recipes:
        return Recipes(self.pretrain, self.finetune)

    def train(self, output: str, settings: dict[str, Any], classes: int) -> Finished:
        self.calls.append(Path(output).name)
        if len(self.calls) == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        if self.diverging and self.diverging in output and not settings.get("max_steps"):
            raise FloatingPointError("the loss is not finite.")
        epochs = settings.get("epochs", 10.0)
        steps = settings.get("max_steps") or round(6 * epochs)
        self.seconds += OPENING
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        for _ in range(steps):  # the cost of a step is the time between two
            self.seconds += STEP
            if settings.get("max_steps"):
                optimizer.step()
        shutil.copytree(saved(settings["seed"], classes), output, dirs_exist_ok=True)
        base_lr = 2e-3 if settings.get("objective") == "simmim" else 1e-3
        config = {"base_lr": base_lr, "encoder": TINY["encoder"], "model_args": SIZE} | settings
        # A larger learning rate is better here.
        score = 50 + 10 * (config["base_lr"] > 1e-3) + settings["seed"]
        self.rates[Path(output).name] = config["base_lr"]
        plan = {"epoch_steps": 6, "effective_batch": 12}
        return Finished(Path(output), config, {"top1": score}, plan)

    def pretrain(self, data: str, *, output: str, **settings: Any) -> Finished:
        if settings["objective"] == self.unfit:
            raise ValueError("this encoder cannot leave patches out.")
        assert vim_ssl.register_data(data) == data
        return self.train(output, settings, 0)

    def finetune(self, encoder: str, data: str, *, output: str, **settings: Any) -> Finished:
        return self.train(output, settings, 3)


def run(folder: Path, fake: Fake | None = None, spec: str = "", **settings: Any) -> dict[str, Any]:
    fake = fake or Fake()
    config = Config(**(TINY | {"data": spec or data(), "output": str(folder)} | settings))
    return run_trial(config, fake.recipes, fake.now)


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of trial.csv, without their folders and the times of readings."""
    with open(folder / "trial.csv", newline="", encoding="utf-8") as file:
        return [row | {"run": Path(row["run"]).name} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, Any], Fake]:
    folder, fake = tmp_path_factory.mktemp("whole"), Fake()
    return folder, run(folder, fake), fake


def test_every_arm_has_a_row_and_the_page_a_verdict(whole):
    folder, metrics, _ = whole
    arms = [row["arm"] for row in metrics["rows"]]
    assert arms == [
        "raw pixels", "fresh weights, frozen features", "fresh weights, trained with labels",
        "mae, frozen features", "mae, fine-tuned",
    ]  # fmt: skip
    assert json.loads(json.dumps(metrics)) == json.loads((folder / "metrics.json").read_text())
    page = (folder / "report.html").read_text()
    (sentence,) = metrics["summary"]
    assert sentence in page
    assert "Accuracy against time" in page
    assert all(arm in page for arm in arms)
    chosen = [row["family"] for row in metrics["rows"] if row["chosen"]]
    assert sorted(chosen) == ["other", "pretrained", "raw pixels"]
    assert len(metrics["differences"]) == 3
    assert (metrics["n"], metrics["split"]) == (60, "test")


def test_trainings_have_equal_time(whole):
    _, metrics, _ = whole
    planned = metrics["plan"]["seconds"]
    for row in metrics["rows"]:
        if row["kind"] == "finetune":
            assert row["planned_seconds"] == pytest.approx(planned, abs=0.01)
            # Opening and saving twice, and steps that are rounded twice.
            assert row["seconds"] == pytest.approx(planned, abs=2 * OPENING + STEP)


def test_the_first_seed_chooses_the_learning_rate(whole):
    folder, metrics, _ = whole
    known = {(row["arm"], row["seed"], row["rate"]) for row in rows(folder)}
    tuned = "fresh weights, trained with labels"
    assert {rate for arm, seed, rate in known if (arm, seed) == (tuned, "0")} == {"1.0", "3.0"}
    assert {rate for arm, seed, rate in known if (arm, seed) == (tuned, "1")} == {"3.0"}
    row = next(row for row in metrics["rows"] if row["arm"] == tuned)
    assert (row["rate"], row["validation"]) == (3.0, 60.5)


def test_a_stopped_trial_continues(whole, tmp_path, capsys):
    """SIGTERM while it measures, and in a job."""
    _, expected, fake = whole
    with pytest.raises(SystemExit):
        run(tmp_path, Fake(stop_at=4))
    stopped = Fake(stop_at=len(fake.calls) - 4)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, stopped, resume="auto")
    assert end.value.code == 0
    assert f"--output {tmp_path} --resume auto" in capsys.readouterr().out
    assert not (tmp_path / "metrics.json").exists()
    resumed = Fake()
    metrics = run(tmp_path, resumed, resume="auto")
    assert [row["values"] for row in metrics["rows"]] == [row["values"] for row in expected["rows"]]
    assert metrics["verdict"] == expected["verdict"]
    assert rows(tmp_path) == rows(whole[0])
    jobs = [name for name in stopped.calls[:-1] + resumed.calls if not name.startswith("tmp")]
    assert len(jobs) == len(set(jobs)), "no finished job runs again"


def test_a_finished_trial_is_read_again_and_not_overwritten(whole):
    folder, metrics, _ = whole
    again = Fake()
    with pytest.raises(FileExistsError, match="already holds a trial"):
        run(folder, again)
    assert run(folder, again, resume="auto")["rows"] == metrics["rows"]
    assert again.calls == []
    for change in ({"minutes": 61.0}, {"spec": data(seed=5)}):
        with pytest.raises(ValueError, match=r"different (minutes|.*images)"):
            run(folder, again, resume="auto", **change)


def test_the_test_images_choose_nothing(whole, tmp_path):
    """With other test images every choice is the same, and only the results differ."""
    folder, metrics, _ = whole
    others = run(tmp_path, spec=data(seed=2, test=45))
    assert rows(tmp_path) == rows(folder)
    for key in ("arm", "chosen", "validation", "rate", "settings"):
        assert [row[key] for row in others["rows"]] == [row[key] for row in metrics["rows"]]
    assert others["n"] == 45
    assert [row["values"] for row in others["rows"]] != [row["values"] for row in metrics["rows"]]


def test_what_does_not_fit_is_left_out_and_printed(tmp_path, capsys):
    metrics = run(tmp_path, Fake(unfit="ar"), minutes=7.0, objectives=("mae", "simmim", "ar"))
    assert metrics["plan"]["seeds"] == 1
    assert metrics["verdict"] == "undecided"
    printed = capsys.readouterr().out
    assert "ar, frozen features: does not fit: this encoder cannot leave patches out." in printed
    assert "Left out, to fit into the time: learning rates times 3; simmim" in printed
    assert "simmim" not in {row["arm"].partition(",")[0] for row in metrics["rows"]}


@pytest.mark.parametrize("cut", ["in the settings", "in the path", "before the line break"])
def test_a_torn_row_is_written_again(whole, tmp_path, cut):
    """A kill in the middle of a row, also inside its quotes or its path."""
    folder, metrics, _ = whole
    copy = tmp_path / "trial"
    shutil.copytree(folder, copy)
    (copy / "metrics.json").unlink()
    *lines, last = (folder / "trial.csv").read_bytes().splitlines(keepends=True)
    while cut == "in the settings" and b'"{""' not in last:
        *lines, last = lines
    ends = {
        "in the settings": last.find(b'"{""') + 9,
        "in the path": -5,
        "before the line break": -2,
    }
    (copy / "trial.csv").write_bytes(b"".join(lines) + last[: ends[cut]])
    resumed = run(copy, resume="auto")
    assert [row["values"] for row in resumed["rows"]] == [row["values"] for row in metrics["rows"]]
    assert rows(copy) == rows(folder)


@pytest.mark.parametrize("changed", [0, -1])
def test_images_that_were_written_again_are_refused(tmp_path, changed):
    """Of the same size; the first or the last of them."""
    pixels, labels = images(90, 0)
    files = [tmp_path / "photos" / label / f"{i}.bmp" for i, label in enumerate(labels)]
    for file, image in zip(files, pixels, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    spec, folder = str(tmp_path / "photos"), tmp_path / "trial"
    with pytest.raises(SystemExit):
        run(folder, Fake(stop_at=1), spec)
    Image.fromarray(255 - pixels[changed]).save(files[changed])
    os.utime(files[changed], (1, 1))
    with pytest.raises(ValueError, match="of other image files"):
        run(folder, Fake(), spec, resume="auto")


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_refused_trial_leaves_its_directory_free(tmp_path, resume):
    with pytest.raises(ValueError, match="too short: its smallest plan needs --minutes"):
        run(tmp_path, minutes=0.02)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []
    with pytest.raises(SystemExit):  # it begins; the first training is interrupted
        run(tmp_path, Fake(stop_at=1), resume=resume)


@pytest.mark.parametrize("other", ["runs-a", "runs a", "Runs/a", "runs/a-0"])
def test_every_job_has_a_folder_of_its_own(other):
    assert folder_of(Job("runs/a")).lower() != folder_of(Job(other)).lower()


def test_a_factor_multiplies_the_learning_rate_of_its_objective(tmp_path):
    fake = Fake()
    run(tmp_path, fake, objectives=("mae", "simmim"), seeds=1)
    for objective, base_lr in (("mae", 1e-3), ("simmim", 2e-3)):
        folder = folder_of(Job(f"{objective}, frozen features", 0, 3.0))
        assert fake.rates[folder] == pytest.approx(3 * base_lr)


@pytest.mark.parametrize("bands", [3, 5])
def test_weights_are_adapted_to_the_bands_of_the_images(tmp_path, bands):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(30, 8, 8, bands)).astype(np.float32), [str(i % 3) for i in range(30)]
    splits = Splits.open(vim_ssl.register_data({"train": (x, y), "test": (x, y)}), 0.2, 0.3, 0)
    session = Session(tmp_path, Config(data="x"), splits, [], Fake().recipes, "cpu")
    (features,), readouts = session.features(saved(0, 0), 0, splits.validation)
    assert len(features.x) == len(splits.validation)
    assert torch.isfinite(features.x[:, next(iter(readouts.values()))]).all()


@pytest.mark.parametrize(
    ("diverging", "left_out", "rates"),
    [
        ("-rate-3", [], {1.0}),
        ("mae-frozen-features", ["mae, frozen features", "mae, fine-tuned"], {3.0}),
    ],
)
def test_what_diverges_is_left_out(tmp_path, diverging, left_out, rates):
    """A learning rate; or a whole arm, with the one that continues it."""
    metrics = run(tmp_path, Fake(diverging=diverging), seeds=1)
    assert list(metrics["left_out"]) == left_out
    assert {row["rate"] for row in metrics["rows"]} - {None} == rates
    page = (tmp_path / "report.html").read_text()
    assert all(f"{name}: the loss is not finite." in page for name in left_out)
    assert ("every pretraining diverged" in metrics["summary"][0]) == bool(left_out)
    again = Fake()
    assert run(tmp_path, again, resume="auto", seeds=1)["rows"] == metrics["rows"]
    assert again.calls == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --data"),
        (["--data", "x", "--minutes", "0"], "minutes must be above 0"),
        (["--data", "x", "--rates", "0"], "factors above 0"),
        (["--data", "x", "--objectives", "maes"], "unknown objective 'maes'"),
        (["--data", "x", "--validation", "1"], "validation is 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(argv, message, capsys):
    with contextlib.suppress(SystemExit):  # of the parser, with code 2
        assert cli.main(["trial", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_of_the_page_trains(tmp_path, monkeypatch):
    """With the recipes; each training stops after two steps, whatever the machine's speed."""
    pixels, labels = images(90, 0)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = tmp_path / "photos" / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "STEPS", 4)
    (block,) = (block for block in blocks("docs/trial.md") if block.language == "sh")
    ((_, name, *argv),) = commands(block.code)
    argv += ["--objectives", "mae", "--weights", "none", "--rates", "1", "--seeds", "1"]
    argv += ["--encoder", "vim_nano_patch4_28", "--model-args"]
    argv += [f"{key}={value}" for key, value in SIZE.items()]
    argv += ["--encoders", "timm:vit_tiny_patch16_224"]
    argv += ["--encoder-args", "embed_dim=24", "depth=1", "num_heads=3"]
    argv += ["--pretrain-args", "max_steps=2", "batch_size=8", "decoder_dim=8", "decoder_depth=1"]
    argv += ["--finetune-args", "max_steps=2"]
    assert cli.main([name, *argv]) == 0
    done = vim_ssl.Run(argv[argv.index("--output") + 1])
    by_arm = {row["arm"]: row for row in done.metrics["rows"]}
    assert by_arm["raw pixels"]["accuracy"] > 95, "the bars are easy"
    assert by_arm["mae, fine-tuned"]["seconds"] > by_arm["mae, frozen features"]["seconds"] > 0
    assert done.metrics["verdict"] == "undecided"  # one seed
    assert done.report.name == "report.html"
    trained = vim_ssl.Run(done.folder / "jobs" / folder_of(Job("mae, fine-tuned")))
    assert trained.state == "finished"
    assert trained.metrics["n"] == done.metrics["validation"]
    assert Path(trained.config["encoder"]).name == folder_of(Job("mae, frozen features"))
    vit = by_arm["timm:vit_tiny_patch16_224: mae, fine-tuned"]
    assert vit["encoder"] == "timm:vit_tiny_patch16_224"
    assert vit["seconds"] > 0
