"""What task models have in common: ``predict`` for images, paths and lists of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vim_ssl.data.bands import check_scale
from vim_ssl.data.inputs import read_input
from vim_ssl.utils.numbers import REMEDY, require_finite

BATCH = 32  # images that `Predictor.predict` holds in memory at once


class Predictor:
    """Base of task models, which predict in two steps.

    A subclass defines ``task``, ``classes``, ``encoder``, ``transform`` and `predict_prepared`.

    Attributes:
        task: "classification", "segmentation", "detection", "clip" or "slide".
        classes: class names.
        trained_on: spec of the training data, "" if unknown; see `vim_ssl.data.inputs.open_new`.
        batched: whether `predict_prepared` computes several inputs at once.
    """

    task: str
    encoder: Any
    classes: list[str]
    trained_on = ""
    batched = False

    def prepare(self, image: Any) -> Any:
        """Convert an image of `ImageData` to an input of `predict_prepared`; called in the loading
        processes. Raises: BadImage."""
        return image

    def predict_prepared(self, inputs: Sequence[Any]) -> Iterable[Any]:
        """Yield a result for each input, in eval mode."""
        raise NotImplementedError

    def read(self, x: Any) -> list[Any] | None:
        """Return the images in a list, or None if ``x`` is a single one. Overridden by models whose
        input may be a list itself, such as the frames of a video."""
        return list(x) if isinstance(x, list | tuple) else None

    def load(self, x: Any) -> Any:
        """Return an image of `ImageData` for one input of `predict`."""
        image = read_input(x, self.trained_on)
        if isinstance(x, np.ndarray) and isinstance(image, np.ndarray):
            check_scale(self.encoder, image)
        return image

    def predict(self, x: Any) -> Any:
        """Predict one input, or each of a list.

        Args:
            x: a PIL image, an array (h, w) or (h, w, bands), or the path of an image; or a list of
                them.
        Returns: the result, or a list of results.
        Raises: BadImage for an image that cannot be read; ValueError for an array whose values are
            far above those of the training images, and for probabilities that are not finite;
            TypeError for anything else.
        """
        several = self.read(x)
        images = [x] if several is None else several
        results: list[Any] = []
        step = BATCH if self.batched else 1
        for first in range(0, len(images), step):
            batch = [self.prepare(self.load(one)) for one in images[first : first + step]]
            results += self.predict_prepared(batch)
        for result in results:
            if isinstance(result, ClassPrediction):
                require_finite(result.probabilities, "the probabilities", REMEDY)
        return results[0] if several is None else results


@dataclass(frozen=True, repr=False)
class ClassPrediction:
    """The predicted class of an image.

    Attributes:
        index, name, probability: of the predicted class; for multi-label targets, of the most
            probable one.
        probabilities: of all classes, float32 (classes,). They sum to one, except for multi-label
            targets, whose labels are independent.
        classes: class names.
        targets: "class", "multi-label" or "ordinal"; see `vim_ssl.metrics.classification`.
    """

    index: int
    probabilities: np.ndarray
    classes: list[str] = field(compare=False)
    targets: str = "class"

    @property
    def name(self) -> str:
        return self.classes[self.index]

    @property
    def probability(self) -> float:
        return float(self.probabilities[self.index])

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return name and probability of the ``k`` most probable classes, in descending order."""
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[i], float(self.probabilities[i])) for i in order]

    def above(self, threshold: float = 0.5) -> list[str]:
        """Return the names of the classes with a probability above ``threshold``, in the order of
        ``classes``: the predicted labels of multi-label targets."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        return [name for name, probability in pairs if probability > threshold]

    def __repr__(self) -> str:
        if self.targets == "multi-label":
            return f"ClassPrediction({self.above()})"
        return f"ClassPrediction({self.name!r}, probability={self.probability:.3f})"
