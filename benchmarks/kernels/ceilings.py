"""Measure the rates of this GPU that bound the time of the scan from below.

The scan needs one exponential per token, channel, state and direction, and a GPU has few units for
them; its backward pass is bound by instructions. Both rates depend on the clock under load, so they
are measured, not looked up.
"""

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
import triton
import triton.language as tl

BLOCK = 1024  # with four warps, eight independent chains per thread: enough to hide the latency
UNROLL: tl.constexpr = tl.constexpr(16)


@triton.jit
def _exponentials(out_ptr, steps, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = offsets.to(tl.float32) / BLOCK
    for i in range(steps):  # noqa: B007
        for j in tl.static_range(UNROLL):  # noqa: B007
            x = tl.exp2(-x)  # converges, so that no value ever overflows
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offsets, x)


@triton.jit
def _multiply_adds(out_ptr, steps, a, b, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = offsets.to(tl.float32) / BLOCK
    for i in range(steps):  # noqa: B007
        for j in tl.static_range(UNROLL):  # noqa: B007
            x = x * a + b
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offsets, x)


@dataclass(frozen=True)
class Ceilings:
    """Rates per second, and the clock while they were measured.

    Attributes:
        exp2, fma: single-precision exponentials; multiply-adds.
        copied: bytes read plus bytes written by a large copy.
        sm_clock_mhz: under load, or None where nvidia-smi does not report it.
    """

    exp2: float
    fma: float
    copied: float
    sm_clock_mhz: float | None

    def floor_ms(self, direction: str, b: int, l: int, d: int, n: int) -> float:
        """Lower bound of the time of a bidirectional scan, in milliseconds.

        forward: its exponentials, n for the states of each direction, two for each softplus and
        two for the gate. backward: twelve instructions per token, channel, state and direction,
        three to recompute the states and nine for the gradients.
        """
        elements = b * l * d
        if direction == "forward":
            return 1e3 * elements * (2 * n + 2 * 2 + 2) / self.exp2
        return 1e3 * elements * 2 * n * 12 / self.fma


def measure(device: str = "cuda", steps: int = 2000) -> Ceilings:
    """Measure this device's ceilings in about two seconds.

    Args:
        device: "cpu" only to test the code in the interpreter.
    """
    gpu = device == "cuda"
    programs = torch.cuda.get_device_properties(0).multi_processor_count * 16 if gpu else 2
    out = torch.empty(programs * BLOCK, device=device)
    work = programs * BLOCK * steps * UNROLL.value
    source = torch.empty(2**28 if gpu else 2**10, device=device)  # 1 GiB, far above the caches
    target = torch.empty_like(source)

    def exponentials() -> None:
        _exponentials[(programs,)](out, steps, BLOCK=BLOCK, num_warps=4)

    def multiply_adds() -> None:
        _multiply_adds[(programs,)](out, steps, 0.999, 0.001, BLOCK=BLOCK, num_warps=4)

    return Ceilings(
        exp2=work / _seconds(exponentials, gpu),
        fma=work / _seconds(multiply_adds, gpu),
        copied=2 * source.nbytes / _seconds(lambda: target.copy_(source), gpu),
        sm_clock_mhz=_clock_under(exponentials) if gpu else None,
    )


def _seconds(call: Callable[[], object], gpu: bool, repeats: int = 10) -> float:
    """Return the time of the fastest call, after one that compiles: a ceiling is the best rate."""
    call()
    if not gpu:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return min(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3


def _clock_under(call: Callable[[], object]) -> float | None:
    """Clock of the multiprocessors in MHz while the device is busy."""
    if shutil.which("nvidia-smi") is None:
        return None
    for _ in range(60):
        call()
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    torch.cuda.synchronize()
    return float(answer) if answer.replace(".", "").isdigit() else None
