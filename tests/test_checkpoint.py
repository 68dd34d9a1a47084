"""Checkpoints: complete or absent, never code, from us, from upstream and from timm."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from common import checkpoint
from deit.models import adapt_weights
from tests.conftest import ROOT, image, reference, tensor_for

SHAPE = {"img_size": 32, "num_classes": 7}


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_LS", **SHAPE | {"depth": 1} | kwargs)


def state(value: float = 1.0) -> dict:
    return {"model": {"weight": torch.full((3,), value)}, "epoch": 4, "best": {}, "args": {"lr": 1.0}}


def test_what_was_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path / "c.pth", state())
    content = checkpoint.load(tmp_path / "c.pth")
    assert torch.equal(content["model"]["weight"], torch.ones(3))
    assert (content["epoch"], content["args"]) == (4, {"lr": 1.0})
    assert os.listdir(tmp_path) == ["c.pth"]


def test_a_failed_save_leaves_the_one_before(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.save(path, state())
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        checkpoint.save(path, state(2.0) | {"cannot be pickled": lambda: None})
    with pytest.raises(FloatingPointError, match="weight of the model holds values that are not finite"):
        checkpoint.save(path, state(float("nan")))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pth"]


def test_a_full_disk_leaves_the_one_before(tmp_path):
    """The limit on file sizes is the kernel's own, set for a process of its own."""
    path = tmp_path / "c.pth"
    checkpoint.save(path, state())
    before = path.read_bytes()
    script = f"""
import resource, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from common import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(Path({str(path)!r}), {{"model": {{"weight": torch.ones(1_000_000)}}}})
except (OSError, RuntimeError) as error:
    print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "stopped\n", done.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pth"]


def test_keep_as_is_a_second_name_that_a_new_save_does_not_touch(tmp_path):
    checkpoint.save(tmp_path / "last.pth", state(1.0))
    checkpoint.keep_as(tmp_path / "last.pth", tmp_path / "best.pth")
    checkpoint.save(tmp_path / "last.pth", state(2.0))
    assert checkpoint.load(tmp_path / "best.pth")["model"]["weight"][0] == 1
    assert sorted(os.listdir(tmp_path)) == ["best.pth", "last.pth"]


class Payload:
    """A pickle that runs a shell command when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    torch.save([1, 2], tmp_path / "list.pth")
    for content, words in (
        (b"", "the file is empty"),
        (whole[: len(whole) // 2], "cut short, or no checkpoint"),
        (b"root:x:0:0:root:/root:/bin/bash\n" * 9, "cut short, or no checkpoint"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            checkpoint.load(path)
    with pytest.raises(ValueError, match="no checkpoint, but a list"):
        checkpoint.load(tmp_path / "list.pth")
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        checkpoint.load(tmp_path / "none.pth")


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickled_code_is_refused_and_not_run(write, tmp_path):
    mark = tmp_path / "was_run"
    write({"model": {"weight": torch.ones(1)}, "args": Payload(mark)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"carries code to run|no checkpoint"):
        checkpoint.load(tmp_path / "c.pth")
    assert not mark.exists()


def test_another_architecture_is_refused_by_its_tensors(tmp_path):
    checkpoint.save(tmp_path / "c.pth", {"model": tiny(embed_dim=96).state_dict()})
    with pytest.raises(
        ValueError, match=r"another architecture: cls_token \(1, 1, 96\) where the model has \(1, 1, 192\)"
    ):
        checkpoint.load_weights(tiny(), tmp_path / "c.pth", adapt_weights)
    checkpoint.save(tmp_path / "c.pth", {"model": tiny(depth=2).state_dict()})
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.weight is none of the model's"):
        checkpoint.load_weights(tiny(), tmp_path / "c.pth", adapt_weights)
    with pytest.raises(ValueError, match="is missing"):
        checkpoint.load_weights(tiny(depth=3), tmp_path / "c.pth", adapt_weights)


def test_upstreams_file_loads(tmp_path):
    part = reference("deit")["forward"]
    weights = {name: tensor_for(name, shape) for name, shape in part["keys"].items()}
    torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "upstream.pth")
    model = timm.create_model(part["model"], **SHAPE)
    checkpoint.load_weights(model, tmp_path / "upstream.pth", adapt_weights)
    with torch.no_grad():
        logits = model.eval()(image(2, 32))
    torch.testing.assert_close(logits, torch.tensor(part["logits"]), rtol=0, atol=1e-5)


def test_safetensors_and_bare_state_dicts_load(tmp_path):
    source = tiny()
    save_file(source.state_dict(), tmp_path / "c.safetensors")
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "bare.pth")
    for name in ("c.safetensors", "bare.pth"):
        model = tiny()
        torch.nn.init.zeros_(model.head.weight)
        checkpoint.load_weights(model, tmp_path / name, adapt_weights)
        assert torch.equal(model.head.weight, source.head.weight)


def test_ours_loads_into_stock_timm(tmp_path):
    model = timm.create_model("deit_small_patch16_LS", num_classes=7).eval()
    checkpoint.save(tmp_path / "c.pth", {"model": model.state_dict(), "model_ema": model.state_dict(), "epoch": 0})
    stock = timm.create_model("deit3_small_patch16_224", num_classes=7, checkpoint_path=str(tmp_path / "c.pth")).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(image(1, 224)), model(image(1, 224)))


def test_a_head_of_another_shape_stays_new_and_positions_are_interpolated(tmp_path):
    checkpoint.save(tmp_path / "c.pth", {"model": tiny(num_classes=3, img_size=64).state_dict()})
    model = tiny()
    head = model.head.weight.clone()
    checkpoint.load_weights(model, tmp_path / "c.pth", adapt_weights, new_head=True)
    assert torch.equal(model.head.weight, head)
    assert model.pos_embed.shape == (1, 4, 192)
    with pytest.raises(ValueError, match=r"head.weight \(3, 192\) where the model has \(7, 192\)"):
        checkpoint.load_weights(tiny(), tmp_path / "c.pth", adapt_weights)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny()
    model.head.bias.data[0] = float("inf")
    torch.save({"model": model.state_dict()}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.load_weights(tiny(), tmp_path / "c.pth", adapt_weights)
