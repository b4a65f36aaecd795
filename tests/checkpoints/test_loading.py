"""load_encoder, save_encoder and verify: every kind of source, and every way to be wrong."""

import argparse
import json
import os
import pickle
import shutil
import time
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from golden_weights import GOLDEN, NAME, golden_input, write_golden
from safetensors.torch import load_file
from timm.models import adapt_input_conv

import vim_ssl
from vim_ssl import VimEncoder, load_encoder, save_encoder
from vim_ssl.checkpoints import files as checkpoint_files
from vim_ssl.checkpoints.adapt import adapt_patch_embed
from vim_ssl.checkpoints.loading import TAGS
from vim_ssl.checkpoints.verify import verify, verify_main
from vim_ssl.data.transforms.clip import ClipTransform
from vim_ssl.kernels.selective_scan import available_backends
from vim_ssl.models.presets import PRESETS
from vim_ssl.models.tokens import join_pos_embed, split_pos_embed
from vim_ssl.models.video import VideoEncoder

STRIDE8 = NAME.replace("patch16", "patch16_stride8")
TINY = {"img_size": 64, "embed_dim": 32, "depth": 2, "patch_size": 16, "num_classes": 5}


def small(**args) -> VimEncoder:
    """A small encoder, the same at every call, every parameter different from every other's start
    value, so that a lost one shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        encoder = VimEncoder(**TINY | args).eval()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return encoder


def write_released(path: Path, encoder: VimEncoder, name: str | None = NAME, **more) -> Path:
    """The container of the released files."""
    args = {} if name is None else {"args": argparse.Namespace(model=name, lr=1e-3, dist_url=None)}
    torch.save({"model": encoder.state_dict(), "epoch": 3, "optimizer": {}} | args | more, path)
    return path


def random_images(size=(64, 64), chans=3):
    return golden_input(size, chans)


def same(a: VimEncoder, b: VimEncoder, images: torch.Tensor | None = None) -> None:
    images = random_images() if images is None else images
    with torch.inference_mode():
        torch.testing.assert_close(a(images), b(images), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- presets


def test_preset_is_fresh_features_in_eval_mode():
    encoder = load_encoder("vim_nano_patch8_64")
    assert not encoder.training
    assert encoder.num_classes == 0
    assert encoder(random_images()).shape == (2, 192)


def test_the_encoder_that_comes_with_the_package_loads_by_name_and_says_what_made_it():
    name = "vim_mini_patch8_96.offline_rgb"
    encoder, fresh = load_encoder(name), load_encoder("vim_mini_patch8_96")
    assert encoder.grid_size == fresh.grid_size == (12, 12)
    assert encoder(torch.randn(1, 3, 96, 96)).shape == (1, 192)
    both = zip(encoder.parameters(), fresh.parameters(), strict=True)
    assert not any(torch.equal(trained, untrained) for trained, untrained in both)
    assert encoder.mask_token is None
    record = json.loads((TAGS[name] / "encoder.json").read_text())["made_by"]
    assert record["recipe"] == "mim_pretrain"
    with pytest.raises(ValueError, match=f"available: {name}"):
        load_encoder("vim_mini_patch8_96.offline_rbg")


@pytest.mark.parametrize("source", ["vim_nano_patch4_28", "run", "run/encoder.safetensors"])
def test_a_transform_by_name_reads_only_the_description(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    encoder = VimEncoder(**TINY | {"in_chans": 1, "data_config": {"mean": [0.3], "std": [0.2]}})
    path = save_encoder(encoder, "run")
    path.write_bytes(b"no weights")
    if source in PRESETS:
        encoder = load_encoder(source)
    transform = vim_ssl.create_transform(source, is_training=True, hflip=0)
    assert repr(transform) == repr(vim_ssl.create_transform(encoder, is_training=True, hflip=0))


def test_a_transform_of_a_run_on_videos_takes_videos(tmp_path):
    save_encoder(VideoEncoder(frames=4, tubelet=2, **TINY), tmp_path)
    assert isinstance(vim_ssl.create_transform(tmp_path), ClipTransform)


def test_preset_takes_size_channels_head_and_variants():
    encoder = load_encoder(
        "vim_nano_patch4_28", img_size=(16, 24), in_chans=3, num_classes=4, depth=2,
        global_pool="token+avg", dtype=torch.bfloat16, device="cpu",
    )  # fmt: skip
    assert encoder.grid_size == (4, 6)
    assert len(encoder.data_config["mean"]) == 3
    assert encoder.data_config["input_size"] == (3, 16, 24)
    assert encoder.head.weight.shape == (4, 384)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("vim_tinny_patch16_224", ValueError, "Did you mean 'vim_tiny_patch16_224'"),
        ("resnet50", ValueError, "Known: vim_tiny_patch16_224"),
        ("vim_tiny_patch16_224.in1k", ValueError, "no weights 'in1k'.*none yet"),
        ("gone.pth", FileNotFoundError, "no file or folder 'gone.pth'"),
        ("/gone/encoder.safetensors", FileNotFoundError, "no file or folder"),
        (Path("owner/name"), FileNotFoundError, "no file or folder"),
    ],
    ids=str,
)
def test_source_that_is_nothing(source, error, says):
    with pytest.raises(error, match=says):
        load_encoder(source)


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ({"droppath": 0.1}, TypeError, "Unknown argument 'droppath'.*'drop_path_rate'"),
        ({"num_clases": 3}, TypeError, "Did you mean 'num_classes'"),
        ({"if_devide_out": True}, TypeError, "Did you mean 'divide_out'"),
        ({"num_classes": -1}, ValueError, "num_classes is -1"),
        ({"num_classes": "ten"}, ValueError, "num_classes is 'ten'"),
        ({"num_classes": None}, ValueError, "untrained"),
        ({"ema": True}, ValueError, "untrained"),
        ({"img_size": 225}, ValueError, "img_size 225 is not divisible"),
        ({"img_size": (64, 64, 64)}, ValueError, "expected pixels or"),
        ({"dtype": torch.int64}, ValueError, "floating-point"),
        ({"global_pool": "min"}, ValueError, "global_pool 'min'"),
    ],
    ids=str,
)
def test_arguments_that_are_wrong(args, error, says):
    with pytest.raises(error, match=says):
        load_encoder("vim_nano_patch8_64", **args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there():
    with pytest.raises(ValueError, match="no GPU here"):
        load_encoder("vim_nano_patch8_64", device="cuda")


# -------------------------------------------------------------------- files of ours


VARIANTS = [
    {},
    {"cls_position": "double", "norm_after_scan": True},
    {"cls_position": "none", "rope": True, "use_pos_embed": False},
    {"directions": "backward", "num_registers": 3, "use_mask_token": True},
    {"directions": "layer", "global_pool": "max"},
    {"shared_conv": True, "divide_out": False, "global_pool": "max-logits"},
    {"in_chans": 2, "img_size": (48, 80), "stride": 8, "divide_out": False},
    {"global_pool": "token+avg", "cls_position": "first", "num_classes": 0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())) or "v2")
def test_saved_encoder_comes_back_whole(tmp_path, variant):
    encoder = small(**variant)
    save_encoder(encoder, tmp_path / "run", record={"loss": 0.5})
    for source in (tmp_path / "run", str(tmp_path / "run" / "encoder.safetensors")):
        loaded = load_encoder(source, num_classes=encoder.num_classes)
        assert loaded.config == encoder.config
        same(encoder, loaded, random_images(encoder.img_size, encoder.in_chans))
    assert json.loads((tmp_path / "run" / "encoder.json").read_text())["made_by"] == {"loss": 0.5}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "encoder.json",
        "encoder.safetensors",
    ]


def test_saved_keys_are_the_official_ones(tmp_path):
    official = json.loads((GOLDEN / "vim_tiny_patch16_224.keys.json").read_text())
    encoder = load_encoder("vim_tiny_patch16_224", num_classes=1000)
    saved = load_file(save_encoder(encoder, tmp_path))
    assert {key: list(tensor.shape) for key, tensor in saved.items()} == official


@pytest.mark.parametrize(
    ("ema_default", "ema", "takes_ema"),
    [(True, None, True), (True, False, False), (False, None, False), (False, True, True)],
)
def test_ema_copy_is_chosen_by_file_or_caller(tmp_path, ema_default, ema, takes_ema):
    encoder, average = small(), VimEncoder(**TINY).eval()
    save_encoder(encoder, tmp_path, ema=average, ema_default=ema_default)
    same(average if takes_ema else encoder, load_encoder(tmp_path, ema=ema, num_classes=None))
    by_name = load_encoder(tmp_path / "encoder_ema.safetensors", num_classes=None)
    same(average, by_name)


def test_saving_without_ema_again_leaves_no_old_copy(tmp_path):
    encoder = small()
    save_encoder(encoder, tmp_path, ema=encoder.state_dict())
    save_encoder(encoder, tmp_path)
    assert not (tmp_path / "encoder_ema.safetensors").exists()
    with pytest.raises(ValueError, match="without an EMA copy"):
        load_encoder(tmp_path, ema=True)


def test_save_refuses_what_cannot_be_loaded_again(tmp_path):
    encoder = small()
    with pytest.raises(TypeError, match="unwrap it"):
        save_encoder(torch.nn.Sequential(encoder), tmp_path)
    with pytest.raises(ValueError, match=r"differ in head\.bias"):
        save_encoder(encoder, tmp_path, ema=small(num_classes=0))
    with pytest.raises(TypeError, match="JSON"):
        save_encoder(encoder, tmp_path, record={"path": Path()})
    assert list(tmp_path.iterdir()) == []


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    encoder = small()
    save_encoder(encoder, tmp_path)

    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_encoder(VimEncoder(**TINY), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    same(encoder, load_encoder(tmp_path, num_classes=None))


def edit_json(folder: Path, **changes) -> None:
    path = folder / "encoder.json"
    record = json.loads(path.read_text())
    config = record["config"] | changes.pop("config", {})
    path.write_text(json.dumps(record | {"config": config} | changes))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "encoder.json").unlink(), "no encoder.json next to it"),
        (lambda f: (f / "encoder.json").write_text("{"), "not JSON"),
        (lambda f: (f / "encoder.json").write_text("[]"), 'no "config"'),
        (lambda f: (f / "encoder.json").write_text(""), "is empty"),
        (lambda f: edit_json(f, format=99), "format 99.*Upgrade"),
        (lambda f: edit_json(f, extra=1), "unknown key 'extra'"),
        (lambda f: edit_json(f, ema="yes"), '"ema" is'),
        (lambda f: edit_json(f, config={"embed_dims": 3}), "'embed_dims'.*'embed_dim'"),
        (lambda f: edit_json(f, config={"embed_dim": 64}), r"does not fit: .*expected"),
        (lambda f: edit_json(f, config={"img_size": [64, 80]}), "position table of 17 rows"),
        (lambda f: edit_json(f, config={"directions": "forward"}), "14 unexpected.*_b"),
        (lambda f: edit_json(f, config={"use_mask_token": True}), r"1 missing \(mask_token"),
        (lambda f: edit_json(f, config={"num_classes": 9}), "head of 5 classes.*says 9"),
        (lambda f: (f / "encoder.safetensors").write_bytes(b""), "is empty"),
        (lambda f: os.truncate(f / "encoder.safetensors", 5000), "truncated"),
        (lambda f: (f / "encoder.safetensors").unlink(), "not written its encoder yet"),
    ],
    ids=[
        "no-json", "broken-json", "foreign-json", "empty-json", "newer-format", "unknown-key",
        "unknown-ema", "unknown-argument", "other-width", "other-size",
        "other-directions", "other-tokens",
        "other-classes",
        "empty-weights", "truncated-weights", "no-weights",
    ],
)  # fmt: skip
def test_damaged_folder(tmp_path, damage, says):
    save_encoder(small(), tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load_encoder(tmp_path, num_classes=None)
    assert not verify(tmp_path).loads


def test_folders_without_one_file_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="not written its encoder yet"):
        load_encoder(tmp_path)
    write_released(tmp_path / "a.pth", small())
    same(small(), load_encoder(tmp_path, num_classes=None))
    write_released(tmp_path / "b.pth", small())
    with pytest.raises(ValueError, match=r"several weights files.*a\.pth.*b\.pth"):
        load_encoder(tmp_path)


# -------------------------------------------------------------------- released checkpoints


@pytest.fixture(scope="module")
def golden_file(tmp_path_factory):
    return write_golden(tmp_path_factory.mktemp("golden") / "vim_t_midclstok_76p1acc.pth")


@pytest.mark.parametrize("backend", available_backends())
def test_released_container_gives_the_reference_outputs(golden_file, backend):
    expected = np.load(GOLDEN / "vim_tiny_patch16_224.npz")
    encoder = load_encoder(golden_file, num_classes=None, scan_backend=backend)
    with torch.inference_mode():
        tokens = encoder.forward_features(golden_input())
        for name, out in (
            ("features", encoder.forward_head(tokens, pre_logits=True)),
            ("logits", encoder.forward_head(tokens)),
        ):
            error = np.abs(out.double().numpy() - expected[name]).max()
            assert error <= 1e-4 * np.abs(expected[name]).max()


@pytest.mark.parametrize("wrap", ["model", "state_dict", "bare", "module", "legacy", "half"])
def test_every_container_form(tmp_path, wrap):
    encoder, path = small(), tmp_path / "vim.pth"
    state = encoder.state_dict()
    content = {
        "model": {"model": state, "args": argparse.Namespace(model=NAME)},
        "state_dict": {"state_dict": state, "arch": "vim"},
        "module": {"model": {f"module.{key}": value for key, value in state.items()}},
        "half": {key: value.half() for key, value in state.items()},
    }.get(wrap, state)
    torch.save(content, path, _use_new_zipfile_serialization=wrap != "legacy")
    loaded = load_encoder(path, num_classes=None, divide_out=True, cls_position="middle")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    if wrap == "half":
        encoder.half().float()
    same(encoder, loaded)


@pytest.mark.parametrize(
    "variant",
    [
        {}, {"stride": 8, "img_size": 80}, {"cls_position": "first"}, {"cls_position": "double"},
        {"cls_position": "none"}, {"divide_out": False}, {"norm_after_scan": True},
        {"d_state": 4, "d_conv": 3, "expand": 1, "dt_rank": 5}, {"in_chans": 4},
        {"directions": "forward"}, {"use_pos_embed": False, "img_size": 224},
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) or "v2",
)  # fmt: skip
def test_architecture_is_read_from_shapes_and_name(tmp_path, variant):
    encoder = small(**variant)
    name = NAME if variant.get("stride") is None else STRIDE8
    if variant.get("directions"):
        name = name.replace("_bimambav2", "")
    if variant.get("cls_position") == "first":
        name = name.replace("midclstok", "clstok")
    if variant.get("divide_out") is False:
        name = name.replace("_div2", "")
    path = write_released(tmp_path / "vim.pth", encoder, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if "_div2" in name and "bimamba" in name else "ignore")
        loaded = load_encoder(path, num_classes=None)
    for key in set(encoder.config) - {"stride", "dt_rank", "data_config"}:
        assert loaded.config[key] == encoder.config[key], key
    same(encoder, loaded, random_images(encoder.img_size, encoder.in_chans))


def test_without_a_name_the_assumption_is_said(tmp_path):
    encoder = small()
    path = write_released(tmp_path / "vim.pth", encoder, name=None)
    with pytest.warns(UserWarning, match="assumed") as caught:
        loaded = load_encoder(path, num_classes=None)
    said = " ".join(str(warning.message) for warning in caught)
    assert "assumed divide_out=True" in said
    assert "class token's position: assumed in the middle" in said
    assert all(warning.filename == __file__ for warning in caught)
    same(encoder, loaded)
    assert "ASSUMED" in str(verify(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_encoder(path, divide_out=False, cls_position="first")


def test_name_of_a_preset_says_nothing_of_division(tmp_path):
    path = write_released(tmp_path / "vim.pth", small(), name="vim_tiny_patch16_224")
    with pytest.warns(UserWarning, match="assumed divide_out=True"):
        assert load_encoder(path, cls_position="middle").config["divide_out"]


@pytest.mark.parametrize(
    ("asked", "img_size", "stride"),
    [
        ({"stride": 8}, (224, 224), 8),
        ({"stride": 16}, (432, 432), 16),
        ({"img_size": 224}, (224, 224), 8),
        ({"img_size": 432}, (432, 432), 16),
        ({"stride": 8, "img_size": 96}, (96, 96), 8),
    ],
    ids=str,
)
def test_table_of_730_rows_fits_two_layouts(tmp_path, asked, img_size, stride):
    encoder = small(img_size=224, stride=8, depth=1)
    nameless = write_released(tmp_path / "a.pth", encoder, name=None)
    with pytest.raises(ValueError, match=r"stride 8 at 224 px and stride 16 at 432 px.*Pass"):
        load_encoder(nameless, divide_out=True)
    loaded = load_encoder(nameless, divide_out=True, cls_position="middle", **asked)
    assert loaded.img_size == img_size
    assert loaded.config["stride"] == stride
    named = load_encoder(write_released(tmp_path / "b.pth", encoder, STRIDE8))
    assert (named.img_size, named.config["stride"]) == ((224, 224), 8)


def test_table_that_is_no_square_asks_for_the_size(tmp_path):
    encoder = small(img_size=(48, 80))
    path = write_released(tmp_path / "vim.pth", encoder)
    with pytest.raises(ValueError, match=r"16 rows, 15 of them patches.*img_size="):
        load_encoder(path)
    with pytest.raises(ValueError, match="another number of patches"):
        load_encoder(path, img_size=64)
    loaded = load_encoder(path, img_size=(48, 80), num_classes=None)
    same(encoder, loaded, random_images((48, 80)))


def without_own_conv(state):
    return {key: value for key, value in state.items() if "conv1d_b" not in key}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (NAME.replace("v2", "v1"), dict, "says bimambav1"),
        (None, without_own_conv, "8 unexpected.*x_proj_b"),
        (NAME.replace("v2", "_bidirectional"), dict, "two directions each"),
        (NAME, lambda s: s | {"rope.freqs_cos": torch.ones(16, 32)}, "another definition"),
        (NAME, lambda s: {"blocks.0.attn.qkv.weight": torch.ones(1)}, "vision transformer"),
        (NAME, lambda s: {"layer1.0.conv1.weight": torch.ones(1)}, "a ResNet"),
        (NAME, lambda s: {"w": torch.ones(1)}, "architecture is unknown"),
        (NAME, lambda s: s | {"layers.0.mixer.gamma": torch.ones(32)}, "1 unexpected.*gamma"),
        (NAME, lambda s: {k: v for k, v in s.items() if k != "norm_f.weight"}, "1 missing.*norm_f"),
        (NAME, lambda s: s | {"norm_f.weight": torch.ones(7)}, r"norm_f.weight is \(7,\)"),
        (NAME, lambda s: s | {"note": "hello"}, "'note' is a str, not a tensor"),
    ],
    ids=[
        "v1-by-name", "parts-of-v1-and-v2", "layer-pairs", "rope", "vit", "resnet", "unknown",
        "unexpected-key", "missing-key", "other-shape", "no-tensor",
    ],
)  # fmt: skip
def test_weights_that_are_refused(tmp_path, name, change, says):
    path = tmp_path / "vim.pth"
    args = {} if name is None else {"args": argparse.Namespace(model=name)}
    torch.save({"model": change(small().state_dict())} | args, path)
    with pytest.raises(ValueError, match=says):
        load_encoder(path)


def test_strict_false_loads_what_fits(tmp_path):
    encoder = small()
    state = encoder.state_dict() | {"extra": torch.ones(1)}
    del state["norm_f.weight"]
    path = write_released(tmp_path / "vim.pth", encoder, model=state)
    with pytest.warns(UserWarning, match=r"1 missing \(norm_f.weight\); 1 unexpected \(extra\)"):
        loaded = load_encoder(path, strict=False)
    torch.testing.assert_close(loaded.cls_token, encoder.cls_token)
    torch.testing.assert_close(loaded.norm_f.weight, torch.ones(32))


def _under(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "encoder.", "backbone.", "model.encoder.", "module.model.",
     "_fsdp_wrapped_module.backbone._orig_mod."],
)  # fmt: skip
@pytest.mark.parametrize(
    "container", [None, "model_state_dict", "state_dict", "teacher", "net", "ema"]
)
def test_weights_of_a_wrapped_model(tmp_path, prefix, container):
    encoder, path = small(), tmp_path / "vim.pth"
    state = _under(prefix, encoder.state_dict())
    torch.save({container: state, "epoch": 3} if container else state, path)
    loaded = load_encoder(path, num_classes=None, divide_out=True, cls_position="middle")
    same(encoder, loaded)


def test_weights_of_torchs_average_and_of_a_compiled_model(tmp_path):
    encoder = small()
    average = torch.optim.swa_utils.AveragedModel(encoder)
    torch.save(average.state_dict(), tmp_path / "average.pth")
    torch.save(torch.compile(encoder).state_dict(), tmp_path / "compiled.pth")
    for file in ("average.pth", "compiled.pth"):
        args = {"num_classes": None, "divide_out": True, "cls_position": "middle"}
        same(encoder, load_encoder(tmp_path / file, **args))


def test_the_encoder_of_a_larger_model_is_told(tmp_path):
    encoder, path = small(), tmp_path / "vim.pth"
    larger = _under("encoder.", encoder.state_dict()) | {"decoder.weight": torch.ones(2)}
    torch.save(larger, path)
    with pytest.warns(UserWarning, match=r"encoder is 'encoder'; 1 other.*decoder\.weight"):
        loaded = load_encoder(path, num_classes=None, divide_out=True, cls_position="middle")
    same(encoder, loaded)


@pytest.mark.parametrize("nested", [True, False])
def test_student_and_teacher(tmp_path, nested):
    student, teacher, path = small(), VimEncoder(**TINY).eval(), tmp_path / "vim.pth"
    states = {"student": student.state_dict(), "teacher": teacher.state_dict()}
    if not nested:
        states = {
            k: v for name in states for k, v in _under(f"{name}.backbone.", states[name]).items()
        }
    torch.save(states, path)
    args = {"num_classes": None, "divide_out": True, "cls_position": "middle"}
    with pytest.warns(UserWarning, match="the student is loaded; ema=True loads the teacher"):
        same(student, load_encoder(path, **args))
    with pytest.warns(UserWarning, match="the student is loaded"):
        same(teacher, load_encoder(path, ema=True, **args))


def test_several_encoders_in_a_file_are_refused(tmp_path):
    state = small().state_dict()
    torch.save(_under("online.", state) | _under("target.", state), tmp_path / "vim.pth")
    with pytest.raises(ValueError, match=r"several encoders, under the keys 'online', 'target'"):
        load_encoder(tmp_path / "vim.pth")


def test_ema_of_a_released_file_only_when_asked(tmp_path):
    encoder, average = small(), VimEncoder(**TINY).eval()
    path = write_released(tmp_path / "vim.pth", encoder, model_ema=average.state_dict())
    same(encoder, load_encoder(path, num_classes=None))
    same(average, load_encoder(path, num_classes=None, ema=True))
    bare = write_released(tmp_path / "bare.pth", encoder)
    with pytest.raises(ValueError, match="no EMA copy"):
        load_encoder(bare, ema=True)


# -------------------------------------------------------------------- files that are broken or bad


class Bomb:
    """What a malicious checkpoint holds: unpickled carelessly, it calls `os.mkdir`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Harmless:
    """A class of somebody's training code."""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "protocol5"])
def test_pickle_that_wants_to_run_code_is_refused(tmp_path, form):
    path, trace = tmp_path / "vim.pth", tmp_path / "ran"
    content = {"model": small().state_dict(), "args": Bomb(trace)}
    if form == "protocol5":
        path.write_bytes(pickle.dumps({"args": Bomb(trace)}, protocol=5))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"refused: it refers to (posix|nt|os)\.mkdir.*run any"):
        load_encoder(path)
    assert not trace.exists()


def test_pickle_with_a_foreign_class_is_refused_by_name(tmp_path):
    path = write_released(tmp_path / "vim.pth", small(), config=Harmless())
    with pytest.raises(ValueError, match=r"refers to test_loading\.Harmless"):
        load_encoder(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "not a checkpoint: it starts with"),
        (b"version https://git-lfs.github.com/spec/v1", "not a checkpoint: it starts with"),
        (b"\x80\x02garbage", "damaged"),
        (pickle.dumps([1, 2], protocol=2), "damaged"),
    ],
    ids=["empty", "html", "lfs-pointer", "garbage", "plain-pickle"],
)
def test_file_that_is_no_checkpoint(tmp_path, content, says):
    path = tmp_path / "vim.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_encoder(path)


@pytest.mark.parametrize("keep", [30, 0.5, 0.99], ids=["head", "half", "most"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_file(tmp_path, keep, zipped):
    path = tmp_path / "vim.pth"
    content = {"model": small().state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, keep if isinstance(keep, int) else int(path.stat().st_size * keep))
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        load_encoder(path)


def test_saved_list_is_no_state_dict(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "vim.pth")
    with pytest.raises(ValueError, match="contains a list"):
        load_encoder(tmp_path / "vim.pth")


# -------------------------------------------------------------------- adapting


@pytest.fixture
def trained(tmp_path):
    save_encoder(small(), tmp_path)
    return tmp_path


def test_a_head_that_is_left_out_by_default_is_mentioned(trained, caplog):
    assert load_encoder(trained).num_classes == 0
    (message,) = caplog.messages
    assert message.startswith(f"{trained}: its head of 5 outputs is left out (num_classes=None")
    caplog.clear()
    for num_classes in (0, None, 5):  # requested
        load_encoder(trained, num_classes=num_classes)
    save_encoder(small(num_classes=0), trained)
    load_encoder(trained)  # nothing to leave out
    assert not caplog.messages


def test_class_names_come_with_the_runs_head_and_stay_with_it(tmp_path):
    names = ["cat", "dog", "eel", "fox", "gnu"]
    save_encoder(small(), tmp_path / "run", record={"classes": names})
    encoder = load_encoder(tmp_path / "run", num_classes=None)
    assert encoder.classes == load_encoder(tmp_path / "run", num_classes=5).classes == names
    assert load_encoder(tmp_path / "run", num_classes=7).classes is None
    save_encoder(encoder, tmp_path / "copy")
    assert load_encoder(tmp_path / "copy", num_classes=None).classes == names
    encoder.reset_classifier(5)
    assert encoder.classes is None


@pytest.mark.parametrize("chans", [1, 2, 3, 4, 6, 7])
def test_patch_embedding_adapts_as_timm_does(chans):
    weight = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(adapt_patch_embed(weight, chans), adapt_input_conv(chans, weight))


def test_grey_image_gives_what_it_gave_in_three_channels(trained):
    grey = random_images(chans=1)
    one = load_encoder(trained, in_chans=1)
    with torch.inference_mode():
        expected = load_encoder(trained)(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(one(grey), expected, rtol=1e-4, atol=1e-4)
    assert one.data_config["bands"] == ("L",)
    assert one.data_config["mean"] == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))


def test_statistics_follow_the_channels(trained):
    data = load_encoder(trained, in_chans=4, img_size=(48, 96)).data_config
    assert data["mean"] == (0.485, 0.456, 0.406, 0.485)
    assert data["input_size"] == (4, 48, 96)
    data = load_encoder(trained, in_chans=2, data_config={"bands": ["VV", "VH"]}).data_config
    assert data["bands"] == ("VV", "VH")


def test_named_bands_take_their_own_weights(trained):
    stats = {
        "bands": ("B02", "B03", "B04", "B08"), "mean": (1.0, 2.0, 3.0, 4.0), "std": (5.0,) * 4,
    }  # fmt: skip
    four = load_encoder(trained, in_chans=4, data_config=stats)
    had = load_encoder(trained).patch_embed.proj.weight
    has = four.patch_embed.proj.weight
    expected = torch.stack([had[:, 2], had[:, 1], had[:, 0], had.mean(1)], 1) * 3 / 4
    torch.testing.assert_close(has, expected)
    assert four.data_config["mean"] == stats["mean"]
    save_encoder(four, trained / "four")  # the statistics travel with the encoder
    again = load_encoder(trained / "four")
    assert {k: again.data_config[k] for k in stats} == stats
    torch.testing.assert_close(again.patch_embed.proj.weight, has)
    # Of these some are known, so they go by name once more.
    two = load_encoder(trained / "four", in_chans=2, data_config={"bands": ("B08", "SWIR")})
    torch.testing.assert_close(two.patch_embed.proj.weight[:, 0], 2 * has[:, 3])
    torch.testing.assert_close(two.patch_embed.proj.weight[:, 1], 2 * has.mean(1))
    assert two.data_config["mean"] == (4.0, 2.5)


def test_the_same_bands_in_another_order(trained):
    swapped = load_encoder(trained, data_config={"bands": ("blue", "green", "red")})
    had = load_encoder(trained)
    torch.testing.assert_close(swapped.patch_embed.proj.weight, had.patch_embed.proj.weight.flip(1))
    assert swapped.data_config["mean"] == (0.406, 0.456, 0.485)


def test_size_is_resampled_for_good_and_the_class_row_kept(trained):
    at_call, for_good = load_encoder(trained), load_encoder(trained, img_size=(48, 96))
    assert for_good.grid_size == (3, 6)
    assert for_good.pos_embed.shape == (1, 19, 32)
    same(at_call, for_good, random_images((48, 96)))
    for encoder, middle in ((at_call, 8), (for_good, 9)):
        row = load_file(trained / "encoder.safetensors")["pos_embed"][:, 8]
        torch.testing.assert_close(encoder.pos_embed[:, middle], row)


def test_other_stride_resamples_the_table(trained):
    encoder = load_encoder(trained, stride=8)
    assert encoder.grid_size == (7, 7)
    same(load_encoder(trained, stride=8, img_size=64), encoder)


def test_class_token_moved_takes_its_row_along(trained):
    middle, first = load_encoder(trained), load_encoder(trained, cls_position="first")
    patches, cls = split_pos_embed(middle.pos_embed, "middle")
    torch.testing.assert_close(first.pos_embed, join_pos_embed(patches, cls, "first"))
    torch.testing.assert_close(first.pos_embed[:, 0], middle.pos_embed[:, 8])


def test_head_is_kept_when_it_fits_else_fresh(trained, caplog):
    own = load_encoder(trained, num_classes=None)
    assert own.num_classes == 5
    same(own, load_encoder(trained, num_classes=np.int64(5)))
    assert not caplog.records
    fresh = load_encoder(trained, num_classes=7)
    assert fresh(random_images()).shape == (2, 7)
    assert "fresh head of 7 classes: the checkpoint's has 5" in caplog.text
    joined = load_encoder(trained, num_classes=None, global_pool="token+avg")
    assert joined.head.weight.shape == (5, 64)
    assert "another width" in caplog.text
    pooled = load_encoder(trained, num_classes=None, global_pool="avg")
    torch.testing.assert_close(pooled.head.weight, own.head.weight)


def test_own_head_that_is_not_there(tmp_path):
    save_encoder(small(num_classes=0), tmp_path)
    with pytest.raises(ValueError, match="which has none"):
        load_encoder(tmp_path, num_classes=None)


@pytest.mark.parametrize(("had", "other"), [("forward", "backward"), ("backward", "forward")])
def test_directions_are_seeded_dropped_and_never_invented(tmp_path, had, other):
    one = small(directions=had)
    save_encoder(one, tmp_path / "one")
    both = load_encoder(tmp_path / "one", directions="both", num_classes=None)
    mixer = both.layers[1].mixer
    for left, right in (
        ("A_log", "A_b_log"), ("D", "D_b"), ("conv1d.weight", "conv1d_b.weight"),
        ("dt_proj.bias", "dt_proj_b.bias"), ("x_proj.weight", "x_proj_b.weight"),
    ):  # fmt: skip
        torch.testing.assert_close(mixer.get_parameter(left), mixer.get_parameter(right))
    with torch.inference_mode():
        head = both.forward_head(both.forward_tokens(both.embed(random_images()), directions=had))
        torch.testing.assert_close(head, one(random_images()))
    save_encoder(both, tmp_path / "both")
    same(one, load_encoder(tmp_path / "both", directions=had, num_classes=None))
    with pytest.raises(ValueError, match=f"directions='{other}' was requested.*directions='both'"):
        load_encoder(tmp_path / "one", directions=other)


def test_new_tokens_start_fresh_and_old_ones_can_go(trained, tmp_path):
    rich = load_encoder(trained, use_mask_token=True, num_registers=2, num_classes=None)
    assert rich.mask_token.shape == (1, 1, 32)
    assert rich.register_tokens.shape == (1, 2, 32)
    save_encoder(rich, tmp_path / "rich")
    plain = load_encoder(tmp_path / "rich", use_mask_token=False, num_registers=0, num_classes=None)
    same(load_encoder(trained, num_classes=None), plain)
    with pytest.raises(ValueError, match=r"num_registers=3 was requested.*num_registers=2"):
        load_encoder(tmp_path / "rich", num_registers=3)


@pytest.mark.parametrize(
    "args",
    [{"embed_dim": 64}, {"depth": 3}, {"d_state": 8}, {"patch_size": 8}, {"dt_rank": 7},
     {"norm_after_scan": True}, {"use_pos_embed": False}, {"cls_position": "double"}],
    ids=str,
)  # fmt: skip
def test_argument_that_contradicts_the_weights(trained, args):
    name = next(iter(args))
    with pytest.raises(ValueError, match=f"{name}=.* was requested, but .* has {name}="):
        load_encoder(trained, **args)


def test_argument_that_agrees_is_fine(trained):
    args = {"embed_dim": 32, "depth": 2, "dt_rank": 2, "patch_size": 16, "drop_path_rate": 0.2}
    assert load_encoder(trained, **args).drop_path_rate == 0.2


def test_dtype_and_device(trained):
    encoder = load_encoder(trained, dtype=torch.float64, device=torch.device("cpu"))
    assert {p.dtype for p in encoder.parameters()} == {torch.float64}
    assert encoder(random_images().double()).dtype == torch.float64


# -------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub in a local folder: repositories at <root>/<owner>/<name>[@revision]."""
    root, asked = tmp_path / "hub", []

    def place(repo, revision):
        return root / (repo if revision is None else f"{repo}@{revision}")

    def list_repo_files(self, repo_id, *, revision=None):
        folder = place(repo_id, revision)
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    def hf_hub_download(repo_id, filename, *, revision=None):
        asked.append(filename)
        return str(place(repo_id, revision) / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.chdir(tmp_path)
    return root, asked


def test_hub_id_of_ours(hub):
    root, asked = hub
    encoder, average = small(), VimEncoder(**TINY).eval()
    save_encoder(encoder, root / "me/vim", ema=average, ema_default=False)
    for source in ("me/vim", "hf://me/vim", "me/vim/encoder.safetensors"):
        same(encoder, load_encoder(source, num_classes=None))
    assert "encoder_ema.safetensors" not in asked  # nothing is downloaded for nothing
    same(average, load_encoder("me/vim", ema=True, num_classes=None))


@pytest.mark.parametrize("source", ["me/vim@v2", "hf://me/vim@v2/b.pth", "me/vim/b.pth@v2"])
def test_hub_revision(hub, source):
    root, _ = hub
    (root / "me/vim@v2").mkdir(parents=True)
    write_released(root / "me/vim@v2" / "b.pth", small())
    same(small(), load_encoder(source, num_classes=None))


def test_hub_id_with_several_files_lists_them(hub):
    root, _ = hub
    (root / "hustvl/Vim-tiny").mkdir(parents=True)
    for name in ("vim_t.pth", "vim_t_ft.pth"):
        write_released(root / "hustvl/Vim-tiny" / name, small())
    with pytest.raises(ValueError, match=r"several.*Vim-tiny/vim_t\.pth, .*/vim_t_ft\.pth"):
        load_encoder("hustvl/Vim-tiny")
    same(small(), load_encoder("hustvl/Vim-tiny/vim_t.pth", num_classes=None))
    with pytest.raises(FileNotFoundError, match=r"no file 'x.pth'; its weights: vim_t\.pth"):
        load_encoder("hustvl/Vim-tiny/x.pth")


def test_hub_prefers_ours_at_the_top(hub):
    root, _ = hub
    save_encoder(small(), root / "me/run")
    save_encoder(small(), root / "me/run/checkpoints/step-3")
    write_released(root / "me/run/vim.pth", VimEncoder(**TINY))
    same(small(), load_encoder("me/run", num_classes=None))
    same(small(), load_encoder("me/run/checkpoints/step-3", num_classes=None))


def test_hub_without_weights(hub):
    root, _ = hub
    (root / "me/vim").mkdir(parents=True)
    (root / "me/vim/README.md").write_text("soon")
    with pytest.raises(FileNotFoundError, match=r"has no weights.*it contains README.md"):
        load_encoder("me/vim")


def test_path_wins_over_hub(hub):
    _, asked = hub
    save_encoder(small(), "me/vim")
    same(small(), load_encoder("me/vim", num_classes=None))
    assert not asked


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("a/b", ("a/b", None, None)),
        ("hf://a/b-1.0", ("a/b-1.0", None, None)),
        ("a/b/c/d.pth", ("a/b", None, "c/d.pth")),
        ("a/b@main", ("a/b", "main", None)),
        ("a/b@main/c.pth", ("a/b", "main", "c.pth")),
        ("a/b/c.pth@main", ("a/b", "main", "c.pth")),
        ("a/b@refs/pr/1/c.pth", ("a/b", "refs/pr/1", "c.pth")),
        ("./a/b", None), ("/a/b", None), ("a", None), ("~/a", None), ("https://x/y/z", None),
    ],
)  # fmt: skip
def test_hub_ids(source, parts):
    assert checkpoint_files.parse_hub_id(source) == parts


def test_hub_unreachable_ends_soon_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint_files, "HUB_TIMEOUT_S", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"'me/vim' is not a local path, and the Hub cannot be"
    ):
        load_encoder("me/vim")
    assert time.monotonic() - start < 4


def test_offline_mode_takes_the_cache_or_says_so(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    save_encoder(small(), tmp_path / "cached")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tmp_path / "cached")
    same(small(), load_encoder("me/vim", num_classes=None))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConnectionError, match=r"offline mode is enabled.*HF_HUB_OFFLINE"):
        load_encoder("me/vim")


# -------------------------------------------------------------------- verify


def test_verify_tells_what_a_released_file_is(golden_file, capsys):
    assert verify_main([str(golden_file)]) == 0
    text = capsys.readouterr().out
    for fact in (
        NAME, "vim_tiny_patch16_224: embed_dim 192", "7,148,008", "14x14 patches of 224x224 px",
        "divided by 2, as its name", "Vim-Ti, top-1 76.1 %", "class token middle",
        "loads completely",
    ):  # fmt: skip
        assert fact in text


def test_verify_lists_every_key_of_every_copy(tmp_path, capsys):
    state, average = small().state_dict(), small().state_dict()
    for key in [key for key in state if ".mixer.conv1d." in key]:
        del average[key]
    state["head.bias"][0] = torch.nan
    path = write_released(tmp_path / "vim.pth", small(), model=state, model_ema=average)
    assert verify_main([str(path)]) == 1
    text = capsys.readouterr().out
    assert "weights: non-finite values: head.bias" in text
    for i in range(2):
        assert f"EMA copy: missing: layers.{i}.mixer.conv1d.bias" in text
    assert "does NOT load completely" in text


def test_verify_takes_the_layout_of_a_nameless_file(tmp_path, capsys):
    encoder = small(img_size=48, stride=8)
    path = write_released(tmp_path / "vim.pth", encoder, name=None)
    assert verify_main([str(path)]) == 1
    assert "Pass stride=8 or stride=16" in capsys.readouterr().out
    assert verify_main([str(path), "--stride", "8"]) == 0
    assert verify_main([str(path), "--img-size", "48"]) == 0
    assert "5x5 patches of 48x48 px" in capsys.readouterr().out


def test_verify_of_a_run(tmp_path, capsys):
    save_encoder(small(), tmp_path, ema=small(), record={"recipe": "mim_pretrain"})
    shutil.copy(tmp_path / "encoder.json", tmp_path / "copy.json")
    assert verify_main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "vim_ssl file" in text
    assert "mim_pretrain" in text
    assert "EMA copy tried" in text


def test_verify_of_nothing(capsys):
    assert verify_main(["vim_tinny_patch16_224"]) == 1
    assert verify_main(["vim_tiny_patch16_224"]) == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_public_names():
    assert vim_ssl.load_encoder is load_encoder
    assert vim_ssl.save_encoder is save_encoder
