"""What the two masked objectives see, predict and learn; the traps that only a scan has."""

import pytest
import torch
from timm.layers import build_sincos2d_pos_embed

from vim_ssl import VimEncoder
from vim_ssl.objectives.mae import MAE
from vim_ssl.objectives.masking import RandomMask, visible_ids
from vim_ssl.objectives.pixels import patchify, unpatchify
from vim_ssl.objectives.simmim import SimMIM


def make_encoder(**args) -> VimEncoder:
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 0} | args
    return VimEncoder(**args)


def make(objective: str, norm_pix_loss: bool = False, **args):
    if objective == "mae":
        return MAE(
            make_encoder(**args), decoder_dim=16, decoder_depth=1, norm_pix_loss=norm_pix_loss
        )
    return SimMIM(make_encoder(**args, use_mask_token=True), norm_pix_loss=norm_pix_loss)


def make_batch(objective, b: int = 3, size: tuple[int, int] = (16, 16), ratio: float = 0.5):
    draw = RandomMask(objective.encoder.grid(*size), ratio)
    return {
        "image": torch.randn(b, objective.encoder.in_chans, *size),
        "mask": torch.stack([draw() for _ in range(b)]),
    }


def hide(images: torch.Tensor, mask: torch.Tensor, patch: int = 4) -> torch.Tensor:
    """(b, h, w) bool of the pixels under a mask, without `unpatchify`."""
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    grid = mask.view(-1, rows, columns)
    return grid.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


both = pytest.mark.parametrize("objective", ["mae", "simmim"])


# ------------------------------------------------------------------ patches and pixels


@pytest.mark.parametrize("channels", [1, 3, 5], ids="{}ch".format)
@pytest.mark.parametrize("size", [(4, 6), (6, 2), (8, 8)], ids=str)
def test_unpatchify_undoes_patchify(channels, size):
    images = torch.randn(2, channels, *size)
    patches = patchify(images, 2)
    assert patches.shape == (2, size[0] * size[1] // 4, 4 * channels)
    assert torch.equal(unpatchify(patches, 2, size), images)


def test_patches_come_in_raster_order_and_their_pixels_row_by_row_with_channels_last():
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    for number, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        tile = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patches[:, number], tile.permute(0, 2, 3, 1).flatten(1))


@both
def test_patch_numbers_of_pixels_and_tokens_agree(objective):
    """The token of patch i is the one that changes with the pixels of patch i."""
    encoder = make(objective, img_size=(8, 12)).encoder
    images = torch.randn(1, 3, 8, 12)
    for i in range(6):
        patches = patchify(images, 4)
        patches[:, i] += 1
        moved = encoder.embed(unpatchify(patches, 4, (8, 12))) - encoder.embed(images)
        assert moved.abs().sum(-1).nonzero()[:, 1].tolist() == [i]


# ------------------------------------------------------------------ what is seen


@both
def test_hidden_pixels_do_not_reach_the_prediction(objective):
    model = make(objective).eval()
    batch = make_batch(model)
    hidden = hide(batch["image"], batch["mask"])[:, None]
    other = torch.where(hidden, torch.randn_like(batch["image"]), batch["image"])
    with torch.no_grad():
        before = model.predict(batch["image"], batch["mask"])
        after = model.predict(other, batch["mask"])
        shown = model.predict(batch["image"] + ~hidden, batch["mask"])  # visible pixels do count
        assert model(batch).loss_sum != model(batch | {"image": other}).loss_sum
    assert torch.equal(before, after)
    assert not torch.allclose(before, shown)


def test_the_encoder_of_mae_runs_over_the_visible_patches_in_raster_order():
    """The sequence that enters the first block, token by token, class token in the middle of what
    is visible and with the position of its own slot."""
    model = make("mae")
    encoder, entered = model.encoder, []
    torch.nn.init.normal_(encoder.pos_embed)
    encoder.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    batch = make_batch(model, b=4, ratio=0.75)
    model(batch)
    (sequence,) = entered
    assert sequence.shape == (4, 4 + 1, 16)
    tokens = encoder.embed(batch["image"])
    cls = (encoder.cls_token + encoder.pos_embed[:, 8:9])[0, 0]  # row 16 // 2 of 16 + 1
    for sample in range(4):
        visible = [i for i in range(16) if not batch["mask"][sample, i]]
        torch.testing.assert_close(sequence[sample, [0, 1, 3, 4]], tokens[sample, visible])
        torch.testing.assert_close(sequence[sample, 2], cls)


def test_the_order_is_given_up_only_when_asked():
    """`keep_order=False` reads the same patches, shuffled in every image in its own way."""
    model = MAE(make_encoder(), decoder_dim=16, decoder_depth=1, keep_order=False)
    read = []
    forward_visible = model.encoder.forward_visible

    def spy(images, ids_keep):
        read.append(ids_keep)
        return forward_visible(images, ids_keep)

    model.encoder.forward_visible = spy
    batch = make_batch(model, b=8)
    batch["mask"] = batch["mask"][:1].expand(8, -1)
    assert torch.isfinite(model(batch).loss_sum)
    (ids,) = read
    assert torch.equal(ids.sort(1).values, visible_ids(batch["mask"]))
    assert len(ids.unique(dim=0)) > 6


def test_the_order_of_the_visible_patches_matters_to_a_scan():
    """Why it is worth a test: attention would give the same features for any order."""
    encoder = make_encoder().eval()
    tokens = encoder.embed(torch.randn(1, 3, 16, 16))
    keep = torch.tensor([[1, 4, 6, 11]])
    swapped = keep[:, [2, 0, 3, 1]]
    ordered = encoder.forward_tokens(tokens, ids_keep=keep)
    shuffled = encoder.forward_tokens(tokens, ids_keep=swapped)
    patches, again = (encoder.split_tokens(x)[0] for x in (ordered, shuffled))
    assert not torch.allclose(patches[:, [2, 0, 3, 1]], again, atol=1e-3)


def test_the_decoder_puts_every_visible_patch_back_in_its_place():
    model = make("mae")
    entered = []
    model.decoder_layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    batch = make_batch(model)
    seen = model.encoder.forward_tokens(
        model.encoder.embed(batch["image"]), ids_keep=visible_ids(batch["mask"])
    )
    content = model.decoder_embed(model.encoder.split_tokens(seen)[0])
    model(batch)
    slots = entered[0] - build_sincos2d_pos_embed([4, 4], dim=16)
    for sample in range(3):
        mask = batch["mask"][sample]
        torch.testing.assert_close(slots[sample, ~mask], content[sample])
        torch.testing.assert_close(slots[sample, mask], model.mask_token[0].expand(8, -1))


def test_the_decoder_gives_every_patch_of_a_wide_image_its_own_position():
    """Rows and columns have separate halves: what a step to the right adds is the same in every
    row, what a step down adds in every column."""
    model, entered = make("mae"), []
    model.decoder_layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    torch.nn.init.zeros_(model.decoder_embed.weight)
    torch.nn.init.zeros_(model.decoder_embed.bias)
    torch.nn.init.zeros_(model.mask_token)
    model(make_batch(model, size=(8, 24)))
    grid = entered[0][0].unflatten(0, (2, 6))
    right, down = grid[:, 1:] - grid[:, :-1], grid[1:] - grid[:-1]
    torch.testing.assert_close(right, right[:1].expand_as(right))
    torch.testing.assert_close(down, down[:, :1].expand_as(down))
    assert len(grid.flatten(0, 1).round(decimals=4).unique(dim=0)) == 12


@both
def test_samples_of_a_batch_do_not_see_each_other(objective):
    model = make(objective).eval()
    batch = make_batch(model)
    whole = model.predict(batch["image"], batch["mask"])
    alone = model.predict(batch["image"][1:2], batch["mask"][1:2])
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ targets and loss


def fix_prediction(model, monkeypatch, value: torch.Tensor) -> None:
    monkeypatch.setattr(model, "predict", lambda images, mask: value)


@both
def test_only_hidden_patches_count(objective, monkeypatch):
    model = make(objective)
    batch = make_batch(model)
    target = patchify(batch["image"], 4)
    hidden = batch["mask"][..., None]
    fix_prediction(model, monkeypatch, torch.where(hidden, target, target + 7))
    assert model(batch).loss_sum == 0
    fix_prediction(model, monkeypatch, torch.where(hidden, target + 7, target))
    assert model(batch).loss_sum == pytest.approx(3 * (49 if objective == "mae" else 7), rel=1e-5)


def test_the_loss_of_mae_is_the_mean_square_over_hidden_patches(monkeypatch):
    model = make("mae", norm_pix_loss=True)
    batch = make_batch(model)
    prediction = torch.randn(3, 16, 48)
    fix_prediction(model, monkeypatch, prediction)
    total = 0.0
    for sample in range(3):
        for i in batch["mask"][sample].nonzero()[:, 0].tolist():
            row, column = divmod(i, 4)
            tile = batch["image"][sample, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            t = tile.permute(1, 2, 0).flatten().double()
            mean = t.sum() / 48
            variance = ((t - mean) ** 2).sum() / 47  # unbiased, as MAE has it
            t = (t - mean) / (variance + 1e-6) ** 0.5
            total += ((prediction[sample, i].double() - t) ** 2).mean().item()
    out = model(batch)
    hidden_patches = int(batch["mask"].sum()) / 3
    assert out.weight == 3
    assert out.loss_sum.item() / out.weight == pytest.approx(total / 3 / hidden_patches, rel=1e-5)


def test_the_loss_of_simmim_is_the_mean_distance_over_hidden_pixels(monkeypatch):
    model = make("simmim")
    batch = make_batch(model)
    prediction = torch.randn(3, 16, 48)
    fix_prediction(model, monkeypatch, prediction)
    hidden = hide(batch["image"], batch["mask"])[:, None]  # one channel, as in SimMIM's code
    distance = (unpatchify(prediction, 4, (16, 16)) - batch["image"]).abs()
    expected = (distance * hidden).sum() / hidden.sum() / 3
    out = model(batch)
    assert out.loss_sum.item() / out.weight == pytest.approx(expected.item(), rel=1e-5)


@both
def test_pixel_mse_is_told_in_the_pixels_own_scale(objective, monkeypatch):
    """A prediction that is right in normalised pixels has no error, however loud the patch."""
    model = make(objective, norm_pix_loss=True)
    batch = make_batch(model)
    batch["image"] = batch["image"] * 5 + 2
    pixels = patchify(batch["image"], 4)
    mean, std = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    fix_prediction(model, monkeypatch, (pixels - mean) / std)
    assert model(batch).metrics["pixel_mse"] < 1e-6
    fix_prediction(model, monkeypatch, (pixels + 1 - mean) / std)
    assert model(batch).metrics["pixel_mse"].item() / 3 == pytest.approx(1, rel=1e-4)


@both
def test_constant_patches_have_a_finite_loss_and_gradient(objective):
    model = make(objective, norm_pix_loss=True)
    batch = make_batch(model)
    batch["image"] = torch.full_like(batch["image"], 0.3)
    loss = model(batch).loss_sum
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@both
def test_targets_and_loss_stay_in_float32_under_bf16_autocast(objective, monkeypatch):
    """Patches nearly constant around 3: in bf16 their normalised pixels would be noise."""
    model = make(objective, norm_pix_loss=True)
    batch = make_batch(model)
    batch["image"] = 3 + 1e-2 * batch["image"]
    fix_prediction(model, monkeypatch, torch.zeros(3, 16, 48, dtype=torch.bfloat16))
    exact = model(batch).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
    assert out.loss_sum.dtype == out.metrics["pixel_mse"].dtype == torch.float32
    torch.testing.assert_close(out.loss_sum, exact)
    assert exact.item() / 3 == pytest.approx(0.97 if objective == "mae" else 0.79, abs=0.1)


@both
def test_bf16_autocast_is_close_to_float32(objective):
    model = make(objective, norm_pix_loss=True)
    batch = make_batch(model)
    exact = model(batch).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch).loss_sum
    half.backward()
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ------------------------------------------------------------------ learning


VARIANTS = {
    "plain": {},
    "no-cls": {"cls_position": "none"},
    "two-cls": {"cls_position": "double"},
    "registers": {"num_registers": 2},
    "rope": {"rope": True, "use_pos_embed": False},
    "forward": {"directions": "forward"},
    "norm-after-scan": {"norm_after_scan": True},
}


@both
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(objective, variant):
    """A parameter without gradient would stop data-parallel training at its second step."""
    model = make(objective, **VARIANTS[variant])
    model(make_batch(model)).loss_sum.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@both
def test_no_parameter_goes_without_gradient_under_drop_path(objective):
    model = make(objective, drop_path_rate=0.99).train()
    model(make_batch(model)).loss_sum.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@both
@pytest.mark.parametrize("channels", [1, 3, 5], ids="{}ch".format)
@pytest.mark.parametrize("size", [(16, 16), (8, 20)], ids=str)
def test_any_channels_and_any_aspect(objective, channels, size):
    model = make(objective, in_chans=channels)
    batch = make_batch(model, b=2, size=size)
    patches = size[0] * size[1] // 16
    prediction = model.predict(batch["image"], batch["mask"])
    assert prediction.shape == (2, patches, 16 * channels)
    out = model(batch)
    assert torch.isfinite(out.loss_sum)
    images = out.images()
    assert images.shape == (2, min(channels, 3), size[0], 4 * size[1])
    assert 0 <= images.min() <= images.max() <= 1


@both
@pytest.mark.parametrize("norm_pix_loss", [False, True], ids=["pixels", "norm-pix"])
def test_the_loss_falls_on_one_batch(objective, norm_pix_loss):
    model = make(objective, norm_pix_loss, embed_dim=32).train()
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = torch.rand(4, 3, 1, 1) * 6
    batch = make_batch(model, b=4) | {"image": (rows / 5 + columns / 3 + phase).sin()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(batch).loss_sum / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ------------------------------------------------------------------ images


@both
@pytest.mark.parametrize("norm_pix_loss", [False, True], ids=["pixels", "norm-pix"])
def test_images_show_original_gaps_prediction_and_both(objective, norm_pix_loss, monkeypatch):
    model = make(objective, norm_pix_loss)
    batch = make_batch(model, b=10)
    truth = torch.rand(10, 3, 16, 16)
    mean, std = (torch.tensor(model.encoder.data_config[k])[:, None, None] for k in ("mean", "std"))
    batch["image"] = (truth - mean) / std
    pixels = patchify(batch["image"], 4)
    centre, spread = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    dark = patchify((truth * 0 + 0.25 - mean) / std, 4)
    fix_prediction(model, monkeypatch, (dark - centre) / spread if norm_pix_loss else dark)
    original, gaps, predicted, pasted = model(batch).images().chunk(4, dim=-1)
    assert len(original) == 8  # of ten samples
    hidden = hide(batch["image"], batch["mask"])[:8, None].expand(-1, 3, -1, -1)
    near = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(original, truth[:8], **near)
    torch.testing.assert_close(gaps[~hidden], truth[:8][~hidden], **near)
    assert gaps.masked_select(hidden).unique().numel() <= 3  # one grey, in at most three channels
    torch.testing.assert_close(predicted[hidden], torch.full_like(predicted[hidden], 0.25), **near)
    assert predicted[~hidden].unique().numel() == 1  # grey: visible patches are not predicted
    torch.testing.assert_close(pasted, torch.where(hidden, predicted, original), **near)


# ------------------------------------------------------------------ refused


@both
def test_overlapping_patches_are_refused(objective):
    with pytest.raises(ValueError, match="stride 2 overlap"):
        make(objective, stride=2)


@both
def test_a_head_is_refused(objective):
    with pytest.raises(ValueError, match=r"head of 7 classes.*num_classes=0"):
        make(objective, num_classes=7)


def test_mask_tokens_are_for_simmim():
    with pytest.raises(ValueError, match="use_mask_token=False"):
        MAE(make_encoder(use_mask_token=True))
    with pytest.raises(ValueError, match="use_mask_token=True"):
        SimMIM(make_encoder())


@pytest.mark.parametrize(
    ("argument", "message"),
    [({"decoder_depth": 0}, "use 1 or more"), ({"decoder_dim": 30}, "divisible by 4.*use 28")],
    ids=["no-blocks", "dim-30"],
)
def test_a_decoder_that_cannot_work_is_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        MAE(make_encoder(), **argument)


@both
@pytest.mark.parametrize(
    "mask",
    [torch.zeros(3, 9, dtype=torch.bool), torch.zeros(3, 16), torch.zeros(2, 16, dtype=torch.bool)],
    ids=["patches", "dtype", "batch"],
)
def test_a_mask_that_does_not_fit_is_refused(objective, mask):
    model = make(objective)
    with pytest.raises(ValueError, match=r"expected torch\.bool \(3, 16\), True = masked"):
        model(make_batch(model) | {"mask": mask})


@pytest.mark.parametrize("norm", [False, True], ids=["pixels", "normalised"])
@both
def test_the_loss_has_a_gradient_by_the_images(objective, norm):
    model = make(objective, norm_pix_loss=norm)
    batch = make_batch(model)
    batch["image"].requires_grad_()
    (gradient,) = torch.autograd.grad(model(batch).loss_sum, batch["image"])
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
