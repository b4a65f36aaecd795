"""Results of the functions of `vim_ssl.api`, with a display for notebooks."""

import base64
import dataclasses
import html
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vim_ssl.utils.files import read_object
from vim_ssl.utils.names import number

if TYPE_CHECKING:
    from vim_ssl.models.encoder import VimEncoder

LISTED = 8  # metrics in the summary of a run


class Run(os.PathLike[str]):
    """A run directory, of this or an earlier process. It can be used wherever a path can.

    Args:
        folder: the run directory.
    Raises: FileNotFoundError for a folder that is no run directory.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"{self.folder} is not a run directory: no config.json.")

    def __fspath__(self) -> str:
        return str(self.folder)

    __str__ = __fspath__

    @property
    def config(self) -> dict[str, Any]:
        """The settings, with the name of the ``recipe``."""
        return read_object(self.folder / "config.json", "the settings of a run")

    @property
    def plan(self) -> dict[str, Any]:
        """The numbers of the training: ``effective_batch``, ``peak_lr``, ``epoch_steps`` …; empty
        for a run of an earlier version."""
        from vim_ssl.training.state import recorded

        return recorded(self.folder, "plan")

    @property
    def state(self) -> str:
        """How the run ended, such as "finished" or "interrupted at step 40 of 400: SIGTERM", or
        "running"; "" for a run of an earlier version."""
        from vim_ssl.training.state import state_of

        return str(state_of(self.folder) or "")

    @property
    def curves(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, for example for ``pandas.DataFrame(run.curves)``."""
        from vim_ssl.training.run import read_metrics

        return read_metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []

    @property
    def metrics(self) -> dict[str, Any]:
        """The results: metrics.json of a task, else the last row of the curves.

        ``stale`` is added, as True, to results of weights that the run no longer has.
        """
        file = self.folder / "metrics.json"
        if not file.exists():
            return self.curves[-1] if self.curves else {}
        from vim_ssl.report.record import Record

        metrics = read_object(file, "the results of a run")
        return metrics | ({"stale": True} if Record(self.folder).result.stale else {})

    @property
    def images(self) -> list[Path]:
        """The images that were drawn in training, oldest first, and those of the test."""
        drawn = sorted((self.folder / "images").glob("[!.]*.png"), key=lambda path: path.name)
        return drawn + sorted(self.folder.glob("predictions.png"))

    @property
    def report(self) -> Path:
        """Path of the report, report.html, written from what the run has written so far."""
        from vim_ssl.report import write_report

        return write_report(self.folder)

    def encoder(self, **args: Any) -> "VimEncoder":
        """Load the encoder; see `vim_ssl.load_encoder` for the arguments."""
        from vim_ssl.checkpoints.loading import load_encoder

        return load_encoder(self.folder, **args)

    def model(self) -> Any:
        """Load the fitted task model, which has ``predict``; see `vim_ssl.load_model`."""
        from vim_ssl.tasks.models import load_model

        return load_model(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}: {', '.join(f'{k} {v}' for k, v in self._summary())})"

    def _summary(self) -> list[tuple[str, str]]:
        """Return the recipe, the step, and the first metrics."""
        rows, last = self.curves, self.metrics
        values = [(k, number(v)) for k, v in last.items()
                  if isinstance(v, int | float) and not isinstance(v, bool)]  # fmt: skip
        values = [pair for pair in values if pair[0] not in ("step", "lr", "seconds")][:LISTED]
        at = rows[-1].get("step") if rows else None
        step = [("step", f"{at:,}")] if isinstance(at, int) else []
        return [("recipe", str(self.config.get("recipe") or "")), *step, *values]

    def _repr_html_(self) -> str:
        """The summary, the loss and the newest images, for notebooks."""
        from vim_ssl.report.record import is_number

        parts = [f"<p><b>{html.escape(str(self.folder))}</b></p>", _html_table(self._summary())]
        losses = [
            (row["step"], row["loss"]) for row in self.curves
            if is_number(row.get("step")) and is_number(row.get("loss"))
        ]  # fmt: skip
        if len(losses) > 1:
            parts.append(_html_curve("loss", losses))
        for path in self.images[-1:]:
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(path.name)}" src="data:image/png;base64,{data}">')
        return "\n".join(parts)


@dataclasses.dataclass(repr=False)
class Evaluation:
    """The result of a command that trains no encoder.

    Attributes:
        metrics: the content of metrics.json.
        text: the command's table.
    """

    metrics: dict[str, Any]
    text: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the table, for example for ``pandas.DataFrame(result.rows)``."""
        return self.metrics.get("rows", [])

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"


def _html_table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"


def _html_curve(title: str, points: list[tuple[float, float]]) -> str:
    """Draw (x, y) as SVG, with the axes of the report."""
    import numpy as np

    from vim_ssl.report.curve import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Series, draw_curves

    x, y = np.array(points, float).T
    curve = draw_curves(title, [Series(x, np.full(len(x), np.nan), y)], allow_log=True)
    style = 'font-size="11" fill="currentColor"'
    lines = [f'<polyline points="{line}" fill="none" stroke="#2a78d6" stroke-width="1.5"/>'
             for drawn in curve.lines for line in drawn.lines]  # fmt: skip
    lines += [f'<text x="{at:.0f}" y="{BOTTOM + 18}" text-anchor="middle" {style}>{text}</text>'
              for at, text in curve.x_ticks]  # fmt: skip
    lines += [f'<text x="{LEFT - 6}" y="{at + 4:.0f}" text-anchor="end" {style}>{text}</text>'
              for at, text in curve.y_ticks]  # fmt: skip
    lines.append(f'<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="currentColor" opacity="0.4"/>')
    caption = html.escape(f"{title}: {curve.note}")
    return (f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">{"".join(lines)}</svg>'
            f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip
