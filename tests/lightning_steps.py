"""A step in Lightning, which records its batches, gradients and reductions; run under torchrun by test_lightning.py.

torchrun --nproc-per-node 2 -m tests.lightning_steps FOLDER
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from common.augsub import AugSub
from tests.equation import gradients
from tests.processes import build, count_reductions

NAME = "swin_tiny_patch4_window7_224"  # gains a mask token, which the main pass does not use


class Automatic(lightning.LightningModule):
    """Both passes in one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build(NAME)
        self.augsub = AugSub(self.model, "masking", 0.5)
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.gradients: dict[str, Tensor] = {}
        self.reductions: list[int] = []

    def on_train_start(self) -> None:
        """Start the draws and the count of reductions."""
        torch.manual_seed(self.global_rank)
        ddp: Any = self.trainer.strategy.model
        if hasattr(ddp, "register_comm_hook"):
            ddp.register_comm_hook(self.reductions, count_reductions)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss."""
        self.batches.append(tuple(batch))
        images, labels = batch
        return self.augsub.step(self.model, images, labels, F.cross_entropy).loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the gradients."""
        self.gradients = gradients(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, made after AugSub."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Manual(Automatic):
    """A backward for each pass, of which the second reduces the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take the step."""
        self.batches.append(tuple(batch))
        images, labels = batch
        for loss in self.augsub.losses(self.model, images, labels, F.cross_entropy, no_sync=self.no_sync()):
            self.manual_backward(loss)
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()

    def no_sync(self) -> Any:
        """Return what keeps gradients from being reduced."""
        return getattr(self.trainer.strategy, "block_backward_sync", contextlib.nullcontext)


class ManualReducedTwice(Manual):
    """A backward for each pass, each of which reduces the gradients."""

    def no_sync(self) -> Any:
        """Leave it to AugSub, which does not see Lightning's DDP."""
        return None


def main(folder: str) -> None:
    """Take one optimizer step of each kind and save what it was made of."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(8, 3, 64, 64, generator=generator), torch.arange(8) % 5)
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    results = {}
    for kind in (Automatic, Manual, ManualReducedTwice):
        module = kind()
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=lightning.pytorch.strategies.DDPStrategy(bucket_cap_mb=1000),
            max_steps=1,
            accumulate_grad_batches=2 if kind is Automatic else 1,
            **settings,
        )
        trainer.fit(module, DataLoader(data, batch_size=2))
        results[kind.__name__] = module.batches, module.gradients, module.reductions
    torch.save(results, Path(folder) / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
