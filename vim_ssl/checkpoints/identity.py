"""Hashes of weights: of an encoder in memory, and of the files that a result was computed from.

A figure is recorded with the hash of its weights, which distinguishes it from figures of other
weights, whatever the files are called.
"""

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vim_ssl.checkpoints import files as checkpoint_files
from vim_ssl.checkpoints.loading import find_file
from vim_ssl.checkpoints.timm_models import is_timm, timm_state
from vim_ssl.models.presets import PRESETS
from vim_ssl.models.protocol import Encoder
from vim_ssl.utils.files import reading

# Files beside encoder.safetensors with the other weights of a task's model.
PARTS = (
    "segmentation.safetensors", "detection.safetensors", "clip.safetensors", "slide.safetensors",
)  # fmt: skip


def hash_of(*parts: Any) -> str:
    """Return a hash (16 hex digits) of values that JSON can hold, in this order."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def weights_hash(encoder: nn.Module | Encoder) -> str:
    """Return a hash (16 hex digits) of an encoder's tensors and settings."""
    digest = blake2b(digest_size=8)
    config: dict[str, Any] = getattr(encoder, "config", {})
    # The kernel backend depends on the machine and is left out; so is a setting that was added
    # later, at its default: recorded hashes stay valid.
    ignored = {"scan_backend"} | ({"shared_conv"} if not config.get("shared_conv") else set())
    settings = {name: value for name, value in config.items() if name not in ignored}
    digest.update(json.dumps([type(encoder).__name__, settings], default=str).encode())
    _add(digest, encoder.state_dict())
    return digest.hexdigest()


def encoder_hash(source: str | os.PathLike, ema: bool | None = None) -> str:
    """Return the hash of the encoder's weights in ``source``, without its head.

    Args:
        source: a run, file or Hub id, as for `vim_ssl.load_encoder`.
        ema: see `vim_ssl.load_encoder`.
    Returns: 16 hex digits; "" for a preset, which has no weights, for weights that a name of timm
        says, and for a source that is absent.
    Raises: ValueError for a damaged file.
    """
    state = _stored(source, ema)
    return _hash({name: x for name, x in state.items() if not name.startswith("head.")})


def model_hash(source: str | os.PathLike, ema: bool | None = None) -> str:
    """The same for a whole model: the encoder with its head, and the heads of a task's run."""
    from safetensors.torch import load_file

    folder = Path(source)
    state = dict(_stored(source, ema))
    for name in PARTS if folder.is_dir() else ():
        if (folder / name).is_file():
            with reading(folder / name, "a model's weights"):
                tensors = load_file(folder / name)
            state |= {f"{name} {key}": value for key, value in tensors.items()}
    return _hash(state)


def hashes_of_run(folder: Path, whole: bool) -> set[str]:
    """Return the hashes that results of this run may have now: of its weights and its average."""
    hash_weights = model_hash if whole else encoder_hash
    return {hash_weights(folder, ema) for ema in _copies(folder)} - {""}


def _copies(folder: Path) -> Iterable[bool | None]:
    return (False, True) if (folder / "encoder_ema.safetensors").is_file() else (None,)


def _stored(source: str | os.PathLike, ema: bool | None) -> Mapping[str, Tensor]:
    if source in PRESETS:
        return {}
    try:
        if is_timm(source):
            return timm_state(source)
        return checkpoint_files.read(*find_file(source), ema=ema).state
    except (FileNotFoundError, ConnectionError):
        return {}


def _hash(state: Mapping[str, Tensor]) -> str:
    digest = blake2b(digest_size=8)
    _add(digest, state)
    return digest.hexdigest() if state else ""


def _add(digest: blake2b, state: Mapping[str, Tensor]) -> None:
    for name, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
