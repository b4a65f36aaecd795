"""Images are the same by their content: in files, tables, joined sets, volumes and videos."""

import gzip
import io
import shutil
from hashlib import blake2b

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import contents, identity, open_data
from vim_ssl.data.identity import (
    FILES,
    PIXELS,
    TrainingRecord,
    content_keys,
    describe_training,
)
from vim_ssl.data.sources.memory import register_data


def keys(spec: str, by: str = PIXELS) -> list[int]:
    return content_keys(open_data(spec), by).images.tolist()


@pytest.fixture
def photos(tmp_path):
    for i in range(4):
        values = np.random.default_rng(i).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / "p" / f"{i}.png")
    return tmp_path / "p"


def test_bytes_of_a_table_are_files(photos):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.iterdir())]
    pq.write_table(pa.table({"image": rows}), photos.parent / "t.parquet")
    for by in (PIXELS, FILES):
        assert keys(f"parquet:{photos.parent / 't.parquet'}", by) == keys(str(photos), by)


def test_large_images_of_a_table_are_files(tmp_path, monkeypatch):
    """Pieces of their bytes are compared; an earlier version compared all bytes in a table."""
    monkeypatch.setattr(contents, "WHOLE", 100)
    monkeypatch.setattr(contents, "PIECE", 10)
    buffer = io.BytesIO()
    Image.fromarray(np.arange(3000, dtype=np.uint8).reshape(50, 60)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    (file,) = keys(str(tmp_path), FILES)
    assert identity._position_of(buffer.getvalue(), FILES).key == file
    whole = blake2b(buffer.getvalue(), digest_size=6).digest()
    earlier = identity._position_of(buffer.getvalue(), "files").key
    assert earlier == int.from_bytes(whole, "little") != file


def test_images_in_memory_are_not_compared_with_files_by_their_bytes(photos):
    by_pixels = describe_training("finetune", open_data(str(photos)), open_data(str(photos)))
    by_files = TrainingRecord("finetune", "p", True, FILES, np.array(keys(str(photos), FILES)))
    here = open_data(register_data([Image.open(path) for path in sorted(photos.iterdir())]))
    assert identity.compare(here, [by_files]).uncompared.all()
    assert not identity.compare(here, [by_pixels]).uncompared.any()
    assert not identity.compare(open_data(str(photos)), [by_files]).uncompared.any()


def nifti(folder, packed: bool):
    nibabel = pytest.importorskip("nibabel", reason="needs 'vim-ssl[medical]'")
    values = np.random.default_rng(0).normal(size=(6, 7, 3)).astype(np.float32)
    path = folder / ("a.nii.gz" if packed else "a.nii")
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return f"nifti:{path}"


def geotiff(folder, packed: bool):
    rasterio = pytest.importorskip("rasterio", reason="needs 'vim-ssl[remote-sensing]'")
    values = np.random.default_rng(0).integers(0, 255, (3, 16, 16), dtype=np.uint8)
    how = {"compress": "deflate", "tiled": True, "blockxsize": 16, "blockysize": 16}
    with rasterio.open(
        folder / "a.tif", "w", driver="GTiff", height=16, width=16, count=3, dtype="uint8",
        crs="EPSG:32633", transform=rasterio.Affine(1, 0, 5, 0, -1, 9), **how if packed else {},
    ) as file:  # fmt: skip
        file.write(values)
    return f"geotiff:{folder}?tile=8"


def dicom(folder, packed: bool):
    pydicom = pytest.importorskip("pydicom", reason="needs 'vim-ssl[medical]'")
    one = pydicom.Dataset()
    one.file_meta = pydicom.dataset.FileMetaDataset()
    one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    one.PatientID, one.SeriesInstanceUID = "P-1", "1.2.3"
    one.Rows = one.Columns = 8
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated = one.BitsStored = 16
    one.HighBit, one.PixelRepresentation = 15, 0
    one.PixelData = np.arange(64, dtype="<u2").tobytes()
    one["PixelData"].VR = "OW"
    if packed:
        one.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    one.save_as(folder / "a.dcm", enforce_file_format=True)
    return f"dicom:{folder}"


@pytest.mark.parametrize("write", [nifti, geotiff, dicom])
def test_parts_are_known_by_the_contents_of_their_files_however_packed(write, tmp_path):
    specs = []
    for packed in (False, True):
        folder = tmp_path / str(packed)
        folder.mkdir()
        specs.append(write(folder, packed))
    plain, packed = (keys(spec) for spec in specs)
    assert plain == packed
    assert identity.UNKNOWN not in plain
    earlier = [keys(spec, "pixels") for spec in specs]  # records of earlier versions: file bytes
    assert not set(earlier[0]) & set(earlier[1])
    by_files = [keys(spec, FILES) for spec in specs]  # too many to decode
    assert (by_files[0] == by_files[1]) == (write is nifti)


def test_keys_of_an_earlier_version_stay_as_they_are(tmp_path):
    data = open_data(nifti(tmp_path, packed=True))

    def key(content: bytes) -> int:
        return int.from_bytes(blake2b(content, digest_size=6).digest(), "little")

    files = [key((tmp_path / "a.nii.gz").read_bytes())]
    expected = [key(repr((files, data.part(i))).encode()) for i in range(len(data))]
    assert content_keys(data, "pixels").images.tolist() == expected


def test_a_volume_in_many_blocks_is_known_by_its_whole_content(tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    blocks = [gzip.compress(content[i : i + 65_000]) for i in range(0, 300_000, 65_000)]
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"".join([*blocks, gzip.compress(b"")]))
    (tmp_path / "c").write_bytes(gzip.compress(content))
    assert len({b"".join(contents.volume(str(tmp_path / name))) for name in "abc"}) == 1


def test_joined_sets_keep_the_keys_of_their_images(photos):
    one = keys(str(photos))
    assert keys(f"{photos} + 2 * {photos}") == 3 * one
    assert len(set(one)) == 4


def test_an_unreadable_image_is_known_by_its_bytes_and_a_missing_one_equals_none(photos):
    (photos / "0.png").write_bytes(b"broken")
    (photos / "1.png").write_bytes(b"broken")
    data = open_data(str(photos))
    (photos / "2.png").unlink()
    first, second, third, _ = content_keys(data, PIXELS).images.tolist()
    assert first == second != identity.UNKNOWN
    assert third == identity.UNKNOWN


def test_planes_are_parts_of_their_volume_wherever_it_lies(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="needs 'vim-ssl[medical]'")
    values = np.random.default_rng(0).normal(size=(6, 7, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "a.nii", tmp_path / "moved" / "b.nii")
    here, there = (open_data(f"nifti:{file}") for file in
                   (tmp_path / "a.nii", tmp_path / "moved" / "b.nii"))  # fmt: skip
    assert len(set(content_keys(here, PIXELS).images.tolist())) == 3
    assert (content_keys(here, PIXELS).images == content_keys(there, PIXELS).images).all()
    trained = describe_training("segmentation", here.subset([0]), here.subset([1]))
    assert identity.compare(there, [trained]).labels.tolist() == [True, False, True]
    # Another axis: other planes of a volume that was trained on.
    assert identity.compare(open_data(f"nifti:{tmp_path / 'a.nii'}?axis=0"), [trained]).labels.all()


def test_a_folder_of_frames_is_known_by_its_frames(photos, tmp_path):
    pytest.importorskip("av", reason="needs 'vim-ssl[video]'")
    for name in ("v/one", "v/two", "w/three"):
        shutil.copytree(photos, tmp_path / name)
    Image.new("RGB", (9, 8)).save(tmp_path / "v/two/3.png")
    one, two = keys(f"video:{tmp_path / 'v'}")
    assert [one] == keys(f"video:{tmp_path / 'w'}")
    assert one != two


def test_keys_of_many_files_are_kept_until_a_file_changes(photos, monkeypatch):
    monkeypatch.setattr(identity, "CACHED_FROM", 1)
    first = keys(str(photos))
    read = []
    hash_file = identity._file_key
    monkeypatch.setattr(identity, "_file_key", lambda *job: read.append(job) or hash_file(*job))
    assert keys(str(photos)) == first
    assert not read
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8)).save(buffer, "PNG")
    (photos / "2.png").write_bytes(buffer.getvalue())
    assert [a == b for a, b in zip(keys(str(photos)), first, strict=True)] == [1, 1, 0, 1]
    assert len(read) == 1


def test_groups_of_a_table_and_in_memory_are_recorded_by_their_names(photos):
    paths = sorted(photos.iterdir())
    rows = [f"{path},{'ab'[i % 2]},{'p1' if i < 2 else ''}" for i, path in enumerate(paths)]
    table = photos.parent / "t.csv"
    table.write_text("\n".join(["path,label,patient", *rows]))
    items = [{"image": Image.new("L", (8, 8), i), "group": ("p1", None)[i % 2]} for i in range(4)]
    here, there = open_data(register_data(items)), open_data(f"csv:{table}?group=patient")
    for trained, new, expected in ((here, there, [1, 1, 0, 0]), (there, here, [1, 0, 1, 0])):
        training = describe_training("finetune", trained, trained.subset([]))
        assert len(training.groups) == 1  # not the ids of images without a group
        assert identity.compare(new, [training]).by_group.tolist() == expected
