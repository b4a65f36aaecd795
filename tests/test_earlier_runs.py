"""Runs made at an earlier commit still load, resume and can be evaluated; see
fixtures/earlier/make.py for how they were made.

A failure here means that a user's run directory of that time no longer works. The files of
fixtures/earlier must not be made again to mend it.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from earlier_runs import EARLIER, EMBED, PROBE, RUNS, batch, outputs, write_data
from safetensors.numpy import load_file

import vim_ssl
from vim_ssl import cli

TASKS = ("finetune", "segmentation", "detection")
MAY_DIFFER = {"resume", "max_steps"}  # between the settings of a run and of the same run resumed
# Their crops are resized as uint8 tensors, which torch rounds differently without AVX2.
RESIZED = ("segmentation", "detection")
DESCRIBED = ("format", "ema")  # in encoder.json and clip_config.json
MEASURED = ("loss", "lr", "grad_norm")  # in metrics.jsonl, of every step


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder / "data"


@pytest.fixture(autouse=True)
def workplace(data, tmp_path, monkeypatch) -> Path:
    """A folder with the data and a copy of the runs, as where they were made: it is the current
    one."""
    return prepare(data, tmp_path, monkeypatch)


@pytest.fixture(scope="module", params=RUNS)
def resumed(request, data, tmp_path_factory) -> tuple[str, Path]:
    """A run's name, and the folder of a copy that was resumed until its end."""
    if request.param == "detection":
        pytest.importorskip("pycocotools", reason="needs 'vim-ssl[detection]'")
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare(data, folder, monkeypatch)
        RUNS[request.param].main("--output", f"runs/{request.param}", "--resume", "auto")
    return request.param, folder / "runs" / request.param


def prepare(data: Path, folder: Path, monkeypatch) -> Path:
    shutil.copytree(EARLIER / "runs", folder / "runs")
    (folder / "data").symlink_to(data)
    monkeypatch.chdir(folder)
    return folder


def skip_other_rounding(name: str) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if name in RESIZED and "AVX" not in capability:
        pytest.skip(f"with {capability} the crops differ by a grey level from those recorded")


def read(path: Path):
    return json.loads(path.read_text())


def rows(path: Path) -> dict[int, dict]:
    """The lines of a metrics.jsonl by step."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line for line in lines}


def header(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return next(csv.reader(file))


def keys(value, prefix: str = "") -> set[str]:
    """The paths of all keys of nested dicts; of a list the keys of its items."""
    if isinstance(value, list):
        return {key for item in value for key in keys(item, f"{prefix}[]")}
    if not isinstance(value, dict):
        return set()
    below = (keys(item, f"{prefix}/{key}") for key, item in value.items())
    return {f"{prefix}/{key}" for key in value}.union(*below)


def expected() -> dict[str, np.ndarray]:
    with np.load(EARLIER / "outputs.npz") as file:
        return dict(file)


def assert_outputs(name: str, found: dict[str, np.ndarray]) -> None:
    kept = expected()
    assert {f"{name}/{key}" for key in found} == {k for k in kept if k.startswith(f"{name}/")}
    for key, value in found.items():
        np.testing.assert_allclose(value, kept[f"{name}/{key}"], rtol=1e-5, atol=1e-5, err_msg=key)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("name", RUNS)
def test_a_run_loads_and_gives_the_recorded_outputs(name):
    assert_outputs(name, outputs(name, Path("runs", name)))


@pytest.mark.parametrize("source", [".", "encoder.safetensors"], ids=["folder", "file"])
def test_a_saved_encoder_gives_the_recorded_outputs(source):
    encoder = vim_ssl.load_encoder(EARLIER / "encoder" / source, num_classes=None)
    with torch.no_grad():
        assert_outputs("encoder", {"logits": encoder(batch(2, 2, 16, 16)).numpy()})


def test_a_saved_encoder_keeps_its_configuration(tmp_path):
    encoder = vim_ssl.load_encoder(EARLIER / "encoder", num_classes=None)
    vim_ssl.save_encoder(encoder, tmp_path / "again", record={"recipe": "none"})
    before, after = read(EARLIER / "encoder/encoder.json"), read(tmp_path / "again/encoder.json")
    assert keys(before) <= keys(after)
    assert {key: after[key] for key in DESCRIBED} == {key: before[key] for key in DESCRIBED}
    assert after["config"].items() >= before["config"].items()
    before = load_file(EARLIER / "encoder/encoder.safetensors")
    after = load_file(tmp_path / "again/encoder.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_verified(name, capsys):
    assert cli.main(["verify", f"runs/{name}"]) == 0
    assert "loads completely" in capsys.readouterr().out


@pytest.mark.parametrize("name", RUNS)
def test_the_report_of_a_run_is_written(name):
    assert cli.main(["report", f"runs/{name}"]) == 0
    assert Path("runs", name, "report.html").is_file()


@pytest.mark.parametrize("name", TASKS)
def test_a_run_is_evaluated_as_it_is(name):
    if name == "detection":
        pytest.importorskip("pycocotools", reason="needs 'vim-ssl[detection]'")
    source = RUNS[name].argv[RUNS[name].argv.index("--data") + 1]
    RUNS[name].main(
        "--eval-only", "--encoder", f"runs/{name}", "--data", source, "--output", "evaluation",
        "--threads", "1",
    )  # fmt: skip
    before, after = read(Path("runs", name, "metrics.json")), read(Path("evaluation/metrics.json"))
    figure = {"finetune": "top1", "segmentation": "aacc", "detection": "box_ap"}[name]
    assert after["test"] == before["test"]
    assert after[figure] == pytest.approx(before[figure], abs=1e-3)


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(resumed):
    name, run = resumed
    skip_other_rounding(name)
    (checkpoint,) = run.glob("checkpoints/step-*")
    files = sorted((EARLIER / "whole" / name).glob("*.safetensors"))
    assert files
    for file in files:
        whole, now = load_file(file), load_file(checkpoint / file.name)
        assert whole.keys() == now.keys()
        for key in whole:
            np.testing.assert_allclose(now[key], whole[key], rtol=1e-6, atol=1e-6, err_msg=key)


def test_a_resumed_run_logs_what_one_that_was_not_stopped_logs(resumed):
    name, run = resumed
    skip_other_rounding(name)
    whole, now = rows(EARLIER / "whole" / name / "metrics.jsonl"), rows(run / "metrics.jsonl")
    assert list(whole) == list(now)
    for step in whole:
        assert keys(whole[step]) <= keys(now[step]), step
        for key in MEASURED:
            if key == "lr" and read(run / "config.json")["layer_decay"]:
                # Once that of the first block; now the largest.
                assert now[step][key] >= whole[step][key]
                continue
            assert now[step][key] == pytest.approx(whole[step][key], rel=1e-4, abs=1e-6), (
                step,
                key,
            )


def test_a_resumed_run_keeps_its_settings(resumed):
    name, run = resumed
    before, after = read(EARLIER / "runs" / name / "config.json"), read(run / "config.json")
    assert before.keys() <= after.keys()
    assert {key for key in before if before[key] != after[key]} <= MAY_DIFFER


def test_a_resumed_run_writes_the_files_keys_and_columns_of_before(resumed):
    name, run = resumed
    for file in sorted((EARLIER / "runs" / name).glob("*")):
        if file.suffix == ".json" and file.name not in ("config.json", "tokenizer.json"):
            before, after = read(file), read(run / file.name)
            assert keys(before) <= keys(after), file.name
            for key in ("recipe", "task", *DESCRIBED):
                assert after.get(key) == before.get(key), (file.name, key)
        elif file.suffix == ".csv":
            assert set(header(file)) <= set(header(run / file.name)), file.name
        elif file.suffix == ".safetensors":
            assert load_file(file).keys() == load_file(run / file.name).keys(), file.name
        elif file.is_file():
            assert (run / file.name).is_file(), file.name


# ---------------------------------------------------------------- tasks on a run


def test_a_linear_probe_writes_the_keys_of_before():
    written = Path("runs/mae/linear_probe/metrics.json")
    before = read(written)
    PROBE.main(*PROBE.argv)
    after = read(written)
    assert keys(before) <= keys(after)
    assert after["data"] == before["data"]
    assert (after["train"], after["test"]) == (before["train"], before["test"])
    names = [row["features"] for row in before["rows"]]
    assert [row["features"] for row in after["rows"]] == names


def test_embeddings_of_before_are_completed():
    """A file of the embeddings is lost: the same command writes this one, and the same values."""
    folder = Path("runs/mae/embed")
    before = read(folder / "record.json")
    for file in (lost := sorted((folder / "shards").glob("*00001*"))):
        file.unlink()
    assert lost
    EMBED.main(*EMBED.argv)
    assert keys(before) <= keys(read(folder / "record.json"))
    for file in lost:
        earlier = EARLIER / file
        assert file.is_file()
        if file.suffix == ".npy":
            np.testing.assert_allclose(np.load(file), np.load(earlier), atol=1e-5)
        elif file.suffix == ".csv":
            assert header(file) == header(earlier)
