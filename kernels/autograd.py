"""Custom operators: registration with `torch.library`, fake results, gradients, and strides.

    @operator("double", fake=lambda x: x.new_empty(x.shape))
    def double(x: Tensor) -> Tensor: ...

defines ``torch.ops.vim_ssl.double``. torch.compile and torch.export treat an operator as one node
of the graph and get the shapes of its results from the fake.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# A parameter of s directions: stacked (s, …), or a tensor for each direction.
Parameter = Tensor | tuple[Tensor, ...]


def operator(
    name: str, *, fake: Callable, device_types: str | None = None, schema: str | None = None
) -> Callable:
    """Return a decorator that registers a function as `torch.ops.vim_ssl.<name>`.

    Args:
        fake: returns empty results with the right shapes and dtypes, given the same arguments.
        device_types: the only device type that it supports; None for all.
        schema: "(Tensor x, ...) -> Tensor", if the function's annotations do not say it.
    """

    def decorate(function: Callable) -> Any:
        registered = torch.library.custom_op(
            f"vim_ssl::{name}", function, mutates_args=(), device_types=device_types, schema=schema
        )
        registered.register_fake(fake)
        return Operator(function, registered)

    return decorate


class Operator:
    """A function, and the operator of torch that it is registered as.

    Calls the function itself where nothing needs the operator: without gradients, programs being
    traced and modes such as a counter of operations. An operator costs as much as a short kernel.
    """

    def __init__(self, function: Callable, registered: Any):
        self.function, self.registered = function, registered

    def __call__(self, *args):
        if torch.compiler.is_compiling() or not _is_plain_call(args):
            return self.registered(*args)
        return self.function(*args)


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_plain_call(args: Sequence[Any]) -> bool:
    """True if only the results of a call are needed."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    differentiating = torch.is_grad_enabled()
    for m in args:
        if isinstance(m, Tensor) and (
            type(m) not in _PLAIN
            or not (m.is_cpu or m.is_cuda)
            or m.is_neg()
            or (differentiating and m.requires_grad)
        ):
            return False
    return True


def register_gradient(
    forward: Any,
    backward: Any,
    title: str,
    *,
    saved: slice = slice(None),
    kept: int | None = None,
    gradients: Callable | None = None,
) -> None:
    """Register the operator ``backward`` as the derivative of ``forward``; it cannot be
    differentiated again.

    ``forward`` takes tensors, some of which may be None, then options. ``backward`` takes the
    gradients of the results, the saved tensors and the options, and returns a gradient for each
    tensor. Gradients of absent tensors are dropped; the others are cast to their tensor's dtype.

    Args:
        title: name of the operation, for the error message on double backward.
        saved: the tensors that ``backward`` needs.
        kept: index of the first result that is saved; ``backward`` gets the saved results instead
            of their gradients. None if no result is saved.
        gradients: called instead of ``backward`` as ``gradients(ctx, *gradients of all results)``,
            where a result without a gradient has None; ``ctx`` has ``saved_tensors``, ``options``
            and ``dtypes`` (of all tensors; None for an absent one).
    """

    def setup_context(ctx, inputs, output):
        tensors = [m for m in inputs if m is None or isinstance(m, Tensor)]
        ctx.options = inputs[len(tensors) :]
        ctx.dtypes = [None if m is None else m.dtype for m in tensors]
        ctx.save_for_backward(*tensors[saved], *(() if kept is None else output[kept:]))
        ctx.set_materialize_grads(gradients is None)

    def differentiate(ctx, *incoming):
        if gradients is None:
            results = backward(*incoming[:kept], *ctx.saved_tensors, *ctx.options)
        else:
            results = gradients(ctx, *incoming)
        cast = (
            None if gradient is None or dtype is None else gradient.to(dtype)
            for gradient, dtype in zip(results, ctx.dtypes, strict=True)
        )
        return (*cast, *(None for _ in ctx.options))

    def refuse(ctx, *incoming):
        raise RuntimeError(
            f"The {title} cannot be differentiated twice (double backward); "
            "set VIM_SSL_BACKEND=reference, or select backend='reference', for second derivatives."
        )

    forward.registered.register_autograd(differentiate, setup_context=setup_context)
    backward.registered.register_autograd(refuse)


def gradient_required(tensors) -> bool:
    return torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in tensors)


def contiguous(m: Any) -> Any:
    """Return a contiguous tensor, a tuple of them for a tuple, or None."""
    if isinstance(m, tuple):
        return tuple(one.contiguous() for one in m)
    return None if m is None else m.contiguous()


def channels_contiguous(m: Any) -> Any:
    """Return m unchanged if its last axis has stride 1 (e.g. half of a projection's output), else a
    contiguous copy."""
    return m if m is None or m.stride(-1) == 1 else m.contiguous()


def address(m: Tensor | None) -> int:
    """Return the address for a kernel: 0 for None, as for an empty tensor."""
    return 0 if m is None else m.data_ptr()


def addresses(m: Parameter | None) -> tuple[int, int]:
    """Return the addresses of both directions' parts of a contiguous parameter, 0 for None; with
    one direction the second one is not to be read."""
    if m is None:
        return 0, 0
    if isinstance(m, Tensor):
        return m.data_ptr(), m.data_ptr() + m.stride(0) * m.itemsize
    return m[0].data_ptr(), m[-1].data_ptr()
