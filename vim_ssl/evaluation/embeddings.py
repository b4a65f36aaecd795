"""Write embeddings of any data to files of a few thousand rows, each written atomically.

    plan_shards → files that do not exist yet → read_rows, in order → write_shard

The content of a file depends only on the data: any number of processes, killed and restarted at any
time, write the same files.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.loading.workers import Loader
from vim_ssl.data.split import as_key, is_known
from vim_ssl.data.transforms.image import Transform
from vim_ssl.evaluation.extract import Features, Readable, encode_batches
from vim_ssl.utils.files import atomic_path, read_object, reading
from vim_ssl.utils.names import printable
from vim_ssl.utils.numbers import require_finite
from vim_ssl.utils.resumable import read_record

FORMATS = ("parquet", "npy")
KNOWN = ("ids", "labels", "groups")  # stored for every row
# (id, label or None, group or None, image (c, h, w)), or the error text of an unreadable image.
Row = tuple[str, Any, str | None, Tensor] | str


@dataclass(frozen=True)
class EmbeddingShard:
    """A file to write: ``count`` images, starting at index ``first`` of the data, or of the shard
    ``source`` of a stream."""

    name: str
    source: int
    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


def plan_shards(data: ImageData | ImageStream, rows: int) -> list[EmbeddingShard]:
    """Return all files, with at most ``rows`` images each; no file spans two shards of a stream."""
    if data.is_stream:
        sizes, pattern = [shard.count for shard in data.shards], "{0:05}-{1:03}"
    else:
        sizes, pattern = [len(data)], "{1:05}"
    return [
        EmbeddingShard(
            pattern.format(source, first // rows), source, first, min(rows, size - first)
        )
        for source, size in enumerate(sizes)
        for first in range(0, size, rows)
    ]


def local_shards(
    shards: Sequence[EmbeddingShard], streamed: bool, rank: int, world: int
) -> list[EmbeddingShard]:
    """Return the files of one rank: every ``world``-th file; for a stream, which is read once in
    order, the files of every ``world``-th shard."""
    if not streamed:
        return list(shards[rank::world])
    ours = set(sorted({shard.source for shard in shards})[rank::world])
    return [shard for shard in shards if shard.source in ours]


def read_rows(
    data: ImageData | ImageStream,
    shards: Sequence[EmbeddingShard],
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
) -> Iterator[tuple[EmbeddingShard, list[Row], bool]]:
    """Read the images of these files in batches that do not span files.

    Yields: (file, its next rows, whether they are its last). The rows of a file come in order;
        for a stream, batches of several files may alternate.
    """
    if data.is_stream:
        stream = StreamRows(data, shards, transform, batch_size)
        yield from Loader(stream, batch_size=None, num_workers=workers)
        return
    cuts = [
        (shard, range(begin, min(begin + batch_size, shard.end)))
        for shard in shards
        for begin in range(shard.first, shard.end, batch_size)
    ]
    loader = Loader(
        Readable(data, transform),
        batch_sampler=[list(indices) for _, indices in cuts],
        num_workers=workers,
        collate_fn=list,
    )
    for (shard, indices), batch in zip(cuts, loader, strict=True):
        rows: list[Row] = [
            row if isinstance(row, str) else (*_fields(data, row[0]), row[1]) for row in batch
        ]
        yield shard, rows, indices.stop == shard.end


class StreamRows(IterableDataset):
    """`read_rows` for a stream; each worker reads different shards."""

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
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        by_source: dict[int, list[EmbeddingShard]] = {}
        for shard in self.shards:
            by_source.setdefault(shard.source, []).append(shard)
        for source in sorted(by_source)[index::count]:
            records = enumerate(self.data.records(source))
            for shard in by_source[source]:
                rows: list[Row] = []
                for number, record in records:
                    if number < shard.first:  # belongs to a file that already exists
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


def stream_features(
    encode: Callable[[Tensor], Tensor],
    data: ImageStream,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    device: str | torch.device = "cpu",
) -> Features:
    """`extract_features` for the labelled images of a stream, which is read once.

    Raises: ValueError if no labelled image can be read.
    """
    shards = plan_shards(data, max(len(data), 1))
    rows = read_rows(data, shards, transform, batch_size=batch_size, workers=workers)
    labelled = (
        [row for row in batch if isinstance(row, str) or row[1] is not None] for _, batch, _ in rows
    )
    x, fields, skipped = encode_batches(encode, labelled, device)
    if not fields:
        raise ValueError(f"{data.name} has no readable image with a label. Skipped: {skipped[:3]}")
    ids, labels, groups = map(list, zip(*fields, strict=True))
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return Features(x, y, ids, skipped, None if None in groups else groups)


def _fields(data: ImageData, index: int) -> tuple[str, Any, str | None]:
    """Id, label (an int, a list of 0 and 1, or None if unknown), group or None."""
    group = None if data.groups is None else str(data.groups[index])
    if data.labels is None or not is_known(data.labels[index]):
        return data.ids[index], None, group
    key: Any = as_key(data.labels[index])
    return data.ids[index], list(key) if isinstance(key, tuple) else key, group


# ---------------------------------------------------------------- files


@dataclass
class Embedded:
    """The content of a file, or of a folder of files.

    Attributes:
        x: embeddings (n, d), float32 on the CPU.
        ids, labels, groups: one per image; None if unknown.
        skipped: error texts of unreadable images.
        made_of: the record of `embed.py`, if read from a folder.
    """

    name: str
    x: Tensor
    ids: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    made_of: dict[str, Any] = field(default_factory=dict)


def write_shard(folder: Path, part: Embedded, *, format: str, multi_label: bool = False) -> None:
    """Write one file atomically.

    ``NAME.parquet`` has the columns id, label (null if unknown; a list for multi-label data), group
    (null if unknown) and embedding. ``NAME.npy`` has the embeddings; ``NAME.json``, written first,
    has the rest. Bytes of a file name that are not UTF-8 are escaped (`printable`).

    Args:
        format: one of `FORMATS`.
    """
    if format == "npy":
        content = {key: getattr(part, key) for key in ("skipped", *KNOWN)}
        content["ids"] = list(map(printable, part.ids))
        content["groups"] = [group and printable(group) for group in part.groups]
        text = json.dumps(content)
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
        "id": pa.array(map(printable, part.ids), pa.string()),
        "label": pa.array(part.labels, kind),
        "group": pa.array([group and printable(group) for group in part.groups], pa.string()),
    }  # fmt: skip
    table = pa.table(columns | {"embedding": values}).replace_schema_metadata(
        {"skipped": json.dumps(part.skipped)}
    )
    with atomic_path(folder / f"{part.name}.parquet", shared=False) as path:
        parquet.write_table(table, path)


def read_summary(folder: Path, name: str, format: str) -> tuple[int, list[str]]:
    """Return the number of rows in a written file, and its skipped images."""
    if format == "npy":
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return len(content["ids"]), content["skipped"]
    from pyarrow import parquet

    with parquet.ParquetFile(folder / f"{name}.parquet") as file:
        metadata = file.schema_arrow.metadata
        return file.metadata.num_rows, json.loads(metadata[b"skipped"])


EMBED_AGAIN = "delete it and run embed.py again"


def _read_parquet(file: Path, result: Embedded) -> torch.Tensor:
    """Add the columns of a file to ``result`` and return its features (n, d)."""
    from pyarrow import parquet

    table = parquet.read_table(file)
    values, width = table["embedding"].combine_chunks(), table.schema.field("embedding").type
    rows = values.flatten().to_numpy().reshape(len(table), width.list_size)
    for key in KNOWN:
        getattr(result, key).extend(table[key.removesuffix("s")].to_pylist())
    result.skipped += json.loads(table.schema.metadata[b"skipped"])
    return torch.from_numpy(rows.copy())


def read_embeddings(folder: Path) -> Embedded:
    """Read all files in a folder, in order.

    Args:
        folder: folder that contains ``record.json`` and ``shards/``.
    Raises: FileNotFoundError for a folder without embeddings; ValueError for an unfinished one, a
        damaged file, and values that are not finite.
    """
    record = folder / "record.json"
    if not record.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} contains no embeddings (record.json); write them with "
            "downstream/embed.py --output."
        )
    stored = read_record(record)
    if not stored.get("finished"):
        raise ValueError(f"the embeddings in {folder} are incomplete; run embed.py until it ends.")
    result = Embedded(folder.name, torch.empty(0, 0), made_of=stored.get("made_of", {}))
    xs = []
    # Names of our own files: no hidden files, such as "._0.npy".
    for file in sorted((folder / "shards").glob("[!.]*.npy")):
        rest = read_object(file.with_suffix(".json"), "the ids of embeddings", EMBED_AGAIN)
        with reading(file, "embeddings", EMBED_AGAIN):
            xs.append(torch.from_numpy(np.load(file)))
            for key in ("skipped", *KNOWN):
                getattr(result, key).extend(rest[key])
    for file in sorted((folder / "shards").glob("[!.]*.parquet")):
        with reading(file, "embeddings", EMBED_AGAIN):
            xs.append(_read_parquet(file, result))
    if xs:
        result.x = torch.cat(xs)
    if len(result.x) != len(result.ids):
        raise ValueError(f"{folder} has {len(result.x)} embeddings and {len(result.ids)} ids; "
                         "run embed.py again.")  # fmt: skip
    require_finite(result.x, f"the embeddings in {folder}", "embed the data again")
    return result
