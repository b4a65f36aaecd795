"""The spec string: what it accepts, and what it says about the rest."""

from pathlib import Path

import pytest

from vim_ssl.data import DataSpec, open_data, parse_spec
from vim_ssl.data.spec import pick_split, same_data, sets_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("photos/2024", DataSpec("folder", "photos/2024")),
        ("photos?split=val", DataSpec("folder", "photos", split="val")),
        (r"C:\photos\cats", DataSpec("folder", r"C:\photos\cats")),
        ("C:/photos?limit=5", DataSpec("folder", "C:/photos", limit=5)),
        ("./a&b=c #1 100%", DataSpec("folder", "./a&b=c #1 100%")),
        ("what?/photos?split=test", DataSpec("folder", "what?/photos", split="test")),
        ("~/photos", DataSpec("folder", "~/photos")),
        ("folder:hf:odd", DataSpec("folder", "hf:odd")),
        ("sample:mnist5k", DataSpec("sample", "mnist5k")),
        ("HF:owner/name", DataSpec("hf", "owner/name")),
        ("hf:owner/name:config", DataSpec("hf", "owner/name:config")),
        (r"hf:C:\saved\set", DataSpec("hf", r"C:\saved\set")),
        (
            "hf:o/n?image=img&label=fine_label&caption=text&group=patient&limit=10&streaming=true",
            DataSpec(
                "hf", "o/n", image="img", label="fine_label", caption="text", group="patient",
                limit=10, streaming=True,
            ),
        ),
        ("hf:o/n?label=a%26b", DataSpec("hf", "o/n", label="a&b")),
        ("hf:o/n?split=train[:10%]", DataSpec("hf", "o/n", split="train[:10%]")),
    ],
)  # fmt: skip
def test_parse_and_print(text, expected):
    spec = parse_spec(text)
    assert spec == expected
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize("name", ["what?split=val", "hf:lookalike", "a:b"])
def test_an_existing_path_is_a_folder_whatever_its_name(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_spec(name) == DataSpec("folder", name)


def test_a_path_object_is_a_folder():
    assert parse_spec(Path("sample:mnist5k")).scheme == "folder"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("sampel:mnist5k", r"unknown scheme 'sampel'\. Did you mean 'sample'\?"),
        ("sample:", "has no location"),
        ("photos?splt=val", r"unknown option 'splt'\. Did you mean 'split'\?"),
        ("photos?split", "no value"),
        ("photos?split=", "no value"),
        ("photos?split=a&split=b", "twice"),
        ("photos?limit=many", "limit=many"),
        ("photos?limit=0", "above 0"),
        ("photos?streaming=yes", "neither true nor false"),
    ],
)
def test_errors_say_what_to_do(text, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(text)


def test_streaming_of_a_folder_is_refused_politely(tmp_path):
    with pytest.raises(ValueError, match=r"read by index.*remove streaming=true"):
        open_data(f"{tmp_path}?streaming=true")


@pytest.mark.parametrize(
    ("wanted", "splits", "expected"),
    [
        (None, (), "all"),
        (None, ("test", "train"), "train"),
        (None, ("training", "val"), "training"),
        (None, ("test",), "test"),
        ("all", ("train", "test"), "all"),
        ("val", ("train", "validation"), "validation"),
        ("validation", ("train", "val"), "val"),
        ("extra", ("train", "extra"), "extra"),
    ],
)
def test_pick_split(wanted, splits, expected):
    assert pick_split(wanted, splits, "the source") == expected


@pytest.mark.parametrize(
    ("wanted", "splits", "message"),
    [
        ("tset", ("train", "test"), r"no split 'tset'\. Did you mean 'test'\?"),
        ("train", (), "It has: none"),
        (None, ("a", "b"), r"the splits a, b, but no training split; add \?split=NAME"),
    ],
)
def test_pick_split_errors(wanted, splits, message):
    with pytest.raises(ValueError, match=message):
        pick_split(wanted, splits, "the source")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("x", "folder:./x?split=test&limit=3", True),
        ("pairs:x", "folder:x/../x", True),
        ("hf:owner/x + 20 * x", "x", True),
        ("hf:owner/x", "hf:owner/x?split=train", True),
        ("hf:owner/x", "sample:owner/x", False),
        ("x", "y", False),
    ],
)
def test_the_same_data_whatever_its_split_and_spelling(one, other, same, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert same_data(one, other) == same_data(other, one) == same
    if one == "x":
        assert same_data(str(tmp_path / "x"), other) == same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A + B", [("folder", "A + B")]),
        ("A + B?label=none", [("folder", "A + B")]),
        ("A + B/deep", [("folder", "A + B/deep")]),
        ("geotiff:A + B/*.tif", [("geotiff", "A + B/*.tif")]),
        ("csv:A + B/t.csv + C", [("csv", "A + B/t.csv"), ("folder", "C")]),
        ("C + A + B", [("folder", "C"), ("folder", "A + B")]),
        ("C + 20 * A + B", [("folder", "C"), ("folder", "A + B")]),
        ("C + hf:owner/x", [("folder", "C"), ("hf", "owner/x")]),
        ("C+D", [("folder", "C+D")]),
        ("3 * C", [("folder", "3 * C")]),
    ],
)
def test_a_plus_in_the_name_of_a_path_divides_nothing(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("A + B/deep", "C", "C+D"):
        (tmp_path / name).mkdir(parents=True)
    sets = sets_of(text)
    assert [(spec.scheme, spec.location) for _, spec in sets] == expected
    assert [times for times, _ in sets] == [1] * len(sets[:1]) + [20 if "20" in text else 1] * (
        len(sets) - 1
    )


@pytest.mark.parametrize("name", ["what?", "a&b", "c#1", "x=1", "is it? yes=no", "50%", "a?b=c"])
@pytest.mark.parametrize("scheme", ["folder", "csv", "geotiff"])
def test_signs_of_the_options_in_a_path(tmp_path, monkeypatch, scheme, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    location = f"{name}/t.csv" if scheme == "csv" else name
    (tmp_path / name / "t.csv").touch()
    for text, expected in (
        (f"{scheme}:{location}", DataSpec(scheme, location)),
        (f"{scheme}:{location}?label=none", DataSpec(scheme, location, label="none")),
    ):
        assert parse_spec(text) == expected
        assert parse_spec(str(expected)) == expected
    assert parse_spec(f"{name}?label=none") == DataSpec("folder", name, label="none")


@pytest.mark.parametrize("pattern", ["img?.tif", "scans/a?/*.tif"])
def test_a_question_mark_may_be_part_of_a_glob(pattern):
    spec = parse_spec(f"geotiff:{pattern}?bands=1")
    assert (spec.location, spec.bands) == (pattern, "1")
    assert parse_spec(f"geotiff:{pattern}") == DataSpec("geotiff", pattern)
    assert parse_spec(str(spec)) == spec
