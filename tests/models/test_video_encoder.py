"""Clips through an inflated image encoder."""

import re

import pytest
import torch

from vim_ssl import VimEncoder, load_encoder, save_encoder
from vim_ssl.models.video import VideoEncoder, inflate
from vim_ssl.objectives.masking import RandomMask

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_classes": 0}


def image_encoder(**more) -> VimEncoder:
    torch.manual_seed(0)
    return VimEncoder(**ARGS | more).eval()


@pytest.mark.parametrize("how", ["centre", "mean"])
@pytest.mark.parametrize("tubelet", [1, 2, 3])
@pytest.mark.parametrize("cls_position", ["middle", "none"])
def test_a_clip_of_one_tubelet_is_an_image(how, tubelet, cls_position):
    encoder = image_encoder(cls_position=cls_position)
    video = inflate(encoder, frames=tubelet, tubelet=tubelet, how=how)
    images = torch.randn(2, 3, 16, 16)
    still = images[:, :, None].expand(-1, -1, tubelet, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(video(still), encoder(images), rtol=1e-5, atol=1e-5)


def test_longer_clips_have_the_images_embeddings_frame_by_frame():
    encoder = image_encoder()
    video = inflate(encoder, frames=6, tubelet=1)
    clip = torch.randn(2, 3, 6, 16, 16)
    with torch.no_grad():
        tokens = video.embed(clip).unflatten(1, (6, 16))
        for t in range(6):
            torch.testing.assert_close(tokens[:, t], encoder.embed(clip[:, :, t]))
        assert video.forward_features(clip).shape == (2, 6 * 16 + 1, 16)
        assert not torch.allclose(video(clip), video(clip.flip(2)))  # time matters


def test_what_was_chosen_for_the_image_encoder_stays():
    encoder = image_encoder().to(torch.bfloat16)
    encoder.set_grad_checkpointing()
    video = inflate(encoder)
    assert {p.dtype for p in video.parameters()} == {torch.bfloat16}
    assert (video.grad_checkpointing, video.training) == (True, False)


def test_other_lengths_and_sizes_go_in():
    video = inflate(image_encoder(), frames=4, tubelet=2)
    with torch.no_grad():
        video.time_embed.copy_(torch.randn(1, 2, 16))
        assert video(torch.randn(1, 3, 10, 16, 24)).shape == (1, 16)
        maps = video.forward_intermediates(
            torch.randn(1, 3, 10, 16, 24), [0, 2], norm=True, intermediates_only=True
        )
    assert [tuple(m.shape) for m in maps] == [(1, 16, 5, 4, 6)] * 2


@pytest.mark.parametrize("frames", [8, 12], ids="table of {}".format)
@pytest.mark.parametrize("cls_position", ["none", "first"])
def test_a_clip_read_piece_by_piece_is_the_clip_read_at_once(frames, cls_position):
    """Also where the table of times is of another length, and resampled."""
    encoder = image_encoder(directions="forward", cls_position=cls_position)
    video = inflate(encoder, frames=frames, tubelet=2).eval()
    clip, state, first, parts = torch.randn(2, 3, 8, 16, 16), None, 0, []
    with torch.no_grad():
        video.time_embed.copy_(torch.randn_like(video.time_embed))
        for piece in clip.split([2, 4, 2], dim=2):
            tokens = video.embed(piece, first=first, frames=8)
            out, state = video.forward_stream(tokens, state)
            parts.append(out)
            first += piece.shape[2]
        whole = video.forward_tokens(video.embed(clip))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [{"first": 6}, {"first": 1}, {"first": -2}, {"frames": 5}])
def test_a_piece_beyond_its_clip_is_told(place):
    with pytest.raises(ValueError, match="are not a valid piece of a clip"):
        inflate(image_encoder()).embed(torch.randn(1, 3, 4, 16, 16), **{"frames": 8} | place)


def test_every_parameter_learns_also_under_masks():
    video = VideoEncoder(frames=4, tubelet=2, **ARGS | {"use_mask_token": True})
    clip = torch.randn(2, 3, 4, 16, 16)
    mask = torch.stack([RandomMask((8, 4), 0.5)() for _ in range(2)])
    out = video.forward_tokens(video.embed(clip), mask=mask)
    assert out.shape == (2, 33, 16)
    out.square().sum().backward()
    idle = [name for name, p in video.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    hidden = torch.where(
        mask.view(2, 2, 4, 4).repeat_interleave(2, 1).repeat_interleave(4, 2)
        .repeat_interleave(4, 3)[:, None], torch.randn_like(clip), clip,
    )  # fmt: skip
    with torch.no_grad():
        again = video.forward_tokens(video.embed(hidden), mask=mask)
    torch.testing.assert_close(again, out)  # what is hidden is not seen


def test_a_video_encoder_is_saved_and_loaded(tmp_path):
    video = inflate(image_encoder(), frames=4, tubelet=2).eval()
    save_encoder(video, tmp_path)
    loaded = load_encoder(tmp_path)
    clip = torch.randn(1, 3, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(clip), video(clip))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VideoEncoder(frames=5, tubelet=2, **ARGS), "not a positive multiple of tubelet 2"),
        (lambda: VideoEncoder(frames=4, tubelet=2, rope=True, **ARGS), "not time"),
        (lambda: inflate(image_encoder(), how="best"), "not one of centre, mean"),
        (lambda: inflate(inflate(image_encoder())), "already a video encoder"),
        (lambda: inflate(image_encoder())(torch.randn(1, 3, 16, 16)), "expected (b, 3, t, h, w)"),
        (lambda: inflate(image_encoder())(torch.randn(1, 3, 3, 16, 16)), "a multiple of 2"),
        (lambda: inflate(image_encoder())(torch.randn(1, 3, 0, 16, 16)), "a multiple of 2"),
    ],
)
def test_what_does_not_fit_is_told(make, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        make()
