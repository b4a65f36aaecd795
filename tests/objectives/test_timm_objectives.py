"""The pixel objectives on a vision transformer of timm, against its forward pass written out."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm_encoders import SWIN, TOKENS, VIT, WHOLE

from vim_ssl import load_encoder
from vim_ssl.checkpoints.identity import weights_hash
from vim_ssl.objectives.base import get_objective
from vim_ssl.objectives.distill import Distill, load_teacher
from vim_ssl.objectives.mae import MAE
from vim_ssl.objectives.simmim import SimMIM

PATCH, WIDTH, DEPTH, HEADS = (VIT[1][k] for k in ("patch_size", "embed_dim", "depth", "num_heads"))
GRID = 4


def norm(x, s, name, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * s[f"{name}.weight"] + s[f"{name}.bias"]


def linear(x, s, name):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def blocks(x, s, prefix, depth, heads):
    """Attention and MLP, both with the norm before them and the residual around them."""
    for i in range(depth):
        at = f"{prefix}.{i}"
        b, n, d = x.shape
        q, k, v = linear(norm(x, s, f"{at}.norm1"), s, f"{at}.attn.qkv").split(d, dim=-1)
        q, k, v = (m.view(b, n, heads, d // heads).transpose(1, 2) for m in (q, k, v))
        weights = (q @ k.transpose(2, 3) / (d // heads) ** 0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(b, n, d)
        x = x + linear(mixed, s, f"{at}.attn.proj")
        hidden = F.gelu(linear(norm(x, s, f"{at}.norm2"), s, f"{at}.mlp.fc1"))
        x = x + linear(hidden, s, f"{at}.mlp.fc2")
    return x


def cut(images):
    """(b, 3, h, w) -> (b, m, 3, p, p), the patches one by one."""
    starts = range(0, GRID * PATCH, PATCH)
    rows = [images[:, :, i : i + PATCH, j : j + PATCH] for i in starts for j in starts]
    return torch.stack(rows, 1)


def encode(s, content, positions):
    """Patches (b, k, d) without positions, and their numbers (b, k) -> (b, k, d)."""
    pos = s["encoder.model.pos_embed"][0]
    x = content + pos[1:][positions]
    cls = (s["encoder.model.cls_token"][0] + pos[:1]).expand(len(x), 1, -1)
    x = blocks(torch.cat([cls, x], 1), s, "encoder.model.blocks", DEPTH, HEADS)
    return norm(x, s, "encoder.model.norm")[:, 1:]


def embedded(s, images):
    weight, bias = (s[f"encoder.model.patch_embed.proj.{k}"] for k in ("weight", "bias"))
    return cut(images).flatten(2) @ weight.flatten(1).T + bias


def pixels(images):
    """(b, m, p * p * 3), pixel by pixel, channels last."""
    return cut(images).permute(0, 1, 3, 4, 2).flatten(2)


def mae(s, images, mask):
    visible = torch.stack([row.logical_not().nonzero()[:, 0] for row in mask])
    content = torch.stack([x[i] for x, i in zip(embedded(s, images), visible, strict=True)])
    latent = linear(encode(s, content, visible), s, "decoder_embed")
    hidden = s["mask_token"].expand(*mask.shape, -1).clone()
    for row, (x, i) in enumerate(zip(latent, visible, strict=True)):
        hidden[row, i] = x
    hidden = hidden + build_sincos2d_pos_embed([GRID, GRID], dim=64, dtype=torch.float64)
    hidden = blocks(hidden, s, "decoder_layers", 2, 2)
    return linear(norm(hidden, s, "decoder_norm", 1e-5), s, "decoder_pred")


def simmim(s, images, mask):
    content = torch.where(mask[..., None], s["encoder.mask_token"], embedded(s, images))
    tokens = encode(s, content, torch.arange(GRID**2).expand(len(images), -1))
    return linear(tokens, s, "decoder_pred")


@pytest.mark.parametrize(
    ("objective", "args", "reference"),
    [
        (MAE, {"decoder_dim": 64, "decoder_depth": 2, "norm_pix_loss": False}, mae),
        (SimMIM, {}, simmim),
    ],
    ids=["mae", "simmim"],
)
def test_loss_and_gradient_are_those_of_the_forward_pass_written_out(objective, args, reference):
    encoder = load_encoder(VIT[0], use_mask_token=objective is SimMIM, **VIT[1])
    model = objective(encoder, **args).double().train()
    for parameter in model.parameters():  # tokens begin near zero
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(3, 3, GRID * PATCH, GRID * PATCH, dtype=torch.float64)
    mask = torch.zeros(3, GRID**2, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(GRID**2)[:10]] = True
    state = dict(model.named_parameters())
    predicted, expected = model.predict(images, mask), reference(state, images, mask)
    torch.testing.assert_close(predicted, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected)
    mine, other = (torch.autograd.grad((x * weights).sum(), list(state.values()))
                   for x in (predicted, expected))  # fmt: skip
    for name, gradient, reference_gradient in zip(state, mine, other, strict=True):
        torch.testing.assert_close(gradient, reference_gradient, rtol=1e-9, atol=1e-9, msg=name)
    error = (expected - pixels(images)).abs()
    loss = (error if objective is SimMIM else error.square()).mean(-1)[mask].sum() / 10
    out = model({"image": images, "mask": mask})
    torch.testing.assert_close(out.loss_sum.double(), loss, rtol=1e-5, atol=0)  # float32 targets


def test_the_decoder_is_of_the_encoders_kind_unless_another_is_named():
    vit, vim = load_encoder(VIT[0], **VIT[1]), load_encoder("vim_nano_patch4_28", depth=1)
    sizes = {"decoder_dim": 32, "decoder_depth": 1}
    assert "decoder_layers.0.attn.qkv.weight" in MAE(vit, **sizes).state_dict()
    assert "decoder_layers.0.mixer.in_proj.weight" in MAE(vim, **sizes).state_dict()
    images = torch.randn(2, 3, 32, 32)
    batch = {"image": images, "mask": torch.arange(16).expand(2, -1) % 2 == 0}
    swapped = MAE(vit, decoder="vim", **sizes)
    assert "decoder_layers.0.mixer.in_proj.weight" in swapped.state_dict()
    assert swapped(batch).loss_sum.isfinite()
    with pytest.raises(ValueError, match="decoder is 'cnn'; expected one of vim, vit"):
        MAE(vit, decoder="cnn", **sizes)


@pytest.mark.parametrize("teacher", [None, VIT, SWIN], ids=["average", "vit", "swin"])
def test_a_student_of_timm_learns_from_any_teacher(teacher):
    student = load_encoder(VIT[0], use_mask_token=True, **VIT[1])
    model = Distill(student, teacher and load_encoder(teacher[0], **teacher[1]), layers=1)
    batch = {"image": torch.randn(2, 3, 32, 32), "mask": torch.arange(16).expand(2, -1) < 8}
    assert model.targets(batch["image"]).shape[1] == GRID**2
    model(batch).loss_sum.backward()
    assert student.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize("objective", ["mae", "simmim", "ar", "distill"])
@pytest.mark.parametrize(("source", "args"), WHOLE.values(), ids=WHOLE)
def test_an_architecture_without_tokens_is_refused(objective, source, args):
    """With its class, the reason and a remedy, whether the recipe or the user builds it."""
    kind = get_objective(objective)
    with pytest.raises(ValueError, match=rf"{source}.*(vision transformer|only a Vim)"):
        kind(load_encoder(source, **kind.encoder_args, **args))
    encoder = load_encoder(source, **args)
    with pytest.raises(
        ValueError, match=rf"{kind.__name__} leaves out .*{source} is a .* Use a vis"
    ):
        kind(encoder)


def test_a_teacher_of_timm_has_the_hash_of_timms_model(tmp_path):
    """By which a run of an earlier version resumes."""
    model = timm.create_model(VIT[0].removeprefix("timm:"), num_classes=5, **VIT[1])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    weights = {"num_classes": 5, "input_size": [3, 32, 32], "fixed_input_size": True,
               "classifier": "head", "first_conv": "patch_embed.proj"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": VIT[0].removeprefix("timm:"), "num_classes": 5, "model_args": VIT[1],
        "pretrained_cfg": weights,
    }))  # fmt: skip
    before = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, num_classes=0, dynamic_img_size=True
    )
    assert weights_hash(load_teacher(f"timm:local-dir:{tmp_path}")) == weights_hash(before)


def test_a_vision_transformer_reads_in_no_direction():
    with pytest.raises(ValueError, match="ar predicts later patches"):
        get_objective("ar")(load_encoder(VIT[0], **VIT[1]))


@pytest.mark.parametrize("make", [MAE, SimMIM, Distill])
@pytest.mark.parametrize(("source", "args"), TOKENS.values(), ids=TOKENS)
def test_every_trained_parameter_has_a_gradient(source, args, make):
    """Several processes would wait for it; what only the features read is frozen."""
    encoder = load_encoder(source, use_mask_token=make is not MAE, **args)
    objective = make(encoder, **({"decoder_dim": 16} if make is MAE else {}))
    mask = torch.arange(16).expand(2, -1) < 8
    objective({"image": torch.randn(2, 3, 32, 32), "mask": mask}).loss_sum.backward()
    named = [(name, p) for name, p in objective.named_parameters() if "average." not in name]
    assert not [name for name, p in named if p.requires_grad == (p.grad is None)]
    frozen = {name.split(".")[2] for name, p in named if not p.requires_grad}
    assert frozen <= {"fc_norm", "attn_pool"}
