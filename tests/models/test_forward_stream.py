"""A sequence read piece by piece is the sequence read at once."""

import pytest
import torch

from vim_ssl import VimEncoder

FORWARD = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_classes": 0,
           "directions": "forward"}  # fmt: skip


def read(encoder, tokens, pieces) -> torch.Tensor:
    state, parts = None, []
    for piece in tokens.split(pieces, dim=1):
        out, state = encoder.forward_stream(piece, state)
        parts.append(out)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("backend", ["torch", "numba", "reference"])
@pytest.mark.parametrize("cls_position", ["none", "first"])
@pytest.mark.parametrize(
    "pieces", [[64], [1] * 64, [2, 3, 1, 40, 18]], ids=["whole", "ones", "odd"]
)
def test_pieces_give_what_one_pass_gives(backend, cls_position, pieces):
    torch.manual_seed(0)
    encoder = VimEncoder(**FORWARD, cls_position=cls_position, scan_backend=backend).eval()
    tokens = torch.randn(2, 64, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            read(encoder, tokens, pieces), encoder.forward_tokens(tokens), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("more", [{"norm_after_scan": True}, {"d_conv": 1}, {"d_conv": 2}])
def test_other_blocks_stream_too(more):
    torch.manual_seed(0)
    encoder = VimEncoder(**FORWARD, cls_position="none", **more).eval()
    tokens = torch.randn(1, 20, 16)
    with torch.no_grad():
        expected = encoder.forward_tokens(tokens, grid=(4, 5))
        torch.testing.assert_close(read(encoder, tokens, [7, 13]), expected, rtol=1e-5, atol=1e-5)


def test_the_state_does_not_grow():
    encoder = VimEncoder(**FORWARD, cls_position="none").eval()
    sizes, state = set(), None
    for k in (1, 50, 7):
        _, state = encoder.forward_stream(torch.randn(1, k, 16), state)
        sizes.add(tuple(tuple(m.shape) for pair in state for m in pair))
        sizes.add(tuple((m.untyped_storage().nbytes() // 4,) for pair in state for m in pair))
    assert len(sizes) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state[:2], "has 2 blocks, but this encoder has 3"),
        (lambda state: [tuple(m[:1] for m in pair) for pair in state], "does not match a batch of"),
        (lambda state: [(tail[..., :8], start) for tail, start in state], "another size"),
        (lambda state: [(tail, start[..., :8]) for tail, start in state], "another size"),
    ],
    ids=["blocks", "batch", "width", "scan"],
)
def test_a_state_of_something_else_is_told(change, says):
    encoder = VimEncoder(**FORWARD, cls_position="none").eval()
    _, state = encoder.forward_stream(torch.randn(2, 4, 16))
    with pytest.raises(ValueError, match=says):
        encoder.forward_stream(torch.randn(2, 4, 16), change(state))


@pytest.mark.parametrize("shape", [(2, 0, 16), (2, 4, 8), (4, 16), (2, 3, 16, 16)])
def test_what_is_no_piece_of_tokens_is_told(shape):
    encoder = VimEncoder(**FORWARD, cls_position="none").eval()
    with pytest.raises(ValueError, match=r"expected \(b, k, 16\) with k 1 or more"):
        encoder.forward_stream(torch.randn(shape))


def test_gradients_flow_through_the_state():
    torch.manual_seed(0)
    encoder = VimEncoder(**FORWARD, cls_position="none")
    tokens = torch.randn(1, 12, 16, requires_grad=True)
    weight = torch.randn(1, 12, 16)
    (expected,) = torch.autograd.grad(
        (encoder.forward_tokens(tokens, grid=(3, 4)) * weight).sum(), tokens
    )
    (found,) = torch.autograd.grad((read(encoder, tokens, [5, 7]) * weight).sum(), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"directions": "both"}, "depends on all later tokens"),
        ({"cls_position": "middle"}, "depend on the length"),
        ({"num_registers": 2}, "depend on the length"),
        ({"rope": True}, "depend on the length"),
    ],
)
def test_encoders_that_cannot_stream_say_why(more, says):
    encoder = VimEncoder(**{**FORWARD, "cls_position": "none", **more})
    with pytest.raises(ValueError, match=says):
        encoder.forward_stream(torch.randn(1, 4, 16))
