"""AugSub: a model learns together with a sub-model, its own weights with one drop technique switched on.

Heo, Kim, Yun and Han, "Augmenting Sub-model to Improve Main Model", arXiv 2306.11339 ("MaskSub", CVPR 2025).
With f the main model, f_p the sub-model at drop probability p, l the recipe's training loss and s the function that
turns logits into l's targets (softmax, or sigmoid where l is a binary cross-entropy), a batch (x, y) costs

    1/2 l(f(x), y)  +  1/2 l(f_p(x), stop_gradient(s(f(x))))

    augsub = AugSub(model, "masking", ratio=0.5)     # before the optimizer, DDP and compile
    for x, y in loader:
        for loss in augsub.losses(model, x, y, criterion):
            loss.backward()
        optimizer.step(); optimizer.zero_grad()

The drops are AugMask ("masking"), AugDrop ("dropout") and AugPath ("droppath"). Degenerate cases: at p = 0 the
sub-model is the main model; kind "none" is the plain loss l(f(x), y). This file and `common.masking` need torch and
timm only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from common.masking import BLOCK, PixelMask, TokenMask, patch_embedding

KINDS = ("none", "masking", "dropout", "droppath")
Criterion = Callable[[Tensor, Tensor], Tensor]


class AugSub:
    """The sub-model of a timm model, and the two losses of a step.

    Args:
        model: the bare model; it is prepared in place (a placeholder becomes a real drop layer, a hierarchical
            model gains a `mask_token`), so do this before making the optimizer, DDP or a compiled model.
        kind: "masking", "dropout", "droppath", or "none" for the plain recipe.
        ratio: the drop probability p of the sub-model, in [0, 1); 0.5 throughout the paper.
        batch_norm: "shared" lets both passes update the running batch statistics, as upstream does; "main" the main
            pass alone. Both passes normalise with their own batch's statistics.
        block: side of a block that a mask token or pixel mask hides, in pixels; token drop has no blocks.

    Raises:
        ValueError: an unknown kind, a ratio outside [0, 1), a wrapped model, or a drop the model has no place for.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "masking",
        ratio: float = 0.5,
        *,
        block: int = BLOCK,
        batch_norm: str = "shared",
    ):
        if kind not in KINDS:
            raise ValueError(f"unknown drop {kind!r}: choose one of {', '.join(KINDS)}")
        if batch_norm not in ("shared", "main"):
            raise ValueError(f"unknown batch_norm {batch_norm!r}: choose shared or main")
        if not 0 <= ratio < 1:
            raise ValueError(f"drop ratio {ratio} is outside [0, 1)")
        if hasattr(model, "no_sync") or hasattr(model, "_orig_mod"):
            raise ValueError(f"make AugSub from the bare model, before {type(model).__name__} wraps it")
        self.kind, self.ratio = kind, ratio
        self.joined: str | None = None  # how `common.joint.join` computes both passes at once
        self.drop, self.switches = ("plain", []) if kind == "none" else _install(model, kind, ratio, block)
        if batch_norm == "main":
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
            self.switches += [Switch(m, "track_running_stats", False) for m in norms if m.track_running_stats]

    def __repr__(self) -> str:
        joined = f", {self.joined}" if self.joined else ""
        return f"AugSub({self.kind}, ratio={self.ratio}, {self.drop}{joined})"

    @property
    def weight(self) -> float:
        """What each of the step's losses is multiplied by: 1/2, or 1 for the plain recipe."""
        return 1.0 if self.kind == "none" else 0.5

    @contextmanager
    def sub_model(self) -> Iterator[None]:
        """Within it the model given to `__init__` is the sub-model; every rate is restored at the end.

        Drops act in training mode only: after `model.eval()` the sub-model equals the main model, inside this
        context as outside. The context changes neither the mode nor whether gradients are recorded, so
        `with torch.no_grad(), augsub.sub_model(): model(x)` is the sub-model's output for a model in train().
        """
        before = [getattr(switch.module, switch.name) for switch in self.switches]
        try:
            for switch in self.switches:
                setattr(switch.module, switch.name, switch.within)
            yield
        finally:
            for switch, rate in zip(self.switches, before):
                setattr(switch.module, switch.name, rate)

    def losses(
        self, model: nn.Module, x: Tensor, y: Tensor, criterion: Criterion, *, sync: bool = True
    ) -> Iterator[Tensor]:
        """Yields the weighted loss of the main model, then that of its sub-model; call `backward()` on each in turn.

        The first graph can be freed before the second is built, so the peak memory is the plain recipe's. Given a DDP
        model, the main pass's forward and backward are held under `no_sync()`: a step costs one all-reduce.

        `sum(augsub.losses(...)).backward()` is the same step with one backward: the same gradients to rounding and
        still one all-reduce, for the memory of both graphs. Not with activation checkpointing and AugDrop or AugPath:
        backward would recompute the sub pass at the main model's rates.

        Args:
            model: the model of `__init__`, bare, in DDP or compiled; or what `common.joint.join` made of it, whose
                losses come from one graph and must be summed.
            x: images (B, 3, H, W), which both passes see.
            y: labels, class indices (B,) or probabilities (B, K).
            criterion: the recipe's loss, mean over the batch. What it does to labels (smoothing, a threshold) it does
                to `y` only; the sub-model learns the main model's output as it is.
            sync: False on all but the last micro-batch of an accumulated step, so that DDP waits with its
                all-reduce. Scale what is yielded by 1 / micro-batches.

        Yields:
            scalars in float32, also under autocast: `weight` * l.
        """
        wait = getattr(model, "no_sync", nullcontext)
        with nullcontext() if sync and (self.joined or self.kind == "none") else wait():
            logits, sub_logits = model(x) if self.joined else (model(x), None)
            yield self.weight * _float32(criterion, logits, y)
        if self.kind == "none":
            return
        soft_criterion, to_target = soft_target_loss(criterion)
        target = to_target(logits.detach().float())
        if sub_logits is not None:
            yield self.weight * _float32(soft_criterion, sub_logits, target)
            return
        # the rates stay switched while the caller runs backward, so activation checkpointing recomputes this pass
        with nullcontext() if sync else wait(), self.sub_model():
            yield self.weight * _float32(soft_criterion, model(x), target)


def soft_target_loss(criterion: Criterion) -> tuple[Criterion, Callable[[Tensor], Tensor]]:
    """The criterion as the sub-model uses it, and the function that makes its targets from the main model's logits.

    The targets are sigmoid's for a binary cross-entropy and softmax's otherwise. Label smoothing and target
    thresholds are dropped, because they are corrections of labels and the target is none.
    """
    if isinstance(criterion, BinaryCrossEntropy):
        return _without(criterion, target_threshold=None, smoothing=0.0), torch.sigmoid
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        return criterion, torch.sigmoid
    if isinstance(criterion, LabelSmoothingCrossEntropy):
        return SoftTargetCrossEntropy(), _softmax
    if isinstance(criterion, nn.CrossEntropyLoss):
        return _without(criterion, label_smoothing=0.0), _softmax
    return criterion, _softmax


def drops(model: nn.Module) -> dict[str, str]:
    """Each drop that the model has a place for, with how it works there, e.g. {"masking": "token drop"}.

    Nothing is changed in the model.
    """
    offered = {"masking": _mask_name(model)}
    if _dropouts(model):
        offered["dropout"] = "dropout of attention projections and MLPs"
    if _drop_paths(model):
        offered["droppath"] = "stochastic depth of every block"
    return offered


class Switch(NamedTuple):
    """An attribute of a module that holds a drop rate, and its value in the sub-model."""

    module: Any
    name: str
    within: float


def _install(model: nn.Module, kind: str, ratio: float, block: int) -> tuple[str, list[Switch]]:
    offered = drops(model)
    if kind not in offered:
        raise ValueError(f"{type(model).__name__} has no place for {kind}: it offers {', '.join(offered)}")
    if ratio == 0:  # the sub-model is the main model; a mask token would be a parameter without a gradient
        return offered[kind], []
    if kind == "masking":
        return offered[kind], [_install_mask(model, ratio, block)]
    if kind == "dropout":
        return offered[kind], [Switch(module, "p", ratio) for module in _dropouts(model)]
    switches = []
    for branch, name in _drop_paths(model):
        if not isinstance(getattr(branch, name), DropPath):
            setattr(branch, name, DropPath(0.0).train(branch.training))
        switches.append(Switch(getattr(branch, name), "drop_prob", ratio))
    return offered[kind], switches


def _mask_name(model: nn.Module) -> str:
    # a model that keeps its tokens in a grid, as SAM's does, counts no prefix tokens and cannot spare any
    sequence = hasattr(model, "patch_drop") and hasattr(model, "num_prefix_tokens")
    if sequence or hasattr(model, "patch_drop_rate"):
        return "token drop"
    return TokenMask.name if patch_embedding(model) is not None else PixelMask.name


def _install_mask(model: nn.Module, ratio: float, block: int) -> Switch:
    name = _mask_name(model)
    if name != "token drop":
        return Switch((TokenMask if name == TokenMask.name else PixelMask).on(model, block), "ratio", ratio)
    if not hasattr(model, "patch_drop"):  # Hiera drops whole mask units itself
        return Switch(model, "patch_drop_rate", ratio)
    if not isinstance(model.patch_drop, (PatchDropout, PatchDropoutWithIndices)):
        # a model with rotary or variable-length positions holds None here and wants to know which tokens were kept
        layer = PatchDropoutWithIndices if model.patch_drop is None else PatchDropout
        model.patch_drop = layer(0.0, num_prefix_tokens=model.num_prefix_tokens).train(model.training)
    return Switch(model.patch_drop, "prob", ratio)


def _dropouts(model: nn.Module) -> list[nn.Dropout]:
    """Dropouts of attention projections and MLPs; not those of attention weights, positions, pooling or the head."""
    inside = re.compile(
        r"(?!.*\b(head|attn_pool|\w*rel_pos|cpb_mlp|meta_mlp)\b).*"
        r"\b(proj_drop|drop[123]|mlp_drop|out_drop|mlp\.drop|linear\.drop|main\.\d+)"
    )
    return [m for name, m in model.named_modules() if isinstance(m, nn.Dropout) and inside.fullmatch(name)]


def _drop_paths(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where residual branches have their stochastic depth: (block, attribute). At rate 0 timm leaves an Identity or
    None there."""
    return [
        (block, name)
        for block in model.modules()
        for name, layer in (vars(block) | block._modules).items()
        if re.fullmatch(r"(\w+_)?drop_path\d*", name) and (layer is None or isinstance(layer, (DropPath, nn.Identity)))
    ]


def _float32(criterion: Criterion, logits: Tensor, target: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return criterion(logits.float(), target)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def _without(criterion: nn.Module, **neutral: Any) -> Criterion:
    plain = copy.copy(criterion)
    for name, value in neutral.items():
        setattr(plain, name, value)
    return plain


if __name__ == "__main__":
    from common.survey import main

    main()
