"""The variants of the paper's ablations: pairs of blocks, a shared convolution, maximum readouts.

Values are compared with NumPy in `test_encoder.py`; here is what else an encoder does.
"""

import numpy as np
import pytest
import torch
from numpy_encoder import encode
from torch import Tensor

from vim_ssl.kernels.selective_scan.flops import flop_counter
from vim_ssl.models.encoder import VimEncoder

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 4, "d_state": 3,
         "num_classes": 5}  # fmt: skip
PAIRS, SHARED = {"directions": "layer"}, {"shared_conv": True, "divide_out": False}
BLOCKS = {"layer": PAIRS, "shared-conv": SHARED}
IDS = torch.tensor([[1, 4, 5, 9, 14], [0, 2, 3, 11, 15]])


def make(**args) -> VimEncoder:
    """A small encoder in eval mode, with every parameter away from its start value."""
    torch.manual_seed(0)
    encoder = VimEncoder(**SMALL | args).eval()
    with torch.no_grad():
        for p in encoder.parameters():
            p += 0.2 * torch.randn_like(p)
    return encoder


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def arrays(encoder: VimEncoder) -> dict[str, np.ndarray]:
    return {key: value.double().numpy() for key, value in encoder.state_dict().items()}


def relative_error(m: Tensor, expected: Tensor | np.ndarray) -> float:
    expected = torch.as_tensor(expected)
    return ((m.detach().double().cpu() - expected).norm() / expected.norm()).item()


def gradients(encoder: VimEncoder, x: Tensor) -> dict[str, Tensor]:
    tokens = encoder.forward_features(x)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
    loss = (tokens * weights.to(tokens)).sum() + encoder.forward_head(tokens).square().sum()
    names, leaves = zip(*encoder.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


GRADIENTS = {
    **BLOCKS, "shared-conv-norm": SHARED | {"norm_after_scan": True},
    "max-logits": {"global_pool": "max-logits"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "case"),
    [*(("torch", case) for case in GRADIENTS), *(("numba", case) for case in BLOCKS),
     *(("triton", case) for case in BLOCKS)],
)  # fmt: skip
def test_gradients_equal_the_reference_in_float64(backend, case, monkeypatch):
    pytest.importorskip(backend)
    monkeypatch.setenv("VIM_SSL_BACKEND", backend)
    # Without a GPU, triton's kernels are interpreted.
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    args = GRADIENTS[case]
    if backend == "triton":  # its interpreter is slow
        depth = 2 if case == "layer" else 1
        args = args | {"img_size": 16, "depth": depth, "cls_position": "none", "embed_dim": 8}
    encoder, exact = make(**args), make(**args, scan_backend="reference").double()
    x = images(encoder.img_size[0])
    expected = gradients(exact, x.double())
    for name, m in gradients(encoder.to(device), x.to(device)).items():
        assert relative_error(m, expected[name]) < 2e-5, name


@pytest.mark.parametrize("args", BLOCKS.values(), ids=BLOCKS)
def test_visible_patches_equal_numpy(args):
    encoder = make(**args)
    expected = encode(arrays(encoder), encoder.config, images().numpy(), ids_keep=IDS.numpy())
    tokens, _ = encoder.forward_visible(images(), IDS)
    assert relative_error(tokens, expected) < 1e-5


@pytest.mark.parametrize("directions", ["forward", "backward"])
def test_one_direction_at_run_time_of_a_shared_convolution(directions):
    encoder = make(**SHARED)
    out = encoder.forward_tokens(encoder.embed(images()), directions=directions)
    expected = encode(arrays(encoder), encoder.config, images().numpy(), directions=directions)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("directions", ["forward", "backward", "both"])
def test_pairs_have_no_other_directions(directions):
    encoder = make(**PAIRS)
    with pytest.raises(ValueError, match="has only 'layer'; its blocks have one direction each"):
        encoder.forward_tokens(encoder.embed(images()), directions=directions)


def test_the_residual_stream_doubles_in_every_pair():
    """As upstream: with all later outputs dropped, both blocks of a pair hand on its input."""
    encoder = make(**PAIRS, drop_path_rate=0.5, cls_position="none").train()
    for module in encoder.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 1 - 1e-9
    tokens = encoder.embed(images())
    _, taps = encoder.forward_tokens(tokens, indices=[1, 3])
    first = [block(tokens, None)[0] for block in encoder.layers[:2]]
    torch.testing.assert_close(taps[0], 2 * tokens + first[0] + first[1])
    second = [block.mixer(block.norm(2 * tokens)[0]) for block in encoder.layers[2:]]
    # Block 2 drops at a rate above 0, so it reads the residual stream alone.
    torch.testing.assert_close(taps[1], 4 * tokens + second[0] + second[1])


def test_a_tap_is_taken_after_the_whole_pair(monkeypatch):
    encoder, calls = make(**PAIRS), []
    for block in encoder.layers:
        monkeypatch.setattr(
            block, "forward", lambda *a, f=block.forward: (calls.append(1), f(*a))[1]
        )
    final, maps = encoder.forward_intermediates(images(), norm=True, output_fmt="NLC")
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=0)
    torch.testing.assert_close(encoder.split_tokens(final)[0], maps[3])
    calls.clear()
    early = encoder.forward_intermediates(
        images(), [0], norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    assert len(calls) == 2
    torch.testing.assert_close(early[0], maps[1])
    encoder.prune_intermediate_layers([0])
    assert encoder.config["depth"] == 2
    assert VimEncoder(**encoder.config).load_state_dict(encoder.state_dict())


@pytest.mark.parametrize("args", BLOCKS.values(), ids=BLOCKS)
def test_grad_checkpointing_gives_equal_gradients(args):
    encoder = make(**args, drop_path_rate=0.3).train()
    got = []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        got.append(gradients(encoder, images()))
    torch.testing.assert_close(*got)


@pytest.mark.parametrize("args", BLOCKS.values(), ids=BLOCKS)
def test_it_compiles_whole(args):
    encoder = make(**args, depth=2, global_pool="max-logits")
    with torch.no_grad():
        compiled = torch.compile(encoder, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images()), encoder(images()))


def test_operations_are_counted(monkeypatch):
    """Pairs cost what one direction costs. A shared convolution saves the second projections, not
    the second scan."""
    monkeypatch.setenv("VIM_SSL_BACKEND", "torch")

    def counts(**args) -> tuple[int, int]:
        encoder = make(**args)
        with torch.no_grad(), flop_counter(display=False) as counter:
            encoder(images())
        totals = counter.get_flop_counts()["Global"]
        scans = sum(n for name, n in totals.items() if "scan" in str(name))
        projections = sum(n for name, n in totals.items() if "mm" in str(name))
        return scans, projections

    one, two = counts(directions="forward"), counts()
    assert counts(**PAIRS) == one
    assert counts(**SHARED) == (2 * one[0], one[1])
    assert two[0] == 2 * one[0]
    assert two[1] > one[1]


@pytest.mark.parametrize("args", BLOCKS.values(), ids=BLOCKS)
def test_a_layer_that_is_hooked_acts(args):
    """As if its weights were scaled, in every direction that it serves."""
    hooked, scaled = make(**args), make(**args)
    for encoder in (hooked, scaled):
        for name, module in encoder.named_modules():
            if not name.endswith(("x_proj", "x_proj_b")):
                continue
            if encoder is hooked:
                module.register_forward_hook(lambda m, inputs, out: 1.5 * out)
            else:
                module.weight.data *= 1.5
    with torch.no_grad():
        torch.testing.assert_close(hooked(images()), scaled(images()))
        assert (hooked(images()) - make(**args)(images())).abs().max() > 1e-3


def test_the_maximum_of_logits_is_not_that_of_features():
    features, logits = make(global_pool="max"), make(global_pool="max-logits")
    patches = logits.split_tokens(logits.forward_features(images()))[0]
    torch.testing.assert_close(logits(images()), logits.head(patches).amax(1))
    torch.testing.assert_close(features(images()), features.head(patches.amax(1)))
    assert (features(images()) - logits(images())).abs().max() > 1e-3
    for encoder in (features, logits):
        pooled = encoder.forward_head(encoder.forward_features(images()), pre_logits=True)
        torch.testing.assert_close(pooled, patches.amax(1))
