"""Autoregressive pretraining: nothing that is predicted was seen, and what was seen counts."""

import pytest
import torch

from vim_ssl import VimEncoder, load_encoder, save_encoder
from vim_ssl.objectives.ar import AutoRegressive
from vim_ssl.objectives.pixels import patchify, unpatchify

ARGS = {"img_size": (16, 24), "patch_size": 2, "embed_dim": 16, "depth": 4, "num_classes": 0}


def make(cluster: int = 4, **args) -> AutoRegressive:
    torch.manual_seed(0)
    encoder = VimEncoder(**ARGS | {"directions": "forward"} | args)
    torch.nn.init.normal_(encoder.pos_embed)
    return AutoRegressive(encoder, cluster=cluster, decoder_dim=16, decoder_depth=2)


def everything(model: AutoRegressive, images: torch.Tensor) -> torch.Tensor:
    """Predictions in the order of reading, (b, clusters, patches of one, pixels)."""
    grid = model.encoder.grid(*images.shape[-2:])
    mask = model.hidden({"image": images}, grid)
    with torch.no_grad():
        predicted = model.predict(images, mask)
    return predicted[:, model.order(grid)].unflatten(1, (-1, model.cluster**2))


@pytest.mark.parametrize("cls_position", ["middle", "first", "double", "none"])
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_no_prediction_sees_its_own_or_later_clusters(cluster, cls_position):
    model = make(cluster, cls_position=cls_position).eval()
    images = torch.randn(2, 3, 16, 24)
    order = model.order((8, 12))
    before = everything(model, images)
    number = before.shape[1]
    for k in range(0, number, max(number // 6, 1)):
        patches = patchify(images, 2)
        chosen = order[k * cluster**2 : (k + 1) * cluster**2]
        patches[:, chosen] = torch.randn_like(patches[:, chosen])
        after = everything(model, unpatchify(patches, 2, (16, 24)))
        assert torch.equal(before[:, : k + 1], after[:, : k + 1])
        for later in range(k + 1, number):  # and every later one uses it
            assert not torch.equal(before[:, later], after[:, later])


def test_clusters_are_squares_read_in_raster_order():
    order = make(2).order((4, 4))
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_the_first_cluster_is_given_and_all_others_count():
    model = make(4)
    images = torch.randn(2, 3, 16, 24)
    mask = model.hidden({"image": images}, (8, 12))
    given = (~mask[0]).nonzero()[:, 0].tolist()
    assert given == [12 * row + column for row in range(4) for column in range(4)]
    out = model({"image": images})
    target = patchify(images, 2)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    predicted = model.predict(images, mask)
    expected = (predicted - target)[mask].square().mean() * 2
    torch.testing.assert_close(out.loss_sum, expected)
    assert out.weight == 2
    assert out.images().shape == (2, 3, 16, 96)


def test_every_weight_learns():
    model = make(4)
    model({"image": torch.randn(2, 3, 16, 24)}).loss_sum.backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_the_other_direction_begins_as_a_copy(tmp_path):
    model = make(4)
    save_encoder(model.encoder, tmp_path)
    assert load_encoder(tmp_path).directions == "forward"
    both = load_encoder(tmp_path, directions="both")
    assert both.directions == "both"
    mixer = both.layers[0].mixer
    assert torch.equal(mixer.A_b_log, mixer.A_log)
    assert torch.equal(mixer.A_log, model.encoder.layers[0].mixer.A_log)


@pytest.mark.parametrize(
    ("encoder", "args", "message"),
    [
        ({"directions": "both"}, {}, "directions='forward'"),
        ({"directions": "backward"}, {}, "directions='forward'"),
        ({"use_mask_token": True}, {}, "no mask token"),
        ({"num_classes": 3}, {}, "num_classes=0"),
        ({}, {"decoder_dim": 18}, "2-D sine"),
        ({}, {"cluster": 0}, "must be 1 or more"),
    ],
    ids=lambda v: str(v),
)
def test_what_does_not_fit_is_refused(encoder, args, message):
    with pytest.raises(ValueError, match=message):
        AutoRegressive(VimEncoder(**ARGS | {"directions": "forward"} | encoder), **args)


@pytest.mark.parametrize("grid", [(8, 10), (4, 4), (6, 8)], ids=str)
def test_a_grid_that_clusters_do_not_fill_is_refused(grid):
    with pytest.raises(ValueError, match=f"do not divide the {grid[0]}x{grid[1]} grid"):
        make(4).order(grid)
