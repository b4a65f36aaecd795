"""Local tables: csv files that name images, parquet files that hold them."""

import io

import pytest
from PIL import Image

from vim_ssl.data import BadImage, labelled_splits, open_data


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def table(root, *lines: str, name: str = "table.csv", encoding: str = "utf-8"):
    (root / "pics").mkdir(exist_ok=True)
    for i in range(4):
        (root / f"pics/{i}.png").write_bytes(png(i))
    (root / name).write_text("\n".join(lines) + "\n", encoding=encoding)
    return f"csv:{root / name}"


def test_csv(tmp_path):
    spec = table(
        tmp_path, "path,label,caption,patient", 'pics/0.png,10,"one, two",a',
        "pics/1.png,9,x,a", "pics/2.png,,y,b", encoding="utf-8-sig",
    )  # fmt: skip
    data = open_data(f"{spec}?group=patient")
    assert data.ids == ["pics/0.png", "pics/1.png", "pics/2.png"]
    assert (data.classes, data.labels) == (["9", "10"], [1, 0, -1])
    assert data.groups == ["a", "a", "b"]
    item = data[0]
    assert (item["caption"], item["image"].getpixel((0, 0))) == ("one, two", (0, 0, 0))
    assert item["meta"]["path"] == str(tmp_path / "pics/0.png")
    assert open_data(f"{spec}?label=none").labels is None
    assert open_data(f"{spec}?label=patient").classes == ["a", "b"]


def test_csv_with_splits(tmp_path):
    spec = table(
        tmp_path, "image\tclass\tsplit", "pics/0.png\tcat\ttrain", "pics/1.png\tdog\ttest",
        "pics/2.png\tdog\ttrain", "pics/3.png\tcat\ttest", name="t.tsv",
    )  # fmt: skip
    assert open_data(spec).splits == ["train", "test"]
    train, test = labelled_splits(spec, 0.5, 0)
    assert (train.ids, test.ids) == (["pics/0.png", "pics/2.png"], ["pics/1.png", "pics/3.png"])
    assert test.labels == [1, 0]
    assert len(open_data(f"{spec}?split=all")) == 4


def test_a_file_that_is_gone_is_named(tmp_path):
    data = open_data(table(tmp_path, "path", "pics/9.png"))
    with pytest.raises(BadImage, match=r"pics/9\.png"):
        data[0]


@pytest.mark.parametrize(
    ("lines", "query", "message"),
    [
        (["where,label", "a.png,1"], "", "no column of paths .* It has where, label"),
        (["path,label", "a.png,1"], "?label=lable", r"no column 'lable'.*mean 'label'"),
        (["path,label", "a.png,1", "a.png,2"], "", "lists 'a.png' twice"),
        (["path,label", "a.png,1,2"], "", "row 1 has 3 fields, the header has 2"),
        (["path,label"], "", "but no rows"),
    ],
)
def test_csv_errors(tmp_path, lines, query, message):
    with pytest.raises(ValueError, match=message):
        open_data(table(tmp_path, *lines) + query)


def test_a_table_that_is_not_utf_8_is_told_with_the_line(tmp_path):
    (tmp_path / "t.csv").write_bytes("image,label\na.png,cat\nb.png,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t.csv is not UTF-8 \(line 3\); save it as UTF-8"):
        open_data(f"csv:{tmp_path}/t.csv")


def test_csv_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="the file does not exist"):
        open_data(f"csv:{tmp_path / 'no.csv'}")


@pytest.mark.parametrize("kind", ["bytes", "struct", "paths"])
def test_parquet(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    (tmp_path / "pics").mkdir()

    def image(i):
        (tmp_path / f"pics/{i}.png").write_bytes(png(i))
        return {"bytes": png(i), "struct": {"bytes": png(i), "path": None}}.get(
            kind, f"pics/{i}.png"
        )

    for name, rows in (("train-00000-of-00002", [0, 1]), ("train-00001-of-00002", [2]),
                       ("test-00000-of-00001", [3, 4])):  # fmt: skip
        columns = {"image": [image(i) for i in rows], "kind": ["ab"[i % 2] for i in rows]}
        parquet.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    data = open_data(f"parquet:{tmp_path}?label=kind")
    assert (data.splits, data.split) == (["train", "test"], "train")
    assert data.ids == ["train/0", "train/1", "train/2"]
    assert (data.labels, data.classes) == ([0, 1, 0], ["a", "b"])
    assert [item["image"].getpixel((0, 0))[0] for item in data] == [0, 1, 2]
    one = open_data(f"parquet:{tmp_path / 'test-00000-of-00001.parquet'}?label=kind")
    assert [item["image"].getpixel((0, 0))[0] for item in one] == [3, 4]


def test_parquet_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"parquet:.*no file matches"):
        open_data(f"parquet:{tmp_path}")
