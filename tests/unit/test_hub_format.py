"""Models in timm's hub format: what timm alone makes of a folder is the model that was trained."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from common.args import parse
from common.augsub import AugSub
from common.checkpoint import hub_format
from common.checkpoint.hub_format import CARD, CONFIG, WEIGHTS, begin_folder, hub_config, is_current, write_folder
from common.checkpoint.weights import move_mask_tokens
from common.model_card import RAW, model_card
from common.trainer import build_model
from scripts.launch.registry import RECIPES
from tests.commands import environment
from tests.compare_runs import diff_nested

# not one of the numbers that timm has for any of these models
IMAGES = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_ratio": 0.77, "crop_mode": "squash"}  # fmt: skip
CARD_OF_3 = model_card({}, RAW, {"epoch": 2, "test_acc1": 12.5, "test_acc5": 50.0}, "after epoch 3 of 9", "some_model")
LOAD = """
import json, sys
import timm, torch
assert not {"common", "deit", "mae", "swin", "resnet_rsb"} & sys.modules.keys()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    x = torch.rand(2, *config["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save({"logits": model(x), "labels": model.pretrained_cfg["label_names"]}, f"{folder}/loaded.pt")
"""
VARIANTS = [(name, variant) for name, recipe in RECIPES.items() for variant in recipe.variants]
# models besides the variants' own, and other shapes
OTHERS = [
    ("deit", ["--model", "deit_tiny_patch16_LS"]),
    ("deit", ["--model", "deit_medium_patch16_LS", "--input-size", "160"]),
    ("deit", []),  # a model of timm's
    ("mae", ["--model", "vit_huge_patch16", "--input-size", "448"]),
    ("mae", ["--model", "vit_base_patch16", "--cls-token"]),
    ("mae", ["--model", "vit_small_patch16_224", "--cls-token", "--input-size", "64"]),
    ("swin", ["--opts", "MODEL.SWIN.DEPTHS", "[1,1]", "MODEL.SWIN.NUM_HEADS", "[1,2]", "MODEL.NAME", "mine"]),
    ("swin", ["--opts", "MODEL.SWIN.MLP_RATIO", "2.0", "MODEL.SWIN.QKV_BIAS", "False", "DATA.IMG_SIZE", "448"]),
    ("resnet_rsb", ["--model", "convnext_atto"]),
    ("resnet_rsb", ["--model", "resnet18.a1_in1k"]),
]


def config_of(recipe, args, model, class_names=None) -> bytes:
    return hub_config(model, recipe.hub_architecture(args), class_names, {"input_size": args.input_size, **IMAGES})


@pytest.mark.parametrize(("name", "flags"), [*((name, ["--variant", variant]) for name, variant in VARIANTS), *OTHERS])
def test_config_json_rebuilds_the_model(name, flags, tmp_path):
    """With the names and shapes of each weight, for every row of the tables."""
    recipe = RECIPES[name]
    args = parse(recipe, [*flags, "--data-path", "x"])
    with torch.device("meta"):
        model = build_model(recipe, args, 13)
    begin_folder(tmp_path / "best", config_of(recipe, args, model))
    with torch.device("meta"):
        stock = timm.create_model(f"local-dir:{tmp_path / 'best'}")
    shapes = [{key: weight.shape for key, weight in each.state_dict().items()} for each in (model, stock)]
    assert shapes[0] == shapes[1] and stock.num_classes == 13
    assert type(stock) is type(model)
    images = {**IMAGES, "input_size": (3, args.input_size, args.input_size), "crop_pct": IMAGES["crop_ratio"]}
    config = resolve_model_data_config(stock)
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in images.items() if key != "crop_ratio"
    }
    written = json.loads((tmp_path / "best" / CONFIG).read_text())
    assert not written["pretrained_cfg"].keys() & {"tag", "license", "url", "hf_hub_id", "label_names"}


def test_timm_alone_computes_what_the_digits_models_do(tmp_path):
    """In a process that imports nothing of this repository; AugSub's mask token is left out."""
    models = {}
    for name, recipe in RECIPES.items():
        args = parse(recipe, ["--augsub", "masking"])
        torch.manual_seed(1)
        model = build_model(recipe, args, 10)
        AugSub(model, args.augsub, args.augsub_ratio, block=args.augsub_block)
        for weight in model.state_dict().values():
            if weight.is_floating_point():
                weight.add_(torch.rand_like(weight) * 0.1)  # also where a model begins with zeros
        weights = move_mask_tokens({"model": model.to(memory_format=torch.channels_last).state_dict()})["model"]
        assert ("mask_token" in model.state_dict()) == (name == "swin") and "mask_token" not in weights
        config = config_of(recipe, args, model, [f"digit {i}" for i in range(10)])
        write_folder(tmp_path / name, config, weights, CARD_OF_3)
        models[name] = model.eval()
    folders = [str(tmp_path / name) for name in models]
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, model in models.items():
        loaded = torch.load(tmp_path / name / "loaded.pt")
        with torch.no_grad():
            logits = model(x)
        assert logits.std() > 0.01
        torch.testing.assert_close(loaded["logits"], logits, rtol=1e-5, atol=1e-5)
        assert loaded["labels"] == [f"digit {i}" for i in range(10)]


@pytest.fixture
def tiny():
    model = timm.create_model("resnet10t", num_classes=3)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return hub_config(model, None, ["cat", "dog"], {"input_size": 32, **IMAGES}), weights


def test_classes_without_a_name_are_left_out(tiny):
    assert json.loads(tiny[0])["label_names"] == {"0": "cat", "1": "dog"}


def test_a_model_that_timm_does_not_know_is_refused():
    model = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="the model is not one of timm's own"):
        hub_config(model, None, None, {"input_size": 32, **IMAGES})
    stranger = timm.create_model("resnet10t")
    stranger.pretrained_cfg = {**stranger.pretrained_cfg, "architecture": "deit_tiny_patch16_LS"}
    with pytest.raises(ValueError, match="the model is not one of timm's own"):
        hub_config(stranger, None, None, {"input_size": 32, **IMAGES})


def test_each_file_is_replaced_as_a_whole_and_the_card_comes_last(tiny, tmp_path, monkeypatch):
    config, weights = tiny
    begin_folder(tmp_path / "best", config)
    assert os.listdir(tmp_path / "best") == [CONFIG]
    replaced = []
    monkeypatch.setattr(
        os, "replace", lambda tmp, path, replace=os.replace: (replaced.append(path.name), replace(tmp, path))
    )
    for _ in range(2):
        write_folder(tmp_path / "best", config, weights, CARD_OF_3)
    assert replaced == [WEIGHTS, CARD] * 2
    assert sorted(os.listdir(tmp_path / "best")) == [CARD, CONFIG, WEIGHTS]
    modes = {stat.S_IMODE((tmp_path / "best" / name).stat().st_mode) for name in (CARD, CONFIG, WEIGHTS)}
    assert len(modes) == 1
    loaded = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True)
    assert not diff_nested(dict(loaded.state_dict()), weights)


def test_weights_never_stand_under_another_config(tiny, tmp_path, monkeypatch):
    """Another config.json, as after a run that was continued under other settings: the old weights go before it."""
    config, weights = tiny
    write_folder(tmp_path / "best", config, weights, CARD_OF_3)
    begin_folder(tmp_path / "best", b"of a later start")
    assert (tmp_path / "best" / CONFIG).read_bytes() == config, "the weights keep their own"
    monkeypatch.setattr(hub_format, "save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "best", b"other", weights, CARD_OF_3)
    assert os.listdir(tmp_path / "best") == [CONFIG] and (tmp_path / "best" / CONFIG).read_bytes() == b"other"


def test_a_full_disk_leaves_the_weights_before(small_disk, tmp_path):
    model = timm.create_model("deit3_small_patch16_224", depth=1, embed_dim=64, num_heads=1, img_size=32, num_classes=2)
    config = hub_config(model, None, None, {"input_size": 32, **IMAGES})
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    nbytes = sum(weight.nbytes for weight in weights.values())
    folder = small_disk(f"{nbytes * 3 // 2048}k") / "best"
    write_folder(folder, config, weights, CARD_OF_3)
    with pytest.raises(Exception, match="No space left on device"):
        write_folder(folder, config, {name: weight + 1 for name, weight in weights.items()}, CARD_OF_3)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert not diff_nested(dict(loaded.state_dict()), weights)


def test_the_card_says_what_it_has_to(tiny, tmp_path):
    write_folder(tmp_path / "best", *tiny, CARD_OF_3)
    card = (tmp_path / "best" / CARD).read_text()
    assert card.startswith("---\n") and "license: unknown" in card
    assert "- **Weights:** the model's, after epoch 3 of 9" in card
    assert "- **Accuracy of the model after epoch 3:** 12.50 % top-1, 50.00 % top-5" in card
    assert "arXiv 2306.11339; CVPR 2025 as MaskSub" in card and "heo2025masksub" in card
    checkpoint = tmp_path / "checkpoint.pth"
    assert not is_current(tmp_path / "best", checkpoint)
    checkpoint.touch()
    os.utime(checkpoint, ns=(0, 0))
    assert is_current(tmp_path / "best", checkpoint)
    os.utime(tmp_path / "best" / CARD, ns=(0, 0))
    os.utime(checkpoint, ns=(1, 1))
    assert not is_current(tmp_path / "best", checkpoint)
