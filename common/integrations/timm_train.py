"""Run timm's train.py with AugSub in its training tasks.

    python -m augsub.integrations.timm_train TRAIN_PY --augsub masking [flags of train.py]

TRAIN_PY is a train.py that makes its loss with `timm.task`, as that of timm 1.0.31 does. Everything but the flags
below is passed on to it. Under torchrun: `torchrun --nproc-per-node 8 -m augsub.integrations.timm_train TRAIN_PY …`.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import timm.task
from timm.task import TrainingTask

from ..drops import KINDS
from ..masking import BLOCK
from .timm_task import AugSubTask


def main(words: list[str] | None = None) -> None:
    """Run train.py in this process, as if it had been started with the flags that are not AugSub's."""
    args, flags = create_parser().parse_known_args(words)
    check_script(args.train_py)
    options = {"block": args.augsub_block, "batch_norm": args.augsub_bn, "target": args.augsub_target}
    patch_tasks(args.augsub, args.augsub_ratio, options)
    sys.argv = [str(args.train_py), *flags]
    sys.path[0] = str(args.train_py.resolve().parent)
    runpy.run_path(str(args.train_py), run_name="__main__")


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that train.py does not have."""
    parser = argparse.ArgumentParser(
        "python -m augsub.integrations.timm_train", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("train_py", type=Path, metavar="TRAIN_PY", help="timm's train.py; its own flags follow")
    parser.add_argument("--augsub", choices=KINDS, default="masking", help="drop technique of the sub-model")
    parser.add_argument("--augsub-ratio", type=float, default=0.5, help="drop probability of the sub-model, in [0, 1)")
    parser.add_argument("--augsub-block", type=int, default=BLOCK, help="side of a hidden block, in pixels")
    parser.add_argument("--augsub-bn", choices=("shared", "main"), default="shared", help="batch_norm of AugSub")
    parser.add_argument(
        "--augsub-target",
        choices=("auto", "softmax", "sigmoid", "same"),
        default="auto",
        help="what the sub-model learns of the main model's logits",
    )
    return parser


def check_script(path: Path) -> None:
    """Exit with status 2 where the script would train without AugSub."""
    if not path.is_file():
        fail(f"{path}: no such file; pass the path of timm's train.py")
    if not re.search(r"\btimm\.task\b", path.read_text()):
        fail(f"{path}: does not use timm.task, where AugSub is put in; take the train.py of timm 1.0.31 or later")


def patch_tasks(kind: str, ratio: float, options: dict[str, Any]) -> None:
    """Replace the classes of timm.task by subclasses whose instances train with AugSub."""

    def create(cls: Any) -> type[TrainingTask]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            cls.__init__(self, *args, **kwargs)
            try:
                AugSubTask(self, kind, ratio, **options)
            except ValueError as error:
                fail(f"--augsub {kind}: {error}")
            if self.verbose:  # on rank 0
                print(f"{cls.__name__}: {self.augsub}", flush=True)

        return type(cls.__name__, (cls,), {"__init__": __init__})

    modules = [module for name, module in sys.modules.items() if name.split(".")[:2] == ["timm", "task"]]
    for name in timm.task.__all__:
        cls = getattr(timm.task, name)
        if isinstance(cls, type) and issubclass(cls, TrainingTask) and cls is not TrainingTask:
            replacement = create(cls)
            for module in modules:  # also where train.py imports from timm.task.classification
                if getattr(module, name, None) is cls:
                    setattr(module, name, replacement)


def fail(message: str) -> None:
    """Exit with status 2 and one sentence."""
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
