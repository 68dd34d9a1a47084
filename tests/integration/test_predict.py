"""scripts/export.py and scripts/predict.py on a run's files."""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from common.checkpoint import io as files
from common.cli import run
from resnet_rsb.recipe import RECIPE as RESNET_RSB
from scripts import export, predict
from tests.commands import ROOT, environment
from tests.compare_runs import diff_nested
from tests.runs import load_checkpoint, log_entries

NAMES = ["cat", "dog", "owl"]  # of the finished run


def call(script, *words, status=None) -> None:
    """Run a script's `main` in this process; with `status` it has to leave with it."""
    argv, sys.argv = sys.argv, ["script", *map(str, words)]
    try:
        if status is None:
            script.main()
        else:
            with pytest.raises(SystemExit) as leaving:
                script.main()
            assert leaving.value.code == status
    finally:
        sys.argv = argv


@pytest.fixture
def photos(finished, tmp_path) -> Path:
    """The finished run's evaluation images, in folders of their classes."""
    return Path(shutil.copytree(Path(finished[0][1]) / "val", tmp_path / "photos"))


def predictions(text: str) -> dict[str, str]:
    """Path → class, from what predict.py prints."""
    lines = [line.rpartition(": ") for line in text.splitlines()]
    return {path: classes.partition(" ")[0] for path, _, classes in lines}


def accuracy(text: str) -> float:
    found = predictions(text)
    return 100 * sum(Path(path).parent.name == name for path, name in found.items()) / len(found)


@pytest.mark.parametrize("model", ["best", "last", "checkpoint.pth"])
def test_the_accuracy_of_predictions_is_the_runs(model, finished, photos, capsys):
    """With its preprocessing and names: a shift of labels or another crop would show."""
    out = finished[1]
    call(predict, out / model, photos, "--topk", "1")
    entry = log_entries(out)[0 if model == "best" else -1]
    assert accuracy(capsys.readouterr().out) == pytest.approx(max(entry["test_acc1"], entry["test_ema_acc1"]))


def test_files_folders_and_patterns_are_classified_in_their_order(finished, photos, capsys, tmp_path):
    first = sorted((photos / "owl").iterdir())[0]
    (photos / ".hidden").mkdir()
    shutil.copy(first, photos / ".hidden" / "x.jpg")
    shutil.copy(first, photos / "owl" / "._x.jpg")
    (photos / "notes.txt").write_text("no image")
    table = tmp_path / "table.csv"
    call(
        predict,
        finished[1] / "best",
        first,
        photos,
        str(photos / "c*"),
        "--topk",
        "9",
        "--csv",
        table,
        "--batch-size",
        "4",
    )
    output = capsys.readouterr()
    said = [line.rpartition(": ")[0] for line in output.out.splitlines()]
    inside = sorted(str(path) for path in photos.glob("[a-z]*/[a-z0-9]*.*"))
    assert said == [str(first), *inside, *(path for path in inside if "/cat/" in path)]
    assert output.err == "", "no bar where it is no terminal"
    rows = list(csv.DictReader(table.open()))
    assert [row["image"] for row in rows] == said
    for row in rows:
        shares = [float(row[f"probability_{rank}"]) for rank in (1, 2, 3)]
        assert sorted(shares, reverse=True) == shares and sum(shares) == pytest.approx(1, abs=1e-5)
        assert {row[f"class_{rank}"] for rank in (1, 2, 3)} == set(NAMES) and "class_4" not in row


def test_what_cannot_be_read_is_named_with_its_reason(finished, photos, capsys, tmp_path):
    good = str(sorted((photos / "cat").iterdir())[0])
    (photos / "damaged.jpg").write_bytes(Path(good).read_bytes()[:200])
    (photos / "text.png").write_text("no image")
    bad = [photos / "damaged.jpg", photos / "text.png", photos / "missing.jpg"]
    call(predict, finished[1] / "best", good, *bad, status=1)
    output = capsys.readouterr()
    assert predictions(output.out).keys() == {good}
    reasons = ["truncated", "(not an image)", "no such file or directory"]
    for path, reason, line in zip(bad, reasons, output.err.splitlines()):
        assert line.startswith(f"{path}: unreadable (") and reason in line.lower()
    assert output.err.endswith("predict.py: 3 of 4 images could not be read\n")
    call(predict, finished[1] / "best", *bad, "--csv", tmp_path / "x.csv", status=2)
    output = capsys.readouterr()
    assert output.out == "" and output.err.endswith("predict.py: error: no image could be read\n")
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(("model", "images", "sentence"), [
    ("resnet5", "x.jpg", "resnet5: no such file or folder, and timm has no model of this name; did you mean resnet"),
    ("{}", "*.nothing", "*.nothing: holds no images; files with .jpg"),
    ("{}/tensorboard", "x.jpg", "tensorboard: no folder in timm's format; pass the file in it"),
    ("{}/log.txt", "x.jpg", "log.txt: truncated, or not a checkpoint"),
])  # fmt: skip
def test_a_model_that_is_none_is_told(model, images, sentence, finished, capsys):
    name = model.format(finished[1] if "/" in model else finished[1] / "best")
    call(predict, name, images, status=2)
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("predict.py: error: ") and error.count("\n") == 1


@pytest.mark.slow
def test_a_bar_on_a_terminal_and_none_in_a_pipe(finished, photos):
    words = [sys.executable, str(ROOT / "scripts" / "predict.py"), str(finished[1] / "best"), str(photos)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # tqdm shows nothing in 0 columns
    os.set_blocking(ours, False)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment(), timeout=100)
    shown = os.read(ours, 65536).decode()
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 15
    assert "15/15" in shown or "image/s" in shown
    pipe = subprocess.run(f"{' '.join(words)} | head -n 1", shell=True, capture_output=True, text=True, env=environment(), timeout=100)  # fmt: skip
    assert pipe.stderr == "" and pipe.stdout.count("\n") == 1


def test_imagenets_classes_are_named_by_words():
    assert predict.describe_synsets(["n01440764", "n02123045"]) == ["tench, Tinca tinca", "tabby, tabby cat"]
    assert predict.describe_synsets(["n01440764", "cat"]) == ["n01440764", "cat"]
    assert predict.list_class_names({}, 1000, "resnet50")[0].startswith("tench")
    assert predict.list_class_names({}, 1000, "local-dir:x")[:2] == ["0", "1"], "1,000 classes of anything"
    assert predict.list_class_names({"label_names": {"1": "dog"}}, 3, "local-dir:x") == ["0", "dog", "2"]


# export


def test_a_folder_from_a_checkpoint_is_the_runs_own(finished, tmp_path, capsys):
    """Also the choice between the model and its average; and a second call replaces it."""
    out = finished[1]
    for _ in range(2):
        call(export, out / "checkpoint.pth", tmp_path / "model")
    said = capsys.readouterr().out
    assert f'timm.create_model("local-dir:{tmp_path / "model"}", pretrained=True)' in said
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (out / "last" / name).read_bytes()
    assert (tmp_path / "model" / "README.md").read_text() == (out / "last" / "README.md").read_text()
    for part in ("model", "model_ema"):
        call(export, out / "checkpoint.pth", tmp_path / part, "--weights", part)
        loaded = timm.create_model(f"local-dir:{tmp_path / part}", pretrained=True)
        assert not diff_nested(dict(loaded.state_dict()), load_checkpoint(out)[part])


def test_a_checkpoint_of_an_earlier_version_is_exported(finished, tmp_path, capsys):
    """It has no names of classes, no preprocessing and fewer settings."""
    content = load_checkpoint(finished[1])
    del content["class_names"], content["preprocessing"]
    for name in ("mean", "std", "interpolation", "model_ema_warmup"):
        del content["args"][name]
    files.write(tmp_path / "old.pth", content, lambda: None)
    call(export, tmp_path / "old.pth", tmp_path / "plain")
    assert "old.pth: has no names of classes; add them by --class-names FILE" in capsys.readouterr().out
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "label_names" not in config and config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    (tmp_path / "names.txt").write_text("Katze\nHund\nEule\n")
    flags = ["--class-names", tmp_path / "names.txt", "--mean", "0.5", "0.5", "0.5", "--crop-pct", "0.9"]
    call(export, tmp_path / "old.pth", tmp_path / "named", *flags)
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    assert config["label_names"] == ["Katze", "Hund", "Eule"]
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5] and config["pretrained_cfg"]["crop_pct"] == 0.9
    (tmp_path / "names.txt").write_text("Katze\n\nEule\n")
    call(export, tmp_path / "old.pth", tmp_path / "x", *flags, status=2)
    assert "names.txt: line 2 is empty; write one name a line" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("\n".join("abcd"))
    call(export, tmp_path / "old.pth", tmp_path / "x", *flags, status=2)
    assert "--class-names: 4 names for a model of 3 classes" in capsys.readouterr().err


def test_a_checkpoint_of_upstreams_needs_the_recipe(finished, tmp_path, capsys):
    """Its names of weights are upstream's; the flags say what it does not."""
    weights = load_checkpoint(finished[1])["model"]
    renamed = {name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): weight for name, weight in weights.items()}  # fmt: skip
    settings = argparse.Namespace(model="deit_pico_patch8_LS", input_size=32, eval_crop_ratio=1.0)
    torch.save({"model": renamed, "args": settings, "epoch": 3}, tmp_path / "upstream.pth")
    torch.save({"model": renamed}, tmp_path / "bare.pth")
    call(export, tmp_path / "upstream.pth", tmp_path / "x", status=2)
    error = capsys.readouterr().err
    assert (
        "upstream.pth: does not say which recipe trained it; pass --recipe, one of deit, mae, swin, resnet_rsb" in error
    )
    call(export, tmp_path / "bare.pth", tmp_path / "x", "--recipe", "deit", status=2)
    assert "bare.pth: does not say which model it is of; pass --model" in capsys.readouterr().err
    call(predict, tmp_path / "bare.pth", "x.jpg", status=2)
    assert "pass --recipe" in (error := capsys.readouterr().err) and "scripts/export.py makes a folder of it" in error
    call(export, tmp_path / "upstream.pth", tmp_path / "a", "--recipe", "deit")
    bare = ["--recipe", "deit", "--model", "deit_pico_patch8_LS", "--input-size", "32"]
    call(export, tmp_path / "bare.pth", tmp_path / "b", *bare)
    assert not (tmp_path / "x").exists()
    for folder in ("a", "b"):
        loaded = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True)
        assert not diff_nested(dict(loaded.state_dict()), weights)


def test_a_folder_with_other_files_is_left_alone(finished, tmp_path, capsys):
    (tmp_path / "README.md").write_text("of a project")
    call(export, finished[1] / "checkpoint.pth", tmp_path, status=2)
    assert f"{tmp_path}: holds other files; choose a new folder" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "of a project"


def test_images_of_all_modes_are_classified(finished, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 4), dtype=np.uint8)
    for mode in ("RGB", "L", "RGBA", "CMYK", "P", "LA", "1"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode).save(tmp_path / f"{mode}.{suffix}")
    call(predict, finished[1] / "best", tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_a_checkpoint_of_a_model_that_a_folder_named_is_used(jpegs, tmp_path, capsys):
    """Its classifier has timm's name for it, `fc` of a ResNet."""
    images = jpegs()
    flags = [*("--img-size", "32", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0", "--num-workers", "0"),
             *("--amp", "off", "--aa", "none")]  # fmt: skip
    run(RESNET_RSB, [str(images), "--model", "resnet10t", *flags, "--output", str(tmp_path / "first")])
    best = f"local-dir:{tmp_path / 'first' / 'best'}"
    run(RESNET_RSB, [str(images), "--finetune", best, *flags, "--output", str(tmp_path / "second")])
    capsys.readouterr()
    call(predict, tmp_path / "second" / "last", *(images / "val").glob("*/*"))
    expected = capsys.readouterr().out
    call(predict, tmp_path / "second" / "checkpoint.pth", *(images / "val").glob("*/*"))
    assert capsys.readouterr().out == expected and "cat" in expected
