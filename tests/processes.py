"""Scripts in several processes, started as a launcher starts them but without the launcher, which
would import torch once more."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def start(processes: int, script: Path | str, *argv: str) -> list[subprocess.Popen]:
    """The ranks of one run; each has its output and errors in one pipe."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks: list[dict] = [{}]
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [
        subprocess.Popen(
            [sys.executable, str(script), *argv], env=environment | rank,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ranks
    ]  # fmt: skip


def finish(ranks: list[subprocess.Popen], timeout: float = 400) -> str:
    """Wait until all have ended, without an error, and return what they printed."""
    try:
        output = "".join(rank.communicate(timeout=timeout)[0] for rank in ranks)
    finally:
        for rank in ranks:  # one that failed leaves the others waiting for it
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), output
    return output
