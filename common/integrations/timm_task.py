"""AugSub in a training task of timm, `timm.task`, which timm 1.0.31 has and earlier versions have in part or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..augsub import AugSub
from ..criteria import Criterion, sub_criterion
from ..step_checks import check_recomputation

MASK_TOKEN = "mask_token"  # in the task's state


class SwitchedCriterion(nn.Module):
    """A task's criterion, which becomes the sub-model's in the sub pass."""

    def __init__(self, criterion: Criterion):
        super().__init__()
        self.criterion: Any = criterion
        self.of_sub_model: Any = None  # a criterion while the sub-model computes

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, K)."""
        return (self.of_sub_model or self.criterion)(logits, target)


class AugSubTask(TrainingTask):
    """Make a task of timm train with AugSub: its loss is the mean of the main model's and the sub-model's.

    With L the task's loss of an output and labels, which for a distillation task includes the teacher's part, a batch
    (x, y) costs 1/2 L(f(x), y) + 1/2 L(f_p(x), stop_gradient(s(f(x)))). The teacher computes each batch once.

        task = AugSubTask(ClassificationTask(model, criterion), "masking", 0.5)  # before optimizer, EMA, DDP, compile

    The task itself is changed and returned; its class is then both AugSubTask and the class that it had, so that EMA,
    compile, DDP and checkpoints are the task's own. Checkpoints hold the plain model, and a mask token in the task's
    state. In eval mode the task computes its plain loss.

    Args:
        task: any of timm's tasks with a `criterion`; its `trainable_module` is prepared in place.
        kind, ratio, options: of `AugSub`.

    Raises:
        ValueError: a task without a criterion, or with AugSub already; as `AugSub`, and in a step as its `losses`.
    """

    augsub: AugSub
    criterion: Any

    def __new__(cls, task: TrainingTask, *args: Any, **options: Any) -> AugSubTask:
        if isinstance(task, cls):
            raise ValueError("task: trains with AugSub already; make a new task")
        if not hasattr(task, "criterion"):
            raise ValueError(f"task: {type(task).__name__} has no criterion that AugSub could give its targets to")
        task.__class__ = type(f"AugSub{type(task).__name__}", (cls, type(task)), {})
        return task

    def __init__(self, task: TrainingTask, kind: str = "masking", ratio: float = 0.5, **options: Any):
        # `self` is `task`, so that there is nothing of TrainingTask to initialise
        module = self.get_trainable_module()
        self.augsub = AugSub(module, kind, ratio, **options)
        if kind != "none":
            sub_criterion(self.criterion, self.augsub.target)  # refused before training
        self.criterion = SwitchedCriterion(self.criterion)
        names = self.augsub.no_weight_decay()
        if names:  # create_optimizer_v2 asks the model; a partial of `set` pickles without this package
            names |= getattr(module, "no_weight_decay", set)()
            module.no_weight_decay = partial(set, frozenset(names))
            self.augsub.installed.undo.append(partial(delattr, module, "no_weight_decay"))

    def forward(self, input: Any, target: Tensor) -> dict[str, Tensor]:
        """Return the task's results for the main model, with `loss` the mean of both models' losses.

        Args:
            input: images (B, C, H, W), or what timm's NaFlex loader gives.
            target: labels, as the task takes them.

        Returns:
            `loss` to call backward() on, `main_loss` and `sub_loss` detached and unweighted, and the task's other
            results for the main model.
        """
        if not self.training:
            return super().forward(input, target)
        soft = self.augsub.check_step(self.get_trainable_module(), self.criterion.criterion)
        if soft is None:
            return super().forward(input, target)
        check_recomputation(self.augsub.model, self.augsub.kind)
        to_loss, to_target = soft
        # one all-reduce, in the sub pass; a DDP with a static graph has to see both passes
        static = getattr(self.get_trainable_module(), "static_graph", False)
        with (
            nullcontext() if static else self.no_sync(),
            record_outputs(getattr(self, "teacher", None)) as outputs,
            self.augsub.first_call_checked(self.get_trainable_module()),
        ):
            main = super().forward(input, target)
        soft_target = to_target(main["output"].detach().float())
        self.criterion.of_sub_model = lambda logits, soft: to_loss(logits.float(), soft, target)
        try:
            with self.augsub.sub_model(), replay_outputs(getattr(self, "teacher", None), outputs):
                sub = super().forward(input, soft_target)
        finally:
            self.criterion.of_sub_model = None
        loss = self.augsub.weight * (main["loss"] + sub["loss"])
        return {**main, "loss": loss, "main_loss": main["loss"].detach(), "sub_loss": sub["loss"].detach()}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the task's state and the mask token."""
        token = self.get_mask_token(module, ema)
        return super().get_task_state(module, ema) | ({} if token is None else {MASK_TOKEN: token.detach()})

    def load_task_state(
        self,
        state: Mapping[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load the task's state, and the mask token where it holds one."""
        super().load_task_state(state, strict, module, ema)
        token = self.get_mask_token(module, ema)
        if token is not None and state and MASK_TOKEN in state:
            token.data.copy_(state[MASK_TOKEN])

    def get_mask_token(self, module: nn.Module | None, ema: bool) -> nn.Parameter | None:
        """Return the mask token of the trainable module or of its average, if it has one."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        names = self.augsub.no_weight_decay() if module is not None else ()
        return next((unwrap_model(module).get_parameter(name) for name in names), None)

    def get_checkpoint_state(self, ema: bool = False, **options: Any) -> dict[str, Any]:
        """Return what a checkpoint holds: the plain model, and the task's state."""
        state = super().get_checkpoint_state(ema, **options)
        weights = state.get("state_dict_ema" if ema else "state_dict", {})
        for name in self.mask_token_names():
            weights.pop(name, None)
        return state

    def load_checkpoint_state(
        self,
        state_dict: Mapping[str, Any],
        task_state: Mapping[str, Any] | None = None,
        ema: bool = False,
        strict: bool = True,
    ) -> None:
        """Load a checkpoint with or without a mask token; without one the model keeps its own."""
        model = self.get_eval_model(ema=ema)
        names = self.mask_token_names() if model is not None else ()
        kept = {name: unwrap_model(model).get_parameter(name) for name in names}
        super().load_checkpoint_state({**kept, **state_dict}, task_state, ema, strict)

    def mask_token_names(self) -> set[str]:
        """Return the name of the mask token in the model that timm evaluates and saves, if it has one."""
        token = self.augsub.installed.mask_token
        return {name for name, p in unwrap_model(self.get_eval_model()).named_parameters() if p is token}


@contextmanager
def record_outputs(teacher: nn.Module | None) -> Iterator[list[Any]]:
    """Give a list to which the teacher's outputs are appended; empty where there is no teacher."""
    outputs: list[Any] = []
    hook = teacher and teacher.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        if hook:
            hook.remove()


@contextmanager
def replay_outputs(teacher: nn.Module | None, outputs: list[Any]) -> Iterator[None]:
    """Have the teacher return recorded outputs, in order: it sees the same images, and costs as much as the student."""
    if teacher is None:
        yield
        return
    recorded = iter(outputs)
    teacher.forward = lambda *args, **kwargs: next(recorded)
    try:
        yield
    finally:
        del teacher.forward
