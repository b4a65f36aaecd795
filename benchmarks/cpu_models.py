"""Vim-Ti beside DeiT-Ti on one CPU thread: time and memory (`cpu.py`).

DeiT has fused attention, timm's default.
"""

import math
import os
from collections.abc import Callable
from functools import partial

import timm
import torch
from process import peak_mib, saved_bytes
from torch import nn
from turns import Values, in_turns, medians

from vim_ssl import load_encoder

VIM, DEIT = "vim_tiny_patch16_224", "deit_tiny_patch16_224"
RATIO = ("Vim-Ti", "DeiT-Ti")


def models(size: int) -> dict[str, nn.Module]:
    """Return both models, without a classifier, for images of ``size`` px."""
    return {
        "Vim-Ti": load_encoder(VIM),
        "DeiT-Ti": timm.create_model(DEIT, num_classes=0, img_size=size),
    }


@torch.inference_mode()
def time_encoder(size: int, batch: int, turns: int) -> Values:
    """Time the features of a batch of images of ``size`` px."""
    torch.set_num_threads(1)
    x = torch.randn(batch, 3, size, size)
    calls = {name: partial(model.eval(), x) for name, model in models(size).items()}
    return medians(in_turns(calls, turns), [RATIO])


def time_step(size: int, batch: int, turns: int) -> Values:
    """Time a training step, forward, backward and AdamW."""
    torch.set_num_threads(1)
    calls = {name: partial(stepper(model), batch, size) for name, model in models(size).items()}
    return medians(in_turns(calls, turns), [RATIO])


def stepper(model: nn.Module) -> Callable[[int, int], None]:
    """Return a function (batch, size in px) that makes a training step on random images."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step(batch: int, size: int) -> None:
        model(torch.randn(batch, 3, size, size)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def variant_model(variant: str) -> nn.Module:
    """Return DeiT-Ti, or Vim-Ti with a backend: "numba", or "numba, recomputing" with gradient
    checkpointing. The backend holds for the process."""
    if variant == "DeiT-Ti":
        return models(224)[variant]
    backend, _, recompute = variant.partition(", ")
    os.environ["VIM_SSL_BACKEND"] = backend
    encoder = load_encoder(VIM)
    encoder.set_grad_checkpointing(bool(recompute))
    return encoder


def step_memory(variant: str, batch: int) -> Values:
    """Measure the increase of the peak resident set by a training step of Vim-Ti at 224 px, after a
    step on a small image, which compiles and allocates the optimiser's state."""
    torch.set_num_threads(1)
    step = stepper(variant_model(variant))
    step(1, 32)
    before = peak_mib()
    step(batch, 224)
    return {variant: (round(peak_mib() - before), "MiB")}


def saved_memory(variant: str, batch: int) -> Values:
    """Measure what autograd keeps of a forward pass at 224 px for the backward pass."""
    torch.set_num_threads(1)
    model = variant_model(variant).train()
    x = torch.randn(batch, 3, 224, 224)
    saved = saved_bytes(lambda: model(x), model.parameters())
    return {variant: (round(saved / 2**20, 1), "MiB")}


def crossing(ratios: dict[int, float]) -> float:
    """Return the size in px from which on the ratio is at most 1, by linear interpolation of its
    logarithm over that of the size.

    Args:
        ratios: size -> Vim's time / DeiT's.
    Returns: the smallest size if the ratio is never above 1; inf if it is above 1 at the largest;
        nan if a ratio is.
    """
    if any(map(math.isnan, ratios.values())):
        return math.nan
    sizes = sorted(ratios)
    slower = [size for size in sizes if ratios[size] > 1]
    if not slower:
        return sizes[0]
    if slower[-1] == sizes[-1]:
        return math.inf
    low, high = slower[-1], sizes[sizes.index(slower[-1]) + 1]
    above, below = math.log(ratios[low]), math.log(ratios[high])
    return low * (high / low) ** (above / (above - below))
