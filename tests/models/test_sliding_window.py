"""A sliding window gives what a plain computation gives, in blocks too, at any size."""

import pytest
import torch
import torch.nn.functional as F

from vim_ssl.models.sliding_window import label_pixels, starts

CLASSES, WINDOW, STRIDE = 5, 16, 11


def logits_of(images: torch.Tensor) -> torch.Tensor:
    """Depends on the place in the window, so that windows which overlap disagree."""
    places = torch.linspace(-1, 1, images.shape[-1])
    mixed = torch.stack([images.mean(1) * k + places * (k - 2) for k in range(CLASSES)], 1)
    return F.avg_pool2d(mixed, 4)


def naive(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Everything at once, as the windows' definition says."""
    h, w = image.shape[1:]
    image = F.pad(image, (0, max(WINDOW - w, 0), 0, max(WINDOW - h, 0)))
    sums, counts = torch.zeros(CLASSES, *image.shape[1:]), torch.zeros(image.shape[1:])
    for y in starts(image.shape[1], WINDOW, STRIDE):
        for x in starts(image.shape[2], WINDOW, STRIDE):
            part = slice(y, y + WINDOW), slice(x, x + WINDOW)
            found = logits_of(image[None, :, part[0], part[1]])
            sums[:, part[0], part[1]] += F.interpolate(found, (WINDOW, WINDOW), mode="bilinear")[0]
            counts[part] += 1
    mean = (sums / counts)[None, :, :h, :w]
    return F.interpolate(mean, size, mode="bilinear", align_corners=False)[0].argmax(0)


def test_windows_cover_the_side_and_end_at_its_border():
    assert starts(512, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(1024, 512, 341) == [0, 341, 512]
    assert starts(300, 512, 341) == [0]


@pytest.mark.parametrize("max_values", [2**27, CLASSES * 400, CLASSES * 90])
@pytest.mark.parametrize("image_size", [(16, 16), (40, 27), (9, 50), (5, 3)], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (61, 33), (20, 90)], ids=str)
def test_it_is_the_plain_computation_whatever_the_blocks(image_size, size, max_values):
    image = torch.randn(3, *image_size)
    found = label_pixels(
        logits_of, image, size, classes=CLASSES, window=WINDOW, stride=STRIDE, batch_size=3,
        max_values=max_values,
    )  # fmt: skip
    assert found.dtype == torch.int64
    assert (found == naive(image, size)).float().mean() > 0.998  # ties may fall either way


@pytest.mark.parametrize("image_size", [(40, 27), (9, 50), (5, 3)], ids=str)
def test_windows_are_normalised_before_they_are_padded(image_size):
    """So that a large image may stay uint8."""
    image = torch.randint(0, 256, (3, *image_size), dtype=torch.uint8)
    common = {"classes": CLASSES, "window": WINDOW, "stride": STRIDE}

    def prepare(pixels):
        return pixels / 50 - 2

    found = label_pixels(
        logits_of, image, (30, 20), prepare=prepare, dtype=torch.uint8, **common
    )  # fmt: skip
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), label_pixels(logits_of, prepare(image), (30, 20), **common))


def test_memory_does_not_grow_with_the_image():
    """No tensor on the way is larger than the image or the limit."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    limit = CLASSES * 64 * 64
    image = torch.randn(1, 150, 200)
    with Watch():
        label_pixels(
            logits_of, image, (300, 250), classes=CLASSES, window=WINDOW, stride=STRIDE,
            max_values=limit,
        )  # fmt: skip
    assert largest <= max(300 * 250, 2 * limit)
    assert 4 * largest < 300 * 250 * CLASSES


def test_a_stride_that_leaves_gaps_is_refused():
    with pytest.raises(ValueError, match="stride 17 is not between 1 and the window's 16"):
        label_pixels(logits_of, torch.randn(3, 9, 9), (9, 9), classes=5, window=16, stride=17)
