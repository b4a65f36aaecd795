"""Linear heads: torch and scikit-learn agree, a sweep may start warm, LARS is what MAE's is."""

import numpy as np
import pytest
import torch

from vim_ssl.evaluation import linear_heads
from vim_ssl.evaluation.linear_heads import fit_lars, fit_logistic, lars_reach


def blobs(n: int, classes: int = 4, d: int = 8, noise: float = 1.5, seed: int = 0):
    """Points around one centre a class, in random order; features of unlike scale and offset."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n)[torch.randperm(n, generator=draw)] % classes
    x = centres[y] + noise * torch.randn(n, d, generator=draw)
    return 3 * torch.linspace(0.1, 2, d) * x + 5, y


def several(n: int, seed: int = 0):
    """Each of three labels stands in a feature of its own, with noise; the last is rare."""
    draw = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, 3, generator=draw) < torch.tensor([0.5, 0.3, 0.1])).long()
    return 2.0 * y + torch.randn(n, 3, generator=draw), y


@pytest.mark.parametrize("classes", [2, 3, 7], ids="classes{}".format)
@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0], ids="C{:g}".format)
def test_torch_finds_scikit_learns_minimum(classes, C, monkeypatch):
    (x, y), (queries, _) = blobs(300, classes), blobs(200, classes, seed=1)
    theirs = fit_logistic(x, y, C, tol=1e-6)
    monkeypatch.setattr(linear_heads, "LARGE", 100)
    monkeypatch.setattr(linear_heads, "CHUNK", 128)  # several parts
    ours = fit_logistic(x, y, C, tol=1e-6)
    assert ours.weight.shape == theirs.weight.shape
    torch.testing.assert_close(ours.weight, theirs.weight, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(ours.scores(queries), theirs.scores(queries), atol=2e-2, rtol=1e-2)
    assert torch.equal(ours.predict(queries), theirs.predict(queries))


def test_it_is_scikit_learns_own_model():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (queries, truth) = blobs(300), blobs(200, seed=1)
    other = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
    other.fit(x.numpy(), y.numpy())
    head = fit_logistic(x, y, 0.3)
    assert (head.predict(queries).numpy() == other.predict(queries.numpy())).mean() > 0.99
    assert head.score(queries, truth) == pytest.approx(other.score(queries, truth), abs=0.01)


def test_several_labels_are_as_many_regressions():
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import StandardScaler

    (x, y), (queries, truth) = several(400), several(200, seed=1)
    scaler = StandardScaler().fit(x.numpy())
    other = OneVsRestClassifier(LogisticRegression(C=0.5, max_iter=1000, tol=1e-6))
    other.fit(scaler.transform(x.numpy()), y.numpy())
    head = fit_logistic(x, y, 0.5, tol=1e-6)
    expected = other.decision_function(scaler.transform(queries.numpy()))
    np.testing.assert_allclose(head.scores(queries), expected, atol=0.02)
    assert head.predict(queries).shape == (200, 3)
    assert head.score(queries, truth) > 0.6


def test_a_label_that_no_image_has_is_predicted_for_none():
    x, y = several(100)
    y[:, 2] = 0
    head = fit_logistic(x, y, 1.0)
    assert torch.isfinite(head.weight).all()
    assert not head.predict(x)[:, 2].any()


@pytest.mark.parametrize("large", [False, True], ids=["scikit-learn", "torch"])
def test_a_warm_start_ends_at_the_same_minimum(large, monkeypatch):
    x, y = blobs(200)
    monkeypatch.setattr(linear_heads, "LARGE", 0 if large else 1000)
    cold = fit_logistic(x, y, 1.0, tol=1e-6)
    warm = fit_logistic(x, y, 1.0, tol=1e-6, start=fit_logistic(x, y, 0.1))
    torch.testing.assert_close(warm.weight, cold.weight, atol=2e-3, rtol=2e-3)


def test_labels_keep_their_names_where_some_are_missing():
    x, y = blobs(120, classes=3)
    names = torch.tensor([1, 4, 9])
    assert set(fit_logistic(x, names[y], 1.0).predict(x).tolist()) == {1, 4, 9}
    assert set(fit_lars(x, names[y]).predict(x).tolist()) <= {1, 4, 9}
    two = y[y < 2]
    head = fit_logistic(x[y < 2], names[two], 1.0)
    assert (head.predict(x[y < 2]) == names[two]).float().mean() > 0.8


def test_a_feature_that_does_not_vary_does_no_harm():
    x, y = blobs(100)
    x[:, 0] = 0.1
    for head in (fit_logistic(x, y, 1.0), fit_lars(x, y, base_lr=5)):
        assert torch.isfinite(head.scores(x)).all()
    assert fit_logistic(x, y, 1.0).score(x, y) > 0.7


def test_one_class_alone_is_refused():
    with pytest.raises(ValueError, match="needs two classes"):
        fit_logistic(torch.randn(5, 2), torch.zeros(5, dtype=torch.int64), 1.0)


def test_the_lars_head_learns_and_follows_its_seed():
    (x, y), (queries, truth) = blobs(1000), blobs(500, seed=1)
    head = fit_lars(x, y, base_lr=5, batch=100)
    assert head.score(queries, truth) > fit_logistic(x, y, 1.0).score(queries, truth) - 0.05
    assert torch.equal(head.weight, fit_lars(x, y, base_lr=5, batch=100).weight)
    assert not torch.equal(head.weight, fit_lars(x, y, base_lr=5, batch=100, seed=1).weight)
    several_labels = fit_lars(*several(1000), base_lr=5, batch=100)
    assert several_labels.score(*several(500, seed=1)) > 0.6


@pytest.mark.parametrize("base_lr", [0.1, 1.0, 10.0], ids="lr{:g}".format)
def test_lars_moves_the_weights_by_a_share_of_their_own_length(base_lr):
    """Which is what plain SGD, timm's LARS without weight decay, would not do."""
    x, y = blobs(256)
    first = fit_lars(x, y, base_lr=1e-12, batch=64)
    head = fit_lars(x, y, base_lr=base_lr, batch=64)
    moved = (head.weight - first.weight).norm() / first.weight.norm()
    assert 0 < moved < np.exp(lars_reach(256, base_lr, 90)) - 1
