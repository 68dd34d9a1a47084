"""Pixel blocks on inputs of any form, and NaFlexViT's own input."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchDropoutWithIndices
from torch import nn
from torch._dynamo.testing import CompileCounter

from common.augsub import AugSub
from common.masking import PixelMask, block_mask
from common.token_drop import NaFlexTokenDrop


class Catch(nn.Module):
    """Keeps what it gets."""

    def forward(self, *args, **kwargs):
        self.got = args, kwargs


def masked(*args, ratio=0.5, block=4, **kwargs):
    model = Catch()
    mask = PixelMask.on(model, block)
    mask.ratio = ratio
    torch.manual_seed(2)
    model(*args, **kwargs)
    torch.manual_seed(2)
    return model.got


def expected_mask(batch, size=16):
    torch.manual_seed(2)
    return block_mask(batch, (size, size), (4, 4), 8)


@pytest.mark.parametrize("shape", [
    (3, 3, 16, 16), (2, 1, 16, 16), (3, 3, 5, 16, 16), (2, 3, 5, 16, 16), (1, 1, 16, 16, 16),
])  # fmt: skip
def test_every_frame_and_channel_of_an_image_has_the_same_blocks_hidden(shape):
    """Also where a batch has as many images as channels."""
    x = torch.rand(*shape) + 1
    (got,), _ = masked(x)
    hidden = expected_mask(shape[0])
    for image in range(shape[0]):
        planes = got[image].reshape(-1, 16, 16)
        for plane, original in zip(planes, x[image].reshape(-1, 16, 16)):
            assert torch.equal(plane, original.masked_fill(hidden[image], 0))


def test_images_are_found_in_keywords_tuples_and_mappings():
    x, labels, extra = torch.rand(2, 3, 16, 16) + 1, torch.tensor([0, 1]), torch.rand(2, 7)
    expected = x.masked_fill(expected_mask(2)[:, None], 0)
    assert torch.equal(masked(pixel_values=x, labels=labels)[1]["pixel_values"], expected)
    batch = {"image": x, "meta": extra}
    got = masked(batch)[0][0]
    assert torch.equal(got["image"], expected) and got["meta"] is extra and batch["image"] is x
    (views,), _ = masked([x, x + 1])
    assert torch.equal(views[0], expected) and torch.equal(views[1] == 0, expected == 0)
    _, kwargs = masked(pixel_values=x, attention_bias=torch.rand(2, 1, 9, 9))
    assert torch.equal(kwargs["pixel_values"], expected) and (kwargs["attention_bias"] > 0).all()


def test_channels_last_is_kept():
    x = torch.rand(2, 3, 16, 16).to(memory_format=torch.channels_last)
    (got,), _ = masked(x)
    assert got.is_contiguous(memory_format=torch.channels_last) and (got == 0).any()


@pytest.mark.parametrize(("x", "match"), [
    (torch.rand(2, 16, 16), "got no images"),
    (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "of floating point; give them normalised"),
    (torch.rand(2, 16, 16, 3), "channels last"),
    (torch.rand(2, 8, 16, 16, 3), "channels last"),
    ([torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8)], "images of several sizes"),
])  # fmt: skip
def test_what_cannot_be_masked_is_refused(x, match):
    with pytest.raises(ValueError, match=match):
        masked(x)


NAFLEX = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}


def naflex_input(valid):
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    coord = torch.stack((rows, columns), -1).view(1, 16, 2).repeat(len(valid), 1, 1)
    coord *= valid[..., None]  # as timm's collate function pads
    return {"patches": torch.randn(len(valid), 16, 16 * 16 * 3), "patch_coord": coord, "patch_valid": valid}


@pytest.mark.parametrize("counts", [None, [16, 6, 2, 1]])
def test_naflexvit_takes_a_step_on_its_own_input(counts):
    valid = torch.ones(4, 16, dtype=torch.bool) if counts is None else torch.arange(16) < torch.tensor(counts)[:, None]
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", **NAFLEX)
    x, y = naflex_input(valid), torch.tensor([0, 1, 2, 3])
    augsub = AugSub(model, "masking", 0.5)
    assert augsub.drop == "token drop"
    torch.manual_seed(4)
    for loss in augsub.losses(model, x, y, nn.CrossEntropyLoss()):
        loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    augsub.remove()
    assert model.patch_drop is None and not model.embeds._forward_pre_hooks

    # the same with each image alone, of its kept patches only
    torch.manual_seed(4)
    noise = torch.randn(4, 16)
    model.zero_grad()
    main = model(x)
    parts, prefix = [], model.num_prefix_tokens
    for image, count in enumerate(valid.sum(1).tolist()):
        patches, coord, _ = (value[image : image + 1, :count] for value in x.values())
        kept = noise[image, :count].argsort()[: max(1, count // 2)]
        tokens = model.embeds(patches, patch_coord=coord)[0]
        tokens = torch.cat((tokens[:, :prefix], tokens[:, prefix + kept]), dim=1)
        tokens = model.norm(model.blocks(model.norm_pre(tokens)))
        parts.append(model.head(model.fc_norm(tokens[:, prefix:].mean(1))))
    sub = torch.cat(parts)
    loss = 0.5 * F.cross_entropy(main, y) + 0.5 * F.cross_entropy(sub, main.detach().softmax(1))
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name, rtol=1e-4, atol=1e-5)


def test_naflexvit_compiles_into_two_graphs_and_no_more():
    torch._dynamo.reset()
    model, counter = timm.create_model("naflexvit_base_patch16_gap", **NAFLEX), CompileCounter()
    augsub, compiled = AugSub(model, "masking", 0.5), torch.compile(model, backend=counter)
    for _ in range(3):
        for loss in augsub.losses(compiled, torch.randn(2, 3, 64, 64), torch.tensor([0, 1]), nn.CrossEntropyLoss()):
            loss.backward()
        assert counter.frame_count == 2


def test_without_padding_naflexvit_drops_as_timm_does():
    x = torch.randn(3, 12, 4)
    ours, timms = NaFlexTokenDrop(0.4, num_prefix_tokens=2), PatchDropoutWithIndices(0.4, num_prefix_tokens=2)
    ours.set_valid(torch.ones(3, 10, dtype=torch.bool))
    torch.manual_seed(1)
    got = ours(x)
    torch.manual_seed(1)
    for one, other in zip(got, timms(x)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9])
def test_each_image_keeps_its_share_of_valid_patches(ratio):
    layer = NaFlexTokenDrop(ratio, num_prefix_tokens=0)
    counts = torch.arange(1, 14)
    valid = torch.arange(13) < counts[:, None]
    layer.set_valid(valid)
    _, kept = layer(torch.randn(13, 13, 4))
    assert valid.gather(1, kept).sum(1).tolist() == [max(1, int(n * (1 - ratio))) for n in counts.tolist()]
