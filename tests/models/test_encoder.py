"""The encoder against an independent float64 NumPy one, and everything a user may ask of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_weights import golden_input, golden_state_dict
from numpy_encoder import encode, predict, resize_table
from PIL import Image
from processes import run
from torch import Tensor, nn

from vim_ssl.checkpoints.loading import save_encoder
from vim_ssl.kernels.selective_scan import available_backends
from vim_ssl.models.block import VimBlock
from vim_ssl.models.encoder import PRESETS, VimEncoder
from vim_ssl.models.video import VideoEncoder
from vim_ssl.tasks.dense import DenseConfig, fresh_encoder

# Small enough for a NumPy loop, yet with more than one block, channel group and grid row.
SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "d_state": 4,
    "num_classes": 5,
    "scan_backend": "torch",
}
BACKENDS = available_backends("cpu")


def make(*, seed: int = 0, **args) -> VimEncoder:
    """A small encoder in eval mode whose every parameter matters: tokens and positions of the
    size of the patches, norms and biases away from 1 and 0."""
    torch.manual_seed(seed)
    encoder = VimEncoder(**(SMALL | args))
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            tokens = p.ndim == 3 and "conv" not in name
            p += (0.7 if tokens else 0.15) * torch.randn_like(p)
    return encoder.eval()


def images(size: tuple[int, int] = (32, 32), chans: int = 3, b: int = 2) -> Tensor:
    return torch.randn(b, chans, *size, generator=torch.Generator().manual_seed(1))


def arrays(encoder: VimEncoder) -> dict[str, np.ndarray]:
    return {key: value.double().numpy() for key, value in encoder.state_dict().items()}


def relative_error(got: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(got.detach().double().numpy() - expected).max() / np.abs(expected).max())


def grid_tokens(encoder: VimEncoder, b: int = 2) -> Tensor:
    m = encoder.grid_size[0] * encoder.grid_size[1]
    return torch.randn(b, m, encoder.embed_dim, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------- against NumPy

VARIANTS = {
    "plain": {},
    "first": {"cls_position": "first"},
    "double": {"cls_position": "double"},
    "none": {"cls_position": "none"},
    "sum": {"divide_out": False},
    "norm-after-scan": {"norm_after_scan": True},
    "norm-after-scan-sum": {"norm_after_scan": True, "divide_out": False},
    "forward": {"directions": "forward"},
    "backward": {"directions": "backward"},
    "backward-norm-after-scan": {"directions": "backward", "norm_after_scan": True},
    "registers-1": {"num_registers": 1},
    "registers-5": {"num_registers": 5},
    "registers-double": {"num_registers": 3, "cls_position": "double"},
    "avg": {"global_pool": "avg"},
    "double-avg": {"global_pool": "avg", "cls_position": "double"},
    "token+avg": {"global_pool": "token+avg"},
    "double-token+avg": {"global_pool": "token+avg", "cls_position": "double"},
    "max": {"global_pool": "max"},
    "max-none": {"global_pool": "max", "cls_position": "none"},
    "max-logits": {"global_pool": "max-logits", "cls_position": "none"},
    "max-logits-no-head": {"global_pool": "max-logits", "num_classes": 0},
    "layer": {"directions": "layer", "depth": 4},
    "layer-rope-registers": {
        "directions": "layer",
        "depth": 4,
        "rope": True,
        "num_registers": 2,
        "norm_after_scan": True,
    },
    "shared-conv": {"shared_conv": True, "divide_out": False},
    "shared-conv-mean": {"shared_conv": True},
    "shared-conv-norm-after-scan": {"shared_conv": True, "norm_after_scan": True},
    "stride": {"stride": 4},
    "stride-none": {"stride": 4, "cls_position": "none"},
    "no-positions": {"use_pos_embed": False},
    "no-head": {"num_classes": 0},
    "one-channel": {"in_chans": 1},
    "five-channels": {"in_chans": 5},
    "non-square": {"img_size": (24, 40)},
    "d_state-1": {"d_state": 1},
    "d_conv-2": {"d_conv": 2},
    "expand-1": {"expand": 1},
    "dt_rank-3": {"dt_rank": 3},
    "rope": {"rope": True},
    "rope-stride-registers": {"rope": True, "stride": 4, "num_registers": 2},
}
SIZES = [(32, 32), (32, 48), (56, 24), (16, 16), (8, 8)]


@pytest.mark.parametrize("size", [None, (40, 24)], ids=["own-size", "40x24"])
@pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_numpy_in_float32(args, size):
    encoder = make(**args)
    x = images(size or encoder.img_size, chans=encoder.in_chans)
    expected = predict(arrays(encoder), encoder.config, x.numpy())
    assert encoder(x).shape == expected.shape
    assert relative_error(encoder(x), expected) <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls_position", ["middle", "first", "double", "none"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_token_equals_numpy_at_every_size(size, cls_position, backend):
    encoder = make(cls_position=cls_position, scan_backend=backend)
    x = images(size)
    expected = encode(arrays(encoder), encoder.config, x.numpy())
    assert relative_error(encoder.forward_features(x), expected) <= 1e-4


BLOCKS = ("forward", "backward", "layer", "shared-conv", "norm-after-scan", "sum")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "args",
    [VARIANTS[name] for name in BLOCKS],
    ids=BLOCKS,
)
def test_every_backend_equals_numpy(args, backend):
    encoder = make(**args, scan_backend=backend)
    expected = predict(arrays(encoder), encoder.config, images().numpy())
    assert relative_error(encoder(images()), expected) <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)
def test_float64_equals_numpy(args, backend):
    encoder = make(**args, scan_backend=backend).double()
    x = images(encoder.img_size, chans=encoder.in_chans).double()
    expected = predict(arrays(encoder), encoder.config, x.numpy())
    assert encoder(x).dtype == torch.float64
    # timm computes the rotation's angles in float32.
    assert relative_error(encoder(x), expected) <= (1e-5 if encoder.rope else 1e-10)


@pytest.mark.parametrize("size", [(224, 224), (128, 192)], ids=["224", "128x192"])
def test_tiny_with_reference_weights_equals_numpy(size):
    encoder = VimEncoder(scan_backend="torch").eval()
    encoder.load_state_dict(
        golden_state_dict({k: list(v.shape) for k, v in encoder.state_dict().items()})
    )
    x = golden_input(size)[:1]
    expected = predict(arrays(encoder), encoder.config, x.numpy())
    with torch.no_grad():
        assert relative_error(encoder(x), expected) <= 1e-4


def test_a_block_exports_for_any_number_of_tokens():
    block, l = VimBlock(8, d_state=2), torch.export.Dim("l")
    tokens = torch.randn(2, 70, 8)
    exported = torch.export.export(block, (tokens, tokens), dynamic_shapes=({1: l}, {1: l}))
    for length in (1, 32, 70):
        some = tokens[:, :length]
        torch.testing.assert_close(exported.module()(some, some), block(some, some))


# ---------------------------------------------------------------- presets and construction


@pytest.mark.parametrize("name", PRESETS)
def test_preset_constructs_with_its_sizes(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        encoder = VimEncoder(**preset)
    assert encoder.embed_dim == preset["embed_dim"]
    assert len(encoder.layers) == preset["depth"]
    assert encoder.in_chans == preset.get("in_chans", 3)
    assert encoder.num_classes == 1000
    assert VimEncoder(**encoder.config | {"depth": 1}).config == encoder.config | {"depth": 1}


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_forward_pass_on_the_meta_device_tells_the_shape(backend):
    with torch.device("meta"):
        encoder = VimEncoder(**SMALL | {"scan_backend": backend})
        assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "args", "count"),
    [
        ("vim_tiny_patch16_224", {}, 7_148_008),
        ("vim_tiny_patch16_224", {"img_size": 384}, 7_220_968),
        ("vim_tiny_patch16_stride8_224", {}, 7_250_344),
        ("vim_small_patch16_224", {}, 25_796_584),
        ("vim_base_patch16_224", {}, 97_598_440),
    ],
    ids=["tiny", "tiny-384", "tiny-stride8", "small", "base"],
)
def test_parameter_count_is_the_published_one(name, args, count):
    with torch.device("meta"):
        encoder = VimEncoder(**(PRESETS[name] | args))
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert len(encoder.state_dict()) == 415


@pytest.mark.parametrize("suffix", ["", "_b"], ids=["forward", "backward"])
def test_both_directions_start_alike(suffix):
    torch.manual_seed(0)
    encoder = VimEncoder(**SMALL | {"embed_dim": 96, "d_state": 16})
    for layer in encoder.layers:
        mixer = layer.mixer
        dt_proj = getattr(mixer, f"dt_proj{suffix}")
        dt = F.softplus(dt_proj.bias)
        assert dt.min() >= 1e-4
        assert dt.max() <= 0.1 * (1 + 1e-5)
        # Log-uniform in [1e-3, 1e-1]: the geometric mean is near 1e-2.
        assert 0.007 < dt.log().mean().exp() < 0.014
        bound = mixer.dt_rank**-0.5
        assert 0.95 * bound < dt_proj.weight.abs().max() <= bound
        a_log = getattr(mixer, "A_b_log" if suffix else "A_log")
        torch.testing.assert_close(a_log, torch.arange(1.0, 17).log().expand_as(a_log))
        assert (getattr(mixer, f"D{suffix}") == 1).all()
    assert not torch.equal(mixer.dt_proj.bias, mixer.dt_proj_b.bias)


def test_out_proj_starts_smaller_in_a_deeper_encoder():
    bounds = {}
    for depth in (1, 4):
        torch.manual_seed(0)
        encoder = VimEncoder(**SMALL | {"depth": depth})
        bounds[depth] = encoder.layers[0].mixer.out_proj.weight.abs().max()
    torch.testing.assert_close(bounds[4], bounds[1] / 2)


# ---------------------------------------------------------------- any size, each patch its place


@pytest.mark.parametrize(
    ("args", "size", "grid"),
    [
        ({"patch_size": 16, "img_size": 224}, (384, 256), (24, 16)),
        ({"patch_size": 16, "img_size": 224, "stride": 8}, (224, 224), (27, 27)),
        ({"patch_size": 16, "img_size": 224, "stride": 8}, (384, 256), (47, 31)),
        ({}, (8, 80), (1, 10)),
    ],
    ids=["384x256", "stride8", "stride8-384x256", "one-row"],
)
def test_grid_of_any_size_and_aspect(args, size, grid):
    encoder = make(**args, depth=1, num_classes=0)
    assert encoder.grid(*size) == grid
    x = images(size, b=1)
    assert encoder.embed(x).shape == (1, grid[0] * grid[1], 24)
    assert encoder.forward_features(x).shape == (1, grid[0] * grid[1] + 1, 24)
    (feature_map,) = encoder.forward_intermediates(x, indices=1, intermediates_only=True)
    assert feature_map.shape == (1, 24, *grid)


@pytest.mark.parametrize("cls_position", ["middle", "first", "double", "none"])
@pytest.mark.parametrize(
    "size",
    [(384, 256), (224, 224), (96, 160), (512, 512), (1024, 1024), (512, 1024)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
def test_every_patch_gets_its_own_resampled_position(size, cls_position):
    encoder = make(patch_size=16, img_size=224, cls_position=cls_position)
    x, grid = images(size, b=1), (size[0] // 16, size[1] // 16)
    got = (encoder.embed(x) - encoder.patch_embed(x))[0].double().detach().numpy()

    table = encoder.pos_embed[0].double().detach().numpy()
    own_rows = {"middle": [98], "first": [0], "double": [0, 197], "none": []}[cls_position]
    patches = np.delete(table, own_rows, axis=0)
    np.testing.assert_allclose(got, resize_table(patches, (14, 14), grid), atol=2e-5)

    # What treating the class token's row as a prefix gives: half of the patches are one off.
    if cls_position == "middle":
        shifted = resize_table(table[1:], (14, 14), grid)
        wrong = np.abs(got - shifted).max(1) > 0.1
        m = grid[0] * grid[1]
        assert wrong[: m // 3].all()
        if size == (224, 224):
            assert wrong[:98].all()
            assert not wrong[98:].any()


@pytest.mark.parametrize("size", [(32, 32), (56, 40)], ids=["own-size", "56x40"])
@pytest.mark.parametrize("cls_position", ["middle", "first", "double"])
def test_class_token_keeps_its_own_row(size, cls_position, monkeypatch):
    """Seen at the input of the first block."""
    encoder = make(cls_position=cls_position)
    seen = first_block_input(encoder, monkeypatch)
    encoder(images(size))
    m = encoder.grid(*size)[0] * encoder.grid(*size)[1]
    slots, rows = {
        "middle": ([m // 2], [8]),
        "first": ([0], [0]),
        "double": ([0, m + 1], [0, 17]),
    }[cls_position]
    for slot, row, name in zip(slots, rows, encoder.cls_names, strict=True):
        expected = encoder.get_parameter(name)[0, 0] + encoder.pos_embed[0, row]
        torch.testing.assert_close(seen[0][0, slot], expected)


def test_an_encoder_that_dense_training_loads_has_them_too(tmp_path):
    stored = make(patch_size=16, img_size=224, depth=1)
    save_encoder(stored, tmp_path)
    encoder = fresh_encoder(DenseConfig(warmup_epochs=0), str(tmp_path), 1024, {})
    x = images((1024, 1024), b=1)
    got = (encoder.embed(x) - encoder.patch_embed(x))[0].double().detach().numpy()
    patches = np.delete(stored.pos_embed[0].double().detach().numpy(), 98, axis=0)
    np.testing.assert_allclose(got, resize_table(patches, (14, 14), (64, 64)), atol=2e-5)


def test_same_number_of_patches_on_another_grid_is_resampled():
    """A 2x8 table on a 4x4 grid: equal counts are not equal places."""
    encoder = make(img_size=(16, 64), cls_position="none")
    x = images((32, 32))
    got = (encoder.embed(x) - encoder.patch_embed(x))[0].double().detach().numpy()
    table = encoder.pos_embed[0].double().detach().numpy()
    np.testing.assert_allclose(got, resize_table(table, (2, 8), (4, 4)), atol=2e-5)


def first_block_input(encoder: VimEncoder, monkeypatch) -> list[Tensor]:
    """Record what the first block is given."""
    seen = []
    forward = encoder.layers[0].forward

    def record(hidden, *args):
        seen.append(hidden)
        return forward(hidden, *args)

    monkeypatch.setattr(encoder.layers[0], "forward", record)
    return seen


# ---------------------------------------------------------------- forward_tokens

IDS = torch.tensor([[1, 2, 5, 9, 14], [0, 3, 4, 13, 15]])


@pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("cls_position", ["middle", "first", "double", "none"])
def test_ids_keep_equals_numpy(cls_position, rope):
    encoder = make(cls_position=cls_position, num_registers=2, rope=rope)
    expected = encode(arrays(encoder), encoder.config, images().numpy(), ids_keep=IDS.numpy())
    visible, _ = encoder.forward_visible(images(), IDS)
    for out in (encoder.forward_tokens(encoder.embed(images()), ids_keep=IDS), visible):
        assert out.shape == expected.shape
        assert relative_error(out, expected) <= 1e-4


KINDS = {
    "image": lambda: (make(), images()),
    "overlap": lambda: (make(stride=4, patch_size=8), images()),
    "clip": lambda: (
        VideoEncoder(**SMALL, frames=6, tubelet=2).eval(), torch.randn(2, 3, 6, 32, 32)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [None, IDS.flip(1)], ids=["all", "some"])
def test_embedded_patches_are_those_of_the_convolution(kind, ids):
    """In any order, with the same gradients; positions are those of the patches."""
    encoder, x = KINDS[kind]()
    encoder, x = encoder.double(), x.double().requires_grad_()
    out = encoder.embed(x, ids_keep=ids)
    expected = encoder.patch_embed.proj(x).flatten(2).mT
    expected = expected + (encoder.embed(x) - encoder.patch_embed(x))
    if ids is not None:
        expected = expected[torch.arange(2)[:, None], ids]
    weight = torch.randn_like(out)
    leaves = [x, *encoder.patch_embed.parameters(), encoder.pos_embed]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_visible_tokens_come_in_order_with_the_class_token_in_their_middle(monkeypatch):
    encoder = make()
    tokens = encoder.embed(images())
    seen = first_block_input(encoder, monkeypatch)
    encoder.forward_tokens(tokens, ids_keep=IDS)
    for i in range(2):
        torch.testing.assert_close(seen[0][i, [0, 1, 3, 4, 5]], tokens[i, IDS[i]])
        torch.testing.assert_close(seen[0][i, 2], encoder.cls_token[0, 0] + encoder.pos_embed[0, 8])


def test_keeping_all_tokens_is_keeping_none_out():
    encoder = make(rope=True)
    tokens = encoder.embed(images())
    all_ids = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(
        encoder.forward_tokens(tokens, ids_keep=all_ids), encoder.forward_tokens(tokens)
    )


def test_hidden_tokens_cannot_be_seen():
    encoder = make()
    tokens = encoder.embed(images())
    changed = tokens.clone()
    changed[0, [0, 3, 4, 15]] += 1  # image 0 keeps 1, 2, 5, 9, 14
    torch.testing.assert_close(
        encoder.forward_tokens(tokens, ids_keep=IDS), encoder.forward_tokens(changed, ids_keep=IDS)
    )


@pytest.mark.parametrize("use_mask_token", [True, False], ids=["mask-token", "no-mask-token"])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)], ids=["own-size", "24x48"])
def test_mask_equals_numpy(size, use_mask_token):
    encoder = make(use_mask_token=use_mask_token)
    grid = encoder.grid(*size)
    mask = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(3)) < 0.5
    out = encoder.forward_tokens(encoder.embed(images(size)), mask=mask, grid=grid)
    expected = encode(arrays(encoder), encoder.config, images(size).numpy(), mask=mask.numpy())
    assert relative_error(out, expected) <= 1e-4


def test_true_means_masked_and_positions_stay(monkeypatch):
    encoder = make(use_mask_token=True, cls_position="none")
    tokens = encoder.embed(images())
    seen = first_block_input(encoder, monkeypatch)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [2, 7]] = True
    encoder.forward_tokens(tokens, mask=mask)
    torch.testing.assert_close(seen[0][~mask], tokens[~mask])
    torch.testing.assert_close(
        seen[0][0, [2, 7]], encoder.mask_token[0] + encoder.pos_embed[0, [2, 7]]
    )


def test_pixels_of_a_masked_patch_do_not_leak():
    encoder = make(use_mask_token=True)
    x = images()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 5] = True  # row 1, column 1
    changed = x.clone()
    changed[:, :, 8:16, 8:16] += 3
    before, after = (encoder.forward_tokens(encoder.embed(i), mask=mask) for i in (x, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    visible = (encoder.forward_tokens(encoder.embed(i), mask=~mask) for i in (x, changed))
    assert not torch.equal(*visible)


def test_mask_then_ids_keep():
    """A mask speaks of all patches, whatever is read of them."""
    encoder = make(use_mask_token=True, rope=True)
    tokens = encoder.embed(images())
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 14:] = True
    out = encoder.forward_tokens(tokens, ids_keep=IDS, mask=mask)
    expected = encode(
        arrays(encoder), encoder.config, images().numpy(), ids_keep=IDS.numpy(), mask=mask.numpy()
    )
    assert relative_error(out, expected) <= 1e-4


@pytest.mark.parametrize("num_registers", [0, 3], ids=["", "registers-3"])
def test_indices_tap_the_residual_stream(num_registers):
    encoder = make(num_registers=num_registers)
    tokens = encoder.embed(images())
    out, taps = encoder.forward_tokens(tokens, indices=[0, -1])
    assert [tap.shape for tap in taps] == [out.shape] * 2
    torch.testing.assert_close(encoder.norm_f(taps[1])[0], out)
    one_block = make(num_registers=num_registers, depth=1)
    one_block.load_state_dict(encoder.state_dict(), strict=False)
    torch.testing.assert_close(one_block.norm_f(taps[0])[0], one_block.forward_tokens(tokens))
    torch.testing.assert_close(encoder.forward_tokens(tokens), out)


@pytest.mark.parametrize("directions", ["forward", "backward", "both"])
@pytest.mark.parametrize("norm_after_scan", [False, True], ids=["", "norm-after-scan"])
def test_directions_at_run_time_equal_numpy(directions, norm_after_scan):
    encoder = make(norm_after_scan=norm_after_scan)
    out = encoder.forward_tokens(encoder.embed(images()), directions=directions)
    expected = encode(arrays(encoder), encoder.config, images().numpy(), directions=directions)
    assert relative_error(out, expected) <= 1e-4


@pytest.mark.parametrize("built", ["both", "own"])
@pytest.mark.parametrize("directions", ["forward", "backward"])
def test_one_direction_is_causal(directions, built):
    encoder = make(directions=directions if built == "own" else "both", cls_position="none")
    tokens = grid_tokens(encoder)
    changed = tokens.clone()
    changed[:, 7] += 1
    before, after = (encoder.forward_tokens(t, directions=directions) for t in (tokens, changed))
    same = (before == after).all(-1).all(0)
    unseen = torch.arange(16) < 7 if directions == "forward" else torch.arange(16) > 7
    assert same.tolist() == unseen.tolist()


def test_both_directions_see_everything():
    encoder = make()
    tokens = grid_tokens(encoder)
    changed = tokens.clone()
    changed[:, 7] += 1
    before, after = (encoder.forward_tokens(t) for t in (tokens, changed))
    assert not (before == after).all(-1).any()


# ---------------------------------------------------------------- rope


def rotations(encoder: VimEncoder, monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Record the sin and cos that every block is given."""
    seen = []
    for layer in encoder.layers:

        def record(hidden, residual, directions, rotation, forward=layer.forward):
            seen.append(rotation)
            return forward(hidden, residual, directions, rotation)

        monkeypatch.setattr(layer, "forward", record)
    return seen


@pytest.mark.parametrize("stride", [8, 4], ids=["stride8", "stride4"])
@pytest.mark.parametrize("cls_position", ["middle", "double"])
def test_rope_turns_patches_by_row_and_column_and_nothing_else(stride, cls_position, monkeypatch):
    encoder = make(rope=True, stride=stride, cls_position=cls_position, num_registers=2)
    seen = rotations(encoder, monkeypatch)
    encoder(images((32, 48)))
    rows, columns = encoder.grid(32, 48)
    m = rows * columns
    patches = [("patch", p // columns, p % columns) for p in range(m)]
    for slot in {"middle": [m // 2], "double": [0, m + 1]}[cls_position]:
        patches.insert(slot, ("class", 0, 0))
    t = len(patches)
    for i in range(2):
        patches.insert((i + 1) * t // 3 + i, ("register", 0, 0))
    bands = 10000.0 ** -(torch.arange(6) / 6)
    row = torch.tensor([r for _, r, _ in patches])
    column = torch.tensor([c for _, _, c in patches])
    angles = torch.cat([row[:, None] * bands, column[:, None] * bands], 1).repeat_interleave(2, 1)
    assert len(seen) == 3
    for sin, cos in seen:
        torch.testing.assert_close(sin[0], angles.sin(), atol=1e-5, rtol=0)
        torch.testing.assert_close(cos[0], angles.cos(), atol=1e-5, rtol=0)


def test_a_kept_patch_turns_as_in_the_full_grid(monkeypatch):
    encoder = make(rope=True, cls_position="none")
    seen = rotations(encoder, monkeypatch)
    encoder.forward_tokens(grid_tokens(encoder))
    full = seen[0]
    seen.clear()
    encoder.forward_tokens(grid_tokens(encoder), ids_keep=IDS)
    for table, kept in zip(full, seen[0], strict=True):
        torch.testing.assert_close(kept, table[0][IDS])


def test_rope_changes_the_output():
    plain, rope = make(), make(rope=True)
    rope.load_state_dict(plain.state_dict())
    assert (plain(images()) - rope(images())).abs().max() > 1e-2


# ---------------------------------------------------------------- training


def test_drop_path_rates_and_places():
    """Block i drops its incoming hidden state at [0] + linspace(0, rate, depth); the last mixer's
    output is dropped at the full rate."""
    encoder = make(drop_path_rate=0.4, depth=5)
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in encoder.layers]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3])
    assert encoder.drop_path.drop_prob == pytest.approx(0.4)


def test_dropping_every_path_leaves_the_residual(monkeypatch):
    """At a rate near 1 nothing but the first two blocks' input reaches the norm."""
    encoder = make(drop_path_rate=0.4).train()
    for module in encoder.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 1 - 1e-9
    tokens = grid_tokens(encoder)
    out = encoder.forward_tokens(tokens)
    seen = first_block_input(encoder, monkeypatch)
    encoder.forward_tokens(tokens)
    # linspace(0, 0.4, 3) gives block 1 a rate of 0: its input, block 0's output, always stays.
    first, _ = encoder.layers[0](seen[0], None)
    torch.testing.assert_close(out, encoder.norm_f(first, seen[0])[0])


def test_drop_path_is_random_in_training_alone():
    encoder = make(drop_path_rate=0.5, depth=4)
    x = images(b=4)
    assert torch.equal(encoder(x), encoder(x))
    encoder.train()
    assert not torch.equal(encoder(x), encoder(x))
    torch.manual_seed(0)
    first = encoder(x)
    torch.manual_seed(0)
    assert torch.equal(first, encoder(x))


@pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_finite_gradient(args):
    encoder = make(**args).train()
    x = images((40, 24), chans=encoder.in_chans)
    tokens = encoder.forward_features(x)
    # All tokens: the first one alone has no past, so no use for A.
    loss = (tokens * torch.randn_like(tokens)).sum() + encoder.forward_head(tokens).square().sum()
    loss.backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_mask_token_gets_a_gradient():
    encoder = make(use_mask_token=True)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3] = True
    encoder.forward_tokens(encoder.embed(images()), mask=mask).square().sum().backward()
    assert encoder.mask_token.grad.abs().max() > 0


@pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
def test_grad_checkpointing_gives_equal_gradients(rope, monkeypatch):
    calls = []
    forward = VimBlock.forward
    monkeypatch.setattr(
        VimBlock, "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1]
    )
    encoder = make(drop_path_rate=0.3, rope=rope).train()
    gradients = []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        encoder.zero_grad()
        torch.manual_seed(0)
        calls.clear()
        encoder(images()).square().sum().backward()
        assert len(calls) == (6 if enable else 3)  # each block runs again in the backward pass
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    torch.testing.assert_close(*gradients)


def test_eval_is_deterministic_and_keeps_batch_items_apart():
    encoder = make(drop_path_rate=0.3)
    x = images(b=3)
    assert torch.equal(encoder(x), encoder(x))
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]))


@pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)
def test_bfloat16_autocast_is_finite_and_near(args):
    encoder = make(**args)
    x = images(encoder.img_size, chans=encoder.in_chans)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = encoder(x)
        (out.float() ** 2).sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    assert (out.float() - encoder(x)).abs().max() <= 0.1 * encoder(x).abs().max()


def test_residual_stream_is_float32_under_autocast():
    encoder = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, taps = encoder.forward_tokens(encoder.embed(images()), indices=[0, 2])
    assert [tap.dtype for tap in taps] == [torch.float32] * 2


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "size", "message"),
    [
        (
            {"patch_size": 16, "img_size": 224},
            (225, 224),
            r"^img_size 225 is not divisible by patch_size 16; use 224 or 240\.$",
        ),
        ({"patch_size": 16, "img_size": 224}, (224, 230), "230 .* use 224 or 240"),
        ({"patch_size": 16, "img_size": 224}, (8, 224), "8 .* use at least 16"),
        ({"patch_size": 16, "img_size": 224, "stride": 8}, (228, 224), "use 224 or 232"),
    ],
    ids=["225", "230", "too-small", "stride8"],
)
def test_images_that_do_not_fit_name_sizes_that_would(args, size, message):
    encoder = make(**args, depth=1)
    with pytest.raises(ValueError, match=message):
        encoder(images(size))


def test_constructor_checks_img_size_alike():
    message = r"^img_size 225 is not divisible by patch_size 16; use 224 or 240\.$"
    with pytest.raises(ValueError, match=message):
        VimEncoder(img_size=225, depth=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"cls_position": "last"}, "cls_position 'last' .*'middle'"),
        ({"directions": "up"}, "directions 'up' .*'forward'"),
        ({"global_pool": "min"}, "global_pool 'min' .*'token'"),
        ({"directions": "layer", "depth": 3}, "depth is 3; use an even one"),
        ({"directions": "layer", "depth": 4, "shared_conv": True}, "directions is 'layer'; use"),
        ({"directions": "forward", "shared_conv": True}, "directions is 'forward'; use"),
        ({"global_pool": "token", "cls_position": "none"}, "needs a class token; use 'avg'"),
        ({"global_pool": "token+avg", "cls_position": "none"}, "needs a class token; use 'avg'"),
        ({"rope": True, "embed_dim": 18}, "rope needs .* divisible by 4; embed_dim is 18"),
        ({"data_config": {"meen": (0.5,) * 3}}, "no 'meen'"),
        ({"data_config": {"mean": (0.5,)}}, "1 entries; in_chans is 3"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_constructor_errors(args, message):
    with pytest.raises(ValueError, match=message):
        VimEncoder(**SMALL | args)


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError, match="if_devide_out"):
        VimEncoder(**SMALL, if_devide_out=True)


@pytest.mark.parametrize("image", [Image.new("RGB", (64, 64)), np.zeros((64, 64, 3))], ids=type)
@pytest.mark.parametrize("call", ["__call__", "forward_intermediates", "embed"])
@pytest.mark.parametrize("kind", [VimEncoder, VideoEncoder])
def test_an_image_that_is_no_tensor_is_told_how_to_become_one(kind, call, image):
    encoder = kind(img_size=64, embed_dim=16, depth=1)
    with pytest.raises(TypeError, match=r"not \w+; .*vim_ssl\.create_transform\(encoder\)"):
        getattr(encoder, call)(image)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32)], ids=["channels", "no-batch"])
def test_wrong_image_shapes(shape):
    with pytest.raises(ValueError, match=r"expected \(b, 3, h, w\)"):
        make()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask": torch.zeros(2, 16)}, r"torch\.float32 .*True = masked"),
        ({"mask": torch.zeros(2, 15, dtype=torch.bool)}, r"\(2, 15\).*\(2, 16\)"),
        ({"directions": "up"}, "directions 'up'"),
        ({"indices": [3]}, r"indices \[3\] .* 3 blocks"),
        ({"indices": [-4]}, "out of range; the encoder has 3 blocks"),
        ({"ids_keep": torch.zeros(5, dtype=torch.long)}, r"ids_keep .*\(2, k\)"),
        ({"ids_keep": torch.zeros(3, 5, dtype=torch.long)}, r"ids_keep .*\(2, k\)"),
        ({"mask": torch.zeros(2, 16, dtype=torch.bool), "grid": (3, 5)}, "pass grid="),
    ],
    ids=[
        "float-mask", "short-mask", "directions", "indices", "negative-indices", "flat-ids",
        "other-batch-ids", "grid",
    ],
)  # fmt: skip
def test_forward_tokens_errors(kwargs, message):
    encoder = make()
    with pytest.raises(ValueError, match=message):
        encoder.forward_tokens(grid_tokens(encoder), **kwargs)


def test_a_direction_without_parameters_is_refused():
    encoder = make(directions="forward")
    for directions in ("backward", "both"):
        with pytest.raises(ValueError, match="only 'forward'"):
            encoder.forward_tokens(grid_tokens(encoder), directions=directions)


def test_reset_classifier_checks_global_pool_and_keeps_the_encoder():
    encoder = make(cls_position="none")
    with pytest.raises(ValueError, match="needs a class token"):
        encoder.reset_classifier(7, "token")
    assert encoder.num_classes == 5
    assert isinstance(encoder.get_classifier(), nn.Linear)


@pytest.mark.slow
def test_the_first_thing_a_process_does_may_be_compiled_whole():
    """Kernels are imported at their first use, which then is while torch.compile traces."""
    code = (
        "import torch, vim_ssl\n"
        "encoder = vim_ssl.load_encoder('vim_nano_patch4_28', depth=1, embed_dim=16)\n"
        "x = torch.ones(1, 1, 28, 28)\n"
        "got = torch.compile(encoder, fullgraph=True, backend='eager')(x)\n"
        "torch.testing.assert_close(got, encoder(x))\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("ids", [torch.zeros(3, 5, dtype=torch.long), torch.zeros(5).long()])
def test_indices_of_another_batch_are_refused(ids):
    for call in (
        lambda e, x: e.embed(x, ids_keep=ids),
        lambda e, x: e.forward_visible(x, ids),
        lambda e, x: e.forward_tokens(e.embed(x), ids_keep=ids),
    ):
        with pytest.raises(ValueError, match=r"ids_keep has shape .*; expected \(2, k\)"):
            call(make(), images())


@pytest.mark.parametrize("args", [{"padding": 2}, {"dilation": 2}, {"groups": 3}], ids=str)
def test_a_projection_that_does_more_than_cut_patches_is_a_convolution(args):
    encoder = make()
    encoder.patch_embed.proj = proj = torch.nn.Conv2d(3, 12, 8, 8, **args)
    assert torch.equal(encoder.patch_embed(images()), proj(images()).flatten(2).mT)
