"""Write predicted classes as a table: CSV, parquet or JSON lines."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from vim_ssl.models.predictor import ClassPrediction
from vim_ssl.tasks.prediction import Writer
from vim_ssl.utils.files import atomic_path
from vim_ssl.utils.names import printable

FEW = 20  # classes up to which each has a column of probabilities
CHUNK = 10_000  # rows of a parquet file in memory at once
DIGITS = 6  # decimals of a probability


class TableWriter(Writer):
    """Writes a row per image: ``id``, ``class``, ``probability``, then ``class_2``,
    ``probability_2`` … and ``p_NAME`` for each class. Bytes of names that are not UTF-8 are escaped
    (`printable`).

    With multi-label targets ``classes`` has all labels above ``threshold``, joined by "|", and
    ``class`` is the most probable one.

    Args:
        file: a path that ends in .csv, .parquet or .jsonl.
        model: a task model that predicts `ClassPrediction`.
        top_k: number of classes with name and probability.
        all_classes: write ``p_NAME`` for any number of classes; by default up to `FEW`.
        threshold: for multi-label targets.
    Raises: ValueError for another ending, a ``top_k`` below 1 or a threshold outside 0..1.
    """

    is_folder = False

    def __init__(
        self,
        file: str | Path,
        model: Any,
        *,
        top_k: int = 3,
        all_classes: bool = False,
        threshold: float = 0.5,
    ):
        super().__init__(file)
        if self.output.suffix not in FORMATS:
            raise ValueError(
                f"{self.output} ends in {self.output.suffix!r}; expected {', '.join(FORMATS)}."
            )
        if top_k < 1 or not 0 <= threshold <= 1:
            raise ValueError(
                f"top_k is {top_k} and threshold {threshold:g}; expected 1 or more, and 0 to 1."
            )
        video = getattr(model.encoder, "reads_clips", False)
        self.unit = "slides" if model.task == "slide" else "videos" if video else "images"
        self.classes, self.top_k = model.classes, min(top_k, len(model.classes))
        self.multi_label = getattr(model, "targets", "class") == "multi-label"
        self.has_columns = all_classes or len(self.classes) <= FEW
        self.threshold = threshold

    def describe(self) -> dict[str, Any]:
        settings = {"top_k": self.top_k, "probabilities": self.has_columns}
        return settings | ({"threshold": self.threshold} if self.multi_label else {})

    def write(self, item: dict[str, Any], result: ClassPrediction) -> dict[str, Any]:
        row: dict[str, Any] = {}
        names = [result.name]
        if self.multi_label:
            names = result.above(self.threshold)
            row["classes"] = "|".join(names)
        # The predicted class first: that of ordinal targets may not be the most probable one.
        others = [one for one in result.top(self.top_k + 1) if one[0] != result.name]
        best = [(result.name, result.probability), *others][: self.top_k]
        for rank, (name, probability) in enumerate(best, 1):
            ending = "" if rank == 1 else f"_{rank}"
            row |= {f"class{ending}": name, f"probability{ending}": _rounded(probability)}
        if self.has_columns:
            pairs = zip(self.classes, result.probabilities, strict=True)
            row |= {f"p_{name}": _rounded(probability) for name, probability in pairs}
        return {"row": row, "counts": dict.fromkeys(names, 1)}

    def finish(self, records: Iterable[dict[str, Any]]) -> Path:
        rows = (
            {
                printable(key): printable(value) if isinstance(value, str) else value
                for key, value in {"id": record["id"], **record["row"]}.items()
            }
            for record in records
        )
        with atomic_path(self.output, shared=False) as partial:
            FORMATS[self.output.suffix](partial, rows)
        return self.output


def _rounded(probability: float) -> float:
    return round(float(probability), DIGITS)


def _write_csv(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    first = next(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(first))
        table.writeheader()
        table.writerow(first)
        table.writerows(rows)


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    chunk = list(islice(rows, CHUNK))
    schema = pa.Table.from_pylist(chunk[:1]).schema
    with parquet.ParquetWriter(path, schema) as file:
        while chunk:
            file.write_table(pa.Table.from_pylist(chunk, schema))
            chunk = list(islice(rows, CHUNK))


FORMATS: dict[str, Callable[[Path, Iterator[dict[str, Any]]], None]] = {
    ".csv": _write_csv, ".parquet": _write_parquet, ".jsonl": _write_lines,
}  # fmt: skip
