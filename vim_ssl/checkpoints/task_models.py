"""Save and load a task's model: encoder, heads and their configuration."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vim_ssl.checkpoints.files import check_values
from vim_ssl.checkpoints.loading import load_encoder, made_by, save_encoder
from vim_ssl.utils.files import atomic_write, reading

Model = TypeVar("Model", bound=nn.Module)


def save_task(
    model: Any, folder: str | os.PathLike, file: str, record: dict[str, Any] | None = None
) -> None:
    """Write ``model.encoder`` with `save_encoder`, and the other weights, with ``model.config``, to
    ``file`` next to it."""
    save_encoder(model.encoder, folder, record=record)
    save_head(model, folder, file)


def save_head(model: Any, folder: str | os.PathLike, file: str) -> None:
    """Write the weights of ``model`` without its encoder's, and ``model.config``, to ``file``."""
    from safetensors.torch import save

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
        make: (encoder, classes, other settings of ``config``) -> model.
        file: name of the file in ``folder``.
        task: name of the script that writes such files.
        device: device of the model.
    Raises: FileNotFoundError for a folder without the file; ValueError for a file that does not
        fit the encoder in the folder.
    """
    config, state = load_head(folder, file, task)
    with reading(Path(folder) / file, f"the model of a {task} run", "copy the run again"):
        classes = config.pop("classes")
        model = make(load_encoder(folder), classes, **config)
    check_values(Path(folder) / file, state, model.state_dict())
    result = model.load_state_dict(state, strict=False)
    wrong = [key for key in result.missing_keys if not key.startswith("encoder.")]
    wrong += result.unexpected_keys
    if wrong:
        raise ValueError(f"{Path(folder) / file} does not fit its encoder: {wrong[:5]}.")
    model.trained_on = made_by(folder).get("data", "")  # type: ignore[assignment]
    return model.to(device).eval()


def load_head(
    folder: str | os.PathLike, file: str, task: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the ``config`` and the weights that `save_head` wrote. Arguments and errors: see
    `load_task`."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {file}, which a {task} run contains; give a run of "
            f"downstream/{task}.py."
        )
    with reading(path, f"the model of a {task} run", "copy the run again"):
        with safe_open(path, "pt") as opened:
            stored = opened.metadata() or {}
        if "config" not in stored:
            raise ValueError(f"{path} was not written by downstream/{task}.py.")
        return json.loads(stored["config"]), load_file(path)
