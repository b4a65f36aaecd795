"""The fused mixer against the sequence of operations in float64: results, gradients, memory."""

import pytest
import torch
from backend_helpers import poison_new_tensors, use
from torch import Tensor

from vim_ssl.kernels import backends
from vim_ssl.kernels.mixer import Direction, bi_mixer
from vim_ssl.kernels.selective_scan import torch_backend

CASES = {  # b, l, d, n, r, k, gated
    "gated": (2, 9, 40, 4, 3, 4, True),
    "ungated": (1, 5, 64, 4, 2, 4, False),
    "three-taps": (2, 34, 130, 3, 5, 3, True),
    "one-token": (3, 1, 8, 1, 1, 2, True),
    "wide-projections": (1, 50, 72, 16, 12, 4, True),
}


def inputs(b, l, d, n, r, k, dtype=torch.float64) -> tuple[Tensor, Direction, Direction]:
    """Reproducible leaves that require gradients."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def direction() -> Direction:
        steps = torch.arange(1.0, n + 1, dtype=torch.float64).log().repeat(d, 1)
        return Direction(
            normal(d, 1, k) / 2, normal(d), normal(r + 2 * n, d) * d**-0.5,
            normal(d, r) * r**-0.5, normal(d) - 2, steps + normal(d, n) / 10, normal(d),
        )  # fmt: skip

    xz, *directions = normal(b, l, 2 * d), direction(), direction()
    leaf = lambda m: m.to(dtype).requires_grad_()  # noqa: E731
    return leaf(xz), *(Direction(*map(leaf, one)) for one in directions)


def gradients(out: Tensor, xz: Tensor, *directions: Direction) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    leaves = [xz, *(m for one in directions for m in one)]
    return list(torch.autograd.grad(out, leaves, dout))


def relative_error(m: Tensor, expected: Tensor) -> float:
    return ((m.double() - expected).norm() / (expected.norm() or 1)).item()  # 0: one token's dA


@pytest.mark.parametrize(
    ("backend", "case"),
    [*(("numba", case) for case in CASES), ("triton", "gated")],  # its interpreter is slow
)
def test_it_equals_the_operations_in_float64(backend, case, monkeypatch):
    device = use(backend, monkeypatch)
    *sizes, gated = CASES[case]
    exact = inputs(*sizes)
    expected = bi_mixer(*exact, gated=gated, scale=0.5, backend="reference")
    poison_new_tensors(monkeypatch)
    rounded = [
        type(m)(*(t.detach().float().to(device).requires_grad_() for t in m))
        if isinstance(m, Direction) else m.detach().float().to(device).requires_grad_()
        for m in exact
    ]  # fmt: skip
    out = bi_mixer(*rounded, gated=gated, scale=0.5)
    assert "mixer" in out.grad_fn.name()
    assert relative_error(out.cpu(), expected) < 2e-6
    for m, e in zip(gradients(out, *rounded), gradients(expected, *exact), strict=True):
        assert relative_error(m.cpu(), e) < 5e-6
    with torch.no_grad():
        assert torch.equal(bi_mixer(*rounded, gated=gated, scale=0.5), out)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("images", [1, 2, 7])
def test_pieces_of_a_batch_equal_the_whole(images, gated, monkeypatch):
    use("numba", monkeypatch)
    b, l, d = 5, 11, 72
    arguments = inputs(b, l, d, 3, 5, 4, torch.float32)
    whole = bi_mixer(*arguments, gated=gated).detach()
    monkeypatch.setattr("vim_ssl.kernels.mixer.numba_backend.PIECE", 2 * images * l * d)
    poison_new_tensors(monkeypatch)
    with torch.no_grad():
        assert torch.equal(bi_mixer(*arguments, gated=gated), whole)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_change_it(threads, monkeypatch):
    use("numba", monkeypatch)
    arguments = inputs(1, 120, 200, 16, 12, 4, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = bi_mixer(*arguments)
        torch.set_num_threads(threads)
        assert torch.equal(bi_mixer(*arguments), expected)
    finally:
        torch.set_num_threads(before)


def test_weights_of_other_strides_give_the_same(monkeypatch):
    use("numba", monkeypatch)
    xz, *directions = inputs(2, 7, 40, 3, 2, 4, torch.float32)
    strided = [Direction(*(m.detach().mT.contiguous().mT if m.dim() == 2 else m for m in one))
               for one in directions]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(bi_mixer(xz, *strided), bi_mixer(xz, *directions))


def test_operators_pass_opcheck(monkeypatch):
    use("numba", monkeypatch)
    xz, *directions = inputs(1, 5, 8, 2, 1, 4, torch.float32)
    leaves = [m.detach().requires_grad_() for m in (xz, *sum(directions, ()))]
    bi_mixer(xz, *directions)  # defines the operator
    operator = torch.ops.vim_ssl.mixer_forward.default
    torch.library.opcheck(operator, (*leaves, True, 0.5, True))


def test_what_autograd_keeps_is_small(monkeypatch):
    """The input, x_proj's output and the scan's states, but no tensor of both directions."""
    use("numba", monkeypatch)
    b, l, d, n, r = 2, 64, 128, 16, 6
    xz, *directions = inputs(b, l, d, n, r, 4, torch.float32)
    saved: dict[int, int] = {}

    def pack(m: Tensor) -> Tensor:
        saved[m.untyped_storage().data_ptr()] = m.untyped_storage().nbytes()
        return m

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda m: m):
        bi_mixer(xz, *directions)
    parameters = sum(m.nbytes for one in directions for m in one)
    states = 2 * b * (d // 64) * (l // 32) * n * 64 * 4
    x_dbl = 2 * b * l * (r + 2 * n) * 4
    assert sum(saved.values()) == xz.nbytes + parameters + x_dbl + states


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_run_as_operations(dtype, monkeypatch):
    use("numba", monkeypatch)
    exact = inputs(1, 7, 8, 4, 1, 4)
    cast = [m.to(dtype) if isinstance(m, Tensor) else Direction(*(t.to(dtype) for t in m))
            for m in exact]  # fmt: skip
    out = bi_mixer(*cast)
    assert out.dtype == dtype
    expected = bi_mixer(*exact, backend="reference")
    assert relative_error(out, expected) < {torch.float64: 1e-12}.get(dtype, 3e-2)


@pytest.mark.parametrize("save", [True, False], ids=["training", "inference"])
def test_it_compiles_whole(save, monkeypatch):
    use("numba", monkeypatch)
    arguments = inputs(1, 6, 8, 4, 1, 4, torch.float32)
    compiled = torch.compile(bi_mixer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(save):
        out = compiled(*arguments)
        assert torch.equal(out, bi_mixer(*arguments))
    if save:
        expected = gradients(bi_mixer(*arguments), *arguments)
        for m, e in zip(gradients(out, *arguments), expected, strict=True):
            torch.testing.assert_close(m, e)


@pytest.mark.filterwarnings("ignore:.*not properly registered as a parameter")
def test_a_program_exported_without_gradients_can_be_trained(monkeypatch):
    use("numba", monkeypatch)
    xz, *directions = inputs(1, 6, 8, 4, 1, 4, torch.float32)

    class Mixer(torch.nn.Module):
        def forward(self, xz):
            return bi_mixer(xz, *directions)

    with torch.no_grad():
        program = torch.export.export(Mixer(), (xz,)).module()
    (d_program,) = torch.autograd.grad(program(xz).sum(), xz)
    (expected,) = torch.autograd.grad(bi_mixer(xz, *directions).sum(), xz)
    assert torch.equal(d_program, expected)


def test_it_cannot_be_differentiated_twice(monkeypatch):
    use("numba", monkeypatch)
    xz, *directions = inputs(1, 4, 8, 2, 1, 4, torch.float32)
    (dxz,) = torch.autograd.grad(bi_mixer(xz, *directions).sum(), xz, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*reference"):
        dxz.sum().backward()


def test_a_scan_of_another_package_replaces_the_fused_mixer(monkeypatch):
    """It has no mixer of its own, so its scan runs between operations of torch."""
    calls = []

    def scan(*args, **options):
        calls.append(args)
        return torch_backend.bi_selective_scan(*args, **options)

    table = backends.BACKENDS["selective_scan"]
    monkeypatch.setitem(table, "other", backends.Backend(
        "other", "other", None, 9, None, True, False
    ))  # fmt: skip
    table["other"].loaded = type("module", (), {"bi_selective_scan": staticmethod(scan)})
    backends._auto.cache_clear()
    try:
        out = bi_mixer(*inputs(1, 4, 8, 2, 1, 4, torch.float32))
    finally:
        monkeypatch.undo()
        backends._auto.cache_clear()
    assert len(calls) == 1
    assert "mixer" not in out.grad_fn.name()


def test_what_does_not_fit_is_refused():
    xz, *directions = inputs(1, 4, 8, 2, 1, 4, torch.float32)
    with pytest.raises(ValueError, match=r"xz has shape \(1, 4, 15\); expected .* d = 8"):
        bi_mixer(xz[..., 1:], *directions)
    with pytest.raises(ValueError, match=r"Unknown backend 'nunba'.*Did you mean 'numba'"):
        bi_mixer(xz, *directions, backend="nunba")
    for n in (0, 65):
        xz, *directions = inputs(1, 4, 8, n, 1, 4, torch.float32)
        with pytest.raises(ValueError, match=f"A_log has d_state {n}; expected 1 to 64"):
            bi_mixer(xz, *directions)


def test_an_input_with_other_strides_gives_the_same(monkeypatch):
    """As of a layer that computes with channels first."""
    use("numba", monkeypatch)
    xz, *directions = inputs(2, 7, 40, 3, 2, 4, torch.float32)
    strided = xz.detach().mT.contiguous().mT.requires_grad_()
    for m, e in zip(
        gradients(bi_mixer(strided, *directions), strided, *directions),
        gradients(bi_mixer(xz, *directions), xz, *directions),
        strict=True,
    ):
        torch.testing.assert_close(m, e)


def test_parameters_may_have_other_dtypes(monkeypatch):
    use("numba", monkeypatch)
    xz, *directions = inputs(2, 7, 40, 3, 2, 4, torch.float32)
    halves = [
        Direction(*(m.detach().bfloat16().requires_grad_() for m in one)) for one in directions
    ]
    wide = [Direction(*(m.detach().float().requires_grad_() for m in one)) for one in halves]
    out, expected = bi_mixer(xz, *halves), bi_mixer(xz, *wide)
    assert torch.equal(out, expected)
    for m, e in zip(gradients(out, xz, *halves), gradients(expected, xz, *wide), strict=True):
        torch.testing.assert_close(m, e.to(m.dtype))


@pytest.mark.parametrize("forward", [False, True], ids=["forward-outside", "forward-inside"])
def test_an_autocast_region_around_it_changes_nothing(forward, monkeypatch):
    """Its input decides the dtype, in both passes."""
    use("numba", monkeypatch)
    arguments = inputs(2, 7, 40, 3, 2, 4, torch.float32)
    expected = gradients(bi_mixer(*arguments), *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=forward, dtype=torch.bfloat16):
            out = bi_mixer(*arguments)
        assert out.dtype == torch.float32
        for m, e in zip(gradients(out, *arguments), expected, strict=True):
            assert torch.equal(m, e)


def test_nan_stays_in_its_image(monkeypatch):
    """With channels that do not fill a block, images share memory of the kernel."""
    use("numba", monkeypatch)
    xz, *directions = inputs(3, 7, 40, 3, 2, 4, torch.float32)
    xz = xz.detach()
    xz[0, 2, 5] = torch.nan
    xz.requires_grad_()
    (dxz,) = torch.autograd.grad(bi_mixer(xz, *directions).sum(), xz)
    assert [m.isfinite().all().item() for m in dxz] == [False, True, True]


@pytest.mark.parametrize("field", Direction._fields)
def test_parameters_that_do_not_fit_are_named(field):
    xz, first, second = inputs(1, 4, 8, 2, 1, 4, torch.float32)
    short = second._replace(**{field: getattr(second, field)[1:]})
    with pytest.raises(ValueError, match=rf"backward\.{field} has shape"):
        bi_mixer(xz, first, short)
