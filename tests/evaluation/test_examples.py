"""Images that explain an evaluation: mistakes, neighbours, maps of the patch features."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import load_encoder
from vim_ssl.data import open_data
from vim_ssl.evaluation.examples import (
    NEIGHBOURS,
    QUERIES,
    SIDE,
    Viewer,
    feature_maps,
    nearest_neighbours,
    principal_colours,
    worst_mistakes,
    write_examples,
)

GREYS = range(0, 240, 12)  # one image each, recognisable by its grey


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("greys")
    for grey in GREYS:
        Image.new("L", (28, 28), grey).save(folder / f"{grey:03d}.png")
    return open_data(f"folder:{folder}")


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return load_encoder("vim_nano_patch4_28", depth=2).eval()


def grey_of(image: Image.Image) -> int:
    low, high = image.convert("L").getextrema()
    assert low == high
    return low


def test_an_image_is_shown_as_it_was(data, encoder):
    view = Viewer(data, encoder)
    assert [grey_of(view(id)) for id in data.ids] == list(GREYS)
    assert view(data.ids[0]).size == (28, 28)


def test_the_surest_mistakes_come_first(data, encoder):
    labels, predicted = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 1])
    likely = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]])
    view, names = Viewer(data, encoder), ["cat", "dog"]
    rows = worst_mistakes(view, data.ids[:4], labels, predicted, likely, names)
    assert [row["id"] for row in rows] == [data.ids[i] for i in (2, 3, 1)]
    assert [grey_of(row["image"]) for row in rows] == [GREYS[i] for i in (2, 3, 1)]
    first = {key: rows[0][key] for key in ("label", "predicted")}
    assert first == {"label": "dog", "predicted": "cat"}
    assert rows[0]["predicted_probability"] == pytest.approx(0.8)
    assert rows[0]["label_probability"] == pytest.approx(0.2)
    assert len(worst_mistakes(view, data.ids[:4], labels, predicted, likely, names, most=2)) == 2


@pytest.mark.parametrize("multi_label", [False, True])
def test_neighbours_are_the_images_with_the_most_similar_features(data, encoder, multi_label: bool):
    angles = torch.linspace(0, 1.5, len(data))
    x = torch.stack([angles.cos(), angles.sin()], 1)
    y = torch.arange(len(data)) % 2
    y = torch.nn.functional.one_hot(y) if multi_label else y
    view, split = Viewer(data, encoder), (data.ids, x, y)
    rows = nearest_neighbours(view, view, split, split, ["even", "odd"], standardise=False)
    assert len(rows) == QUERIES
    for row in rows:
        place = data.ids.index(row["id"])
        assert grey_of(row["image"]) == GREYS[place]
        assert row["neighbours"][0]["id"] == row["id"]  # itself is in this bank
        assert row["neighbours"][0]["similarity"] == pytest.approx(1)
        found = [data.ids.index(other["id"]) for other in row["neighbours"]]
        assert len(found) == NEIGHBOURS
        assert max(found) - min(found) == NEIGHBOURS - 1
        assert row["label"] == ("" if multi_label else ["even", "odd"][place % 2])


def test_colours_separate_what_the_features_separate():
    maps = torch.zeros(2, 16, 3, 4)
    maps[:, 5, :, :2] = 4.0  # the strongest direction: left against right
    maps[0, 9] = 1.0  # then: one image against the other
    colours, share = principal_colours(maps)
    assert colours.shape == (2, 3, 4, 3)
    assert share == pytest.approx(1)
    red, green = colours[..., 0], colours[..., 1]
    assert (red[:, :, :2] == 255).all()
    assert (red[:, :, 2:] == 0).all()
    assert (green[0] == 255).all()
    assert (green[1] == 0).all()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_few_or_constant_features_give_colours_all_the_same(width: int):
    colours, share = principal_colours(torch.ones(1, width, 2, 2))
    assert colours.shape == (1, 2, 2, 3)
    assert share == 0


def test_a_map_has_one_pixel_per_patch(data, encoder):
    found = feature_maps(Viewer(data, encoder), encoder, data.ids)
    assert 0 < found["share"] <= 1
    assert {row["map"].size for row in found["rows"]} == {(7, 7)}
    assert feature_maps(Viewer(data, encoder), encoder, []) == {}


def test_written_examples_replace_earlier_ones_and_nothing_else(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "mine.txt").write_text("kept")
    write_examples(tmp_path, mistakes=[{"image": Image.new("RGB", (9, 9))} for _ in range(3)])
    large = Image.fromarray(np.zeros((300, 600), np.uint8))
    write_examples(tmp_path, maps={"rows": [{"id": "ü\udce4", "image": large}], "share": 0.5})
    stored = json.loads((tmp_path / "examples" / "examples.json").read_text(encoding="utf-8"))
    assert stored["maps"]["share"] == 0.5
    (file,) = (tmp_path / "examples").glob("*.png")
    assert stored["maps"]["rows"][0]["image"] == file.name
    assert Image.open(file).size == (SIDE, SIDE // 2)
    assert (tmp_path / "examples" / "mine.txt").read_text() == "kept"
