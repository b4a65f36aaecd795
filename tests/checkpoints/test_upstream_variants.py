"""Upstream's variants that were never released: made-up weights by upstream's key names, against
NumPy in float64."""

import argparse

import numpy as np
import pytest
import torch
from golden_weights import golden_input, golden_state_dict
from numpy_encoder import predict

from vim_ssl import load_encoder, save_encoder
from vim_ssl.checkpoints.verify import verify

D, E, N, R, DEPTH, SIDE, CLASSES = 32, 64, 16, 2, 4, 64, 7
NAME = "vim_tiny_patch16_64_bimamba{}_final_pool_{}_abs_pos_embed_with_{}clstok"
ONE_DIRECTION = {
    "A_log": [E, N], "D": [E], "conv1d.weight": [E, 1, 4], "conv1d.bias": [E],
    "x_proj.weight": [R + 2 * N, E], "dt_proj.weight": [E, R], "dt_proj.bias": [E],
}  # fmt: skip
V1 = ONE_DIRECTION | {"A_b_log": [E, N]}
V2 = V1 | {
    "D_b": [E], "conv1d_b.weight": [E, 1, 4], "conv1d_b.bias": [E],
    "x_proj_b.weight": [R + 2 * N, E], "dt_proj_b.weight": [E, R], "dt_proj_b.bias": [E],
}  # fmt: skip


def weights(mixer: dict[str, list[int]], cls: tuple[str, ...] = ("cls_token",)):
    """A model of upstream's, by its keys."""
    shapes = {name: [1, 1, D] for name in cls} | {
        "pos_embed": [1, 16 + len(cls), D], "norm_f.weight": [D], "head.weight": [CLASSES, D],
        "head.bias": [CLASSES], "patch_embed.proj.weight": [D, 3, 16, 16],
        "patch_embed.proj.bias": [D],
    }  # fmt: skip
    for i in range(DEPTH):
        shapes[f"layers.{i}.norm.weight"] = [D]
        both = mixer | {"in_proj.weight": [2 * E, D], "out_proj.weight": [D, E]}
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in both.items()}
    return golden_state_dict(shapes)


def write(path, state, name=None, **args):
    args = {"args": argparse.Namespace(model=name, **args)} if name or args else {}
    torch.save({"model": state} | args, path)
    return path


# id -> mixer, class tokens, model name, training arguments, arguments of load_encoder, config
DOUBLE = ("cls_token_head", "cls_token_tail")
CASES = {
    "v1": (V1, ("cls_token",), NAME.format("v1", "mean", "mid"), {}, {},
           {"shared_conv": True, "divide_out": False}),
    "v1-by-keys": (V1, ("cls_token",), None, {}, {"cls_position": "middle"},
                   {"shared_conv": True, "divide_out": False}),
    "pairs": (ONE_DIRECTION, ("cls_token",), NAME.format("", "mean", "mid"),
              {"if_bidirectional": True}, {}, {"directions": "layer"}),
    "pairs-requested": (ONE_DIRECTION, (), None, {}, {"directions": "layer"},
                        {"directions": "layer", "cls_position": "none", "global_pool": "avg"}),
    "none": (ONE_DIRECTION, (), NAME.format("", "mean", "no"), {}, {},
             {"directions": "forward", "cls_position": "none", "global_pool": "avg"}),
    "max": (V2, (), NAME.format("v2", "max", "no") + "_div2", {}, {},
            {"cls_position": "none", "global_pool": "max-logits"}),
    "mean": (V2, (), NAME.format("v2", "mean", "no") + "_div2", {}, {},
             {"cls_position": "none", "global_pool": "avg"}),
    "double": (V2, DOUBLE, NAME.format("v2", "mean", "double") + "_div2", {}, {},
               {"cls_position": "double"}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*has no div2")  # one direction: nothing to divide
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_numpy(tmp_path, case):
    mixer, cls, name, args, requested, config = CASES[case]
    state = weights(mixer, cls)
    path = write(tmp_path / "vim.pth", state, name, **args)
    loaded = load_encoder(path, num_classes=None, dtype=torch.float64, **requested)
    assert {key: loaded.config[key] for key in config} == config
    x = golden_input((SIDE, SIDE))
    upstream = {key: value.double().numpy() for key, value in state.items()}
    expected = predict(upstream, loaded.config | {"img_size": (SIDE, SIDE)}, x.double().numpy())
    with torch.inference_mode():
        got = loaded(x.double()).numpy()
    assert np.abs(got - expected).max() <= 1e-10 * np.abs(expected).max()

    save_encoder(loaded, tmp_path / "run")
    again = load_encoder(tmp_path / "run", num_classes=None, dtype=torch.float64)
    assert again.config == loaded.config
    with torch.inference_mode():
        assert torch.equal(again(x.double()), loaded(x.double()))


def test_a_bare_state_dict_of_pairs_shows_them(tmp_path):
    """Unlike upstream's: parameters that read backward have other names here."""
    path = write(tmp_path / "vim.pth", weights(ONE_DIRECTION, ()))
    pairs = load_encoder(path, directions="layer")
    again = load_encoder(write(tmp_path / "bare.pth", pairs.state_dict()))
    assert again.directions == "layer"
    torch.testing.assert_close(again.state_dict(), pairs.state_dict())


def test_a_pool_that_is_not_known_here_is_reported(tmp_path):
    name = NAME.format("v2", "none", "no") + "_div2"
    path = write(tmp_path / "vim.pth", weights(V2, ()), name)
    with pytest.warns(UserWarning, match=r"final_pool_none .*assumed global_pool='avg'"):
        assert load_encoder(path).global_pool == "avg"


def test_one_direction_without_a_name_may_be_a_pair(tmp_path):
    path = write(tmp_path / "vim.pth", weights(ONE_DIRECTION))
    with pytest.warns(UserWarning, match=r"same keys; for that one pass directions='layer'"):
        assert load_encoder(path, cls_position="middle").directions == "forward"


def test_verify_names_the_variant(tmp_path):
    path = write(tmp_path / "v1.pth", weights(V1), NAME.format("v1", "mean", "mid"))
    report = verify(path)
    assert report.loads
    assert "directions both with one convolution" in str(report)
    args = {"if_bidirectional": True}
    report = verify(write(tmp_path / "pairs.pth", weights(ONE_DIRECTION), NAME, **args))
    assert report.loads
    assert "directions layer" in str(report)


@pytest.mark.parametrize(
    ("mixer", "name", "args", "requested", "says"),
    [
        (V2, NAME.format("v1", "mean", "mid"), {}, {}, "says bimambav1.*A_b_log without conv1d_b"),
        (V2, None, {"if_bidirectional": True}, {}, "two directions each"),
        (V1, None, {"if_bidirectional": True}, {}, "two directions each"),
        (V1, None, {}, {"directions": "layer"}, "directions='layer' was requested.*different"),
        (V1, None, {}, {"shared_conv": False}, "shared_conv=False was requested"),
        (V2, None, {}, {"shared_conv": True}, "shared_conv=True was requested"),
        (ONE_DIRECTION, None, {"if_bidirectional": True}, {"directions": "both"},
         "directions='both' was requested.*different networks"),
    ],
    ids=["v1-name-v2-keys", "v2-pairs", "v1-pairs", "v1-as-pairs", "v1-as-v2", "v2-as-v1",
         "pairs-as-v2"],
)  # fmt: skip
def test_what_contradicts_the_weights_is_refused(tmp_path, mixer, name, args, requested, says):
    path = write(tmp_path / "vim.pth", weights(mixer), name, **args)
    with pytest.raises(ValueError, match=says):
        load_encoder(path, cls_position="middle", divide_out=True, **requested)
