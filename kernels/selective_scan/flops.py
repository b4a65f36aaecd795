"""The cost of a scan: operations (also for torch's FLOP counter) and bytes.

    with flop_counter(display=False) as counter:
        encoder(images).sum().backward()
    counter.get_total_flops()

torch counts matrix products but no element-wise operations. Accordingly, the recurrence is counted,
but not the operations around it (softplus, D, the gate). Each multiplication, addition and
exponential counts as one, per token, channel, state and direction:

    forward    dt A, exp, a h, x B, their sum, h C, its sum                           7
    backward   a and h recomputed                                                     5
               g + C dy, h dy + …, g x + …, <g, B>, <q, A>, dt q + …        2 each   12
               q = g a h, g a                                               1 each    2

The reference is a plain loop of torch operations; torch counts those that it knows. A fused mixer
is counted with its two projections and the delta that its backward pass computes again; torch's
counter hooks all modules of a model, which are then called one by one. A plain `FlopCounterMode`
does not know the scans.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vim_ssl.kernels.backends import BACKENDS, available_backends, resolve
from vim_ssl.kernels.mixer import Direction

FORWARD, BACKWARD = 7, 19


@dataclass(frozen=True)
class Cost:
    """Operations, and a lower bound on the bytes that any implementation moves."""

    flops: int
    bytes: int


def scan_cost(
    s: int, b: int, l: int, d: int, n: int, *, backward: bool = False, itemsize: int = 4
) -> Cost:
    """Return the cost of `bi_selective_scan` (s = 2) with all its arguments, or of one direction
    (s = 1).

    Args:
        s, b, l, d, n: directions, batch, tokens, channels, states.
        backward: return the cost of all gradients instead.
        itemsize: bytes per element of u, delta, B, C, z and the output; parameters have four.
    Returns: the cost if every input is read and every output written once; tensors that a backend
        saves for the backward pass are not included.
    """
    tokens = 2 * s * b * l * (d + n)  # u, delta, B, C
    gate = b * l * d
    parameters = s * d * (n + 2)  # A, D, bias
    if backward:  # dout; the inputs; their gradients
        values, steps = gate + 2 * (tokens + gate), BACKWARD
        parameters *= 2
    else:
        values, steps = tokens + 2 * gate, FORWARD
    return Cost(steps * s * b * l * d * n, itemsize * values + 4 * parameters)


def flop_counter(device: str | torch.device = "cpu", **options: Any) -> Any:
    """Return a new `torch.utils.flop_counter.FlopCounterMode` that counts scans on this device.

    Args:
        options: options of `FlopCounterMode`, such as ``display=False``.
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

    for op, formulas in FORMULAS.items():
        for name in available_backends(device, op):
            resolve(op, name, torch.device(device).type)
            # Names in torch.ops.vim_ssl: forward, backward.
            operators = getattr(BACKENDS[op][name].loaded, "OPERATORS", ())
            for operator, formula in zip(operators, formulas, strict=False):
                packet = getattr(torch.ops.vim_ssl, operator)
                if packet not in flop_registry:
                    register_flop_formula(packet, get_raw=True)(formula)
    return FlopCounterMode(**options)


# Both the first and third argument of a scan, or result of its backward pass, are (s, b, l, d) and
# (s, d, n).
def _scan_forward(first: Tensor, second: Tensor, A: Tensor, *args, **more) -> int:
    return FORWARD * first.numel() * A.shape[-1]


def _scan_backward(*args, out_val, **more) -> int:
    first, _, dA, *_ = out_val
    return BACKWARD * first.numel() * dA.shape[-1]


def _mixer_forward(xz: Tensor, *rest, **more) -> int:
    projections, recurrence = _mixer(xz, Direction(*rest[: len(Direction._fields)]))
    return sum(projections) + FORWARD * recurrence


def _mixer_backward(dout: Tensor, xz: Tensor, *rest, **more) -> int:
    projections, recurrence = _mixer(xz, Direction(*rest[: len(Direction._fields)]))
    return 2 * sum(projections) + projections[1] + BACKWARD * recurrence  # delta is recomputed


def _mixer(xz: Tensor, one: Direction) -> tuple[list[int], int]:
    """Return operations of x_proj and dt_proj, and the elements of the recurrence."""
    tokens = 2 * xz.shape[0] * xz.shape[1]
    projections = [2 * tokens * m.numel() for m in (one.x_proj, one.dt_proj)]
    return projections, tokens * one.A_log.numel()


FORMULAS: dict[str, tuple[Callable[..., int], Callable[..., int]]] = {
    "selective_scan": (_scan_forward, _scan_backward),
    "mixer": (_mixer_forward, _mixer_backward),
}
