"""What a measurement says about a claim, and the rule that turns it into a state.

A finding is one comparison: the lower bound of the 95 % interval of a value (the value, if it is
counted or timed), the bar that the paper sets, and the neutral value, at which there is no effect.

    reproduced          the bound is above the neutral value and reaches the bar
    in part             the bound is above the neutral value, but below the bar
    not reproduced      the bound is not above the neutral value: no effect, or none that shows
    not yet measured    there is no value, or no interval (a single seed)

Scaled-down trainings have the neutral value as their bar: the paper's points do not carry over to
small images, only their direction does. A claim is reproduced if every finding is, not reproduced
if no finding is reproduced, even in part, and otherwise reproduced in part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

REPRODUCED, IN_PART, NOT_REPRODUCED, NOT_MEASURED = (
    "reproduced", "in part", "not reproduced", "not yet measured",
)  # fmt: skip
NOISE = 0.05  # share of a value that is timed once, or of a peak of memory, that is no effect
STATES = (REPRODUCED, IN_PART, NOT_REPRODUCED, NOT_MEASURED)


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        name: on what, such as a data set; "" if there is only one.
        text: the value with its unit and interval, for the reader.
        bound, bar, neutral: see this module; more is better. NaN: unknown.
        decides: False for a value that is only reported, such as one at another image size.
    """

    name: str
    text: str
    bound: float
    bar: float = 0.0
    neutral: float = 0.0
    decides: bool = True

    @property
    def state(self) -> str:
        if not (self.decides and math.isfinite(self.bound)):
            return NOT_MEASURED
        if self.bound <= self.neutral:
            return NOT_REPRODUCED
        return REPRODUCED if self.bound >= self.bar else IN_PART

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" if self.name else self.text


def combined_state(findings: Sequence[Finding]) -> str:
    """Return the state of a claim: the rule of this module, over the findings that decide.

    A finding without an interval makes the claim "not yet measured".
    """
    states = [finding.state for finding in findings if finding.decides]
    if not states or NOT_MEASURED in states:
        return NOT_MEASURED
    if set(states) == {REPRODUCED}:
        return REPRODUCED
    return NOT_REPRODUCED if set(states) == {NOT_REPRODUCED} else IN_PART
