"""CLIP on emoji: the queries, the ranks of their answers, and the tables."""

import csv
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import create_transform, load_encoder
from vim_ssl.data import open_data
from vim_ssl.data.samples.fetch import list_samples

ROOT = Path(__file__).parents[2]
EMOJI = ("fluent-emoji", "noto-emoji", "twemoji")
needs_emoji = pytest.mark.skipif(
    not all(map(list_samples().get, EMOJI)), reason=f"vim-ssl samples get {' '.join(EMOJI)}"
)


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("emoji_clip")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


# ------------------------------------------------------------------ what is asked


@pytest.mark.parametrize(
    ("captions", "concept"),
    [
        (("man running", "woman running: facing right", "person running: dark skin tone"),
         "running"),
        (("woman and man holding hands", "men holding hands: light skin tone"), "holding hands"),
        (("man", "person: red hair", "woman: bald"), "person"),
        (("boy", "girl: dark skin tone", "child"), "child"),
        (("Mrs. Claus", "Mx Claus", "Santa Claus"), "claus"),
        (("merman", "mermaid", "merperson"), "mermaid"),
        (("prince", "princess", "person with crown"), "princess"),
        (("family: man, boy", "family: adult, adult, child"), "family"),
        (("flag: Isle of Man",), "flag: isle of man"),
        (("snowman",), "snowman"),
        (("personal computer",), "personal computer"),
    ],
)  # fmt: skip
def test_a_concept_is_what_is_drawn_whoever_is_drawn(bench, captions, concept):
    assert {bench.concept(caption) for caption in captions} == {concept}


@needs_emoji
def test_no_concept_is_asked_about_as_unseen_that_was_trained_on(bench):
    """Not even as another gender, which the sample sets let pass."""
    asked = bench.test_sets(bench.training_sets())
    data = open_data(bench.CLIP.data)
    trained = {c for i in range(len(data)) for c in data.captions(i)}
    concepts = {bench.concept(caption) for caption in trained}
    held_out = open_data("sample:fluent-emoji?split=test")
    leaks = {bench.concept(c) for i in range(len(held_out)) for c in held_out.captions(i)}
    assert leaks & concepts
    assert not set(asked["unseen"].concepts) & concepts
    assert set(asked["seen"].captions) <= trained
    assert [len(part.captions) for part in asked.values()] == [1480, 313]
    for part in asked.values():
        assert len(set(part.captions)) == len(part.captions)
        assert part.concepts == sorted(part.concepts)
        for i in (0, len(part.captions) - 1):
            assert part.data.captions(i) == [part.captions[i]]
            assert part.data.labels[i] == part.labels["category"][i]


# ------------------------------------------------------------------ how it is answered


def test_a_right_answer_stands_behind_its_equals(bench):
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [float("nan")] * 3])
    places = bench.ranks(scores, torch.tensor([0, 1, 0, 1]))
    assert places.tolist() == [1, 3, 3, 3]


def some(bench, captions: list[str], labels: list[int], classes: int = 2):
    kinds = bench.QUESTIONS[2:]
    return bench.Queries(
        None, captions, captions, {kind: torch.tensor(labels) for kind in kinds},
        {kind: [str(i) for i in range(classes)] for kind in kinds},
    )  # fmt: skip


def test_the_nearest_drawing_gives_caption_and_category(bench):
    """Of two vendors; the second's cat is nearest to the cat. One drawing is of something else."""
    trained = [some(bench, ["dog", "cat"], [0, 1]), some(bench, ["cat", "cow"], [1, 0])]
    part = some(bench, ["cat", "dog"], [1, 0])
    bank = torch.tensor([[0.0], [9.0], [2.0], [1.5]])
    found = bench.neighbour_scores(torch.tensor([[2.1], [0.1]]), bank, trained, part)
    torch.testing.assert_close(found["caption"], torch.tensor([[-0.1, -2.1], [-1.9, -0.1]]))
    assert torch.equal(found["picture"], found["caption"].T)
    torch.testing.assert_close(found["category"], torch.tensor([[-0.6, -0.1], [-0.1, -1.9]]))
    unseen = some(bench, ["owl"], [1])
    assert set(bench.neighbour_scores(bank[:1], bank, trained, unseen)) == set(bench.QUESTIONS[2:])


def test_colours_count_wherever_they_stand(bench):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[1] = images[0].flip(2)
    features = bench.colours(images, 4)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    distance = torch.cdist(features, features)
    assert distance[0, 1] < 1e-3 < distance[0, 2]
    assert torch.cdist(bench.small(images, 4), bench.small(images, 4))[0, 1] > 0.1


# ------------------------------------------------------------------ rows and tables


def row(bench, arm: str, seed: int, places: list[int], question="caption", concepts="seen", m=20):
    """The columns of a row, as they come out of the CSV file; four images of three concepts."""
    part = some(bench, ["a", "a", "b", "c"], [0] * 4)
    scores = -torch.arange(float(m)).repeat(4, 1)
    part.labels[question] = torch.tensor(places) - 1
    found = bench.answers(scores, question, part)
    row = {
        "arm": arm,
        "seed": seed,
        "epochs": 8.0,
        "concepts": concepts,
        "question": question,
        **found,
    }
    return {key: str(value) for key, value in row.items()}


def test_a_row_has_the_place_of_every_right_answer(bench):
    found = row(bench, "vim", 0, [1, 10, 5, 11])
    assert found["ranks"] == "1x 5 ."
    assert (found["asked"], found["answers"]) == ("4", "20")
    assert (found["r1"], found["r5"], found["r10"]) == ("25.0", "50.0", "75.0")
    results = importlib.import_module("emoji_tables").Results([found])
    values = [results.recall("vim", "seen", "caption", k).value for k in (1, 5, 10)]
    assert values == [25.0, 50.0, 75.0]
    assert results.groups("seen", "caption") == [0, 0, 1, 2]


def test_tables_average_seeds_and_pair_images(bench):
    took = {"parameters": "1000000", "cpu_seconds": "400.4",
            "mae_seconds": "60"}  # fmt: skip
    rows = [
        row(bench, "vim", 0, [1, 1, 1, 1]) | took, row(bench, "vim", 1, [1, 1, 1, 20]) | took,
        row(bench, "pixels", 0, [20, 20, 20, 1]),
        row(bench, "vim", 0, [1, 1, 1, 1], "category"),
    ]  # fmt: skip
    text = bench.tables([row(bench, "vim", 1, [9, 9, 9, 9]), *rows])  # the first row came again
    assert "| Vim | 1.00 M | 2 | 8.0 | 400 | 60 |" in text
    assert "seen concepts (4 images of 3)" in text
    assert "| Vim | 87.5 ± 17.7 / 87.5 / 87.5 |  | 100.0 |  |" in text
    assert "| nearest training drawing, pixels | 25.0 / 25.0 / 25.0 |" in text
    assert "| chance | 5.0 / 25.0 / 50.0 |" in text
    # Three concepts are too few for an interval.
    assert "Vim − nearest training drawing, pixels | +62.5 [none]" in text
    assert "ViT" not in text
    assert "unseen" not in text


def test_a_campaign_goes_on_where_it_was_cut_off(bench, tmp_path, monkeypatch):
    done = [row(bench, "vim", 0, [1] * 4, q, c) for c in bench.SETS for q in bench.QUESTIONS]
    cut = [row(bench, "vit", 0, [1] * 4, q) for q in bench.QUESTIONS]
    with open(tmp_path / bench.TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, bench.COLUMNS)
        writer.writeheader()
        writer.writerows(done + cut)
    monkeypatch.setattr(bench, "costs", lambda *_: {"vim": 3.0, "vit": 2.0})
    asked = []
    monkeypatch.setattr(bench, "run_jobs", lambda script, out, jobs, at_once: asked.extend(jobs))
    bench.measure(tmp_path, [0, 1], 8.0, 2)
    left = [(arm, seed) for arm, seed, _ in asked]
    assert ("vim", 0) not in left
    assert {("vim", 1), ("vit", 0), ("vim after mae", 0), ("pixels", 0)} <= set(left)
    epochs = {arm: epochs for arm, _, epochs in asked}
    assert epochs["vit"] == pytest.approx(1.5 * epochs["vim"])
    assert epochs["vim after mae"] == epochs["vim"] == 8
    with pytest.raises(ValueError, match=r"rows with 8.0 epochs, but --epochs is 24"):
        bench.measure(tmp_path, [0, 1], 24.0, 2)


# ------------------------------------------------------------------ training


@pytest.mark.slow
@needs_emoji
@pytest.mark.parametrize("arm", ["vim", "vit", "vim after mae"])
def test_every_arm_trains_and_answers(bench, arm, tmp_path, monkeypatch):
    few = "sample:noto-emoji?split=train&limit=16 + sample:twemoji?split=train&limit=16"
    small = {"data": few, "batch_size": 16, "model_args": {"depth": 1, "embed_dim": 48}}
    monkeypatch.setattr(bench, "CLIP", replace(bench.CLIP, text_depth=1, **small))
    monkeypatch.setattr(bench, "MAE", replace(bench.MAE, max_steps=1, **small))
    monkeypatch.setattr(bench, "VIT", bench.VIT | {"depth": 1, "embed_dim": 48})
    clip, spent = bench.train(arm, 0, 8.0, tmp_path, max_steps=1)
    assert not clip.training
    assert spent["cpu_seconds"] > 0
    assert ("mae_seconds" in spent) == (arm == "vim after mae")
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(values)
    expected = create_transform(load_encoder("vim_nano_patch8_64"))(image)
    torch.testing.assert_close(clip.transform(image), expected)  # every arm sees the same
    asked = bench.queries("sample:fluent-emoji", "test")
    part = replace(asked, data=asked.data.subset(range(12)))
    scores = bench.model_scores(clip, part)
    assert scores["caption"].shape == (12, 12)
    assert torch.equal(scores["picture"], scores["caption"].T)
    assert scores["category"].shape == (12, 9)
