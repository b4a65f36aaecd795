"""What holds for every test: few threads, fixed seeds, no network, GPU tests skipped by name."""

import atexit
import ipaddress
import os
import random
import shutil
import socket
import sys
import tempfile
from collections import Counter

import pytest

# Before torch is imported: workers that each use every core are slower than one of them alone.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# The user's caches neither help nor suffer, and a proxy would make the loopback look remote.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="vim-ssl-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
for _name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[_name]

import vim_ssl.utils.openmp  # noqa: E402, F401 (before torch)

import torch  # noqa: E402

# Triton reads this when it is imported, which timm does: its kernels are interpreted without a GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from vim_ssl.utils.files import cache_dir  # noqa: E402

# Our own cache too; sample sets that are on this machine are used.
os.environ.setdefault("VIM_SSL_SAMPLES", str(cache_dir()))
os.environ["VIM_SSL_CACHE"] = os.path.join(os.environ["HF_HOME"], "vim_ssl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, so that no worker begins one when the others end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate() -> None:
    """No module starts with the precision of the one before: accelerate keeps it by process."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()


class NetworkBlockedError(OSError):
    """A test reached for the network; to our code it looks like a machine that is offline."""


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Python's sockets reach this machine only."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def local_connect(self, address):
        if self.family != getattr(socket, "AF_UNIX", None):
            _refuse_remote(address[0])
        return connect(self, address)

    def local_lookup(host, *args, **kwargs):
        _refuse_remote(host)
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_connect)
        patch.setattr(socket, "getaddrinfo", local_lookup)
        yield


def _refuse_remote(host: str | bytes | None) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return
    try:
        local = ipaddress.ip_address(name).is_loopback
    except ValueError:
        local = False
    if not local:
        raise NetworkBlockedError(f"tests have no network; {name!r} was asked for.")
