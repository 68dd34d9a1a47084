"""best/ and last/ of runs, names of classes in checkpoints, and the average of the weights."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch

from common import train
from common.args import parse
from common.checkpoint import io as files
from common.checkpoint.manager import CheckpointManager
from common.checkpoint.state import trainer_state
from common.cli import run
from common.optim import explain_initial_weights
from common.run_dir import BEST_MODEL, LAST_MODEL
from deit.recipe import RECIPE
from mae.recipe import RECIPE as MAE
from tests.compare_runs import diff_nested
from tests.runs import (
    FLAGS,
    build,
    load_checkpoint,
    log_entries,
    run_refused,
    start,
    stop_after,
    train_for,
)
from tests.sample_data import make_jpegs

MAE_FLAGS = [
    *("--model", "vit_pico_patch8", "--input-size", "32", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0"),
    *("--amp", "off", "--num-workers", "0"),
]
NAMES = ["cat", "dog", "owl"]  # of the finished run


def weights_of(folder) -> dict:
    return dict(timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict())


def test_a_run_leaves_its_best_and_last_model(finished):
    """Each the more accurate of the model and the average of its weights; the card says which."""
    _, out, _ = finished
    entries = log_entries(out)
    scores = [max(entry["test_acc1"], entry["test_ema_acc1"]) for entry in entries]
    for name, epoch in ((BEST_MODEL, scores.index(max(scores))), (LAST_MODEL, 1)):
        entry = entries[epoch]
        part = "model_ema" if entry["test_ema_acc1"] > entry["test_acc1"] else "model"
        card = (out / name / "README.md").read_text()
        assert ("the average of the model's (--model-ema)" in card) == (part == "model_ema")
        assert f"after epoch {epoch + 1} of 2" in card and f"{entry['test_ema_acc1']:.2f} % top-1" in card
        assert "--augsub masking --augsub-ratio 0.5" in card and "3 classes" in card
        if epoch == 1:
            assert not diff_nested(weights_of(out / name), load_checkpoint(out)[part])
    config = json.loads((out / BEST_MODEL / "config.json").read_text())
    assert config["architecture"] == "deit3_small_patch16_224" and config["label_names"] == NAMES
    content = load_checkpoint(out)
    assert content["class_names"] == NAMES and content["preprocessing"]["input_size"] == 32
    assert content["preprocessing"]["crop_ratio"] == config["pretrained_cfg"]["crop_pct"]


def test_best_is_the_average_where_that_is_the_better(tmp_path, jpegs, monkeypatch):
    """Also after an epoch that is not the raw model's best, so that best_checkpoint.pth is of another."""
    results = iter(
        [{"acc1": 60.0, "ema_acc1": 10.0}, {"acc1": 50.0, "ema_acc1": 70.0}, {"acc1": 55.0, "ema_acc1": 65.0}]
    )
    rest = {"acc5": 100.0, "loss": 1.0, "ema_acc5": 100.0, "ema_loss": 1.0, "images": 6}
    monkeypatch.setattr(train, "evaluate_models", lambda run: rest | next(results))
    out = tmp_path / "out"
    start(
        "--data-path", str(jpegs()), "--output-dir", str(out), "--epochs", "3", "--save-freq", "3", "--keep-last", "9"
    )
    assert load_checkpoint(out, "best_checkpoint.pth")["epoch"] == 0
    second = load_checkpoint(out, "previous_checkpoint_1.pth")
    assert second["epoch"] == 1 and not diff_nested(weights_of(out / BEST_MODEL), second["model_ema"])
    assert not diff_nested(weights_of(out / LAST_MODEL), load_checkpoint(out)["model_ema"])


def test_a_stop_leaves_the_last_model(finished, tmp_path, monkeypatch, capsys):
    """In the middle of an epoch; and what is continued ends with the same models."""
    flags, out, _ = finished
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        start(*flags, "--output-dir", str(stopped))
    assert "after step 2 of 6 in epoch 2 of 2" in (stopped / LAST_MODEL / "README.md").read_text()
    entry = log_entries(stopped)[-1]
    part = "model_ema" if entry["test_ema_acc1"] > entry["test_acc1"] else "model"
    assert not diff_nested(weights_of(stopped / LAST_MODEL), load_checkpoint(stopped)[part])
    start(*flags, "--output-dir", str(stopped))
    for name in (BEST_MODEL, LAST_MODEL):
        for file in ("model.safetensors", "config.json"):
            assert (stopped / name / file).read_bytes() == (out / name / file).read_bytes()


def test_a_stop_at_the_end_of_an_epoch_saves_once(finished, tmp_path, monkeypatch, capsys):
    stopped = tmp_path / "stopped"
    saves = []
    save = CheckpointManager.save
    monkeypatch.setattr(CheckpointManager, "save", lambda self, *args: (saves.append(None), save(self, *args)))
    stop_after(monkeypatch, 6)
    start(*finished[0], "--output-dir", str(stopped), "--save-freq", "2")
    assert "stopped before epoch 2, checkpoint saved" in capsys.readouterr().out and len(saves) == 1
    assert load_checkpoint(stopped)["position"] is None and weights_of(stopped / LAST_MODEL)


def test_what_a_kill_left_out_is_made_up_for(continued, capsys):
    """Killed after the last checkpoint: the models are written when the command is run again, and then left alone."""
    flags, out = continued
    before = {name: (out / name / "model.safetensors").read_bytes() for name in (BEST_MODEL, LAST_MODEL)}
    (out / LAST_MODEL / "README.md").unlink()
    (out / LAST_MODEL / "model.safetensors").write_bytes((out / BEST_MODEL / "config.json").read_bytes())
    start(*flags)
    assert "all 2 epochs are trained already" in capsys.readouterr().out
    assert {name: (out / name / "model.safetensors").read_bytes() for name in before} == before
    (out / LAST_MODEL / "README.md").write_text("edited")
    start(*flags)
    assert (out / LAST_MODEL / "README.md").read_text() == "edited"


def test_another_run_in_the_folder_moves_the_models_away(continued, capsys):
    flags, out = continued
    before = (out / BEST_MODEL / "model.safetensors").read_bytes()
    for path in out.glob("*checkpoint*.pth"):
        path.unlink()
    start(*flags, "--epochs", "1", "--seed", "5")
    assert (out / "earlier_best" / "model.safetensors").read_bytes() == before
    assert (out / BEST_MODEL / "model.safetensors").read_bytes() != before


def test_a_model_that_timm_does_not_know_trains_without_a_folder_for_timm(tmp_path, jpegs, capsys):
    from tests import small_models  # noqa: F401 - registers small_vit

    out = tmp_path / "out"
    start("--data-path", str(jpegs()), "--output-dir", str(out), "--epochs", "1", "--model", "small_vit")
    said = capsys.readouterr().out
    assert "--model small_vit: no best/ and last/ for timm to load (the model is not one of timm's own)" in said
    assert not (out / BEST_MODEL).exists() and (out / "checkpoint.pth").exists()


# names of classes


@pytest.fixture
def other_names(finished, tmp_path):
    """Flags to train on the finished run's images under other names of classes."""

    def make(*names: str) -> list[str]:
        data = make_jpegs(tmp_path / "-".join(names), train=12, val=4, classes=names)
        return ["--data-path", str(data), *finished[0][2:]]

    return make


def with_names(finished, tmp_path, names: list[str] | None):
    """The finished run's checkpoint, with these names of classes."""
    content = load_checkpoint(finished[1])
    content["class_names"] = names
    files.write(tmp_path / "other.pth", content, lambda: None)
    return str(tmp_path / "other.pth")


def test_labels_are_never_shifted_by_eval_and_resume(finished, tmp_path, capsys):
    flags = finished[0]
    named = with_names(finished, tmp_path, ["cat", "owl", "dog"])
    advice = f"use the data that it was trained on, or train a new classifier with --finetune {named}"
    error = run_refused(capsys, *flags, "--eval", "--resume", named)
    assert f"{named}: its classes are the data's in another order: label 1 is 'owl', here 'dog'; {advice}" in error
    assert "in another order" in run_refused(capsys, *flags, "--eval", "--finetune", named)
    assert "in another order" in run_refused(capsys, *flags, "--resume", named, "--output-dir", str(tmp_path / "x"))
    named = with_names(finished, tmp_path, ["cat", "dog", "wolf"])
    error = run_refused(capsys, *flags, "--eval", "--resume", named)
    assert "not the data's: 'wolf' is not in the data, 'owl' is new; use the data" in error
    named = with_names(finished, tmp_path, None)
    start(*flags, "--eval", "--resume", named)  # a data set that did not say


def test_other_data_in_a_runs_own_folder_is_told_by_its_classes(continued, other_names, capsys):
    flags, out = continued
    before = (out / "checkpoint.pth").read_bytes()
    error = run_refused(capsys, *other_names("ant", "bee"), *flags[-2:])
    assert "it has 3 and the data 2, 'cat' is not in the data, 'ant' is new" in error
    assert (out / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("names", [("ant", "bee"), ("ant", "bee", "fly")])
def test_finetuning_to_other_classes_has_a_new_classifier(finished, other_names, capsys, names):
    flags, out, _ = finished
    flags = [*FLAGS, *other_names(*names), "--finetune", str(out / "checkpoint.pth")]
    trainer = build(*flags).trainer
    content = load_checkpoint(out)["model"]
    assert torch.equal(trainer.raw_model.state_dict()["cls_token"], content["cls_token"])
    assert not torch.equal(trainer.raw_model.state_dict()["head.weight"][:2], content["head.weight"][:2])
    said = capsys.readouterr().out
    counts = "it has 3 and the data 2, " if len(names) == 2 else ""
    assert f"checkpoint.pth: its classes are not the data's: {counts}'cat' is not in the data, 'ant' is new" in said
    assert "; the classifier is new" in said


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_the_names_in_a_config_json_are_compared_too(finished, other_names, tmp_path, capsys, flag):
    """The weights beside it hold none."""
    flags, out, _ = finished
    start(*flags, "--eval", flag, f"local-dir:{out / BEST_MODEL}")
    folder = tmp_path / "model"
    shutil.copytree(out / BEST_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": ["cat", "owl", "dog"]}))
    error = run_refused(capsys, *flags, "--eval", flag, f"local-dir:{folder}")
    assert "its classes are the data's in another order: label 1 is 'owl', here 'dog'; use the data" in error


def test_fewer_names_than_classes_in_a_config_json_are_compared_too(jpegs, tmp_path, capsys):
    """timm's form of them is a dict."""
    flags = ["--data-path", str(jpegs()), "--nb-classes", "12", "--epochs", "1"]
    start(*FLAGS, *flags, "--output-dir", str(tmp_path / "out"))
    folder = tmp_path / "out" / BEST_MODEL
    config = json.loads((folder / "config.json").read_text())
    names = config["label_names"]
    assert set(names) == {str(label) for label in range(len(names))} and len(names) < 12
    capsys.readouterr()
    start(*FLAGS, *flags, "--eval", "--resume", f"local-dir:{folder}")
    names["0"], names["1"] = names["1"], names["0"]
    folder = shutil.copytree(folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    error = run_refused(capsys, *FLAGS, *flags, "--eval", "--resume", f"local-dir:{folder}")
    assert f"its classes are the data's in another order: label 0 is '{names['0']}', here '{names['1']}'" in error
    assert f"train a new classifier with --finetune local-dir:{folder}\n" in error


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_evaluation_prepares_images_as_the_folder_says_whatever_the_model_is_called(finished, tmp_path, capsys, flag):
    flags, out, _ = finished
    folder = tmp_path / "model"
    shutil.copytree(out / BEST_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_checkpoint(out)["args"]["model"]
    start(*flags, "--model", model, "--eval", flag, f"local-dir:{folder}")
    assert "evaluation crop 0.5, bicubic; mean 0.1 0.2 0.3, std 0.4 0.5 0.6\n" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_evaluation_refuses_weights_that_lack_some_of_the_models(jpegs, tmp_path, capsys, flag):
    """A class token's model has no norm behind the pooling; training would start that one anew."""
    flags = ["--data-path", str(jpegs()), *MAE_FLAGS]
    run(MAE, [*flags, "--cls_token", "--output_dir", str(tmp_path / "out")])
    path = str(tmp_path / "out" / "checkpoint.pth")
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        run(MAE, [*flags, "--eval", flag, path, "--output_dir", ""])
    assert leaving.value.code == 2
    assert (
        f"{path}: lacks fc_norm.weight, fc_norm.bias of the model; pass the flags of its training"
        in capsys.readouterr().err
    )
    run(MAE, [*flags, "--eval", flag, path, "--cls_token", "--output_dir", ""])


def test_finetuning_to_the_same_classes_in_another_order_has_a_new_classifier(finished, tmp_path, capsys):
    flags, out, _ = finished
    named = with_names(finished, tmp_path, ["owl", "dog", "cat"])
    model = build(*FLAGS, *flags, "--finetune", named).trainer.raw_model
    assert not torch.equal(model.state_dict()["head.weight"], load_checkpoint(out)["model"]["head.weight"])
    assert "label 0 is 'owl', here 'cat'; the classifier is new" in capsys.readouterr().out
    model = build(*FLAGS, *flags, "--finetune", str(out / "checkpoint.pth")).trainer.raw_model
    assert torch.equal(model.state_dict()["head.weight"], load_checkpoint(out)["model"]["head.weight"])
    assert "classifier is new" not in capsys.readouterr().out


@pytest.mark.parametrize("names", ["cat", [1, 2, 3], {"cat": 0}])
def test_names_that_are_none_are_corrupt(finished, tmp_path, capsys, names):
    error = run_refused(capsys, *finished[0], "--eval", "--resume", with_names(finished, tmp_path, names))
    assert "corrupt, or not a checkpoint of this trainer (its class names are no list of names)" in error


# the average of the weights


def test_a_warm_up_lets_the_average_forget_the_initial_weights(jpegs, tmp_path, monkeypatch):
    """With timm's decay after each update of the whole run, also after a resume."""
    flags = ["--data-path", str(jpegs()), "--model-ema-decay", "0.9999", "--model-ema-warmup"]
    run = build(*FLAGS, *flags)
    decays = []
    update = run.trainer.ema.apply_update_
    monkeypatch.setattr(
        run.trainer.ema, "apply_update_", lambda model, decay: (decays.append(decay), update(model, decay))
    )
    train_for(run)
    assert decays == [run.trainer.ema.get_decay(step) for step in (1, 2, 3, 4)]
    assert decays[:3] == [0.0, pytest.approx(1 - 2 ** (-2 / 3)), pytest.approx(1 - 3 ** (-2 / 3))]
    out, stopped = tmp_path / "out", tmp_path / "stopped"
    start(*flags, "--output-dir", str(out))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        start(*flags, "--output-dir", str(stopped))
    start(*flags, "--output-dir", str(stopped))
    ema = [load_checkpoint(folder)["model_ema"] for folder in (out, stopped)]
    assert not diff_nested(*ema)
    weights, first = load_checkpoint(out)["model"]["head.weight"], build(*FLAGS, *flags).trainer.raw_model
    distance = (ema[0]["head.weight"] - weights).norm(), (ema[0]["head.weight"] - first.head.weight).norm()
    assert distance[0] < distance[1]


def test_an_average_that_keeps_the_initial_weights_is_warned_of(jpegs, capsys):
    data = ["--data-path", str(jpegs())]
    build(*FLAGS, *data, "--model-ema-decay", "0.9")
    line = next(line for line in capsys.readouterr().out.splitlines() if "--model-ema-decay" in line)
    assert line == (
        "--model-ema-decay 0.9: 43.0 % of the initial weights would be left in the average after 8 steps; use "
        "--model-ema-warmup, or --model-ema-decay 0.6"
    )
    for flags in (["--model-ema-decay", "0.6"], ["--model-ema-decay", "0.9", "--model-ema-warmup"], ["--no-model-ema"]):
        build(*FLAGS, *data, *flags)
        assert "initial weights" not in capsys.readouterr().out


def test_a_published_finetuning_is_not_warned_of(capsys):
    """It leaves 13.5 % after 20 epochs on ImageNet."""
    args = parse(RECIPE, ["--variant", "base_finetune", "--data-path", "x"])
    updates = args.epochs * (1_281_167 // (8 * args.batch_size))
    assert args.model_ema_decay**updates == pytest.approx(0.135, abs=5e-4)
    limit = RECIPE.initial_weights_limit(args)
    assert explain_initial_weights(args.model_ema_decay, updates, limit) == []
    assert "36.8 %" in explain_initial_weights(args.model_ema_decay, updates // 2, limit)[0], "on twice the GPUs"
    assert RECIPE.initial_weights_limit(args.replace(variant=None)) == 0.05


def test_exports_run_beside_training(finished, tmp_path):
    """From a copy: what training changes afterwards is not in the file."""
    run = build(*FLAGS, *finished[0], "--output-dir", str(tmp_path / "out"))
    before = {name: weight.clone() for name, weight in run.trainer.raw_model.state_dict().items()}
    run.checkpoints.export(trainer_state(run.trainer), train.list_exports(run, 0, ends=True))
    with torch.no_grad():
        for weight in run.trainer.raw_model.parameters():
            weight.add_(1)
    run.checkpoints.wait()
    assert not diff_nested(weights_of(tmp_path / "out" / LAST_MODEL), before)
    run.close()
