"""The benchmark, run as it is on tiny models: what its figures must be, whatever the machine's speed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.args import parse
from common.dist import Process
from scripts import plan, timing
from scripts.table import RECIPES
from tests.conftest import make_jpegs, run

BENCHMARK = "scripts/benchmark.py"


def measured(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The JSON of a real run of the script, and what it prints."""
    file = folder / "figures.json"
    done = run(*words, "--json", str(file), cwd=folder, entry=BENCHMARK)
    assert not done.returncode, done.stderr
    assert not done.stderr, "the profiler's chatter among others"
    return json.loads(file.read_text()), done.stdout


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Swin's digits model, whose mask token only the sub-model has, with all that `step` can measure."""
    folder = tmp_path_factory.mktemp("steps")
    words = ["step", "swin", "--augsub", "none,masking", "--batch-size", "4", "--rounds", "3", "--reference",
             "--communication", "--profile"]  # fmt: skip
    return measured(folder, *words)


def modes(steps) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in steps[0]["figures"]}


def test_every_mode_has_all_figures_and_fits_the_terminal(steps):
    entry, printed = steps
    assert list(modes(steps)) == ["plain", "AugMask", "reference plain", "reference AugMask"]
    assert entry["benchmark"] == "step" and entry["versions"]["torch"] == torch.__version__
    assert entry["machine"]["threads"] == 1 and entry["machine"]["cores"] >= 1
    assert entry["command"][0].endswith("benchmark.py") and entry["args"]["model"].startswith("swin_pico")
    for figure in entry["figures"]:
        for name in ("images_per_second", "ms_per_step", "cpu_ms_per_step", "matrix_flops_per_second"):
            spread = figure[name]
            assert 0 < spread["quartile_1"] <= spread["median"] <= spread["quartile_3"]
        assert set(figure["ms"]) == {"forward", "backward", "optimizer", "EMA", "host"}
        assert figure["share_of_matrix_rate"] > 0 and figure["name"].replace("reference", "ref.") in printed
        assert ("speed_over_reference" in figure) == (not figure["reference"])
    assert max(map(len, printed.splitlines()[1:])) <= 100


def test_figures_agree_with_each_other(steps):
    for figure in modes(steps).values():
        step, speed = figure["ms_per_step"], figure["images_per_second"]
        assert speed["median"] * step["median"] / 1000 == pytest.approx(figure["images_per_step"])
        parts = {name: part["median"] for name, part in figure["ms"].items()}
        assert all(parts[name] > 0 for name in ("forward", "backward", "optimizer"))
        assert sum(part["quartile_1"] for part in figure["ms"].values()) <= step["quartile_3"]
        arithmetic = 2 * 3 * sum(figure["multiply_adds"].values())
        assert figure["flops_per_second"] == pytest.approx(arithmetic * speed["median"])
        rate = figure["matrix_flops_per_second"]["median"]
        assert figure["share_of_matrix_rate"] == pytest.approx(figure["flops_per_second"] / rate)


def test_multiply_adds_are_the_plans(steps):
    for name, kind in (("plain", "none"), ("AugMask", "masking")):
        args = parse(RECIPES["swin"], ["--augsub", kind])
        args.nb_classes = 10
        expected = plan.measure("swin", args)
        assert modes(steps)[name]["multiply_adds"] == {"main": expected.main / 2, "sub": expected.sub / 2}
    assert modes(steps)["AugMask"]["to_first"]["multiply_adds"] == pytest.approx(2, rel=1e-3)


def test_a_step_sends_each_gradient_once_and_the_references_sends_it_twice(steps):
    found = modes(steps)
    for name in ("plain", "AugMask"):
        sent = found[name]["communication"]
        assert sent == {"bytes": 4 * found[name]["parameters"], "all_reduces": 1}
        assert sent["bytes"] == found[name]["gradient_bytes"]
    assert found["AugMask"]["parameters"] == found["plain"]["parameters"] + 48, "a mask token"
    sent = found["reference AugMask"]["communication"]
    assert sent == {"bytes": 2 * 4 * found["AugMask"]["parameters"], "all_reduces": 2}
    assert found["reference plain"]["communication"] == found["plain"]["communication"]


def test_ours_never_waits_for_the_device_and_the_reference_reads_every_loss(steps):
    for name, reads in (("plain", 0), ("AugMask", 0), ("reference plain", 1), ("reference AugMask", 2)):
        waits = modes(steps)[name]["waits"]
        assert waits["waits"] == reads * waits["updates"], name


def test_memory_is_that_of_the_tensors(steps):
    """At least weights, gradients and two moments. AugMask has no more than plain but for the first pass's gradients,
    which are there while the second pass runs; its first graph is gone by then."""
    found = modes(steps)
    for figure in found.values():
        assert figure["peak_bytes"] > 4 * figure["gradient_bytes"]
    assert found["AugMask"]["peak_bytes"] <= 1.01 * found["plain"]["peak_bytes"] + found["AugMask"]["gradient_bytes"]


def test_memory_counts_what_a_step_allocates():
    """A criterion that takes 64 MB more raises the peak by as much; and one backward holds both graphs."""
    flags = ["--augsub", "masking", "--batch-size", "16", "--output-dir", ""]

    def subject(*more: str) -> timing.Subject:
        args = parse(RECIPES["mae"], [*flags, *more])
        mode = timing.Mode("AugMask", "masking", False, argparse.Namespace(**vars(args)))
        return timing.prepare_subject(RECIPES["mae"], mode, Process(torch.device("cpu")), warmup=1)

    made = subject()
    criterion = made.trainer.criterion
    made.trainer.criterion = lambda z, y: criterion(z, y) + 0 * torch.zeros(16_000_000).sum()
    assert timing.peak_memory(made, 0) - made.peak == pytest.approx(64e6, rel=0.1)
    assert subject("--augsub-joint").peak > 1.15 * made.peak


def test_any_timm_model_and_both_passes_at_once(tmp_path):
    words = ["step", "--model", "test_vit", "--input-size", "160", "--augsub", "none,dropout,masking-joint"]
    more = ["--batch-size", "2", "--rounds", "1", "--accum-iter", "2", "--opt", "adamw", "--profile"]
    entry, _ = measured(tmp_path, *words, *more)
    for figure in entry["figures"]:
        assert figure["waits"]["waits"] == 0
        assert figure["images_per_step"] == 4 and figure["communication"] is None
        assert figure["gradient_bytes"] == 4 * figure["parameters"]
    assert [f["name"] for f in entry["figures"]] == ["plain", "AugDrop", "AugMask joint"]
    work = [f["to_first"]["multiply_adds"] for f in entry["figures"]]
    assert work[:2] == [1, 2] and 1.4 < work[2] < 1.6


def test_data(tmp_path):
    data = make_jpegs(tmp_path / "images", train=4)
    entry, printed = measured(tmp_path, "data", "--data-path", str(data), "--images", "4", "--rounds", "2")
    rows = {figure["name"]: figure for figure in entry["figures"]}
    assert list(rows) == ["deit", "mae", "swin", "resnet_rsb"]
    assert rows["deit"]["augmentation"] == "ThreeAugment" and "rand-m7" in rows["resnet_rsb"]["augmentation"]
    for row in rows.values():
        for pipeline, speed in row["images_per_second"].items():
            assert speed["median"] > 0 and row["ms_per_image"][pipeline]["median"] > 0
        assert row["to_first"]["PIL"]["median"] == 1
    assert "ThreeAugment" in printed


def test_end_to_end_with_loader_processes(tmp_path):
    words = ["end-to-end", "--images", "128", "--batch-size", "64", "--rounds", "1", "--num-workers", "1", "--augsub", "masking",
             "--reference"]  # fmt: skip
    entry, _ = measured(tmp_path, *words)
    assert [f["name"] for f in entry["figures"]] == ["AugMask", "reference AugMask"]
    for figure in entry["figures"]:
        assert figure["loader_processes"] == 1 and figure["images_per_second"]["median"] > 0
        assert 0 <= figure["waiting"]["median"] <= 1


def test_a_checkpoint_is_written_beside_training(tmp_path):
    entry, printed = measured(tmp_path, "save", "--batch-size", "8", "--augsub", "masking", "--rounds", "2")
    (figure,) = entry["figures"]
    assert figure["bytes"] > 4 * 4 * figure["parameters"] > 0, "weights, their average, and two moments"
    assert all(figure[name]["median"] > 0 for name in ("step", "stall", "write", "step_beside"))
    assert figure["stall"]["median"] < figure["write"]["median"] and "s a step waits" in printed


@pytest.mark.parametrize(("words", "sentence"), [
    (["step", "--model", "vit_smal_patch16_224"], "unknown model 'vit_smal_patch16_224': did you mean vit_small"),
    (["step", "resnet_rsb", "--augsub", "none,dropout"], "ResNet has no place for dropout: it offers masking, droppath"),
    (["step", "--augsub", "none,maskng"], "--augsub maskng: choose from none,masking,dropout,droppath"),
    (["step", "--referense"], "unknown flag --referense: did you mean --reference?"),
    (["step", "--rounds", "0"], "argument --rounds: '0': a whole number of at least 1 is needed"),
    (["steps"], "argument command: invalid choice: 'steps'"),
    (["data", "--data-path", "nowhere"], "--data-path nowhere: there is no such folder"),
    (["end-to-end", "--batch-size", "200"], "--images 256 are fewer than two batches"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_ends_with_one_sentence(words, sentence, monkeypatch, capsys):
    from scripts import benchmark

    monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as leaving:
        benchmark.main()
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error.count("\n") == 1
    assert error.startswith("benchmark.py: error: ") and sentence in error
