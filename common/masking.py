"""How each architecture hides patches for AugMask.

Token drop    ViT-like models, through timm's `patch_drop` or a hook: the hidden tokens are not computed.
Mask token    hierarchical models, which need their full grid: blocks of tokens become one learned vector.
Pixel blocks  any other model: blocks of the normalised input become 0, the mean colour.

Source: Heo et al., "Augmenting Sub-model to Improve Main Model", arXiv 2306.11339; token drop as in timm's
`PatchDropout` (arXiv 2212.00794). A mask acts in training mode only, and only while its `ratio` is above 0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 32  # side of a hidden block, in pixels: 49 blocks in an image of 224


def count_blocks(grid: tuple[int, int], block: tuple[int, int]) -> int:
    """Blocks in a grid, partial ones included; both by height and width, in cells."""
    return -(-grid[0] // block[0]) * -(-grid[1] // block[1])


def block_mask(
    batch: int, grid: tuple[int, int], block: tuple[int, int], hidden: int, device: torch.device | None = None
) -> Tensor:
    """Draw which blocks of a grid to hide, for each image a uniformly random set of them.

    Args:
        batch: number of images B; each gets its own set.
        grid: height and width (H, W) of the grid, in cells.
        block: height and width of a block, in cells. Blocks are aligned to the top left corner; where they do not
            divide the grid, those on the lower and right border are partial.
        hidden: number of blocks to hide. Every block is as likely as any other, so the hidden share of cells is right
            on average, partial blocks or not.

    Returns:
        (B, H, W) of bool, True where hidden.
    """
    rows, columns = -(-grid[0] // block[0]), -(-grid[1] // block[1])
    n = rows * columns
    chosen = torch.rand(batch, n, device=device).argsort(dim=1)[:, :hidden]
    mask = torch.zeros(batch, n, dtype=torch.bool, device=device).scatter_(1, chosen, True)
    mask = mask.view(batch, rows, columns)
    mask = mask.repeat_interleave(block[0], dim=1).repeat_interleave(block[1], dim=2)
    return mask[:, : grid[0], : grid[1]]


class Mask:
    """A hook on a module of the model that hides patches while `ratio` is above 0."""

    name: str

    def __init__(self) -> None:
        self.ratio = 0.0  # on the instance from the start: torch.compile guards on where it reads an attribute

    def __deepcopy__(self, memo: dict[int, Any]) -> Mask:
        """Copy the mask with the model that it is a hook of, where `__reduce__` would leave nothing of it."""
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a hook that does nothing, so that a pickled model loads without this package."""
        return getattr, (nullcontext(), "__exit__")


class BlockMask(Mask):
    """A hook that hides blocks of a grid.

    Args:
        model: the model to register the hook on.
        block: side of a hidden block, in pixels.
    """

    def __init__(self, model: nn.Module, block: int = BLOCK):
        super().__init__()
        if block < 1:
            raise ValueError(f"block {block} is below 1; give the side of a hidden block in pixels")
        self.block = block
        self.uses_token_always = False  # a mask token is part of the main pass's graph too, with weight 0
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Register the hook."""
        raise NotImplementedError

    def count_hidden(self, blocks: int) -> int:
        """Return how many of so many blocks are hidden; at least one is not."""
        raise NotImplementedError

    def use_token_always(self) -> None:
        """Have a mask token in the graph of the main pass too, with weight 0."""
        self.uses_token_always = True

    def block_in(self, grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of a block in cells of the grid of an image of this size in pixels."""
        return max(1, round(self.block * grid[0] / size[0])), max(1, round(self.block * grid[1] / size[1]))

    def draw(self, batch: int, grid: tuple[int, int], block: tuple[int, int], device: torch.device) -> Tensor:
        """Draw what to hide, as `block_mask`.

        Raises:
            ValueError: nothing would be hidden, since the ratio of so few blocks is less than one.
        """
        blocks = count_blocks(grid, block)
        hidden = self.count_hidden(blocks)
        if self.ratio and not hidden:
            raise ValueError(
                f"a ratio of {self.ratio} of {blocks} blocks of {block[0]} x {block[1]} in a grid of {grid[0]} x "
                f"{grid[1]}: nothing can be hidden; pass a smaller block= than {self.block} pixels, or a higher ratio"
            )
        return block_mask(batch, grid, block, hidden, device)

    @classmethod
    def on(cls, model: nn.Module, block: int = BLOCK) -> BlockMask:
        """Return the mask of this kind on `model`: the one that is registered already, or a new one."""
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

    Args:
        model: gains the token.
        block: side of a hidden block, in pixels.
        embed: gives the patches of the images that it gets; the model's `patch_embed` where it is None.
        layout: "NHWC" or "NCHW", where the module does not show it itself.

    Raises:
        ValueError: the model has no patch embedding, or already has a `mask_token`.
    """

    name = "mask token"

    def __init__(self, model: nn.Module, block: int = BLOCK, embed: nn.Module | None = None, layout: str = ""):
        self.embed, self.layout = embed, layout
        super().__init__(model, block)

    def attach(self, model: nn.Module) -> None:
        embed = patch_embedding(model) if self.embed is None else self.embed
        if embed is None:
            raise ValueError(f"{type(model).__name__} has no patch embedding, so there are no tokens to mask")
        widths = [weight.shape[0] for weight in embed.parameters() if weight.ndim == 4]
        if not widths:
            raise ValueError(
                f"patches: {type(embed).__name__} has no convolution that tells the width of its patches; name the "
                "module that turns images into patches"
            )
        if getattr(model, "mask_token", None) is not None:
            raise ValueError(f"patches: {type(model).__name__} has a mask_token already, for another purpose")
        self.model: Any = model
        width = widths[-1]
        model.mask_token = nn.Parameter(torch.empty(1, 1, width).to(next(model.parameters())))
        nn.init.trunc_normal_(model.mask_token, std=0.02)
        embed.register_forward_hook(self)

    def count_hidden(self, blocks: int) -> int:
        """The published n - int(n * (1 - p)): 25 of 49 at p = 0.5."""
        return blocks - max(1, int(blocks * (1 - self.ratio)))

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        """output: tokens (B, H, W, C), (B, C, H, W) or (B, H*W, C), alone or first of a tuple → the same, masked."""
        if not module.training or not (self.ratio or self.uses_token_always):
            return None
        if not inputs:
            raise ValueError(f"patches: {type(module).__name__} got its images by keyword; pass them by position")
        change = self.hide if self.ratio else self.use_token
        if isinstance(output, tuple):
            return (change(module, inputs[0], output[0]), *output[1:])
        return change(module, inputs[0], output)

    def use_token(self, embed: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
        """Return the tokens as they are, with the mask token in their graph."""
        return tokens + 0.0 * self.model.mask_token.sum().to(tokens.dtype)

    def hide(self, embed: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
        """Replace a share of the blocks of the tokens that `embed` made of images (B, 3, H, W)."""
        if self.embed is not None:
            self.check_patches(embed, images, tokens)
        token = self.model.mask_token.to(tokens.dtype)
        height, width = images.shape[-2:]
        layout = self.layout or getattr(embed, "output_fmt", "NCHW" if tokens.shape[1] == token.shape[-1] else "NHWC")
        channels_first = tokens.ndim == 4 and layout == "NCHW"
        if tokens.ndim == 3:  # the grid has the image's proportions
            rows = round((tokens.shape[1] * height / width) ** 0.5)
            grid = rows, tokens.shape[1] // rows
        else:
            grid = (tokens.shape[2], tokens.shape[3]) if channels_first else (tokens.shape[1], tokens.shape[2])
        mask = self.draw(len(tokens), grid, self.block_in(grid, (height, width)), tokens.device)
        if tokens.ndim == 3:
            return torch.where(mask.flatten(1)[..., None], token, tokens)
        if channels_first:
            return torch.where(mask[:, None], token.mT[..., None], tokens)
        return torch.where(mask[..., None], token, tokens)

    def check_patches(self, embed: nn.Module, images: Tensor, patches: Tensor) -> None:
        """Refuse what a module gives that the user named, where it does not show its grid.

        Raises:
            ValueError: it did not get images, or the channels of its output are not to be told.
        """
        width, name = self.model.mask_token.shape[-1], type(embed).__name__
        if images.ndim != 4 or patches.ndim not in (3, 4) or width not in (patches.shape[1], patches.shape[-1]):
            raise ValueError(
                f"patches: {name} made {tuple(patches.shape)} of {tuple(images.shape)}; name the module that turns "
                f"images (B, C, H, W) into a grid of patches of {width} channels"
            )
        shown = self.layout or hasattr(embed, "output_fmt") or isinstance(embed, nn.Conv2d)
        if patches.ndim == 4 and patches.shape[1] == patches.shape[-1] and not shown:
            raise ValueError(
                f"patches: {name} gave {tuple(patches.shape)}, the channels of which may be first or last; set its "
                'attribute output_fmt to "NCHW" or "NHWC"'
            )


class EmbeddingMask(BlockMask):
    """Has transformers' Swin embeddings put their own `mask_token` in place of blocks, by `bool_masked_pos`.

    The token is made where there is none, as `TokenMask`'s.
    """

    name = TokenMask.name
    count_hidden = TokenMask.count_hidden

    def attach(self, model: nn.Module) -> None:
        embed: Any = model
        self.added: nn.Parameter | None = None
        if embed.mask_token is None:
            weight = embed.patch_embeddings.projection.weight
            self.added = embed.mask_token = nn.Parameter(torch.empty(1, 1, len(weight)).to(weight))
            nn.init.trunc_normal_(embed.mask_token, std=0.02)
        embed.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """args[0]: images (B, C, H, W) → the same arguments, with `bool_masked_pos` (B, N).

        Raises:
            ValueError: the model was given a `bool_masked_pos`.
        """
        if not module.training or not (self.ratio or self.uses_token_always):
            return None
        images: Tensor = args[0]
        if len(args) > 1 or kwargs.get("bool_masked_pos") is not None:
            raise ValueError("bool_masked_pos: AugSub draws which patches are hidden; leave it out")
        embed: Any = module
        patch = embed.patch_embeddings.patch_size
        height, width = images.shape[-2:]
        grid = -(-height // patch[0]), -(-width // patch[1])  # the border is padded to whole patches
        block = max(1, round(self.block / patch[0])), max(1, round(self.block / patch[1]))
        if self.ratio:
            mask = self.draw(len(images), grid, block, images.device)
        else:
            mask = torch.zeros(len(images), *grid, dtype=torch.bool, device=images.device)
        return args, {**kwargs, "bool_masked_pos": mask.flatten(1)}


class PixelMask(BlockMask):
    """Sets blocks of the normalised input to 0 before the model sees it; works on any image model.

    The images are the floating-point tensors of four dimensions or more among the model's arguments, as they are or in
    tuples, lists and mappings; where `pixel_values` is one of them, that one alone. Of a video (B, C, T, H, W) or
    (B, T, C, H, W) or a volume the same blocks are hidden in each frame or slice; of several inputs the same in each.
    """

    name = "pixel blocks"

    def attach(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self, with_kwargs=True)

    def count_hidden(self, blocks: int) -> int:
        """int(n * p): the published 24 of 49 at p = 0.5."""
        return min(blocks - 1, int(blocks * self.ratio))

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """args, kwargs: with images (B, C, H, W) → the same with masked copies of them.

        Raises:
            ValueError: there are no images, or several of different sizes.
        """
        if not (self.ratio and module.training):
            return None
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and _is_image(args[0]):
            return (self.hide(args[0]),), kwargs  # in one graph of torch.compile
        images = _find_images((args, kwargs))
        if not images:
            raise ValueError(
                f"pixel blocks: {type(module).__name__} got no images (B, C, H, W) of floating point; give them "
                "normalised, or name the module that gives the tokens as tokens="
            )
        sizes = {(len(x), *x.shape[-2:]) for x in images}
        if len(sizes) > 1:
            raise ValueError(
                f"pixel blocks: {type(module).__name__} got images of several sizes, {sorted(sizes)}; name the module "
                "that gives the tokens as tokens=, or that of the patches as patches="
            )
        narrow = [to_autocast_dtype(x) for x in images]
        mask = self.draw_for(narrow[0])
        masked = [fill_hidden(x, mask) for x in narrow]
        return _replace((args, kwargs), {id(x): y for x, y in zip(images, masked)})

    def draw_for(self, x: Tensor) -> Tensor:
        """Draw what to hide of images x (B, ..., H, W) → (B, H, W)."""
        return self.draw(len(x), (x.shape[-2], x.shape[-1]), (self.block, self.block), x.device)

    def hide(self, x: Tensor) -> Tensor:
        """Set a share of the blocks of images x (B, ..., H, W) to 0, in a copy of autocast's dtype."""
        x = to_autocast_dtype(x)
        return fill_hidden(x, self.draw_for(x))


def fill_hidden(x: Tensor, mask: Tensor) -> Tensor:
    """Return x (B, ..., H, W) with 0 where mask (B, H, W) is True."""
    between = (None,) * (x.ndim - 3)
    return x.clone().masked_fill_(mask[(slice(None), *between)], 0)  # out of place it would lose channels_last


def _find_images(inputs: Any) -> list[Tensor]:
    """List the images among a model's inputs, each once."""
    tensors = [(name, x) for name, x in _walk("", inputs) if _is_image(x)]
    named = [x for name, x in tensors if name in ("pixel_values", "pixel_values_videos")]
    return list({id(x): x for x in named or [x for _, x in tensors]}.values())


def _is_image(x: Tensor) -> bool:
    """Return whether x is (B, C, H, W) or of more dimensions.

    Raises:
        ValueError: its channels are last.
    """
    if x.ndim >= 4 and x.shape[-1] <= 4 < x.shape[-3]:
        raise ValueError(
            f"pixel blocks: images of {tuple(x.shape)} have their channels last; give (B, C, H, W), or name the "
            "module that gives the tokens as tokens="
        )
    return x.ndim >= 4 and x.is_floating_point()


def _walk(name: str, inputs: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(inputs, Tensor):
        yield name, inputs
    elif isinstance(inputs, Mapping):
        for key, value in inputs.items():
            yield from _walk(str(key), value)
    elif isinstance(inputs, (tuple, list)):
        for value in inputs:
            yield from _walk(name, value)


def _replace(inputs: Any, replaced: dict[int, Tensor]) -> Any:
    """Copy tuples, lists and mappings with some of their tensors replaced, by id."""
    if isinstance(inputs, Tensor):
        return replaced.get(id(inputs), inputs)
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(_replace(value, replaced) for value in inputs))
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_replace(value, replaced) for value in inputs)
    if type(inputs) is dict:
        return {key: _replace(value, replaced) for key, value in inputs.items()}
    if isinstance(inputs, Mapping):
        changed: Any = copy.copy(inputs)
        for key, value in inputs.items():
            changed[key] = _replace(value, replaced)
        return changed
    return inputs


def to_autocast_dtype(images: Tensor) -> Tensor:
    """Cast images to autocast's dtype, where it is on.

    The first layer would cast them anyway, and a masked copy in float32 would take memory during the whole pass.
    """
    kind = images.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return images.to(torch.get_autocast_dtype(kind))
    return images


def patch_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that turns the image into a grid of tokens, if the model has one with a patch size."""
    embed = getattr(model, "patch_embed", None)
    return embed if isinstance(embed, nn.Module) and hasattr(embed, "patch_size") else None
