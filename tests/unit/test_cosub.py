"""CoSub: its gradients are the equation's, and what it cannot do is refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from common.args import parse
from common.cosub import CoSub
from deit.recipe import RECIPE

CLASSES = 5


def vit(drop_path: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=CLASSES,
        drop_path_rate=drop_path,
    ).train()  # fmt: skip


def settings(*flags: str):
    return parse(RECIPE, ["--cosub", "--drop-path", "0.1", *flags])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("flags", "labels", "targets"), [
    ((), torch.tensor([1, 4, 0]), F.one_hot(torch.tensor([1, 4, 0]), CLASSES).float()),
    (("--no-bce-loss", "--smoothing", "0.1"), torch.tensor([1]), torch.tensor([[0.02, 0.92, 0.02, 0.02, 0.02]])),
    (("--bce-loss", "--mixup", "0.8"), torch.tensor([[0.7, 0, 0.3, 0, 0]]), torch.tensor([[1.0, 0, 1, 0, 0]])),
    (("--no-bce-loss", "--mixup", "0.8"), torch.tensor([[0.7, 0, 0.3, 0, 0]]), torch.tensor([[0.7, 0, 0.3, 0, 0]])),
])  # fmt: skip
def test_the_gradients_are_the_equations(flags, labels, targets):
    args = settings("--smoothing", "0", *flags)
    model, x = vit(), torch.randn(len(labels), 3, 32, 32)
    torch.manual_seed(3)
    bce = F.binary_cross_entropy_with_logits
    outputs = model(torch.cat((x, x)))
    o, other = outputs[: len(x)], outputs[len(x) :]
    assert not torch.allclose(o, other), "each image's stochastic depth is its own"
    loss = bce(o, targets) + bce(other, targets)
    loss = loss + bce(o, other.detach().sigmoid()) + bce(other, o.detach().sigmoid())
    (loss / 4).backward()
    expected = gradients(model)
    torch.manual_seed(3)
    (got,) = CoSub(model).losses(model, x, labels, RECIPE.loss(args, labels.ndim == 2))
    got.backward()
    assert got.item() == pytest.approx(loss.item() / 4, rel=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_only_the_last_micro_batch_reduces():
    class Wrapper(nn.Module):
        entered = 0

        def __init__(self, model: nn.Module):
            super().__init__()
            self.module = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

        def no_sync(self):
            self.entered += 1
            return torch.enable_grad()

    wrapper = Wrapper(vit())
    method, x, y = CoSub(wrapper.module), torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for sync, entered in ((False, 1), (True, 1), (False, 2)):
        list(method.losses(wrapper, x, y, RECIPE.loss(settings(), False), sync=sync))
        assert wrapper.entered == entered


def test_a_model_without_stochastic_depth_is_refused():
    for model in (vit(0.0), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="--cosub: the model has no stochastic depth, by which alone its sub-mod"):
            CoSub(copy.deepcopy(model))


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--augsub", "masking"], "--cosub: trains sub-models of its own; leave --augsub out"),
    (["--drop-path", "0"], "--cosub: its sub-models differ by their stochastic depth alone; pass --drop-path above 0"),
    (["--no-train-mode"], "--cosub: its sub-models differ by their stochastic depth alone; pass --train-mode"),
])  # fmt: skip
def test_what_does_not_go_with_it_is_refused(flags, sentence, capsys):
    with pytest.raises(SystemExit) as leaving:
        settings(*flags)
    assert leaving.value.code == 2 and sentence in capsys.readouterr().err
