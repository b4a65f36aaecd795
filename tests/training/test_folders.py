"""Default names are unique, and no output is overwritten without a word."""

import json
import threading
from pathlib import Path

import pytest

from vim_ssl.training.folders import claim, evaluation_folder, new_folder, task_folder
from vim_ssl.utils.files import writable


def finish(folder: Path, task: str = "knn", **metrics) -> None:
    (folder / "metrics.json").write_text(json.dumps({"task": task, **metrics}))


@pytest.mark.parametrize("named", [True, False])
def test_the_same_evaluation_may_be_repeated_and_another_one_does_not_replace_it(tmp_path, named):
    first = tmp_path / "knn"
    settings = {"k": (5, 10), "data": "q", "device": "cpu", "output": ""}
    assert claim(first, "knn", settings, named=named) == first
    assert claim(first, "knn", settings, named=named) == first  # after a kill
    claim(first, "knn", settings | {"k": (3,)}, named=named)  # which failed: nothing is lost
    claim(first, "knn", settings, named=named)
    finish(first)
    assert claim(first, "knn", settings | {"device": "cuda"}, named=named) == first
    for task, other in (("knn", {"k": (5,)}), ("probe", settings), ("knn", {"data": "r"})):
        if named:
            with pytest.raises(FileExistsError, match=r"knn contains a result .*not overwritten"):
                claim(first, task, settings | other, named=True)
    if not named:
        second = claim(first, "knn", settings | {"k": (5,)}, named=False)
        assert second == tmp_path / "knn-2"
        finish(second)
        assert claim(first, "knn", settings | {"k": (5,)}, named=False) == second
        assert claim(first, "knn", settings | {"k": (7,)}, named=False) == tmp_path / "knn-3"


def test_two_evaluations_at_the_same_time_do_not_share_a_folder(tmp_path):
    folder = claim(tmp_path / "knn", "knn", {"k": 1}, named=False)
    mark = json.loads((folder / ".evaluation.json").read_text())
    for process, name in ([["elsewhere", 1], "knn-2"], [[mark["process"][0], 2**30], "knn"]):
        (folder / ".evaluation.json").write_text(json.dumps(mark | {"process": process}))
        assert claim(tmp_path / "knn", "knn", {"k": 2}, named=False).name == name


def test_data_whose_names_give_one_folder_do_not_share_it(tmp_path):
    folders = {data: task_folder("knn", tmp_path, data) for data in ("q/x", "q-x", "q x")}
    assert len(set(folders.values())) == 1
    claimed = []
    for data, folder in folders.items():
        claimed.append(claim(folder, "knn", {"data": data}, named=False))
        finish(claimed[-1])
    assert len(set(claimed)) == 3


@pytest.mark.parametrize(
    "content", ["config.json", "checkpoints", "predictions.csv", "classes.csv", "metrics.json"]
)
def test_a_run_and_files_of_others_are_not_overwritten(tmp_path, content):
    (tmp_path / content).mkdir() if content == "checkpoints" else finish(tmp_path, task="finetune")
    if content.endswith("csv"):
        (tmp_path / "metrics.json").rename(tmp_path / content)
    elif content == "config.json":
        (tmp_path / content).write_text("{}")
    with pytest.raises(FileExistsError, match="not overwritten"):
        evaluation_folder(str(tmp_path), "evaluation", {})


def test_a_result_of_an_earlier_version_is_known_by_its_protocol(tmp_path):
    finish(tmp_path, protocol={"k": [5], "seed": 0})
    assert claim(tmp_path, "knn", {"k": (5,), "seed": 0, "new": 1}, named=True) == tmp_path
    (tmp_path / ".evaluation.json").unlink()
    with pytest.raises(FileExistsError, match=r"a result with seed = 0, not 1"):
        claim(tmp_path, "knn", {"k": (5,), "seed": 1}, named=True)


def test_replacing_the_result_of_earlier_weights_is_reported(tmp_path, capsys):
    claim(tmp_path / "knn", "knn", {}, named=False, weights="1")
    finish(tmp_path / "knn", weights="1")
    claim(tmp_path / "knn", "knn", {}, named=False, weights="1")
    assert capsys.readouterr().out == ""
    claim(tmp_path / "knn", "knn", {}, named=False, weights="2")
    assert "the result of earlier weights will be replaced" in capsys.readouterr().out


def test_one_encoder_has_one_identity_under_any_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for spelling in ("run", "./run/", str(tmp_path / "run")):
        assert claim(tmp_path / "out", "knn", {"encoder": spelling}, named=True)


@pytest.mark.parametrize("what", ["working directory", "images added", "against"])
def test_one_text_may_mean_other_data_which_do_not_replace_a_result(
    tmp_path, monkeypatch, capsys, what
):
    for site in ("a", "b"):
        (tmp_path / site / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    key = "against" if what == "against" else "data"
    settings, images = {key: "photos" if key == "data" else ["photos"]}, {"train": "1", "test": "2"}
    first = tmp_path / "knn"
    assert claim(first, "knn", settings, named=False, images=images) == first
    finish(first)
    assert claim(first, "knn", settings, named=False, images=images) == first
    if what == "images added":
        images = {"train": "1", "test": "3"}
        (first / ".evaluation.json").unlink()  # as of an earlier version
        finish(first, fingerprints={"train": "1", "test": "2"}, protocol=settings)
    else:
        monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(FileExistsError, match=r"contains a result .*not overwritten"):
        claim(first, "knn", settings, named=True, images=images)
    assert claim(first, "knn", settings, named=False, images=images) == tmp_path / "knn-2"
    assert "writing to" in capsys.readouterr().out
    finish(tmp_path / "knn-2")
    assert claim(first, "knn", settings, named=False, images=images) == tmp_path / "knn-2"


def test_folders_begun_in_the_same_second_differ(tmp_path, monkeypatch):
    """As of a job array, whose processes may be on several machines."""
    monkeypatch.setattr("time.strftime", lambda _: "20260102-030405")
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(new_folder("run", tmp_path)))
        for _ in range(16)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 16
    assert all(folder.is_dir() for folder in made)


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path):
    message = r"out cannot be written: Permission denied\. Choose another"
    with pytest.raises(OSError, match=message), writable(tmp_path / "out"):
        raise PermissionError(13, "Permission denied")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file cannot be written: .* Choose another"):
        claim(tmp_path / "file" / "knn", "knn", {}, named=False)
