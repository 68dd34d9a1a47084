"""The programs of docs/integrations.md, each run as it stands under the name of the installed package."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch

from tests.commands import ROOT
from tests.installed import run_installed

PAGE = (ROOT / "docs" / "integrations.md").read_text()
PROGRAMS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
LIBRARIES = ("transformers", "lightning", "accelerate")
pytestmark = pytest.mark.slow


def test_each_trainer_has_its_program():
    assert list(PROGRAMS) == ["Your own loop", "timm's tasks", "transformers", "Lightning, automatic optimization",
                              "Lightning, manual optimization", "accelerate"]  # fmt: skip
    assert PAGE.count("```python") == len(PROGRAMS)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "last.pth.tar").exists():
        return torch.load(folder / "last.pth.tar")["state_dict"]
    return torch.load(folder / "model.pth")


@pytest.mark.parametrize(("name", "processes"), [
    *((name, 0) for name in PROGRAMS), ("transformers", 2), ("accelerate", 2),
])  # fmt: skip
def test_programs_run_as_they_stand(name, processes, tmp_path):
    program = PROGRAMS[name]
    for library in LIBRARIES:
        if re.search(rf"^(from|import) {library}\b", program, re.MULTILINE) and not importlib.util.find_spec(library):
            pytest.skip(f"{library} is not installed: pip install augsub[{library}]")
    (tmp_path / "program.py").write_text(program)
    done = run_installed("program.py", folder=tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr
    if name == "transformers":
        from transformers import ViTForImageClassification

        ViTForImageClassification.from_pretrained(tmp_path / "model")
    else:  # what was saved loads into a model that AugSub never saw
        timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10).load_state_dict(saved_weights(tmp_path))
