"""A training script in the order of timm's train.py: model, task, optimizer, resume, EMA, compile, DDP, loop, saver.

`python -m augsub.integrations.timm_train tests/timm_loop.py --augsub masking …` runs it in tests, and under torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, init_distributed_device

SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 8},
}


def main() -> None:
    """Train for two updates of two micro-batches, save, and print losses and the keys of the checkpoint as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--output", required=True)
    parser.add_argument("--resume", default="")
    parser.add_argument("--optimizer-first", action="store_true", help="as a train.py does whose model gains nothing")
    args = parser.parse_args()
    args.device = "cpu"
    device = init_distributed_device(args)

    torch.manual_seed(0)
    model = timm.create_model(args.model, img_size=64, num_classes=5, **SIZES[args.model])
    options: dict[str, Any] = {"opt": args.opt, "lr": 1e-3, "weight_decay": 0.05}
    early = create_optimizer_v2(model, **options) if args.optimizer_first else None
    task = ClassificationTask(model, LabelSmoothingCrossEntropy(0.1), device=device, verbose=args.rank == 0)
    optimizer = early or create_optimizer_v2(task.get_trainable_module(), **options)
    if args.resume:
        resume_task_checkpoint(task, args.resume, optimizer)
    task.setup_ema(decay=0.9)
    if args.resume:
        load_task_ema_checkpoint(task, args.resume)
    if args.distributed:
        task.prepare_distributed()
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, args=args, task=task, checkpoint_dir=args.output, max_history=1
    )

    task.train()
    losses = []
    for update in range(2):
        for last in (False, True):
            generator = torch.Generator().manual_seed(10 * update + last + 100 * args.rank)
            x, y = torch.randn(4, 3, 64, 64, generator=generator), torch.randint(5, (4,), generator=generator)
            with nullcontext() if last else task.no_sync():
                result = task(x, y)
                (result["loss"] / 2).backward()
        losses.append(result["loss"].item())
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=update)
    if args.rank == 0:
        saver.save_checkpoint(0, metric=0.0)
        saved = torch.load(Path(args.output) / "last.pth.tar", weights_only=False)
        print(json.dumps({"losses": losses, "results": list(result), "isinstance": isinstance(task, ClassificationTask),
                          "task_state": list(saved.get("task_state", {})), "weights": list(saved["state_dict"]),
                          "processes": int(os.environ.get("WORLD_SIZE", 1))}))  # fmt: skip


if __name__ == "__main__":
    main()
