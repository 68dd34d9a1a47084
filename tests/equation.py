"""What the tests of integrations compare with: the method's equation, written out in one graph."""

import os
import socket
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch, with probabilities as target (B, K)."""
    return -(target * logits.log_softmax(1)).sum(1).mean()


def two_passes(augsub: Any, compute: Any) -> tuple[Any, Any]:
    """What `compute` gives of the main model, then of the sub-model, with the draws of a step."""
    main = compute()
    with augsub.sub_model():
        return main, compute()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def classification_gradients(
    model: nn.Module, augsub: Any, shares: list[list[tuple[Tensor, Tensor]]]
) -> dict[str, Tensor]:
    """Gradients of the joined batch with cross-entropy; `shares` are the micro-batches of each process.

    A process has its rank as the seed.
    """
    total = sum(len(y) for share in shares for _, y in share)
    losses = []
    for rank, share in enumerate(shares):
        torch.manual_seed(rank)
        for x, y in share:
            main, sub = two_passes(augsub, lambda x=x: model(x))
            loss = F.cross_entropy(main, y) + soft_cross_entropy(sub, main.detach().softmax(1))
            losses.append(loss / 2 * len(y) / total)
    torch.stack(losses).sum().backward()
    return gradients(model)


def assert_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and got
    for name, gradient in got.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale + 1e-8, msg=name)


def set_rank(rank: int, world: int, port: int) -> None:
    """What torchrun tells a process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
