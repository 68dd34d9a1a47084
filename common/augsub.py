"""AugSub: a model learns together with a sub-model, its own weights with one drop technique switched on.

Heo, Kim, Yun and Han, "Augmenting Sub-model to Improve Main Model", arXiv 2306.11339 ("MaskSub", CVPR 2025).
With f the main model, f_p the sub-model at drop probability p, l the recipe's training loss and s the function that
turns logits into l's targets (softmax, sigmoid where l is a binary cross-entropy, identity in regression), a batch
(x, y) costs

    1/2 l(f(x), y)  +  1/2 l(f_p(x), stop_gradient(s(f(x))))

    augsub = AugSub(model, "masking", ratio=0.5)     # before the optimizer, DDP and compile
    for x, y in loader:
        for loss in augsub.losses(model, x, y, criterion):
            loss.backward()
        optimizer.step(); optimizer.zero_grad()

The drops are AugMask ("masking"), AugDrop ("dropout") and AugPath ("droppath"). Degenerate cases: at p = 0 the
sub-model is the main model; kind "none" is the plain loss l(f(x), y). `common.criteria` says what s is for each l,
`common.drops` and `common.masking` where a model has a place for each drop, `common.step_checks` what is refused.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import step_checks
from .criteria import CHOICES, Criterion, SubCriterion, Target, compute_loss, logits_of, sub_criterion, widen
from .drops import KINDS, InstalledDrop, Switch, install_drop
from .masking import BLOCK

_live: weakref.WeakSet[AugSub] = weakref.WeakSet()  # those that were not removed
NoSync = Callable[[], AbstractContextManager]


class StepResult(NamedTuple):
    """A step with one backward.

    Args:
        loss: what to call `backward()` on, the mean of both losses (the main model's alone for kind "none").
        main_loss, sub_loss: detached and unweighted; `sub_loss` is None for kind "none".
        logits: the main model's, detached.
    """

    loss: Tensor
    main_loss: Tensor
    sub_loss: Tensor | None
    logits: Tensor


class _Pass(NamedTuple):
    loss: Tensor  # unweighted
    logits: Tensor


class AugSub:
    """The sub-model of a model, and the two losses of a step.

    Args:
        model: the bare model; it is prepared in place (a placeholder becomes a real drop layer, a hierarchical model
            gains a `mask_token`, an earlier AugSub of the kind is removed), so do this before making the optimizer,
            DDP or a compiled model.
        kind: "masking", "dropout", "droppath", or "none" for the plain recipe.
        ratio: the drop probability p of the sub-model, in [0, 1); 0.5 throughout the paper.
        tokens: module, or its name, that gives (B, prefix + N, D) tokens, for masking to drop some of the N.
        prefix: how many tokens at the start are no patches; None is 1, or as many as a module of `common.foreign` has.
        patches: module, or its name, that gives a grid of patches, for masking to put the mask token there.
        target: what the sub-model learns of the main model's logits: "softmax" over dim 1, "sigmoid", "same" or a
            function of them; "auto" is what `common.criteria` has for the criterion.
        logits: the function from the model's output to the logits.
        block: side of a block that a mask token or pixel mask hides, in pixels; token drop has no blocks.
        batch_norm: "shared" lets both passes update the running batch statistics, as upstream does; "main" the main
            pass alone. Both passes normalise with their own batch's statistics.

    Raises:
        ValueError: an unknown kind, a ratio outside [0, 1), a wrapped or compiled model, or no place for the drop.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "masking",
        ratio: float = 0.5,
        *,
        tokens: nn.Module | str | None = None,
        prefix: int | None = None,
        patches: nn.Module | str | None = None,
        target: Target = "auto",
        logits: Callable[[Any], Tensor] = logits_of,
        block: int = BLOCK,
        batch_norm: str = "shared",
    ):
        if kind not in KINDS:
            raise ValueError(f"unknown drop {kind!r}: choose one of {', '.join(KINDS)}")
        if batch_norm not in ("shared", "main"):
            raise ValueError(f"unknown batch_norm {batch_norm!r}: choose shared or main")
        if not 0 <= ratio < 1:
            raise ValueError(f"drop ratio {ratio} is outside [0, 1)")
        if not callable(target) and target not in ("auto", "softmax", "sigmoid", "same"):
            raise ValueError(f'target: {target!r} is unknown; use "auto", {CHOICES}')
        step_checks.check_bare(model)
        self.model, self.kind, self.ratio, self.target, self.logits = model, kind, ratio, target, logits
        self.installed = InstalledDrop("plain", [], [])
        if kind != "none":
            for other in step_checks.find_related(model, _live, kind):  # two would act in the same layers
                install_drop(model, kind, 0.0, block, tokens=tokens, prefix=prefix, patches=patches)  # may raise
                other.remove()
            self.installed = install_drop(model, kind, ratio, block, tokens=tokens, prefix=prefix, patches=patches)
        token = self.installed.mask_token
        if token is not None:  # it trains where anything does
            token.requires_grad_(any(p.requires_grad for p in model.parameters() if p is not token))
        self._token_names = {name for name, parameter in model.named_parameters() if parameter is token}
        if self.installed.note:
            warnings.warn(f"AugSub: {self.installed.note}", stacklevel=2)
        self.drop, self.switches = self.installed.name, list(self.installed.switches)
        self._acting = step_checks.find_acting_modules(model, self.installed.switches)
        if batch_norm == "main":
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
            self.switches += [Switch(m, "track_running_stats", False) for m in norms if m.track_running_stats]
        self._checked: set[int] = set()  # ids of the models of steps so far
        self._removed, self._calls_checked = False, not self._acting  # the calls of the first step
        self._watch: list[Any] = []  # hooks of the first `step` that notice activation checkpointing
        self._open_step: Generator[_Pass] | None = None  # the passes of a step that has begun and not ended
        try:
            step_checks.check_not_compiled(model, self._acting)
        except ValueError:
            self.remove()
            raise
        _live.add(self)

    def __repr__(self) -> str:
        return "AugSub(none)" if self.kind == "none" else f"AugSub({self.kind}, ratio={self.ratio}, {self.drop})"

    def __deepcopy__(self, memo: dict[int, Any]) -> AugSub:
        """Copy it with its model, as an object that holds both is copied."""
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy({**vars(self), "_open_step": None, "_checked": set(), "_watch": []}, memo))
        _live.add(twin)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "AugSub: cannot be pickled, since its hooks stay behind; make it in each process, started by torchrun or "
            'Lightning\'s strategy "ddp" and not by "ddp_spawn"'
        )

    @property
    def weight(self) -> float:
        """What each of the step's losses is multiplied by: 1/2, or 1 for the plain recipe."""
        return 1.0 if self.kind == "none" else 0.5

    @contextmanager
    def sub_model(self) -> Iterator[None]:
        """Turn the model given to `__init__` into the sub-model; on exit every rate is restored.

        Drops act in training mode only: after `model.eval()` the sub-model equals the main model, inside this
        context as outside. The context changes neither the mode nor whether gradients are recorded, so
        `with torch.no_grad(), augsub.sub_model(): model(x)` is the sub-model's output for a model in train().
        """
        main_values = [getattr(switch.module, switch.name) for switch in self.switches]
        try:
            for switch in self.switches:
                setattr(switch.module, switch.name, switch.sub_value)
            yield
        finally:
            for switch, main_value in zip(self.switches, main_values):
                setattr(switch.module, switch.name, main_value)

    def losses(
        self,
        model: nn.Module,
        x: Any,
        y: Any,
        criterion: Criterion,
        *,
        sync: bool = True,
        no_sync: NoSync | None = None,
    ) -> Iterator[Tensor]:
        """Yield the weighted loss of the main model, then that of its sub-model; call `backward()` on each in turn.

        The first graph is freed before the second is built, so the peak memory is the plain recipe's and the first
        pass's gradients.

        `sum(augsub.losses(...)).backward()` is the same step with one backward: the same gradients to rounding and
        still one all-reduce, for the memory of both graphs. Not with activation checkpointing and AugDrop or AugPath:
        backward would recompute the sub pass at the main model's rates. `step` refuses that, and gives the logits too.

        Each call draws its drop anew. An optimizer that evaluates a step several times (SAM, LBFGS) needs the same one
        each time: in its closure, `with torch.random.fork_rng(): torch.manual_seed(step)` around the loop holds it.

        Args:
            model: the model of `__init__`, bare, in DDP or compiled.
            x: images (B, 3, H, W), which both passes see; a tuple holds several inputs, a mapping those by keyword.
            y: labels, class indices (B,) or (B, H, W), or probabilities (B, K).
            criterion: the recipe's loss, mean over the batch. What it does to labels (smoothing, a threshold) it does
                to `y` only; the sub-model learns the main model's output as it is.
            sync: False on all but the last micro-batch of an accumulated step, so that DDP waits with its
                all-reduce. Scale what is yielded by 1 / micro-batches.
            no_sync: gives a context in which gradients are not reduced; the model's own where it is None.

        Yields:
            scalars in float32, or float64 for a model in it, also under autocast: `weight` * l.

        Raises:
            ValueError: a criterion without a known target, a model in eval mode, or a mistake that
                `common.step_checks` names, before any gradient; a mask that can hide nothing, in the sub pass.
        """
        passes = self._start_step(model, x, y, criterion, sync, no_sync)
        return (self.weight * each.loss for each in passes)

    def step(
        self,
        model: nn.Module,
        x: Any,
        y: Any,
        criterion: Criterion,
        *,
        sync: bool = True,
        no_sync: NoSync | None = None,
    ) -> StepResult:
        """Return both losses as one, for a trainer that calls `backward()` once; arguments and errors of `losses`."""
        step_checks.check_recomputation(self.model, self.kind)
        first = not self._calls_checked
        main, *subs = self._start_step(model, x, y, criterion, sync, no_sync)
        if first and not step_checks.is_compiled(model):
            self._watch = step_checks.refuse_calls_in_backward([*self._acting, *(s.module for s in self.switches)])
        loss = sum((self.weight * each.loss for each in subs), self.weight * main.loss)
        sub_loss = subs[0].loss.detach() if subs else None
        return StepResult(loss, main.loss.detach(), sub_loss, main.logits.detach())

    def remove(self) -> None:
        """Give the model back as it was, without drop layers, hooks and mask token."""
        self._close_step()
        if self._removed:
            return
        for undo in reversed(self.installed.undo):
            undo()
        self._removed = True
        _live.discard(self)

    def plain_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a model's state dict without the mask token and the prefixes of DDP and compile.

        Args:
            model: the model of `__init__`, an average of it, or what wraps either.
        """
        model = step_checks.unwrap(model)
        token = self.installed.mask_token
        state = model.state_dict()
        names = {name for name, parameter in model.named_parameters() if parameter is token}
        if not names:  # an average, or loaded with assign=True
            names = self._token_names & state.keys()
        if not names:  # an average of a wrapper has it under a longer name
            names = {name for name in state for own in self._token_names if name.endswith(f".{own}")}
        state = {name: value for name, value in state.items() if name not in names}
        return {name.replace("_orig_mod.", ""): value for name, value in state.items()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that AugSub added, none of which is to decay."""
        return {name for name, _ in self.model.named_parameters() if name in self._token_names}

    def _start_step(
        self,
        model: nn.Module,
        x: Any,
        y: Any,
        criterion: Criterion,
        sync: bool,
        no_sync: NoSync | None,
    ) -> Iterator[_Pass]:
        """Begin a step, where nothing has been computed yet."""
        self._refuse_open_step()
        soft = self.check_step(model, criterion)
        if no_sync is None:  # a DDP with a static graph has to reduce in its first backward
            no_sync = nullcontext if getattr(model, "static_graph", False) else getattr(model, "no_sync", nullcontext)
        return self._in_turn(self._passes(model, x, y, criterion, soft, sync, no_sync))

    def check_step(
        self, model: nn.Module, criterion: Criterion
    ) -> tuple[SubCriterion, Callable[[Tensor], Tensor]] | None:
        """Check what a step is made of → `sub_criterion`, None for kind "none"; errors of `losses`."""
        if self._removed:
            raise ValueError("AugSub: was removed from its model, or replaced by a newer one; make a new one")
        if self.kind == "none":
            return None
        soft = sub_criterion(criterion, self.target)
        step_checks.check_mode(self._acting)
        if id(model) not in self._checked:
            layers = [*self._acting, *(switch.module for switch in self.switches)]
            step_checks.check_first_step(self.model, model, self.installed.mask_token, layers)
            self._checked.add(id(model))
        return soft

    def _in_turn(self, passes: Generator[_Pass]) -> Generator[_Pass]:
        """Yield a step's passes, refused while those of another are not all taken."""
        self._refuse_open_step()
        self._open_step = passes
        try:
            yield from passes
        finally:
            if self._open_step is passes:
                self._open_step = None

    def _refuse_open_step(self) -> None:
        if self._close_step():
            raise ValueError(
                "losses: the step before was not finished and the model was still its sub-model; take all that "
                "losses() yields in a for loop or with sum(), or use step()"
            )

    def _close_step(self) -> bool:
        """Turn the model back from the sub-model where a step has not ended → whether one had not."""
        passes, self._open_step = self._open_step, None
        for handle in self._watch:
            handle.remove()
        if passes is not None:
            passes.close()
        return passes is not None

    def _passes(
        self,
        model: nn.Module,
        x: Any,
        y: Any,
        criterion: Criterion,
        soft: tuple[SubCriterion, Callable[[Tensor], Tensor]] | None,
        sync: bool,
        no_sync: NoSync,
    ) -> Generator[_Pass]:
        # A generator stops at `yield` inside its `with`, so each context below covers the caller's backward() too.
        # DDP all-reduces in the backward of a pass whose forward ran outside no_sync(), and then sends all gradients
        # that have accumulated. One all-reduce a step is enough, in its last pass:
        #
        #                       earlier micro-batches    last micro-batch (sync)
        #   main pass           no_sync                  no_sync; without a sub pass all-reduce
        #   sub pass            no_sync                  all-reduce, of both passes' gradients
        with nullcontext() if sync and soft is None else no_sync():
            self._keep_token_in_graph(model)
            with self.first_call_checked(model):
                output = _call(model, x)
            logits = self.logits(output)
            yield _Pass(compute_loss(criterion, logits, y), logits)
        if soft is None:
            return
        soft_criterion, to_target = soft
        target = to_target(widen(logits.detach()))
        # the rates stay switched during backward too, so activation checkpointing recomputes the sub-model
        with nullcontext() if sync else no_sync(), self.sub_model():
            try:
                output = _call(model, x)
            except Exception as error:
                error.add_note(f"AugSub: this is the sub-model's pass ({self.drop}); the main model's had no error")
                raise
            logits = self.logits(output)
            yield _Pass(compute_loss(soft_criterion, logits, target, y), logits)

    @contextmanager
    def first_call_checked(self, model: nn.Module) -> Iterator[None]:
        """Warn where the first call inside reaches no layer that the drop acts in; a compiled model hides its calls."""
        if self._calls_checked or step_checks.is_compiled(model):
            yield
            return
        with step_checks.calls_checked(self.model, self.installed.switches):
            yield
        self._calls_checked = True

    def _keep_token_in_graph(self, model: nn.Module) -> None:
        """Let the main pass use the mask token, with weight 0, where a DDP might reduce in this pass's backward.

        DDP expects a gradient of each parameter then. Its own `no_sync` keeps it from that, but not with a static
        graph, which it learns from the first backward, nor where the DDP is around a module that calls `model`.
        """
        token = self.installed.mask_token
        processes = torch.distributed.is_available() and torch.distributed.is_initialized()
        if token is None or not token.requires_grad or not processes:
            return
        if hasattr(model, "no_sync") and not getattr(model, "static_graph", False):
            return
        if any(parameter is token for parameter in self.model.parameters()):  # else FSDP has made another of it
            for switch in self.installed.switches:
                switch.module.use_token_always()


def _call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        is_naflex = {"patches", "patch_coord"} <= x.keys()  # timm's NaFlexViT takes its mapping as one argument
        return model(x) if is_naflex else model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


if __name__ == "__main__":
    from .survey import main

    main()
