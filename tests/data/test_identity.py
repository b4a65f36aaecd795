"""Images are the same by their content: in files, tables, joined sets, volumes and videos."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import identity, open_data
from vim_ssl.data.identity import FILES, PIXELS, content_keys, describe_training


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
