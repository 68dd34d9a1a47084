"""The DeiT-III recipe against the numbers of the published trainer, and against upstream's command lines."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath, PatchDropout
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.args import parse
from common.augsub import AugSub
from common.data.samplers import build_sampler
from common.data_config import loader_config
from common.distributed import Process
from common.optim import create_optimizer
from common.trainer import build_model
from deit.models import adapt_weights
from deit.recipe import RECIPE, VARIANTS
from tests.commands import ROOT
from tests.golden import check_golden
from tests.published import image, reference, tensor_for

REFERENCE = reference("deit")
COMMON = (
    "--smoothing 0.0 --reprob 0.0 --opt fusedlamb --color-jitter 0.3 --drop 0.0 --unscale-lr --repeated-aug --bce-loss "
    "--ThreeAugment --eval-crop-ratio 1.0 --dist-eval"
)
FINETUNE = (
    "--smoothing 0.1 --reprob 0.0 --opt adamw --lr 1e-5 --weight-decay 0.1 --input-size 224 --drop 0.0 --mixup 0.8 "
    "--cutmix 1.0 --unscale-lr --no-repeated-aug --aa rand-m9-mstd0.5-inc1 --eval-crop-ratio 1.0 "
    "--dist-eval --epochs 20"
)
UPSTREAM = {
    "small_400": f"--model deit_small_patch16_LS --batch-size 256 --epochs 400 --lr 4e-3 --weight-decay 0.03 --input-size 224 --drop-path 0.0 {COMMON}",
    "small_800": f"--model deit_small_patch16_LS --batch-size 256 --epochs 800 --lr 4e-3 --weight-decay 0.05 --input-size 224 --drop-path 0.05 {COMMON}",
    "base_400": f"--model deit_base_patch16_LS --batch-size 256 --epochs 400 --lr 3e-3 --weight-decay 0.03 --input-size 192 --drop-path 0.1 {COMMON}",
    "base_800": f"--model deit_base_patch16_LS --batch-size 256 --epochs 800 --lr 3e-3 --weight-decay 0.05 --input-size 192 --drop-path 0.2 {COMMON}",
    "large_400": f"--model deit_large_patch16_LS --batch-size 32 --epochs 400 --lr 3e-3 --weight-decay 0.03 --input-size 192 --drop-path 0.4 {COMMON}",
    "large_800": f"--model deit_large_patch16_LS --batch-size 32 --epochs 800 --lr 3e-3 --weight-decay 0.05 --input-size 192 --drop-path 0.45 {COMMON}",
    "huge_400": f"--model deit_huge_patch14_LS --batch-size 32 --epochs 400 --lr 3e-3 --weight-decay 0.03 --input-size 160 --drop-path 0.5 {COMMON}",
    "huge_800": f"--model deit_huge_patch14_LS --batch-size 32 --epochs 800 --lr 3e-3 --weight-decay 0.05 --input-size 160 --drop-path 0.6 {COMMON}",
    "base_finetune": f"--model deit_base_patch16_LS --batch-size 64 --drop-path 0.2 {FINETUNE}",
    "large_finetune": f"--model deit_large_patch16_LS --batch-size 8 --drop-path 0.45 {FINETUNE}",
    "huge_finetune": f"--model deit_huge_patch14_LS --batch-size 8 --drop-path 0.55 {FINETUNE}",
}  # fmt: skip


def upstream_model(part: dict[str, Any]) -> nn.Module:
    """The recipe's model of a reference entry, loaded from an upstream-named state dict."""
    flags = ["--model", part["model"], "--input-size", str(part["img_size"]), "--drop-path", "0", "--data-path", "x"]
    model = build_model(RECIPE, parse(RECIPE, flags), part["num_classes"])
    state = {name: tensor_for(name, shape) for name, shape in part["keys"].items()}
    model.load_state_dict(adapt_weights(state, model))
    return model


def test_logits_equal_upstreams():
    part = REFERENCE["forward"]
    model = upstream_model(part).eval()
    with torch.no_grad():
        logits = model(image(part["batch"], part["img_size"]))
    torch.testing.assert_close(logits, torch.tensor(part["logits"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("loss", "flag"), [("bce", "--bce-loss"), ("ce", "--no-bce-loss")])
def test_a_step_at_ratio_zero_equals_upstreams(loss, flag):
    step, part = REFERENCE[f"step_ratio0_{loss}"], REFERENCE["forward"]
    model = upstream_model(part).train()
    criterion = RECIPE.loss(parse(RECIPE, [flag, "--smoothing", "0", "--data-path", "x"]), True)
    augsub = AugSub(model, "masking", 0.0)
    values = []
    for value in augsub.losses(model, image(2, part["img_size"]), torch.tensor(step["target"]), criterion):
        value.backward()
        values.append(value.item() / augsub.weight)
    assert values == pytest.approx([step["main_loss"], step["sub_loss"]], rel=1e-5)
    named = dict(model.named_parameters())
    total = math.sqrt(sum(p.grad.double().square().sum().item() for p in named.values() if p.grad is not None))
    assert total == pytest.approx(step["grad_norm_total"], rel=1e-4)
    for name, norm in step["grad_norm"].items():
        gradient = named[name.replace(".gamma_2", ".ls2.gamma")].grad
        assert gradient is not None and gradient.norm().item() == pytest.approx(norm, rel=1e-4), name


def test_learning_rates_equal_upstreams():
    args = parse(RECIPE, ["--variant", "base_400", "--data-path", "x"])
    optimizer = create_optimizer(RECIPE.param_groups(nn.Linear(2, 2), args), args)
    set_lr = RECIPE.schedule(optimizer, args, 7)
    for epoch, lr in REFERENCE["lr_by_epoch_base_400"].items():
        for update in (int(epoch) * 7, int(epoch) * 7 + 6):
            set_lr(update)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-9), epoch


def test_learning_rate_is_for_512_images_unless_unscaled():
    args = parse(RECIPE, ["--data-path", "x", "--lr", "1e-3"])
    assert RECIPE.scale_lr(args, 2048).lr == pytest.approx(4e-3)
    args = parse(RECIPE, ["--data-path", "x", "--lr", "1e-3", "--unscale-lr"])
    assert RECIPE.scale_lr(args, 2048).lr == 1e-3


def test_repeated_augmentation_draws_upstreams_indices():
    part = REFERENCE["repeated_aug"]
    args = parse(RECIPE, ["--data-path", "x", "--num-workers", "0"])
    process = Process(torch.device("cpu"), part["rank"], part["num_replicas"])
    sampler = build_sampler(range(part["dataset_len"]), process, args.seed, loader_config(args).repeats)
    sampler.set_epoch(part["epoch"])
    indices = [index for index, _ in sampler]
    assert len(indices) == part["len"]
    assert indices[: len(part["first_indices"])] == part["first_indices"]


@pytest.mark.parametrize("name", REFERENCE["param_count"])
def test_parameter_count_equals_upstreams(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == REFERENCE["param_count"][name]


def test_position_embedding_of_another_size_is_interpolated_as_upstreams():
    part = REFERENCE["pos_embed_10_to_14"]
    model = timm.create_model("deit_pico_patch8_LS", img_size=14 * 8, embed_dim=16)
    weight = adapt_weights({"pos_embed": tensor_for("pos_embed", part["shape"])}, model)["pos_embed"]
    assert weight.shape == (1, 196, 16)
    assert weight.sum().item() == pytest.approx(part["sum"], abs=1e-4)
    torch.testing.assert_close(weight[0, 0], torch.tensor(part["row0"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(weight[0, 195], torch.tensor(part["row195"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "giga", "share"), [
    ("deit_small_patch16_LS", 4.599, 0.489), ("deit_base_patch16_LS", 17.564, 0.496),
    ("deit_large_patch16_LS", 61.555, 0.496), ("deit_huge_patch14_LS", 167.295, 0.494),
])  # fmt: skip
def test_multiply_adds_of_main_and_sub_model(name, giga, share):
    with torch.device("meta"):
        model = timm.create_model(name).train()
        augsub, x = AugSub(model, "masking", 0.5), torch.empty(1, 3, 224, 224)

        def count() -> float:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(x)
            return counter.get_total_flops() / 2e9

        main = count()
        with augsub.sub_model():
            sub = count()
    assert main == pytest.approx(giga, rel=0.001)
    assert sub / main == pytest.approx(share, abs=0.001)


def test_every_row_of_upstreams_is_a_variant():
    assert VARIANTS.keys() == UPSTREAM.keys()


@pytest.mark.parametrize("variant", UPSTREAM)
def test_variant_is_upstreams_command_line(variant):
    pasted = vars(parse(RECIPE, [*UPSTREAM[variant].split(), "--data-path", "x", "--output_dir", "y"]))
    named = vars(parse(RECIPE, ["--variant", variant, "--data-path", "x", "--output_dir", "y"]))
    drop = {"variant", "left_to_model"}
    assert {k: v for k, v in pasted.items() if k not in drop} == {k: v for k, v in named.items() if k not in drop}


def test_readme_shows_a_command_for_every_variant():
    text = (ROOT / "deit" / "README.md").read_text()
    assert all(f"--variant {variant} " in text for variant in VARIANTS)


def test_initialisation_is_upstreams():
    torch.manual_seed(0)
    model: Any = timm.create_model("deit_tiny_patch16_LS", drop_path_rate=0.3)
    for weight in (model.pos_embed, model.cls_token, model.head.weight, model.blocks[3].attn.qkv.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert weight.abs().max() < 0.12
    assert model.blocks[3].attn.qkv.bias.abs().max() == 0
    assert model.blocks[3].ls1.gamma.unique().item() == pytest.approx(1e-4)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == [0.3] * 24, "the same in every block"
    assert model.pos_embed.shape[1] == 196, "the class token has no position"


def test_weight_decay_skips_what_upstream_skips():
    model = timm.create_model("deit_tiny_patch16_LS", img_size=32)
    args = argparse.Namespace(weight_decay=0.05)
    decayed = {id(p) for group in RECIPE.param_groups(model, args) if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        skipped = parameter.ndim == 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")
        assert (id(parameter) in decayed) != skipped, name


def test_attention_alone_is_trained_where_asked():
    args = parse(RECIPE, ["--model", "deit_pico_patch8_LS", "--input-size", "32", "--attn-only", "--data-path", "x"])
    model = build_model(RECIPE, args, 10)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    attention = {f"blocks.{i}.attn.{layer}.{part}" for i in range(4) for layer in ("qkv", "proj")
                 for part in ("weight", "bias")}  # fmt: skip
    assert trained == attention | {"pos_embed", "head.weight", "head.bias"}


@pytest.mark.parametrize("flags", [
    "--teacher-model regnety_160", "--teacher-path t.pth", "--distillation-type soft", "--distillation-type hard",
    "--distillation-alpha 0.5", "--distillation-tau 1.0",
])  # fmt: skip
def test_distillation_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(RECIPE, [*flags.split(), "--data-path", "x"])
    assert leaving.value.code == 2
    assert f"{flags.split()[0]}: distillation is not supported" in capsys.readouterr().err


def test_plain_timm_and_reference_masking_agree_on_the_drop_layer():
    """A model built with timm's own rate keeps its layer; one built without gets the same kind."""
    ours: Any = timm.create_model("deit_pico_patch8_LS", img_size=32)
    AugSub(ours, "masking")
    theirs: Any = timm.create_model("deit_pico_patch8_LS", img_size=32, patch_drop_rate=0.3)
    layer = theirs.patch_drop
    AugSub(theirs, "masking")
    assert theirs.patch_drop is layer and layer.prob == 0.3
    assert isinstance(ours.patch_drop, PatchDropout) and ours.patch_drop.prob == 0.0


@pytest.mark.parametrize("kind", ["none", "masking", "dropout", "droppath"])
def test_golden_losses(kind):
    check_golden(RECIPE, kind)
