"""What make's demonstrations would run is what the scripts take; nothing of it is run here."""

import importlib
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from vim_ssl.data.samples.fetch import SAMPLES
from vim_ssl.utils.config import parse

ROOT = Path(__file__).parents[1]
PRESETS = {"demo": "demo", "clip-demo": "emoji_clip"}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def commands(target: str) -> list[list[str]]:
    """The words of each command that ``make target`` runs once all is installed."""
    done = subprocess.run(
        ["make", "--dry-run", "VENV=venv", "--old-file=venv/.installed-demo", target],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("venv/bin/")]


def scripts(target: str) -> list[tuple[str, list[str]]]:
    """(recipes/name.py, its arguments) of each command that runs one."""
    found = []
    for command in commands(target):
        places = [i for i, word in enumerate(command) if word.endswith(".py")]
        found += [(command[i], command[i + 1 :]) for i in places]
    return found


@pytest.mark.parametrize("target", PRESETS)
def test_scripts_take_the_arguments(target):
    found = scripts(target)
    assert [Path(path).parent.name for path, _ in found][:2] == ["recipes", "downstream"]
    for path, argv in found:
        module = importlib.import_module("vim_ssl." + path.removesuffix(".py").replace("/", "."))
        presets = getattr(module, "PRESETS", {})
        default = module.default_preset if presets else None
        config = parse(module.Config, presets, argv, default_preset=default)
        if presets:
            assert config == presets[PRESETS[target]]()


def test_the_third_vendor_is_searched_for_emoji_of_both_kinds():
    """The two vendors that train are other ones, and every set is fetched."""
    from vim_ssl.recipes.clip_pretrain import emoji_clip

    fetched = next(words[3:] for words in commands("clip-demo") if words[1:3] == ["samples", "get"])
    assert set(fetched) <= set(SAMPLES)
    searched = [argv[argv.index("--data") + 1] for _, argv in scripts("clip-demo")[1:]]
    assert searched == [
        f"sample:fluent-emoji?split={split}&tones=none" for split in ("train", "test")
    ]
    config = emoji_clip()
    read = {
        name for name in SAMPLES if f"sample:{name}" in f"{config.data} {config.val} {searched}"
    }
    assert read == set(fetched)
    assert "fluent" not in config.data + config.val
