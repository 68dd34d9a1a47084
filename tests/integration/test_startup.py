"""What is answered before PyTorch is imported: help, and mistakes on the command line."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from timm.data import create_transform

from common import args, augsub, flag_types, masking
from scripts.launch.registry import ENTRY_POINTS, RECIPES
from tests.commands import ROOT, environment

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
TOOLS = ("submit", "reproduce", "collect", "compare_digits", "benchmark", "export", "predict")


def answer(entry: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A script's answer, and behind it what it has imported."""
    words = [sys.executable, "-c", LOOK, str(ROOT / entry), *flags]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60)


@pytest.mark.parametrize(
    "entry", [*ENTRY_POINTS.values(), *(f"scripts/{tool}.py" for tool in TOOLS), "tests/chaos/soak.py"]
)
def test_help_is_there_before_pytorch_is(entry):
    said = answer(entry, "--help")
    assert said.returncode == 0 and said.stdout.startswith("usage: ")
    assert said.stderr == "imported:\n"


@pytest.mark.parametrize("entry", ENTRY_POINTS.values())
@pytest.mark.parametrize(("flags", "complaint"), [
    (["--augsub", "mask"], "invalid choice: 'mask'"),
    (["--augsub-ration", "0.5"], "did you mean --augsub-ratio?"),
    (["--batch-size", "0"], "argument --batch-size: '0': expected an integer of at least 1"),
])  # fmt: skip
def test_a_mistake_is_told_before_pytorch_is_there(entry, flags, complaint):
    said = answer(entry, *flags)
    assert said.returncode == 2 and complaint in said.stderr
    assert said.stderr.endswith("imported:\n")


@pytest.mark.parametrize(("words", "sentence"), [
    (["step", "--device", "tpu"], "argument --device: 'tpu': unknown device; use cuda or cpu"),
    (["step", "--threads", "100000"], "--threads 100000: this machine has fewer cores; choose at most "),
    (["step", "--rounds", "²"], "argument --rounds: '²': expected an integer of at least 1"),
    (["step", "--augsub", "masking,"], "--augsub '': unknown drop; choose from none,masking,"),
    (["step", "--json", ""], "argument --json: the path is empty"),
    (["step", "--plot", "figure.png"], "unknown flag --plot"),
    (["data", "--threads", "2"], "unknown flag --threads"),
    (["data", "--variant", "small_400"], "--variant: belongs to one recipe; name it, as in: benchmark.py data swin"),
    (["data", "--data-set", "DIGITS"], "--data-set DIGITS: holds no files to decode; choose IMNET or wds/photographs"),
    (["end-to-end", "--data-set", "CIFAR10"], "--data-set CIFAR10: needs --data-path; photographs are made only for IMNET and wds/photographs"),
    (["data", "--augsub", "none,masking"], "--augsub none,masking: data takes one drop; name one"),
    (["growth", "--plot", "figure.gif"], "--plot figure.gif: unknown file type; use one of .pdf, .png, .svg"),
    (["--rounds", "3", "step"], "--rounds: comes before the command; begin with one of step, data"),
    (["data", "--nonsense"], "unknown flag --nonsense"),
    (["growth", "--processes", "0"], "argument --processes: '0': expected an integer of at least 1"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_the_benchmark_tells_of_a_mistake_before_pytorch_is_there(words, sentence):
    said = answer("scripts/benchmark.py", *words)
    assert said.returncode == 2 and said.stderr.startswith("benchmark.py: error: ") and sentence in said.stderr
    assert said.stderr.endswith("imported:\n")


def test_this_would_notice_pytorch(tmp_path):
    (tmp_path / "heavy.py").write_text("import torch\n")
    assert answer(str(tmp_path / "heavy.py")).stderr.startswith("imported: numpy torch")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_each_function_that_a_recipe_imports_is_there(recipe):
    """Its methods import what needs PyTorch, so that a wrong name would show only when the method is called."""
    sources = [Path(inspect.getfile(kind)).read_text() for kind in type(recipe).__mro__[:2]]
    functions = [node for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    names = [
        (node.module, alias.name)
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert len(names) >= 4
    for module, name in names:
        assert callable(getattr(import_module(module), name))


def test_the_command_line_knows_the_methods_drops_and_block():
    assert args.KINDS == augsub.KINDS and args.BLOCK == masking.BLOCK


def test_timm_makes_each_policy_that_it_is_not_asked_of():
    for policy in flag_types.POLICIES:
        assert create_transform(32, is_training=True, auto_augment=policy)
    published = [{**recipe.defaults, **settings} for recipe in RECIPES.values()
                 for settings in (recipe.digits, *recipe.variants.values())]  # fmt: skip
    assert {settings.get("aa") for settings in published} <= {None, *flag_types.POLICIES}
