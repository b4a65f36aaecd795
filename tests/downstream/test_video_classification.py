"""Videos are told apart by the order of their frames; what is frozen stays; every clip counts."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder, cli, load_encoder, save_encoder
from vim_ssl.downstream import embed, linear_probe, video
from vim_ssl.evaluation.extract import encode_views
from vim_ssl.models.video import VideoEncoder, inflate

SMALL = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2,
         "num_classes": 0}  # fmt: skip
QUICK = ["--threads", "1", "--batch-size", "8", "--crop-scale", "1", "1", "--hflip", "0",
         "--trackers", "none"]  # fmt: skip
FRAMES = 4


@pytest.fixture(scope="module")
def motion(tmp_path_factory) -> Path:
    """Noise that gets dark or bright, the same frames in the other order: one tells nothing."""
    root, rng = tmp_path_factory.mktemp("motion"), np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 6)):
        for i in range(count):
            frames = rng.integers(0, 60, (FRAMES, 16, 16), dtype=np.uint8)
            frames[: FRAMES // 2] += 150
            for kind, order in (("falls", frames), ("rises", frames[::-1])):
                folder = root / part / kind / f"{i:02}"
                folder.mkdir(parents=True)
                for t, frame in enumerate(order):
                    Image.fromarray(frame).save(folder / f"{t}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_encoder(VimEncoder(**SMALL), folder)
    (folder / "config.json").write_text(json.dumps({"data": "elsewhere"}))
    return folder


def data(motion: Path, more: str = "") -> list[str]:
    return ["--data", f"video:{motion}?frames={FRAMES}{more}"]


def test_order_is_learnt_and_the_run_reads_clips(motion, run, tmp_path):
    argv = ["--encoder", str(run), "--output", str(tmp_path), *data(motion, "&clips=2"), *QUICK]
    assert video.main([*argv, "--epochs", "5", "--warmup-epochs", "1", "--base-lr", "2e-2"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["task"], metrics["train"], metrics["test"]) == ("video", 32, 12)
    assert metrics["top1"] >= 90  # a guess, and a look at any one frame, gives 50
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 13
    encoder = load_encoder(tmp_path, num_classes=None)
    assert isinstance(encoder, VideoEncoder)
    assert (encoder.frames, encoder.tubelet, encoder.num_classes) == (FRAMES, 1, 2)
    assert encoder.time_embed.abs().max() > 0


def test_what_is_frozen_stays(motion, run, tmp_path):
    argv = ["--encoder", str(run), "--output", str(tmp_path), *data(motion), *QUICK, "--frozen"]
    video.main([*argv, "--epochs", "2", "--warmup-epochs", "0", "--tubelet", "2"])
    trained = load_encoder(tmp_path, num_classes=None)
    before = inflate(load_encoder(run, global_pool="token+avg"), frames=FRAMES, tubelet=2)
    for name, value in before.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value), name
    assert trained.head.weight.std() > 0


def test_every_clip_counts():
    encoder = inflate(VimEncoder(**SMALL), frames=2, tubelet=1).eval()
    clips = torch.randn(3, 4, 1, 2, 16, 16)
    with torch.no_grad():
        apart = torch.stack([encoder(clips[:, k]) for k in range(4)])
        torch.testing.assert_close(encode_views(encoder, clips), apart.mean(0))
        torch.testing.assert_close(encode_views(encoder, clips[:, 0]), apart[0])


def test_probe_and_embedding_take_videos_too(motion, run, tmp_path):
    same = ["--encoder", str(run), *data(motion, "&clips=2")]
    linear_probe.main([*same, "--no-cache", "--output", str(tmp_path / "probe")])
    metrics = json.loads((tmp_path / "probe" / "metrics.json").read_text())
    rows = {row["features"]: row for row in metrics["rows"]}
    assert rows["pretrained encoder"]["logistic"] >= 75
    embed.main([*same, "--output", str(tmp_path / "vectors"), "--format", "npy"])
    assert np.load(tmp_path / "vectors" / "shards" / "00000.npy").shape == (32, 24)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--data", "{0}/train/rises"], "does not contain videos"),
        (
            ["--data", "video:{0}?frames=3", "--tubelet", "2"],
            "not a positive multiple of tubelet 2",
        ),
        (["--data", "video:{0}", "--mixup", "0.8"], "not clips"),
        (["--data", "video:{0}", "--frozen", "--drop-path", "0.1"], "trains only the head"),
    ],
    ids=["pictures", "tubelet", "mixup", "frozen"],
)
def test_what_does_not_fit_is_told(motion, run, tmp_path, more, says, capsys, monkeypatch):
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)
    argv = ["--encoder", str(run), "--output", str(tmp_path / "x"), *QUICK]
    with contextlib.suppress(SystemExit):
        assert cli.main(["video", *argv, *(text.format(motion) for text in more)]) == 2
    assert says in capsys.readouterr().err
