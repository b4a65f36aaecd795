"""The mixer as one operator that saves little, built from the kernels of a backend.

    forward     u = silu(conv(x))                 (2, b, l, d)
                dt, B, C = x_proj(u)              (2, b, l, r + 2 n)     saved: small
                out = scan(u, dt_proj(dt), A, B, C, D, z)

    backward    u and delta are computed again from x and dt, then the gradients in reverse order

Saved are the operator's input, the output of x_proj and, if the backend keeps them, the states of
the scan. The largest tensors, u and delta of both directions, live only inside the operator, in
the forward and in the backward pass. Both directions' parameters are read where they are: there is
no stacked copy, which a change of a weight could leave behind.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vim_ssl.kernels.autograd import (
    channels_contiguous,
    gradient_required,
    operator,
    register_gradient,
)
from vim_ssl.kernels.mixer import Direction, torch_backend
from vim_ssl.kernels.mixer.torch_backend import wide

Pair = Sequence[Tensor]  # a parameter of both directions


class Kernels(NamedTuple):
    """What a backend computes, on channel-last tensors whose first axis is the direction: see the
    scan's `fused.py`. A, D, bias and weight are pairs of tensors; their gradients are (2, ...)."""

    # (x, z, parameters, scale, save) -> out, x_dbl, states; of the last two nothing is read unless
    # `save`, nor states that are not kept
    forward: Callable[..., tuple]
    # (x, weight, bias) -> u, again
    conv_forward: Callable[..., Tensor]
    # (du, x, weight, bias, dx) -> dweight, dbias; writes dx
    conv_backward: Callable[..., tuple[Tensor, ...]]
    # (u, delta, A, B, C, D, z, bias, scale) -> kept, again; None if the states were saved
    scan_forward: Callable[..., tuple[Tensor, ...]] | None
    # (dout, u, delta, A, B, C, D, z, bias, *kept, scale, dz) -> du, ddelta, dA, dB, dC, dD, dbias;
    # writes dz, unless it is None
    scan_backward: Callable[..., tuple[Tensor, ...]]
    # Number of elements of the states that are saved, of xz and A_log; None to save none.
    states: Callable[[Tensor, Tensor], int] | None


def fused_mixer(prefix: str, kernels: Kernels, dtypes: Sequence[torch.dtype]) -> Callable:
    """Define the operators `vim_ssl::<prefix>mixer_forward` and `…backward`, and return `bi_mixer`
    of a backend; inputs of other dtypes go to the torch backend."""
    tensors = ", ".join(
        f"Tensor {field}{suffix}" for suffix in ("", "_b") for field in Direction._fields
    )
    options = "bool gated, float scale"

    @operator(
        f"{prefix}mixer_forward",
        schema=f"(Tensor xz, {tensors}, {options}, bool save) -> (Tensor, Tensor, Tensor)",
        fake=lambda xz, *rest: _empty_results(kernels, xz, rest),
    )
    def forward(xz, *rest):
        *parameters, gated, scale, save = rest
        return _forward(kernels, xz, parameters, gated, scale, save)

    @operator(
        f"{prefix}mixer_backward",
        schema=f"(Tensor dout, Tensor xz, {tensors}, Tensor x_dbl, Tensor states, {options}) -> ("
        + ", ".join(["Tensor"] * (1 + len(Direction._fields))) + ")",
        fake=lambda dout, xz, *rest: _empty_gradients(xz, rest),
    )  # fmt: skip
    def backward(dout, xz, *rest):
        *parameters, x_dbl, states, gated, scale = rest
        return _backward(kernels, dout, xz, parameters, x_dbl, states, gated, scale)

    def gradients(ctx, dout, *_):
        *inputs, x_dbl, states = ctx.saved_tensors
        gated, scale, save = ctx.options
        if not save:  # a program that was exported without gradients
            _, x_dbl, states = forward(*inputs, gated, scale, True)
        dxz, *stacked = backward(dout, *inputs, x_dbl, states, gated, scale)
        return dxz, *(m[k] for k in (0, 1) for m in stacked)

    register_gradient(forward, backward, f"{prefix}mixer", kept=1, gradients=gradients)

    def bi_mixer(xz, first, second, gated, scale, backend):
        tensors = (xz, *first, *second)
        if xz.dtype not in dtypes or xz.numel() == 0:
            return torch_backend.bi_mixer(xz, first, second, gated, scale, backend)
        return forward(*tensors, gated, scale, gradient_required(tensors))[0]

    return bi_mixer


def _empty_results(kernels: Kernels, xz: Tensor, rest: Sequence[Any]) -> tuple[Tensor, ...]:
    """The output, and for the backward pass x_proj's output and the scan's states, flat."""
    (b, l, d2), first, save = xz.shape, Direction(*rest[: len(Direction._fields)]), rest[-1]
    states = kernels.states(xz, first.A_log) if save and kernels.states else 0
    return (
        xz.new_empty(b, l, d2 // 2),
        xz.new_empty((2, b, l, len(first.x_proj)) if save else 0),
        xz.new_empty(states, dtype=torch.float32),
    )


def _empty_gradients(xz: Tensor, rest: Sequence[Any]) -> tuple[Tensor, ...]:
    """The gradients of xz, and of each parameter of both directions together."""
    first = Direction(*rest[: len(Direction._fields)])
    return xz.new_empty(xz.shape), *(m.new_empty(2, *m.shape) for m in first)


def without_autocast(function: Callable) -> Callable:
    """Decorate a pass: it computes in the dtype of its input, also where the backward pass is in
    another autocast region than the forward pass."""

    @functools.wraps(function)
    def run(kernels, first, *rest):
        kind = first.device.type
        if not torch.is_autocast_enabled(kind):
            return function(kernels, first, *rest)
        with torch.autocast(kind, enabled=False):
            return function(kernels, first, *rest)

    return run


@without_autocast
def _forward(kernels: Kernels, xz, parameters, gated: bool, scale: float, save: bool):
    x, z, pairs = _split(xz, parameters, gated)
    out, x_dbl, states = kernels.forward(x, z, pairs, scale, save)
    if not save:
        x_dbl = xz.new_empty(0)
    if not (save and kernels.states):
        states = xz.new_empty(0, dtype=torch.float32)
    return out, x_dbl, states


@without_autocast
def _backward(kernels: Kernels, dout, xz, parameters, x_dbl, states, gated: bool, scale: float):
    x, z, pairs = _split(xz, parameters, gated)
    u = kernels.conv_forward(x, *taps(pairs))
    dt, scan = scan_arguments(u, x_dbl, z, pairs)
    kept = kernels.scan_forward(*scan, scale) if kernels.scan_forward else (states,)
    dxz = xz.new_empty(xz.shape) if gated else xz.new_zeros(xz.shape)  # contiguous
    dx, dz = dxz.chunk(2, dim=-1)
    du, ddelta, dA, dB, dC, dD, ddt_bias = kernels.scan_backward(
        dout, *scan, *kept, scale, dz if gated else None
    )
    dA *= scan[2]  # A = -exp(A_log) is its own derivative
    ddt_proj = weight_gradients(ddelta, dt)
    ddt = project(ddelta, [w.mT for w in pairs.dt_proj])
    dx_dbl = torch.cat([ddt, dB, dC], dim=-1)
    dx_proj = weight_gradients(dx_dbl, u)
    x_proj = torch.stack(pairs.x_proj).to(xz.dtype)
    du.flatten(1, 2).baddbmm_(dx_dbl.flatten(1, 2), x_proj)
    dconv_weight, dconv_bias = kernels.conv_backward(du, x, *taps(pairs), dx)
    dconv_weight = dconv_weight.view(2, *pairs.conv_weight[0].shape)
    gradients = dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA, dD
    return dxz, *(m.to(pair[0].dtype) for m, pair in zip(gradients, pairs, strict=True))


def _split(xz: Tensor, parameters: Sequence[Tensor], gated: bool):
    """Return x, z or None, and the parameters as pairs."""
    x, z = channels_contiguous(xz).chunk(2, dim=-1)
    count = len(Direction._fields)
    both: Any = zip(parameters[:count], parameters[count:], strict=True)
    pairs = Direction(*both)
    return x, z if gated else None, pairs


def taps(pairs) -> tuple[Pair, Pair]:
    """Return the convolution's weight and bias."""
    return tuple(map(wide, pairs.conv_weight)), tuple(map(wide, pairs.conv_bias))


def scan_arguments(u: Tensor, x_dbl: Tensor, z: Tensor | None, pairs):
    """Return dt (2, b, l, r), and the tensors that the scan takes."""
    n, r = pairs.A_log[0].shape[-1], pairs.dt_proj[0].shape[-1]
    dt, B, C = x_dbl.split([r, n, n], dim=-1)
    D, bias = (tuple(map(wide, m)) for m in (pairs.D, pairs.dt_bias))
    A = wide(torch.stack(pairs.A_log)).exp().neg_()
    return dt, (u, project(dt, pairs.dt_proj), A, B, C, D, z, bias)


def project(m: Tensor, weights: Pair) -> Tensor:
    """(2, b, l, i) times each direction's weight (o, i) -> (2, b, l, o)."""
    weight = torch.stack(tuple(weights)).to(m.dtype)
    return (m.flatten(1, 2) @ weight.mT).unflatten(1, m.shape[1:3])


def weight_gradients(dout: Tensor, m: Tensor) -> Tensor:
    """(2, b, l, o), (2, b, l, i) -> (2, o, i), the gradients of both directions' weight."""
    return dout.flatten(1, 2).mT @ m.flatten(1, 2)
