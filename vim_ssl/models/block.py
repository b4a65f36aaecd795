"""The Vim block: add, normalise, mix tokens by a scan in each direction.

    residual += drop_path(hidden)             in float32
    x, z      = in_proj(rms_norm(residual))   d_model -> d_inner each
    u_k       = silu(conv_k(x))               k = forward, backward; causal in its own direction
    dt, B, C  = x_proj_k(u_k)
    y_k       = scan_k(u_k, softplus(dt_proj_k(dt)), A_k, B, C) + D_k u_k
    hidden    = out_proj((y_f + y_b) / 2 * silu(z))

Reference: Vision Mamba, arXiv:2401.09417, Algorithm 1 and figure 2 ("v2" in the released code).
Parameter names are those of the released checkpoints; backward parameters end in ``_b``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vim_ssl.kernels.causal_conv1d import causal_conv1d
from vim_ssl.kernels.mixer import Direction, bi_mixer
from vim_ssl.kernels.mixer.torch_backend import wide
from vim_ssl.kernels.rms_norm import add_rms_norm
from vim_ssl.kernels.selective_scan import selective_scan

# State of a block between the pieces of a stream: the convolution's last inputs
# (b, d_conv - 1, d_inner) and the scan's state (b, d_inner, d_state), float32 at least.
MixerState = tuple[Tensor, Tensor]
DIRECTIONS = {"forward": ("",), "backward": ("_b",), "both": ("", "_b")}  # parameter suffixes


class RMSNorm(nn.Module):
    """Weight of a fused residual-add + RMSNorm; key ``weight``."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Two (b, l, d) -> (normalised, new residual); see `add_rms_norm`."""
        return add_rms_norm(hidden, residual, self.weight, self.eps)


class DepthwiseConv1d(nn.Module):
    """One direction's causal convolution: weight (d, 1, k), bias (d,)."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        bound = kernel_size**-0.5  # torch's default for a convolution with this fan-in
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """(b, l, d) -> silu of the convolution, same shape; see `causal_conv1d`."""
        return causal_conv1d(x, self.weight.squeeze(1), self.bias, reverse)


class VimMixer(nn.Module):
    """Mixes tokens by one or two selective scans.

    Args:
        d_model: width of the residual stream; d_inner is ``expand`` times that.
        d_state: n, the size of each channel's state.
        d_conv: taps of the causal convolution.
        dt_rank: rank of the step-size projection; ceil(d_model / 16) by default.
        directions: "both", "forward" or "backward": the directions that have parameters.
        shared_conv: both directions scan the output of one causal convolution, with the same
            projections and D; only ``A_b_log`` is extra. With divide_out=False this is upstream's
            "v1" block.
        divide_out: average the directions instead of adding them, as in all released weights.
        norm_after_scan: LayerNorm between the averaged scans and the gate (FastVim,
            arXiv:2502.00594); the directions are then always averaged.
        depth: number of blocks of the encoder; sets the initial scale of ``out_proj``.
    """

    A_log: nn.Parameter  # (d_inner, d_state); each exists only if its direction does
    A_b_log: nn.Parameter

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        directions: str = "both",
        shared_conv: bool = False,
        divide_out: bool = True,
        norm_after_scan: bool = False,
        depth: int = 24,
        scan_backend: str = "auto",
    ):
        super().__init__()
        self.d_inner, self.d_state = expand * d_model, d_state
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        self.directions, self.divide_out = directions, divide_out
        self.shared_conv = shared_conv
        self.scan_backend = scan_backend
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        for suffix in DIRECTIONS[directions]:
            self._add_direction(suffix, d_conv)
        self.layernorm = nn.LayerNorm(self.d_inner) if norm_after_scan else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def _add_direction(self, suffix: str, d_conv: int) -> None:
        """Add one direction's parameters. Both directions have the same initialisation; upstream's
        backward ``dt_proj`` bias is zero by accident, which gives it a short initial memory."""
        d, n = self.d_inner, self.d_state
        a_log = torch.arange(1, n + 1, dtype=torch.float32).log().repeat(d, 1)
        setattr(self, "A_b_log" if suffix else "A_log", nn.Parameter(a_log))
        if suffix and self.shared_conv:
            return
        dt_proj = nn.Linear(self.dt_rank, d)
        with torch.no_grad():
            dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt = torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt
        setattr(self, f"conv1d{suffix}", DepthwiseConv1d(d, d_conv))
        x_proj = nn.Linear(d, self.dt_rank + 2 * n, bias=False)
        setattr(self, f"x_proj{suffix}", x_proj)
        setattr(self, f"dt_proj{suffix}", dt_proj)
        setattr(self, f"D{suffix}", nn.Parameter(torch.ones(d)))

    def forward(self, hidden: Tensor, directions: str | None = None) -> Tensor:
        """Mix tokens: (b, l, d_model) -> (b, l, d_model).

        Args:
            directions: a subset of the mixer's directions; all of them by default.
        """
        xz = self.in_proj(hidden)
        x, z = xz.chunk(2, dim=-1)
        suffixes = DIRECTIONS[directions or self.directions]
        gate = None if self.layernorm else z
        plain = None
        if len(suffixes) == 2 and not self.shared_conv:
            plain = self._plain_directions()
        if plain is not None:
            y = bi_mixer(
                xz, *plain, gated=gate is not None, scale=self._scale, backend=self.scan_backend
            )
        else:
            shared = self._scan_inputs(x, "") if self.shared_conv else None
            scans = (
                self._scan_one(shared or self._scan_inputs(x, suffix), gate, suffix)[0]
                for suffix in suffixes
            )
            y = sum(scans, x.new_zeros(()))
            y = y * self._scale if len(suffixes) == 2 else y
        return self._finish(y, z)

    def forward_stream(self, hidden: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """Encode the next piece of a forward stream: (b, l, d_model) and the state before it (None
        at the start) -> the same shape and the state after it."""
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        conv: Any = self.conv1d
        taps = conv.weight.shape[2]
        if state is None:  # the convolution pads with zeros, the scan starts from zero
            tail, start = x.new_zeros(len(x), taps - 1, self.d_inner), None
        else:
            tail, start = state
            shapes = tuple(tail.shape[1:]), tuple(start.shape[1:])
            expected = (taps - 1, self.d_inner), (self.d_inner, self.d_state)
            if shapes != expected:
                raise ValueError(
                    f"the state comes from an encoder of another size: it has {shapes} per "
                    f"sequence, expected {expected}."
                )
        x = torch.cat([tail, x], dim=1)
        inputs = self._scan_inputs(x, "", taps - 1)
        y, last = self._scan_one(inputs, None if self.layernorm else z, "", start)
        # Clone: a view would keep the whole piece in memory.
        return self._finish(y, z), (x[:, x.shape[1] - (taps - 1) :].clone(), last)

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        if self.layernorm is not None:
            y = self.layernorm(y) * F.silu(z)
        return self.out_proj(y)

    @property
    def _scale(self) -> float:
        """Factor of the sum of both directions."""
        return 0.5 if self.divide_out or self.layernorm is not None else 1.0

    def _plain_directions(self) -> tuple[Direction, Direction] | None:
        """Return the parameters of both directions if they can be computed from these, in one
        operator; None if a module was replaced, wrapped or hooked, as by LoRA or quantisation:
        then it is called."""
        modules: Any = self._modules
        directions = []
        for suffix in DIRECTIONS["both"]:
            conv, x_proj, dt_proj = (
                modules[f"{name}{suffix}"] for name in ("conv1d", "x_proj", "dt_proj")
            )
            if not (is_plain(conv) and is_plain(x_proj) and is_plain(dt_proj)):
                return None
            a_log, d = self.A_b_log if suffix else self.A_log, getattr(self, f"D{suffix}")
            directions.append(Direction(
                conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, a_log, d
            ))  # fmt: skip
        return directions[0], directions[1]

    def _scan_inputs(self, x: Tensor, suffix: str, skip: int = 0) -> tuple[Tensor | None, ...]:
        """Return what a direction scans, channels first: u, delta, B, C, D and the bias of delta.
        The first ``skip`` tokens of x are context for the convolution only."""
        u = getattr(self, f"conv1d{suffix}")(x, suffix == "_b")[:, skip:]  # (b, l, d)
        dt, B, C = self._split(getattr(self, f"x_proj{suffix}")(u))
        dt_proj, bias = getattr(self, f"dt_proj{suffix}"), None
        if is_plain(dt_proj):  # the scan adds the bias in float32
            delta, bias = F.linear(dt, dt_proj.weight), wide(dt_proj.bias)
        else:
            delta = dt_proj(dt)
        return u.mT, delta.mT, B.mT, C.mT, wide(getattr(self, f"D{suffix}")), bias

    def _scan_one(
        self, inputs: tuple[Any, ...], z: Tensor | None, suffix: str, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scan one direction, without dividing by 2. Returns y and the last state."""
        u, delta, B, C, D, bias = inputs
        a_log = self.A_b_log if suffix else self.A_log
        y, last = selective_scan(
            u, delta, -wide(a_log).exp(), B, C, D, None if z is None else z.mT, bias, True,
            initial_state=start, return_last_state=True, reverse=suffix == "_b",
            backend=self.scan_backend,
        )  # fmt: skip
        return y.mT, last

    def _split(self, x_dbl: Tensor) -> tuple[Tensor, ...]:
        return x_dbl.split([self.dt_rank, self.d_state, self.d_state], dim=-1)


_APPLY_WEIGHT = (
    nn.Linear.forward, nn.Conv2d.forward, nn.Conv3d.forward, DepthwiseConv1d.forward,
)  # fmt: skip


def is_plain(module: Any) -> bool:
    """True if calling a module only applies its weight and bias, however these are computed."""
    if (
        type(module).forward not in _APPLY_WEIGHT
        or "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    ):
        return False
    weight = module.weight
    # A tensor of torchao may support no operation but its layer's.
    return type(weight) is nn.Parameter or not hasattr(weight, "__tensor_flatten__")


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate each pair of channels of x (…, d) by its angle; sin, cos broadcast to x."""
    swapped = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + swapped * sin).to(x.dtype)


class VimBlock(nn.Module):
    """Add -> RMSNorm -> mixer. Drop path acts on the incoming hidden state, as upstream does."""

    def __init__(self, d_model: int, *, drop_path: float = 0.0, **mixer_args):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = VimMixer(d_model, **mixer_args)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        directions: str | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(b, l, d_model) and the residual stream (float32) -> the next pair.

        Args:
            rotation: (sin, cos) of every token, (l, d_model) or (b, l, d_model); see `VimEncoder`.
        """
        hidden, residual = self.norm(self.drop_path(hidden), residual)
        if rotation is not None:
            hidden = rotate(hidden, *rotation)
        return self.mixer(hidden, directions), residual

    def forward_stream(
        self, hidden: Tensor, residual: Tensor | None, state: MixerState | None
    ) -> tuple[Tensor, Tensor, MixerState]:
        """Run `forward` starting from ``state``; also return the state after it."""
        hidden, residual = self.norm(self.drop_path(hidden), residual)
        hidden, state = self.mixer.forward_stream(hidden, state)
        return hidden, residual, state
