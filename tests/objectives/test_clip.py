"""The contrast of images and captions: its loss, and the gradient of the whole step's batch."""

import json
import math
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from processes import METHOD
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes

from vim_ssl import load_encoder
from vim_ssl.models.text import TextEncoder
from vim_ssl.models.tokenizers import train_bpe
from vim_ssl.objectives.clip import Clip, Embedded, load_clip, save_clip
from vim_ssl.training.loop import forward_backward
from vim_ssl.training.optim import param_groups

N, DIM = 6, 8


def embedded(loss: str, requires_grad: bool = True) -> Embedded:
    """Random features in double precision, and the scale and bias of an untrained model."""
    image, text = (F.normalize(torch.randn(N, DIM, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.tensor([10.0], dtype=torch.float64)
    bias = torch.tensor([-10.0], dtype=torch.float64) if loss == "siglip" else None
    for x in (image, text, scale, bias):
        if x is not None:
            x.requires_grad_(requires_grad)
    return Embedded(image, text, scale, bias, torch.zeros(N, dtype=torch.bool))


def small(loss: str = "clip", drop: float = 0.0, **more) -> Clip:
    torch.manual_seed(0)
    encoder = load_encoder(
        "vim_nano_patch4_28", depth=2, embed_dim=16, img_size=8, drop_path_rate=drop
    )
    text = TextEncoder(20, eos_id=2, context_length=6, width=16, depth=2, heads=2, dropout=drop)
    return Clip(encoder, text, **{"embed_dim": DIM, "loss": loss} | more).train()


def batches(count: int, size: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 20, (count * size, 6), generator=generator)
    rows[torch.arange(len(rows)), torch.arange(len(rows)) % 4 + 2] = 2
    images = torch.randn(count * size, 1, 8, 8, generator=generator).double()
    batch = {"image": images, "tokens": rows, "cut": rows[:, 2] == 2, "index": rows[:, 0]}
    return [
        {key: value[i * size : (i + 1) * size] for key, value in batch.items()}
        for i in range(count)
    ]


def gradients(clip: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): p.grad.clone()
        for name, p in clip.named_parameters()
        if p.grad is not None
    }


# ------------------------------------------------------------------ the losses


def by_the_papers(loss: str, at: Embedded) -> torch.Tensor:
    """CLIP's figure 3 and SigLIP's algorithm 1, pair by pair."""
    total = torch.zeros((), dtype=torch.float64)
    if loss == "clip":
        cosines = at.image @ at.text.T
        for i in range(N):
            for way in (cosines[i], cosines[:, i]):
                total = total - (at.scale * way[i] - torch.logsumexp(at.scale * way, 0)) / 2
    else:
        for i in range(N):
            for j in range(N):
                z = 1 if i == j else -1
                logit = at.scale * (at.image[i] @ at.text[j]) + at.bias
                total = total + torch.log1p(torch.exp(-z * logit))
    return total.sum() / N


def by_open_clip(loss: str, at: Embedded) -> torch.Tensor:
    losses = pytest.importorskip("open_clip.loss")
    if loss == "clip":
        return losses.ClipLoss()(at.image, at.text, at.scale)
    return losses.SigLipLoss()(at.image, at.text, at.scale, at.bias)


@pytest.mark.parametrize("theirs", [by_the_papers, by_open_clip])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_loss_and_its_gradients_are_those_of_the_field(loss, theirs):
    at = embedded(loss)
    leaves = [x for x in at[:4] if x is not None]
    losses, _ = small(loss).contrast(at)
    expected = theirs(loss, at)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(losses.mean(), leaves)
    for mine, other in zip(ours, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_loss_is_small_where_pairs_are_alike_and_nothing_else_is(loss):
    image = torch.eye(4)
    scale = torch.tensor([100.0])
    bias = torch.tensor([-50.0]) if loss == "siglip" else None
    cut = torch.zeros(4, dtype=torch.bool)
    losses, found = small(loss).contrast(Embedded(image, image, scale, bias, cut))
    assert losses.max() < 1e-6
    assert found.all()
    losses, found = small(loss).contrast(Embedded(image, image.roll(1, 0), scale, bias, cut))
    assert losses.min() > 10
    assert not found.any()


def test_the_loss_is_single_precision_under_autocast():
    at = Embedded(*(x if x is None else x.detach().float() for x in embedded("clip")[:4]), None)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = small().contrast(at)
    torch.testing.assert_close(losses, small().contrast(at)[0], rtol=0, atol=0)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "scale", "bias"), [("clip", 1 / 0.07, None), ("siglip", 10.0, -10.0)]
)
def test_scale_and_bias_begin_as_in_the_papers_and_are_not_decayed(loss, scale, bias):
    clip = small(loss)
    assert clip.logit_scale.exp().item() == pytest.approx(scale)
    assert (clip.logit_bias is None) if bias is None else clip.logit_bias.item() == bias
    decayed = {id(p) for g in param_groups(clip, 0.1) if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in clip.named_parameters() if id(p) in decayed}
    assert {"image_proj.weight", "text_proj.weight", "text.layers.0.qkv.weight"} <= names
    assert not {"logit_scale", "logit_bias", "text.pos_embed", "text.norm.weight"} & names


@pytest.mark.parametrize(("at", "then"), [(9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)])
def test_the_scale_is_clamped_after_a_step(at, then):
    clip = small()
    torch.nn.init.constant_(clip.logit_scale, at)
    clip.after_step()
    assert clip.logit_scale.item() == pytest.approx(then)


def test_figures_are_sums_over_the_batch():
    clip, (batch,) = small().double(), batches(1, 8)
    out = clip(batch)
    assert out.weight == 8
    assert out.metrics["captions_cut"] / 8 == 100 * batch["cut"].double().mean()
    assert out.metrics["logit_scale"].item() / 8 == pytest.approx(1 / 0.07)


# ------------------------------------------------------------------ the whole step's gradient


CONFIG = SimpleNamespace(seed=0)
PROGRESS = SimpleNamespace(step=3)


def step(clip: Clip, parts: list[dict], accelerator=None) -> dict[str, float]:
    """What the trainer does with these micro-batches."""
    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
    model = accelerator.prepare_model(clip)
    return forward_backward(accelerator, model, clip, parts, CONFIG, PROGRESS)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_micro_batches_have_the_large_batchs_loss_and_gradient(loss):
    large, small_ones = small(loss).double(), small(loss).double()
    expected, figures = step(large, batches(1, 12)), step(small_ones, batches(3, 4))
    assert figures == pytest.approx(expected, rel=1e-6)  # logged in single precision
    for name, grad in gradients(large).items():
        torch.testing.assert_close(gradients(small_ones)[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_dropout_and_drop_path_are_the_same_in_both_passes(loss):
    """Against one graph over all micro-batches, each embedded once with its step's draws."""
    clip, parts = small(loss, drop=0.4).double(), batches(3, 4)
    expected = step(clip, parts)
    ours = gradients(clip)
    clip.zero_grad()

    def seeded(i, **more):
        from vim_ssl.data.loading.indexed import stable_hash

        torch.manual_seed(stable_hash("step", 0, 3, i, 0))
        return clip(parts[i], **more)

    embedded = [seeded(i, only_embed=True) for i in range(3)]
    columns = [torch.cat([part[k] for part in embedded]) for k in (0, 1)]
    losses, _ = clip.contrast(Embedded(*columns, *embedded[0][2:4], torch.zeros(12)))
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(expected["loss"], rel=1e-6)
    for name, grad in gradients(clip).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-12)
    assert not torch.equal(seeded(0, only_embed=True).image, seeded(1, only_embed=True).image)


def _process(rank: int, port: int, folder: str) -> None:
    """One of two: halves of every micro-batch; its gradients go to a file."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for loss in ("clip", "siglip"):
        for count in (1, 3):
            clip = small(loss).double()
            halves = [
                {k: v[rank * len(v) // 2 :][: len(v) // 2] for k, v in part.items()}
                for part in batches(count, 12 // count)
            ]
            figures = step(clip, halves, accelerator)
            torch.save(gradients(clip), f"{folder}/{loss}-{count}-{rank}.pt")
            Path(f"{folder}/{loss}-{count}-{rank}.json").write_text(json.dumps(figures))
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_have_one_processs_loss_and_gradient(tmp_path):
    """With and without micro-batches; in another order of the pairs, which changes no sum."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_process, (port, str(tmp_path)), nprocs=2, start_method=METHOD)
    for loss in ("clip", "siglip"):
        whole = small(loss).double()
        expected = step(whole, batches(1, 12))
        for count in (1, 3):
            for rank in (0, 1):
                stem = tmp_path / f"{loss}-{count}-{rank}"
                figures = json.loads(stem.with_suffix(".json").read_text())
                assert figures == pytest.approx(expected, rel=1e-6)
                theirs = torch.load(stem.with_suffix(".pt"))
                for name, grad in gradients(whole).items():
                    torch.testing.assert_close(theirs[name], grad, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ towers


@pytest.mark.parametrize("lock", ["image", "text"])
def test_a_locked_tower_stays_as_it_is_and_its_projection_learns(lock):
    clip = small(drop=0.5, **{f"lock_{lock}": True}).double()
    tower = clip.encoder if lock == "image" else clip.text
    assert clip.training
    assert not tower.training
    step(clip, batches(1, 4))
    names = set(gradients(clip))
    prefix = {"image": "encoder.", "text": "text."}[lock]
    assert not any(name.startswith(prefix) for name in names)
    assert {"image_proj.weight", "text_proj.weight", "logit_scale"} <= names


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"loss": "infonce"}, "not one of clip, siglip"),
        ({"lock_image": True, "lock_text": True}, "lock_image and lock_text are both set"),
        ({"embed_dim": 0}, "embed_dim 0 must be 1 or more"),
    ],
)
def test_what_cannot_learn_is_refused(more, says):
    with pytest.raises(ValueError, match=says):
        small(**more)


@pytest.mark.parametrize(
    ("args", "says"),
    [({"num_classes": 3}, "head of 3 classes"), ({"use_mask_token": True}, "uses no mask token")],
)
def test_an_encoder_with_parts_that_would_never_learn_is_refused(args, says):
    encoder = load_encoder("vim_nano_patch4_28", depth=1, embed_dim=16, **args)
    with pytest.raises(ValueError, match=says):
        Clip(encoder, small().text)


def test_every_parameter_gets_a_gradient():
    clip = small("siglip").double()
    step(clip, batches(2, 4))
    assert set(gradients(clip)) == {name for name, _ in clip.named_parameters()}


# ------------------------------------------------------------------ files


TOWERS = {
    "vim": ("vim_nano_patch8_64", {"depth": 1, "embed_dim": 16}),
    "timm": ("timm:vit_tiny_patch16_224",
             {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 64}),
}  # fmt: skip


def test_a_tower_of_timm_of_an_earlier_run_loads(tmp_path):
    """Its weights are in clip.safetensors, and clip_config.json has the arguments of timm."""
    image = {"model_name": "vit_tiny_patch16_224", "num_classes": 0, "pretrained": False,
             **TOWERS["timm"][1]}  # fmt: skip
    tower = timm.create_model(**image).eval()
    tokenizer = train_bpe(["a dog", "a cat"] * 3, vocab_size=300, context_length=6)
    text = TextEncoder(tokenizer.vocab_size, eos_id=2, context_length=6, width=16, depth=1, heads=2)
    clip = Clip(load_encoder(*TOWERS["timm"][:1], **TOWERS["timm"][1]), text, embed_dim=DIM,
                tokenizer=tokenizer)  # fmt: skip
    save_clip(clip, tmp_path)
    state = load_file(tmp_path / "clip.safetensors")
    state |= {f"encoder.{key}": value for key, value in tower.state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors")
    described = json.loads((tmp_path / "clip_config.json").read_text())
    (tmp_path / "clip_config.json").write_text(json.dumps(described | {"image": image}))
    for name in ("encoder.safetensors", "encoder.json"):
        (tmp_path / name).unlink()
    again, images = load_clip(tmp_path), torch.randn(2, 3, 64, 64)
    assert torch.equal(again.encoder(images), tower(images))
    assert again.transform(Image.new("L", (80, 64))).shape == (3, 64, 64)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_saved_model_comes_back(tmp_path, tower):
    tokenizer = train_bpe(["a dog", "a cat"] * 3, vocab_size=300, context_length=6)
    source, args = TOWERS[tower]
    encoder = load_encoder(source, **args)
    text = TextEncoder(tokenizer.vocab_size, eos_id=2, context_length=6, width=16, depth=1, heads=2)
    clip = Clip(encoder, text, embed_dim=DIM, loss="siglip", tokenizer=tokenizer).eval()
    save_clip(clip, tmp_path)
    again = load_clip(tmp_path)
    assert not again.training
    images = torch.randn(2, 3, 64, 64)
    features = clip.encode_image(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(again.encode_image(images), features)
    torch.testing.assert_close(again.encode_text(["a dog", ""]), clip.encode_text(["a dog", ""]))
    assert torch.equal(again.logit_bias, clip.logit_bias)
    torch.testing.assert_close(load_encoder(tmp_path)(images), encoder(images))
    allowed = {".safetensors", ".json"}
    assert {path.suffix for path in tmp_path.iterdir()} == allowed


def test_what_could_not_be_loaded_again_is_not_written(tmp_path):
    clip = small()
    with pytest.raises(ValueError, match="without a tokenizer"):
        save_clip(clip, tmp_path / "run")
    clip.encoder = torch.nn.Identity()
    with pytest.raises(TypeError, match="is a Identity, not an encoder; load it with load_enc"):
        save_clip(clip, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_such_a_model_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"clip_pretrain run"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match="without a tokenizer"):
        small().encode_text("a dog")


def test_an_image_must_be_transformed_first():
    message = r"not Image; for an image use clip\.encode_image\(clip\.tr"
    with pytest.raises(TypeError, match=message):
        small().encode_image(Image.new("RGB", (20, 20)))
