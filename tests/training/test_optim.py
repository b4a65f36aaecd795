"""Which parameters are decayed, how fast each one learns, and when."""

import math

import pytest
import torch
from torch import nn

from vim_ssl.models.block import VimBlock
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.training.optim import build_optimizer, build_schedule, param_groups, use_fused

DEPTH = 3
DECAY, LAYER_DECAY = 0.05, 0.5

# By the last parts of a name: what weight decay may touch. All else it must not.
DECAYED = (
    "in_proj.weight", "out_proj.weight", "x_proj.weight", "x_proj_b.weight", "dt_proj.weight",
    "dt_proj_b.weight", "conv1d.weight", "conv1d_b.weight", "proj.weight", "head.weight",
    "embed.weight", "pred.weight",
)  # fmt: skip


def encoder(**args) -> VimEncoder:
    return VimEncoder(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": DEPTH, "num_classes": 5}
        | {"num_registers": 2, "use_mask_token": True}
        | args
    )


class Objective(nn.Module):
    """An encoder and a decoder with names that look like an encoder's."""

    def __init__(self, **args):
        super().__init__()
        self.encoder = encoder(**args)
        self.embed = nn.Linear(16, 16)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.layers = nn.ModuleList([VimBlock(16)])
        self.decoder = nn.Sequential(VimBlock(16))
        self.odd = nn.Parameter(torch.zeros(3, 3))
        self.pred = nn.Linear(16, 8)

    def no_weight_decay(self) -> set[str]:
        return {"odd"}


MODELS = {
    "encoder": lambda: encoder(),
    "double-cls": lambda: encoder(cls_position="double"),
    "one-direction": lambda: encoder(directions="backward", norm_after_scan=True),
    "no-head": lambda: encoder(num_classes=0),
    "objective": Objective,
    "objective-no-head": lambda: Objective(num_classes=0),
}


def group_of(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    """Each parameter's group by the parameter's name; fails if one is lost or doubled."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


@pytest.mark.parametrize("layer_decay", [None, LAYER_DECAY], ids=["flat", "layer-decay"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_its_weight_decay(name, layer_decay):
    model = MODELS[name]()
    for name, group in group_of(model, param_groups(model, DECAY, layer_decay)).items():
        expected = DECAY if name.endswith(DECAYED) else 0.0
        assert group["weight_decay"] == expected, name


@pytest.mark.parametrize("name", ["encoder", "objective"])
def test_state_space_parameters_tokens_and_positions_escape_decay(name):
    model = MODELS[name]()
    groups = group_of(model, param_groups(model, DECAY))
    prefix = "encoder." if name == "objective" else ""
    escaped = ["pos_embed", "cls_token", "mask_token", "register_tokens"]
    escaped += [f"layers.0.mixer.{leaf}" for leaf in ("A_log", "A_b_log", "D", "D_b")]
    escaped += [f"layers.0.mixer.dt_proj{s}.bias" for s in ("", "_b")] + ["layers.0.norm.weight"]
    names = [prefix + name for name in escaped]
    if name == "objective":
        names += ["mask_token", "odd", "layers.0.mixer.A_log", "decoder.0.mixer.A_b_log"]
    assert {groups[name]["weight_decay"] for name in names} == {0.0}


@pytest.mark.parametrize("name", MODELS)
def test_layer_decay_reaches_every_block(name):
    model = MODELS[name]()
    scales = {
        name: group["lr_scale"]
        for name, group in group_of(model, param_groups(model, DECAY, LAYER_DECAY)).items()
    }
    inside = "encoder." if isinstance(model, Objective) else ""
    # What comes after the last block has factor 1, if there is anything.
    top = 0 if name == "no-head" else 1
    for name, scale in scales.items():
        own = name.removeprefix(inside) if name.startswith(inside) else None
        if own is None or own.startswith("head."):
            expected = 1.0
        elif own.startswith("layers."):
            expected = LAYER_DECAY ** (DEPTH - 1 - int(own.split(".")[1]) + top)
        elif own.startswith("norm_f."):
            expected = LAYER_DECAY**top  # together with the last block
        else:  # tokens, positions, patch embedding
            expected = LAYER_DECAY ** (DEPTH + top)
        assert scale == pytest.approx(expected), name


@pytest.mark.parametrize("layer_decay", [None, LAYER_DECAY], ids=["flat", "layer-decay"])
@pytest.mark.parametrize("name", MODELS)
def test_the_rate_of_the_encoder_is_a_factor_on_that_of_layer_decay(name, layer_decay):
    model = MODELS[name]()
    plain = group_of(model, param_groups(model, DECAY, layer_decay))
    inside = "encoder." if isinstance(model, Objective) else ""
    for name, group in group_of(model, param_groups(model, DECAY, layer_decay, 0.1)).items():
        in_encoder = name.startswith(inside) and not name.startswith(f"{inside}head.")
        factor = 0.1 if in_encoder else 1.0
        assert group["lr_scale"] == plain[name].get("lr_scale", 1.0) * factor, name
        assert group["weight_decay"] == plain[name]["weight_decay"], name


def test_frozen_parameters_are_left_out():
    model = Objective()
    model.encoder.requires_grad_(False)
    for layer_decay in (None, LAYER_DECAY):
        groups = param_groups(model, DECAY, layer_decay)
        got = {id(p) for group in groups for p in group["params"]}
        assert got == {id(p) for p in model.parameters() if p.requires_grad}


def test_rates_of_layers_without_an_encoder_say_what_to_do():
    with pytest.raises(ValueError, match=r"lr_encoder needs.*Linear has none.*lr_encoder=1"):
        param_groups(nn.Linear(2, 2), DECAY, lr_encoder=0.1)
    with pytest.raises(ValueError, match=r"layer_decay needs.*Linear has none.*layer_decay=None"):
        param_groups(nn.Linear(2, 2), DECAY, LAYER_DECAY)


@pytest.mark.parametrize("layer_decay", [None, LAYER_DECAY], ids=["flat", "layer-decay"])
def test_build_optimizer(layer_decay):
    model = Objective()
    optimizer = build_optimizer(
        model, lr=1e-3, weight_decay=DECAY, betas=(0.9, 0.95), layer_decay=layer_decay
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = group_of(model, optimizer.param_groups)
    for name, group in groups.items():
        assert group["weight_decay"] == (DECAY if name.endswith(DECAYED) else 0.0), name
        assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.95))
    scale = groups["encoder.patch_embed.proj.weight"].get("lr_scale", 1.0)
    assert scale == (1.0 if layer_decay is None else LAYER_DECAY ** (DEPTH + 1))


@pytest.mark.parametrize("opt", ["sgd", "lars", "lion", "lamb"])
def test_other_optimisers_of_timm_step(opt):
    model = encoder()
    before = [p.clone() for p in model.parameters()]
    optimizer = build_optimizer(model, opt=opt, lr=1e-2, weight_decay=DECAY, betas=(0.9, 0.95))
    torch.manual_seed(0)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weight_decay_does_not_move_what_it_must_not():
    """Decay alone: with zero gradients AdamW changes a parameter only by its decay."""
    model = Objective()
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if name.endswith(DECAYED) else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


# ---------------------------------------------------------------- schedule

TOTAL, WARMUP, LR = 100, 10, 1e-3


@pytest.mark.parametrize("layer_decay", [None, LAYER_DECAY], ids=["flat", "layer-decay"])
@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 1e-6),
        (5, 1e-6 + (LR - 1e-6) / 2),
        (10, LR),
        (55, 1e-5 + (LR - 1e-5) / 2),
        (99, 1e-5 + (LR - 1e-5) * (1 + math.cos(math.pi * 89 / 90)) / 2),
        (100, 1e-5),
        (1000, 1e-5),
    ],
    ids=["start", "half-warm", "warm", "half-down", "last-step", "end", "long-after"],
)
def test_schedule(step, lr, layer_decay):
    model = encoder()
    optimizer = build_optimizer(model, lr=LR, weight_decay=DECAY, layer_decay=layer_decay)
    schedule = build_schedule(
        optimizer, total_steps=TOTAL, warmup_steps=WARMUP, min_lr=1e-5, warmup_lr=1e-6
    )
    schedule.step_update(step)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(lr * group.get("lr_scale", 1.0))
    groups = group_of(model, optimizer.param_groups)
    assert groups["head.weight"]["lr"] == pytest.approx(lr)


@pytest.mark.parametrize(("step", "lr"), [(0, 0.0), (5, LR / 2), (10, LR), (55, LR / 2), (100, 0)])
def test_a_linear_schedule_falls_in_a_line(step, lr):
    optimizer = build_optimizer(encoder(), lr=LR, weight_decay=DECAY)
    schedule = build_schedule(optimizer, total_steps=TOTAL, warmup_steps=WARMUP, schedule="linear")
    schedule.step_update(step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="Did you mean 'cosine'"):
        build_schedule(build_optimizer(encoder(), lr=LR, weight_decay=DECAY), total_steps=9,
                       schedule="cosin")  # fmt: skip


def test_schedule_is_a_function_of_the_step_alone():
    """As after a resume: a new schedule on the restored optimiser goes on where the old one was."""
    model = encoder()
    optimizer = build_optimizer(model, lr=LR, weight_decay=DECAY, layer_decay=LAYER_DECAY)
    schedule = build_schedule(optimizer, total_steps=TOTAL, warmup_steps=WARMUP)
    for step in range(40):
        schedule.step_update(step)
    expected = [group["lr"] for group in optimizer.param_groups]

    resumed = build_optimizer(model, lr=LR, weight_decay=DECAY, layer_decay=LAYER_DECAY)
    again = build_schedule(resumed, total_steps=TOTAL, warmup_steps=WARMUP)
    resumed.load_state_dict(optimizer.state_dict())
    again.step_update(39)
    assert [group["lr"] for group in resumed.param_groups] == expected


def test_schedule_without_warm_up_starts_at_the_top():
    optimizer = build_optimizer(encoder(), lr=LR, weight_decay=DECAY)
    build_schedule(optimizer, total_steps=TOTAL).step_update(0)
    assert optimizer.param_groups[0]["lr"] == LR


@pytest.mark.parametrize("warmup_steps", [100, 101, -1])
def test_a_warm_up_that_leaves_no_step_is_an_error(warmup_steps):
    optimizer = build_optimizer(encoder(), lr=LR, weight_decay=DECAY)
    message = rf"{warmup_steps} steps .* run of 100; shorten the warm-up"
    with pytest.raises(ValueError, match=message):
        build_schedule(optimizer, total_steps=100, warmup_steps=warmup_steps)


@pytest.mark.parametrize(
    ("step", "lr"), [(5, LR / 2), (88, LR), (89, LR / 10), (95, LR / 10), (96, LR / 100)]
)
def test_a_schedule_in_steps_falls_at_the_steps_of_the_whole_run(step, lr):
    """8/9 and 26/27 of 100 steps, the warm-up among them."""
    optimizer = build_optimizer(encoder(), lr=LR, weight_decay=DECAY)
    schedule = build_schedule(optimizer, total_steps=TOTAL, warmup_steps=WARMUP, schedule="steps")
    schedule.step_update(step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
    with pytest.raises(ValueError, match="divides the rate by 10 and ignores min_lr"):
        build_schedule(optimizer, total_steps=TOTAL, min_lr=1e-5, schedule="steps")


# ---------------------------------------------------------------- one pass over the parameters


@pytest.mark.parametrize("opt", ["adamw", "adam", "sgd", "lamb"])
@pytest.mark.parametrize("threads", [1, 2])
def test_fused_steps_are_those_of_separate_operators(opt, threads):
    """With any number of threads the same bits; other optimisers stay as they are."""

    def trained(fuse: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(401, 251)  # odd sizes: the threads' shares have remainders
        optimizer = build_optimizer(model, opt=opt, lr=1e-2, weight_decay=DECAY)
        if fuse:
            use_fused(optimizer)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        return model.weight.detach()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        fused = trained(fuse=True)
        torch.set_num_threads(1)
        assert torch.equal(fused, trained(fuse=True))
        torch.testing.assert_close(fused, trained(fuse=False), rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)
