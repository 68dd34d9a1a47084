"""Main and sub-model in one forward: what they have in common is computed once, and the rest as one larger batch.

It pays where a pass alone is too small to fill the device, for the memory of both graphs. The gradients are those of
two passes, to rounding, since nothing mixes images or the two models:

Packed tokens   token drop: behind each image's tokens lie those that the sub-model sees of it, and attention stays
                within either.
Doubled batch   any other drop: the second half of the batch is the sub-model's.

Where a mask hides patches they are embedded once for both. Not for models with batch norm, whose statistics are of each
pass's own.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, DropPath, PatchDropout, drop_path
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from common.augsub import AugSub
from common.masking import BlockMask, PixelMask, TokenMask, in_autocast_type, patch_embedding


def join(augsub: AugSub, model: nn.Module) -> nn.Module | None:
    """The module that computes both passes of a model at once; `augsub.losses` takes it in the model's place from here
    on, bare, compiled or in DDP, and its losses must be summed for one backward. None where the model has none.

    Args:
        augsub: made from `model`.
    """
    if not augsub.switches or any(map(_computed_apart, model.modules())):
        return None
    if augsub.drop == "token drop":
        if not _packs(model):
            return None
        augsub.joined = "packed tokens"
        return PackedTokens(model, augsub.ratio)
    augsub.joined = "doubled batch"
    return DoubledBatch(model, augsub)


def _computed_apart(module: nn.Module) -> bool:
    """Whether a module needs its passes one by one: for their statistics, or to compute them again in backward."""
    return isinstance(module, nn.modules.batchnorm._NormBase) or bool(getattr(module, "grad_checkpointing", False))


def _packs(model: nn.Module) -> bool:
    """Whether it is a vision transformer whose forward is timm's own throughout."""
    return (
        isinstance(model, VisionTransformer)
        and all(getattr(type(model), name) is getattr(VisionTransformer, name)
                for name in ("forward", "forward_features", "forward_head"))
        and isinstance(model.patch_drop, PatchDropout)
        and all(type(block) is Block and type(block.attn) is Attention for block in model.blocks)
    )  # fmt: skip


class PackedTokens(nn.Module):
    """images (B, 3, H, W) → logits of main and sub-model, each (B, K).

    Args:
        model: a plain vision transformer of timm's.
        ratio: share of the patches that the sub-model does not see.
    """

    def __init__(self, model: VisionTransformer, ratio: float):
        super().__init__()
        self.model, self.ratio = model, ratio

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        tokens = model._pos_embed(model.patch_embed(x))
        kept, _ = patch_dropout_forward(tokens, self.ratio, model.num_prefix_tokens, False, model.training)
        parts = model.patch_drop(tokens), kept
        lengths = [part.shape[1] for part in parts]
        x = model.norm_pre(torch.cat(parts, dim=1))  # (B, L + L', D)
        for block in model.blocks:
            x = x + _each(block.drop_path1, block.ls1(_attention(block.attn, block.norm1(x), lengths)), lengths)
            x = x + _each(block.drop_path2, block.ls2(block.mlp(block.norm2(x))), lengths)
        main, sub = model.norm(x).split(lengths, dim=1)
        return model.forward_head(main), model.forward_head(sub)


def _each(layer: nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    """Stochastic depth drawn for main and sub-model apart; x: (B, L + L', D)."""
    if not (isinstance(layer, DropPath) and layer.drop_prob and layer.training):
        return x
    return torch.cat([layer(part) for part in x.split(lengths, dim=1)], dim=1)


def _attention(attention: Attention, x: Tensor, lengths: list[int]) -> Tensor:
    """timm's attention over the first L of x: (B, L + L', D), and apart from it over the others."""
    batch, length, _ = x.shape
    qkv = attention.qkv(x).view(batch, length, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B, heads, L + L', D / heads)
    q, k = attention.q_norm(q), attention.k_norm(k)
    apart = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2))
    found = [_attend(attention, q, k, v) for q, k, v in apart]
    mixed = attention.norm(torch.cat(found, dim=2).transpose(1, 2).flatten(2))
    if attention.gate is not None:
        mixed = mixed * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(mixed))


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, each (B, heads, L, D), in one kernel or in the open as the model has it."""
    if attention.fused_attn:
        drop = attention.attn_drop.p if attention.training else 0.0
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=drop)
    return attention.attn_drop((q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v


class DoubledBatch(nn.Module):
    """images (B, 3, H, W) → logits of main and sub-model, each (B, K).

    Hooks on the model's own modules change the second half of what they make, while a forward through here lasts.

    Args:
        model: any model whose modules keep the images of a batch in their order.
        augsub: made from it.
    """

    def __init__(self, model: nn.Module, augsub: AugSub):
        super().__init__()
        self.model, self.ratio, self.on = model, augsub.ratio, False
        self.mask: BlockMask | None = None
        for switch in augsub.switches:
            if isinstance(switch.module, BlockMask):
                self.mask = switch.module
            else:
                switch.module.register_forward_hook(self._drop)
        if isinstance(self.mask, TokenMask):
            patch_embedding(model).register_forward_hook(self._hide)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(self.mask, TokenMask):  # which doubles the tokens
            x = in_autocast_type(x)
            masked = isinstance(self.mask, PixelMask) and self.model.training
            x = torch.cat([x, self.mask.hide(x, self.ratio) if masked else x])  # type: ignore[union-attr]
        self.on = True
        try:
            main, sub = self.model(x).chunk(2)
        finally:
            self.on = False
        return main, sub

    def _hide(self, embed: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        if not self.on:
            return None
        tokens, *rest = output if isinstance(output, tuple) else (output,)
        assert isinstance(self.mask, TokenMask)
        hidden = self.mask.hide(embed, inputs[0], tokens, self.ratio) if embed.training else tokens
        both = torch.cat([tokens, hidden])
        return (both, *rest) if isinstance(output, tuple) else both

    def _drop(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not (self.on and layer.training):
            return None
        sub = inputs[0].chunk(2)[1]
        if isinstance(layer, DropPath):
            return torch.cat([output.chunk(2)[0], drop_path(sub, self.ratio, True, layer.scale_by_keep)])
        return torch.cat([output.chunk(2)[0], functional.dropout(sub, self.ratio)])
