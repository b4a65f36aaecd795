"""A frozen part of a model has no gradients and stays in eval mode, except its head."""

import copy

import pytest
import torch
from torch import nn

from vim_ssl import VimEncoder
from vim_ssl.models.freezing import Freezable, pooled_features


class Tower(nn.Sequential):
    """A module with everything that training mode changes, and a head."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))

    def get_classifier(self) -> nn.Module:
        return self.head


class Model(Freezable):
    def __init__(self):
        super().__init__()
        self.encoder, self.neck = Tower(), nn.BatchNorm1d(4)

    def forward(self, x):
        with self.grad_of(self.encoder):
            x = nn.Sequential(*list(self.encoder)[:3])(x)
        return self.encoder.head(self.neck(x))


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_the_trainer_cannot_change_a_frozen_encoder(copied):
    model = Model()
    model.freeze_encoder()
    model = copy.deepcopy(model) if copied else model
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model.eval()
        model.train()
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    body = [module for name, module in model.encoder.named_modules() if "head" not in name]
    assert not any(module.training for module in body)
    assert all(module.training for module in (model.neck, *model.encoder.head.modules()))
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {
        name for name in before if name.startswith("neck.") or name.startswith("encoder.head.")
    }


def test_a_frozen_encoder_records_no_graph_and_drops_no_path():
    model = Model()
    model.encoder = VimEncoder(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_classes=2, drop_path_rate=0.9
    )
    model.freeze_encoder()
    model.train()
    with model.grad_of(model.encoder):
        first, again = (pooled_features(model.encoder, torch.ones(2, 3, 8, 8)) for _ in range(2))
    assert first.grad_fn is None
    assert not first.requires_grad
    assert torch.equal(first, again)
    with model.grad_of(model.neck):  # another part
        assert torch.is_grad_enabled()
