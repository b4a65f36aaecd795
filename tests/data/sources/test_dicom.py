"""DICOM: values as a viewer shows them, slices in order, patients kept apart and unnamed."""

import json
import pickle
import sys

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="needs pip install 'vim-ssl[medical]'")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import (  # noqa: E402
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    RLELossless,
)

from vim_ssl.data import BadImage, labelled_splits, open_data  # noqa: E402
from vim_ssl.data.check import check  # noqa: E402
from vim_ssl.data.sources.dicom import locate  # noqa: E402

RAMP = np.arange(0, 2048, 32, dtype=np.int16).reshape(8, 8)


def dataset(pixels=RAMP, **tags) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.PatientName, ds.PatientID, ds.SeriesInstanceUID = "Doe^Jane", "P-1", "1.2.3"
    ds.Modality, ds.BodyPartExamined = "CT", "LIVER"
    ds.Rows, ds.Columns = pixels.shape[-2:] if pixels.ndim < 4 else pixels.shape[1:3]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


def write(path, ds):
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def read(tmp_path, ds, query=""):
    write(tmp_path / "one.dcm", ds)
    return np.asarray(open_data(f"dicom:{tmp_path}{query}")[0]["image"])


def test_rescaled_and_windowed_as_the_standard_says(tmp_path):
    ds = dataset(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=40, WindowWidth=400)
    hu = RAMP.astype(float) * 2 - 1000
    expected = (((hu - 39.5) / 399 + 0.5).clip(0, 1) * 255).round()
    np.testing.assert_array_equal(read(tmp_path, ds), expected)
    # The file's window gives way to the one asked for.
    expected = (((hu + 160) / 400).clip(0, 1) * 255).round()
    np.testing.assert_array_equal(read(tmp_path, ds, "?window=-160,240"), expected)


def test_windows_of_other_forms(tmp_path):
    several = dataset(WindowCenter=[1000, 5], WindowWidth=[500, 5], VOILUTFunction="LINEAR_EXACT")
    expected = (((RAMP - 1000.0) / 500 + 0.5).clip(0, 1) * 255).round()
    np.testing.assert_array_equal(read(tmp_path, several), expected)
    sigmoid = dataset(WindowCenter=1000, WindowWidth=500, VOILUTFunction="SIGMOID")
    values = read(tmp_path, sigmoid)
    assert (values[0, 0], values[-1, -1]) == (0, 255)
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 8], [0, 10, 200, 255]
    looked_up = dataset(RAMP // 512, VOILUTSequence=Sequence([table]))
    looked_up["VOILUTSequence"].value[0]["LUTData"].VR = "US"
    assert set(read(tmp_path, looked_up).flat) == {0, 10, 200, 255}


def test_monochrome1_is_turned_over(tmp_path):
    plain = read(tmp_path, dataset(WindowCenter=1000, WindowWidth=2000))
    turned = dataset(WindowCenter=1000, WindowWidth=2000, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read(tmp_path, turned), 255 - plain)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_depths_without_a_window(tmp_path, bits):
    pixels = np.linspace(0, 2**bits - 1, 64).astype(np.uint8 if bits == 8 else np.uint16)
    values = read(tmp_path, dataset(pixels.reshape(8, 8), BitsStored=bits, HighBit=bits - 1))
    assert (values.min(), values.max()) == (0, 255)
    assert (np.diff(values.ravel().astype(int)) >= 0).all()


def test_padding_is_black_and_does_not_stretch_the_window(tmp_path):
    pixels = RAMP.copy()
    pixels[0] = -2000
    for colours in ("MONOCHROME2", "MONOCHROME1"):
        values = read(
            tmp_path,
            dataset(pixels, PixelPaddingValue=-2000, PhotometricInterpretation=colours),
        )
        assert (values[0] == 0).all()
        assert np.ptp(values[1:].astype(int)) == 255


def test_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 6, 7, 3), dtype=np.uint8)
    ds = dataset(pixels, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    np.testing.assert_array_equal(read(tmp_path, ds), pixels[0])


def test_slices_in_order_of_position_or_number(tmp_path):
    turned = [1, 0, 0, 0, 1, 0]
    for file, z in (("a", 30), ("b", 10), ("c", 20)):
        ds = dataset(RAMP + z, ImagePositionPatient=[0, 0, z], ImageOrientationPatient=turned)
        write(tmp_path / "by_position" / file, ds)  # no extension, as scanners write them
        ds = dataset(RAMP + z, SeriesInstanceUID="1.2.4", InstanceNumber=z)
        write(tmp_path / "by_number" / f"{file}.dcm", ds)
    data = open_data(f"dicom:{tmp_path}?window=0,100")
    first = [int(np.asarray(item["image"])[0, 0]) for item in data]
    assert first == [26, 51, 76, 26, 51, 76]
    assert [name[-4:] for name in data.ids] == ["0000", "0001", "0002"] * 2
    found = locate(tmp_path)
    assert found[data.ids[0]] == "by_number/b.dcm"


def test_frames(tmp_path):
    frames = np.stack([RAMP, RAMP + 500])
    write(tmp_path / "f.dcm", dataset(frames, NumberOfFrames=2))
    data = open_data(f"dicom:{tmp_path}?window=0,2500")
    assert len(data) == 2
    assert np.asarray(data[1]["image"])[0, 0] == 51


def test_enhanced_frames_have_values_of_their_own(tmp_path):
    groups = []
    for slope, z in ((1, 5), (2, 1)):
        group, scale, place = Dataset(), Dataset(), Dataset()
        scale.RescaleSlope, scale.RescaleIntercept = slope, 0
        place.ImagePositionPatient = [0, 0, z]
        group.PixelValueTransformationSequence = Sequence([scale])
        group.PlanePositionSequence = Sequence([place])
        groups.append(group)
    shared, turned = Dataset(), Dataset()
    turned.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PlaneOrientationSequence = Sequence([turned])
    frames = np.full((2, 8, 8), 50, np.int16)
    write(tmp_path / "f.dcm", dataset(
        frames, NumberOfFrames=2, PerFrameFunctionalGroupsSequence=Sequence(groups),
        SharedFunctionalGroupsSequence=Sequence([shared]),
    ))  # fmt: skip
    data = open_data(f"dicom:{tmp_path}?window=0,255")
    assert [np.asarray(item["image"])[0, 0] for item in data] == [100, 50]


def patients(root, **labels):
    for patient in range(6):
        for i in range(2):
            ds = dataset(RAMP + patient + 7 * i, PatientID=f"MRN-{patient}", InstanceNumber=i,
                         PatientName=f"Doe^{patient}", SeriesInstanceUID=f"1.{patient}",
                         Modality="CT" if patient % 2 else "MR")  # fmt: skip
            write(root / f"Doe_{patient}/{i}.dcm", ds)


def test_a_patient_is_on_one_side_only_and_stays_unnamed(tmp_path):
    patients(tmp_path)
    data = open_data(f"dicom:{tmp_path}?label=modality")
    assert (data.classes, len(set(data.groups))) == (["ct", "mr"], 6)
    assert len(open_data(f"dicom:{tmp_path}?label=folder").classes) == 6
    train, test = labelled_splits(f"dicom:{tmp_path}?label=modality", 0.4, 0)
    assert not set(train.groups) & set(test.groups)
    handed_on = json.dumps([{k: str(v) for k, v in item.items()} for item in data])
    handed_on += repr(data) + json.dumps([data.groups, data.ids, data.classes])
    for secret in ("Doe", "MRN", "LIVER"):
        assert secret not in handed_on.replace(str(tmp_path), "")
    assert check(f"dicom:{tmp_path}?label=modality").problems == []
    again = pickle.loads(pickle.dumps(data))[3]
    assert np.array_equal(np.asarray(again["image"]), np.asarray(data[3]["image"]))


def test_files_whose_identity_was_blanked_stay_together(tmp_path):
    """Else neighbouring slices of one patient would come to both sides of a split."""
    for folder in ("one", "two"):
        for z in range(3):
            ds = dataset(RAMP + z, PatientID="", SeriesInstanceUID="", InstanceNumber=3 - z)
            write(tmp_path / folder / f"{z}.dcm", ds)
    data = open_data(f"dicom:{tmp_path}?window=0,255")
    assert data.groups == ["patient-00000"] * 3 + ["patient-00001"] * 3
    assert [int(np.asarray(item["image"])[0, 0]) for item in data] == [2, 1, 0] * 2


@pytest.mark.parametrize("patient", ["ANONYMOUS", ""])
@pytest.mark.parametrize(("studies", "group"), [(3, "study"), (1, "series")])
def test_files_of_one_patient_are_grouped_by_study_or_series(tmp_path, patient, studies, group):
    for i in range(6):
        ds = dataset(RAMP + i, PatientID=patient, StudyInstanceUID=f"1.{i % studies}",
                     SeriesInstanceUID=f"2.{i % 3}", InstanceNumber=i)  # fmt: skip
        write(tmp_path / ("ab"[i < 3]) / f"{i}.dcm", ds)
    spec = f"dicom:{tmp_path}?label=folder"
    data = open_data(spec)
    if not patient and studies > 1:
        group = "patient"  # without PatientID, a study counts as one
    assert set(data.groups) == {f"{group}-0000{i}" for i in range(3)}
    if group != "patient":
        assert f"the group is the {group}" in data.faults[0]
        assert f"the group is the {group}" in check(spec).problems[0]
    train, test = labelled_splits(spec, 0.4, 0)
    assert not set(train.groups) & set(test.groups)
    everything = f"{spec}&group=patient"
    assert len(set(open_data(f"{spec}&group=series").groups)) == 3
    assert set(open_data(everything).groups) <= {f"patient-0000{i}" for i in range(studies)}
    if patient:
        assert "all images are in one group" in " ".join(check(everything).remarks)
        with pytest.raises(ValueError, match=r"at least two groups; got 1. Name smaller groups"):
            labelled_splits(everything, 0.4, 0)
    with pytest.raises(ValueError, match="unsupported group=name"):
        open_data(f"{spec}&group=name")


def test_no_header_is_quoted_in_warnings(tmp_path, recwarn):
    write(tmp_path / "one.dcm", dataset(SeriesInstanceUID="1.2.3"))
    content = (tmp_path / "one.dcm").read_bytes()
    (tmp_path / "one.dcm").write_bytes(content.replace(b"1.2.3", b"Doe^J"))
    recwarn.clear()
    open_data(f"dicom:{tmp_path}")[0]
    assert not [w for w in recwarn if "Doe" in str(w.message)]


def test_split_folders(tmp_path):
    for split, patient in (("train", "a"), ("test", "b"), ("test", "a")):
        ds = dataset(RAMP + ord(patient), PatientID=patient, SeriesInstanceUID=f"1.{ord(patient)}")
        write(tmp_path / split / f"{patient}.dcm", ds)
    assert len(open_data(f"dicom:{tmp_path}")) == 1
    assert len(open_data(f"dicom:{tmp_path}", split="test")) == 2
    problems = check(f"dicom:{tmp_path}").problems
    assert "1 groups are in train and in test" in problems[0]
    assert "1 images are in more than one split" in problems[1]


def test_compressed(tmp_path):
    ds = dataset(WindowCenter=1000, WindowWidth=2000)
    plain = read(tmp_path, ds)
    ds.compress(RLELossless)
    np.testing.assert_array_equal(read(tmp_path, ds), plain)


def test_a_missing_decompressor_is_named(tmp_path, monkeypatch):
    ds = dataset()
    ds.compress(RLELossless)
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    write(tmp_path / "one.dcm", ds)
    decoder = type(pydicom.pixels.get_decoder(JPEGLosslessSV1))
    monkeypatch.setattr(decoder, "is_available", False)
    monkeypatch.setattr(decoder, "missing_dependencies", ["pylibjpeg - requires pylibjpeg>=2.0"])
    with pytest.raises(ImportError, match=r"JPEG Lossless.* requires pylibjpeg>=2\.0"):
        open_data(f"dicom:{tmp_path}")


def test_what_is_no_image(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        open_data(f"dicom:{tmp_path / 'no'}")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"contains no DICOM image .*1 × not DICOM"):
        open_data(f"dicom:{tmp_path}")
    report = dataset()
    for tag in ("Rows", "Columns", "PixelData"):
        del report[tag]
    write(tmp_path / "report.dcm", report)
    lost = dataset(PatientName="Doe^Jane")
    del lost["PixelData"]
    write(tmp_path / "lost.dcm", lost)
    cut = dataset(SeriesInstanceUID="1.9")
    write(tmp_path / "cut.dcm", cut)
    content = (tmp_path / "cut.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(content[:-40])
    data = open_data(f"dicom:{tmp_path}")
    assert data.passed_over["DICOM without pixels"] == 1
    assert len(data) == 2
    for i in range(2):
        with pytest.raises(BadImage, match="its pixels cannot be read") as bad:
            data[i]
        assert "Doe" not in str(bad.value)
    assert "2 images cannot be decoded" in str(check(f"dicom:{tmp_path}").problems)


@pytest.mark.parametrize(
    ("tag", "value", "right", "wrong", "told"),
    [
        ("InstanceNumber", 4242, b"4242", b"42x2", "broken header"),
        ("NumberOfFrames", 1111, b"1111", b"11x1", "broken header"),
        ("NumberOfFrames", 9999, b"9999", b"9999", "number of frames differs from the header"),
        ("NumberOfFrames", 9999, b"9999", b"-999", "number of frames differs from the header"),
        ("ImagePositionPatient", [0, 0, 1.25], b"1.25", b"1.2x", "broken header"),
        ("ImagePositionPatient", [0, 0, 1.25], b"1.25", b"nan ", "broken header"),
    ],
)
def test_a_wrong_value_costs_its_own_file_only(tmp_path, caplog, tag, value, right, wrong, told):
    turned = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.dcm", dataset(**turned))
    write(tmp_path / "b.dcm", dataset(**{tag: value}, **turned, SOPInstanceUID="1.2.7"))
    content = (tmp_path / "b.dcm").read_bytes()
    assert content.count(right) == 1
    (tmp_path / "b.dcm").write_bytes(content.replace(right, wrong))
    data = open_data(f"dicom:{tmp_path}")
    assert list(locate(tmp_path).values()) == ["a.dcm", "c.dcm"]
    assert len(data) == len([item["image"] for item in data]) == 2
    assert f"skipped 1 × {told} (b.dcm)" in caplog.text
    told_of_it = caplog.text.replace(str(tmp_path), "")
    assert wrong.decode() not in told_of_it  # nothing of a header


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?label=patient_name", "unsupported label=.* Free-text fields are not allowed"),
        ("?window=5", "is not valid; write LOW,HIGH"),
        ("?window=9,3", "is not valid"),
        ("?window=1%,101%", "is not valid"),
    ],
)
def test_errors(tmp_path, query, message):
    write(tmp_path / "one.dcm", dataset())
    with pytest.raises(ValueError, match=message):
        open_data(f"dicom:{tmp_path}{query}")


def test_without_pydicom(tmp_path, monkeypatch):
    write(tmp_path / "one.dcm", dataset())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"pip install 'vim-ssl\[medical\]'"):
        open_data(f"dicom:{tmp_path}")


def test_one_file_is_opened_without_the_others_of_its_folder(tmp_path):
    write(tmp_path / "one.dcm", dataset())
    write(tmp_path / "two.dcm", dataset(SeriesInstanceUID="1.2.4", RescaleSlope=2))
    data = open_data(f"dicom:{tmp_path}/two.dcm")
    assert [path.rpartition("/")[2] for path in data.paths(0)] == ["two.dcm"]
    assert len(data) == 1
