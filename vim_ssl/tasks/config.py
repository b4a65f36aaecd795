"""`TransferConfig`: the options of tasks that train a pretrained encoder further."""

from dataclasses import dataclass

from vim_ssl.training.config import NEVER, TrainConfig
from vim_ssl.utils.config import opt


@dataclass
class TransferConfig(TrainConfig):
    """Train a pretrained encoder, or the same architecture from scratch."""

    encoder: str = opt("", "run, checkpoint, preset or Hub id; default: the newest run", "data")
    from_scratch: bool = opt(False, "discard the pretrained weights, as a baseline", "model")
    betas: tuple[float, float] = opt(
        (0.9, 0.999), "betas of the optimiser (AdamW, LAMB …)", "optimiser"
    )
    layer_decay: float | None = opt(
        0.8, "learning-rate factor per block, from top to bottom; none: off", "optimiser"
    )
    workers: int = opt(0, "data loading processes per rank", "run")
    eval_every: float = opt(
        NEVER, "epochs between evaluations; never: only at the end", "run", words={"never": NEVER}
    )
