"""Save and load a task's model: encoder, heads and their configuration."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vim_ssl.checkpoints.loading import load_encoder, save_encoder
from vim_ssl.utils.files import atomic_write

Model = TypeVar("Model", bound=nn.Module)


def save_task(
    model: Any, folder: str | os.PathLike, file: str, record: dict[str, Any] | None = None
) -> None:
    """Write ``model.encoder``, unless it is None, with `save_encoder`, and the other weights, with
    ``model.config``, to ``file`` next to it."""
    from safetensors.torch import save

    if model.encoder is not None:
        save_encoder(model.encoder, folder, record=record)
    state = {
        key: value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith("encoder.")
    }
    atomic_write(Path(folder) / file, save(state, {"config": json.dumps(model.config)}))


def load_task(
    make: Callable[..., Model],
    folder: str | os.PathLike,
    file: str,
    task: str,
    device: str | torch.device | None = None,
) -> Model:
    """Load a model written by `save_task`, in eval mode, and set its ``trained_on``.

    Args:
        make: (encoder or None, classes, other settings of ``config``) -> model.
        file: name of the file in ``folder``.
        task: name of the script that writes such files.
    Raises: FileNotFoundError for a folder without the file; ValueError for a file that does not
        fit the encoder in the folder.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {file}, which a {task} run contains; give a run of "
            f"downstream/{task}.py."
        )
    with safe_open(path, "pt") as opened:
        stored = opened.metadata() or {}
    if "config" not in stored:
        raise ValueError(f"{path} was not written by downstream/{task}.py.")
    config, description = json.loads(stored["config"]), Path(folder) / "encoder.json"
    encoder = load_encoder(folder) if description.is_file() else None
    model = make(encoder, config.pop("classes"), **config)
    result = model.load_state_dict(load_file(path), strict=False)
    wrong = [key for key in result.missing_keys if not key.startswith("encoder.")]
    wrong += result.unexpected_keys
    if wrong:
        raise ValueError(f"{path} does not fit its encoder: {wrong[:5]}.")
    if encoder is not None:
        record = json.loads(description.read_text(encoding="utf-8")).get("made_by") or {}
        model.trained_on = record.get("data", "")  # type: ignore[assignment]
    return model.to(device).eval()
