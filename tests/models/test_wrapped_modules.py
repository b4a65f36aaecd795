"""What people wrap round an encoder acts: adapters, hooks, pruning, transforms, programs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from vim_ssl import load_encoder
from vim_ssl.models.block import VimMixer

PARTS = ("conv1d", "x_proj", "dt_proj", "in_proj", "out_proj")
CLASS_TOKENS = ("middle", "double")


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def tiny(**args):
    torch.manual_seed(0)
    return load_encoder("vim_nano_patch4_28", depth=2, embed_dim=16, **args).eval()


class LowRank(nn.Module):
    """An adapter, as peft makes it: the base layer's weight stays visible."""

    def __init__(self, base: nn.Module, amount: float):
        super().__init__()
        self.base, self.amount = base, amount

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, *args):
        return self.base(*args) * (1 + self.amount)


def parts_of(encoder):
    for module in encoder.modules():
        if isinstance(module, VimMixer):
            for name in PARTS:
                for part in {name, f"{name}_b"} & set(dict(module.named_children())):
                    yield module, part


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("way", ["replaced", "hooked", "method"])
def test_a_layer_that_is_wrapped_acts(images, name, way):
    """Wrapped without effect gives the same features; with one, those of changed weights."""

    def wrapped(amount):
        encoder = tiny()
        for mixer, part in parts_of(encoder):
            layer = getattr(mixer, part)
            if part.removesuffix("_b") != name:
                continue
            if way == "replaced":
                setattr(mixer, part, LowRank(layer, amount))
            elif way == "hooked":
                layer.register_forward_hook(lambda m, args, out: out * (1 + amount))
            else:
                layer.forward = lambda *a, f=layer.forward: f(*a) * (1 + amount)
        return encoder(images)

    with torch.no_grad():
        plain = tiny()(images)
        assert (wrapped(0.0) - plain).abs().max() < 1e-5
        assert (wrapped(0.5) - plain).abs().max() > 1e-3
        if name != "conv1d":  # linear: scaling the output is scaling weight and bias
            scaled = tiny()
            for mixer, part in parts_of(scaled):
                if part.removesuffix("_b") == name:
                    for p in getattr(mixer, part).parameters():
                        p.mul_(1.5)
            assert (wrapped(0.5) - scaled(images)).abs().max() < 1e-5


@pytest.mark.parametrize("way", ["replaced", "hooked", "parametrised"])
def test_a_patch_embedding_that_is_wrapped_acts(images, way):
    with torch.no_grad():
        encoder, doubled = tiny(), tiny()
        patch = encoder.patch_embed
        if way == "replaced":
            patch.proj = LowRank(patch.proj, 1.0)
        elif way == "hooked":
            patch.proj.register_forward_hook(lambda module, args, out: 2 * out)
        else:
            parametrize.register_parametrization(patch.proj, "weight", Doubled())
        for p in doubled.patch_embed.parameters():  # the bias is 0
            p.mul_(2)
        assert (encoder(images) - doubled(images)).abs().max() < 1e-6


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", ["x_proj", "dt_proj_b", "conv1d"])
def test_parametrisations_and_pruning_act(images, name):
    with torch.no_grad():
        parametrised, pruned, doubled = tiny(), tiny(), tiny()
        for encoder in (parametrised, pruned, doubled):
            layer = getattr(encoder.layers[0].mixer, name)
            if encoder is parametrised:
                parametrize.register_parametrization(layer, "weight", Doubled())
            elif encoder is pruned:
                prune.l1_unstructured(layer, "weight", amount=0.5)
                assert (layer.weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)
                layer.weight_orig.mul_(2)
            else:
                layer.weight.mul_(2)
        expected = doubled(images)
        assert (parametrised(images) - expected).abs().max() < 1e-6
        half = copy.deepcopy(doubled)
        weight = getattr(half.layers[0].mixer, name).weight
        weight.mul_(getattr(pruned.layers[0].mixer, name).weight_mask)
        assert (pruned(images) - half(images)).abs().max() < 1e-5


def edit(encoder):
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.25)


def step(encoder):
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()


def load(encoder):
    encoder.load_state_dict({k: 1.25 * v for k, v in encoder.state_dict().items()})


def swap(encoder):
    for mixer, part in [*parts_of(encoder)]:
        setattr(mixer, part, copy.deepcopy(getattr(mixer, part)))
    edit(encoder)


def assign(encoder):
    for module in encoder.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(1.25 * parameter.detach()))


def set_data(encoder):
    for parameter in encoder.parameters():
        parameter.data = 1.25 * parameter.data


@pytest.mark.parametrize("change", [edit, step, load, swap, assign, set_data])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_change_of_the_weights_is_followed(images, change, train):
    """The same as an encoder that gets the changed weights before it is first used."""
    used, fresh = tiny(), tiny()
    with torch.set_grad_enabled(train):
        before = used(images)
        change(used)
        fresh.load_state_dict(used.state_dict())
        assert torch.equal(used(images), fresh(images))
        assert not torch.equal(used(images), before)
        double = used.double()(images.double())
        assert (double - fresh(images)).abs().max() < 1e-4
        assert torch.equal(used.float()(images), fresh(images))


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_runs(images):
    encoder = torch.ao.quantization.quantize_dynamic(tiny(), {nn.Linear}, torch.qint8)
    difference = (encoder(images) - tiny()(images)).abs().max()
    assert 0 < difference < 0.5


@pytest.mark.parametrize("position", CLASS_TOKENS)
def test_parameters_may_be_given_from_outside(images, position):
    encoder = tiny(cls_position=position)
    with torch.no_grad():
        weights = {k: v.clone() for k, v in encoder.state_dict().items()}
        called = torch.func.functional_call(encoder, weights, (images,))
        assert torch.equal(called, encoder(images))
        token = "cls_token" if position == "middle" else "cls_token_tail"
        weights[token] = weights[token] + 1
        assert not torch.equal(torch.func.functional_call(encoder, weights, (images,)), called)
        parametrize.register_parametrization(encoder, token, Doubled())
        assert not torch.equal(encoder(images), called)


def test_transforms_of_torch_func_give_the_gradient_of_autograd():
    torch.manual_seed(0)
    encoder = load_encoder("vim_nano_patch4_28", depth=1, embed_dim=8, img_size=8).eval()
    image = torch.randn(1, 1, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(encoder(image).square().sum(), image)[0]

    def energy(x):
        return encoder(x).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        assert (transform(energy)(image.detach()) - expected).abs().max() < 1e-4


def test_a_hook_for_all_modules_reaches_every_layer(images):
    encoder, seen = tiny(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m))
    try:
        with torch.no_grad():
            encoder(images)
    finally:
        handle.remove()
    layers = {m for m in encoder.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    assert layers
    assert layers <= seen


def test_the_default_device_of_new_tensors_does_not_matter(images):
    encoder = tiny()
    with torch.no_grad():
        expected = encoder(images)
        with torch.device("meta"):
            assert torch.equal(encoder(images), expected)


def test_an_encoder_exports_for_any_batch(images):
    encoder, batch = tiny(), {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(encoder, (torch.cat([images] * 2),), dynamic_shapes=batch)
    with torch.no_grad():
        for some in (images[:1], torch.cat([images] * 3)):
            assert (program.module()(some) - encoder(some)).abs().max() < 1e-6


def test_a_program_exported_without_gradients_gives_them(images):
    encoder = tiny()
    with torch.no_grad():
        program = torch.export.export(encoder, (images,)).module()
    given = images.clone().requires_grad_()
    program(given).square().sum().backward()
    expected = images.clone().requires_grad_()
    encoder(expected).square().sum().backward()
    assert (given.grad - expected.grad).abs().max() < 1e-5
