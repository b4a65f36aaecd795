"""Feature distillation: what the student is asked for, and that its teacher teaches."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config

from vim_ssl import VimEncoder, load_encoder
from vim_ssl.objectives.distill import Distill
from vim_ssl.objectives.masking import RandomMask

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_classes": 0}


def student(**args) -> VimEncoder:
    torch.manual_seed(0)
    return VimEncoder(**ARGS | {"use_mask_token": True} | args)


def frozen(**args):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2} | args
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **args)


def batch_of(objective, b: int = 3) -> dict[str, torch.Tensor]:
    encoder = objective.encoder
    draw = RandomMask(encoder.grid_size, 0.5)
    images = torch.randn(b, encoder.in_chans, 16, 16)
    return {"image": images, "mask": torch.stack([draw() for _ in range(b)])}


teachers = pytest.mark.parametrize("teacher", [None, frozen], ids=["average", "frozen"])


@teachers
def test_hidden_pixels_reach_the_targets_only(teacher):
    model = Distill(student(), teacher and teacher()).eval()
    batch = batch_of(model)
    hidden = batch["mask"].view(-1, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    other = torch.where(hidden, torch.randn_like(batch["image"]), batch["image"])
    read = []
    model.head.register_forward_hook(lambda module, args, out: read.append(out))
    with torch.no_grad():
        model(batch), model(batch | {"image": other})
        targets = model.targets(batch["image"]), model.targets(other)
    assert torch.equal(*read)
    assert not torch.allclose(*targets)


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("where", ["masked", "all"])
def test_the_loss_is_what_it_says(loss, where):
    model = Distill(student(), loss=loss, where=where, layers=2).eval()
    batch = batch_of(model)
    with torch.no_grad():
        out = model(batch)
        encoder = model.encoder
        tokens = encoder.forward_tokens(encoder.embed(batch["image"]), mask=batch["mask"])
        predicted = model.head(encoder.split_tokens(tokens)[0])
        _, taps = model.average.forward_tokens(model.average.embed(batch["image"]), indices=[1, 2])
        target = sum(F.layer_norm(encoder.split_tokens(t)[0], (16,)) for t in taps) / 2
    chosen = batch["mask"] if where == "masked" else torch.ones_like(batch["mask"])
    if loss == "cosine":
        each = 1 - F.cosine_similarity(predicted, target, dim=-1)
    else:
        each = F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
    torch.testing.assert_close(out.loss_sum, each[chosen].mean() * 3)


def test_the_average_follows_the_student_slowly_and_is_part_of_the_state():
    model = Distill(student(), momentum=0.9)
    start = model.average.pos_embed.clone()
    with torch.no_grad():
        model.encoder.pos_embed.add_(1.0)
    for n in range(1, 101):
        model.after_step()
        if n == 1:  # a tenth of the way stays from before: 1 / (1 + 9)
            torch.testing.assert_close(model.average.pos_embed, start + 0.9)
    expected = 1.0
    for n in range(1, 101):
        expected *= min(0.9, n / (n + 9))
    torch.testing.assert_close(model.average.pos_embed, start + 1 - expected)
    again = Distill(student(), momentum=0.9)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.average.pos_embed, model.average.pos_embed)
    assert again.updates == 100


@teachers
def test_a_teacher_is_never_trained(teacher):
    model = Distill(student(drop_path_rate=0.5), teacher and teacher()).train()
    taught = model.average if teacher is None else model._frozen[0]
    assert not taught.training
    out = model(batch_of(model))
    out.loss_sum.backward()
    assert all(p.grad is None for p in taught.parameters())
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert out.metrics["target_std"] > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_frozen_teacher_sees_the_image_in_its_own_scale_size_and_channels(channels):
    """4 x 4 patches of 8 px: 32 px, and a mid-grey image is its own mid-grey."""
    teacher, shown = frozen(), []
    teacher.patch_embed.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    model = Distill(student(in_chans=channels), teacher)
    mean, std = (torch.tensor(model.encoder.data_config[k])[:, None, None] for k in ("mean", "std"))
    grey = (torch.full((2, channels, 16, 16), 0.5) - mean) / std
    assert model.targets(grey).shape == (2, 16, 24)
    config = resolve_model_data_config(teacher)
    expected = [(0.5 - m) / s for m, s in zip(config["mean"], config["std"], strict=True)]
    (images,) = shown
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images[0, :, 16, 16], torch.tensor(expected))
    assert "_frozen" not in " ".join(model.state_dict())


@pytest.mark.parametrize(("patch", "stride", "side"), [(8, 8, 32), (8, 4, 20), (8, 2, 14)])
def test_a_teacher_whose_patches_overlap_sees_images_that_give_the_students_grid(
    patch, stride, side
):
    teacher = load_encoder("vim_nano_patch8_64", depth=1, embed_dim=16, stride=stride)
    shown = []
    teacher.patch_embed.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    model = Distill(student(), teacher)  # 4 x 4 patches
    assert model.targets(torch.zeros(1, 3, 16, 16)).shape == (1, 16, 16)
    assert shown[0].shape[-2:] == (side, side)


def test_a_teacher_of_other_channels_is_refused():
    model = Distill(student(in_chans=4), frozen())
    with pytest.raises(ValueError, match="expects 3 channels, the student 4"):
        model.targets(torch.zeros(1, 4, 16, 16))


def test_distilling_lowers_the_loss():
    torch.manual_seed(1)
    model = Distill(student(), frozen(), loss="cosine")
    batch = batch_of(model, b=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(batch).loss_sum / 8
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("encoder", "args", "message"),
    [
        ({"use_mask_token": False}, {}, "use_mask_token=True"),
        ({"num_classes": 3}, {}, "num_classes=0"),
        ({}, {"loss": "l2"}, "cosine, smooth_l1"),
        ({}, {"where": "visible"}, "masked, all"),
        ({}, {"momentum": 1.0}, "momentum 1.0"),
        ({}, {"layers": 0}, "layers 0"),
    ],
    ids=lambda v: str(v),
)
def test_what_does_not_fit_is_refused(encoder, args, message):
    with pytest.raises(ValueError, match=message):
        Distill(student(**encoder), **args)


@pytest.mark.parametrize("teacher_chans", [1, 3])
def test_an_encoder_of_ours_teaches_with_images_as_it_knows_them(teacher_chans):
    """Its own mean and deviation, not ImageNet's; grey images in colour for one in colour."""
    data = {"mean": (0.2,) * teacher_chans, "std": (0.5,) * teacher_chans}
    teacher = VimEncoder(**ARGS | {"in_chans": teacher_chans, "data_config": data}).eval()
    own = {"mean": (0.1,), "std": (0.3,)}
    model = Distill(student(in_chans=1, data_config=own), teacher, layers=1)
    pixels = torch.rand(2, 1, 16, 16)
    shown = (pixels.expand(-1, teacher_chans, -1, -1) - 0.2) / 0.5
    (expected,) = teacher.forward_intermediates(shown, 1, output_fmt="NLC", intermediates_only=True)
    found = model.targets((pixels - 0.1) / 0.3)
    torch.testing.assert_close(found, F.layer_norm(expected, expected.shape[-1:]))
