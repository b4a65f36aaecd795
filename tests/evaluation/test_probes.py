"""What frozen features are judged by: extraction in order, neighbours, C, intervals, readouts."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from vim_ssl import VimEncoder, load_encoder
from vim_ssl.data import open_data
from vim_ssl.evaluation.extract import Features, extract_features
from vim_ssl.evaluation.knn import (
    Neighbours,
    choose_neighbours,
    knn_predict,
    knn_votes,
    nearest,
    usable_k,
)
from vim_ssl.evaluation.linear_heads import fit_logistic
from vim_ssl.evaluation.online import effective_rank, online_probe
from vim_ssl.evaluation.readout import (
    C_GRID,
    CHOICES,
    all_readouts,
    choose_C,
    choose_readout,
    readout_columns,
)
from vim_ssl.metrics.bootstrap import wilson_interval
from vim_ssl.metrics.classification import accuracy


def blobs(n: int, classes: int = 4, d: int = 8, noise: float = 1.0, seed: int = 0):
    """Points around one centre a class, n in all, in random order."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n) % classes
    y = y[torch.randperm(n, generator=draw)]
    return centres[y] + noise * torch.randn(n, d, generator=draw), y


# ------------------------------------------------------------------ extraction


@pytest.fixture
def grey_steps(tmp_path) -> str:
    """Ten images, image i all of value 20 i, in two classes; number 3 and 7 are broken."""
    for i in range(10):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        if i in (3, 7):
            path.write_bytes(b"no image")
        else:
            Image.new("L", (5, 4), 20 * i).save(path)
    return str(tmp_path)


@pytest.mark.parametrize("workers", [0, 2], ids="workers{}".format)
@pytest.mark.parametrize("batch_size", [1, 4, 100], ids="batch{}".format)
def test_features_keep_the_order_of_the_data_and_name_what_is_broken(
    grey_steps, batch_size, workers
):
    found = extract_features(
        lambda x: x[:, :, :2, :2].float(), open_data(grey_steps), pil_to_tensor,
        batch_size=batch_size, workers=workers,
    )  # fmt: skip
    whole = [0, 2, 4, 6, 8, 1, 5, 9]
    assert found.ids == [f"{'ab'[i % 2]}/{i}.png" for i in whole]
    assert found.y.tolist() == [i % 2 for i in whole]
    assert (found.x.dtype, found.y.dtype) == (torch.float32, torch.int64)
    assert torch.equal(found.x, torch.tensor([[20.0 * i] * 4 for i in whole]))
    assert [name.partition(":")[0] for name in found.skipped] == ["b/3.png", "b/7.png"]
    assert found.groups is None


def test_features_know_their_groups(grey_steps):
    data = open_data(grey_steps + "?group=folder")
    found = extract_features(lambda x: x.float(), data, pil_to_tensor)
    assert found.groups == ["a"] * 5 + ["b"] * 3


def test_extraction_leaves_no_graph(grey_steps):
    weight = torch.ones(1, requires_grad=True)
    assert not extract_features(
        lambda x: x * weight, open_data(grey_steps), pil_to_tensor
    ).x.requires_grad


def test_data_without_a_readable_image_is_an_error(tmp_path):
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 1 images can be read.*1\.png"):
        extract_features(lambda x: x, open_data(str(tmp_path)), pil_to_tensor)


# ------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("k", [1, 5, 20], ids="k{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_neighbours_agree_with_scikit_learn(k, dtype):
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    (x, y), (queries, truth) = blobs(300), blobs(2500, seed=1)  # more than one part of 1024
    x, queries = x.to(dtype), queries.to(dtype)
    scaler = StandardScaler().fit(x.numpy())
    other = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(scaler.transform(x.numpy()), y.numpy())
    expected = other.predict(scaler.transform(queries.numpy()))
    predicted = knn_predict(x, y, queries, k=k)
    assert (predicted.numpy() == expected).mean() > 0.999  # ties of rounding
    assert (
        60 < accuracy(predicted, truth).value < 100
    )  # classes overlap, so that neighbours disagree


def test_near_neighbours_outvote_many_far_ones():
    bank = torch.tensor([[1.0, 0.02], [-1.0, 1.0], [-1.0, 1.1], [-1.0, -1.0], [-1.0, -1.1]])
    labels = torch.tensor([0, 1, 1, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_predict(bank, labels, query, k=5).item() == 0
    assert knn_predict(bank, labels, query, k=5, temperature=1e3).item() == 1


def test_a_bank_smaller_than_k_is_refused():
    x, y = blobs(8, classes=2, noise=0.01)
    with pytest.raises(ValueError, match="k is 20, but there are only 8 training images"):
        knn_predict(x, y, x, k=20)
    assert torch.equal(knn_predict(x, y, x, k=8), y)


@pytest.mark.parametrize(
    ("given", "bank", "usable"),
    [((), 150, [10, 20, 100]), ((), 9, [1]), ((5, 50, 500), 100, [5, 50])],
    ids=str,
)
def test_as_many_neighbours_as_the_bank_has(given, bank, usable):
    assert usable_k(given, bank) == usable


def test_settings_of_neighbours_are_chosen_by_the_validation_split():
    """Plain cosines of the columns that tell the classes are hidden by three large ones."""
    x, y = blobs(200, noise=0.7)
    noise = torch.randn(200, 11, generator=torch.Generator().manual_seed(1))
    ids = [str(i) for i in range(200)]
    train = Features(torch.cat([noise[:, :8], 1000 * noise[:, 8:], x], 1), y, ids, [])
    readouts = {"noise": slice(0, 8), "hidden": slice(8, 19), "again": slice(8, 19)}
    chosen, score = choose_neighbours(train, readouts, k=(5, 180))
    assert chosen == Neighbours("hidden", standardise=True, k=5)
    assert chosen.metric == "cosine of standardised features"
    assert 60 < score <= 100
    plain, worse = choose_neighbours(train, readouts, k=(5, 180), standardise=(False,))
    assert not plain.standardise
    assert worse < score


def test_what_all_images_share_does_not_blur_the_neighbours():
    x, y = blobs(200, noise=0.5)
    queries, truth = blobs(200, noise=0.5, seed=1)
    plain = accuracy(knn_predict(x, y, queries), truth).value
    shifted = accuracy(knn_predict(x + 1000, y, queries + 1000), truth).value
    assert shifted == pytest.approx(plain, abs=1)


@pytest.mark.parametrize("sizes", [(7, 13), (64, 300), (1, 1)], ids=str)
def test_neighbours_do_not_depend_on_how_the_work_is_cut(sizes, monkeypatch):
    (x, _), (queries, _) = blobs(300), blobs(40, seed=1)
    similarity, places = nearest(x, queries, k=20)
    monkeypatch.setattr("vim_ssl.evaluation.knn.QUERIES", sizes[0])
    monkeypatch.setattr("vim_ssl.evaluation.knn.BANK", sizes[1])
    cut_similarity, cut_places = nearest(x, queries, k=20)
    torch.testing.assert_close(cut_similarity, similarity)
    assert (cut_places == places).float().mean() > 0.99  # ties of rounding
    assert places.shape == similarity.shape == (40, 20)
    assert (similarity.diff(dim=1) <= 0).all()


def test_no_more_than_a_part_of_the_similarities_is_ever_held(monkeypatch):
    """1.28 M x 50 k of them would be 256 GB."""
    largest = 0
    topk = torch.Tensor.topk

    def watched(self, *args, **kwargs):
        nonlocal largest
        largest = max(largest, self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    monkeypatch.setattr("vim_ssl.evaluation.knn.QUERIES", 16)
    monkeypatch.setattr("vim_ssl.evaluation.knn.BANK", 64)
    nearest(torch.randn(1000, 4), torch.randn(200, 4), k=10)
    assert largest == 16 * 64


def test_neighbours_vote_for_every_label_of_an_image():
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]])
    labels = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 0]])
    found = nearest(bank, torch.tensor([[1.0, 0.05]]), k=2, standardise=False)
    (votes,) = knn_votes(labels, *found)
    assert votes[0] == pytest.approx(1.0)
    assert votes[1] == 0
    assert 0.4 < votes[2] < 0.6


# ------------------------------------------------------------------ logistic regression


def test_logistic_regression_does_not_care_about_the_scale_of_a_feature():
    (x, y), (queries, _) = blobs(200), blobs(100, seed=1)
    scale = torch.logspace(-3, 3, 8)
    first = fit_logistic(x, y, 1.0).predict(queries)
    second = fit_logistic(x * scale, y, 1.0).predict(queries * scale)
    assert (first == second).float().mean() >= 0.99


def test_C_is_the_best_of_the_grid_on_the_validation_part(monkeypatch):
    monkeypatch.setattr("vim_ssl.evaluation.readout.SEARCH_TOL", 1e-6)
    (x, y), (x_val, y_val) = blobs(60, noise=2), blobs(200, noise=2, seed=1)
    C, share = choose_C(x, y, x_val, y_val)
    scores = {c: fit_logistic(x, y, c, 1e-6).score(x_val, y_val) for c in C_GRID}
    # A warm start may put an image or two on the other side of the border.
    assert share == pytest.approx(max(scores.values()), abs=0.011)
    assert scores[C] == pytest.approx(share, abs=0.011)
    assert min(scores.values()) < share - 0.02  # otherwise there was nothing to choose


def test_of_equally_good_values_the_smaller_C_is_taken():
    x, y = blobs(60, noise=0.01)
    assert choose_C(x, y, x, y, grid=(1.0, 100.0, 10.0)) == (1.0, 1.0)


def test_readouts_are_searched_side_by_side_and_the_first_of_equals_wins():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    told = torch.stack([y + 0.1 * torch.randn(80, generator=g) for _ in "ab"], dim=1)
    x = torch.cat([torch.randn(80, 2, generator=g), told], dim=1)
    readouts = {"noise": slice(0, 2), "first": slice(2, 3), "second": slice(3, 4)}
    name, C, share = choose_readout(x[:60], y[:60], x[60:], y[60:], readouts)
    assert (name, share) == ("first", 1.0)
    assert C in C_GRID


def test_accuracy_is_told_in_per_cent():
    assert accuracy([0, 1, 2, 2], torch.tensor([0, 1, 2, 0])).value == 75.0


@pytest.mark.parametrize(
    ("percent", "n", "low", "high"),
    [
        (80, 10, 49.02, 94.33),  # values of statsmodels' proportion_confint(method="wilson")
        (0, 10, 0.0, 27.75),
        (100, 10, 72.25, 100.0),
        (50, 1000, 46.91, 53.09),
        (95, 100, 88.82, 97.85),
    ],
    ids=lambda v: f"{v:g}",
)
def test_the_interval_is_wilsons(percent, n, low, high):
    assert wilson_interval(percent, n) == pytest.approx((low, high), abs=0.011)


# ------------------------------------------------------------------ readouts


def make_encoder(**args) -> VimEncoder:
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_classes": 0} | args
    return VimEncoder(**args).eval()


@pytest.mark.parametrize("depth", [1, 2, 4, 7], ids="depth{}".format)
@pytest.mark.parametrize("readout", ["token", "avg", "token+avg", "max"])
def test_a_readout_is_the_encoders_own_pooling(readout, depth):
    encoder, x = make_encoder(depth=depth), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = all_readouts(encoder, x)[:, readout_columns(encoder, readout)]
        expected = encoder.pool(encoder.forward_features(x), readout)
    torch.testing.assert_close(features, expected)


def test_the_layers_readout_joins_the_pooled_features_and_means_from_within():
    encoder, x = make_encoder(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = all_readouts(encoder, x)[:, readout_columns(encoder, "layers")]
        maps = encoder.forward_intermediates(x, [0, 1, 2], norm=True, intermediates_only=True)
        pooled = encoder.pool(encoder.forward_features(x), "token+avg")
    torch.testing.assert_close(features, torch.cat([pooled, *(m.mean((2, 3)) for m in maps)], 1))


def test_without_a_class_token_the_means_are_left():
    encoder, x = make_encoder(cls_position="none"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        everything = all_readouts(encoder, x)
        expected = encoder.forward_features(x).mean(1)
    torch.testing.assert_close(everything[:, readout_columns(encoder, "avg")], expected)
    assert everything[:, readout_columns(encoder, "layers")].shape == (2, 64)
    assert everything.shape == (2, 64 + 16)  # the maximum is the last
    maximum = encoder.forward_features(x).amax(1)
    torch.testing.assert_close(everything[:, readout_columns(encoder, "max")], maximum)
    with pytest.raises(ValueError, match="'token' needs a class token; use 'avg' or 'layers'"):
        readout_columns(encoder, "token")


def test_an_unknown_readout_is_refused():
    with pytest.raises(ValueError, match=re.escape(f"'cls' is not one of {', '.join(CHOICES)}.")):
        readout_columns(make_encoder(), "cls")


def test_a_plateau_at_chance_does_not_end_the_search_for_C(monkeypatch):
    """Small C's all score alike; the good one comes after them."""
    scores = {0.001: 0.1, 0.01: 0.1, 0.1: 0.1, 1.0: 0.9, 10.0: 0.5, 100.0: 0.4, 1000.0: 1.0}

    class Fitted:
        def __init__(self, C):
            self.C = C

        def score(self, x, y):
            return scores[self.C]

    fitted = "vim_ssl.evaluation.readout.fit_logistic"
    monkeypatch.setattr(fitted, lambda x, y, C, tol, start: Fitted(C))
    assert choose_C(None, None, None, None, tuple(scores)) == (1.0, 0.9)


# ------------------------------------------------------------------ while training


@pytest.mark.parametrize(("directions", "rank"), [(1, 1.0), (3, 3.0), (0, 0.0)])
def test_the_effective_rank_counts_directions_that_vary_alike(directions, rank):
    axes = torch.eye(8)[:directions]
    x = 5.0 + torch.cat([axes, -axes, torch.zeros(1, 8)])
    assert effective_rank(x) == pytest.approx(rank, abs=1e-5)


def test_a_rare_class_missing_from_the_bank_does_not_end_a_training(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / ("rare" if i < 2 else "common") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(path)
    encoder = load_encoder("vim_nano_patch4_28", depth=1, embed_dim=16)
    for seed in range(4):
        watch = online_probe(encoder, open_data(tmp_path), "cpu", seed, bank=4, queries=5)
        assert watch()["feature_std"] > 0


def test_a_probe_while_training_leaves_several_labels_alone(grey_steps):
    folder = open_data(grey_steps)
    whole = folder.subset(i for i, name in enumerate(folder.ids) if name[2] not in "37")
    whole.labels = [[1, 0]] * len(whole)
    figures = online_probe(make_encoder(), whole, "cpu", 0)()
    assert set(figures) == {"feature_std", "effective_rank"}


@pytest.mark.parametrize("training", [True, False])
def test_a_probe_while_training_measures_in_eval_mode_and_restores_the_mode(grey_steps, training):
    """Stochastic depth would drop blocks of the encoder."""
    data = open_data(grey_steps)
    whole = data.subset(i for i, name in enumerate(data.ids) if name[2] not in "37")
    torch.manual_seed(0)
    encoder = make_encoder(drop_path_rate=0.9)
    watch = online_probe(encoder.train(training), whole, "cpu", 0)
    first = watch()
    assert encoder.training == training
    assert watch() == first
    assert online_probe(encoder.eval(), whole, "cpu", 0)() == first


def test_a_validation_split_without_any_label_is_refused():
    """Of several labels per image; its score would be NaN, and any setting the best."""
    x, y = torch.randn(20, 3), torch.zeros(20, 2, dtype=torch.int64)
    train = Features(x, y, [str(i) for i in range(20)], [])
    says = "none of the 4 images of the validation split has a label"
    with pytest.raises(ValueError, match=says):
        choose_neighbours(train, {"all": slice(None)})
    with pytest.raises(ValueError, match=says):
        choose_readout(x[4:], y[4:] + 1, x[:4], y[:4], {"all": slice(None)})


def test_a_bank_of_one_image_is_its_answer_and_an_empty_one_refused():
    bank, label = torch.tensor([[1.0, 2, 3]]), torch.tensor([2])
    for standardise in (True, False):
        found = knn_predict(bank, label, torch.randn(4, 3), k=1, standardise=standardise)
        assert found.tolist() == [2] * 4
    with pytest.raises(ValueError, match="bank of neighbours is empty"):
        nearest(bank[:0], bank, k=1)
    with pytest.raises(ValueError, match=r"without a label \(-1\)"):
        knn_predict(bank, torch.tensor([-1]), bank, k=1)
