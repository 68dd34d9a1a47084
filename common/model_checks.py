"""Checks of a model before it trains: the size of its images, batch norm with one image, a mask that hides nothing."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.augsub import AugSub
from common.cosub import CoSub
from common.distributed import Process
from common.masking import PixelMask, TokenMask, count_blocks
from common.train_args import TrainArgs


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def check_batch_norm(model: nn.Module, args: TrainArgs, process: Process) -> None:
    """Refuse to train with one image a batch where batch norm would have one value per channel, on a map of 1x1 pixels.

    Raises:
        ValueError: names the layer.
    """
    synchronized = args.sync_bn and process.world_size > 1
    if args.batch_size > 1 or synchronized or not (args.trains and args.train_mode and has_batch_norm(model)):
        return
    single: list[str] = []  # layers with one value per channel

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            single.append(name)

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    hooks = [layer.register_forward_pre_hook(partial(record, name)) for name, layer in layers]
    check_input_size(model, args, process.device)
    for hook in hooks:
        hook.remove()
    if single:
        raise ValueError(
            f"--batch-size 1: batch norm {single[0]} has one value per channel at --input-size {args.input_size}; use "
            "--batch-size 2 or more"
        )


@torch.no_grad()
def check_input_size(model: nn.Module, args: TrainArgs, device: torch.device) -> None:
    """Try the model on one blank image.

    Raises:
        ValueError: it takes no images of this size.
    """
    training = model.training
    model.eval()
    try:
        model(torch.zeros(1, 3, args.input_size, args.input_size, device=device))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--input-size {args.input_size}: not accepted by --model {args.model} ({error})") from error
    finally:
        model.train(training)


def check_mask(augsub: AugSub | CoSub, model: nn.Module, args: TrainArgs) -> None:
    """Refuse a mask that would hide nothing, since at least one block or token always stays.

    Raises:
        ValueError: names the flag and a value that works.
    """
    if not isinstance(augsub, AugSub) or augsub.kind != "masking" or not args.augsub_ratio:
        return
    size = args.input_size
    if augsub.drop in (TokenMask.name, PixelMask.name) and args.augsub_block >= size:
        raise ValueError(
            f"--augsub-block {args.augsub_block}: covers the whole image of {size} pixels, so that masking hides "
            f"nothing; use --augsub-block {max(1, size // 4)}"
        )
    blocks = count_blocks((size, size), (args.augsub_block, args.augsub_block))
    if augsub.drop == PixelMask.name and int(blocks * args.augsub_ratio) == 0:
        raise ValueError(
            f"--augsub-ratio {args.augsub_ratio}: less than one of {blocks} blocks, so that masking hides nothing; use "
            f"--augsub-ratio {math.ceil(1000 / blocks) / 1000}"
        )
    if getattr(getattr(model, "patch_embed", None), "num_patches", None) == 1:
        raise ValueError(
            f"--input-size {size}: one patch of {args.model}, so that masking hides nothing; use a larger one"
        )
