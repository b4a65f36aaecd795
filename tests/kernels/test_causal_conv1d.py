"""The short convolution against its definition, one token and one tap at a time."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from backend_helpers import (
    TRITON_DEVICE,
    poison_new_tensors,
    use,
)
from scan_helpers import relative_error

from vim_ssl.kernels.causal_conv1d import bi_causal_conv1d, causal_conv1d

FAST = ["numba", "triton"]


@pytest.fixture(params=["torch", *FAST])
def device(request, monkeypatch):
    """The device of one implementation, which runs for the test."""
    return use(request.param, monkeypatch)


def by_definition(x, weight, bias, reverse):
    """silu(bias + sum_j w_j x_{t-(k-1)+j}), mirrored in time with `reverse`; float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    k, rows = weight.shape[1], []
    for t in range(x.shape[1]):
        y = bias.expand(x.shape[0], -1)
        for j in range(k):
            source = t + (k - 1 - j) if reverse else t - (k - 1 - j)
            if 0 <= source < x.shape[1]:
                y = y + weight[:, j] * x[:, source]
        rows.append(y * torch.sigmoid(y))
    return torch.stack(rows, dim=1)


def both_by_definition(x, weight, bias):
    return torch.stack([by_definition(x, weight[s], bias[s], s == 1) for s in (0, 1)])


def inputs(b, l, d, k, dtype=torch.float32, directions=2, device="cpu"):
    g = torch.Generator().manual_seed(0)
    shapes = (b, l, d), (directions, d, k), (directions, d)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes]


def grads_of(function, leaves, *args):
    out = function(*leaves, *args)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad((out * weights).sum(), leaves)


def results(function, m, *args):
    """The output and the gradient of every input."""
    out, grads = grads_of(function, [v.detach().requires_grad_() for v in m], *args)
    return (out.detach(), *grads)


def assert_same(function, definition, m, *args, tolerance=1e-5):
    got, exact = results(function, m, *args), results(definition, [v.double() for v in m], *args)
    assert [v.dtype for v in got] == [m[0].dtype, *(v.dtype for v in m)]
    for value, expected in zip(got, exact, strict=True):
        scale = float(expected.abs().max()) + 1e-30
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance * scale)


SHAPES = [
    (2, 1, 5, 4), (2, 3, 5, 4), (1, 5, 130, 4), (1, 20, 65, 4), (3, 7, 7, 1), (1, 9, 3, 6),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-l{}-d{}-k{}".format(*s))
class TestAgainstTheDefinition:
    def test_two_way(self, device, shape):
        assert_same(bi_causal_conv1d, both_by_definition, inputs(*shape, device=device))

    @pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
    def test_one_way(self, device, shape, reverse):
        x, weight, bias = inputs(*shape, directions=1, device=device)
        assert_same(causal_conv1d, by_definition, [x, weight[0], bias[0]], reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype(device, dtype):
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}[dtype]
    assert_same(bi_causal_conv1d, both_by_definition, inputs(2, 10, 8, 4, dtype, device=device),
                tolerance=tolerance)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_parameters_may_have_another_dtype_than_x(device, dtype, other):
    x, *parameters = inputs(1, 4, 3, 4, device=device)
    m = [x.to(dtype), *(v.to(other) for v in parameters)]
    tolerance = 2e-2 if torch.bfloat16 in (dtype, other) else 1e-5
    assert_same(bi_causal_conv1d, both_by_definition, m, tolerance=tolerance)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_within_twice_the_plain_path(backend, dtype, monkeypatch):
    m = inputs(1, 14, 65, 4, dtype)
    exact = results(both_by_definition, [v.double() for v in m])
    use("torch", monkeypatch)
    plain = results(bi_causal_conv1d, m)
    device = use(backend, monkeypatch)
    got = results(bi_causal_conv1d, [v.to(device) for v in m])
    for value, reference, expected in zip(got, plain, exact, strict=True):
        limit = 2 * relative_error(reference, expected) + 1e-5
        assert relative_error(value.cpu(), expected) <= limit


def test_takes_a_slice_of_a_wider_tensor(device):
    """The block hands in one half of a projection's output."""
    x, weight, bias = inputs(2, 12, 8, 4, device=device)
    for half in (slice(8), slice(8, 16)):
        leaf = torch.cat([x, x], -1)
        assert_same(
            lambda wide, *rest, half=half: bi_causal_conv1d(wide[..., half], *rest),
            lambda wide, *rest, half=half: both_by_definition(wide[..., half], *rest),
            [leaf, weight, bias],
        )


def test_takes_channels_first_memory(device):
    x, weight, bias = inputs(2, 12, 8, 4, device=device)
    assert_same(bi_causal_conv1d, both_by_definition, [x.mT.contiguous().mT, weight, bias])


def test_a_token_sees_one_side_only(device):
    x, weight, bias = inputs(1, 9, 3, 4, device=device)
    changed = x.clone()
    changed[:, 4] += 1
    moved = (bi_causal_conv1d(changed, weight, bias) != bi_causal_conv1d(x, weight, bias))[:, 0]
    assert moved.any(-1).nonzero().tolist() == [[0, t] for t in (4, 5, 6, 7)] + [
        [1, t] for t in (1, 2, 3, 4)
    ]


def test_autocast_and_compile(device):
    m = inputs(2, 12, 8, 4, device=device)
    exact = both_by_definition(*m)
    with torch.autocast(device, torch.bfloat16):
        out = bi_causal_conv1d(*m)
        narrow = bi_causal_conv1d(m[0].bfloat16(), *m[1:])
    assert (out.double() - exact).norm() < 2e-2 * exact.norm()
    assert (out.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert (narrow.double() - exact).norm() < 2e-2 * exact.norm()
    compiled = torch.compile(bi_causal_conv1d, fullgraph=True, backend="aot_eager")
    leaves = [v.requires_grad_() for v in m]
    out, grads = grads_of(compiled, leaves)
    _, plain_grads = grads_of(bi_causal_conv1d, leaves)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, plain_grads)


def test_huge_negative_inputs_stay_finite(device):
    _, weight, bias = inputs(1, 4, 2, 4, device=device)
    x = torch.full((1, 4, 2), -1e4, device=device)
    assert_same(bi_causal_conv1d, both_by_definition, [x, weight, bias])


@pytest.mark.parametrize("backend", FAST)
def test_what_is_not_finite_goes_where_it_goes_in_plain_torch(backend, monkeypatch):
    """Each in a separate channel, also at the ends, beyond which a kernel may read."""
    finite = []
    for name in ("torch", backend):
        device = use(name, monkeypatch)
        x, weight, bias = m = inputs(1, 14, 9, 4, device=device)
        x[0, 13, 0], x[0, 7, 1], x[0, 0, 2] = torch.inf, -torch.inf, torch.inf
        x[0, 13, 3], x[0, 7, 4] = torch.nan, torch.nan
        weight[0, 5, 2], weight[1, 6, 0] = torch.inf, torch.nan
        bias[1, 7] = -torch.inf
        finite.append([v.isfinite().cpu() for v in results(bi_causal_conv1d, m)])
    for plain, got in zip(*finite, strict=True):
        assert torch.equal(got, plain)


@pytest.mark.parametrize("backend", FAST)
def test_every_element_is_written_the_same_twice(backend, monkeypatch):
    device = use(backend, monkeypatch)
    m = inputs(1, 9, 5, 4, device=device)
    poison_new_tensors(monkeypatch)
    first, second = results(bi_causal_conv1d, m), results(bi_causal_conv1d, m)
    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_triton_gradients_however_the_work_is_cut(monkeypatch):
    """Two spans an image, the first of two blocks of tokens; two programs for the four spans."""
    device = use("triton", monkeypatch)
    backend = pytest.importorskip("vim_ssl.kernels.causal_conv1d.triton_backend")
    monkeypatch.setattr(backend, "_shares", lambda b, l, k, most: (2, 12, 2))
    assert_same(bi_causal_conv1d, both_by_definition, inputs(2, 17, 2, 4, device=device))


@pytest.mark.parametrize("l", [0, 1, 5, 49, 197, 1025, 6085])
@pytest.mark.parametrize("b", [0, 1, 3, 128, 1000])
def test_the_spans_cover_every_token_once(b, l):
    backend = pytest.importorskip("vim_ssl.kernels.causal_conv1d.triton_backend")
    for most in (1, 66, 264):
        spans, span, programs = backend._shares(b, l, 4, most)
        assert span % backend.BACKWARD_TOKENS == 0
        assert (spans - 1) * span < max(l, 1)
        assert spans * span >= l
        assert min(b, 1) <= programs <= min(most, b * spans)


def test_triton_operators_pass_opcheck(monkeypatch):
    device = use("triton", monkeypatch)
    x, weight, bias = inputs(1, 2, 3, 4, device=device)
    bi_causal_conv1d(x, weight, bias)  # registers the operators
    m = [v.requires_grad_() for v in (x, weight.mT.contiguous(), bias)]
    torch.library.opcheck(torch.ops.vim_ssl.triton_conv_forward, (*m, False))
    m = [v.detach() for v in m]
    dout = torch.randn(2, 1, 2, 3, device=device)
    torch.library.opcheck(torch.ops.vim_ssl.triton_conv_backward, (dout, *m, False))


@pytest.mark.parametrize("backend", FAST)
def test_double_backward_is_refused_with_a_reason(backend, monkeypatch):
    device = use(backend, monkeypatch)
    m = [v.requires_grad_() for v in inputs(1, 3, 2, 4, device=device)]
    (grad,) = torch.autograd.grad(bi_causal_conv1d(*m).square().sum(), m[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)],
                         ids=["no-images", "no-tokens", "no-channels"])  # fmt: skip
def test_takes_empty_tensors(device, shape):
    out, dx, dweight, dbias = results(bi_causal_conv1d, inputs(*shape, 4, device=device))
    assert (out.shape, dx.shape) == ((2, *shape), shape)
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("wrong", ["x", "weight", "bias"])
def test_shapes_that_do_not_fit_are_refused(wrong):
    m = dict(zip(("x", "weight", "bias"), inputs(1, 4, 3, 4), strict=True))
    m[wrong] = m[wrong][..., :2] if wrong != "weight" else m[wrong][:, :2]
    with pytest.raises(ValueError, match=r"expected \(b, l, d\)"):
        bi_causal_conv1d(**m)


@pytest.mark.gpu
def test_triton_beyond_32_bit_offsets():
    """The last image of a batch whose outputs have more than 2^31 elements."""
    b, l, d = 3, 6000, 65536
    _, weight, bias = inputs(1, 1, d, 4, torch.bfloat16, device=TRITON_DEVICE)
    x = torch.randn(b, l, d, dtype=torch.bfloat16, device=TRITON_DEVICE)
    got = bi_causal_conv1d(x, weight, bias)[1, -1, -8:, -64:]
    expected = both_by_definition(x[-1:, -16:, -64:], weight[:, -64:], bias[:, -64:])[1, 0, -8:]
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("directions", "taps"), [(1, 0), (2, 0), (3, 2)])
def test_a_weight_without_taps_or_of_three_directions_is_refused(device, directions, taps):
    """Before a kernel, which does not check its sizes, writes out of bounds."""
    x = torch.randn(1, 4, 3, device=device)
    weight = torch.randn(directions, 3, taps, device=device)
    with pytest.raises(ValueError, match="1 or 2 directions and 1 tap"):
        bi_causal_conv1d(x, weight, torch.randn(directions, 3, device=device))


def test_integers_are_refused(device):
    x = torch.ones(1, 4, 3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        causal_conv1d(x, torch.randn(3, 2, device=device), torch.randn(3, device=device))


@pytest.mark.parametrize("name", FAST)
def test_forward_mode_is_refused_with_a_reason(name, monkeypatch):
    device = use(name, monkeypatch)
    m = inputs(1, 4, 3, 2, device=device)
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="VIM_SSL_BACKEND=reference"):
        bi_causal_conv1d(fwAD.make_dual(m[0], torch.ones_like(m[0])), *m[1:])


def test_forward_mode_of_plain_torch_agrees_with_a_difference(monkeypatch):
    use("torch", monkeypatch)
    x, *rest = inputs(1, 4, 3, 2, dtype=torch.float64)
    step = torch.ones_like(x)
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(bi_causal_conv1d(fwAD.make_dual(x, step), *rest)).tangent
    ahead, behind = (bi_causal_conv1d(x + sign * 1e-6 * step, *rest) for sign in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6)
