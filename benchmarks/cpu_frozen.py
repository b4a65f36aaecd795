"""Steps of classification and segmentation with a trained and with a frozen encoder (`cpu.py`)."""

from collections.abc import Callable

import torch
from process import peak_mib
from turns import Values, in_turns, medians

from vim_ssl import load_encoder
from vim_ssl.models.freezing import Freezable
from vim_ssl.objectives.classification import Classification
from vim_ssl.tasks.segmentation import Segmentation
from vim_ssl.training.optim import build_optimizer

VIM, SIZE, CLASSES = "vim_tiny_patch16_224", 224, 10
TASKS = ("classification", "segmentation")
VARIANTS = ("trained", "frozen", "features at hand")  # the last one of classification only


def objective(task: str) -> Freezable:
    if task == "classification":
        return Classification(load_encoder(VIM, num_classes=CLASSES))
    names = [str(i) for i in range(CLASSES)]
    return Segmentation(load_encoder(VIM), names, window=SIZE, channels=64)


def stepper(task: str, variant: str, batch: int) -> Callable[..., None]:
    """Return a function that makes a training step on a random batch, or on its first images."""
    model = objective(task)
    if variant != "trained":
        model.freeze_encoder()
    optimizer = build_optimizer(model.train(), lr=1e-4, weight_decay=0.05)
    x = {"image": torch.randn(batch, 3, SIZE, SIZE)}
    if variant == "features at hand":
        x = {"features": torch.randn(batch, model.encoder.num_features)}
    x["label"] = torch.arange(batch) % CLASSES
    x["mask"] = x["label"][:, None, None].expand(batch, SIZE, SIZE)

    def step(images: int = batch) -> None:
        output = model({name: values[:images] for name, values in x.items()})
        (output.loss_sum / output.weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_frozen(task: str, batch: int, turns: int) -> Values:
    """Time a step, forward, backward and AdamW, of every variant."""
    torch.set_num_threads(1)
    variants = VARIANTS if task == "classification" else VARIANTS[:2]
    calls = {variant: stepper(task, variant, batch) for variant in variants}
    return medians(in_turns(calls, turns), [(VARIANTS[0], VARIANTS[1])])


def frozen_memory(task: str, variant: str, batch: int) -> Values:
    """Measure the increase of the peak resident set by a step, after one on two images, which
    compiles and allocates the optimiser's state."""
    torch.set_num_threads(1)
    step = stepper(task, variant, batch)
    step(2)
    before = peak_mib()
    step()
    return {variant: (round(peak_mib() - before), "MiB")}
