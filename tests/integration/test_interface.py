"""Flags, names and shapes are those of the reference; `python tests/interface.py` records an intended change."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.interface import ENTRIES, REFERENCE, ROOT, describe, files_of, help_of, parse_help, plan_of

HELP = """usage: prog [-h] --list [PATTERN] [--amp {off,bf16}] [--lr LR] [--pin | --no-pin] [rows ...] {b,a}

What it does.

    prog --list                       an example

positional arguments:
  rows                  which rows (default: all
                        of them)
  {b,a}

options:
  -h, --help            show this help message and exit
  --list [PATTERN]      such as 'swin*'

numbers:
  --amp {off,bf16}      precision
  --lr LR, --learning-rate LR
                        of the optimizer (default: 0.1)
  --pin, --no-pin       (default: True)
"""


def test_each_command_line_has_the_flags_of_the_reference():
    expected, found = json.loads((REFERENCE / "help.json").read_text()), help_of(ROOT)
    assert found.keys() == expected.keys()
    for command, flags in expected.items():
        assert shown(found[command], flags) == flags, command


def shown(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """The flags without the defaults that the reference does not know, since a flag without help shows none."""
    without = {flag: {name: item for name, item in value.items() if name != "default"}
               for flag, value in found.items()
               if flag in expected and "default" not in expected[flag] and value != "not offered"}  # fmt: skip
    return {**found, **without}


@pytest.mark.slow
def test_the_plan_of_the_table_is_the_references():
    assert plan_of(ROOT) == (REFERENCE / "plan.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ENTRIES)
def test_a_run_leaves_the_files_of_the_reference(recipe, tmp_path):
    expected, found = json.loads((REFERENCE / f"{recipe}.json").read_text()), files_of(ROOT, recipe, tmp_path)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name


def test_help_is_read_whatever_its_order_and_words():
    flags = parse_help(HELP)
    assert flags == {
        "rows": {"metavar": "rows", "default": "all of them"},
        "a,b": {"choices": ["a", "b"], "required": True},
        "--help -h": {},
        "--list": {"metavar": "[PATTERN]", "required": True},
        "--amp": {"choices": ["bf16", "off"]},
        "--learning-rate --lr": {"metavar": "LR", "default": "0.1"},
        "--no-pin --pin": {"default": "True"},
    }
    amp = "  --amp {off,bf16}      precision\n"
    assert amp in HELP
    assert parse_help(HELP.replace(amp, "") + "  --amp {bf16,off}      of what?\n") == flags
    assert parse_help(HELP.replace("--lr LR, --learning-rate LR", "--learning-rate LR, --lr LR")) == flags
    assert parse_help(HELP.replace("0.1)", "0.2)")) != flags


def test_a_list_is_described_by_its_length():
    assert describe({"b": (1, 2, 3), "a": [None, "x"]}) == {"a": ["NoneType", "str"], "b": {"3 times": "int"}}
