"""Embeddings in files: the encoder's own vectors with the right ids, whatever breaks."""

import io
import json
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start

from vim_ssl import VimEncoder, cli, create_transform, load_encoder, save_encoder
from vim_ssl.data import ImageData, open_data
from vim_ssl.downstream import embed
from vim_ssl.evaluation.embeddings import Embedded, read_embeddings, write_shard
from vim_ssl.evaluation.readout import all_readouts, available_readouts
from vim_ssl.utils.names import original

SMALL = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 8, "depth": 1,
         "num_classes": 0}  # fmt: skip


def image(number: int) -> bytes:
    values = np.random.default_rng(number).integers(0, 255, (16, 16), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """23 images of two classes; numbers 4 and 9 are broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(23):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image" if i in (4, 9) else image(i))
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> str:
    """Three tars of 9, 1 and 6 images, the first's third broken, the last unlabelled."""
    folder, number = tmp_path_factory.mktemp("tars"), 0
    for shard, count in enumerate((9, 1, 6)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for _ in range(count):
                files = {"png": b"no image" if number == 2 else image(number)}
                files |= {} if shard == 2 else {"cls": str(number % 2).encode()}
                for extension, content in files.items():
                    member = tarfile.TarInfo(f"{number:02}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    return f"wds:{folder}/*.tar"


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_encoder(VimEncoder(**SMALL), tmp_path_factory.mktemp("encoder"))


def expected(encoder_file: Path, data, readout: str | None = None) -> dict[str, np.ndarray]:
    """The embedding of every readable image by its id, one at a time."""
    encoder = load_encoder(encoder_file)
    transform = create_transform(encoder)
    found = {}
    for item in data:
        with torch.no_grad():
            x = transform(item["image"])[None]
            y = encoder(x)
            if readout:
                columns = available_readouts(encoder, [readout])[readout]
                y = all_readouts(encoder, x)[:, columns]
        found[item["id"]] = y[0].numpy()
    return found


def readable(data: ImageData) -> list[dict]:
    return [data[i] for i in range(len(data)) if i not in broken(data)]


def broken(data: ImageData) -> list[int]:
    return [i for i, name in enumerate(data.ids) if name in ("a/04.png", "b/09.png")]


def run(encoder_file: Path, spec, folder: Path, *argv: str) -> dict:
    code = embed.main(["--encoder", str(encoder_file), "--data", str(spec), "--output", str(folder),
                       "--shard-rows", "4", "--batch-size", "3", *argv])  # fmt: skip
    assert code == 0
    return json.loads((folder / "record.json").read_text())


def read_parquet(folder: Path) -> dict[str, list]:
    from pyarrow import parquet

    return parquet.read_table(folder / "shards").to_pydict()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def same_content(one: Path, other: Path) -> None:
    """The same files with the same rows; of embeddings, floats that agree."""
    assert contents(one).keys() == contents(other).keys()
    rows, others = read_parquet(one), read_parquet(other)
    np.testing.assert_allclose(rows.pop("embedding"), others.pop("embedding"), atol=1e-5)
    assert rows == others


def agree(found: dict[str, list], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found["id"]) == sorted(wanted)
    for name, vector in zip(found["id"], found["embedding"], strict=True):
        np.testing.assert_allclose(vector, wanted[name], atol=1e-5)


# ------------------------------------------------------------------ what is written


def test_images_are_embedded_at_the_size_asked_for(images, encoder_file, tmp_path):
    """Each in one scan: what the encoder gives at that size."""
    run(encoder_file, images, tmp_path / "out", "--img-size", "40")
    large = save_encoder(load_encoder(encoder_file, img_size=40), tmp_path / "large")
    assert create_transform(load_encoder(large))(Image.new("L", (16, 16))).shape == (1, 40, 40)
    agree(read_parquet(tmp_path / "out"), expected(large, readable(open_data(str(images)))))


@pytest.mark.parametrize("workers", ["0", "2"], ids="workers{}".format)
def test_a_folder_becomes_parquet_with_ids_and_labels(images, encoder_file, tmp_path, workers):
    record = run(encoder_file, images, tmp_path / "out", "--workers", workers)
    found, data = read_parquet(tmp_path / "out"), open_data(images)
    agree(found, expected(encoder_file, readable(data)))
    assert found["id"] == [name for name in data.ids if name not in ("a/04.png", "b/09.png")]
    assert found["label"] == [int(name.startswith("b")) for name in found["id"]]
    assert set(found["group"]) == {None}
    assert (record["rows"], record["files"], record["finished"]) == (21, 6, True)
    assert [name.partition(":")[0] for name in record["skipped"]] == ["a/04.png", "b/09.png"]
    assert {"commit", "versions", "hardware", "encoder", "made_of"} <= set(record)


def test_a_folder_becomes_npy(images, encoder_file, tmp_path):
    record = run(encoder_file, images, tmp_path, "--format", "npy")
    x = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("shards/*.npy"))])
    beside = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("shards/*.json"))]
    ids = [name for part in beside for name in part["ids"]]
    assert x.dtype == np.float32
    agree({"id": ids, "embedding": list(x)}, expected(encoder_file, readable(open_data(images))))
    assert len(record["skipped"]) == 2


def test_a_probes_readout_can_be_asked_for(images, encoder_file, tmp_path):
    run(encoder_file, images, tmp_path, "--readout", "layers")
    wanted = expected(encoder_file, readable(open_data(images)), "layers")
    agree(read_parquet(tmp_path), wanted)


@pytest.mark.parametrize("workers", ["0", "2"], ids="workers{}".format)
def test_a_stream_of_tars(tars, encoder_file, tmp_path, workers):
    record = run(encoder_file, tars, tmp_path, "--workers", workers)
    stream = open_data(tars, streams=True)
    records = [r for number in range(3) for r in stream.records(number)]
    whole = [stream.decode(r) for r in records if r["id"] != "0.tar/02"]
    found = read_parquet(tmp_path)
    agree(found, expected(encoder_file, whole))
    labels = dict(zip(found["id"], found["label"], strict=True))
    assert labels == {item["id"]: item.get("label") for item in whole}
    assert None in labels.values()
    assert [name.partition(":")[0] for name in record["skipped"]] == ["0.tar/02"]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "00000-000.parquet", "00000-001.parquet", "00000-002.parquet", "00001-000.parquet",
        "00002-000.parquet", "00002-001.parquet",
    ]  # fmt: skip


def test_a_stream_of_parquet_gives_what_the_table_gives(encoder_file, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    for part in range(2):
        columns = {"image": [{"bytes": image(5 * part + i)} for i in range(5)],
                   "label": [i % 2 for i in range(5)]}  # fmt: skip
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / "table" / f"train-{part}.parquet")
    spec = f"hf:{tmp_path / 'table'}"
    run(encoder_file, spec, tmp_path / "table-out")
    run(encoder_file, f"{spec}?streaming=true", tmp_path / "stream-out")
    table, stream = (read_parquet(tmp_path / f"{name}-out") for name in ("table", "stream"))
    assert table["id"] == stream["id"]
    assert table["label"] == stream["label"]
    np.testing.assert_allclose(table["embedding"], stream["embedding"], atol=1e-5)


def test_several_labels_become_a_list(images, encoder_file, tmp_path, monkeypatch):
    names = [str(path) for path in sorted(images.glob("a/1*.png"))]
    labels = [np.array([1, 0, i % 2]) for i in range(len(names) - 1)] + [[-1, -1, -1]]
    data = ImageData(names, names, name="several", labels=labels)
    monkeypatch.setattr(embed, "open_data", lambda *_, **__: data)
    run(encoder_file, "several", tmp_path)
    assert read_parquet(tmp_path)["label"] == [[1, 0, i % 2] for i in range(len(names) - 1)] + [
        None
    ]


def test_a_file_whose_images_are_all_broken_is_there_and_empty(encoder_file, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        path = tmp_path / "pictures" / f"{i}.png"
        path.write_bytes(image(i) if i > 3 else b"no image")
    record = run(encoder_file, tmp_path / "pictures", tmp_path / "out")
    assert (record["rows"], record["files"], len(record["skipped"])) == (2, 2, 4)
    assert read_parquet(tmp_path / "out")["id"] == ["4.png", "5.png"]
    assert read_embeddings(tmp_path / "out").x.shape == (2, 8)


# ------------------------------------------------------------------ going on


class Killed(Exception):
    pass


def killed_after(files: int, monkeypatch) -> None:
    """The run ends in the middle of a file, as by a kill, once so many are written."""
    write, done = embed.write_shard, []

    def dying(folder, part, **more):
        if len(done) == files:
            (folder / f".{part.name}.parquet.part").write_bytes(b"half a file")
            raise Killed
        done.append(part.name)
        write(folder, part, **more)

    monkeypatch.setattr(embed, "write_shard", dying)


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_a_killed_run_goes_on_and_leaves_what_one_run_leaves(
    kind, images, tars, encoder_file, tmp_path, monkeypatch, capsys
):
    spec = images if kind == "folder" else tars
    whole = run(encoder_file, spec, tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            run(encoder_file, spec, tmp_path / "killed")
    assert not json.loads((tmp_path / "killed" / "record.json").read_text())["finished"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("shards/*.parquet")}
    assert len(before) == 2
    capsys.readouterr()
    record = run(encoder_file, spec, tmp_path / "killed")
    assert "2 already done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    same_content(tmp_path / "killed", tmp_path / "whole")
    assert [record[key] for key in ("rows", "skipped")] == [
        whole[key] for key in ("rows", "skipped")
    ]


def test_a_finished_run_is_left_as_it_is(images, encoder_file, tmp_path, capsys):
    first = run(encoder_file, images, tmp_path)
    before = contents(tmp_path)
    again = run(encoder_file, images, tmp_path)
    assert "6 already done" in capsys.readouterr().out
    assert contents(tmp_path) == before
    assert again == first


def test_a_kill_before_the_record_is_no_end(images, encoder_file, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / ".record.json.part").write_text("{")
    assert run(encoder_file, images, tmp_path)["rows"] == 21
    (tmp_path / "record.json").unlink()
    with pytest.raises(FileExistsError, match="choose another --output"):
        run(encoder_file, images, tmp_path)


@pytest.mark.parametrize("change", ["encoder", "data", "readout", "shard_rows"])
def test_other_embeddings_are_not_mixed_in(change, images, encoder_file, tmp_path):
    run(encoder_file, images, tmp_path / "out")
    argv, spec = [], str(images)
    if change == "encoder":
        torch.manual_seed(1)
        encoder_file = save_encoder(VimEncoder(**SMALL), tmp_path / "other")
    elif change == "data":
        spec += "?limit=10"
    elif change == "readout":
        argv = ["--readout", "avg"]
    else:
        argv = ["--shard-rows", "5"]
    with pytest.raises(
        ValueError, match=r"contains embeddings with different .*choose another --output"
    ):
        run(encoder_file, spec, tmp_path / "out", *argv)


@pytest.mark.parametrize("kind", ["finished", "unfinished", "shards"])
def test_an_image_replaced_by_one_of_the_same_size_is_noticed(kind, encoder_file, tmp_path):
    """Its old vector must not be kept as if it were that of the new image."""
    spec = str(tmp_path / "in")
    if kind == "shards":
        spec = f"wds:{tmp_path}/in/*.tar"
    path = tmp_path / "in" / ("a.tar" if kind == "shards" else "a.bmp")
    path.parent.mkdir()

    def write(value: int) -> None:
        buffer = io.BytesIO()
        Image.new("L", (16, 16), value).save(buffer, "BMP")
        if kind != "shards":
            path.write_bytes(buffer.getvalue())
        else:
            with tarfile.open(path, "w") as tar:
                member = tarfile.TarInfo("a.bmp")
                member.size = len(buffer.getvalue())
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
        os.utime(path, ns=(0, 10**18 + value))

    write(10)
    record = tmp_path / "out/record.json"
    run(encoder_file, spec, tmp_path / "out")
    run(encoder_file, spec, tmp_path / "out")
    content = json.loads(record.read_text())
    if kind == "unfinished":
        record.write_text(json.dumps(content | {"finished": False}))
    write(200)
    with pytest.raises(ValueError, match="contains embeddings of other image files"):
        run(encoder_file, spec, tmp_path / "out")
    del content["made_of"]["image_files"]  # as of an earlier version
    record.write_text(json.dumps(content))
    run(encoder_file, spec, tmp_path / "out")


def test_an_embedding_that_is_not_finite_is_skipped_and_named(encoder_file, images, tmp_path):
    rows = embed.read_rows(open_data(images), embed.plan_shards(open_data(images), 4), lambda _: 
                           torch.zeros(1, 2, 2), batch_size=3)  # fmt: skip

    def encode(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        x = torch.ones(len(x), 2)
        x[0, 1] = float("nan") if len(seen) == 1 else float("inf") if len(seen) == 2 else 1
        return x

    seen: list[int] = []
    shards = list(embed.embed(encode, rows, 2, "cpu", None))
    assert sum(len(shard.x) for shard in shards) == sum(len(shard.ids) for shard in shards) == 19
    assert all(shard.x.isfinite().all() for shard in shards)
    assert [text for shard in shards for text in shard.skipped if "not finite" in text] == [
        f"{name}: its embedding is not finite (NaN, infinity)" for name in ("a/00.png", "a/06.png")
    ]
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards", replace(shards[0], x=shards[0].x * float("nan")),
                format="npy")  # fmt: skip
    (tmp_path / "record.json").write_text('{"finished": true}')
    with pytest.raises(ValueError, match=r"the embeddings in .* not finite"):
        read_embeddings(tmp_path)


def test_the_rows_of_a_file_are_copied_once(images, monkeypatch):
    """However many batches it has: not again for every batch."""
    data, copied = open_data(images), []
    whole = torch.cat
    rows = embed.read_rows(data, embed.plan_shards(data, 100), lambda _: torch.zeros(1, 2, 2),
                           batch_size=1)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", lambda parts, *args: copied.append(parts) or whole(parts))
        (shard,) = embed.embed(lambda x: torch.ones(len(x), 2), rows, 2, "cpu", None)
    assert (len(shard.x), len(copied)) == (21, 1)


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_names_that_are_not_utf_8_are_written_and_read(tmp_path, format):
    names = [os.fsdecode(b"caf\xe9.png"), 'a,"b"\nc.png', "=1+1.png"]
    shard = Embedded("0", torch.ones(3, 2), names, [0, 1, None], [names[0], None, "p"], names[:1])
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards", shard, format=format)
    (tmp_path / "record.json").write_text('{"finished": true}')
    found = read_embeddings(tmp_path)
    assert found.ids == ["caf\\udce9.png", *names[1:]]
    assert [original(name) for name in found.ids] == names
    assert (found.labels, found.groups) == ([0, 1, None], ["caf\\udce9.png", None, "p"])


def test_a_folder_of_something_else_is_not_written_into(images, encoder_file, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear Sir")
    with pytest.raises(FileExistsError, match="choose another --output"):
        run(encoder_file, images, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_second_process_is_kept_out(images, encoder_file, tmp_path):
    from filelock import FileLock

    run(encoder_file, images, tmp_path)
    with FileLock(tmp_path / ".lock"), pytest.raises(BlockingIOError, match="another process"):
        run(encoder_file, images, tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shard-rows", "0"], "1 or more"),
        (["--format", "csv"], "not a valid choice"),
        (["--data", "nowhere"], "The folder 'nowhere' does not exist"),
    ],
)
def test_a_mistake_is_told_in_one_line(argv, message, encoder_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    try:
        code = cli.main(["embed", "--encoder", str(encoder_file), *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


# ------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_killed_and_started_again_leave_what_one_leaves(encoder_file, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(300):
        (tmp_path / "pictures" / f"{i:03}.png").write_bytes(image(i) if i != 7 else b"no")
    argv = ["--encoder", str(encoder_file), "--data", str(tmp_path / "pictures"),
            "--shard-rows", "3", "--batch-size", "1"]  # fmt: skip
    assert embed.main([*argv, "--output", str(tmp_path / "one")]) == 0
    both = [*argv, "--output", str(tmp_path / "two")]
    processes = start(2, embed.__file__, *both)
    while len(list((tmp_path / "two").glob("shards/*.parquet"))) < 4:
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    assert len(list((tmp_path / "two").glob("shards/*.parquet"))) < 100
    processes = start(2, embed.__file__, *both)
    assert finish(processes).count("Written: 299 embeddings") == 1
    same_content(tmp_path / "two", tmp_path / "one")
