"""Suggestions for unknown names."""

import os
from dataclasses import fields

import pytest

from vim_ssl.downstream.finetune import Config
from vim_ssl.utils.names import SYNONYMS, closest, original, printable

FLAGS = [f"--{field.name.replace('_', '-')}" for field in fields(Config)]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--lr", ["--base-lr"]),
        ("--learning-rate", ["--base-lr"]),
        ("--batch", ["--batch-size"]),
        ("--bs", ["--batch-size"]),
        ("--epoch", ["--epochs"]),
        ("--pretrained", ["--encoder"]),
        ("--model", ["--encoder"]),
        ("--dataset", ["--data"]),
        ("--out", ["--output"]),
        ("--num-workers", ["--workers"]),
        ("--Image_Size", ["--img-size"]),
        ("--decay", ["--weight-decay", "--layer-decay"]),  # both contain the word
        ("--momentum-of-the-teacher", []),
    ],
)
def test_flags_that_other_projects_have(typed, expected):
    assert set(closest(typed, FLAGS)) == set(expected)


def test_a_synonym_counts_only_where_its_name_is_known():
    assert closest("lr", ["min_lr", "sample_rate"]) == ["min_lr"]
    assert closest("lr", ["lr_min", "lrs"]) == ["lr_min"]
    assert not set(SYNONYMS) & set(SYNONYMS.values()), "a name of ours is not another's synonym"


@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", b"a\xff\xfeb", "café.png".encode(), b"plain", b"line\nbreak"]
)
def test_names_that_are_not_utf_8_are_escaped_and_come_back(name):
    text = printable(os.fsdecode(name))
    text.encode("utf-8")
    assert os.fsencode(original(text)) == name
