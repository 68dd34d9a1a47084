"""The command line: who overrides whom, spellings, and what is refused in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import typing
from collections.abc import Sequence

import pytest

from common.args import create_parser, parse
from deit.recipe import RECIPE, DeiT
from scripts.launch.registry import RECIPES
from tests.commands import ROOT

DATA = ["--data-path", "x"]


# each source of settings says a number of its own, so that the number in force names its source
class Levels(DeiT):
    defaults = {"mixup": 1.0, "cutmix": 1.0, "reprob": 0.1, "lr": 1.0, "weight_decay": 1.0}  # noqa: RUF012
    variants = {"row": {"cutmix": 2.0, "reprob": 0.2, "lr": 2.0, "weight_decay": 2.0}}  # noqa: RUF012
    digits = {"cutmix": 3.0, "reprob": 0.3}  # noqa: RUF012

    def read_config(self, args):
        return {"lr": 4.0, "weight_decay": 4.0}


LEVELS = Levels()


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
    assert parse(LEVELS, ["--data-set", "MNIST5K"]).cutmix == 3.0


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
    assert folder("--data-set", "MNIST5K") == "output/deit_mnist5k_none"
    assert folder("--finetune", "a/b.pth").count("/") == 1
    assert folder("--num-workers", "3") == folder(), "what does not make another run makes no other folder"
    assert folder("--output-dir", "mine", "--epochs", "3") == "mine"
    assert folder("--output-dir", "") == "", "asked for, nothing is saved"


REFUSED = [
    (["--augsub-ration", "1"], "unknown flag --augsub-ration: did you mean --augsub-ratio?"),
    (["--agusub_ratio=1"], "unknown flag --agusub-ratio: did you mean --augsub-ratio?"),
    (["--epoch", "3"], "unknown flag --epoch: did you mean --epochs?"),
    (["--xyz"], "unknown flag --xyz; --help lists them all"),
    (["stray"], "unexpected argument 'stray'"),
    (["--lr", "0.1", "0.2"], "unexpected argument '0.2'"),
    (["--epochs"], "argument --epochs: expected one argument"),
    (["--dist-eval=yes"], "argument --dist-eval/--no-dist-eval: ignored explicit argument 'yes'"),
    (["--batch-size", "many"], "argument --batch-size: 'many': expected an integer of at least 1"),
    (["--epochs", "1.5"], "argument --epochs: '1.5': expected an integer of at least 1"),
    (["--lr", "5e-"], "argument --lr: '5e-': expected a finite number of at least 0"),
    (["--scale", "0.5"], "argument --scale: expected 2 arguments"),
    (["--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
    (["--batch-size", "0"], "argument --batch-size: '0': expected an integer of at least 1"),
    (["--epochs", "0"], "argument --epochs: '0': expected an integer of at least 1"),
    (["--accum-iter", "0"], "argument --accum-iter/--accumulation-steps: '0': expected an integer of at least 1"),
    (["--log-interval", "0"], "argument --log-interval: '0': expected an integer of at least 1"),
    (["--num-workers", "-1"], "argument --num-workers/--workers: '-1': expected an integer of at least 0"),
    (["--batch-size", "7", *DATA], "--batch-size 7: odd, but mixup needs pairs of images; use an even one"),
    (["--batch-size", "7", *DATA, "--mixup", "0"], "--batch-size 7: odd, but mixup needs pairs of images; use an even one"),
    (["--batch-size", "7", *DATA, "--mixup", "0", "--cutmix", "0", "--cutmix-minmax", "0.2", "0.8"], "use an even one"),
    (["--augsub", "masks"], "argument --augsub: invalid choice: 'masks'"),
    (["--augsub-ratio", "1.0"], "argument --augsub-ratio: '1.0': expected a number in [0, 1)"),
    (["--augsub-ratio=-0.1"], "argument --augsub-ratio: '-0.1': expected a number in [0, 1)"),
    (["--augsub_ratio", "nan"], "argument --augsub-ratio: 'nan': expected a number in [0, 1)"),
    (["--drop", "1"], "argument --drop: '1': expected a number in [0, 1)"),
    (["--drop-path", "-0.5"], "argument --drop-path: '-0.5': expected a number in [0, 1)"),
    (["--reprob", "2"], "argument --reprob: '2': expected a number in [0, 1]"),
    (["--smoothing", "-0.1"], "argument --smoothing: '-0.1': expected a number in [0, 1]"),
    (["--mixup-prob", "1.1"], "argument --mixup-prob: '1.1': expected a number in [0, 1]"),
    (["--eval-crop-ratio", "0"], "argument --eval-crop-ratio/--crop-pct: '0': expected a number in (0, 1]"),
    (["--crop-pct", "87.5"], "argument --eval-crop-ratio/--crop-pct: '87.5': expected a number in (0, 1]"),
    (["--variant", "smal_400"], "argument --variant: invalid choice: 'smal_400'"),
    (["--variant", "small_400"], "--variant small_400: trains on ImageNet; pass its folder as --data-path"),
    (["--data-set", "IMNT"], "argument --data-set: 'IMNT': unknown data set; did you mean IMNET?"),
    (["--data-set", "digits"], "argument --data-set: 'digits': unknown data set; did you mean DIGITS?"),
    (["--data-set", "svhn"], "argument --data-set: 'svhn': unknown data set; use IMNET, CIFAR10, CIFAR, INAT, INAT19, DIGITS, MNIST5K or a timm name"),
    (["--data-set", "CIFAR"], "--data-set CIFAR: needs --data-path"),
    (["--teacher-model", "regnety_160"], "--teacher-model: distillation is not supported"),
    (["--teacher-path=t.pth"], "--teacher-path: distillation is not supported"),
    (["--distillation-type", "hard"], "--distillation-type: distillation is not supported"),
    (["--distillation_alpha", "0.5"], "--distillation-alpha: distillation is not supported"),
    (["--distillation-tau", "1.0"], "--distillation-tau: distillation is not supported"),
    (["--no-train-mode", "--augsub", "masking"], "--augsub masking: needs --train-mode"),
    (["--sched", "plateau"], "argument --sched: 'plateau': depends on past results"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "sentence"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_bad_input_is_one_sentence_and_status_2(flags, sentence, capsys):
    error = refusal(flags, capsys)
    assert sentence in error
    assert error.count("\n") == 1


def test_a_warm_up_may_cover_a_run_that_trains_nothing_or_tries_the_digits():
    for flags in ([*DATA, "--eval"], [*DATA, "--throughput"], [*DATA, "--sched", "none"], []):
        assert parse(RECIPE, ["--epochs", "2", *flags]).warmup_epochs == 5
    assert parse(RECIPE, [*DATA, "--epochs", "6"]).epochs == 6


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
    assert "--data-path is empty (unset variable in a script?)" in refusal(["--data-path", ""], capsys)


def annotations_of(recipe) -> dict[str, typing.Any]:
    return typing.get_type_hints(recipe.args_class)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_each_setting_is_annotated_and_each_annotation_is_a_setting(recipe):
    assert annotations_of(recipe).keys() == vars(parse(recipe, DATA)).keys()
    flags = {action.dest for action in create_parser(recipe)._actions if action.default != "==SUPPRESS=="}
    assert flags <= annotations_of(recipe).keys()


def fits(value: object, hint: typing.Any) -> bool:
    """Whether a value is of an annotated type."""
    if isinstance(hint, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Sequence:
        return isinstance(value, (list, tuple)) and all(fits(item, *typing.get_args(hint)) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_defaults_digits_and_variants_are_of_the_annotated_types(recipe):
    hints = annotations_of(recipe)
    for flags in ([], DATA, *([*DATA, "--variant", variant] for variant in recipe.variants)):
        for name, value in vars(parse(recipe, flags)).items():
            assert fits(value, hints[name]), f"{name} = {value!r}"


def test_a_misspelled_setting_is_an_error_of_type_checking(tmp_path):
    """argparse.Namespace alone would take any name."""
    (tmp_path / "use.py").write_text("""
from common.train_args import TrainArgs
def read(args: TrainArgs) -> None:
    args.batch_size
    args.batch_sise
    args.epohcs = 3
""")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "use.py")]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [line.rpartition("use.py:")[2] for line in checked.stdout.splitlines() if ": error:" in line]
    assert [error.partition(":")[0] for error in errors] == ["5", "6"], checked.stdout + checked.stderr


class WrongValues(DeiT):
    variants = {  # noqa: RUF012
        "type": {"epochs": 1.5}, "range": {"batch_size": 0}, "choice": {"remode": "pixels"},
        "count": {"scale": (0.5,)}, "item": {"ratio": (0, 1)}, "together": {"scale": (1.0, 0.5)},
    }  # fmt: skip


@pytest.mark.parametrize(("variant", "sentence"), [
    ("type", "argument --epochs: '1.5': expected an integer of at least 1"),
    ("range", "argument --batch-size: '0': expected an integer of at least 1"),
    ("choice", "argument --remode: invalid choice: 'pixels'"),
    ("count", "argument --scale: expected 2 arguments"),
    ("item", "argument --ratio: '0': expected a finite number above 0"),
    ("together", "--scale 1.0 0.5: expected 0 < min <= max"),
])  # fmt: skip
def test_values_of_a_variant_are_checked_as_those_of_the_command_line(variant, sentence, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(WrongValues(), [*DATA, "--variant", variant])
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and sentence in error and error.count("\n") == 1


TOGETHER = [
    (["--ratio", "2", "1"], "--ratio 2.0 1.0: expected 0 < min <= max"),
    (["--lr-noise", "0.1", "0.2", "0.3"], "--lr-noise: 3 values; give one or two, start [end]"),
    (["--opt-betas", "0.9"], "--opt-betas 0.9: --opt adamw takes 2 values"),
    (["--opt", "adan", "--opt-betas", "0.9", "0.9"], "--opt-betas 0.9 0.9: --opt adan takes 3 values"),
    (["--cutmix-minmax", "0.5", "0.5"], "--cutmix-minmax 0.5 0.5: expected min < max by a pixel or more"),
    (["--opt", "adahessian"], "argument --opt: 'adahessian': second-order optimizers are not supported"),
    (["--seed", "4294967296"], "argument --seed: '4294967296': expected an integer in [0, 2**32)"),
    (["--device", "tpu"], "argument --device: 'tpu': unknown device; use cuda or cpu"),
]


@pytest.mark.parametrize(("flags", "sentence"), TOGETHER, ids=[" ".join(flags) for flags, _ in TOGETHER])
def test_flags_are_checked_against_each_other(flags, sentence, capsys):
    assert sentence in refusal([*DATA, *flags], capsys)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_checking_changes_nothing(recipe):
    args = parse(recipe, DATA)
    before = dict(vars(args))
    recipe.check_args(args)
    assert vars(args) == before
