"""Intensity windows: the values that map to black and white in an 8-bit image."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """The values from ``low`` (black) to ``high`` (white), or percentiles of an image or volume."""

    low: float
    high: float
    percent: bool = False

    @classmethod
    def parse(cls, text: str) -> "Window":
        """Parse ``-160,240``, in the source's unit, or percentiles, ``0.5%,99.5%``.

        Raises: ValueError for anything else, and for an empty window.
        """
        parts = text.split(",")
        percent = all(part.endswith("%") for part in parts)
        try:
            low, high = (float(part.removesuffix("%" if percent else "")) for part in parts)
        except ValueError:
            low = high = 0.0
        if not low < high or (percent and not 0 <= low < high <= 100):
            raise ValueError(
                f"window={text} is not valid; write LOW,HIGH in the source's unit, such as "
                "-160,240, or percentiles, such as 0.5%,99.5%."
            )
        return cls(low, high, percent)

    def limits(self, values: np.ndarray) -> tuple[float, float]:
        """Low and high as intensities; percentiles are taken over the finite ``values``."""
        if not self.percent:
            return self.low, self.high
        finite = values[np.isfinite(values)]
        if not finite.size:
            return 0.0, 1.0
        low, high = np.percentile(finite, (self.low, self.high))
        return float(low), float(high)
