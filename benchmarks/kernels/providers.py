"""The implementations of the bidirectional scan that `timing.py` compares.

Our own backends, a loop and an associative scan by torch.compile, and on a GPU the peers of
benchmarks/peers/.
"""

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_ssl.kernels.selective_scan import bi_selective_scan
from vim_ssl.kernels.selective_scan.accuracy import BACKENDS, Tensors, runnable

PEERS = Path(__file__).parents[1] / "peers"
CHUNK = 16  # tokens of the compiled loop


@dataclass(frozen=True)
class Shape:
    """The scan inside one block: d = 384, 768, 1536 are those of Vim-Ti, -S and -B."""

    b: int
    l: int
    d: int
    n: int = 16

    def __str__(self) -> str:
        return f"b{self.b}-l{self.l}-d{self.d}-n{self.n}"


def _same(m):
    return m


def _always(shape: Shape, direction: str) -> str | None:
    return None


@dataclass
class Provider:
    """An implementation of `bi_selective_scan`.

    Attributes:
        scan: called with the tensors that ``prepare`` returns. It has no backward pass to time if
            its output needs no gradient.
        prepare: converts the arguments of `bi_selective_scan` to the provider's layout. Not timed,
            since a model would compute them in that layout.
        output: converts the result of ``scan`` to (b, l, d). Not timed.
        why_not: the reason to skip this shape and direction, or None.
        compiles: the first call with a shape takes seconds, which are reported.
        capture: also time it replayed from a CUDA graph, without launches by the host.
    """

    name: str
    scan: Callable[..., Tensor]
    prepare: Callable[[Tensors], Tensors] = _same
    output: Callable[[Tensor], Tensor] = _same
    why_not: Callable[[Shape, str], str | None] = _always
    compiles: bool = False
    capture: bool = False


def providers(
    device: str, groups: Collection[str] | None = None
) -> tuple[list[Provider], list[str]]:
    """The providers that run on this kind of device, and a line for each that does not.

    Args:
        groups: names of backends, "compiled" (by torch.compile) and, on a GPU, names of the files
            in benchmarks/peers/; None for all.
    """

    def requested(group: str) -> bool:
        return groups is None or group in groups

    names, skipped = runnable(device)
    if device == "cuda":
        names = [name for name in names if name != "reference"]  # a slower torch loop
    limits = {"reference": _reference_limits, "torch": _launches if device == "cuda" else _always}
    available = [
        Provider(
            name,
            partial(bi_selective_scan, backend=name),
            capture=name == "triton",
            why_not=limits.get(name, _always),
        )
        for name in sorted(filter(requested, names), key=BACKENDS.index, reverse=True)
    ]
    torch._functorch.config.donated_buffer = False  # a backward pass is called many times here
    peers = sorted(PEERS.glob("*.py")) if device == "cuda" else []
    for path in (path for path in peers if requested(path.stem)):
        try:
            available += load_peer(path).providers()
        except Exception as error:  # of any type: a third party's kernel is built here
            skipped.append(f"skipped: {path.stem}. {type(error).__name__}: {str(error)[:300]}")
    if requested("compiled"):
        loop = partial(chunked_loop, torch.compile(_chunk, dynamic=False))
        mode = "pointwise" if device == "cuda" else "generic"
        scan = torch.compile(partial(associative_scan, combine_mode=mode), dynamic=False)
        available += [
            Provider("compiled loop", loop, why_not=_forward_only, compiles=True),
            Provider("compiled associative_scan", scan, why_not=_small_only, compiles=True),
        ]
    return available, skipped


def load_peer(path: Path):
    """Import a file of benchmarks/peers/ under a name that hides no installed package."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reference_limits(shape: Shape, direction: str) -> str | None:
    if direction == "backward" and shape.l > 1000:
        return "autograd pads every token's gradient to the whole sequence"
    return None


def _launches(shape: Shape, direction: str) -> str | None:
    if shape.d > 384:
        return "bound by its launches; only the smallest width is timed"
    return None


def _forward_only(shape: Shape, direction: str) -> str | None:
    if direction == "backward":
        return "compiled for its forward pass only"
    return _launches(shape, direction)


def _small_only(shape: Shape, direction: str) -> str | None:
    if direction == "backward":
        return "its backward pass keeps every state, and torch cannot compile it everywhere"
    if shape.b * shape.l * shape.d > 10_000_000:
        return "it keeps every state in memory"
    return None


def _two_ways(u, delta, A, B, C, D, z, delta_bias):
    """Inputs in float32 and scan order: the second direction flipped, dt after softplus."""
    u, delta, B, C = (torch.stack([m[0], m[1].flip(1)]).float() for m in (u, delta, B, C))
    dt = F.softplus(delta + delta_bias[:, None, None])
    return u, dt, A, B, C, D[:, None, None], F.silu(z.float())


def chunked_loop(chunk, u, delta, A, B, C, D, z, delta_bias):
    """One step a token without kept states, in chunks that a compiler unrolls in seconds."""
    dtype = u.dtype
    u, dt, A, B, C, D, gate = _two_ways(u, delta, A, B, C, D, z, delta_bias)
    h, ys = u.new_zeros(*u.shape[:2], *A.shape[1:]), []
    for chunks in zip(*(m.split(CHUNK, dim=2) for m in (dt, dt * u, B, C)), strict=True):
        h, y = chunk(h, A, *chunks)
        ys.append(y)
    y = torch.cat(ys, dim=2) + D * u
    return ((y[0] + y[1].flip(1)) * gate).to(dtype)


def _chunk(h, A, dt, x, B, C):
    ys = []
    for t in range(dt.shape[2]):
        h = (dt[:, :, t, :, None] * A[:, None]).exp() * h + x[:, :, t, :, None] * B[:, :, t, None]
        ys.append((h * C[:, :, t, None]).sum(-1))
    return h, torch.stack(ys, dim=2)


def associative_scan(u, delta, A, B, C, D, z, delta_bias, combine_mode):
    """torch's associative scan over pairs (decay, input), with all states in memory."""
    from torch._higher_order_ops.associative_scan import associative_scan

    dtype = u.dtype
    u, dt, A, B, C, D, gate = _two_ways(u, delta, A, B, C, D, z, delta_bias)
    decay = (dt[..., None] * A[:, None, None]).exp()  # (2, b, l, d, n)
    fed = (dt * u)[..., None] * B[:, :, :, None]
    _, h = associative_scan(
        lambda one, two: (one[0] * two[0], one[1] * two[0] + two[1]), (decay, fed), dim=2,
        combine_mode=combine_mode,
    )  # fmt: skip
    y = (h * C[:, :, :, None]).sum(-1) + D * u
    return ((y[0] + y[1].flip(1)) * gate).to(dtype)
