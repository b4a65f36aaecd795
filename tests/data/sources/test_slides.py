"""Slides as tiles with tissue: places, colours, levels, classes, and what is wrong with files."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import open_data
from vim_ssl.data.sources import slides
from vim_ssl.data.sources.slides import tile_origin, tissue

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("tiffslide")
TILE, ROWS, COLUMNS = 64, 4, 6
PINK = {(0, 1): 255, (2, 3): 200, (3, 5): 150}  # (row, column) -> red of a tile with tissue


def slide(seed: int = 0) -> np.ndarray:
    """Light grey with three pink tiles, and a border that fills no tile."""
    values = np.full((ROWS * TILE + 20, COLUMNS * TILE + 30, 3), 240, np.uint8)
    values[-10:, :40] = 0  # not scanned
    for (row, column), red in PINK.items():
        values[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = (red, 90, 120)
    return values


def write_tiff(path: Path, levels: int = 3, mpp: float = 0.5) -> Path:
    """A tiled pyramid, as scanners write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    resolution = (1e4 / mpp, 1e4 / mpp)
    with tifffile.TiffWriter(path) as file:
        values = slide()
        file.write(values, tile=(32, 32), photometric="rgb", subifds=levels - 1 or None,
                   resolution=resolution, resolutionunit="CENTIMETER")  # fmt: skip
        for _ in range(levels - 1):
            h, w = values.shape[0] // 2 * 2, values.shape[1] // 2 * 2
            values = values[:h:2, :w:2]
            file.write(values, tile=(32, 32), photometric="rgb", subfiletype=1)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same slide as a pyramid, as one level, and as a plain image, in two classes."""
    root = tmp_path_factory.mktemp("slides")
    write_tiff(root / "tumour" / "pyramid.tif")
    write_tiff(root / "normal" / "flat.tif", levels=1)
    Image.fromarray(slide()).save(root / "normal" / "plain.png")
    return root


@pytest.mark.parametrize("name", ["tumour/pyramid.tif", "normal/flat.tif", "normal/plain.png"])
def test_tiles_with_tissue_are_read_where_they_lie(folder, name):
    data = open_data(f"slide:{folder / name}?tile={TILE}")
    assert [tile_origin(id) for id in data.ids] == [
        (Path(name).name, column * TILE, row * TILE) for row, column in PINK
    ]
    for item, red in zip(pickle.loads(pickle.dumps(data)), PINK.values(), strict=True):
        values = np.asarray(item["image"])
        assert values.shape == (TILE, TILE, 3)
        assert (values == (red, 90, 120)).all()
    assert len(open_data(f"slide:{folder / name}?tile={TILE}&tissue=none")) == ROWS * COLUMNS
    shares = tissue(str(folder / name), TILE)
    assert shares.shape == (ROWS, COLUMNS)
    assert {(int(r), int(c)) for r, c in np.argwhere(shares > 0.5)} == set(PINK)


def test_a_magnification_chooses_the_level(folder):
    # At 1 µm a pixel a tile of 32 pixels is one of 64 at the slide's own 0.5.
    data = open_data(f"slide:{folder}/tumour/pyramid.tif?tile=32&mpp=1")
    assert [np.asarray(item["image"]).shape for item in data] == [(32, 32, 3)] * 3
    assert [item["image"].getpixel((9, 9))[0] for item in data] == list(PINK.values())
    assert [tile_origin(id)[1] for id in data.ids] == [column * TILE for _, column in PINK]


@pytest.mark.parametrize("name", ["tumour/pyramid.tif", "normal/flat.tif", "normal/plain.png"])
def test_a_slide_can_be_shrunk_into_one_tile(folder, name):
    """Of a file that does not say how large its pixels are too: what one long scan reads."""
    data = open_data(f"slide:{folder / name}?tile=32&shrink=8&tissue=none")
    assert [tile_origin(id)[1:] for id in data.ids] == [(0, 0)]
    values = np.asarray(data[0]["image"]).astype(int)
    whole = slide()[:256, :256].astype(int).reshape(32, 8, 32, 8, 3).mean((1, 3))
    assert values.shape == (32, 32, 3)
    assert np.abs(values - whole).mean() < 8  # a level of the pyramid was made without averaging
    assert values[4, 12, 0] == 255  # the tile with tissue at row 0, column 1
    assert len(open_data(f"slide:{folder / name}?tile=32&shrink=2")) == len(PINK)


@pytest.mark.parametrize("side", [128, 150])
def test_without_a_pyramid_wide_tiles_are_shrunk_piece_by_piece(folder, monkeypatch, side):
    """A tile that spans the slide is what it is when read at once, in little memory."""
    path = str(folder / "normal" / "flat.tif")
    spec = f"slide:{path}?tile=32&mpp={side / 64}&tissue=none"  # 0.5 are its own

    def found() -> tuple[list[np.ndarray], np.ndarray]:
        data = open_data(spec)
        assert {tile_origin(id)[1] % side for id in data.ids} == {0}
        return [np.asarray(item["image"]).astype(int) for item in data], tissue(path, side)

    tiles, shares = found()
    assert tiles[0].std() > 10
    sizes, read = [], slides.open_image(path).read

    def watched(*args):
        values = read(*args)
        sizes.append(values.shape[0] * values.shape[1])
        return values

    monkeypatch.setattr(slides, "PIECE", 4096)
    monkeypatch.setattr(slides.open_image(path), "read", watched)
    again, shares_again = found()
    for one, other in zip(tiles, again, strict=True):
        assert np.abs(one - other).max() <= 1
    np.testing.assert_allclose(shares_again, shares, rtol=1e-5)
    assert max(sizes) <= 4096 + side  # a row is read for both of its neighbours


def test_a_resolution_of_printing_is_no_magnification(tmp_path):
    path = write_tiff(tmp_path / "a.tif", mpp=25400 / 72)  # 72 dpi, as editors write
    with pytest.raises(ValueError, match=r"pixels of 352\.778 micro.*enlarged 706 times"):
        open_data(f"slide:{path}?tile=64&mpp=0.5")
    assert len(open_data(f"slide:{path}?tile=64")) == len(PINK)


def write_sizes(path: Path, x: float, y: float) -> Path:
    """A slide whose header declares these pixel sizes, in micrometres."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, slide(), tile=(32, 32), photometric="rgb",
                     resolution=(1e4 / x, 1e4 / y), resolutionunit="CENTIMETER")  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [(0.5, 1.0, "0.5 x 1 micrometres, which are not square"),
     (1e-4, 1e-4, r"declares pixels of 0\.0001 micro.*shrunk 5000 times")],
)  # fmt: skip
def test_pixel_sizes_that_cannot_be_meant_are_named(tmp_path, x, y, says):
    path = write_sizes(tmp_path / "a.tif", x, y)
    with pytest.raises(ValueError, match=says):
        open_data(f"slide:{path}?tile=64&mpp=0.5")
    assert len(open_data(f"slide:{path}?tile=64")) == len(PINK)


@pytest.mark.parametrize("value", [None, "0", "nan", "inf", "-0.25", "unknown", ""])
def test_a_pixel_size_that_is_none_counts_as_missing(tmp_path, value, monkeypatch):
    tiffslide = pytest.importorskip("tiffslide")
    path = write_sizes(tmp_path / "a.tif", 0.5, 0.5)
    real = tiffslide.TiffSlide.properties.func
    sizes = {f"tiffslide.mpp-{axis}": value for axis in "xy"}
    monkeypatch.setattr(
        tiffslide.TiffSlide, "properties", property(lambda self: {**real(self), **sizes})
    )
    assert len(open_data(f"slide:{path}?tile=64")) == len(PINK)
    with pytest.raises(ValueError, match="does not declare its pixel size"):
        open_data(f"slide:{path}?tile=64&mpp=0.5")


def test_slides_of_several_resolutions_are_told(tmp_path):
    write_sizes(tmp_path / "a.tif", 0.25, 0.25)
    write_sizes(tmp_path / "b.tif", 0.252, 0.252)
    assert open_data(f"slide:{tmp_path}?tile=64").faults == []
    write_sizes(tmp_path / "c.tif", 0.5, 0.5)
    (fault,) = open_data(f"slide:{tmp_path}?tile=64").faults
    assert "pixels of 0.25 (a.tif) to 0.5 micrometres (c.tif)" in fault
    assert open_data(f"slide:{tmp_path}?tile=64&mpp=0.5").faults == []


def test_thumbnails_and_labels_beside_a_slide_are_counted(tmp_path):
    write_tiff(tmp_path / "TCGA-A1.2b.uuid.tif")
    write_tiff(tmp_path / "macro.tif")
    pink = Image.new("RGB", (TILE, TILE), (255, 90, 120))
    others = ["TCGA-A1.2b.uuid_thumbnail.jpg", "TCGA-A1.2b.uuid-label.png", "macro.png",
              "TCGA-A1.2b.uuid_macro.tif", "TCGA-A1.2b.uuid.jpg"]  # fmt: skip
    for name in [*others, "other_label.png"]:  # of no slide here: an image of its own
        pink.save(tmp_path / name)
    data = open_data(f"slide:{tmp_path}?tile={TILE}")
    assert set(data.groups) == {"TCGA-A1.2b.uuid.tif", "macro.tif", "other_label.png"}
    (count,) = data.passed_over.values()
    assert count == len(others)


def test_slides_have_classes_and_stay_together(folder):
    data = open_data(f"slide:{folder}?tile={TILE}")
    assert data.classes == ["normal", "tumour"]
    assert data.labels == [0] * 6 + [1] * 3
    assert len(set(data.groups)) == 3
    assert data[8]["group"] == "tumour/pyramid.tif"
    table = folder.parent / f"{folder.name}.csv"
    lines = [f"{folder}/normal/plain.png,0,train", f"{folder}/tumour/pyramid.tif,1,test"]
    lines = [f"{line},patient {i}" for i, line in enumerate(lines)]
    table.write_text("\n".join(["path,label,split,who", *lines]))
    test = open_data(f"slide:{table}?split=test&tile={TILE}")
    assert (len(test), set(test.labels), test.splits) == (3, {1}, ["train", "test"])
    assert set(test.groups) == {f"{folder}/tumour/pyramid.tif"}
    grouped = open_data(f"slide:{table}?split=all&tile={TILE}&group=who")
    assert grouped.groups == ["patient 0"] * 3 + ["patient 1"] * 3


def test_what_cannot_be_read_is_named_and_passed_over(folder, tmp_path):
    write_tiff(tmp_path / "good.tif")
    (tmp_path / "bad.tif").write_bytes(b"II*\0 and then nothing")
    Image.new("RGB", (200, 200), (240, 240, 240)).save(tmp_path / "glass.png")
    data = open_data(f"slide:{tmp_path}?tile={TILE}")
    assert set(data.groups) == {"good.tif"}
    assert "bad.tif cannot be read" in data.faults[0]
    assert "glass.png has no tile of 64 pixels with tissue" in data.faults[1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"photometric": "miniswhite"}, "its colour space is MINISWHITE; expected MINISBLACK, RGB"),
        ({"photometric": "palette", "colormap": np.ones((3, 256), np.uint16)}, "is PALETTE"),
        ({"photometric": "minisblack"}, "segments of 114,264 pixels, the limit is 100,000; save"),
    ],
    ids=["inverted", "palette", "one piece"],
)
def test_what_would_be_read_wrong_is_named(tmp_path, monkeypatch, more, says):
    monkeypatch.setenv("VIM_SSL_MAX_PIXELS", "100000")
    grey = slide()[..., 0]
    tifffile.imwrite(tmp_path / "grey.tif", grey, tile=(32, 32), photometric="minisblack")
    assert np.asarray(open_data(f"slide:{tmp_path}?tile=64&tissue=none")[1]["image"]).min() == 255
    (tmp_path / "grey.tif").unlink()
    tifffile.imwrite(tmp_path / "a.tif", grey, **more)
    with pytest.raises(ValueError, match=says):
        open_data(f"slide:{tmp_path}?tile=64&tissue=none")


def test_a_lost_level_is_done_without(tmp_path):
    path = write_tiff(tmp_path / "a.tif")
    with tifffile.TiffFile(path) as file:
        pointer = file.pages[0].tags["SubIFDs"].valueoffset
    content = path.read_bytes()
    beyond = (len(content) + 1000).to_bytes(4, "little")
    path.write_bytes(content[:pointer] + beyond + content[pointer + 4 :])
    assert len(open_data(f"slide:{path}?tile={TILE}")) == len(PINK)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("slide:{0}?tissue=much", "must be a fraction"),
        ("slide:{0}/normal/plain.png?mpp=1", "does not declare its pixel size"),
        ("slide:{0}?tile=4096", r"none of .* slides has a tile"),
        ("slide:{0}?mpp=0", "not a number above 0"),
        ("slide:{0}?mpp=1&shrink=2", "mpp= and shrink= both set"),
    ],
)
def test_what_does_not_fit_is_told(folder, spec, says):
    with pytest.raises(ValueError, match=says):
        open_data(spec.format(folder))
