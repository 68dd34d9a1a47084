"""Token drop where timm's own `patch_drop` is missing or falls short: on any module that gives tokens, on NaFlexViT."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from .masking import Mask


class TokenDrop(Mask):
    """A forward hook that leaves tokens out of a module's output (B, prefix + N, D), as timm's `PatchDropout`.

    Args:
        module: gives the tokens, with their positions added.
        prefix: number of tokens at the start that stay.
    """

    name = "token drop"

    def __init__(self, module: nn.Module, prefix: int):
        super().__init__()
        self.prefix = prefix
        self.layer = PatchDropout(0.5, num_prefix_tokens=prefix)
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """output: tokens (B, prefix + N, D), alone or first of a tuple → the same with max(1, int(N (1 - p))) of the N.

        Raises:
            ValueError: the output is no sequence of tokens.
        """
        if not (self.ratio and module.training):
            return None
        if isinstance(output, tuple) and output:
            return (self(module, inputs, output[0]), *output[1:])
        if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[1] < self.prefix + 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"tokens: {type(module).__name__} gave {shape}, not (B, {self.prefix} + N, D); name the module that "
                "gives the sequence of tokens, and their number that are no patches as prefix="
            )
        self.layer.prob = self.ratio
        return self.layer(output)


class NaFlexTokenDrop(PatchDropoutWithIndices):
    """Leaves tokens out of timm's NaFlexViT, where images of a batch differ in how many of their patches are valid.

    Each image keeps max(1, int(n (1 - p))) of its n valid patches, and padding where others keep more. Without
    padding the draws and the result are those of `PatchDropoutWithIndices`.
    """

    valid: Tensor | None = None  # (B, L), of the batch in the forward pass

    def set_valid(self, valid: Tensor | None) -> None:
        """Say which patches of the next batch are valid: (B, L), or None where all are."""
        self.valid = valid

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: (B, prefix + L, D) → (B, prefix + K, D), indices (B, K) of what was kept, prefix not counted."""
        if self.valid is None:
            return super().forward(x)
        prefix, x = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        valid, self.valid = self.valid.bool(), None
        batch, length = valid.shape
        noise = torch.randn(batch, length, device=x.device)
        order = noise.masked_fill(~valid, torch.inf).argsort(dim=1)  # the valid ones in random order, then padding
        counts = valid.sum(1, keepdim=True)
        rank = torch.arange(length, device=x.device)
        kept = rank < (counts * (1.0 - self.prob)).int().clamp(min=1)
        padding = rank >= counts
        last = torch.where(kept, 0, torch.where(padding, 1, 2)).argsort(dim=1, stable=True)
        indices = order.gather(1, last)[:, : max(1, int(length * (1.0 - self.prob)))]
        x = x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))
        return torch.cat((prefix, x), dim=1), indices


class NaFlexValid(Mask):
    """A forward pre-hook on NaFlexViT's embedding that tells the token drop which patches are valid."""

    def __init__(self, layer: NaFlexTokenDrop):
        super().__init__()
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """kwargs: `patch_valid`, (B, L) or None."""
        self.layer.set_valid(kwargs.get("patch_valid"))
