"""What every script that appends rows to a tracked CSV file tells in its help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = (
    "cpu",
    "dense",
    "digits",
    "efficiency",
    "emoji_clip",
    "exits",
    "gpu_check",
    "learning/study",
    "objectives",
    "presets",
    "resume",
    "transfer",
    "slides",
)
HELP = """
import contextlib, io, json, runpy, sys
texts = []
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    run = runpy.run_path if name.endswith(".py") else runpy.run_module
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run(name, run_name="__main__")
    texts.append(out.getvalue())
print(json.dumps(texts))
"""


@pytest.mark.slow
def test_every_option_has_help_with_its_default_and_rows_can_go_elsewhere():
    folder = ROOT / "benchmarks"
    names = [str(folder / f"{name}.py") for name in SCRIPTS]
    names.append("vim_ssl.kernels.selective_scan.benchmark")
    paths = os.pathsep.join(map(str, (ROOT, folder, folder / "learning")))
    done = subprocess.run(
        [sys.executable, "-c", HELP, *names], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    for name, text in zip(names, json.loads(done.stdout), strict=True):
        options = text.split("\n  --")[1:]
        assert any(option.startswith("out FOLDER") for option in options), name
        for option in options:
            assert "(default:" in option, f"{name}: {option}"
