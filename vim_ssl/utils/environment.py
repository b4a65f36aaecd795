"""Describe the environment of a measurement: versions, commit, hardware."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

__version__ = "0.1.0"


def environment() -> dict[str, str]:
    """Return hardware and versions, to record with measurements."""
    import platform

    import timm
    import torch

    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        processor = names[0].partition(":")[2].strip() if names else processor
    hardware = f"{processor}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        hardware += f"; {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    versions = f"vim_ssl {__version__}, torch {torch.__version__}, timm {timm.__version__}"
    return {"hardware": hardware, "versions": f"{versions}, Python {platform.python_version()}"}


def print_any_character() -> None:
    """Let print replace characters that the terminal's encoding lacks (Windows code pages, ASCII,
    file names that are not UTF-8); by default they end the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_main_rank() -> bool:
    """True unless a launcher gave this process a rank other than 0."""
    return os.environ.get("RANK", "0") == "0"


CHECKOUT = Path(__file__).parents[2]


def commit() -> str:
    """Return the current commit, marked "dirty" if files differ; COMMIT overrides git."""
    if name := os.environ.get("COMMIT"):
        return name
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


ORIGIN = ("date", "commit", "hardware", "versions")  # the columns that `origin` fills


def origin() -> dict[str, str]:
    """Return date, commit, hardware and versions, for the rows of a measurement."""
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit(), **environment()}
