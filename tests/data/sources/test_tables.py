"""Local tables: csv files that name images, parquet files that hold them."""

import bz2
import gzip
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
        (["path,label", "a.png,1,2"], "", "line 2: 3 fields, the header has 2"),
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


SPLIT_ROWS = [{"image": f"pics/{i}.png", "caption": f"photo {i}", "label": i % 2,
               "split": ["train", "Train", "val", None][i]} for i in range(4)]  # fmt: skip


def of_text(root, rows, scheme):
    lines = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
    return scheme + table(root, ",".join(rows[0]), *lines).removeprefix("csv")


def of_arrow(root, rows):
    import datasets

    table(root, "path")
    read = [{**row, "image": (root / row["image"]).read_bytes()} for row in rows]
    (root / "h").mkdir()
    datasets.Dataset.from_list(read).to_parquet(root / "h/t.parquet")
    return root / "h"


SPLIT_TABLES = {
    "csv": lambda root, rows: of_text(root, rows, "csv"),
    "pairs": lambda root, rows: of_text(root, rows, "pairs"),
    "parquet": lambda root, rows: f"parquet:{of_arrow(root, rows)}/t.parquet?image=image",
    "hf": lambda root, rows: f"hf:{of_arrow(root, rows)}?image=image",
}


@pytest.mark.parametrize("write", SPLIT_TABLES.values(), ids=SPLIT_TABLES)
def test_a_column_of_splits_divides_every_kind_of_table(tmp_path, write):
    spec = write(tmp_path, SPLIT_ROWS)
    mark = "&" if "?" in spec else "?"
    train = open_data(spec)
    assert (train.splits, train.split, len(train)) == (["train", "val"], "train", 2)
    assert [fault for fault in train.faults if "name no split" in fault]
    val = open_data(f"{spec}{mark}split=val")
    assert [val[i]["caption"] for i in range(len(val))] in (["photo 2"], [["photo 2"]])
    assert len(open_data(f"{spec}{mark}split=all")) == 4


@pytest.mark.parametrize("write", SPLIT_TABLES.values(), ids=SPLIT_TABLES)
def test_a_column_that_seems_to_name_splits_is_reported_wherever_they_begin(tmp_path, write):
    rows = [{"image": f"pics/{i}.png", "caption": "a", "label": 1,
             "set": "train" if i < 1200 else "test"} for i in range(1203)]  # fmt: skip
    (tmp_path / "pics").mkdir()
    for i in range(len(rows)):
        (tmp_path / f"pics/{i}.png").touch()
    data = open_data(write(tmp_path, rows))
    assert [fault for fault in data.faults if "'set' seems to name splits" in fault]


def test_a_column_of_splits_that_differs_from_the_files_is_reported(tmp_path):
    import datasets

    table(tmp_path, "path")
    for split, value in (("train", "train"), ("test", "val")):
        row = {"image": png(0), "split": value}
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"h/{split}.parquet")
    for scheme in ("parquet", "hf"):
        data = open_data(f"{scheme}:{tmp_path}/h?image=image")
        assert data.splits == ["train", "test"]
        assert ["'split' is not used" in fault for fault in data.faults] == [True]
    (tmp_path / "h/test.parquet").unlink()
    stream = open_data(f"hf:{tmp_path}/h?image=image&streaming=true", streams=True)
    assert ["'split' is not used in a stream" in fault for fault in stream.faults] == [True]


@pytest.mark.parametrize(
    ("files", "splits", "warns"),
    [
        (["train-0", "test-0"], ["train", "test"], ""),
        (["my_train", "my_val"], ["train", "validation"], ""),
        (["train/0000", "test/0000"], ["train", "test"], ""),
        (["train-0", "test-0", "unsupervised-0"], ["train", "test", "unsupervised"], "in none"),
        (["train", "more"], ["train"], "more.parquet are read as training images"),
        (["0000", "0001"], ["train"], ""),
    ],
)
def test_parquet_files_are_the_splits_of_their_names_and_folders(tmp_path, files, splits, warns):
    import datasets

    for file in files:
        datasets.Dataset.from_list([{"image": png(0)}]).to_parquet(tmp_path / f"{file}.parquet")
    data = open_data(f"parquet:{tmp_path}/**/*.parquet?image=image&split=all")
    assert (data.splits, len(data)) == (splits, len(files))
    assert [text for text in data.passed_over.warnings if warns in text] == (
        data.passed_over.warnings
    )
    assert bool(warns) == bool(data.passed_over.warnings)


def test_parquet_files_that_hf_does_not_read_are_reported(tmp_path):
    import datasets

    for file in ("train-0", "test-0", "unsupervised-0"):
        datasets.Dataset.from_list([{"image": png(0)}]).to_parquet(tmp_path / f"{file}.parquet")
    (warning,) = open_data(f"hf:{tmp_path}?image=image").passed_over.warnings
    assert warning.startswith("unsupervised-0.parquet are in none of the splits train, test")


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"t\.parquet cannot be read as"):
        open_data(f"parquet:{tmp_path}/t.parquet")


# ------------------------------------------------------------------ as people write them


def of(root, content: bytes | str, name: str = "t.csv"):
    """The data of a table beside the images pics/0.png to pics/3.png."""
    table(root, "path", name="unused.csv")
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_data(f"csv:{root / name}")


PLAIN = "path,label\npics/0.png,é\npics/1.png,b\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN, PLAIN.replace("\n", "\r\n"), PLAIN.replace("\n", "\r"),
        PLAIN.replace(",", ";"), PLAIN.replace(",", "\t"), PLAIN.replace(",", "|"),
        PLAIN.encode("utf-8-sig"), PLAIN.encode("utf-16"), PLAIN.encode("utf-32"),
        "sep=;\n" + PLAIN.replace(",", ";"), "\n\n" + PLAIN, PLAIN + ",\n,\n",
        PLAIN.replace("path,label", "Path, Label"), PLAIN.replace(",", " , "),
        PLAIN.replace("é", "e\u0301"), 'path,"label"\n"pics/0.png", "é"\npics/1.png,b',
        PLAIN.replace("pics/", "pics\\"), PLAIN.replace("pics/", ".\\pics\\"),
        "label;path\né;pics/0.png\nb;pics/1.png",
    ],
    ids=["plain", "crlf", "cr", "semicolons", "tabs", "bars", "utf-8 mark", "utf-16", "utf-32",
         "excel sep", "blank first", "blank last", "header case", "spaces", "decomposed", "quotes",
         "backslashes", "dot backslashes", "order"],
)  # fmt: skip
def test_tables_of_every_program_are_read(tmp_path, content):
    data = of(tmp_path, content)
    assert (data.classes, data.labels, data.faults) == (["b", "é"], [1, 0], [])
    assert [item["image"].getpixel((0, 0))[0] for item in data] == [0, 1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('path,label\na,"y\nc,x\nd,y"\ne,x\n', "line 2: the field 'label' has a line break"),
        ('path,label\n"a\nb",x\n', "line 2: the field 'path' has a line break"),
        ('path,label\na,x\nb,"y\nc,x\n', "line 3: a quote is not closed; lost down to line 4"),
        ('path,caption\na,"y\nb.png,x"\n', "line 2: a quoted field contains a further row"),
        ("path,label,label\na,b,c\n", "several columns 'label'; rename all but one"),
        ("path,Path,label\na,b,c\n", None),
        ("path,label\na,x\n./a,y\n", r"lists './a' twice \(lines 2 and 3\)"),
        ("path,label\nb\\a,x\nb/a,y\n", r"lists 'b/a' twice"),
        ("path,label\na\n", "line 2: 1 fields, the header has 2"),
        ("path,label\na\0,x\n", "line 2: it contains a NUL byte"),
        ("path,label\na,x\n".encode("utf-16-le"), "NUL bytes, so it is not UTF-8; save it as"),
        (",label\na.png,x\n", r"no column of paths .* It has \(no name\), label"),
    ],
    ids=["label", "path", "unclosed", "caption", "repeated", "letter case", "dot", "backslash",
         "short", "nul", "utf-16", "nameless"],
)  # fmt: skip
def test_a_table_that_cannot_be_meant_is_refused_with_its_line(tmp_path, content, says):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a").touch()
    if says is None:
        assert len(of(tmp_path, content)) == 1
        return
    with pytest.raises(ValueError, match=says):
        of(tmp_path, content)


def test_missing_values_are_unknown_in_every_column(tmp_path):
    rows = [
        "pics/0.png,None,NA,nan,train", "pics/1.png,a,p1,a cat,val", "pics/2.png,b,,,Valid",
        "pics/3.png,nan, p1 ,null,", "NaN,a,p1,,train", ",b,p1,x,train",
    ]  # fmt: skip
    table = "\n".join(["path,label,patient,caption,split", *rows])
    data = of(tmp_path, table)
    assert data.splits == ["train", "validation"]
    (tmp_path / "t.csv").write_text(table)
    everything = open_data(f"csv:{tmp_path}/t.csv?split=all&group=patient")
    assert (everything.classes, everything.labels) == (["a", "b"], [-1, 0, 1, -1])
    assert everything.groups == ["pics/0.png", "p1", "pics/2.png", "p1"]  # or a group of its own
    assert [everything.captions(i) for i in range(4)] == [[], ["a cat"], [], []]
    assert len(open_data(f"csv:{tmp_path}/t.csv?split=val")) == 2
    assert everything.faults == [
        "2 rows have no path and are skipped: line 6, 7",
        "1 labels are 'None', which is read as a missing value; rename the label if it is a real "
        "one",
        "1 labels are 'nan', which is read as a missing value; rename the label if it is a real "
        "one",
        "1 groups are 'NA', which is read as a missing value; rename the group if it is a real one",
        "1 rows name no split and are in none: line 5",
    ]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers", "said"),
    [
        (["1", "1.0", "2", "2"], ["1", "2"], [0, 0, 1, 1], "'1' and '1.0' are read as one label"),
        (["1.0", "2.0", "", "1.0"], ["1.0", "2.0"], [0, 1, -1, 0], ""),
        (["True", "False"] * 2, ["False", "True"], [1, 0, 1, 0], ""),
        (["007", "7", "07", "10"], ["007", "07", "7", "10"], [0, 2, 1, 3], "'007' and '07'"),
        (["Cat", "cat", "dog", "dog"], ["Cat", "cat", "dog"], [0, 1, 2, 2], "'Cat' and 'cat'"),
        (["-1", "0", "1", "1"], ["-1", "0", "1"], [0, 1, 2, 2], "-1 is read as a class"),
        (["-1.5", "10", "9", "-2"], ["-2", "-1.5", "9", "10"], [1, 3, 2, 0], ""),
    ],
)
def test_labels_of_one_kind_are_one_class(tmp_path, labels, classes, numbers, said):
    rows = [f"pics/{i}.png,{label}" for i, label in enumerate(labels)]
    data = of(tmp_path, "\n".join(["path,label", *rows]))
    assert (data.classes, data.labels) == (classes, numbers)
    assert len(data.faults) == bool(said)
    assert said in " ".join(data.faults)


def test_splits_in_a_column_of_another_name_are_told(tmp_path):
    data = of(tmp_path, "path,subset\npics/0.png,train\npics/1.png,test\n")
    assert data.splits == []
    assert "the column 'subset' seems to name splits" in data.faults[0]


def test_paths_of_all_kinds_are_found_and_the_others_counted(tmp_path, monkeypatch):
    (tmp_path / "work/pics").mkdir(parents=True)
    (tmp_path / "work/pics/9.png").write_bytes(png(9))
    (tmp_path / "work/pics/3.png").write_bytes(png(33))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = [
        "path", f"{tmp_path}/pics/0.png", (tmp_path / "pics/1.png").as_uri(), "~/pics/2.png",
        "pics/3.png", "pics/9.png", "pics/8.png", "C:\\x\\7.png",
    ]  # fmt: skip
    data = of(tmp_path, "\n".join(lines))
    reds = [data[i]["image"].getpixel((0, 0))[0] for i in range(5)]
    assert reds == [0, 1, 2, 3, 9]
    assert data.ids == lines[1:]
    assert [fault.split(",")[0].replace(str(tmp_path), "~") for fault in data.faults] == [
        "2 of 7 files do not exist",
        "1 files are not in the table's folder ~ but in the working directory",
        "1 files are in the table's folder ~ and in the working directory; the former are read",
    ]
    assert "pics/8.png (line 7), C:\\x\\7.png (line 8)" in data.faults[0]
    alone = of(tmp_path, "path\nD:/x/7.png\n")
    assert "drive letter are of another computer" in alone.faults[0]


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


def test_a_cache_that_cannot_be_written_is_named_with_what_to_do(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", "/home/them/.cache")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    monkeypatch.setattr("vim_ssl.data.sources.tables.parquet_parts", lambda files: {})
    monkeypatch.setattr("vim_ssl.data.sources.tables.united_features", lambda parts: None)
    (tmp_path / "table.parquet").touch()
    for spec in (f"parquet:{tmp_path}/table.parquet", f"hf:{tmp_path}", "hf:owner/name"):
        with pytest.raises(OSError, match=r"them/\.cache cannot be written: .* Set HF_HOME to a f"):
            open_data(spec)


def names_in_csv(root, names):
    (root / "t.csv").write_text("\n".join(["path,label", *(f"{n},a" for n in names)]), "utf-8")
    return f"csv:{root}/t.csv"


def names_in_pairs(root, names):
    (root / "t.csv").write_text("\n".join(["path,caption", *(f"{n},a" for n in names)]), "utf-8")
    return f"pairs:{root}/t.csv"


def names_in_parquet(root, names):
    import datasets

    datasets.Dataset.from_list([{"path": n} for n in names]).to_parquet(root / "t.parquet")
    return f"parquet:{root}/t.parquet?image=path"


@pytest.mark.parametrize("write", [names_in_csv, names_in_pairs, names_in_parquet])
@pytest.mark.parametrize(
    ("given", "on_disk", "warns"),
    [
        ("d\u00e9/caf\u00e9.png", "de\u0301/cafe\u0301.png", False),
        ("de\u0301/cafe\u0301.png", "d\u00e9/caf\u00e9.png", False),
        ("d/img.png", "D/IMG.PNG", True),
        ("d/x1", "d/x1.png", False),
        ("d/x1.5", "d/x1.5.png", False),
    ],
)
def test_files_of_another_spelling_are_matched(tmp_path, write, given, on_disk, warns):
    for name in (on_disk, "other/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(png(3))
    (tmp_path / on_disk).with_suffix(".txt").touch()
    data = open_data(write(tmp_path, [given, "other/b.png"]))
    assert data[0]["image"].size == (6, 4)
    if write is not names_in_parquet:
        assert ["another letter case" in fault for fault in data.faults] == [True] * warns


def test_files_that_differ_only_in_case_or_ending_are_named_but_not_matched(tmp_path):
    for name in ("A.png", "a.PNG", "x.jpg"):
        (tmp_path / name).write_bytes(png(0))
    for given, near in (("a.png", "A.png and a.PNG"), ("x.png", "x.jpg")):
        (fault,) = open_data(names_in_csv(tmp_path, [given])).faults
        assert fault.startswith(f"1 of 1 files do not exist, for example {given}")
        assert fault.endswith(f" There is {near}.")


@pytest.mark.parametrize("scheme", ["csv", "pairs"])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv.gz", gzip.compress(b"path,label"), "compressed with gzip.*gunzip"),
        ("t.csv", bz2.compress(b"path,label"), "compressed with bzip2"),
        ("t.xlsx", b"PK\x03\x04rest", "an Excel file.*save it as CSV"),
        ("t.parquet", b"PAR1rest", "a parquet file.* open it with parquet:"),
    ],
    ids=["gzip", "bzip2", "xlsx", "parquet"],
)
def test_a_compressed_table_says_what_it_is(tmp_path, scheme, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        open_data(f"{scheme}:{tmp_path}/{name}")


def test_captions_in_a_text_file_are_a_table(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(png(i))
    lines = "image,caption\n0.jpg,one\n0.jpg,two\n1.jpg,three\n"  # as Flickr8k has them
    (tmp_path / "captions.txt").write_text(lines)
    data = open_data(f"pairs:{tmp_path}/captions.txt")
    assert [data.captions(i) for i in range(2)] == [["one", "two"], ["three"]]
