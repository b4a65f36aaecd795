"""The named encoders, and the weights that are included in the package."""

from pathlib import Path

from vim_ssl.data.config import MNIST_DATA

_TINY = {"embed_dim": 192, "depth": 24}
_SMALL = {"embed_dim": 384, "depth": 24}
_BASE = {"embed_dim": 768, "depth": 24}
# For CPUs, trained in minutes: wide rather than deep, because every block is a sequential scan.
_NANO = {"embed_dim": 192, "depth": 4, "d_state": 8}
# A preset's name states what changes tensor shapes; everything else is an argument.
PRESETS: dict[str, dict] = {
    "vim_tiny_patch16_224": _TINY,
    "vim_small_patch16_224": _SMALL,
    "vim_base_patch16_224": _BASE,
    "vim_tiny_patch16_stride8_224": _TINY | {"stride": 8},
    "vim_small_patch16_stride8_224": _SMALL | {"stride": 8},
    "vim_nano_patch4_28": _NANO
    | {"patch_size": 4, "img_size": 28, "in_chans": 1, "data_config": MNIST_DATA},
    "vim_nano_patch8_64": _NANO | {"patch_size": 8, "img_size": 64},
    "vim_nano_patch16_64": _NANO | {"patch_size": 16, "img_size": 64},
    "vim_mini_patch8_96": _NANO | {"depth": 8, "patch_size": 8, "img_size": 96},
}

# Included weights: "preset.tag" -> folder, as written by `save_encoder`.
TAGS = {path.name: path for path in sorted((Path(__file__).parents[1] / "weights").glob("*.*"))}
