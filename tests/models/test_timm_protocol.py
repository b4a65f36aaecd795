"""What timm's users expect of a model: the registry, features_only, heads, intermediates."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from vim_ssl.checkpoints.loading import load_encoder, save_encoder
from vim_ssl.models.block import VimBlock
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.models.presets import PRESETS, TAGS

# Presets that are quick to run on a CPU, with their image size and channels.
QUICK = {
    "vim_nano_patch4_28": (28, 1),
    "vim_nano_patch8_64": (64, 3),
    "vim_nano_patch16_64": (64, 3),
}


def make(name: str = "vim_nano_patch8_64", **args) -> VimEncoder:
    """A shallow preset by timm, in eval mode, with random tokens."""
    torch.manual_seed(0)
    model = timm.create_model(name, **({"depth": 4, "num_classes": 5} | args)).eval()
    with torch.no_grad():
        for p in (model.pos_embed, *(model.get_parameter(name) for name in model.cls_names)):
            p.normal_(std=0.5)
    return model


def images(size: tuple[int, int] = (64, 64), chans: int = 3) -> Tensor:
    return torch.randn(2, chans, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def block_calls(monkeypatch) -> list[VimBlock]:
    """The blocks that ran, in order."""
    calls = []
    forward = VimBlock.forward

    def count(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(VimBlock, "forward", count)
    return calls


# ---------------------------------------------------------------- registry


def test_presets_are_in_the_registry():
    assert set(timm.list_models("vim_*", module="timm_registry")) == set(PRESETS)
    assert set(PRESETS) <= set(timm.list_models("vim_*"))
    assert all(timm.is_model(name) for name in PRESETS)


def test_weights_of_the_package_are_timms_pretrained_models():
    listed = timm.list_models("vim_*", pretrained=True)
    assert {name for name in listed if name.partition(".")[0] in PRESETS} == set(TAGS)
    for tag in TAGS:
        ours, preset = load_encoder(tag), tag.partition(".")[0]
        by_tag, by_name = (timm.create_model(name, pretrained=True) for name in (tag, preset))
        for model in (by_tag, by_name):
            torch.testing.assert_close(model.state_dict(), ours.state_dict(), rtol=0, atol=0)
            config = resolve_model_data_config(model)
            for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
                assert config[key] == model.data_config[key] == ours.data_config[key], key


def test_weights_of_the_package_take_timms_arguments():
    name = "vim_mini_patch8_96"
    ours = load_encoder(f"{name}.offline_rgb", img_size=64, in_chans=1)
    model = timm.create_model(name, pretrained=True, img_size=64, in_chans=1, num_classes=7)
    assert model.head.weight.shape == (7, 192)
    model.reset_classifier(0)
    torch.testing.assert_close(model.state_dict(), ours.state_dict())
    maps = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 7))
    torch.testing.assert_close(maps.model.layers.state_dict(), ours.layers.state_dict())


def test_a_preset_without_weights_is_untrained_and_says_so():
    assert timm.create_model("vim_mini_patch8_96", depth=1).num_classes == 1000
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vim_nano_patch8_64"):
        timm.create_model("vim_nano_patch8_64", pretrained=True)


def test_a_run_is_a_checkpoint_of_its_preset(tmp_path):
    encoder = load_encoder("vim_nano_patch8_64")
    path = str(save_encoder(encoder, tmp_path))
    model = timm.create_model("vim_nano_patch8_64", num_classes=0, checkpoint_path=path)
    torch.testing.assert_close(model.state_dict(), encoder.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", QUICK)
def test_create_model_and_run(name):
    size, chans = QUICK[name]
    model = timm.create_model(name)
    assert isinstance(model, VimEncoder)
    assert model(images((size, size), chans)).shape == (2, 1000)


def test_create_tiny_and_run():
    model = timm.create_model("vim_tiny_patch16_224", num_classes=10).eval()
    with torch.no_grad():
        assert model(images((224, 224))[:1]).shape == (1, 10)
        assert model(images((96, 64))[:1]).shape == (1, 10)


@pytest.mark.parametrize("name", PRESETS)
def test_create_model_on_the_meta_device(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, drop_path_rate=0.1)
    assert model.num_features == PRESETS[name]["embed_dim"]
    assert model.default_cfg["architecture"] == name


def test_state_dict_keys_and_shapes_are_the_released_ones():
    path = Path(__file__).parents[1] / "golden" / "vim_tiny_patch16_224.keys.json"
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_patch16_224")
    got = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert got == json.loads(path.read_text())


def test_arguments_reach_the_encoder():
    model = make(cls_position="double", img_size=32, drop_path_rate=0.2, in_chans=4)
    assert (model.cls_position, model.grid_size) == ("double", (4, 4))
    assert model(images((32, 32), chans=4)).shape == (2, 5)


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError, match="if_devide_out"):
        make(if_devide_out=True)


# ---------------------------------------------------------------- features_only


@pytest.mark.parametrize("out_indices", [(0, 2), (1, 3), (-1,), 2], ids=str)
def test_features_only(out_indices, block_calls):
    model = timm.create_model(
        "vim_nano_patch8_64", depth=4, features_only=True, out_indices=out_indices
    )
    assert isinstance(model, FeatureGetterNet)
    expected = {(-1,): [3], 2: [2, 3]}.get(out_indices) or list(out_indices)
    assert model.feature_info.module_name() == [f"layers.{i}" for i in expected]
    assert model.feature_info.channels() == [192] * len(expected)
    assert model.feature_info.reduction() == [8] * len(expected)
    maps = model(images((64, 40)))
    assert [m.shape for m in maps] == [(2, 192, 8, 5)] * len(expected)
    assert len(block_calls) == max(expected) + 1  # blocks after the last map are pruned


def test_features_only_leaves_no_parameter_without_gradient():
    """Unused parameters would stop distributed training."""
    model = timm.create_model("vim_nano_patch8_64", depth=4, features_only=True, out_indices=(0, 2))
    torch.stack(model(images())).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_feature_info_of_an_overlapping_encoder():
    info = make(stride=4).feature_info
    assert info == [{"module": f"layers.{i}", "num_chs": 192, "reduction": 4} for i in range(4)]


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("global_pool", "width"), [("token", 192), ("avg", 192), ("token+avg", 384)]
)  # fmt: skip
def test_reset_classifier(global_pool, width):
    model = make()
    model.reset_classifier(7, global_pool)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.num_classes == 7
    assert model.num_features == model.head_hidden_size == width
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert (model.num_classes, model.global_pool) == (0, global_pool)
    assert model(images()).shape == (2, width)


def test_reset_classifier_keeps_the_dtype():
    model = make().double()
    model.reset_classifier(3)
    assert model(images().double()).dtype == torch.float64


def test_forward_head_pools_as_global_pool_says():
    model = make()
    features = model.forward_features(images())  # 64 patches, the class token at 32
    patches = torch.cat([features[:, :32], features[:, 33:]], dim=1)
    readouts = {
        "token": features[:, 32],
        "avg": patches.mean(1),
        "token+avg": torch.cat([features[:, 32], patches.mean(1)], dim=1),
        "": features,
    }
    for global_pool, expected in readouts.items():
        model.reset_classifier(5, global_pool)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, expected)
        torch.testing.assert_close(model.forward_head(features), model.head(pooled))
        torch.testing.assert_close(model(images()), model.head(pooled))


def test_get_classifier_is_named_in_the_configuration():
    model = make()
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), nn.Conv2d)


# ---------------------------------------------------------------- forward_intermediates


@pytest.mark.parametrize("size", [(64, 64), (40, 72)], ids=["64x64", "40x72"])
@pytest.mark.parametrize("cls_position", ["middle", "first", "double", "none"])
def test_last_normed_map_is_forward_features(cls_position, size):
    model = make(cls_position=cls_position)
    x, (rows, columns) = images(size), model.grid(*size)
    final, maps = model.forward_intermediates(x, norm=True)
    features = model.forward_features(x)
    torch.testing.assert_close(final, features)
    m = rows * columns
    slots = {"middle": [m // 2], "first": [0], "double": [0, m + 1], "none": []}[cls_position]
    patches = features[:, [i for i in range(features.shape[1]) if i not in slots]]
    raster = patches.transpose(1, 2).reshape(2, 192, rows, columns)
    torch.testing.assert_close(maps[-1], raster)


def test_maps_are_the_residual_stream_after_each_block():
    model = make()
    x = images()
    maps = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    short = make(depth=2)
    short.load_state_dict(model.state_dict(), strict=False)
    _, taps = short.forward_tokens(short.embed(x), indices=[0, 1])
    for got, tap in zip(maps, taps, strict=True):
        torch.testing.assert_close(got.flatten(2).mT, short.split_tokens(tap)[0])


@pytest.mark.parametrize(
    ("indices", "expected"),
    [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, 3], [0, 3]), ([-1], [3]), ((1, -2), [1, 2])],
    ids=["all", "last-2", "list", "negative", "mixed"],
)
def test_indices(indices, expected):
    model, x = make(), images()
    every = model.forward_intermediates(x, intermediates_only=True)
    maps = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert len(every) == 4
    for got, i in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, every[i])


@pytest.mark.parametrize("indices", [5, 0, [4], [-5]], ids=str)
def test_indices_outside_the_encoder(indices):
    with pytest.raises(ValueError, match="the encoder has 4"):
        make().forward_intermediates(images(), indices=indices)


def test_output_formats_hold_the_same():
    model, x = make(), images((40, 72))
    (nchw,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    (nlc,) = model.forward_intermediates(x, indices=1, output_fmt="NLC", intermediates_only=True)
    assert nchw.shape == (2, 192, 5, 9)
    torch.testing.assert_close(nchw.flatten(2).transpose(1, 2), nlc)
    with pytest.raises(ValueError, match=r"output_fmt 'NHWC' .*'NCHW'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_prefix_tokens():
    model, x = make(cls_position="double"), images()
    (pair,) = model.forward_intermediates(
        x, indices=[3], norm=True, return_prefix_tokens=True, intermediates_only=True
    )
    features = model.forward_features(x)
    assert pair[0].shape == (2, 192, 8, 8)
    torch.testing.assert_close(pair[1], features[:, [0, -1]])


@pytest.mark.parametrize("stop_early", [False, True], ids=["", "stop-early"])
def test_stop_early_stops(stop_early, block_calls):
    model, x = make(), images()
    maps = model.forward_intermediates(
        x, indices=[0, 1], stop_early=stop_early, intermediates_only=True
    )
    assert len(block_calls) == (2 if stop_early else 4)
    torch.testing.assert_close(
        maps, model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    )


def test_intermediates_only_leaves_the_final_features_out():
    model, x = make(), images()
    maps = model.forward_intermediates(x, intermediates_only=True)
    final, same = model.forward_intermediates(x)
    assert isinstance(maps, list)
    torch.testing.assert_close(maps, same)
    torch.testing.assert_close(final, model.forward_features(x))


def test_prune_intermediate_layers():
    model, x = make(), images()
    expected = model.forward_intermediates(x, indices=[0, 2], norm=True, intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.layers) == model.config["depth"] == 3
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(
        model.forward_intermediates(x, indices=[0, 2], norm=True, intermediates_only=True), expected
    )


@pytest.mark.parametrize("prune_head", [False, True], ids=["", "head"])
@pytest.mark.parametrize("prune_norm", [False, True], ids=["", "norm"])
def test_prune_takes_what_it_is_told(prune_norm, prune_head):
    model = make()
    assert model.prune_intermediate_layers(1, prune_norm=prune_norm, prune_head=prune_head) == [3]
    keys = model.state_dict().keys()
    assert ("norm_f.weight" in keys) is not prune_norm
    assert ("head.weight" in keys) is not prune_head
    raw, normed = (
        model.forward_intermediates(images(), norm=norm, intermediates_only=True)[-1]
        for norm in (False, True)
    )
    assert torch.equal(raw, normed) is prune_norm


# ---------------------------------------------------------------- data


def test_resolve_data_config_gives_the_presets_statistics():
    config = resolve_model_data_config(make("vim_nano_patch4_28"))
    assert config["input_size"] == (1, 28, 28)
    assert (config["mean"], config["std"]) == ((0.1307,), (0.3081,))
    config = resolve_data_config({}, model=make("vim_tiny_patch16_224", depth=1))
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.875)


def test_timm_knows_the_data_of_an_encoder_that_it_did_not_make(tmp_path):
    statistics = {"mean": (0.2, 0.3), "std": (0.4, 0.5)}
    encoder = load_encoder("vim_nano_patch4_28", in_chans=2, img_size=32, data_config=statistics)
    save_encoder(encoder, tmp_path)
    for model in (encoder, load_encoder(tmp_path)):
        config = resolve_model_data_config(model)
        assert config["input_size"] == (2, 32, 32)
        assert {key: config[key] for key in statistics} == statistics


def test_transform_of_timm_feeds_the_model():
    model = make()
    transform = create_transform(**resolve_model_data_config(model))
    x = transform(Image.new("RGB", (200, 100), (255, 0, 0)))
    assert x.shape == (3, 64, 64)
    torch.testing.assert_close(x[:, 0, 0], (torch.eye(3)[0] - _tensor("mean")) / _tensor("std"))
    assert model(x[None]).shape == (1, 5)


def _tensor(key: str) -> Tensor:
    return torch.tensor(make().data_config[key])


@pytest.mark.parametrize("name", PRESETS)
def test_data_config_agrees_with_timms(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    config = resolve_model_data_config(model)
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert config[key] == model.data_config[key], key
