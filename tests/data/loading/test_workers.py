"""Worker processes that cannot go on say so."""

import importlib
import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch

from vim_ssl.data.loading import workers
from vim_ssl.data.loading.workers import Loader

MiB = 2**20
Usage = namedtuple("Usage", "total used free")


class Squares(torch.utils.data.Dataset):
    def __init__(self, killed: bool = False):
        self.killed = killed

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.killed and index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": torch.full((256, 1024), float(index))}  # 1 MiB


@pytest.mark.parametrize("count", [0, 2])
def test_a_shared_memory_with_space_changes_nothing(count):
    values = [batch["x"][:, 0, 0].tolist() for batch in Loader(Squares(), 2, num_workers=count)]
    assert values == [[0, 1], [2, 3]]


def test_a_full_shared_memory_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE_S", 0.2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * MiB, 61 * MiB, 3 * MiB))
    assert len(list(Loader(Squares(), 2, num_workers=1))) == 2  # 2 MiB fit
    says = r"^/dev/shm has 3 MiB.*2 workers need 4 MiB.*--shm-size=8g.*--workers 0"
    with pytest.raises(OSError, match=says):
        list(Loader(Squares(), 2, num_workers=2))
    assert len(list(Loader(Squares(), 4))) == 1


def test_a_killed_worker_is_told():
    with pytest.raises(OSError, match=r"was killed \(DataLoader worker .*fewer --workers than 1"):
        list(Loader(Squares(killed=True), 2, num_workers=1))


@pytest.mark.parametrize("listed", [["__main__"], ["numpy"]], ids=["default", "the user's"])
def test_a_fork_server_imports_once_what_workers_need(monkeypatch, listed):
    """A list that the user set is kept."""
    forkserver = pytest.importorskip("multiprocessing.forkserver", exc_type=ImportError)
    server = forkserver.ForkServer()
    server.set_forkserver_preload(listed)
    monkeypatch.setattr(forkserver, "_forkserver", server)
    Loader(Squares(), 2)
    assert server._preload_modules == listed  # no workers
    Loader(Squares(), 2, num_workers=1)
    added = server._preload_modules[len(listed) :]
    assert server._preload_modules[: len(listed)] == listed
    assert bool(added) == (listed == ["__main__"])
    for name in added:
        importlib.import_module(name)
