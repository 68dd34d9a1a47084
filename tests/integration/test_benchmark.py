"""The benchmark, run as it is on tiny models: what its figures must be, whatever the machine's speed."""

from __future__ import annotations

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
from common.data.datasets import open_dataset
from common.data_config import dataset_config
from common.distributed import Process
from common.errors import StopTraining
from scripts import benchmark
from scripts.bench import data, report, scaling, step
from scripts.bench.args import COMMANDS, parse_modes
from scripts.bench.cases import BenchCase, RoundTime, prepare_modes
from scripts.bench.plot import draw_sweeps
from scripts.bench.report import strip_common_words
from scripts.bench.workers import WorkerGroup
from scripts.launch import cost
from scripts.launch.registry import RECIPES
from tests.commands import ROOT, environment, run
from tests.sample_data import make_jpegs

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
    words = ["step", "swin", "--augsub", "none,masking", "--batch-size", "4", "--rounds", "3", "--reference"]
    return measured(folder, *words)


def modes(steps) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in steps[0]["figures"]}


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_multiply_adds_are_the_plans(steps):
    for name, kind in (("plain", "none"), ("AugMask", "masking")):
        args = parse(RECIPES["swin"], ["--augsub", kind])
        args.nb_classes = 10
        expected = cost.measure("swin", args)
        assert modes(steps)[name]["multiply_adds"] == {"main": expected.main / 2, "sub": expected.sub / 2}
    assert modes(steps)["AugMask"]["to_first"]["multiply_adds"] == pytest.approx(2, rel=1e-3)


@pytest.mark.slow
def test_memory_is_that_of_the_tensors(steps):
    """At least weights, gradients and two moments. AugMask has no more than plain but for the first pass's gradients,
    which are there while the second pass runs; its first graph is gone by then."""
    found = modes(steps)
    for figure in found.values():
        assert figure["peak_bytes"] > 4 * 4 * figure["parameters"]
    gradient_bytes = 4 * found["AugMask"]["parameters"]
    assert found["AugMask"]["peak_bytes"] <= 1.01 * found["plain"]["peak_bytes"] + gradient_bytes
    assert found["AugMask"]["parameters"] == found["plain"]["parameters"] + 48, "a mask token"


def test_memory_counts_what_a_step_allocates():
    """A criterion that takes 64 MB more raises the peak by as much."""
    flags = ["--augsub", "masking", "--batch-size", "16", "--warmup", "1"]
    (mode,) = prepare_modes("step", RECIPES["mae"], flags)
    case = step.build_case_with_memory(RECIPES["mae"], mode, Process(torch.device("cpu")))
    criterion = case.trainer.criterion
    case.trainer.augsub.target = "softmax"
    case.trainer.criterion = lambda z, y: criterion(z, y) + 0 * torch.zeros(16_000_000).sum()
    assert step.measure_peak_memory(case, 0) - case.peak_bytes == pytest.approx(64e6, rel=0.1)


@pytest.mark.slow
def test_any_timm_model(tmp_path):
    words = ["step", "--model", "test_vit", "--input-size", "160", "--augsub", "none,dropout,masking"]
    more = ["--batch-size", "2", "--rounds", "1", "--accum-iter", "2", "--opt", "adamw"]
    entry, _ = measured(tmp_path, *words, *more)
    for figure in entry["figures"]:
        assert figure["images_per_step"] == 4 and figure["parameters"] > 0
    assert [f["name"] for f in entry["figures"]] == ["plain", "AugDrop", "AugMask"]
    work = [f["to_first"]["multiply_adds"] for f in entry["figures"]]
    assert work[:2] == [1, 2] and 1.4 < work[2] < 1.6


@pytest.mark.slow
def test_data(tmp_path):
    folder = make_jpegs(tmp_path / "images", train=4)
    entry, printed = measured(
        tmp_path, "data", "--data-path", str(folder), "--images", "4", "--rounds", "2", OMP_NUM_THREADS="2"
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


@pytest.mark.slow
def test_data_makes_shards_of_its_photographs(tmp_path):
    pytest.importorskip("webdataset")
    entry, _ = measured(tmp_path, "data", "swin", "--data-set", "wds/photographs", "--images", "2", "--rounds", "1")
    assert [row["name"] for row in entry["figures"]] == ["swin"], "the one that is named"
    assert all(row["images_per_second"]["fast"]["median"] > 0 for row in entry["figures"])
    assert entry["args"]["data_set"] == "wds/photographs"
    made = data.make_photographs(tmp_path / "photographs", 6)
    data.pack_shards(made)
    folder, shards = (
        open_dataset(dataset_config(parse(RECIPES["deit"], ["--data-path", str(made), *more])), train=True)
        for more in ([], ["--data-set", "wds/photographs"])
    )
    assert sorted(map(folder.read_encoded, range(6))) == sorted(map(shards.read_encoded, range(6)))


@pytest.mark.slow
def test_end_to_end_packs_a_shard_where_shards_are_asked_for(tmp_path):
    pytest.importorskip("webdataset")
    words = ["end-to-end", "deit", "--model", "deit_pico_patch8_LS", "--data-set", "wds/photographs", "--input-size",
             "32", "--batch-size", "4", "--images", "16", "--rounds", "1", "--num-workers", "1"]  # fmt: skip
    entry, _ = measured(tmp_path, *words)
    assert all(figure["images_per_second"]["median"] > 0 for figure in entry["figures"])


@pytest.mark.slow
def test_end_to_end_with_loader_processes(tmp_path):
    words = ["end-to-end", "--images", "128", "--batch-size", "64", "--rounds", "1", "--num-workers", "1", "--augsub", "masking",
             "--reference"]  # fmt: skip
    entry, _ = measured(tmp_path, *words)
    assert [f["name"] for f in entry["figures"]] == ["AugMask", "reference AugMask"]
    for figure in entry["figures"]:
        assert figure["loader_processes"] == 1 and figure["images_per_second"]["median"] > 0
        assert 0 <= figure["waiting"]["median"] <= 1


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_growth_is_drawn(grown):
    with Image.open(grown[2]) as image:
        assert image.format == "PNG" and image.size == (1800, 1400)
        colours = {colour[:3] for _, colour in image.getcolors(1 << 24)}
    assert {(0, 114, 178), (213, 94, 0), (255, 255, 255)} <= colours
    assert {path.name for path in grown[2].parent.iterdir()} == {"figures.json", "figure.png"}


@pytest.mark.slow
def test_growth_is_drawn_as_its_name_ends_or_not_at_all(grown, tmp_path):
    draw_sweeps(tmp_path / "figure.svg", grown[0]["figures"], "deit")
    text = (tmp_path / "figure.svg").read_text()
    for word in ("AugMask", "pixels a side", "test_vit", "ms per image"):
        assert f"<!-- {word} -->" in text
    with pytest.raises(ValueError, match=r"--plot .*nowhere/figure.svg: not writable"):
        draw_sweeps(tmp_path / "nowhere" / "figure.svg", grown[0]["figures"], "deit")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.svg"]


def test_names_are_shown_by_what_tells_them_apart():
    assert strip_common_words(["deit_tiny_patch16_LS", "deit_small_patch16_LS"]) == ["tiny", "small"]
    assert strip_common_words(["resnet18", "resnet50"]) == ["resnet18", "resnet50"]
    assert strip_common_words(["a_b"]) == ["a_b"]
    assert strip_common_words(["a_b", "a_b_c"]) == ["b", "b_c"]


def test_every_point_is_timed_in_each_round():
    timed: list[tuple[int, int]] = []
    slots = [(0, 0), (0, 1), (1, 0), (1, 1)]

    def run_round(slot):
        timed.append(slot)
        return RoundTime({}, float(len(timed)))

    times = scaling.interleave_rounds("batch size", slots, 3, run_round)
    assert timed == [*slots, *slots[1:], slots[0], *slots[2:], *slots[:2]]
    assert times[1, 0] == [({}, 3.0), ({}, 6.0), ({}, 9.0)]


@pytest.mark.slow
@pytest.mark.parametrize("share", [scaling.MEMORY_SHARE, 0.0])
def test_models_that_do_not_fit_into_memory_together_are_built_anew(share, monkeypatch):
    monkeypatch.setattr(scaling, "MEMORY_SHARE", share)
    flags = ["--augsub", "none", "--batch-sizes", "1,2", "--warmup", "1", "--processes", "1"]
    _, sweeps = scaling.plan_sweeps(RECIPES["deit"], flags)
    runner = scaling.SweepRunner(RECIPES["deit"], sweeps["batch size"], Process(torch.device("cpu")))
    built: list[Any] = []
    build_case = scaling.build_case

    def recorded(*args: Any) -> BenchCase:
        case = build_case(*args)
        built.append(weakref.ref(case.trainer.raw_model))
        return case

    monkeypatch.setattr(scaling, "build_case", recorded)
    for slot in [(0, 0), (1, 0)] * 2:
        phases, cpu = runner(slot)
        assert sum(phases.values()) > 0 and cpu > 0
    assert [model() is not None for model in built] == ([True] * 2 if share else [False] * 4)
    runner.release()
    assert not any(model() is not None for model in built)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_measurement():
    flags = ["--augsub", "none", "--batch-sizes", "1", "--warmup", "1", "--processes", "2"]
    _, sweeps = scaling.plan_sweeps(RECIPES["deit"], flags)
    group = WorkerGroup("deit", sweeps["processes"][0].modes, 2, "cpu")
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    try:
        for worker in group.workers:
            os.kill(worker.pid, signal.SIGINT)  # as Ctrl-C does: the parent ends them
        assert group.run_round(0).cpu > 0
        group.workers[1].kill()
        group.workers[1].join()
        with pytest.raises(StopTraining, match="one of 2 worker processes"):
            group.run_round(0)
        assert not any(worker.is_alive() for worker in group.workers)
    finally:
        group.terminate()


@pytest.mark.slow
@pytest.mark.parametrize(("words", "sentence"), [
    (["--models", "vit_smal_patch16_224"], "model size vit_smal_patch16_224: --model vit_smal_patch16_224: timm has no model vit_smal_patch16_224; did you"),
    (["--image-sizes", "32,4"], "image size 4: --input-size 4: not accepted by --model deit_pico_patch8_LS"),
    (["--image-sizes", "8"], "image size 8: --input-size 8: one patch of deit_pico_patch8_LS, so that masking hides no"),
    (["--processes", "0"], "argument --processes: '0': expected an integer of at least 1"),
    (["--batch-sizes", "1,two"], "argument --batch-sizes: 'two': expected an integer of at least 1"),
    (["--batch-sizes", "1,2", "--mixup", "0.8"], "--batch-size 1: odd, but mixup needs pairs of images; use an even one"),
    (["--models", "deit_pico_patch8_LS,"], "argument --models: 'deit_pico_patch8_LS,': expected names"),
    (["--plot", "figure"], "--plot figure: unknown file type; use one of .pdf, .png, .svg"),
    (["--plot", "nowhere/figure.png"], "--plot nowhere/figure.png: not writable (No such file or directory)"),
    (["--json", "/proc/figures.json"], "--json /proc/figures.json: not writable"),
    (["--plot", "folder.png"], "--plot folder.png: not writable (it is a folder)"),
    (["--plot", "nomatplotlib.png"], "--plot: matplotlib is missing; pip install"),
    (["resnet_rsb", "--batch-sizes", "1"], "batch size 1: --batch-size 1: batch norm layer4.0.bn1 has one value per channel at --input-size 32; use"),
    (["swin", "--models", "vit_tiny_patch16_224"], "--model vit_tiny_patch16_224: has no effect here; choose a Swin with --cfg or --variant"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_growth_refuses_bad_input_before_it_measures(words, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("sys.argv", ["benchmark.py", "growth", *words])
    monkeypatch.setattr(scaling, "measure_sweep", lambda *_: pytest.fail("it measures"))
    if "nomatplotlib.png" in words:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as leaving:
        benchmark.main()
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error.count("\n") == 1
    assert error.startswith("benchmark.py: error: ") and sentence in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(("words", "sentence"), [
    (["step", "--model", "vit_smal_patch16_224"], "--model vit_smal_patch16_224: timm has no model vit_smal_patch16_224; did you mean vit_small"),
    (["step", "resnet_rsb", "--augsub", "none,dropout"], "--augsub dropout: ResNet has no place for it; use masking or droppath"),
    (["step", "--augsub", "none,maskng"], "--augsub maskng: unknown drop; choose from none,masking,dropout,droppath"),
    (["step", "--referense"], "unknown flag --referense: did you mean --reference?"),
    (["step", "--rounds", "0"], "argument --rounds: '0': expected an integer of at least 1"),
    (["steps"], "argument command: invalid choice: 'steps'"),
    (["step", "--json", "no/where.json"], "--json no/where.json: not writable (No such file or directory)"),
    (["data", "--json", "."], "--json .: not writable (it is a folder)"),
    (["data", "--data-path", "nowhere"], "--data-path nowhere: there is no such folder"),
    (["end-to-end", "--batch-size", "200"], "--images 256: less than two batches; pass at least 400"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_ends_with_one_sentence(words, sentence, monkeypatch, capsys):
    """Also of a file that could not be written in the end, before a minute is spent on measuring."""
    monkeypatch.setattr(report, "write_report", None)
    monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as leaving:
        benchmark.main()
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error.count("\n") == 1
    assert error.startswith("benchmark.py: error: ") and sentence in error


@pytest.mark.parametrize(("command", "there", "missing"), [
    ("step", ["none, masking, dropout, droppath", "(default: none,masking)", "--reference"], ["--plot", "--images", "(default: None)"]),
    ("data", ["of each recipe unless one is named", "--images IMAGES", "--augsub {none,masking,dropout,droppath}"],
     ["none, masking, dropout, droppath", "--reference", "none,masking)"]),
    ("growth", ["--plot FILE", "CutMix alpha (default: 0)"], ["--images"]),
])  # fmt: skip
def test_help_tells_of_a_commands_own_flags_and_defaults(command, there, missing, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", command, "--help"])
    with pytest.raises(SystemExit) as leaving:
        benchmark.main()
    said = " ".join(capsys.readouterr().out.split())
    assert not leaving.value.code
    assert all(words in said for words in there) and not any(words in said for words in missing)


@pytest.mark.slow
def test_a_file_that_cannot_be_written_in_the_end_costs_no_figures(monkeypatch, capsys, tmp_path):
    """Neither the printed ones nor, where the picture fails, the JSON; a link stays one, and a pipe a pipe."""
    (tmp_path / "link.json").symlink_to("figures.json")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    small = ["growth", "--augsub", "none", "--rounds", "1", "--warmup", "1", "--batch-sizes", "1", "--image-sizes", "16",
             "--models", "deit_pico_patch8_LS", "--processes", "1", "--batch-size", "1"]  # fmt: skip

    def failing(*_: Any) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr("scripts.bench.plot.draw_sweeps", failing)
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
        command, recipes, flags = benchmark.parse_command_line(benchmark.create_parser(), shlex.split(words))
        assert all(parse_modes(command, recipe, flags) for recipe in recipes)


@pytest.mark.slow
def test_what_was_measured_is_kept_though_it_cannot_be_printed(tmp_path):
    flags = "--rounds 1 --warmup 1 --augsub none --json f.json".split()
    words = [sys.executable, str(ROOT / BENCHMARK), "step", *flags]
    for full in ("1", ""):  # whether the interpreter writes at once
        with open("/dev/full", "w") as nowhere:
            done = subprocess.run(words, cwd=tmp_path, env=environment(PYTHONUNBUFFERED=full), stdout=nowhere,
                                  stderr=subprocess.PIPE, text=True)  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == "benchmark.py: error: standard output: could not be written (No space left on device)\n"
        assert json.loads((tmp_path / "f.json").read_text())["figures"]
        (tmp_path / "f.json").unlink()
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head` does
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    assert json.loads((tmp_path / "f.json").read_text())["figures"]


@pytest.mark.slow
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

    monkeypatch.setattr(step, "measure_step", interrupted)
    monkeypatch.setattr("sys.argv", ["benchmark.py", "step"])
    with pytest.raises(SystemExit) as leaving:
        benchmark.main()
    assert leaving.value.code == 130 and capsys.readouterr().err == "benchmark.py: interrupted\n"
