"""Time and memory of features, of features with a dense head, or of a training step.

python -m vim_ssl.tasks.paper.efficiency '{"model": …}'        # one point, in this process
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
from torch import Tensor, nn

from vim_ssl.models.heads import FeatureUpsampling, UPerNet
from vim_ssl.tasks.paper.counted import gflops
from vim_ssl.utils.memory import peak_mib, proc_mib, reset_peak

MODELS = {
    "vim_tiny": "vim_tiny_patch16_224", "deit_tiny": "deit_tiny_patch16_224",
    "vim_small": "vim_small_patch16_224", "deit_small": "deit_small_patch16_224",
}  # fmt: skip
NAMES = {"vim_tiny": "Vim-Ti", "deit_tiny": "DeiT-Ti", "vim_small": "Vim-S", "deit_small": "DeiT-S"}
FEATURES, STEP, DENSE = "features", "step", "dense"
TASKS = (FEATURES, STEP, DENSE)
DONE, TOO_LONG, TOO_LARGE = "measured", "too long", "too large"
SHORT, LONG = 2.0, 10.0  # seconds: minimum total of the passes; passes this long are not repeated
CLASSES = 150  # outputs of the dense head, as for ADE20K


@dataclass(frozen=True)
class Point:
    """A measurement in one process.

    Attributes:
        task: "features", "step" (a training step with AdamW), or "dense" (features and UPerNet).
    """

    device: str
    threads: int
    model: str
    attention: str  # "fused" or "plain"; "" for Vim
    task: str
    pixels: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        kind = f", {self.attention} attention" if self.attention else ""
        return f"{NAMES[self.model]}{kind}, {self.task}, {self.pixels} px"


def measure(point: Point, repeats: int, memory_gb: float) -> dict[str, Any]:
    """Measure a point in this process. Raises: MemoryError when it does not fit."""
    import resource  # not on Windows

    from timm.layers import set_fused_attn

    torch.set_num_threads(point.threads)
    if point.attention == "plain":
        set_fused_attn(False)
    cuda = point.device == "cuda"
    torch.manual_seed(0)
    training = point.task == STEP
    name = MODELS[point.model]
    args = {"num_classes": 1000 if training else 0, "img_size": point.pixels}
    model = _model(point, name, args).to(point.device).train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    dtype = getattr(torch, point.dtype)

    def run(net: Any, x: Any) -> None:
        with (
            torch.inference_mode(not training),
            torch.autocast(point.device, dtype, enabled=dtype != torch.float32),
        ):
            out = net(x)
        if training:
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    small = _model(point, name, args | {"img_size": 32}).to(point.device).train(training)
    run(small, torch.randn(1, 3, 32, 32, device=point.device))  # compiles and loads libraries
    del small
    x = torch.randn(point.batch, 3, point.pixels, point.pixels, device=point.device)
    if memory_gb and not cuda:
        # Limit private memory only: the libraries' address space is many times larger.
        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    reset_peak(point.device)
    before = peak_mib(point.device)
    clock = time.process_time if not cuda and point.threads == 1 else time.perf_counter

    def timed() -> float:
        started = clock()
        run(model, x)
        if cuda:
            torch.cuda.synchronize()
        return clock() - started

    try:
        times = [timed()]
        if times[0] < LONG:
            times = [timed()]
        while sum(times) < (LONG if len(times) < repeats else SHORT):
            times.append(timed())
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise
    peak = peak_mib(point.device)
    median = statistics.median(times)
    return {
        "seconds": round(median, 5), "passes": len(times),
        "images_per_s": round(point.batch / median, 4), "peak_mib": round(peak),
        "rise_mib": round(peak - before, 1), "gflops": gflops(name, point.pixels),
    }  # fmt: skip


class WithDenseHead(nn.Module):
    """A model of timm's protocol with the neck and head of segmentation, for inference.

    Args:
        model: has ``forward_intermediates``, patches of 16 px and ``embed_dim``.
    """

    def __init__(self, model: Any):
        super().__init__()
        dim, depth = model.embed_dim, len(model.feature_info)
        self.model = model
        self.taps: Sequence[int] = [depth * k // 4 - 1 for k in (1, 2, 3, 4)]
        self.neck, self.head = FeatureUpsampling(dim, 16), UPerNet([dim] * 4, CLASSES, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, CLASSES, h / 4, w / 4)."""
        maps = self.model.forward_intermediates(
            x, indices=self.taps, norm=True, intermediates_only=True
        )
        return self.head(self.neck(maps))


def _model(point: Point, name: str, args: dict[str, Any]) -> nn.Module:
    import timm

    import vim_ssl.checkpoints.timm_registry  # noqa: F401 (registers its models)

    model = timm.create_model(name, **args)
    return WithDenseHead(model) if point.task == DENSE else model


def free_gib() -> float:
    """Return 70 % of the available memory, so that no process is killed; 0 if unknown."""
    return round(0.7 * proc_mib("meminfo", "MemAvailable") / 2**10, 1)


def measured(
    point: Point, *, seconds: float = 300.0, repeats: int = 3, memory_gb: float | None = None
) -> dict[str, Any]:
    """Measure a point in a fresh process; return its row.

    Args:
        seconds: limit for the process.
        repeats: passes that are measured if one takes less than `LONG`.
        memory_gb: limit on a CPU, 0 for none; by default `free_gib`.
    Raises: RuntimeError with the process's output if it fails for a reason other than time or
        memory.
    """
    limit = free_gib() if memory_gb is None else memory_gb
    words = {"point": asdict(point), "repeats": repeats, "memory_gb": limit}
    command = [sys.executable, "-m", "vim_ssl.tasks.paper.efficiency", json.dumps(words)]
    tokens = {"tokens": (point.pixels // 16) ** 2 + 1}
    environment = os.environ | {"OMP_NUM_THREADS": str(point.threads)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return tokens | {"state": TOO_LONG}
    # A process killed by the system for its memory prints nothing.
    if done.returncode == -9 or (done.returncode and "MemoryError" in done.stderr):
        return tokens | {"state": TOO_LARGE}
    if done.returncode:
        raise RuntimeError(f"{point} failed:\n{done.stderr[-3000:]}")
    return tokens | {"state": DONE} | json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str]) -> int:
    words = json.loads(argv[0])
    words["point"] = Point(**words["point"])
    print(json.dumps(measure(**words)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
