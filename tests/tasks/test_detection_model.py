"""The detection model: what is counted, where boxes end up, what is kept in a file."""

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder, load_encoder
from vim_ssl.tasks.detection import Detection, load_detection

CLASSES = ["tree", "house"]
SMALL = {"size": 64, "channels": 8, "convs": 1, "hidden": 16, "anchor": 8, "samples": 16}


def encoder(**changes) -> VimEncoder:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 0}
    return VimEncoder(**(settings | changes))


def model(**changes) -> Detection:
    return Detection(encoder(), CLASSES, **(SMALL | changes))


def batch(size: int = 64) -> dict:
    masks = torch.zeros(1, size, size, dtype=torch.uint8)
    masks[:, 10:30, 5:45] = 1
    one = {"boxes": torch.tensor([[5.0, 10, 45, 30]]), "labels": torch.tensor([2]), "masks": masks}
    nothing = {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
        "masks": masks[:0],
    }  # fmt: skip
    return {"image": torch.randn(2, 3, size, size), "objects": [one, nothing]}


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
@pytest.mark.parametrize("head", ["cascade", "rcnn"])
def test_a_step_reaches_every_parameter(head, masks):
    objective = model(head=head, masks=masks).train()
    out = objective(batch())
    out.loss_sum.backward()
    assert out.weight == 2
    torch.testing.assert_close(out.loss_sum, sum(out.metrics.values()))
    assert ("mask" in out.metrics) is masks
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert objective.encoder.patch_embed.proj.weight.grad.any()


def test_low_precision_gives_nearly_the_same_losses():
    """The same draws, in float32 and as several GPUs would do it."""
    objective, samples = model().train(), batch()
    torch.manual_seed(1)
    full = objective(samples)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        low = objective(samples)
    for name, loss in full.metrics.items():
        torch.testing.assert_close(low.metrics[name].float(), loss, rtol=0.1, atol=0.02, msg=name)
    low.loss_sum.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters())


def test_in_evaluation_there_are_images_and_no_loss():
    out = model().eval()(batch())
    assert (out.loss_sum, out.weight, out.metrics) == (0, 2, {})
    images = out.images()
    assert images.shape == (2, 3, 64, 128)
    assert 0 <= images.min() <= images.max() <= 1


def test_boxes_and_masks_are_in_the_images_own_pixels(monkeypatch):
    """200 x 100 pixels lie as 64 x 32 on the canvas; what is found below lies beside the image,
    and what reaches below is cut off."""
    found = {
        "boxes": torch.tensor([[8.0, 4, 24, 12], [16, 28, 48, 40], [0, 40, 64, 64]]),
        "labels": torch.tensor([1, 2, 1]), "scores": torch.tensor([0.9, 0.8, 0.7]),
        "masks": torch.ones(3, 1, 28, 28),
    }  # fmt: skip
    detector = model().eval()
    monkeypatch.setattr(detector, "detect", lambda images: ([found], {}))
    answer = detector.predict(Image.new("RGB", (200, 100)))
    assert answer["boxes"].tolist() == [[25, 12.5, 75, 37.5], [50, 87.5, 150, 100]]
    assert answer["labels"].tolist() == [0, 1]
    assert answer["scores"].tolist() == pytest.approx([0.9, 0.8])
    assert answer["masks"].shape == (2, 100, 200)
    for mask, (left, top, right, bottom) in zip(answer["masks"], answer["boxes"], strict=True):
        rows, columns = np.nonzero(mask)
        ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(np.array(ends) - [left, top, right, bottom]).max() <= 2


def test_a_mask_stays_in_place_where_its_box_leaves_the_image(monkeypatch):
    """The canvas goes on below a wide image; of this box the image ends half way."""
    upper = torch.zeros(1, 1, 28, 28)
    upper[..., :14, :] = 1
    found = {
        "boxes": torch.tensor([[16.0, 24, 48, 40]]), "labels": torch.tensor([1]),
        "scores": torch.tensor([0.9]), "masks": upper,
    }  # fmt: skip
    detector = model().eval()
    monkeypatch.setattr(detector, "detect", lambda images: ([found], {}))
    answer = detector.predict(Image.new("RGB", (200, 100)))
    assert answer["boxes"].tolist() == [[50, 75, 150, 100]]
    assert answer["masks"][0, 77:, 52:148].all()


@pytest.mark.parametrize("head", ["cascade", "rcnn"])
@pytest.mark.parametrize("size", [(1, 1), (3, 300), (64, 64), (90, 40)], ids=str)
def test_any_image_can_be_searched(size, head):
    width, height = size
    answer = model(head=head).eval().predict(Image.new("L", size, 70))
    n = len(answer["boxes"])
    assert answer["masks"].shape == (n, height, width)
    assert answer["labels"].shape == answer["scores"].shape == (n,)
    assert set(answer["labels"].tolist()) <= {0, 1}
    if n:
        assert answer["boxes"].min() >= 0
        assert (answer["boxes"][:, 2:] <= [width, height]).all()
        assert (np.diff(answer["scores"]) <= 0).all()


@pytest.mark.parametrize(
    ("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)]
)
def test_what_is_found_lies_in_the_upright_image(orientation, turn):
    noise = np.random.default_rng(0).integers(0, 256, (40, 71, 3), np.uint8)
    upright = Image.fromarray(noise)
    stored = upright.transpose(turn)
    stored.getexif()[0x0112] = orientation
    detector = model(score=0.01).eval()
    expected, found = detector.predict(upright), detector.predict(stored)
    assert len(expected["boxes"])
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("head", ["cascade", "rcnn"])
def test_where_nothing_is_found_the_answer_is_empty(head):
    answer = model(head=head, score=0.999).eval().predict(Image.new("RGB", (50, 40)))
    assert answer["boxes"].shape == (0, 4)
    assert answer["masks"].shape == (0, 40, 50)
    assert len(answer["labels"]) == len(answer["scores"]) == 0


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
@pytest.mark.parametrize("head", ["cascade", "rcnn"])
def test_a_saved_model_finds_the_same(tmp_path, head, masks):
    before = model(head=head, masks=masks, score=0.01, most=7).eval()
    before.save(tmp_path)
    after = load_detection(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (50, 71, 3), np.uint8)
    image = Image.fromarray(noise)
    one, other = before.predict(image), after.predict(image)
    assert 0 < len(one["boxes"]) <= 7
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert after.config == before.config
    assert not after.training
    assert load_encoder(tmp_path).embed_dim == 16


def test_a_folder_without_a_detector_says_so(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no detection\.safetensors, which a detection run"
    ):
        load_detection(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "cascades"}, "head 'cascades' is unknown. Did you mean 'cascade'"),
        ({"size": 100}, "size 100 is not a multiple of 64, .* use 128"),
        ({"size": 16}, "size 16 is not a multiple of 64, .* use 64"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_encoders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patches overlap"):
        Detection(encoder(patch_size=16, stride=8), CLASSES, **SMALL)
    with pytest.raises(ValueError, match="img_size 64 is not divisible by patch_size 7"):
        Detection(encoder(img_size=28, patch_size=7), CLASSES, **SMALL)
    with pytest.raises(ValueError, match="classes is empty"):
        Detection(encoder(), [], **SMALL)
