"""Weights with values that are no finite numbers, or of another type, are refused on loading."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vim_ssl import VimEncoder, load_encoder, save_encoder
from vim_ssl.checkpoints.verify import verify
from vim_ssl.models.text import TextEncoder
from vim_ssl.models.tokenizers import train_bpe
from vim_ssl.objectives.clip import Clip, load_clip, save_clip
from vim_ssl.tasks.detection import Detection, load_detection
from vim_ssl.tasks.segmentation import Segmentation, load_segmentation
from vim_ssl.tasks.slides import SlideClassifier, load_slide

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1}


def save_clip_run(folder: Path) -> None:
    tokenizer = train_bpe(["a red dog"], vocab_size=270, context_length=8)
    text = TextEncoder(tokenizer.vocab_size, eos_id=2, context_length=8, width=8, depth=1, heads=2)
    save_clip(Clip(VimEncoder(**SMALL, num_classes=0), text, embed_dim=8, tokenizer=tokenizer),
              folder)  # fmt: skip


def save_segmentation_run(folder: Path) -> None:
    encoder = VimEncoder(**SMALL, num_classes=0)
    Segmentation(encoder, ["a", "b"], head="linear", window=32).save(folder)


def save_detection_run(folder: Path) -> None:
    encoder = VimEncoder(**SMALL | {"img_size": 64}, num_classes=0)
    Detection(
        encoder, ["a"], head="rcnn", masks=False, size=64, channels=8, convs=1, hidden=8
    ).save(folder)


# file, writer of the folder, loader, type of the error's file
LOADERS = {
    "encoder": ("encoder", lambda to: save_encoder(VimEncoder(**SMALL), to), load_encoder),
    "clip": ("clip", save_clip_run, load_clip),
    "segmentation": ("segmentation", save_segmentation_run, load_segmentation),
    "detection": ("detection", save_detection_run, load_detection),
    "slide": ("slide", lambda to: SlideClassifier(["a", "b"], dim=4, hidden=4).save(to),
              load_slide),
}  # fmt: skip


def change(file: Path, how) -> str:
    """Change one weight matrix of a file; return its key."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    state = load_file(file)
    key = next(key for key, tensor in state.items() if tensor.ndim > 1)
    state[key] = how(state[key])
    save_file(state, file, metadata)
    return key


def with_value(value: float):
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[1] = value
        return tensor

    return changed


@pytest.mark.parametrize("loader", LOADERS)
def test_weights_that_are_no_numbers_are_refused_and_halves_converted(tmp_path, loader):
    name, write, load = LOADERS[loader]
    torch.manual_seed(0)
    tmp_path.mkdir(exist_ok=True)
    write(tmp_path)
    file = tmp_path / f"{name}.safetensors"
    intact = file.read_bytes()
    for how, says in (
        (with_value(float("nan")), "not finite"),
        (with_value(float("inf")), "not finite"),
        (lambda x: x.to(torch.int8), "number type torch.int8, expected torch.float32"),
        (lambda x: x > 0, "number type torch.bool"),
    ):
        key = change(file, how)
        with pytest.raises(ValueError, match=f"{name}.safetensors: {key}.*{says}"):
            load(tmp_path)
        file.write_bytes(intact)
    key = change(file, lambda x: x.bfloat16())
    loaded = load(tmp_path).state_dict()
    assert {tensor.dtype for tensor in loaded.values() if tensor.is_floating_point()} == {
        torch.float32
    }


def test_verify_names_a_weight_of_another_number_type(tmp_path):
    save_encoder(VimEncoder(**SMALL), tmp_path)
    key = change(tmp_path / "encoder.safetensors", lambda x: x.to(torch.int8))
    assert f"weights: number type torch.int8: {key}" in verify(tmp_path).problems
    assert json.loads((tmp_path / "encoder.json").read_text(encoding="utf-8"))["format"] == 1
