"""Predictions of a data set: complete, once each, in order, whatever breaks or kills."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import nn

from vim_ssl.data import BadImage, ImageData, open_data
from vim_ssl.data.loading.streamed import ImageStream, Shard
from vim_ssl.models.predictor import ClassPrediction, Predictor
from vim_ssl.tasks.prediction import Writer, predict_data
from vim_ssl.tasks.tables import TableWriter
from vim_ssl.utils.names import original

NAMES = ["dark", "light", "wei|ß"]
BROKEN = {4, 9}


class Brightness(Predictor, nn.Module):
    """A classifier by the first pixel; it counts the images of its calls."""

    task, batched, transform, encoder = "classification", True, None, None

    def __init__(self, classes=NAMES, targets="class"):
        super().__init__()
        self.config = {"targets": targets}
        self.classes, self.targets, self.calls = list(classes), targets, []

    def prepare(self, image):
        return torch.tensor(float(np.asarray(image).flat[0]))

    def predict_prepared(self, inputs):
        torch.stack(inputs)  # as models do, which fails for an empty list
        self.calls.append(len(inputs))
        for x in inputs:
            row = torch.linspace(x / 60, 1 - x / 60, len(self.classes)).softmax(0).numpy()
            yield ClassPrediction(int(row.argmax()), row, self.classes, self.targets)


class Values:
    """Images of one value, by row; some are broken."""

    def __init__(self, count: int, broken=BROKEN):
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int):
        if row in self.broken:
            raise BadImage("", "torn")
        return np.full((2, 2), row, np.uint8)


def images(count: int = 23, broken=BROKEN) -> ImageData:
    ids = [f"{i:02}é.png" for i in range(count)]
    return ImageData(Values(count, broken), ids, name="test:images")


def read_records(shard: str):
    first = {"x": 0, "y": 9, "z": 10}[shard]
    for i in range(first, 23):
        image = BadImage("", "torn") if i in BROKEN else b"P5 1 1 255\n" + bytes([i])
        yield {"id": f"{i:02}é.png", "image": image}


def stream() -> ImageStream:
    shards = [Shard("x", 9), Shard("y", 1), Shard("z", 13)]
    return ImageStream(shards, read_records, name="test:stream")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(path: Path, data=None, model=None, writer=None, **options):
    model = model or Brightness()
    options = {"batch_size": 5, "quiet": True} | options
    return predict_data(model, data or images(), writer or TableWriter(path, model), **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [images, stream])
def test_every_readable_image_is_predicted_once_in_order(tmp_path, make, workers):
    predicted = predict(tmp_path / "out.csv", make(), workers=workers)
    table = rows(tmp_path / "out.csv")
    assert [row["id"] for row in table] == [f"{i:02}é.png" for i in range(23) if i not in BROKEN]
    assert (predicted.images, predicted.unit) == (21, "images")
    assert predicted.skipped == ["04é.png: torn", "09é.png: torn"]
    counts = {name: sum(row["class"] == name for row in table) for name in NAMES}
    assert predicted.counts == {name: count for name, count in counts.items() if count}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.csv.record.json"]


@pytest.mark.parametrize("make", [images, stream])
def test_a_batch_of_broken_images_is_skipped(tmp_path, make):
    assert predict(tmp_path / "out.csv", make(), batch_size=1).images == 21


class Killed(TableWriter):
    """Is killed after some images."""

    def __init__(self, *args, after: int):
        super().__init__(*args)
        self.left = after

    def write(self, item, result):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().write(item, result)


@pytest.mark.parametrize("make", [images, stream])
def test_a_killed_prediction_continues_where_it_stopped(tmp_path, make, capsys):
    predict(tmp_path / "whole.csv", make())
    for _ in range(2):
        model = Brightness()
        writer = Killed(tmp_path / "out.csv", model, after=8)
        with pytest.raises(KeyboardInterrupt):
            predict(writer.output, make(), model, writer, quiet=False)
        with (tmp_path / "out.csv.journal.jsonl").open("ab") as file:
            file.write(b'{"index": 20, "id": "to')
    assert "Stopped with 16 of 23 done; the same command resumes." in capsys.readouterr().out
    assert not (tmp_path / "out.csv").exists()
    model = Brightness()
    predict(tmp_path / "out.csv", make(), model)
    assert sum(model.calls) < 21
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    again = Brightness()
    assert predict(tmp_path / "out.csv", make(), again).images == 21
    assert again.calls == []


def test_an_image_that_was_broken_is_tried_again_when_resuming(tmp_path):
    model = Brightness()
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "out.csv", None, model, Killed(tmp_path / "out.csv", model, after=15))
    predicted = predict(tmp_path / "out.csv", images(broken={9}))
    assert (predicted.images, predicted.skipped) == (22, ["09é.png: torn"])
    assert "04é.png" in [row["id"] for row in rows(tmp_path / "out.csv")]


@pytest.mark.parametrize(
    ("change", "message"),
    [("model", "classes"), ("data", "images"), ("writer", "top_k"), ("made_of", "prompt")],
)
def test_other_predictions_are_not_mixed_in(tmp_path, change, message):
    predict(tmp_path / "out.csv", made_of={"prompt": 1})
    model = Brightness(["a", "b", "c"] if change == "model" else NAMES)
    data = images(7 if change == "data" else 23)
    writer = TableWriter(tmp_path / "out.csv", model, top_k=1 if change == "writer" else 3)
    made_of = {"prompt": 2 if change == "made_of" else 1}
    with pytest.raises(ValueError, match=rf"contains predictions with different .*{message}"):
        predict(writer.output, data, model, writer, made_of=made_of)


def test_an_image_replaced_by_one_of_the_same_size_is_noticed(tmp_path):
    for i in range(3):
        Image.new("L", (4, 4), 50 * i).save(tmp_path / f"{i}.bmp")
    spec, output = str(tmp_path), tmp_path / "out/out.csv"
    predict(output, open_data(spec))
    predict(output, open_data(spec))
    Image.new("L", (4, 4), 255).save(tmp_path / "1.bmp")
    os.utime(tmp_path / "1.bmp", ns=(0, 10**18))
    with pytest.raises(ValueError, match="contains predictions of other image files"):
        predict(output, open_data(spec))


class Overflowing(Brightness):
    """Its probabilities of images 6 and 7 are NaN."""

    def predict_prepared(self, inputs):
        for x, result in zip(inputs, super().predict_prepared(inputs), strict=True):
            if x in (6, 7):
                result.probabilities[1] = float("nan")
            yield result


def test_a_prediction_that_is_not_finite_is_skipped_and_named(tmp_path):
    predicted = predict(tmp_path / "out.csv", model=Overflowing())
    reasons = dict(text.split(": ", 1) for text in predicted.skipped)
    assert list(reasons) == ["04é.png", "06é.png", "07é.png", "09é.png"]
    assert "not finite" in reasons["06é.png"]
    assert predicted.images == len(rows(tmp_path / "out.csv")) == 19


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_names_that_are_not_utf_8_do_not_lose_the_table(tmp_path, ending):
    """A class folder's and an image's."""
    name = os.fsdecode(b"caf\xe9")
    data = ImageData(Values(1, ()), [f"{name}\n,=.png"], name="test:images")
    model = Brightness([name, "b", "c"])
    predict(tmp_path / f"out.{ending}", data, model)
    if ending == "csv":
        (row,) = rows(tmp_path / "out.csv")
    elif ending == "jsonl":
        row = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    else:
        from pyarrow import parquet

        (row,) = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert original(row["id"]) == data.ids[0]
    assert {original(row[key]) for key in ("class", "class_2", "class_3")} == set(model.classes)
    assert "p_caf\\udce9" in row


def test_a_file_of_something_else_is_kept(tmp_path):
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out.csv exists, but no record of predictions"):
        predict(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "mine"


def test_a_second_process_is_kept_out(tmp_path):
    with FileLock(tmp_path / ".out.csv.lock"), pytest.raises(BlockingIOError):
        predict(tmp_path / "out.csv")


def test_data_without_a_readable_image_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none of the 2 images of test:images can be read: .*to"):
        predict(tmp_path / "out.csv", images(2, {0, 1}))
    assert predict(tmp_path / "out.csv", images(2, {0})).images == 1  # the disk is back


class Files(Writer):
    """Writes a file per image, and a list."""

    unit = "pixels"

    def describe(self):
        return {"kind": "files"}

    def write(self, item, result):
        (self.output / f"{item['id']}.txt").write_text(result.name)
        return {"file": f"{item['id']}.txt", "counts": {result.name: 4}}

    def finish(self, records):
        text = json.dumps({record["id"]: record["file"] for record in records})
        (self.output / "list.json").write_text(text)
        return self.output / "list.json"


def test_a_writer_of_a_folder_has_record_and_journal_in_it(tmp_path):
    model = Brightness()
    predicted = predict(None, images(5), model, Files(tmp_path / "out"))
    names = [f"{i:02}é.png.txt" for i in range(4)]
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == [*names, "list.json", "record.json"]
    assert list(json.loads(predicted.output.read_text()).values()) == names
    assert (sum(predicted.counts.values()), predicted.unit) == (16, "pixels")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"letter\.txt"):
        predict(None, images(5), model, Files(tmp_path / "other"))


# ---------------------------------------------------------------- tables


def test_all_formats_have_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for ending in ("csv", "parquet", "jsonl"):
        predict(tmp_path / f"out.{ending}")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert table == [json.loads(line) for line in lines]
    texts = [{key: str(value) for key, value in row.items()} for row in table]
    assert texts == rows(tmp_path / "out.csv")
    first = table[0]
    assert list(first) == [
        "id", "class", "probability", "class_2", "probability_2", "class_3", "probability_3",
        "p_dark", "p_light", "p_wei|ß",
    ]  # fmt: skip
    assert first["class"] == "wei|ß"
    assert first["probability"] == first["p_wei|ß"]
    ranked = [first["probability"], first["probability_2"], first["probability_3"]]
    assert ranked == sorted(ranked, reverse=True)
    assert sum(ranked) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("count", "options", "columns"),
    [
        (3, {"top_k": 1}, 3 + 3),
        (3, {"top_k": 9}, 3 + 4 + 3),
        (21, {}, 3 + 4),
        (21, {"top_k": 2, "all_classes": True}, 3 + 2 + 21),
    ],
)
def test_many_classes_have_columns_only_on_request(tmp_path, count, options, columns):
    model = Brightness([f"c{i}" for i in range(count)])
    predict(None, images(3), model, TableWriter(tmp_path / "out.csv", model, **options))
    assert len(rows(tmp_path / "out.csv")[0]) == columns


def test_all_labels_of_an_image_are_listed(tmp_path):
    model = Brightness(["a", "b"], "multi-label")
    writer = TableWriter(tmp_path / "out.csv", model, threshold=0.4)
    predicted = predict(None, images(23, ()), model, writer)
    table = rows(tmp_path / "out.csv")
    assert {row["classes"] for row in table} == {"b", "a|b"}
    assert predicted.counts["b"] == 23
    assert predicted.counts["a"] == sum(row["classes"] == "a|b" for row in table)
    assert all(float(row["probability"]) == float(row["p_b"]) for row in table)


def test_the_predicted_rank_comes_first_even_if_another_is_more_probable(tmp_path):
    result = ClassPrediction(1, np.array([0.4, 0.25, 0.35]), NAMES, "ordinal")
    writer = TableWriter(tmp_path / "out.csv", Brightness(targets="ordinal"), top_k=2)
    row = writer.write({"id": "x"}, result)["row"]
    assert [row["class"], row["class_2"]] == ["light", "dark"]


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("out.txt", {}, "ends in '.txt'; expected .csv, .parquet, .jsonl"),
        ("out.csv", {"top_k": 0}, "top_k is 0"),
        ("out.csv", {"threshold": 2.0}, "threshold 2"),
    ],
)
def test_settings_without_a_meaning_are_refused(file, options, message):
    with pytest.raises(ValueError, match=message):
        TableWriter(file, Brightness(), **options)
