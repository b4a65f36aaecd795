"""Files that predictions of dense models write, read back by the libraries that users read them
with."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from vim_ssl import VimEncoder
from vim_ssl.data import ImageData, open_data
from vim_ssl.data.inputs import open_new
from vim_ssl.data.labels import IGNORE
from vim_ssl.downstream import predict as predict_script
from vim_ssl.tasks.detection import Detection
from vim_ssl.tasks.outputs import BoxWriter, MaskWriter
from vim_ssl.tasks.prediction import predict_data
from vim_ssl.tasks.segmentation import Segmentation

CLASSES = ["ground", "tree", "house"]
# Values of the classes in the images here; a `Brightness` model recovers the class.
GREY = np.array([20, 120, 220], np.uint8)


def encoder(**changes) -> VimEncoder:
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_classes": 0}
    return VimEncoder(**(settings | changes))


class Brightness(Segmentation):
    """A model that is always right: the class of a pixel is its brightness."""

    def predict_image(self, image):
        values = np.asarray(image.convert("L") if isinstance(image, Image.Image) else image[..., 0])
        return np.searchsorted([70, 170], np.nan_to_num(values.astype(float))).astype(np.uint8)


def segmentation(kind=Brightness, **changes) -> Segmentation:
    return kind(encoder(**changes), CLASSES, head="linear", window=16).eval()


def labels(height=30, width=40, seed=0) -> np.ndarray:
    """Class numbers in blocks of 10 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 3, (-(-height // 10), -(-width // 10)))
    return np.kron(blocks, np.ones((10, 10), int))[:height, :width].astype(np.uint8)


def draw(path, mask, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GREY[mask]).convert("RGB").save(path, **options)


def predict(data, output, model=None, writer=MaskWriter, **options):
    model = model or segmentation()
    data = open_new(data) if isinstance(data, str) else data
    return predict_data(model, data, writer(output, model, data, **options), quiet=True)


def rows(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def files(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ------------------------------------------------------------------------- images


def test_masks_lie_where_the_images_lie_and_train_the_next_model(tmp_path):
    """Also of names with spaces and in sub-folders: read as ``masks:``, they fit the images."""
    truth = {}
    for i, name in enumerate(["a.jpg", "sub/a.png", "sub/deep er/b c.tif", "v1.2 x.png"]):
        truth[name] = labels(13 + 9 * i, 25 + 4 * i, seed=i)
        options = {"quality": 100} if name.endswith("jpg") else {}
        draw(tmp_path / "images" / name, truth[name], **options)
    predicted = predict(str(tmp_path / "images"), tmp_path / "out")
    pixels = np.concatenate([mask.ravel() for mask in truth.values()])
    counts = dict(zip(CLASSES, np.bincount(pixels).tolist(), strict=True))
    assert (predicted.images, predicted.counts, predicted.unit) == (4, counts, "pixels")
    shutil.copytree(tmp_path / "images", tmp_path / "out/images")
    data = open_data(f"masks:{tmp_path}/out")
    assert (len(data), data.classes) == (4, CLASSES)
    for item in data:
        assert np.array_equal(item["mask"], truth[item["id"]]), item["id"]
    table = rows(tmp_path / "out/images.csv")
    assert [row["id"] for row in table] == sorted(truth)
    for row in table:
        mask = truth[row["id"]]
        assert [int(row[name]) for name in CLASSES] == np.bincount(
            mask.ravel(), minlength=3
        ).tolist()
        assert (int(row["height"]), int(row["width"])) == mask.shape
        assert (tmp_path / "out" / row["file"]).is_file()
    table = rows(tmp_path / "out/classes.csv")
    assert [(row["number"], row["name"], int(row["pixels"])) for row in table] == [
        (str(i), name, counts[name]) for i, name in enumerate(CLASSES)
    ]
    assert sum(float(row["fraction"]) for row in table) == pytest.approx(1, abs=2e-4)


def test_an_overlay_shows_image_classes_and_legend(tmp_path):
    mask = np.repeat([[0, 1, 2]], 400, 0).repeat(200, 1).astype(np.uint8)
    draw(tmp_path / "images/a.png", mask)
    predict(str(tmp_path / "images"), tmp_path / "out")
    overlay = np.asarray(Image.open(tmp_path / "out/overlays/a.jpg"), int)
    assert 400 + 20 < len(overlay) < 400 + 60
    near = [np.abs(overlay[200, 6 + x] - GREY[i]).max() for i, x in enumerate((100, 300, 500))]
    assert near[0] <= 3  # class 0 is not painted
    assert min(near[1:]) > 30
    for swatch in ((230, 25, 75), (0, 130, 255)):
        assert (np.abs(overlay[410:] - swatch).max(-1) < 20).sum() > 80
    predict(str(tmp_path / "images"), tmp_path / "bare", overlays=False)
    assert files(tmp_path / "bare") == [
        "classes.csv",
        "classes.txt",
        "images.csv",
        "masks/a.png",
        "record.json",
    ]


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_mask_lies_on_the_upright_image(tmp_path, orientation):
    mask = labels(30, 50)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: 2, 6: 1}[orientation]  # quarter turns that the viewer undoes
    draw(tmp_path / "images/a.png", np.rot90(mask, turn), exif=exif)
    predict(str(tmp_path / "images"), tmp_path / "out")
    written = np.asarray(Image.open(tmp_path / "out/masks/a.png"))
    assert np.array_equal(written, mask)


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode there")
def test_a_name_that_is_not_utf8(tmp_path):
    draw(tmp_path / "a.png", labels())
    folder = os.fsencode(tmp_path / "images")
    os.mkdir(folder)
    try:
        os.rename(tmp_path / "a.png", folder + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system accepts UTF-8 names only")
    predict(str(tmp_path / "images"), tmp_path / "out")
    assert os.listdir(os.fsencode(tmp_path / "out/masks")) == [b"caf\xe9.png"]
    assert rows(tmp_path / "out/images.csv")[0]["file"] == r"masks/caf\udce9.png"


def test_images_of_the_same_name_up_to_the_ending_keep_it(tmp_path):
    for i, name in enumerate(["a.png", "a.bmp", "b.png"]):
        draw(tmp_path / "images" / name, labels(seed=i))
    predict(str(tmp_path / "images"), tmp_path / "out", overlays=False)
    assert files(tmp_path / "out/masks") == ["a.bmp.png", "a.png.png", "b.png"]


def test_no_image_or_volume_overwrites_another(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    names = ["../a.png", "a.png", "a.jpg", "b.png.jpg", "b.png", "b.jpg"]
    for i, name in enumerate(names):
        draw(tmp_path / "data/list" / name, labels(seed=i))
    (tmp_path / "data/list/all.csv").write_text("path\n" + "\n".join(names) + "\n")
    predict(f"csv:{tmp_path}/data/list/all.csv", tmp_path / "out")
    written = {row["file"] for row in rows(tmp_path / "out/images.csv")}
    assert len(written) == len(files(tmp_path / "out/overlays")) == len(names)
    assert {f"masks/{name}" for name in files(tmp_path / "out/masks")} == written
    (tmp_path / "scans").mkdir()
    for i, name in enumerate(["a.nii", "a.nii.gz"]):
        volume = GREY[labels(8, 8, seed=i)][..., None].repeat(2, 2)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "scans" / name)
    predict(f"nifti:{tmp_path}/scans?window=0,255", tmp_path / "masked")
    assert files(tmp_path / "masked/masks") == ["a.nii.gz.nii.gz", "a.nii.nii.gz"]
    assert len(files(tmp_path / "masked/overlays")) == 2


def test_ids_do_not_lead_out_of_the_folder(tmp_path):
    draw(tmp_path / "a.png", labels())
    item = {"image": Image.open(tmp_path / "a.png"), "id": "/../..\\up/C:/a.png"}
    record = MaskWriter(tmp_path / "out", segmentation()).write(item, labels())
    assert record["file"] == "masks/up/C/a.png"
    assert files(tmp_path) == ["a.png", "out/masks/up/C/a.png", "out/overlays/up/C/a.jpg"]


def test_a_real_model_writes_what_it_predicts(tmp_path):
    draw(tmp_path / "images/a.png", labels(21, 50))
    model = segmentation(Segmentation)
    predict(str(tmp_path / "images"), tmp_path / "out", model)
    written = np.asarray(Image.open(tmp_path / "out/masks/a.png"))
    assert np.array_equal(written, model.predict(tmp_path / "images/a.png"))


# ------------------------------------------------------------------------- rasters


def raster(path, values, **options):
    """A GeoTIFF of values (bands, h, w), with pixels of 10 x 10 m."""
    rasterio = pytest.importorskip("rasterio", reason="needs pip install 'vim-ssl[remote-sensing]'")
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=values.dtype,
        **(place | options),
    ) as file:  # fmt: skip
        file.write(values)
    return rasterio, place


@pytest.mark.parametrize(
    ("bands", "query"),
    [(3, ""), (3, "?tile=32"), (3, "?tile=32&overlap=8"), (5, "?tile=80&overlap=8")],
)
def test_a_raster_is_labelled_where_it_lies(tmp_path, query, bands):
    """Also from tiles, which come together as one file; without an overlap, what is left at the
    right and lower border has no prediction."""
    mask = labels(75, 90)
    values = np.stack([GREY[mask]] * bands).astype(np.uint8 if bands == 3 else np.uint16)
    rasterio, place = raster(tmp_path / "in/north/a.tif", values)
    raster(tmp_path / "in/b.tiff", values[:, :40, :40])
    model = segmentation(in_chans=bands, data_config={"mean": (100.0,) * 5, "std": (50.0,) * 5}
                         if bands == 5 else None)  # fmt: skip
    predicted = predict(f"geotiff:{tmp_path}/in{query}", tmp_path / "out", model)
    with rasterio.open(tmp_path / "out/masks/north/a.tif") as file:
        assert (file.crs, file.transform) == tuple(place.values())
        written = file.read(1)
    seen = np.full((75, 90), query != "?tile=32")
    seen[:64, :64] = True
    assert np.array_equal(written, np.where(seen, mask, IGNORE))
    assert files(tmp_path / "out") == [
        "classes.csv", "classes.txt", "images.csv", "masks/b.tiff", "masks/north/a.tif",
        "overlays/b.jpg", "overlays/north/a.jpg", "record.json",
    ]  # fmt: skip
    row = next(row for row in rows(tmp_path / "out/images.csv") if row["id"].startswith("north"))
    assert [int(row[name]) for name in CLASSES] == np.bincount(mask[seen], minlength=3).tolist()
    assert (row["width"], row["height"]) == ("90", "75")
    assert (row["pixel_size"], row["unit"], int(row["no_prediction"])) == (
        "100",
        "m2",
        (~seen).sum(),
    )
    assert sum(predicted.counts.values()) == seen.sum() + (1600 if query != "?tile=32" else 1024)


@pytest.mark.parametrize("query", ["", "?tile=16&overlap=4"])
def test_rasters_of_the_same_name_up_to_the_ending_have_files_of_their_own(tmp_path, query):
    masks = {name: labels(20, 30, seed) for seed, name in enumerate(("a.tif", "a.jp2", "b/a.tif"))}
    for name, mask in masks.items():
        rasterio, _ = raster(tmp_path / "in" / name, np.stack([GREY[mask]] * 3))
    predict(f"geotiff:{tmp_path}/in/**/a.*{query}", tmp_path / "out")
    written = {row["id"]: row["file"] for row in rows(tmp_path / "out/images.csv")}
    assert len(set(written.values())) == 3
    for name, mask in masks.items():
        with rasterio.open(tmp_path / "out" / written[name]) as file:
            assert np.array_equal(file.read(1), mask), name
            assert [file.tags(1)[f"CLASS_{i}"] for i in range(3)] == CLASSES


def test_pixels_without_data_have_no_prediction(tmp_path):
    values = np.stack([GREY[labels(20, 30)]] * 3)
    values[:, :5] = 0
    rasterio, _ = raster(tmp_path / "a.tif", values, nodata=0, crs="EPSG:4326")
    predict(f"geotiff:{tmp_path}/a.tif", tmp_path / "out")
    with rasterio.open(tmp_path / "out/masks/a.tif") as file:
        written = file.read(1)
    assert (written[:5] == IGNORE).all()
    assert (written[5:] != IGNORE).all()
    (row,) = rows(tmp_path / "out/images.csv")
    assert (row["unit"], row["no_prediction"]) == ("pixel", "150")  # degrees are not lengths


# ------------------------------------------------------------------------- volumes


@pytest.mark.parametrize(("axis", "turned"), [(0, True), (1, True), (2, False), (2, True)])
def test_a_volume_is_labelled_in_its_axes_and_position(tmp_path, axis, turned):
    nibabel = pytest.importorskip("nibabel", reason="needs pip install 'vim-ssl[medical]'")
    affine = np.diag([2.0, 3, 4, 1])
    if turned:
        affine = np.array([[0, -2, 0, 9], [0, 0, 3, -7], [-4, 0, 0, 5], [0, 0, 0, 1.0]])
    truth = np.random.default_rng(0).integers(0, 3, (5, 7, 6)).astype(np.uint8)
    image = nibabel.Nifti1Image(GREY[truth].astype(np.int16), affine)
    image.set_qform(affine, 0)
    image.set_sform(affine, 2)
    image.header.set_xyzt_units("mm")
    (tmp_path / "in/p1").mkdir(parents=True)
    nibabel.save(image, tmp_path / "in/p1/scan.nii")
    predict(f"nifti:{tmp_path}/in?axis={axis}&window=0,255", tmp_path / "out")
    written = nibabel.load(tmp_path / "out/masks/p1/scan.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), truth)
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_allclose(written.affine, affine)
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (0, 2)
    assert written.header.get_xyzt_units()[0] == "mm"
    assert files(tmp_path / "out") == [
        "classes.csv", "classes.txt", "images.csv", "masks/p1/scan.nii.gz", "overlays/p1/scan.jpg",
        "record.json",
    ]  # fmt: skip
    (row,) = rows(tmp_path / "out/images.csv")
    assert [int(row[name]) for name in CLASSES] == np.bincount(truth.ravel()).tolist()
    assert (row["id"], row["pixel_size"], row["unit"]) == ("p1/scan.nii", "24", "mm3")
    assert row["no_prediction"] == "0"


@pytest.mark.parametrize("codes", [(1, 2), (1, 0), (0, 2), (0, 0)])
def test_a_volume_keeps_both_of_its_positions(tmp_path, codes):
    nibabel = pytest.importorskip("nibabel", reason="needs pip install 'vim-ssl[medical]'")
    scanner, aligned = np.diag([2.0, 3, 4, 1]), np.diag([2.0, 3, 4, 1])
    aligned[:3, 3] = 5, 6, 7
    image = nibabel.Nifti1Image(GREY[labels(5, 7)[..., None].repeat(2, 2)], None)
    image.header.set_zooms((2, 3, 4))
    image.set_qform(scanner if codes[0] else None, codes[0])
    image.set_sform(aligned if codes[1] else None, codes[1])
    nibabel.save(image, tmp_path / "a.nii.gz")
    predict(f"nifti:{tmp_path}/a.nii.gz?window=0,255", tmp_path / "out")
    source, written = (nibabel.load(tmp_path / path) for path in ("a.nii.gz", "out/masks/a.nii.gz"))
    np.testing.assert_allclose(written.affine, source.affine)
    assert written.header.get_zooms() == source.header.get_zooms()
    for get in ("get_qform", "get_sform"):
        (here, code), (there, expected) = (getattr(x, get)(coded=True) for x in (written, source))
        assert code == expected
        if code:
            np.testing.assert_allclose(here, there, atol=1e-6)


def test_a_plane_that_was_not_predicted_has_no_class(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="needs pip install 'vim-ssl[medical]'")
    truth = np.random.default_rng(0).integers(0, 3, (5, 7, 6)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(GREY[truth], np.eye(4)), tmp_path / "a.nii.gz")
    data = open_data(f"nifti:{tmp_path}/a.nii.gz?window=0,255").subset([0, 1, 2, 4, 5])
    predict(data, tmp_path / "out")
    written = np.asarray(nibabel.load(tmp_path / "out/masks/a.nii.gz").dataobj)
    truth[:, :, 3] = IGNORE
    assert np.array_equal(written, truth)
    assert rows(tmp_path / "out/images.csv")[0]["no_prediction"] == "35"


# ------------------------------------------------------------------------- kills


@pytest.mark.parametrize("stop", ["write", "finish", "parts"])
def test_a_killed_prediction_is_resumed(tmp_path, monkeypatch, stop):
    """In the middle of the tiles, before the tables, and while the parts are removed."""
    mask = labels(75, 90)
    rasterio, _ = raster(tmp_path / "a.tif", np.stack([GREY[mask]] * 3))
    spec, model, out = (
        f"geotiff:{tmp_path}/a.tif?tile=32&overlap=8",
        segmentation(),
        tmp_path / "out",
    )
    whole = predict(spec, tmp_path / "whole", model)
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) > 3 or stop != "write":
            raise KeyboardInterrupt
        return write(*args, **options)

    write = MaskWriter.write
    where = {"write": (MaskWriter, "write"), "finish": (MaskWriter, "_table"),
             "parts": (shutil, "rmtree")}[stop]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(*where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict(spec, out, model)
    assert predict(spec, out, model).counts == whole.counts
    with rasterio.open(out / "masks/a.tif") as file:
        assert np.array_equal(file.read(1), mask)
    for name in files(tmp_path / "whole"):
        if name != "record.json":
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert files(out) == files(tmp_path / "whole")


# ------------------------------------------------------------------------- objects


class Boxes(Detection):
    """A model that detects the same objects in every image."""

    def predict_image(self, image):
        boxes = np.array([[2, 1, 12, 9], [0, 0, 5, 5], [4, 4, 8, 10]], np.float32)
        masks = np.zeros((3, image.height, image.width), bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
            mask[top:bottom, left:right] = True
        masks[0, 1] = False
        result = {"boxes": boxes, "labels": np.array([1, 0, 1]),
                  "scores": np.array([0.9, 0.6, 0.2], np.float32)}  # fmt: skip
        return result | ({"masks": masks} if self.masks else {})


def detector(kind=Boxes, masks=True) -> Detection:
    return kind(encoder(img_size=64), ["cat", "dog"], masks=masks, size=64, channels=8, convs=0,
                hidden=8, anchor=8, samples=8).eval()  # fmt: skip


@pytest.mark.parametrize("masks", [True, False])
def test_objects_are_a_coco_file_and_results(tmp_path, masks):
    coco = pytest.importorskip("pycocotools.coco", reason="needs pip install 'vim-ssl[detection]'")
    for name, size in (("sub/a b.jpg", (20, 12)), ("z.png", (90, 31))):
        (tmp_path / "in/sub").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "green").save(tmp_path / "in" / name)
    out = tmp_path / "out"
    predicted = predict(str(tmp_path / "in"), out, detector(masks=masks), BoxWriter)
    assert (predicted.unit, predicted.counts) == ("objects", {"cat": 2, "dog": 2})
    document = coco.COCO(out / "predictions.json")
    assert [image["file_name"] for image in document.loadImgs([1, 2])] == ["sub/a b.jpg", "z.png"]
    assert document.imgs[2] == {"id": 2, "file_name": "z.png", "width": 90, "height": 31}
    assert [(c["id"], c["name"]) for c in document.loadCats([1, 2])] == [(1, "cat"), (2, "dog")]
    assert len(document.anns) == 4  # from the score of 0.5 on
    dog, cat = document.loadAnns(document.getAnnIds(imgIds=1))
    assert (dog["bbox"], dog["score"], dog["category_id"]) == ([2, 1, 10, 8], 0.9, 2)
    assert (dog["area"], cat["area"]) == ((70, 25) if masks else (80, 25))
    assert ("segmentation" in dog) == masks
    if masks:
        mask = document.annToMask(dog)
        assert mask.shape == (12, 20)
        assert mask[1, 2:12].tolist() == [0] * 10
        assert mask[2:9, 2:12].all()
    every = document.loadRes(str(out / "results.json"))
    assert len(every.anns) == 6
    assert {one["score"] for one in every.dataset["annotations"]} == {0.9, 0.6, 0.2}
    assert files(out / "drawings") == ["sub/a b.jpg", "z.jpg"]
    assert [(r["name"], r["objects"], r["images"]) for r in rows(out / "classes.csv")] == [
        ("cat", "2", "2"), ("dog", "2", "2")
    ]  # fmt: skip
    assert [(r["file_name"], r["objects"], r["dog"]) for r in rows(out / "images.csv")] == [
        ("sub/a b.jpg", "2", "1"), ("z.png", "2", "1")
    ]  # fmt: skip


@pytest.mark.parametrize(("score", "count"), [(0, 3), (0.5, 2), (0.95, 0)])
def test_the_score_chooses_the_objects(tmp_path, score, count):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    predicted = predict(
        str(tmp_path / "a.png"), tmp_path / "out", detector(masks=False), BoxWriter, score=score
    )
    assert sum(predicted.counts.values()) == count
    document = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [one["id"] for one in document["annotations"]] == list(range(1, count + 1))
    assert len(json.loads((tmp_path / "out/results.json").read_text())) == 3
    drawing = np.asarray(Image.open(tmp_path / "out/drawings/a.jpg"), int)[6:-40]
    assert ((np.abs(drawing - (0, 130, 255)).max(-1) < 60).any()) == (count > 0)


def test_a_wrong_score_is_refused(tmp_path):
    with pytest.raises(ValueError, match="score is 50; expected 0 to 1"):
        BoxWriter(tmp_path, detector(), score=50)


def test_results_of_a_coco_file_have_its_ids(tmp_path):
    """So that they can be evaluated with the original file."""
    coco = pytest.importorskip("pycocotools.coco", reason="needs pip install 'vim-ssl[detection]'")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images/a.png")
    entry = {"id": 77, "file_name": "a.png", "width": 40, "height": 30}
    box = {"id": 1, "image_id": 77, "category_id": 9, "bbox": [2, 1, 10, 8], "area": 80,
           "iscrowd": 0}  # fmt: skip
    categories = [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}]
    path = tmp_path / "annotations/val.json"
    path.write_text(json.dumps({"images": [entry], "annotations": [box], "categories": categories}))
    predict(f"coco:{tmp_path}", tmp_path / "out", detector(masks=False), BoxWriter)
    results = coco.COCO(path).loadRes(str(tmp_path / "out/results.json")).dataset["annotations"]
    assert [(one["image_id"], one["category_id"]) for one in results] == [(77, 9), (77, 4), (77, 9)]
    document = json.loads((tmp_path / "out/predictions.json").read_text())
    assert (document["images"], document["categories"]) == ([entry], categories)


def test_objects_are_detected_in_a_raster_with_missing_pixels(tmp_path):
    bands = (GREY[labels(50, 70)][..., None] / np.float32(255)).repeat(3, 2)
    bands[:5] = np.nan
    data = ImageData([bands], ["a.tif"], name="rasters", bands=["R", "G", "B"])
    predicted = predict(data, tmp_path / "out", detector(Detection, masks=False), BoxWriter)
    assert predicted.images == 1
    document = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [(image["width"], image["height"]) for image in document["images"]] == [(70, 50)]
    assert files(tmp_path / "out/drawings") == ["a.jpg"]


def test_a_real_detector_writes_what_it_detects(tmp_path):
    Image.fromarray(GREY[labels(50, 70)]).save(tmp_path / "a.png")
    model = detector(Detection)
    predict(str(tmp_path / "a.png"), tmp_path / "out", model, BoxWriter, score=0)
    found = model.predict(tmp_path / "a.png")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results) == len(found["boxes"]) > 0
    assert [one["score"] for one in results] == pytest.approx(found["scores"].tolist(), abs=1e-5)


# ------------------------------------------------------------------------- the command


def run_of(tmp_path, model, data: str) -> str:
    model.save(tmp_path / "run", {"data": data})
    return str(tmp_path / "run")


def test_a_raster_above_the_limit_is_labelled_by_command(tmp_path, monkeypatch, capsys):
    """In tiles that nobody asked for, with the margin of a window."""
    monkeypatch.setenv("VIM_SSL_MAX_PIXELS", "3000")
    monkeypatch.setattr("vim_ssl.data.inputs.TILE", 48)
    mask = labels(75, 90)
    rasterio, place = raster(tmp_path / "in/a.tif", np.stack([GREY[mask]] * 3))
    model = segmentation(Segmentation)
    run, out = run_of(tmp_path, model, "geotiff:elsewhere"), tmp_path / "out"
    argv = ["--encoder", run, "--data", str(tmp_path / "in"), "--output", str(out)]
    assert predict_script.main(argv) == 0
    assert "pixels" in capsys.readouterr().out
    with rasterio.open(out / "masks/a.tif") as file:
        written = file.read(1)
        assert file.transform == place["transform"]
    whole = model.predict_image(Image.fromarray(GREY[mask]).convert("RGB"))
    assert (written == whole).mean() > 0.9
    assert (written != IGNORE).all()


def test_objects_are_detected_by_command(tmp_path, capsys):
    Image.fromarray(GREY[labels(50, 70)]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    run = run_of(tmp_path, detector(Detection), "")
    argv = ["--encoder", run, "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert predict_script.main([*argv, "--score", "0", "--no-overlays"]) == 0
    assert "1 could not be read: b.png" in capsys.readouterr().out
    assert files(tmp_path / "out") == [
        "classes.csv", "images.csv", "predictions.json", "record.json", "results.json"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="detection writes a folder; give a folder"):
        predict_script.main([*argv[:-1], "out.csv"])


def test_masks_that_do_not_fit_their_images_do_not_matter(tmp_path):
    mask = labels()
    draw(tmp_path / "images/a.png", mask)
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask[:9]).save(tmp_path / "masks/a.png")
    predict(f"masks:{tmp_path}", tmp_path / "out")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/masks/a.png")), mask)
