"""Registration and selection of backends, the same for every operation."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from scan_helpers import one_way_inputs, two_way_inputs

from vim_ssl.kernels import backends, plugins
from vim_ssl.kernels.backends import BACKENDS, available_backends, register, resolve
from vim_ssl.kernels.causal_conv1d import bi_causal_conv1d, causal_conv1d
from vim_ssl.kernels.rms_norm import add_rms_norm
from vim_ssl.kernels.selective_scan import bi_selective_scan, selective_scan

# Every output is full of sevens, which no real backend returns.
TOY = """
import torch

def selective_scan(u, *args, return_last_state=False, **options):
    return (torch.full_like(u, 7), None) if return_last_state else torch.full_like(u, 7)

def bi_selective_scan(u, *args, **options):
    return torch.full_like(u[0], 7)

def conv_silu(x, weight, bias, reverse=False):
    return x.new_full((len(weight), *x.shape), 7)

def add_rms_norm(hidden, residual, weight, eps):
    return torch.full_like(hidden, 7), hidden.float()
"""
PLUGIN = """
from vim_ssl.kernels.backends import register
register(op="selective_scan", name="from_plugin", module="toy_kernels")
"""


def call_each(**options) -> dict[str, torch.Tensor]:
    """The first output of every public function, by the name of its operation."""
    x, one = torch.randn(1, 4, 3), one_way_inputs(1, 4, 3, 2)
    weight, bias = torch.randn(2, 3, 2), torch.randn(2, 3)
    return {
        "selective_scan": selective_scan(**one, **options),
        "causal_conv1d": causal_conv1d(x, weight[0], bias[0], **options),
        "rms_norm": add_rms_norm(x, x, bias[0], **options)[0],
        "selective_scan, both": bi_selective_scan(**two_way_inputs(1, 4, 3, 2), **options),
        "causal_conv1d, both": bi_causal_conv1d(x, weight, bias, **options),
    }


@pytest.fixture(autouse=True)
def restored_registry(monkeypatch):
    """Undo every registration of a test."""
    monkeypatch.delenv("VIM_SSL_BACKEND", raising=False)
    before = {op: dict(names) for op, names in BACKENDS.items()}
    yield
    for op, names in before.items():
        BACKENDS[op].clear()
        BACKENDS[op].update(names)
    backends._auto.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A folder on the import path with a module `toy_kernels`."""
    (tmp_path / "toy_kernels.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("toy_kernels", None)


@pytest.fixture
def install(toy, monkeypatch):
    """Install a package whose entry point is a plugin of this code."""
    monkeypatch.setattr(plugins, "_loaded", set())

    def install(code: str) -> None:
        (toy / "toy_plugin.py").write_text(code)
        (toy / "toy-1.dist-info").mkdir()
        (toy / "toy-1.dist-info" / "METADATA").write_text("Name: toy\nVersion: 1\n")
        entry_points = f"[{plugins.GROUP}]\ntoy = toy_plugin\n"
        (toy / "toy-1.dist-info" / "entry_points.txt").write_text(entry_points)

    yield install
    sys.modules.pop("toy_plugin", None)


def register_toy(**options) -> None:
    for op in BACKENDS:
        register(op=op, name="toy", module="toy_kernels", **options)


@pytest.mark.usefixtures("toy")
def test_a_registered_backend_runs_by_name_and_is_imported_then():
    register_toy(priority=-5)
    assert available_backends("cpu")[-1] == "toy"
    assert not any(bool((y == 7).all()) for y in call_each().values())
    assert "toy_kernels" not in sys.modules
    for name, y in call_each(backend="toy").items():
        assert bool((y == 7).all()), name


@pytest.mark.usefixtures("toy")
def test_auto_selects_by_priority_and_device(monkeypatch):
    call_each()  # the choice of "auto" so far, which the registration must renew
    register_toy(device="cpu", priority=9)
    assert all(available_backends("cpu", op)[0] == "toy" for op in BACKENDS)
    assert "toy" not in available_backends("meta")
    for name, y in call_each().items():
        assert bool((y == 7).all()), name
    with pytest.raises(ValueError, match="'toy' runs on cpu tensors; these are on meta"):
        resolve("rms_norm", "toy", "meta")
    monkeypatch.setenv("VIM_SSL_BACKEND", "torch")
    assert not any(bool((y == 7).all()) for y in call_each().values())


@pytest.mark.usefixtures("toy")
def test_the_environment_selects_a_registered_backend(monkeypatch):
    register_toy()
    assert not any(bool((y == 7).all()) for y in call_each().values())
    monkeypatch.setenv("VIM_SSL_BACKEND", "toy")
    assert all(bool((y == 7).all()) for y in call_each().values())


@pytest.mark.usefixtures("toy")
def test_several_backends_compile_in_one_graph():
    register_toy()
    m = two_way_inputs(1, 4, 3, 2)

    def three(**m):
        return sum(bi_selective_scan(**m, backend=name) for name in ("toy", "torch", "auto"))

    compiled = torch.compile(three, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**m), three(**m))


@pytest.mark.parametrize("op", BACKENDS)
def test_an_unknown_name_lists_the_known_ones_with_a_suggestion(op):
    known = ", ".join(["auto", *BACKENDS[op]])
    message = f"Unknown backend 'trition'; choose one of {known}. Did you mean 'triton'?"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve(op, "trition", "cpu")


def test_duplicates_and_impossible_registrations_are_refused():
    with pytest.raises(ValueError, match=r"rms_norm already has a backend 'torch' \(vim_ssl\."):
        register(op="rms_norm", name="torch", module="toy_kernels")
    with pytest.raises(ValueError, match="cannot be named 'auto'"):
        register(op="rms_norm", name="auto", module="toy_kernels")
    with pytest.raises(ValueError, match=r"Unknown operation 'rmsnorm'.*'rms_norm'"):
        register(op="rmsnorm", name="toy", module="toy_kernels")


def test_a_missing_package_is_named():
    register(op="rms_norm", name="toy", module="toy_kernels", priority=9, requires="no_such_kit")
    assert "toy" not in available_backends("cpu", "rms_norm")
    with pytest.raises(ValueError, match="'toy' needs the package no_such_kit: pip install"):
        add_rms_norm(torch.randn(1, 2, 3), None, torch.ones(3), backend="toy")


def test_an_operation_without_the_backend_of_the_environment_runs_in_torch(monkeypatch):
    for name, norm in (("reference", "torch"), ("numba", "numba")):
        monkeypatch.setenv("VIM_SSL_BACKEND", name)
        assert resolve("rms_norm", "auto", "cpu") == norm
        assert resolve("selective_scan", "auto", "cpu") == name
    with pytest.raises(ValueError, match="'numba' runs on cpu tensors"):
        resolve("rms_norm", "auto", "cuda")
    with pytest.raises(ValueError, match="Unknown backend 'reference'"):
        resolve("rms_norm", "reference", "cpu")


@pytest.mark.usefixtures("toy")
def test_float64_and_forward_mode_follow_the_registration():
    register(op="rms_norm", name="toy", module="toy_kernels", float64=False)
    hidden, weight = torch.randn(1, 2, 3), torch.ones(3)
    double = add_rms_norm(hidden.double(), None, weight, backend="toy")[0]
    assert torch.equal(double, add_rms_norm(hidden.double(), None, weight, backend="torch")[0])
    with fwAD.dual_level():
        dual = fwAD.make_dual(hidden, torch.ones_like(hidden))
        with pytest.raises(RuntimeError, match="forward-mode"):
            add_rms_norm(dual, None, weight, backend="toy")
        register(op="rms_norm", name="toy2", module="toy_kernels", forward_mode=True)
        add_rms_norm(dual, None, weight, backend="toy2")


def test_an_installed_plugin_is_loaded_when_a_name_is_unknown(install):
    install(PLUGIN)
    call_each()
    assert "toy_plugin" not in sys.modules
    y = bi_selective_scan(**two_way_inputs(1, 4, 3, 2), backend="from_plugin")
    assert bool((y == 7).all())
    for _ in range(2):  # and only once: a second registration would be refused
        with pytest.raises(ValueError, match=r"choose one of auto, reference, .*, from_plugin"):
            resolve("selective_scan", "nonsense", "cpu")


def test_a_plugin_that_fails_is_named(install):
    install("raise OSError('no such driver')")
    for _ in range(2):
        with pytest.raises(ImportError, match=r"'toy' \(toy_plugin\).*OSError: no such driver"):
            resolve("selective_scan", "from_plugin", "cpu")


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_call_without_gradients_skips_the_operator_and_nothing_else_does():
    """What torch must see, it sees: gradients, modes, traced programs."""
    from vim_ssl.kernels.autograd import operator

    calls = []

    @operator("test_doubled", fake=lambda x: x.new_empty(x.shape))
    def doubled(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch._C._len_torch_dispatch_stack())
        return 2 * x

    registered, seen = doubled.registered, []
    doubled.registered = lambda *args: seen.append(len(args)) or registered(*args)
    x, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert torch.equal(doubled(x), 2 * x)
    with torch.no_grad():
        assert torch.equal(doubled(leaf), 2 * x)
    assert (len(calls), seen) == (2, [])
    doubled(leaf)
    doubled(x.to("meta"))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        doubled(x)
    torch.jit.trace(lambda m: doubled(m), (x,), check_trace=False)
    assert len(seen) == 4
