"""Weights that people have: which are taken from a file, and what is said of them."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.swin_transformer import SwinTransformer

from common.args import parse
from common.checkpoint.io import load
from common.checkpoint.sources import WeightsSource, find_weights
from common.checkpoint.weights import load_weights, read_initial_weights
from common.trainer import build_model, load_initial_weights, weights_adapter
from deit.models import adapt_weights
from deit.recipe import RECIPE as DEIT
from mae import models as mae_models  # noqa: F401 - registers vit_pico_patch8
from mae.recipe import RECIPE as MAE
from resnet_rsb.recipe import RECIPE as RESNET_RSB
from swin.recipe import RECIPE as SWIN
from tests.runs import build, run_refused

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
SMALL: dict[str, dict[str, Any]] = {
    "deit3_small_patch16_224": VIT,
    "vit_base_patch16_clip_224": VIT,
    "vit_small_patch14_reg4_dinov2": VIT | {"patch_size": 8},
    "beitv2_base_patch16_224": VIT,
    "vit_small_patch16_dinov3": VIT | {"rope_type": "dinov3"},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    | {"window_size": 4, "num_classes": 7},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 7},
    "resnet10t": {"num_classes": 7},
}


def deit(**kwargs):
    return timm.create_model("deit_pico_patch8_LS", **{"img_size": 32, "num_classes": 7} | kwargs)


def said(model, path, **kwargs) -> list[str]:
    """The lines about weights that are loaded into a model of the deit recipe."""
    return list(load_weights(model, path, adapt_weights, **kwargs).lines())


def assert_equal(model, state) -> None:
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def take_initial_weights(recipe, args, model) -> list[str]:
    return load_initial_weights(recipe, args, model, read_initial_weights(args.finetune, args.model))


def test_what_was_taken_is_said(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": deit().state_dict()}, path)
    assert said(deit(), path) == [f"weights: {path}, raw (model): all 64 tensors taken"]
    upstream = {
        name.replace(".ls1.gamma", ".gamma_1"): weight for name, weight in deit(img_size=64).state_dict().items()
    }
    torch.save(upstream | {"decoder_embed.weight": torch.ones(2), "decoder_embed.bias": torch.ones(2)}, path)
    words = "all 64 tensors taken, 4 renamed, positions resized from 8x8 to 4x4"
    model = timm.create_model("deit_pico_patch8_LS", img_size=32, num_classes=7)
    with pytest.raises(ValueError, match="unexpected key decoder_embed"):
        load_weights(model, path, adapt_weights)
    adapt = lambda state, model: adapt_weights({k: v for k, v in state.items() if "decoder" not in k}, model)  # noqa: E731
    report = load_weights(model, path, adapt)
    assert list(report.lines()) == [
        f"weights: {path}: {words}",
        "weights: left out: decoder_embed.weight, decoder_embed.bias",
    ]
    assert (report.taken, report.tensors, report.renamed) == (64, 64, 4)


def test_a_new_classifier_is_said_with_both_sizes(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": deit(num_classes=1000).state_dict()}, path)
    first, second = said(deit(), path, new_head=True)
    assert first == f"weights: {path}, raw (state_dict): 62 of 64 tensors taken"
    assert second == "weights: new: classifier of 7 classes (the file's: 1,000)"


def test_maes_file_tells_what_is_new_and_left_out(tmp_path):
    encoder = timm.create_model("vit_pico_patch8", img_size=32, num_classes=0, global_pool="token").state_dict()
    decoder = {f"decoder_blocks.{i}.norm1.weight": torch.ones(8) for i in range(3)}
    path = tmp_path / "mae.pth"
    torch.save({"model": encoder | decoder | {"mask_token": torch.zeros(1, 1, 8)}}, path)
    args = parse(MAE, ["--finetune", str(path)])
    first, second = take_initial_weights(MAE, args, build_model(MAE, args, 10))
    assert first == f"weights: {path}, raw (model): 52 of 56 tensors taken"
    assert second == ("weights: new: classifier of 10 classes, fc_norm.weight, fc_norm.bias; "
                      "left out: norm (2), decoder_blocks (3), mask_token")  # fmt: skip


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone."])
def test_a_prefix_that_is_removed_is_said(tmp_path, prefix):
    path = tmp_path / "w.pth"
    torch.save({prefix + name: value for name, value in deit().state_dict().items()}, path)
    (line,) = said(deit(), path)
    assert line == f"weights: {path}: all 64 tensors taken, prefix {prefix} removed"


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "teacher"])
def test_a_file_with_nothing_but_an_average_gives_it(key, tmp_path):
    source, model = deit(), deit()
    torch.save({key: source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    assert said(model, tmp_path / "w.pth")[0].split(": ")[1] == f"{tmp_path}/w.pth, average ({key})"
    assert_equal(model, source.state_dict())


def test_timms_average_is_taken_for_one(tmp_path, jpegs, capsys):
    """In timm's own checkpoint, which has the raw weights too: each is evaluated as what it is."""
    raw, averaged = (timm.create_model("resnet10t", num_classes=2) for _ in range(2))
    with torch.no_grad():
        averaged.fc.weight.zero_()
        averaged.fc.bias.copy_(torch.tensor([0.0, 1.0]))
    path = tmp_path / "timm.pth.tar"
    torch.save(
        {"epoch": 3, "arch": "resnet10t", "state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}, path
    )
    flags = ["--model", "resnet10t", "--img-size", "32", "--data-path", str(jpegs()), "--num-workers", "0", "--amp", "off",
             "--output", "", "--batch-size", "4", "--eval", "--model-ema", "--resume", str(path)]  # fmt: skip
    run = build(*flags, recipe=RESNET_RSB)
    assert run.trainer.ema is not None
    assert_equal(run.trainer.raw_model, raw.state_dict())
    assert_equal(run.trainer.ema.module, averaged.state_dict())
    out = capsys.readouterr().out
    assert f"weights: {path}, raw (state_dict): all" in out and "no EMA weights" not in out


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "encoder.", "backbone.", "module.model.backbone."]
)
def test_a_prefix_of_all_names_is_removed(prefix, tmp_path):
    source, model = deit(), deit()
    torch.save({f"{prefix}{name}": weight for name, weight in source.state_dict().items()}, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", adapt_weights)
    assert_equal(model, source.state_dict())


def test_a_prefix_of_some_names_stays(tmp_path):
    state = deit().state_dict()
    state["model.norm.weight"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing key norm\.weight; unexpected key model\.norm\.weight"):
        load_weights(deit(), tmp_path / "w.pth", adapt_weights)


def test_dinos_teacher_loses_its_head_and_its_prefix(tmp_path):
    source, model = deit(num_classes=0), deit()
    teacher = {f"backbone.{name}": weight for name, weight in source.state_dict().items()}
    torch.save({"teacher": teacher | {"head.mlp.0.weight": torch.ones(4, 64)}, "student": {}}, tmp_path / "w.pth")
    first, second = said(model, tmp_path / "w.pth", new_head=True)
    assert first.endswith("average (teacher): 62 of 64 tensors taken, prefix backbone. removed")
    assert second == "weights: new: classifier of 7 classes; left out: head.mlp.*.weight"
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_simmims_swin_loads(tmp_path):
    """Its encoder has a prefix and smaller windows; a decoder and a mask token stand beside it."""
    shape = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 0}
    encoder = SwinTransformer(img_size=24, window_size=3, **shape).state_dict()
    names = {name.replace("layers.1.downsample", "layers.0.downsample"): weight for name, weight in encoder.items()}
    index = {"encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.long)}
    beside = {
        "encoder.mask_token": torch.zeros(1, 1, 12),
        "decoder.0.weight": torch.ones(4, 24, 1, 1),
        "decoder.0.bias": torch.ones(4),
    }
    path = tmp_path / "simmim.pth"
    torch.save({"model": {f"encoder.{name}": weight for name, weight in names.items()} | index | beside}, path)
    opts = ["--opts", "MODEL.SWIN.EMBED_DIM", "12", "MODEL.SWIN.DEPTHS", "[1,1]", "MODEL.SWIN.NUM_HEADS", "[1,2]",
            "MODEL.SWIN.WINDOW_SIZE", "4"]  # fmt: skip
    args = parse(SWIN, ["--data-path", "x", "--pretrained", str(path), "--input-size", "32", *opts])
    model = build_model(SWIN, args, 7)
    first, second = take_initial_weights(SWIN, args, model)
    total = len(model.state_dict())
    assert first == (f"weights: {path}, raw (model): {total - 2} of {total} tensors taken, prefix encoder. removed, 3 renamed, "
                     "2 tables of relative positions resized from windows of 3x3 to 4x4")  # fmt: skip
    assert second == "weights: new: classifier of 7 classes; left out: mask_token, decoder.*.weight, decoder.*.bias"
    state = model.state_dict()
    assert torch.equal(state["layers.1.downsample.reduction.weight"], encoder["layers.1.downsample.reduction.weight"])
    expected = timm.layers.resize_rel_pos_bias_table(
        encoder["layers.0.blocks.0.attn.relative_position_bias_table"], (4, 4), (49, 1)
    )
    assert torch.equal(state["layers.0.blocks.0.attn.relative_position_bias_table"], expected)


def test_names_that_fit_no_module_are_a_sentence(tmp_path, jpegs, capsys):
    """timm's function for Swin looks up the module of each table."""
    torch.save({"model": {"stage.0.relative_position_bias_table": torch.zeros(169, 3)}}, tmp_path / "s.pth")
    args = parse(SWIN, ["--pretrained", str(tmp_path / "s.pth")])
    with pytest.raises(ValueError, match=r"s\.pth: .*has no attribute `stage`"):
        take_initial_weights(SWIN, args, build_model(SWIN, args, 10))


@pytest.mark.parametrize("numpy", ["numpy.core", "numpy._core"])
def test_numpys_numbers_and_arrays_load(numpy, tmp_path):
    """Under the names that NumPy 1 and NumPy 2 pickle them."""
    content = {"model": {"w": torch.ones(2)}, "best": np.float64(81.25), "epoch": np.int64(7), "done": np.bool_(True),
               "curve": np.arange(6, dtype=">f4").reshape(2, 3), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
               "empty": np.zeros((0, 3))}  # fmt: skip
    torch.save(content, tmp_path / "n.pth")
    data = (tmp_path / "n.pth").read_bytes()
    names = {b"numpy._core.": f"{numpy}.".encode(), b"numpy.core.": f"{numpy}.".encode()}
    old = next(name for name in names if name in data)
    rewrite_pickle(tmp_path / "n.pth", old, names[old])
    loaded = load(tmp_path / "n.pth")
    assert [loaded[name] for name in ("best", "epoch", "done")] == [81.25, 7, True]
    assert [type(loaded[name]) for name in ("best", "epoch", "done")] == [float, int, bool]
    assert torch.equal(loaded["curve"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(loaded["fortran"], torch.arange(6).reshape(2, 3))
    assert loaded["empty"].shape == (0, 3)
    assert not {name for _, name in map(named, torch.serialization.get_safe_globals()) if "numpy" in name}


def named(item) -> tuple[object, str]:
    return item if isinstance(item, tuple) else (item, f"{item.__module__}.{item.__qualname__}")


def rewrite_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of torch's archive."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part.replace(old, new) if name.endswith("data.pkl") else part)


def test_a_state_dict_of_arrays_loads(tmp_path):
    source, model = deit(), deit()
    torch.save({"model": {name: weight.numpy() for name, weight in source.state_dict().items()}}, tmp_path / "n.pth")
    load_weights(model, tmp_path / "n.pth", adapt_weights)
    assert_equal(model, source.state_dict())


def test_a_refused_file_names_what_it_carries(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "output": Path("x")}, tmp_path / "p.pth")
    with pytest.raises(ValueError) as refused:
        load(tmp_path / "p.pth")
    name = f"{type(Path('x')).__module__}.{type(Path('x')).__name__}"
    assert str(refused.value) == (f"{tmp_path}/p.pth: refused: contains pickled code ({name}); only tensors and plain "
                                  "values are loaded; scripts/convert.py takes the weights out")  # fmt: skip
    torch.save({"x": eval, "args": argparse.Namespace()}, tmp_path / "p.pth")
    with pytest.raises(ValueError, match=r"pickled code \(builtins\.eval\)"):
        load(tmp_path / "p.pth")


def test_a_format_is_known_by_its_content(tmp_path):
    source = deit()
    save_file(source.state_dict(), tmp_path / "tensors.pth")
    torch.save({"model": source.state_dict()}, tmp_path / "pickle.safetensors")
    torch.save({"model": source.state_dict()}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("tensors.pth", "pickle.safetensors", "old.safetensors"):
        model = deit()
        report = load_weights(model, tmp_path / name, adapt_weights)
        assert_equal(model, source.state_dict())
        assert report.kind == ("" if name == "tensors.pth" else ", raw (model)")


@pytest.mark.parametrize(("name", "content", "words"), [
    ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "a Git-LFS pointer, not a checkpoint; fetch the file with git lfs pull"),
    ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer"),
    ("w.pth", b"\n<!DOCTYPE html><html></html>", "a web page, not a checkpoint; download the file"),
    ("w.safetensors", b"<html>", "a web page"),
], ids=["LFS", "LFS.safetensors", "page", "page.safetensors"])  # fmt: skip
def test_what_is_no_checkpoint_is_told_as_what_it_is(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refused:
        load(tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name}: {words}")


def test_a_folder_is_told_with_what_to_pass(tmp_path):
    def refusal() -> str:
        with pytest.raises(ValueError) as refused:
            load(tmp_path)
        return str(refused.value).removeprefix(f"{tmp_path}: a folder, not a checkpoint; ")

    assert refusal() == "pass the file in it"
    (tmp_path / "checkpoint.pth").touch()
    assert refusal() == f"pass {tmp_path}/checkpoint.pth"
    (tmp_path / "config.json").touch()
    assert refusal() == f"local-dir:{tmp_path} takes its weights"


def make_folder(folder: Path, name: str, **kwargs) -> torch.nn.Module:
    """Save a small model with timm in its format."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name] | kwargs)
    save_for_hf(model, str(folder), safe_serialization=True)
    return model


@pytest.mark.parametrize("name", SMALL)
def test_a_folder_gives_what_timm_makes_of_it(name, tmp_path):
    """At another size and with another classifier."""
    make_folder(tmp_path / "best", name)
    size = {"img_size": 64} if "img_size" in SMALL[name] else {}
    place = f"local-dir:{tmp_path}/best"
    torch.manual_seed(1)
    expected = timm.create_model(place, pretrained=True, num_classes=3, **size).state_dict()
    args = parse(RESNET_RSB, ["--data-path", "x", "--finetune", place, "--img-size", "64"])
    assert args.model == place
    model = build_model(RESNET_RSB, args, 3)
    lines = take_initial_weights(RESNET_RSB, args, model)
    assert "new: classifier of 3 classes (the file's: 7)" in lines[1]
    head = model.pretrained_cfg["classifier"]
    taken = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{head}.")}
    assert len(taken) > 10 and all(torch.equal(value, expected[key]) for key, value in taken.items())


def test_a_folder_brings_architecture_and_pooling(tmp_path):
    source = make_folder(tmp_path, "deit3_small_patch16_224", global_pool="avg", fc_norm=False)
    for flags, pool in (([], "avg"), (["--cls-token"], "token")):
        args = parse(MAE, ["--data-path", "x", "--finetune", f"local-dir:{tmp_path}", "--input-size", "32", *flags])
        model = build_model(MAE, args, 7)
        assert (model.global_pool, len(model.blocks), model.embed_dim) == (pool, 2, 32)
        if not flags:
            take_initial_weights(MAE, args, model)
            assert_equal(model, source.state_dict())


def test_swins_shape_comes_from_the_folder(tmp_path):
    source = make_folder(tmp_path, "swin_tiny_patch4_window7_224")
    args = parse(
        SWIN, ["--data-path", "x", "--pretrained", f"local-dir:{tmp_path}", "--input-size", "32", "--output", "out"]
    )
    model = build_model(SWIN, args, 7)
    take_initial_weights(SWIN, args, model)
    assert_equal(model, source.state_dict())
    assert args.output_dir == f"out/local-dir-{str(tmp_path)[1:].replace('/', '-')}/default"
    make_folder(tmp_path / "resnet", "resnet10t")
    args = parse(SWIN, ["--data-path", "x", "--pretrained", f"local-dir:{tmp_path}/resnet"])
    with pytest.raises(ValueError, match="its model is a ResNet; this recipe trains a SwinTransformer"):
        build_model(SWIN, args, 7)


def test_another_model_is_refused_by_name(tmp_path):
    make_folder(tmp_path, "resnet10t")
    place = f"local-dir:{tmp_path}"
    with pytest.raises(ValueError) as refused:
        find_weights(place, "resnet18")
    assert str(refused.value) == f"--model resnet18: {place} has weights of resnet10t; leave out --model"
    assert find_weights(place, "resnet10t").architecture == "resnet10t"
    assert find_weights(place, "resnet10t.c3_in1k").path == f"{tmp_path}/model.safetensors"


def test_a_model_of_this_trainer_takes_a_folder_by_its_tensors(tmp_path):
    shape = {"embed_dim": 64, "depth": 4, "num_classes": 7, "init_values": 0.1}
    source = make_folder(tmp_path, "deit3_small_patch16_224", **shape)
    args = parse(
        DEIT,
        [
            "--data-path",
            "x",
            "--model",
            "deit_pico_patch8_LS",
            "--input-size",
            "32",
            "--finetune",
            f"local-dir:{tmp_path}",
        ],
    )
    model = build_model(DEIT, args, 7)
    take_initial_weights(DEIT, args, model)
    assert_equal(model, source.state_dict())


@pytest.mark.parametrize(("place", "words"), [
    ("local-dir:none", "no file none/config.json; expected a folder in timm's format"),
    ("local-dir:run", "no file run/config.json; local-dir:run/best has one"),
    ("local-dir:transformers", "config.json is not in timm's format (KeyError: 'architecture')"),
    ("local-dir:json", "config.json is not in timm's format"),
    ("local-dir:empty", "the folder holds no weights; expected model.safetensors"),
    ("hf-hub:", "no model id"),
])  # fmt: skip
def test_what_is_no_folder_of_timms_is_a_sentence(place, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, content in {"run/best": "{}", "transformers": '{"architectures": ["ViT"]}', "json": "[",
                            "empty": json.dumps({"architecture": "resnet10t", "pretrained_cfg": {}})}.items():  # fmt: skip
        os.makedirs(folder)
        Path(folder, "config.json").write_text(content)
    with pytest.raises(ValueError) as refused:
        find_weights(place, place)
    assert place in str(refused.value) and words in str(refused.value)


@pytest.mark.parametrize(("model", "words"), [
    ("resnet10t", "it names no tag; timm has resnet10t.c3_in1k"),
    ("resnet10t.nothing", "it has no tag nothing; timm has resnet10t.c3_in1k"),
    ("deit_pico_patch8_LS", "it names no tag; timm has no weights of deit_pico_patch8_LS"),
])  # fmt: skip
def test_the_word_timm_needs_a_tag(model, words):
    with pytest.raises(ValueError) as refused:
        find_weights("timm", model)
    assert str(refused.value) == f"--finetune timm with --model {model}: {words}"


def test_a_file_called_timm_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": deit().state_dict()}, "timm")
    assert find_weights("./timm", "deit_pico_patch8_LS") == WeightsSource("./timm", "./timm")
    load_weights(deit(), find_weights("./timm", "").path, weights_adapter(DEIT, None))


def test_a_name_without_its_weights_says_that_training_starts_from_scratch(jpegs, tmp_path, capsys):
    flags = ["--data-path", str(jpegs()), "--num-workers", "0", "--img-size", "32", "--batch-size", "4", "--output", ""]
    make_folder(tmp_path / "best", "resnet10t")
    place = f"local-dir:{tmp_path}/best"
    for model, word in (("resnet10t.c3_in1k", "timm"), (place, place)):
        build(*flags, "--model", model, recipe=RESNET_RSB)
        line = f"weights: none, training starts from scratch; --finetune {word} takes those of {model}\n"
        assert line in capsys.readouterr().out
    build(*flags, "--model", "resnet10t", recipe=RESNET_RSB)
    assert "weights:" not in capsys.readouterr().out


def test_weights_of_another_shape_are_refused_in_a_run(jpegs, tmp_path, capsys):
    make_folder(tmp_path / "best", "resnet10t")
    data = ["--data-path", str(jpegs())]
    error = run_refused(capsys, *data, "--finetune", f"local-dir:{tmp_path}/best")  # the tests' --model
    assert "another architecture" in error and f"local-dir:{tmp_path}/best (model.safetensors)" in error
