"""ImageNet's official layouts: labels by sorted synsets, one report of what is missing."""

import numpy as np
import pytest
from PIL import Image

from vim_ssl.data import labelled_splits, open_data

SYNSETS = ("n01440764", "n01443537", "n15075141")  # classes 0, 1 and 999


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(root / name)
    return root


def official(root, top=""):
    fill(root, *(f"{top}train/{synset}/{synset}_{i}.JPEG" for synset in SYNSETS for i in range(2)))
    return fill(root, *(f"{top}val/ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)))


def test_synset_folders(tmp_path, caplog):
    fill(tmp_path, "train/n15075141/a.JPEG", "train/n01440764/b.JPEG", "val/n15075141/c.JPEG")
    data = open_data(f"imagenet:{tmp_path}")
    assert data.splits == ["train", "val"]
    assert data.ids == ["train/n01440764/b.JPEG", "train/n15075141/a.JPEG"]
    assert data.labels == [0, 999]
    assert (len(data.classes), data.classes[0]) == (1000, "tench, Tinca tinca")
    assert data.faults == ["train/ has 2 of 1,281,167 images, of 2 of 1,000 classes"]
    assert data.faults[0] in caplog.text
    assert open_data(f"imagenet:{tmp_path}", split="validation").labels == [999]


@pytest.mark.parametrize("top", ["", "ILSVRC/Data/CLS-LOC/"], ids=["root", "kaggle"])
def test_flat_validation_by_the_solution(tmp_path, top):
    official(tmp_path, top)
    lines = ["ImageId,PredictionString"]
    lines += [f"ILSVRC2012_val_{i:08d},{s} 1 2 3 4 {s} 5 6 7 8" for i, s in
              ((3, SYNSETS[0]), (1, SYNSETS[2]), (2, SYNSETS[1]))]  # fmt: skip
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    train, val = labelled_splits(f"imagenet:{tmp_path}", 0.5, 0)
    assert train.labels == [0, 0, 1, 1, 999, 999]
    assert (val.split, val.labels) == ("val", [999, 1, 0])


def test_flat_validation_by_the_devkit(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    official(tmp_path)
    kit = tmp_path / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n")
    kind = [("ILSVRC2012_ID", object), ("WNID", object)]  # its numbers are in an order of their own
    synsets = np.array([(1, SYNSETS[2]), (2, SYNSETS[0]), (3, SYNSETS[1])], dtype=kind)
    scipy_io.savemat(kit / "meta.mat", {"synsets": synsets})
    assert open_data(f"imagenet:{tmp_path}?split=val").labels == [0, 1, 999]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        open_data(f"imagenet:{tmp_path / 'no'}")
    with pytest.raises(FileNotFoundError, match=r"neither train/ nor val/.*contains nothing"):
        open_data(f"imagenet:{tmp_path}")
    official(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"LOC_val_solution\.csv .*meta\.mat"):
        open_data(f"imagenet:{tmp_path}?split=val")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")
    with pytest.raises(ValueError, match="3 of 3 images in val/ have no label"):
        open_data(f"imagenet:{tmp_path}?split=val")
    fill(tmp_path, "train/cats/a.JPEG")
    with pytest.raises(ValueError, match=r"not synsets of ImageNet-1k, such as cats"):
        open_data(f"imagenet:{tmp_path}")
