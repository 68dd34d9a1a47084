"""Draws what the sub-model sees of images under AugMask: what is hidden at several ratios, by each kind of masking.

    python scripts/show.py photo.jpg --ratios 0.25 0.5 0.75 --out masks.png
    python scripts/show.py --data-path imagenet --count 2 --model vit_base_patch16_224

A row for each image and model. Token drop leaves the hidden patches out (white); a mask token takes the place of blocks
(grey); pixel blocks become the mean colour. Without images, scikit-learn's two photographs are shown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

from common.flag_types import below_one, nonempty_path, positive_int, seed  # noqa: E402
from common.parser import Parser  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.cli_errors import check_writable, cli_errors, write_output  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from common.augsub import AugSub

MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet50")  # one of each kind of masking
WHITE, GREY, BLACK = (255, 255, 255), (128, 128, 128), (0, 0, 0)
GAP, LABEL_HEIGHT, FONT_SIZE = 8, 24, 16  # pixels


def create_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__, prog="show.py", raw_description=True)
    add = parser.add_argument
    add("images", type=nonempty_path, nargs="*", metavar="IMAGE", help="files, folders or patterns")
    add("--data-path", type=nonempty_path, default=None, help="folder with val/<class>/… to take images from")
    add("--count", type=positive_int, default=2, help="how many images to take from --data-path")
    add("--model", nargs="+", default=list(MODELS), metavar="NAME", help="timm models, whose masking is shown")
    add("--ratios", type=below_one, nargs="+", default=[0.25, 0.5, 0.75], help="drop probabilities p")
    add("--block", type=positive_int, default=32, help="side of a hidden block in pixels, as --augsub-block")
    add("--input-size", type=positive_int, default=224, help="side of the images, in pixels")
    add("--seed", type=seed, default=0, help="of what is hidden")
    add("--out", type=nonempty_path, default="augmask.png", help="PNG file to write")
    return parser


def main() -> None:
    """Write the picture."""
    protect_output()
    parser = create_parser()
    args = parser.parse_args()
    with cli_errors(parser):
        if args.images and args.data_path:
            raise ValueError("--data-path: images are named already; give one of both")
        if Path(args.out).suffix.lower() != ".png":
            raise ValueError(f"--out {args.out}: a PNG file is written; let the name end in .png")
        check_writable("--out", args.out)
        write_output(Path(args.out), draw(args))
        print(f"wrote {args.out}")


def draw(args: argparse.Namespace) -> bytes:
    """Return the picture as a PNG file.

    Raises:
        ValueError: an image cannot be read, there is no such model, or nothing can be hidden.
    """
    import torch

    from common.drops import find_drops

    views = [crop(image, args.input_size) for image in read_images(args)]
    models = {name: build(name, args.input_size) for name in args.model}
    torch.manual_seed(args.seed)
    rows = []
    for view in views:
        for name, model in models.items():
            cells = [view, *(hide(view, model, ratio, args.block) for ratio in args.ratios)]
            rows.append((f"{name}: {find_drops(model)['masking']}", cells))
    return compose(rows, ["image", *(f"p = {ratio:g}" for ratio in args.ratios)], args.input_size)


def read_images(args: argparse.Namespace) -> list[Image.Image]:
    """Return the images to show, in RGB.

    Raises:
        ValueError: one cannot be read.
    """
    from common.data.bad_samples import READ_ERRORS, explain_read_error
    from common.data.datasets import open_class_folders
    from common.data.folders import find_folder
    from common.data.images import open_image, to_rgb
    from scripts.predict import find_images

    if args.data_path is not None:
        data = open_class_folders(find_folder(Path(args.data_path), train=False))
        step = max(1, len(data) // args.count)
        paths = [data.sample_name(index) for index in range(0, len(data), step)][: args.count]
    elif args.images:
        paths = find_images(args.images)
    else:
        from PIL import Image
        from sklearn.datasets import load_sample_images

        return [to_rgb(Image.fromarray(pixels)) for pixels in load_sample_images().images]
    images = []
    for path in paths:
        try:
            images.append(to_rgb(open_image(Path(path).read_bytes())))
        except READ_ERRORS as error:
            raise ValueError(f"{path}: unreadable ({explain_read_error(error)})") from error
    return images


def crop(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side and crop the centre → (3, size, size) in [0, 1]."""
    from torchvision.transforms import functional

    return functional.to_tensor(functional.center_crop(functional.resize(image, size, antialias=True), [size, size]))


def build(name: str, size: int) -> nn.Module:
    """Build a model for images of this side, without memory for weights, since only the places of its patches matter.

    Raises:
        ValueError: timm has no such model, or not of this image size.
    """
    import timm
    import torch

    from common.models import suggest_models

    if not timm.is_model(name):
        raise ValueError(f"--model {name}: timm has no such model; {suggest_models(name)}")
    try:
        cfg = timm.get_pretrained_cfg(name)
        settings = {"img_size": size} if cfg is None or cfg.fixed_input_size else {}
        with torch.device("meta"):
            return timm.create_model(name, **settings)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"--model {name}: cannot be built for --input-size {size} ({error})") from error


def hide(view: Tensor, model: nn.Module, ratio: float, block: int) -> Tensor:
    """Draw what is hidden of an image (3, H, W) → the image with that replaced by a colour."""
    import torch

    from common.augsub import AugSub

    if not ratio:
        return view
    augsub = AugSub(model, "masking", ratio, block=block)
    with augsub.sub_model():
        hidden, colour = hidden_pixels(view, augsub)
    augsub.remove()
    return torch.where(hidden, torch.tensor(colour)[:, None, None], view)


def hidden_pixels(view: Tensor, augsub: AugSub) -> tuple[Tensor, tuple[float, ...]]:
    """Draw which pixels (H, W) of an image (3, H, W) are hidden, by the code that hides them in training; and the
    colour to show that in, in [0, 1]."""
    import torch
    from timm.layers import PatchDropout, to_2tuple

    from common.masking import PixelMask, TokenMask

    model: Any = augsub.model
    mask: Any = augsub.switches[0].module
    size = (view.shape[-2], view.shape[-1])
    if augsub.drop == PixelMask.name:
        return mask.draw_for(view[None])[0], tuple(model.pretrained_cfg["mean"])
    embed: Any = getattr(model, "patch_embed", None)
    if not hasattr(embed, "patch_size"):
        raise ValueError(f"--model: the patches of a {type(model).__name__} are not in a grid that can be drawn")
    patch = to_2tuple(getattr(getattr(embed, "proj", None), "stride", embed.patch_size))  # patches may overlap
    grid = (size[0] // patch[0], size[1] // patch[1])
    if augsub.drop == TokenMask.name:
        hidden = mask.draw(1, grid, mask.block_in(grid, size), view.device)[0]
        return enlarge(hidden, patch, size), tuple(level / 255 for level in GREY)
    tokens = torch.arange(grid[0] * grid[1]).view(1, -1, 1)
    kept = PatchDropout(augsub.ratio, num_prefix_tokens=0)(tokens).flatten()
    return enlarge(~torch.isin(tokens.view(grid), kept), patch, size), tuple(level / 255 for level in WHITE)


def enlarge(grid: Tensor, patch: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Patches (rows, columns) → their pixels (H, W); False where the size is no multiple of the patch's."""
    pixels = grid.repeat_interleave(patch[0], dim=0).repeat_interleave(patch[1], dim=1)
    whole = grid.new_zeros(size)
    whole[: len(pixels), : len(pixels[0])] = pixels
    return whole


def compose(rows: list[tuple[str, list[Tensor]]], titles: list[str], size: int) -> bytes:
    """Lay out rows of images (3, size, size) under their labels, and columns under their titles → a PNG file."""
    import io

    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.functional import to_pil_image

    row_height, column_width = LABEL_HEIGHT + size + GAP, size + GAP
    picture = Image.new("RGB", (len(titles) * column_width + GAP, LABEL_HEIGHT + len(rows) * row_height + GAP), WHITE)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    for column, title in enumerate(titles):
        canvas.text((column * column_width + GAP, GAP), title, BLACK, font)
    for row, (label, cells) in enumerate(rows):
        top = LABEL_HEIGHT + row * row_height + GAP
        canvas.text((GAP, top), label, BLACK, font)
        for column, cell in enumerate(cells):
            left = column * column_width + GAP
            picture.paste(to_pil_image(cell), (left, top + LABEL_HEIGHT))
            frame = (left - 1, top + LABEL_HEIGHT - 1, left + size, top + LABEL_HEIGHT + size)
            canvas.rectangle(frame, outline=GREY)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
