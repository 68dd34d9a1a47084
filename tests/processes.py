"""Several real processes over gloo: what the tests of `test_processes.py` run in each of them."""

from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.augsub import AugSub
from common.masking import block_mask
from mae import models as mae_models  # noqa: F401 - registers vit_pico_patch8

SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 8, "num_classes": 5}
VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL: dict[str, dict[str, Any]] = {
    "deit3_small_patch16_224": VIT,
    "vit_pico_patch8": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "resnet18": {"layers": (1, 1, 1, 1), "num_classes": 5},
}
CASES = [(name, kind, parts, one_backward) for name in SMALL
         for kind in ("none", "masking") for parts in (1, 3) for one_backward in (False, True)]  # fmt: skip
BATCH = 12


def build(name: str) -> nn.Module:
    """The same small model in every process."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, drop_path_rate=0.0, **SMALL[name])
    return model.train()


def joined_batch(name: str) -> tuple[Tensor, Tensor]:
    """All processes' images and labels. A model with batch statistics gets the same two images again and again, so
    that every process's share has the joined batch's statistics: SyncBatchNorm, which would see to that, needs GPUs."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(BATCH, 3, 64, 64, generator=generator), torch.arange(BATCH) % 5
    return (x[:2].repeat(BATCH // 2, 1, 1, 1), y[:2].repeat(BATCH // 2)) if name.startswith("resnet") else (x, y)


def same_mask_for_all(model: nn.Module) -> None:
    """Make the drop hide the same patches of every image, so that it does not matter which process draws them."""
    import common.masking as masking

    masking.block_mask = lambda batch, *rest: block_mask(1, *rest).expand(batch, -1, -1)
    if hasattr(model, "patch_drop"):
        model.patch_drop.forward = lambda x: x[:, :33] if getattr(model.patch_drop, "prob", 0) else x  # type: ignore[union-attr]


def gradients(
    model: nn.Module, called: nn.Module, augsub: AugSub, x: Tensor, y: Tensor, parts: int, one_backward: bool = False
) -> dict[str, Tensor]:
    """Gradients of one update from `parts` micro-batches, by a backward for each loss or one for their sum.

    Args:
        model: the bare module, whose gradients are returned.
        called: `model` itself, or the DDP module around it.
    """
    for part, (images, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts)), start=1):
        torch.manual_seed(5)
        losses = augsub.losses(called, images, labels, F.cross_entropy, sync=part == parts)
        for loss in [torch.stack(list(losses)).sum()] if one_backward else losses:
            (loss / parts).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_reductions(state: list[int], bucket: torch_dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook for DDP that averages as it does and notes each bucket."""
    state.append(bucket.index())
    work = torch_dist.all_reduce(bucket.buffer().div_(torch_dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def ddp_steps(
    rank: int, world: int, folder: Path, cases: list[tuple[str, str, int, bool]] = CASES, ratio: float = 0.5
) -> None:
    """Gradients and the number of all-reduces of a DDP step in each case → a file of the first process."""
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = {}
    for name, kind, parts, one_backward in cases:
        model = build(name)
        augsub = AugSub(model, kind, ratio)
        same_mask_for_all(model)
        ddp = DistributedDataParallel(model, bucket_cap_mb=1000)
        rounds: list[int] = []
        ddp.register_comm_hook(rounds, count_reductions)
        x, y = joined_batch(name)
        # micro-batch m of all processes together is micro-batch m of the joined batch
        share = [torch.arange(BATCH).chunk(parts)[part].chunk(world)[rank] for part in range(parts)]
        mine = torch.cat(share)
        got = gradients(model, ddp, augsub, x[mine], y[mine], parts, one_backward)
        results[name, kind, parts, one_backward] = got, list(rounds)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch_dist.barrier()
    torch_dist.destroy_process_group()
