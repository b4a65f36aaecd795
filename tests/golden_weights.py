"""The weights and the input behind tests/golden/: rebuilt from key names and shapes alone."""

import argparse
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
NAME = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
TOKENS = ("cls_token", "pos_embed", "cls_token_head", "cls_token_tail")


def golden_state_dict(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The reference weights, float32, for a map from state-dict keys to shapes.

    Each tensor is drawn from a generator seeded with the CRC of its key, so any set of keys
    (another size, another variant) has its weights without a file.
    """
    return {
        key: torch.from_numpy(_draw(key, tuple(shape)).astype(np.float32))
        for key, shape in shapes.items()
    }


def write_golden(path: Path) -> Path:
    """The reference weights of Vim-Ti, in the container of the released files."""
    shapes = json.loads((GOLDEN / "vim_tiny_patch16_224.keys.json").read_text())
    args = argparse.Namespace(model=NAME, batch_size=128, output_dir="x", drop_path=0.0)
    torch.save({"model": golden_state_dict(shapes), "epoch": 299, "args": args}, path)
    return path


def golden_input(size: tuple[int, int] = (224, 224), chans: int = 3) -> torch.Tensor:
    """Two images of noise, (2, chans, *size), float32."""
    values = np.random.default_rng(0).standard_normal((2, chans, *size))
    return torch.from_numpy(values.astype(np.float32))


def _draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    g = rng.standard_normal(shape)
    if key.endswith(("A_log", "A_b_log")):
        return np.log(np.arange(1, shape[1] + 1)) + 0.1 * g
    if key.endswith((".D", ".D_b")):
        return 1 + 0.1 * g
    if key.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        dt = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), shape))
        return dt + np.log(-np.expm1(-dt))
    if key.endswith(("norm.weight", "norm_f.weight")):
        return 1 + 0.1 * g
    if key.endswith("bias") or key in TOKENS:
        return 0.02 * g
    return g / math.sqrt(math.prod(shape[1:]))
