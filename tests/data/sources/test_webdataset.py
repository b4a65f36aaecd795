"""Tars as people pack them: each sample is read, or told; labels and texts as they are meant."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vim_ssl.data import BadImage, open_data
from vim_ssl.data.sources.webdataset import whole_number


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, *files: tuple[str, bytes | tarfile.TarInfo]) -> str:
    with tarfile.open(path, "w") as shard:
        for name, content in files:
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            shard.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return f"wds:{path}"


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, tarfile.TarInfo]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


def opened(spec: str):
    return open_data(spec, streams=True)


def records(spec: str) -> list[dict]:
    stream = opened(spec)
    return [record for shard in range(len(stream.shards)) for record in stream.records(shard)]


def test_links_are_followed_within_a_tar_or_told(tmp_path):
    files = [
        ("d/a.png", png(1)), ("d/a.cls", b"1"), link("d/b.png", "a.png"), link("d/b.cls", "a.cls"),
        link("d/c.png", "d/a.png", tarfile.LNKTYPE), link("d/e.png", "gone.png"),
        link("d/f.png", "f.png"), ("d/g.png", png(7)),
    ]  # fmt: skip
    spec = tar(tmp_path / "a.tar", *files)
    found = records(spec)
    assert [record["id"][-1] for record in found] == [*"abcefg"]
    assert [record.get("label") for record in found[:3]] == [1, 1, None]
    assert [record["image"] for record in found[:3]] == [png(1)] * 3
    assert found[5]["image"] == png(7)
    for record in found[3:5]:
        with pytest.raises(BadImage, match=r"it is a link to (gone|f)\.png, not in the tar"):
            opened(spec).decode(record)
    (tmp_path / "a.tgz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    packed = opened(f"wds:{tmp_path}/a.tgz")
    assert "5 files are links, which are not followed in compressed" in packed.faults[0]
    with pytest.raises(BadImage, match=r"b\.cls: it is a link to a\.cls; pack the files"):
        packed.decode(list(packed.records(0))[1])


def test_what_is_lost_in_a_tar_is_told(tmp_path, caplog):
    files = [
        *((f"{name}.png", png(1)) for name in "ab"), *((f"{name}.cls", b"1") for name in "ab"),
        ("a.png", png(2)), ("c.heic", b"x"), ("c.txt", b"x"), ("d.001.jpg", b"x"),
        ("e.png", png(3)), ("e.seg.png", png(3)), ("../f.png", png(4)), ("/g.png", png(4)),
        ("._h.png", b"x"), ("__MACOSX/h.png", b"x"), (".ipynb_checkpoints/h.png", b"x"),
        ("./i.v1/j.png", png(5)),
    ]  # fmt: skip
    stream = opened(tar(tmp_path / "a.tar", *files))
    tar(tmp_path / "b.tar")
    assert [record["id"] for record in stream.records(0)] == [
        "a.tar/a", "a.tar/b", "a.tar/a", "a.tar/e", "a.tar/./i.v1/j",
    ]  # fmt: skip
    assert [fault.split(" ", 1)[0] + fault.rpartition(",")[2] for fault in stream.faults] == [
        "3 for example a.tar/a.cls",  # and b.cls, c.txt
        "1 for example a.tar/a",
        "1 for example a.tar/d.001.jpg",
        "2 for example a.tar/../f.png",
    ]
    assert stream.passed_over == {"HEIC": 1, "hidden": 3}
    assert stream.faults[0] in caplog.text
    assert opened(f"wds:{tmp_path}").faults[-1] == "1 shards contain no sample, for example b.tar"


def test_shards_of_all_endings_and_odd_names_are_found(tmp_path):
    for i, name in enumerate(["a.TAR", "b.tgz", "c.tar.gz", "d{1}.tar", "e.tar.bz2"]):
        tar(tmp_path / "made", (f"{i}.png", png(i)))
        content = (tmp_path / "made").read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(content) if "gz" in name else content)
    (tmp_path / "._a.tar").write_bytes(b"x")
    assert len(opened(f"wds:{tmp_path}")) == 5
    assert len(opened(f"wds:{tmp_path}/d{{1}}.tar")) == 1


@pytest.mark.parametrize(
    ("label", "number"),
    [
        (3, 3), (3.0, 3), ("3", 3), (" 3\n", 3), ("3.0", 3), ("-1", -1), (None, None), ("", None),
        ("nan", None), (float("nan"), None), ("None", None),
    ],
)  # fmt: skip
def test_labels_that_are_whole_numbers_or_missing(label, number):
    assert whole_number(label) == number


@pytest.mark.parametrize("label", [3.7, True, "3.7", "cat", [3], {"a": 1}, "1e-3", "1,000", "1e3"])
def test_labels_that_are_not_whole_numbers_are_refused(label):
    with pytest.raises(ValueError, match="is not a whole number"):
        whole_number(label)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_texts_with_a_byte_order_mark(tmp_path, encoding):
    texts = {"txt": "ein Hünd", "cls": "2", "json": json.dumps({"who": "ich"})}
    files = [("a.png", png(1)), *((f"a.{k}", v.encode(encoding)) for k, v in texts.items())]
    (record,) = records(tar(tmp_path / "a.tar", *files))
    assert (record["caption"], record["label"], record["meta"]) == ("ein Hünd", 2, {"who": "ich"})


@pytest.mark.parametrize(
    ("ending", "content", "says"),
    [
        ("txt", b"caf\xe9", r"\.txt is not UTF-8"), ("json", b'{"a": 1,}', "line 1 column"),
        ("json", b"{", "Expecting"), ("cls", b"1\0", "NUL bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_beside_an_image_is_named(tmp_path, ending, content, says):
    (record,) = records(tar(tmp_path / "a.tar", ("a.png", png(1)), (f"a.{ending}", content)))
    with pytest.raises(BadImage, match=rf"a\.tar/a: its label, caption or json .*{says}"):
        opened(f"wds:{tmp_path}/a.tar").decode(record)


def test_remote_shards_are_counted_by_an_index_beside_them(tmp_path, caplog):
    pytest.importorskip("fsspec")
    for i in range(2):
        tar(tmp_path / f"{i}.tar", ("a.png", png(1)))
    spec = f"wds:file://{tmp_path}/{{0,1}}.tar"
    assert len(opened(spec)) == 2
    assert "without a sizes.json beside them" in caplog.text
    shards = [{"url": f"{i}.tar", "nsamples": 5 + i} for i in range(2)]
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": shards}))
    assert [shard.count for shard in opened(spec).shards] == [5, 6]


def test_shards_of_several_splits_are_all_read_and_reported(tmp_path):
    for split in ("train", "test"):
        tar(tmp_path / f"{split}-000.tar", ("a.png", png(0)))
    (warning,) = opened(f"wds:{tmp_path}").passed_over.warnings
    assert warning.startswith("the shards of test and train are all read")
    for quiet in (f"{tmp_path}?split=all", f"{tmp_path}/train-*.tar"):
        assert opened(f"wds:{quiet}").passed_over.warnings == []


def test_several_images_of_a_sample_are_reported(tmp_path):
    files = [("a.jpg", png(1)), ("a.png", png(2)), ("b.png", png(3)), ("b.jpg", png(4))]
    spec = tar(tmp_path / "a.tar", *files)
    (fault,) = opened(spec).faults
    assert "2 samples have several images" in fault
    assert "image=" in fault
    assert opened(f"{spec}?image=png").faults == []
