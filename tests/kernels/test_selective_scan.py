"""Every backend of the scan against the float64 loop, and the loop against plain arithmetic."""

import logging
import math
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from scan_helpers import (
    BACKENDS,
    FAST_BACKENDS,
    OPTIONAL,
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

from vim_ssl.kernels import backends
from vim_ssl.kernels.selective_scan import available_backends, bi_selective_scan, dispatch
from vim_ssl.kernels.selective_scan import selective_scan as scan

LAST = {"return_last_state": True}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fast_backend = pytest.mark.parametrize("backend", FAST_BACKENDS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More threads would compete for the cores on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the reference itself --------------------------------------------------------------------


def by_hand(m, softplus, reverse):
    """The recurrence on Python floats, one channel and one state at a time."""
    b, d, l = m["u"].shape
    n = m["A"].shape[1]
    y, last = torch.zeros(b, d, l, dtype=torch.float64), torch.zeros(b, d, n, dtype=torch.float64)
    for i in range(b):
        for e in range(d):
            h = [float(v) for v in m["initial_state"][i, e]]
            for t in range(l - 1, -1, -1) if reverse else range(l):
                dt = float(m["delta"][i, e, t] + m["delta_bias"][e])
                dt = math.log(1 + math.exp(dt)) if softplus else dt
                u, z = float(m["u"][i, e, t]), float(m["z"][i, e, t])
                total = float(m["D"][e]) * u
                for k in range(n):
                    h[k] = math.exp(dt * m["A"][e, k]) * h[k] + dt * float(m["B"][i, k, t]) * u
                    total += float(m["C"][i, k, t]) * h[k]
                y[i, e, t] = total * z / (1 + math.exp(-z))
            last[i, e] = torch.tensor(h)
    return y, last


@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
@pytest.mark.parametrize("softplus", [False, True], ids=["plain", "softplus"])
def test_reference_is_the_recurrence_by_hand(softplus, reverse):
    m = one_way_inputs(2, 5, 3, 2, dtype=torch.float64)
    y, last = scan(**m, delta_softplus=softplus, reverse=reverse, **LAST, backend="reference")
    expected_y, expected_last = by_hand(m, softplus, reverse)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(last, expected_last)


def test_bidirectional_reference_is_two_scans_added_gated_and_scaled():
    m = two_way_inputs(2, 6, 3, 2, dtype=torch.float64)
    zero = torch.zeros(2, 3, 2, dtype=torch.float64)
    parts = []
    for k in (0, 1):
        one = {name: v[k].mT for name, v in m.items() if name in ("u", "delta", "B", "C")}
        one |= {name: m[name][k] for name in ("A", "D", "delta_bias")}
        one |= {"z": m["z"].mT, "initial_state": zero}
        parts.append(by_hand(one, softplus=True, reverse=k == 1)[0].mT)
    got = bi_selective_scan(**m, scale=0.5, backend="reference")
    torch.testing.assert_close(got, (parts[0] + parts[1]) / 2)


# --- values and every gradient ---------------------------------------------------------------

SHAPES = [  # b, l, d, n
    (2, 1, 5, 16), (2, 3, 1, 8), (1, 63, 7, 1), (2, 63, 65, 16), (1, 197, 9, 16), (1, 17, 130, 8),
    (2, 33, 3, 5), (1, 5, 3, 64), (2, 32, 3, 2), (2, 64, 3, 2),
]  # fmt: skip
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-l{}-d{}-n{}".format(*s))


@each_backend
@each_shape
def test_two_way_scan_in_float32(backend, shape):
    m = two_way_inputs(*shape)
    expected = run_scan(as_double(m), "reference", scale=0.5)
    assert_close(run_scan(m, backend, scale=0.5), expected)


@each_backend
@each_shape
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
def test_one_way_scan_in_float32(backend, shape, reverse):
    m = one_way_inputs(*shape)
    options = {"delta_softplus": True, "reverse": reverse, **LAST}
    assert_close(run_scan(m, backend, **options), run_scan(as_double(m), "reference", **options))


@each_backend
@pytest.mark.parametrize("softplus", [False, True], ids=["plain", "softplus"])
@pytest.mark.parametrize("without", [(), *((name,) for name in OPTIONAL), OPTIONAL],
                         ids=["all", "no-D", "no-z", "no-bias", "bare"])  # fmt: skip
class TestOptionalArguments:
    def test_two_way(self, backend, softplus, without):
        m = two_way_inputs(2, 21, 6, 4, without=without)
        if not softplus:  # a step size must not be negative
            m |= {name: m[name].abs() / 4 for name in ("delta", "delta_bias") if name in m}
        options = {"delta_softplus": softplus, "scale": 1.0}
        expected = run_scan(as_double(m), "reference", **options)
        assert_close(run_scan(m, backend, **options), expected)

    def test_one_way(self, backend, softplus, without):
        m = one_way_inputs(2, 21, 6, 4, without=(*without, "initial_state"))
        if not softplus:  # a step size must not be negative
            m |= {name: m[name].abs() / 4 for name in ("delta", "delta_bias") if name in m}
        options = {"delta_softplus": softplus}
        expected = run_scan(as_double(m), "reference", **options)
        assert_close(run_scan(m, backend, **options), expected)


@each_backend
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
def test_groups_of_channels_share_B_and_C(backend, groups, reverse):
    m = one_way_inputs(2, 11, 6, 4, groups=groups)
    options = {"delta_softplus": True, "reverse": reverse, **LAST}
    expected = run_scan(as_double(m), "reference", **options)
    assert_close(run_scan(m, backend, **options), expected)


@each_backend
def test_only_one_of_B_and_C_may_have_groups(backend):
    m = one_way_inputs(2, 11, 6, 4, groups=3)
    m["C"] = m["C"][:, 0].clone()
    expected = run_scan(as_double(m), "reference", delta_softplus=True)
    assert_close(run_scan(m, backend, delta_softplus=True), expected)


@each_fast_backend
@pytest.mark.parametrize("make", [one_way_inputs, two_way_inputs], ids=["one-way", "two-way"])
def test_float64_inputs_keep_float64_accuracy(backend, make):
    m = make(2, 21, 5, 4, dtype=torch.float64)
    got = run_scan(m, backend, delta_softplus=True)
    assert all(v.dtype == torch.float64 for v in got.values())
    assert_close(got, run_scan(m, "reference", delta_softplus=True), 1e-12, 1e-12)


@each_fast_backend
@pytest.mark.parametrize("make", [one_way_inputs, two_way_inputs], ids=["one-way", "two-way"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_within_twice_the_plain_path(backend, make, dtype):
    m = make(2, 63, 16, 8, dtype=dtype)
    exact = run_scan(as_double(m), "reference", delta_softplus=True)
    plain = run_scan(m, "reference", delta_softplus=True)
    got = run_scan(m, backend, delta_softplus=True)
    assert got["y"].dtype == dtype
    for name in exact:
        assert got[name].dtype == plain[name].dtype, name
        limit = 2 * relative_error(plain[name], exact[name]) + 1e-5
        assert relative_error(got[name], exact[name]) <= limit, name


def test_torch_backend_passes_gradcheck_one_way():
    m = one_way_inputs(2, 5, 2, 3, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in m.values()]

    def call(*args):
        return scan(**dict(zip(m, args, strict=True)), delta_softplus=True, **LAST, backend="torch")

    assert torch.autograd.gradcheck(call, leaves)


def test_torch_backend_passes_gradcheck_two_way():
    m = two_way_inputs(1, 4, 2, 2, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in m.values()]
    assert torch.autograd.gradcheck(
        lambda *args: bi_selective_scan(*args, scale=0.5, backend="torch"), leaves
    )


@each_backend
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_one_gradient_alone_equals_that_of_a_full_backward_pass(backend, name):
    m = two_way_inputs(1, 5, 3, 4)
    whole = run_scan(m, backend)[f"d_{name}"]
    leaf = m[name].clone().requires_grad_()
    alone = run_on_leaves({name: leaf}, m | {name: leaf}, backend)[f"d_{name}"]
    torch.testing.assert_close(alone, whole)


@each_fast_backend
def test_a_loss_of_the_last_state_alone(backend):
    m = one_way_inputs(2, 19, 3, 4)
    got, exact = last_state_gradients(m, backend), last_state_gradients(as_double(m), "reference")
    assert_close(got, exact)


@each_fast_backend
def test_the_initial_state_alone_requires_a_gradient(backend):
    m = one_way_inputs(2, 19, 3, 4)
    leaf = {"initial_state": m["initial_state"].clone().requires_grad_()}
    options = {"delta_softplus": True, **LAST}
    got, whole = run_on_leaves(leaf, m | leaf, backend, **options), run_scan(m, backend, **options)
    assert_close(got, {name: whole[name] for name in ("y", "last", "d_initial_state")})


# --- guarantees -----------------------------------------------------------------


@each_backend
def test_flipping_tokens_and_directions_flips_the_output(backend):
    m = two_way_inputs(2, 20, 5, 4)
    flipped = {name: v.flip(0) for name, v in m.items() if name != "z"}
    for name in ("u", "delta", "B", "C"):
        flipped[name] = flipped[name].flip(2)
    flipped["z"] = m["z"].flip(1)
    torch.testing.assert_close(
        bi_selective_scan(**flipped, backend=backend),
        bi_selective_scan(**m, backend=backend).flip(1),
    )


@each_backend
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
def test_two_halves_joined_by_the_state_are_the_whole(backend, reverse):
    m = one_way_inputs(2, 40, 5, 4)
    options = {"delta_softplus": True, "reverse": reverse, "backend": backend, **LAST}
    y, last = scan(**m, **options)
    per_token = ("u", "delta", "B", "C", "z")
    halves = [
        {name: v[..., part] if name in per_token else v for name, v in m.items()}
        for part in (slice(17), slice(17, None))
    ]
    first, second = reversed(halves) if reverse else halves
    y1, state = scan(**first, **options)
    y2, end = scan(**second | {"initial_state": state}, **options)
    joined = torch.cat([y2, y1] if reverse else [y1, y2], dim=-1)
    torch.testing.assert_close(joined, y)
    torch.testing.assert_close(end, last)


LAYOUTS = {
    "transposed": lambda m: m.transpose(-1, -2).contiguous().transpose(-1, -2),
    "padded-rows": lambda m: torch.cat([m, m], dim=-1)[..., : m.shape[-1]],
    "every-second": lambda m: m.repeat_interleave(2, dim=-1)[..., ::2],
    "batch-last": lambda m: m.movedim(-2, 0).contiguous().movedim(0, -2),
}


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [one_way_inputs, two_way_inputs], ids=["one-way", "two-way"])
def test_any_strides_give_the_same(backend, layout, make):
    m = make(2, 19, 6, 4)
    views = {k: LAYOUTS[layout](v) if v.dim() > 1 else v for k, v in m.items()}
    assert not views["u"].is_contiguous()
    got, expected = (run_scan_of(v, backend) for v in (views, m))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=name)


def run_scan_of(views, backend):
    leaves = {name: v.detach().requires_grad_() for name, v in views.items()}  # keeps the strides
    return run_on_leaves(leaves, leaves, backend, delta_softplus=True)


@each_backend
def test_expanded_inputs_get_summed_gradients(backend):
    m = two_way_inputs(3, 7, 4, 2)
    leaves = {name: v.clone().requires_grad_() for name, v in m.items()}
    leaves["u"] = m["u"][:, :1].clone().requires_grad_()
    views = leaves | {"u": leaves["u"].expand(2, 3, 7, 4)}
    got = run_on_leaves(leaves, views, backend)
    whole = run_scan(m | {"u": views["u"].detach()}, backend)
    torch.testing.assert_close(got["d_u"], whole["d_u"].sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


@each_fast_backend
def test_inputs_are_left_alone_and_backward_can_run_twice(backend):
    m = two_way_inputs(2, 40, 6, 4)
    leaves = {name: v.clone().requires_grad_() for name, v in m.items()}
    out = bi_selective_scan(**leaves, backend=backend)
    first, second = (
        torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True) for _ in "12"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(leaves[name], m[name]) for name in m)


@each_fast_backend
def test_two_runs_are_bitwise_equal_on_any_number_of_threads(backend):
    m = two_way_inputs(3, 50, 130, 16)
    one = run_scan(m, backend)
    assert all(torch.equal(v, one[name]) for name, v in run_scan(m, backend).items())
    if backend == "numba":
        torch.set_num_threads(2)
        try:
            two = run_scan(m, backend)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(v, one[name]) for name, v in two.items())


@each_fast_backend
@pytest.mark.parametrize("make", [one_way_inputs, two_way_inputs], ids=["one-way", "two-way"])
def test_no_grad_and_grad_give_the_same_values(backend, make):
    m = make(2, 40, 6, 4)
    with torch.no_grad():
        plain = (bi_selective_scan if m["u"].dim() == 4 else scan)(
            **m, delta_softplus=True, backend=backend
        )
    torch.testing.assert_close(plain, run_scan(m, backend, delta_softplus=True)["y"])


@each_fast_backend
@pytest.mark.parametrize("make", [one_way_inputs, two_way_inputs], ids=["one-way", "two-way"])
def test_double_backward_is_refused_with_a_reason(backend, make):
    m = {name: v.requires_grad_() for name, v in make(1, 4, 2, 2).items()}
    out = (bi_selective_scan if m["u"].dim() == 4 else scan)(**m, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), m["u"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)once|double backward|twice"):
        grad.sum().backward()


def test_reference_differentiates_twice():
    m = one_way_inputs(1, 3, 2, 2, dtype=torch.float64)
    u = m.pop("u").requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: scan(x, **m, delta_softplus=True, backend="reference"), u
    )


@each_backend
@pytest.mark.parametrize("make", [one_way_inputs, two_way_inputs], ids=["one-way", "two-way"])
def test_autocast_keeps_the_recurrence_exact(backend, make):
    """Under autocast the inputs come in bfloat16, but nothing inside may be rounded to it."""
    m = make(2, 63, 8, 4)
    for name in ("u", "delta", "z"):
        m[name] = m[name].bfloat16()
    expected = run_scan(m, backend, delta_softplus=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_scan(m, backend, delta_softplus=True)
    assert got["y"].dtype == torch.bfloat16
    assert_close(got, expected, 1e-6, 1e-6)


@each_backend
@pytest.mark.parametrize("make", [one_way_inputs, two_way_inputs], ids=["one-way", "two-way"])
def test_compiles_in_one_graph(backend, make):
    m = make(2, 3, 3, 2)
    call = bi_selective_scan if m["u"].dim() == 4 else scan
    leaves = {name: v.clone().requires_grad_() for name, v in m.items()}
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = compiled(**leaves, delta_softplus=True, backend=backend)
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    plain = call(**leaves, delta_softplus=True, backend=backend)
    torch.testing.assert_close(out, plain)
    for got, expected in zip(
        grads, torch.autograd.grad(plain.sum(), list(leaves.values())), strict=True
    ):
        torch.testing.assert_close(got, expected)


@each_fast_backend
def test_exports(backend):
    class Scan(torch.nn.Module):
        def forward(self, **m):
            return bi_selective_scan(**m, backend=backend)

    m = two_way_inputs(1, 4, 3, 2)
    exported = torch.export.export(Scan(), (), m).module()
    torch.testing.assert_close(exported(**m), bi_selective_scan(**m, backend=backend))


@each_fast_backend
@pytest.mark.parametrize("lengths", [(5, 1, 70), (40, 16, 1)], ids=["one-chunk", "more"])
def test_exports_for_any_number_of_tokens(backend, lengths):
    assert_exports_for_lengths(lengths, backend)


# --- hard numbers ----------------------------------------------------------------------------


@cache  # the loops take seconds; every backend is compared with the same
def eight_decades(length):
    """dt from 1e-8 to 1e3, A from -1e-4 to -1e4: inputs, float64 results, the plain loop's."""
    m = two_way_inputs(1, length, 6, 4, without=("delta_bias",))
    g = torch.Generator().manual_seed(1)
    m["delta"] = 10 ** (torch.rand(m["delta"].shape, generator=g) * 11 - 8)
    m["A"] = -(10 ** (torch.rand(m["A"].shape, generator=g) * 8 - 4))
    # In float64 the torch backend is held to 1e-12 above, and takes a tenth of the loop's time.
    exact = run_scan(as_double(m), "reference" if length < 100 else "torch", delta_softplus=False)
    return m, exact, run_scan(m, "reference", delta_softplus=False)


@each_fast_backend
@pytest.mark.parametrize("length", [50, 4000], ids=["l50", "l4000"])
def test_steps_and_decays_over_eight_decades(backend, length):
    """Rounding of decays near one adds up along the tokens in float32, in every implementation."""
    m, exact, plain = eight_decades(length)
    got = run_scan(m, backend, delta_softplus=False)
    for name in exact:
        limit = 2 * relative_error(plain[name], exact[name]) + 2e-5
        assert relative_error(got[name], exact[name]) <= limit, name


@each_fast_backend
@pytest.mark.parametrize("center", [-18.0, -11.0, -7.0, 0.0, 19.9, 25.0])
def test_softplus_is_exact_at_every_size(backend, center):
    """u, B, C = 1 from a zero state over one token: y is dt itself, once for each direction."""
    one = torch.ones(2, 1, 1, 64)
    delta = center + torch.linspace(-1, 1, 128).reshape(2, 1, 1, 64)
    delta.requires_grad_()
    n_one = torch.ones(2, 1, 1, 1)
    y = bi_selective_scan(one, delta, -torch.ones(2, 64, 1), n_one, n_one, backend=backend)
    dt = torch.log1p(delta.double().exp())
    torch.testing.assert_close(y[0, 0].double(), dt.sum(0)[0, 0], rtol=1e-6, atol=0)
    slope, exact_slope = (torch.autograd.grad(m.sum(), delta)[0] for m in (y, dt))
    torch.testing.assert_close(slope, exact_slope, rtol=2e-6, atol=0)


@each_fast_backend
def test_all_zero_inputs_give_zeros_and_finite_gradients(backend):
    m = {name: torch.zeros_like(v) for name, v in two_way_inputs(1, 20, 3, 4).items()}
    got = run_scan(m, backend)
    assert not got["y"].any()
    assert all(v.isfinite().all() for v in got.values())


@each_fast_backend
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_the_same_outputs_are_not_finite_as_in_float64(backend, name, value):
    m = two_way_inputs(2, 20, 5, 4)
    m[name].view(-1)[m[name].numel() // 3] = value
    expected = bi_selective_scan(**as_double(m), backend="reference").isfinite()
    got = bi_selective_scan(**m, backend=backend).isfinite()
    assert torch.equal(got, expected)


# --- dispatch --------------------------------------------------------------------------------


def test_the_call_in_the_readme_runs_as_it_stands():
    text = Path(dispatch.__file__).with_name("README.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert names["both"].shape == (2, 197, 384)
    assert names["one"].shape == (2, 384, 197)
    assert names["last"].shape == (2, 384, 16)


def test_auto_on_a_cpu_prefers_numba_then_torch():
    assert available_backends("cpu") == ["numba", "torch", "reference"]


def test_auto_logs_its_choice_once(caplog):
    backends._auto.cache_clear()
    m = two_way_inputs(1, 2, 2, 2)
    with caplog.at_level(logging.INFO, logger=backends.log.name):
        bi_selective_scan(**m)
        bi_selective_scan(**m)
    (record,) = [record for record in caplog.records if record.name == backends.log.name]
    assert available_backends("cpu")[0] in record.getMessage()


def test_the_environment_overrides_auto_but_not_a_name(monkeypatch):
    m = one_way_inputs(1, 2, 2, 2)
    monkeypatch.setenv("VIM_SSL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        scan(**m)
    scan(**m, backend="torch")
    calls = []
    monkeypatch.setenv("VIM_SSL_BACKEND", "reference")
    monkeypatch.setattr(
        "vim_ssl.kernels.selective_scan.reference.selective_scan",
        lambda *args, **options: calls.append(1),
    )
    scan(**m)
    assert calls


@pytest.mark.parametrize(
    ("backend", "message"),
    [("fast", r"Unknown backend 'fast'; choose one of auto, reference"), ("triton", "cuda")],
)
def test_a_backend_by_name_runs_or_raises(backend, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        bi_selective_scan(**two_way_inputs(1, 2, 2, 2), backend=backend)


def test_a_missing_package_is_named(monkeypatch):
    find_spec = backends.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda s: None if s == "numba" else find_spec(s))
    assert available_backends("cpu") == ["torch", "reference"]
    with pytest.raises(ValueError, match="pip install numba"):
        bi_selective_scan(**two_way_inputs(1, 2, 2, 2), backend="numba")


BAD_ONE_WAY = {
    "u-2d": ({"u": torch.zeros(2, 5)}, r"u has shape \(2, 5\)"),
    "delta": ({"delta": torch.zeros(2, 5, 8)}, r"delta has shape .*expected \(2, 5, 9\)"),
    "A": ({"A": -torch.ones(4, 4)}, r"A has shape \(4, 4\)"),
    "A-n": ({"A": -torch.ones(5, 65)}, "A has d_state 65; expected 1 to 64"),
    "B": ({"B": torch.zeros(2, 9, 4)}, "B has shape"),
    "C": ({"C": torch.zeros(2, 9, 4)}, "C has shape"),
    "groups": ({"B": torch.zeros(2, 3, 4, 9)}, "3 groups, which do not divide d = 5"),
    "D": ({"D": torch.zeros(4)}, "D has shape"),
    "z": ({"z": torch.zeros(2, 9, 5)}, "z has shape"),
    "delta_bias": ({"delta_bias": torch.zeros(1)}, "delta_bias has shape"),
    "initial_state": ({"initial_state": torch.zeros(2, 4, 5)}, "initial_state has shape"),
    "integers": ({"B": torch.zeros(2, 4, 9, dtype=torch.long)}, "B has dtype torch.int64"),
    "device": ({"C": torch.zeros(2, 4, 9, device="meta")}, "C is on meta but u is on cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ONE_WAY.values(), ids=BAD_ONE_WAY)
def test_one_way_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        scan(**one_way_inputs() | change)


BAD_TWO_WAY = {
    "u-3d": ({"u": torch.zeros(2, 9, 5)}, r"u has shape \(2, 9, 5\).*directions first"),
    "u-directions": ({"u": torch.zeros(3, 2, 9, 5)}, r"expected \(2, b, l, d\)"),
    "delta": ({"delta": torch.zeros(2, 2, 5, 9)}, "delta has shape"),
    "A": ({"A": -torch.ones(5, 4)}, "A has shape"),
    "B": ({"B": torch.zeros(2, 2, 4, 9)}, "B has shape"),
    "C": ({"C": torch.zeros(2, 2, 4, 9)}, "C has shape"),
    "D": ({"D": torch.zeros(5)}, "D has shape"),
    "z": ({"z": torch.zeros(2, 2, 9, 5)}, "z has shape"),
    "delta_bias": ({"delta_bias": torch.zeros(5)}, "delta_bias has shape"),
    "integers": ({"z": torch.zeros(2, 9, 5, dtype=torch.int32)}, "z has dtype torch.int32"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TWO_WAY.values(), ids=BAD_TWO_WAY)
def test_two_way_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        bi_selective_scan(**two_way_inputs() | change)


def test_values_are_checked_only_on_request(monkeypatch):
    growing = two_way_inputs(1, 3, 2, 2)
    growing["A"][0, 0, 0] = 0.1
    broken = two_way_inputs(1, 3, 2, 2)
    broken["delta"][0, 0, 0, 0] = math.nan
    monkeypatch.delenv("VIM_SSL_CHECK", raising=False)
    bi_selective_scan(**growing)
    bi_selective_scan(**broken)
    monkeypatch.setenv("VIM_SSL_CHECK", "1")
    with pytest.raises(ValueError, match="A has values that are not negative"):
        bi_selective_scan(**growing)
    with pytest.raises(ValueError, match="delta contains values that are not finite"):
        bi_selective_scan(**broken)
    bi_selective_scan(**two_way_inputs(1, 3, 2, 2))


def test_a_start_of_any_strides_compiles_in_the_torch_backend():
    m = one_way_inputs(1, 5, 3, 4)
    start = m.pop("initial_state").mT.contiguous().mT
    m["A"] = m["A"].mT.contiguous().mT

    def one_way(start, **m):
        return scan(**m, initial_state=start, return_last_state=True, backend="torch")

    m = {name: tensor.requires_grad_() for name, tensor in m.items()}
    out = torch.compile(one_way, fullgraph=True, backend="aot_eager")(start, **m)
    for got, expected in zip(out, one_way(start, **m), strict=True):
        torch.testing.assert_close(got, expected)
    (out[0].sum() + out[1].mT.contiguous().mT.sum()).backward()
    tests = ("test_schema", "test_faketensor")
    dt = torch.rand(1, 1, 5, 3)
    x, A, B = torch.randn_like(dt), -torch.rand(1, 4, 3).mT, torch.randn(1, 1, 5, 4)
    torch.library.opcheck(
        torch.ops.vim_ssl.torch_scan_forward,
        (dt, x, A, B, B.clone(), torch.randn(1, 1, 4, 3).mT, [False]), test_utils=tests,
    )  # fmt: skip


def test_value_checks_let_a_model_compile(monkeypatch):
    monkeypatch.setenv("VIM_SSL_CHECK", "1")
    m = two_way_inputs(1, 3, 2, 2)
    compiled = torch.compile(bi_selective_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**m), bi_selective_scan(**m))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_output(backend):
    out = bi_selective_scan(**two_way_inputs(2, 3, 2, 2) | {
        name: torch.zeros(2, 2, 0, 2) for name in ("u", "delta", "B", "C")
    } | {"z": torch.zeros(2, 0, 2)}, backend=backend)  # fmt: skip
    assert out.shape == (2, 0, 2)


@pytest.mark.parametrize("name", ["u", "A", "D"])
@each_fast_backend
def test_forward_mode_is_refused_with_a_reason(backend, name):
    """It would lose the tangent, or a part of it."""
    m = two_way_inputs(1, 3, 2, 2)
    with fwAD.dual_level():
        m[name] = fwAD.make_dual(m[name], torch.ones_like(m[name]))
        with pytest.raises(RuntimeError, match="VIM_SSL_BACKEND=reference"):
            bi_selective_scan(**m, backend=backend)


def test_forward_mode_of_the_reference_agrees_with_a_difference():
    m = two_way_inputs(1, 3, 2, 2, dtype=torch.float64)
    step = torch.randn_like(m["u"])
    ahead, behind = (
        bi_selective_scan(**m | {"u": m["u"] + 1e-6 * sign * step}, backend="reference")
        for sign in (1, -1)
    )
    with fwAD.dual_level():
        dual = fwAD.make_dual(m["u"], step)
        out = fwAD.unpack_dual(bi_selective_scan(**m | {"u": dual}, backend="reference"))
    torch.testing.assert_close(out.tangent, (ahead - behind) / 2e-6)
