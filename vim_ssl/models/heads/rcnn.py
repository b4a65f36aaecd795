"""Detection heads: Mask R-CNN and Cascade Mask R-CNN from torchvision's modules."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

LEVELS = ("0", "1", "2", "3")  # regions are pooled from these; proposals come from "pool" too
COARSEST = 64  # stride of "pool" in pixels; images are multiples of it
# The cascade's stages: the minimum IoU of a positive box, and the weights of its offsets.
STAGES = (
    (0.5, (10.0, 10.0, 5.0, 5.0)),
    (0.6, (20.0, 20.0, 10.0, 10.0)),
    (0.7, (30.0, 30.0, 15.0, 15.0)),
)
Objects = dict[str, Tensor]  # boxes, labels, scores, masks of one image


class RCNN(nn.Module):
    """Predict proposals from a pyramid, and the class, refined box and mask of each.

    Args:
        channels: channels of the pyramid's maps and of the heads.
        num_classes: number of object classes, without the background (class 0).
        cascade: use three box heads in sequence, each trained on the boxes of the previous one
            (`CascadeRoIHeads`); otherwise one (torchvision's `RoIHeads`).
        masks: add a mask head.
        convs: number of 3x3 convolutions in each box head and in the mask head.
        hidden: width of a box head's last layer.
        anchor: side of the finest level's anchors in pixels; doubled per coarser level.
        samples: number of proposals per image for training the box heads.
        score: minimum score of a detection.
        most: maximum number of detections per image.
    References: Mask R-CNN, arXiv:1703.06870; Cascade R-CNN, arXiv:1712.00726. The sizes and norms
        are ViTDet's, arXiv:2203.16527. The proposals' boxes use torchvision's smooth L1 loss
        (beta 1/9) instead of ViTDet's L1.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        cascade: bool = True,
        masks: bool = True,
        convs: int = 4,
        hidden: int = 1024,
        anchor: int = 32,
        samples: int = 512,
        score: float = 0.05,
        most: int = 100,
    ):
        super().__init__()
        sides = tuple((anchor * 2**i,) for i in range(len(LEVELS) + 1))
        anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides))
        self.proposals = RegionProposalNetwork(
            anchors, ProposalHead(channels, 3, conv_depth=2),
            fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000}, nms_thresh=0.7,
        )  # fmt: skip

        def pool(side: int) -> MultiScaleRoIAlign:
            # A box 7 anchors wide is pooled at stride 16 (224 px for anchors of 32).
            return MultiScaleRoIAlign(list(LEVELS), side, 0, canonical_scale=7 * anchor)

        def box_head() -> nn.Module:
            return FastRCNNConvFCHead(
                (channels, 7, 7), [channels] * convs, [hidden], norm_layer=LayerNorm2d
            )

        common: dict[str, Any] = {
            "box_roi_pool": pool(7), "batch_size_per_image": samples, "positive_fraction": 0.25,
            "score_thresh": score, "nms_thresh": 0.5, "detections_per_img": most,
        }  # fmt: skip
        if masks:
            common |= {
                "mask_roi_pool": pool(14),
                "mask_head": MaskRCNNHeads(
                    channels, [channels] * convs, dilation=1, norm_layer=LayerNorm2d
                ),
                "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes + 1),
            }
        self.regions: RoIHeads
        if cascade:
            self.regions = CascadeRoIHeads(
                [box_head() for _ in STAGES],
                [BoxPredictor(hidden, num_classes + 1, boxes=1) for _ in STAGES],
                **common,
            )
        else:
            self.regions = RoIHeads(
                box_head=box_head(), fg_iou_thresh=STAGES[0][0], bg_iou_thresh=STAGES[0][0],
                box_predictor=BoxPredictor(hidden, num_classes + 1, boxes=num_classes + 1),
                bbox_reg_weights=STAGES[0][1], **common,
            )  # fmt: skip

    def forward(
        self, images: Tensor, maps: OrderedDict[str, Tensor], targets: list[Objects] | None = None
    ) -> tuple[list[Objects], dict[str, Tensor]]:
        """Return (detections, {}) in evaluation, ([], losses) in training.

        Args:
            images: (b, c, h, w); only the size is used; sides are multiples of 64.
            maps: output of `SimpleFeaturePyramid`.
            targets: in training, one dict per image: ``boxes`` (n, 4) float32, left, top, right,
                bottom in pixels, with positive width and height; ``labels`` (n,) int64, from 1;
                with a mask head ``masks`` (n, h, w) uint8, 1 = object. n may be 0.
        Returns: detections, one dict per image: ``boxes``, ``labels``, ``scores`` (n,), descending,
            and with a mask head ``masks`` (n, 1, 28, 28), probabilities over the box; and the
            losses, scalars by name, each an average.
        """
        # Boxes get the maps' dtype, and bfloat16 cannot resolve single pixels beyond 256.
        maps = OrderedDict((name, x.float()) for name, x in maps.items())
        # All images have the same size, including padding: torchvision infers the levels' strides
        # from the first batch.
        shapes = [(images.shape[-2], images.shape[-1])] * len(images)
        boxes, losses = self.proposals(ImageList(images, shapes), maps, targets)
        detections, more = self.regions(maps, boxes, shapes, targets)
        return detections, losses | more


class ProposalHead(RPNHead):
    """Predict objectness and box offsets for every anchor, in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in offsets]


class BoxPredictor(nn.Module):
    """The last layers of a box head: (n, dim) -> logits (n, classes), offsets (n, 4 boxes), in
    float32.

    Args:
        dim: width of the input.
        classes: number of classes, including the background (class 0).
        boxes: 1 for class-agnostic boxes, or ``classes`` for one box per class.
    """

    def __init__(self, dim: int, classes: int, boxes: int):
        super().__init__()
        self.classify, self.move = nn.Linear(dim, classes), nn.Linear(dim, 4 * boxes)
        for layer, std in ((self.classify, 0.01), (self.move, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classify(x).float(), self.move(x).float()


class CascadeRoIHeads(RoIHeads):
    """Box heads in sequence, each trained at a higher IoU on the boxes refined by the previous one;
    in evaluation their class probabilities are averaged.

    The stages' losses have equal weights; with three stages, each passes a third of its gradient to
    the shared features. Offsets are class-agnostic. Masks are trained on the first stage's samples.

    Args:
        heads, predictors: one per stage.
        stages: per stage, the minimum IoU of a positive box, and the weights of its offsets.
        common: remaining arguments of torchvision's `RoIHeads`.
    Reference: Cascade R-CNN, arXiv:1712.00726, in ViTDet's configuration.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        predictors: Sequence[nn.Module],
        stages: Sequence[tuple[float, tuple[float, float, float, float]]] = STAGES,
        **common: Any,
    ):
        super().__init__(
            box_head=nn.ModuleList(heads), box_predictor=nn.ModuleList(predictors),
            fg_iou_thresh=stages[0][0], bg_iou_thresh=stages[0][0],
            bbox_reg_weights=stages[0][1], **common,
        )  # fmt: skip
        if not len(heads) == len(predictors) == len(stages):
            raise ValueError(
                f"{len(heads)} heads and {len(predictors)} predictors for {len(stages)} stages."
            )
        self.matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou, _ in stages]
        self.coders = [BoxCoder(weights) for _, weights in stages]

    def forward(self, features, proposals, image_shapes, targets=None):
        """Same signature as in torchvision; the losses are ``loss_classifier_k`` and
        ``loss_box_reg_k`` for each stage k, and ``loss_mask``."""
        losses = {}
        scores, samples, labels, offsets = [], None, None, None
        count = len(self.coders)
        for k in range(count):
            self.proposal_matcher, self.box_coder = self.matchers[k], self.coders[k]
            if self.training and k == 0:
                proposals, matched, labels, offsets = self.select_training_samples(
                    proposals, targets
                )
                samples = (proposals, matched, labels)
            elif self.training:
                labels, offsets = self._match(proposals, targets)
            pooled = self.box_roi_pool(features, proposals, image_shapes)
            if self.training:
                pooled = _less_gradient(pooled, 1 / count)
            logits, moves = self.box_predictor[k](self.box_head[k](pooled))
            if self.training:
                losses |= {
                    f"{name}_{k}": loss
                    for name, loss in box_losses(
                        logits, moves, torch.cat(labels), torch.cat(offsets)
                    ).items()
                }
            else:
                scores.append(logits.softmax(-1))
            if k + 1 < count:
                moved = self.box_coder.decode(moves.detach(), proposals)
                moved = moved.reshape(-1, 4).split([len(boxes) for boxes in proposals])
                proposals = [
                    clip_boxes_to_image(boxes, shape)
                    for boxes, shape in zip(moved, image_shapes, strict=True)
                ]
        if self.training:
            if self.has_mask():
                losses["loss_mask"] = self._mask_loss(features, image_shapes, targets, *samples)
            return [], losses
        # torchvision expects logits, and a box for every class.
        mean = torch.stack(scores).mean(0)
        every = moves.repeat(1, mean.shape[1])
        columns = self.postprocess_detections(mean.log(), every, proposals, image_shapes)
        detections = [
            dict(zip(("boxes", "scores", "labels"), of_one, strict=True))
            for of_one in zip(*columns, strict=True)
        ]
        if self.has_mask():
            logits = self._mask_logits(features, [one["boxes"] for one in detections], image_shapes)
            masks = maskrcnn_inference(logits, [one["labels"] for one in detections])
            for one, of_one in zip(detections, masks, strict=True):
                one["masks"] = of_one
        return detections, {}

    def _match(self, proposals: list[Tensor], targets: list[Objects]):
        """Return labels and offsets for later stages, which use all boxes without sampling."""
        truth = [target["boxes"].to(proposals[0].dtype) for target in targets]
        matched, labels = self.assign_targets_to_proposals(
            proposals, truth, [target["labels"] for target in targets]
        )
        matches = []
        for boxes, known, of, label in zip(proposals, truth, matched, labels, strict=True):
            label[((boxes[:, 2:] - boxes[:, :2]) <= 0).any(1)] = -1  # clipped to nothing: ignored
            matches.append((known if len(known) else known.new_zeros(1, 4))[of])
        return labels, self.box_coder.encode(matches, proposals)

    def _mask_logits(self, features, boxes, image_shapes) -> Tensor:
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        return self.mask_predictor(self.mask_head(pooled)).float()

    def _mask_loss(self, features, image_shapes, targets, proposals, matched, labels) -> Tensor:
        objects = [torch.where(label > 0)[0] for label in labels]
        boxes = [box[i] for box, i in zip(proposals, objects, strict=True)]
        return maskrcnn_loss(
            self._mask_logits(features, boxes, image_shapes), boxes,
            [target["masks"] for target in targets], [target["labels"] for target in targets],
            [of[i] for of, i in zip(matched, objects, strict=True)],
        )  # fmt: skip


def box_losses(logits: Tensor, moves: Tensor, labels: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    """Return the cross-entropy of all boxes and the L1 loss of the positive boxes' offsets, both
    divided by the number of all boxes.

    Args:
        logits: (n, classes). moves: (n, 4), predicted offsets.
        labels: (n,), 0 for background, -1 for ignored boxes. offsets: (n, 4), targets.
    """
    counted = (labels >= 0).sum().clamp(min=1)
    objects = torch.where(labels > 0)[0]
    classes = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    boxes = F.l1_loss(moves[objects], offsets[objects], reduction="sum")
    return {"loss_classifier": classes / counted, "loss_box_reg": boxes / counted}


def _less_gradient(x: Tensor, share: float) -> Tensor:
    """Return ``x`` with its gradient scaled by ``share``."""
    constant = x.detach()
    return constant + share * (x - constant)
