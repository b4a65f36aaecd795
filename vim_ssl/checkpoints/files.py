"""Locate and read weight files of any architecture.

find(source)             a path, a run directory or a Hub id -> a folder and a file name in it
read(folder, name, ema)  safetensors with json, or a pickle -> Stored: tensors and metadata
"""

import argparse
import json
import os
import pickle
import pickletools
import re
import threading
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vim_ssl.checkpoints.wrappers import find_states
from vim_ssl.utils.numbers import require_finite

FORMAT = 1  # version of encoder.json; increased when older readers could misread newer files
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
HUB_TIMEOUT_S = 10.0  # for listing a repository; downloads have no limit


@dataclass
class Stored:
    """Content of a weights file: one set of weights and its metadata; ``notes`` say which part of
    the file that is."""

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None  # the encoder's arguments, in files of `save_encoder`
    model_name: str | None = None  # in released files: the model's name in the training code
    training_args: dict[str, Any] = field(default_factory=dict)
    is_ema: bool = False
    has_ema: bool = False
    made_by: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Folder:
    """A local folder with files, or a repository on the Hub."""

    where: str
    names: list[str]
    get: Callable[[str], Path]


# -------------------------------------------------------------------- locating


def find(source: str | os.PathLike) -> tuple[Folder, str]:
    """Return the folder and file name of ``source``, an existing path or otherwise a Hub id.

    Raises: FileNotFoundError if the source does not exist or has no weights; ValueError if several
        files match; ConnectionError if the Hub does not answer.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _choose_local(path)
    if path.exists():
        return _local(path.parent), path.name
    hub_id = parse_hub_id(source) if isinstance(source, str) else None
    if hub_id and not str(source).startswith("hf://") and Path(path.parts[0]).is_dir():
        hub_id = None  # a mistyped local path such as runs/nope: do not query the Hub
    if hub_id is None:
        raise FileNotFoundError(f"There is no file or folder {str(source)!r} (in {Path.cwd()}).")
    repo, revision, name = hub_id
    folder = _hub(repo, revision, named=str(source))
    if name is None:
        return folder, _choose(folder.names, folder.where)
    if name in folder.names:
        return folder, name
    inside = [other for other in folder.names if other.startswith(f"{name}/")]
    if inside:
        return folder, _choose(inside, f"{folder.where}/{name}")
    weights = _weights(folder.names)
    known = f"its weights: {', '.join(weights)}" if weights else "it has no weights"
    raise FileNotFoundError(f"{folder.where} has no file {name!r}; {known}.")


def parse_hub_id(source: str) -> tuple[str, str | None, str | None] | None:
    """``[hf://]owner/name[@revision][/file][@revision]`` -> (repository, revision, file)."""
    rev = r"(?:@(refs/\w+/\w+|[^/@]+))?"
    match = re.fullmatch(rf"(?:hf://)?(\w[\w.-]*/\w[\w.-]*){rev}(?:/([^@]+?))?/?{rev}", source)
    return match and (match[1], match[2] or match[4], match[3])


def _local(root: Path) -> Folder:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_file())
    return Folder(str(root), names, root.joinpath)


def _choose_local(root: Path) -> tuple[Folder, str]:
    folder = _local(root)
    marks = ("config.json", "metrics.jsonl", "checkpoints", "encoder.json")
    if not _weights(folder.names) and any((root / mark).exists() for mark in marks):
        raise FileNotFoundError(
            f"The run in {root} has not written its encoder yet (encoder.safetensors); "
            "wait for its first checkpoint, or resume it."
        )
    return folder, _choose(folder.names, folder.where)


def _weights(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(WEIGHT_SUFFIXES)]


def _choose(names: list[str], where: str) -> str:
    """Return the only weights file, or the only one from `save_encoder`; several are an error."""
    weights = _weights(names)
    if not weights:
        listing = ", ".join(names[:8]) or "nothing"
        raise FileNotFoundError(
            f"{where} has no weights ({' '.join(WEIGHT_SUFFIXES)}); it contains {listing}."
        )
    ours = [name for name in weights if _beside(name, ".json") in names]
    candidates = ours or weights
    top = [name for name in candidates if "/" not in name]
    candidates = top or candidates
    if len(candidates) > 1:
        raise ValueError(
            f"{where} has several weights files; name one of them: "
            + ", ".join(f"{where}/{name}" for name in candidates)
        )
    return candidates[0]


def _beside(name: str, ending: str) -> str:
    """encoder.safetensors -> encoder.json, or encoder_ema.safetensors."""
    return name.removesuffix(".safetensors") + ending


def _hub(repo: str, revision: str | None, named: str) -> Folder:
    """Return a repository's files as listed by the Hub, or cached ones if it does not answer."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    where = repo if revision is None else f"{repo}@{revision}"
    try:
        names = _within(HUB_TIMEOUT_S, lambda: hub.HfApi().list_repo_files(repo, revision=revision))
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} on the Hub has no revision {revision!r}.") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo} requires accepting conditions: do so on its page, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{named!r} is neither a path here nor a repository on the Hub "
            "(or it is private: `hf auth login`)."
        ) from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{named!r} is neither a path here nor a Hub id.") from error
    except Exception as error:  # each HTTP client and the offline mode raise different classes
        try:
            cached = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
        except Exception:
            raise ConnectionError(
                f"{named!r} is not a local path, and the Hub cannot be reached ({_brief(error)}). "
                "Check the connection and HF_HUB_OFFLINE, or download the file and give its path."
            ) from error
        files = (p for p in cached.rglob("*") if p.is_file())
        return Folder(where, sorted(p.relative_to(cached).as_posix() for p in files),
                      cached.joinpath)  # fmt: skip

    def get(name: str) -> Path:
        try:
            return Path(hub.hf_hub_download(repo, name, revision=revision))
        except Exception as error:
            raise ConnectionError(f"Downloading {name} of {where} failed: {error}") from error

    return Folder(where, sorted(names), get)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return the result of ``call``, or raise TimeoutError: the Hub's client has no public limit on
    its retries. An unfinished thread ends with the process."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


# -------------------------------------------------------------------- reading


def read(folder: Folder, name: str, ema: bool | None = None, tensors: bool = True) -> Stored:
    """Read one set of weights.

    Args:
        ema: True for the exponential moving average, False for the raw weights, None for the file's
            default (the raw weights if it declares none).
        tensors: False reads only the description of a file of `save_encoder`, without ``state``;
            other files are described by their tensors.
    Raises: ValueError for a file that is empty, truncated, in a format that differs from its name,
        or a pickle that needs more than tensors; also for ``ema=True`` without an EMA copy.
    """
    if name.endswith(".safetensors"):
        return _read_ours(folder, name, ema, tensors)
    path = folder.get(name)
    return _unwrap(_load_pickle(path), path, ema)


def _read_ours(folder: Folder, name: str, ema: bool | None, tensors: bool) -> Stored:
    if _beside(name, ".json") not in folder.names and name.endswith("_ema.safetensors"):
        name, ema = name.replace("_ema.safetensors", ".safetensors"), True  # requested by name
    json_name, ema_name = _beside(name, ".json"), _beside(name, "_ema.safetensors")
    if json_name not in folder.names:
        raise FileNotFoundError(
            f"{folder.where}/{name} has no {Path(json_name).name} next to it, so its architecture "
            "is unknown; copy both (vim_ssl.save_encoder writes them together)."
        )
    record = _read_json(folder.get(json_name))
    ema = record["ema"] == "default" if ema is None else ema
    if ema and record["ema"] is None:
        raise ValueError(f"{folder.where}/{name} was saved without an EMA copy; omit ema=True.")
    weights = ema_name if ema else name
    path = folder.get(weights) if tensors else Path(folder.where, weights)
    return Stored(
        path, _load_safetensors(path) if tensors else {}, record["config"],
        is_ema=ema, has_ema=record["ema"] is not None, made_by=record["made_by"],
    )  # fmt: skip


def check_values(
    path: str | os.PathLike, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Check the values of stored weights; keys and shapes are not compared.

    Half precision is accepted, because loading converts it.

    Args:
        path: the file, for messages.
        expected: the state dict of the model that the weights are for.
    Raises: ValueError for values that are not finite, and for integers where the model has
        floating-point numbers or the reverse.
    """
    for key in (key for key in state if key in expected):
        given, model = state[key], expected[key]
        if given.is_floating_point() != model.is_floating_point() or given.is_complex():
            raise ValueError(
                f"{path}: {key} has the number type {given.dtype}, expected {model.dtype}; "
                "quantised weights must be converted to floating point first."
            )
        given = given.float() if given.element_size() < 2 else given  # 8-bit floats
        if bool(model.isfinite().all()):  # a buffer may hold -inf, such as a mask
            require_finite(given, f"{path}: {key}", "these weights cannot be used; copy them again "
                           "from an intact run, or train again")  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    """Read and check encoder.json; missing keys are None."""
    _refuse_empty(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again from its run.") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f'{path} has no "config": it does not describe an encoder of vim_ssl.')
    if not isinstance(record.get("format"), int) or record["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {record.get('format')!r}; this vim_ssl reads up to {FORMAT}. "
            "Upgrade: pip install -U vim-ssl."
        )
    known = {"format": None, "vim_ssl": None, "ema": None, "config": None, "made_by": None}
    if unknown := sorted(set(record) - set(known)):
        raise ValueError(f"{path} has the unknown key {unknown[0]!r}; it has {', '.join(known)}.")
    record = known | record
    if record["ema"] not in (None, "default", "optional"):
        raise ValueError(
            f'{path}: "ema" is {record["ema"]!r}; expected null, "default" or "optional".'
        )
    return record


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _refuse_empty(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); "
                         "copy or download it again.") from error  # fmt: skip


def _load_pickle(path: Path) -> Any:
    """Read a torch.save file with tensors, plain values and argparse.Namespace. A pickle can name
    any function to call, so all other names are refused and nothing is called."""
    _refuse_empty(path)
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        head = file.read(64)
    if not is_zip and not head.startswith(b"\x80"):
        what = (
            "truncated" if head.startswith(b"PK") else f"not a checkpoint: it starts with {head!r}"
        )
        raise ValueError(f"{path} is {what}; copy or download it again.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mmap does not read the optimiser and other copies of the weights from disk
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if names := _unsafe_globals(path, str(error)):
            raise ValueError(
                f"{path} is refused: it refers to {names}, and calling functions named in a file "
                "could run any code. A checkpoint may contain tensors, plain values and "
                "argparse.Namespace; ask its author for the state dict only."
            ) from error
        raise ValueError(f"{path} is damaged or not a checkpoint: {_brief(error)}.") from error
    except Exception as error:  # a pickle that ends too early may fail at any instruction
        raise ValueError(
            f"{path} is truncated or damaged ({_brief(error)}); copy or download it again."
        ) from error


def _unsafe_globals(path: Path, message: str) -> str:
    """Return the classes and functions named in a refused pickle, as module.name; "" if damaged.

    The pickle is disassembled, not run. torch does this for zip files, and its ``message`` names
    the global of a legacy file; torch does not support protocol 4, which is read here.
    """
    if zipfile.is_zipfile(path):
        with suppress(Exception), torch.serialization.safe_globals([argparse.Namespace]):
            return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        return ""
    if match := re.search(r"GLOBAL (\S+)", message):
        return match[1]
    strings: list[str] = []
    with suppress(ValueError), path.open("rb") as file:
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                return str(value).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(value, str):
                strings.append(value)
    return ""


def _unwrap(content: Any, path: Path, ema: bool | None) -> Stored:
    """Extract the weights from a training checkpoint, in any of the layouts of `find_states`."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} contains a {type(content).__name__}, not a dict of weights.")
    weights, averaged, notes = find_states(content, path)
    if ema and averaged is None:
        raise ValueError(f"{path} has no EMA copy (model_ema); omit ema=True.")
    state = averaged if ema and averaged is not None else weights
    if other := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path} has no state dict: {other[0]!r} is a {type(state[other[0]]).__name__}, not a "
            'tensor; expected {"model": …}, {"state_dict": …} or the tensors themselves.'
        )
    args = content.get("args")
    args = dict(vars(args)) if isinstance(args, argparse.Namespace) else args
    args = dict(args) if isinstance(args, Mapping) else {}
    name = args.get("model")
    return Stored(
        path, state, model_name=name if isinstance(name, str) else None, training_args=args,
        is_ema=bool(ema), has_ema=averaged is not None, notes=notes,
    )  # fmt: skip


def _refuse_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; copy or download it again.")


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
