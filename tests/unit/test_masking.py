"""Geometry of the masks: which blocks, how many, for which images."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from common.augsub import AugSub
from common.masking import PixelMask, TokenMask, block_mask, count_blocks

SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 8, "num_classes": 5}


@pytest.mark.parametrize("hidden", [0, 1, 24, 48])
def test_hides_the_stated_number_of_aligned_blocks_in_each_image(hidden):
    mask = block_mask(16, (56, 56), (8, 8), hidden)
    blocks = mask.view(16, 7, 8, 7, 8).permute(0, 1, 3, 2, 4).flatten(3).float().mean(3)
    assert set(blocks.unique().tolist()) <= {0.0, 1.0}, "a block is hidden whole or not at all"
    assert (blocks.sum((1, 2)) == hidden).all()


@pytest.mark.parametrize(("ratio", "pixel_blocks", "token_blocks"), [
    (0.25, 12, 13), (0.5, 24, 25), (0.75, 36, 37), (0.1, 4, 5), (0.99, 48, 48), (1 - 1e-16, 48, 48),
])  # fmt: skip
def test_pixel_blocks_are_rounded_down_and_those_of_the_mask_token_up(ratio, pixel_blocks, token_blocks):
    """Of the 49 of an image of 224 pixels: int(49 p), and 49 - int(49 (1 - p)). At least one stays."""
    convolutional = timm.create_model("resnet18", num_classes=5)
    pixels, token = PixelMask.on(convolutional), TokenMask.on(timm.create_model("swin_tiny_patch4_window7_224", **SWIN))
    pixels.ratio = token.ratio = ratio
    masked = pixels.hide(torch.ones(8, 3, 224, 224))
    assert (masked[:, 0, ::32, ::32] == 0).sum((1, 2)).tolist() == [pixel_blocks] * 8
    embed = token.model.patch_embed
    tokens = token.hide(embed, torch.ones(8, 3, 224, 224), torch.full((8, 56, 56, 8), 7.0))
    assert (tokens[:, ::8, ::8, 0] != 7).sum((1, 2)).tolist() == [token_blocks] * 8


def test_every_image_has_its_own_blocks_and_every_block_its_turn():
    torch.manual_seed(0)
    mask = block_mask(4000, (7, 7), (1, 1), 25)
    assert len(mask.flatten(1).unique(dim=0)) > 3990
    share = mask.float().mean(0)
    # hidden 25 of 49: the share of each block is binomial, standard deviation 0.0079
    assert (share - 25 / 49).abs().max() < 5 * 0.0079
    assert torch.corrcoef(mask.flatten(1).float().T).fill_diagonal_(0).abs().max() < 0.1


@pytest.mark.parametrize("grid", [(50, 37), (7, 12), (33, 64)])
def test_odd_sizes_get_partial_blocks_and_the_right_share_on_average(grid):
    torch.manual_seed(0)
    n = count_blocks(grid, (8, 8))
    mask = block_mask(3000, grid, (8, 8), n // 2)
    assert mask.shape == (3000, *grid)
    assert n == -(-grid[0] // 8) * -(-grid[1] // 8)
    assert abs(mask.float().mean().item() - n // 2 / n) < 0.02


@pytest.mark.parametrize(("ratio", "block"), [(0.5, 64), (0.2, 32)])
def test_a_ratio_of_less_than_one_block_is_refused(ratio, block):
    """Of one block that covers the whole image, or of four."""
    mask = PixelMask.on(nn.Conv2d(3, 4, 3), block)
    images = torch.ones(2, 3, 64, 64)
    assert torch.equal(mask.hide(images), images)
    mask.ratio = ratio
    with pytest.raises(ValueError, match="nothing can be hidden"):
        mask.hide(images)


def test_mask_token_takes_the_place_of_whole_blocks_after_the_patch_embedding():
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    mask = TokenMask.on(model)
    assert TokenMask.on(model) is mask, "a second AugSub uses the mask that is there"
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        plain = model.patch_embed(x)
        mask.ratio = 0.5
        masked = model.patch_embed(x)
        model.eval()
        assert torch.equal(model.patch_embed(x), plain), "masks act in training mode only"
    hidden = (masked != plain).any(-1)  # (3, 16, 16) tokens, in blocks of 8
    assert hidden.view(3, 2, 8, 2, 8).permute(0, 1, 3, 2, 4).flatten(3).float().mean(3).sum((1, 2)).tolist() == [2] * 3
    assert torch.equal(masked[hidden], model.mask_token[0].expand(int(hidden.sum()), -1))


class Grid(nn.Module):
    """A patch embedding of 4-pixel patches that gives its tokens in one of the layouts of timm's models."""

    def __init__(self, layout: str, channels: int):
        super().__init__()
        self.patch_size, self.layout = 4, layout
        self.proj = nn.Conv2d(3, channels, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)  # (B, C, H, W)
        return {"NCHW": x, "NHWC": x.permute(0, 2, 3, 1), "NLC": x.flatten(2).transpose(1, 2)}[self.layout]


@pytest.mark.parametrize(("layout", "channels"), [
    ("NCHW", 6), ("NHWC", 6), ("NLC", 6), ("NHWC", 8), ("NLC", 8), ("NCHW", 8),
])  # fmt: skip
def test_mask_token_finds_the_grid_in_each_layout(layout, channels):
    """The same seed hides the same blocks of an image that is wider than high, whichever way its tokens lie."""
    model: nn.Module = nn.Module()
    model.patch_embed = Grid(layout, channels)
    mask = TokenMask.on(model, block=8)
    x = torch.randn(3, 3, 16, 32)
    plain = model.patch_embed.proj(x)
    mask.ratio = 0.5
    torch.manual_seed(4)
    masked = model.patch_embed(x)
    if layout == "NLC":
        masked = masked.view(3, 4, 8, channels)
    if layout != "NCHW":
        masked = masked.permute(0, 3, 1, 2)
    torch.manual_seed(4)
    hidden = block_mask(3, (4, 8), (2, 2), 4)[:, None]
    assert hidden.float().mean() == 0.5
    assert torch.equal(masked, torch.where(hidden, model.mask_token.view(1, channels, 1, 1), plain))


@pytest.mark.parametrize(("name", "size"), [
    ("pvt_v2_b0", 224),  # patches of 7 every 4 pixels: `patch_size` is not the grid's
    ("pit_ti_224", 224),  # patches of 16 every 8 pixels
    ("efficientvit_m0", 224),  # a stem that halves four times, `patch_size` of which says only the last
    ("xcit_nano_12_p16_224", 224),  # the embedding gives (tokens, grid)
    ("samvit_base_patch16", 1024),  # `patch_drop` gets (B, H, W, C) and takes whole rows for tokens
])  # fmt: skip
def test_masking_is_refused_at_construction_or_works(name, size):
    with torch.device("meta"):
        model = timm.create_model(name).train()
        try:
            augsub = AugSub(model, "masking", 0.5)
        except ValueError:
            return
        with torch.no_grad(), augsub.sub_model():
            model(torch.empty(2, 3, size, size))


def test_mask_token_starts_as_upstreams_and_has_no_weight_decay():
    from common.optim import weight_decay_groups

    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN | {"embed_dim": 256, "num_heads": (4, 8)})
    TokenMask.on(model)
    assert model.mask_token.shape == (1, 1, 256)
    assert 0.015 < model.mask_token.std() < 0.025
    exempt = [p for g in weight_decay_groups(model, 0.05) if not g["weight_decay"] for p in g["params"]]
    assert any(p is model.mask_token for p in exempt)


def test_a_copy_of_the_model_masks_with_its_own_token():
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    TokenMask.on(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.mask_token.fill_(7.0)
        TokenMask.on(twin).ratio = 0.5
        assert (twin.patch_embed(torch.randn(1, 3, 64, 64)) == 7).any()
        assert not (model.patch_embed(torch.randn(1, 3, 64, 64)) == 7).any()


def test_pixel_blocks_are_zeroed_before_a_convolutional_model_sees_them():
    model = timm.create_model("resnet18", num_classes=5)
    seen = []
    mask = PixelMask.on(model)
    model.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(4, 3, 224, 224) + 1
    mask.ratio = 0.25
    model(x)
    hidden = seen[0] == 0
    assert torch.equal(seen[0][~hidden], x[~hidden])
    blocks = hidden.view(4, 3, 7, 32, 7, 32).permute(0, 1, 2, 4, 3, 5).flatten(4).float().mean(4)
    assert set(blocks.unique().tolist()) == {0.0, 1.0}
    assert (blocks[:, 0].sum((1, 2)) == 12).all()
    assert torch.equal(blocks[:, 0], blocks[:, 2]), "all three channels alike"
    assert torch.equal(x, x.clamp(min=1)), "the caller's images are left alone"
    model.eval()
    model(x)
    assert torch.equal(seen[1], x)


def test_masked_images_are_the_first_layers_own_copy_under_autocast():
    """As many bytes as in the plain model's pass, and the same pixels as when the layer makes them narrow itself."""
    conv = nn.Conv2d(3, 4, 3, bias=False)
    mask = PixelMask.on(conv, 32)
    images = torch.randn(4, 3, 64, 64)
    wide = mask.hide(images)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, out = mask.hide(images), conv(mask.hide(images))
    assert wide is not images and wide.dtype is torch.float32 and narrow.dtype is out.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(out, conv(images), rtol=0, atol=0)
    mask.ratio = 0.5
    torch.manual_seed(1)
    wide = mask.hide(images)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = mask.hide(images)
    assert torch.equal(narrow, wide.bfloat16()) and (narrow == 0).any()


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18"])
def test_a_block_has_a_side(name):
    with pytest.raises(ValueError, match="block 0 is below 1; give the side of a hidden block in pixels"):
        AugSub(timm.create_model(name), "masking", block=0)
