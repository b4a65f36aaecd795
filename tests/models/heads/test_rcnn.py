"""Detection heads: torchvision's results where it has the same, and the cascade by hand."""

from collections import OrderedDict

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from vim_ssl.models.heads import RCNN, SimpleFeaturePyramid
from vim_ssl.models.heads.rcnn import STAGES, BoxPredictor, CascadeRoIHeads

SIZE, CHANNELS, CLASSES = 128, 8, 3
SMALL = {"convs": 1, "hidden": 16, "anchor": 8, "samples": 16}


def pyramid(batch: int = 2, size: int = SIZE) -> OrderedDict[str, torch.Tensor]:
    return SimpleFeaturePyramid(8, 16, CHANNELS)(torch.randn(batch, 8, size // 16, size // 16))


def rcnn(**changes) -> RCNN:
    return RCNN(CHANNELS, CLASSES, **(SMALL | changes))


def targets(*boxes_of_one, masks: bool = True) -> list[dict[str, torch.Tensor]]:
    found = []
    for boxes in boxes_of_one:
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        one = {"boxes": boxes, "labels": torch.arange(len(boxes)) % CLASSES + 1}
        if masks:
            one["masks"] = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.uint8)
            for mask, (left, top, right, bottom) in zip(one["masks"], boxes.long(), strict=True):
                mask[top:bottom, left:right] = 1
        found.append(one)
    return found


TWO = targets([[10, 10, 60, 50], [70, 20, 120, 110]], [])


class Maps(nn.Module):
    """A backbone that gives the maps of before."""

    out_channels = CHANNELS

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, images):
        return self.maps


def test_mask_rcnn_is_torchvisions():
    """The same weights in torchvision's own MaskRCNN, built as ViTDet's configuration says."""
    ours, maps = rcnn(cascade=False), pyramid()
    with torch.no_grad():  # so that classes and boxes differ
        ours.regions.box_predictor.classify.weight.normal_()
        ours.regions.box_predictor.move.weight.normal_(std=0.1)
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5)
    proposal_head = RPNHead(CHANNELS, 3, conv_depth=2)
    proposal_head.load_state_dict(ours.proposals.head.state_dict())
    names = ["0", "1", "2", "3"]
    regions = ours.regions
    theirs = MaskRCNN(
        Maps(maps), min_size=SIZE, max_size=SIZE, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        rpn_anchor_generator=anchors, rpn_head=proposal_head, rpn_post_nms_top_n_train=1000,
        _skip_resize=True,  # for which it would draw a random number
        box_roi_pool=MultiScaleRoIAlign(names, 7, 0, canonical_scale=56),
        box_head=regions.box_head, box_predictor=regions.box_predictor,
        box_batch_size_per_image=16, mask_roi_pool=MultiScaleRoIAlign(
            names, 14, 0, canonical_scale=56
        ),
        mask_head=regions.mask_head, mask_predictor=regions.mask_predictor,
    )  # fmt: skip
    images = torch.rand(2, 3, SIZE, SIZE)
    torch.manual_seed(1)
    expected = theirs.train()(list(images), TWO)
    torch.manual_seed(1)
    _, losses = ours.train()(images, maps, TWO)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
    expected = theirs.eval()(list(images))
    found, _ = ours.eval()(images, maps)
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"]) > 20
        for name in ("boxes", "labels", "scores"):
            torch.testing.assert_close(one[name], other[name])
        assert one["masks"].shape == (len(one["boxes"]), 1, 28, 28)


# ------------------------------------------------------------------------- the cascade


def cascade(stages=STAGES, **changes) -> CascadeRoIHeads:
    settings = {
        "box_roi_pool": MultiScaleRoIAlign(["0"], 7, 0), "batch_size_per_image": 16,
        "positive_fraction": 0.25, "score_thresh": 0.05, "nms_thresh": 0.5,
        "detections_per_img": 100,
    }  # fmt: skip
    heads = [nn.Flatten() for _ in stages]
    predictors = [BoxPredictor(49 * CHANNELS, CLASSES + 1, boxes=1) for _ in stages]
    return CascadeRoIHeads(heads, predictors, stages, **(settings | changes))


def test_a_cascade_of_one_stage_is_torchvisions():
    """But for the boxes' loss, and with one box for all classes."""
    ours = cascade(STAGES[:1]).eval()
    with torch.no_grad():
        ours.box_predictor[0].classify.weight.normal_()
        ours.box_predictor[0].move.weight.normal_(std=0.1)

    class EveryClass(nn.Module):
        def forward(self, x):
            logits, moves = ours.box_predictor[0](x)
            return logits, moves.repeat(1, CLASSES + 1)

    theirs = RoIHeads(
        ours.box_roi_pool, nn.Flatten(), EveryClass(), 0.5, 0.5, 16, 0.25, None, 0.05, 0.5, 100
    ).eval()
    maps, proposals = pyramid(), [torch.rand(30, 4) * 50 for _ in range(2)]
    for boxes in proposals:
        boxes[:, 2:] += boxes[:, :2] + 4
    shapes = [(SIZE, SIZE)] * 2
    found, _ = ours(maps, proposals, shapes)
    expected, _ = theirs(maps, proposals, shapes)
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"])
        for name in ("boxes", "labels", "scores"):
            torch.testing.assert_close(one[name], other[name])
    known = targets([[10, 10, 60, 50], [70, 20, 120, 110]], [], masks=False)
    losses = []
    for module in (ours.train(), theirs.train()):
        torch.manual_seed(0)
        losses.append(module(maps, proposals, shapes, known)[1])
    torch.testing.assert_close(losses[0]["loss_classifier_0"], losses[1]["loss_classifier"])


def told(module: CascadeRoIHeads, moves, logits) -> CascadeRoIHeads:
    """Predictors that say the same of every box."""
    with torch.no_grad():
        for predictor, move, logit in zip(module.box_predictor, moves, logits, strict=True):
            predictor.move.weight.zero_()
            predictor.classify.weight.zero_()
            predictor.move.bias.copy_(torch.tensor(move))
            predictor.classify.bias.copy_(torch.tensor(logit))
    return module


def test_every_stage_moves_the_boxes_on_and_the_scores_are_the_mean():
    """Each by a tenth of the width to the right and down; the third also halves the width."""
    moves = [[weights[0] / 10, weights[1] / 10, 0.0, 0.0] for _, weights in STAGES]
    moves[2][2] = -STAGES[2][1][2] * torch.tensor(2.0).log().item()
    logits = [[0.0, 3.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0], [1.0, 0.0, 5.0, 0.0]]
    module = told(cascade(), moves, logits).eval()
    proposals = [torch.tensor([[10.0, 20, 30, 40], [90, 90, 120, 120]])]
    (found,), _ = module(pyramid(1), proposals, [(SIZE, SIZE)])
    scores = torch.tensor(logits).softmax(-1).mean(0)[1:]
    got = {tuple(round(x, 3) for x in box) for box in found["boxes"].tolist()}
    # The second would reach down to 129.
    assert got == {(21.0, 26.0, 31.0, 46.0), (106.5, 99.0, 121.5, 128.0)}
    for label in (1, 2, 3):
        if scores[label - 1] > 0.05:
            of_it = found["scores"][found["labels"] == label]
            torch.testing.assert_close(of_it, scores[label - 1].expand(2))
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def test_later_stages_ask_for_more_overlap():
    """A box of IoU 0.55 is an object to the first stage alone; the truth itself to all."""
    still = told(cascade(), [[0.0] * 4] * 3, [[0.0] * 4] * 3).train()
    known = targets([[0, 0, 40, 40]], masks=False)
    proposals = [torch.tensor([[0.0, 0, 22, 40], [80, 80, 120, 120]])]
    _, losses = still(pyramid(1), proposals, [(SIZE, SIZE)], known)
    # Two of L1: the centre's miss, 9 of 22 pixels, and the width's, log(40 / 22); of 3 samples.
    expected = (10 * 9 / 22 + 5 * torch.tensor(40 / 22).log()) / 3
    torch.testing.assert_close(losses["loss_box_reg_0"], expected)
    assert losses["loss_box_reg_1"] == losses["loss_box_reg_2"] == 0
    for k in range(3):
        torch.testing.assert_close(losses[f"loss_classifier_{k}"], torch.tensor(4.0).log())


def test_stages_share_the_gradient_into_the_features():
    """Three alike send together what one would send."""
    gradients = []
    for count in (1, 3):
        torch.manual_seed(0)
        module = cascade([STAGES[0]] * count).train()
        with torch.no_grad():
            for predictor in module.box_predictor:
                predictor.load_state_dict(module.box_predictor[0].state_dict())
                predictor.move.weight.zero_()
        maps = OrderedDict({"0": torch.ones(1, CHANNELS, 32, 32, requires_grad=True)})
        known = targets([[0, 0, 40, 40]], masks=False)
        proposals = [torch.tensor([[0.0, 0, 30, 40], [80, 80, 120, 120]])]
        _, losses = module(maps, proposals, [(SIZE, SIZE)], known)
        sum(v for name, v in losses.items() if "classifier" in name).backward()
        gradients.append(maps["0"].grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


# ------------------------------------------------------------------------- both


@pytest.mark.parametrize("known", ["two", "none"])
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
@pytest.mark.parametrize("cascade", [True, False], ids=["cascade", "rcnn"])
def test_every_parameter_has_a_gradient_objects_or_not(cascade, masks, known):
    """Several processes would refuse a parameter without one."""
    module, maps = rcnn(cascade=cascade, masks=masks).train(), pyramid()
    truth = TWO if known == "two" else targets([], [])
    _, losses = module(torch.zeros(2, 3, SIZE, SIZE), maps, truth)
    sum(losses.values()).backward()
    assert ("loss_mask" in losses) is masks
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_low_precision_leaves_the_boxes_their_pixels():
    """bfloat16 has 8 bits: of two boxes beyond 256 that lie a pixel apart it makes one."""
    module, size = rcnn(masks=False).eval(), 512
    with torch.no_grad():
        module.proposals.head.bbox_pred.weight.zero_()
        for predictor in module.regions.box_predictor:
            predictor.move.weight.zero_()
    maps = pyramid(1, size)
    images = ImageList(torch.zeros(1, 3, size, size), [(size, size)])
    (anchors,) = module.proposals.anchor_generator(images, list(maps.values()))
    allowed = {tuple(box) for box in anchors.clamp(0, size).tolist()}
    with torch.autocast("cpu", torch.bfloat16):
        (found,), _ = module(images.tensors, maps)
    assert found["boxes"].dtype == torch.float32
    rounded = found["boxes"].double().round()
    torch.testing.assert_close(found["boxes"].double(), rounded, atol=1e-3, rtol=0)
    assert {tuple(box) for box in rounded.tolist()} <= allowed
    assert found["boxes"].max() > 256


def test_the_papers_heads_have_their_number_of_parameters():
    """Counted by hand: 3x3 convolutions with LayerNorm and no bias, one layer of 1024."""
    c, hidden, n = 256, 1024, 81

    def count(module):
        return sum(p.numel() for p in module.parameters())

    module = RCNN(c, n - 1)
    convs = 4 * (9 * c * c + 2 * c)
    assert count(module.proposals) == 2 * (9 * c * c + c) + 3 * (c + 1) + 12 * (c + 1)
    box = convs + (49 * c + 1) * hidden + (hidden + 1) * (n + 4)
    mask = convs + 4 * c * c + c + (c + 1) * n
    assert count(module.regions) == 3 * box + mask
    assert count(RCNN(c, n - 1, cascade=False, masks=False).regions) == (
        convs + (49 * c + 1) * hidden + (hidden + 1) * 5 * n
    )
    assert isinstance(module.regions.mask_head[0][1], LayerNorm2d)
