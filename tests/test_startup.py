"""What is answered before PyTorch is imported: help, and mistakes on the command line."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
from timm.data import create_transform

from common import args, augsub, masking
from scripts.table import ENTRIES, RECIPES
from tests.conftest import ROOT, environment

LOOK = """
import runpy, sys
entry = sys.argv[1]
sys.argv = sys.argv[1:]
try:
    runpy.run_path(entry, run_name="__main__")
finally:
    heavy = {"torch", "torchvision", "timm", "numpy"} & sys.modules.keys()
    print("imported:", *sorted(heavy), file=sys.stderr)
"""
TOOLS = ("submit", "reproduce", "collect", "soak", "compare_digits", "benchmark")


def answer(entry: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A script's answer, and behind it what it has imported."""
    words = [sys.executable, "-c", LOOK, str(ROOT / entry), *flags]
    return subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=60)


@pytest.mark.parametrize("entry", [*ENTRIES.values(), *(f"scripts/{tool}.py" for tool in TOOLS)])
def test_help_is_there_before_pytorch_is(entry):
    said = answer(entry, "--help")
    assert said.returncode == 0 and said.stdout.startswith("usage: ")
    assert said.stderr == "imported:\n"


@pytest.mark.parametrize("entry", ENTRIES.values())
@pytest.mark.parametrize(("flags", "complaint"), [
    (["--augsub", "mask"], "invalid choice: 'mask'"),
    (["--augsub-ration", "0.5"], "did you mean --augsub-ratio?"),
    (["--batch-size", "0"], "--batch-size 0: at least 1 is needed"),
])  # fmt: skip
def test_a_mistake_is_told_before_pytorch_is_there(entry, flags, complaint):
    said = answer(entry, *flags)
    assert said.returncode == 2 and complaint in said.stderr
    assert said.stderr.endswith("imported:\n")


@pytest.mark.parametrize(("words", "sentence"), [
    (["step", "--device", "tpu"], "--device tpu: unknown, use cuda or cpu"),
    (["step", "--threads", "100000"], "--threads 100000: this machine has"),
    (["step", "--rounds", "²"], "argument --rounds: '²': a whole number of at least 1 is needed"),
    (["step", "--augsub", "masking,"], "--augsub '': choose from none,masking,"),
    (["step", "--json", ""], "argument --json: a file's name is missing"),
    (["step", "--plot", "figure.png"], "unknown flag --plot"),
    (["data", "--threads", "2"], "unknown flag --threads"),
    (["data", "--variant", "small_400"], "of which recipe is the variant?"),
    (["data", "--data-set", "DIGITS"], "--data-set DIGITS: its images are no files to decode"),
    (["end-to-end", "--data-set", "CIFAR10"], "--data-set CIFAR10 needs --data-path; where there is none, photographs"),
    (["start", "--augsub", "none,masking"], "--augsub none,masking: start takes one drop"),
    (["growth", "--plot", "figure.gif"], "--plot figure.gif: a name that ends in .pdf, .png, .svg is needed"),
    (["--rounds", "3", "step"], "--rounds before the command, which comes first: one of step, data"),
    (["start", "--nonsense"], "unknown flag --nonsense"),
    (["growth", "--processes", "0"], "argument --processes: '0': a whole number of at least 1 is needed"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_the_benchmark_tells_of_a_mistake_before_pytorch_is_there(words, sentence):
    said = answer("scripts/benchmark.py", *words)
    assert said.returncode == 2 and said.stderr.startswith("benchmark.py: error: ") and sentence in said.stderr
    assert said.stderr.endswith("imported:\n")


def test_this_would_notice_pytorch(tmp_path):
    (tmp_path / "heavy.py").write_text("import torch\n")
    assert answer(str(tmp_path / "heavy.py")).stderr.startswith("imported: numpy torch")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_each_function_that_a_recipe_names_is_there(recipe):
    named = [call.__name__ for call in vars(recipe).values() if callable(call) and ":" in call.__name__]
    assert len(named) >= 4
    for module, function in (name.split(":") for name in named):
        assert callable(getattr(import_module(module), function))


def test_the_command_line_knows_the_methods_drops_and_block():
    assert args.KINDS == augsub.KINDS and args.BLOCK == masking.BLOCK


def test_timm_makes_each_policy_that_it_is_not_asked_of():
    for policy in args.POLICIES:
        assert create_transform(32, is_training=True, auto_augment=policy)
    published = [{**recipe.defaults, **settings} for recipe in RECIPES.values()
                 for settings in (recipe.digits, *recipe.variants.values())]  # fmt: skip
    assert {settings.get("aa") for settings in published} <= {None, *args.POLICIES}


def test_arguments_that_are_bound_to_a_late_function_reach_it():
    from common.recipe import late

    assert late("builtins:dict", one=1)(two=2) == {"one": 1, "two": 2}
