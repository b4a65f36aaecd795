"""What the trainer asks of an objective, whatever is being trained.

forward(batch) -> StepOutput
after_step()                       optional: called after every step of the optimiser
accumulate(forward, count)         optional: yields the StepOutput of each of a step's ``count``
                                   micro-batches, for losses that compare their samples with one
                                   another; ``forward(i, **more)`` calls the model on the i-th,
                                   with the same random draws every time
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class StepOutput:
    """What one forward pass of an objective returns.

    The gradient of a step is that of sum(loss_sum) / sum(weight) over its micro-batches and
    processes, so accumulation and data parallelism give the large batch's gradient exactly.

    Args:
        loss_sum: scalar, the loss summed over what ``weight`` counts.
        weight: how many samples (or whatever is averaged) went into ``loss_sum``.
        metrics: scalars summed likewise, logged as their average.
        images: called when images are wanted: (n, c, h, w) in [0, 1], one row a sample.
    """

    loss_sum: Tensor
    weight: float
    metrics: dict[str, Tensor] = field(default_factory=dict)
    images: Callable[[], Tensor] | None = None
