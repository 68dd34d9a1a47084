"""The command line: precedence, spellings, and what is refused in one sentence."""

from __future__ import annotations

import pytest

from common.args import parse
from deit.recipe import RECIPE

DATA = ["--data-path", "x"]


def test_command_line_over_variant_over_recipe_over_common():
    assert parse(RECIPE, DATA).weight_decay == 0.05  # common
    assert parse(RECIPE, DATA).mixup == 0.8  # recipe
    assert parse(RECIPE, [*DATA, "--variant", "small_400"]).weight_decay == 0.03
    args = parse(RECIPE, ["--weight-decay", "0.1", *DATA, "--variant", "small_400"])
    assert (args.weight_decay, args.model) == (0.1, "deit_small_patch16_LS")


def test_hyphens_and_underscores_are_alike():
    args = parse(RECIPE, ["--data_path", "a_b", "--augsub_ratio=0.25", "--no-repeated_aug", "--output_dir", "o_o"])
    assert (args.data_path, args.augsub_ratio, args.repeated_aug, args.output_dir) == ("a_b", 0.25, False, "o_o")


def test_other_trainers_spellings_are_aliases():
    flags = ["--img-size", "64", "--workers", "3", "--output", "o", "--crop-pct", "0.9", "--accumulation-steps", "2"]
    args = parse(RECIPE, [*DATA, *flags])
    assert (args.input_size, args.num_workers, args.output_dir, args.eval_crop_ratio, args.accum_iter) == (
        64, 3, "o", 0.9, 2)  # fmt: skip


def test_upstreams_defaults():
    args = parse(RECIPE, DATA)
    expected = {
        "batch_size": 64, "epochs": 300, "bce_loss": False, "unscale_lr": False, "model": "deit_base_patch16_224",
        "input_size": 224, "drop": 0.0, "drop_path": 0.1, "model_ema": True, "model_ema_decay": 0.99996,
        "model_ema_force_cpu": False, "opt": "adamw", "opt_eps": 1e-8, "opt_betas": None, "clip_grad": None,
        "momentum": 0.9, "weight_decay": 0.05, "sched": "cosine", "lr": 5e-4, "lr_noise": None, "lr_noise_pct": 0.67,
        "lr_noise_std": 1.0, "warmup_lr": 1e-6, "min_lr": 1e-5, "decay_epochs": 30, "warmup_epochs": 5,
        "cooldown_epochs": 10, "patience_epochs": 10, "decay_rate": 0.1, "color_jitter": 0.3,
        "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1, "train_interpolation": "bicubic", "repeated_aug": True,
        "train_mode": True, "ThreeAugment": False, "src": False, "reprob": 0.25, "remode": "pixel", "recount": 1,
        "resplit": False, "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None, "mixup_prob": 1.0,
        "mixup_switch_prob": 0.5, "mixup_mode": "batch", "augsub": "none", "augsub_ratio": 0.5, "finetune": "",
        "attn_only": False, "data_set": "IMNET", "inat_category": "name", "output_dir": "", "seed": 0, "resume": "",
        "start_epoch": 0, "eval": False, "eval_crop_ratio": 0.875, "dist_eval": False, "pin_mem": True,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_digits_stand_in_where_no_data_is_named():
    args = parse(RECIPE, ["--augsub", "masking"])
    assert (args.data_set, args.model) == ("DIGITS", "deit_pico_patch8_LS")
    assert args.output_dir == "output/deit_digits_masking"
    assert parse(RECIPE, ["--epochs", "3"]).output_dir == "output/deit_digits_none_epochs-3"
    assert parse(RECIPE, ["--num-workers", "3", "--output-dir", "mine"]).output_dir == "mine"
    full_size = parse(RECIPE, ["--data-set", "DIGITS", "--variant", "small_400"])
    assert full_size.model == "deit_small_patch16_LS"


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--augsub-ration", "1"], "unknown flag --augsub-ration: did you mean --augsub-ratio?"),
    (["--xyz"], "unknown flag --xyz; --help lists them all"),
    (["stray"], "what is 'stray'?"),
    (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
    (["--batch-size", "0"], "--batch-size 0: at least 1 is needed"),
    (["--batch-size", "7", *DATA], "--batch-size 7: mixup pairs images, so it must be even"),
    (["--augsub", "masks"], "argument --augsub: invalid choice: 'masks'"),
    (["--augsub-ratio", "1.0"], "--augsub-ratio 1.0 is outside [0, 1)"),
    (["--augsub-ratio=-0.1"], "--augsub-ratio -0.1 is outside [0, 1)"),
    (["--augsub_ratio", "nan"], "--augsub-ratio nan is outside [0, 1)"),
    (["--reprob", "2"], "--reprob 2.0 is outside [0, 1]"),
    (["--variant", "smal_400"], "argument --variant: invalid choice: 'smal_400'"),
    (["--variant", "small_400"], "--variant small_400 trains on ImageNet: --data-path says where it is"),
    (["--data-set", "IMNT"], "unknown data set 'IMNT': did you mean IMNET?"),
    (["--data-set", "CIFAR"], "--data-set CIFAR needs --data-path"),
    (["--teacher-model", "regnety_160"], "--teacher-model: distillation is not offered here"),
    (["--distillation-type", "hard"], "--distillation-type: distillation is not offered here"),
    (["--no-train-mode", "--augsub", "masking"], "--augsub masking needs --train-mode"),
    (["--sched", "plateau"], "--sched plateau depends on past results"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_status_2(flags, sentence, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(RECIPE, flags)
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_distillation_none_is_upstreams_default_and_passes():
    assert parse(RECIPE, ["--distillation-type", "none"]).recipe == "deit"


def test_help_shows_the_recipes_defaults(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(RECIPE, ["--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--mixup MIXUP mixup alpha (default: 0.8)" in text
    assert "teacher" not in text
