"""What `pip install` gives, and that a clone needs no installation: by a Python that sees the dependencies alone."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import site
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import common
import common.augsub
import common.drops
from scripts.launch.job import TrainJob
from scripts.launch.registry import ENTRY_POINTS
from scripts.launch.slurm import Cluster, create_executor
from tests.commands import ROOT, environment

pytestmark = pytest.mark.slow

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "common", "deit", "mae", "resnet_rsb", "scripts", "swin", "docs")
STEP = """
import sys
import common  # the user's
import timm, torch
from augsub import AugSub

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).train()
augsub = AugSub(model, "masking", ratio=0.5)
losses = []
for loss in augsub.losses(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.nn.CrossEntropyLoss()):
    loss.backward()
    losses.append(loss.item())
assert len(losses) == 2 and model.head.weight.grad is not None
assert common.OWNER == "the user" and "common.augsub" not in sys.modules
print(AugSub.__module__, sys.modules["augsub"].__file__)
"""
WITHOUT_FCNTL = """
import pkgutil, runpy, sys
sys.modules["fcntl"] = None  # as on Windows, where an import of it fails
import augsub
for module in pkgutil.iter_modules(augsub.__path__, "augsub."):
    __import__(module.name)
sys.argv[:] = ["augsub", *sys.argv[1:]]
runpy.run_module("augsub", run_name="__main__")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Make a Python with the dependencies of this one, but not with this repository, which may be installed there."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))  # whose own .pth files are not read
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """Copy the sources, since a build writes into them."""
    folder = tmp_path_factory.mktemp("clone") / "my clone"
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        folder.mkdir(exist_ok=True)
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def installed(clone) -> Path:
    """Install the package with pip → its folder."""
    folder = clone.parent / "site"
    pip("install", "--target", str(folder), str(clone))
    return folder


@pytest.fixture
def user_folder(tmp_path) -> Path:
    """Make a folder with packages of the names that this repository uses."""
    for name in ("common", "scripts", "deit", "swin"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'the user'\n")
    return tmp_path


def pip(command: str, *words: str, python: Path | str = sys.executable) -> None:
    call(python, "-m", "pip", command, "--quiet", "--no-deps", "--no-build-isolation", *words)


def call(python: Path | str, *words: str, cwd: Path | None = None, **env: str) -> str:
    done = subprocess.run(
        [str(python), *words], cwd=cwd, capture_output=True, text=True, timeout=240,
        env=environment(**{"PYTHONPATH": ""} | env),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules(folder: Path) -> set[str]:
    """List the modules that are installed in a folder, as paths in it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


@pytest.mark.skipif(os.environ.get("AUGSUB_TEST_INTEGRATIONS") != "required", reason="libraries may be missing here")
@pytest.mark.parametrize("library", ["transformers", "lightning", "accelerate", "peft"])
def test_no_integration_is_skipped_for_want_of_its_library(library):
    assert importlib.util.find_spec(library), f"{library}: not installed; the tests that need it must run here"


def test_names_of_the_package_are_imported_when_they_are_asked_for(tmp_path):
    assert common.AugSub is common.augsub.AugSub and common.find_drops is common.drops.find_drops
    assert set(common.__all__) <= set(dir(common)) and all(hasattr(common, name) for name in common.__all__)
    with pytest.raises(AttributeError, match="module 'common' has no attribute 'nothing'"):
        common.nothing  # noqa: B018
    imports = "import common, sys; print(sorted({'torch', 'timm', 'numpy'} & sys.modules.keys()))"
    assert call(sys.executable, "-c", imports, cwd=ROOT) == "[]\n"


@pytest.mark.parametrize(
    "entry", [*ENTRY_POINTS.values(), "scripts/submit.py", "scripts/reproduce.py", "scripts/collect.py"]
)
def test_a_clone_needs_no_installation(python, entry, user_folder):
    for folder in (ROOT, ROOT / "docs", user_folder):
        script = os.path.relpath(ROOT / entry, folder)
        assert call(python, script, "--help", cwd=folder).startswith("usage: ")


def test_a_submitted_job_is_unpickled_in_a_process_of_another_folder(python, user_folder):
    """As Slurm starts it: the exports of the batch script, then `python -m` in the folder of the submission."""
    from submitit.core.utils import DelayedSubmission

    options = {"cpus_per_task": 1, "time": 1}
    executor = create_executor(user_folder / "slurm", Cluster(True, 1, 1, options, 5), "job")
    DelayedSubmission(TrainJob(user_folder / "out")).dump(user_folder / "job.pkl")
    lines = executor._make_submission_file_text("command", "1").splitlines()
    exports = [line for line in lines if line.startswith("export ")]
    load = (
        "from submitit.core.utils import DelayedSubmission; import scripts, common\n"
        "job = DelayedSubmission.load('job.pkl').function\n"
        "print(type(job).__module__, job.folder, scripts.__file__, common.__file__, sep='\\n')"
    )
    script = "\n".join([*exports, f"exec {shlex.quote(str(python))} -c {shlex.quote(load)}"])
    done = subprocess.run(
        ["bash", "-c", script], cwd=user_folder, env=environment(PYTHONPATH=""), capture_output=True, text=True
    )
    expected = ["scripts.launch.job", str(user_folder / "out")]
    expected += [str(ROOT / name / "__init__.py") for name in ("scripts", "common")]
    assert done.stdout.splitlines() == expected, done.stderr


def test_torchrun_and_the_list_in_a_clone(python, user_folder):
    for folder in (ROOT / "docs", user_folder):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        script = os.path.relpath(ROOT / "deit" / "main.py", folder)
        assert "--augsub-ratio" in call(python, *torchrun, script, "--help", cwd=folder)
    for module in ("common.augsub", "common"):
        assert "resnet18 " in call(python, "-m", module, "--list", "resnet18", cwd=ROOT)


def test_pip_installs_the_method_alone(installed):
    files = modules(installed)
    assert {file.partition("/")[0] for file in files} == {"augsub"}
    assert {"augsub/__init__.py", "augsub/__main__.py", "augsub/augsub.py"} <= files
    assert not {"augsub/args.py", "augsub/cli.py", "augsub/trainer.py"} & files
    (metadata,) = installed.glob("augsub-*.dist-info")
    required = Parser().parsestr((metadata / "METADATA").read_text()).get_all("Requires-Dist") or []
    assert sorted(line.partition(">")[0].partition("<")[0] for line in required if "extra ==" not in line) == [
        "timm",
        "torch",
    ]


def test_the_package_beside_a_users_own_common(python, installed, user_folder):
    (user_folder / "train.py").write_text(STEP)
    printed = call(python, "train.py", cwd=user_folder, PYTHONPATH=str(installed))
    assert printed.split(maxsplit=1) == ["augsub.augsub", f"{installed}/augsub/__init__.py\n"]


def test_the_list_where_there_is_no_fcntl(python, installed, user_folder):
    words = ["--list", "swin_tiny_patch4_window7_224"]
    printed = call(python, "-c", WITHOUT_FCNTL, *words, cwd=user_folder, PYTHONPATH=str(installed))
    assert printed == call(python, "-m", "augsub", *words, cwd=user_folder, PYTHONPATH=str(installed))
    line = next(line for line in printed.splitlines() if line.startswith("swin_tiny_patch4_window7_224 "))
    assert line.split() == ["swin_tiny_patch4_window7_224", "mask", "token", "yes", "yes"]
    assert call(python, "-m", "augsub", "--help", PYTHONPATH=str(installed)).startswith("usage: python -m augsub [-h]")


def test_the_sdist_builds_the_same_wheel(clone, installed):
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(clone.parent / "dist"), str(clone))
    (wheel,) = (clone.parent / "dist").glob("augsub-*.whl")  # built from the sdist
    assert len(list((clone.parent / "dist").glob("augsub-*.tar.gz"))) == 1
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert names == modules(installed)


def test_an_editable_installation_follows_the_clone(python, clone, user_folder):
    pip("install", "--ignore-installed", "--editable", str(clone), python=python)
    imports = "import augsub, common; print(augsub.AugSub.__module__, augsub.__file__, common.OWNER, sep='\\n')"
    printed = call(python, "-c", imports, cwd=user_folder).splitlines()
    assert printed == ["augsub.augsub", str(clone / "common" / "__init__.py"), "the user"]
    absent = call(python, "-c", "from importlib.util import find_spec; print(find_spec('common'))", cwd=clone / "docs")
    assert absent == "None\n"
