"""What every reader gives can be learnt: 32 labelled images by heart, from file to logits; and
the data doctor finds nothing wrong with it."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vim_ssl import create_transform, load_encoder
from vim_ssl.data import band_arguments, open_data
from vim_ssl.data.check import check
from vim_ssl.data.samples.fetch import list_samples
from vim_ssl.data.sources.bigearthnet import BIGEARTHNET_BANDS
from vim_ssl.data.sources.eurosat import EUROSAT_CLASSES

CLASSES = ("n01440764", "n01443537", "n01484850", "n01491361")  # synsets, for ImageNet's sake
SIDE = 32


def image(i: int, channels: int = 0) -> np.ndarray:
    """Image i of class i % 4: waves of one of four directions, under noise. uint8 (h, w[, c])."""
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = (x, y, x + y, x - y)[i % 4] * (2 * np.pi / 8) + i
    draw = np.random.default_rng(i)
    shape = (SIDE, SIDE, channels) if channels else (SIDE, SIDE)
    wave = wave[..., None] if channels else wave
    return (128 + 80 * np.sin(wave) + draw.normal(0, 15, shape)).clip(0, 255).astype(np.uint8)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image(i, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def folder(root):
    for i in range(32):
        put(root / CLASSES[i % 4] / f"{i}.png", png(i))
    return str(root)


def csv(root):
    for i in range(32):
        put(root / f"{i}.png", png(i))
    rows = [f"{i}.png,{CLASSES[i % 4]}" for i in range(32)]
    (root / "t.csv").write_text("\n".join(["path,label", *rows]))
    return f"csv:{root / 't.csv'}"


def parquet(root):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": [png(i) for i in range(32)], "label": [i % 4 for i in range(32)]}
    parquet.write_table(pa.table(columns), root / "t.parquet")
    return f"parquet:{root}?label=label"


def hf(root):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    images = [{"bytes": png(i), "path": None} for i in range(32)]
    columns = {"image": images, "label": [i % 4 for i in range(32)]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(root / "saved")
    return f"hf:{root / 'saved'}"


def imagenet(root):
    for i in range(32):
        put(root / "train" / CLASSES[i % 4] / f"{i}.png", png(i))
    return f"imagenet:{root}"


def medmnist(root):
    arrays = {}
    for number, part in enumerate(("train", "val", "test")):
        arrays[f"{part}_images"] = np.stack([image(i + 32 * number) for i in range(32)])
        arrays[f"{part}_labels"] = np.arange(32)[:, None] % 4
    np.savez_compressed(root / "octmnist.npz", **arrays)
    return f"medmnist:{root / 'octmnist.npz'}"


def dicom(root):
    pydicom = pytest.importorskip("pydicom", reason="needs 'vim-ssl[medical]'")
    for i in range(32):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        ds.SOPInstanceUID, ds.SeriesInstanceUID = pydicom.uid.generate_uid(), f"1.{i}"
        ds.Modality, ds.PatientID = ("CT", "MR", "US", "CR")[i % 4], str(i)
        ds.Rows = ds.Columns = SIDE
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = (image(i).astype(np.uint16) * 16).tobytes()
        ds.save_as(root / f"{i}.dcm", enforce_file_format=True)
    return f"dicom:{root}?label=modality"


def nifti(root):
    nibabel = pytest.importorskip("nibabel", reason="needs 'vim-ssl[medical]'")
    for kind in range(4):
        planes = np.stack([image(i) for i in range(kind, 32, 4)], -1).astype(np.int16)
        (root / CLASSES[kind]).mkdir()
        nibabel.save(nibabel.Nifti1Image(planes, np.eye(4)), root / CLASSES[kind] / "v.nii.gz")
    return f"nifti:{root}?label=folder"


def raster(path, values):
    rasterio = pytest.importorskip("rasterio", reason="needs 'vim-ssl[remote-sensing]'")
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=bands, dtype=values.dtype,
        transform=rasterio.Affine(10, 0, 0, 0, -10, 0),
    ) as file:  # fmt: skip
        file.write(values)


def geotiff(root):
    for i in range(32):
        values = image(i, 5).transpose(2, 0, 1).astype(np.uint16) * 20
        raster(root / CLASSES[i % 4] / f"{i}.tif", values)
    return f"geotiff:{root}?label=folder"


def eurosat(root):
    for i in range(32):
        values = image(i, 13).transpose(2, 0, 1).astype(np.uint16) * 20
        raster(root / EUROSAT_CLASSES[i % 4] / f"{i}.tif", values)
    for name in EUROSAT_CLASSES[4:]:
        raster(root / name / "x.tif", np.full((13, SIDE, SIDE), 1000, np.uint16))
    return f"eurosat:{root}"


def bigearthnet(root):
    names = ("Pastures", "Mixed forest", "Salines", "Estuaries")
    for i in range(32):
        patch = root / f"S2A_{i}_{i}"
        for band in BIGEARTHNET_BANDS:
            raster(patch / f"{patch.name}_{band}.tif", image(i)[None].astype(np.uint16) * 20)
        labels = json.dumps({"labels": [names[i % 4], "Airports"]})
        put(patch / f"{patch.name}_labels_metadata.json", labels.encode())
    return f"bigearthnet:{root}"


def slide(root):
    for kind in range(4):
        tiles = [image(i, 3) for i in range(kind, 32, 4)]
        (root / CLASSES[kind]).mkdir()
        Image.fromarray(np.hstack(tiles)).save(root / CLASSES[kind] / "slide.png")
    return f"slide:{root}?tile={SIDE}&tissue=none"


READERS = (
    folder, csv, parquet, hf, imagenet, medmnist, dicom, nifti, geotiff, eurosat, slide,
    pytest.param(bigearthnet, marks=pytest.mark.slow),  # 384 files
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "VIM_SSL_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_the_doctor_is_content_with_what_is_right(reader, tmp_path):
    spec = reader(tmp_path / "data")
    found = check(spec)
    told = ["train/ has 32"] if reader is imagenet else []  # of 1,281,167
    assert [problem.partition(" of ")[0] for problem in found.problems] == told
    data = open_data(spec, split="all")
    assert f"Read: {len(data):,} images, all." in found.facts
    rows = [line.split() for line in found.facts]
    assert ["split", "images", "labelled", "groups"] in rows
    counts = {row[0]: row[1:] for row in rows if len(row) == 4}
    for part in data.splits or [data.split]:
        held = open_data(spec, split=part)
        groups = "-" if held.groups is None else str(len(set(held.groups)))
        assert counts[part] == [str(len(held)), str(len(held)), groups]


@pytest.mark.skipif(not list_samples()["mnist5k"], reason="vim-ssl samples get mnist5k")
def test_the_doctor_is_content_with_a_sample_set():
    found = check("sample:mnist5k", sample=20)
    assert found.problems == []
    assert "Read: 40 images, of 5,000." in found.facts


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_32_images_are_learnt_by_heart(reader, tmp_path):
    data = open_data(reader(tmp_path / "data"))
    labels = [tuple(y) if isinstance(y, list) else y for y in data.labels]
    common = sorted(set(labels), key=labels.count)[-4:]
    data = data.subset(i for i, label in enumerate(labels) if label in common)
    assert len(data) >= 32
    encoder = load_encoder(
        "vim_nano_patch8_64", img_size=SIDE, depth=2, embed_dim=48, num_classes=len(data.classes),
        **band_arguments(data),
    )  # fmt: skip
    transform = create_transform(encoder)
    x = torch.stack([transform(item["image"]) for item in data])
    y = torch.tensor([item["label"] for item in data])
    encoder.train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    right = 0.0
    for _ in range(100):
        logits = encoder(x)
        several = y.ndim == 2
        loss = F.binary_cross_entropy_with_logits if several else F.cross_entropy
        optimizer.zero_grad()
        loss(logits, y.float() if several else y).backward()
        optimizer.step()
        right = float(((logits > 0) == y).float().mean() if several
                      else (logits.argmax(1) == y).float().mean())  # fmt: skip
        if right >= 0.999:
            return
    pytest.fail(f"{100 * right:.1f} % right after 100 steps")
