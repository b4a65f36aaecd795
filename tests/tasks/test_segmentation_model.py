"""The segmentation model and its loss: what counts, what is equal, what is kept in a file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from vim_ssl import VimEncoder, load_encoder
from vim_ssl.data.labels import IGNORE
from vim_ssl.tasks.segmentation import Segmentation, dice_loss, load_segmentation

CLASSES = ["ground", "tree", "house"]


def encoder(**changes) -> VimEncoder:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_classes": 0}
    return VimEncoder(**(settings | changes))


def model(**changes) -> Segmentation:
    depth = changes.pop("depth", 4)
    return Segmentation(encoder(depth=depth), CLASSES, **({"window": 32, "channels": 16} | changes))


def batch(count: int = 2, size=(32, 32)) -> dict:
    return {
        "image": torch.randn(count, 3, *size),
        "mask": torch.randint(0, 3, (count, *size)),
    }


@pytest.mark.parametrize(
    ("depth", "head", "taps"),
    [
        (24, "upernet", [5, 11, 17, 23]),
        (4, "upernet", [0, 1, 2, 3]),
        (2, "upernet", [0, 0, 1, 1]),
        (24, "linear", [23]),
    ],
)
def test_taps_are_spread_evenly_to_the_last_block(depth, head, taps):
    assert model(depth=depth, head=head).taps == taps


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)], ids=str)
def test_a_step_reaches_every_parameter(head, size):
    objective = model(head=head, depth=2).train()
    out = objective(batch(size=size))
    out.loss_sum.backward()
    assert out.weight == 2
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert out.images().shape == (2, 3, size[0], 3 * size[1])
    assert 0 <= out.images().min() <= out.images().max() <= 1


def test_blocks_above_the_last_tap_are_not_kept():
    objective = model(depth=4, head="linear", taps=[1])
    assert len(objective.encoder.layers) == 2
    assert objective.config["taps"] == [1]


def test_the_loss_is_the_mean_over_labelled_pixels():
    objective = model(auxiliary=0.0).eval()
    samples = batch(4)
    samples["mask"][0, :20] = IGNORE
    samples["mask"][3] = IGNORE
    out = objective(samples)
    logits = F.interpolate(objective.logits(samples["image"]), (32, 32), mode="bilinear")
    expected = F.cross_entropy(logits, samples["mask"], ignore_index=IGNORE)
    torch.testing.assert_close(out.loss_sum / out.weight, expected)
    hits = (logits.argmax(1) == samples["mask"])[samples["mask"] != IGNORE].float().mean()
    accuracy = out.metrics["pixel_accuracy"] / out.weight
    torch.testing.assert_close(accuracy, 100 * hits)


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_micro_batches_add_up_to_the_large_batch(dice):
    """Whatever their labelled shares: sums of losses over sums of weights."""
    objective = model(dice=dice).eval()  # without dropout
    samples = batch(4)
    samples["mask"][0, :25] = IGNORE
    whole = objective(samples)
    parts = [objective({k: v[i : i + 2] for k, v in samples.items()}) for i in (0, 2)]
    torch.testing.assert_close(sum(p.loss_sum for p in parts), whole.loss_sum)
    assert sum(p.weight for p in parts) == pytest.approx(whole.weight)


def test_nothing_labelled_is_no_loss_and_no_nan():
    objective = model(dice=1.0).train()
    samples = batch()
    samples["mask"][:] = IGNORE
    out = objective(samples)
    out.loss_sum.backward()
    assert out.weight == out.loss_sum == 0
    assert all(not p.grad.any() for p in objective.parameters() if p.grad is not None)


def test_the_auxiliary_loss_is_of_training_alone():
    objective = model(auxiliary=0.4, norm="layer")
    for part in (*objective.head.modules(), *objective.auxiliary.modules()):
        if isinstance(part, torch.nn.Dropout2d):
            part.p = 0.0
    samples = batch()
    plain = objective.eval()(samples).loss_sum
    both = objective.train()(samples).loss_sum
    logits = objective.auxiliary(objective.maps(samples["image"])[2])
    logits = F.interpolate(logits, (32, 32), mode="bilinear")
    extra = F.cross_entropy(logits, samples["mask"], reduction="sum") / 32**2
    torch.testing.assert_close(both, plain + 0.4 * extra)


def test_dice_is_zero_for_the_truth_and_one_for_its_opposite():
    truth = torch.randint(0, 2, (3, 8, 8))
    truth[1, :4] = IGNORE
    truth[2] = IGNORE
    sure = 50 * F.one_hot(truth.clamp(max=1), 3).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(dice_loss(sure, truth), torch.zeros(3), atol=1e-5, rtol=0)
    wrong = 50 * F.one_hot(2 * torch.ones_like(truth), 3).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(dice_loss(wrong, truth), torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_a_saved_model_predicts_the_same(tmp_path, head):
    before = model(head=head, depth=3, slide=20, short_side=40).eval()
    before.save(tmp_path)
    after = load_segmentation(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 71, 3), np.uint8))
    found = after.predict(image)
    assert (found.shape, found.dtype) == ((50, 71), np.uint8)
    assert np.array_equal(found, before.predict(image))
    assert after.config == before.config
    assert not after.training
    assert load_encoder(tmp_path).embed_dim == 16


def test_a_folder_without_a_head_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no segmentation\.safetensors"):
        load_segmentation(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "segmentation.safetensors")
    with pytest.raises(ValueError, match="was not written by downstream/segmentation"):
        load_segmentation(tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (32, 32), (45, 33)], ids=str)
def test_any_image_is_labelled(size):
    image = Image.new("L", size[::-1], 70)
    assert model().eval().predict(image).shape == size


@pytest.mark.parametrize(
    ("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)]
)
def test_labels_are_of_the_upright_image(orientation, turn):
    noise = np.random.default_rng(0).integers(0, 256, (40, 71, 3), np.uint8)
    upright = Image.fromarray(noise)
    stored = upright.transpose(turn)
    stored.getexif()[0x0112] = orientation
    segmenter = model(head="linear").eval()
    expected = segmenter.predict(upright)
    assert len(np.unique(expected)) > 1
    assert np.array_equal(segmenter.predict(stored), expected)
    assert np.array_equal(segmenter.displayed(stored), upright)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "upernets"}, "head 'upernets' is unknown. Did you mean 'upernet'"),
        ({"norm": "group"}, "norm 'group' is unknown"),
        ({"taps": [1, 2]}, "upernet needs exactly four blocks"),
        ({"taps": [1, 2, 3, 9]}, "out of range; the encoder has 4 blocks"),
        ({"window": 30}, "img_size 30 is not divisible by patch_size 8"),
        ({"slide": 40}, "slide 40 leaves gaps"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


@pytest.mark.parametrize("count", [0, 1, 256])
def test_too_few_or_many_classes_are_refused(count):
    with pytest.raises(ValueError, match=f"got {count} classes.* expected 2 to 255"):
        Segmentation(encoder(), [str(i) for i in range(count)], window=32)


def test_patches_that_are_no_power_of_two_take_the_linear_head():
    with pytest.raises(ValueError, match="linear head accepts any"):
        Segmentation(encoder(img_size=28, patch_size=7), CLASSES, window=28)
    found = Segmentation(encoder(img_size=28, patch_size=7), CLASSES, head="linear", window=28)
    assert found.predict(Image.new("RGB", (30, 20))).shape == (20, 30)
