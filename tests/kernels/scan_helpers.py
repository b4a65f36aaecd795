"""Inputs, runners and error measures that the scan's tests share."""

import torch
from torch import Tensor

from vim_ssl.kernels.selective_scan import (
    accuracy,
    available_backends,
    bi_selective_scan,
    selective_scan,
)
from vim_ssl.kernels.selective_scan.accuracy import loss_weights, relative_error, typed

BACKENDS = available_backends("cpu")
FAST_BACKENDS = [name for name in BACKENDS if name != "reference"]
OPTIONAL = ("D", "z", "delta_bias")


def one_way_inputs(
    b: int = 2,
    l: int = 9,
    d: int = 5,
    n: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    groups: int = 0,
    without: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Random arguments of `selective_scan`, parameters in float32 (float64 for float64 inputs)."""
    inputs = typed(accuracy.one_way_inputs(b, l, d, n, groups=groups), dtype)
    return {name: m for name, m in inputs.items() if name not in without}


def two_way_inputs(
    b: int = 2,
    l: int = 9,
    d: int = 5,
    n: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Random arguments of `bi_selective_scan`, parameters in float32 (float64 for float64)."""
    inputs = typed(accuracy.two_way_inputs(b, l, d, n), dtype)
    return {name: m for name, m in inputs.items() if name not in without}


def as_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: m.detach().double() for name, m in inputs.items()}


def run_scan(inputs: dict[str, Tensor], backend: str, **options) -> dict[str, Tensor]:
    """Outputs and the gradient of every input, named ``y``, ``last``, ``d_<argument>``.

    The loss weighs every output element differently, and the last state too where it is returned.
    """
    leaves = {name: m.detach().clone().requires_grad_() for name, m in inputs.items()}
    return run_on_leaves(leaves, leaves, backend, **options)


def run_on_leaves(leaves, inputs, backend, **options) -> dict[str, Tensor]:
    """`run_scan` for inputs that are views of leaves."""
    two_way = inputs["u"].dim() == 4
    out = (bi_selective_scan if two_way else selective_scan)(**inputs, backend=backend, **options)
    named = {"y": out[0], "last": out[1]} if isinstance(out, tuple) else {"y": out}
    loss = sum((m.double() * loss_weights(m)).sum() for m in named.values())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named |= {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: m.detach() for name, m in named.items()}


def last_state_gradients(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Gradients of a loss that the outputs of `selective_scan` have no part in."""
    leaves = {name: m.detach().clone().requires_grad_() for name, m in inputs.items()}
    _, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True, backend=backend)
    loss = (last.double() * loss_weights(last)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}


def assert_exports_for_lengths(lengths, backend: str, device: str = "cpu") -> None:
    """One exported training forward pass of both directions, and the same results as without."""

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C, D, z, delta_bias):
            return bi_selective_scan(u, delta, A, B, C, D, z, delta_bias, backend=backend)

    def inputs(l: int) -> tuple[Tensor, ...]:
        m = two_way_inputs(1, l, 2, 2)
        return tuple(v.to(device).requires_grad_() for v in m.values())

    l = torch.export.Dim("l")
    tokens = {"u": {2: l}, "delta": {2: l}, "B": {2: l}, "C": {2: l}, "z": {1: l}}
    dynamic = {name: tokens.get(name) for name in two_way_inputs()}
    exported = torch.export.export(Scan(), inputs(lengths[0]), dynamic_shapes=dynamic).module()
    for length in lengths:
        m = inputs(length)
        torch.testing.assert_close(exported(*m), Scan()(*m))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], forward=1e-5, gradient=1e-4):
    """Relative errors within the project's float32 table; the names must be the same."""
    assert got.keys() == expected.keys()
    for name, m in got.items():
        assert m.shape == expected[name].shape, name
        error = relative_error(m, expected[name])
        limit = gradient if name.startswith("d_") else forward
        assert error <= limit, f"{name}: relative error {error:.1e} is above {limit:.0e}"
