"""The presets and the included weights in timm's registry, imported right after timm.

    timm.list_models("vim*", pretrained=True)                              # included weights
    timm.create_model("vim_mini_patch8_96.offline_rgb", pretrained=True)   # features
    timm.create_model("vim_tiny_patch16_224", num_classes=10)              # untrained
    timm.create_model("vim_tiny_patch16_224", num_classes=0,
                      checkpoint_path="RUN/encoder.safetensors")           # a run of this preset

timm's arguments apply: ``num_classes``, ``in_chans``, ``img_size``, ``features_only``. A run whose
encoder differs from its preset needs the same arguments again; `load_encoder` knows them.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vim_ssl.data.config import complete_data_config, timm_cfg
from vim_ssl.models.presets import PRESETS, TAGS

_UNTRAINED = "untrained"


def _register(name: str, preset: dict[str, Any]) -> None:
    """Add a preset to timm's registry."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # timm's import runs this module, and the encoder imports timm.
        from vim_ssl.checkpoints.adapt import adapt_positions
        from vim_ssl.checkpoints.loading import DEFAULTS
        from vim_ssl.models.encoder import VimEncoder

        def fit(state: dict[str, Tensor], encoder: VimEncoder) -> dict[str, Tensor]:
            # Only positions: timm adapts channels and drops another head.
            stored: Any = encoder.pretrained_cfg
            config, file = DEFAULTS | preset, stored.get("file", name)
            table = adapt_positions(Path(file), state["pos_embed"], config, encoder)
            return state | {"pos_embed": table}

        if not pretrained and not kwargs.get("pretrained_cfg"):
            kwargs["pretrained_cfg"] = _UNTRAINED  # not the first tag, which may have no head
        # Drop the statistics that timm passes; the preset's are in data_config.
        return build_model_with_cfg(
            VimEncoder, name, pretrained, feature_cfg={"feature_cls": "getter"},
            pretrained_filter_fn=fit, **(preset | kwargs),
        )  # fmt: skip

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}: {preset}"
    register_model(build)


def _timm_cfg(preset: dict[str, Any], **weights: Any) -> dict[str, Any]:
    side, chans = preset.get("img_size", 224), preset.get("in_chans", 3)
    data = complete_data_config(preset.get("data_config"), chans, (side, side))
    return timm_cfg(data, 1000) | weights


_cfgs: dict[str, Any] = {
    f"{name}.{_UNTRAINED}": _timm_cfg(preset) for name, preset in PRESETS.items()
} | {
    tag: _timm_cfg(
        PRESETS[tag.partition(".")[0]], file=str(folder / "encoder.safetensors"), num_classes=0
    )
    for tag, folder in TAGS.items()
}
default_cfgs = generate_default_cfgs(_cfgs)
for _name, _preset in PRESETS.items():
    _register(_name, _preset)
