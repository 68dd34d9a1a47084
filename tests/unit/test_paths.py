"""`~` is the home folder in each flag that names a file or a folder, wherever its value comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.args import parse
from common.flag_types import weights_source
from scripts import collect, compare_digits, reproduce, submit
from scripts.bench.args import parse_modes
from scripts.launch import job
from scripts.launch.registry import RECIPES

FLAGS = {
    "--data-path": "data_path",
    "--data-dir": "data_path",
    "--output-dir": "output_dir",
    "--output": "output_dir",
    "--resume": "resume",
    "--finetune": "finetune",
    "--pretrained": "finetune",
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_flags_of_all_recipes(recipe, flag, home):
    for words in ([f"{flag}=~/a b"], [flag, "~/a b"]):
        value = getattr(parse(recipe, ["--data-path", "x", *words]), FLAGS[flag])
        folder = "/swin_tiny_patch4_window7_224/default" if recipe.name == "swin" and "output" in flag else ""
        assert value == f"{home}/a b{folder}"


def test_swins_files_and_options(home):
    (home / "my.yaml").write_text(
        "DATA: {DATA_PATH: ~/images}\nOUTPUT: ~/out\nMODEL: {RESUME: ~/r.pth, PRETRAINED: ~/p.pth}"
    )
    options = [
        "DATA.DATA_PATH",
        "~/images",
        "OUTPUT",
        "~/out",
        "MODEL.RESUME",
        "~/r.pth",
        "MODEL.PRETRAINED",
        "~/p.pth",
    ]
    for words in (["--cfg=~/my.yaml"], ["--opts", *options]):
        args = parse(RECIPES["swin"], words)
        assert (args.data_path, args.resume, args.finetune) == tuple(
            f"{home}/{n}" for n in ("images", "r.pth", "p.pth")
        )
        assert args.output_dir == f"{home}/out/swin_tiny_patch4_window7_224/default"


def test_flags_of_one_recipe(home):
    assert parse(RECIPES["mae"], ["--log-dir=~/curves"]).log_dir == f"{home}/curves"
    assert parse(RECIPES["resnet_rsb"], ["~/images"]).data_path == f"{home}/images"


def test_addresses_are_left_alone(home):
    for address in ("https://host/~user/w.pth", "hf-hub:timm/vit~x", "local-dir:/w", "timm", "", "./~", "w~"):
        assert weights_source(address) == address
    assert weights_source("local-dir:~/w") == f"local-dir:{home}/w"
    assert parse(RECIPES["deit"], ["--finetune=local-dir:~/w"]).finetune == f"local-dir:{home}/w"


def test_the_benchmarks_files(home):
    flags = ["--json=~/f.json", "--plot=~/f.png", "--data-path=~/images", "--model", "deit_pico_patch8_LS"]
    args = parse_modes("growth", RECIPES["deit"], flags)[0].args
    assert (args.json, args.plot, args.data_path) == tuple(f"{home}/{n}" for n in ("f.json", "f.png", "images"))


def run_script(script, *words: str, monkeypatch, capsys) -> tuple[str | int | None, str]:
    """A script in this process → its exit code, what it printed."""
    monkeypatch.setattr("sys.argv", [script.__name__, *words])
    with pytest.raises(SystemExit) as leaving:
        script.main()
    said = capsys.readouterr()
    return int(leaving.value.code or 0), said.out + said.err


def test_folders_of_the_launcher(home, monkeypatch, capsys):
    run = lambda *words: run_script(*words, monkeypatch=monkeypatch, capsys=capsys)  # noqa: E731
    words = ["swin", "--data-path=~/images", "--output=~/out"]
    code, said = run(reproduce, *words)
    assert code == 2 and f"{home}/images has no folder train" in said
    for split in ("train", "val"):
        (home / "images" / split / "cat").mkdir(parents=True)
    code, said = run(reproduce, "mae", *words[1:], "--mae-weights=~/mae")
    assert code == 2 and f"--mae-weights: no file {home}/mae/mae_pretrain_vit_base.pth" in said
    code, said = run(collect, "--output=~/none")
    assert code == 2 and f": --output {home}/none: no such folder; scripts/reproduce_table.sh creates it" in said
    (home / "out" / "x").mkdir(parents=True)
    code, said = run(collect, "--output=~/out", "--plot=~/none/f.png")
    assert code == 2 and f"--plot {home}/none/f.png: not writable (No such file or directory)" in said
    code, said = run(job, "~/out")
    assert code == 2 and said == f"job.py: error: {home}/out: no job.json; scripts/submit.py creates such folders\n"
    assert submit.output_folder(["--output-dir=~/out"]) == home / "out"


def test_a_run_that_is_submitted(home, monkeypatch, capsys):
    """Its folder is done already, so nothing is started."""
    (home / "out").mkdir()
    (home / "out" / "status.json").write_text(json.dumps({"state": "done"}))
    monkeypatch.setattr("sys.argv", ["submit.py", "deit", "--local", "--", "--output-dir=~/out"])
    submit.main()
    assert capsys.readouterr().out == f"{home}/out: done, so nothing is submitted\n"


def test_the_comparison_on_the_digits(home, monkeypatch, capsys):
    """Its one run is done already, so nothing is started."""
    folder = home / "out" / "deit" / "none-0"
    folder.mkdir(parents=True)
    (folder / "seconds.json").write_text(json.dumps({"seconds": 61.2, "settings": ["deit/main.py"]}))
    (folder / "log.txt").write_text(json.dumps({"epoch": 0, "train_loss": 0.5, "test_acc1": 90.0}))
    words = ["deit/main.py", "--augsub", "none", "--seeds", "1", "--output-dir=~/out"]
    monkeypatch.setattr("sys.argv", ["compare_digits.py", *words])
    compare_digits.main()
    assert capsys.readouterr().out.splitlines()[-1] == "| none | 0.5000 ± 0.0000 | 90.00 ± 0.00 | 61 ± 0 | 1 |"
