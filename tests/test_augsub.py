"""The method: its losses against an independent step, its drops on many architectures, DDP, compile, autocast."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchDropout
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch._dynamo.testing import CompileCounter

from common.augsub import KINDS, AugSub, drops

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL: dict[str, dict[str, Any]] = {
    "deit3_small_patch16_224": VIT,
    "vit_little_patch16_reg4_gap_256": VIT,
    "eva02_tiny_patch14_224": VIT,
    "hiera_tiny_224": {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1), "num_classes": 5},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64,
                                     "window_size": 8, "num_classes": 5},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16), "num_classes": 5},
    "resnet18": {"num_classes": 5, "layers": (1, 1, 1, 1)},
    "resnet50": {"num_classes": 5, "layers": (1, 1, 1, 1)},
    "mobilenetv3_small_050": {"num_classes": 5},
}  # fmt: skip
SIZES = {"hiera_tiny_224": 224} | dict.fromkeys(list(SMALL)[4:], 64)
OFFERED = [(name, kind) for name in SMALL for kind in KINDS[1:]
           if not (kind == "dropout" and name in ("resnet18", "resnet50", "mobilenetv3_small_050"))]  # fmt: skip


def small(name: str = "deit3_small_patch16_224", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name] | kwargs)


def images(name: str = "deit3_small_patch16_224", batch: int = 4) -> torch.Tensor:
    size = SIZES.get(name, 32)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def take_step(augsub: AugSub, model: nn.Module, x, y, criterion, **kwargs) -> list[float]:
    values = []
    for loss in augsub.losses(model, x, y, criterion, **kwargs):
        loss.backward()
        values.append(loss.item() / augsub.weight)
    return values


def one_hot_mix(y, classes=5):
    return 0.7 * F.one_hot(y, classes).float() + 0.3 * F.one_hot(y.flip(0), classes).float()


def log_softmax_loss(logits, target):
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def bce(logits, target):
    return (logits.clamp(min=0) - logits * target + (-logits.abs()).exp().log1p()).mean()


LABELS = torch.tensor([0, 1, 2, 4])
SMOOTH = F.one_hot(LABELS, 5) * 0.9 + 0.1 / 5
CASES = {
    "labels": (nn.CrossEntropyLoss(), LABELS, lambda z: log_softmax_loss(z, F.one_hot(LABELS, 5)), torch.softmax),
    "torch smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS,
                        lambda z: log_softmax_loss(z, SMOOTH), torch.softmax),
    "timm smoothing": (LabelSmoothingCrossEntropy(0.1), LABELS, lambda z: log_softmax_loss(z, SMOOTH), torch.softmax),
    "mixup": (SoftTargetCrossEntropy(), one_hot_mix(LABELS),
              lambda z: log_softmax_loss(z, one_hot_mix(LABELS)), torch.softmax),
    "bce": (nn.BCEWithLogitsLoss(), one_hot_mix(LABELS), lambda z: bce(z, one_hot_mix(LABELS)), torch.sigmoid),
    "bce threshold": (BinaryCrossEntropy(0.0, target_threshold=0.0), one_hot_mix(LABELS),
                      lambda z: bce(z, (one_hot_mix(LABELS) > 0).float()), torch.sigmoid),
    "bce labels": (BinaryCrossEntropy(0.1), LABELS, lambda z: bce(z, SMOOTH), torch.sigmoid),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_equation(case):
    """Against the equation written out in one graph, with AugMask's drawing of patches repeated by its seed."""
    criterion, y, main_loss, sigma = CASES[case]
    x, model = images(), small()
    twin = copy.deepcopy(model)
    augsub = AugSub(model, "masking", 0.5)
    torch.manual_seed(3)
    main, sub = take_step(augsub, model, x, y, criterion)

    twin.patch_drop = PatchDropout(0.5, num_prefix_tokens=1)
    torch.manual_seed(3)
    sub_logits = twin(x)
    twin.patch_drop.prob = 0.0
    logits = twin(x)
    target = sigma(logits, -1).detach() if sigma is torch.softmax else sigma(logits).detach()
    expected_sub = (log_softmax_loss if sigma is torch.softmax else bce)(sub_logits, target)
    (0.5 * main_loss(logits) + 0.5 * expected_sub).backward()

    assert main == pytest.approx(main_loss(logits).item(), rel=1e-5)
    assert sub == pytest.approx(expected_sub.item(), rel=1e-5)
    expected = gradients(twin)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_none_and_ratio_zero_are_the_plain_recipe(kind):
    """kind none: the plain gradients. Ratio 0: half of them, and half of the same model learning its own output."""
    x, model = images(), small()
    twin = copy.deepcopy(model)
    ratio = 0.5 if kind == "none" else 0.0
    take_step(AugSub(model, kind, ratio), model, x, LABELS, nn.CrossEntropyLoss())
    logits = twin(x)
    plain = F.cross_entropy(logits, LABELS)
    self_taught = log_softmax_loss(logits, logits.softmax(-1).detach())
    (plain if kind == "none" else 0.5 * plain + 0.5 * self_taught).backward()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-5, atol=1e-8)


def test_first_graph_is_freed_before_the_second_forward():
    """What backward has freed of the main pass must be gone when the sub pass builds its own."""
    model, alive = small(), []
    augsub = AugSub(model, "masking")
    model.blocks[0].mlp.register_forward_hook(lambda m, i, output: alive.append(weakref.ref(output)))
    losses = augsub.losses(model, images(), LABELS, nn.CrossEntropyLoss())
    next(losses).backward()
    assert len(alive) == 1, "the sub-model runs only when it is asked for"
    assert alive[0]() is None
    next(losses).backward()
    assert len(alive) == 2
    assert next(losses, None) is None


def test_sub_model_switches_and_restores_every_rate():
    for kind in KINDS[1:]:
        model = small(drop_path_rate=0.2, proj_drop_rate=0.1)
        augsub = AugSub(model, kind, 0.5)
        rates = lambda model=model: [  # noqa: E731
            [m.drop_prob for m in model.modules() if isinstance(m, DropPath)],
            [m.p for m in model.modules() if isinstance(m, nn.Dropout)],
            [m.prob for m in model.modules() if isinstance(m, PatchDropout)],
        ]
        before = rates()
        with pytest.raises(ZeroDivisionError), augsub.sub_model():
            within = rates()
            with augsub.sub_model():
                assert rates() == within
            assert rates() == within
            raise ZeroDivisionError
        assert rates() == before != within


def test_drops_act_in_training_mode_only():
    x = images()
    for kind in KINDS[1:]:
        model = small()
        augsub = AugSub(model, kind, 0.5)
        with torch.no_grad():
            plain = model.train()(x)
            with augsub.sub_model():
                assert not torch.allclose(model(x), plain)
                torch.testing.assert_close(model.eval()(x), plain)


def test_masking_keeps_prefix_tokens_and_half_of_the_patches():
    for name, prefix in (("deit3_small_patch16_224", 1), ("vit_little_patch16_reg4_gap_256", 4)):
        model = small(name)
        augsub = AugSub(model, "masking", 0.5)
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda m, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad(), augsub.sub_model():
            embedded = model._pos_embed(model.patch_embed(images(name)))
            model(images(name))
        assert seen[0].shape[1] == prefix + 32
        torch.testing.assert_close(seen[0][:, :prefix], embedded[:, :prefix])


def test_dropout_is_that_of_projections_and_mlps_alone():
    model = small(drop_rate=0.0)
    augsub = AugSub(model, "dropout", 0.3)
    with augsub.sub_model():
        on = {name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p == 0.3}
    places = ("attn.proj_drop", "mlp.drop1", "mlp.drop2")
    assert on == {f"blocks.{i}.{place}" for i in range(2) for place in places}


@pytest.mark.parametrize(("name", "kind"), OFFERED)
def test_each_family_takes_a_step_with_each_drop_it_offers(name, kind):
    model = small(name)
    assert kind in drops(model)
    augsub = AugSub(model, kind, 0.5)
    x = images(name)
    main, sub = take_step(augsub, model, x, LABELS, nn.CrossEntropyLoss())
    assert main != sub
    for parameter, gradient in gradients(model).items():
        assert gradient.isfinite().all(), parameter
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without, "the sub-model leaves no parameter without a gradient"
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "resnet18", "resnet50", "convnext_atto"])
def test_droppath_reaches_every_residual_branch(name):
    model = small(name)
    augsub = AugSub(model, "droppath", 0.5)
    with augsub.sub_model():
        rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    branches = {"deit3_small_patch16_224": 4, "resnet18": 4, "resnet50": 4, "convnext_atto": 4}[name]
    assert rates == [0.5] * branches


def test_refusals_say_what_would_do():
    model = small("resnet18")
    with pytest.raises(ValueError, match=r"ResNet has no place for dropout: it offers masking, droppath"):
        AugSub(model, "dropout")
    with pytest.raises(ValueError, match="unknown drop 'mask': choose one of none, masking"):
        AugSub(model, "mask")
    for ratio in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
            AugSub(model, "masking", ratio)
    with pytest.raises(ValueError, match="before OptimizedModule wraps it"):
        AugSub(torch.compile(model), "masking")


def test_losses_and_target_are_float32_under_autocast():
    model, kinds = small(), []

    def criterion(logits, target):
        kinds.append((logits.dtype, target.dtype))
        return F.cross_entropy(logits, target)

    with torch.autocast("cpu", torch.bfloat16):
        for loss in AugSub(model, "masking").losses(model, images(), one_hot_mix(LABELS), criterion):
            assert loss.dtype is torch.float32
            loss.backward()
    assert kinds == [(torch.float32, torch.float32)] * 2


@pytest.mark.parametrize(("name", "kind"), [
    ("deit3_small_patch16_224", "masking"), ("deit3_small_patch16_224", "dropout"),
    ("deit3_small_patch16_224", "droppath"), ("swin_tiny_patch4_window7_224", "masking"), ("resnet18", "masking"),
])  # fmt: skip
def test_compiles_into_two_graphs_and_no_more(name, kind):
    torch._dynamo.reset()
    model, counter = small(name), CompileCounter()
    augsub = AugSub(model, kind, 0.5)
    compiled = torch.compile(model, backend=counter)
    x = images(name)
    take_step(augsub, compiled, x, LABELS, nn.CrossEntropyLoss())
    assert counter.frame_count == 2
    for _ in range(4):
        take_step(augsub, compiled, x, LABELS, nn.CrossEntropyLoss())
    assert counter.frame_count == 2
