"""Video encoder: Vim on clips, with tubelets of several frames as patches.

    clip (b, c, t, h, w) → tubelets of `tubelet` frames x patch x patch pixels
                         → tokens in the order frame, row, column ("spatial first"), one scan
    position of a token  = the image encoder's for its row and column + one for its time

A still clip of one tubelet gives the same output as the image encoder for its frame. In a longer
clip each frame has the image's patch embeddings, but the scan continues across frames. The class
token is in the middle of all tokens. Reference: VideoMamba, arXiv:2403.06977.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_ssl.models.encoder import PatchEmbed, VimEncoder, check_ids, check_tensor
from vim_ssl.models.tokens import select_tokens

INFLATIONS = ("centre", "mean")


class VideoEncoder(VimEncoder):
    """Vision Mamba over clips.

    Args:
        frames: clip length of the time table; for other lengths it is resampled.
        tubelet: frames per token; must divide the number of frames.
        args: arguments of `VimEncoder`; ``rope`` is not supported, because it has no time axis.
    Raises: ValueError for values that do not fit together.
    """

    reads_clips = True

    def __init__(self, *, frames: int = 16, tubelet: int = 2, **args: Any):
        super().__init__(**args)
        if tubelet < 1 or frames < tubelet or frames % tubelet:
            raise ValueError(f"frames {frames} is not a positive multiple of tubelet {tubelet}.")
        if self.rope:
            raise ValueError("rope encodes only row and column, not time; use rope=False.")
        self.frames, self.tubelet = frames, tubelet
        self._args |= {"frames": frames, "tubelet": tubelet}
        patch: Any = self.patch_embed
        flat, p, stride = patch.proj, patch.patch_size, patch.stride
        patch.proj = nn.Conv3d(
            self.in_chans, self.embed_dim, (tubelet, p, p), (tubelet, stride, stride)
        )
        with torch.no_grad():
            patch.proj.weight.copy_(inflate_kernel(flat.weight, tubelet, "mean"))
            patch.proj.bias.zero_()
        self.time_embed = nn.Parameter(torch.zeros(1, frames // tubelet, self.embed_dim))

    @property
    def input_shape(self) -> tuple[int, ...]:
        channels, *sides = super().input_shape
        return (channels, self.frames, *sides)

    def for_data(self, data, *, tubelet: int = 1, inflation: str = "centre") -> VimEncoder:
        """Return this encoder. Raises: ValueError for clips not divisible by its tubelets."""
        if data.kind == "video" and data.sampling.frames % self.tubelet:
            raise ValueError(
                f"{data.name} gives clips of {data.sampling.frames} frames, not a multiple of the "
                f"encoder's tubelet of {self.tubelet}; choose another number with ?frames=."
            )
        return self

    def embed(
        self, x: Tensor, *, ids_keep: Tensor | None = None, first: int = 0,
        frames: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Embed clips, or pieces of a longer clip for `forward_stream`, with positions and times.

        Args:
            x: (b, in_chans, t, h, w), t a multiple of ``tubelet``.
            ids_keep: (b, k) integers: indices of the tokens to embed; all by default.
            first: number of frames before this piece, a multiple of ``tubelet``.
            frames: length of the whole clip, to which the time table is resampled; by default
                first + t, the number of frames so far.
        Returns: (b, t / tubelet · rows · columns, embed_dim), frame by frame, row by row; with
            ``ids_keep`` (b, k, embed_dim) in its order.
        Raises: ValueError for a shape or piece that does not fit.
        """
        check_tensor(x)
        fits = x.dim() == 5 and x.shape[1] == self.in_chans and x.shape[2] > 0
        if not fits or x.shape[2] % self.tubelet:
            raise ValueError(
                f"clips have shape {tuple(x.shape)}; expected (b, {self.in_chans}, t, h, w) with t "
                f"a multiple of {self.tubelet}."
            )
        end = first + x.shape[2]
        whole = end if frames is None else frames
        if first < 0 or first % self.tubelet or whole % self.tubelet or end > whole:
            raise ValueError(
                f"frames {first} to {end} are not a valid piece of a clip of {whole}; first and "
                f"frames must be multiples of {self.tubelet}, and first + t at most frames."
            )
        grid = self.grid(*x.shape[-2:])
        check_ids(ids_keep, x.shape[0])
        tokens = self.patch_embed(x, ids_keep)
        piece = slice(first // self.tubelet, end // self.tubelet)
        pos = self._space_time(whole // self.tubelet, grid, piece)
        return tokens + select_tokens(pos, ids_keep).to(tokens.dtype)

    def _space_time(self, times: int, grid: tuple[int, int], piece: slice = slice(None)) -> Tensor:
        """Return the positions of all tokens, (1, times · rows · columns, embed_dim), or only those
        of ``piece``."""
        space, _ = self._positions(grid)
        if space is None:
            space = self.time_embed.new_zeros(1, grid[0] * grid[1], self.embed_dim)
        time: Tensor = self.time_embed
        if time.shape[1] != times:
            time = F.interpolate(time.mT, size=times, mode="linear", align_corners=False).mT
        return (time[:, piece, None] + space[:, None]).flatten(1, 2)

    def _patch_positions(self, m: int, grid: tuple[int, int]) -> Tensor:
        return self._space_time(m // (grid[0] * grid[1]), grid)

    def _grid_of(self, m: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        rows, columns = grid or self.grid_size
        if m % (rows * columns):
            raise ValueError(f"{m} tokens do not fill {rows}x{columns} grids; pass grid=.")
        return rows, columns

    def no_weight_decay(self) -> set[str]:
        """As for images, plus the time table."""
        return super().no_weight_decay() | {"time_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """As for images; the time table is grouped with the other positions."""
        groups = super().group_matcher(coarse)
        return groups | {"stem": f"{groups['stem']}|^time_embed"}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCTHW",
        intermediates_only: bool = False,
    ):
        """As for images; maps are (b, embed_dim, times, rows, columns), or "NLC"."""
        if output_fmt not in ("NCTHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not one of NCTHW, NLC.")
        final, maps = super().forward_intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, "NLC"
        )
        if output_fmt == "NCTHW":
            rows, columns = self.grid(*x.shape[-2:])

            def to_map(patches: Tensor) -> Tensor:
                return patches.mT.unflatten(2, (-1, rows, columns)).contiguous()

            maps = [
                (to_map(tap[0]), tap[1]) if return_prefix_tokens else to_map(tap) for tap in maps
            ]
        return maps if intermediates_only else (final, maps)


def inflate_kernel(weight: Tensor, tubelet: int, how: str) -> Tensor:
    """Extend a patch embedding (d, c, p, p) to ``tubelet`` frames, (d, c, tubelet, p, p).

    "centre" reads only the middle frame, "mean" the mean of all frames; for a still clip both give
    the embedding of the image.
    """
    if how not in INFLATIONS:
        raise ValueError(f"how {how!r} is not one of {', '.join(INFLATIONS)}.")
    if how == "mean":
        return weight[:, :, None].repeat(1, 1, tubelet, 1, 1) / tubelet
    kernel = weight.new_zeros(*weight.shape[:2], tubelet, *weight.shape[2:])
    kernel[:, :, tubelet // 2] = weight
    return kernel


def inflate(
    encoder: VimEncoder, *, frames: int = 16, tubelet: int = 2, how: str = "centre"
) -> VideoEncoder:
    """Return a video encoder with the weights of an image encoder and a time table of zeros.

    Args:
        encoder: image encoder.
        frames, tubelet: see `VideoEncoder`.
        how: see `inflate_kernel`.
    Raises: ValueError for a video encoder.
    """
    if encoder.reads_clips or not isinstance(encoder.patch_embed, PatchEmbed):
        raise ValueError("the encoder is already a video encoder; inflate an image encoder.")
    video = VideoEncoder(frames=frames, tubelet=tubelet, **encoder.config)
    state = encoder.state_dict()
    state["patch_embed.proj.weight"] = inflate_kernel(
        state["patch_embed.proj.weight"], tubelet, how
    )
    state["time_embed"] = video.time_embed.detach()
    video.load_state_dict(state)
    video.set_grad_checkpointing(encoder.grad_checkpointing)
    like = encoder.patch_embed.proj.weight
    return video.to(like.device, like.dtype).train(encoder.training)
