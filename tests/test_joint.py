"""Both passes in one forward are the two passes: losses, gradients, draws, graphs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch._dynamo.testing import CompileCounter

from common.augsub import AugSub
from common.joint import DoubledBatch, _each, join
from common.prepare import use_plain_attention
from tests.test_augsub import CASES, LABELS, OFFERED, gradients, images, one_hot_mix, small

APART = ("resnet18", "resnet50", "efficientnet_b0")  # batch norm
OWN_DROP = ("eva02_tiny_patch14_224", "naflexvit_base_patch16_gap", "hiera_tiny_224")  # or forward of their own
JOINED = [(name, kind, "packed tokens" if kind == "masking" and "vit_l" in name + "vit_l" * ("deit3" in name)
           else "doubled batch") for name, kind in OFFERED
          if name not in APART and not (kind == "masking" and name in OWN_DROP)]  # fmt: skip


def lively(model: nn.Module) -> nn.Module:
    """Made so that what each block computes shows in the loss, which at the start of training it hardly does."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "head" in name:
            nn.init.normal_(parameter)
        elif "gamma" in name:
            nn.init.ones_(parameter)
    return model


def two_ways(name, kind, x, y, criterion, dtype=None, **kwargs):
    """Losses, gradients and the joined module, of two passes and of one."""
    model = lively(small(name, **kwargs))
    augsub, found, joint = AugSub(model, kind, 0.5), [], None
    for joined in (False, True):
        if joined:
            joint = join(augsub, model)
            model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            losses = list(augsub.losses(joint or model, x, y, criterion))
            torch.stack(losses).sum().backward()
        found += [torch.stack(losses).detach(), gradients(model)]
    return *found, augsub, joint, model


@pytest.mark.parametrize(("name", "kind", "how"), JOINED)
def test_one_forward_gives_the_losses_and_gradients_of_two(name, kind, how):
    """With the same draws: where the main model draws nothing, the sub-model's are all there are, in the same order."""
    two, expected, one, got, augsub, joint, model = two_ways(name, kind, images(name), LABELS, F.cross_entropy)
    assert joint is not None and augsub.joined == how and how in repr(augsub)
    assert abs(two[0] - two[1]) > 1e-2, "else the passes could be taken for one another"
    torch.testing.assert_close(one, two)
    assert got.keys() == expected.keys()
    for parameter, gradient in got.items():
        scale = expected[parameter].abs().max().item()
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5 * scale + 1e-8, msg=parameter)
    model.eval()
    with torch.no_grad():
        main, sub = joint(images(name))
        torch.testing.assert_close(main, model(images(name)))
        torch.testing.assert_close(sub, main)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_each_loss_and_precision(case, dtype):
    criterion, y, _, _ = CASES[case]
    two, expected, one, got, *_ = two_ways("deit3_small_patch16_224", "masking", images(), y, criterion, dtype)
    torch.testing.assert_close(one, two, rtol=1e-5 if dtype is None else 1e-3, atol=1e-6)
    for parameter, gradient in got.items():
        scale = expected[parameter].norm().item()
        error = (gradient - expected[parameter]).norm().item()
        assert error <= (1e-5 if dtype is None else 2e-2) * scale + 1e-8, parameter


def test_attention_in_the_open_stays_so(monkeypatch):
    """As it is in bfloat16 on a CPU, where PyTorch's kernel is the slower way."""
    fused, *_ = two_ways("deit3_small_patch16_224", "masking", images(), LABELS, F.cross_entropy)
    plain = small
    monkeypatch.setattr(
        "tests.test_joint.small", lambda name: use_plain_attention(model := plain(name), torch.bfloat16) or model
    )
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("the kernel is used"))
    two, expected, one, got, *_ = two_ways("deit3_small_patch16_224", "masking", images(), LABELS, F.cross_entropy)
    torch.testing.assert_close([one, two], [fused, fused])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "masking") for name in (*APART, *OWN_DROP)), (APART[0], "droppath")]
)
def test_models_that_need_two_passes_keep_them(name, kind):
    model = small(name)
    augsub = AugSub(model, kind, 0.5)
    assert join(augsub, model) is None and augsub.joined is None
    assert len(list(augsub.losses(model, images(name), LABELS, F.cross_entropy))) == 2


def test_activation_checkpointing_and_no_drop_keep_two_passes():
    model = small()
    assert join(AugSub(model, "masking", 0.0), model) is None
    assert join(AugSub(model, "none"), model) is None
    model.set_grad_checkpointing()
    assert join(AugSub(model, "masking", 0.5), model) is None
    swin = small("swin_tiny_patch4_window7_224")
    swin.set_grad_checkpointing()
    assert join(AugSub(swin, "droppath", 0.5), swin) is None


def test_images_are_embedded_once_where_patches_are_hidden():
    for name in ("deit3_small_patch16_224", "swin_tiny_patch4_window7_224"):
        model = small(name)
        augsub, seen = AugSub(model, "masking", 0.5), []
        joint = join(augsub, model)
        model.patch_embed.proj.register_forward_hook(lambda module, x, y, seen=seen: seen.append(len(y)))
        list(augsub.losses(joint, images(name), LABELS, F.cross_entropy))
        assert seen == [4]


@pytest.mark.parametrize(("kind", "mask"), [("masking", "pixel blocks"), ("dropout", None), ("droppath", None)])
def test_doubled_images_are_of_autocasts_type(kind, mask):
    """Two float32 copies of them would lie there during the step."""
    model = small("convnext_atto")
    joint, seen = join(AugSub(model, kind, 0.5), model), []
    assert getattr(joint.mask, "name", None) == mask
    model.register_forward_pre_hook(lambda module, x: seen.append((len(x[0]), x[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        joint(images("convnext_atto"))
    joint(images("convnext_atto"))
    assert seen == [(8, torch.bfloat16), (8, torch.float32)]


def test_stochastic_depth_is_drawn_for_main_and_sub_model_apart():
    """Each of the four cases, of a rate of 1/2, has a quarter of the images; an image's tokens go together."""
    torch.manual_seed(0)
    x = _each(DropPath(0.5).train(), torch.ones(4000, 5, 1), [3, 2])[..., 0]
    assert (x[:, :3] == x[:, :1]).all() and (x[:, 3:] == x[:, 3:4]).all()
    cases = torch.stack([x[:, 0] > 0, x[:, 4] > 0], 1).long() @ torch.tensor([2, 1])
    assert torch.bincount(cases, minlength=4) / 4000 == pytest.approx(torch.full((4,), 0.25), abs=0.03)


def test_the_main_models_own_rates_hold_in_its_half():
    """A dropout of 0.2 in the main model and of 0.5 in its sub-model, counted where it acts."""
    model = small(proj_drop_rate=0.2)
    augsub, seen = AugSub(model, "dropout", 0.5), []
    joint = join(augsub, model)
    assert isinstance(joint, DoubledBatch)
    model.blocks[0].mlp.drop1.register_forward_hook(lambda layer, x, y: seen.append((y == 0).float().mean((1, 2))))
    list(augsub.losses(joint, images(batch=4).repeat(16, 1, 1, 1), LABELS.repeat(16), F.cross_entropy))
    model(images())
    assert seen[0][:64].mean() == pytest.approx(0.2, abs=0.01)
    assert seen[0][64:].mean() == pytest.approx(0.5, abs=0.01)
    assert seen[1].shape == (4,) and seen[1].mean() == pytest.approx(0.2, abs=0.05), "the model itself is as it was"


@pytest.mark.parametrize(("name", "kind"), [
    ("deit3_small_patch16_224", "masking"), ("deit3_small_patch16_224", "dropout"),
    ("swin_tiny_patch4_window7_224", "masking"), ("swin_tiny_patch4_window7_224", "droppath"),
])  # fmt: skip
def test_compiles_into_one_graph(name, kind):
    torch._dynamo.reset()
    model, counter, x = small(name), CompileCounter(), images(name)
    twin = copy.deepcopy(model)
    augsub = AugSub(model, kind, 0.5)
    joint = join(augsub, model)
    compiled = torch.compile(joint, backend=counter, fullgraph=True)
    for _ in range(3):
        torch.manual_seed(3)
        got = list(augsub.losses(compiled, x, LABELS, F.cross_entropy))
        torch.manual_seed(3)
        assert got == list(augsub.losses(joint, x, LABELS, F.cross_entropy))
    assert counter.frame_count == 1
    model.eval()
    assert torch.equal(model(x), twin.eval()(x)), "evaluation is the model's own"


def test_a_mixed_step_with_the_compiler(tmp_path):
    """Through PyTorch's own compiler, whose kernels round differently."""
    torch._dynamo.reset()
    model, x, y = small(), images(), one_hot_mix(LABELS)
    augsub = AugSub(model, "masking", 0.5)
    joint = join(augsub, model)
    found = []
    with torch._inductor.config.patch(fallback_random=True):
        for called in (joint, torch.compile(joint)):
            torch.manual_seed(3)
            model.zero_grad()
            torch.stack(list(augsub.losses(called, x, y, nn.CrossEntropyLoss()))).sum().backward()
            found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
