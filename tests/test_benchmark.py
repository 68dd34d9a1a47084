"""The benchmark, run as it is on tiny models: what its figures must be, whatever the machine's speed."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.args import parse
from common.data import open_data_set
from common.dist import Process
from common.errors import StopTraining
from scripts import benchmark, growth, measure, pipelines, plan, team, timing
from scripts.draw import draw
from scripts.figures import short
from scripts.measure import modes_of
from scripts.options import COMMANDS, Mode, modes_asked
from scripts.table import RECIPES
from tests.conftest import ROOT, environment, make_jpegs, run

BENCHMARK = "scripts/benchmark.py"


def measured(folder: Path, *words: str, **env: Any) -> tuple[dict[str, Any], str]:
    """The JSON of a real run of the script, and what it prints."""
    file = folder / "figures.json"
    done = run(*words, "--json", str(file), cwd=folder, entry=BENCHMARK, **env)
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
    assert max(map(len, printed.splitlines()[1:])) <= 80


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
        mode = Mode("AugMask", "masking", False, argparse.Namespace(**vars(args)))
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
    entry, printed = measured(
        tmp_path, "data", "--data-path", str(data), "--images", "4", "--rounds", "2", OMP_NUM_THREADS="2"
    )
    rows = {figure["name"]: figure for figure in entry["figures"]}
    assert list(rows) == ["deit", "mae", "swin", "resnet_rsb"]
    assert rows["deit"]["augmentation"] == "ThreeAugment" and "rand-m7" in rows["resnet_rsb"]["augmentation"]
    for row in rows.values():
        for pipeline, speed in row["images_per_second"].items():
            assert speed["median"] > 0 and row["ms_per_image"][pipeline]["median"] > 0
        assert row["to_first"]["PIL"]["median"] == 1
    assert "ThreeAugment" in printed
    assert entry["machine"]["threads"] == 1 and ", 1 thread;" in printed


def test_data_makes_shards_of_its_photographs(tmp_path):
    pytest.importorskip("webdataset")
    entry, _ = measured(tmp_path, "data", "swin", "--data-set", "wds/photographs", "--images", "2", "--rounds", "1")
    assert [row["name"] for row in entry["figures"]] == ["swin"], "the one that is named"
    assert all(row["images_per_second"]["fast"]["median"] > 0 for row in entry["figures"])
    assert entry["args"]["data_set"] == "wds/photographs"
    made = pipelines.make_photographs(tmp_path / "photographs", 6)
    pipelines.pack(made)
    folder, shards = (
        open_data_set(parse(RECIPES["deit"], ["--data-path", str(made), *more]), train=True)
        for more in ([], ["--data-set", "wds/photographs"])
    )
    assert sorted(map(folder.bytes_of, range(6))) == sorted(map(shards.bytes_of, range(6)))


def test_end_to_end_packs_a_shard_where_shards_are_asked_for(tmp_path):
    pytest.importorskip("webdataset")
    words = ["end-to-end", "deit", "--model", "deit_pico_patch8_LS", "--data-set", "wds/photographs", "--input-size",
             "32", "--batch-size", "4", "--images", "16", "--rounds", "1", "--num-workers", "1"]  # fmt: skip
    entry, _ = measured(tmp_path, *words)
    assert all(figure["images_per_second"]["median"] > 0 for figure in entry["figures"])


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


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """All four sweeps of DeiT's digits model → the JSON, what was printed, the figure's file."""
    folder = tmp_path_factory.mktemp("grown")
    words = ["growth", "deit", "--batch-size", "2", "--batch-sizes", "2,1", "--image-sizes", "16,32", "--models",
             "deit_pico_patch8_LS,test_vit", "--rounds", "2", "--warmup", "1", "--plot", "figure.png"]  # fmt: skip
    return *measured(folder, *words), folder / "figure.png"


def points(grown) -> dict[str, list[dict[str, Any]]]:
    return {sweep["name"]: sweep["points"] for sweep in grown[0]["figures"]}


def test_growth_has_every_point_of_every_sweep_and_fits_the_terminal(grown):
    entry, printed, _ = grown
    assert entry["benchmark"] == "growth" and entry["rounds"] == 2 and entry["machine"]["threads"] == 1
    assert {name: [point["at"] for point in own] for name, own in points(grown).items()} == {
        "batch size": [1, 2],
        "image size": [16, 32],
        "model size": ["deit_pico_patch8_LS", "test_vit"],
        "processes": [1, 2],
    }
    for name, own in points(grown).items():
        assert name in printed
        for point in own:
            assert [figure["name"] for figure in point["figures"]] == ["plain", "AugMask"]
            for figure in point["figures"]:
                assert figure["dtype"] == "float32"
                for spread in (figure["ms_per_image"], figure["cpu_ms_per_image"], figure["to_first_of_all"]):
                    assert 0 < spread["quartile_1"] <= spread["median"] <= spread["quartile_3"]
                parts = sum(part["median"] for part in figure["ms"].values())  # of two turns, so the mean
                assert parts == pytest.approx(figure["ms_per_image"]["median"])
    assert max(map(len, printed.splitlines()[1:])) <= 80


def test_growth_sets_what_the_points_are_named_for(grown):
    for name, setting in (("batch size", "batch_size"), ("image size", "input_size"), ("model size", "model"),
                          ("processes", "processes")):  # fmt: skip
        for point in points(grown)[name]:
            rest = {"batch_size": 2, "input_size": 32, "model": "deit_pico_patch8_LS", "processes": 1}
            assert {key: point[key] for key in rest} == rest | {setting: point["at"]}


def pico_multiply_adds(side: int, tokens: int) -> int:
    """A forward pass of DeiT's digits model with so many tokens in its blocks, by hand: 4 blocks of 64 channels with
    query, key, value, two products of attention, projection and an MLP of 256; patches of 8 pixels, 10 classes."""
    block = tokens * 64 * (3 * 64) + 2 * tokens**2 * 64 + tokens * 64 * 64 + 2 * tokens * 64 * 256
    return (side // 8) ** 2 * (3 * 8 * 8) * 64 + 4 * block + 64 * 10


def test_arithmetic_of_growth_is_that_counted_by_hand(grown):
    whole: dict[str, dict[int, float]] = {"plain": {}, "AugMask": {}}
    for point in points(grown)["image size"]:
        side, patches = point["at"], (point["at"] // 8) ** 2
        main, sub = pico_multiply_adds(side, patches + 1), pico_multiply_adds(side, patches // 2 + 1)
        plain, masked = point["figures"]
        assert plain["multiply_adds"] == {"main": main, "sub": 0}
        assert masked["multiply_adds"] == {"main": main, "sub": sub}
        whole["plain"][side], whole["AugMask"][side] = main, main + sub
    small, large = (point["figures"] for point in points(grown)["image size"])
    for before, after in zip(small, large):
        assert after["arithmetic_ms"] == pytest.approx(after["ms_per_image"]["median"])
        ratio = whole[after["name"]][32] / whole[after["name"]][16]
        assert after["arithmetic_ms"] / before["arithmetic_ms"] == pytest.approx(ratio)
    for one, two in zip(*(point["figures"] for point in points(grown)["batch size"])):
        assert one["arithmetic_ms"] == two["arithmetic_ms"] == pytest.approx(two["ms_per_image"]["median"])


def test_two_processes_are_real_and_share_their_gradients(grown):
    """They have different images, so their weights would differ without; and the first has those of the process that
    is alone, so that its weights would be that one's."""
    one, two = points(grown)["processes"]
    assert one["world_size"] == [1] and two["world_size"] == [2, 2]
    assert len({*one["pids"], *two["pids"]}) == 3
    for alone, first, second in zip(*one["weights"], *two["weights"]):
        assert first == second and first != pytest.approx(alone, rel=1e-9)
    for before, after in zip(one["figures"], two["figures"]):
        assert after["arithmetic_ms"] == pytest.approx(before["ms_per_image"]["median"] / 2)


def test_growth_is_drawn(grown):
    with Image.open(grown[2]) as image:
        assert image.format == "PNG" and image.size == (1800, 1400)
        colours = {colour[:3] for _, colour in image.getcolors(1 << 24)}
    assert {(0, 114, 178), (213, 94, 0), (255, 255, 255)} <= colours
    assert {path.name for path in grown[2].parent.iterdir()} == {"figures.json", "figure.png"}


def test_growth_is_drawn_as_its_name_ends_or_not_at_all(grown, tmp_path):
    draw(tmp_path / "figure.svg", grown[0]["figures"], "deit")
    text = (tmp_path / "figure.svg").read_text()
    for word in ("AugMask", "pixels a side", "test_vit", "ms per image"):
        assert f"<!-- {word} -->" in text
    with pytest.raises(ValueError, match=r"--plot .*nowhere/figure.svg: not writable"):
        draw(tmp_path / "nowhere" / "figure.svg", grown[0]["figures"], "deit")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.svg"]


def test_names_are_shown_by_what_tells_them_apart():
    assert short(["deit_tiny_patch16_LS", "deit_small_patch16_LS"]) == ["tiny", "small"]
    assert short(["resnet18", "resnet50"]) == ["resnet18", "resnet50"] and short(["a_b"]) == ["a_b"]
    assert short(["a_b", "a_b_c"]) == ["b", "b_c"]


def test_every_point_has_a_turn_in_each_round():
    played: list[tuple[int, int]] = []
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]

    def play(cell):
        played.append(cell)
        return {}, float(len(played))

    turns = growth.take_turns("batch size", cells, 3, play)
    assert played == [*cells, *cells[1:], cells[0], *cells[2:], *cells[:2]]
    assert turns[1, 0] == [({}, 3.0), ({}, 6.0), ({}, 9.0)]


@pytest.mark.parametrize("share", [growth.SHARE, 0.0])
def test_models_that_do_not_fit_into_memory_together_are_built_anew(share, monkeypatch):
    monkeypatch.setattr(growth, "SHARE", share)
    flags = ["--augsub", "none", "--batch-sizes", "1,2", "--warmup", "1", "--processes", "1"]
    _, sweeps = growth.sweeps_of(RECIPES["deit"], flags, modes_of)
    player = growth.Player(RECIPES["deit"], sweeps[0], Process(torch.device("cpu")))
    built: list[Any] = []
    warm = timing.warm_subject

    def noted(*words: Any) -> timing.Subject:
        subject = warm(*words)
        built.append(weakref.ref(subject.trainer.bare))
        return subject

    monkeypatch.setattr(timing, "warm_subject", noted)
    for cell in [(0, 0), (1, 0)] * 2:
        parts, cpu = player(cell)
        assert sum(parts.values()) > 0 and cpu > 0
    assert [model() is not None for model in built] == ([True] * 2 if share else [False] * 4)
    player.release()
    assert not any(model() is not None for model in built)


def test_a_process_that_dies_ends_the_measurement():
    flags = ["--augsub", "none", "--batch-sizes", "1", "--warmup", "1", "--processes", "2"]
    _, sweeps = growth.sweeps_of(RECIPES["deit"], flags, modes_of)
    gang = team.Team("deit", sweeps[-1].points[0].modes, 2, "cpu")
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    try:
        for member in gang.members:
            os.kill(member.pid, signal.SIGINT)  # as Ctrl-C does: whoever asked ends them
        assert gang.turn(0)[1] > 0
        gang.members[1].kill()
        gang.members[1].join()
        with pytest.raises(StopTraining, match="one of 2 processes"):
            gang.turn(0)
        assert not any(member.is_alive() for member in gang.members)
    finally:
        gang.end()


@pytest.mark.parametrize(("words", "sentence"), [
    (["--models", "vit_smal_patch16_224"], "model size vit_smal_patch16_224: unknown model 'vit_smal_patch16_224': did you"),
    (["--image-sizes", "32,4"], "image size 4: --input-size 4 is none that --model deit_pico_patch8_LS takes"),
    (["--image-sizes", "8"], "image size 8: --input-size 8 is one patch of deit_pico_patch8_LS, so masking would hide no"),
    (["--processes", "0"], "argument --processes: '0': a whole number of at least 1 is needed"),
    (["--batch-sizes", "1,two"], "argument --batch-sizes: 'two': a whole number of at least 1 is needed"),
    (["--batch-sizes", "1,2", "--mixup", "0.8"], "--batch-size 1: mixup pairs images, so it must be even"),
    (["--models", "deit_pico_patch8_LS,"], "argument --models: 'deit_pico_patch8_LS,': names with commas"),
    (["--plot", "figure"], "--plot figure: a name that ends in .pdf, .png, .svg is needed"),
    (["--plot", "nowhere/figure.png"], "--plot nowhere/figure.png: not writable (No such file or directory)"),
    (["--json", "/proc/figures.json"], "--json /proc/figures.json: not writable"),
    (["--plot", "folder.png"], "--plot folder.png: not writable (it is a folder)"),
    (["--plot", "nomatplotlib.png"], "--plot needs matplotlib: pip install"),
    (["resnet_rsb", "--batch-sizes", "1"], "batch size 1: Expected more than 1 value per channel when training"),
    (["swin", "--models", "vit_tiny_patch16_224"], "--model vit_tiny_patch16_224: --cfg or --variant says which Swin"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_growth_refuses_bad_input_before_it_measures(words, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("sys.argv", ["benchmark.py", "growth", *words])
    monkeypatch.setattr(growth, "measured", lambda *_: pytest.fail("it measures"))
    if "nomatplotlib.png" in words:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as leaving:
        benchmark.main()
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error.count("\n") == 1
    assert error.startswith("benchmark.py: error: ") and sentence in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(("words", "sentence"), [
    (["step", "--model", "vit_smal_patch16_224"], "unknown model 'vit_smal_patch16_224': did you mean vit_small"),
    (["step", "resnet_rsb", "--augsub", "none,dropout"], "ResNet has no place for dropout: it offers masking, droppath"),
    (["step", "--augsub", "none,maskng"], "--augsub maskng: choose from none,masking,dropout,droppath"),
    (["step", "--referense"], "unknown flag --referense: did you mean --reference?"),
    (["step", "--rounds", "0"], "argument --rounds: '0': a whole number of at least 1 is needed"),
    (["steps"], "argument command: invalid choice: 'steps'"),
    (["step", "--json", "no/where.json"], "--json no/where.json: not writable (No such file or directory)"),
    (["start", "--json", "."], "--json .: not writable (it is a folder)"),
    (["data", "--data-path", "nowhere"], "--data-path nowhere: there is no such folder"),
    (["end-to-end", "--batch-size", "200"], "--images 256: two batches of --batch-size 200 are needed"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_ends_with_one_sentence(words, sentence, monkeypatch, capsys):
    """Also of a file that could not be written in the end, before a minute is spent on measuring."""
    monkeypatch.setattr(measure, "report", None)
    monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as leaving:
        benchmark.main()
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error.count("\n") == 1
    assert error.startswith("benchmark.py: error: ") and sentence in error


@pytest.mark.parametrize(("command", "there", "missing"), [
    ("step", ["masking-joint", "(default: none,masking)", "--communication"], ["--plot", "--images", "(default: None)"]),
    ("data", ["of each recipe where none is named", "--images IMAGES", "--augsub {none,masking,dropout,droppath}"],
     ["masking-joint", "--communication", "none,masking)"]),
    ("growth", ["--plot FILE", "CutMix alpha (default: 0)"], ["--images"]),
])  # fmt: skip
def test_help_tells_of_a_commands_own_flags_and_defaults(command, there, missing, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", command, "--help"])
    with pytest.raises(SystemExit) as leaving:
        benchmark.main()
    said = " ".join(capsys.readouterr().out.split())
    assert not leaving.value.code
    assert all(words in said for words in there) and not any(words in said for words in missing)


def test_a_file_that_cannot_be_written_in_the_end_costs_no_figures(monkeypatch, capsys, tmp_path):
    """Neither the printed ones nor, where the picture fails, the JSON; a link stays one, and a pipe a pipe."""
    (tmp_path / "link.json").symlink_to("figures.json")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    small = ["growth", "--augsub", "none", "--rounds", "1", "--warmup", "1", "--batch-sizes", "1", "--image-sizes", "16",
             "--models", "deit_pico_patch8_LS", "--processes", "1", "--batch-size", "1"]  # fmt: skip

    def failing(*_: Any) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr("scripts.draw.draw", failing)
    for name in ("link.json", "pipe"):
        words = [*small, "--plot", str(tmp_path / "figure.png"), "--json", str(tmp_path / name)]
        monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
        with pytest.raises(SystemExit):
            benchmark.main()
        said = capsys.readouterr()
        assert said.err == "benchmark.py: error: no picture\n" and "ms an image" in said.out
    assert json.loads((tmp_path / "figures.json").read_text())["figures"] and (tmp_path / "link.json").is_symlink()
    assert json.loads(os.read(reader, 1 << 20))["figures"]
    os.close(reader)


@pytest.mark.parametrize("text", ["README.md", BENCHMARK])
def test_commands_that_are_written_down_are_understood(text):
    commands = re.findall(rf"{BENCHMARK} ((?:{'|'.join(COMMANDS)})\b[^`\n]*)", (ROOT / text).read_text())
    assert len(commands) >= 5
    for words in commands:
        command, recipes, flags = benchmark.opening(benchmark.create_parser(), shlex.split(words))
        assert all(modes_asked(command, recipe, flags) for recipe in recipes)


@pytest.mark.parametrize("flags", [
    ["--augsub", "none,masking-joint"], ["--augsub", "none,masking", "--augsub-joint"],
    ["--augsub", "none,masking,masking-joint", "--augsub-joint"],
], ids=" ".join)  # fmt: skip
def test_both_passes_at_once_are_named_so_however_they_are_asked_for(flags):
    modes = modes_of("step", RECIPES["deit"], [*flags, "--reference"])
    assert [mode.name for mode in modes] == ["plain", "AugMask joint", "reference plain", "reference AugMask"]
    assert [mode.args.augsub_joint for mode in modes if mode.kind == "masking"] == [True, False]


def test_what_was_measured_is_kept_though_it_cannot_be_printed(tmp_path):
    flags = "--rounds 1 --warmup 1 --augsub none --json f.json".split()
    words = [sys.executable, str(ROOT / BENCHMARK), "step", *flags]
    for full in ("1", ""):  # whether the interpreter writes at once
        with open("/dev/full", "w") as nowhere:
            done = subprocess.run(words, cwd=tmp_path, env=environment(PYTHONUNBUFFERED=full), stdout=nowhere,
                                  stderr=subprocess.PIPE, text=True)  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == "benchmark.py: error: No space left on device\n"
        assert json.loads((tmp_path / "f.json").read_text())["figures"]
        (tmp_path / "f.json").unlink()
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head` does
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    assert json.loads((tmp_path / "f.json").read_text())["figures"]


def test_asked_to_stop_it_leaves_no_photographs_behind(tmp_path):
    words = ["data", "swin", "--images", "64", "--rounds", "1000"]
    process = subprocess.Popen([sys.executable, str(ROOT / BENCHMARK), *words], env=environment(TMPDIR=str(tmp_path)),
                               stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        while len(list(tmp_path.glob("*/train/*/*.jpg"))) < 64 and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM and not list(tmp_path.iterdir())
    finally:
        process.kill()


def test_ctrl_c_ends_with_one_sentence(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "step", interrupted)
    monkeypatch.setattr("sys.argv", ["benchmark.py", "step"])
    with pytest.raises(SystemExit) as leaving:
        benchmark.main()
    assert leaving.value.code == 130 and capsys.readouterr().err == "benchmark.py: interrupted\n"


def test_starts_are_timed_from_the_command_to_the_first_step(tmp_path, monkeypatch):
    """One recipe's, each figure from processes of its own."""
    from scripts import startup

    (found,) = startup.measure_starts({"resnet_rsb": "resnet50"}, ["--model", "resnet10t", "--augsub", "masking"], 1)
    (shortest,), (digits,), (photographs,) = (found.seconds[look] for look in startup.LOOKS)
    assert 0 < shortest < min(digits, photographs), "PyTorch is imported before a step only"
    with pytest.raises(ValueError, match=r"train.py ended before its first step: .*unknown flag --modell"):
        startup.measure_starts({"resnet_rsb": "resnet50"}, ["--modell", "resnet10t"], 1)
