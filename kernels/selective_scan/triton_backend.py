"""The selective scan on a GPU, in Triton: both directions in one launch, forward and backward.

`triton_kernels.py` and `triton_backward.py` define and explain the kernels; this file wraps them in
two operators, `vim_ssl::triton_scan_forward` and `vim_ssl::triton_scan_backward`, whose arguments
`fused.py` describes. u, delta, z, B and C are float32, bfloat16 or float16 and are read without a
copy in any strides with contiguous channels (the backward pass copies u and delta if their tokens
are not contiguous either); everything else is float32, and so is every state.

For the backward pass the states before every 8th token are saved in float32: 16 bytes per token and
channel, both directions together, at d_state 16. ``VIM_SSL_SCAN_STATES=16`` (tokens, a multiple of
4) halves that, for about a fifth more work in the backward pass.

With ``TRITON_INTERPRET=1`` set before triton is imported, the kernels
run on CPU tensors, slowly: this is how they are tested without a GPU.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from vim_ssl.kernels.autograd import channels_contiguous, contiguous, gradient_required, operator
from vim_ssl.kernels.selective_scan import torch_backend, triton_backward, triton_kernels
from vim_ssl.kernels.selective_scan.fused import public_scans, register_scan_gradient

OPERATORS = ("triton_scan_forward", "triton_scan_backward")  # for `flops.py`
LANES = 32
EVERY = int(os.environ.get("VIM_SSL_SCAN_STATES", 8))  # tokens between saved states
if EVERY < 4 or EVERY % 4:
    raise ValueError(f"VIM_SSL_SCAN_STATES is {EVERY}; expected a multiple of 4.")
WARPS = 11  # per multiprocessor for full occupancy; with fewer, tokens are cut into segments
FAR = 2**31  # elements from which on an offset within an image needs 64 bits
SHORTEST = 64  # minimum number of tokens per segment


def _scan(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale) -> tuple[Tensor, Tensor]:
    A, D, bias, h0 = (None if m is None else m.float() for m in (A, D, bias, h0))
    u, delta, B, C, z = map(_narrow, (u, delta, B, C, z))
    tensors = (u, delta, A, B, C, D, z, bias, h0)
    out, last, *_ = scan_forward(*tensors, softplus, reverse, scale, gradient_required(tensors))
    return out, last


def _narrow(m: Tensor | None) -> Tensor | None:
    """Cast float64 to float32, the dtype of the state; u is never float64 here."""
    return m.float() if m is not None and m.dtype == torch.float64 else m


selective_scan, bi_selective_scan = public_scans(_scan, float64=torch_backend.scan)


# --- launch choices --------------------------------------------------------------------------


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def channels_per_lane(warps: int, n: int, device: torch.device) -> int:
    """Return 2 channels per lane, which share each load of B and C, or 1, for twice as many warps
    and for larger states."""
    return 2 if n <= 16 and warps >= 2 * WARPS * _multiprocessors(device) else 1


class Variant(NamedTuple):
    """How the backward kernel spreads a state over the lanes of a warp."""

    groups: int  # of lanes, which share the states of a channel
    channels: int  # that a lane works on
    tokens: int  # whose states it keeps in registers

    def state(self, n: int) -> int:
        """n with the zeros that fill the last group."""
        return -(-n // self.groups) * self.groups

    @property
    def block(self) -> int:
        """Channels of a program."""
        return LANES // self.groups * self.channels


# d_state at most -> variant. A lane holds up to 16 states, channels times n / groups: with these,
# their gradients, A and the states of 4 tokens, it uses its 255 registers. With fewer states it
# keeps 8 tokens, so that none is recomputed before its group. A channel's step size and gate cost
# as much as 5 states, so one lane computes them and the other groups receive them: as many channels
# as groups. benchmarks/results/sm90.csv has the counts, README.md what else was tried.
VARIANTS = {
    1: Variant(1, 1, 8),
    4: Variant(2, 2, 8),
    5: Variant(1, 1, 8),
    6: Variant(2, 2, 4),
    16: Variant(4, 4, 4),
    32: Variant(8, 4, 4),
    40: Variant(8, 2, 4),
    64: Variant(16, 4, 4),
}


def variant(n: int) -> Variant:
    chosen = next(v for most, v in VARIANTS.items() if n <= most)
    return chosen if EVERY % chosen.tokens == 0 else chosen._replace(tokens=4)


def segment_length(warps: int, length: int, device: torch.device) -> int:
    """Tokens per segment, a multiple of `EVERY`, given the number of warps per segment."""
    target = -(-WARPS * _multiprocessors(device) // max(warps, 1))
    segments = min(target, length // SHORTEST)
    if segments <= 2:  # carrying states costs nearly as much as the scan itself
        return max(-(-length // EVERY), 1) * EVERY
    return -(-length // (segments * EVERY)) * EVERY


# --- forward ---------------------------------------------------------------------------------


def _empty_results(u, A, z, save):
    s, b, l, d = u.shape
    n = A.shape[-1]
    return (
        u.new_empty(b, l, d),
        A.new_empty(s, b, d, n),
        A.new_empty((b, l, d) if save and z is not None else 0),
        A.new_empty(s * b * -(-l // EVERY) * n * -(-d // LANES) * LANES if save else 0),
    )


@operator(
    "triton_scan_forward",
    fake=lambda u, delta, A, B, C, D, z, *rest: _empty_results(u, A, z, save=rest[-1]),
)
def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, h0: Tensor | None, softplus: bool, reverse: bool, scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fused.py`; the kept results are, in float32, y_sum = sum_s(y_s) (b, l, d) if there is
    z, and the states (s, b, checkpoints, blocks, n, 32) before every `EVERY`-th token, flat."""
    s, b, l, d = u.shape
    n = A.shape[-1]
    out, last, y_sum, states = _empty_results(u, A, z, save)
    if out.numel() == 0:  # nothing to launch
        return out, last.zero_() if h0 is None else last.copy_(h0), y_sum, states
    u, delta, B, C, z = map(channels_contiguous, (u, delta, B, C, z))
    A, D, bias = contiguous(A), contiguous(D), contiguous(bias)
    warps = s * b * -(-d // LANES)
    segment = segment_length(warps, l, u.device)
    per_lane = channels_per_lane(warps, n, u.device)
    with torch.cuda.device_of(u):
        start = _carried(
            u, delta, A, B, z, bias, h0, softplus, reverse, scale, segment, adjoint=False
        )
        pairs = _packed(B, C, n, margin=0)
        keep_sum = y_sum.numel() > 0
        # Add the directions in float32 even if nothing is kept: in half precision, a sum that
        # cancels would lose all digits, or overflow in float16.
        y_float32 = y_sum if keep_sum else out
        if s == 2 and y_float32.dtype != torch.float32:
            y_float32 = A.new_empty(b, l, d)
        triton_kernels.forward_kernel[(b * -(-d // (LANES * per_lane)), -(-l // segment))](
            u, delta, A, pairs, *_filled(u, D, z, bias, start),
            out, y_float32, last, states,
            b, l, d, segment, scale, 0, int(reverse),
            *_strides(u), *_strides(delta), *_strides(z)[1:],
            S=s, N=n, C=per_lane, EVERY=EVERY, SOFTPLUS=softplus,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=bias is not None,
            HAS_START=start is not None, SAVE=save, KEEP_SUM=keep_sum, num_warps=s,
        )  # fmt: skip
    return out, last, y_sum, states


def _packed(B: Tensor, C: Tensor, state: int, margin: int) -> Tensor:
    """B and C as pairs of float32, (s, b, margin + l + margin, state), with zeros around them."""
    s, b, l, n = B.shape
    pairs = B.new_empty((s, b, l + 2 * margin, state), dtype=torch.int64)
    triton_kernels.pack_kernel[(-(-pairs.numel() // 1024),)](
        B, C, pairs.view(torch.float32), b, l, pairs.numel(), *_strides(B), *_strides(C),
        N=n, PADDED=state, MARGIN=margin, BLOCK=1024,
    )  # fmt: skip
    return pairs


def _carried(w, delta, A, V, z, bias, start, softplus, reverse, scale, segment, *, adjoint):
    """Return the initial states of the segments (s, b, segments, n, d), or None if all are zero."""
    s, b, l, d = delta.shape
    n, parts = A.shape[-1], -(-l // segment)
    start = None if start is None else start.mT.contiguous()  # (s, b, n, d)
    if parts == 1:
        return start
    ends = A.new_empty(s, b, parts, n, d)
    sums = A.new_empty(s, b, parts, d)
    triton_kernels.carry_kernel[(b * -(-d // LANES), parts)](
        w, delta, A, V, *_filled(w, z, bias), ends, sums, b, l, d, segment, scale, 0, int(reverse),
        *_strides(w), *_strides(delta), *_strides(V), *_strides(z)[1:],
        S=s, N=n, C=1, SOFTPLUS=softplus, HAS_Z=z is not None, HAS_BIAS=bias is not None,
        ADJOINT=adjoint, num_warps=s,
    )  # fmt: skip
    triton_kernels.join_kernel[(-(-d // LANES), b, s)](
        ends, sums, A, *_filled(A, start), b, d, parts, 0, int(reverse),
        N=n, HAS_START=start is not None, ADJOINT=adjoint, num_warps=1,
    )  # fmt: skip
    return ends


# --- backward --------------------------------------------------------------------------------


def _empty_gradients(
    dout, dlast, u, delta, A, B, C, D, z, bias, y_sum, states, softplus, reverse, scale
):
    s, b, _, d = u.shape
    dz = u.new_empty(0) if z is None else z.new_empty(z.shape)
    return (u.new_empty(u.shape), delta.new_empty(delta.shape), A.new_empty(A.shape),
            B.new_empty(B.shape), C.new_empty(C.shape), A.new_empty(s, d), dz, A.new_empty(s, d),
            A.new_empty(s, b, d, A.shape[-1]))  # fmt: skip


@operator("triton_scan_backward", fake=_empty_gradients)
def scan_backward(
    dout: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, bias: Tensor | None, y_sum: Tensor, states: Tensor,
    softplus: bool, reverse: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z (empty without z), bias and h0."""
    s, b, l, d = u.shape
    n = A.shape[-1]
    du, ddelta = (m.new_empty(m.shape) for m in (u, delta))
    dz = u.new_empty(0) if z is None else z.new_empty(z.shape)
    if du.numel() == 0:
        zeros = (A.new_zeros(m) for m in (A.shape, B.shape, C.shape, (s, d), (s, d)))
        dA, dB, dC, dD, dbias = zeros
        dh0 = A.new_zeros(s, b, d, n) if dlast is None else dlast.clone()
        return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias, dh0
    B, C, z = map(channels_contiguous, (B, C, z))
    dout, u, delta, A, D, bias = map(contiguous, (dout, u, delta, A, D, bias))
    segment = segment_length(s * b * -(-d // LANES), l, u.device)
    parts = -(-l // segment)
    shared = dout.expand(s, b, l, d)  # both directions get the same
    chosen = variant(n)
    blocks = -(-d // chosen.block)
    dA = A.new_empty(s, b, parts, -(-d // LANES), n, LANES)
    dstart = torch.empty_like(dA)
    dD, dbias = A.new_empty(s, b, parts, d), A.new_empty(s, b, parts, d)
    dB_dC = A.new_empty(2, s, b, l, blocks, n)
    farthest = l * max(d, _strides(z)[2])
    with torch.cuda.device_of(u):
        carry = _carried(shared, delta, A, C, z, bias, dlast, softplus, reverse, scale, segment,
                         adjoint=True)  # fmt: skip
        pairs = _packed(B, C, chosen.state(n), margin=chosen.tokens - 1)
        triton_backward.backward_kernel[(b * blocks, parts, s)](
            dout, u, delta, A.mT.contiguous(), pairs, *_filled(u, D, z, bias), y_sum, states,
            *_filled(u, carry), du, ddelta, dA, dB_dC, dD, dz, dbias, dstart,
            b, l, d, segment, scale, 0, int(reverse),
            *_strides(z)[1:],
            N=n, G=chosen.groups, X=chosen.channels, K=chosen.tokens, EVERY=EVERY,
            SOFTPLUS=softplus, HAS_D=D is not None, HAS_Z=z is not None,
            HAS_BIAS=bias is not None, HAS_CARRY=carry is not None,
            OFFSET=tl.int64 if farthest >= FAR else tl.int32, num_warps=1,
        )  # fmt: skip
    dB, dC = (sums.sum(3) for sums in dB_dC)
    rows = [part if (k == 1 or reverse) else 0 for k, part in enumerate([parts - 1] * s)]
    dh0 = torch.stack([dstart[k, :, row] for k, row in enumerate(rows)])
    dA, dh0 = (m.mT.flatten(-3, -2)[..., :d, :].contiguous() for m in (dA.sum((1, 2)), dh0))
    return (
        du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype),
        dD.sum((1, 2)), dz, dbias.sum((1, 2)), dh0,
    )  # fmt: skip


register_scan_gradient(scan_forward, scan_backward, "Triton")


# --- tensors for the kernels -----------------------------------------------------------------


def _filled(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Replace each None with `stand_in`; its address is used in arithmetic but never read."""
    return [stand_in if m is None else m for m in tensors]


def _strides(m: Tensor | None) -> tuple[int, int, int]:
    """Strides of directions, images and tokens; z has no directions."""
    if m is None:
        return 0, 0, 0
    s, b, l = (0, *m.stride()[:2]) if m.dim() == 3 else m.stride()[:3]
    return s, b, l
