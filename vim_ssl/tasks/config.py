"""`TransferConfig`: the options of tasks that train a pretrained encoder further."""

import math
from dataclasses import dataclass

from vim_ssl.training.config import NEVER, TrainConfig
from vim_ssl.utils.config import opt


@dataclass
class TransferConfig(TrainConfig):
    """Train a pretrained encoder, or the same architecture from scratch."""

    encoder: str = opt(
        "", "run, checkpoint, preset, Hub id or timm:NAME; default: the newest run", "data"
    )
    from_scratch: bool = opt(False, "discard the pretrained weights, as a baseline", "model")
    frozen: bool = opt(
        False, "train only the heads; with from_scratch, on random features", "model"
    )
    betas: tuple[float, float] = opt(
        (0.9, 0.999), "betas of the optimiser (AdamW, LAMB …)", "optimiser"
    )
    layer_decay: float | None = opt(
        0.8, "learning-rate factor per block, from top to bottom; none: off", "optimiser"
    )
    lr_encoder: float = opt(
        1.0, "learning rate of the encoder relative to that of the heads", "optimiser"
    )
    workers: int = opt(0, "data loading processes per rank", "run")
    eval_every: float = opt(
        NEVER, "epochs between evaluations; never: only at the end", "run", words={"never": NEVER}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.lr_encoder < math.inf:
            raise ValueError(
                f"lr_encoder is {self.lr_encoder:g}; it must be above 0. To train only the heads, "
                "use --frozen."
            )
        if not self.frozen:
            return
        if self.lr_encoder != 1:
            raise ValueError(
                f"lr_encoder is {self.lr_encoder:g}, but a frozen encoder has no learning rate; "
                "omit one of the two."
            )
        if drop_path := getattr(self, "drop_path", 0.0):
            raise ValueError(
                f"drop_path is {drop_path:g}, but frozen trains only the heads, and a frozen "
                "encoder drops no path; use --drop-path 0."
            )
