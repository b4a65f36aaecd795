"""Compute the features of a data set on several processes, and cache them on disk.

The name of the cache file is a hash of everything that determines the features: the encoder's
weights and settings, the images (their spec with all options, their list, labels and modification
times), the transform and the readouts. The name of the encoder's file does not matter.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from vim_ssl.checkpoints.identity import weights_hash
from vim_ssl.data.bands import check_bands
from vim_ssl.data.transforms.image import create_transform
from vim_ssl.evaluation.extract import Features, extract_rows, features_of
from vim_ssl.evaluation.readout import all_readouts
from vim_ssl.models.protocol import Encoder
from vim_ssl.utils.distributed import Processes
from vim_ssl.utils.files import atomic_path, reading, user_cache
from vim_ssl.utils.names import printable

FORMAT = 2  # increase it when the meaning of `all_readouts` or of the file changes


def encode_data(
    encoder: Encoder,
    data,
    *,
    readout: Callable[[Any, torch.Tensor], torch.Tensor] = all_readouts,
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
    cache: bool = True,
    processes: Processes | None = None,
) -> Features | None:
    """Compute features of the images, using the encoder's transform.

    Processes divide whole batches, so that results do not depend on their number.

    Args:
        encoder: encoder on ``device``, in eval mode.
        data: map-style data of `vim_ssl.data.open_data`.
        readout: function (encoder, images) -> features; the cache knows it by its name.
        cache: write the features to the user's cache, and reuse them.
        processes: rank and world; a single process by default.
    Returns: the features on the main process, None on the others.
    Raises: ValueError if no image can be read, or the bands differ from the encoder's.
    """
    processes = processes or Processes()
    check_bands(encoder, data)
    transform = create_transform(encoder)
    file = cache_folder() / f"{_key(encoder, data, transform, readout)}.safetensors"
    if processes.broadcast(cache and file.exists()):
        return _load(file, data) if processes.main else None
    local = extract_rows(
        partial(readout, encoder), data, transform,
        local_indices(len(data), batch_size, processes),
        batch_size=batch_size, workers=workers, device=device,
    )  # fmt: skip
    results = processes.gather(local)
    if not processes.main:
        return None
    x = torch.cat([x for x, rows, _ in results if rows] or [torch.empty(0, 0)])
    rows = [row for _, local_rows, _ in results for row in local_rows]
    skipped = [error for _, _, errors in results for error in errors]
    if len(results) > 1:
        order = torch.tensor(rows, dtype=torch.int64).argsort()
        x, rows = x[order], sorted(rows)
    features = features_of(data, x, rows, skipped)
    if cache:
        _save(file, x, rows, skipped, data.name)
    return features


def cache_folder() -> Path:
    """The folder of cached features; VIM_SSL_CACHE sets the cache."""
    return user_cache() / "features"


def encode_splits(encoder: Encoder, splits: Sequence, **options) -> list[Features] | None:
    """`encode_data` for each split; None on all processes except the main one."""
    results = [encode_data(encoder, split, **options) for split in splits]
    features = [result for result in results if result is not None]
    return features if len(features) == len(splits) else None


def local_indices(size: int, batch_size: int, processes: Processes) -> list[int]:
    """Return the image indices of one rank: every ``world``-th batch of the data."""
    begins = range(processes.rank * batch_size, size, processes.world * batch_size)
    return [i for begin in begins for i in range(begin, min(begin + batch_size, size))]


def _key(encoder: Encoder, data, transform, readout: Any) -> str:
    # The fingerprint covers files, but not options such as image=COLUMN that select their content.
    images = [data.name, data.fingerprint, data.min_side, _times(data)]
    parts = [FORMAT, weights_hash(encoder), *images, repr(transform)]
    if readout is not all_readouts:
        parts.append(readout.__name__)
    return blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=12).hexdigest()


def times_hash(data) -> str:
    """Return a hash (16 hex digits) of the modification times of all files, to detect images that
    were replaced by others of the same size, which a fingerprint does not show."""
    return blake2b(repr(_times(data)).encode(), digest_size=8).hexdigest()


def _times(data) -> list[int]:
    """Return the modification time of every image file, or local shard of a stream (ns; 0 for a
    missing file)."""
    if data.is_stream:
        paths = (shard.name for shard in data.shards)
    else:
        of_item = getattr(data, "paths", lambda _: ())  # slides have none: their features count
        paths = (path for i in range(len(data)) for path in of_item(i))
    times = dict.fromkeys(paths, 0)
    for path in times:
        with suppress(OSError):
            times[path] = os.stat(path).st_mtime_ns
    return list(times.values())


def _load(file: Path, data) -> Features:
    from safetensors import safe_open

    with reading(file, "cached features", "delete it, or use --no-cache"):
        with safe_open(file, "pt") as stored:
            x, rows = stored.get_tensor("x"), stored.get_tensor("rows").tolist()
            skipped = json.loads(stored.metadata()["skipped"])
        return features_of(data, x, rows, skipped)


def _save(file: Path, x: torch.Tensor, rows: list[int], skipped: list[str], name: str) -> None:
    """Write the file atomically. Print a failure instead of raising it, to keep the features."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as partial:
            save_file(
                {"x": x.contiguous(), "rows": torch.tensor(rows)},
                partial,
                metadata={"skipped": json.dumps(skipped), "data": printable(name)},
            )
    except (OSError, SafetensorError) as error:
        print(f"Features of {name} cannot be cached: {error}", flush=True)
