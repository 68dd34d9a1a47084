"""AugSub with accelerate on two processes, under accumulation: gradients against the equation, one all-reduce."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from common.augsub import AugSub
from tests.equation import assert_gradients, classification_gradients, free_port, gradients, set_rank
from tests.processes import build, count_reductions

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install augsub[accelerate]")
pytestmark = pytest.mark.slow
NAME = "swin_tiny_patch4_window7_224"


def step(rank: int, port: int, folder: Path) -> None:
    """Micro-batches, gradients and reductions of an accumulated step → a file of each process."""
    set_rank(rank, 2, port)
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    buckets = DistributedDataParallelKwargs(bucket_cap_mb=1000)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[buckets])
    model = build(NAME)
    augsub = AugSub(model, "masking", 0.5)
    reductions: list[int] = []
    wrapped: Any = accelerator.prepare(model)
    wrapped.register_comm_hook(reductions, count_reductions)
    generator = torch.Generator().manual_seed(rank)
    batches = [(torch.randn(2, 3, 64, 64, generator=generator), torch.tensor([i, 4])) for i in range(2)]
    torch.manual_seed(rank)
    for x, y in batches:
        with accelerator.accumulate(wrapped):
            for loss in augsub.losses(wrapped, x, y, F.cross_entropy, no_sync=lambda: accelerator.no_sync(wrapped)):
                accelerator.backward(loss)
    torch.save((batches, gradients(model), reductions), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_the_equation(tmp_path):
    mp.spawn(step, args=(free_port(), tmp_path), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = build(NAME)
    expected = classification_gradients(model, AugSub(model, "masking", 0.5), [batches for batches, _, _ in results])
    for _, got, reductions in results:
        assert_gradients(got, expected)
        assert reductions == [0]
