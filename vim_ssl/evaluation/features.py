"""The features of a data set under an encoder, shared out over processes and kept on disk.

They are kept under a name that follows from what they are made of: the encoder's weights and
settings, the images (their spec with all its options, their list, labels, and when their files
were changed), the transform, and how features are read. So they are found again whatever the
encoder's file is called.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vim_ssl.data.bands import check_bands
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.extract import (
    READOUTS,
    Features,
    extract_rows,
    features_of,
    read_all,
    readout_columns,
)
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.utils.distributed import Processes
from vim_ssl.utils.files import atomic_path, user_cache

FORMAT = 1  # raised when `read_all` or the file changes its meaning


def encode_data(
    encoder: VimEncoder,
    data,
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
    cache: bool = True,
    processes: Processes | None = None,
) -> Features | None:
    """`read_all` of the images under the encoder's own transform.

    Whole batches are shared out, so that several processes compute what one computes.

    Args:
        encoder: on ``device``, in eval mode.
        data: map-style data of `vim_ssl.data.open_data`.
        cache: keep the features in the user's cache, and take them from there.
        processes: this one's place among all; alone by default.
    Returns: the features on the main process, None on the others.
    Raises: ValueError when no image can be read, or the bands are other ones.
    """
    processes = processes or Processes()
    check_bands(encoder, data)
    transform = create_transform(encoder)
    file = user_cache() / "features" / f"{_key(encoder, data, transform)}.safetensors"
    if processes.broadcast(cache and file.exists()):
        return _load(file, data) if processes.main else None
    part = extract_rows(
        lambda x: read_all(encoder, x), data, transform, share(len(data), batch_size, processes),
        batch_size=batch_size, workers=workers, device=device,
    )  # fmt: skip
    parts = processes.gather(part)
    if not processes.main:
        return None
    rows = [row for _, part_rows, _ in parts for row in part_rows]
    skipped = [name for _, _, part_skipped in parts for name in part_skipped]
    x = torch.cat([part_x for part_x, part_rows, _ in parts if part_rows] or [torch.empty(0, 0)])
    if len(parts) > 1:
        order = torch.tensor(rows, dtype=torch.int64).argsort()
        x, rows = x[order], sorted(rows)
    features = features_of(data, x, rows, skipped)
    if cache:
        _keep(file, x, rows, skipped, data.name)
    return features


def encode_parts(encoder: VimEncoder, parts: Sequence, **options) -> list[Features] | None:
    """`encode_data` of each part; None on all processes but the main one."""
    found = [encode_data(encoder, part, **options) for part in parts]
    features = [part for part in found if part is not None]
    return features if len(features) == len(parts) else None


def share(size: int, batch_size: int, processes: Processes) -> list[int]:
    """The places of one process: whole batches in turn, as one process would cut them."""
    begins = range(processes.rank * batch_size, size, processes.world * batch_size)
    return [i for begin in begins for i in range(begin, min(begin + batch_size, size))]


def readouts_of(encoder: VimEncoder, names: Sequence[str]) -> dict[str, slice]:
    """The columns of `read_all` for every readout; if these are all there are, without those that
    need a class token which the encoder does not have."""
    if tuple(names) == READOUTS and not encoder.cls_names:
        names = [name for name in names if not name.startswith("token")]
    return {name: readout_columns(encoder, name) for name in names}


def weights_hash(encoder: nn.Module) -> str:
    """16 hex digits of an encoder's tensors and settings, wherever it was loaded from."""
    digest = blake2b(digest_size=8)
    config: dict[str, Any] = getattr(encoder, "config", {})
    # Which kernels compute is the machine's matter.
    settings = {name: value for name, value in config.items() if name != "scan_backend"}
    digest.update(json.dumps([type(encoder).__name__, settings], default=str).encode())
    for name, value in sorted(encoder.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(encoder: VimEncoder, data, transform) -> str:
    # The fingerprint is of files, not of what an option such as image=COLUMN reads from them.
    images = [data.name, data.fingerprint, data.min_side, _times(data)]
    parts = [FORMAT, weights_hash(encoder), *images, repr(transform)]
    return blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=12).hexdigest()


def _times(data) -> list[int]:
    """When each file of the images was last changed (ns; 0 when it is gone), which another
    image of just the same size is known by."""
    times = dict.fromkeys((path for i in range(len(data)) for path in data.paths(i)), 0)
    for path in times:
        with suppress(OSError):
            times[path] = os.stat(path).st_mtime_ns
    return list(times.values())


def _load(file: Path, data) -> Features:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            x, rows = stored.get_tensor("x"), stored.get_tensor("rows").tolist()
            skipped = json.loads(stored.metadata()["skipped"])
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, or use --no-cache.") from error
    print(f"Features of {data.name} taken from {file} (--no-cache computes them).", flush=True)
    return features_of(data, x, rows, skipped)


def _keep(file: Path, x: torch.Tensor, rows: list[int], skipped: list[str], name: str) -> None:
    """Write the file whole, or say why not: the features themselves are there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as partial:
            save_file(
                {"x": x.contiguous(), "rows": torch.tensor(rows)},
                partial,
                metadata={"skipped": json.dumps(skipped), "data": name},
            )
        print(
            f"Features of {name} kept in {file}, {file.stat().st_size / 1e6:,.1f} MB (--no-cache "
            "does not; VIM_SSL_CACHE names another place).",
            flush=True,
        )
    except (OSError, SafetensorError) as error:
        print(f"Features of {name} were not kept: {error}", flush=True)
