"""Embeddings of any data in files of a few thousand rows, each written whole or not at all.

    plan_shards → the files that are still to be made → read_rows, in order → write_shard

What a file holds follows from the data alone, so that any number of processes, killed and started
again at will, leave the same files.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.split import as_key, is_known
from vim_ssl.data.transforms.image import Transform
from vim_ssl.evaluation.extract import Features, Readable, encode_views
from vim_ssl.utils.files import atomic_path

FORMATS = ("parquet", "npy")
KNOWN = ("ids", "labels", "groups")  # of every row
# An image that could be read (id, label or None, group or None, (c, h, w)), or the error of one
# that could not.
Row = tuple[str, Any, str | None, Tensor] | str


@dataclass(frozen=True)
class EmbeddingShard:
    """A file to be made: ``count`` images from place ``first`` on, of the data or, of a stream,
    of its shard ``source``."""

    name: str
    source: int
    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


def plan_shards(data: ImageData | ImageStream, rows: int) -> list[EmbeddingShard]:
    """All files, of ``rows`` images at most; in a stream none goes over the end of a shard."""
    if isinstance(data, ImageData):
        sizes, pattern = [len(data)], "{1:05}"
    else:
        sizes, pattern = [shard.count for shard in data.shards], "{0:05}-{1:03}"
    return [
        EmbeddingShard(
            pattern.format(source, first // rows), source, first, min(rows, size - first)
        )
        for source, size in enumerate(sizes)
        for first in range(0, size, rows)
    ]


def share_of(
    shards: Sequence[EmbeddingShard], streamed: bool, rank: int, world: int
) -> list[EmbeddingShard]:
    """Those of one process: every ``world``-th, or every ``world``-th shard of a stream, which is
    read once from front to back."""
    if not streamed:
        return list(shards[rank::world])
    sources = sorted({shard.source for shard in shards})[rank::world]
    return [shard for shard in shards if shard.source in sources]


def read_rows(
    data: ImageData | ImageStream,
    shards: Sequence[EmbeddingShard],
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
) -> Iterator[tuple[EmbeddingShard, list[Row], bool]]:
    """The images of these files in batches, none over the end of a file.

    Yields: the file, its next rows, and whether they are its last. One worker keeps the order of a
        file; of a stream several files may be under way at a time.
    """
    if isinstance(data, ImageStream):
        stream = StreamRows(data, shards, transform, batch_size)
        yield from DataLoader(stream, batch_size=None, num_workers=workers)
        return
    cuts = [
        (shard, range(begin, min(begin + batch_size, shard.end)))
        for shard in shards
        for begin in range(shard.first, shard.end, batch_size)
    ]
    loader = DataLoader(
        Readable(data, transform),
        batch_sampler=[list(places) for _, places in cuts],
        num_workers=workers,
        collate_fn=list,
    )
    for (shard, places), found in zip(cuts, loader, strict=True):
        rows: list[Row] = [
            row if isinstance(row, str) else (*_known_of(data, row[0]), row[1]) for row in found
        ]
        yield shard, rows, places.stop == shard.end


class StreamRows(IterableDataset):
    """`read_rows` of a stream; each worker reads shards of its own."""

    def __init__(
        self,
        data: ImageStream,
        shards: Sequence[EmbeddingShard],
        transform: Transform,
        batch_size: int,
    ):
        self.data, self.shards, self.transform = data, shards, transform
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[EmbeddingShard, list[Row], bool]]:
        worker = get_worker_info()
        place, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for source in sorted({shard.source for shard in self.shards})[place::count]:
            records = enumerate(self.data.records(source))
            for shard in (shard for shard in self.shards if shard.source == source):
                rows: list[Row] = []
                for number, record in records:
                    if number < shard.first:  # of a file that is there already
                        continue
                    rows.append(self._row(record))
                    last = number + 1 == shard.end
                    if last or len(rows) == self.batch_size:
                        yield shard, rows, last
                        rows = []
                    if last:
                        break

    def _row(self, record: dict[str, Any]) -> Row:
        try:
            item = self.data.decode(record)
        except BadImage as bad:
            return str(bad)
        label, group = item.get("label", -1), item.get("group")
        image = self.transform(item["image"])
        return item["id"], label if is_known(label) else None, group and str(group), image


@torch.no_grad()
def stream_features(
    encode: Callable[[Tensor], Tensor],
    data: ImageStream,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    device: str | torch.device = "cpu",
) -> Features:
    """`extract_features` of the labelled images of a stream, which is read once.

    Raises: ValueError when none can be read.
    """
    xs: list[Tensor] = []
    known: list[tuple[str, Any, str | None]] = []
    skipped: list[str] = []
    shards = plan_shards(data, max(len(data), 1))
    for _, rows, _ in read_rows(data, shards, transform, batch_size=batch_size, workers=workers):
        skipped += [row for row in rows if isinstance(row, str)]
        if whole := [row for row in rows if not isinstance(row, str) and row[1] is not None]:
            known += [row[:3] for row in whole]
            images = torch.stack([row[3] for row in whole]).to(device)
            xs.append(encode_views(encode, images).flatten(1).float().cpu())
    if not known:
        raise ValueError(f"{data.name} has no image with a label that can be read: {skipped[:3]}")
    ids, labels, groups = map(list, zip(*known, strict=True))
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return Features(torch.cat(xs), y, ids, skipped, None if None in groups else groups)


def _known_of(data: ImageData, index: int) -> tuple[str, Any, str | None]:
    """Id, label (an int, a list of 0 and 1, or None where it is not known), group or None."""
    group = None if data.groups is None else str(data.groups[index])
    if data.labels is None or not is_known(data.labels[index]):
        return data.ids[index], None, group
    key: Any = as_key(data.labels[index])
    return data.ids[index], list(key) if isinstance(key, tuple) else key, group


# ---------------------------------------------------------------- files


@dataclass
class Embedded:
    """What goes into a file: embeddings ``x`` (n, d), float32 on the CPU, ``ids``, ``labels`` and
    ``groups`` (None where unknown) of n images; ``skipped``, the errors of those that could not
    be read; ``made_of``, what `embed.py` recorded, where it is read from a folder."""

    name: str
    x: Tensor
    ids: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    made_of: dict[str, Any] = field(default_factory=dict)


def write_shard(folder: Path, part: Embedded, *, format: str, multi_label: bool = False) -> None:
    """Write one file: a reader, or a kill, sees it whole or not at all.

    ``NAME.parquet`` has the columns id, label (null where unknown; a list where images have
    several), group (null where unknown; what belongs together, as a patient's) and embedding;
    ``NAME.npy`` the embeddings, ``NAME.json`` the rest, written before it.

    Args:
        format: one of `FORMATS`.
    """
    if format == "npy":
        text = json.dumps({key: getattr(part, key) for key in ("skipped", *KNOWN)})
        with atomic_path(folder / f"{part.name}.json", shared=False) as path:
            path.write_text(text, encoding="utf-8")
        with (
            atomic_path(folder / f"{part.name}.npy", shared=False) as path,
            path.open("wb") as file,
        ):
            np.save(file, part.x.numpy())
        return
    import pyarrow as pa
    from pyarrow import parquet

    kind = pa.list_(pa.int8()) if multi_label else pa.int64()
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(part.x.numpy().reshape(-1)), part.x.shape[1]
    )
    columns = {
        "id": pa.array(part.ids, pa.string()), "label": pa.array(part.labels, kind),
        "group": pa.array(part.groups, pa.string()),
    }  # fmt: skip
    table = pa.table(columns | {"embedding": values}).replace_schema_metadata(
        {"skipped": json.dumps(part.skipped)}
    )
    with atomic_path(folder / f"{part.name}.parquet", shared=False) as path:
        parquet.write_table(table, path)


def read_summary(folder: Path, name: str, format: str) -> tuple[int, list[str]]:
    """Rows of a written file, and the images left out of it."""
    if format == "npy":
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return len(found["ids"]), found["skipped"]
    from pyarrow import parquet

    with parquet.ParquetFile(folder / f"{name}.parquet") as file:
        metadata = file.schema_arrow.metadata
        return file.metadata.num_rows, json.loads(metadata[b"skipped"])


def read_embeddings(folder: Path) -> Embedded:
    """All that a folder of whole files holds, in their order.

    Args:
        folder: that ``record.json`` and ``shards/`` lie in.
    Raises: FileNotFoundError for a folder without embeddings; ValueError for an unfinished one.
    """
    record = folder / "record.json"
    if not record.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no embeddings (record.json); write them by "
            "downstream/embed.py --output."
        )
    stored = json.loads(record.read_text())
    if not stored.get("finished"):
        raise ValueError(f"the embeddings in {folder} are not finished; run embed.py to the end.")
    found = Embedded(folder.name, torch.empty(0, 0), made_of=stored.get("made_of", {}))
    xs = []
    for file in sorted((folder / "shards").glob("*.npy")):
        rest = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        xs.append(torch.from_numpy(np.load(file)))
        for key in ("skipped", *KNOWN):
            getattr(found, key).extend(rest[key])
    for file in sorted((folder / "shards").glob("*.parquet")):
        from pyarrow import parquet

        table = parquet.read_table(file)
        values, width = table["embedding"].combine_chunks(), table.schema.field("embedding").type
        rows = values.flatten().to_numpy().reshape(len(table), width.list_size)
        xs.append(torch.from_numpy(rows.copy()))
        for key in KNOWN:
            getattr(found, key).extend(table[key.removesuffix("s")].to_pylist())
        found.skipped += json.loads(table.schema.metadata[b"skipped"])
    if xs:
        found.x = torch.cat(xs)
    return found
