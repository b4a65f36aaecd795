"""Encoders of timm: timm's numbers, timm's files, and the methods of the protocol."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform as timm_transform
from timm.data import resolve_model_data_config
from timm_encoders import AVERAGED, BEIT, CNN, EVA, EVERY, SWIN, TOKENS, VIT, WHOLE

from vim_ssl import create_transform, load_encoder, save_encoder
from vim_ssl.checkpoints.identity import encoder_hash
from vim_ssl.checkpoints.loading import made_by
from vim_ssl.checkpoints.verify import verify
from vim_ssl.evaluation.seen import trainings_of
from vim_ssl.models.protocol import Encoder
from vim_ssl.models.timm_encoder import TimmEncoder

every = pytest.mark.parametrize(("source", "args"), EVERY.values(), ids=EVERY)
with_tokens = pytest.mark.parametrize(("source", "args"), TOKENS.values(), ids=TOKENS)
without_tokens = pytest.mark.parametrize(("source", "args"), WHOLE.values(), ids=WHOLE)


def inputs(encoder, count=2) -> torch.Tensor:
    return torch.randn(count, *encoder.input_shape)


def test_both_kinds_of_encoders_satisfy_the_protocol():
    assert isinstance(load_encoder("vim_nano_patch4_28", depth=1), Encoder)
    assert isinstance(load_encoder(CNN[0], **CNN[1]), Encoder)


@every
def test_a_saved_encoder_is_timms_with_its_keys_and_numbers(tmp_path, source, args):
    encoder = load_encoder(source, num_classes=3, **args)
    encoder.classes = ["a", "b", "c"]
    file = save_encoder(encoder, tmp_path)
    model = timm.create_model(
        source.removeprefix("timm:"), num_classes=3, checkpoint_path=file, **args
    ).eval()
    assert load_file(file).keys() == model.state_dict().keys()
    images = inputs(encoder)
    logits = model(images)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    for loaded in (
        load_encoder(tmp_path, num_classes=None),
        load_encoder(f"{source}?file={file}", num_classes=None, **args),
    ):
        assert torch.equal(loaded(images), logits)
        torch.testing.assert_close(
            loaded.forward_head(loaded.forward_features(images), pre_logits=True), features,
            rtol=0, atol=1e-6,
        )  # fmt: skip
    assert load_encoder(tmp_path, num_classes=None).classes == ["a", "b", "c"]
    assert load_encoder(tmp_path, num_classes=3).classes == ["a", "b", "c"]
    bare = load_encoder(tmp_path)
    assert (bare.num_classes, bare.classes) == (0, None)
    torch.testing.assert_close(bare(images), features, rtol=0, atol=1e-6)
    assert encoder_hash(tmp_path) == encoder_hash(f"{source}?file={file}") != ""


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224.openai", "resnet50.a1_in1k"])
def test_images_are_prepared_as_timm_prepares_them(name):
    """Mean, deviation, interpolation and crop of the tag; both differ from ImageNet's defaults."""
    with torch.device("meta"):
        config = resolve_model_data_config(timm.create_model(name))
    pixels = torch.randint(256, (301, 262, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    expected = timm_transform(**config)(image)
    torch.testing.assert_close(create_transform(f"timm:{name}")(image), expected)


@pytest.mark.parametrize(("source", "args"), [VIT, CNN], ids=["vit", "cnn"])
def test_other_channels_and_classes_are_adapted_as_in_timm(tmp_path, source, args):
    file = save_encoder(load_encoder(source, num_classes=3, **args), tmp_path)
    grey = load_encoder(tmp_path, in_chans=1, num_classes=None)
    name = source.removeprefix("timm:")
    overlay = {"file": str(file), "num_classes": 3}
    model = timm.create_model(
        name, pretrained=True, in_chans=1, num_classes=3, pretrained_cfg_overlay=overlay, **args
    ).eval()
    images = torch.randn(2, 1, *grey.img_size)
    assert torch.equal(grey(images), model(images))
    assert grey.data_config["bands"] == ("L",)
    assert load_encoder(tmp_path, num_classes=5)(torch.randn(1, 3, *grey.img_size)).shape == (1, 5)


def test_positions_are_resampled_to_another_size(tmp_path):
    source, args = VIT
    encoder = load_encoder(source, **args)
    save_encoder(encoder, tmp_path)
    images = torch.randn(2, 3, 48, 64)
    large = load_encoder(tmp_path, img_size=(48, 64))
    assert (large.grid_size, large.input_shape) == ((6, 8), (3, 48, 64))
    torch.testing.assert_close(large(images), encoder(images), rtol=0, atol=1e-5)


def test_the_pool_changes_what_the_head_reads_and_nothing_else(tmp_path):
    source, args = VIT
    save_encoder(load_encoder(source, num_classes=3, **args), tmp_path)
    averaged = load_encoder(tmp_path, global_pool="avg", num_classes=None)
    images = inputs(averaged)
    tokens = averaged.forward_features(images)
    torch.testing.assert_close(
        averaged(images), averaged.get_classifier()(tokens[:, 1:].mean(1)), rtol=0, atol=1e-6
    )
    again = load_encoder(save_encoder(averaged, tmp_path / "again").parent, num_classes=None)
    assert torch.equal(again(images), averaged(images))
    with pytest.raises(ValueError, match=r"timm has no global_pool 'token\+avg'; use token"):
        load_encoder(source, global_pool="token+avg", **args)
    with pytest.raises(ValueError, match="does not accept global_pool 'map'"):
        load_encoder(tmp_path, global_pool="map")


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("stored", ["avg", "token"])
@pytest.mark.parametrize(("source", "args"), [VIT, EVA, BEIT], ids=["vit", "eva", "beit"])
def test_the_norm_stays_where_the_weights_have_it(tmp_path, source, args, stored, pool):
    """In a new model of timm the pool decides whether the last norm is before or after it."""
    name, file = source.removeprefix("timm:"), tmp_path / "weights.safetensors"
    model = timm.create_model(name, num_classes=3, global_pool=stored, **args).eval()
    save_file(model.state_dict(), file)
    images = torch.randn(2, 3, 32, 32)
    same = load_encoder(f"{source}?file={file}", num_classes=None, **args)
    assert torch.equal(same(images), model(images))
    model.reset_classifier(3, pool)
    model.head.load_state_dict(same.get_classifier().state_dict())
    changed = load_encoder(f"{source}?file={file}", num_classes=None, global_pool=pool, **args)
    assert torch.equal(changed(images), model(images))
    run = save_encoder(changed, tmp_path / "run").parent
    assert torch.equal(load_encoder(run, num_classes=None)(images), model(images))
    assert load_encoder(run, in_chans=1).global_pool == pool


def test_a_second_classifier_that_timm_drops_is_not_expected_again(tmp_path):
    encoder = load_encoder("timm:repvit_m0_9", num_classes=2, embed_dim=(8,) * 4, depth=(1,) * 4)
    encoder.reset_classifier(3)
    images = torch.randn(1, 3, 32, 32)
    again = load_encoder(save_encoder(encoder.eval(), tmp_path).parent, num_classes=None)
    assert torch.equal(again(images), encoder(images))


def test_a_head_needs_a_pool():
    unpooled = load_encoder(VIT[0], global_pool="", **VIT[1])
    match = "which a head of 3 classes cannot read; use token, avg or max"
    with pytest.raises(ValueError, match=match):
        load_encoder(VIT[0], num_classes=3, global_pool="", **VIT[1])
    with pytest.raises(ValueError, match=match):
        unpooled.reset_classifier(3)


@pytest.mark.parametrize("by", ["run", "file"])
@pytest.mark.parametrize("bands", [("B", "G", "R"), ("red", "nir"), ("R", "G", "B", "nir")])
@pytest.mark.parametrize(("source", "args"), [VIT, CNN], ids=["vit", "cnn"])
def test_bands_take_the_weights_of_their_name(tmp_path, source, args, bands, by):
    encoder = load_encoder(source, **args)
    file = save_encoder(encoder, tmp_path)
    chosen = tmp_path if by == "run" else f"{source}?file={file}"
    more = {} if by == "run" else args
    other = load_encoder(chosen, in_chans=len(bands), data_config={"bands": bands}, **more)
    layer = encoder.model.pretrained_cfg["first_conv"]
    before, after = (e.model.get_submodule(layer).weight for e in (encoder, other))
    for i, band in enumerate(bands):
        known = "RGB".find(band[0].upper())
        kernel = before.mean(1) if known < 0 else before[:, known]
        torch.testing.assert_close(after[:, i], kernel * (3 / len(bands)), rtol=1e-6, atol=1e-8)
    renamed = load_encoder(chosen, data_config={"bands": ("red", "green", "blue")}, **more)
    images = inputs(encoder)
    assert torch.equal(renamed(images), encoder(images))


@with_tokens
def test_token_methods_agree_with_timms_forward(source, args):
    encoder = load_encoder(source, **args)
    images = inputs(encoder)
    expected = encoder.forward_features(images)
    everything = torch.arange(16).expand(2, -1)
    tokens, taps = encoder.forward_visible(images, everything, indices=[1, 3])
    assert torch.equal(tokens, expected)
    assert torch.equal(encoder.forward_tokens(encoder.embed(images)), expected)
    maps = encoder.forward_intermediates(
        images, [1, 3], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    for tap, (patches, cls) in zip(taps, maps, strict=True):
        assert torch.equal(encoder.split_tokens(tap)[0], patches)
        assert torch.equal(encoder.split_tokens(tap)[1], cls)
        assert cls.shape[1] == len(encoder.cls_names)


@with_tokens
def test_hidden_content_does_not_reach_the_features(source, args):
    encoder = load_encoder(source, use_mask_token=True, **args)
    images = inputs(encoder)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, :8] = True  # the upper half
    other = images.clone()
    other[:, :, :16] = 7.0
    for read in (
        lambda x: encoder.forward_visible(x, torch.arange(8, 16).expand(2, -1))[0],
        lambda x: encoder.forward_tokens(encoder.embed(x), mask=hidden),
    ):
        assert torch.equal(read(images), read(other))


@without_tokens
def test_an_architecture_without_tokens_says_so(source, args):
    encoder = load_encoder(source, **args)
    kind = type(encoder.model).__name__
    with pytest.raises(ValueError, match=rf"{source} is a {kind}, .* Use a vision transformer"):
        encoder.embed(inputs(encoder))
    with pytest.raises(ValueError, match=f"use_mask_token needs patch tokens: {source}"):
        load_encoder(source, use_mask_token=True, **args)


@every
def test_a_layer_of_the_learning_rate_is_a_layer_of_timm(source, args):
    from timm.optim import param_groups_layer_decay

    from vim_ssl.training.optim import param_groups

    encoder = load_encoder(source, num_classes=2, **args)

    def scales(groups, model) -> dict[str, tuple[float, float]]:
        names = {id(p): name for name, p in model.named_parameters()}
        return {
            names[id(p)].removeprefix("model."): (group["lr_scale"], group["weight_decay"])
            for group in groups
            for p in group["params"]
        }

    model = encoder.model
    expected = param_groups_layer_decay(
        model, 0.1, layer_decay=0.5,
        no_weight_decay_list=getattr(model, "no_weight_decay", tuple)(),
    )  # fmt: skip
    assert scales(param_groups(encoder, 0.1, 0.5), encoder) == scales(expected, model)


def test_the_description_names_the_model_of_timm(tmp_path):
    save_encoder(load_encoder(SWIN[0], **SWIN[1]), tmp_path)
    config = json.loads((tmp_path / "encoder.json").read_text())["config"]
    assert (config["timm"], config["embed_dim"]) == ("swin_tiny_patch4_window7_224", 8)


def write_folder(folder, source, args):
    """As ``timm.models.save_for_hf``: config.json and model.safetensors."""
    model = timm.create_model(source.removeprefix("timm:"), num_classes=4, **args).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architecture": source.removeprefix("timm:"), "num_classes": 4, "model_args": args,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "num_classes": 4,
                           "fixed_input_size": True, "classifier": "head",
                           "first_conv": "patch_embed.proj"},
    }))  # fmt: skip
    return model


def test_a_local_folder_of_timm_is_read(tmp_path):
    model = write_folder(tmp_path, *AVERAGED)
    encoder = load_encoder(f"timm:local-dir:{tmp_path}?pretrained", num_classes=None)
    images = inputs(encoder)
    assert torch.equal(encoder(images), model(images))
    assert encoder.data_config["mean"] == (0.1, 0.2, 0.3)
    run = save_encoder(encoder, tmp_path / "run").parent
    (tmp_path / "config.json").unlink()  # the run does not need the folder
    assert torch.equal(load_encoder(run, num_classes=None)(images), model(images))
    assert load_encoder(run).data_config["mean"] == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("key", "value"),
    [("checkpoint_path", "x.pth"), ("pretrained", True), ("pretrained_cfg", {"file": "x.pth"}),
     ("pretrained_cfg_overlay", {"file": "x.pth"}), ("cache_dir", "x")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["run", "folder"])
def test_settings_do_not_name_other_weights(tmp_path, key, value, kind):
    source, args = VIT
    if kind == "run":
        file = save_encoder(load_encoder(source, **args), tmp_path).with_name("encoder.json")
        settings = json.loads(file.read_text())
        settings["config"][key] = value
        file.write_text(json.dumps(settings))
        source = str(tmp_path)
    else:
        write_folder(tmp_path, source, args)
        file = tmp_path / "config.json"
        settings = json.loads(file.read_text())
        settings["model_args"][key] = value
        file.write_text(json.dumps(settings))
        source = f"timm:local-dir:{tmp_path}"
    for read in (load_encoder, create_transform):
        with pytest.raises(ValueError, match=f"has the setting '{key}', by which timm would read"):
            read(source)
    assert "has the setting" in verify(source).problems[0]


@pytest.mark.parametrize("name", ["a?b", "a b&c=d", "a?file"])
def test_a_path_may_have_any_characters(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    model, images = write_folder(folder, *VIT), torch.randn(2, 3, 32, 32)
    file = folder / "model.safetensors"
    sources = {f"{VIT[0]}?file={file}": VIT[1], f"timm:local-dir:{folder}?pretrained": {}}
    for source, args in sources.items():
        assert torch.equal(load_encoder(source, num_classes=None, **args)(images), model(images))


def test_the_hash_of_a_folder_is_of_its_weights(tmp_path):
    source = f"timm:local-dir:{tmp_path}?pretrained"
    assert encoder_hash(source) == ""  # there is none yet
    write_folder(tmp_path, *VIT)
    first = encoder_hash(source)
    assert first == encoder_hash(f"{VIT[0]}?file={tmp_path / 'model.safetensors'}") != ""
    write_folder(tmp_path, *VIT)  # other random weights
    assert encoder_hash(source) not in ("", first)


def test_the_file_of_a_run_keeps_the_record_of_its_trainings(tmp_path):
    encoder = load_encoder(VIT[0], **VIT[1])
    encoder.trainings = [{"recipe": "finetune", "data": "folder:photos", "labels": True}]
    source = f"{VIT[0]}?file={save_encoder(encoder, tmp_path)}"
    assert load_encoder(source, **VIT[1]).trainings == encoder.trainings
    assert made_by(source)["trainings"] == encoder.trainings
    assert [training.data for training in trainings_of(source)] == ["folder:photos"]
    assert trainings_of(VIT[0]) == []


def test_verify_describes_models_of_timm(tmp_path):
    name = "timm:test_resnet"
    fresh = verify(name)
    assert fresh.loads
    assert "the weights are fresh" in str(fresh)
    file = save_encoder(load_encoder(name, num_classes=3), tmp_path)
    report = verify(f"{name}?file={file}")
    assert (report.loads, report.facts["classes"]) == (True, "3")
    assert "(1, 3) from (1, 3, 160, 160), finite" in str(report)
    assert not verify("timm:nope").loads
    assert "timm has no model 'nope'" in str(verify("timm:nope"))


@pytest.mark.parametrize(
    ("source", "args", "error", "match"),
    [
        ("timm:vit_tinny_patch16_224", {}, ValueError, "timm has no model .* Did you mean 'vit_t"),
        ("timm:vim_tiny_patch16_224", {}, ValueError, "is a Vim of this package; give it without"),
        ("timm:resnet18.a9_in1k", {}, ValueError, "Invalid pretrained tag .* Did you mean 'resnet"),
        ("timm:resnet18?pretraned", {}, ValueError, r"expected timm:NAME, timm:NAME\?pretrained"),
        ("timm:resnet18?file=nope.pth", {}, FileNotFoundError, "There is no file 'nope.pth'"),
        ("timm:hub:some/model", {}, ValueError, "'hub' is unknown; expected hf-hub: or local-dir:"),
        ("timm:local-dir:nope", {}, FileNotFoundError, "timm:local-dir:nope: "),
        (VIT[0], {"embed_dm": 32}, TypeError, "timm:vit_tiny_patch16_224: .*'embed_dm'"),
        (VIT[0], {"num_classes": None}, ValueError, "requires weights with a head"),
        (VIT[0], {"ema": True}, ValueError, "ema=True requires a run with a moving average"),
        (VIT[0], {"directions": "forward"}, ValueError, "only a Vim reads in one direction"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_named(source, args, error, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        load_encoder(source, **args)


def test_damaged_and_misfitting_files_are_named(tmp_path):
    source, args = VIT
    encoder = load_encoder(source, **args)
    file = save_encoder(encoder, tmp_path)
    state = load_file(file)
    save_file(state | {"norm.weight": state["norm.weight"] * torch.nan}, file)
    for broken in (tmp_path, f"{source}?file={file}"):
        with pytest.raises(ValueError, match=r"norm\.weight"):
            load_encoder(broken, **({} if broken == tmp_path else args))
    save_file({key: x for key, x in state.items() if key != "norm.bias"}, file)
    for broken in (tmp_path, f"{source}?file={file}"):
        with pytest.raises(ValueError, match=r"norm\.bias"):
            load_encoder(broken, **({} if broken == tmp_path else args))
    with pytest.raises(ValueError, match=r"depth=2 was requested, but .* has depth=4"):
        load_encoder(tmp_path, depth=2)
    assert isinstance(load_encoder(save_encoder(encoder, tmp_path).parent), TimmEncoder)
