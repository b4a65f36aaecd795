"""The cost of a scan, against a loop that counts its own steps and against its tensors."""

import math
from pathlib import Path

import pytest
import torch
from scan_helpers import FAST_BACKENDS, two_way_inputs

from vim_ssl.kernels.mixer import Direction, bi_mixer
from vim_ssl.kernels.selective_scan import bi_selective_scan, flops
from vim_ssl.kernels.selective_scan.flops import flop_counter, scan_cost

B, L, D, N = 2, 9, 5, 4


class Counted(float):
    """A number that counts what is done with it."""

    steps = 0

    def _count(self, value: float) -> "Counted":
        Counted.steps += 1
        return Counted(value)

    def __add__(self, other):
        return self._count(float(self) + other)

    def __mul__(self, other):
        return self._count(float(self) * other)

    def exp(self) -> "Counted":
        return self._count(math.exp(self))


def by_hand(backward: bool) -> int:
    """The recurrence of one channel and state for all tokens, as the README writes it, times their
    number."""
    Counted.steps, x = 0, Counted(0.5)
    dt, A, u, b, c, dy = x, x, x, x, x, x
    h = y = g = dA = x
    for _ in range(L):
        a = (dt * A).exp()
        ah = a * h
        h = ah + u * b
        if backward:
            g = g + c * dy
            (x + h * dy, x + g * u, x + g * b)  # dC, dB, du: sums over channels or states
            q = g * ah
            (x + q * A, dA + dt * q)
            g = g * a
        else:
            y = y + h * c
    return Counted.steps * 2 * B * D * N


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_torchs_counter_counts_what_a_loop_does(backend):
    inputs = {k: v.requires_grad_() for k, v in two_way_inputs(B, L, D, N).items()}
    with flop_counter(display=False) as forward:
        out = bi_selective_scan(**inputs, backend=backend)
    with flop_counter(display=False) as backward:
        out.sum().backward()
    counted = forward.get_total_flops(), backward.get_total_flops()
    assert counted == (by_hand(False), by_hand(True))
    assert counted == tuple(scan_cost(2, B, L, D, N, backward=b).flops for b in (False, True))


def test_bytes_are_those_of_the_tensors():
    inputs = {k: v.requires_grad_() for k, v in two_way_inputs(B, L, D, N).items()}
    out = bi_selective_scan(**inputs)
    read = sum(m.nbytes for m in inputs.values())
    assert scan_cost(2, B, L, D, N).bytes == read + out.nbytes
    gradients = torch.autograd.grad(out.sum(), list(inputs.values()))
    moved = out.nbytes + read + sum(m.nbytes for m in gradients)
    assert scan_cost(2, B, L, D, N, backward=True).bytes == moved
    half = two_way_inputs(B, L, D, N, dtype=torch.bfloat16)
    read = sum(m.nbytes for m in half.values())
    assert scan_cost(2, B, L, D, N, itemsize=2).bytes == read + 2 * B * L * D


def counts(function, op: str) -> list[int]:
    """Operations of the forward and backward pass that are in operators of this name."""
    with flop_counter(display=False) as forward:
        out = function()
    with flop_counter(display=False) as backward:
        out.sum().backward()
    found = [counter.get_flop_counts()["Global"] for counter in (forward, backward)]
    return [sum(n for name, n in c.items() if op in str(name)) for c in found]


SCANS = [scan_cost(2, 1, 17, 32, 16, backward=b).flops for b in (False, True)]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_whole_encoder_is_counted(monkeypatch, backend):
    """The matrix products of torch's own count and the scans of every block; torch's counter hooks
    all modules, so that no mixer is fused. The convolution is counted where torch knows it only."""
    from vim_ssl import VimEncoder

    encoder = VimEncoder(img_size=16, patch_size=4, embed_dim=16, depth=3, num_classes=0)

    def run() -> torch.Tensor:
        return encoder(torch.randn(1, 3, 16, 16))

    monkeypatch.setenv("VIM_SSL_BACKEND", "torch")
    products = counts(run, "mm")
    monkeypatch.setenv("VIM_SSL_BACKEND", backend)
    assert counts(run, "mm") == products
    assert counts(run, "scan") == [3 * scans for scans in SCANS]


def test_a_fused_mixer_is_counted_with_its_projections():
    torch.manual_seed(0)
    d, n, r = 32, 16, 1
    shapes = ((d, 1, 4), (d,), (r + 2 * n, d), (d, r), (d,), (d, n), (d,))
    one, two = (Direction(*(torch.rand(shape) for shape in shapes)) for _ in range(2))
    xz = torch.randn(1, 17, 2 * d, requires_grad=True)
    projections = 2 * 2 * 17 * d * (r + 2 * n + r)  # of both directions
    delta = 2 * 2 * 17 * d * r  # computed again in the backward pass
    inner = counts(lambda: bi_mixer(xz, one, two, backend="numba"), "mixer")
    assert inner == [projections + SCANS[0], 2 * projections + delta + SCANS[1]]


def test_the_count_in_the_readme_holds():
    text = Path(flops.__file__).with_name("README.md").read_text(encoding="utf-8")
    call, count = (part.partition("```")[0] for part in text.split("```python\n")[1:3])
    exec(call + count, {})
