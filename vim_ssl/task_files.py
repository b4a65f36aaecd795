"""Keep a task's model in a run: the encoder as ever, and what stands on it in a file beside it."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vim_ssl.encoder import VimEncoder
from vim_ssl.loading import load_encoder, save_encoder, write_whole

Model = TypeVar("Model", bound=nn.Module)


def load_for(source: str, bands: Mapping[str, Any], **args: Any) -> VimEncoder:
    """The encoder that ``source`` names, for pictures of these bands.

    Args:
        bands: of `vim_ssl.data.transforms.band_arguments`. An encoder of the same ones keeps its
            own statistics.
        args: of `load_encoder`.
    """
    encoder = load_encoder(source, **args)
    if bands and tuple(encoder.data_config["bands"]) != tuple(bands["data_config"]["bands"]):
        encoder = load_encoder(source, **args, **bands)
    return encoder


def check_same_classes(model: Any, source: str, data: Any) -> None:
    """Raises: ValueError if ``data`` have other classes than the model that ``source`` names."""
    if model.classes != data.classes:
        raise ValueError(
            f"{source} knows the classes {model.classes[:5]} …, {data.name} has "
            f"{data.classes[:5]} …; evaluate on the classes it was trained on."
        )


def save_task(
    model: Any, folder: str | os.PathLike, file: str, record: dict[str, Any] | None = None
) -> None:
    """Write ``model.encoder`` as `save_encoder` does, and the rest, with ``model.config``, to
    ``file`` beside it."""
    from safetensors.torch import save

    save_encoder(model.encoder, folder, record=record)
    state = {
        key: value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith("encoder.")
    }
    write_whole(Path(folder) / file, save(state, {"config": json.dumps(model.config)}))


def load_task(make: Callable[..., Model], folder: str | os.PathLike, file: str, task: str) -> Model:
    """The model that `save_task` has written, in eval mode.

    Args:
        make: encoder, classes and the other settings of ``config`` -> model.
        file: the name it has in ``folder``.
        task: of the script that writes such files.
    Raises: FileNotFoundError for a folder without the file; ValueError for one that does not fit
        the encoder beside it.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {file}, the head that {task} has trained; name a run of "
            f"downstream/{task}.py."
        )
    with safe_open(path, "pt") as opened:
        config = json.loads((opened.metadata() or {})["config"])
    model = make(load_encoder(folder), config.pop("classes"), **config)
    found = model.load_state_dict(load_file(path), strict=False)
    wrong = [key for key in found.missing_keys if not key.startswith("encoder.")]
    if wrong or found.unexpected_keys:
        raise ValueError(f"{path} does not fit its encoder: {(wrong + found.unexpected_keys)[:5]}.")
    return model.eval()
