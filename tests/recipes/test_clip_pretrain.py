"""The recipe of images and captions as a user runs it: pairs in, a model with two towers out."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start

import vim_ssl
from vim_ssl import load_clip, load_encoder, save_encoder
from vim_ssl.data import open_data
from vim_ssl.evaluation.retrieval import PairFeatures, embed_pairs, nearest, recall
from vim_ssl.recipes import clip_pretrain
from vim_ssl.training.run import read_metrics

ROOT = Path(vim_ssl.__file__).parents[1]
COLOURS = {
    "red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "yellow": (230, 210, 40),
    "белый": (250, 250, 250), "黒": (5, 5, 5), "grey": (128, 128, 128), "purple": (130, 20, 140),
}  # fmt: skip
SMALL = [
    "--encoder", "vim_nano_patch8_64", "--model-args", "depth=2", "embed_dim=32", "img_size=32",
    "drop_path_rate=0.2", "--text-width", "32", "--text-depth", "1", "--text-heads", "2",
    "--text-dropout", "0.2", "--embed-dim", "16", "--vocab-size", "300", "--context-length", "12",
    "--tokenizer", "bpe", "--batch-size", "8", "--epochs", "3", "--warmup-epochs", "0",
    "--base-lr", "1e-3", "--lr-reference-batch", "8", "--workers", "0", "--threads", "1",
    "--log-every", "1", "--precision", "no", "--eval-every", "100", "--crop-scale", "1", "1",
    "--accumulation", "1", "--trackers", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Eight colours five times each, two captions an image; an image without a text file, one
    with an empty one, one with a text longer than is read."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for i in range(40):
        name, colour = list(COLOURS.items())[i % 8]
        values = np.clip(np.array(colour) + rng.integers(-20, 20, (32, 32, 3)), 0, 255)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a {name} image\n{name}\n", encoding="utf-8")
    (folder / "07.txt").write_text(" \n")
    (folder / "08.txt").write_text("a red image " * 30)
    (folder / "09.txt").unlink()
    return folder


def pretrain(folder: Path, data: Path | str, *more: str) -> list[dict]:
    spec = f"pairs:{data}" if isinstance(data, Path) else data
    assert clip_pretrain.main([*SMALL, "--data", spec, "--output", str(folder), *more]) == 0
    return read_metrics(folder)


def losses(rows: list[dict]) -> list[tuple[int, str]]:
    return [(row["step"], repr(row["loss"])) for row in rows]


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    pretrain(folder, pairs, "--epochs", "12", "--val", f"pairs:{pairs}", "--model-args", "depth=2",
             "embed_dim=32", "img_size=32", "--text-dropout", "0")  # fmt: skip
    return folder


# ------------------------------------------------------------------ a run


def test_it_learns_which_caption_belongs_to_which_image(trained):
    rows = read_metrics(trained)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    # Five images have the same caption: one in five is the best that can be found first.
    assert rows[-1]["image_to_text_r10"] > 60  # of 78 captions, 10 of the right colour


def test_what_is_no_pair_is_named_and_counted(trained, pairs, capfd, tmp_path):
    rows = read_metrics(trained)
    assert rows[-1]["skipped"] == 2
    assert max(row["captions_cut"] for row in rows) == pytest.approx(100 / 8)
    pretrain(tmp_path / "run", pairs, "--max-steps", "4")
    output = capfd.readouterr().out
    assert "09.png: 09.txt does not exist" in output
    assert "07.png: it has no caption" in output


def test_the_model_that_a_run_leaves(trained, pairs):
    clip = load_clip(trained)
    assert not clip.training
    features = clip.encode_image(clip.transform(Image.open(pairs / "00.png"))[None])
    assert features.shape == (1, 16)
    texts = clip.encode_text(["a red image", "a blue image", ""])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    assert (features @ texts.T).argmax() == 0
    found = recall(embed_pairs(clip, open_data(f"pairs:{pairs}")))
    for name, value in found.items():
        assert value == pytest.approx(read_metrics(trained)[-1][name]), name


def test_its_encoder_is_an_encoder_like_any_other(trained):
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_encoder(trained)(images), load_clip(trained).encoder(images))


def test_the_run_directory_holds_no_pickle_outside_its_checkpoints(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.html", "encoder.safetensors", "encoder.json",
            "clip.safetensors", "clip_config.json", "tokenizer.json"} <= names  # fmt: skip
    allowed = {".json", ".jsonl", ".html", ".safetensors", ".png"}
    assert all(p.suffix in allowed for p in trained.iterdir() if p.is_file() and p.name != ".lock")
    assert json.loads((trained / "tokenizer.json").read_text())["name"] == "bpe"


# ------------------------------------------------------------------ exactness


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("stop", [1, 3], ids=lambda n: f"stop-at-{n}")
def test_resume_is_bit_identical(tmp_path, pairs, loss, stop):
    """39 pairs in 9 micro-batches of 4, 5 steps an epoch, the last of one; dropout in both towers.
    The run that goes on has the tokenizer of its first part."""
    more = ("--loss", loss, "--batch-size", "4", "--accumulation", "2", "--epochs", "1.4")
    whole = pretrain(tmp_path / "whole", pairs, *more)
    pretrain(tmp_path / "parts", pairs, *more, "--max-steps", str(stop), "--workers", "1")
    tokens = (tmp_path / "parts" / "tokenizer.json").read_bytes()
    parts = pretrain(tmp_path / "parts", pairs, *more, "--resume", "auto")
    assert losses(parts) == losses(whole)
    assert len(whole) == 7
    assert (tmp_path / "parts" / "tokenizer.json").read_bytes() == tokens


STILL = ("--text-dropout", "0", "--model-args", "depth=2", "embed_dim=32", "img_size=32")


@pytest.mark.slow
def test_micro_batches_and_processes_change_nothing(tmp_path, pairs):
    """One batch of 8; two micro-batches of 4; two processes of two micro-batches of 2. Of captions
    that are all different: which of two alike is the nearest is for rounding to say."""
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    for i, file in enumerate(sorted(folder.glob("*.txt"))):
        lines = file.read_text(encoding="utf-8").splitlines()
        file.write_text("\n".join(f"{i} {line}" if line.strip() else "" for line in lines))
    data = f"pairs:{folder}?limit=32"
    one = pretrain(tmp_path / "one", data, *STILL)
    two = pretrain(tmp_path / "two", data, *STILL, "--batch-size", "4", "--accumulation", "2")
    finish(start(
        2, ROOT / "recipes" / "clip_pretrain.py", *SMALL, *STILL, "--batch-size", "2",
        "--accumulation", "2", "--data", data, "--output", str(tmp_path / "four"),
    ))  # fmt: skip
    for other in (two, read_metrics(tmp_path / "four")):
        assert len(other) == len(one) == 12
        for ours, theirs in zip(one[:6], other[:6], strict=True):  # rounding grows
            for name in ("loss", "batch_top1", "logit_scale", "captions_cut", "samples"):
                assert theirs[name] == pytest.approx(ours[name], rel=2e-4), name


def test_a_run_killed_while_its_model_is_written_ends_with_one(tmp_path, pairs, monkeypatch):
    """A run that has its last checkpoint has ended, and writes no model any more."""
    run = tmp_path / "run"

    def killed(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(clip_pretrain, "save_clip", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(run, pairs, "--max-steps", "2")
    pretrain(run, pairs, "--max-steps", "2", "--resume", "auto")
    assert load_clip(run).tokenizer is not None


# ------------------------------------------------------------------ towers and data


def test_it_starts_from_another_run_and_leaves_a_locked_encoder_as_it_was(tmp_path, pairs):
    encoder = load_encoder(
        "vim_nano_patch8_64", depth=1, embed_dim=16, img_size=32, use_mask_token=True
    )
    save_encoder(encoder, tmp_path / "before")
    pretrain(tmp_path / "run", pairs, "--encoder", str(tmp_path / "before"), "--lock-image",
             "--max-steps", "2", "--model-args", "global_pool=avg")  # fmt: skip
    after = load_clip(tmp_path / "run").encoder.state_dict()
    before = encoder.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert "mask_token" not in after


def test_a_timm_model_stands_in_for_comparison(tmp_path, pairs):
    pretrain(tmp_path / "run", pairs, "--encoder", "timm:vit_tiny_patch16_224", "--max-steps", "1",
             "--model-args", "depth=1", "embed_dim=24", "num_heads=2", "img_size=32")  # fmt: skip
    clip = load_clip(tmp_path / "run")
    assert type(clip.encoder.model).__name__ == "VisionTransformer"
    image = clip.transform(Image.open(pairs / "00.png"))
    assert clip.encode_image(image[None]).shape == (1, 16)


def test_a_stream_of_tars_trains(tmp_path, pairs, monkeypatch):
    """Captions as text, and as a list in the json; a sample without any."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(20):
            tar.add(pairs / f"{i:02}.png", f"{i:02}.png")
            texts = {"txt": "a red image"} if i % 2 else {"json": '{"txt": ["red", "a red one"]}'}
            for kind, text in texts.items() if i != 4 else ():
                info = tarfile.TarInfo(f"{i:02}.{kind}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    rows = pretrain(tmp_path / "run", f"wds:{tmp_path}/shard.tar", "--epochs", "1")
    assert [row["step"] for row in rows] == [1, 2]
    assert load_clip(tmp_path / "run").tokenizer.vocab_size > 259


@pytest.mark.parametrize(
    ("argv", "error", "says"),
    [
        (["--text", "lstm"], ValueError, "expected transformer, or hf:NAME"),
        (["--text-heads", "3"], ValueError, "not divisible by 3 heads"),
        (["--vocab-size", "100"], ValueError, "is too small for the 256 bytes"),
        (["--tokenizer", "word"], ValueError, "bpe, clip or hf:NAME"),
        (["--lock-image", "--lock-text"], ValueError, "lock_image and lock_text are both set"),
        (["--model-args", "dept=2"], ValueError, "Did you mean 'depth'"),
        (["--data", "no/such/folder"], FileNotFoundError, "no/such/folder' does not exist"),
        (["--data", "PLAIN"], ValueError, "has no captions; .* pairs:FOLDER"),
        (["--encoder", "timm:vit_tinny_patch16_224"], ValueError, "timm has no model .* Did you"),
        (["--val", "PLAIN"], ValueError, "has no captions"),
        (["--batch-size", "1"], ValueError, "single pair, without negatives"),
        (["--data", "pairs:PLAIN?limit=1"], ValueError, "needs two or more"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_a_mistake_is_told_before_training(argv, error, says, pairs, tmp_path):
    argv = [word.replace("PLAIN", str(pairs)) for word in argv]
    with pytest.raises(error, match=says):
        pretrain(tmp_path / "run", pairs, *argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("query", "part"), [("", "val"), ("?split=train", "train")])
def test_retrieval_is_watched_on_the_part_held_out(tmp_path, pairs, query, part):
    for split in ("train", "val", "test"):
        shutil.copytree(pairs, tmp_path / split)
    config = clip_pretrain.Config(val=f"pairs:{tmp_path}{query}")
    assert clip_pretrain.build_val(config).split == part


def test_a_tokenizer_of_no_captions_is_refused():
    with pytest.raises(ValueError, match="tokenizer_captions is 0; it must be 1 or more"):
        clip_pretrain.Config(tokenizer_captions=0)


# ------------------------------------------------------------------ presets


def settings(monkeypatch, *argv: str) -> clip_pretrain.Config:
    caught = []
    monkeypatch.setattr(clip_pretrain, "run", caught.append)
    clip_pretrain.main(list(argv))
    return caught[0]


@pytest.mark.parametrize(
    ("preset", "batch", "lr"),
    [
        ("emoji_clip", 128, 7e-4),
        ("cc3m_small_224", 1024, 5e-4),
        ("cc12m_small_224", 4096, 1e-3),
        ("datacomp_small_224", 4096, 5e-4),
    ],
)
def test_a_presets_numbers_and_towers(preset, batch, lr, monkeypatch):
    config = settings(monkeypatch, "--preset", preset, "--data", "photos")
    assert config.batch_size * config.accumulation == batch == config.lr_reference_batch
    assert (config.base_lr, config.betas, config.eps) == (lr, (0.9, 0.98), 1e-6)
    assert (config.weight_decay, config.precision) == (
        0.2, "no" if preset == "emoji_clip" else "bf16"
    )  # fmt: skip

    class Tokens:
        vocab_size, eos_id = config.vocab_size, 2

    with torch.device("meta"):
        encoder = clip_pretrain.build_model(config)
        clip = clip_pretrain.build_objective(config, encoder, Tokens())
    text = sum(p.numel() for p in clip.text.parameters()) / 1e6
    assert text == pytest.approx(2.11 if preset == "emoji_clip" else 63.2, rel=0.02)  # CLIP-B's


@pytest.mark.parametrize(
    ("argv", "gpu", "preset"),
    [
        ([], True, "emoji_clip"),
        (["--data", "photos"], False, "cpu_clip"),
        (["--data", "photos"], True, "cc3m_small_224"),
    ],
    ids=["nothing", "data", "data-and-gpu"],
)
def test_without_a_preset_data_and_machine_choose_it(argv, gpu, preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    expected = settings(monkeypatch, "--preset", preset, *argv)
    assert settings(monkeypatch, *argv) == expected


def test_pairs_of_ones_own_are_not_measured_on_the_presets(monkeypatch):
    own = ("--preset", "emoji_clip", "--data", "pairs:mine")
    assert settings(monkeypatch, *own).val == ""
    assert settings(monkeypatch, *own, "--val", "pairs:other").val == "pairs:other"
    assert settings(monkeypatch, "--epochs", "1").val.startswith("sample:")


# ------------------------------------------------------------------ retrieval


def test_the_nearest_are_found_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr("vim_ssl.evaluation.knn.QUERIES", 3)
    monkeypatch.setattr("vim_ssl.evaluation.knn.BANK", 48)
    queries, keys = torch.randn(10, 4), torch.randn(100, 4)
    expected = (queries @ keys.T).topk(5, dim=1).indices
    assert torch.equal(nearest(queries, keys, 5), expected)
    assert nearest(queries, keys[:2], 5).shape == (10, 2)


def test_recall_counts_any_caption_of_an_image():
    """Image 0 is nearest to its second caption; image 1 to the first of image 0."""
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, -0.1]])
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pairs = PairFeatures(images, texts, torch.tensor([0, 0, 1]), ["a", "b"], ["x", "y", "z"], [])
    found = recall(pairs, ks=(1, 2))
    assert found["image_to_text_r1"] == 50.0
    assert found["image_to_text_r2"] == 50.0
    assert found["text_to_image_r1"] == pytest.approx(200 / 3)
    assert found["text_to_image_r2"] == 100.0
