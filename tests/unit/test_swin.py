"""The Swin recipe against the numbers of the published trainer, its configuration files and its weights."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.args import parse
from common.augsub import AugSub
from common.checkpoint import io as files
from common.checkpoint.weights import load_weights
from common.cli import run
from common.distributed import Process
from common.run import Run, build_run
from common.trainer import Trainer, build_model
from swin.config import KEYS
from swin.recipe import RECIPE, VARIANTS
from tests.commands import ROOT
from tests.golden import check_golden
from tests.published import image, reference, tensor_for

REFERENCE = reference("swin")
DATA = ["--data-path", "x"]
CFG = "configs/swin/swin_{}_patch4_window7_224.yaml"


def published(*flags: str):
    """Swin-T with the reference's weights, loaded as Microsoft's file."""
    part = REFERENCE["forward"]
    model = build_model(RECIPE, parse(RECIPE, [*DATA, "--cfg", CFG.format("tiny"), *flags]), part["num_classes"])
    AugSub(model, "masking")
    state = {name: tensor_for(name, shape) for name, shape in part["keys"].items()}
    return model, state


def test_logits_equal_upstreams_from_microsofts_file(tmp_path):
    model, state = published()
    torch.save({"model": state, "epoch": 1}, tmp_path / "swin.pth")
    load_weights(model, tmp_path / "swin.pth", RECIPE.adapt_weights)
    part = REFERENCE["forward"]
    with torch.no_grad():
        logits = model.eval()(image(part["batch"], 224))
    torch.testing.assert_close(logits, torch.tensor(part["logits"]), rtol=0, atol=2e-5)
    assert torch.equal(model.mask_token, state["mask_token"])


def test_weight_decay_skips_what_upstream_skips():
    model, _ = published()
    args = parse(RECIPE, DATA)
    decayed = {id(p) for group in RECIPE.param_groups(model, args) if group["weight_decay"] for p in group["params"]}
    ours = {name for name, p in model.named_parameters() if id(p) not in decayed}

    def upstreams(name: str) -> str:
        """timm keeps the merging of patches with the stage that follows, and nests the classifier."""
        if ".downsample." in name:
            _, stage, *rest = name.split(".")
            name = ".".join(["layers", str(int(stage) - 1), *rest])
        return name.replace("head.fc.", "head.")

    assert {upstreams(name) for name in ours} == set(REFERENCE["no_weight_decay"])


def test_learning_rates_equal_upstreams():
    args = RECIPE.scale_lr(parse(RECIPE, [*DATA, "--variant", "tiny"]), 1024)
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), args.lr)
    set_lr = RECIPE.schedule(optimizer, args, 500)
    for update, lr in REFERENCE["lr_in_force_by_update_300_epochs_500_updates_each"]:
        set_lr(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-9), update


def rates_of_runs(monkeypatch, flags: list[str], stop_after: int | None = None) -> list[float]:
    """The rates at which the optimizer steps, in the order of steps over all starts of a run."""
    rates: list[float] = []
    update = Trainer.update

    def noted(trainer):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        update(trainer)
        if len(rates) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "update", noted)
    run(RECIPE, flags)
    if stop_after is not None:
        assert len(rates) == stop_after, "the first start was stopped in the middle of an epoch"
        run(RECIPE, flags)
    monkeypatch.undo()
    return rates


@pytest.mark.slow
def test_the_rate_hangs_on_the_update_of_the_run_alone(jpegs, tmp_path, monkeypatch):
    """Over the ends of epochs, with accumulation whose last step is not full, and after a resume in mid-epoch."""
    shape = "MODEL.SWIN.EMBED_DIM 8 MODEL.SWIN.DEPTHS [1,1] MODEL.SWIN.NUM_HEADS [1,2] MODEL.SWIN.WINDOW_SIZE 4".split()
    flags = ["--data-path", str(jpegs(train=10)), "--input-size", "32", "--batch-size", "4", "--accumulation-steps", "2",
             "--epochs", "3", "--warmup-epochs", "1", "--num-workers", "0", "--amp", "off", "--lr", "1e-2", "--sched",
             "cosine", "--opts", *shape, "--output"]  # fmt: skip
    whole = rates_of_runs(monkeypatch, [*flags, str(tmp_path / "whole")])
    assert len(whole) == 9, "an epoch has 5 batches, 3 updates"
    args = RECIPE.scale_lr(parse(RECIPE, [*flags, ""]), 8)
    # 2.5 updates an epoch: the schedule follows the share of the batches, and each update has the value of the one before
    batches = [epoch * 2.5 + update for epoch in range(3) for update in range(3)]
    expected = [value_of_schedule(args, 2.5, t) for t in (0, *batches[:-1])]
    assert whole == pytest.approx(expected, rel=1e-9)
    assert whole[0] == whole[1] == args.warmup_lr
    resumed = rates_of_runs(monkeypatch, [*flags, str(tmp_path / "resumed")], stop_after=5)
    assert resumed == whole


def value_of_schedule(args, updates_per_epoch: float, t: float) -> float:
    """Linear from warmup-lr to lr, then the cosine over all epochs, of which the warm-up takes the place of the first."""
    warmup, total = args.warmup_epochs * updates_per_epoch, args.epochs * updates_per_epoch
    if t < warmup:
        return args.warmup_lr + (args.lr - args.warmup_lr) * t / warmup
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * t / total)) / 2


@pytest.mark.parametrize(("name", "giga"), [("tiny", 4.5), ("small", 8.7), ("base", 15.4)])
def test_parameters_and_multiply_adds_of_each_row(name, giga):
    args = parse(RECIPE, [*DATA, "--variant", name])
    with torch.device("meta"):
        model = build_model(RECIPE, args, 1000)
        AugSub(model, "masking")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == REFERENCE["param_count"][args.model]
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.015)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_upstreams_command_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the file is found from any directory
    pasted = vars(parse(RECIPE, ["--cfg", CFG.format(name), *DATA, "--output", "o", "--batch-size", "128",
                                 "--augsub", "masking", "--augsub-ratio", "0.5"]))  # fmt: skip
    named = vars(parse(RECIPE, [*DATA, "--variant", name, "--output", "o", "--augsub", "masking"]))
    drop = {"variant", "cfg", "left_to_model"}
    assert {k: v for k, v in pasted.items() if k not in drop} == {k: v for k, v in named.items() if k not in drop}
    assert pasted["output_dir"] == f"o/swin_{name}_patch4_window7_224/default"
    assert pasted["drop_path"] == {"tiny": 0.2, "small": 0.3, "base": 0.5}[name]


def test_upstreams_defaults():
    args = parse(RECIPE, DATA)
    expected = {"batch_size": 128, "input_size": 224, "train_interpolation": "bicubic", "num_workers": min(8, os.cpu_count() or 1), "drop": 0.0,
                "drop_path": 0.1, "smoothing": 0.1, "epochs": 300, "warmup_epochs": 20, "weight_decay": 0.05,
                "lr": 5e-4, "warmup_lr": 5e-7, "min_lr": 5e-6, "clip_grad": 5.0, "auto_resume": True, "accum_iter": 1,
                "sched": "cosine", "opt": "adamw", "opt_eps": 1e-8, "opt_betas": [0.9, 0.999], "color_jitter": 0.4,
                "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "remode": "pixel", "recount": 1, "mixup": 0.8,
                "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "augsub": "none",
                "augsub_ratio": 0.5, "eval_crop_ratio": 0.875, "save_freq": 1, "log_interval": 10, "seed": 0,
                "model_ema": False}  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_command_line_over_opts_over_file():
    flags = ["--cfg", CFG.format("small"), "--opts", "MODEL.DROP_PATH_RATE", "0.4", "TRAIN.BASE_LR", "1e-3"]
    args = parse(RECIPE, [*DATA, *flags])
    assert (args.drop_path, args.lr, args.depths) == (0.4, 1e-3, [2, 2, 18, 2])
    assert parse(RECIPE, [*DATA, *flags, "--drop-path", "0.1"]).drop_path == 0.1
    args = parse(RECIPE, [*DATA, "--opts", "AUG.AUGSUB", "masking", "TEST.CROP", "False", "AMP_ENABLE", "False"])
    assert (args.augsub, args.crop_mode, args.eval_crop_ratio, args.amp) == ("masking", "squash", 1.0, "off")
    assert parse(RECIPE, [*DATA, "--opts", "TEST.CROP", "False", "--crop-pct", "0.9"]).eval_crop_ratio == 0.9
    assert parse(RECIPE, ["--opts", "DATA.DATA_PATH", "y"]).data_path == "y"


@pytest.mark.parametrize(("name", "training", "evaluation"), [
    ("bilinear", "bilinear", "bilinear"), ("lanczos", "lanczos", "lanczos"), ("random", "random", "bicubic"),
])  # fmt: skip
def test_the_interpolation_of_a_configuration_holds_in_evaluation_too(name, training, evaluation):
    args = parse(RECIPE, [*DATA, "--opts", "DATA.INTERPOLATION", name])
    assert (args.train_interpolation, args.interpolation) == (training, evaluation)
    assert parse(RECIPE, [*DATA, "--opts", "DATA.INTERPOLATION", name, "--interpolation", "box"]).interpolation == "box"


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--opts", "TRAIN.BASE_LRR", "1"], "--opts: unknown key TRAIN.BASE_LRR: did you mean TRAIN.BASE_LR?"),
    (["--opts", "TRAIN.EPOCHS", "many"], "--opts: TRAIN.EPOCHS must be an integer, not 'many'"),
    (["--opts", "TRAIN.EPOCHS"], "'TRAIN.EPOCHS' has no value"),
    (["--cfg", "none.yaml"], "--cfg none.yaml: no such file; configs/swin/swin_base"),
    (["--optim", "adahessian"], "argument --optim: 'adahessian': second-order optimizers are not supported"),
    (["--opts", "TRAIN.OPTIMIZER.NAME", "adahessian"], "argument --opt: 'adahessian': second-order optimizers"),
    (["--opts", "TRAIN.EPOCHS", "0"], "argument --epochs: '0': expected an integer of at least 1"),
    (["--opts", "AUG.CUTMIX_MINMAX", "[0.2]"], "argument --cutmix-minmax: expected 2 arguments"),
    (["--opts", "MODEL.SWIN.MLP_RATIO", ".inf"], "--opts: MODEL.SWIN.MLP_RATIO must be a finite number, not inf"),
    (["--opts", "MODEL.TYPE", "swinv2"], "MODEL.TYPE swinv2: not supported; use swin"),
    (["--opts", "MODEL.SWIN.DEPTHS", "[2, 2]"], "MODEL.SWIN: 2 DEPTHS and 4 NUM_HEADS"),
    (["--opts", "MODEL.SWIN.DEPTHS", "[2, two]"], "MODEL.SWIN.DEPTHS must be a list of finite numbers, not [2, 'two']"),
    (["--opts", "MODEL.SWIN.DEPTHS", "[2,"], "--opts: MODEL.SWIN.DEPTHS '[2,' is not YAML"),
    (["--opts", "TRAIN.BASE_LR", "null"], "TRAIN.BASE_LR must be a finite number, not None"),
    (["--opts", "MODEL.NAME", "null"], "MODEL.NAME must be text, not None"),
    (["--opts", "TRAIN.LR_SCHEDULER.NAME", "cosin"], "argument --sched: invalid choice: 'cosin' (choose from 'cosine', 'tanh'"),
    (["--opts", "AUG.REMODE", "pixels"], "argument --remode: invalid choice: 'pixels' (choose from 'const', 'rand', 'pixel')"),
    (["--opts", "AUG.AUGSUB", "maskng"], "argument --augsub: invalid choice: 'maskng' (choose from"),
    (["--opts", "AUG.AUTO_AUGMENT", "rnad-m9"], "argument --aa: 'rnad-m9': timm has no such policy"),
    (["--opts", "DATA.INTERPOLATION", "cubic"], "argument --train-interpolation: invalid choice: 'cubic' (choose from"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(flags, sentence, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(RECIPE, [*DATA, *flags])
    assert leaving.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("text", "sentence"), [
    ("MODEL:\n  NAMES: x\n", "unknown key MODEL.NAMES: did you mean MODEL.NAME?"),
    ("TRAIN:\n  EPOCHS: true\n", "TRAIN.EPOCHS must be an integer, not True"),
    ("MODEL:\n  SWIN:\n    DEPTHS: 2\n", "MODEL.SWIN.DEPTHS must be a list of finite numbers, not 2"),
    ("a: [1\n", "not YAML"), ("- 1\n", "no settings; expected MODEL: …"),
])  # fmt: skip
def test_bad_files_are_refused(text, sentence, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as leaving:
        parse(RECIPE, [*DATA, "--cfg", str(path)])
    assert leaving.value.code == 2
    assert sentence in capsys.readouterr().err


def test_null_and_none_turn_off_what_can_be_off():
    keys = ["TRAIN.CLIP_GRAD", "AUG.AUTO_AUGMENT", "AUG.COLOR_JITTER", "MODEL.PRETRAINED", "AUG.AUGSUB", "OUTPUT"]
    for off in ("null", "none"):
        args = parse(RECIPE, [*DATA, "--opts", *(word for key in keys for word in (key, off))])
        assert (args.clip_grad, args.aa, args.color_jitter, args.finetune) == (None, None, None, "")
        assert (args.augsub, args.output_dir) == ("none", "")


def test_every_key_names_a_setting():
    settings = vars(parse(RECIPE, DATA))
    assert [key for key, (name, _) in KEYS.items() if name is not None and name not in settings] == []


DIGITS = ["--epochs", "1", "--batch-size", "32", "--warmup-epochs", "0"]


def prepared(*flags: str) -> Run:
    args = parse(RECIPE, [*DIGITS, "--augsub", "masking", *flags])
    args.output_dir = ""
    return build_run(RECIPE, args, Process(torch.device("cpu")))


def one_step(run: Run) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    for loss in run.trainer.augsub.losses(run.trainer.raw_model, x, y, nn.CrossEntropyLoss()):
        loss.backward()
    return {name: p.grad for name, p in run.trainer.raw_model.named_parameters() if p.grad is not None}


def test_windows_whose_bias_learns_attend_in_the_open_on_a_cpu():
    """PyTorch's fused kernel does not take such a bias there, and what stands in for it is slower."""
    attention = [
        module for module in prepared("--amp", "off").trainer.raw_model.modules() if hasattr(module, "fused_attn")
    ]
    assert attention and not any(module.fused_attn for module in attention)


def test_activation_checkpointing_recomputes_the_masked_pass():
    """The mask is drawn again in backward; it must be the same one, and be there at all."""
    plain, recomputed = one_step(prepared()), one_step(prepared("--use-checkpoint"))
    assert plain["mask_token"].abs().max() > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_of_both_passes_are_clipped_together():
    made = prepared("--clip-grad", "0.01", "--opt", "sgd")
    one_step(made)
    norms: list[float] = []
    made.trainer.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: norms.append(
            torch.cat([p.grad.flatten() for p in made.trainer.raw_model.parameters() if p.grad is not None])
            .norm()
            .item()
        )
    )
    made.trainer.update()
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def test_a_ratio_is_honoured():
    made = prepared("--augsub-ratio", "0.75")
    hidden = []
    made.trainer.raw_model.layers.register_forward_pre_hook(
        lambda module, inputs: hidden.append((inputs[0] == made.trainer.raw_model.mask_token.view(1, 1, 1, -1)).all(-1))
    )
    with torch.no_grad(), made.trainer.augsub.sub_model():
        made.trainer.raw_model.train()(torch.randn(4, 3, 32, 32))
    assert hidden[0].float().mean((1, 2)).tolist() == [12 / 16] * 4


def test_ours_loads_into_stock_timm_and_resumes_with_the_mask_token(tmp_path, capsys):
    shape = {"embed_dim": 48, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "patch_size": 4,
             "img_size": 32, "num_classes": 10}  # fmt: skip
    flags = [*DIGITS, "--augsub", "masking", "--output", str(tmp_path), "--tag", "t"]
    run(RECIPE, flags)
    path = tmp_path / "swin_pico_patch4_window4_32" / "t" / "checkpoint.pth"
    stock = timm.create_model("swin_tiny_patch4_window7_224", checkpoint_path=str(path), **shape)
    content = files.load(path)
    token = content["mask_tokens"]["model"]
    assert torch.equal(stock.state_dict()["norm.weight"], content["model"]["norm.weight"])
    resumed = build_run(RECIPE, parse(RECIPE, flags), Process(torch.device("cpu")))
    assert resumed.start.epoch == 1 and torch.equal(resumed.trainer.raw_model.mask_token, token)


def test_throughput_is_printed_and_nothing_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(RECIPE, ["--throughput", "--batch-size", "4"])
    assert "images/s in batches of 6" in capsys.readouterr().out
    assert list(Path().iterdir()) == []


def test_readme_shows_a_command_for_every_variant():
    text = (ROOT / "swin" / "README.md").read_text()
    assert all(CFG.format(variant) in text for variant in VARIANTS)


@pytest.mark.parametrize("kind", ["none", "masking", "dropout", "droppath"])
def test_golden_losses(kind):
    check_golden(RECIPE, kind)
