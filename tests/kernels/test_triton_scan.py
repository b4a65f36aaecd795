"""The Triton scan against the float64 loop: on a GPU where there is one, else in the interpreter,
which runs the same kernels on CPU tensors, slowly. So the sizes here are tiny and odd."""

import pytest
import torch

pytest.importorskip("triton")

from backend_helpers import TRITON_DEVICE as DEVICE
from backend_helpers import poison_new_tensors
from scan_helpers import (
    as_double,
    assert_close,
    assert_exports_for_lengths,
    last_state_gradients,
    one_way_inputs,
    relative_error,
    run_on_leaves,
    run_scan,
    two_way_inputs,
)

from vim_ssl.kernels.selective_scan import bi_selective_scan, selective_scan
from vim_ssl.kernels.selective_scan import triton_backend as backend

ONE_WAY = {"delta_softplus": True, "return_last_state": True}
VARIANTS = backend.VARIANTS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def groups_of_four_tokens(monkeypatch):
    """Instead of 8 for small states: the interpreter also computes tokens that do not exist."""
    four = {n: variant._replace(tokens=4) for n, variant in VARIANTS.items()}
    monkeypatch.setattr(backend, "VARIANTS", four)


@pytest.fixture
def segments(monkeypatch):
    """Cut every sequence into segments of one checkpoint, as if there were one long image."""
    monkeypatch.setattr(backend, "segment_length", lambda warps, length, device: backend.EVERY)


@pytest.fixture
def two_channels_a_lane(monkeypatch):
    monkeypatch.setattr(backend, "channels_per_lane", lambda warps, n, device: 2)


def here(inputs: dict) -> dict:
    return {name: m.to(DEVICE) for name, m in inputs.items()}


def run(inputs, **options):
    return {k: v.cpu() for k, v in run_scan(here(inputs), "triton", **options).items()}


def compare(inputs, **options):
    assert_close(run(inputs, **options), run_scan(as_double(inputs), "reference", **options))


# b, l, d, n: one token; an odd middle; one over a checkpoint; two blocks of channels; wide states
SHAPES = [(2, 1, 3, 2), (1, 5, 2, 3), (2, 10, 3, 1), (1, 6, 33, 2), (1, 3, 2, 16), (1, 2, 1, 33)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-l{}-d{}-n{}".format(*s))
each_order = pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])


@each_shape
def test_two_way(shape):
    compare(two_way_inputs(*shape), scale=0.5)


@pytest.mark.parametrize(("n", "length"), [(1, 9), (4, 3), (5, 2), (6, 2), (7, 2), (20, 2),
                                           (48, 1)])  # fmt: skip
def test_every_variant_of_the_backward_pass(monkeypatch, n, length):
    """The others are among SHAPES."""
    monkeypatch.setattr(backend, "VARIANTS", VARIANTS)
    compare(two_way_inputs(1, length, 3, n), scale=0.5)


@each_order
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=lambda s: "b{}-l{}-d{}-n{}".format(*s))
def test_one_way_with_states_in_and_out(shape, reverse):
    compare(one_way_inputs(*shape), reverse=reverse, **ONE_WAY)


def test_a_loss_of_the_last_state_alone():
    m = one_way_inputs(1, 3, 2, 2)
    got = {name: v.cpu() for name, v in last_state_gradients(here(m), "triton").items()}
    assert_close(got, last_state_gradients(as_double(m), "reference"))


def test_the_initial_state_alone_requires_a_gradient():
    m = here(one_way_inputs(1, 3, 2, 2))
    leaf = {"initial_state": m["initial_state"].clone().requires_grad_()}
    got = run_on_leaves(leaf, m | leaf, "triton", **ONE_WAY)
    whole = run_scan(m, "triton", **ONE_WAY)
    assert_close(got, {name: whole[name] for name in ("y", "last", "d_initial_state")})


@pytest.mark.usefixtures("two_channels_a_lane")
@pytest.mark.parametrize("shape", [(1, 5, 33, 2), (1, 4, 70, 1)], ids=["one-block", "two-blocks"])
def test_two_channels_a_lane(shape):
    compare(two_way_inputs(*shape))


@pytest.mark.usefixtures("segments")
class TestSegments:
    @pytest.mark.parametrize("length", [16, 21], ids=["even", "ragged"])
    def test_two_way(self, length):
        compare(two_way_inputs(1, length, 2, 2), scale=0.5)

    @each_order
    def test_one_way(self, reverse):
        compare(one_way_inputs(2, 19, 2, 2), reverse=reverse, **ONE_WAY)

    def test_without_gate_and_start(self):
        inputs = one_way_inputs(1, 17, 2, 2, without=("initial_state", "z", "D", "delta_bias"))
        compare(inputs, **ONE_WAY)


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")],
                         ids=["no-D", "no-z", "no-bias", "bare"])  # fmt: skip
def test_optional_arguments(without):
    compare(two_way_inputs(1, 6, 2, 2, without=without))


def test_without_softplus():
    m = two_way_inputs(1, 6, 2, 2)
    m |= {name: m[name].abs() / 4 for name in ("delta", "delta_bias")}  # steps are not negative
    compare(m, delta_softplus=False)


def test_groups_of_channels_share_B_and_C():
    compare(one_way_inputs(1, 5, 4, 2, groups=2), **ONE_WAY)


def test_saved_states_may_be_farther_apart(monkeypatch):
    monkeypatch.setattr(backend, "EVERY", 12)
    compare(two_way_inputs(1, 13, 2, 2))


def test_offsets_within_an_image_may_exceed_32_bits(monkeypatch):
    monkeypatch.setattr(backend, "FAR", 1)
    compare(two_way_inputs(2, 3, 2, 1))


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("save", [True, False], ids=["training", "inference"])
def test_the_directions_meet_in_float32(length, save):
    """80,000 and -79,800 cancel to 200, and float16 ends at 65,504."""
    shape = (2, 1, length, 2)
    u = torch.full(shape, 8.0, dtype=torch.float16)
    u[1] = -7.98
    m = {"u": u, "delta": torch.full(shape, 1e-3, dtype=torch.float16), "A": -torch.ones(2, 2, 1),
         "B": torch.ones(2, 1, length, 1), "C": torch.ones(2, 1, length, 1),
         "D": torch.full((2, 2), 1e4),
         "z": torch.full(shape[1:], 2.0, dtype=torch.float16)}  # fmt: skip
    m = {name: tensor.to(DEVICE).requires_grad_(save) for name, tensor in m.items()}
    got = bi_selective_scan(**m, backend="triton")
    exact = bi_selective_scan(**as_double(m), backend="reference")
    torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=0)
    if save:
        (dz,) = torch.autograd.grad(got.sum(), m["z"])
        by_hand = (1 + 2 * torch.sigmoid(torch.tensor(-2.0))) / 2  # silu'(z) / silu(z) at z = 2
        torch.testing.assert_close(dz, got.detach() * by_hand.item(), rtol=3e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_within_twice_the_plain_path(dtype):
    m = two_way_inputs(1, 13, 6, 4, dtype=dtype)
    exact = run_scan(as_double(m), "reference", scale=0.5)
    plain = run_scan(m, "reference", scale=0.5)
    got = run(m, scale=0.5)
    for name in exact:
        assert got[name].dtype == plain[name].dtype, name
        limit = 2 * relative_error(plain[name], exact[name]) + 1e-5
        assert relative_error(got[name], exact[name]) <= limit, name


def test_float64_inputs_keep_float64_accuracy():
    m = two_way_inputs(1, 9, 2, 2, dtype=torch.float64)
    assert_close(run(m), run_scan(m, "reference"), 1e-12, 1e-12)


def test_strided_inputs_need_no_copy():
    """As in the block: z is half of a projection, B and C are slices of another; and channels-first
    memory."""
    m = two_way_inputs(2, 7, 4, 3)
    expected = run(m)
    z = torch.cat([m["z"], m["z"]], -1).to(DEVICE)[..., 4:]
    B, C = torch.cat([m["B"], m["C"], m["u"]], -1).to(DEVICE).split([3, 3, 4], -1)[:2]
    delta = m["delta"].mT.contiguous().mT.to(DEVICE)
    leaves = {k: v.detach().requires_grad_() for k, v in
              (here(m) | {"z": z, "B": B, "C": C, "delta": delta}).items()}  # fmt: skip
    assert not any(leaves[k].is_contiguous() for k in ("z", "B", "C", "delta"))
    got = run_on_leaves(leaves, leaves, "triton")
    for name, value in expected.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.usefixtures("segments")
def test_every_output_is_written(monkeypatch):
    """What is allocated starts as NaN, which reveals elements that no kernel writes."""
    poison_new_tensors(monkeypatch)
    for inputs in (two_way_inputs(1, 10, 2, 3), one_way_inputs(1, 10, 2, 3)):
        got = run(inputs, delta_softplus=True)
        assert all(m.isfinite().all() for m in got.values())


def test_two_runs_are_bitwise_equal():
    m = two_way_inputs(2, 5, 3, 2)
    first, second = run(m), run(m)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_inputs_are_left_alone_and_backward_can_run_twice():
    m = here(two_way_inputs(1, 9, 2, 2))
    leaves = {name: v.clone().requires_grad_() for name, v in m.items()}
    out = bi_selective_scan(**leaves, backend="triton")
    grads = [torch.autograd.grad(out.sum(), [*leaves.values()], retain_graph=True) for _ in "12"]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(torch.equal(leaves[name], v) for name, v in m.items())


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=["inf", "-inf", "nan"])
def test_the_same_outputs_are_not_finite_as_in_float64(name, value):
    m = two_way_inputs(1, 3, 2, 1)
    m[name].view(-1)[m[name].numel() // 3] = value
    expected = bi_selective_scan(**as_double(m), backend="reference").isfinite()
    got = bi_selective_scan(**here(m), backend="triton").isfinite().cpu()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("length", [3, 8, 11])
def test_a_state_that_forgets_at_once_leaves_finite_gradients(length):
    """A = -inf, also where fewer tokens follow the last saved state than the others."""
    m = one_way_inputs(1, length, 3, 2)
    m["A"][1, 0] = -1e30  # with -inf the reference itself multiplies by 0
    exact = run_scan(as_double(m), "reference", **ONE_WAY)
    m["A"][1, 0] = -torch.inf
    assert_close(run(m, **ONE_WAY), exact)


@pytest.mark.parametrize("center", [-18.0, -7.0, -0.5, 0.5, 19.9, 25.0])
def test_softplus_is_exact_at_every_size(center):
    """u, B, C = 1 from a zero state over one token: y is dt itself, once for each direction."""
    delta = center + torch.linspace(-1, 1, 64).reshape(2, 1, 1, 32)
    delta.requires_grad_()
    one, n_one, A = torch.ones(2, 1, 1, 32), torch.ones(2, 1, 1, 1), -torch.ones(2, 32, 1)
    args = (m.to(DEVICE) for m in (one, delta, A, n_one, n_one))
    y = bi_selective_scan(*args, backend="triton").cpu()
    dt = torch.log1p(delta.double().exp())
    torch.testing.assert_close(y[0, 0].double(), dt.sum(0)[0, 0], rtol=1e-6, atol=0)
    slope, exact_slope = (torch.autograd.grad(m.sum(), delta)[0] for m in (y, dt))
    torch.testing.assert_close(slope, exact_slope, rtol=2e-6, atol=0)


def test_an_empty_batch_has_empty_results_and_zero_gradients():
    got = run(one_way_inputs(0, 3, 2, 2), **ONE_WAY)
    assert got["y"].shape == (0, 2, 3)
    assert not got["d_A"].any()


@pytest.mark.parametrize("z", [True, False], ids=["gated", "bare"])
def test_operator_passes_opcheck(z):
    m = here(two_way_inputs(1, 3, 2, 2))
    args = [m[k].requires_grad_() for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    if not z:
        args[6] = None
    torch.library.opcheck(backend.scan_forward.registered, (*args, None, True, False, 0.5, True))


def test_compiles_in_one_graph_under_autocast():
    m = here(two_way_inputs(1, 4, 2, 2))
    for name in ("u", "delta", "z"):
        m[name] = m[name].bfloat16()
    leaves = {name: v.requires_grad_() for name, v in m.items()}

    def results(call):
        with torch.autocast(DEVICE, torch.bfloat16):
            out = call(**leaves, backend="triton")
        return out, *torch.autograd.grad(out.sum(), list(leaves.values()))

    compiled = torch.compile(bi_selective_scan, fullgraph=True, backend="aot_eager")
    for got, expected in zip(results(compiled), results(bi_selective_scan), strict=True):
        torch.testing.assert_close(got, expected)


def test_exports():
    class Scan(torch.nn.Module):
        def forward(self, **m):
            return bi_selective_scan(**m, backend="triton")

    m = here(two_way_inputs(1, 3, 2, 2))
    exported = torch.export.export(Scan(), (), m).module()
    torch.testing.assert_close(exported(**m), bi_selective_scan(**m, backend="triton"))


def test_exports_for_any_number_of_tokens():
    assert_exports_for_lengths((3, 9), "triton", DEVICE)


def test_double_backward_is_refused_with_a_reason():
    m = {name: v.requires_grad_() for name, v in here(two_way_inputs(1, 2, 2, 2)).items()}
    out = bi_selective_scan(**m, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), m["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_only_the_interpreter_takes_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' runs on cuda tensors; these are on cpu"):
        bi_selective_scan(**two_way_inputs(1, 2, 2, 2), backend="triton")


# --- at the models' own sizes ----------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 197, 384, 16), (2, 1025, 768, 16), (1, 6085, 192, 16),
                                   (4, 577, 200, 8), (2, 100, 96, 64)],
                         ids=lambda s: "b{}-l{}-d{}-n{}".format(*s))  # fmt: skip
def test_at_full_size(shape, dtype):
    """Against the torch loop in float64, which the CPU tests hold against the reference."""
    m = here(two_way_inputs(*shape, dtype=dtype))
    exact = run_scan(as_double(m), "torch", scale=0.5)
    got = run_scan(m, "triton", scale=0.5)
    if dtype == torch.float32:
        assert_close(got, exact)
        return
    plain = run_scan(m, "torch", scale=0.5)
    for name in exact:
        limit = 2 * relative_error(plain[name], exact[name]) + 1e-5
        assert relative_error(got[name], exact[name]) <= limit, name


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """Offsets that do not fit 32 bits: the last image must be what it is alone."""
    b, l, d, n = 1500, 1024, 768, 2
    m = here(two_way_inputs(1, l, d, n, dtype=torch.bfloat16))
    many = {k: v if k in ("A", "D", "delta_bias") else v.expand(*v.shape[:-3], b, l, v.shape[-1])
            for k, v in m.items()}  # fmt: skip
    many |= {k: many[k].contiguous() for k in ("u", "delta")}
    assert many["u"].numel() > 2**31
    with torch.no_grad():
        together = bi_selective_scan(**many, backend="triton")
        alone = bi_selective_scan(**m, backend="triton")
    assert torch.equal(together[-1], alone[0])


@pytest.mark.gpu
def test_one_way_matches_two_way_on_a_gpu():
    m = here(two_way_inputs(2, 197, 384, 16, without=("z",)))
    both = bi_selective_scan(**m, backend="triton")
    parts = [
        selective_scan(
            m["u"][s].mT, m["delta"][s].mT, m["A"][s], m["B"][s].mT, m["C"][s].mT, m["D"][s], None,
            m["delta_bias"][s], True, reverse=s == 1, backend="triton",
        ).mT
        for s in (0, 1)
    ]  # fmt: skip
    torch.testing.assert_close(both, parts[0] + parts[1], rtol=1e-5, atol=1e-5)
