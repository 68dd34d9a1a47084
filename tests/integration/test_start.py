"""What a run says at its start of settings that are unusual beside others, or beside a checkpoint's."""

from __future__ import annotations

import pytest

from common.cli import run
from scripts.launch.registry import RECIPES
from tests.runs import run_refused, start


def test_one_image_a_batch_with_batch_norm(jpegs, capsys):
    flags = f"{jpegs(train=2, val=1)} --model resnet10t --epochs 1 --warmup-epochs 0 --num-workers 0 --amp off".split()
    with pytest.raises(SystemExit) as leaving:
        run(RECIPES["resnet_rsb"], [*flags, "--img-size", "32", "--batch-size", "1"])
    error = (
        "--batch-size 1: batch norm layer4.0.bn1 has one value per channel at --input-size 32; use --batch-size 2 or"
    )
    assert leaving.value.code == 2 and error in capsys.readouterr().err
    run(RECIPES["resnet_rsb"], [*flags, "--img-size", "64", "--batch-size", "1"])
    said = capsys.readouterr().out
    assert (
        "--batch-size 1: batch norm takes its statistics from one image at a time\n" in said
        and "epoch 1/1  acc" in said
    )


def test_unusual_rates_are_said_before_the_first_step(jpegs, capsys):
    data = ["--data-path", str(jpegs()), "--epochs", "1"]
    start(*data, "--lr", "5e-4", "--batch-size", "4")
    before, note, after = capsys.readouterr().out.partition(
        "--lr: 3.91e-06 in force at 4 images a step, below the 1e-05"
    )
    assert note and "epoch 1" not in before and "epoch 1/1  acc@1" in after
    error = run_refused(capsys, *data, "--lr", "1e-6", "--unscale-lr")
    assert "--lr: 1e-06 in force at 8 images a step, below the 1e-05 of --min-lr; raise --lr or lower --min-lr" in error
    start(*data, "--warmup-epochs", "3")
    before, note, after = capsys.readouterr().out.partition(
        "--warmup-epochs 3: not below --epochs 1, --lr is never reached; use fewer\n"
    )
    assert note and "epoch 1" not in before and "epoch 1/1  acc@1" in after


CHANGES = {
    "--epochs": ("epochs", "2", "3"), "--lr": ("lr", "0.01", "0.02"), "--weight-decay": ("weight_decay", "0.05", "0.1"),
    "--opt-eps": ("opt_eps", "1e-08", "1e-05"), "--smoothing": ("smoothing", "0.1", "0.2"),
    "--min-lr": ("min_lr", "1e-05", "2e-05"), "--mixup": ("mixup", "0.8", "0.4"),
}  # fmt: skip


def test_all_settings_that_differ_are_listed(continued, capsys):
    """One a line where --resume takes them, in one sentence where the folder's run refuses them."""
    flags, out = continued
    other = [word for flag, (_, _, new) in CHANGES.items() for word in (flag, new)]
    lines = [f"{name} {old} → {new}" for name, old, new in CHANGES.values()]
    error = run_refused(capsys, *flags, *other)
    assert all(line in error for line in lines)
    start(*flags, *other, "--resume", str(out / "checkpoint.pth"))
    said = capsys.readouterr().out
    listed = said.partition(f"{out / 'checkpoint.pth'}: saved under other settings; this run uses its own:\n")[2]
    assert sorted(listed.splitlines()[: len(lines)]) == sorted(f"  {line}" for line in lines)
    assert listed.splitlines()[len(lines)] == f"continuing at epoch 3 from {out / 'checkpoint.pth'}"


def test_finetune_beside_a_checkpoint_to_continue_is_not_read(finished, tmp_path, capsys):
    """The same command again, as Slurm starts it, goes on where it was; so does --resume beside it."""
    flags, out, _ = finished
    weights = str(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes((out / "checkpoint.pth").read_bytes())
    flags = [*flags, "--finetune", weights, "--output-dir", str(tmp_path / "out")]
    start(*flags)
    assert "not loaded" not in capsys.readouterr().out
    (tmp_path / "weights.pth").unlink()  # it is not missed
    last = tmp_path / "out" / "checkpoint.pth"
    for more in ([], ["--resume", str(last)], ["--eval"]):
        start(*flags, *more)
        assert f"--finetune {weights}: not loaded; the weights are those of {last}\n" in capsys.readouterr().out
