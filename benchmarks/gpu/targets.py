"""The targets of README.md on a GPU: what was measured of each, what is expected, and whether it is
met.

The expected values are those of one NVIDIA H200. A value outside its range need not be wrong, but
look for a mistake of the measurement before you believe it. Their sources:

    rates     132 multiprocessors, 16 exponentials and 128 multiply-adds a clock each, 1.98 GHz
    copy      4.3 TB/s, read and written, seen on such a card by other programs
    counts    instructions per element by sm90.py over the 12 of the floor: about 2.4 x backward;
              forward 9.2 to 11 cycles against 8 for the exponential, at full issue
    peer      counted by instructions of mamba-ssm's kernels: 4.3 to 8 x forward, 3.9 x backward
    estimate  sum over a block of the scan by counts, the products at 300 to 500 TFLOP/s and the
              other operators by their bytes at 4 TB/s; or launches of 5 µs, if these take longer
    bounds    those that the check itself enforces
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rows import markdown_table, read_rows

README = Path(__file__).parents[1] / "README.md"
CUT, BROKEN = 4, 3
STATES = {  # exit code of a section -> its state
    0: "done", BROKEN: "done, but a check is BROKEN", CUT: "done, but cut off",
    None: "STOPPED, its rows so far are kept",
}  # fmt: skip
ENDED = (STATES[0], STATES[BROKEN])  # every check ran
CSVRow = dict[str, str]
# File name -> its rows.
Tables = Callable[[str], list[CSVRow]]


@dataclass(frozen=True)
class Quantity:
    """One measured value of a line of README.md's table.

    Attributes:
        line: first column of the line.
        name: distinguishes the quantities of a line; "" if there is only one.
        value: returns the value, or None if it was not measured.
        expected: range outside which a value is suspect.
        source: where the range is from; a word of the docstring above.
        at_most, at_least: the target; neither if the line only reports.
        beside: print it beside the row that it is read from.
        section: the section that must have run to its end for the target to be met.
    """

    line: str
    name: str
    value: Callable[[Tables], float | None]
    expected: tuple[float, float]
    source: str
    at_most: float | None = None
    at_least: float | None = None
    beside: bool = True
    section: str = ""

    def text(self, value: float) -> str:
        """``1.19 (expected 1–1.6)``, and a mark if it is outside."""
        low, high = self.expected
        mark = "" if low <= value <= high else " <<< OUTSIDE"
        return f"{_short(value)} (expected {_short(low)}–{_short(high)}){mark}"

    def met(self, value: float) -> bool | None:
        """True if the target is met; None without one."""
        if self.at_most is not None:
            return value <= self.at_most
        return None if self.at_least is None else value >= self.at_least


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else f"{value:.0f}"


def column(file: str, name: str, **where: object) -> Callable[[Tables], float | None]:
    """A column of the last row of a file with these values."""

    def value(tables: Tables) -> float | None:
        cells = [row.get(name) for row in tables(file) if _matches(row, where)]
        return float(cells[-1]) if cells and cells[-1] else None

    return value


def ratio(
    file: str, name: str, over: dict, under: dict, **where: object
) -> Callable[[Tables], float | None]:
    """A column of one row over that of another."""
    above, below = (column(file, name, **where, **one) for one in (over, under))

    def value(tables: Tables) -> float | None:
        a, b = above(tables), below(tables)
        return a / b if a and b else None

    return value


def violations(file: str, backend: str, *quantities: str) -> Callable[[Tables], float | None]:
    """The number of rows whose bound did not hold, of those with these quantities, or of all.

    None if none of them is of this backend. A test that was skipped has no bound.
    """

    def value(tables: Tables) -> float | None:
        rows = [row for row in tables(file)
                if (row["quantity"] in quantities or not quantities) and row["holds"]]  # fmt: skip
        measured = any(row["backend"] == backend for row in rows)
        return float(sum(row["holds"] != "True" for row in rows)) if measured else None

    return value


def _matches(row: CSVRow, where: dict) -> bool:
    return all(row.get(key) == str(value) for key, value in where.items())


# --- the quantities --------------------------------------------------------------------------

SIZES = {"Ti": 384, "S": 768, "B": 1536}  # d of the scan
KERNELS, MODELS = "kernels.csv", "models.csv"
PEER = "mamba-ssm, flips"


def _ceilings() -> Iterable[Quantity]:
    line = "ceilings: copy, exp2, FMA, clock under load"
    for name, low, high, source in (
        ("exp2_per_s", 3.2e12, 4.25e12, "rates"), ("fma_per_s", 2.4e13, 3.4e13, "rates"),
        ("copied_bytes_per_s", 3.8e12, 4.8e12, "copy"), ("sm_clock_mhz", 1400, 1985, "rates"),
    ):  # fmt: skip
        yield Quantity(line, name, column("ceilings.csv", name), (low, high), source)


def _correctness() -> Iterable[Quantity]:
    errors, tests = ("accuracy.csv", "triton"), ("tests.csv", "pytest")
    for line, section, value in (
        ("every backend against float64 on a GPU, NaN-poisoned", "correctness",
         violations(*errors)),
        ("two runs of the Triton scan", "correctness", violations(*errors, "two runs")),
        ("the tests marked gpu", "correctness", violations(*tests, "gpu")),
        ("all tests of the kernels, on a GPU", "tests", violations(*tests, "kernels")),
    ):  # fmt: skip
        yield Quantity(line, "violated", value, (0, 0), "bounds", at_most=0, beside=False,
                       section=section)  # fmt: skip


def _kernels() -> Iterable[Quantity]:
    for direction, target, expected in (
        ("forward", 1.35, {197: (1.0, 1.7), 1025: (1.0, 2.2)}),
        ("backward", 3.0, {197: (1.8, 3.6), 1025: (1.8, 4.0)}),
    ):
        for l, b in ((197, 128), (1025, 64)):
            for size, d in SIZES.items():
                shape = f"b{b}-l{l}-d{d}-n16"
                line = f"{direction}, Vim-{size}, {l} tokens b{b}, bf16"
                value = column(KERNELS, "x_floor", provider="triton", timing="calls",
                               direction=direction, shape=shape, dtype="bf16")  # fmt: skip
                yield Quantity(line, "× floor", value, expected[l], "counts", at_most=target)
                value = column(KERNELS, "x_floor", provider="triton", timing="calls",
                               direction=direction, shape=shape, dtype="fp32")  # fmt: skip
                name = f"{direction}, Vim-{size}, {l} tokens, × floor"
                yield Quantity("the same in float32", name, value, expected[l], "counts")
    long = {"provider": "triton", "direction": "forward", "shape": "b1-l6085-d384-n16"}
    for dtype, line, target in (
        ("bf16", "forward, Vim-Ti, 6085 tokens b1, bf16", 0.08),
        ("fp32", "the same in float32", None),
    ):  # fmt: skip
        value = column(KERNELS, "p50_ms", **long, timing="graph", dtype=dtype)
        name = "ms" if target else "forward, Vim-Ti, 6085 tokens, ms"
        yield Quantity(line, name, value, (0.035, 0.15), "estimate", at_most=target)


def _peers() -> Iterable[Quantity]:
    for direction, target, expected in (("forward", 4, (3, 12)), ("backward", 3, (2, 10))):
        line = f"{direction} against mamba-ssm's two calls plus flips, same shapes"
        for l, b in ((197, 128), (1025, 64)):
            for size, d in SIZES.items():
                value = ratio(
                    KERNELS, "p50_ms", {"provider": PEER}, {"provider": "triton"}, dtype="bf16",
                    direction=direction, timing="calls", shape=f"b{b}-l{l}-d{d}-n16",
                )  # fmt: skip
                name = f"Vim-{size}, {l} tokens, × as fast"
                yield Quantity(line, name, value, expected, "peer", at_least=target, beside=False)
    line = "against `tl.associative_scan`, torch loop, torch.compile"
    for provider, expected in (
        ("tl.associative_scan", (2, 12)), ("torch", (20, 2000)), ("compiled loop", (5, 500)),
        ("compiled associative_scan", (3, 300)),
    ):  # fmt: skip
        value = ratio(
            KERNELS, "p50_ms", {"provider": provider}, {"provider": "triton"}, dtype="bf16",
            direction="forward", timing="calls", shape="b128-l197-d384-n16",
        )  # fmt: skip
        name = f"{provider}, forward, Vim-Ti, 197 tokens, × as fast"
        yield Quantity(line, name, value, expected, "estimate", beside=False)


def _models() -> Iterable[Quantity]:
    line = "one Vim block, Vim-Ti, 224 px, forward and training step"
    for what, expected in (("forward", (0.18, 0.9)), ("training step", (0.7, 4.0))):
        value = column(MODELS, "p50_ms", model="vim block 192", what=what)
        yield Quantity(line, f"{what}, ms", value, expected, "estimate")
    line = (
        "Vim-Ti/S against DeiT-Ti/S with fused attention, 224–2048 px, forward and training step, "
        "bf16: images/s, memory"
    )
    for model, forward, step in (
        ("vim_tiny", (7e3, 3e4), (1.5e3, 8e3)), ("deit_tiny", (2e4, 9e4), (5e3, 3e4)),
        ("vim_small", (4e3, 1.6e4), (1e3, 5e3)), ("deit_small", (1.2e4, 5e4), (3e3, 1.6e4)),
    ):  # fmt: skip
        for what, expected in (("forward", forward), ("training step", step)):
            value = column(MODELS, "images_per_s", model=f"{model}_patch16_224", what=what, px=224,
                           mode="eager")  # fmt: skip
            yield Quantity(line, f"{model}, 224 px, {what}, images/s", value, expected, "estimate")
    line = "memory that a training step saves for its backward pass, Vim-Ti over DeiT-Ti, 224 px"
    value = ratio(
        MODELS, "saved_mb", {"model": "vim_tiny_patch16_224"}, {"model": "deit_tiny_patch16_224"},
        what="training step", px=224, mode="eager",
    )  # fmt: skip
    yield Quantity(line, "times", value, (1.0, 3.0), "estimate", at_most=1.4, beside=False)
    line = "the same under torch.compile, Ti, 224 and 1024 px"
    for model, expected in (("vim_tiny", (7e3, 5e4)), ("deit_tiny", (2e4, 1.5e5))):
        value = column(MODELS, "images_per_s", model=f"{model}_patch16_224", what="forward", px=224,
                       mode="compiled")  # fmt: skip
        yield Quantity(line, f"{model}, 224 px, forward, images/s", value, expected, "estimate")


def _pretraining() -> Iterable[Quantity]:
    file, line = "pretraining.csv", "short bf16 pretraining on digits: seconds, kNN"
    yield Quantity(line, "seconds", column(file, "seconds"), (5, 60), "estimate")
    yield Quantity(line, "kNN", column(file, "knn_top1"), (70, 100), "estimate")
    value = column(file, "resume_difference")
    line, name = "its resumption in the middle", "difference of the losses"
    yield Quantity(line, name, value, (0, 1e-3), "bounds", at_most=1e-3)


QUANTITIES = [*_ceilings(), *_correctness(), *_kernels(), *_peers(), *_models(), *_pretraining()]


# --- what is printed -------------------------------------------------------------------------


def remarks(file: str, row: dict) -> str:
    """The quantities that can be read from one row alone, each with its expected range."""
    cells = {key: "" if value is None else str(value) for key, value in row.items()}
    texts = []
    for quantity in QUANTITIES:
        value = quantity.value(lambda name: [cells] if name == file else [])
        if quantity.beside and value is not None:
            texts.append(f"{quantity.name.rpartition(', ')[2]} {quantity.text(value)}")
    return "; ".join(texts)


def debts() -> list[list[str]]:
    """The lines of README.md's table for a GPU: result, target, measured, origin, file."""
    lines = README.read_text(encoding="utf-8").splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.startswith("| result | target (stretch)")
    )
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return table


def summary(
    out: Path, sections: Iterable[tuple[str, str, str]] = (),
    before: Mapping[str, int] | None = None, dry: bool = False,
) -> str:  # fmt: skip
    """Markdown: the sections, and every line of README.md's table with what a run measured of it.

    Args:
        sections: name, state and seconds of each.
        before: file name -> the number of its rows that are not of this run.
        dry: the run was one on a CPU, which meets no target.
    """
    sections = list(sections)
    tables = {path.name: read_rows(path)[(before or {}).get(path.name, 0) :]
              for path in sorted(out.glob("*.csv"))}  # fmt: skip
    ended = {"", *(name for name, state, _ in sections if state in ENDED)}
    lines, suspect = [], []
    for result, target, *_ in debts():
        pairs = [(q, q.value(lambda file: tables.get(file, []))) for q in QUANTITIES
                 if q.line == result]  # fmt: skip
        texts = [f"{q.name} {q.text(v)}".strip() for q, v in pairs if v is not None]
        suspect += [f"{result}: {text}" for text in texts if "OUTSIDE" in text]
        met = _verdict(pairs, ended) if texts else ""
        lines.append((result, target, "; ".join(texts) or "not measured",
                      "dry run" if texts and dry else met))  # fmt: skip
    origins = dict.fromkeys(_origin(row) for rows in tables.values() for row in rows)
    parts = [
        "\n".join(f"- {origin}" for origin in origins or ["this run has no rows"]),
        "The expected values are those of one NVIDIA H200.",
        markdown_table(("section", "state", "seconds"), sections),
        markdown_table(("result", "target (stretch)", "measured", "met"), lines),
        "Outside the expected ranges:\n" + "\n".join(f"- {line}" for line in suspect or ["none"]),
    ]
    return "\n\n".join(["# GPU check", *parts]) + "\n"


def _verdict(pairs: list[tuple[Quantity, float | None]], ended: set[str]) -> str:
    """Whether the quantities of a line meet its target: a part of them cannot."""
    verdicts = [(None if v is None else q.met(v), q.section in ended)
                for q, v in pairs if q.at_most is not None or q.at_least is not None]  # fmt: skip
    if not verdicts:
        return "reported"
    if any(met is False for met, _ in verdicts):
        return "**no**"
    return "yes" if all(met and complete for met, complete in verdicts) else "incomplete"


def _origin(row: CSVRow) -> str:
    """Commit, hardware and versions of a row; kernels.csv has other columns for these."""
    texts = [row.get("commit"), row.get("hardware") or row.get("device"), row.get("versions")]
    texts += [f"{name} {row[name]}" for name in ("torch", "triton") if row.get(name)]
    return ", ".join(filter(None, texts)) or "unknown"
