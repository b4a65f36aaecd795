"""Embed images: write a vector per image, with its id and label, to parquet or npy files.

    python downstream/embed.py --encoder RUN_OR_FILE --data photos/ --output vectors
    python downstream/embed.py --encoder … --data 'wds:shards/*.tar' --output vectors --workers 4
    accelerate launch downstream/embed.py --encoder … --data hf:owner/name?split=all --output …
    python downstream/embed.py --encoder … --data scenes/ --img-size 2048 --batch-size 1
                                                 # large images, one long scan per image

Accepts any data spec, including streams; without ``split`` the training split is embedded. The
output folder contains ``shards/`` (read with ``pyarrow.parquet.read_table("vectors/shards")``, or
``numpy.load`` for each file) and ``record.json``, which describes the data and the encoder. After a
kill the same command resumes: finished files are kept.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vim_ssl import create_transform, load_encoder
from vim_ssl.cli import guarded
from vim_ssl.data import ImageData, ImageStream, open_data
from vim_ssl.data.bands import check_bands
from vim_ssl.evaluation.embeddings import (
    FORMATS,
    Embedded,
    EmbeddingShard,
    Row,
    local_shards,
    plan_shards,
    read_rows,
    read_summary,
    write_shard,
)
from vim_ssl.evaluation.extract import encode_views
from vim_ssl.evaluation.features import times_hash, weights_hash
from vim_ssl.evaluation.readout import CHOICES, all_readouts, readout_columns
from vim_ssl.evaluation.seen import learnt_by_encoder
from vim_ssl.models.protocol import Encoder
from vim_ssl.training.run import newest_run, task_folder, trained_on
from vim_ssl.utils.config import opt, parse
from vim_ssl.utils.distributed import join_processes, pick_device
from vim_ssl.utils.environment import commit, environment
from vim_ssl.utils.numbers import finite_rows
from vim_ssl.utils.resumable import IMAGE_FILES, claim_output, read_record, write_record

POOLED = "pooled"


@dataclass
class Config:
    """Write embeddings of any data to files."""

    encoder: str = opt("", "run, checkpoint, preset, Hub id or timm:NAME; default: the newest run")
    data: str = opt("", "images, labelled or not; default: the run's training data")
    readout: str = opt(
        POOLED, "pooled: the encoder's output; or a probe's readout", choices=(POOLED, *CHOICES)
    )
    img_size: int = opt(
        0, "input size in pixels; position embeddings are resampled; 0: the encoder's size"
    )
    format: str = opt("parquet", "file format", choices=FORMATS)
    shard_rows: int = opt(4096, "images per file; a kill loses at most one file per process")
    batch_size: int = opt(128, "images per batch")
    workers: int = opt(0, "data loading processes")
    device: str = opt("", "cpu, cuda …; default: cuda if available")
    seed: int = opt(0, "seed of a preset's random weights")
    output: str = opt("", "output folder; default: embed/ in the run")

    def __post_init__(self):
        if min(self.shard_rows, self.batch_size) < 1:
            raise ValueError("shard_rows and batch_size must be 1 or more.")


def run(config: Config) -> dict:
    with ExitStack() as held:  # after an error, a notebook keeps this frame and thus the lock
        return write_embeddings(config, held)


def write_embeddings(config: Config, held: ExitStack) -> dict:
    """Run the command.

    Args:
        held: releases the lock of the folder at the end.
    Returns: the content of record.json, on the main process.
    """
    processes = join_processes()
    device = pick_device(config.device)
    source = config.encoder or str(newest_run())
    torch.manual_seed(config.seed)
    encoder = load_encoder(source, num_classes=0, device=device, img_size=config.img_size or None)
    data = open_data(config.data or trained_on(source), streams=True)
    encoder = encoder.for_data(data)
    check_bands(encoder, data)
    folder = Path(config.output or task_folder("embed", source, config.data))
    encode = build_readout(encoder, config.readout)
    example = torch.zeros(1, *encoder.input_shape, device=device)
    with torch.no_grad():
        dim = encode(example).shape[1]
    shards = plan_shards(data, config.shard_rows)
    missing: list[EmbeddingShard] = []
    if processes.main:
        new = not (folder / "record.json").exists()
        learnt = learnt_by_encoder(source, data) if new else {}
        made_of = describe(encoder, data, config) | {"dim": dim}
        lock = lock_folder(folder, made_of, source, learnt)
        held.callback(lock.release)
        missing = [
            s for s in shards if not (folder / "shards" / f"{s.name}.{config.format}").exists()
        ]
        others = ", ".join(split for split in data.splits if split != data.split)
        part = f" of the split {data.split} (?split=all adds {others})"
        print(f"Encoder {source} · {data.name}: {len(data):,} images"
              f"{part * bool(others and data.split != 'all')}, {len(shards):,} files, "
              f"{len(shards) - len(missing):,} already done", flush=True)  # fmt: skip
    missing = processes.broadcast(missing)
    began = time.perf_counter()
    mine = local_shards(missing, data.is_stream, processes.rank, processes.world)
    rows = read_rows(data, mine, create_transform(encoder), batch_size=config.batch_size,
                     workers=config.workers)  # fmt: skip
    total = sum(shard.count for shard in mine) if processes.main else None
    multi_label = not data.is_stream and data.multi_label
    for shard in embed(encode, rows, dim, device, total):
        write_shard(folder / "shards", shard, format=config.format, multi_label=multi_label)
    processes.gather(None)  # wait for the files of the other processes
    if not processes.main:
        return {}

    record = finish(folder, shards, config.format, time.perf_counter() - began)
    if record["skipped"]:
        print(f"{len(record['skipped']):,} images were skipped, such as "
              f"{record['skipped'][:3]}; record.json lists all.")  # fmt: skip
    print(f"Written: {record['rows']:,} embeddings of {dim} values in {folder}")
    return record


def build_readout(encoder: Encoder, readout: str) -> Callable[[Tensor], Tensor]:
    """Return the function from images (b, c, h, w) to features (b, d)."""
    if readout == POOLED:
        return encoder
    columns = readout_columns(encoder, readout)
    return lambda images: all_readouts(encoder, images)[:, columns]


def describe(encoder: Encoder, data: ImageData | ImageStream, config: Config) -> dict[str, Any]:
    """Return everything that the files' contents depend on; it must match to resume."""
    return {
        "weights": weights_hash(encoder), "readout": config.readout,
        "data": data.name, "fingerprint": data.fingerprint, "classes": data.classes,
        IMAGE_FILES: times_hash(data),
        "transform": repr(create_transform(encoder)), "format": config.format,
        "shard_rows": config.shard_rows,
    }  # fmt: skip


def lock_folder(folder: Path, made_of: dict[str, Any], source: str, learnt: dict[str, Any]):
    """Create the folder, or resume in it, and lock it against other processes.

    Args:
        learnt: what the encoder was trained on, for a new record.
    Returns: the lock.
    Raises: the errors of `claim_output`.
    """
    record, shards = folder / "record.json", folder / "shards"
    leftovers = {".lock", "shards", f".{record.name}.part"}  # from a kill before the record
    present = list(folder.iterdir()) if folder.exists() else []
    strangers = [path for path in present if path.name not in leftovers] + list(shards.glob("*"))
    origin = {"task": "embed", "encoder": source, **learnt, "commit": commit(), **environment()}
    lock = claim_output(
        folder, record, made_of, origin,
        what="embeddings", lock=folder / ".lock", strangers=strangers,
    )  # fmt: skip
    shards.mkdir(exist_ok=True)
    return lock


@torch.no_grad()
def embed(
    encode: Callable[[Tensor], Tensor],
    rows: Iterable[tuple[EmbeddingShard, list[Row], bool]],
    dim: int,
    device: str,
    total: int | None,
) -> Iterator[Embedded]:
    """Yield the content of each file once its last row is embedded; see `read_rows`.

    An image whose embedding is not finite is skipped.

    Args:
        total: number of images, for a progress bar; None: no bar.
    """
    unfinished: dict[str, tuple[Embedded, list[Tensor]]] = {}
    with tqdm(total=total, unit="image", disable=total is None, mininterval=0.5) as bar:
        for shard, batch, last in rows:
            empty = Embedded(shard.name, torch.empty(0, dim)), list[Tensor]()
            content, xs = unfinished.setdefault(shard.name, empty)
            content.skipped += [row for row in batch if isinstance(row, str)]
            if readable := [row for row in batch if not isinstance(row, str)]:
                images = torch.stack([image for *_, image in readable]).to(device)
                x = encode_views(encode, images).float().cpu()
                finite = finite_rows(x)
                xs.append(x[finite])
                for (id, label, group, _), usable in zip(readable, finite.tolist(), strict=True):
                    if not usable:
                        content.skipped.append(f"{id}: its embedding is not finite (NaN, infinity)")
                        continue
                    content.ids.append(id)
                    content.labels.append(label)
                    content.groups.append(group)
            bar.update(len(batch))
            if last:
                content.x = torch.cat([content.x, *xs])
                yield unfinished.pop(shard.name)[0]


def finish(
    folder: Path, shards: list[EmbeddingShard], format: str, seconds: float
) -> dict[str, Any]:
    """Count the rows of all files, mark the record as finished and return it."""
    file = folder / "record.json"
    summaries = [read_summary(folder / "shards", shard.name, format) for shard in shards]
    record = read_record(file)
    record |= {
        "finished": True,
        "files": len(shards),
        "rows": sum(rows for rows, _ in summaries),
        "skipped": [name for _, skipped in summaries for name in skipped],
        "seconds": round(record.get("seconds", 0) + seconds, 1),
    }
    write_record(file, record)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
