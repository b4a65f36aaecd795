"""No figure on images whose labels, or pixels, the weights have seen, without a word about it."""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder, load_encoder, save_encoder
from vim_ssl.data import identity
from vim_ssl.data.identity import TrainingRecord
from vim_ssl.data.sources.memory import register_data
from vim_ssl.downstream import embed, finetune, knn, linear_probe, segmentation
from vim_ssl.evaluation import seen
from vim_ssl.evaluation.seen import record_of, remarks_on_features
from vim_ssl.recipes import mim_pretrain, supervised_pretrain
from vim_ssl.report import write_report
from vim_ssl.tasks import runner

SMALL = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 1,
         "num_classes": 0}  # fmt: skip
QUICK = ["--threads", "1", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0"]
TINY = ["--model-args", "img_size=16", "embed_dim=16", "depth=1", "in_chans=1"]
COUNT = 20


def fit(*_, on_save, **__):
    """Take no step: save the weights as they are."""
    on_save()
    return {"loss": 1.0}


@pytest.fixture(autouse=True)
def no_steps(monkeypatch):
    monkeypatch.setattr(runner, "fit", fit)


def noise(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    return Image.fromarray(values)


def fill(folder: Path, numbers=range(COUNT), masks: bool = False) -> Path:
    for i in numbers:
        path = folder / ("images" if masks else "ab"[i % 2]) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(path)
        if masks:
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray(np.eye(16, dtype=np.uint8)).save(folder / "masks" / path.name)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    save_encoder(VimEncoder(**SMALL), folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory) -> Path:
    """A folder with the data ``p``, and a run that was fine-tuned on them with another seed than
    the default."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "fit", fit)
        patch.chdir(folder)
        fill(Path("p"))
        argv = ["--encoder", encoder, "--data", "p", "--seed", "1", "--output", "run", *QUICK]
        assert finetune.main(argv) == 0
    return folder


@pytest.fixture
def trained(finished, tmp_path, monkeypatch) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def ids_of(folder: str | Path) -> set[str]:
    """Names of the images in predictions.csv, without folders."""
    with open(Path(folder, "predictions.csv")) as file:
        return {Path(row["id"]).name for row in csv.DictReader(file)}


def metrics_of(folder: str | Path) -> dict:
    return json.loads(Path(folder, "metrics.json").read_text())


def evaluate(data: str, encoder: str = "run", script=finetune, output: str = "again") -> dict:
    argv = ["--eval-only", "--encoder", encoder, "--data", data, "--output", output]
    assert script.main([*argv, "--threads", "1"]) == 0
    return metrics_of(output)


# ---------------------------------------------------------------- evaluated again


def as_moved() -> str:
    Path("p").rename("elsewhere")
    return "elsewhere"


def as_link() -> str:
    Path("link").symlink_to("p")
    return "link"


def as_table() -> str:
    rows = [f"{path},{path.parent.name}" for path in sorted(Path("p").glob("*/*"))]
    Path("t.csv").write_text("\n".join(["path,label", *rows]))
    return "csv:t.csv"


def as_other_files() -> str:
    """Saved again without loss, in another format, with three equal channels."""
    for path in sorted(Path("p").glob("*/*")):
        Path("q", path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(
            Path("q", path.parent.name, path.name), "PNG", compress_level=1
        )
    return "q"


def as_memory() -> str:
    paths = sorted(Path("p").glob("*/*"))
    items = [{"image": np.asarray(Image.open(p)), "label": p.parent.name, "id": p.name}
             for p in paths]  # fmt: skip
    return register_data(items)


def as_larger() -> str:
    fill(Path("p"), [COUNT, COUNT + 1])
    return "p"


NAMES = {
    "the-same": lambda: "p", "dot": lambda: "./p", "slash": lambda: "p/", "folder": lambda:
    "folder:p", "absolute": lambda: str(Path("p").resolve()), "moved": as_moved, "link": as_link,
    "table": as_table, "saved-again": as_other_files, "memory": as_memory, "larger": as_larger,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_evaluated_on_what_it_held_out_whatever_the_data_are_called(
    name, trained, capsys
):
    held_out = ids_of(trained)
    data = NAMES[name]()
    shutil.rmtree("weights", ignore_errors=True)
    Path("weights").mkdir()
    for file in ("encoder.safetensors", "encoder.json"):  # a copy, without config.json
        shutil.copy(trained / file, "weights")
    metrics = evaluate(data, "weights/encoder.safetensors")
    assert ids_of("again") == held_out
    assert (metrics["split"], metrics["n"]) == ("held out", len(held_out))
    assert metrics["seen"]["labels"] == 0
    assert metrics["seen"]["left_out"] == (2 if name == "larger" else 0)
    assert ("2 images of the data neither trained on nor" in capsys.readouterr().out) == (
        name == "larger"
    )


def test_asked_for_all_images_says_how_many_were_trained_on(trained, capsys):
    metrics = evaluate("p?split=all")
    count = COUNT - len(ids_of(trained))
    assert (metrics["n"], metrics["seen"]["labels"]) == (COUNT, count)
    said = f"trained with the labels of {count} of these {COUNT} test images"
    assert said in metrics["summary"][-1]
    assert said in capsys.readouterr().out


def test_new_images_of_data_that_lacks_the_held_out_ones_are_evaluated(trained):
    for path in Path("p").glob("*/*"):
        if path.name in ids_of(trained):
            path.unlink()
    fill(Path("p"), range(100, 104))
    assert evaluate("p")["n"] == 4
    assert ids_of("again") == {f"{i}.png" for i in range(100, 104)}


def test_only_trained_images_are_refused(trained):
    for path in Path("p").glob("*/*"):
        if path.name in ids_of(trained):
            path.unlink()
    with pytest.raises(ValueError, match="none of its 16 images was held out; evaluate other"):
        evaluate("p")


def test_other_data_are_evaluated_whole(trained):
    fill(Path("other"), range(50, 60))
    metrics = evaluate("other")
    assert (metrics["n"], metrics["split"]) == (10, "all")
    assert "summary" not in metrics


def test_new_images_of_a_trained_group_are_not_evaluated(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(Path("p"))
    rows = [f"p/{'ab'[i % 2]}/{i:03}.png,{'ab'[i % 2]},{i // 4}" for i in range(COUNT)]
    Path("t.csv").write_text("\n".join(["path,label,patient", *rows]))
    argv = ["--encoder", encoder, "--seed", "1", "--output", "run", *QUICK]
    finetune.main([*argv, "--data", "csv:t.csv?group=patient"])
    kept = ids_of("run")
    known = {row.split(",")[2] for row in rows if Path(row.split(",")[0]).name not in kept}
    fill(Path("p"), range(100, 104))
    patients = dict.fromkeys(range(100, 104), "new") | dict.fromkeys((100, 101), min(known))
    new = [f"p/{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]},{one}" for i, one in patients.items()]
    old = [row for row in rows if Path(row.split(",")[0]).name not in kept]
    for table, count in ((old + new, 2), (new, 2)):
        Path("new.csv").write_text("\n".join(["path,label,patient", *table]))
        assert evaluate("csv:new.csv?group=patient")["n"] == count
        assert ids_of("again") == {"102.png", "103.png"}


def test_a_run_of_an_earlier_version_is_judged_by_its_own_draw(trained):
    held_out = ids_of(trained)
    record = json.loads((trained / "encoder.json").read_text())
    del record["made_by"]["trainings"]
    (trained / "encoder.json").write_text(json.dumps(record))
    assert evaluate("p", "run/encoder.safetensors")["n"] == len(held_out)
    assert ids_of("again") == held_out
    (trained / "config.json").unlink()
    with pytest.raises(ValueError, match="does not record which of these images it held out"):
        evaluate("p")
    fill(Path("other"), range(50, 60))
    other = evaluate("other", output="o")
    assert "not recorded which images" in other["summary"][-1]


@pytest.mark.parametrize("other", [False, True], ids=["own-data", "other-data"])
def test_masks_are_evaluated_as_labels_are(other, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(Path("m"), range(10), masks=True)
    argv = ["--encoder", encoder, "--data", "masks:m", "--seed", "1", "--crop", "16", *QUICK]
    assert segmentation.main([*argv, "--channels", "8", "--output", "run"]) == 0
    (tmp_path / "run/config.json").unlink()
    if other:
        fill(Path("n"), range(50, 60), masks=True)
    else:
        Path("m").rename("n")
    metrics = evaluate("masks:n", script=segmentation)
    assert metrics["split"] == ("all" if other else "held out")
    assert metrics["n"] == (10 if other else 2)
    assert other or ids_of("again") == ids_of("run")


# ---------------------------------------------------------------- probed, trained further


@pytest.mark.parametrize("script", [knn, linear_probe], ids=["knn", "linear-probe"])
@pytest.mark.parametrize("recipe", ["finetune", "supervised_pretrain"])
def test_a_probe_tests_on_what_a_trained_encoder_held_out(script, recipe, trained):
    if recipe == "supervised_pretrain":
        argv = ["--data", "p", "--seed", "1", "--output", "s", "--encoder", "vim_nano_patch8_64"]
        assert supervised_pretrain.main([*argv, *TINY, *QUICK, "--preset", "cpu_supervised"]) == 0
    argv = ["--encoder", "s" if recipe == "supervised_pretrain" else "run", "--no-baselines",
            "--no-cache", "--device", "cpu", "--output", "probe"]  # fmt: skip
    assert script.main([*argv, "--data", "p"]) == 0
    metrics = metrics_of("probe")
    assert metrics["seen"]["labels"] == 0
    assert metrics["n"] == len(ids_of("s" if recipe == "supervised_pretrain" else "run"))
    if script is linear_probe:
        assert ids_of("probe") == ids_of("s" if recipe == "supervised_pretrain" else "run")


def test_a_probe_on_trained_images_of_a_split_says_so(trained, tmp_path, capsys):
    for i, path in enumerate(sorted(Path("p").glob("*/*"))):
        target = Path("q", "test" if i % 2 else "train", path.parent.name)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    used = sum(path.name not in ids_of(trained) for path in Path("q/test").glob("*/*"))
    argv = ["--encoder", "run", "--data", "q", "--no-baselines", "--no-cache", "--device", "cpu"]
    assert linear_probe.main([*argv, "--against", "run/encoder.safetensors"]) == 0
    said = f"trained with the labels of {used} of these 10 test images"
    metrics = metrics_of("run/linear_probe-q")
    assert [said in line for line in metrics["summary"][-2:]] == [True, True]
    assert capsys.readouterr().out.count(said) == 4  # at the start, and at the end
    (trained / "metrics.jsonl").touch()
    assert said in write_report(trained).read_text()


def test_what_was_held_out_is_held_out_by_a_further_training(trained):
    argv = ["--encoder", "run", "--data", "p", "--seed", "2", "--output", "second", *QUICK]
    assert finetune.main(argv) == 0
    assert ids_of("second") == ids_of("run")
    assert finetune.main([*argv[: -len(QUICK) - 1], "third", *QUICK, "--from-scratch"]) == 0
    assert ids_of("third") != ids_of("run")


def test_an_encoder_keeps_its_record_when_it_is_saved_again(trained):
    save_encoder(load_encoder(trained, num_classes=None), "copy")
    assert evaluate("p", "copy")["n"] == len(ids_of(trained))
    assert ids_of("again") == ids_of(trained)


@pytest.mark.parametrize("data", ["p", "./p", "moved"])
def test_pixels_that_pretraining_read_are_told_by_content(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(Path("p"))
    argv = ["--data", "p", "--encoder", "vim_nano_patch8_64", *TINY, *QUICK]
    assert mim_pretrain.main([*argv, "--preset", "mae_minute", "--output", "run"]) == 0
    if data == "moved":
        Path("p").rename("moved")
    shutil.copytree(data, "some")
    argv = ["--encoder", "run", "--no-baselines", "--no-cache", "--device", "cpu", "--output"]
    assert knn.main([*argv, "o", "--data", data]) == 0
    assert metrics_of("o")["summary"][-1].startswith("Pretraining also read these test images")
    fill(Path("some"), range(50, 90))
    assert knn.main([*argv, "s", "--data", "some"]) == 0
    seen = metrics_of("s")["seen"]["pixels"]
    assert 0 < seen < 12
    assert f"{seen} of these 12 test images, without" in metrics_of("s")["summary"][-1]


# ---------------------------------------------------------------- copies, records


def test_exact_copies_on_both_sides_of_a_draw_are_told(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill(Path("p"))
    for path in list(Path("p").glob("*/*")):
        shutil.copy(path, path.with_stem(path.stem + "-again"))
    argv = ["--encoder", encoder, "--data", "p", "--output"]
    assert finetune.main([*argv, "run", *QUICK]) == 0
    assert knn.main([*argv, "o", "--no-baselines", "--no-cache", "--device", "cpu"]) == 0
    for metrics in (metrics_of("run"), metrics_of("o")):
        copies = metrics["seen"]["copies"]
        assert 0 < copies <= metrics["n"]
        said = f"{copies} of these 8 test images have exact copies among the training images"
        assert said in metrics["summary"][-1]
    assert capsys.readouterr().out.count("have exact copies") == 4


def test_a_record_survives_json_and_is_small():
    keys = np.random.default_rng(0).integers(1, 2**48, 100_000).astype(np.uint64)
    record = TrainingRecord("finetune", "p", True, "files", np.unique(keys[:80_000]),
                            np.unique(keys[80_000:]), split="held out")  # fmt: skip
    text = json.dumps(record.record())
    assert len(text) < 1_000_000
    again = TrainingRecord.of_record(json.loads(text))
    assert again.same_images(record)
    with pytest.raises(ValueError, match=r"copy encoder\.json again from its run"):
        TrainingRecord.of_record({"labels": True, "trained": "abc"})


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_only_a_resumed_training_replaces_the_entry_before_it(resumed, recorded):
    first = TrainingRecord("finetune", "x", True)
    second = TrainingRecord("finetune", "y", True, *(["pixels", np.array([7])] * recorded))
    names = [entry["data"] for entry in record_of([first], second, resumed)]
    assert names == (["x", "y"] if not resumed else ["y"] if recorded else ["x"])


def forget(run: Path) -> None:
    """Make the run one of an earlier version, which does not record its images."""
    record = json.loads((run / "encoder.json").read_text())
    del record["made_by"]["trainings"]
    (run / "encoder.json").write_text(json.dumps(record))


def test_an_unrecorded_training_is_named_after_any_further_one(trained):
    forget(trained)
    fill(Path("q"), range(50, 70))
    argv = ["--encoder", "run", "--data", "q", "--output", "second", *QUICK]
    assert finetune.main(argv) == 0
    argv = ["--encoder", "second", "--no-baselines", "--no-cache", "--device", "cpu"]
    assert knn.main([*argv, "--data", "p", "--output", "o", "--against", "second"]) == 0
    metrics = metrics_of("o")
    assert metrics["seen"]["unrecorded"] == ["finetune on folder:p?split=all"]
    first, other = metrics["summary"][-2:]
    assert "not recorded which images were trained on by finetune on folder:p?split=all;" in first
    assert "folder:p?split=all (second);" in other


@pytest.mark.parametrize("limit", [0, 2**31], ids=["remote", "local"])
def test_a_pretraining_on_a_stream_is_recorded_or_named_to_the_end(limit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(identity, "RECORDED_UP_TO", limit)
    fill(Path("p"))
    fill(Path("q"), range(50, 70))
    with tarfile.open("p.tar", "w") as tar:
        for path in sorted(Path("p").glob("*/*")):
            tar.add(path, path.name)
    argv = ["--encoder", "vim_nano_patch8_64", *TINY, *QUICK, "--preset", "mae_minute"]
    assert mim_pretrain.main([*argv, "--data", "wds:p.tar", "--output", "run"]) == 0
    argv = ["--encoder", "run", "--data", "q", "--output", "second", *QUICK]
    assert finetune.main(argv) == 0
    for run in ("run", "second"):
        argv = ["--encoder", run, "--no-baselines", "--no-cache", "--device", "cpu"]
        assert knn.main([*argv, "--data", "p", "--output", f"o-{run}"]) == 0
        metrics = metrics_of(f"o-{run}")
        assert metrics["seen"]["pixels"] == (metrics["n"] if limit else 0)
        expected = "Pretraining also read these" if limit else "mim_pretrain on wds:p.tar"
        assert expected in metrics["summary"][-1]


def test_embeddings_say_what_their_encoder_was_trained_on(trained, monkeypatch):
    count = COUNT - len(ids_of(trained))
    argv = ["--encoder", "run", "--data", "p?split=all", "--device", "cpu", "--output"]
    assert embed.main([*argv, "v"]) == 0
    record = json.loads(Path("v/record.json").read_text())
    assert [entry["recipe"] for entry in record["trainings"]] == ["finetune"]
    assert (record["seen"]["labels"], record["seen"]["n"]) == (count, COUNT)
    (remark,) = remarks_on_features("v")
    assert f"with the labels of {count} of its {COUNT} images" in remark
    monkeypatch.setattr(seen, "RECORD_UP_TO", 10)
    monkeypatch.setattr(identity, "PIXELS_UP_TO", 0)
    assert embed.main([*argv, "w"]) == 0
    record = json.loads(Path("w/record.json").read_text())
    assert set(record["trainings"][0]) == {"recipe", "data", "labels"}
    (remark,) = remarks_on_features("w")
    assert "was trained by finetune on folder:p?split=all; test images may be" in remark
