"""The walk of folders in every source: what it reads, what it passes over, and that it says so."""

import errno
import glob
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import open_data
from vim_ssl.data.check import check
from vim_ssl.data.dataset import join
from vim_ssl.data.inputs import open_new
from vim_ssl.data.open import warn_once
from vim_ssl.data.walk import match_paths

HIDDEN = [
    ".x.png", "._a.png", ".Trash/a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png",
    "@eaDir/a.png", "$RECYCLE.BIN/a.png", "System Volume Information/a.png", "lost+found/a.png",
    "#recycle/a.png", "deep/@eaDir/a.png/SYNOPHOTO.png",
]  # fmt: skip
OUTPUTS = {
    "run/config.json": {"recipe": "mim_pretrain", "seed": 0, "output": "", "epochs": 1},
    "knn/metrics.json": {"results": {}, "versions": "vim_ssl 0.1, torch 2.0"},
    "predictions/record.json": {"command": "predict", "versions": "vim_ssl 0.1", "made_of": {}},
}


def write(root: Path, *names: str) -> Path:
    """Images of noise, each another one."""
    for number, name in enumerate(names):
        values = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(root / name)
    return root


def plain(root: Path) -> tuple[str, Path]:
    return str(write(root, "cat/1.png", "dog/2.png")), root


def pairs(root: Path) -> tuple[str, Path]:
    write(root, "one/1.png", "two/2.png")
    for name in ("one/1.txt", "two/2.txt", "a.txt"):
        (root / name).write_text("caption")
    return f"pairs:{root}", root


def masks(root: Path) -> tuple[str, Path]:
    for name in ("1", "2"):
        write(root, f"images/{name}.png")
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(root / f"masks/{name}.png")
    return f"masks:{root}", root / "images"


def imagenet(root: Path) -> tuple[str, Path]:
    write(root, "train/n01440764/1.png", "train/n01443537/2.png")
    return f"imagenet:{root}", root / "train/n01440764"


def eurosat(root: Path) -> tuple[str, Path]:
    from vim_ssl.data.sources.eurosat import EUROSAT_CLASSES

    write(root, *(f"{name}/1.png" for name in EUROSAT_CLASSES[:2]))
    for name in EUROSAT_CLASSES[2:]:
        (root / name).symlink_to(root / EUROSAT_CLASSES[1])
    return f"eurosat:{root}", root / EUROSAT_CLASSES[0]


def video(root: Path) -> tuple[str, Path]:
    write(root, "one/1.png", "one/2.png", "two/1.png")
    return f"video:{root}", root


def slide(root: Path) -> tuple[str, Path]:
    write(root, "one/1.png", "two/1.png")
    return f"slide:{root}?tile=4&shrink=1&tissue=none", root


def shards(root: Path) -> tuple[str, Path]:
    root.mkdir(exist_ok=True)
    for name in ("1.tar", "._1.tar"):
        with tarfile.open(root / name, "w") as file:
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8)).save(buffer, "PNG")
            member = tarfile.TarInfo("a.png")
            member.size = buffer.tell()
            buffer.seek(0)
            file.addfile(member, buffer)
    return f"wds:{root}", root


def coco(root: Path) -> tuple[str, Path]:
    write(root, "val/1.png")
    (root / "annotations").mkdir()
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 8, "height": 8}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
    }
    (root / "annotations/val.json").write_text(json.dumps(content))
    (root / "annotations/._val.json").write_bytes(b"\0\5\x16\7")
    return f"coco:{root}", root


WALKED = [plain, pairs, masks, imagenet, eurosat, video]
SOURCES = [*WALKED, slide, shards, coco]


def names_of(spec: str) -> list[str]:
    data = open_data(spec, streams=True)
    return [shard.name for shard in data.shards] if data.is_stream else data.ids


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_hidden_and_system_files_are_passed_over_in_every_source(tmp_path, source):
    if source is slide:
        pytest.importorskip("tiffslide")
    spec, folder = source(tmp_path / "data")
    before = names_of(spec)
    assert not any("/." in f"/{name}" for name in before)
    write(folder, *HIDDEN)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (folder / name).write_bytes(b"content")
    assert names_of(spec) == before
    counts = open_data(spec, streams=True).passed_over
    assert counts["hidden"] >= (11 if source in WALKED else 1)


@pytest.mark.parametrize("name", HIDDEN)
def test_each_hidden_or_system_name_is_passed_over(tmp_path, name):
    write(tmp_path, "seen.png", name)
    assert open_data(tmp_path).ids == ["seen.png"]


@pytest.mark.parametrize("name", ["Recycled", "recycler", "Trash", "backup", "Temporary Items"])
def test_words_that_may_be_classes_are_no_system_folders(tmp_path, name):
    write(tmp_path, f"{name}/a.png", "glass/a.png")
    data = open_data(tmp_path)
    assert sorted(data.classes) == sorted([name, "glass"])
    assert data.passed_over == {}


@pytest.mark.parametrize("source", WALKED, ids=lambda source: source.__name__)
def test_own_outputs_below_the_data_are_passed_over_in_every_source(tmp_path, source):
    spec, folder = source(tmp_path / "data")
    first = open_data(spec)
    for name, record in OUTPUTS.items():
        write(folder, str(Path(name).parent / "images/reconstructions-5.png"))
        (folder / name).write_text(json.dumps(record))
    data = open_data(spec)
    assert (data.ids, data.labels, data.fingerprint) == (
        first.ids, first.labels, first.fingerprint
    )  # fmt: skip
    assert data.passed_over["written by vim-ssl"] == 3


def test_own_outputs_are_read_where_they_are_the_data(tmp_path):
    write(tmp_path, "run/images/1.png")
    (tmp_path / "run/config.json").write_text(json.dumps(OUTPUTS["run/config.json"]))
    assert open_data(tmp_path / "run").ids == ["images/1.png"]
    assert match_paths(f"{tmp_path}/run/images/*.png") == [f"{tmp_path}/run/images/1.png"]
    assert match_paths(f"{tmp_path}/**/*.png") == match_paths(f"{tmp_path}/*/images/*.png") == []


@pytest.mark.parametrize("content", ['{"recipe": "soup"}', "[1]", "{", '{"versions": 3}', ""])
def test_folders_of_other_programs_are_read(tmp_path, content):
    write(tmp_path, "cat/1.png", "dog/2.png")
    for name in ("config.json", "metrics.json", "record.json"):
        (tmp_path / "cat" / name).write_text(content)
    assert open_data(tmp_path).labels == [0, 1]


# ------------------------------------------------------------------------- links


def test_two_class_folders_that_link_to_one_folder_are_both_read(tmp_path):
    write(tmp_path / "far", "1.png", "2.png")
    write(tmp_path / "set", "other/3.png")
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "far")
    (tmp_path / "set/other/4.png").symlink_to(tmp_path / "far/1.png")
    data = open_data(tmp_path / "set")
    assert data.ids == [
        "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "other/3.png", "other/4.png"
    ]  # fmt: skip
    assert data.classes == ["cat", "dog", "other"]
    assert data.passed_over == {}
    (warning,) = data.passed_over.warnings
    assert warning.startswith("1 folders are read more than once, through links: dog/ is cat/;")


def test_circles_of_links_are_passed_over_and_reported(tmp_path):
    write(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "cat/up").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    data = open_data(tmp_path)
    assert data.labels == [0, 1]
    assert data.passed_over == {"in a circle of links": 2}
    assert any("cat/up/" in line for line in check(str(tmp_path)).remarks)


# ------------------------------------------------------------------------- unreadable


def test_a_folder_that_cannot_be_read_is_reported(tmp_path, monkeypatch):
    write(tmp_path, "cat/1.png", "dog/2.png", "dog/locked/3.png")
    scandir = os.scandir

    def refuse(path):
        if "locked" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert open_data(tmp_path).passed_over == {"unreadable": 1}
    assert any("dog/locked/" in line for line in check(str(tmp_path)).problems)
    with pytest.raises(PermissionError):
        open_data(tmp_path / "dog/locked")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_passed_over(tmp_path):
    os.mkfifo(write(tmp_path, "1.png") / "2.png")
    data = open_data(tmp_path)
    assert (data.ids, data.passed_over) == (["1.png"], {"not a regular file": 1})


def test_names_that_are_not_utf_8_are_read_and_reported(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        write(tmp_path, "1.png").joinpath("1.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("this system has only names in UTF-8")
    assert open_data(tmp_path)[0]["image"].size == (8, 8)
    (line,) = (line for line in check(str(tmp_path)).remarks if "UTF-8" in line)
    assert r"caf\udce9.png" in line
    line.encode()


# ------------------------------------------------------------------------- globs


@pytest.mark.parametrize("name", ["g [2020]", "a*b", "what?", "[a]", "{1,2}", "a + b", "x=1&y#z"])
def test_names_with_the_signs_of_patterns_exist_as_they_are_written(tmp_path, name):
    write(tmp_path, f"sets/{name}/1.png", f"sets/{name}/deep/2.png", "sets/other/3.png")
    where = f"{tmp_path}/sets/{name}"
    assert match_paths(f"{where}/*.png") == [f"{where}/1.png"]
    assert match_paths(f"{where}/**/*.png") == [f"{where}/1.png", f"{where}/deep/2.png"]
    assert match_paths(f"{tmp_path}/*/{name}/?.png") == [f"{where}/1.png"]
    assert match_paths(f"{where}/1.png") == [f"{where}/1.png"]


def test_a_file_named_like_the_pattern_hides_no_other(tmp_path):
    write(tmp_path, "1.png", "2.png", "*.png")
    assert len(match_paths(f"{tmp_path}/*.png")) == 3


def test_patterns_match_as_those_of_the_standard_library(tmp_path, monkeypatch):
    write(
        tmp_path, "a/1.png", "a/b/2.png", "a/b/.3.png", "c/4.png", "c/.d/5.png", "6.png"
    )  # fmt: skip
    (tmp_path / "7.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    for pattern in ("*", "**", "*/*.png", "**/*.png", "a/**", "**/[12].png", "a/.*", "x/*",
                    "./*.png", "**/b/*", "c/.d/*.png"):  # fmt: skip
        there = glob.glob(pattern, recursive=True)
        assert match_paths(pattern) == sorted(
            {os.path.normpath(p) for p in there if os.path.isfile(p)}
        )


@pytest.mark.parametrize("scheme", ["geotiff", "wds"])
def test_a_folder_with_brackets_is_found_by_every_scheme_that_takes_a_glob(tmp_path, scheme):
    if scheme == "geotiff":
        rasterio = pytest.importorskip("rasterio")
        (tmp_path / "g [2020]").mkdir()
        place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
        with rasterio.open(
            tmp_path / "g [2020]/1.tif", "w", driver="GTiff", width=8, height=8, count=1,
            dtype="uint8", **place,
        ) as file:  # fmt: skip
            file.write(np.eye(8, dtype=np.uint8)[None])
    else:
        shards(tmp_path / "g [2020]")
    ending = {"geotiff": "tif", "wds": "tar"}[scheme]
    for location in ("g [2020]", f"g [2020]/*.{ending}", f"*/1.{ending}", f"**/*.{ending}"):
        assert len(open_data(f"{scheme}:{tmp_path}/{location}", streams=True)) == 1


# ------------------------------------------------------------------------- other formats


@pytest.mark.parametrize(
    "ending", ["HEIC", "heif", "jxl", "CR2", "dng", "psd", "svg", "pdf", "MTS", "3gp", "zip", "tgz"]
)
def test_other_formats_are_counted_at_opening_and_by_the_check(tmp_path, ending, caplog):
    write(tmp_path, "cat/1.jpg", "dog/2.jpg")
    for number in range(3):
        (tmp_path / f"cat/IMG_{number}.{ending}").write_bytes(b"content")
    (tmp_path / "notes.txt").write_text("text")
    warn_once.cache_clear()
    data = open_data(tmp_path)
    assert data.passed_over == {ending.upper(): 3}
    assert f"passed over: 3 {ending.upper()}" in caplog.text
    (line,) = check(str(tmp_path)).remarks
    assert f"3 {ending.upper()}: cat/IMG_0.{ending}, cat/IMG_1.{ending}" in line
    assert "to use them, " in line


def test_images_of_another_name_are_recognised_by_their_content(tmp_path):
    write(tmp_path, "1.jpg", "2.jpg", "3.webp", "4.png")
    (tmp_path / "2.jpg").rename(tmp_path / "2.jpg_large")
    (tmp_path / "3.webp").rename(tmp_path / "photo")
    (tmp_path / "README").write_text("text")
    (tmp_path / "a.npz_backup").write_bytes(b"")
    assert open_data(tmp_path).passed_over == {"JPG_LARGE": 1, "without extension": 2}


def test_other_formats_beside_videos_are_counted(tmp_path):
    write(tmp_path, "one/1.png")
    for name in ("clip.xyz", "a.zip", "one/b.heic"):
        (tmp_path / name).write_bytes(b"content")
    assert open_data(f"video:{tmp_path}").passed_over == {"ZIP": 1, "HEIC": 1}


def test_what_is_passed_over_travels_with_the_data(tmp_path):
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "train/cat/.4.png")
    (tmp_path / "test/cat/5.heic").write_bytes(b"content")
    expected = {"hidden": 1, "HEIC": 1}
    data = open_data(tmp_path)
    for one in (data, data.subset([0]), open_data(f"{tmp_path}?limit=1"),
                pickle.loads(pickle.dumps(data)), join([data, data])):  # fmt: skip
        assert one.passed_over == expected
        assert one.passed_over.examples["HEIC"] == ["test/cat/5.heic"]
    assert open_data(f"{tmp_path} + 2 * {tmp_path}/train").passed_over == {"hidden": 2, "HEIC": 1}


# ------------------------------------------------------------------------- further pages


def frames(count: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(count)]


@pytest.mark.parametrize("ending", ["tif", "gif", "png", "webp", "mpo"])
@pytest.mark.parametrize("shard", [False, True], ids=["folder", "shard"])
def test_further_pages_and_frames_are_counted(tmp_path, ending, shard):
    first, *others = frames(3)
    name = "3.jpg" if ending == "mpo" else f"3.{ending}"
    first.save(tmp_path / name, ending.upper().replace("TIF", "TIFF"), save_all=True,
               append_images=others)  # fmt: skip
    write(tmp_path, "1.jpg", "2.tif")
    spec = str(tmp_path)
    if shard:
        with tarfile.open(tmp_path / "a.tar", "w") as file:
            for number, path in enumerate(("1.jpg", "2.tif", name)):
                file.add(tmp_path / path, f"{number}{Path(path).suffix}")
        spec = f"wds:{tmp_path}/a.tar"
    else:
        assert open_data(spec).passed_over == {"further pages or frames": 2}
    (line,) = (line for line in check(spec).remarks if "pages" in line)
    assert "2 further pages or frames, of 1 files: " in line
    assert "(3)" in line


def test_smaller_versions_of_a_page_are_no_pages(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "1.tif") as file:
        file.write(np.zeros((64, 64), np.uint8))
        file.write(np.zeros((32, 32), np.uint8), subfiletype=1)
    assert open_data(tmp_path).passed_over == {}


def test_the_pages_of_a_few_of_many_files_are_counted(tmp_path):
    first, *others = frames(2)
    first.save(tmp_path / "0.tif", save_all=True, append_images=others)
    for number in range(1, 70):
        (tmp_path / f"{number}.tif").symlink_to(tmp_path / "0.tif")
    assert open_data(tmp_path).passed_over == {
        "further pages or frames (in 64 files looked at)": 64
    }


def test_the_pages_of_a_single_file_are_counted(tmp_path):
    first, *others = frames(3)
    first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    assert open_new(tmp_path / "a.tif").passed_over == {"further pages or frames": 2}
