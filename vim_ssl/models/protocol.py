"""What objectives, readouts, tasks, checkpoints and reports need of an encoder.

`VimEncoder` and `TimmEncoder` implement `Encoder`; so may a class of another package. The token
methods are needed only for pretraining by masks; `require_tokens` refuses an encoder without them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class PatchSize(Protocol):
    """Side and distance of patches, in pixels."""

    patch_size: int
    stride: int


@runtime_checkable
class Encoder(Protocol):
    """An `nn.Module` from images (b, in_chans, h, w) to features.

    Sizes:
        in_chans: channels of an image.
        embed_dim: channels of a token, or of the last map.
        num_features: width of the features, the input of the head.
        num_classes: outputs of the head; 0: no head.
        img_size: (height, width) in pixels that the encoder is built for.
        patch_embed: size and stride of a patch; needed by masks and by the pixel objectives.
        grid_size: rows and columns of patches (or of the last map) at ``img_size``.
        feature_info: a dict for every block or stage, with ``num_chs`` and ``reduction``, its
            stride in pixels; empty without `forward_intermediates`. Needed by readouts and dense
            heads.
        cls_names: names of the class tokens; the readout "token" needs one.

    Settings and record:
        data_config: the expected input; see `vim_ssl.data.config`. Needed by every transform.
        input_shape: (c, h, w), or (c, t, h, w) of an encoder of clips.
        config: arguments that rebuild the encoder, ``type(encoder)(**config)``; JSON can hold
            them. Needed by `save_encoder`.
        global_pool: how tokens become features.
        features_by_head: the head has layers before its last one that change the features, such as
            a norm after the mean; the readout "avg" is then what the last one reads.
        without_tokens: why the token methods do not work, a sentence; "" if they do.
        directions: directions of the scan; "both" for attention, which reads all tokens at once.
        mask_token: parameter for masked patches, or None.
        reads_clips: images are clips (b, c, t, h, w).
        classes: class names of the head, or None.
        trainings: which images the weights were trained on; see `vim_ssl.data.identity`.
    """

    in_chans: int
    embed_dim: int
    num_features: int
    num_classes: int
    img_size: tuple[int, int]
    grid_size: tuple[int, int]
    feature_info: list[dict[str, Any]]
    cls_names: tuple[str, ...]
    data_config: dict[str, Any]
    global_pool: str
    features_by_head: bool
    without_tokens: str
    directions: str
    reads_clips: bool
    classes: list[str] | None
    trainings: list[dict]
    training: bool

    @property
    def patch_embed(self) -> Any: ...

    @property
    def mask_token(self) -> Tensor | None: ...

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def config(self) -> dict[str, Any]: ...

    # ---------------------------------------------------------------- features, of any encoder

    def __call__(self, x: Tensor) -> Tensor:
        """Features (b, num_features), or logits (b, num_classes) with a head."""
        ...

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> tokens or a map, after the final norm."""
        ...

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the output of `forward_features`, and apply the head unless ``pre_logits``."""
        ...

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, **options: Any
    ) -> Any:
        """Return maps after selected blocks, with timm's protocol; see `VimEncoder`."""
        ...

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1) -> list[int]:
        """Drop the blocks after the last index, and the head; return the resolved indices."""
        ...

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns for an image of this size. Raises: ValueError for a size that
        does not fit."""
        ...

    def get_classifier(self) -> nn.Module:
        """Return the last layer of the head; the outputs are the rows of its parameters."""
        ...

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Create a fresh head with this many outputs."""
        ...

    def for_data(self, data: Any, *, tubelet: int = 1, inflation: str = "centre") -> Any:
        """Return this encoder, or one of clips with its weights for videos. Raises: ValueError if
        there is none."""
        ...

    # ---------------------------------------------------------------- tokens, for pretraining

    def embed(self, x: Tensor, *, ids_keep: Tensor | None = None) -> Tensor:
        """Images -> patch tokens with positions (b, m, embed_dim), or those of ``ids_keep`` (b, k)
        integers."""
        ...

    def forward_tokens(self, tokens: Tensor, **options: Any) -> Any:
        """Patch tokens -> (b, class tokens + patches, embed_dim) after the final norm; ``mask`` (b,
        m) bool, True = masked, ``ids_keep`` and ``indices`` as in `VimEncoder`."""
        ...

    def forward_visible(
        self, x: Tensor, ids_keep: Tensor, *, directions: str | None = None,
        indices: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Encode only the patches ``ids_keep`` (b, k): tokens after the final norm, and taps."""
        ...

    def split_tokens(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Split tokens into the patches (b, k, d) and the class tokens (b, c, d)."""
        ...

    # ---------------------------------------------------------------- training

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters without weight decay."""
        ...

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's mapping of parameter names to layers, for layer-wise lr decay."""
        ...

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        ...

    # ---------------------------------------------------------------- of every nn.Module

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


def require_tokens(encoder: Any, objective: str) -> None:
    """Raise ValueError for an encoder whose tokens cannot be left out or replaced."""
    if reason := getattr(encoder, "without_tokens", ""):
        raise ValueError(f"{objective} leaves out or replaces patch tokens: {reason}")
