"""The Swin recipe against the numbers of the published trainer, its configuration files and its weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import checkpoint, files, train
from common.args import parse
from common.augsub import AugSub
from common.dist import Process
from common.prepare import create_model
from common.run import run
from swin.config import KEYS
from swin.recipe import RECIPE, VARIANTS
from tests.conftest import ROOT, image, reference, tensor_for
from tests.golden import check_golden

REFERENCE = reference("swin")
DATA = ["--data-path", "x"]
CFG = "configs/swin/swin_{}_patch4_window7_224.yaml"


def published(*flags: str):
    """Swin-T with the reference's weights, loaded as Microsoft's file."""
    part = REFERENCE["forward"]
    model = create_model(RECIPE, parse(RECIPE, [*DATA, "--cfg", CFG.format("tiny"), *flags]), part["num_classes"])
    AugSub(model, "masking")
    state = {name: tensor_for(name, shape) for name, shape in part["keys"].items()}
    return model, state


def test_logits_equal_upstreams_from_microsofts_file(tmp_path):
    model, state = published()
    torch.save({"model": state, "epoch": 1}, tmp_path / "swin.pth")
    checkpoint.load_weights(model, tmp_path / "swin.pth", RECIPE.adapt_weights)
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
    for update, lr in REFERENCE["lr_by_update_300_epochs_500_updates_each"]:
        set_lr(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-9), update


@pytest.mark.parametrize(("name", "giga"), [("tiny", 4.5), ("small", 8.7), ("base", 15.4)])
def test_parameters_and_multiply_adds_of_each_row(name, giga):
    args = parse(RECIPE, [*DATA, "--variant", name])
    with torch.device("meta"):
        model = create_model(RECIPE, args, 1000)
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
    drop = {"variant", "cfg"}
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
    assert parse(RECIPE, ["--opts", "DATA.DATA_PATH", "y"]).data_path == "y"


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--opts", "TRAIN.BASE_LRR", "1"], "--opts: unknown key TRAIN.BASE_LRR: did you mean TRAIN.BASE_LR?"),
    (["--opts", "TRAIN.EPOCHS", "many"], "--opts: TRAIN.EPOCHS must be a whole number, not 'many'"),
    (["--opts", "TRAIN.EPOCHS"], "'TRAIN.EPOCHS' has no value"),
    (["--cfg", "none.yaml"], "--cfg none.yaml: there is no such file; configs/swin/swin_base"),
    (["--opts", "MODEL.TYPE", "swinv2"], "MODEL.TYPE swinv2: this trainer has swin"),
    (["--augsub-joint", "--use-checkpoint", "--augsub", "droppath"], "backward would recompute the sub-model"),
    (["--opts", "MODEL.SWIN.DEPTHS", "[2, 2]"], "2 DEPTHS for 4 NUM_HEADS"),
    (["--opts", "MODEL.SWIN.DEPTHS", "[2, two]"], "MODEL.SWIN.DEPTHS must be a list of numbers, not [2, 'two']"),
    (["--opts", "MODEL.SWIN.DEPTHS", "[2,"], "--opts: MODEL.SWIN.DEPTHS cannot be '[2,', which is not YAML"),
    (["--opts", "TRAIN.BASE_LR", "null"], "TRAIN.BASE_LR must be a number, not None"),
    (["--opts", "MODEL.NAME", "null"], "MODEL.NAME must be text, not None"),
    (["--opts", "TRAIN.LR_SCHEDULER.NAME", "cosin"], "--sched 'cosin': choose one of cosine, tanh"),
    (["--opts", "AUG.REMODE", "pixels"], "--remode 'pixels': choose one of const, rand, pixel"),
    (["--opts", "AUG.AUGSUB", "maskng"], "--augsub 'maskng': choose one of"),
    (["--opts", "AUG.AUTO_AUGMENT", "rnad-m9"], "argument --aa: timm makes no policy of 'rnad-m9'"),
    (["--opts", "DATA.INTERPOLATION", "cubic"], "--train-interpolation 'cubic': choose one of"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(flags, sentence, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(RECIPE, [*DATA, *flags])
    assert leaving.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("text", "sentence"), [
    ("MODEL:\n  NAMES: x\n", "unknown key MODEL.NAMES: did you mean MODEL.NAME?"),
    ("TRAIN:\n  EPOCHS: true\n", "TRAIN.EPOCHS must be a whole number, not True"),
    ("MODEL:\n  SWIN:\n    DEPTHS: 2\n", "MODEL.SWIN.DEPTHS must be a list of numbers, not 2"),
    ("a: [1\n", "is not YAML"), ("- 1\n", "holds no settings"),
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


def job(*flags: str) -> train.Job:
    args = parse(RECIPE, [*DIGITS, "--augsub", "masking", *flags])
    args.output_dir = ""
    return train.prepare(RECIPE, args, Process(torch.device("cpu")))


def one_step(job: train.Job) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    for loss in job.trainer.augsub.losses(job.trainer.bare, x, y, nn.CrossEntropyLoss()):
        loss.backward()
    return {name: p.grad for name, p in job.model.named_parameters() if p.grad is not None}


def test_windows_whose_bias_learns_attend_in_the_open_on_a_cpu():
    """PyTorch's fused kernel does not take such a bias there, and what stands in for it is slower."""
    attention = [module for module in job("--amp", "off").model.modules() if hasattr(module, "fused_attn")]
    assert attention and not any(module.fused_attn for module in attention)


def test_activation_checkpointing_recomputes_the_masked_pass():
    """The mask is drawn again in backward; it must be the same one, and be there at all."""
    plain, recomputed = one_step(job()), one_step(job("--use-checkpoint"))
    assert plain["mask_token"].abs().max() > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[name], rtol=1e-4, atol=1e-6, msg=name)


def test_one_backward_for_both_passes_is_the_same_step():
    """Through the trainer: gradients, and the losses that it reports."""
    found = []
    for flags in ([], ["--augsub-joint"]):
        trainer = job(*flags).trainer
        torch.manual_seed(3)
        x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
        losses = torch.stack(trainer.micro_step(x, y, parts=2, last=True))
        found.append({"losses": losses} | {n: p.grad for n, p in trainer.bare.named_parameters()})
    assert found[0]["losses"].shape == (2,)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_gradients_of_both_passes_are_clipped_together():
    made = job("--clip-grad", "0.01", "--opt", "sgd")
    one_step(made)
    norms: list[float] = []
    made.trainer.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: norms.append(
            torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None]).norm().item()
        )
    )
    made.trainer.update()
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def test_a_ratio_is_honoured():
    made = job("--augsub-ratio", "0.75")
    hidden = []
    made.model.layers.register_forward_pre_hook(
        lambda module, inputs: hidden.append((inputs[0] == made.model.mask_token.view(1, 1, 1, -1)).all(-1))
    )
    with torch.no_grad(), made.trainer.augsub.sub_model():
        made.model.train()(torch.randn(4, 3, 32, 32))
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
    resumed = train.prepare(RECIPE, parse(RECIPE, flags), Process(torch.device("cpu")))
    assert resumed.start.epoch == 1 and torch.equal(resumed.model.mask_token, token)


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
