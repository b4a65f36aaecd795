"""Masked feature distillation: predict a teacher's features of the whole image from a part of it.

The student reads all patches, with masked ones replaced by its mask token. The teacher is a frozen
network, or the student's exponential moving average. Targets are the features of the teacher's last
blocks, each normalised over channels, then averaged.
References: data2vec, arXiv:2202.03555, sections 3.2 to 3.4; UMT, arXiv:2303.16058.
"""

import copy
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_ssl.checkpoints.identity import weights_hash
from vim_ssl.checkpoints.loading import load_encoder
from vim_ssl.checkpoints.timm_models import is_timm
from vim_ssl.models.protocol import Encoder, require_tokens
from vim_ssl.objectives.base import PretrainObjective, StepOutput
from vim_ssl.objectives.masking import checked_mask
from vim_ssl.objectives.pixels import train_tokens

LOSSES = ("cosine", "smooth_l1")
WHERE = ("masked", "all")


class Distill(PretrainObjective):
    """Masked feature distillation.

    Args:
        encoder: the student, built with ``use_mask_token=True`` and ``num_classes=0``.
        teacher: a frozen network with timm's `forward_intermediates`, or None for the moving
            average of the student. It receives the student's images with the teacher's
            normalisation, resized to the same grid of patches; a single channel is repeated three
            times. It is not part of the state dict: a resumed run loads it again.
        loss: "cosine" (1 - cosine) or "smooth_l1".
        where: patches included in the loss, "masked" or "all".
        layers: number of final teacher blocks whose features are averaged, at most all.
        momentum: EMA momentum of the teacher; lower in the first steps.
    Raises: ValueError for a student without a mask token or with a head, an unknown loss or where;
        when called, for a teacher with another grid of patches or another number of channels.
    """

    settings = ("teacher", "teacher_layers", "teacher_momentum", "distill_loss", "distill_where")
    encoder_args: ClassVar = {"use_mask_token": True}

    def __init__(
        self,
        encoder: Encoder,
        teacher: nn.Module | None = None,
        *,
        loss: str = "smooth_l1",
        where: str = "masked",
        layers: int = 4,
        momentum: float = 0.998,
    ):
        super().__init__()
        require_tokens(encoder, type(self).__name__)
        if encoder.mask_token is None:
            raise ValueError("distill needs an encoder with a mask token: use_mask_token=True.")
        if loss not in LOSSES or where not in WHERE:
            raise ValueError(
                f"loss is {loss!r} and where is {where!r}; expected one of {', '.join(LOSSES)} and "
                f"one of {', '.join(WHERE)}."
            )
        if layers < 1 or not 0 <= momentum < 1:
            raise ValueError(f"layers {layers} must be 1 or more, momentum {momentum} in [0, 1).")
        train_tokens(encoder)
        self.encoder = encoder
        self.loss, self.where, self.layers, self.momentum = loss, where, layers, momentum
        self.average = None
        if teacher is None:
            self.average = copy.deepcopy(encoder).requires_grad_(False).eval()
            self.updates: Tensor
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._frozen = [] if teacher is None else [teacher.requires_grad_(False).eval()]
        target: Any = encoder if teacher is None else teacher
        self.head = nn.Linear(encoder.embed_dim, getattr(target, "embed_dim", target.num_features))

    @classmethod
    def from_config(cls, encoder: Encoder, config: Any) -> Self:
        objective = cls(
            encoder, load_teacher(config.teacher), loss=config.distill_loss,
            where=config.distill_where, layers=config.teacher_layers,
            momentum=config.teacher_momentum, **config.objective_args,
        )  # fmt: skip
        # Fail before training if the teacher does not fit.
        objective.targets(torch.zeros(1, *encoder.data_config["input_size"]))
        return objective

    @classmethod
    def used_settings(cls, config: Any) -> set[str]:
        unused = {"teacher_momentum"} if config.teacher != "ema" else set()
        return super().used_settings(config) - unused

    def dependencies(self) -> dict[str, str]:
        """Return a hash of what training reads but a checkpoint does not contain."""
        return {"teacher": weights_hash(self._frozen[0])} if self._frozen else {}

    def train(self, mode: bool = True) -> "Distill":
        super().train(mode)
        if self.average is not None:
            self.average.eval()  # no drop path in the teacher
        return self

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w), normalised for the student -> (b, m, teacher's width) float32."""
        grid = self.encoder.grid(*images.shape[-2:])
        if self.average is not None:
            teacher: Any = self.average
        else:
            teacher = self._frozen[0] = self._frozen[0].to(images.device)
            images = _inputs_for(teacher, images, self.encoder.data_config, grid)
        layers = min(self.layers, len(teacher.feature_info))
        maps = teacher.forward_intermediates(
            images, layers, output_fmt="NLC", intermediates_only=True
        )
        if maps[0].shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"the teacher gives {maps[0].shape[1]} patches per image, the student "
                f"{grid[0]} x {grid[1]}; choose a teacher that accepts images of any size."
            )
        return torch.stack([F.layer_norm(m.float(), m.shape[-1:]) for m in maps]).mean(0)

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        images = batch["image"]
        grid = self.encoder.grid(*images.shape[-2:])
        mask = checked_mask(batch["mask"], len(images), grid)
        tokens = self.encoder.embed(images)
        tokens = self.encoder.forward_tokens(tokens, mask=mask, grid=grid)
        prediction = self.head(self.encoder.split_tokens(tokens)[0]).float()
        target = self.targets(images)
        if self.loss == "cosine":
            per_patch = 1 - F.cosine_similarity(prediction, target, dim=-1)
        else:
            per_patch = F.smooth_l1_loss(prediction, target, reduction="none").mean(-1)
        counted = mask if self.where == "masked" else torch.ones_like(mask)
        loss = (per_patch * counted).sum(1) / counted.sum(1)
        # Deviation of the targets over images and patches: 0 indicates a collapse.
        spread = target.flatten(0, 1).std(0).mean() * len(images)
        return StepOutput(loss.sum(), len(images), {"target_std": spread})

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the moving average, faster in the first steps."""
        if self.average is None:
            return
        self.updates += 1
        n = int(self.updates)
        weight = 1 - min(self.momentum, n / (n + 9))
        for mean, live in zip(self.average.parameters(), self.encoder.parameters(), strict=True):
            mean.lerp_(live.to(mean.dtype), weight)


def load_teacher(name: str) -> Any:
    """Return the frozen network of this name, or None for "ema", the encoder's average.

    Raises: ValueError for a name that timm does not know, or a network without patches.
    """
    if name == "ema":
        return None
    if not is_timm(name):
        return load_encoder(name, num_classes=0)
    source = name if "?" in name else f"{name}?pretrained"
    teacher = load_encoder(source, num_classes=0).model
    if not getattr(teacher, "dynamic_img_size", False):
        raise ValueError(
            f"the teacher {name} does not accept images of any size; use a vision transformer."
        )
    return teacher


def _inputs_for(teacher, images: Tensor, data_config: dict, grid: tuple[int, int]) -> Tensor:
    """Convert the student's images to the values, channels and size that the teacher expects."""
    from timm.data import resolve_model_data_config

    def column(values) -> Tensor:
        return torch.tensor(values, device=images.device)[:, None, None]

    images = images.float() * column(data_config["std"]) + column(data_config["mean"])
    target = getattr(teacher, "data_config", None) or resolve_model_data_config(teacher)
    channels = target["input_size"][0]
    if images.shape[1] not in (1, channels):
        raise ValueError(
            f"the teacher expects {channels} channels, the student {images.shape[1]}; choose a "
            "teacher with the same number, or --teacher ema."
        )
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    images = (images - column(target["mean"])) / column(target["std"])
    patch, stride = _patch_and_stride(teacher)
    size = [p + (side - 1) * s for side, p, s in zip(grid, patch, stride, strict=True)]
    if list(images.shape[-2:]) != size:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    return images


def _patch_and_stride(teacher) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size and stride of a teacher's patches in pixels (rows, columns); patches may overlap."""
    patches: Any = getattr(teacher, "patch_embed", None)
    if isinstance(side := getattr(patches, "patch_size", None), int):  # an `Encoder`
        return (side, side), (patches.stride, patches.stride)
    projection = getattr(patches, "proj", None)
    if isinstance(projection, nn.Conv2d):
        (rows, columns), (down, right) = projection.kernel_size, projection.stride
        return (rows, columns), (int(down), int(right))
    stride = teacher.feature_info[-1]["reduction"]
    return (stride, stride), (stride, stride)
