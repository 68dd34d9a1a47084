"""The table's rows, what they run and cost, and the launcher without Slurm."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from common.args import parse
from scripts import collect, reproduce, submit
from scripts.launch.cost import estimate_cost, measure
from scripts.launch.paper_tables import MINI, ROWS, Stage, select
from scripts.launch.planner import Table, fit_to_gpus, plan_tasks
from scripts.launch.registry import RECIPES
from scripts.launch.results import markdown_tables
from scripts.launch.slurm import outside_of_jobs, parse_time_limit
from scripts.launch.status import find_state, update_status
from scripts.launch.submission import run_here
from scripts.reproduce import create_parser
from scripts.submit import output_folder
from tests.commands import ROOT, environment


def tasks(*words: str):
    args = create_parser().parse_args([*words, "--data-path", "/data", "--mae-weights", "/weights"])
    table = Table.select(args.rows, args.mini, args.output, args.augsub_ratio, args.append)
    return plan_tasks(table, args.augsub.split(","), args.nodes, args.gpus_per_node, args.data_path, args.mae_weights)


@pytest.fixture
def call(monkeypatch, capfd):
    """Run a script's main → what it and its processes print; what it complains of, where it is to fail. Without
    Slurm, whatever is installed."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(module: ModuleType, *words: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        capfd.readouterr()
        try:
            module.main()
            left = 0
        except SystemExit as leaving:
            left = int(leaving.code or 0)
        out, error = capfd.readouterr()
        assert left == status, out + error
        return error if status else out

    return run


def test_rows_outside_the_papers_tables_are_asked_for(capsys):
    """With a flag of their own, in a table of their own; without it no row changes."""
    table = Table.select([], False, None, 0.5, [], extra=True)
    assert [row.id for row in table.rows] == ["mae/clip_base", "mae/clip_large"]
    tasks = plan_tasks(table, ["masking"], None, None, "/data", None)
    assert [shlex.join(task.flags).partition(" --output-dir")[0] for task in tasks] == [
        "--variant clip_base --augsub masking --data-path /data",
        "--variant clip_large --augsub masking --data-path /data",
    ]
    assert [task.stage.global_batch for task in tasks] == [2048, 2048]
    assert [row.paper for row in table.rows] == [{"none": 85.7}, {"none": 88.0}]
    tables = markdown_tables(table, {})
    assert tables.startswith("**CLIP finetuning**") and "| CLIP ViT-L/14 | 30 | 88.0 |" in tables
    assert not {row.id for row in ROWS} & {row.id for row in table.rows}
    with pytest.raises(ValueError, match="--extra: has no rows on the digits"):
        Table.select([], True, None, 0.5, [], extra=True)


def test_the_rows_are_the_papers():
    assert len(ROWS) == len({row.id for row in ROWS}) == 17
    assert {row.recipe: sum(r.recipe == row.recipe for r in ROWS) for row in ROWS} == {
        "deit": 8, "mae": 3, "swin": 3, "resnet_rsb": 3}  # fmt: skip
    assert all(row.paper["masking"] > row.paper["none"] for row in ROWS)
    for row in ROWS:
        lines = (ROOT / row.recipe / "README.md").read_text().splitlines()
        numbers = f" | {row.paper['none']:.1f} | {row.paper['masking']:.1f} | "
        heads = (f"| {row.model}{numbers}", f"| {row.model}, {row.epochs} epochs{numbers}")
        (line,) = (line for line in lines if line.startswith(heads))
        assert row.name in line.replace("_patch4_window7_224.yaml", " ").replace("swin_", " ").split()
    batches = {stage.variant: stage.global_batch for row in ROWS for stage in row.stages}
    assert batches == {
        **dict.fromkeys([f"{size}_{epochs}" for size in ("small", "base", "large", "huge") for epochs in (400, 800)], 2048),
        "base_finetune": 512, "large_finetune": 512, "huge_finetune": 512, "base_100": 1024, "large_50": 1024,
        "huge_50": 1024, "tiny": 1024, "small": 1024, "base": 1024, "resnet50": 2048, "resnet101": 2048, "resnet152": 2048,
    }  # fmt: skip


def test_every_stage_parses_with_its_recipe_and_starts_from_the_one_before():
    found = tasks()
    assert len(found) == 2 * (17 + 6)
    for task in found:
        args = parse(RECIPES[task.stage.recipe], task.flags)
        assert (args.variant, args.augsub) == (task.stage.variant, task.kind)
        assert args.batch_size * args.accum_iter * task.stage.nodes * task.stage.gpus == task.stage.global_batch
        assert str(task.folder) in args.output_dir
    assert len({task.folder for task in found}) == len(found)
    starts = {task.name: parse(RECIPES[task.stage.recipe], task.flags).finetune for task in found}
    assert starts["deit/huge_800-masking/finetune"].endswith("deit/huge_800-masking/pretrain/checkpoint.pth")
    assert starts["mae/large_50-none/train"] == "/weights/mae_pretrain_vit_large.pth"
    assert starts["swin/tiny-none/train"] == ""


def test_other_settings_have_other_folders():
    names = [tasks("swin/tiny", "--augsub", "masking", *words)[0].folder.parent.name
             for words in ([], ["--augsub-ratio", "0.25"])]  # fmt: skip
    assert names == ["tiny-masking", "tiny-masking-0.25"]


@pytest.mark.parametrize(("variant", "nodes", "gpus", "expected"), [
    ("small_400", 1, 8, []),
    ("small_400", 2, 4, []),
    ("small_400", 1, 4, ["--batch-size", "256", "--accum-iter", "2"]),
    ("small_400", 1, 3, None),
    ("small_400", 2, 8, ["--batch-size", "128", "--accum-iter", "1"]),
    ("large_400", 1, 8, ["--batch-size", "32", "--accum-iter", "8"]),
])  # fmt: skip
def test_other_numbers_of_gpus_keep_the_global_batch_or_are_refused(variant, nodes, gpus, expected):
    stage = Stage("train", "deit", variant, nodes=8 if "large" in variant else 1)
    if expected is None:
        with pytest.raises(ValueError, match="1 x 3 processes do not divide the global batch of 2048 images"):
            fit_to_gpus(stage, nodes, gpus)
    else:
        assert fit_to_gpus(stage, nodes, gpus)[1] == expected


def test_rows_are_asked_for_by_name():
    assert [row.id for row in select(ROWS, ["swin", "deit/base_400"])] == [
        "deit/base_400", "swin/tiny", "swin/small", "swin/base"]  # fmt: skip
    with pytest.raises(ValueError, match="unknown row 'deit/small_500': choose from deit/small_400, "):
        select(ROWS, ["deit/small_500"])


def test_the_plan_counts_steps_and_arithmetic():
    """ViT-S: 4.599 G multiply-adds, of which the sub-model takes 0.489 more; a backward pass is two forwards."""
    plain, masked = (estimate_cost(task.stage, task.flags) for task in tasks("deit/small_400"))
    assert plain.steps == masked.steps == 400 * (1_281_167 // 2048)
    assert plain.flops == pytest.approx(plain.steps * 2048 * 3 * 2 * 4.599e9, rel=1e-3)
    assert masked.flops / plain.flops == pytest.approx(1.489, abs=1e-3)
    assert 22.06e6 * 20 < plain.memory < 32e9


def test_the_arithmetic_is_that_of_the_model_with_its_flags():
    """Swin's configuration changes a model of the same name."""
    small = ["MODEL.SWIN.EMBED_DIM", "16", "MODEL.SWIN.NUM_HEADS", "[1,2]"]
    shapes = [["--opts", *small, "MODEL.SWIN.DEPTHS", depths] for depths in ("[1,1]", "[2,2]")]
    one, two = (measure("swin", parse(RECIPES["swin"], shape)) for shape in shapes)
    assert 1.5 * one.main < two.main < 2.5 * one.main


def test_the_plan_is_printed_and_nothing_made(tmp_path, call):
    words = ["swin/tiny", "resnet_rsb/resnet50", "--data-path", "/none", "--output", str(tmp_path / "out"), "--plan"]
    said = call(reproduce, *words, "--gpu", "h100")
    assert (
        "torchrun --nnodes 1 --nproc-per-node 8 swin/main.py --variant tiny --augsub masking --data-path /none" in said
    )
    assert "1 x 8 GPUs, 1024 images a step, 375,300 steps" in said and "h100-hours" in said
    assert "in all: 4 runs" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "sentence"), [
    (["deit/small_401"], "unknown row 'deit/small_401'"),
    (["--augsub", "mask"], "--augsub mask: choose from none, "),
    (["swin"], "--data-path is missing"),
    (["swin", "--data-path", "/none"], "/none has no folder train"),
    (["mae", "--data-path", "IMAGES"], "--mae-weights is missing"),
    (["mae", "--data-path", "IMAGES", "--mae-weights", "/none"], "--mae-weights: no file /none/mae_pretrain_vit_base.pth"),
    (["deit/large_400", "--data-path", "IMAGES"], "--nodes 8: several nodes need Slurm"),
    (["swin", "--data-path", "IMAGES", "--output", "/proc/none"], "/proc/none"),
    (["swin", "--plan", "--gpu", "b9"], "--gpu b9: choose from v100, a100, h100, h200"),
    (["swin", "--plan", "--nodes", "0"], "argument --nodes: '0': expected an integer of at least 1"),
    (["swin", "--data-path", "IMAGES", "--append", "--lrr", "3"], "unknown flag --lrr: did you mean --lr?"),
    (["swin", "--data-path", "IMAGES", "--augsub-ratio", "1.5"], "argument --augsub-ratio: '1.5': expected a number in [0, 1)"),
    (["swin", "--data-path", "IMAGES", "--append", "--lr", "nan"], "argument --lr: 'nan': expected a finite number"),
    (["swin", "--data-path", "IMAGES", "--append", "--output_dir", "x"], "--append --output-dir: each run has its own folder"),
    (["swin", "--data-path", "IMAGES", "--time", "soon"], "argument --time: 'soon': expected [days-]hours:minutes:seconds"),
])  # fmt: skip
def test_bad_input_is_found_before_anything_is_submitted(words, sentence, jpegs, tmp_path, call):
    words = [str(jpegs()) if word == "IMAGES" else word for word in words]
    if "--append" not in words:
        words += ["--output", str(tmp_path / "out")] if "--output" not in words else []
    else:
        words[:0] = ["--output", str(tmp_path / "out")]
    error = call(reproduce, *words, status=2)
    assert ": error: " in error and sentence in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/*/*"))


def test_limits_of_time():
    assert [parse_time_limit(limit) for limit in ("72:00:00", "2-12:00:00", "90", "30:30", "1-0", "0:10")] == [
        4320,
        3600,
        90,
        31,
        1440,
        1,
    ]


def test_the_folder_of_a_run_is_known_by_its_flags(tmp_path):
    for flags in (
        ["--output_dir", "a"],
        ["--output-dir", "b", "--output-dir", "a"],
        ["--output-dir=a"],
        ["x", "--output", "a", "--lr", "1"],
    ):
        assert output_folder(flags) == Path("a").absolute()
    with pytest.raises(ValueError, match="--output-dir is missing"):
        output_folder(["--augsub", "masking"])


@pytest.mark.parametrize(("status", "queue", "expected"), [
    ({}, "", ("missing", "")),
    ({"state": "queued", "job": "7"}, "PENDING Priority", ("queued", "Priority")),
    ({"state": "running", "job": "7"}, "RUNNING None", ("running", "")),
    ({"state": "requeued", "job": "7"}, "PENDING BeginTime", ("requeued", "BeginTime")),
    ({"state": "running", "job": "7"}, "NODE_FAIL None", ("failed", "node failure")),
    ({"state": "running", "job": "7"}, "OUT_OF_MEMORY None", ("failed", "out of memory on a node")),
    ({"state": "running", "job": "7"}, "", ("failed", "exited without a status")),
    ({"state": "queued", "job": "7"}, "", ("failed", "ended before it started")),
    ({"state": "failed", "reason": "bug", "job": "7"}, "FAILED NonZeroExitCode", ("failed", "bug")),
    ({"state": "done", "job": "7"}, "COMPLETED None", ("done", "")),
    ({"state": "stopped", "reason": "by SIGTERM", "job": "7"}, "CANCELLED None", ("stopped", "by SIGTERM")),
    ({"state": "running", "job": None, "host": "elsewhere"}, "", ("running", "on elsewhere according to status.json")),
    ({"state": "running", "job": None, "host": socket.gethostname()}, "", ("stopped", "process killed")),
])  # fmt: skip
def test_states_tell_a_bug_from_a_node(status, queue, expected, tmp_path):
    if status:
        (tmp_path / "status.json").write_text(json.dumps(status))
    state, reason = find_state(tmp_path, {"7": queue} if queue else {})
    assert state == expected[0] and reason.startswith(expected[1])


@pytest.mark.slow
def test_the_mini_table_without_slurm(tmp_path, call):
    """A chain and a single run, twice: the second call runs nothing, and the table and the curves show both."""
    words = ["--mini", "deit/digits", "resnet_rsb/digits", "--augsub", "masking", "--output", str(tmp_path / "out")]
    said = call(reproduce, *words, "--append", "--epochs", "1")
    assert said.count(": runs here") == 3 and said.count("best accuracy") == 3
    again = call(reproduce, *words, "--append", "--epochs", "1")
    assert again.count(": done") >= 3 and "runs here" not in again
    assert "| ResNet-10 | 5 |" in again and "Swin" not in again, "the rows that were asked for"
    row = tmp_path / "out" / "deit" / "digits-masking-epochs-1"
    update_status(row / "pretrain", state="stopped")  # as if the second stage had begun too early
    after = call(reproduce, *words, "--append", "--epochs", "1")
    assert "digits-masking/finetune: renamed to finetune.before-1" in after
    assert after.count(": runs here") == 2 and (row / "finetune.before-1" / "checkpoint.pth").exists()
    words, more = ["--mini", "--output", str(tmp_path / "out")], ["--append", "--epochs", "1"]
    lines = call(collect, *words, *more).splitlines()
    assert lines[0].split() == ["run", "state", "epoch", "acc@1", "best", "images/s", "left"]
    assert sum(" done" in line and " 1/1 " in line for line in lines) == 3
    assert sum(" missing " in line for line in lines) == 10 - 3
    table = call(collect, *words, "--markdown", *more)
    (row,) = (line for line in table.splitlines() if line.startswith("| ResNet-10 |"))
    accuracy = [cell.strip() for cell in row.split("|")]
    assert accuracy[3:6] == ["", "", ""] and float(accuracy[7]) > 0, "no plain run, and no number of the paper's"
    call(collect, *words, "--plot", str(tmp_path / "table.png"), *more)
    with Image.open(tmp_path / "table.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert "no such folder" in call(collect, "--output", str(tmp_path / "none"), status=2)


def test_the_paper_stands_beside_ours(tmp_path, call):
    folder = tmp_path / "swin" / "tiny-masking" / "train"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    (folder / "log.txt").write_text(json.dumps({"epoch": 0, "test_acc1": 81.52, "train_loss": 1.0}) + "\n")
    table = call(collect, "swin", "--output", str(tmp_path), "--markdown")
    assert "| Swin-T | 300 | 81.3 |  |  | 81.4 | 81.52 | +0.12 |" in table
    assert "| Swin-S | 300 | 83.0 |  |  | 83.4 |  |  |" in table


def test_plain_stands_beside_another_ratio(tmp_path, call):
    for name in ("tiny-none", "tiny-masking-0.25"):
        folder = tmp_path / "swin" / name / "train"
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps({"state": "done"}))
        (folder / "log.txt").write_text(json.dumps({"epoch": 0, "test_acc1": 80.0, "train_loss": 1.0}) + "\n")
    table = call(collect, "swin", "--output", str(tmp_path), "--markdown", "--augsub-ratio", "0.25")
    assert "| Swin-T | 300 | 81.3 | 80.00 | -1.30 | 81.4 | 80.00 | -1.40 |" in table


@pytest.mark.parametrize("content", ["garbage", "", "[]", "null", '{"state": 3}', "{}"])
def test_a_damaged_status_is_named(content, jpegs, tmp_path, call):
    folder = tmp_path / "out" / "swin" / "tiny-none" / "train"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(content)
    words = ["swin", "--output", str(tmp_path / "out")]
    (line,) = (line for line in call(collect, *words).splitlines() if line.startswith("swin/tiny plain"))
    assert "unknown" in line and f"{folder}/status.json is damaged" in line
    error = call(reproduce, *words, "--data-path", str(jpegs()), "--local", status=2)
    assert f"{folder}/status.json is damaged" in error and error.count("\n") == 1
    assert os.listdir(folder) == ["status.json"]


def test_a_run_here_that_ends_without_a_word_has_failed(tmp_path, capfd):
    """As one does that is killed, or breaks before it can say."""
    (tmp_path / "job.json").write_text(json.dumps({"entry": "deit/main.py"}))
    assert run_here(tmp_path, gpus=1) == 1
    assert find_state(tmp_path, {}) == ("failed", "exited with code 1 and no message")


def test_what_a_single_run_is_asked_is_looked_at_first(tmp_path, call):
    words = ["deit", "--cpu", "--local", "--", "--output-dir", str(tmp_path / "out"), "--lrr", "3"]
    assert "unknown flag --lrr: did you mean --lr?" in call(submit, *words, status=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_plan_quietly():
    words = f"{sys.executable} {ROOT}/scripts/reproduce.py swin --plan | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=environment(), timeout=240)
    assert (done.returncode, done.stderr) == (141, "")


def test_jobs_do_not_see_the_job_that_submits_them(monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with outside_of_jobs():
        assert [name for name in os.environ if name.startswith("SLURM_")] == ["SLURM_CONF"]
    assert os.environ["SLURM_MEM_PER_CPU"] == "100"


def test_a_job_that_lost_its_status_is_found_in_the_queue(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "8_submitted.pkl").touch()
    assert find_state(tmp_path, {"7": "RUNNING None", "8": "RUNNING None"}) == ("running", "")
    assert find_state(tmp_path, {"7": "RUNNING None"}) == ("missing", "")


def test_the_mini_rows_are_small():
    assert {row.recipe for row in MINI} == set(RECIPES)
    assert [stage.name for row in MINI for stage in row.stages].count("finetune") == 1


@pytest.mark.slow
def test_a_full_memory_is_told_from_a_bug(jpegs, tmp_path):
    """A process that may have 200 MB more than it has at its start, and would need more."""
    out = tmp_path / "out"
    out.mkdir()
    flags = ["--data-path", str(jpegs()), "--model", "deit_tiny_patch16_LS", "--batch-size", "32", "--num-workers", "0",
             "--epochs", "1", "--warmup-epochs", "0", "--no-repeated-aug", "--output-dir", str(out)]  # fmt: skip
    (out / "job.json").write_text(json.dumps({"entry": "deit/main.py", "flags": flags, "most_idle_starts": 5}))
    driver = f"""
import resource, sys
from pathlib import Path
sys.path[0] = {str(ROOT)!r}
from common import train
from scripts.launch.job import run_stage

train_epoch = train.train_epoch

def confined(*args):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, used + 200_000_000))
    return train_epoch(*args)

train.train_epoch = confined
run_stage(Path({str(out)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", driver], capture_output=True, text=True, env=environment(), timeout=240
    )
    assert done.returncode == 1, done.stderr
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "failed" and status["reason"].startswith("out of memory: "), status


@pytest.mark.slow
def test_a_single_run_here_is_stopped_and_goes_on(jpegs, tmp_path):
    """Two processes through torchrun, asked to stop by a signal to the run, and the same command again."""
    out = tmp_path / "out"
    words = ["deit", "--local", "--gpus-per-node", "2", "--", "--data-path", str(jpegs(train=64)), "--model",
             "deit_pico_patch8_LS", "--input-size", "32", "--batch-size", "4", "--num-workers", "0", "--epochs", "30",
             "--no-repeated-aug", "--log-interval", "1", "--output-dir", str(out)]  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "submit.py"), *words]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert first.stdout is not None and any(line.startswith("epoch 1/30  step 3/") for line in first.stdout)
    subprocess.run(["pkill", "-USR2", "--full", f"python[0-9.]* -u .*scripts/launch/job.py {out}"], check=True)
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 3 and "SIGUSR2: stopped " in said
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    again = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)
    assert again.returncode == 0 and "2 processes on cpu" in again.stdout and "continuing at epoch" in again.stdout
    assert (
        "done, so nothing is submitted"
        in subprocess.run(command, capture_output=True, text=True, env=environment()).stdout
    )


def test_a_job_that_an_earlier_version_queued_is_read(tmp_path):
    """Pickled by submitit under that version's name, `scripts.stage.Queued`; read in a process that knows no other."""
    driver = """
import sys
from submitit.core.utils import DelayedSubmission

job = DelayedSubmission.load(sys.argv[1]).function
print(type(job).__module__, type(job).__name__, job.folder)
"""
    done = subprocess.run(
        [sys.executable, "-c", driver, str(ROOT / "tests" / "reference" / "queued_job.pkl")],
        cwd=tmp_path, capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)), timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["scripts.launch.job", "TrainJob", "queued_run"]
