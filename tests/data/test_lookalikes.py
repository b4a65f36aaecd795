"""Copies of an image that are not equal to it: found, with both names; other images are not."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from vim_ssl.data import check, lookalikes

pytest.importorskip("imagehash")


def photo(seed: int, side: int = 96) -> Image.Image:
    """Shapes of random colours, with smooth shading."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, width, height = rng.integers(5, side // 2, 4).tolist()
        draw.ellipse((x, y, x + width, y + height), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


CHANGES = {
    "recompressed": lambda image, path: image.save(path.with_suffix(".jpg"), quality=50),
    "enlarged": lambda image, path: image.resize((200, 200)).save(path),
    "reduced": lambda image, path: image.resize((64, 64)).save(path),
    "cropped": lambda image, path: image.crop((3, 3, 93, 93)).save(path),
    "one-side": lambda image, path: image.crop((5, 0, 96, 96)).save(path),
    "brightened": lambda image, path: ImageEnhance.Brightness(image).enhance(1.2).save(path),
}


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        path = tmp_path / ("test" if i % 3 == 0 else "train") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(path)
    return tmp_path


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_of_a_training_image_in_the_test_split_is_a_problem(folder, change):
    path = folder / "test" / "a" / "copy.png"
    CHANGES[change](photo(2), path)
    report = check.check(str(folder))
    (problem,) = report.problems
    ids = sorted(path.name for path in path.parent.glob("copy.*"))
    assert problem.startswith("1 pair of images in different splits look alike")
    assert f"train:train/a/2.png ≈ test:test/a/{ids[0]}" in problem


def test_a_changed_copy_in_one_split_is_a_remark_unless_a_group_keeps_them_together(tmp_path):
    for name in ("a/one.png", "b/other.png", "b/more.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo(len(name)).save(tmp_path / name)
    photo(len("a/one.png")).resize((150, 150)).save(tmp_path / "a" / "two.png")
    assert "a/one.png ≈ a/two.png" in check.check(str(tmp_path)).remarks[-1]
    remarks = check.check(f"folder:{tmp_path}?group=folder").remarks
    assert not any("≈" in line for line in remarks)


def test_other_images_do_not_look_alike(folder):
    rng = np.random.default_rng(0)
    for i in range(30):  # blank, nearly blank, noise, and small images of one kind
        target = folder / ("test" if i % 3 == 0 else "train") / "a"
        Image.new("L", (64, 64), 100 + i).save(target / f"blank{i}.png")
        Image.fromarray(rng.integers(250, 256, (64, 64), dtype=np.uint8)).save(
            target / f"paper{i}.png"
        )
        Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(
            target / f"noise{i}.png"
        )
        digit = Image.new("L", (28, 28))
        line = (10 + i % 4, 4 + i % 3, 16 - i % 5, 24 - i % 7)
        ImageDraw.Draw(digit).line(line, fill=255, width=2 + i % 2)
        digit.save(target / f"digit{i}.png")
    report = check.check(str(folder))
    assert not any("≈" in line for line in report.problems + report.remarks)


def test_every_near_hash_is_a_candidate_and_few_others_are_compared(monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (3000, 2), dtype=np.uint64)
    for i in range(1000):  # copies that differ in 0 to 4 bits anywhere
        bits = rng.choice(64, i % 5, replace=False)
        hashes[i + 1000, 0] = hashes[i, 0] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    compared = []
    count = lookalikes._bits_set
    monkeypatch.setattr(lookalikes, "_bits_set", lambda x: compared.append(len(x)) or count(x))
    pairs = np.concatenate(list(lookalikes._candidates(hashes)))
    assert {(a, b) for a, b, crop in pairs.tolist() if crop == 0} == {
        (i, i + 1000) for i in range(1000)
    }
    assert sum(compared[1::2]) < 1000  # of the other hash; one band of 13 bits has about 5,500


def test_what_is_not_searched_without_the_library_is_said(folder, monkeypatch):
    monkeypatch.setattr(check, "MISSING", True)
    assert "pip install imagehash" in str(check.check(str(folder)))
