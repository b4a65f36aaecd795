"""Images with captions, beside them or in a table; what is no pair is named and counted."""

import pickle
import random

import pytest
import torch
from PIL import Image

from vim_ssl.data import BadImage, open_data
from vim_ssl.data.dataset import captions_of
from vim_ssl.data.loading.indexed import SeededSamples


def fill(root, **texts):
    """An image for every name, with these words beside it; None: without."""
    for name, text in texts.items():
        path = root / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
        if text is not None:
            path.with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


# ------------------------------------------------------------------ folders


def test_opening_tells_of_a_few_faults_and_counts_the_rest(tmp_path, caplog):
    for i in range(9):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("a hat")
    assert len(open_data(f"pairs:{tmp_path}").faults) == 8
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        *(f"{i}.png: {i}.txt does not exist" for i in range(1, 6)),
        "3 more faults; `vim-ssl data check` lists them all.",
    ]


def test_every_line_beside_an_image_is_a_caption(tmp_path):
    fill(tmp_path, a="a dog\n\n  the same dog \n", deep__b="\ufeffune fête", c=None)
    data = open_data(f"pairs:{tmp_path}")
    assert data.ids == ["a.png", "deep/b.png"]
    assert data[0]["image"].size == (8, 6)
    assert captions_of(data[0]["caption"]) == data.captions(0) == ["a dog", "the same dog"]
    assert data.captions(1) == ["une fête"]
    assert data.faults == ["c.png: c.txt does not exist"]
    assert data.has_captions
    assert pickle.loads(pickle.dumps(data)).captions(1) == ["une fête"]


def test_split_folders_are_splits(tmp_path):
    fill(tmp_path, train__a="a", train__b="b", train__c=None, val__d="d", val__e=None)
    train, val = open_data(f"pairs:{tmp_path}"), open_data(f"pairs:{tmp_path}?split=validation")
    assert (train.split, train.ids, len(train.faults)) == (
        "train",
        ["train/a.png", "train/b.png"],
        1,
    )
    assert (val.split, val.ids, len(val.faults)) == ("val", ["val/d.png"], 1)
    assert len(open_data(f"pairs:{tmp_path}?split=all")) == 3
    assert len(open_data(f"pairs:{tmp_path}?split=all&limit=2")) == 2


def test_a_caption_that_is_no_text_is_found_when_read(tmp_path):
    fill(tmp_path, a=b"caf\xe9", b="fine")
    data = open_data(f"pairs:{tmp_path}")
    with pytest.raises(BadImage, match=r"a\.png: its caption file a\.txt: it is not UTF-8"):
        data[0]
    with pytest.raises(BadImage, match="not UTF-8"):
        data.captions(0)
    assert data.captions(1) == ["fine"]


def test_the_fingerprint_changes_with_a_caption_file(tmp_path):
    fill(tmp_path, a="a", b="b")
    before = open_data(f"pairs:{tmp_path}").fingerprint
    (tmp_path / "b.txt").write_text("longer")
    assert open_data(f"pairs:{tmp_path}").fingerprint != before


def test_a_folder_without_captions_says_where_one_would_be(tmp_path):
    with pytest.raises(ValueError, match=r"None of the 1 images .* example a\.txt"):
        open_data(f"pairs:{fill(tmp_path, a=None)}")


# ------------------------------------------------------------------ tables


def table(root, text, name="pairs.csv"):
    fill(root, a=None, b=None)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"pairs:{root / name}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('path,caption\na.png,"a dog, running"\nb.png,犬\n', "x.csv"),
        ("caption;filepath\n犬;b.png\na dog, running;a.png\n", "x.csv"),
        ("filepath\ttitle\na.png\ta dog, running\nb.png\t犬\n", "x.csv"),
        ('\ufefffilepath\ttitle\r\na.png\t"a dog, running"\r\n\r\nb.png\t犬', "x.tsv"),
        ('path, caption\na.png,"a dog, running"\nb.png, 犬\n', "x.csv"),
    ],
    ids=["commas", "semicolons", "tabs", "windows", "spaces"],
)
def test_a_table_has_a_pair_in_each_row(tmp_path, text, name):
    data = open_data(table(tmp_path, text, name))
    pairs = {data.ids[i]: data.captions(i) for i in range(2)}
    assert pairs == {"a.png": ["a dog, running"], "b.png": ["犬"]}
    assert data[0]["image"].size == (8, 6)
    assert data.faults == []


def test_rows_of_one_path_are_one_image_with_several_captions(tmp_path):
    data = open_data(table(tmp_path, "path,caption\na.png,one\nb.png,two\na.png,three\n"))
    assert [data.captions(i) for i in range(len(data))] == [["one", "three"], ["two"]]
    changed = table(tmp_path, "path,caption\na.png,one\nb.png,two\na.png,four\n")
    assert open_data(changed).fingerprint != data.fingerprint


def test_bad_rows_are_named_and_counted(tmp_path):
    rows = [b"path,caption", b"a.png,fine", b"only one", b"b.png,too,many", b",no path",
            b"b.png,  ", b"b.png,caf\xe9", b"b.png,good"]  # fmt: skip
    data = open_data(table(tmp_path, b"\n".join(rows)))
    assert [data.captions(i) for i in range(len(data))] == [["fine"], ["good"]]
    assert data.faults == [
        "pairs.csv, line 3: 1 fields, the header has 2",
        "pairs.csv, line 4: 3 fields, the header has 2",
        "pairs.csv, line 5: no path",
        "pairs.csv, line 6: no caption",
        "pairs.csv, line 7: it is not UTF-8",
    ]


def test_a_lone_quote_between_commas_is_a_fault_at_its_line(tmp_path):
    text = 'path,caption\na.png,"two\nlines"\nb.png,"so" he said\nb.png,fine\na.png,"oh\nb.png,hi\n'
    data = open_data(table(tmp_path, text))
    assert [data.captions(i) for i in range(2)] == [["two\nlines"], ["fine"]]
    assert data.faults == [
        "pairs.csv, line 4: ',' expected after '\"'",
        "pairs.csv, line 6: a quote is not closed; lost down to line 7",
    ]


def test_a_lone_quote_between_tabs_swallows_nothing(tmp_path):
    data = open_data(table(tmp_path, 'path\tcaption\na.png\t"oh\nb.png\tsay ""hi"\n', "x.tsv"))
    assert [data.captions(i) for i in range(2)] == [['"oh'], ['say ""hi"']]


def test_spaces_within_quotes_between_tabs_belong_to_the_caption(tmp_path):
    texts = [f"path\tcaption\na.png\t{caption}\n" for caption in ('" a dog "', "a dog", " a dog ")]
    spaced, plain, outside = [open_data(table(tmp_path, text, "x.tsv")) for text in texts]
    assert plain.fingerprint == outside.fingerprint != spaced.fingerprint


@pytest.mark.parametrize(
    ("text", "options", "error", "says"),
    [
        ("a.png,a dog\n", "", ValueError, r"no column for images .* select one with \?image="),
        (
            "path,words\na.png,dog\n",
            "",
            ValueError,
            r"no column for captions .* header is path, words",
        ),
        ("path,words\na.png,dog\n", "?caption=word", ValueError, "Did you mean 'words'"),
        ("path,caption\n", "", ValueError, "has no image-caption pairs"),
        ("path,caption\nx/a.png,dog\n", "", FileNotFoundError, "none of the first images"),
        ("path,caption\na.png,dog\n", "?split=val", ValueError, "has no split 'val'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, text, options, error, says):
    with pytest.raises(error, match=says):
        open_data(table(tmp_path, text) + options)


def test_columns_are_named(tmp_path):
    spec = table(tmp_path, "n,where,words,path\n1,a.png,dog,x\n") + "?image=where&caption=words"
    assert open_data(spec).captions(0) == ["dog"]


def test_no_table_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="the table does not exist"):
        open_data(f"pairs:{tmp_path}/x.csv")


# ------------------------------------------------------------------ other sources


def test_sets_read_as_one_keep_their_captions_if_all_have_them(tmp_path):
    fill(tmp_path / "one", a="a dog\ndog")
    fill(tmp_path / "two", b="a cat", c=None)
    one, two = f"pairs:{tmp_path}/one", f"pairs:{tmp_path}/two"
    data = open_data(f"{one} + {two}")
    assert [data.captions(i) for i in range(2)] == [["a dog", "dog"], ["a cat"]]
    assert captions_of(data[1]["caption"]) == ["a cat"]
    assert data.subset([1]).captions(0) == ["a cat"]
    assert data.faults == ["c.png: c.txt does not exist"]
    assert not open_data(f"{one} + {tmp_path}/two").has_captions


def test_lists_of_captions_in_a_hugging_face_table(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    )
    rows = {"image": [Image.new("RGB", (8, 6))], "captions": [["one", "", "two"]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    assert open_data(f"hf:{tmp_path}/saved").captions(0) == ["one", "two"]


@pytest.mark.parametrize(
    ("value", "texts"),
    [("a dog ", ["a dog"]), (["a", " ", None, 3, "b"], ["a", "b"]), (None, []), ("", []), (7, [])],
)
def test_whatever_stands_for_a_caption_becomes_a_list(value, texts):
    assert captions_of(value) == texts


def test_a_sample_that_the_transform_refuses_gives_its_place_to_another(tmp_path):
    """And one of several captions is drawn by the sample's own seed."""
    fill(tmp_path, a="1\n2\n3\n4", b="", c="5\n6\n7")
    data = open_data(f"pairs:{tmp_path}")

    def words(item):
        if not (texts := captions_of(item["caption"])):
            raise BadImage(item["id"], "it has no caption")
        return {"word": torch.tensor(int(random.choice(texts)))}

    samples = SeededSamples(data, words, seed=1)
    drawn = samples[(0, 1)]
    assert set(drawn["skipped"]) == {"b.png: it has no caption"}
    assert drawn["index"] in (0, 2)
    epochs = [samples[(epoch, 0)]["word"].item() for epoch in range(20)]
    assert set(epochs) == {1, 2, 3, 4}
    assert [samples[(epoch, 0)]["word"].item() for epoch in range(20)] == epochs
