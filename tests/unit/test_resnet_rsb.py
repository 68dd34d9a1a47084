"""The recipe of ResNet strikes back against the numbers of the published trainer, and on any timm model."""

from __future__ import annotations

import os

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.args import parse
from common.augsub import AugSub
from common.cli import run
from common.data.samplers import build_sampler
from common.data_config import loader_config
from common.distributed import Process
from common.run import build_run
from resnet_rsb.recipe import RECIPE, VARIANTS
from tests.commands import ROOT
from tests.golden import check_golden
from tests.published import image, reference, tensor_for

REFERENCE = reference("resnet_rsb")
UPSTREAM = (
    "x --model {} --output o --img-size 224 --epochs 300 --batch-size 256 --opt lamb --lr 5e-3 --sched cosine "
    "--weight-decay 0.02 --warmup-epochs 5 --cooldown-epochs 0 --smoothing 0.0 --drop 0.0 --drop-path 0.05 "
    "--aug-repeats 3 --aa rand-m7-mstd0.5 --mixup 0.1 --cutmix 1.0 --reprob 0.0 --color-jitter 0.0 --crop-pct 0.95 "
    "--bce-loss --native-amp --log-interval 400 --augsub masking --augsub-ratio 0.5"
)
ALONE = Process(torch.device("cpu"))


def test_logits_equal_upstreams():
    part = REFERENCE["forward"]
    model = timm.create_model(part["model"], num_classes=part["num_classes"]).eval()
    state = {name: tensor_for(name, shape) for name, shape in part["keys"].items()}
    model.load_state_dict(RECIPE.adapt_weights(state, model), strict=False)  # batches are counted nowhere
    with torch.no_grad():
        logits = model(image(part["batch"], part["img_size"]))
    torch.testing.assert_close(logits, torch.tensor(part["logits"]), rtol=1e-4, atol=1.0)


def test_learning_rates_equal_upstreams():
    args = RECIPE.scale_lr(parse(RECIPE, ["x", "--variant", "resnet50"]), 2048)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), args.lr)
    set_lr = RECIPE.schedule(optimizer, args, 3)
    for epoch, lr in REFERENCE["lr_by_epoch_300"].items():
        set_lr(3 * int(epoch) + 2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-9), epoch


@pytest.mark.parametrize(("name", "giga"), [("resnet50", 4.1), ("resnet101", 7.9), ("resnet152", 11.6)])
def test_parameters_and_multiply_adds_of_each_row(name, giga):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == REFERENCE["param_count"][name]
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.015)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_upstreams_command_line(variant):
    pasted = vars(parse(RECIPE, UPSTREAM.format(variant).split()))
    named = vars(parse(RECIPE, ["x", "--variant", variant, "--output", "o", "--augsub", "masking", "--native-amp"]))
    drop = {"variant", "left_to_model"}
    assert {k: v for k, v in pasted.items() if k not in drop} == {k: v for k, v in named.items() if k not in drop}
    assert (named["input_size"], named["eval_crop_ratio"], named["class_order"]) == (224, 0.95, "natural")
    assert (pasted["data_path"], pasted["data_set"]) == ("x", "IMNET")


def test_upstreams_defaults():
    args = parse(RECIPE, ["x"])
    expected = {"warmup_lr": 1e-4, "min_lr": 1e-6, "hflip": 0.5, "train_interpolation": "random",
                "seed": 42, "num_workers": min(4, os.cpu_count() or 1), "model_ema": False, "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_the_memory_format_changes_speed_alone():
    losses = []
    for flag, layout in (("--channels-last", torch.channels_last), ("--no-channels-last", torch.contiguous_format)):
        flags = ["--augsub", "masking", "--batch-size", "8", "--amp", "off", "--output-dir", "", flag]
        trainer = build_run(RECIPE, parse(RECIPE, flags), ALONE).trainer
        assert trainer.memory_format is layout
        assert trainer.raw_model.layer1[0].conv2.weight.is_contiguous(memory_format=layout)
        torch.manual_seed(0)
        images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
        trainer.raw_model.train()
        losses.append(
            [loss.item() for loss in trainer.augsub.losses(trainer.raw_model, images, labels, trainer.criterion)]
        )
    assert parse(RECIPE, []).channels_last
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_images_are_repeated_as_often_as_asked():
    args = parse(RECIPE, ["x", "--aug-repeats", "4", "--batch-size", "8", "--num-workers", "0"])
    sampler = build_sampler(range(512), ALONE, args.seed, loader_config(args).repeats)
    indices = [index for index, _ in sampler]
    assert indices[:8] == [indices[0]] * 4 + [indices[4]] * 4


def test_binary_cross_entropy_takes_soft_targets_and_a_threshold_for_labels_alone():
    criterion = RECIPE.loss(parse(RECIPE, ["x", "--bce-loss", "--bce-target-thresh", "0.2"]), True)
    model = nn.Linear(4, 3)
    x, y = torch.randn(2, 4), torch.tensor([[0.3, 0.1, 0.6], [0.0, 0.9, 0.1]])
    main = next(AugSub(model, "none").losses(model, x, y, criterion))
    expected = nn.functional.binary_cross_entropy_with_logits(model(x), (y > 0.2).float())
    torch.testing.assert_close(main, expected)


def statistics(batch_norm: str, momentum: float | None, masked: bool = True) -> dict[str, torch.Tensor]:
    """Running statistics after two steps."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
    augsub = AugSub(model, "masking" if masked else "none", 0.5, batch_norm=batch_norm)
    x = torch.randn(2, 4, 3, 64, 64)
    for images in x:
        for loss in augsub.losses(model, images, torch.arange(4), nn.CrossEntropyLoss()):
            loss.backward()
    assert model.bn1.momentum == momentum and model.bn1.track_running_stats
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_take_both_passes_or_the_main_one_alone(momentum):
    """With a momentum, and with none, where the statistics are the mean over all steps."""
    plain = statistics("shared", momentum, masked=False)
    torch.testing.assert_close(statistics("main", momentum), plain, rtol=0, atol=0)
    shared = statistics("shared", momentum)
    assert not torch.allclose(shared["bn1.running_var"], plain["bn1.running_var"])


@pytest.mark.parametrize(("name", "mask"), [
    ("convnext_atto", "pixel blocks"), ("efficientnet_b0", "pixel blocks"), ("regnety_002", "pixel blocks"),
    ("vit_tiny_patch16_224", "token drop"), ("resnet18", "pixel blocks"),
])  # fmt: skip
def test_any_timm_model_trains_with_the_mask_that_suits_it(name, mask, jpegs, capsys):
    flags = [str(jpegs()), "--model", name, "--augsub", "masking", "--img-size", "64", "--batch-size", "4", "--lr", "1e-3",
             "--workers", "0", "--amp", "off"]  # fmt: skip
    run = build_run(RECIPE, parse(RECIPE, flags), ALONE)
    assert f"AugSub(masking, ratio=0.5, {mask})" in capsys.readouterr().out
    batch = next(iter(run.train_loader))
    losses = run.trainer.train_step(batch[0], batch[1], 1, last=True)
    run.trainer.update()
    assert all(loss.isfinite() for loss in losses) and len(losses) == 2
    assert all(p.isfinite().all() for p in run.trainer.raw_model.parameters())


def test_dropout_on_a_resnet_is_refused(capsys):
    with pytest.raises(SystemExit) as leaving:
        run(RECIPE, ["--augsub", "dropout"])
    assert leaving.value.code == 2
    assert "--augsub dropout: ResNet has no place for it; use masking or droppath" in capsys.readouterr().err


def test_readme_shows_a_command_for_every_variant():
    text = (ROOT / "resnet_rsb" / "README.md").read_text()
    assert all(f"--variant {variant} " in text for variant in VARIANTS)


@pytest.mark.parametrize("kind", ["none", "masking", "droppath"])
def test_golden_losses(kind):
    check_golden(RECIPE, kind)


@pytest.mark.slow
def test_summary_and_the_best_checkpoints_are_kept(jpegs, tmp_path):
    flags = [str(jpegs()), "--model", "test_resnet", "--img-size", "32", "--batch-size", "8", "--workers", "0", "--amp",
             "off", "--output", str(tmp_path / "o"), "--epochs", "4", "--warmup-epochs", "0", "--checkpoint-hist", "2",
             "--lr", "1e-3", "--opt", "adamw"]  # fmt: skip
    run(RECIPE, flags)
    rows = (tmp_path / "o" / "summary.csv").read_text().splitlines()
    assert rows[0] == "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"
    accuracy = {int(row.split(",")[0]): float(row.split(",")[3]) for row in rows[1:]}
    assert list(accuracy) == [0, 1, 2, 3]
    kept = {int(path.stem.split("-")[1]) for path in (tmp_path / "o").glob("checkpoint-*.pth")}
    assert len(kept) == 2
    assert min(accuracy[epoch] for epoch in kept) >= max(accuracy[epoch] for epoch in set(accuracy) - kept)


def test_a_ratio_that_hides_no_block_is_refused_with_one_that_does(capsys):
    with pytest.raises(SystemExit) as leaving:
        run(RECIPE, ["--augsub", "masking", "--augsub-ratio", "0.06", "--output-dir", ""])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert (
        "--augsub-ratio 0.06: less than one of 16 blocks, so that masking hides nothing; use --augsub-ratio 0.063"
        in error
    )
    parsed = parse(RECIPE, ["--augsub", "masking", "--augsub-ratio", "0.063", "--output-dir", ""])
    assert build_run(RECIPE, parsed, ALONE).trainer.augsub.ratio == 0.063
