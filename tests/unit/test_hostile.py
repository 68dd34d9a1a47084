"""Checkpoints from strangers: each is refused with one sentence, runs nothing, touches no file, and takes no memory
beyond its own size."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from common import rng
from deit import models as deit_models  # noqa: F401 - registers deit_pico_patch8_LS
from tests.commands import ROOT, environment
from tests.runs import FLAGS, load_checkpoint, run_refused

MARK = "was_run"  # a file that code leaves behind


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Builds:
    """Pickles as an object with a state, which is code itself."""

    def __reduce__(self):
        return OrderedDict, (), {"inside": Calls(os.system, f"touch {MARK}")}


class StatesArray:
    """Pickles as a NumPy array of bytes with a shape of one's own."""

    def __init__(self, shape: tuple, data: bytes):
        self.shape, self.data = shape, data

    def __reduce__(self):
        return RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, self.shape, np.dtype("u1"), False, self.data)


RECONSTRUCT: Any = np.zeros(1).__reduce__()[0]
SCALAR: Any = np.float64(1).__reduce__()[0]
LARGE = 3_000_000_000


def good() -> dict:
    """Weights of the model that the tests run."""
    model = timm.create_model("deit_pico_patch8_LS", img_size=32, num_classes=3)
    return {"model": model.state_dict()}


def weights_as(change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    return {"model": {name: change(weight) for name, weight in good()["model"].items()}}


def archive(path: Path, parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in parts.items():
            file.writestr(name, content)


def parts_of(content: dict) -> dict[str, bytes]:
    """The files in torch's archive."""
    written = io.BytesIO()
    torch.save(content, written)
    with zipfile.ZipFile(written) as file:
        return {name: file.read(name) for name in file.namelist()}


def pickled(path: Path, content: bytes) -> None:
    """torch's archive with a pickle of one's own."""
    parts = parts_of(good())
    archive(path, {name: content if name.endswith("data.pkl") else part for name, part in parts.items()})


def zip_bomb(path: Path) -> None:
    parts = parts_of({"model": {"weight": torch.zeros(100_000_000)}})
    archive(path, parts, zipfile.ZIP_DEFLATED)


def overlapping(path: Path) -> None:
    """A thousand names for the same megabyte."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data/0", bytes(1_000_000))
        for number in range(1, 1000):
            again = copy.copy(file.filelist[0])
            again.filename = f"archive/data/{number}"
            file.filelist.append(again)
            file.NameToInfo[again.filename] = again
        for name, part in parts_of(good()).items():
            if "data/" not in name:
                file.writestr(name, part)


def lying(path: Path) -> None:
    """A tensor said to have four billion elements, of which a thousand are there."""
    parts = parts_of({"model": {"weight": torch.zeros(1000)}})
    more = b"\x8a\x05\x00\x28\x6b\xee\x00"  # LONG1 of 4,000,000,000
    parts = {name: part.replace(b"M\xe8\x03", more) if name.endswith("data.pkl") else part
             for name, part in parts.items()}  # fmt: skip
    archive(path, parts)


def lying_as_before_1_6(path: Path) -> None:
    written = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(1000)}}, written, _use_new_zipfile_serialization=False)
    path.write_bytes(written.getvalue().replace(b"M\xe8\x03", b"\x8a\x05\x00\x28\x6b\xee\x00"))


def laughing() -> dict:
    """Two to the thirtieth numbers in thirty lists."""
    value: object = 0
    for _ in range(30):
        value = [value, value]
    return good() | {"best": value}


def endless(path: Path) -> None:
    """A list that holds itself."""
    value: list = []
    value.append(value)
    torch.save(good() | {"best": value}, path)


def header_bomb(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}" * 100)


DATA = bytes(10**6)
HOSTILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "os.system": ("code", lambda path: torch.save(good() | {"args": Calls(os.system, f"touch {MARK}")}, path)),
    "os.system, before 1.6": ("code", lambda path: torch.save(
        good() | {"args": Calls(os.system, f"touch {MARK}")}, path, _use_new_zipfile_serialization=False)),
    "a plain pickle": ("", lambda path: path.write_bytes(pickle.dumps(Calls(os.system, f"touch {MARK}")))),
    "eval": ("code", lambda path: torch.save(good() | {"x": Calls(eval, f"open({MARK!r}, 'w')")}, path)),
    "nested reduce": ("code", lambda path: torch.save(good() | {"x": [{"y": (Builds(),)}]}, path)),
    "getattr of a module": ("code", lambda path: torch.save(
        good() | {"x": Calls(getattr, Calls(__import__, "os"), "system")}, path)),
    "torch.load in a pickle": ("code", lambda path: torch.save(good() | {"x": Calls(torch.load, "other.pth")}, path)),
    "zip bomb": ("compressed", zip_bomb),
    "one part under a thousand names": ("unpack to more than the file holds", overlapping),
    "an expanded tensor": ("larger than what the file holds", lambda path: torch.save(
        {"model": {"weight": torch.zeros(1).expand(10**6, 10**6)}}, path)),
    "many views of a tensor": ("larger than what the file holds", lambda path: torch.save(
        {"model": {f"w{i}": part for i, part in enumerate([torch.zeros(10**6)] * 1000)}}, path)),
    "a tensor without storage": ("larger than what the file holds", lambda path: torch.save(
        {"model": {"weight": torch.zeros(10**9, device="meta")}}, path)),
    "a size that lies": ("", lying),
    "a size that lies, before 1.6": ("", lying_as_before_1_6),
    "lists of lists": ("nests more than", lambda path: torch.save(laughing(), path)),
    "a list that holds itself": ("nests", endless),
    "ten thousand lists in each other": ("", lambda path: pickled(
        path, b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 10_000 + b"a" * 9_999 + b"s.")),
    "an array of three gigabytes": ("arrays of bytes", lambda path: pickled(
        path, b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\n" + b"\x8a\x05\x00\x00\x00\xc0\x00" + b"\x85Rs.")),
    "a NumPy array of three gigabytes in a kilobyte": ("arrays are larger than what the file holds", lambda path: torch.save(
        {"x": StatesArray((LARGE,), bytes(1000))}, path)),
    "a NumPy array of three gigabytes without content": ("arrays are not of numbers", lambda path: torch.save(
        {"x": Calls(RECONSTRUCT, np.ndarray, (LARGE,), b"b")}, path)),
    "a NumPy array that is called": ("arrays are not of numbers", lambda path: torch.save(
        {"x": Calls(np.ndarray, (LARGE,))}, path)),
    "a NumPy scalar of two gigabytes": ("arrays are not of numbers", lambda path: torch.save(
        {"x": Calls(SCALAR, np.dtype("V2000000000"))}, path)),
    "a NumPy array of many dimensions": ("arrays are larger than what the file holds", lambda path: torch.save(
        {"x": StatesArray((2**40,) * 100_000, b"x")}, path)),
    "a NumPy array of negative sides": ("arrays are larger than what the file holds", lambda path: torch.save(
        {"x": StatesArray((-1, -8), bytes(8))}, path)),
    "a NumPy array of objects": ("arrays are not of numbers", lambda path: torch.save(
        {"x": np.array([1, None], dtype=object)}, path)),
    "a thousand NumPy arrays of the same bytes": ("tensors are larger than what the file holds", lambda path: torch.save(
        {"x": [StatesArray((10**6,), DATA) for _ in range(1000)]}, path)),
    "three gigabytes of bytes": ("", lambda path: torch.save({"x": Calls(bytes, LARGE)}, path)),
    "a text that is encoded a thousand times": ("copies its strings", lambda path: pickled(
        path, b"\x80\x02}X\x01\x00\x00\x00x](c_codecs\nencode\nq\x00X" + len(DATA).to_bytes(4, "little") + DATA
        + b"X\x06\x00\x00\x00latin1\x86q\x01R" + b"h\x00h\x01R" * 1000 + b"es.")),
    "two million tuples in each other": ("nests more than", lambda path: pickled(
        path, b"\x80\x02}K\x01" + b"\x85" * 2_000_000 + b"K\x01s.")),
    "a key of many tuples": ("nests more than", lambda path: pickled(
        path, b"\x80\x02}K\x01" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60)) + b"K\x01s.")),
    "a key of three thousand tuples": ("nests more than", lambda path: pickled(
        path, b"\x80\x02}K\x01" + b"\x85" * 3_000 + b"K\x01s.")),
    "a key that is a tuple": ("keys that are neither names nor numbers", lambda path: torch.save(good() | {"x": {(1, 2): 3}}, path)),
    "conjugated weights": ("conjugated", lambda path: torch.save(
        {"model": {"w": torch.zeros(3, dtype=torch.complex64).conj()}}, path)),
    "a digest that cannot be": ("", lambda path: torch.save(
        good() | {"digest": "0", "x": torch.zeros(3).expand(3, 3)}, path)),
    "sparse weights": ("sparse", lambda path: torch.save({"model": {"w": torch.zeros(9).to_sparse()}}, path)),
    "names like paths": ("another architecture", lambda path: torch.save(
        {"model": {"../../../../etc/passwd": torch.zeros(3), "/root/.bashrc": torch.zeros(3)}}, path)),
    "parts named like paths": ("", lambda path: archive(
        path, {f"archive/../../{MARK}": b"x", "archive/data.pkl": pickle.dumps({})})),
    "whole numbers for weights": ("of torch.int32 where the model has torch.float32", lambda path: torch.save(
        weights_as(lambda weight: weight.int()), path)),
    "complex weights": ("of torch.complex64 where", lambda path: torch.save(
        weights_as(lambda weight: weight.to(torch.complex64)), path)),
    "words for weights": ("holds no weights", lambda path: torch.save({"model": {"head.weight": "ones"}}, path)),
    "NaN": ("not finite", lambda path: torch.save(weights_as(lambda weight: weight * float("nan")), path)),
    "NaN.safetensors": ("not finite", lambda path: save_file(
        weights_as(lambda weight: weight * float("nan"))["model"], path)),
    "header.safetensors": ("not a checkpoint", header_bomb),
}  # fmt: skip


@pytest.fixture(scope="module")
def files_of_strangers(tmp_path_factory):
    """The files, in a folder of their own."""
    folder = tmp_path_factory.mktemp("strangers")
    for name, (_, write) in HOSTILE.items():
        write(place_of(folder, name))
    return folder


def place_of(folder: Path, name: str) -> Path:
    suffix = "" if name.endswith(".safetensors") else ".pth"
    return folder / f"{name.replace(' ', '_').replace(',', '')}{suffix}"


def seen(*folders: Path) -> dict[str, int]:
    """All files and when they changed."""
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_one_sentence(name, files_of_strangers, jpegs, tmp_path, capsys, monkeypatch):
    """To evaluate, to go on from, to start from; and in the place of a run's own checkpoint."""
    path, words = place_of(files_of_strangers, name), HOSTILE[name][0]
    data = str(jpegs(train=8, val=2, classes=("cat", "dog", "owl")))
    out, own = tmp_path / "out", tmp_path / "own"
    own.mkdir()
    (own / "checkpoint.pth").write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    before = seen(tmp_path, files_of_strangers)
    flags = ["--data-path", data, "--output-dir"]
    for more in (["--eval", "--resume", str(path)], ["--resume", str(path)], ["--finetune", str(path)]):
        error = run_refused(capsys, *flags, str(out), *more)
        assert words in error and str(path) in error, error
    if not name.endswith(".safetensors"):
        assert str(own) in run_refused(capsys, *flags, str(own))
    assert seen(tmp_path, files_of_strangers) == before, "no file is made, changed or removed"


def test_the_files_are_dangerous(files_of_strangers, tmp_path, monkeypatch):
    """What refuses them is us: an unpickler of any object runs their code."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "os.system, before 1.6", "eval", "nested reduce"):
        torch.load(place_of(files_of_strangers, name), weights_only=False)
        assert Path(MARK).exists()
        Path(MARK).unlink()
    pickle.loads(place_of(files_of_strangers, "a plain pickle").read_bytes())
    assert Path(MARK).exists()


@pytest.mark.slow
def test_hostile_files_take_no_memory(files_of_strangers):
    """In a process that reads one after the other; the bomb alone would take 400 MB, and others more than there is."""
    driver = f"""
import resource, sys
sys.path[0] = {str(ROOT)!r}
import timm
from common.checkpoint.weights import load_weights

model = timm.create_model("resnet10t")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = peak()
for path in sys.argv[1:]:
    try:
        load_weights(model, path, lambda weights, model: weights)
    except ValueError:
        continue
    raise SystemExit(f"{{path}} was not refused")
print(peak() - start)
"""
    paths = [str(place_of(files_of_strangers, name)) for name in HOSTILE]
    done = subprocess.run([sys.executable, "-c", driver, *paths], capture_output=True, text=True, env=environment(),
                          timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150_000, f"{done.stdout} kB"


@pytest.mark.parametrize("change", [
    {"epoch": "one"}, {"epoch": None}, {"best": [1]}, {"best": {"acc1": "high"}}, {"position": {"update": 1}, "own": None},
    {"position": {"update": 1, "evil": 2}}, {"position": 7}, {"processes": None}, {"args": {"batch_size": []}},
    {"position": {"update": 1, "rates": 0.0, "total": [], "window": []}, "own": []},
    {"position": {"update": 1, "rates": 0.0, "total": [], "window": []}, "own": [{"window": [], "random": {}, "buffers": {}}]},
    {"position": {"update": 1, "rates": 0.0, "total": [], "window": []},
     "own": [{"window": [], "random": {}, "buffers": {"nowhere": torch.zeros(3)}}]},
    {"epoch": -100}, {"epoch": float("inf")}, {"epoch": True}, {"best": {"acc1": float("nan"), "epoch": 0}}, {"log": [{"epoch": "x"}]},
    *({"position": {"update": update, "rates": 0.0, "total": [8.0, 1.0, 1.0], "window": []},
       "own": [{"window": [8.0, 1.0, 1.0], "random": {}, "buffers": {}}]} for update in (-5, 10**6, 2.5, "a", 6)),
    {"position": {"update": 2, "rates": "x", "total": [8.0, 1.0, 1.0], "window": []}, "own": [{"window": [8.0, 1.0, 1.0]}]},
    {"position": {"update": 2, "rates": 0.0, "total": [], "window": []}, "own": [{"window": []}]},
    {"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"optimizer": None},
], ids=str)  # fmt: skip
def test_what_looks_like_ours_but_is_not_is_refused(change, continued, capsys):
    """Without a digest, which a stranger could give it too."""
    flags, out = continued
    content = load_checkpoint(out)
    for old in out.glob("*checkpoint*"):
        old.unlink()
    torch.save(content | change, out / "checkpoint.pth")
    before = seen(out)
    error = run_refused(capsys, *flags)
    assert str(out / "checkpoint.pth") in error
    assert seen(out) == before


@pytest.mark.parametrize(("name", "value", "words"), [
    ("exp_avg", torch.full((64,), float("nan")), "is not finite"),
    ("exp_avg", torch.zeros(7), "exp_avg (7,) for a parameter"),
])  # fmt: skip
def test_what_an_optimizer_remembers_is_looked_at(name, value, words, continued, capsys):
    flags, out = continued
    content = load_checkpoint(out)
    group = content["optimizer"]["param_groups"][0]["params"]
    place = next(number for number in group if content["optimizer"]["state"][number]["exp_avg"].ndim == 1)
    content["optimizer"]["state"][place][name] = value
    for old in out.glob("*checkpoint*"):
        old.unlink()
    torch.save(content, out / "checkpoint.pth")
    assert words in run_refused(capsys, *flags)


def test_a_generator_is_not_set_beyond_its_end():
    state = rng.get_rng_state()
    kind, keys, _, *rest = state["numpy"]
    for place in (10**9, -1, 625):
        with pytest.raises(ValueError, match="out of range"):
            rng.set_rng_state(state | {"numpy": (kind, keys, place, *rest)})


def test_the_flags_of_these_tests_are_good(continued, capsys):
    """So that what is refused above is refused for the file."""
    flags, _ = continued
    assert "--model" in FLAGS and flags
    file = Path(flags[-1], "good.pth")
    torch.save(good(), file)
    data = flags[flags.index("--data-path") + 1]
    from tests.runs import start

    start("--data-path", data, "--eval", "--resume", str(file))
    assert "images:" in capsys.readouterr().out
