"""What the sub-model learns under each criterion: both losses and all gradients against the equation written out."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm import loss as timm_loss
from torch import Tensor, nn

from common.augsub import AugSub
from common.criteria import REFUSED, TARGETS, criterion_name, sub_criterion

PAGE = Path(__file__).resolve().parents[2] / "docs" / "criteria.md"
K = 5
INDICES = torch.tensor([0, 1, 4, 2])
IGNORED = torch.tensor([0, -100, 4, 2])
SOFT = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0.1, 0.1, 0.8], [0, 0, 1.0, 0, 0]])
TAGS = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]])
VALUES = torch.linspace(-2, 2, 4 * K).view(4, K)
W = torch.tensor([0.2, 3.0, 1.0, 0.5, 8.0])
PIXELS = torch.randint(0, K, (4, 16, 16), generator=torch.Generator().manual_seed(7))
VOID = PIXELS.masked_fill(PIXELS == 3, 255)
PIXEL_TAGS = torch.stack([(PIXELS + k) % 2 for k in range(K)], dim=1).float()


def nll(z: Tensor) -> Tensor:
    """-log softmax over dim 1, by its definition."""
    return -(z.exp() / z.exp().sum(1, keepdim=True)).log()


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(1, keepdim=True)


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


def one_hot(y: Tensor) -> Tensor:
    """Indices (B, ...) → (B, K, ...)."""
    return torch.stack([y == k for k in range(K)], dim=1).float()


def smooth(y: Tensor, amount: float = 0.1) -> Tensor:
    return one_hot(y) * (1 - amount) + amount / K


def by_class(weight: Tensor, z: Tensor) -> Tensor:
    return weight.view(-1, *[1] * (z.ndim - 2))


def cross_entropy(z: Tensor, q: Tensor) -> Tensor:
    return (q * nll(z)).sum(1).mean()


def weighted(z: Tensor, q: Tensor, divide_by: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """Cross-entropy with the class weights W.

    Args:
        divide_by: (B, K, ...), of which the weighted sum divides; q where None.
        counts: (B, ...) of bool, which of the labels count.
    """
    w, counts = by_class(W, z), torch.ones_like(z[:, 0]).bool() if counts is None else counts
    divide_by = q if divide_by is None else divide_by
    return ((w * q * nll(z)).sum(1) * counts).sum() / ((w * divide_by).sum(1) * counts).sum()


def bce(z: Tensor, q: Tensor, weight: Any = 1, pos_weight: Any = 1) -> Tensor:
    p = sigmoid(z)
    return (-weight * (pos_weight * q * p.log() + (1 - q) * (1 - p).log())).mean()


def asymmetric(z: Tensor, q: Tensor) -> Tensor:
    """gamma 4 and 1, clip 0.05, summed over the classes."""
    p = sigmoid(z)
    miss = (1 - p + 0.05).clamp(max=1)
    loss = -(q * p.log() + (1 - q) * miss.log()) * (1 - p * q - miss * (1 - q)) ** (q + 4 * (1 - q))
    return loss.sum() / len(z)


def poly_binary(z: Tensor, q: Tensor) -> Tensor:
    p = sigmoid(z)
    return bce(z, q) + 2 * (1 - q * p - (1 - q) * (1 - p)).mean()


def poly(z: Tensor, q: Tensor) -> Tensor:
    return cross_entropy(z, q) + 2 * (1 - (q * softmax(z)).sum(1)).mean()


def smooth_l1(z: Tensor, y: Tensor, beta: float) -> Tensor:
    d = (z - y).abs()
    return torch.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean()


def huber(z: Tensor, y: Tensor, delta: float) -> Tensor:
    return delta * smooth_l1(z, y, delta)


def counted(z: Tensor, q: Tensor, counts: Tensor) -> Tensor:
    return ((q * nll(z)).sum(1) * counts).sum() / counts.sum()


def smooth_weighted(z: Tensor, y: Tensor) -> Tensor:
    """torch's: smoothed labels in the numerator, the weights of the labels themselves in the denominator."""
    return weighted(z, smooth(y), one_hot(y), y < K)


CE, F_CE, BCE, F_BCE = nn.CrossEntropyLoss, F.cross_entropy, nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits
# criterion, y, the main model's loss of its logits, the sub-model's of its logits and the main model's
CASES: list[tuple[Any, Tensor, Any, Any]] = [
    (CE(), INDICES, lambda z: cross_entropy(z, one_hot(INDICES)), lambda z, m: cross_entropy(z, softmax(m))),
    (CE(label_smoothing=0.1), INDICES, lambda z: cross_entropy(z, smooth(INDICES)),
     lambda z, m: cross_entropy(z, softmax(m))),
    (CE(), SOFT, lambda z: cross_entropy(z, SOFT), lambda z, m: cross_entropy(z, softmax(m))),
    (CE(W), INDICES, lambda z: weighted(z, one_hot(INDICES)), lambda z, m: weighted(z, softmax(m))),
    (CE(W), SOFT, lambda z: (W * SOFT * nll(z)).sum(1).mean(), lambda z, m: (W * softmax(m) * nll(z)).sum(1).mean()),
    (CE(W, reduction="sum"), INDICES, lambda z: (W * one_hot(INDICES) * nll(z)).sum(),
     lambda z, m: (W * softmax(m) * nll(z)).sum()),
    (CE(), IGNORED, lambda z: counted(z, one_hot(IGNORED), IGNORED >= 0),
     lambda z, m: counted(z, softmax(m), IGNORED >= 0)),
    (CE(W, ignore_index=4, label_smoothing=0.1), INDICES,
     lambda z: weighted(z, smooth(INDICES), one_hot(INDICES), INDICES != 4),
     lambda z, m: weighted(z, softmax(m), counts=INDICES != 4)),
    (CE(ignore_index=4, reduction="sum"), INDICES, lambda z: ((INDICES != 4) * (one_hot(INDICES) * nll(z)).sum(1)).sum(),
     lambda z, m: ((INDICES != 4) * (softmax(m) * nll(z)).sum(1)).sum()),
    (CE(), PIXELS, lambda z: cross_entropy(z, one_hot(PIXELS)), lambda z, m: cross_entropy(z, softmax(m))),
    (CE(W, ignore_index=255, label_smoothing=0.1), VOID, lambda z: smooth_weighted(z, VOID),
     lambda z, m: weighted(z, softmax(m), counts=VOID < K)),
    (CE(), smooth(PIXELS), lambda z: cross_entropy(z, smooth(PIXELS)), lambda z, m: cross_entropy(z, softmax(m))),
    (F_CE, INDICES, lambda z: cross_entropy(z, one_hot(INDICES)), lambda z, m: cross_entropy(z, softmax(m))),
    (partial(F_CE, label_smoothing=0.1), INDICES, lambda z: cross_entropy(z, smooth(INDICES)),
     lambda z, m: cross_entropy(z, softmax(m))),
    (partial(F_CE, weight=W, ignore_index=2), INDICES, lambda z: weighted(z, one_hot(INDICES), counts=INDICES != 2),
     lambda z, m: weighted(z, softmax(m), counts=INDICES != 2)),
    (timm_loss.LabelSmoothingCrossEntropy(0.1), INDICES, lambda z: cross_entropy(z, smooth(INDICES)),
     lambda z, m: cross_entropy(z, softmax(m))),
    (timm_loss.SoftTargetCrossEntropy(), SOFT, lambda z: cross_entropy(z, SOFT),
     lambda z, m: cross_entropy(z, softmax(m))),
    (timm_loss.PolyCrossEntropy(smoothing=0.1), INDICES, lambda z: poly(z, smooth(INDICES)),
     lambda z, m: poly(z, softmax(m))),
    (BCE(), TAGS, lambda z: bce(z, TAGS), lambda z, m: bce(z, sigmoid(m))),
    (BCE(weight=W, pos_weight=W.flip(0)), TAGS, lambda z: bce(z, TAGS, W, W.flip(0)),
     lambda z, m: bce(z, sigmoid(m), W, W.flip(0))),
    (BCE(), PIXEL_TAGS, lambda z: bce(z, PIXEL_TAGS), lambda z, m: bce(z, sigmoid(m))),
    (F_BCE, TAGS, lambda z: bce(z, TAGS), lambda z, m: bce(z, sigmoid(m))),
    (partial(F_BCE, pos_weight=W), TAGS, lambda z: bce(z, TAGS, 1, W), lambda z, m: bce(z, sigmoid(m), 1, W)),
    (nn.MultiLabelSoftMarginLoss(W), TAGS, lambda z: bce(z, TAGS, W), lambda z, m: bce(z, sigmoid(m), W)),
    (F.multilabel_soft_margin_loss, TAGS, lambda z: bce(z, TAGS), lambda z, m: bce(z, sigmoid(m))),
    (timm_loss.BinaryCrossEntropy(0.1, weight=W, pos_weight=W), INDICES, lambda z: bce(z, smooth(INDICES), W, W),
     lambda z, m: bce(z, sigmoid(m), W, W)),
    (timm_loss.BinaryCrossEntropy(0.2, smooth_dense=True, sum_classes=True), TAGS,
     lambda z: K * bce(z, TAGS * 0.8 + 0.1), lambda z, m: K * bce(z, sigmoid(m))),
    (timm_loss.BinaryCrossEntropy(0.0, target_threshold=0.2), SOFT, lambda z: bce(z, (SOFT > 0.2).float()),
     lambda z, m: bce(z, sigmoid(m))),
    (timm_loss.AsymmetricLossMultiLabel(smoothing=0.2), TAGS, lambda z: asymmetric(z, TAGS * 0.8 + 0.1),
     lambda z, m: asymmetric(z, sigmoid(m))),
    (timm_loss.PolyBinaryCrossEntropy(smoothing=0.2), TAGS, lambda z: poly_binary(z, TAGS * 0.8 + 0.1),
     lambda z, m: poly_binary(z, sigmoid(m))),
    (nn.MSELoss(), VALUES, lambda z: ((z - VALUES) ** 2).mean(), lambda z, m: ((z - m) ** 2).mean()),
    (F.mse_loss, VALUES, lambda z: ((z - VALUES) ** 2).mean(), lambda z, m: ((z - m) ** 2).mean()),
    (nn.L1Loss(), VALUES, lambda z: (z - VALUES).abs().mean(), lambda z, m: (z - m).abs().mean()),
    (F.l1_loss, VALUES, lambda z: (z - VALUES).abs().mean(), lambda z, m: (z - m).abs().mean()),
    (nn.SmoothL1Loss(beta=0.5), VALUES, lambda z: smooth_l1(z, VALUES, 0.5), lambda z, m: smooth_l1(z, m, 0.5)),
    (partial(F.smooth_l1_loss, beta=0.5), VALUES, lambda z: smooth_l1(z, VALUES, 0.5),
     lambda z, m: smooth_l1(z, m, 0.5)),
    (nn.HuberLoss(delta=0.5), VALUES, lambda z: huber(z, VALUES, 0.5), lambda z, m: huber(z, m, 0.5)),
    (F.huber_loss, VALUES, lambda z: huber(z, VALUES, 1.0), lambda z, m: huber(z, m, 1.0)),
]  # fmt: skip


def build(y: Tensor) -> nn.Module:
    """A classifier of images, or of their pixels where the labels are by pixel."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()]
    if y.ndim > 2:
        return nn.Sequential(*layers, nn.Conv2d(6, K, 1))
    return nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(24, K))


def images() -> Tensor:
    return 2 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def take_step(augsub: AugSub, model: nn.Module, y: Tensor, criterion: Any) -> list[float]:
    torch.manual_seed(3)
    losses = []
    for loss in augsub.losses(model, images(), y, criterion):
        loss.backward()
        losses.append(2 * loss.item())
    return losses


def check_step(criterion: Any, y: Tensor, main: Any, sub: Any, target: Any = "auto") -> None:
    """Compares losses and gradients of a step with those of the equation in one graph."""
    model = build(y)
    twin = copy.deepcopy(model)
    losses = take_step(AugSub(model, "masking", block=4, target=target), model, y, criterion)
    written_out = AugSub(twin, "masking", block=4)
    torch.manual_seed(3)
    logits = twin(images())
    with written_out.sub_model():
        sub_logits = twin(images())
    assert not torch.allclose(logits, sub_logits)
    expected = main(logits), sub(sub_logits, logits.detach())
    (0.5 * expected[0] + 0.5 * expected[1]).backward()
    assert losses == pytest.approx([value.item() for value in expected], rel=1e-5)
    for parameter, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("criterion", "y", "main", "sub"), CASES)
def test_a_step_is_the_equation(criterion, y, main, sub):
    check_step(criterion, y, main, sub)


def test_each_row_of_the_table_is_tested():
    assert {criterion_name(case[0]) for case in CASES} == set(TARGETS)


def test_the_page_shows_the_table():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (\w[^|]*?) \|", PAGE.read_text(), re.MULTILINE))
    assert rows == TARGETS | dict.fromkeys(REFUSED, "refused")


@pytest.mark.parametrize("weight", [None, W])
def test_a_loss_at_a_one_hot_target_is_that_of_the_label(weight):
    """So class weights weigh both losses alike: the mean is over the weights, not over the images."""
    for y in (INDICES, VOID):
        criterion = nn.CrossEntropyLoss(weight, ignore_index=255)
        model = build(y)
        augsub = AugSub(model, "masking", 0.0, target=lambda z, y=y: one_hot(y))
        main, sub = take_step(augsub, model, y, criterion)
        assert sub == pytest.approx(main, rel=1e-6)


class Smoothed(nn.CrossEntropyLoss):
    """A subclass that only sets a default."""

    def __init__(self) -> None:
        super().__init__(label_smoothing=0.1)


class Focal(nn.CrossEntropyLoss):
    """A subclass with a loss of its own."""

    def forward(self, logits, target):
        p = (-F.cross_entropy(logits, target, reduction="none")).exp()
        return ((1 - p) ** 2 * -p.log()).mean()


def test_a_subclass_counts_as_its_parent_unless_it_has_a_loss_of_its_own():
    check_step(Smoothed(), INDICES, CASES[1][2], CASES[1][3])
    with pytest.raises(ValueError, match=r"learn with tests\.Focal is not known"):
        take_step(AugSub(model := build(INDICES), "masking", block=4), model, INDICES, Focal())


@pytest.mark.parametrize("criterion", [
    timm_loss.JsdCrossEntropy(), nn.NLLLoss(), F.nll_loss, timm_loss.AsymmetricLossSingleLabel(), timm_loss.TwoWayLoss(),
    timm_loss.ZlprLoss(), nn.KLDivLoss(), partial(F.kl_div, reduction="batchmean"), nn.BCELoss(), F.binary_cross_entropy,
])  # fmt: skip
def test_criteria_without_a_meaning_are_refused_with_the_reason(criterion):
    name = criterion_name(criterion)
    reason = re.escape(f"criterion: {name} {REFUSED[name]}; or pass target=")
    model = build(INDICES)
    with pytest.raises(ValueError, match=reason):
        AugSub(model, "masking", block=4).losses(model, images(), INDICES, criterion)


def test_a_compiled_criterion_is_what_it_wraps():
    criterion, plain = torch.compile(nn.CrossEntropyLoss(label_smoothing=0.3)), nn.CrossEntropyLoss(label_smoothing=0.3)
    got, expected = (sub_criterion(each)[0](torch.ones(2, K), SOFT[:2], INDICES[:2]) for each in (criterion, plain))
    assert torch.equal(got, expected) and sub_criterion(criterion)[1](torch.ones(1, K))[0, 0] == 1 / K


def test_a_model_in_float64_has_losses_in_it():
    model = build(INDICES).double()
    for loss in AugSub(model, "masking", block=4).losses(model, images().double(), INDICES, nn.CrossEntropyLoss(
        weight=torch.ones(K).double())):  # fmt: skip
        loss.backward()
        assert loss.dtype == torch.float64


@pytest.mark.parametrize("criterion", [
    lambda z, y: F.cross_entropy(z, y), Focal(), nn.MultiMarginLoss(), timm_loss.DistributionBalancedLoss([3] * K, 9),
    partial(nn.CrossEntropyLoss()),
])  # fmt: skip
@pytest.mark.parametrize("y", [INDICES, SOFT])
def test_any_other_criterion_is_refused_whatever_its_labels(criterion, y):
    model = build(INDICES)
    with pytest.raises(ValueError, match=r'is not known; pass target="softmax", "sigmoid", "same" or a function'):
        AugSub(model, "masking", block=4).losses(model, images(), y, criterion)
    take_step(AugSub(model, "none"), model, y, F.cross_entropy)


def test_the_plain_recipe_takes_any_criterion():
    model = build(INDICES)
    (loss,) = AugSub(model, "none").losses(model, images(), INDICES, Focal())
    torch.testing.assert_close(loss, Focal()(model(images()), INDICES))


def test_a_target_that_is_given_comes_first():
    """For a criterion of one's own, for one that is refused, and in place of the table's."""
    own = lambda z, q: (q - z).abs().max()  # noqa: E731
    for target, function in (
        ("softmax", softmax),
        ("sigmoid", sigmoid),
        ("same", lambda z: z),
        (torch.tanh, torch.tanh),
    ):
        check_step(own, VALUES, lambda z: own(z, VALUES), lambda z, m, f=function: own(z, f(m)), target)
    two_way = timm_loss.TwoWayLoss()
    check_step(
        two_way, TAGS, lambda z: two_way(z, TAGS), lambda z, m: two_way(z, (m > 0).float()), lambda z: (z > 0) * 1.0
    )
    sharper = lambda z: softmax(z / 0.5)  # noqa: E731
    criterion = nn.CrossEntropyLoss(W, label_smoothing=0.1)
    check_step(criterion, INDICES, lambda z: weighted(z, smooth(INDICES), one_hot(INDICES)),
               lambda z, m: weighted(z, sharper(m)), sharper)  # fmt: skip


def test_wrong_targets_are_refused():
    model = build(INDICES)
    with pytest.raises(ValueError, match=r"target: 'soft' is unknown; use \"auto\", \"softmax\""):
        AugSub(model, "masking", target="soft")
    with pytest.raises(
        ValueError, match=r"target: returns \(4,\) for logits of \(4, 5\); return a value for each logit"
    ):
        take_step(AugSub(model, "masking", block=4, target=lambda z: z.argmax(1)), model, INDICES, F.cross_entropy)
    settings = partial(F.cross_entropy, size_average=True)
    with pytest.raises(ValueError, match="sets more than weight, ignore_index, reduction, label_smoothing"):
        AugSub(model, "masking", block=4).losses(model, images(), INDICES, settings)
