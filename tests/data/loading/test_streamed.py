"""Streams: every sample once, the same order after a resume, nothing executed, damage named."""

import functools
import http.server
import io
import json
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from vim_ssl.data import BadImage, labelled_splits, open_data
from vim_ssl.data.loading import streamed as stream_module
from vim_ssl.data.loading.indexed import training_loader
from vim_ssl.data.loading.order import Segment
from vim_ssl.data.loading.streamed import SlotReader, StreamSamples
from vim_ssl.data.sources import webdataset as tars_module


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VIM_SSL_CACHE", str(cache))
    return cache


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value % 256, value // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def value(item: dict) -> int:
    red, green, _ = item["image"].getpixel((0, 0))
    return red + 256 * green


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, *counts: int, broken: tuple[int, ...] = ()) -> str:
    """Tars of the images 0, 1, 2 …; a broken one holds no PNG."""
    number = 0
    for shard, count in enumerate(counts):
        files = {}
        for _ in range(count):
            files[f"{number:04}.png"] = b"no image" if number in broken else png(number)
            files[f"{number:04}.cls"] = str(number % 3).encode()
            number += 1
        write_tar(folder / f"part-{shard:03}.tar", files)
    return f"wds:{folder}/part-{{000..{len(counts) - 1:03}}}.tar"


def open_stream(spec: str):
    return open_data(spec, streams=True)


def items(stream) -> list[dict]:
    return [
        stream.decode(r) for number in range(len(stream.shards)) for r in stream.records(number)
    ]


def to_numbers(item: dict) -> dict:
    """The image's number and a draw, as a recipe's transform would make tensors."""
    return {"value": value(item), "x": pil_to_tensor(item["image"]), "draw": torch.rand(())}


def batches_of(spec, epoch=0, start=0, *, rank=0, world=1, workers=0, batch_size=2):
    """(index, image, draw) of every sample, batch by batch, and the skipped."""
    samples = StreamSamples(open_stream(spec), to_numbers, seed=5, buffer=7)
    sampler = samples.batches(batch_size, rank=rank, world=world, workers=workers)
    sampler.epoch, sampler.start = epoch, start
    rows, skipped = [], []
    for batch in training_loader(samples, sampler, num_workers=workers):
        columns = (batch[key].tolist() for key in ("index", "value", "draw"))
        rows.append(list(zip(*columns, strict=True)))
        skipped += batch["skipped"]
    return rows, skipped


# ------------------------------------------------------------------ the order of an epoch


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_sample_comes_once_when_counts_divide(tmp_path, world, workers):
    spec = write_shards(tmp_path, 6, 6, 6, 6)
    seen = []
    for rank in range(world):
        rows, _ = batches_of(spec, rank=rank, world=world, workers=workers)
        assert {len(batch) for batch in rows} == {2}
        seen += [index for batch in rows for index, _, _ in batch]
        assert all(index == number for batch in rows for index, number, _ in batch)
    assert sorted(seen) == list(range(24))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("start", [1, 4, 5])
def test_an_epoch_started_in_the_middle_is_the_rest_of_the_whole(tmp_path, workers, start):
    spec = write_shards(tmp_path, 8, 5, 7, 6, 9)
    whole, _ = batches_of(spec, epoch=1, workers=workers)
    assert batches_of(spec, epoch=1, start=start, workers=workers)[0] == whole[start:]


def test_workers_that_live_through_epochs_give_what_fresh_ones_give(tmp_path):
    spec = write_shards(tmp_path, 6, 6, 6)
    samples = StreamSamples(open_stream(spec), to_numbers, seed=5, buffer=7)
    sampler = samples.batches(2, rank=0, world=1, workers=2)
    loader = training_loader(samples, sampler, num_workers=2)
    for epoch, start in ((0, 3), (1, 0), (2, 0)):
        sampler.epoch, sampler.start = epoch, start
        values = [batch["value"].tolist() for batch in loader]
        fresh, _ = batches_of(spec, epoch, start, workers=2)
        assert values == [[number for _, number, _ in batch] for batch in fresh]


def test_no_and_one_worker_read_alike_and_epochs_differ(tmp_path):
    spec = write_shards(tmp_path, 9, 8)
    first, second = (batches_of(spec, epoch)[0] for epoch in (0, 1))
    assert first == batches_of(spec, workers=1)[0]
    order = [[index for batch in epoch for index, _, _ in batch] for epoch in (first, second)]
    assert order[0] != order[1]
    assert order[0] != sorted(order[0])
    draws = [{index: draw for b in epoch for index, _, draw in b} for epoch in (first, second)]
    assert all(draws[0][index] != draws[1][index] for index in draws[0].keys() & draws[1].keys())


def test_memory_stays_with_the_buffer_and_used_up_shards_are_not_opened_again(tmp_path):
    stream = open_stream(write_shards(tmp_path, 10, 10, 10, 10))
    opened, read = [], stream.read
    stream.read = lambda name: opened.append(name) or read(name)
    slot = [Segment(shard, 0, 10) for shard in (2, 0, 3, 1)]
    whole = SlotReader(stream, slot, torch.Generator().manual_seed(2), buffer=7)
    given = []
    for place in range(40):
        given.append(next(whole.candidates(place))[0])
        assert len(whole._held) < 7
    assert len(opened) == 4
    opened.clear()
    rest = SlotReader(stream, slot, torch.Generator().manual_seed(2), buffer=7, start=32)
    assert [next(rest.candidates(place))[0] for place in range(32, 40)] == given[32:]
    assert len(opened) == 2  # what the buffer held, and the last shard


# ------------------------------------------------------------------ damage


def test_broken_images_are_named_and_replaced_the_same_after_a_resume(tmp_path):
    spec = write_shards(tmp_path, 8, 8, broken=(3, 4, 12))
    whole, skipped = batches_of(spec)
    names = {text.partition(":")[0] for text in skipped}
    assert names == {"part-000.tar/0003", "part-000.tar/0004", "part-001.tar/0012"}
    assert all(number not in (3, 4, 12) for batch in whole for _, number, _ in batch)
    for start in range(8):
        assert batches_of(spec, start=start)[0] == whole[start:]


def test_of_a_tar_cut_off_the_whole_samples_are_used_and_the_rest_is_named(tmp_path):
    spec = write_shards(tmp_path, 6, 6)
    path = tmp_path / "part-001.tar"
    path.write_bytes(path.read_bytes()[: 512 * 4 * 4 + 700])  # inside of the fifth image
    stream = open_stream(spec)
    assert [shard.count for shard in stream.shards] == [6, 4]
    (fault,) = stream.faults
    assert "part-001.tar is damaged after 4 samples" in fault
    assert [value(item) for item in items(stream)] == list(range(10))
    path.write_bytes(path.read_bytes()[: 512 * 4 * 2])  # between two samples
    stream = open_stream(spec)
    assert [shard.count for shard in stream.shards] == [6, 2]
    assert "no end mark" in stream.faults[0]


def test_a_shard_that_is_lost_under_way_is_named_and_the_batches_stay_full(tmp_path):
    spec = write_shards(tmp_path, 30, 10)
    stream = open_stream(spec)
    (tmp_path / "part-001.tar").unlink()
    records = list(stream.records(1))
    assert len(records) == 10
    assert "part-001.tar[9]: the shard cannot be read: FileNotFoundError" in str(
        records[9]["image"]
    )


def test_nothing_in_a_shard_is_executed_or_read_but_what_is_known(tmp_path, monkeypatch):
    import pickle

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, None)
    files = {}
    for key in ("a/1", "a/2"):
        files |= {f"{key}.pyd": b"\x80never", f"{key}.jpg": png(7), f"{key}.pickle": b"\x80never",
                  f"{key}.seg.png": png(9), f"{key}.txt": b"a dog\n"}  # fmt: skip
    path = write_tar(tmp_path / "x.tar", files)
    stream = open_stream(f"wds:{path}")
    asked = []
    extractfile = tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda tar, m: asked.append(m.name) or extractfile(tar, m)
    )
    assert [(item["id"], value(item), item["caption"]) for item in items(stream)] == [
        ("x.tar/a/1", 7, "a dog"),
        ("x.tar/a/2", 7, "a dog"),
    ]
    assert asked == ["a/1.jpg", "a/1.txt", "a/2.jpg", "a/2.txt"]
    assert value(items(open_stream(f"wds:{path}?image=seg.png"))[0]) == 9


# ------------------------------------------------------------------ what a spec opens


def test_labels_captions_and_meta(tmp_path):
    meta = json.dumps({"caption": "from json", "grade": 4}).encode()
    files = {"1.png": png(1), "1.cls": b"2\n", "1.txt": b"said", "1.json": meta}
    write_tar(tmp_path / "a.tar", files)
    (item,) = items(open_stream(f"wds:{tmp_path}"))
    assert (item["label"], item["caption"], item["meta"]["grade"]) == (2, "said", 4)
    (item,) = items(open_stream(f"wds:{tmp_path}?label=grade&caption=caption"))
    assert (item["label"], item["caption"]) == (4, "from json")
    assert "label" not in items(open_stream(f"wds:{tmp_path}?label=none"))[0]
    write_tar(tmp_path / "a.tar", files | {"1.cls": b"dog"})
    with pytest.raises(ValueError, match=r"a.tar/1: .*'dog'.*label=none"):
        items(open_stream(f"wds:{tmp_path}"))


def test_patterns(tmp_path):
    write_shards(tmp_path, 1, 2, 3)
    for pattern, count in (("part-*.tar", 6), ("part-00{0,2}.tar", 4), ("part-{001..002}.tar", 5),
                           ("", 6), ("part-001.tar", 2)):  # fmt: skip
        assert len(open_stream(f"wds:{tmp_path}/{pattern}")) == count
    with pytest.raises(FileNotFoundError, match=r"part-003\.tar"):
        open_stream(f"wds:{tmp_path}/part-{{000..003}}.tar")
    with pytest.raises(ValueError, match="has no splits"):
        open_stream(f"wds:{tmp_path}?split=train")
    write_tar(tmp_path / "none" / "a.tar", {"1.pyd": b"", "1.cls": b"1"})
    with pytest.raises(ValueError, match=r"contain no image .* 1 × pyd"):
        open_stream(f"wds:{tmp_path}/none")


def test_limit_takes_from_every_shard(tmp_path):
    spec = write_shards(tmp_path, 8, 4, 4)
    stream = open_stream(f"{spec}?limit=8")
    assert [value(item) for item in items(stream)] == [0, 1, 2, 3, 8, 9, 12, 13]
    assert len(open_stream(f"{spec}?limit=99")) == 16


def test_counts_are_cached_until_a_shard_changes(tmp_path, monkeypatch, private_cache):
    from vim_ssl.data.sources import webdataset as tars

    spec = write_shards(tmp_path, 3, 4)
    before = open_stream(spec)
    counted = []
    count = tars.count
    monkeypatch.setattr(tars, "count", lambda name, r: counted.append(name) or count(name, r))
    assert open_stream(spec).fingerprint == before.fingerprint
    assert counted == []
    write_tar(tmp_path / "part-001.tar", {"1.png": png(1)})
    assert len(open_stream(spec)) == 4
    assert open_stream(spec).fingerprint != before.fingerprint
    assert counted == [str(tmp_path / "part-001.tar")]


@pytest.mark.parametrize("sizes", [True, False], ids=["sizes-json", "counted"])
def test_shards_behind_http(tmp_path, sizes):
    write_shards(tmp_path, 3, 4)
    if sizes:
        (tmp_path / "sizes.json").write_text('{"part-000.tar": 3, "part-001.tar": 4}')

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stream = open_stream(f"wds:http://127.0.0.1:{server.server_port}/part-{{000..001}}.tar")
        assert [value(item) for item in items(stream)] == list(range(7))
        with pytest.raises(ConnectionError, match="part-007"):
            open_stream(f"wds:http://127.0.0.1:{server.server_port}/part-007.tar")
        server.shutdown()


@pytest.mark.parametrize("cut", [10_240, 10_340, 10_840], ids=["header", "in-header", "in-data"])
def test_a_connection_that_ends_early_loses_no_sample(tmp_path, monkeypatch, cut):
    """Once, while the samples are counted; between two headers, inside of one, inside of a file."""
    write_shards(tmp_path, 40)
    whole = (tmp_path / "part-000.tar").read_bytes()
    answers = []

    class Cutting(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path.endswith("sizes.json"):
                return self.send_error(404)
            answers.append(len(answers))
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.send_header("ETag", "one")
            self.end_headers()
            # The first answer is for its headers alone.
            self.wfile.write(whole[:cut] if len(answers) == 2 else whole)

    monkeypatch.setattr(tars_module.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cutting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        spec = f"wds:http://127.0.0.1:{server.server_port}/part-000.tar"
        stream = open_stream(spec)
        assert (len(stream), stream.faults) == (40, [])
        assert len(answers) == 3
        assert len(open_stream(spec)) == 40
        server.shutdown()


@pytest.mark.parametrize("size", [-512, -10_240])
def test_a_header_of_negative_size_ends_the_tar_with_a_word(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", {"1.png": png(1), "2.png": png(2)})
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo("3.png")
    second = 512 * 2
    header.size = 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    content[second : second + 512] = block
    path.write_bytes(content)
    stream = open_stream(f"wds:{path}")
    assert len(stream) == 1
    assert "negative size" in stream.faults[0]


def test_a_file_that_would_fill_the_memory_is_a_broken_image(tmp_path, monkeypatch):
    monkeypatch.setattr(tars_module, "MAX_FILE", 1000)
    path = write_tar(tmp_path / "a.tar", {"1.png": png(1), "2.png": bytes(2000)})
    first, second = open_stream(f"wds:{path}").records(0)
    assert isinstance(first["image"], bytes)
    assert not second["image"]


def test_hidden_files_between_a_samples_own_do_not_cut_it(tmp_path):
    files = {"._1.cls": b"x", "1.cls": b"2", "._1.txt": b"x", "1.txt": b"a cat", "1.png": png(1)}
    (item,) = items(open_stream(f"wds:{write_tar(tmp_path / 'a.tar', files)}"))
    assert (item["label"], item["caption"]) == (2, "a cat")


def test_a_remote_shard_that_is_gone_is_waited_for_once(tmp_path, monkeypatch):
    """Else each substitute for one of its samples would wait as long again."""
    stream, waits = open_stream(write_shards(tmp_path, 6)), []

    def gone(name):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(stream_module, "is_remote", lambda name: True)
    monkeypatch.setattr(stream_module.time, "sleep", waits.append)
    stream.read = gone
    for _ in range(5):
        assert all("gone" in str(record["image"]) for record in stream.records(0))
    assert sum(waits) == 2 + 4 + 8


def test_a_remote_shard_that_breaks_off_is_taken_up_again(tmp_path, monkeypatch):
    stream = open_stream(write_shards(tmp_path, 6))
    read, calls = stream.read, []

    def flaky(name):
        calls.append(name)
        for i, record in enumerate(read(name)):
            if i == 2 * len(calls):
                raise ConnectionResetError("gone")
            yield record

    monkeypatch.setattr(stream_module, "is_remote", lambda name: True)
    monkeypatch.setattr(stream_module.time, "sleep", lambda seconds: None)
    stream.read = flaky
    assert [value(item) for item in items(stream)] == list(range(6))
    assert len(calls) == 3


def test_a_stream_is_refused_where_images_are_needed_by_index(tmp_path):
    spec = write_shards(tmp_path, 4)
    with pytest.raises(ValueError, match=r"is a stream.*by index here. Give a folder"):
        open_data(spec)
    with pytest.raises(ValueError, match="is a stream"):
        labelled_splits(spec, test=0.2, seed=0)
    for other in (str(tmp_path), "sample:mnist5k"):
        with pytest.raises(ValueError, match="remove streaming=true"):
            open_stream(f"{other}?streaming=true")


# ------------------------------------------------------------------ Hugging Face


@pytest.fixture
def tables(tmp_path) -> str:
    """Two training files and a test file; one image is missing, one broken."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]),
        text=datasets.Value("string"), size=datasets.Value("int64"),
    )  # fmt: skip
    (tmp_path / "set").mkdir()
    for name, begin in (("train-00000-of-00002", 0), ("train-00001-of-00002", 40), ("test", 80)):
        rows = range(begin, begin + 40)
        images = [{"bytes": png(i), "path": None} for i in rows]
        if begin == 0:
            images[5], images[6] = None, {"bytes": b"broken", "path": None}
        columns = {"image": images, "label": [i % 2 for i in rows], "size": list(rows),
                   "text": [f"number {i}" for i in rows]}  # fmt: skip
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / "set" / f"{name}.parquet", batch_size=16)
    return f"hf:{tmp_path / 'set'}"


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_a_streamed_table_gives_the_items_of_the_indexed_one(tables, split):
    by_index = open_data(tables, split=split)
    stream = open_data(f"{tables}?streaming=true", split=split, streams=True)
    assert (stream.classes, stream.splits, stream.split) == (
        by_index.classes, by_index.splits, by_index.split,
    )  # fmt: skip
    assert len(stream) == len(by_index)
    records = [r for number in range(len(stream.shards)) for r in stream.records(number)]
    for i, record in enumerate(records):
        if record["id"] in {"train/5", "train/6"}:
            with pytest.raises(BadImage) as theirs:
                by_index[i]
            with pytest.raises(BadImage) as ours:
                stream.decode(record)
            assert str(ours.value) == str(theirs.value)
            continue
        ours, theirs = stream.decode(record), by_index[i]
        assert value(ours) == value(theirs)
        assert {**ours, "image": 0} == {**theirs, "image": 0}


def test_a_streamed_table_resumes_exactly_with_workers(tables):
    spec = f"{tables}?streaming=true&label=none"
    whole, skipped = batches_of(spec, workers=2, batch_size=8)
    assert {index for batch in whole for index, _, _ in batch} == set(range(80)) - {5, 6}
    assert len(skipped) == 2
    assert batches_of(spec, start=3, workers=2, batch_size=8)[0] == whole[3:]


def test_what_cannot_be_streamed_from_hugging_face_says_so(tables, tmp_path):
    with pytest.raises(ValueError, match="label=size is not of type ClassLabel"):
        open_stream(f"{tables}?streaming=true&label=size")
    with pytest.raises(ValueError, match="no split 'dev'"):
        open_stream(f"{tables}?streaming=true&split=dev")
    import datasets

    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="memory-mapped; read it by index"):
        open_stream(f"hf:{tmp_path / 'saved'}?streaming=true")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("x\n1\n")
    with pytest.raises(ValueError, match=r"not parquet.*train\.csv"):
        open_stream(f"hf:{tmp_path / 'csv'}?streaming=true")
