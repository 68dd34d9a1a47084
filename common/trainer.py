"""Trainer: a model with its drop on the device, and the gradients and the update of one optimizer step."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import rng
from common.augsub import AugSub, Criterion
from common.checkpoint.class_names import check_class_names, describe_other_classes, saved_class_names
from common.checkpoint.report import check_complete
from common.checkpoint.sources import WeightsSource
from common.checkpoint.weights import AdaptWeights, InitialWeights, load_weights
from common.cosub import CoSub
from common.data.fast.ops import DeviceAugment
from common.data.transforms import create_augment
from common.data_config import augment_config, create_mixup
from common.distributed import Process
from common.errors import StopTraining
from common.model_checks import check_batch_norm, check_input_size, check_mask
from common.models import convert_with_timm
from common.optim import SetLR, create_optimizer
from common.recipe import Recipe
from common.train_args import TrainArgs

PHASES = ("forward", "backward", "optimizer", "EMA", "host")  # of a step; "host" is all that the others are not


def ignore_phase(phase: str) -> None:
    """Time nothing: the default of `Trainer.start_phase`."""


@dataclass
class Trainer:
    """What an optimizer step needs.

    Args:
        model: as it is called: compiled, in DDP; `raw_model` is the module inside.
        augsub: made from `raw_model`.
        set_lr: sets the learning rates for an update, counted from 0 over the whole run.
        classes: of the model; labels must be below.
        autocast: dtype of autocast, or None for float32.
        accum_steps: micro-batches per update; the last update of an epoch may have fewer.
        train_mode: whether drops and batch statistics act in the main pass.
        device_augment: augments on the device what the loader defers to it.
        start_phase: is called with one of `PHASES` as each begins, for a benchmark to time them.
        notes: lines to print about how it was built.
    """

    process: Process
    model: nn.Module
    raw_model: nn.Module
    augsub: AugSub | CoSub
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    set_lr: SetLR
    scaler: torch.amp.GradScaler
    classes: int
    autocast: torch.dtype | None = None
    ema: ModelEmaV3 | None = None
    mixup: Mixup | None = None
    clip_grad: float | None = None
    accum_steps: int = 1
    memory_format: torch.memory_format = torch.contiguous_format
    train_mode: bool = True
    device_augment: DeviceAugment | None = None
    start_phase: Callable[[str], None] = ignore_phase
    notes: Sequence[str] = ()
    parameters: list[nn.Parameter] = field(init=False)
    update_number: int = field(init=False, default=0)  # of the update in progress, counted from 1 over the whole run

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.raw_model.parameters() if p.requires_grad]

    @property
    def passes(self) -> int:
        """Forward passes of a step, each with a loss: one, and with AugSub another of its sub-model."""
        return 1 if self.augsub.kind == "none" else 2

    @property
    def lr(self) -> float:
        """The learning rate in force, the largest of all parameter groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def prepare_batch(self, images: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Move a batch to the device, augment and mix it.

        Args:
            images: (B, 3, H, W), or what the loader defers to `device_augment`.
            labels: (B,), checked here while they are on the host.

        Returns:
            images (B, 3, H, W) and labels (B,), or (B, classes) where they are mixed.
        """
        check_labels(labels, self.classes)
        device = self.process.device
        if self.device_augment is not None:
            images = self.device_augment(images)
        images = images.to(device, non_blocking=True, memory_format=self.memory_format)
        labels = labels.to(device, non_blocking=True)
        return self.mixup(images, labels) if self.mixup else (images, labels)

    def start_update(self, update: int) -> None:
        """Set what follows from the place of an update in the whole run, counted from 0."""
        self.set_lr(update)
        self.update_number = update + 1

    def train_step(self, images: Any, labels: Tensor, micro_batches: int, last: bool) -> list[Tensor]:
        """Add the gradients of one micro-batch.

        Args:
            micro_batches: of this optimizer step; each counts 1 / `micro_batches`.
            last: whether this is the last of them, with which DDP reduces the gradients.

        Returns:
            Detached losses, unweighted: the main model's and, with AugSub, the sub-model's.
        """
        self.start_phase("host")
        x, y = self.prepare_batch(images, labels)
        losses = []
        self.start_phase("forward")
        with autocast(self.process.device, self.autocast):
            for loss in self.augsub.losses(self.model, x, y, self.criterion, sync=last):
                self.start_phase("backward")
                # backward runs each operation in the dtype of its forward; autocast would only cost time
                with torch.autocast(self.process.device.type, enabled=False):
                    self.scaler.scale(loss / micro_batches).backward()
                losses.append(loss.detach() / self.augsub.weight)
                self.start_phase("forward")  # of the sub-model
        self.start_phase("host")
        return losses

    def update(self) -> None:
        """Update the weights and their average from the gradients, and clear the gradients."""
        self.start_phase("optimizer")
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.start_phase("EMA")
            # timm's decay hangs on the number only where it is given one
            self.ema.update(self.raw_model, step=self.update_number if self.ema.use_warmup else None)
        self.start_phase("host")

    def drop_ema(self) -> None:
        """Forget the averaged weights, where a checkpoint to evaluate has none."""
        self.ema = None


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise StopTraining where a label is out of range; labels: (B,) on the host."""
    if len(labels) and labels.numpy().min() < 0:
        raise StopTraining(f"label {int(labels.min())} stands for no class; choose a split with labels")
    if len(labels) and labels.numpy().max() >= classes:
        raise StopTraining(f"label {int(labels.max())} is out of range for --nb-classes {classes}")


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Context of mixed precision in `dtype`, or of none."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def build_trainer(
    recipe: Recipe,
    args: TrainArgs,
    process: Process,
    classes: int,
    batches: int,
    class_names: Sequence[str] | None = None,
    initial: InitialWeights | None = None,
    resuming: bool = False,
) -> Trainer:
    """Build the model with its drop, and all that trains it.

    The order of the constructors fixes the random stream, and with it the golden losses: seed, model, weights with a
    new classifier, mask token, DDP.

    Args:
        classes: of the model.
        batches: of an epoch, on each process.
        class_names: of the data, in the order of the labels.
        initial: weights of `--finetune`.
        resuming: whether a checkpoint will replace the weights.

    Raises:
        ValueError: bad input, in one sentence.
    """
    if args.deterministic:
        use_deterministic_kernels()
    rng.seed_everything(args.seed)
    model = build_model(recipe, args, classes)
    notes = load_initial_weights(recipe, args, model, initial, class_names) if initial is not None else []
    if args.sync_bn:
        if process.device.type != "cuda":
            raise ValueError("--sync-bn: PyTorch has no synchronized batch norm on the CPU; use --device cuda")
        model = convert_sync_batchnorm(model)
    augsub = recipe.create_augsub(model, args)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(process.device).to(memory_format=memory_format)
    dtype = autocast_dtype(args.amp, process.device)
    if process.device.type == "cpu":
        use_unfused_attention(model, dtype)
    check_input_size(model, args, process.device)
    check_batch_norm(model, args, process)
    check_mask(augsub, model, args)
    ema = None
    if args.model_ema and (args.trains or resuming):  # --eval of a checkpoint evaluates its average too
        ema = ModelEmaV3(
            model,
            args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device="cpu" if args.model_ema_force_cpu else None,
        )
    args_in_force = recipe.scale_lr(args, args.batch_size * process.world_size * args.accum_iter)
    optimizer = create_optimizer(recipe.param_groups(model, args_in_force), args_in_force)
    mixup = create_mixup(args, classes)
    return Trainer(
        process=process,
        model=compile_and_wrap_ddp(model, args, process),
        raw_model=model,
        augsub=augsub,
        criterion=recipe.loss(args, mixup is not None),
        optimizer=optimizer,
        set_lr=recipe.schedule(optimizer, args_in_force, batches / args.accum_iter),
        scaler=torch.amp.GradScaler(process.device.type, enabled=dtype is torch.float16),
        classes=classes,
        autocast=dtype,
        ema=ema,
        mixup=mixup,
        clip_grad=args.clip_grad or None,
        accum_steps=args.accum_iter,
        memory_format=memory_format,
        train_mode=args.train_mode,
        device_augment=create_augment(augment_config(args), process.device),
        notes=notes,
    )


def build_model(recipe: Recipe, args: TrainArgs, classes: int) -> nn.Module:
    """Build the recipe's model.

    Raises:
        ValueError: there is no such model, or it cannot be made with these settings.
    """
    try:
        return recipe.create_model(args, classes)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--model {args.model}: cannot be built with these settings ({reason})") from error


def load_initial_weights(
    recipe: Recipe,
    args: TrainArgs,
    model: nn.Module,
    initial: InitialWeights,
    class_names: Sequence[str] | None = None,
) -> list[str]:
    """Load the weights of `--finetune`, and return what to print about them.

    Training starts with a new classifier where the file's classes are not the data's.

    Raises:
        ValueError: there are none, they do not fit, or are to be evaluated on other classes than theirs.
    """
    weights, content = initial.source, initial.content
    saved = saved_class_names(content, weights.label, weights.pretrained_cfg)
    if not args.trains:  # evaluation needs the file's own classifier
        check_class_names(weights.label, saved, class_names, weights.name)
    difference = describe_other_classes(saved, class_names)
    report = load_weights(
        model,
        weights.label,
        weights_adapter(recipe, weights),
        new_head=args.trains,
        keep_head=difference is None,
        head_std=recipe.new_head_std,
        content=content,
    )
    if not args.trains:
        check_complete(report)
    lines = list(report.lines())
    if difference is not None:
        lines.append(f"--finetune {weights.label}: {difference}; the classifier is new")
    return lines


def weights_adapter(recipe: Recipe, weights: WeightsSource | None) -> AdaptWeights:
    """The recipe's function from upstream's names and shapes to the model's, after timm's for weights in its format."""
    if weights is None or weights.architecture is None:
        return recipe.adapt_weights
    return lambda state, model: recipe.adapt_weights(convert_with_timm(state, model), model)


def use_deterministic_kernels() -> None:
    """Let PyTorch refuse kernels whose result depends on timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when the GPU is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def use_unfused_attention(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Use timm's unfused attention on a CPU where PyTorch's fused kernel is slower: in bfloat16, and with a learned
    bias, which the kernel does not take.

    Args:
        dtype: autocast's; None without.
    """
    for module in model.modules():
        learned_bias = getattr(module, "relative_position_bias_table", None) is not None
        if getattr(module, "fused_attn", False) and (learned_bias or dtype is torch.bfloat16):
            module.fused_attn = False  # type: ignore[assignment]


def autocast_dtype(amp: str | None, device: torch.device) -> torch.dtype | None:
    """dtype of mixed precision; by default bfloat16 where the hardware is faster in it, else none."""
    if amp is None:
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # AVX-512's bf16 instructions alone are fast on AMD's processors; on Intel's a step of ViT-S takes 1.7 times
            # as long as in float32 with them, and AMX is needed
            capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in each release
            fast = torch.cpu._is_amx_tile_supported() or "AMD" in capabilities.get("cpu_name", "")
            native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and fast
        amp = "bf16" if native else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def compile_and_wrap_ddp(model: nn.Module, args: TrainArgs, process: Process) -> nn.Module:
    """The model as training calls it: compiled, and in DDP where there are several processes."""
    if args.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if process.world_size == 1 or not args.trains:  # there are no gradients to reduce
        return model
    ids = [process.device.index] if process.device.type == "cuda" else None
    # batch statistics are averaged at the end of each epoch instead; torch 2.15 renames the argument
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    unsynced_buffers: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **unsynced_buffers)
