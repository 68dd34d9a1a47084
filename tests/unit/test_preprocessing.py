"""How images are prepared for a model: what the model decides, what flags decide, and what older checkpoints keep."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor

from common import data_config
from common.args import PREPROCESSING, parse
from common.checkpoint import io as files
from common.cli import run
from common.data.transforms import Preprocessing
from common.data_config import resolve_preprocessing
from common.distributed import Process
from common.recipe import Recipe
from common.run import Run, build_run
from common.run_report import format_preprocessing
from deit.recipe import RECIPE as DEIT
from mae.recipe import RECIPE as MAE
from resnet_rsb.recipe import RECIPE as RESNET_RSB
from swin.recipe import RECIPE as SWIN

DATA = ["--data-path", "x"]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
PUBLISHED = IMAGENET | {"input_size": 224, "eval_crop_ratio": 0.875, "crop_mode": "center"}
HUB = {"architecture": "vit_tiny_patch16_224", "input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3],
       "interpolation": "bilinear", "crop_pct": 0.7, "crop_mode": "squash"}  # fmt: skip
SMALL = ["--num-workers", "0", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0", "--amp", "off", "--lr",
         "1e-3", "--opt", "adamw", "--aa", "none", "--reprob", "0"]  # fmt: skip


def in_force(recipe: Recipe, *flags: str, **sources) -> dict:
    """The settings that are in force after these flags, by name."""
    args = resolve_preprocessing(recipe, parse(recipe, [*DATA, *flags]), **sources)
    assert "left_to_model" not in vars(args)
    return {name: list(v) if isinstance(v := getattr(args, name), tuple) else v for name in PREPROCESSING}


# what the model decides


@pytest.mark.parametrize("name", [
    "resnet50", "resnet101", "resnet18.tv_in1k", "vit_base_patch16_384", "vit_base_patch16_siglip_224", "convnext_atto",
    "vit_base_patch16_clip_224.openai", "inception_v4", "efficientnet_b3",
])  # fmt: skip
def test_resnet_rsb_takes_all_of_a_model_as_timms_train_script_does(name):
    expected = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict(), use_test_size=False)
    assert in_force(RESNET_RSB, "--model", name) == {
        "input_size": expected["input_size"][1], "mean": list(expected["mean"]), "std": list(expected["std"]),
        "interpolation": expected["interpolation"], "eval_crop_ratio": expected["crop_pct"],
        "crop_mode": expected["crop_mode"],
    }  # fmt: skip


def test_the_papers_model_is_fed_what_the_paper_says():
    expected = PUBLISHED | {"eval_crop_ratio": 0.95}
    assert in_force(RESNET_RSB) == expected
    assert in_force(RESNET_RSB, "--variant", "resnet152") == expected
    squashed = in_force(RESNET_RSB, "--model", "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k")
    assert (squashed["crop_mode"], squashed["eval_crop_ratio"], squashed["input_size"]) == ("squash", 1.0, 384)


@pytest.mark.parametrize(("flags", "expected"), [
    (["--mean", "0.1", "0.2", "0.3"], {"mean": [0.1, 0.2, 0.3]}), (["--std", "0.1", "0.2", "4"], {"std": [0.1, 0.2, 4]}),
    (["--interpolation", "bilinear"], {"interpolation": "bilinear"}), (["--crop-pct", "0.875"], {"eval_crop_ratio": 0.875}),
    (["--img-size", "224"], {"input_size": 224}), (["--crop-mode", "border"], {"crop_mode": "border"}),
])  # fmt: skip
def test_a_flag_overrides_the_model(flags, expected):
    """Also with the value that would be the recipe's default."""
    model = HALF | {"input_size": 384, "eval_crop_ratio": 1.0, "crop_mode": "center"}
    assert in_force(RESNET_RSB, "--model", "vit_base_patch16_384", *flags) == model | expected


@pytest.mark.parametrize(("recipe", "flags", "expected"), [
    (DEIT, ["--model", "vit_base_patch16_384"], HALF), (MAE, ["--model", "vit_base_patch16_384"], HALF),
    (DEIT, ["--model", "vit_base_patch16_384", "--mean", "0.4", "0.4", "0.4"], HALF | {"mean": [0.4] * 3}),
    (DEIT, [], IMAGENET), (DEIT, ["--model", "deit_small_patch16_LS"], IMAGENET), (MAE, [], IMAGENET),
    (DEIT, ["--variant", "large_400"], IMAGENET | {"input_size": 192, "eval_crop_ratio": 1.0}),
    (MAE, ["--variant", "huge_50"], IMAGENET), (MAE, ["--input-size", "384"], IMAGENET | {"input_size": 384, "eval_crop_ratio": 1.0}),
    (SWIN, [], IMAGENET), (SWIN, ["--opts", "MODEL.NAME", "vit_base_patch16_384"], IMAGENET),
    (MAE, ["--model", "vit_base_patch16_clip_224.openai"],
     {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711], "interpolation": "bicubic"}),
])  # fmt: skip
def test_other_recipes_feed_a_model_of_timms_with_its_own_numbers_at_their_size(recipe, flags, expected):
    assert in_force(recipe, *flags) == PUBLISHED | expected


@pytest.mark.parametrize("recipe", [DEIT, MAE, SWIN, RESNET_RSB])
def test_the_digits_are_fed_as_they_were(recipe):
    digits = IMAGENET | {"input_size": 32, "eval_crop_ratio": 1.0, "crop_mode": "center"}
    args = resolve_preprocessing(recipe, parse(recipe, []))
    assert {name: getattr(args, name) for name in PREPROCESSING} | {
        "mean": list(args.mean),
        "std": list(args.std),
    } == digits
    assert args.output_dir == parse(recipe, []).output_dir and "mean" not in args.output_dir


@pytest.mark.parametrize("recipe", [DEIT, MAE, RESNET_RSB])
def test_a_configuration_of_a_hubs_model_takes_precedence_over_timms(recipe):
    model = ["--model", "vit_base_patch16_384"]
    hub = {"input_size": 96, "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "interpolation": "bilinear",
           "eval_crop_ratio": 0.7, "crop_mode": "squash"}  # fmt: skip
    assert in_force(recipe, *model, pretrained_cfg=HUB) == hub
    flags = ["--input-size", "224", "--std", "1", "1", "1"]
    assert in_force(recipe, *model, *flags, pretrained_cfg=HUB) == hub | {"input_size": 224, "std": [1, 1, 1]}


@pytest.mark.parametrize("recipe", [DEIT, MAE, RESNET_RSB])
def test_weights_that_start_a_training_bring_mean_and_std_alone(recipe):
    """Those of a folder with another --model, and those of a checkpoint; the run's own size and crop stand."""
    model = ["--model", "vit_base_patch16_384"]
    saved = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "input_size": 96, "interpolation": "bilinear",
             "eval_crop_ratio": 0.7, "crop_mode": "squash", "class_order": "natural"}  # fmt: skip
    expected = in_force(recipe, *model) | {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    assert in_force(recipe, *model, pretrained_cfg=HUB, finetunes=True) == expected
    assert in_force(recipe, *model, saved=saved, finetunes=True) == expected
    assert in_force(recipe, *model, "--mean", "0.5", "0.5", "0.5", saved=saved, finetunes=True) == expected | {
        "mean": [0.5] * 3
    }
    assert in_force(recipe, *model, saved=saved) == {name: saved[name] for name in PREPROCESSING}


def test_a_row_of_the_table_keeps_its_size_and_crop_with_weights_of_another_size():
    row = in_force(DEIT, "--variant", "base_finetune", pretrained_cfg=HUB)
    assert (row["input_size"], row["eval_crop_ratio"], row["crop_mode"]) == (224, 1.0, "center")
    assert row["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(("cfg", "sentence"), [
    ({"input_size": [3, 256, 192]}, "config.json: input_size [3, 256, 192] is not supported; pass --input-size"),
    ({"mean": [0.5]}, "config.json: mean [0.5] is not supported; pass --mean"),
    ({"std": [0, 1, 1]}, "config.json: std [0, 1, 1] is not supported; pass --std"),
    ({"mean": [124, 116, 104]}, "config.json: mean [124, 116, 104] is not supported; pass --mean"),
    ({"interpolation": "cubic"}, "config.json: interpolation 'cubic' is not supported; pass --interpolation"),
    ({"crop_pct": "all"}, "config.json: eval_crop_ratio 'all' is not supported; pass --eval-crop-ratio"),
])  # fmt: skip
def test_what_images_cannot_be_prepared_for_is_refused(cfg, sentence):
    with pytest.raises(ValueError) as refusal:
        in_force(MAE, pretrained_cfg=HUB | cfg)
    assert str(refusal.value) == sentence


def test_an_unknown_tag_is_bad_input(capsys):
    with pytest.raises(SystemExit) as leaving:
        run(RESNET_RSB, ["--model", "resnet18.nobody", "--output", ""])
    assert leaving.value.code == 2
    assert "--model resnet18.nobody: Invalid pretrained tag (nobody) for resnet18" in capsys.readouterr().err


def test_a_setting_that_does_not_go_with_the_models_size_is_refused():
    with pytest.raises(ValueError, match=r"--cutmix-minmax 0\.5 0\.505: expected min < max by a pixel or more"):
        in_force(RESNET_RSB, "--cutmix-minmax", "0.5", "0.505", pretrained_cfg=HUB)


# what reaches the model


def folders(root: Path, classes: tuple[str, ...] = ("cat", "dog"), size: tuple[int, int] = (40, 40)) -> Path:
    """Images of one colour, the class's number in each channel's grey level."""
    for split, count in (("train", 4), ("val", 2)):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", size, (40 + k, 100, 200)).save(root / split / name / f"{i}.png")
    return root


def prepared(recipe: Recipe, *flags: str) -> tuple[Run, str]:
    """A run that is built and not started, and what it printed."""
    with redirect_stdout(io.StringIO()) as output:
        built = build_run(recipe, parse(recipe, flags), Process(torch.device("cpu")))
    return built, output.getvalue()


def first_batches(built: Run) -> list[Tensor]:
    """The first training batch as the model gets it, and the first one of evaluation."""
    assert built.train_loader is not None
    images, labels, _ = next(iter(built.train_loader))
    return [built.trainer.prepare_batch(images, labels)[0], next(iter(built.val_loader))[0]]


@pytest.mark.parametrize("reader", ["pil", "fast"])
@pytest.mark.parametrize("recipe", [DEIT, MAE, RESNET_RSB])
def test_training_and_evaluation_are_normalised_with_the_models_numbers(recipe, reader, tmp_path):
    flags = ["--data-path", str(folders(tmp_path)), *SMALL, "--model", "vit_tiny_patch16_224", "--input-size", "32", "--mixup",
             "0", "--cutmix", "0", "--color-jitter", "0", "--input", reader, "--output-dir", ""]  # fmt: skip
    built, output = prepared(recipe, *flags)
    for batch in first_batches(built):
        assert batch.shape[1:] == (3, 32, 32)
        torch.testing.assert_close(batch[:, 1], torch.full_like(batch[:, 1], (100 / 255 - 0.5) / 0.5))
        torch.testing.assert_close(batch[:, 2], torch.full_like(batch[:, 2], (200 / 255 - 0.5) / 0.5))
    assert "mean 0.5 0.5 0.5, std 0.5 0.5 0.5\n" in output


def test_mean_and_std_of_flags_reach_the_model_channel_by_channel(tmp_path):
    flags = ["--data-path", str(folders(tmp_path)), *SMALL, "--input-size", "32", "--mean", "0.1", "0.2", "0.3", "--std", "0.4",
             "0.5", "0.6", "--opts", "MODEL.SWIN.EMBED_DIM", "8", "MODEL.SWIN.DEPTHS", "[1,1]", "MODEL.SWIN.NUM_HEADS",
             "[1,2]", "MODEL.SWIN.WINDOW_SIZE", "4", "AUG.COLOR_JITTER", "0", "--mixup", "0", "--cutmix", "0", "--output", ""]  # fmt: skip
    built, output = prepared(SWIN, *flags)
    for batch in first_batches(built):
        expected = torch.tensor([(100 / 255 - 0.2) / 0.5, (200 / 255 - 0.3) / 0.6]).view(1, 2, 1, 1)
        torch.testing.assert_close(batch[:, 1:], expected.expand_as(batch[:, 1:]))
    line = "images: 32 px, evaluation crop 0.875, bicubic; mean 0.1 0.2 0.3, std 0.4 0.5 0.6\n"
    assert line in output
    assert built.preprocessing == Preprocessing(32, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "bicubic", 0.875, "center")


def test_evaluation_resizes_and_crops_as_the_flags_say(tmp_path):
    folder = folders(tmp_path, size=(80, 40))
    flags = [
        "--data-path",
        str(folder),
        *SMALL,
        "--model",
        "test_vit",
        "--img-size",
        "32",
        "--mixup",
        "0",
        "--output",
        "",
    ]
    built, output = prepared(RESNET_RSB, *flags, "--crop-pct", "0.5", "--interpolation", "nearest")
    resize, crop, *_ = built.val_loader.dataset.transform.transforms
    assert (resize.size, resize.interpolation.value, tuple(crop.size)) == (64, "nearest", (32, 32))
    assert "images: 32 px, evaluation crop 0.5, nearest; mean" in output
    squashed = Preprocessing(8, (0.48145466, 0.0, 1.0), (1.0, 1.0, 1.0), "lanczos", 1.0, "squash")
    line = "images: 8 px, evaluation crop 1 (squash), lanczos; mean 0.4815 0 1, std 1 1 1"
    assert format_preprocessing(squashed) == line


def test_settings_in_force_are_in_the_checkpoint_and_args_json(tmp_path):
    flags = [
        str(folders(tmp_path / "images")),
        *SMALL,
        "--model",
        "test_vit",
        "--img-size",
        "32",
        "--output",
        str(tmp_path / "o"),
    ]
    run(RESNET_RSB, flags)
    saved = files.load(tmp_path / "o" / "checkpoint.pth")["args"]
    cfg = timm.get_pretrained_cfg("test_vit")
    assert (saved["mean"], saved["std"], saved["eval_crop_ratio"]) == (list(cfg.mean), list(cfg.std), cfg.crop_pct)
    assert saved["class_order"] == "natural" and "left_to_model" not in saved


# order of class folders

NUMBERS = ("1", "2", "10", "b", "A10", "a9")


def test_class_folders_are_in_natural_order_as_timms_reader_has_them(tmp_path):
    folder = folders(tmp_path, NUMBERS)
    flags = ["--data-path", str(folder), *SMALL, "--input-size", "32", "--output-dir", "", "--model", "test_vit"]
    natural = prepared(RESNET_RSB, *flags)[0]
    _, class_to_idx = find_images_and_targets(str(folder / "train"))
    assert natural.class_names == list(class_to_idx) == ["1", "2", "10", "a9", "A10", "b"]
    for loader, images in ((natural.train_loader, 4), (natural.val_loader, 2)):
        samples = loader.dataset.data.samples
        assert len(samples) == 6 * images
        assert all(class_to_idx[Path(path).parent.name] == label for path, label in samples)
    assert prepared(MAE, *flags)[0].class_names == sorted(NUMBERS) == ["1", "10", "2", "A10", "a9", "b"]


# older checkpoints


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The output folder of a run of two epochs that an older version stopped after one, and its flags."""
    folder = folders(tmp_path / "images", ("1", "2", "10"))
    flags = [str(folder), *SMALL, "--epochs", "2", "--model", "test_vit", "--output", str(tmp_path / "o")]
    with monkeypatch.context() as patched:
        # as it was: ImageNet's numbers, 32 pixels and 0.9, string order
        values = [
            "--img-size",
            "64",
            "--crop-pct",
            "0.9",
            "--mean",
            *map(str, IMAGENET["mean"]),
            "--std",
            *map(str, IMAGENET["std"]),
        ]
        patched.setitem(RESNET_RSB.defaults, "class_order", "string")
        patched.setattr("common.train.print_summary", lambda *args: None)
        run(RESNET_RSB, [*flags, *values, "--epochs", "1"])
    path = tmp_path / "o" / "checkpoint.pth"
    content = files.load(path)
    content.pop(files.DIGEST, None)
    content["args"]["epochs"] = 2
    for name in ("mean", "std", "interpolation", "class_order"):
        del content["args"][name]
    files.write(path, content, lambda: None)
    return path, flags


KEPT = "images: 64 px, evaluation crop 0.9, bicubic; mean 0.485 0.456 0.406, std 0.229 0.224 0.225\n"


@pytest.mark.parametrize(
    "how", ["continue", "--resume", "--eval --resume", "--eval --finetune", "--eval", "--throughput --resume"]
)
def test_an_older_checkpoint_keeps_imagenets_numbers_its_size_and_the_order_of_strings(how, old):
    path, flags = old
    words = [
        word for part in how.split() for word in ([part, str(path)] if part in ("--resume", "--finetune") else [part])
    ]
    if "--finetune" in words:
        flags = [*flags[:-1], str(path.parent / "elsewhere")]
    built, output = prepared(RESNET_RSB, *flags, *[word for word in words if word != "continue"])
    assert KEPT in output
    (line,) = [line for line in output.splitlines() if "saved by an older version" in line]
    assert line == (
        f"{path}: saved by an older version, without preprocessing; what was in force is kept: ImageNet's mean and std, the "
        "size and crop of that run, class folders in the order of strings"
    )
    assert built.class_names == ["1", "10", "2"]
    batch = next(iter(built.val_loader))[0]
    torch.testing.assert_close(batch[:, 1], torch.full_like(batch[:, 1], (100 / 255 - 0.456) / 0.224))
    built.close()


def test_an_older_run_is_gone_on_with_to_its_end_and_stays_as_it_was(old, capsys):
    path, flags = old
    run(RESNET_RSB, flags)
    capsys.readouterr()
    content = files.load(path)
    assert content["epoch"] == 1
    assert (list(content["args"]["mean"]), content["args"]["class_order"]) == (IMAGENET["mean"], "string")
    run(RESNET_RSB, flags)
    output = capsys.readouterr().out
    assert "all 2 epochs are trained already" in output and KEPT in output and "older version" not in output


def test_other_numbers_for_an_older_run_are_other_settings(old, capsys):
    path, flags = old
    with pytest.raises(SystemExit) as leaving:
        run(RESNET_RSB, [*flags, "--mean", "0.5", "0.5", "0.5"])
    assert leaving.value.code == 2
    assert "holds a run with other settings (mean (0.485, 0.456, 0.406) → [0.5, 0.5, 0.5])" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(RESNET_RSB, [*flags, "--model-ema", "--model-ema-warmup"])
    assert "model_ema_warmup False → True" in capsys.readouterr().err
    built, output = prepared(RESNET_RSB, *flags, "--eval", "--resume", str(path), "--mean", "0.5", "0.5", "0.5")
    assert "mean 0.5 0.5 0.5, std 0.229 0.224 0.225\n" in output
    built.close()


def test_a_checkpoint_is_evaluated_with_the_numbers_that_it_was_trained_with(tmp_path):
    """Where no flag says otherwise; also those that came from flags then."""
    folder = folders(tmp_path / "images")
    flags = [
        "--data-path",
        str(folder),
        *SMALL,
        "--model",
        "test_vit",
        "--output-dir",
        str(tmp_path / "o"),
        "--no-repeated-aug",
    ]
    run(DEIT, [*flags, "--input-size", "64", "--mean", "0.1", "0.2", "0.3"])
    path = str(tmp_path / "o" / "checkpoint.pth")
    for words in (["--resume", path], ["--finetune", path]):
        output = prepared(DEIT, *flags[:-3], "--eval", *words)[1]
        assert "images: 64 px, evaluation crop 0.875, bicubic; mean 0.1 0.2 0.3" in output
        assert "older version" not in output


def test_the_resolving_function_names_every_setting_it_checks():
    assert set(data_config.IS_VALID) == set(PREPROCESSING)


def test_finetuning_feeds_the_images_that_the_checkpoints_weights_know(tmp_path):
    """From a run with a mean of its own, read once."""
    digits = ["--epochs", "1", "--amp", "off", "--num-workers", "0", "--device", "cpu"]
    assert run(DEIT, [*digits, "--mean", "0.1", "0.2", "0.3", "--output-dir", str(tmp_path / "first")]) in (None, 0)
    path = tmp_path / "first" / "checkpoint.pth"
    built, output = prepared(DEIT, *digits, "--finetune", str(path), "--output-dir", "")
    assert built.preprocessing.mean == [0.1, 0.2, 0.3]
    assert "mean 0.1 0.2 0.3, std" in output
