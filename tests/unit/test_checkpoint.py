"""Checkpoints: complete or absent, never code, from us, from upstream and from timm."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from common import run_dir as folder
from common.checkpoint import io as files
from common.checkpoint.manager import save_checkpoint
from common.checkpoint.weights import load_weights
from deit.models import adapt_weights
from tests.published import image, reference, tensor_for

SHAPE = {"img_size": 32, "num_classes": 7}


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_LS", **SHAPE | {"depth": 1} | kwargs)


def state(value: float = 1.0, size: int = 3) -> dict:
    return {"model": {"weight": torch.full((size,), value)}, "epoch": 4, "best": {}, "args": {"lr": 1.0}}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in a folder of its own, which has to be there unharmed at the end."""
    path = tmp_path / "run" / "c.pth"
    path.parent.mkdir()
    save_checkpoint(path, state())
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["c.pth"], "nothing is left over"


def test_what_was_saved_comes_back(saved):
    content = files.load(saved)
    assert torch.equal(content["model"]["weight"], torch.ones(3))
    assert (content["epoch"], content["args"]) == (4, {"lr": 1.0})


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_save_that_fails_midway_leaves_the_one_before(failure, saved):
    with pytest.raises(failure), folder.atomic_write(saved) as file:
        file.write(b"half of it")
        file.flush()
        raise failure


def test_a_state_that_cannot_be_written_leaves_the_one_before(saved):
    with pytest.raises(AttributeError):
        save_checkpoint(saved, state(2.0) | {"cannot be pickled": lambda: None})


@pytest.mark.parametrize("part", ["model", "model_ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_never_holds_a_weight_that_is_not_finite(part, value, saved):
    bad = state() | {part: {"fine": torch.ones(2), "weight": torch.tensor([1.0, value])}}
    with pytest.raises(FloatingPointError, match=f"weight of the {part} is not finite"):
        save_checkpoint(saved, bad)


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(os, "fsync", lambda fd, fsync=os.fsync: (steps.append("flush"), fsync(fd)))

    def replace(aside, path, replace=os.replace):
        steps.append("rename")
        assert torch.load(aside, weights_only=True)["epoch"] == 4
        replace(aside, path)

    monkeypatch.setattr(os, "replace", replace)
    save_checkpoint(tmp_path / "c.pth", state())
    assert steps == ["flush", "rename", "flush"], "the file, its name, the folder that holds the name"


def test_a_disk_that_is_full_leaves_the_one_before(small_disk):
    path = small_disk("500k") / "c.pth"
    save_checkpoint(path, state(size=75_000))
    before = path.read_bytes()
    with pytest.raises((OSError, RuntimeError)):
        save_checkpoint(path, state(2.0, size=75_000))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["c.pth"]


def test_a_limit_on_file_sizes_leaves_the_one_before(saved):
    """The kernel's own limit, where no disk can be mounted."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises((OSError, RuntimeError)):
            save_checkpoint(saved, state(size=1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_called_one(small_disk):
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(small_disk("100k") / "c.pth", state(size=1_000_000))


@pytest.mark.parametrize("links", [True, False])
def test_link_or_copy_makes_another_file_that_a_new_save_does_not_touch(links, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "best.pth").write_text("an earlier best")
    save_checkpoint(tmp_path / "last.pth", state(1.0))
    folder.link_or_copy(tmp_path / "last.pth", tmp_path / "best.pth")
    assert (tmp_path / "last.pth").samefile(tmp_path / "best.pth") is links
    save_checkpoint(tmp_path / "last.pth", state(2.0))
    assert files.load(tmp_path / "best.pth")["model"]["weight"][0] == 1
    assert files.load(tmp_path / "last.pth")["model"]["weight"][0] == 2
    assert sorted(os.listdir(tmp_path)) == ["best.pth", "last.pth"]


def refusal(path: Path) -> str:
    """Why a file is no checkpoint."""
    with pytest.raises(ValueError) as refused:
        files.load(path)
    sentence = str(refused.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence
    return sentence


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.pth")
    assert "a folder, not a checkpoint" in refusal(tmp_path)
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).write_bytes(b"")
        assert "the file is empty" in refusal(tmp_path / name)
    (tmp_path / "text.safetensors").write_text("no tensors in here, but words")
    assert "not a checkpoint" in refusal(tmp_path / "text.safetensors")
    (tmp_path / "text.pth").write_text("root:x:0:0:root:/root:/bin/bash\n")
    assert "not a checkpoint" in refusal(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "not a checkpoint: expected a dict, found list" in refusal(tmp_path / "list.pth")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(share, tmp_path):
    path = tmp_path / "c.pth"
    save_checkpoint(path, state(size=1000))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "truncated, or not a checkpoint" in refusal(path)


@pytest.mark.parametrize("content", [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", b"<!DOCTYPE html><html></html>",
    b'{"error": "not found"}', b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
], ids=["git-lfs pointer", "web page", "JSON", "JPEG"])  # fmt: skip
def test_what_is_no_checkpoint_is_not_called_dangerous(content, tmp_path):
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    assert "not a checkpoint" in refusal(path)


class Payload:
    """A pickle that runs a shell command when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


WRITERS = {
    "torch": torch.save,
    "torch, as before 1.6": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
} | {
    f"pickle {protocol}": lambda content, path, protocol=protocol: path.write_bytes(pickle.dumps(content, protocol))
    for protocol in (0, 2, 4)
}


@pytest.fixture(params=WRITERS)
def armed(request, tmp_path):
    """A file whose code, as an unpickler of any object shows, does run → the file and what its code leaves behind."""
    mark, path = tmp_path / "was_run", tmp_path / "c.pth"
    WRITERS[request.param]({"model": {"weight": torch.ones(1)}, "args": Payload(mark)}, path)
    if request.param.startswith("pickle"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    mark.unlink()
    return path, mark


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_refused_and_not_run(armed):
    path, mark = armed
    refusal(path)
    assert not mark.exists()


def test_pickled_code_is_called_that(tmp_path):
    torch.save({"model": {"weight": torch.ones(1)}, "args": Payload(tmp_path / "was_run")}, tmp_path / "c.pth")
    name = f"{os.system.__module__}.system"
    words = f"refused: contains pickled code ({name}); only tensors and plain values are loaded"
    assert words in refusal(tmp_path / "c.pth")


def test_a_pickled_model_is_code_too(tmp_path):
    torch.save({"model": tiny()}, tmp_path / "c.pth")
    assert "refused: contains pickled code (timm.models.vision_transformer" in refusal(tmp_path / "c.pth")


def test_another_architecture_is_refused_by_its_tensors(tmp_path):
    def refused(words: str, theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
        before = {name: value.clone() for name, value in ours.state_dict().items()}
        save_checkpoint(tmp_path / "c.pth", {"model": theirs.state_dict()})
        with pytest.raises(ValueError, match=rf"c\.pth: another architecture: .*{words}"):
            load_weights(ours, tmp_path / "c.pth", adapt_weights)
        assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())

    refused(r"cls_token \(1, 1, 96\) where the model has \(1, 1, 192\)", tiny(embed_dim=96), tiny())
    refused(r"unexpected key blocks\.1\.norm1\.weight", tiny(depth=2), tiny())
    refused(r"missing key blocks\.1\.norm1\.weight; .*; .* and 11 more", tiny(), tiny(depth=2))
    refused("missing key cls_token", timm.create_model("resnet18", num_classes=7), tiny())


@pytest.mark.parametrize("case", ["class token with a position", "a model without positions"])
def test_another_architectures_positions_are_refused(case, tmp_path):
    """As a plain timm ViT's or MAE's file has them, which a user may well hand to --finetune."""
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, depth=1)
    save_checkpoint(tmp_path / "c.pth", {"model": theirs.state_dict()})
    ours = tiny() if case.startswith("class") else timm.create_model("resnet18", num_classes=7)
    with pytest.raises(ValueError, match="another architecture"):
        load_weights(ours, tmp_path / "c.pth", adapt_weights)


def test_a_checkpoint_without_weights_is_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c\.pth"):
        load_weights(tiny(), tmp_path / "c.pth", adapt_weights)


def test_upstreams_file_loads(tmp_path):
    part = reference("deit")["forward"]
    weights = {name: tensor_for(name, shape) for name, shape in part["keys"].items()}
    assert any(name.endswith(".gamma_1") for name in weights)
    torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "upstream.pth")
    model = timm.create_model(part["model"], **SHAPE)
    load_weights(model, tmp_path / "upstream.pth", adapt_weights)
    with torch.no_grad():
        logits = model.eval()(image(2, 32))
    torch.testing.assert_close(logits, torch.tensor(part["logits"]), rtol=0, atol=1e-5)


def test_safetensors_and_bare_state_dicts_load(tmp_path):
    source = tiny()
    save_file(source.state_dict(), tmp_path / "c.safetensors")
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "ddp.pth")
    for name in ("c.safetensors", "bare.pth", "ddp.pth"):
        model = tiny()
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        load_weights(model, tmp_path / name, adapt_weights)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_part_that_is_asked_for_is_loaded(tmp_path):
    raw, averaged, model = tiny(), tiny(), tiny()
    torch.nn.init.ones_(averaged.head.bias)
    save_checkpoint(tmp_path / "c.pth", {"model": raw.state_dict(), "model_ema": averaged.state_dict()})
    for part, bias in (("model_ema", 1), ("model", 0)):
        load_weights(model, tmp_path / "c.pth", adapt_weights, part=part)
        assert model.head.bias.tolist() == [bias] * 7


def test_ours_loads_into_stock_timm(tmp_path):
    """timm takes the averaged weights where there are any."""
    path = str(tmp_path / "c.pth")
    ours = timm.create_model("deit_small_patch16_LS", num_classes=7).eval()
    raw = {name: torch.zeros_like(value) for name, value in ours.state_dict().items()}
    with torch.no_grad():
        expected = ours(image(1, 224))
        for part, content in (("model", {"model_ema": None}), ("model_ema", {"model": raw})):
            save_checkpoint(
                Path(path), {part: ours.state_dict(), "epoch": 0, "best": {}, "args": {"lr": 1.0}} | content
            )
            stock = timm.create_model("deit3_small_patch16_224", num_classes=7, checkpoint_path=path).eval()
            assert torch.equal(stock(image(1, 224)), expected)
        again = timm.create_model("deit_small_patch16_LS", num_classes=7, checkpoint_path=path).eval()
        assert torch.equal(again(image(1, 224)), expected)


def test_a_head_of_another_shape_stays_new_and_positions_are_interpolated(tmp_path):
    source = tiny(num_classes=3, img_size=64)
    save_checkpoint(tmp_path / "c.pth", {"model": source.state_dict()})
    model = tiny()
    torch.nn.init.zeros_(model.patch_embed.proj.weight)
    head = model.head.weight.clone()
    load_weights(model, tmp_path / "c.pth", adapt_weights, new_head=True)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    grid = source.pos_embed.reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    smaller = torch.nn.functional.interpolate(grid, (2, 2), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed, smaller.permute(0, 2, 3, 1).reshape(1, 4, 192))
    with pytest.raises(ValueError, match=r"head.weight \(3, 192\) where the model has \(7, 192\)"):
        load_weights(tiny(), tmp_path / "c.pth", adapt_weights)


def test_a_head_of_the_same_shape_is_taken(tmp_path):
    source, model = tiny(), tiny()
    torch.nn.init.ones_(source.head.weight)
    save_checkpoint(tmp_path / "c.pth", {"model": source.state_dict()})
    load_weights(model, tmp_path / "c.pth", adapt_weights, new_head=True)
    assert torch.equal(model.head.weight, source.head.weight)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny()
    model.head.bias.data[0] = float("inf")
    torch.save({"model": model.state_dict()}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c\.pth: weights are not finite"):
        load_weights(tiny(), tmp_path / "c.pth", adapt_weights)
