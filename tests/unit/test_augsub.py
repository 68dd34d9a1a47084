"""The method: its losses against an independent step, its drops on many architectures, DDP, compile, autocast."""

from __future__ import annotations

import copy
import re
import weakref
from typing import Any

import pytest
import timm
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.layers import DropPath, PatchDropout
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from common.augsub import KINDS, AugSub
from common.drops import find_drops
from tests.processes import build, ddp_steps, joined_batch
from tests.processes import gradients as gradients_of_step

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL: dict[str, dict[str, Any]] = {
    "deit3_small_patch16_224": VIT,
    "vit_little_patch16_reg4_gap_256": VIT,
    "eva02_tiny_patch14_224": VIT,
    "naflexvit_base_patch16_gap": {name: size for name, size in VIT.items() if name != "img_size"},
    "hiera_tiny_224": {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1), "num_classes": 5},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64,
                                     "window_size": 8, "num_classes": 5, "drop_path_rate": 0.0},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16), "num_classes": 5},
    "resnet18": {"num_classes": 5, "layers": (1, 1, 1, 1)},
    "resnet50": {"num_classes": 5, "layers": (1, 1, 1, 1)},
    "efficientnet_b0": {"num_classes": 5},
}  # fmt: skip
SIZES = {"hiera_tiny_224": 224} | dict.fromkeys(list(SMALL)[5:], 64)
OFFERED = [(name, kind) for name in SMALL for kind in KINDS[1:]
           if not (kind == "dropout" and name in ("resnet18", "resnet50", "efficientnet_b0"))]  # fmt: skip


def small(name: str = "deit3_small_patch16_224", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name] | kwargs)


def images(name: str = "deit3_small_patch16_224", batch: int = 4) -> torch.Tensor:
    size = SIZES.get(name, 32)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def take_step(augsub: AugSub, model: nn.Module, x, y, criterion, **kwargs) -> list[float]:
    values = []
    for loss in augsub.losses(model, x, y, criterion, **kwargs):
        loss.backward()
        values.append(loss.item() / augsub.weight)
    return values


def one_hot_mix(y, classes=5):
    return 0.7 * F.one_hot(y, classes).float() + 0.3 * F.one_hot(y.flip(0), classes).float()


def log_softmax_loss(logits, target):
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def bce(logits, target):
    return (logits.clamp(min=0) - logits * target + (-logits.abs()).exp().log1p()).mean()


LABELS = torch.tensor([0, 1, 2, 4])
SMOOTH = F.one_hot(LABELS, 5) * 0.9 + 0.1 / 5
CASES = {
    "labels": (nn.CrossEntropyLoss(), LABELS, lambda z: log_softmax_loss(z, F.one_hot(LABELS, 5)), torch.softmax),
    "torch smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS,
                        lambda z: log_softmax_loss(z, SMOOTH), torch.softmax),
    "timm smoothing": (LabelSmoothingCrossEntropy(0.1), LABELS, lambda z: log_softmax_loss(z, SMOOTH), torch.softmax),
    "mixup": (SoftTargetCrossEntropy(), one_hot_mix(LABELS),
              lambda z: log_softmax_loss(z, one_hot_mix(LABELS)), torch.softmax),
    "bce": (nn.BCEWithLogitsLoss(), one_hot_mix(LABELS), lambda z: bce(z, one_hot_mix(LABELS)), torch.sigmoid),
    "bce threshold": (BinaryCrossEntropy(0.0, target_threshold=0.0), one_hot_mix(LABELS),
                      lambda z: bce(z, (one_hot_mix(LABELS) > 0).float()), torch.sigmoid),
    "bce labels": (BinaryCrossEntropy(0.1), LABELS, lambda z: bce(z, SMOOTH), torch.sigmoid),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_equation(case):
    """Against the equation written out in one graph, with the patches that AugMask keeps picked out by hand."""
    criterion, y, main_loss, sigma = CASES[case]
    x, model = images(), small()
    twin = copy.deepcopy(model)
    augsub = AugSub(model, "masking", 0.5)
    torch.manual_seed(3)
    main, sub = take_step(augsub, model, x, y, criterion)

    torch.manual_seed(3)
    kept = torch.randn(4, 64).argsort(dim=1)[:, :32]  # the draw that timm makes from that seed
    tokens = twin._pos_embed(twin.patch_embed(x))
    tokens = torch.cat([tokens[:, :1], tokens[torch.arange(4)[:, None], 1 + kept]], dim=1)
    sub_logits = twin.forward_head(twin.norm(twin.blocks(tokens)))
    logits = twin(x)
    target = sigma(logits, -1).detach() if sigma is torch.softmax else sigma(logits).detach()
    expected_sub = (log_softmax_loss if sigma is torch.softmax else bce)(sub_logits, target)
    (0.5 * main_loss(logits) + 0.5 * expected_sub).backward()

    assert main == pytest.approx(main_loss(logits).item(), rel=1e-5)
    assert sub == pytest.approx(expected_sub.item(), rel=1e-5)
    got, expected = gradients(model), gradients(twin)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_none_and_ratio_zero_are_the_plain_recipe(kind):
    """kind none: the plain gradients. Ratio 0: half of them, and half of the same model learning its own output."""
    x, model = images(), small()
    twin = copy.deepcopy(model)
    ratio = 0.5 if kind == "none" else 0.0
    take_step(AugSub(model, kind, ratio), model, x, LABELS, nn.CrossEntropyLoss())
    logits = twin(x)
    plain = F.cross_entropy(logits, LABELS)
    self_taught = log_softmax_loss(logits, logits.softmax(-1).detach())
    (plain if kind == "none" else 0.5 * plain + 0.5 * self_taught).backward()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-5, atol=1e-8)


def test_first_graph_is_freed_before_the_second_forward():
    """What backward has freed of the main pass must be gone when the sub pass builds its own."""
    model, alive = small(), []
    augsub = AugSub(model, "masking")
    model.blocks[0].mlp.register_forward_hook(lambda m, i, output: alive.append(weakref.ref(output)))
    losses = augsub.losses(model, images(), LABELS, nn.CrossEntropyLoss())
    next(losses).backward()
    assert len(alive) == 1, "the sub-model runs only when it is asked for"
    assert alive[0]() is None
    next(losses).backward()
    assert len(alive) == 2
    assert next(losses, None) is None


def test_sub_model_switches_and_restores_every_rate():
    for place, kind in enumerate(("droppath", "dropout", "masking")):
        model = small(drop_path_rate=0.2, proj_drop_rate=0.1)
        augsub = AugSub(model, kind, 0.4)
        rates = lambda model=model: [  # noqa: E731
            [m.drop_prob for m in model.modules() if isinstance(m, DropPath)],
            [m.p for m in model.modules() if isinstance(m, nn.Dropout)],
            [m.prob for m in model.modules() if isinstance(m, PatchDropout)],
        ]
        before = rates()
        with pytest.raises(ZeroDivisionError), augsub.sub_model():
            within = rates()
            with augsub.sub_model():
                assert rates() == within
            assert rates() == within
            raise ZeroDivisionError
        assert rates() == before
        for i, (at_rest, switched) in enumerate(zip(before, within)):
            if i != place:
                assert switched == at_rest, "the other drops keep the recipe's rates"
            else:
                assert set(switched) - set(at_rest) == {0.4}, "in place of the recipe's rate, not on top of it"


def test_drops_act_in_training_mode_only():
    x = images()
    for kind in KINDS[1:]:
        model = small()
        augsub = AugSub(model, kind, 0.5)
        with torch.no_grad():
            plain = model.train()(x)
            with augsub.sub_model():
                assert not torch.allclose(model(x), plain)
                torch.testing.assert_close(model.eval()(x), plain)


@pytest.mark.parametrize(("name", "prefix"), [
    ("deit3_small_patch16_224", 1), ("vit_little_patch16_reg4_gap_256", 4), ("eva02_tiny_patch14_224", 1),
    ("naflexvit_base_patch16_gap", 4),
])  # fmt: skip
@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 32), (0.3, 44), (0.99, 1)])
def test_masking_keeps_prefix_tokens_and_its_share_of_the_patches(name, prefix, ratio, kept):
    """int(64 * (1 - p)) of 64 patches stay, each image's own; the main pass computes with all of them."""
    model, seen = small(name), []
    augsub = AugSub(model, "masking", ratio)
    model.blocks[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images(name))
        with augsub.sub_model():
            model(images(name))
        model(images(name))
    main, sub, after = seen
    assert main.shape[1] == prefix + 64 and sub.shape[1] == prefix + kept
    assert torch.equal(after, main)
    assert torch.equal(sub[:, :prefix], main[:, :prefix])
    # which of the main pass's patches each of the sub pass's is, exactly: positions came before the drop
    same = (sub[:, prefix:, None] == main[:, None, prefix:]).all(-1)  # (B, kept, 64)
    assert (same.sum(2) == 1).all() and (same.sum(1) <= 1).all()
    assert len(same.any(1).unique(dim=0)) > 1, "each image has its own patches"


@pytest.mark.parametrize("sync", [True, False])
def test_masking_halves_the_patches_of_an_image_of_224(sync):
    """In every micro-batch of an accumulated step, not in the last alone."""
    model, seen = small(img_size=224, patch_size=16, depth=1), []
    augsub = AugSub(model, "masking", 0.5)
    model.blocks[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[1]))
    x = torch.zeros(1, 3, 224, 224)
    take_step(augsub, model, x, LABELS[:1], nn.CrossEntropyLoss(), sync=sync)
    assert seen == [197, 1 + 98]


@pytest.mark.parametrize("kind", ["droppath", "dropout"])
def test_activation_checkpointing_recomputes_the_sub_model(kind):
    """Blocks run again in backward, when the drop must still be on."""
    plain, thrifty = small(), small()
    thrifty.set_grad_checkpointing(True)
    for model in (plain, thrifty):
        augsub = AugSub(model, kind, 0.5)
        torch.manual_seed(3)
        take_step(augsub, model, images(), LABELS, nn.CrossEntropyLoss())
    expected = gradients(plain)
    for name, gradient in gradients(thrifty).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-8, msg=name)


@pytest.mark.parametrize(("name", "places"), [
    ("deit3_small_patch16_224", [f"blocks.{i}.{drop}" for i in range(2)
                                 for drop in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")]),
    ("eva02_tiny_patch14_224", [f"blocks.{i}.{drop}" for i in range(2)
                                for drop in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")]),
    ("swin_tiny_patch4_window7_224", [f"layers.{i}.blocks.0.{drop}" for i in range(2)
                                      for drop in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")]),
    ("convnext_atto", [f"stages.{i}.blocks.0.{drop}" for i in range(4) for drop in ("mlp.drop1", "mlp.drop2")]),
])  # fmt: skip
def test_dropout_is_that_of_projections_and_mlps_alone(name, places):
    """Not of attention weights, positions or the head, though all of them are there."""
    model = small(name)
    rates = lambda: {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}  # noqa: E731
    augsub = AugSub(model, "dropout", 0.3)
    with augsub.sub_model():
        within = rates()
    assert {place for place, rate in within.items() if rate == 0.3} == set(places)
    assert set(rates().values()) == {0.0} and len(within) > len(places)


@pytest.mark.parametrize(("name", "kind", "places"), [
    ("pvt_v2_b0", "dropout", r".*(attn\.proj_drop|mlp\.drop)"),  # timm's `drop` acts after both layers of this MLP
    ("test_vit_relpos", "dropout", r"blocks\.\d+\.(attn\.proj_drop|mlp\.drop\d)"),  # not the positions' own MLP
    ("swinv2_cr_tiny_224", "dropout", r".*\d+\.(attn\.proj_drop|mlp\.drop\d)"),  # nor this one's, attn.meta_mlp
    ("levit_128", "dropout", r".*\.mlp\.drop"),
    ("nextvit_small", "droppath", r".*_drop_path"),
])  # fmt: skip
def test_drops_of_less_common_families(name, kind, places):
    with torch.device("meta"):
        model = timm.create_model(name)
    layer, rate = (nn.Dropout, "p") if kind == "dropout" else (DropPath, "drop_prob")
    assert kind in find_drops(model)
    with AugSub(model, kind, 0.31).sub_model():
        on = {n for n, m in model.named_modules() if isinstance(m, layer) and getattr(m, rate) == 0.31}
    assert on == {n for n, m in model.named_modules() if isinstance(m, layer) and re.fullmatch(places, n)}


@pytest.mark.parametrize(("name", "kind"), OFFERED)
def test_each_family_takes_a_step_with_each_drop_it_offers(name, kind):
    model = small(name)
    assert kind in find_drops(model)
    with torch.no_grad():  # several start with branches or heads of almost 0, which would hide what is dropped
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    augsub = AugSub(model, kind, 0.5)
    x = images(name)
    take_step(augsub, model, x, LABELS, nn.CrossEntropyLoss())
    for n, gradient in gradients(model).items():
        assert gradient.isfinite().all(), n
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without, "the sub-model leaves no parameter without a gradient"
    with torch.no_grad():
        plain = model(x)
        with augsub.sub_model():
            assert not torch.allclose(model(x), plain)
        assert torch.equal(model(x), plain), "in training mode nothing is left of the drop"


@pytest.mark.parametrize(("name", "branches"), [
    ("deit3_small_patch16_224", 4), ("eva02_tiny_patch14_224", 4), ("swin_tiny_patch4_window7_224", 4),
    ("resnet18", 4), ("resnet50", 4), ("convnext_atto", 4), ("efficientnet_b0", 9),
])  # fmt: skip
@pytest.mark.parametrize("own", [0.0, 0.2])
def test_droppath_reaches_every_residual_branch_and_leaves_it_as_it_was(name, branches, own):
    """Whatever stood there at rate 0: an Identity in a ViT, None in a ResNet. The rates rise from 0 to the recipe's.
    EfficientNet-B0 has 16 blocks, of which 7 change the width or stride and have no residual branch."""
    model = small(name, drop_path_rate=own)

    def rates() -> list[float]:
        blocks = [block for block in model.modules() if getattr(block, "has_skip", True)]
        return [layer.drop_prob for block in blocks for layer in block.children() if isinstance(layer, DropPath)]

    trained = rates()
    augsub = AugSub(model, "droppath", 0.5)
    with augsub.sub_model():
        assert rates() == [0.5] * branches
    assert [rate for rate in rates() if rate] == [rate for rate in trained if rate]
    assert len(rates()) == branches
    assert any(trained) == bool(own)


def two_ways(model: nn.Module, kind: str, x, y, criterion, dtype: torch.dtype | None = None):
    """Gradients, both losses and running statistics of a step with two backwards, and of one with a single one."""
    found = []
    for one_backward in (False, True):
        twin = copy.deepcopy(model)
        torch.manual_seed(3)
        augsub = AugSub(twin, kind, 0.5)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            passes = augsub.losses(twin, x, y, criterion)
            losses = []
            for group in [list(passes)] if one_backward else ([loss] for loss in passes):
                torch.stack(group).sum().backward()
                losses += [loss.detach() for loss in group]
        found.append((gradients(twin), torch.stack(losses), dict(twin.named_buffers())))
    return found


@pytest.mark.parametrize(("name", "kind"), OFFERED)
def test_one_backward_gives_the_gradients_of_two(name, kind):
    """Batch statistics too: each pass is normalised by its own batch's, and both move the running ones, in order."""
    (two, losses, buffers), (one, summed, moved) = two_ways(small(name), kind, images(name), LABELS, F.cross_entropy)
    assert one.keys() == two.keys()
    torch.testing.assert_close(summed, losses)
    torch.testing.assert_close(moved, buffers)
    for parameter, gradient in one.items():
        scale = two[parameter].abs().max().item()
        torch.testing.assert_close(gradient, two[parameter], rtol=1e-4, atol=1e-5 * scale + 1e-8, msg=parameter)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_backward_gives_the_gradients_of_two_with_each_loss(case, dtype):
    criterion, y, _, _ = CASES[case]
    (two, losses, _), (one, summed, _) = two_ways(small(), "masking", images(), y, criterion, dtype)
    torch.testing.assert_close(summed, losses)
    for parameter, gradient in one.items():
        scale = two[parameter].norm().item()
        error = (gradient - two[parameter]).norm().item()
        assert error <= (1e-5 if dtype is None else 2e-2) * scale + 1e-8, parameter


def test_refusals_say_what_would_do():
    model = small("resnet18")
    with pytest.raises(ValueError, match="--augsub dropout: ResNet has no place for it; use masking or droppath"):
        AugSub(model, "dropout")
    with pytest.raises(ValueError, match="unknown drop 'mask': choose one of none, masking"):
        AugSub(model, "mask")
    for ratio in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
            AugSub(model, "masking", ratio)
    with pytest.raises(ValueError, match="before OptimizedModule wraps it"):
        AugSub(torch.compile(model), "masking")


def test_a_model_in_ddp_is_refused(tmp_path):
    torch_dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="before DistributedDataParallel wraps it"):
            AugSub(DistributedDataParallel(small()), "masking")
    finally:
        torch_dist.destroy_process_group()


def test_losses_and_target_are_float32_under_autocast():
    model, kinds, outputs = small(), [], []
    model.register_forward_hook(lambda m, inputs, output: outputs.append(output.dtype))

    def criterion(logits, target):
        kinds.append((logits.dtype, target.dtype, (logits @ logits.T).dtype))
        return F.cross_entropy(logits, target)

    with torch.autocast("cpu", torch.bfloat16):
        augsub = AugSub(model, "masking", target="softmax")
        for loss in augsub.losses(model, images(), one_hot_mix(LABELS), criterion):
            assert loss.dtype is torch.float32
            loss.backward()
    assert outputs == [torch.bfloat16] * 2, "else there is nothing to see"
    assert kinds == [(torch.float32,) * 3] * 2


@pytest.mark.parametrize(("name", "kind"), [
    ("deit3_small_patch16_224", "masking"), ("deit3_small_patch16_224", "dropout"),
    ("deit3_small_patch16_224", "droppath"), ("swin_tiny_patch4_window7_224", "masking"), ("resnet18", "masking"),
])  # fmt: skip
def test_compiles_into_two_graphs_and_no_more(name, kind):
    torch._dynamo.reset()
    model, counter = small(name), CompileCounter()
    augsub = AugSub(model, kind, 0.5)
    compiled = torch.compile(model, backend=counter)
    x = images(name)
    take_step(augsub, compiled, x, LABELS, nn.CrossEntropyLoss())
    assert counter.frame_count == 2
    for _ in range(4):
        take_step(augsub, compiled, x, LABELS, nn.CrossEntropyLoss())
    assert counter.frame_count == 2


ZERO_CASES = [("deit3_small_patch16_224", "droppath", 1, False), ("swin_tiny_patch4_window7_224", "masking", 3, True)]


@pytest.fixture(scope="module")
def zero_ratio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    mp.spawn(ddp_steps, args=(2, folder, ZERO_CASES, 0.0), nprocs=2)
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "parts", "one_backward"), ZERO_CASES)
def test_two_processes_equal_one_at_ratio_zero(name, kind, parts, one_backward, zero_ratio):
    """Both passes, the same function twice: gradients of the joined batch for one all-reduce, in its one bucket."""
    model = build(name)
    expected = gradients_of_step(model, model, AugSub(model, kind, 0.0), *joined_batch(name), parts)
    got, rounds = zero_ratio[name, kind, parts, one_backward]
    assert rounds == [0]
    assert got.keys() == expected.keys() and "mask_token" not in got
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-6, msg=parameter)
