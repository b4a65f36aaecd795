"""Claims that are counted, not timed: parameters, and operations by image size."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vim_ssl.models.encoder import VimEncoder
from vim_ssl.models.presets import PRESETS
from vim_ssl.tasks.paper.findings import Finding
from vim_ssl.tasks.paper.measure import Job, Settings
from vim_ssl.tasks.paper.rows import Key, Row, Rows

PIXELS = (224, 384, 512, 768, 1024, 1248, 1600, 2048)
VIM, DEIT = "vim_tiny_patch16_224", "deit_tiny_patch16_224"
LINEAR = 1.05  # largest exponent of tokens that counts as linear


@dataclass(frozen=True)
class Count:
    """A job that counts something in a second or two."""

    key: Key
    count: Callable[[], float] = field(compare=False)
    metric: str = field(compare=False)

    @property
    def order(self) -> tuple:
        return (0, self.key.measure, self.key.arm, self.key.data)

    def estimate(self, rows: Rows, settings: Settings) -> float:
        return 2.0

    def run(self, rows: Rows, settings: Settings) -> None:
        rows.append(self.key, metric=self.metric, value=self.count())


@dataclass(frozen=True)
class Parameters:
    """The number of parameters with a head of 1,000 classes.

    Attributes:
        published: preset -> millions, as rounded in the paper.
    """

    published: dict[str, int]
    command: str = ""

    def jobs(self, settings: Settings) -> list[Job]:
        return [Count(Key("parameters", name), partial(parameters, name), "parameters")
                for name in self.published]  # fmt: skip

    def sources(self, rows: Rows, settings: Settings) -> list[Row]:
        return [row for row in rows.select(measure="parameters") if row["arm"] in self.published]

    def findings(self, rows: Rows, settings: Settings) -> list[Finding]:
        counts = {row["arm"]: int(row["value"]) for row in self.sources(rows, settings)}
        return [
            Finding(short(name), f"{counts[name]:,}",
                  -abs(round(counts[name] / 1e6) - millions), bar=0, neutral=-1)
            for name, millions in self.published.items() if name in counts
        ]  # fmt: skip


@dataclass(frozen=True)
class LinearCost:
    """The exponents with which operations grow with tokens: Vim's, beside DeiT's."""

    command: str = ""

    def jobs(self, settings: Settings) -> list[Job]:
        return [
            Count(Key("operations", name, f"{px} px"), partial(gflops, name, px), "GFLOP")
            for px in PIXELS for name in (VIM, DEIT)
        ]  # fmt: skip

    def sources(self, rows: Rows, settings: Settings) -> list[Row]:
        return rows.select(measure="operations")

    def findings(self, rows: Rows, settings: Settings) -> list[Finding]:
        slopes = {name: exponent(self._points(rows, name)) for name in (VIM, DEIT)}
        if not all(map(math.isfinite, slopes.values())):
            return []
        text = (
            f"operations grow as tokens^{slopes[VIM]:.2f}, those of DeiT-Ti as "
            f"tokens^{slopes[DEIT]:.2f} ({PIXELS[0]} to {PIXELS[-1]} px)"
        )
        return [Finding("", text, -slopes[VIM], bar=-LINEAR, neutral=-slopes[DEIT])]

    @staticmethod
    def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
        """(tokens, GFLOP) by size."""
        chosen = rows.select(measure="operations", arm=name)
        return [((int(row["data"].split()[0]) // 16) ** 2 + 1, float(row["value"]))
                for row in chosen]  # fmt: skip


def parameters(preset: str) -> int:
    """The number of parameters of a preset with a head of 1,000 classes; no memory is used."""
    import torch

    with torch.device("meta"):
        encoder = VimEncoder(**PRESETS[preset] | {"num_classes": 1000})
    return sum(p.numel() for p in encoder.parameters())


def gflops(name: str, pixels: int) -> float:
    """Return the GFLOP for one image's features, counted on meta tensors with plain attention.

    Fused attention computes the same products, but torch does not count them all.

    Args:
        name: model of timm or this package.
    """
    import timm
    import torch
    from timm.layers import set_fused_attn, use_fused_attn

    from vim_ssl.kernels.selective_scan.flops import flop_counter

    before: Any = use_fused_attn()
    set_fused_attn(False)
    try:
        with torch.device("meta"), torch.no_grad():
            model = timm.create_model(name, num_classes=0, img_size=pixels)
            with flop_counter("meta", display=False) as counter:
                model(torch.empty(1, 3, pixels, pixels))
    finally:
        set_fused_attn(bool(before))
    return round(counter.get_total_flops() / 1e9, 2)


def exponent(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of log(y) over log(x); NaN with fewer than three points."""
    if len(points) < 3:
        return math.nan
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def short(preset: str) -> str:
    """``tiny``, ``tiny, stride 8``."""
    _, size, *rest = preset.split("_")
    return f"{size}, stride 8" if "stride8" in rest else size
