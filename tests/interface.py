"""What users and their scripts depend on, apart from numbers: flags, the names and shapes in files, the table's plan.

    python tests/interface.py --tree FOLDER

writes tests/reference/interface/ from the code in a folder; by default from this tree, to record an intended change.
The order of flags and the wording of their help are not part of it, nor is anything that hangs on the processor. Only
command lines and the files of a run are used, so that the tree may be rearranged freely.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
REFERENCE = ROOT / "tests" / "reference" / "interface"
ENTRIES = {
    "deit": "deit/main.py",
    "mae": "mae/main_finetune.py",
    "swin": "swin/main.py",
    "resnet_rsb": "resnet_rsb/train.py",
}
SCRIPTS = ("benchmark", "collect", "export", "predict", "reproduce", "show", "submit")
# two steps, of which the first is saved; all that is not needed for a small run is left at the recipe's default
FLAGS = (
    "--epochs 1 --warmup-epochs 0 --batch-size 8 --save-every 1 --log-interval 1 --num-workers 0 --amp off "
    "--augsub masking --augsub-block 8 --model-ema --no-repeated-aug"
)
MODEL_FLAGS = {
    "deit": "--model deit_pico_patch8_LS --input-size 32",
    "mae": "--model vit_pico_patch8 --input-size 32",
    "swin": "--opts DATA.IMG_SIZE 32 MODEL.SWIN.EMBED_DIM 16 MODEL.SWIN.DEPTHS [1,1] MODEL.SWIN.NUM_HEADS [1,2] "
    "MODEL.SWIN.WINDOW_SIZE 4",
    "resnet_rsb": "--model resnet10t --input-size 32",
}
PROCESSES = {"resnet_rsb": 2}  # whose batch statistics differ between processes and are saved for each
STATE = ("model", "model_ema", "optimizer")  # entries that are alike in both checkpoints
LINE = 110  # characters up to which a JSON value is written on one line


def call(tree: Path, *words: str, cwd: Path | None = None) -> str:
    """What a command of the tree prints; it has to succeed."""
    environment = {
        **os.environ,
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tree),
    }
    done = subprocess.run(words, cwd=cwd or tree, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


# --help


def help_of(tree: Path) -> dict[str, Any]:
    """The flags of each command line; those of a benchmark's command as what differs from the trainer's."""
    commands = {entry: [str(tree / entry)] for entry in ENTRIES.values()}
    commands |= {f"scripts/{name}.py": [str(tree / "scripts" / f"{name}.py")] for name in SCRIPTS}
    commands["-m common.augsub"] = ["-m", "common.augsub"]
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda words: call(tree, sys.executable, *words, "--help"), commands.values())
        flags: dict[str, dict[str, Any]] = {name: parse_help(text) for name, text in zip(commands, texts)}
        benchmark = "scripts/benchmark.py"
        measured = next(value["choices"] for value in flags[benchmark].values() if "step" in value.get("choices", ()))
        pairs = {f"{benchmark} {name} {recipe}": (name, recipe) for name in measured for recipe in ENTRIES}
        texts = pool.map(
            lambda pair: call(tree, sys.executable, str(tree / benchmark), *pair, "--help"), pairs.values()
        )
        for (name, (_, recipe)), text in zip(pairs.items(), texts):
            trainer, found = flags[ENTRIES[recipe]], parse_help(text)
            flags[name] = {flag: value for flag, value in found.items() if trainer.get(flag) != value}
            flags[name] |= dict.fromkeys(trainer.keys() - found.keys(), "not offered")
    return {name: dict(sorted(flags[name].items())) for name in sorted(flags)}


def parse_help(text: str) -> dict[str, dict[str, Any]]:
    """The flags in the text that argparse prints at 200 columns.

    Returns:
        {option strings: {"metavar" or "choices", "default" if the text shows one, "required" if it is}}; a positional
        argument stands under its own name.
    """
    usage, sections = re.split(r"^(?:positional arguments|options):$", text, maxsplit=1, flags=re.MULTILINE)
    usage = " ".join(usage.partition("\n\n")[0].split())
    entries: list[list[str]] = []
    for line in sections.splitlines():
        if re.match(r"  \S", line):
            entries.append([*re.split(r"\s{2,}", line.strip(), maxsplit=1)])
        elif line.startswith("   ") and entries:
            entries[-1].append(line.strip())
    return dict(parse_entry(names, " ".join(words), usage) for names, *words in entries)


def parse_entry(names: str, words: str, usage: str) -> tuple[str, dict[str, Any]]:
    """One flag: its names with metavar, its help, and the usage line that says whether it is required."""
    found: dict[str, Any] = {}
    if names.startswith("-"):
        options = [option.partition(" ")[::2] for option in re.split(r", (?=-)", names)]
        key, metavar = " ".join(sorted(option for option, _ in options)), options[-1][1]
        required = all(f"[{option}" not in usage for option, _ in options)
    else:
        key = metavar = names
        required = f"[{names}" not in usage
    if choices := re.fullmatch(r"\{(.*)\}", metavar):
        found["choices"] = sorted(choices[1].split(","))
        key = ",".join(found["choices"]) if key == metavar else key
    elif metavar:
        found["metavar"] = metavar
    if default := re.search(r"\(default: (.*)\)$", words):
        found["default"] = default[1] if "--num-workers" not in key else "hangs on the number of cores"
    return key, found | ({"required": True} if required else {})


# the plan of the table


def plan_of(tree: Path) -> str:
    """What scripts/reproduce_table.sh would run, with paths that are alike everywhere."""
    text = call(tree, "bash", str(tree / "scripts" / "reproduce_table.sh"), "--plan")
    return text.replace(str(tree), "TREE")


# the files of a run


def files_of(tree: Path, recipe: str, folder: Path) -> dict[str, Any]:
    """Train for two steps and describe what is in the output folder."""
    images, output = folder / "images", folder / "output"
    make_images(images)
    processes = PROCESSES.get(recipe, 1)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    flags = [*FLAGS.split(), "--batch-size", str(8 // processes), "--data-path", str(images)]
    flags += ["--output-dir", str(output), *MODEL_FLAGS[recipe].split()]
    call(tree, *launcher, str(tree / ENTRIES[recipe]), *flags, cwd=folder)
    inner = next(output.rglob("checkpoint.pth")).parent
    settings = json.loads((inner / "args.json").read_text())
    summary = inner / "summary.csv"
    before = checkpoint(inner / "previous_checkpoint_1.pth", settings["args"])
    return {
        "folder": sorted(
            re.sub(r"tfevents.*", "tfevents", str(path.relative_to(output)))
            for path in output.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        ),
        "args.json": sorted(settings),
        "args.json versions": sorted(settings["versions"]),
        "args.json args": json.loads(json.dumps(settings["args"]).replace(str(folder), "FOLDER")),
        "log.txt": [sorted(json.loads(line)) for line in (inner / "log.txt").read_text().splitlines()],
        "summary.csv": summary.read_text().splitlines()[0] if summary.exists() else None,
        "tensorboard": curves(inner / "tensorboard"),
        "checkpoint.pth": checkpoint(inner / "checkpoint.pth", settings["args"]),
        "previous_checkpoint_1.pth": {name: before[name] for name in before if name not in STATE},  # in mid-epoch
    }


def make_images(folder: Path) -> None:
    """Folders of JPEGs of two classes, 16 for training and 4 for evaluation."""
    for split, count in (("train", 8), ("val", 2)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (20 * i, 200, 0)).save(folder / split / label / f"{i}.jpg")


def curves(folder: Path) -> dict[str, list[int]]:
    """TensorBoard's tags and the steps of their points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [point.step for point in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])}


def checkpoint(path: Path, run_args: dict[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint; "the same" are settings as in args.json, and an average like the model."""
    content = torch.load(path, weights_only=True)
    described = describe(content) | {"args": sorted(content["args"])}
    for name, other in (("args", sorted(run_args)), ("model_ema", described["model"])):
        if described[name] == other:
            described[name] = "the same"
    return described


def describe(value: Any) -> Any:
    """Name, shapes and types of what is in dicts and list; equal items of a list are counted."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return {str(key): describe(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        items = [describe(item) for item in value]
        if len(items) > 1 and all(item == items[0] for item in items):
            return {f"{len(items)} times": items[0]}
        return items
    return type(value).__name__


def write(value: Any, indent: int = 0) -> str:
    """JSON with a line for each value that fits on one."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= LINE or not isinstance(value, (dict, list)):
        return line
    space, ends = " " * (indent + 1), "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        items = [f"{json.dumps(key, ensure_ascii=False)}: {write(item, indent + 1)}" for key, item in value.items()]
    else:
        items = [write(item, indent + 1) for item in value]
    body = ",\n".join(space + item for item in items)
    return f"{ends[0]}\n{body}\n{' ' * indent}{ends[1]}"


def main() -> None:
    """Write the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="folder of the code")
    parts = ("help", "plan", *ENTRIES)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all where none is named")
    args = parser.parse_args()
    tree = args.tree.resolve()
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for part in args.parts or parts:
        if part == "plan":
            (REFERENCE / "plan.txt").write_text(plan_of(tree))
        elif part == "help":
            (REFERENCE / "help.json").write_text(write(help_of(tree)) + "\n")
        else:
            with tempfile.TemporaryDirectory() as folder:
                content = files_of(tree, part, Path(folder).resolve())
            (REFERENCE / f"{part}.json").write_text(write(content) + "\n")


if __name__ == "__main__":
    main()
