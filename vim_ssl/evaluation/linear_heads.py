"""Linear classifiers on frozen features: logistic regression, and MAE's head trained with LARS."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_ssl.data.loading.indexed import EpochBatches
from vim_ssl.metrics.classification import answer_metrics
from vim_ssl.training.optim import build_schedule
from vim_ssl.utils.numbers import REMEDY, require_finite

MANY = int(5e7)  # number of values from which a matrix product benefits from several threads
LARGE = 100_000  # number of images above which scikit-learn takes hours
CHUNK = 2**16  # images in float32 on the device at a time
MAX_STEPS = 1000  # maximum number of L-BFGS steps


@dataclass
class LinearHead:
    """Linear classifier with logits (x - mean) / std @ weight + bias.

    Attributes:
        mean, std: (d,).  weight: (d, k).  bias: (k,).
        classes: (c,) int64, the labels in the training data; k = c columns, or one column for the
            second of two classes. None for multi-label data: one independent column per label.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    classes: Tensor | None

    def scores(self, x: Tensor | np.ndarray) -> Tensor:
        """Logits (n, k) of features (n, d)."""
        x = torch.as_tensor(x, dtype=self.weight.dtype)
        require_finite(x, "the features", REMEDY)
        parts = ((part - self.mean) / self.std @ self.weight for part in x.split(CHUNK))
        scores = torch.cat([part + self.bias for part in parts])
        require_finite(scores, "the scores of the linear head", REMEDY)
        return scores

    def probabilities(self, x: Tensor | np.ndarray, count: int) -> Tensor:
        """Probabilities (n, count) of all classes; 0 for classes without training data."""
        scores = self.scores(x)
        if self.classes is None:
            return scores.sigmoid()
        if scores.shape[1] == 1:
            scores = torch.cat([torch.zeros_like(scores), scores], 1)
        result = scores.new_zeros(len(scores), count)
        result[:, self.classes] = scores.softmax(1)
        return result

    def predict(self, x: Tensor | np.ndarray) -> Tensor:
        """Predicted labels (n,), or rows of 0 and 1 (n, k), int64."""
        scores = self.scores(x)
        if self.classes is None:
            return (scores > 0).long()
        best = (scores[:, 0] > 0).long() if scores.shape[1] == 1 else scores.argmax(1)
        return self.classes[best]

    def score(self, x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> float:
        """Model-selection score in [0, 1]: accuracy, or macro mAP for multi-label data."""
        answer = self.scores(x) if self.classes is None else self.predict(x)
        return answer_metrics(answer, y)["main"].value / 100


def fit_logistic(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    C: float,
    tol: float = 1e-4,
    start: LinearHead | None = None,
) -> LinearHead:
    """Fit a logistic regression on standardised features with L-BFGS: multinomial, or one-vs-rest
    for multi-label data.

    It minimises  sum of the images' losses + ||weight||² / (2 C)  in float32, with scikit-learn;
    above `LARGE` images and for multi-label data with torch, on a GPU if available. A thousand
    steps suffice to rank the values of C in a sweep, although the largest may not converge.

    Args:
        x: (n, d).  y: (n,) labels, or (n, k) of 0 and 1.
        tol: tolerance of the gradient; a ten times larger one halves the time.
        start: a head fitted to the same data with another C; speeds up a sweep over ascending C.
    Raises: ValueError if all labels are equal, or a feature is not finite.
    """
    x, y = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)
    require_finite(x, "the features", REMEDY)
    mean, std = (start.mean, start.std) if start else moments(x)
    classes = None
    if y.ndim == 1:
        classes, y = y.unique(return_inverse=True)
        if len(classes) < 2:
            raise ValueError("all images have the same label; a classifier needs two classes.")
    fit = _by_sklearn if y.ndim == 1 and len(x) <= LARGE else _by_torch
    weight, bias = fit(x, y, mean, std, C, tol, start)
    return LinearHead(mean, std, weight, bias, classes)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d,) of features (n, d); the latter is 1 for constant ones."""
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    std = variance.sqrt()
    return mean, torch.where(std > 1e-6 * mean.abs(), std, 1.0)


def _by_sklearn(x, y, mean, std, C, tol, start) -> tuple[Tensor, Tensor]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(C=C, tol=tol, max_iter=MAX_STEPS, warm_start=start is not None)
    if start is not None:
        model.coef_, model.intercept_ = start.weight.T.numpy().copy(), start.bias.numpy().copy()
    # For its many small matrix products, threads cost far more than they gain.
    with threadpool_limits(1 if x.numel() < MANY else None), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(((x - mean) / std).numpy(), y.numpy())
    weight, bias = (torch.from_numpy(v).float() for v in (model.coef_.T, model.intercept_))
    return weight, bias


def _by_torch(x, y, mean, std, C, tol, start) -> tuple[Tensor, Tensor]:
    """Minimise the same objective, divided by n, until no entry of the gradient exceeds ``tol``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, d = x.shape
    if y.ndim == 1 and int(y.max()) == 1:  # two classes: one column, as in scikit-learn
        y = y[:, None]
    k = int(y.max()) + 1 if y.ndim == 1 else y.shape[1]
    weight, bias = torch.zeros(d, k, device=device), torch.zeros(k, device=device)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias)
    mean, std = mean.to(device), std.to(device)
    solver = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()], max_iter=MAX_STEPS, history_size=10,
        tolerance_grad=tol, tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        total = weight.square().sum() / (2 * C * n)
        total.backward()
        total = total.detach().double()
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            logits = (part.to(device) - mean) / std @ weight + bias
            loss = loss_sum(logits, labels.to(device)) / n
            loss.backward()
            total += loss.detach().double()
        return total

    solver.step(objective)
    return weight.detach().cpu(), bias.detach().cpu()


def loss_sum(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy summed over images, and, for multi-label y (n, k), over columns."""
    if y.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, y.to(logits), reduction="sum")
    return F.cross_entropy(logits, y, reduction="sum")


def fit_lars(
    x: Tensor,
    y: Tensor,
    *,
    base_lr: float = 0.1,
    batch: int = 16384,
    epochs: int = 90,
    seed: int = 0,
) -> LinearHead:
    """Train MAE's linear probe on stored features: batch normalisation without scale and shift, a
    linear layer, LARS without weight decay, and a cosine schedule after warm-up for a ninth of the
    epochs. Unlike in MAE, the images are not augmented.

    The defaults are MAE's, for the million images of ImageNet. The distance that weights can move
    is proportional to images x epochs x lr: see `lars_reach`.

    It does not use `vim_ssl.training.loop.fit`: the normalisation needs the whole batch, which
    processes would split, and a sample is one row of a matrix.

    Args:
        x: (n, d).  y: (n,) labels, or (n, k) of 0 and 1.
        base_lr: learning rate per 256 images.
        batch: batch size, capped at the number of images.
    Reference: Masked Autoencoders, arXiv:2111.06377, appendix A.1.
    """
    from timm.optim import create_optimizer_v2

    require_finite(x, "the features", REMEDY)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classes = None
    if y.ndim == 1:
        classes, y = y.unique(return_inverse=True)
    norm = nn.BatchNorm1d(x.shape[1], eps=1e-6, affine=False)
    linear = nn.Linear(x.shape[1], y.shape[1] if classes is None else len(classes))
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    model = nn.Sequential(norm, linear).to(device).train()
    batches = EpochBatches(len(x), min(batch, len(x)), seed=seed)
    # Without weight decay, timm's LARS is plain SGD unless always_adapt is set; MAE's LARS adapts
    # all parameters except the bias.
    adapted: dict[str, Any] = {"params": [linear.weight], "always_adapt": True}
    lr = base_lr * batches.batch_size / 256
    optimizer = create_optimizer_v2(
        [adapted, {"params": [linear.bias]}], "lars", lr=lr, weight_decay=0.0, momentum=0.9
    )
    steps = epochs * len(batches)
    schedule = build_schedule(optimizer, total_steps=steps, warmup_steps=steps // 9)
    step = 0
    for batches.epoch in range(epochs):
        for batch_rows in batches:
            rows = torch.tensor([row for _, row in batch_rows])
            schedule.step_update(step)
            loss = loss_sum(model(x[rows].to(device)), y[rows].to(device)) / len(rows)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    model.cpu()
    mean, variance = (norm.get_buffer(f"running_{name}") for name in ("mean", "var"))
    weight, bias = linear.weight.detach().T, linear.bias.detach()
    return LinearHead(mean, (variance + norm.eps).sqrt(), weight, bias, classes)


def lars_reach(n: int, base_lr: float, epochs: int) -> float:
    """Return the maximum distance that a weight can move in `fit_lars`, in multiples of its norm. A
    step is a thousandth of the norm times the lr; momentum multiplies it by ten, the cosine
    schedule halves it. 225 for ImageNet with MAE's settings."""
    return 0.001 * 10 * 0.5 * n * epochs * base_lr / 256
