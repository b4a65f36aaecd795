"""Processes for tests, forked from one that has imported torch, timm and the recipes already.

A fresh interpreter needs nine seconds of a core for these imports. What a test must import anew
(the import itself, or variables that are read by it) still takes `subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    _CONTEXT.set_forkserver_preload(
        ["torch", "accelerate", "timm", "vim_ssl.recipes.mim_pretrain",
         "vim_ssl.recipes.clip_pretrain", "vim_ssl.tasks.segmentation"]
    )  # fmt: skip


class Process:
    """A script, or code, in a process of its own, with the methods of `subprocess.Popen`.

    Args:
        program: path of a script, or code.
        argv: its arguments.
        environment: all variables.
        merge: errors go to the output.
    """

    def __init__(
        self, program: str, argv: tuple[str, ...], environment: dict[str, str], merge: bool = True
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="process-")
        self._files = [Path(self._folder.name, name) for name in ("out", "out" if merge else "err")]
        for path in self._files:
            path.touch()
        files = [str(path) for path in self._files]
        arguments = (program, argv, environment, os.getcwd(), files)
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid
        atexit.register(self.kill)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it has ended; return its output, and its errors unless they are in it."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("the process", timeout or 0)
        output, errors = (path.read_text(errors="replace") for path in self._files)
        return output, "" if self._files[0] == self._files[1] else errors


def _run(
    program: str, argv: tuple[str, ...], environment: dict[str, str], cwd: str, files: list[str]
) -> None:
    """Run as ``python PROGRAM ARGV`` or ``python -c PROGRAM ARGV`` would."""
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # the default, for workers of its own
    is_script = program.endswith(".py")
    sys.argv = [program if is_script else "-c", *argv]
    sys.path.insert(0, str(Path(program).parent) if is_script else "")
    if is_script:
        runpy.run_path(program, run_name="__main__")
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


def start(processes: int, script: Path | str, *argv: str) -> list[Process]:
    """The ranks of one run, as a launcher starts them; each has its output and errors in one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks: list[dict] = [{}]
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [Process(str(script), argv, environment | rank) for rank in ranks]


def finish(ranks: list[Process], timeout: float = 400) -> str:
    """Wait until all have ended, without an error, and return what they printed."""
    try:
        output = "".join(rank.communicate(timeout=timeout)[0] for rank in ranks)
    finally:
        for rank in ranks:  # one that failed leaves the others waiting for it
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), output
    return output


def run(program: Path | str, *argv: str, timeout: float = 200, **variables: str):
    """Run a script, or code, to its end: a `subprocess.CompletedProcess` with text."""
    process = Process(str(program), argv, {**os.environ, **variables}, merge=False)
    try:
        output, errors = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(argv, process.returncode or 0, output, errors)
