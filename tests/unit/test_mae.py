"""The MAE finetuning recipe against the numbers of the published trainer, its weights and upstream's command lines."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.args import parse
from common.checkpoint.weights import load_weights
from common.optim import create_optimizer
from common.trainer import build_model
from mae.models import adapt_weights
from mae.recipe import RECIPE, VARIANTS
from tests.commands import ROOT
from tests.golden import check_golden
from tests.published import image, reference, tensor_for
from tests.runs import build
from tests.sample_data import make_shards

REFERENCE = reference("mae")
COMMON = "--weight_decay 0.05 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval --augsub masking --augsub_ratio 0.5"
UPSTREAM = {
    "base_100": f"--model vit_base_patch16 --batch_size 128 --accum_iter 1 --epochs 100 --blr 5e-4 --layer_decay 0.65 --drop_path 0.1 {COMMON}",
    "large_50": f"--model vit_large_patch16 --batch_size 32 --accum_iter 4 --epochs 50 --blr 1e-3 --layer_decay 0.75 --drop_path 0.2 {COMMON}",
    "huge_50": f"--model vit_huge_patch14 --batch_size 16 --accum_iter 1 --epochs 50 --blr 1e-3 --layer_decay 0.75 --drop_path 0.3 {COMMON}",
}
DATA = ["--data-path", "x"]


@cache
def weights_of(part):
    """Fixed weights of a model in the reference, of ViT-B's size: made once for all tests, which leave them as they are."""
    return {name: tensor_for(name, shape) for name, shape in REFERENCE[part]["keys"].items()}


@pytest.mark.parametrize(
    ("name", "flag"), [("forward_global_pool", "--global-pool"), ("forward_cls_token", "--cls_token")]
)
def test_logits_equal_upstreams(name, flag):
    part = REFERENCE[name]
    args = parse(
        RECIPE, [*DATA, "--model", part["model"], "--input-size", str(part["img_size"]), flag, "--nb-classes", "7"]
    )
    model = build_model(RECIPE, args, part["num_classes"]).eval()
    model.load_state_dict(adapt_weights(weights_of(name), model))
    with torch.no_grad():
        logits = model(image(part["batch"], part["img_size"]))
    torch.testing.assert_close(logits, torch.tensor(part["logits"]), rtol=0, atol=2e-5)


def test_layer_decay_equals_upstreams():
    args = parse(RECIPE, [*DATA, "--variant", "large_50"])
    with torch.device("meta"):
        model = build_model(RECIPE, args, 1000)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"])
             for group in RECIPE.param_groups(model, args) for p in group["params"]}  # fmt: skip
    for name, expected in REFERENCE["layer_decay_large_0.75"].items():
        assert found[name] == pytest.approx(expected), name
    assert len(found) == len(names)


def test_learning_rates_equal_upstreams():
    args = RECIPE.scale_lr(parse(RECIPE, [*DATA, "--variant", "large_50"]), 1024)
    assert args.lr == pytest.approx(4e-3)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight], "lr_scale": 0.5}, {"params": [model.bias]}], args.lr)
    set_lr = RECIPE.schedule(optimizer, args, 100)
    for epoch, lr in REFERENCE["lr_by_fractional_epoch_large_50"]:
        set_lr(round(epoch * 100))
        assert optimizer.param_groups[1]["lr"] == pytest.approx(lr, rel=1e-9, abs=1e-12), epoch
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * lr, rel=1e-9, abs=1e-12)


def test_the_rate_follows_the_share_of_the_batches_that_are_done():
    """Ten batches in updates of four, four and two: at 0, 0.4 and 0.8 of the epoch."""
    args = parse(
        RECIPE, ["--data-path", "x", "--lr", "1e-3", "--epochs", "20", "--warmup-epochs", "5", "--min-lr", "1e-6"]
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    set_lr = RECIPE.schedule(optimizer, args, 10 / 4)
    for epoch in (0, 3, 7, 19):
        for done, share in enumerate((0.0, 0.4, 0.8)):
            set_lr(3 * epoch + done)
            at = epoch + share
            cosine = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (at - 5) / 15))
            expected = 1e-3 * at / 5 if at < 5 else cosine
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6), at


@pytest.mark.parametrize(
    ("name", "giga"), [("vit_base_patch16", 17.5), ("vit_large_patch16", 61.6), ("vit_huge_patch14", 167.4)]
)
def test_parameters_and_multiply_adds_of_each_row(name, giga):
    with torch.device("meta"):
        model = timm.create_model(name)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == REFERENCE["param_count"][name]
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.015)


def pretrained(tmp_path, **changes):
    """A pretrained MAE as upstream saves it: an encoder with its last norm, a decoder, no classifier."""
    encoder = {name: weight for name, weight in weights_of("forward_cls_token").items() if "head" not in name}
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 768)}
    state = {k: v for k, v in (encoder | decoder | changes).items() if v is not None}
    torch.save({"model": state}, tmp_path / "mae.pth")
    return state


def finetuned(tmp_path, *flags):
    args = parse(RECIPE, [*DATA, "--model", "vit_base_patch16", "--input-size", "32", *flags])
    model = build_model(RECIPE, args, 7)
    load_weights(model, tmp_path / "mae.pth", RECIPE.adapt_weights, new_head=True, head_std=RECIPE.new_head_std)
    return model.state_dict()


def test_a_pretrained_encoder_loads_with_a_new_head(tmp_path):
    state = pretrained(tmp_path)
    model = finetuned(tmp_path)
    assert torch.equal(model["blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])
    assert 1e-5 < model["head.weight"].std() < 3e-5 and not model["head.bias"].any()
    assert torch.equal(model["fc_norm.weight"], torch.ones(768))
    assert torch.equal(finetuned(tmp_path, "--cls-token")["norm.weight"], state["norm.weight"])
    pretrained(tmp_path, **{"norm.weight": None, "norm.bias": None})
    finetuned(tmp_path)


def test_another_patch_grid_is_interpolated(tmp_path):
    state = pretrained(tmp_path, pos_embed=tensor_for("pos_embed", [1, 17, 768]))
    positions = finetuned(tmp_path)["pos_embed"]
    assert positions.shape == (1, 5, 768)
    assert torch.equal(positions[:, 0], state["pos_embed"][:, 0]), "the class token's stays"


def test_a_pretrained_file_without_encoder_weights_is_refused(tmp_path):
    pretrained(tmp_path, **{"blocks.7.attn.qkv.weight": None})
    with pytest.raises(ValueError, match=r"another architecture: missing key blocks\.7\.attn\.qkv\.weight"):
        finetuned(tmp_path)


@pytest.mark.parametrize("variant", UPSTREAM)
def test_variant_is_upstreams_command_line(variant):
    pasted = vars(parse(RECIPE, [*UPSTREAM[variant].split(), "--data_path", "x", "--finetune", "y"]))
    named = vars(parse(RECIPE, [*DATA, "--variant", variant, "--finetune", "y", "--augsub", "masking"]))
    drop = {"variant", "left_to_model"}
    assert {k: v for k, v in pasted.items() if k not in drop} == {k: v for k, v in named.items() if k not in drop}


# FT-CLIP's settings (arXiv 2212.06138): epochs, warm-up, learning rate at 2,048 images a step, layer decay, layers
FT_CLIP = {"clip_base": (50, 10, 6e-4, 0.6, 12), "clip_large": (30, 5, 4e-4, 0.65, 24)}


@pytest.mark.parametrize("variant", FT_CLIP)
def test_ft_clips_settings(variant):
    epochs, warmup_epochs, lr, layer_decay, layers = FT_CLIP[variant]
    args = parse(RECIPE, [*DATA, "--variant", variant])
    expected = {"epochs": epochs, "warmup_epochs": warmup_epochs, "layer_decay": layer_decay, "weight_decay": 0.05,
                "min_lr": 1e-6, "opt": "adamw", "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "model_ema": True,
                "model_ema_decay": 0.9998, "global_pool": True, "finetune": "timm"}  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.batch_size * args.accum_iter * 8 == 2048
    assert RECIPE.scale_lr(args, 2048).lr == pytest.approx(lr)
    cfg = timm.get_pretrained_cfg(args.model)
    assert (tuple(args.mean), tuple(args.std)) == (cfg.mean, cfg.std) == (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    check_layers(args, layers)


def check_layers(args, layers: int) -> None:
    """Mean-pooled, with a learning rate for each layer, from the embeddings (the lowest) to the classifier."""
    with torch.device("meta"):
        model: Any = build_model(RECIPE, args, 1000)
    assert model.global_pool == "avg" and len(model.blocks) == layers
    groups = RECIPE.param_groups(model, args)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert scales["patch_embed.proj.weight"] == scales["cls_token"] == pytest.approx(args.layer_decay ** (layers + 1))
    assert scales[f"blocks.{layers - 1}.norm1.weight"] == pytest.approx(args.layer_decay)
    assert scales["head.weight"] == 1


@pytest.mark.parametrize("tag", [
    "vit_base_patch14_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2.lvd142m", "vit_base_patch16_dinov3.lvd1689m",
    "beitv2_base_patch16_224.in1k_ft_in22k", "vit_base_patch16_224.mae",
])  # fmt: skip
def test_any_vision_transformer_of_timms_has_layers(tag):
    check_layers(parse(RECIPE, [*DATA, "--model", tag, "--finetune", "timm", "--layer-decay", "0.65"]), 12)


def test_the_tags_of_the_page_are_timms():
    """Each has weights in timm, and is among what `--finetune timm` takes."""
    text = (ROOT / "mae" / "README.md").read_text()
    tags = set(re.findall(r"--model ([a-z]\S+\.\S+) --finetune timm", text))
    tags |= {settings["model"] for settings in VARIANTS.values() if settings.get("finetune") == "timm"}
    assert len(tags) == 6 and tags <= set(timm.list_pretrained())


def test_upstreams_name_for_the_huge_model_is_an_alias():
    with torch.device("meta"):
        assert timm.create_model("vit_huge_patch16").patch_embed.patch_size == (14, 14)


def test_evaluation_has_a_margin_up_to_224_pixels():
    assert parse(RECIPE, DATA).eval_crop_ratio == 0.875
    assert parse(RECIPE, [*DATA, "--input_size", "384"]).eval_crop_ratio == 1.0


def test_upstreams_defaults():
    args = parse(RECIPE, DATA)
    expected = {"batch_size": 64, "epochs": 50, "accum_iter": 1, "model": "vit_large_patch16", "input_size": 224,
                "drop_path": 0.1, "clip_grad": None, "weight_decay": 0.05, "lr": None, "blr": 1e-3, "layer_decay": 0.75,
                "min_lr": 1e-6, "warmup_epochs": 5, "color_jitter": None, "aa": "rand-m9-mstd0.5-inc1",
                "smoothing": 0.1, "reprob": 0.25, "remode": "pixel", "recount": 1, "resplit": False, "mixup": 0.0,
                "cutmix": 0.0, "mixup_prob": 1.0, "global_pool": True, "output_dir": "./output_dir", "seed": 0, "start_epoch": 0, "pin_mem": True, "model_ema": False}  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


SMALL = ["--model", "vit_pico_patch8", "--input-size", "32", "--batch-size", "4", "--num-workers", "0", "--mixup", "0",
         "--output-dir", ""]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "classes"), [([], 3), (["--nb-classes", "1000"], 1000), (["--eval", "--throughput"], 3)]
)
def test_the_head_has_the_classes_of_the_data_unless_a_flag_says_so(flags, classes, jpegs, capsys):
    folder = jpegs(classes=("cat", "dog", "owl"))
    run = build(*SMALL, "--data-path", str(folder), *flags, recipe=RECIPE)
    assert run.trainer.raw_model.get_classifier().out_features == classes
    assert f"data: IMNET {folder}, {classes} classes\n" in capsys.readouterr().out
    assert run.args.nb_classes == run.identity.settings["nb_classes"] == classes, "as earlier checkpoints have it"


def test_the_head_has_1000_classes_where_nobody_says(tmp_path):
    run = build(*SMALL, *make_shards(tmp_path / "shards"), recipe=RECIPE)
    assert run.trainer.raw_model.get_classifier().out_features == 1000


def test_optimizer_is_adamw_with_its_usual_betas():
    args = RECIPE.scale_lr(parse(RECIPE, [*DATA, "--model", "vit_pico_patch8", "--input-size", "32"]), 256)
    groups = RECIPE.param_groups(build_model(RECIPE, args, 10), args)
    optimizer = create_optimizer(groups, args)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.999)


def test_readme_shows_a_command_for_every_variant():
    text = (ROOT / "mae" / "README.md").read_text()
    assert all(f"--variant {variant} " in text for variant in VARIANTS)


@pytest.mark.parametrize("kind", ["none", "masking", "dropout", "droppath"])
def test_golden_losses(kind):
    check_golden(RECIPE, kind)
