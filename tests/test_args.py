"""The command line: who overrides whom, spellings, and what is refused in one sentence."""

from __future__ import annotations

import dataclasses
import os

import pytest

from common.args import parse
from deit.recipe import RECIPE

DATA = ["--data-path", "x"]

# each source of settings says a number of its own, so that the number in force names its source
LEVELS = dataclasses.replace(
    RECIPE,
    defaults={"mixup": 1.0, "cutmix": 1.0, "reprob": 0.1, "lr": 1.0, "weight_decay": 1.0},
    variants={"row": {"cutmix": 2.0, "reprob": 0.2, "lr": 2.0, "weight_decay": 2.0}},
    digits={"cutmix": 3.0, "reprob": 0.3},
    from_files=lambda first: {"lr": 4.0, "weight_decay": 4.0},
)


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the parser says as it leaves with status 2."""
    with pytest.raises(SystemExit) as leaving:
        parse(RECIPE, flags)
    assert leaving.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_command_line_over_files_over_variant_over_recipe_over_common():
    args = parse(LEVELS, [*DATA, "--weight-decay", "5", "--variant", "row"])
    assert (args.vflip, args.mixup, args.cutmix, args.lr, args.weight_decay) == (0.0, 1.0, 2.0, 4.0, 5.0)
    assert parse(LEVELS, DATA).cutmix == 1.0


def test_the_digits_settings_take_the_variants_place():
    assert (parse(LEVELS, []).cutmix, parse(LEVELS, []).mixup) == (3.0, 1.0)
    assert parse(LEVELS, ["--cutmix", "5"]).cutmix == 5.0
    assert parse(LEVELS, DATA).reprob == 0.1
    assert parse(LEVELS, ["--data-set", "DIGITS", "--variant", "row"]).cutmix == 2.0


def test_a_row_of_the_table_gives_way_to_the_command_line():
    args = parse(RECIPE, ["--weight-decay", "0.1", *DATA, "--variant", "small_400"])
    assert (args.weight_decay, args.model, args.batch_size) == (0.1, "deit_small_patch16_LS", 256)
    assert parse(RECIPE, [*DATA, "--variant", "small_400"]).weight_decay == 0.03


def test_hyphens_and_underscores_are_alike_in_flags_and_stay_in_values():
    args = parse(RECIPE, ["--data_path", "a_b-c", "--augsub_ratio=0.25", "--no-repeated_aug", "--output_dir=o_o-o"])
    assert (args.data_path, args.augsub_ratio, args.repeated_aug, args.output_dir) == ("a_b-c", 0.25, False, "o_o-o")


@pytest.mark.parametrize(("flag", "value", "name"), [
    ("--img-size", 64, "input_size"), ("--workers", 3, "num_workers"), ("--output", "o", "output_dir"),
    ("--crop-pct", 0.9, "eval_crop_ratio"), ("--accumulation-steps", 2, "accum_iter"), ("--data-dir", "d", "data_path"),
    ("--num-classes", 5, "nb_classes"), ("--pretrained", "w.pth", "finetune"),
])  # fmt: skip
def test_other_trainers_spellings_are_aliases(flag, value, name):
    assert getattr(parse(RECIPE, [*DATA, flag, str(value)]), name) == value


@pytest.mark.parametrize("switch", ["model-ema", "repeated-aug", "pin-mem", "dist-eval", "bce-loss", "ThreeAugment",
                                    "src", "unscale-lr", "train-mode", "attn-only", "compile", "resplit"])  # fmt: skip
def test_each_switch_goes_on_and_off_and_the_last_word_counts(switch):
    name = switch.replace("-", "_")
    for flags, state in (
        ([f"--{switch}"], True),
        ([f"--no-{switch}"], False),
        ([f"--{switch}", f"--no_{name}"], False),
    ):
        assert getattr(parse(RECIPE, [*DATA, *flags]), name) is state


def test_none_is_no_policy():
    assert parse(RECIPE, [*DATA, "--aa", "none"]).aa is None
    assert parse(RECIPE, [*DATA, "--aa", "original"]).aa == "original"


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
    assert args.num_workers == min(10, os.cpu_count() or 1)


def test_digits_stand_in_where_no_data_is_named():
    args = parse(RECIPE, ["--augsub", "masking"])
    assert (args.data_set, args.data_path, args.model) == ("DIGITS", None, RECIPE.digits["model"])
    full_size = parse(RECIPE, ["--data-set", "DIGITS", "--variant", "small_400"])
    assert (full_size.data_set, full_size.model) == ("DIGITS", "deit_small_patch16_LS")
    assert parse(RECIPE, DATA).data_set == "IMNET"
    assert parse(RECIPE, ["--data-set", "hfds/mnist"]).data_set == "hfds/mnist"


def test_runs_on_the_digits_that_differ_have_folders_that_differ():
    folder = lambda *flags: parse(RECIPE, list(flags)).output_dir  # noqa: E731
    assert folder("--augsub", "masking") == "output/deit_digits_masking"
    assert folder("--epochs", "3") == "output/deit_digits_none_epochs-3"
    assert folder("--finetune", "a/b.pth").count("/") == 1
    assert folder("--num-workers", "3") == folder(), "what does not make another run makes no other folder"
    assert folder("--output-dir", "mine", "--epochs", "3") == "mine"
    assert folder("--output-dir", "") == "", "asked for, nothing is saved"


REFUSED = [
    (["--augsub-ration", "1"], "unknown flag --augsub-ration: did you mean --augsub-ratio?"),
    (["--agusub_ratio=1"], "unknown flag --agusub-ratio: did you mean --augsub-ratio?"),
    (["--epoch", "3"], "unknown flag --epoch: did you mean --epochs?"),
    (["--xyz"], "unknown flag --xyz; --help lists them all"),
    (["stray"], "what is 'stray'?"),
    (["--lr", "0.1", "0.2"], "what is '0.2'?"),
    (["--epochs"], "argument --epochs: expected one argument"),
    (["--dist-eval=yes"], "argument --dist-eval/--no-dist-eval: ignored explicit argument 'yes'"),
    (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
    (["--epochs", "1.5"], "argument --epochs: invalid int value: '1.5'"),
    (["--lr", "5e-"], "argument --lr: invalid float value: '5e-'"),
    (["--scale", "0.5"], "argument --scale: expected 2 arguments"),
    (["--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
    (["--batch-size", "0"], "--batch-size 0: at least 1 is needed"),
    (["--epochs", "0"], "--epochs 0: at least 1 is needed"),
    (["--accum-iter", "0"], "--accum-iter 0: at least 1 is needed"),
    (["--log-interval", "0"], "--log-interval 0: at least 1 is needed"),
    (["--num-workers", "-1"], "--num-workers -1: at least 0 is needed"),
    (["--batch-size", "7", *DATA], "--batch-size 7: mixup pairs images, so it must be even"),
    (["--batch-size", "7", *DATA, "--mixup", "0"], "--batch-size 7: mixup pairs images, so it must be even"),
    (["--batch-size", "7", *DATA, "--mixup", "0", "--cutmix", "0", "--cutmix-minmax", "0.2", "0.8"], "must be even"),
    (["--augsub", "masks"], "argument --augsub: invalid choice: 'masks'"),
    (["--augsub-ratio", "1.0"], "--augsub-ratio 1.0 is outside [0, 1)"),
    (["--augsub-ratio=-0.1"], "--augsub-ratio -0.1 is outside [0, 1)"),
    (["--augsub_ratio", "nan"], "--augsub-ratio nan: a finite number is needed"),
    (["--drop", "1"], "--drop 1.0 is outside [0, 1)"),
    (["--drop-path", "-0.5"], "--drop-path -0.5 is outside [0, 1)"),
    (["--reprob", "2"], "--reprob 2.0 is outside [0, 1]"),
    (["--smoothing", "-0.1"], "--smoothing -0.1 is outside [0, 1]"),
    (["--mixup-prob", "1.1"], "--mixup-prob 1.1 is outside [0, 1]"),
    (["--eval-crop-ratio", "0"], "--eval-crop-ratio 0.0 is outside (0, 1]"),
    (["--crop-pct", "87.5"], "--eval-crop-ratio 87.5 is outside (0, 1]"),
    (["--variant", "smal_400"], "argument --variant: invalid choice: 'smal_400'"),
    (["--variant", "small_400"], "--variant small_400 trains on ImageNet: --data-path says where it is"),
    (["--data-set", "IMNT"], "unknown data set 'IMNT': did you mean IMNET?"),
    (["--data-set", "digits"], "unknown data set 'digits': did you mean DIGITS?"),
    (["--data-set", "svhn"], "unknown data set 'svhn': use IMNET, CIFAR10, CIFAR, INAT, INAT19, DIGITS or a timm name"),
    (["--data-set", "CIFAR"], "--data-set CIFAR needs --data-path"),
    (["--teacher-model", "regnety_160"], "--teacher-model: distillation is not offered here"),
    (["--teacher-path=t.pth"], "--teacher-path: distillation is not offered here"),
    (["--distillation-type", "hard"], "--distillation-type: distillation is not offered here"),
    (["--distillation_alpha", "0.5"], "--distillation-alpha: distillation is not offered here"),
    (["--distillation-tau", "1.0"], "--distillation-tau: distillation is not offered here"),
    (["--no-train-mode", "--augsub", "masking"], "--augsub masking needs --train-mode"),
    (["--sched", "plateau"], "--sched plateau depends on past results"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "sentence"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_bad_input_is_one_sentence_and_status_2(flags, sentence, capsys):
    error = refusal(flags, capsys)
    assert sentence in error
    assert error.count("\n") == 1


def test_an_odd_batch_will_do_without_mixup():
    assert parse(RECIPE, [*DATA, "--batch-size", "7", "--mixup", "0", "--cutmix", "0"]).batch_size == 7


def test_no_train_mode_will_do_for_the_plain_recipe():
    assert parse(RECIPE, [*DATA, "--no-train-mode"]).train_mode is False


def test_distillation_none_is_upstreams_default_and_passes():
    assert parse(RECIPE, ["--distillation-type", "none"]).recipe == "deit"


def test_help_shows_the_recipes_defaults(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(RECIPE, ["--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--mixup MIXUP mixup alpha (default: 0.8)" in text
    assert "teacher" not in text and "distillation" not in text


def test_one_process_speaks_of_bad_input(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert refusal(["--augsub-ratio", "2"], capsys) == ""


def test_an_empty_data_path_is_a_mistake_of_a_script(capsys):
    """As --data-path "$IMAGENET" is, where nobody has set IMAGENET."""
    assert 'the data path is ""' in refusal(["--data-path", ""], capsys)
