"""Retrieval: equal texts are all right, equal features are in no order."""

import pytest
import torch
import torch.nn.functional as F

from vim_ssl.evaluation import retrieval
from vim_ssl.evaluation.retrieval import PairFeatures, chance, hits_at_k, recall


def pairs(images, texts, captions, owner=None) -> PairFeatures:
    owner = torch.arange(len(texts)) if owner is None else torch.tensor(owner)
    ids = [f"{i}.png" for i in range(len(images))]
    return PairFeatures(images, texts, owner, ids, captions, [])


@pytest.mark.parametrize("twin", ["a dog", " A  Dog", "a dog\n"])
def test_images_with_the_same_caption_are_all_right(twin):
    """Features that are perfect: of two equal texts neither is nearer."""
    x = torch.eye(4)[[0, 0, 1, 2]]
    found = recall(pairs(x, x, ["a dog", twin, "a cat", "a cow"]))
    assert set(found.values()) == {100.0}


def test_an_image_finds_the_text_that_another_image_has_too():
    images = torch.eye(3)
    texts = torch.eye(3)[[1, 0, 2]]  # the first two captions are nearer to one another's image
    assert recall(pairs(images, texts, ["x", "y", "z"]))["text_to_image_r1"] == pytest.approx(
        100 / 3
    )
    assert recall(pairs(images, texts, ["x", "x", "z"]))["text_to_image_r1"] == 100
    assert recall(pairs(images, texts, ["x", "x", "z"]))["image_to_text_r1"] == 100


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_collapsed_features_give_chance(noise):
    torch.manual_seed(0)
    owner = [i // 2 for i in range(12)]
    images, texts = (
        F.normalize(torch.ones(n, 8) + noise * torch.randn(n, 8), dim=1) for n in (6, 12)
    )
    of = pairs(images, texts, [f"caption {i}" for i in range(12)], owner)
    found, expected = recall(of), chance(of)
    for way in ("image_to_text", "text_to_image"):
        assert found[f"{way}_r1"] == pytest.approx(expected[way]) == pytest.approx(100 / 6)
    assert found["text_to_image_r5"] == pytest.approx(100 * 5 / 6)
    assert found["text_to_image_r10"] == 100


def test_some_queries_at_a_time_give_what_all_give(monkeypatch):
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 4), dim=1) for n in (7, 15))
    captions = [str(i % 9) for i in range(15)]
    of = pairs(images, texts, captions, [i % 7 for i in range(15)])
    whole = hits_at_k(of)
    monkeypatch.setattr(retrieval, "ROWS", 20)
    for name, hits in hits_at_k(of).items():
        assert torch.equal(hits, whole[name])
    right = torch.zeros(7, 15, dtype=torch.bool)
    for image in range(7):
        own = {captions[j] for j in range(15) if j % 7 == image}
        right[image] = torch.tensor([caption in own for caption in captions])
    best = (images @ texts.T).argmax(1)
    assert torch.equal(whole["image_to_text_r1"].bool(), right[torch.arange(7), best])
    best = (texts @ images.T).argmax(1)
    assert torch.equal(whole["text_to_image_r1"].bool(), right[best, torch.arange(15)])
