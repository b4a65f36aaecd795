"""What of an encoder in memory its saved file cannot represent: a file has settings and weights."""

from collections.abc import Iterator
from typing import Any

import torch

from vim_ssl.models.encoder import VimEncoder
from vim_ssl.models.timm_encoder import TimmEncoder
from vim_ssl.models.video import VideoEncoder

_PLAIN = (bool, int, float, str, tuple)
# Attributes that change no feature of an encoder in eval mode, or that the file does have.
_FREE = {"training", "grad_checkpointing", "drop_path_rate", "drop_prob", "p", "scan_backend"}


def not_saved(encoder: Any) -> str:
    """Say what of an encoder would be lost in its file, as the first part of a sentence: another
    class, hooks, a replaced function or module, other settings; "" if nothing would."""
    if type(encoder) not in (VimEncoder, VideoEncoder, TimmEncoder):
        return f"the encoder in memory is a {type(encoder).__name__}, a class of its own"
    for name, module in encoder.named_modules():
        where = name or "the encoder itself"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{where} of the encoder in memory has a forward hook"
        # accelerate wraps `forward` for mixed precision, and keeps the original beside it.
        wrapped = {"forward"} if "_original_forward" in vars(module) else set()
        for key in vars(module).keys() - wrapped:
            if callable(getattr(type(module), key, None)):
                return f"{where} of the encoder in memory has another function {key}"
    return next(_differences(encoder), "")


def _differences(encoder: Any) -> Iterator[str]:
    """Compare the modules with those of a fresh encoder of the same settings."""
    with torch.device("meta"):
        fresh = type(encoder)(**encoder.config)
    modules, expected = dict(encoder.named_modules()), dict(fresh.named_modules())
    for name in [*expected, *modules]:
        if name not in modules:
            yield f"{name} is missing from the encoder in memory"
        elif name not in expected:
            yield f"{name} was added to the encoder in memory"
        elif type(modules[name]) is not type(expected[name]):
            now, before = type(modules[name]).__name__, type(expected[name]).__name__
            yield f"{name} of the encoder in memory is a {now}, not a {before}"
        for key, value in vars(expected[name]).items() if name in modules else ():
            now = vars(modules[name]).get(key, value)
            if key in _FREE or key.startswith("_") or not isinstance(value, _PLAIN):
                continue
            if isinstance(now, _PLAIN) and now != value:
                where = f"{name}.{key}" if name else key
                yield f"{where} of the encoder in memory is {now!r}, not {value!r}"
    weights, needed = encoder.state_dict(), fresh.state_dict()
    for key in sorted(weights.keys() | needed.keys()):
        if key not in weights or key not in needed:
            yield f"{key} is {'missing from' if key in needed else 'new in'} the encoder in memory"
        elif weights[key].shape != needed[key].shape:
            shape, expected_shape = tuple(weights[key].shape), tuple(needed[key].shape)
            yield f"{key} of the encoder in memory is {shape}, not {expected_shape}"
