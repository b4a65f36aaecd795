"""Guarantees of the compiled CPU kernels only: operators, threads, forks, and the disk cache."""

import errno
import os
import warnings

import pytest
import torch
from processes import run
from scan_helpers import one_way_inputs, run_scan, two_way_inputs

from vim_ssl.kernels.causal_conv1d import bi_causal_conv1d
from vim_ssl.kernels.selective_scan import (
    available_backends,
    bi_selective_scan,
    selective_scan,
)

pytestmark = pytest.mark.skipif("numba" not in available_backends("cpu"), reason="needs numba")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def wide_inputs():
    """Enough work for a second thread."""
    return two_way_inputs(8, 50, 130, 16)


@pytest.mark.parametrize("z", [True, False], ids=["gated", "bare"])
@pytest.mark.parametrize("save", [True, False], ids=["save", "forget"])
def test_scan_operators_pass_opcheck(z, save):
    from vim_ssl.kernels.selective_scan import numba_backend

    m = two_way_inputs(2, 18, 5, 3)
    args = [m[k].requires_grad_(save) for k in ("u", "delta", "A", "B", "C", "D", "z")]
    if not z:
        args[-1] = None
    args += [m["delta_bias"].requires_grad_(save), None, True, False, 0.5, save]
    torch.library.opcheck(numba_backend.scan_forward.registered, args)


def test_conv_operators_pass_opcheck():
    bi_causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3))  # imports it
    m = [torch.randn(s).requires_grad_() for s in ((2, 9, 5), (2, 5, 4), (2, 5))]
    torch.library.opcheck(torch.ops.vim_ssl.conv_forward.default, (*m, False))


def strided(shape, seed):
    """The second half of a wider tensor."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape[:-1], 2 * shape[-1], generator=g)[..., shape[-1] :]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("d", [5, 64, 70])
class TestParametersApartAndPartsOfWiderTensors:
    """The plain functions give the operators' results, without stacking or copying anything."""

    def test_convolution(self, directions, d):
        from vim_ssl.kernels.causal_conv1d import numba_backend

        b, l, k = 2, 9, 4
        x, wide = strided((b, l, d), 0), torch.zeros(b, l, 3 * d)
        weight, bias = torch.randn(directions, d, k), torch.randn(directions, d)
        apart = tuple(weight[:, :, None].clone()), tuple(bias.clone())  # (d, 1, k), as in a block
        out = numba_backend.forward(x, *apart, False)
        assert torch.equal(out, torch.ops.vim_ssl.conv_forward(x, weight, bias, False))
        got = numba_backend.backward(out, x, *apart, False, dx=wide[..., d : 2 * d])
        expected = torch.ops.vim_ssl.conv_backward(out, x, weight, bias, False)
        assert all(map(torch.equal, got, expected))
        assert torch.equal(wide[..., d : 2 * d], expected[0])
        assert not wide[..., :d].any()
        assert not wide[..., 2 * d :].any()

    def test_scan(self, directions, d):
        from vim_ssl.kernels.selective_scan import numba_backend

        b, l, n = 2, 40, 3
        m = {name: v[:directions] for name, v in two_way_inputs(b, l, d, n).items() if name != "z"}
        u, delta, parameters = m["u"], m["delta"], (m["A"], m["D"], m["delta_bias"])
        (A, D, bias), z, wide = parameters, strided((b, l, d), 1), torch.zeros(b, l, 3 * d)
        apart = (tuple(v.clone()) for v in parameters)
        A_apart, D_apart, bias_apart = apart
        B, C = strided((directions, b, l, 2 * n), 2).split(n, dim=-1)
        options = True, directions == 1, 0.5
        args, whole = (u, delta, A_apart, B, C, D_apart, z), (u, delta, A, B, C, D, z)
        got = numba_backend.forward(*args, bias_apart, None, *options, True)
        expected = torch.ops.vim_ssl.scan_forward(*whole, bias, None, *options, True)
        assert all(map(torch.equal, got, expected))
        out, last, states = expected
        dz = wide[..., d : 2 * d]
        got = numba_backend.backward(out, last, *args, bias_apart, states, *options, dz=dz)
        expected = torch.ops.vim_ssl.scan_backward(out, last, *whole, bias, states, *options)
        assert all(map(torch.equal, got, expected))
        assert torch.equal(dz, expected[6])
        assert not wide[..., :d].any()
        assert not wide[..., 2 * d :].any()


def scan_of(delta, A, tokens, softplus):
    """y of one image, (channels, tokens): u is 1 at the first token and 0 after it, B = C = 1."""
    delta = delta[None, :, None].expand(1, len(delta), tokens)
    u = torch.zeros_like(delta).index_fill(2, torch.tensor(0), 1.0)
    ones = torch.ones(1, A.shape[1], tokens)
    return selective_scan(u, delta, A, ones, ones, None, None, None, softplus, backend="numba")[0]


def test_a_step_size_has_full_relative_accuracy_however_small():
    v = torch.linspace(-100, 100, 4001).double()
    v = torch.cat([v, torch.linspace(-1e-3, 1e-3, 99).double()]).float()
    dt = scan_of(v.requires_grad_(), torch.zeros(len(v), 1), 1, True)[:, 0]
    (slope,) = torch.autograd.grad(dt.sum(), v)
    exact = v.detach().double()
    for got, expected in (
        (dt, torch.nn.functional.softplus(exact)),
        (slope, torch.sigmoid(exact)),
    ):
        error = (got.double() / expected - 1).abs()
        assert error[exact > -87].max() < 5e-6
        assert got[exact < -88].abs().max() < 1e-38
    assert torch.equal(dt[v >= 20], v[v >= 20])


@pytest.mark.parametrize("also", [0.5, 200.0], ids=["near", "with-one-far"])
def test_decays_are_exact_at_zero_and_right_to_underflow(also):
    """In one row of channels, with decays of e^0 to e^-86; a far one takes another path."""
    x = torch.linspace(0, 86, 63).double().float()
    A = -torch.cat([x, torch.tensor([also])])[:, None]
    decays = scan_of(torch.ones(64), A, 2, False)[:, 1]
    assert decays[0] == 1
    exact = A[:, 0].double().exp()
    torch.testing.assert_close(decays[:63].double(), exact[:63], rtol=5e-6, atol=0)
    torch.testing.assert_close(decays[63].double(), exact[63], rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("step", [200.0, -80.0, torch.nan], ids=["vanishes", "grows", "nan"])
def test_a_step_far_from_zero_changes_its_channel_only(step):
    steps = torch.tensor([0.5, step, 0.5])
    got = scan_of(steps, torch.full((3, 2), -1.0), 2, False)[:, 1]
    torch.testing.assert_close(
        got, 2 * steps * (-steps).exp(), rtol=5e-6, atol=1e-30, equal_nan=True
    )


def test_two_threads_take_part_and_change_nothing(two_threads, monkeypatch):
    from vim_ssl.kernels import numba_threads

    m = wide_inputs()
    together = run_scan(m, "numba")
    assert numba_threads._pool is not None
    torch.set_num_threads(1)
    monkeypatch.setattr(numba_threads, "_pool", None)
    alone = run_scan(m, "numba")
    assert numba_threads._pool is None
    assert all(torch.equal(v, alone[name]) for name, v in together.items())


class ScanningDataset(torch.utils.data.Dataset):
    """An item is some numbers of a scan made on two threads, in any process."""

    def __init__(self):
        self.inputs = wide_inputs()

    def __len__(self):
        return 2

    def __getitem__(self, index):
        torch.set_num_threads(2)
        return bi_selective_scan(**self.inputs, backend="numba")[-1, -1, -5:].clone()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_workers_scan_too(two_threads):
    dataset = ScanningDataset()
    here = dataset[0]  # starts this process's pool, whose threads no child inherits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: our very case
        loader = torch.utils.data.DataLoader(
            dataset, num_workers=1, timeout=20, multiprocessing_context="fork"
        )
        for there in loader:
            assert torch.equal(there[0], here)


def test_gradients_come_from_another_thread_as_well():
    """Accelerators and servers call backward from threads of their own."""
    import threading

    m, results = two_way_inputs(2, 30, 70, 4), []
    threads = [
        threading.Thread(target=lambda: results.append(run_scan(m, "numba"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = run_scan(m, "numba")
    assert len(results) == 3
    assert all(torch.equal(r[k], v) for r in results for k, v in expected.items())


SCAN_ONCE = """
import torch, vim_ssl
from vim_ssl.kernels import numba_kernels
from vim_ssl.kernels.selective_scan import bi_selective_scan as scan
u, n = torch.ones(2, 1, 3, 2), torch.ones(2, 1, 3, 1)
print(scan(u, u, -torch.ones(2, 2, 1), n, n, backend="numba").sum().item(),
      sum(numba_kernels.scan_forward.stats.cache_hits.values()),
      sum(numba_kernels.scan_forward.stats.cache_misses.values()))
"""


@pytest.mark.slow
def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    runs = [run(SCAN_ONCE, NUMBA_CACHE_DIR=str(tmp_path)) for _ in "12"]
    assert [done.returncode for done in runs] == [0, 0], runs
    first, second = (done.stdout.split() for done in runs)
    assert first[0] == second[0]
    assert first[1:] == ["0", "1"]
    assert second[1:] == ["1", "0"]
    assert [done.stderr.count("compiling the CPU kernels") for done in runs] == [1, 0]


def test_without_a_writable_cache_folder_it_compiles_in_every_process(monkeypatch, caplog):
    from numba.core import caching

    from vim_ssl.kernels import numba_kernels

    monkeypatch.setattr(caching.CodeLibraryCacheImpl, "_locator_classes", [])
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    monkeypatch.setattr(numba_kernels.NOTICE, "logged", False)
    monkeypatch.setattr(numba_kernels, "__name__", __name__)  # the notice is of its own kernels
    doubled = numba_kernels.kernel(lambda x: 2 * x)
    assert doubled(21) == 42
    assert not doubled.stats.cache_path
    assert "in every process, since" in caplog.text
    assert "NUMBA_CACHE_DIR" in caplog.text


def test_empty_batch_and_last_state():
    m = one_way_inputs(0, 5, 3, 2)
    got = run_scan(m, "numba", return_last_state=True)
    assert got["y"].shape == (0, 3, 5)
    assert got["d_A"].shape == (3, 2)
    assert not got["d_A"].any()


def doubled_by(cache, monkeypatch, caplog):
    """Compile a kernel with this cache folder, or load it; return its hits and the log."""
    from numba.core import config

    from vim_ssl.kernels import numba_kernels

    monkeypatch.setattr(config, "CACHE_DIR", str(cache))
    caplog.clear()
    kernel = numba_kernels.kernel(_double)
    assert kernel(3) == 6
    return sum(kernel.stats.cache_hits.values()), caplog.text


def _double(x):
    return 2 * x


@pytest.mark.parametrize("ending", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("damage", [b"", b"\x80\x04torn", "shorter"])
def test_a_damaged_cache_is_compiled_anew_and_told(tmp_path, monkeypatch, caplog, ending, damage):
    assert doubled_by(tmp_path, monkeypatch, caplog)[0] == 0
    for file in tmp_path.rglob(ending):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if damage == "shorter" else damage)
    hits, log = doubled_by(tmp_path, monkeypatch, caplog)
    assert hits == 0
    assert "numba's cache" in log
    assert "is damaged" in log
    assert doubled_by(tmp_path, monkeypatch, caplog) == (1, "")  # it was mended


@pytest.mark.parametrize(("changed", "kept"), [("version", 0), ("processor", 1), ("features", 1)])
def test_a_cache_of_another_numba_or_processor_is_not_loaded(
    tmp_path, monkeypatch, caplog, changed, kept
):
    """Processors may share a folder, as in a cluster; versions of numba replace one another."""
    import numba
    from numba.core.registry import cpu_target

    codegen = cpu_target.target_context.codegen()
    assert doubled_by(tmp_path, monkeypatch, caplog)[0] == 0
    assert doubled_by(tmp_path, monkeypatch, caplog)[0] == 1
    with monkeypatch.context() as other:
        if changed == "version":
            other.setattr(numba, "__version__", "0.1")
        elif changed == "processor":
            other.setattr(codegen, "_get_host_cpu_name", lambda: "another")
        else:
            other.setattr(codegen, "_tm_features", "-avx2")
        assert doubled_by(tmp_path, monkeypatch, caplog)[0] == 0
        assert doubled_by(tmp_path, monkeypatch, caplog)[0] == 1
    assert doubled_by(tmp_path, monkeypatch, caplog)[0] == kept


def test_a_cache_on_a_full_disk_is_told_and_the_kernel_runs(tmp_path, monkeypatch, caplog):
    from numba.core import caching

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    _, log = doubled_by(tmp_path, monkeypatch, caplog)
    assert "No space left on device), so every process compiles" in log
    assert "NUMBA_CACHE_DIR" in log


def test_compilations_in_progress_are_known():
    import numba
    from numba.core import event

    from vim_ssl.kernels import numba_kernels  # noqa: F401 (listens to compilations)
    from vim_ssl.kernels.backends import is_compiling

    seen = []

    class Watch(event.Listener):
        def on_start(self, event):
            seen.append(is_compiling())

        def on_end(self, event):
            pass

    watch = Watch()
    event.register("numba:compile", watch)
    try:
        assert numba.njit(lambda x: 3 * x)(2) == 6  # never cached on disk, unlike a kernel
    finally:
        event.unregister("numba:compile", watch)
    assert seen
    assert all(seen)
    assert not is_compiling()
