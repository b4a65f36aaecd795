"""Features of a data set: kept on disk and found again, never taken for others', shared out."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder, load_encoder, save_encoder
from vim_ssl.data import open_data
from vim_ssl.evaluation.features import encode_data, local_indices, weights_hash
from vim_ssl.utils.distributed import Processes


def make_encoder(seed: int = 0, **args) -> VimEncoder:
    torch.manual_seed(seed)
    small = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 8, "depth": 1,
             "num_classes": 0}  # fmt: skip
    return VimEncoder(**(small | args)).eval()


@pytest.fixture
def images(tmp_path) -> Path:
    """Seven images of two classes and one that is broken."""
    draw = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
    path.write_bytes(b"no image")
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VIM_SSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def repaint(path: Path, content: bytes, later: int):
    """Other content in a file, changed so many nanoseconds after it was before."""
    assert len(content) == path.stat().st_size
    time = path.stat().st_mtime_ns + later
    path.write_bytes(content)
    os.utime(path, ns=(time, time))


def test_features_are_kept_and_found_again(images, cache, capsys):
    data, encoder = open_data(images), make_encoder()
    first = encode_data(encoder, data)
    (file,) = cache.rglob("*.safetensors")
    for path in images.rglob("*.png"):  # no image is read again
        repaint(path, bytes(path.stat().st_size), later=0)
    again = encode_data(encoder, open_data(images))
    assert not capsys.readouterr().out  # the commands print one line for all of them
    assert file.exists()
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert (first.ids, first.skipped) == (again.ids, again.skipped)
    assert len(first.ids) == 7
    assert [name.partition(":")[0] for name in first.skipped] == ["b/7.png"]


@pytest.mark.parametrize("source", ["folder", "csv", "hf"])
def test_an_image_painted_over_in_a_file_of_the_same_size_is_another(tmp_path, cache, source):
    root, spec = tmp_path / "bitmaps", str(tmp_path / "bitmaps")
    root.mkdir()
    draw = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(draw.integers(0, 255, (16, 16), dtype=np.uint8)).save(root / f"{name}.bmp")
    if source == "csv":
        (root / "t.csv").write_text("path\na.bmp\nb.bmp\nc.bmp")
        spec = f"csv:{root / 't.csv'}"
    elif source == "hf":
        datasets = pytest.importorskip("datasets")
        names = [str(root / f"{name}.bmp") for name in "abc"]
        datasets.Dataset.from_dict({"file": names}).save_to_disk(tmp_path / "table")
        spec = f"hf:{tmp_path / 'table'}?image=file"
    first = encode_data(make_encoder(), open_data(spec))
    again = encode_data(make_encoder(), open_data(spec))
    assert torch.equal(first.x, again.x)
    assert len(list(cache.rglob("*.safetensors"))) == 1
    repaint(root / "b.bmp", (root / "c.bmp").read_bytes(), later=1_000_000)
    changed = encode_data(make_encoder(), open_data(spec))
    assert torch.equal(changed.x[1], first.x[2])
    assert not torch.equal(changed.x[1], first.x[1])


@pytest.mark.parametrize("change", ["weights", "setting", "pictures", "labels", "transform"])
def test_other_features_are_never_taken_for_these(images, cache, change):
    encoder, other, spec = make_encoder(), make_encoder(), str(images)
    encode_data(encoder, open_data(spec))
    if change == "weights":
        other = make_encoder(seed=1)
    elif change == "setting":
        other = make_encoder(divide_out=False)
    elif change == "pictures":
        spec += "?limit=4"
    elif change == "labels":
        spec += "?label=none"
    else:
        other.data_config["mean"] = (0.1,)
    encode_data(other, open_data(spec))
    assert len(list(cache.rglob("*.safetensors"))) == 2


def test_another_column_of_the_same_table_is_another_set(cache, tmp_path):
    datasets = pytest.importorskip("datasets")
    draw = np.random.default_rng(0)
    columns = {
        name: [Image.fromarray(draw.integers(0, 255, (16, 16), dtype=np.uint8)) for _ in range(4)]
        for name in ("first", "second")
    }
    features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "table")
    found = [
        encode_data(make_encoder(), open_data(f"hf:{tmp_path / 'table'}?image={name}"))
        for name in columns
    ]
    assert not torch.equal(found[0].x, found[1].x)


def test_the_cache_goes_by_the_weights_not_by_their_file(images, cache, tmp_path):
    encoder = make_encoder()
    encode_data(encoder, open_data(images))
    for name in ("first", "second"):
        save_encoder(encoder, tmp_path / name)
        encode_data(load_encoder(tmp_path / name), open_data(images))
    assert len(list(cache.rglob("*.safetensors"))) == 1
    assert weights_hash(encoder) == weights_hash(load_encoder(tmp_path / "first"))


def test_a_setting_that_was_added_later_keeps_recorded_hashes():
    """A run compares its teacher's hash with the recorded one when it resumes."""
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "d_state": 2}
    encoder = VimEncoder(**size, num_classes=0)
    with torch.no_grad():
        for p in encoder.parameters():
            p.zero_()
    assert weights_hash(encoder) == "125cc75427ad3ce2"
    summed = {p: VimEncoder(**size, num_classes=0, shared_conv=p) for p in (True, False)}
    hashes = {p: weights_hash(one) for p, one in summed.items()}
    assert hashes[True] != hashes[False]


def test_without_the_cache_nothing_is_written_or_read(images, cache, capsys):
    data, encoder = open_data(images), make_encoder()
    encode_data(encoder, data, cache=False)
    assert not cache.exists()
    kept = encode_data(encoder, data)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(b"broken")
    assert torch.equal(encode_data(encoder, data, cache=False).x, kept.x)
    damaged = r"cannot be read as cached features .* delete it, or use --no-cache"
    with pytest.raises(ValueError, match=damaged):
        encode_data(encoder, data)


def test_a_cache_that_cannot_be_written_costs_nothing_but_itself(images, cache, capsys):
    cache.write_text("a file where the folder should be")
    assert len(encode_data(make_encoder(), open_data(images)).ids) == 7
    assert "cannot be cached" in capsys.readouterr().out


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 8, 20])
def test_whole_batches_are_shared_out(world, size):
    parts = [local_indices(size, 4, Processes(rank, world)) for rank in range(world)]
    assert sorted(i for part in parts for i in part) == list(range(size))
    for part in parts:
        batches = [part[i : i + 4] for i in range(0, len(part), 4)]
        assert all(batch[0] % 4 == 0 for batch in batches)
        assert all(len(batch) == 4 or batch[-1] == size - 1 for batch in batches)


class FreeProcesses(Processes):
    """Places without a connection."""

    def broadcast(self, value):
        return value


@pytest.mark.parametrize("world", [2, 5])
def test_several_processes_put_together_what_one_computes(images, world, monkeypatch):
    data, encoder = open_data(images), make_encoder()
    alone = encode_data(encoder, data, batch_size=2, cache=False)
    sent = []
    monkeypatch.setattr(Processes, "gather", lambda self, part: sent.append(part) or [])
    for rank in range(1, world):
        found = encode_data(encoder, data, batch_size=2, cache=False,
                            processes=FreeProcesses(rank, world))  # fmt: skip
        assert found is None
    monkeypatch.setattr(Processes, "gather", lambda self, part: [part, *sent])
    together = encode_data(
        encoder, data, batch_size=2, cache=False, processes=FreeProcesses(0, world)
    )
    assert torch.equal(together.x, alone.x)
    assert torch.equal(together.y, alone.y)
    assert (together.ids, sorted(together.skipped)) == (alone.ids, sorted(alone.skipped))
