"""Predict a data set with a task model and write the results; a killed command is resumed.

    items → model.prepare (in the loading processes) → model.predict_prepared → writer.write
          → a line of the journal; when all are done: writer.finish

The journal has a line for each finished item. The record has the settings and, at the end, the
summary. For a file, both are beside it; for a folder, in it.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from vim_ssl.data.images import BadImage
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.loading.workers import Loader
from vim_ssl.evaluation.features import times_hash, weights_hash
from vim_ssl.models.predictor import ClassPrediction, Predictor
from vim_ssl.utils.environment import commit, environment
from vim_ssl.utils.numbers import NotFinite, require_finite
from vim_ssl.utils.resumable import (
    IMAGE_FILES,
    Journal,
    claim_output,
    read_record,
    write_record,
)

# Index in the data, id, and the item with its prepared image, or the error text of a broken image.
Row = tuple[int, str, dict[str, Any] | str]


class Writer(ABC):
    """Writes the results of one kind of task.

    Attributes:
        output: the file or folder to write.
        is_folder: whether ``output`` is a folder.
        unit: what ``counts`` of a record count, in the plural.
        items: what is predicted, in the plural, if this is not what is counted.
    """

    is_folder = True
    unit = "images"
    items = ""

    def __init__(self, output: str | Path):
        self.output = Path(output)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the settings that the content depends on; they must match to resume.
        JSON-serialisable."""

    @abstractmethod
    def write(self, item: dict[str, Any], result: Any) -> dict[str, Any]:
        """Write the files of one item, atomically; after a kill an item may be written again.

        Args:
            item: the item of the data with ``id`` and, where known, ``meta``; its ``image`` is what
                `Predictor.prepare` returned (dense models: the image itself).
            result: what the model predicted.
        Returns: the item's JSON-serialisable record for `finish`. Its optional ``counts``, class
            name → number, are summed over all items for the summary.
        """

    @abstractmethod
    def finish(self, records: Iterable[dict[str, Any]]) -> Path:
        """Write what needs all items.

        Args:
            records: the records of all readable items, each with the item's ``id``, in the order of
                the data. Read from the journal at each iteration.
        Returns: the file or folder to name in the summary.
        """


@dataclass
class Predicted:
    """Summary of a finished prediction.

    Attributes:
        output: the written file or folder.
        images: number of predicted items.
        counts: class name → number of ``unit``.
        skipped: "id: reason" of each broken item.
    """

    output: Path
    images: int
    counts: dict[str, float]
    unit: str
    skipped: list[str] = field(default_factory=list)


def predict_data(
    model: Any,
    data: Any,
    writer: Writer,
    *,
    batch_size: int = 32,
    workers: int = 0,
    made_of: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Predicted:
    """Predict all items of ``data`` and write the results; skip those that are already written.

    Args:
        model: a task model of `vim_ssl.load_model`; see `Predictor`.
        data: images of `open_data`, by index or as a stream.
        batch_size: items per batch, for models that predict several at once.
        workers: data loading processes.
        made_of: further settings that the results depend on.
        quiet: print nothing, show no progress bar.
    Raises: ValueError if the output was made with other settings, or if no item can be read;
        FileExistsError for other content; BlockingIOError while another process writes there.
    """
    output, name = writer.output, f"{writer.output.name}."
    folder, name = (output, "") if writer.is_folder else (output.parent, name)
    record, lines = folder / f"{name}record.json", folder / f"{name}journal.jsonl"
    lock = folder / f".{name}lock"
    settings = {
        "task": model.task, "weights": weights_hash(model), "classes": model.classes,
        "transform": repr(model.transform), "data": data.name, "images": data.fingerprint,
        IMAGE_FILES: times_hash(data),
        **(made_of or {}), **writer.describe(),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # as it is read from a record: lists, no tuples
    origin = {"command": "predict", "commit": commit(), **environment()}
    held = claim_output(
        output, record, settings, origin, what="predictions", lock=lock,
        strangers=_strangers(writer, {record, lock}),
    )  # fmt: skip
    try:
        stored = read_record(record)
        if not (stored["finished"] and output.exists()):
            with closing(Journal(lines)) as journal:
                _fill(journal, model, data, writer, batch_size, workers, quiet)
                stored |= _finish(journal, data, writer)
            write_record(record, stored)
            lines.unlink()
        elif not quiet:
            print(f"{output} is complete; nothing to do.", flush=True)
    finally:
        held.release()
        lock.unlink(missing_ok=True)
    return Predicted(
        folder / stored["output"], stored["images"], stored["counts"], writer.unit,
        stored["skipped"],
    )  # fmt: skip


def _strangers(writer: Writer, ours: Container[Path]) -> Iterator[Path]:
    """Yield existing paths at the output that no prediction has written."""
    if not writer.is_folder:
        yield from filter(Path.exists, [writer.output])
    elif writer.output.exists():
        yield from (path for path in writer.output.iterdir() if path not in ours)


def _fill(
    journal: Journal, model: Any, data: Any, writer: Writer, batch_size: int, workers: int,
    quiet: bool,
) -> None:  # fmt: skip
    """Predict and write the items that the journal does not have."""
    total = len(data)
    if not quiet:
        done = f", {len(journal):,} already done" if len(journal) else ""
        print(f"{data.name}: {total:,} items to predict{done}", flush=True)
    size = batch_size if model.batched else 1
    batches = read_batches(data, model, journal, batch_size=size, workers=workers)
    unit = (writer.items or writer.unit).removesuffix("s")
    bar = tqdm(total=total, initial=len(journal), unit=unit, disable=quiet, mininterval=0.5)
    with bar:
        try:
            for batch in batches:
                _write_batch(journal, model, writer, batch)
                bar.update(len(batch))
        except KeyboardInterrupt:
            if not quiet:
                print(f"\nStopped with {len(journal):,} of {total:,} done; the same command "
                      "resumes.", flush=True)  # fmt: skip
            raise


@torch.no_grad()
def predict_batch(model: Any, batch: list[Row]) -> Iterator[tuple[Row, Any]]:
    """Yield each row of `read_batches` with its result; None for a broken item, and for one whose
    result is not finite, with the reason in place of the item."""
    readable = [content["image"] for _, _, content in batch if not isinstance(content, str)]
    results = iter(model.predict_prepared(readable) if readable else ())
    for index, id, content in batch:
        if isinstance(content, str):
            yield (index, id, content), None
            continue
        try:
            result = next(results)
            if isinstance(result, ClassPrediction):
                require_finite(result.probabilities, "the probabilities")
            yield (index, id, content), result
        except NotFinite as error:
            yield (index, id, str(error)), None


def _write_batch(journal: Journal, model: Any, writer: Writer, batch: list[Row]) -> None:
    for (index, id, content), result in predict_batch(model, batch):
        if isinstance(content, str):
            journal.append(index, {"id": id, "error": content})
        elif index not in journal:
            journal.append(index, {"id": id, "record": writer.write(content, result)})


class _Records:
    """The records of a journal without the broken items; see `Writer.finish`."""

    def __init__(self, journal: Journal):
        self.journal = journal

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for entry in self.journal:
            if "record" in entry:
                yield {"id": entry["id"], **entry["record"]}


def _finish(journal: Journal, data: Any, writer: Writer) -> dict[str, Any]:
    """Write what needs all items; return the entries that complete the output's record."""
    skipped = [f"{entry['id']}: {entry['error']}" for entry in journal if "error" in entry]
    if not len(journal):
        raise ValueError(
            f"none of the {len(data)} images of {data.name} can be read: {skipped[:3]}"
        )
    records, counts = _Records(journal), dict[str, float]()
    for record in records:
        for name, count in record.get("counts", {}).items():
            counts[name] = counts.get(name, 0) + count
    written = writer.finish(records)
    folder = writer.output if writer.is_folder else writer.output.parent
    return {
        "finished": True, "output": str(written.relative_to(folder)), "images": len(journal),
        "counts": counts, "unit": writer.unit, "skipped": skipped,
    }  # fmt: skip


# ---------------------------------------------------------------- reading


def read_batches(
    data: Any, model: Predictor, done: Container[int], *, batch_size: int, workers: int
) -> Iterator[list[Row]]:
    """Yield the batches that contain an item that is not done.

    Batches are always cut at the same indices, so a resumed prediction has the same ones.
    """
    loader: Loader
    if data.is_stream:
        stream = _StreamRows(data, model, done, batch_size)
        loader = Loader(stream, batch_size=None, num_workers=workers)
    else:
        cuts = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
        missing = [list(cut) for cut in cuts if any(i not in done for i in cut)]
        loader = Loader(
            _Rows(data, model), batch_sampler=missing, num_workers=workers, collate_fn=list
        )
    yield from loader


class _Rows(Dataset):
    """`Row` by index."""

    def __init__(self, data: Any, model: Predictor):
        self.data, self.prepare = data, model.prepare

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        return row_of(index, self.data.ids[index], lambda: self.data[index], self.prepare)


class _StreamRows(IterableDataset):
    """Batches of `Row` of a stream; each worker reads different shards."""

    def __init__(self, data: ImageStream, model: Predictor, done: Container[int], batch_size: int):
        self.data, self.prepare, self.batch_size = data, model.prepare, batch_size
        self.missing = [
            [number for number in range(shard.count) if start + number not in done]
            for start, shard in zip(data.starts, data.shards, strict=True)
        ]

    def __iter__(self) -> Iterator[list[Row]]:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for shard in range(index, len(self.data.shards), count):
            if not self.missing[shard]:
                continue
            needed = {number // self.batch_size for number in self.missing[shard]}
            start, rows = self.data.starts[shard], list[Row]()
            for number, record in enumerate(self.data.records(shard)):
                if number // self.batch_size in needed:
                    rows.append(self._row(start + number, record))
                if rows and (number + 1) % self.batch_size == 0:
                    yield rows
                    rows = []
            if rows:
                yield rows

    def _row(self, index: int, record: dict[str, Any]) -> Row:
        return row_of(index, record["id"], lambda: self.data.decode(record), self.prepare)


def row_of(index: int, id: str, load: Any, prepare: Any) -> Row:
    try:
        item = load()
        return index, id, item | {"image": prepare(item["image"])}
    except BadImage as bad:
        return index, id, bad.reason or str(bad)
