"""Masked modelling of clips: tubelets in the order of the tokens, tubes, and a whole run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import load_encoder
from vim_ssl.models.video import VideoEncoder
from vim_ssl.objectives.mae import MAE
from vim_ssl.objectives.masking import RandomMask, RowMask, TubeMask
from vim_ssl.objectives.pixels import fold_time, patchify
from vim_ssl.objectives.simmim import SimMIM
from vim_ssl.recipes import mim_pretrain
from vim_ssl.training.run import read_metrics

ARGS = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 0}
TIMES, ROWS, COLUMNS = 3, 2, 3


def encoder(**more) -> VideoEncoder:
    return VideoEncoder(frames=2 * TIMES, tubelet=2, **ARGS | more)


@pytest.mark.parametrize(("t", "y", "x"), [(0, 0, 0), (3, 5, 1), (5, 7, 11), (2, 3, 8)])
def test_pixels_and_tokens_are_in_the_same_places(t, y, x):
    clip = torch.randn(1, 3, 2 * TIMES, 8, 12)
    other = clip.clone()
    other[0, 1, t, y, x] += 1
    net = encoder()
    tokens = (net.embed(clip) != net.embed(other)).any(-1)
    patches = (patchify(fold_time(clip, 2), 4) != patchify(fold_time(other, 2), 4)).any(-1)
    assert torch.equal(tokens, patches)
    assert tokens[0].nonzero().tolist() == [[(t // 2 * ROWS + y // 4) * COLUMNS + x // 4]]


def test_a_tube_hides_the_same_places_at_all_times():
    mask = TubeMask((ROWS, COLUMNS), 0.5, times=TIMES)().view(TIMES, -1)
    assert (mask == mask[0]).all()
    assert mask[0].sum() == 3
    torch.manual_seed(0)
    alone = TubeMask((ROWS, COLUMNS), 0.5)()
    torch.manual_seed(0)
    assert torch.equal(alone, RandomMask((ROWS, COLUMNS), 0.5)())


@pytest.mark.parametrize("kind", ["mae", "simmim"])
@pytest.mark.parametrize("mask", [TubeMask, RowMask])
def test_every_parameter_learns_from_what_is_hidden_alone(kind, mask):
    if kind == "mae":
        model = MAE(encoder(), decoder_dim=16, decoder_depth=1, norm_pix_loss=False)
    else:
        model = SimMIM(encoder(use_mask_token=True))
    if mask is TubeMask:
        draw = TubeMask((ROWS, COLUMNS), 0.5, times=TIMES)
    else:
        draw = RowMask((TIMES * ROWS, COLUMNS), 0.5)
    clips = torch.randn(2, 3, 2 * TIMES, 8, 12)
    hidden = torch.stack([draw() for _ in range(2)])
    out = model({"image": clips, "mask": hidden})
    out.loss_sum.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert out.images().shape == (2, 3, TIMES * 8, 4 * 12)
    # What the encoder is shown does not depend on what is hidden.
    cover = hidden.view(2, 1, TIMES, ROWS, COLUMNS).repeat_interleave(2, 2)
    cover = cover.repeat_interleave(4, 3).repeat_interleave(4, 4)
    with torch.no_grad():
        before, after = (
            model.predict(images, hidden)
            for images in (clips, torch.where(cover, torch.randn_like(clips), clips))
        )
    torch.testing.assert_close(before, after)


def test_a_run_on_videos_leaves_an_encoder_of_clips(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "videos" / f"{i}"
        folder.mkdir(parents=True)
        ramp = np.linspace(0, 200, 16)[None] + rng.integers(0, 40, (4, 16, 16))
        for t, values in enumerate(ramp):
            Image.fromarray(np.roll(values, t, 1).astype(np.uint8)).convert("RGB").save(
                folder / f"{t}.png"
            )
    argv = [
        "--data", f"video:{tmp_path}/videos?frames=4", "--encoder", "vim_nano_patch8_64",
        "--model-args", "depth=1", "embed_dim=16", "img_size=16", "--decoder-dim", "16",
        "--decoder-depth", "1", "--mask", "tube", "--mask-ratio", "0.5", "--batch-size", "4",
        "--epochs", "10", "--warmup-epochs", "0", "--base-lr", "2e-2", "--lr-reference-batch", "4",
        "--crop-scale", "1", "1", "--no-norm-pix-loss", "--workers", "0", "--threads", "1",
        "--log-every", "1", "--trackers", "none", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert mim_pretrain.main(argv) == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    trained = load_encoder(tmp_path / "run")
    assert (type(trained), trained.frames, trained.tubelet) == (VideoEncoder, 4, 2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mask"] == "tube"
    for objective in ("ar", "distill"):
        with pytest.raises(ValueError, match="reads images, not clips"):
            mim_pretrain.main([*argv[:-1], str(tmp_path / objective), "--objective", objective])
