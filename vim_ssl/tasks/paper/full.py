"""Measure a claim at its full size: the commands, what they need, and what their results say."""

import math
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vim_ssl.tasks.paper.findings import Finding
from vim_ssl.tasks.paper.measure import Settings
from vim_ssl.tasks.paper.rows import Key, Rows
from vim_ssl.utils.environment import CHECKOUT
from vim_ssl.utils.files import read_object

# Fields of commands, and how they are written while they have no value.
UNSET = {"imagenet": "IMAGENET", "coco": "COCO", "ade20k": "ADE20K", "output": "RUNS"}
MEASURE = "full size"


@dataclass(frozen=True)
class FullSize:
    """Commands that run one after another; step n writes to ``{output}/n``.

    Attributes:
        commands: arguments of ``vim-ssl``, or a command that starts with ``python``, with the
            fields ``{imagenet}``, ``{coco}``, ``{ade20k}`` and ``{output}``.
        metric: key of the last run's metrics.json; "" if the command writes rows itself.
        published: value that has to be reached.
        rival: value below which the claim fails, such as DeiT's; None: our value is only reported.
        needs: data and hardware.
    """

    commands: tuple[str, ...]
    metric: str
    published: float | None
    rival: float | None
    needs: str

    def lines(self, fields: Mapping[str, str], launch: str = "") -> list[str]:
        """The commands as one would type them.

        Args:
            fields: values of the fields; missing ones are upper-case words.
            launch: what starts several processes, such as ``accelerate launch``.
        """
        values = UNSET | {key: shlex.quote(value) for key, value in fields.items() if value}
        made = []
        for step, command in enumerate(self.commands, 1):
            words = command.format(**values)
            if not words.startswith("python "):
                name, _, rest = words.partition(" ")
                folder = "recipes" if name == "supervised-pretrain" else "downstream"
                module = f"{launch} -m vim_ssl.{folder}.{name.replace('-', '_')}"
                words = f"{module if launch else f'vim-ssl {name}'} {rest}"
                words += f" --output {values['output']}/{step} --resume auto"
            made.append(words)
        return made

    def run(
        self, key: str, rows: Rows, settings: Settings, fields: Mapping[str, str], launch: str = ""
    ) -> None:
        """Run the commands; append a row with the result.

        Raises: ValueError for data that are not given; RuntimeError for a command that fails.
        """
        for name, option in (("imagenet", "--imagenet"), ("coco", "--coco"),
                             ("ade20k", "--ade20k")):  # fmt: skip
            if any(f"{{{name}}}" in command for command in self.commands) and not fields[name]:
                raise ValueError(f"{key} at full size needs {self.needs}; give {option} FOLDER.")
        for line in self.lines(fields, launch):
            settings.report(line)
            words = shlex.split(line)
            if words[0] == "vim-ssl":
                code = settings.command(words[1:])
            else:
                words = [sys.executable, *words[1:]] if words[0] == "python" else words
                code = subprocess.run(words, cwd=CHECKOUT).returncode
            if code:
                raise RuntimeError(f"{line}\nended with code {code}.")
        if self.metric:
            run = Path(fields["output"]) / str(len(self.commands))
            metrics = read_object(run / "metrics.json", "the metrics of a run")
            rows.append(
                Key(MEASURE, key), metric=self.metric, value=metrics[self.metric],
                settings=" && ".join(self.lines(fields, launch)),
            )  # fmt: skip

    def findings(self, key: str, rows: Rows) -> list[Finding]:
        """Our value, which reproduces the claim if it rounds to the published one or is above."""
        chosen = rows.select(measure=MEASURE, arm=key)
        if not chosen or self.published is None:
            return []
        value = float(chosen[-1]["value"])
        text, rival = f"{value:.1f} at full size", self.rival
        neutral = math.nan if rival is None else rival
        return [Finding("", text, round(value, 1), self.published, neutral,
                        decides=rival is not None)]  # fmt: skip
