"""Weights from a hub: real requests of the hub's own client to a server on the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from timm.models import save_for_hf

from tests.commands import ROOT, environment
from tests.hub_server import HubServer
from tests.runs import load_checkpoint
from tests.sample_data import make_jpegs

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {"img_size": 32, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "num_classes": 2}
RATES = "--lr 0 --warmup-lr 0 --min-lr 0"  # at which training leaves the weights as they are
COMMON = f"--num-workers 0 --batch-size 4 --epochs 1 --warmup-epochs 0 --amp off {RATES}"
# one process runs all commands of a test, since importing PyTorch takes longer than any of them
DRIVER = f"""
import contextlib, importlib, io, json, sys
sys.path[0] = {str(ROOT)!r}
from common.cli import run

answers = []
for recipe, *words in json.loads(sys.stdin.read()):
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            run(importlib.import_module(f"{{recipe}}.recipe").RECIPE, words)
        except SystemExit as leaving:
            code = leaving.code
    answers.append((code, out.getvalue()))
print(json.dumps(answers))
"""


class Answer(NamedTuple):
    status: int
    output: str

    @property
    def weights(self) -> list[str]:
        """The lines about weights."""
        return [line for line in self.output.splitlines() if line.startswith("weights: ")]


class Place(NamedTuple):
    """A folder with data and caches, the hub, and the models in it."""

    folder: Path
    hub: HubServer
    models: dict[str, torch.nn.Module]

    def run(self, *commands: str, cache: str = "cache", **env: str) -> list[Answer]:
        """Run commands such as "deit --finetune …" one after the other in one process."""
        data = f"--data-path {self.folder}/images"
        words = [f"{command} {COMMON} {data}".split() for command in commands]
        env = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.folder / cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        } | env
        done = subprocess.run([sys.executable, "-c", DRIVER], input=json.dumps(words), cwd=self.folder, text=True,
                              capture_output=True, timeout=240, env=environment(**env))  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [Answer(*answer) for answer in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    models = {
        "org/vit": timm.create_model("vit_tiny_patch16_224", global_pool="avg", **VIT),
        "org/swin": timm.create_model("swin_tiny_patch4_window7_224", **SWIN),
        "timm/test_vit.r160_in1k": timm.create_model("test_vit"),
    }
    for name, model in models.items():
        save_for_hf(model, str(folder / "served" / name), safe_serialization=True)
    pickled = folder / "served" / "org" / "pickled"
    save_for_hf(models["org/vit"], str(pickled), safe_serialization=False)
    (folder / "served" / "org" / "transformers").mkdir()
    (folder / "served" / "org" / "transformers" / "config.json").write_text('{"architectures": ["ViTModel"]}')
    (folder / "served" / "org" / "bare").mkdir()
    make_jpegs(folder / "images")
    hub = HubServer(folder / "served")
    yield Place(folder, hub, models)
    hub.close()


def assert_taken(state: dict[str, torch.Tensor], model: torch.nn.Module, but: tuple[str, ...]) -> None:
    expected = {name: weight for name, weight in model.state_dict().items() if not name.startswith(but)}
    assert len(expected) > 20 and all(torch.equal(state[name], weight) for name, weight in expected.items())


@pytest.mark.slow
def test_weights_come_from_the_hub_and_then_from_its_cache(place):
    commands = [
        "deit --finetune hf-hub:org/vit --output-dir deit",
        "mae --finetune hf-hub:org/vit --output-dir mae",
        "mae --finetune hf-hub:org/pickled@main --cls-token --eval --nb-classes 5 --input-size 32",
        "swin --eval --resume hf-hub:org/swin --img-size 32 --output swin",
        "resnet_rsb --model test_vit.r160_in1k --finetune timm --img-size 80 --output tag",
        "resnet_rsb --model test_vit.r160_in1k --img-size 80 --output scratch",
    ]
    deit, mae, pickled, swin, tag, scratch = place.run(*commands)
    total = len(place.models["org/vit"].state_dict())
    assert deit.status == 0, deit.output
    assert deit.weights == [
        f"weights: hf-hub:org/vit (model.safetensors): {total - 2} of {total} tensors taken",
        "weights: new: classifier of 2 classes (the file's: 5)",
    ]
    for answer in (deit, mae):
        assert "model: vit_tiny_patch16_224 of hf-hub:org/vit, 0." in answer.output
        assert "images: 32 px, evaluation crop 0.9, bicubic; mean 0.5 0.5 0.5, std 0.5 0.5 0.5\n" in answer.output
    for name in ("deit", "mae"):
        assert_taken(load_checkpoint(place.folder / name)["model"], place.models["org/vit"], ("head.",))
    assert mae.status == 0, mae.output
    assert pickled.status == 2 and "missing key norm.weight" in pickled.output
    assert "hf-hub:org/pickled@main (pytorch_model.bin): another architecture" in pickled.output
    assert swin.status == 0 and "images: acc@1" in swin.output, swin.output
    assert swin.weights == [
        f"weights: hf-hub:org/swin (model.safetensors): all {len(place.models['org/swin'].state_dict())} tensors taken"
    ]
    assert tag.status == 0, tag.output
    assert (
        "positions resized from 10x10 to 5x5" in tag.weights[0]
        and "test_vit.r160_in1k (model.safetensors)" in tag.weights[0]
    )
    assert_taken(
        load_checkpoint(place.folder / "tag")["model"], place.models["timm/test_vit.r160_in1k"], ("head.", "pos_embed")
    )
    assert scratch.weights == [
        "weights: none, training starts from scratch; --finetune timm takes those of test_vit.r160_in1k"
    ]
    assert [line for line in place.hub.requests if line.startswith("GET /org/vit/")] == [
        "GET /org/vit/resolve/main/config.json", "GET /org/vit/resolve/main/model.safetensors"]  # fmt: skip

    place.hub.requests.clear()
    again = place.run(commands[0].replace("--output-dir deit", "--output-dir again"), HF_HUB_OFFLINE="1")
    assert again[0].weights == deit.weights and place.hub.requests == []


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_one_sentence(place):
    answers = place.run(
        "deit --finetune hf-hub:org/none",
        "deit --finetune hf-hub:org/bare",
        "deit --finetune hf-hub:org/transformers",
        "deit --model resnet18 --finetune hf-hub:org/vit",
        "deit --finetune hf-hub:a/b/c/d",
        cache="other",
    )
    words = [
        "hf-hub:org/none: the hub has no such repository, or it is private; check the name",
        "hf-hub:org/bare: the repository has no config.json; expected one in timm's format",
        "hf-hub:org/transformers: config.json is not in timm's format (KeyError: 'architecture')",
        "--model resnet18: hf-hub:org/vit has weights of vit_tiny_patch16_224; leave out --model",
        "hf-hub:a/b/c/d: Repo id must be in the form",
    ]
    for answer, expected in zip(answers, words, strict=True):
        assert answer.status == 2 and answer.output.count("\n") == 1 and expected in answer.output, answer


@pytest.mark.slow
@pytest.mark.parametrize(("env", "reason"), [
    ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; download it once without"),
    ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub is not reached; check the network"),
], ids=["offline", "no hub"])  # fmt: skip
def test_without_a_hub_and_a_cache_it_says_so(env, reason, place):
    before = len(place.hub.requests)
    (answer,) = place.run("deit --finetune hf-hub:org/vit", cache="empty", **env)
    assert answer.status == 2 and "Traceback" not in answer.output
    *_, last = answer.output.splitlines()  # the client warns of each attempt before
    assert last.endswith(f"hf-hub:org/vit: no config.json in the cache, and {reason}")
    assert len(place.hub.requests) == before
