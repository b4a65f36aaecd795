"""Find an encoder's weights in what training programs save: dicts round state dicts, and keys that
begin with the names of the modules round the encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# Keys of a checkpoint that hold a state dict, in order of preference.
CONTAINERS = (
    "model", "state_dict", "model_state_dict", "student", "module", "net", "network", "encoder",
    "backbone", "weights", "params",
)  # fmt: skip
AVERAGES = (
    "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema", "teacher",
)  # fmt: skip
# Modules that wrappers of torch put between others: compile, FSDP, checkpointing, DataParallel.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_ANCHOR = "patch_embed.proj.weight"  # every encoder has it


def find_states(
    content: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """Return the weights, their moving average (None without one), and notes on what was chosen.

    Containers are opened until a dict of tensors is reached. Names of wrappers are removed from its
    keys; where the encoder is part of a larger model, only its keys are returned.

    Raises: ValueError for several encoders under names that do not say which is the average.
    """
    raw = _opened(content, (*CONTAINERS, *AVERAGES))
    notes: list[str] = []
    averaged = _opened({k: content[k] for k in AVERAGES if k in content}, (*AVERAGES, *CONTAINERS))
    firsts = {part.partition(".")[0] for part in _parts(raw)}
    if {"student", "teacher"} <= firsts:  # both in one state dict
        raw, averaged = _below(raw, "student"), _below(raw, "teacher")
    if averaged is raw or not _parts(averaged):
        averaged = {}
    state = _encoder(raw, path, notes)
    if averaged and "teacher" in (firsts | set(content)):
        notes.append(f"{path}: the student is loaded; ema=True loads the teacher.")
    return state, _encoder(averaged, path, []) if averaged else None, notes


def _opened(content: Mapping[str, Any], containers: tuple[str, ...]) -> Mapping[str, Any]:
    """The state dict within nested containers; ``content`` itself if it has none."""
    for key in containers:
        if isinstance(content.get(key), Mapping):
            inner = _opened(content[key], containers)
            if any(isinstance(value, Tensor) for value in inner.values()):
                return inner
    return content


def _parts(state: Mapping[str, Any]) -> list[str]:
    """The prefixes, without wrappers, under which the state dict has an encoder."""
    plain = (_plain_key(str(key)) for key in state)
    return sorted({k.removesuffix(_ANCHOR).rstrip(".") for k in plain if k.endswith(_ANCHOR)})


def _below(state: Mapping[str, Any], first: str) -> dict[str, Any]:
    """The entries of one part of a model."""
    return {k: v for k, v in state.items() if _plain_key(str(k)).partition(".")[0] == first}


def _plain_key(key: str) -> str:
    """The key without wrappers: "module.encoder._orig_mod.head.bias" -> "encoder.head.bias"."""
    return ".".join(name for name in key.split(".") if name not in _WRAPPERS)


def _encoder(state: Mapping[str, Any], path: Path, notes: list[str]) -> dict[str, Any]:
    """The encoder's weights, by the keys that the encoder has."""
    plain = {_plain_key(str(key)): value for key, value in state.items()}
    plain.pop("n_averaged", None)  # of torch's AveragedModel
    parts = _parts(state)
    if len(parts) > 1:
        raise ValueError(
            f"{path} has several encoders, under the keys {', '.join(map(repr, parts))}; save the "
            "state dict of one of them."
        )
    if not parts or not parts[0]:
        return plain
    prefix = f"{parts[0]}."
    inside = {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}
    if others := sorted(k for k in plain if not k.startswith(prefix)):
        notes.append(
            f"{path}: the encoder is {parts[0]!r}; {len(others)} other entries are left out, for "
            f"example {others[0]}."
        )
    return inside
