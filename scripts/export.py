"""Makes a model in timm's hub format of a checkpoint, as a run keeps in best/ and last/.

    python scripts/export.py output/small_400/best_checkpoint.pth output/small_400_model

`timm.create_model("local-dir:output/small_400_model", pretrained=True)` then gives the model. What a checkpoint cannot
tell is taken from the flags: one of an earlier version has no names of classes, one of upstream's no recipe.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

from common.args import INTERPOLATIONS  # noqa: E402
from common.flag_types import (  # noqa: E402
    above_zero_to_one,
    nonempty_path,
    positive_float,
    positive_int,
    probability,
)
from common.parser import Parser  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.cli_errors import cli_errors  # noqa: E402
from scripts.launch.registry import RECIPES  # noqa: E402


def main() -> None:
    """Write the folder."""
    protect_output()
    parser = Parser(description=__doc__, prog="export.py", raw_description=True)
    add = parser.add_argument
    add("checkpoint", type=nonempty_path, help="file of a run, of this trainer or of upstream's")
    add("folder", type=nonempty_path, help="to write; a model in it is replaced")
    add("--weights", choices=("model", "model_ema"), default=None, help="by default the more accurate ones")
    add("--recipe", choices=RECIPES, default=None, help="that trained it; by default as the checkpoint says")
    add("--model", default=None, help="name of the model; by default as the checkpoint says")
    add("--class-names", type=nonempty_path, default=None, metavar="FILE", help="names of the classes, one a line")
    add("--input-size", type=positive_int, default=None, help="side of the images, in pixels")
    add("--mean", type=probability, nargs=3, default=None, help="of the channels, in [0, 1]")
    add("--std", type=positive_float, nargs=3, default=None, help="of the channels")
    add("--interpolation", choices=INTERPOLATIONS[1:], default=None, help="of evaluation's resize")
    add("--crop-pct", type=above_zero_to_one, default=None, help="share of the resized image that evaluation crops")
    args = parser.parse_args()
    with cli_errors(parser):
        export(args)


def export(args: argparse.Namespace) -> None:
    """Read the checkpoint and write the folder.

    Raises:
        ValueError: one of them cannot be used.
    """
    from dataclasses import asdict

    from common.checkpoint.hub_format import CONFIG, hub_config, write_folder
    from scripts.trained_model import Missing, read_trained_model

    folder = Path(args.folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file; choose a new folder")
    if folder.exists() and not (folder / CONFIG).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds other files; choose a new folder")
    names = read_class_names(Path(args.class_names)) if args.class_names is not None else None
    missing = Missing(
        recipe=args.recipe,
        model=args.model,
        part=args.weights,
        class_names=names,
        input_size=args.input_size,
        mean=args.mean,
        std=args.std,
        interpolation=args.interpolation,
        crop_ratio=args.crop_pct,
    )
    trained = read_trained_model(Path(args.checkpoint), missing)
    try:
        config = hub_config(trained.model, trained.architecture, trained.class_names, asdict(trained.preprocessing))
    except ValueError as error:
        raise ValueError(f"{args.checkpoint}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, config, trained.model.state_dict(), trained.card)
    print(f"{folder}: {trained.card['name']}, {trained.card['details']['Weights']}")
    if trained.class_names is None:
        print(f"{args.checkpoint}: has no names of classes; add them by --class-names FILE")
    print(f'to use it: timm.create_model("local-dir:{folder}", pretrained=True)')


def read_class_names(path: Path) -> list[str]:
    """Read the names of the classes, one a line.

    Raises:
        ValueError: the file cannot be read, or a line before the last name is empty.
    """
    try:
        names = path.read_text(encoding="utf-8").rstrip().splitlines()
    except OSError as error:
        raise ValueError(f"--class-names {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--class-names {path}: no text in UTF-8; write one name a line") from error
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise ValueError(f"--class-names {path}: line {number} is empty; write one name a line")
    return names


if __name__ == "__main__":
    main()
