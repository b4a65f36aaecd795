"""Run a measurement in a fresh process, launch a recipe, and count what autograd saves."""

import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

from vim_ssl.utils.memory import peak_mib as peak_mib  # for the scripts
from vim_ssl.utils.memory import proc_mib as proc_mib
from vim_ssl.utils.memory import reset_peak as reset_peak
from vim_ssl.utils.memory import rusage_peak_mib as rusage_peak_mib

Result = TypeVar("Result")
RECIPE = Path(__file__).parents[1] / "recipes" / "mim_pretrain.py"


def run_apart(function: Callable[..., Result], *args) -> Result:
    """Call a module-level function in a fresh process, hide its output, return its result.

    Raises: RuntimeError with the end of its output if it raises or is killed.
    """
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile("r", errors="replace") as log,
        ProcessPoolExecutor(1, spawn, _print_to, (log.name,)) as pool,
    ):
        try:
            return pool.submit(function, *args).result()
        except Exception as error:
            output = log.read()[-5000:]
            raise RuntimeError(f"{function.__name__} failed: {error}\n{output}") from error


def _print_to(path: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)  # stdout
    os.dup2(log, 2)  # stderr


def _end_with_parent() -> None:
    """A pool's process would wait for work for ever if its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def launcher(processes: int) -> list[str]:
    """Return the command that runs mim_pretrain.py with accelerate on CPU processes."""
    return [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
        "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0",
        *(["--multi_gpu"] if processes > 1 else []), str(RECIPE),
    ]  # fmt: skip


def saved_bytes(forward: Callable[[], object], parameters: Iterable) -> int:
    """Return the bytes of all storages that autograd saves for the backward pass, except those of
    the parameters. A storage that several operators save counts once."""
    import torch

    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: list[torch.Tensor] = []  # holds them, so that no address is used twice
    sizes: list[int] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            kept.append(saved)
            sizes.append(storage.nbytes())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = forward()
    del output
    return sum(sizes)
