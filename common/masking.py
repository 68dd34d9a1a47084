"""How each architecture hides patches for AugMask.

Token drop    ViT-like models with timm's `patch_drop`: the hidden tokens are not computed.
Mask token    hierarchical models, which need their full grid: blocks of tokens become one learned vector.
Pixel blocks  convolutional models: blocks of the normalised input image become 0, the mean colour.

Source: Heo et al., "Augmenting Sub-model to Improve Main Model", arXiv 2306.11339; token drop as in timm's
`PatchDropout` (arXiv 2212.00794). A mask acts in training mode only, and only while its `ratio` is above 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 32  # side of a hidden block, in pixels: 49 blocks in an image of 224


def block_mask(
    batch: int, grid: tuple[int, int], block: tuple[int, int], ratio: float, device: torch.device | None = None
) -> Tensor:
    """Hide blocks of a grid, for each image a uniformly random set of them.

    Args:
        batch: number of images B; each gets its own set.
        grid: height and width (H, W) of the grid, in cells.
        block: height and width of a block, in cells. Blocks are aligned to the top left corner; where they do not
            divide the grid, those on the lower and right border are partial.
        ratio: share p of the n blocks to hide; n - int(n * (1 - p)) of them are hidden, and at least one is not.
            Every block is as likely as any other, so the hidden share of cells is right on average, partial blocks
            or not.

    Returns:
        (B, H, W) of bool, True where hidden.

    Raises:
        ValueError: there is only one block, so that nothing would be hidden.
    """
    rows, columns = -(-grid[0] // block[0]), -(-grid[1] // block[1])
    n = rows * columns
    if n == 1 and ratio:
        raise ValueError(
            f"one block of {block[0]} x {block[1]} covers the grid of {grid[0]} x {grid[1]}: nothing can be hidden"
        )
    hidden = torch.rand(batch, n, device=device).argsort(dim=1)[:, : n - max(1, int(n * (1 - ratio)))]
    mask = torch.zeros(batch, n, dtype=torch.bool, device=device).scatter_(1, hidden, True)
    mask = mask.view(batch, rows, columns)
    mask = mask.repeat_interleave(block[0], dim=1).repeat_interleave(block[1], dim=2)
    return mask[:, : grid[0], : grid[1]]


class BlockMask:
    """A mask that hangs on a module of the model as a hook and hides blocks while `ratio` is above 0.

    Args:
        model: the model to hang it on.
        block: side of a hidden block, in pixels.
    """

    name: str

    def __init__(self, model: nn.Module, block: int = BLOCK):
        self.ratio = 0.0  # an attribute of the instance from the start: torch.compile guards on where it finds it
        self.block = block
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Hangs the mask on the model."""
        raise NotImplementedError

    @classmethod
    def on(cls, model: nn.Module, block: int = BLOCK) -> BlockMask:
        """The mask of this kind on `model`: the one that hangs there already, or a new one."""
        for module in model.modules():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if isinstance(hook, cls):
                    hook.block = block
                    return hook
        return cls(model, block)


class TokenMask(BlockMask):
    """Replaces blocks of tokens after the patch embedding by one learned `mask_token` of (1, 1, C).

    The token is a parameter of the model itself, initialised trunc-normal with std 0.02 and to be left out of weight
    decay. The image keeps its size, so the sub pass costs as much as the main pass.

    Raises:
        ValueError: the model has no patch embedding.
    """

    name = "mask token"

    def attach(self, model: nn.Module) -> None:
        embed = patch_embedding(model)
        if embed is None:
            raise ValueError(f"{type(model).__name__} has no patch embedding, so there are no tokens to mask")
        self.model: Any = model
        width = [weight.shape[0] for weight in embed.parameters() if weight.ndim == 4][-1]
        model.mask_token = nn.Parameter(torch.empty(1, 1, width).to(next(model.parameters())))
        nn.init.trunc_normal_(model.mask_token, std=0.02)
        embed.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        """output: tokens (B, H, W, C), (B, C, H, W) or (B, H*W, C), alone or first of several; its like comes back."""
        if not (self.ratio and module.training):
            return None
        if isinstance(output, tuple):
            return (self.hide(module, inputs[0], output[0], self.ratio), *output[1:])
        return self.hide(module, inputs[0], output, self.ratio)

    def hide(self, embed: nn.Module, images: Tensor, tokens: Tensor, ratio: float) -> Tensor:
        """The tokens that `embed` made of images (B, 3, H, W), with a share of the blocks replaced."""
        token = self.model.mask_token.to(tokens.dtype)
        height, width = images.shape[-2:]
        layout = getattr(embed, "output_fmt", "NCHW" if tokens.shape[1] == token.shape[-1] else "NHWC")
        channels_first = tokens.ndim == 4 and layout == "NCHW"
        if tokens.ndim == 3:  # the grid has the image's proportions
            rows = round((tokens.shape[1] * height / width) ** 0.5)
            grid = rows, tokens.shape[1] // rows
        else:
            grid = (tokens.shape[2], tokens.shape[3]) if channels_first else (tokens.shape[1], tokens.shape[2])
        block = max(1, round(self.block * grid[0] / height)), max(1, round(self.block * grid[1] / width))
        mask = block_mask(len(tokens), grid, block, ratio, tokens.device)
        if tokens.ndim == 3:
            return torch.where(mask.flatten(1)[..., None], token, tokens)
        if channels_first:
            return torch.where(mask[:, None], token.mT[..., None], tokens)
        return torch.where(mask[..., None], token, tokens)


class PixelMask(BlockMask):
    """Sets blocks of the normalised input to 0 before the model sees it; works on any image model."""

    name = "pixel blocks"

    def attach(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """inputs[0]: images (B, 3, H, W); the same shape comes back."""
        if not (self.ratio and module.training):
            return None
        x, *rest = inputs
        return (self.hide(x, self.ratio), *rest)

    def hide(self, x: Tensor, ratio: float) -> Tensor:
        """x: images (B, 3, H, W), with a share of the blocks set to 0, in autocast's type."""
        x = in_autocast_type(x)
        mask = block_mask(len(x), (x.shape[-2], x.shape[-1]), (self.block, self.block), ratio, x.device)
        return x.masked_fill(mask[:, None], 0)


def in_autocast_type(images: Tensor) -> Tensor:
    """Images for a copy of them to be made: in float32 it would lie there during the whole pass, and under autocast the
    first layer makes its own type of them anyway.
    """
    kind = images.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return images.to(torch.get_autocast_dtype(kind))
    return images


def patch_embedding(model: nn.Module) -> nn.Module | None:
    """The module that turns the image into a grid of tokens, where the model has one that knows its patch size."""
    embed = getattr(model, "patch_embed", None)
    return embed if isinstance(embed, nn.Module) and hasattr(embed, "patch_size") else None
