"""OpenMP waits passively in every way that the suite starts, unless the user said otherwise."""

import importlib.util
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.config import TrainConfig
from vim_ssl.utils import openmp
from vim_ssl.utils.distributed import pick_device

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("recipes", "downstream", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8") and path.parent.name != "peers"  # of others
]
MODULES = ["vim_ssl.recipes.mim_pretrain", "vim_ssl.kernels.selective_scan.accuracy"]
COMMANDS = ["mim-pretrain", "linear-probe", "verify"]
# Starts every program up to the moment at which torch would be loaded; prints what it would read.
START = """
import json, os, runpy, sys
from pathlib import Path

class Reached(BaseException):
    pass

class Torch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise Reached

def call(command):
    from vim_ssl import cli
    cli.main([command, "--help"])

first, ways = set(sys.modules), {}
sys.meta_path.insert(0, Torch)
for kind, start in (("scripts", runpy.run_path), ("modules", runpy.run_module), ("commands", call)):
    for name in json.loads(sys.argv[1])[kind]:
        os.environ.pop("OMP_WAIT_POLICY", None)
        # What may be imported once only stays, such as numpy.
        for module in [m for m in sys.modules if m.startswith("vim_ssl")]:
            del sys.modules[module]
        if kind == "scripts":
            sys.path[0] = str(Path(name).parent)
        try:
            start(name)
            ways[name] = "torch was not loaded"
        except Reached:
            ways[name] = os.environ.get("OMP_WAIT_POLICY")
print(json.dumps(ways))
"""


def start_fresh(code: str, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process without any setting of OpenMP other than ``variables``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=True,
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ways() -> dict[str, str]:
    programs = {"scripts": SCRIPTS, "modules": MODULES, "commands": COMMANDS}
    return json.loads(start_fresh(START, json.dumps(programs)).stdout.splitlines()[-1])


@pytest.mark.parametrize("program", [*SCRIPTS, *MODULES, *COMMANDS])
def test_programs_that_load_torch_at_once_set_the_policy_before(ways, program):
    """`python` or a launcher with a script, `python -m`, and `vim-ssl`. Benchmarks may load torch
    in functions, which are not called here."""
    later = "torch was not loaded"
    assert ways[program] == "passive" or (ways[program] == later and "benchmarks" in program)


LIBRARY = """
import ctypes, sys
for step in sys.argv[2:]:
    __import__(step) if step == "vim_ssl" else ctypes.CDLL(sys.argv[1])
"""
DEFAULT, FOR_EVER = "300000", "30000000000"


@pytest.mark.parametrize(
    ("order", "variables", "spins"),
    [
        (["vim_ssl", "library"], {}, "0"),
        (["library", "vim_ssl"], {}, DEFAULT),
        (["vim_ssl", "library"], {"OMP_WAIT_POLICY": "active"}, FOR_EVER),
        (["vim_ssl", "library"], {"GOMP_SPINCOUNT": "77"}, "77"),
        (["vim_ssl", "library"], {"KMP_BLOCKTIME": "1"}, "0"),
        (["vim_ssl", "library"], {"OMP_WAIT_POLICY": ""}, "0"),
    ],
    ids=["first", "too-late", "the-users-policy", "the-users-count", "of-another-library", "empty"],
)
def test_the_library_of_torch_reads_it(order, variables, spins):
    """How often a waiting thread looks before it sleeps, as GNU's OpenMP prints it when loaded."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    folder = Path(spec.submodule_search_locations[0], "lib")
    library = next(iter(folder.glob("libgomp*.so*")), None)
    if library is None:
        pytest.skip("this torch does not come with GNU's OpenMP")
    done = start_fresh(LIBRARY, str(library), *order, OMP_DISPLAY_ENV="verbose", **variables)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


WORKER = """
import multiprocessing, os, sys
import vim_ssl
with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
    print(pool.apply(os.getenv, ("OMP_WAIT_POLICY",)))
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_wait_passively(method):
    assert start_fresh(WORKER, method).stdout.split() == ["passive"]


@pytest.mark.parametrize(
    ("allowed", "machine", "users", "expected"),
    [(2, 64, None, "2"), (2, 64, "", "2"), (2, 64, "8", "8"), (4, 4, None, None)],
)
def test_threads_are_those_that_a_container_allows(monkeypatch, allowed, machine, users, expected):
    monkeypatch.setattr(openmp, "cores", lambda: allowed)
    monkeypatch.setattr(openmp, "affinity", lambda: machine)
    monkeypatch.setenv("OMP_NUM_THREADS", users or "")
    if users is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    openmp.prepare_openmp()
    assert os.environ.get("OMP_NUM_THREADS") == expected


@pytest.fixture
def imported_after_torch(monkeypatch):
    for name in openmp.POLICIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(openmp, "_too_late", False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restored afterwards
    monkeypatch.setitem(sys.modules, "torch", sys.modules["torch"])
    openmp.prepare_openmp()
    yield
    os.environ.pop("OMP_WAIT_POLICY", None)


STARTS = {
    "training": lambda: make_accelerator(TrainConfig(threads=1)),
    "evaluation": lambda: pick_device("cpu"),
}


@pytest.mark.usefixtures("imported_after_torch")
@pytest.mark.parametrize("start", STARTS)
def test_a_late_import_is_a_remark_on_a_shared_machine(start, monkeypatch, caplog):
    load = [1.0]
    monkeypatch.setattr(os, "getloadavg", lambda: (load[0], 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with caplog.at_level(logging.WARNING, "vim_ssl"):
        STARTS[start]()
        assert not caplog.messages, "the machine is not shared"
        load[0] = 5.5
        STARTS[start]()
        STARTS[start]()
    (message,) = caplog.messages
    assert "load 5.5, 2 cores" in message
    assert "OMP_WAIT_POLICY=passive" in message


@pytest.mark.usefixtures("imported_after_torch")
@pytest.mark.parametrize(
    ("threads", "rank", "device"), [(1, "0", "cpu"), (2, "1", "cpu"), (2, "0", "cuda:0")]
)
def test_threads_that_do_not_spin_here_are_no_remark(monkeypatch, caplog, threads, rank, device):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_RANK", rank)
    pick_device(device)
    assert not caplog.messages


@pytest.mark.parametrize("name", openmp.POLICIES)
def test_the_users_choice_is_kept_without_a_remark(name, monkeypatch, caplog):
    for other in openmp.POLICIES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "5")
    monkeypatch.setattr(openmp, "_too_late", False)
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0), raising=False)
    openmp.prepare_openmp()
    pick_device("cpu")
    assert {k: os.environ[k] for k in openmp.POLICIES if k in os.environ} == {name: "5"}
    assert not caplog.messages
