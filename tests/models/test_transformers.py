"""The encoder in transformers' models, through timm's registry."""

import pytest
import torch
from docs_pages import blocks
from timm.models._features import FeatureGetterNet

from vim_ssl import load_encoder
from vim_ssl.checkpoints.adapt import copy_weights

transformers = pytest.importorskip("transformers")
NAME = "vim_nano_patch8_64"


def build(task: str, out_indices: list[int]):
    """A small model of transformers' on the preset."""
    small = {"encoder_layers": 1, "decoder_layers": 2}
    settings = {
        "Detr": {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2} | small,
        "UperNet": {"hidden_size": 16, "use_auxiliary_head": False},
        "Mask2Former": {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32,
                        "num_attention_heads": 2, "dim_feedforward": 32} | small,
    }[task]  # fmt: skip
    kind = {"Detr": "ForObjectDetection", "UperNet": "ForSemanticSegmentation",
            "Mask2Former": "ForUniversalSegmentation"}[task]  # fmt: skip
    backbone = transformers.TimmBackboneConfig(backbone=NAME, out_indices=out_indices)
    config = getattr(transformers, f"{task}Config")(backbone_config=backbone, **settings)
    return getattr(transformers, task + kind)(config).eval()


def test_the_lines_of_the_documentation_run():
    (block,) = [block for block in blocks("docs/dense.md") if block.run_by]
    names: dict = {}
    exec(block.code, names)
    assert isinstance(names["detr"], transformers.DetrForObjectDetection)


@pytest.mark.parametrize(
    ("task", "indices", "output"),
    [
        ("Detr", [2], "pred_boxes"),
        ("UperNet", [0, 1, 2, 3], "logits"),
        ("Mask2Former", [0, 1, 2, 3], "masks_queries_logits"),
    ],
)
def test_models_of_transformers_read_the_encoders_maps(task, indices, output):
    encoder, model = load_encoder(NAME).requires_grad_(False), build(task, indices)
    images = torch.randn(1, 3, 64, 96)
    copy_weights(encoder, model)
    (reader,) = (module for module in model.modules() if isinstance(module, FeatureGetterNet))
    seen: list = []
    reader.register_forward_hook(lambda module, args, maps: seen.extend(maps))
    assert torch.isfinite(model(images)[output]).all()
    expected = encoder.forward_intermediates(images, indices, intermediates_only=True)
    for ours, theirs in zip(expected, seen, strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize(
    ("encoder", "model", "says"),
    [
        ({"embed_dim": 24}, lambda: build("Detr", [2]), "preset that the encoder was built from"),
        ({"depth": 2}, lambda: build("Detr", [2]), "not there"),
        ({}, lambda: torch.nn.Linear(1, 1), "0 Vim encoders"),
    ],
)
def test_weights_that_do_not_fit_are_refused(encoder, model, says):
    with pytest.raises(ValueError, match=says):
        copy_weights(load_encoder(NAME, **encoder), model())
