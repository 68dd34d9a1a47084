"""Classifies images: prints the most probable classes of each.

    python scripts/predict.py output/small_400/best photo.jpg
    python scripts/predict.py resnet50.a1_in1k photos '*.png' --topk 3 --csv classes.csv

MODEL is a folder in timm's hub format (a run's best/ or last/), a checkpoint of a run, or a name that timm knows.
Images that cannot be read are named on standard error; the exit status is then 1, or 2 where none could be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

from common.flag_types import device_name, nonempty_path, positive_int, weights_source  # noqa: E402
from common.parser import Parser  # noqa: E402
from common.run_dir import BEST_MODEL  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.cli_errors import check_writable, cli_errors, write_output  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn


class Classifier(NamedTuple):
    """A model, and what it needs."""

    model: nn.Module  # in evaluation mode
    transform: Callable[[Image.Image], Tensor]  # RGB image → (3, H, W)
    class_names: list[str]  # in the order of the labels


def main() -> None:
    """Print a line an image."""
    protect_output()
    parser = Parser(description=__doc__, prog="predict.py", raw_description=True)
    add = parser.add_argument
    add(
        "model",
        type=weights_source,
        metavar="MODEL",
        help="a folder such as output/x/best, a checkpoint, or a timm name",
    )
    add(
        "images",
        type=nonempty_path,
        nargs="+",
        metavar="IMAGE",
        help="files, folders (with all that is in them) or patterns",
    )
    add("--topk", type=positive_int, default=5, help="classes to show of each image")
    add(
        "--csv",
        type=nonempty_path,
        default=None,
        metavar="FILE",
        help="write image, class_1, probability_1, … to it too",
    )
    add("--batch-size", type=positive_int, default=64, help="images at a time")
    add("--device", type=device_name, default=None, help="cuda or cpu; by default the GPU if there is one")
    args = parser.parse_args()
    with cli_errors(parser):
        check_writable("--csv", args.csv)
        unreadable, count = predict(args)
        if unreadable == count:
            raise ValueError("no image could be read")
    if unreadable:
        print(f"{parser.prog}: {unreadable} of {count} images could not be read", file=sys.stderr)
        sys.exit(1)


def predict(args: argparse.Namespace) -> tuple[int, int]:
    """Classify the images and print the result → how many could not be read, and how many there are.

    Raises:
        ValueError: there is no such model, or no image.
    """
    import torch
    from tqdm import tqdm

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: PyTorch finds no GPU on this machine; use --device cpu")
    paths = find_images(args.images)
    classifier = load_classifier(args.model)
    model = classifier.model.to(device)
    topk = min(args.topk, len(classifier.class_names))
    header = ["image", *(f"{column}_{rank + 1}" for rank in range(topk) for column in ("class", "probability"))]
    rows: list[list[Any]] = [header]
    unreadable = 0
    with tqdm(total=len(paths), unit="image", disable=not sys.stderr.isatty(), leave=False) as bar:
        for batch in read_batches(paths, classifier.transform, args.batch_size):
            for path, reason in ((path, image) for path, image in batch if isinstance(image, str)):
                unreadable += 1
                tqdm.write(f"{path}: unreadable ({reason})", file=sys.stderr)
            readable = [(path, image) for path, image in batch if not isinstance(image, str)]
            if readable:
                with torch.no_grad():
                    logits = model(torch.stack([image for _, image in readable]).to(device))
                probabilities, labels = logits.float().softmax(dim=1).topk(topk)
                for (path, _), shares, chosen in zip(readable, probabilities.tolist(), labels.tolist()):
                    pairs = [(classifier.class_names[label], share) for label, share in zip(chosen, shares)]
                    tqdm.write(f"{path}: {', '.join(f'{name} {100 * share:.1f} %' for name, share in pairs)}")
                    rows.append([path, *(value for pair in pairs for value in pair)])
            bar.update(len(batch))
    if args.csv is not None and len(rows) > 1:
        write_output(Path(args.csv), format_csv(rows))
    return unreadable, len(paths)


def find_images(words: Sequence[str]) -> list[str]:
    """Return the paths that the command line means, in its order; what is not there is named when it is read.

    Raises:
        ValueError: a folder or a pattern holds no image.
    """
    from glob import glob

    from torchvision.datasets.folder import IMG_EXTENSIONS

    paths: list[str] = []
    for word in words:
        path = Path(word)
        is_pattern = not path.exists() and any(character in word for character in "*?[")
        matches = [Path(match) for match in sorted(glob(str(path), recursive=True))] if is_pattern else [path]
        found: list[Path] = []
        for match in matches:
            found += list_images(match) if match.is_dir() else [match]
        if not found:
            raise ValueError(f"{word}: holds no images; files with {' '.join(IMG_EXTENSIONS)} are looked for")
        paths += map(str, found)
    return paths


def list_images(folder: Path) -> list[Path]:
    """Return the images in a folder and those below it, but for hidden and system ones."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from common.data.folders import is_class_name

    inside = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    return [path for path in inside if all(map(is_class_name, path.relative_to(folder).parts))]


def load_classifier(name: str) -> Classifier:
    """Load a folder, a checkpoint or a timm model.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from common.checkpoint.io import name_weights_in
    from common.data.transforms import evaluation_transform

    path = Path(name)
    if path.is_file() and path.with_name("config.json").is_file() and path.suffix == ".safetensors":
        path = path.parent
    if path.is_dir():
        if not (path / "config.json").is_file():
            best = path / BEST_MODEL
            advice = f"pass {best}" if best.is_dir() else name_weights_in(path)
            raise ValueError(f"{path}: no folder in timm's format; {advice}")
        return load_timm_model(f"local-dir:{path}")
    if not path.is_file():
        return load_timm_model(name)
    from scripts.trained_model import Missing, read_trained_model

    try:
        trained = read_trained_model(path, Missing())
    except ValueError as error:
        hint = "; scripts/export.py makes a folder of it, with these flags" if "; pass --" in str(error) else ""
        raise ValueError(f"{error}{hint}") from error
    names = number_classes(trained.class_names, trained.classes)
    return Classifier(trained.model, evaluation_transform(trained.preprocessing), names)


def load_timm_model(name: str) -> Classifier:
    """Load a model by timm: local-dir:…, hf-hub:…, or a name with or without a tag.

    Raises:
        ValueError: timm has none of this name, or it cannot be read or downloaded.
    """
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from common.models import suggest_models

    if ":" not in name and not timm.is_model(name):
        hint = suggest_models(name)
        raise ValueError(f"{name}: no such file or folder, and timm has no model of this name; {hint}")
    try:
        model: Any = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # of timm, of the hub's client, or of the file's format
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{name}: cannot be loaded by timm ({reason})") from error
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return Classifier(model, transform, list_class_names(model.pretrained_cfg, model.num_classes, name))


def list_class_names(cfg: dict[str, Any], classes: int, name: str) -> list[str]:
    """Return the names in timm's pretrained_cfg; ImageNet's for a model of timm's own that has none."""
    from timm.data import CustomDatasetInfo, DatasetInfoLabelMapper, ImageNetInfo, infer_imagenet_subset

    subset = None if name.startswith("local-dir:") else infer_imagenet_subset({"num_classes": classes})
    if cfg.get("label_names"):
        info: Any = CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
    elif subset is not None:
        info = ImageNetInfo(subset)
    else:
        return number_classes(None, classes)
    names = DatasetInfoLabelMapper(info, fallback_format="{index}")
    return describe_synsets([names(label) for label in range(classes)])


def number_classes(names: Sequence[str] | None, classes: int) -> list[str]:
    """Return names of all classes; one without a name has its number."""
    known = list(names or ())
    return describe_synsets([*known, *map(str, range(len(known), classes))])


def describe_synsets(names: list[str]) -> list[str]:
    """Replace ImageNet's n01440764 by words, where all classes are such."""
    from timm.data import ImageNetInfo

    if not all(name.startswith("n") and name[1:].isdigit() for name in names):
        return names
    words = ImageNetInfo()
    try:
        return [words.label_name_to_description(name) for name in names]
    except KeyError:
        return names


def read_batches(
    paths: Sequence[str], transform: Callable[[Image.Image], Tensor], size: int
) -> Iterator[list[tuple[str, Tensor | str]]]:
    """Yields batches of paths, each with its image (3, H, W) or the reason why there is none; threads read the next one
    meanwhile."""
    from concurrent.futures import ThreadPoolExecutor

    from common.data.bad_samples import READ_ERRORS, explain_read_error
    from common.data.images import open_image, to_rgb

    def read(path: str) -> Tensor | str:
        try:
            return transform(to_rgb(open_image(Path(path).read_bytes())))
        except READ_ERRORS as error:
            return explain_read_error(error)

    with ThreadPoolExecutor() as pool:
        previous: tuple[Sequence[str], Iterator[Tensor | str]] | None = None
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            images = pool.map(read, batch)
            if previous is not None:
                yield list(zip(*previous))
            previous = batch, images
        if previous is not None:
            yield list(zip(*previous))


def format_csv(rows: Sequence[Sequence[Any]]) -> bytes:
    """Return a table in UTF-8; a path that is no text stays as it is."""
    import csv
    import io

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


if __name__ == "__main__":
    main()
