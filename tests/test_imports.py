"""Importing stays light, and each layer knows only the layers below it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("vim_ssl", "kernels", "recipes", "downstream")
USED_LATE = {"accelerate", "datasets", "sklearn", "numba", "tokenizers", "transformers"}
# Kernels stand on torch; the compilers of two backends are known to the files named after them.
COMPILERS = {"numba": {"numba", "numpy", "llvmlite"}, "triton": {"triton"}}


def fresh_import(name: str) -> tuple[float, set[str]]:
    """Import a module in a process of its own: (processor seconds, top-level modules loaded)."""
    code = (
        f"import time, sys, {name}\n"
        "print(time.process_time(), *{name.partition('.')[0] for name in sys.modules})"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    seconds, *modules = done.stdout.split()
    return float(seconds), set(modules)


@pytest.mark.slow
def test_import_is_light():
    """No heavier modules than timm's own, and under 1.5 times its time.

    Processor time, best of interleaved runs (three at most, since another process's work can
    only lengthen one of them).
    """
    best = {"timm": float("inf"), "vim_ssl": float("inf")}
    loaded = {}
    for _ in range(3):
        for name in best:
            seconds, loaded[name] = fresh_import(name)
            best[name] = min(best[name], seconds)
        if best["vim_ssl"] < 1.5 * best["timm"]:
            break
    assert best["vim_ssl"] < 1.5 * best["timm"]

    ours = loaded["vim_ssl"] - loaded["timm"]  # timm brings torch and torchvision
    assert not ours & USED_LATE
    third_party = {name for name in ours - set(sys.stdlib_module_names) if name[0] != "_"}
    small = {"vim_ssl", "PIL", "yaml", "safetensors", "torch", "torchvision"}
    assert third_party <= small, "each slows every import down; import it where it is used"


# ------------------------------------------------------------------------- layers


def sources() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every absolute name that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(name: str) -> str | None:
    """vim_ssl.kernels.rms_norm -> kernels; vim_ssl.models.encoder -> vim_ssl; torch -> None."""
    parts = name.split(".")
    if parts[0] != "vim_ssl":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "vim_ssl"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_looks_only_downwards(path):
    layer = path.relative_to(ROOT).parts[0]
    names = imported(path)
    may = {
        "kernels": {"kernels"},
        "vim_ssl": {"vim_ssl", "kernels"},
        "recipes": {"recipes", "vim_ssl", "kernels"},
        "downstream": {"downstream", "vim_ssl", "kernels"},
    }[layer]
    assert {layer_of(name) for name in names} - {None} <= may
    top = {name.partition(".")[0] for name in names}
    assert not top & {"kernels", "recipes", "downstream", "tests"}, "use the vim_ssl.… name"
    if layer == "kernels":
        known = {"torch", "vim_ssl"}.union(
            *(COMPILERS[word] for word in COMPILERS if word in path.stem)
        )
        known |= top if path.stem == "benchmark" else set()  # it may compare with other packages
        assert top - set(sys.stdlib_module_names) <= known


@pytest.mark.parametrize("folder", ["kernels", "recipes", "downstream"])
def test_the_three_folders_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["recipes", "downstream"])
def test_no_script_hides_a_library(folder):
    """A script's own folder is first on sys.path, before every installed package."""
    taken = {path.stem for path in (ROOT / folder).glob("*.py")} & (
        {"torch", "timm", "vim_ssl", "torchvision"} | USED_LATE | set(sys.stdlib_module_names)
    )
    assert not taken
