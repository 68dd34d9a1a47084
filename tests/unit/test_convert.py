"""scripts/convert.py: the weights come out of pickles that hold objects, and nothing in them runs."""

from __future__ import annotations

import builtins
import os
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint.io import StandIn
from scripts.convert import main
from tests.unit.test_hostile import Calls

MARK = "was_run"  # a file that code leaves behind
WEIGHTS = {"layers.0.weight": torch.arange(6.0).reshape(2, 3), "layers.0.bias": torch.ones(2, dtype=torch.float16)}


def convert(monkeypatch, *words: str) -> int:
    """Run the command line in this process → its exit code."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *words])
    try:
        main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


@pytest.fixture
def cfg_node(monkeypatch):
    """yacs' CfgNode, as far as its pickle goes: a dict with attributes."""
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module = types.ModuleType("yacs.config")
    module.CfgNode = node
    for name, value in (("yacs", types.ModuleType("yacs")), ("yacs.config", module)):
        monkeypatch.setitem(sys.modules, name, value)
    return node


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "before 1.6"])
def test_swins_own_checkpoint(zipped, cfg_node, tmp_path, monkeypatch, capsys):
    """With its configuration, a path and a defaultdict beside the weights."""
    config = cfg_node(MODEL=cfg_node(TYPE="swin", DEPTHS=[2, 2]), DATA=cfg_node())
    config.__dict__["__immutable__"] = True
    counts = defaultdict(list, {"a": [1], (1, 2): [None]})
    content = {
        "model": WEIGHTS,
        "epoch": 299,
        "max_accuracy": 81.2,
        "config": config,
        "out": Path("x"),
        "counts": counts,
    }
    torch.save(content | {"args": StandIn}, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    for name in ("yacs.config", "yacs"):
        monkeypatch.delitem(sys.modules, name)
    target = tmp_path / "c.safetensors"
    assert convert(monkeypatch, str(tmp_path / "c.pth"), str(target)) == 0
    assert capsys.readouterr().out == f"{target}: 2 tensors, 0.0 MB, of model in {tmp_path}/c.pth\n"
    converted = load_file(target)
    assert converted.keys() == WEIGHTS.keys()
    assert all(
        torch.equal(converted[name], weight) and converted[name].dtype is weight.dtype
        for name, weight in WEIGHTS.items()
    )
    assert "yacs" not in sys.modules, "nothing was imported"


def test_prefixes_ties_and_averages(tmp_path, monkeypatch):
    tied = torch.ones(3)
    torch.save(
        {"state_dict_ema": {"module.a": tied, "module.b": tied, "module.c": tied[:2]}, "x": Path("x")},
        tmp_path / "c.pth",
    )
    assert convert(monkeypatch, str(tmp_path / "c.pth"), str(tmp_path / "c.safetensors")) == 0
    converted = load_file(tmp_path / "c.safetensors")
    assert {name: len(weight) for name, weight in converted.items()} == {"a": 3, "b": 3, "c": 2}


class SetsState:
    """Pickles as a call whose result gets a state, which is a call itself."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return Counter, (), {"inside": Calls(*self.call), "__setstate__": Calls(*self.call)}


class SlotState(SetsState):
    def __reduce__(self):
        return OrderedDict, (), (None, {"update": Calls(*self.call), "__class__": Calls(*self.call)})


class Slotted:
    """Pickles as an object with a tuple for its state."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Items(SetsState):
    def __reduce__(self):
        return defaultdict, (list,), None, None, iter([("key", Calls(*self.call))])


class Appends(SetsState):
    def __reduce__(self):
        return deque, (), None, iter([Calls(*self.call)])


SHELL = (os.system, f"touch {MARK}")
CODE = f"open({MARK!r}, 'w')"
HOSTILE = {
    "os.system": Calls(*SHELL),
    "exec": Calls(builtins.exec, CODE),
    "eval": Calls(builtins.eval, CODE),
    "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
    "open": Calls(open, MARK, "w"),
    "state": SetsState(exec, CODE),
    "state of a shell": SetsState(*SHELL),
    "slots": SlotState(exec, CODE),
    "items": Items(exec, CODE),
    "appended": Appends(exec, CODE),
    "nested": {"a": [({"b": (Calls(exec, Calls(str, CODE)),)},)]},
    "torch.load": Calls(torch.load, "other.pth"),
    "object with slots": Slotted(Calls(exec, CODE)),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "before 1.6"])
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_runs(name, zipped, tmp_path, monkeypatch, capsys):
    """Either the weights come out, or the file is refused with one sentence; nothing is run, imported or written."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS, "args": HOSTILE[name]}, "c.pth", _use_new_zipfile_serialization=zipped)
    modules = set(sys.modules)
    code = convert(monkeypatch, "c.pth", "c.safetensors")
    said = capsys.readouterr()
    assert not Path(MARK).exists()
    assert set(sys.modules) - modules <= {"safetensors.torch"}
    if code:
        assert code == 2 and said.err.count("\n") == 1 and said.err.startswith("convert.py: error: c.pth: "), said.err
        assert sorted(os.listdir()) == ["c.pth"]
    else:
        assert torch.equal(load_file("c.safetensors")["layers.0.weight"], WEIGHTS["layers.0.weight"])
    assert code == (2 if name in ("os.system", "state of a shell", "slots", "appended") else 0), said.err


def test_the_pickles_are_dangerous(tmp_path, monkeypatch):
    """An unpickler of any object runs what is in them."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "exec", "state", "items", "nested", "open"):
        torch.save({"args": HOSTILE[name]}, "c.pth")
        torch.load("c.pth", weights_only=False)
        assert Path(MARK).exists(), name
        Path(MARK).unlink()


def test_what_stands_in_is_empty_and_inert():
    inert = StandIn(exec, CODE)
    inert.__setstate__({"__class__": int})
    assert type(inert) is Counter and not inert


@pytest.mark.parametrize(("content", "words"), [
    ({"epoch": 3, "x": Path("x")}, "c.pth: holds no weights"),
    ([1, 2], "not a checkpoint: expected a dict, found list"),
])  # fmt: skip
def test_bad_input_is_one_sentence(content, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "c.pth")
    assert convert(monkeypatch, "c.pth", "c.safetensors") == 2
    assert words in capsys.readouterr().err
    assert convert(monkeypatch, "none.pth", "c.safetensors") == 2
    assert "none.pth: no such file" in capsys.readouterr().err
    assert convert(monkeypatch, "c.pth", "c.pth") == 2
    assert "expected a name that ends in .safetensors" in capsys.readouterr().err
    assert convert(monkeypatch, "c.pth", "none/c.safetensors") == 2
    assert "not writable" in capsys.readouterr().err
    assert os.listdir() == ["c.pth"]
