"""Load and save encoders.

source -> files.find, files.read -> released_config, or the config in the file
       -> the requested encoder -> weights adapted to it -> check of every key
"""

import difflib
import inspect
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vim_ssl.checkpoints import files as checkpoint_files
from vim_ssl.checkpoints.adapt import adapt_state, load_checked, some
from vim_ssl.checkpoints.files import FORMAT, WEIGHT_SUFFIXES, Stored
from vim_ssl.checkpoints.released import released_config
from vim_ssl.checkpoints.representable import not_saved
from vim_ssl.checkpoints.timm_models import (
    is_timm,
    load_timm,
    rebuild,
    record_beside,
    timm_settings,
)
from vim_ssl.data.bands import check_unit
from vim_ssl.data.config import IMAGENET_DATA, Configured, adapt_data
from vim_ssl.data.transforms import image as image_transforms
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.models.presets import PRESETS, TAGS
from vim_ssl.models.protocol import Encoder
from vim_ssl.models.timm_build import check_stored
from vim_ssl.models.timm_encoder import TimmEncoder
from vim_ssl.models.video import VideoEncoder
from vim_ssl.utils.environment import __version__
from vim_ssl.utils.files import atomic_write, reading
from vim_ssl.utils.names import did_you_mean

log = logging.getLogger(__name__)
DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(VimEncoder).parameters.items()
}
_VIDEO = {"frames", "tubelet"}  # arguments only of `VideoEncoder`
# Determined by the tensors: requesting another value is an error.
_FIXED = (
    "embed_dim", "depth", "d_state", "d_conv", "expand", "dt_rank", "patch_size",
    "shared_conv", "norm_after_scan", "use_pos_embed",
)  # fmt: skip


class _Default(int):
    """The value of an argument that was not given."""


def load_encoder(
    source: str | os.PathLike,
    *,
    num_classes: int | None = _Default(0),
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
    ema: bool | None = None,
    strict: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **model_args: Any,
) -> Any:
    """Load an encoder in eval mode: a `VimEncoder`, or a `TimmEncoder`.

    Args:
        source: the first match of
            - a preset (``vim_tiny_patch16_224``): fresh weights;
            - an existing path: a released Vim checkpoint (``.pth``), a file of `save_encoder`
              (``.safetensors`` with its ``.json``), or a run directory;
            - a Hub id: ``owner/name``, ``owner/name/file``, ``hf://owner/name/file``, each with
              ``@revision`` after the name or at the end;
            - ``timm:NAME``: a model of timm with fresh weights; ``timm:NAME?pretrained``,
              ``timm:NAME?file=PATH``: with weights; see `vim_ssl.checkpoints.timm_models`.
        num_classes: None for the checkpoint's head, its class names in ``encoder.classes``; n for a
            head of n outputs, the checkpoint's if it has n, otherwise a fresh one; 0 (the default)
            for features without a head. If a head is left out by default, a warning says so.
        img_size: pixels, or (height, width): the position table is resampled once. Without it,
            other sizes are also accepted, and the table is resampled at every call.
        in_chans: channels; a checkpoint's patch embedding is summed for 1 channel, or repeated in
            turn and rescaled for n, mean and std in ``data_config`` likewise. Bands that
            ``data_config["bands"]`` names take the weights of the same name, such as red; others
            start from the mean.
        global_pool: as in `VimEncoder`; if the width changes, the head is fresh.
        ema: load the EMA copy (True) or the raw weights (False); by default as stored by
            `save_encoder`, and the raw weights for a released file.
        strict: missing or unexpected keys are errors. False fills missing ones with fresh weights
            and skips unexpected ones, with a warning; shapes must always fit.
        device, dtype: device and floating-point dtype of the encoder.
        model_args: any other argument of `VimEncoder`, or of `timm.create_model`. If the
            checkpoint has one direction, ``directions="both"`` initialises the other as its copy;
            if it has both, requesting one drops the other. ``use_mask_token`` and
            ``num_registers`` add fresh tokens if the checkpoint has none.

    Raises:
        FileNotFoundError: no such path, file or repository. ConnectionError: no Hub.
        TypeError: an argument that `VimEncoder` does not have; the nearest name is suggested.
        ValueError: an unknown name; a file that is broken, unsafe, of another architecture, with
            values that are not finite, or that contradicts the arguments; several files to choose
            from.
    """
    _check_arguments({} if is_timm(source) else model_args, num_classes, img_size, device, dtype)
    by_default = isinstance(num_classes, _Default)
    if num_classes is not None:
        num_classes = int(num_classes)  # numpy integers are not JSON-serialisable
    requested = dict(model_args, img_size=img_size, in_chans=in_chans, global_pool=global_pool)
    if source in PRESETS:
        if num_classes is None or ema:
            what = "num_classes=None" if num_classes is None else "ema=True"
            raise ValueError(f"{what} requires a checkpoint; preset {source!r} is untrained.")
        config = dict(PRESETS[source], num_classes=num_classes)
        encoder: Any = VimEncoder(**_apply(config, requested))
    elif is_timm(source):
        if ema:
            raise ValueError(f"ema=True requires a run with a moving average, not {source}.")
        encoder, outputs = load_timm(source, requested, num_classes)
        encoder.trainings = made_by(source).get("trainings") or []
        _warn_of_head(source, outputs if by_default else 0)
    else:
        stored = checkpoint_files.read(*find_file(source), ema=ema)
        encoder, assumed = _build(stored, requested, num_classes, strict)
        for assumption in assumed:
            warnings.warn(assumption, stacklevel=2)
        _warn_of_head(source, (stored.config or {}).get("num_classes") if by_default else 0)
    return encoder.to(device=device, dtype=dtype).eval()


def _warn_of_head(source: str | os.PathLike, outputs: int | None) -> None:
    if outputs:
        log.warning(
            "%s: its head of %d outputs is left out (num_classes=None loads it; "
            "vim_ssl.load_model also predicts class names)", source, outputs,
        )  # fmt: skip


def made_by(source: str | os.PathLike) -> dict[str, Any]:
    """Return the ``record`` that `save_encoder` stored in ``source``; empty for any other file.

    Raises: the errors of `load_encoder`.
    """
    file = record_beside(source) if is_timm(source) else source
    return {} if file is None or file in PRESETS else _describe(file).made_by or {}


def _describe(source: str | os.PathLike) -> Stored:
    """Read a checkpoint, if possible without its tensors."""
    return checkpoint_files.read(*find_file(source), tensors=False)


def _settings(source: str | os.PathLike) -> Mapping[str, Any]:
    """Return the arguments of the encoder that ``source`` names."""
    if source in PRESETS:
        return PRESETS[str(source)]
    return timm_settings(source) if is_timm(source) else config_of(_describe(source), {})[0]


def create_transform(
    encoder: Configured | nn.Module | Mapping[str, Any] | str | os.PathLike,
    is_training: bool = False,
    **augment: Any,
) -> image_transforms.Transform:
    """Return an encoder's input transform: image → normalised float tensor (c, h, w).

    Args:
        encoder: an encoder, its ``data_config``, or a preset, run or file as in `load_encoder`,
            whose weights are not loaded.
        is_training, augment: see `vim_ssl.data.transforms.image.create_transform`.
    """
    if isinstance(encoder, str | os.PathLike):
        config = _settings(encoder)
        with torch.device("meta"):
            encoder = encoder_class(config)(**config)
    return image_transforms.create_transform(encoder, is_training, **augment)


def stored_classes(source: str | os.PathLike) -> int:
    """Return the number of outputs of the head in ``source``; 0 without a head, as in a preset.

    Raises: the errors of `load_encoder`.
    """
    return 0 if source in PRESETS else _settings(source)["num_classes"]


def is_of_timm(source: str | os.PathLike) -> bool:
    """Whether ``source`` names a model of timm, or a run of one. Raises: the errors of
    `load_encoder`."""
    return "timm" in _settings(source)


def load_for_bands(source: str, bands: Mapping[str, Any], **args: Any) -> Any:
    """Load the encoder ``source`` for images with these bands.

    Args:
        bands: from `vim_ssl.data.bands.band_arguments`. An encoder for the same bands keeps its
            statistics.
        args: arguments of `load_encoder`.
    Raises: ValueError for the same bands in another unit.
    """
    encoder = load_encoder(source, **args)
    if not bands:
        return encoder
    if tuple(encoder.data_config["bands"]) != tuple(bands["data_config"]["bands"]):
        return load_encoder(source, **args, **bands)
    check_unit(encoder.data_config, bands["data_config"], "the training data")
    return encoder


def save_encoder(
    encoder: Encoder,
    folder: str | os.PathLike,
    *,
    ema: nn.Module | Mapping[str, Tensor] | None = None,
    ema_default: bool = True,
    record: dict[str, Any] | None = None,
) -> Path:
    """Write ``encoder.safetensors`` and ``encoder.json`` to a folder for `load_encoder`.

    Each file is written atomically, encoder.json last. Keys are those of the released checkpoints,
    or timm's: `timm.create_model` reads the file of a timm encoder by ``checkpoint_path``.

    Args:
        ema: the exponential moving average of the weights, written as
            ``encoder_ema.safetensors``.
        ema_default: `load_encoder` loads the EMA copy by default.
        record: JSON-serialisable notes on the training, stored as ``made_by``.
    Returns: the path of encoder.safetensors.
    Raises: TypeError for a model that is no encoder of this package or a record that is not JSON;
        ValueError for an EMA copy with other keys.
    Warns: if the encoder has what a file of settings and weights cannot represent, such as a hook.
    """
    from safetensors.torch import save

    if not isinstance(encoder, VimEncoder | TimmEncoder):
        raise TypeError(
            f"save_encoder takes a VimEncoder or TimmEncoder, not a {type(encoder).__name__}; "
            "unwrap it first (.module of DDP, ._orig_mod of torch.compile)."
        )
    if lost := not_saved(encoder):
        warnings.warn(f"{lost}; its file will not have that.", stacklevel=2)
    if encoder.classes:
        record = {"classes": encoder.classes} | (record or {})
    if encoder.trainings:
        record = {"trainings": encoder.trainings} | (record or {})
    state = _plain(encoder.state_dict())
    if ema is not None:
        ema = _plain(ema.state_dict() if isinstance(ema, nn.Module) else ema)
        if wrong := sorted(set(ema) ^ set(state)):
            raise ValueError(f"The EMA copy and the encoder differ in {some(wrong)}.")
    # The backend depends on the machine, not on the weights.
    config = {key: value for key, value in encoder.config.items() if key != "scan_backend"}
    description = {
        "format": FORMAT,
        "vim_ssl": __version__,
        "ema": None if ema is None else "default" if ema_default else "optional",
        "config": config,
        "made_by": record,
    }
    text = json.dumps(description, indent=2) + "\n"  # raises before anything is written
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, averaged = folder / "encoder.safetensors", folder / "encoder_ema.safetensors"
    if ema is not None:
        atomic_write(averaged, save(ema))
    atomic_write(weights, save(state))
    atomic_write(folder / "encoder.json", text.encode())
    if ema is None:
        averaged.unlink(missing_ok=True)
    return weights


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


# -------------------------------------------------------------------- the arguments


def _check_arguments(
    model_args: Mapping[str, Any],
    num_classes: int | None,
    img_size: int | tuple[int, int] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> None:
    arguments = list(inspect.signature(load_encoder).parameters)[1:-1]
    for name in model_args:
        if name not in DEFAULTS:
            hint = did_you_mean(name, [*DEFAULTS, *arguments])
            raise TypeError(f"Unknown argument {name!r}. {hint}")
    whole = isinstance(num_classes, Integral) and not isinstance(num_classes, bool)
    if num_classes is not None and not (whole and num_classes >= 0):
        raise ValueError(
            f"num_classes is {num_classes!r}; expected 0 (features), a number of classes, or None "
            "(the checkpoint's head)."
        )
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    if sides is not None and not (
        isinstance(sides, tuple | list)
        and len(sides) == 2
        and all(isinstance(side, int) and side > 0 for side in sides)
    ):
        raise ValueError(f"img_size is {img_size!r}; expected pixels or (height, width).")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected a floating-point torch.dtype.")
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch sees no GPU here; use 'cpu'.")


def find_file(source: str | os.PathLike) -> tuple[checkpoint_files.Folder, str]:
    """Like `checkpoint_files.find`, but first try presets with packaged weights."""
    if source in TAGS:
        return checkpoint_files.find(TAGS[str(source)])
    if isinstance(source, str) and not Path(source).expanduser().exists():
        name, _, tag = source.partition(".")
        if name in PRESETS and not source.endswith(WEIGHT_SUFFIXES):
            tags = ", ".join(t for t in TAGS if t.startswith(f"{name}.")) or "none yet"
            raise ValueError(f"Preset {name!r} has no weights {tag!r}; available: {tags}.")
        if "/" not in source and os.sep not in source and not source.endswith(WEIGHT_SUFFIXES):
            hint = did_you_mean(source, PRESETS)
            raise ValueError(f"Unknown preset {source!r}, and no file or folder here. {hint}")
    return checkpoint_files.find(source)


def encoder_class(config: Mapping[str, Any]) -> type[VimEncoder] | type[TimmEncoder]:
    """Return the class that a config describes: an image or video encoder, or one of timm."""
    if "timm" in config:
        return TimmEncoder
    return VideoEncoder if _VIDEO & config.keys() else VimEncoder


def _apply(config: Mapping[str, Any], requested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the requested encoder's arguments: the checkpoint's, overridden by the caller's."""
    target = dict(config) | {key: value for key, value in requested.items() if value is not None}
    chans = config.get("in_chans", DEFAULTS["in_chans"])
    data = dict(config.get("data_config") or {})
    data.pop("input_size", None)  # derived from img_size and in_chans
    bands = (requested.get("data_config") or {}).get("bands")
    if target.get("in_chans", chans) != chans or bands:
        known = IMAGENET_DATA | data if chans == 3 else data
        data = adapt_data(known, target.get("in_chans", chans), bands)
        data.pop("input_size", None)
    target["data_config"] = data | (requested.get("data_config") or {})
    return target


# -------------------------------------------------------------------- the weights


def _build(
    stored: Stored, requested: Mapping[str, Any], num_classes: int | None, strict: bool
) -> tuple[Any, list[str]]:
    """Build the requested encoder with the stored weights; also return the assumptions made."""
    config, assumed = config_of(stored, requested)
    if "timm" in config:
        return rebuild(stored, _apply(config, requested), num_classes, strict)
    if num_classes is None and not config["num_classes"]:
        raise ValueError(
            f"num_classes=None requests the head of {stored.path}, which has none; use 0 for "
            "features or the number of classes for a fresh head."
        )
    _check_contradictions(stored.path, config, requested)
    target = _apply(config, requested)
    target["num_classes"] = config["num_classes"] if num_classes is None else num_classes
    try:
        encoder: Any = encoder_class(target)(**target)
    except Exception:
        if stored.config:  # is it the file's fault, or that of the arguments?
            file = stored.path.with_name(f"{stored.path.stem.removesuffix('_ema')}.json")
            with reading(file, "the settings of an encoder"), torch.device("meta"):
                encoder_class(stored.config)(**stored.config)
        raise
    checkpoint_files.check_values(stored.path, stored.state, encoder.state_dict())
    state = adapt_state(stored.path, stored.state, config, encoder)
    assumed += load_checked(stored.path, encoder, state, strict)
    if encoder.num_classes and encoder.num_classes == config["num_classes"]:
        encoder.classes = (stored.made_by or {}).get("classes")
    encoder.trainings = (stored.made_by or {}).get("trainings") or []
    return encoder, assumed


def config_of(stored: Stored, requested: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return all arguments of the stored encoder, and the assumptions made."""
    if stored.config is None:
        try:
            config, assumed = released_config(
                stored.state, stored.model_name, stored.training_args, requested
            )
        except ValueError as error:
            raise ValueError(f"{stored.path}: {error}") from error
    else:
        config, assumed = stored.config, []
        if "timm" in config:
            check_stored(config, f"The config of {stored.path}")
        for name in () if "timm" in config else config:
            if name not in DEFAULTS and name not in _VIDEO:
                near = difflib.get_close_matches(name, DEFAULTS, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "Was it written by a newer one?"
                raise ValueError(
                    f"The config of {stored.path} has {name!r}, which this vim_ssl does not know. "
                    f"{hint}"
                )
    assumed = [*stored.notes, *assumed]
    config = dict(config) if "timm" in config else DEFAULTS | config
    if not isinstance(config["img_size"], int):
        config["img_size"] = tuple(config["img_size"])  # JSON has lists
    return config, assumed


def _check_contradictions(
    path: Path, config: Mapping[str, Any], requested: Mapping[str, Any]
) -> None:
    def refuse(name: str, why: str = "the weights decide it") -> None:
        raise ValueError(
            f"{name}={requested[name]!r} was requested, but {path} has {name}={config[name]!r}; "
            f"{why}."
        )

    config = dict(config, dt_rank=config["dt_rank"] or math.ceil(config["embed_dim"] / 16))
    for name in _FIXED:
        if requested.get(name) is not None and requested[name] != config[name]:
            refuse(name)
    registers = requested.get("num_registers")
    if registers and config["num_registers"] not in (0, registers):
        refuse("num_registers", "pass that number, or 0 to drop them")
    positions = requested.get("cls_position") or config["cls_position"], config["cls_position"]
    if positions[0] != positions[1] and not {*positions} <= {"middle", "first"}:
        refuse("cls_position")
    ways = requested.get("directions") or config["directions"], config["directions"]
    if ways[0] != ways[1] and "layer" in ways:
        refuse("directions", "blocks in pairs and blocks by themselves are different networks")
    if ways[0] != ways[1] and "both" not in ways:
        refuse("directions", "directions='both' initialises the other direction as its copy")
