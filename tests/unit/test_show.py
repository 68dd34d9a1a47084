"""scripts/show.py: as much of the picture is hidden as in training, and mistakes are one sentence."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
import torch
from PIL import Image

from common.augsub import AugSub
from scripts.show import MODELS, build, compose, create_parser, hidden_pixels, hide, read_images
from tests.commands import ROOT


@pytest.mark.parametrize(("name", "drop", "shares"), [
    (MODELS[0], "token drop", {0.25: 49 / 196, 0.5: 98 / 196, 0.75: 147 / 196}),
    (MODELS[1], "mask token", {0.25: 13 / 49, 0.5: 25 / 49, 0.75: 37 / 49}),
    (MODELS[2], "pixel blocks", {0.25: 12 / 49, 0.5: 24 / 49, 0.75: 36 / 49}),
])  # fmt: skip
def test_the_published_number_of_patches_is_hidden(name, drop, shares):
    image = torch.rand(3, 224, 224)
    model = build(name, 224)
    for ratio, share in shares.items():
        augsub = AugSub(model, "masking", ratio)
        assert augsub.drop == drop
        with augsub.sub_model():
            torch.manual_seed(1)
            hidden, colour = hidden_pixels(image, augsub)
        augsub.remove()
        side = 16 if drop == "token drop" else 32
        blocks = hidden.unfold(0, side, side).unfold(1, side, side).flatten(2).float().mean(2)
        assert set(blocks.unique().tolist()) == {0.0, 1.0}, "whole patches or blocks"
        assert hidden.float().mean().item() == pytest.approx(share)
        torch.manual_seed(1)
        shown = hide(image, model, ratio, 32)
        assert torch.equal(shown[:, ~hidden], image[:, ~hidden])
        assert torch.equal(shown[:, hidden], torch.tensor(colour)[:, None].expand(3, int(hidden.sum())))
    assert torch.equal(hide(image, model, 0.0, 32), image)


def test_overlapping_patches_are_drawn_by_their_distance():
    shown = hide(torch.ones(3, 224, 224), build("pvt_v2_b0", 224), 0.5, 32)
    hidden = (shown[0] != 1).unfold(0, 32, 32).unfold(1, 32, 32).flatten(2).float().mean(2)
    assert set(hidden.unique().tolist()) == {0.0, 1.0} and hidden.sum() == 25


def test_the_picture_has_a_row_an_image_and_model():
    import io

    picture = compose([("a", [torch.zeros(3, 50, 50)] * 3), ("b", [torch.ones(3, 50, 50)] * 3)], ["x", "y", "z"], 50)
    image = Image.open(io.BytesIO(picture))
    assert image.format == "PNG" and image.size == (3 * 58 + 8, 24 + 2 * 82 + 8)
    assert image.getpixel((30, 24 + 8 + 24 + 25)) == (0, 0, 0)


def options(*words: str) -> argparse.Namespace:
    return create_parser().parse_args([*words, "--model", "vit_tiny_patch16_224", "--input-size", "33"])


def test_images_come_from_files_a_data_set_or_scikit_learn(tmp_path):
    for label in ("a", "b"):
        folder = tmp_path / "val" / label
        folder.mkdir(parents=True)
        Image.new("L", (40, 30), 77).save(folder / "1.png")
    assert [image.mode for image in read_images(options("--data-path", str(tmp_path)))] == ["RGB", "RGB"]
    assert len(read_images(options("--data-path", str(tmp_path), "--count", "1"))) == 1
    assert [image.size for image in read_images(options(str(tmp_path / "val" / "a" / "1.png")))] == [(40, 30)]
    assert [image.size for image in read_images(options())] == [(640, 427)] * 2
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    for name, reason in (("missing.png", "No such file"), ("broken.png", "not an image")):
        with pytest.raises(ValueError, match=rf"{name}: unreadable \({reason}"):
            read_images(options(str(tmp_path / name)))


def test_the_model_has_to_be_one_of_timms():
    with pytest.raises(
        ValueError, match="--model vit_tinny_patch16_224: timm has no such model; did you mean vit_tiny"
    ):
        build("vit_tinny_patch16_224", 224)
    with pytest.raises(ValueError, match=r"--model resnet50\.nope: cannot be built for --input-size 224"):
        build("resnet50.nope", 224)
    with pytest.raises(ValueError, match="--model: the patches of a Hiera are not in a grid that can be drawn"):
        hide(torch.rand(3, 224, 224), build("hiera_tiny_224", 224), 0.5, 32)
    with pytest.raises(ValueError, match="--model nest_tiny: cannot be built for --input-size 33"):
        build("nest_tiny", 33)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    def show(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "show.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    small = ("--model", "vit_tiny_patch16_224", "--input-size", "33")
    done = show(*small, "--ratios", "0.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "wrote augmask.png\n", "")
    assert Image.open(tmp_path / "augmask.png").size == (2 * 41 + 8, 24 + 2 * 65 + 8)
    for words, sentence in (
        (["x.png", "--data-path", "data"], "--data-path: images are named already; give one of both"),
        (["--out", "x.jpg"], "--out x.jpg: a PNG file is written; let the name end in .png"),
        (["--out", "no/x.png"], "--out no/x.png: not writable"),
        (["--model", "resnet50", "--ratios", "0.01"], "a ratio of 0.01 of 49 blocks"),
    ):
        done = show(*words)
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, (words, done.stderr)
