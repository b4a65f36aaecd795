"""NIfTI volumes as planes: turned upright, windowed, one volume on one side."""

import gzip
import json
import pickle
import re

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="needs pip install 'vim-ssl[medical]'")

from vim_ssl.data import BadImage, labelled_splits, masked_splits, open_data  # noqa: E402
from vim_ssl.data.check import check  # noqa: E402
from vim_ssl.data.sources.nifti import upright  # noqa: E402

VOLUME = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)  # right, anterior, superior


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "VIM_SSL_CACHE"):
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp("cache")))


def write(path, values=VOLUME, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(values, affine, dtype=values.dtype), path)
    return path


def images(spec):
    return [np.asarray(item["image"]) for item in open_data(spec)]


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_planes(tmp_path, ending):
    write(tmp_path / f"a.{ending}")
    data = open_data(f"nifti:{tmp_path}?window=0,255")
    assert len(data) == 5
    assert data.ids[1] == f"a.{ending}/0001"
    assert set(data.groups) == {f"a.{ending}"}
    axial = np.asarray(data[1]["image"])
    assert (axial.shape, data[1]["image"].mode) == ((4, 3), "L")
    np.testing.assert_array_equal(axial, VOLUME[:, ::-1, 1].T)  # anterior is up
    coronal = images(f"nifti:{tmp_path}?window=0,255&axis=1")
    assert len(coronal) == 4
    np.testing.assert_array_equal(coronal[2], VOLUME[:, 2, ::-1].T)  # superior is up
    sagittal = images(f"nifti:{tmp_path}?window=0,255&axis=0")
    np.testing.assert_array_equal(sagittal[2], VOLUME[2, :, ::-1].T)
    again = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(np.asarray(again[1]["image"]), axial)


def test_stored_in_other_axes(tmp_path):
    """Left, inferior, anterior in the file: the images are those of the canonical volume."""
    affine = np.array([[-1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], float)
    write(tmp_path / "plain" / "a.nii")
    write(tmp_path / "turned" / "a.nii", VOLUME[::-1, :, ::-1].transpose(0, 2, 1), affine)
    for axis in "012":
        one, other = (
            images(f"nifti:{tmp_path / name}?window=0,255&axis={axis}")
            for name in ("plain", "turned")
        )
        np.testing.assert_array_equal(one, other)


def test_windows(tmp_path):
    values = np.linspace(-1000, 1000, 1000).reshape(10, 10, 10).astype(np.float32)
    values[0, 0, 0] = np.nan
    write(tmp_path / "a.nii.gz", values)
    default = np.stack(images(f"nifti:{tmp_path}"))
    assert (default.min(), default.max()) == (0, 255)
    narrow = np.stack(images(f"nifti:{tmp_path}?window=0,100"))
    assert 0.4 < (narrow == 0).mean() < 0.55
    share = np.stack(images(f"nifti:{tmp_path}?window=10%,90%"))
    assert 0.09 < (share == 255).mean() < 0.12


def test_a_series_in_time_gives_its_first_volume(tmp_path):
    write(tmp_path / "a.nii", np.stack([VOLUME, VOLUME + 100], -1))
    np.testing.assert_array_equal(images(f"nifti:{tmp_path}?window=0,255")[0], VOLUME[:, ::-1, 0].T)


def test_labels_splits_and_globs(tmp_path):
    for name in ("train/brain/a.nii", "train/liver/b.nii", "test/brain/c.nii", "test/liver/d.nii"):
        write(tmp_path / name)
    train, test = labelled_splits(f"nifti:{tmp_path}?label=folder", 0.5, 0)
    assert (train.classes, train.labels, test.labels) == (
        ["brain", "liver"], [0] * 5 + [1] * 5, [0] * 5 + [1] * 5,
    )  # fmt: skip
    assert not set(train.groups) & set(test.groups)
    assert len(open_data(f"nifti:{tmp_path}/*/brain/*.nii", split="all")) == 10
    assert len(open_data(f"nifti:{tmp_path}/test/brain/c.nii")) == 5


def test_broken_files(tmp_path):
    write(tmp_path / "good.nii")
    (tmp_path / "bad.nii").write_bytes(b"no volume")
    write(tmp_path / "cut.nii", np.zeros((4, 4, 4), np.int16))
    content = (tmp_path / "cut.nii").read_bytes()
    (tmp_path / "cut.nii").write_bytes(content[:-20])
    data = open_data(f"nifti:{tmp_path}")
    assert data.faults[0].startswith("bad.nii cannot be read")
    assert len(data) == 9
    with pytest.raises(BadImage, match=r"cut\.nii/0000: the volume cannot be read"):
        data[0]
    assert data[5]["image"].size == (3, 4)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?axis=3", "unsupported axis=3; use axis=0 or axis=1"),
        ("?label=organ", "label=folder"),
        ("?label=folder", r"1 images in .* are not in a class folder"),
    ],
)
def test_errors(tmp_path, query, message):
    write(tmp_path / "a.nii")
    with pytest.raises(ValueError, match=message):
        open_data(f"nifti:{tmp_path}{query}")
    with pytest.raises(FileNotFoundError, match="give a file, a folder or a glob"):
        open_data(f"nifti:{tmp_path}/*.nrrd")


# ------------------------------------------------------------------------- masks

TURNED = np.array([[-2, 0, 0, 9], [0, 0, 3, 0], [0, -4, 0, 5], [0, 0, 0, 1]], float)
ORGAN = (VOLUME % 3).astype(np.uint8)


def pair(root, name="a", values=ORGAN, folders=("images", "masks"), affines=(TURNED, TURNED)):
    """A volume and its mask; of both the values are given in the file's own axes."""
    write(root / folders[0] / f"{name}.nii.gz", VOLUME, affines[0])
    write(root / folders[1] / f"{name}.nii", values, affines[1])
    return f"nifti:{root}"


@pytest.mark.parametrize("folders", [("images", "labels"), ("imagesTr", "labelsTr")], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mask_lies_on_its_plane(tmp_path, axis, folders):
    """Bright is class 1 in the file, and so in every plane, whatever axes they are stored in."""
    spec = pair(tmp_path, values=(VOLUME > 30).astype(np.float32), folders=folders)
    data = pickle.loads(pickle.dumps(open_data(f"{spec}?window=30,31&axis={axis}")))
    assert (data.classes, data.has_masks, data.labels) == (["0", "1"], True, None)
    for item in data:
        assert np.array_equal(np.asarray(item["image"]) == 255, item["mask"] == 1)
    # The file's axes are left, inferior, anterior, of 2, 4 and 3 mm.
    planes, *sides = {0: (3, 4.0, 3.0), 1: (5, 4.0, 2.0), 2: (4, 3.0, 2.0)}[axis]
    across = {0: 2.0, 1: 3.0, 2: 4.0}[axis]
    place = {"volume": "a.nii.gz", "plane": 1, "planes": planes, "spacing": (across, *sides)}
    place |= {"file": str(tmp_path / folders[0] / "a.nii.gz"), "axis": axis}
    assert data[1]["meta"] == place
    assert len(data) == planes
    bare = open_data(f"{spec}?label=none&axis={axis}")[1]
    assert "mask" not in bare
    assert bare["meta"] == place  # known without masks, for predictions


def test_names_groups_and_class_names(tmp_path):
    for patient in ("p1", "p2", "p3"):
        for scan in ("early", "late"):
            spec = pair(tmp_path, f"{patient}/{scan}")
    pair(tmp_path, "p3/first_0000")
    (tmp_path / "masks/p3/first_0000.nii").rename(tmp_path / "masks/p3/first.nii")
    (tmp_path / "classes.txt").write_text("none\nliver\ntumour\nvessel\n")
    train, test = masked_splits(f"{spec}?group=folder", 0.3, 0)
    assert train.classes == ["none", "liver", "tumour", "vessel"]
    assert not set(train.groups) & set(test.groups)
    assert set(train.groups) | set(test.groups) == {"p1", "p2", "p3"}
    train, test = masked_splits(spec, 0.3, 0)
    assert not set(train.groups) & set(test.groups)
    assert set(train.groups) | set(test.groups) >= {"p1/early.nii.gz", "p3/first_0000.nii.gz"}


@pytest.mark.parametrize(
    "labels",
    [{"2": "cancer", "0": "background", "1": "liver"}, {"background": 0, "liver": 1, "cancer": 2}],
    ids=["Decathlon", "nnU-Net"],
)
def test_a_dataset_json_names_the_classes(tmp_path, labels):
    spec = pair(tmp_path, folders=("imagesTr", "labelsTr"))
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "Liver", "labels": labels}))
    assert open_data(spec).classes == ["background", "liver", "cancer"]
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert open_data(spec).classes == ["a", "b", "c"]


@pytest.mark.parametrize(
    "content",
    [
        '{"labels": {"0": "a", "2": "b"}}', '{"labels": {"a": 0, "b": [1, 2]}}', '{"labels": 3}',
        '{"labels": {"a": 0, "b": 1.5}}', '{"labels": {"a": 0, "b": true}}',
        '{"labels": {"0": "a", "1": null}}', "{",
    ],
)  # fmt: skip
def test_a_dataset_json_that_names_no_classes_is_told(tmp_path, content):
    spec = pair(tmp_path)
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"or name the classes in classes\.txt beside it"):
        open_data(spec)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "liver": 1, "ignore": 2}, r"number 2 is \"ignore\".*must be 255"),
        ({"0": "background"}, "names 1 classes; expected 2 to 255"),
        ({}, "names 0 classes"),
        ({str(i): f"part {i}" for i in range(256)}, "names 256 classes"),
    ],
    ids=["ignore", "one", "none", "256"],
)
def test_classes_of_a_dataset_json_that_masks_cannot_have_are_told(tmp_path, labels, message):
    spec = pair(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ValueError, match=message):
        open_data(spec)


def test_masks_that_do_not_fit_are_named(tmp_path):
    spec = pair(tmp_path, "good")
    moved = TURNED + np.array([[0, 0, 0, 2], *[[0] * 4] * 3])
    pair(tmp_path, "moved", affines=(TURNED, moved))
    pair(tmp_path, "small", ORGAN[:, :2])
    pair(tmp_path, "half", ORGAN + np.float32(0.5))
    data = open_data(spec)
    assert set(data.groups) == {"good.nii.gz", "half.nii.gz"}
    told = " ".join(data.faults)
    assert "moved.nii.gz cannot be read (ValueError: its mask has another position" in told
    assert "small.nii.gz cannot be read (ValueError: its mask has (3, 5, 2) voxels" in told
    with pytest.raises(BadImage, match=r"half.*it contains 1\.5; the values of a mask"):
        data[data.groups.index("half.nii.gz")]
    (tmp_path / "masks/good.nii").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images .* have no mask .*: good\.nii\.gz"):
        open_data(spec)


# ------------------------------------------------------------------------- files of the field


def test_masks_and_modalities_of_a_case_are_reported(tmp_path):
    for case in ("case_1", "case_2"):
        for kind in ("t1", "flair", "seg"):
            write(tmp_path / case / f"{case}_{kind}.nii.gz")
    data = open_data(f"nifti:{tmp_path}")
    assert len(set(data.groups)) == 6
    modalities, masks = sorted(data.passed_over.warnings, reverse=True)
    assert modalities.startswith("the modalities of a case are separate groups")
    assert "case_1/case_1, case_2/case_2. Put each case into a folder" in modalities
    assert masks.startswith("2 of 6 files look like masks of others, but are read as images")
    assert len(check(f"nifti:{tmp_path}").problems) >= 2
    data = open_data(f"nifti:{tmp_path}/*/*_t1.nii.gz?group=folder")
    assert (len(set(data.groups)), data.passed_over.warnings) == (2, [])


def channels(root, folder="imagesTr"):
    """Two cases of three channels; the values say which."""
    for case in ("A", "B"):
        for number in range(3):
            values = np.full((3, 4, 5), 50 * (number + 1), np.int16)
            write(root / folder / f"{case}_{number:04}.nii.gz", values)


@pytest.mark.parametrize(("query", "grey"), [("", 50), ("&channel=0", 50), ("&channel=2", 150)])
def test_one_channel_of_a_case_is_read_with_its_mask(tmp_path, query, grey):
    channels(tmp_path)
    for case in ("A", "B"):
        write(tmp_path / f"labelsTr/{case}.nii.gz", ORGAN)
    data = open_data(f"nifti:{tmp_path}?window=0,255{query}")
    assert (len(data), len(set(data.groups))) == (10, 2)
    assert data.passed_over == {"of other channels": 4}
    assert np.unique(np.asarray(data[7]["image"])).tolist() == [grey]
    assert np.array_equal(data[7]["mask"], upright(ORGAN, 2, 2))


def test_a_channel_that_no_volume_has_is_refused(tmp_path):
    channels(tmp_path)
    for case in ("A", "B"):
        write(tmp_path / f"labelsTr/{case}.nii.gz", ORGAN)
    with pytest.raises(ValueError, match=r"channel=7; there are the channels 0, 1, 2"):
        open_data(f"nifti:{tmp_path}?channel=7")
    with pytest.raises(ValueError, match="unsupported channel=first"):
        open_data(f"nifti:{tmp_path}?channel=first")


def test_channels_without_masks_are_reported_or_chosen(tmp_path):
    channels(tmp_path, "imagesTs")
    data = open_data(f"nifti:{tmp_path}/imagesTs")
    assert len(data) == 30
    assert "channels 0, 1, 2 of a case are read as separate volumes; channel=0" in data.faults[0]
    data = open_data(f"nifti:{tmp_path}/imagesTs?channel=1&window=0,255")
    assert (len(data), data.faults) == (10, [])
    assert np.unique(np.asarray(data[0]["image"])).tolist() == [100]
    for number in range(3):  # numbered patients are no channels
        write(tmp_path / f"scans/p_{number:04}.nii")
    assert open_data(f"nifti:{tmp_path}/scans").faults == []


@pytest.mark.parametrize("name", ["A.NII.GZ", "A.Nii", "A.HDR", "a.hdr"])
def test_endings_in_upper_case_and_pairs(tmp_path, name):
    ending = name[1:].lower()
    path = tmp_path / f"x{ending}"
    kind = nibabel.Nifti1Pair if ending == ".hdr" else nibabel.Nifti1Image
    nibabel.save(kind(VOLUME, np.eye(4)), path)
    path.rename(tmp_path / name)
    if ending == ".hdr":
        (tmp_path / "x.img").rename(tmp_path / name.replace("hdr", "img").replace("HDR", "IMG"))
    data = open_data(f"nifti:{tmp_path}?window=0,255")
    assert (len(data), data.passed_over) == (5, {})
    np.testing.assert_array_equal(np.asarray(data[1]["image"]), VOLUME[:, ::-1, 1].T)
    assert data.paths(0)[0] == str(tmp_path / name)


def test_compression_is_known_by_the_content(tmp_path):
    content = nibabel.Nifti1Image(VOLUME, np.eye(4)).to_bytes()
    (tmp_path / "a.nii").write_bytes(gzip.compress(content))
    (tmp_path / "b.nii.gz").write_bytes(content)
    one, other = np.split(np.stack(images(f"nifti:{tmp_path}?window=0,255")), 2)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one[1], VOLUME[:, ::-1, 1].T)


def test_a_pair_with_a_mask_that_is_a_pair(tmp_path):
    for folder, values in (("images", VOLUME), ("masks", ORGAN)):
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Pair(values, np.eye(4)), tmp_path / folder / "a.hdr")
    data = open_data(f"nifti:{tmp_path}")
    assert np.array_equal(data[1]["mask"], upright(ORGAN, 1, 2))
    before = data.fingerprint
    (tmp_path / "images/a.img").write_bytes((tmp_path / "images/a.img").read_bytes() + b"more")
    assert open_data(f"nifti:{tmp_path}").fingerprint != before


def test_the_volumes_of_a_series_are_counted(tmp_path):
    write(tmp_path / "a.nii", np.stack([VOLUME] * 4, -1))
    write(tmp_path / "b.nii", np.zeros((3, 4, 5, 1, 3), np.float32) + VOLUME[..., None, None])
    assert open_data(f"nifti:{tmp_path}").passed_over == {"further volumes of a series": 5}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("slope", [0, np.nan, 2])
def test_scales_and_byte_orders(tmp_path, order, slope):
    """A slope of 0 or NaN means that values are not scaled."""
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(np.int16)
    content = bytearray(nibabel.Nifti1Image(VOLUME, np.eye(4), header).to_bytes())
    content[112:120] = np.array([slope, 5], f"{order}f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    expected = VOLUME * 2 + 5 if slope == 2 else VOLUME
    np.testing.assert_array_equal(
        images(f"nifti:{tmp_path}?window=0,255")[1], expected[:, ::-1, 1].T
    )


def test_values_that_are_not_finite_are_black(tmp_path):
    values = VOLUME.astype(np.float32)
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = np.nan, np.inf, -np.inf
    write(tmp_path / "a.nii", values)
    assert images(f"nifti:{tmp_path}?window=-10,100")[0][-1].tolist() == [0, 0, 0]
    write(tmp_path / "b.nii", np.full((3, 4, 5), np.nan, np.float32))
    with pytest.raises(BadImage, match=r"b\.nii/0000: .*none of its values is finite"):
        open_data(f"nifti:{tmp_path}")[5]


def colour_volume() -> np.ndarray:
    return np.zeros((3, 4, 5), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))


@pytest.mark.parametrize(
    ("values", "affine", "reason"),
    [
        (colour_volume(), None, "expected real numbers"),
        (VOLUME.astype(np.complex64), None, "expected real numbers"),
        (VOLUME[0], None, r"shape \(4, 5\) is not a volume"),
    ],
    ids=["RGB", "complex", "2D"],
)
def test_what_is_no_volume_of_grey_is_named(tmp_path, values, affine, reason):
    write(tmp_path / "good.nii")
    write(tmp_path / "odd.nii", values, affine)
    data = open_data(f"nifti:{tmp_path}")
    assert len(data) == 5
    assert any(re.search(f"odd.nii cannot be read.*{reason}", fault) for fault in data.faults)


def test_damaged_and_foreign_files_are_named(tmp_path):
    write(tmp_path / "good.nii")
    nibabel.save(nibabel.AnalyzeImage(VOLUME, np.eye(4)), tmp_path / "old.hdr")
    draw = np.random.default_rng(0).integers(0, 2000, (30, 30, 30)).astype(np.int16)
    content = write(tmp_path / "short.nii.gz", draw).read_bytes()
    (tmp_path / "short.nii.gz").write_bytes(content[: len(content) // 2])
    flat = bytearray(nibabel.Nifti1Image(VOLUME, np.eye(4)).to_bytes())
    flat[280:328] = np.zeros(12, np.float32).tobytes()  # every axis has the size 0
    (tmp_path / "flat.nii").write_bytes(flat)
    data = open_data(f"nifti:{tmp_path}")
    text = " ".join(data.faults)
    assert re.search(r"old\.hdr cannot be read .*does not say which side is left", text)
    assert re.search(r"flat\.nii cannot be read .*no direction or size", text)
    with pytest.raises(BadImage, match=r"short\.nii\.gz/0000: the volume cannot be read"):
        data[data.ids.index("short.nii.gz/0000")]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (ORGAN.astype(np.float64), ""),
        (ORGAN.astype(np.int64), ""),
        (ORGAN - np.float32(1e-4), ""),
        (np.stack([ORGAN], -1), ""),
        (np.stack([ORGAN == 0, ORGAN > 0], -1).astype(np.uint8), "its mask has 2 volumes"),
    ],
    ids=["float", "int64", "1.9999", "one-volume", "one-hot"],
)
def test_masks_of_other_types(tmp_path, values, reason):
    pair(tmp_path, "good")
    spec = pair(tmp_path, "odd", values)
    data = open_data(spec)
    if reason:
        assert reason in " ".join(data.faults)
    else:
        assert data.faults == []
        first = data.groups.index("odd.nii.gz")
        assert np.array_equal(data[first]["mask"], data[0]["mask"])


def test_a_dataset_json_with_a_byte_order_mark(tmp_path):
    spec = pair(tmp_path)
    labels = {"labels": {"0": "background", "1": "liver", "2": "cancer"}}
    (tmp_path / "dataset.json").write_text("\ufeff" + json.dumps(labels), encoding="utf-8")
    assert open_data(spec).classes == ["background", "liver", "cancer"]
