"""--input fast against PIL and timm: each operation, what is drawn, whole pipelines, broken files, runs that go on."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from common.args import parse
from common.data.bad_samples import READ_ERRORS
from common.data.datasets import open_dataset
from common.data.fast import decode as decoding
from common.data.fast import ops as device
from common.data.fast.decode import decode, read_jpeg_header
from common.data.fast.ops import OPERATIONS, DeferredBatch
from common.data.fast.recorder import FastTransform, OpRecorder
from common.data.loader import (
    AugmentedDataset,
    FastAugmentedDataset,
    build_train_loader,
    collate,
    iterate_epoch,
    seeded_rng,
)
from common.data.transforms import create_augment, evaluation_transform, training_stages, training_transform
from common.data_config import augment_config, dataset_config, loader_config, preprocessing_config
from common.distributed import Process
from deit.recipe import RECIPE
from scripts.bench.args import check_args, parse_modes
from tests.commands import run
from tests.runs import RANDOM, assert_same_bits, load_checkpoint, run_refused, start, stop_after
from tests.sample_data import make_shards

CPU = torch.device("cpu")
ONE_PROCESS = Process(CPU)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
FILL = (124, 116, 104)
THREE = ["--ThreeAugment", "--color-jitter", "0.3", "--reprob", "0"]
RAND = ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0"]
RESNET = ["--aa", "rand-m7-mstd0.5", "--train-interpolation", "random", "--color-jitter", "0", "--reprob", "0"]


def settings(*flags: str):
    where = [] if {"--data-path", "--data-set"} & {*flags} else ["--data-path", "x"]
    return parse(RECIPE, ["--num-workers", "0", "--batch-size", "4", "--input-size", "64", "--no-repeated-aug",
                          "--input", "fast", *where, *flags])  # fmt: skip


@cache
def photographs(side: int = 160) -> tuple[Image.Image, ...]:
    """Parts of scikit-learn's two photographs; the last one is dim, so that contrast can be stretched."""
    images = [Image.fromarray(photo[40 : 40 + side, 100 : 100 + side]) for photo in load_sample_images().images]
    return (*images, images[0].point(lambda value: value // 2 + 20))


def batch_of(images) -> Tensor:
    return torch.stack([pil_to_tensor(image) for image in images])


def differences(theirs, name: str, *numbers: float) -> Tensor:
    """Grey levels between timm's operation on each photograph and ours on all of them."""
    rows = torch.tensor([[*numbers, *[0.0] * (device.MAX_OP_PARAMS - len(numbers))]]).repeat(len(photographs()), 1)
    ours = device.PIXEL_OPS[name](batch_of(photographs()), rows)
    assert ours.dtype == torch.uint8
    return (batch_of([theirs(image) for image in photographs()]).int() - ours.int()).abs()


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "invert"])
def test_operations_without_a_number_are_pils_to_the_bit(name):
    assert differences(getattr(auto_augment, name), name).max() == 0


@pytest.mark.parametrize("name", ["auto_contrast", "equalize"])
@pytest.mark.parametrize("level", [0, 7, 255])
def test_images_of_one_colour_stay_as_they_are(name, level):
    image = Image.new("RGB", (16, 16), (level, level, 0))
    ours = device.PIXEL_OPS[name](pil_to_tensor(image)[None], torch.zeros(1, device.MAX_OP_PARAMS))
    assert torch.equal(ours[0], pil_to_tensor(getattr(auto_augment, name)(image)))


@pytest.mark.parametrize("name", ["brightness", "color", "contrast", "sharpness"])
@pytest.mark.parametrize("factor", [0.1, 0.5, 0.95, 1.0, 1.07, 1.5, 1.9])
def test_enhancements_are_pils_to_the_bit(name, factor):
    assert differences(lambda image: getattr(auto_augment, name)(image, factor), name, factor).max() == 0


@pytest.mark.parametrize(("name", "numbers"), [
    ("posterize", (0, 1, 2, 3, 4, 5, 6, 7)), ("solarize", (0, 1, 26, 128, 255, 256)), ("solarize_add", (0, 1, 50, 128)),
])  # fmt: skip
def test_operations_on_grey_levels_are_pils_to_the_bit(name, numbers):
    for number in numbers:
        assert differences(lambda image: getattr(auto_augment, name)(image, number), name, number).max() == 0  # noqa: B023


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.77, 1.0, 1.25, 1.5, 1.9, 2.0])
def test_the_blur_is_pils_to_the_bit(sigma):
    """PIL's is no Gaussian but three box blurs, and so is ours."""
    assert differences(lambda image: auto_augment.gaussian_blur(image, sigma), "gaussian_blur", sigma).max() == 0


@pytest.mark.parametrize("filtering", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("name", "number"), [
    ("rotate", 27.0), ("rotate", -13.3), ("rotate", 0.0), ("shear_x", 0.3), ("shear_y", -0.27),
    ("translate_x_rel", 0.31), ("translate_y_rel", -0.405), ("translate_x_abs", 10.0), ("translate_y_abs", 33.4),
])  # fmt: skip
def test_affine_operations_are_pils_up_to_a_rounding(filtering, name, number):
    """Positions here are float32 and PIL's float64: what falls onto a whole number is cut off to either side of it."""
    arguments = {"resample": Image.Resampling[filtering.upper()], "fillcolor": FILL}
    operation = getattr(auto_augment, name)
    plan = OpRecorder(160)
    assert operation(plan, number, **arguments) is plan
    ((place, *numbers),) = plan.rows
    assert OPERATIONS[int(place)] == filtering
    images = photographs()
    ours = device.affine(batch_of(images), torch.tensor([numbers] * len(images)), device.AFFINE_FILTERS[filtering],
                         torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1))  # fmt: skip
    off = (batch_of([operation(image, number, **arguments) for image in images]).int() - ours.int()).abs().float()
    assert (off > 0).float().mean() < 0.05
    if filtering != "nearest":  # where a position between two pixels is taken to the other one
        assert off.max() <= 1


@pytest.mark.parametrize("filtering", ["bilinear", "bicubic"])
def test_what_is_of_one_colour_stays_so_between_pixels(filtering):
    """As in PIL, at all grey levels: a cubic's weights, whose sum may be just below 1, would make 254 of 255, and
    equalize more of it."""
    levels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    for shift in np.linspace(-3, 3, 41):
        numbers = torch.tensor([[1.0, 0.03, shift, -0.02, 1.0, shift / 3]]).repeat(256, 1)
        ours = device.affine(levels, numbers, device.AFFINE_FILTERS[filtering], torch.zeros(3, 1, 1, dtype=torch.uint8))
        for level in (1, 100, 255):
            theirs = Image.new("RGB", (16, 16), (level,) * 3).transform(
                (16, 16), Image.Transform.AFFINE, numbers[0].tolist(), Image.Resampling[filtering.upper()]
            )
            assert torch.equal(ours[level], pil_to_tensor(theirs))
        assert ((ours == levels) | (ours == 0)).all()


def items_of(flags: list[str], seeds: range, data=None) -> tuple[Tensor, Tensor, DeferredBatch]:
    """The images of timm's pipeline and of ours, drawn from the same seeds, and what ours are made from."""
    args = settings(*flags)
    data = data or [(image, 0) for image in photographs()]
    pil, fast = (
        AugmentedDataset(data, training_transform(augment_config(args))),
        FastAugmentedDataset(data, FastTransform(*training_stages(augment_config(args)))),
    )
    theirs, _, _ = collate([pil[seed % len(data), seed] for seed in seeds])
    raw, _, _ = collate([fast[seed % len(data), seed] for seed in seeds])
    augment = create_augment(augment_config(args), CPU)
    assert isinstance(theirs, Tensor) and isinstance(raw, DeferredBatch) and augment is not None
    return theirs, augment(raw), raw


@pytest.mark.parametrize("flags", [
    THREE, RAND, RESNET, [*THREE, "--src"], ["--aa", "original-mstd0.5", "--reprob", "0"],
    ["--aa", "v0", "--reprob", "0", "--vflip", "0.5"], ["--aa", "rand-m8-n3-t3aw-mstd101", "--reprob", "0"],
    ["--aa", "none", "--reprob", "0.7", "--remode", "const", "--recount", "3", "--color-jitter", "0.4"],
    ["--aa", "none", "--reprob", "0", "--hflip", "0", "--train-interpolation", "nearest"],
])  # fmt: skip
def test_the_same_seed_gives_the_image_that_timm_gives(flags):
    """The whole pipeline. A resize that is rounded to the other side may be on the other side of a threshold."""
    theirs, ours, _ = items_of(flags, range(60))
    assert ours.shape == theirs.shape == (60, 3, 64, 64)
    off = ((theirs - ours) * STD).abs()
    assert off.mean() < 0.05 and off.mean((1, 2, 3)).max() < 1


@pytest.mark.parametrize(("mean", "std", "fill"), [
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (128, 128, 128)), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0, 0, 0)),
    ((0.1, 0.9, 1.0), (0.2, 0.3, 0.4), (26, 230, 255)),
])  # fmt: skip
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original-mstd0.5"])
def test_a_models_own_mean_and_std_give_the_image_that_timm_gives(policy, mean, std, fill):
    """What rotations and shifts leave empty gets the mean as its colour; what is erased gets 0 after normalisation."""
    flags = ["--aa", policy, "--reprob", "0.7", "--remode", "const", "--mean", *map(str, mean), "--std", *map(str, std)]
    theirs, ours, _ = items_of(flags, range(60))
    off = ((theirs - ours) * torch.tensor(std).view(3, 1, 1) * 255).abs()
    assert off.mean() < 0.05 and off.mean((1, 2, 3)).max() < 1
    augment = create_augment(augment_config(settings(*flags)), CPU)
    assert augment is not None and tuple(augment.fill.flatten().tolist()) == fill
    erased = (ours == 0).all(1).flatten(1).any(1).float().mean()
    assert erased > 0.5


def test_what_is_drawn_is_what_timm_draws(monkeypatch):
    """Crop and operations are the same for the same seed; flips, erasing, operations and crop for others are
    distributed alike."""
    args = settings(*RAND, "--reprob", "0.25")
    crop, change, _ = training_stages(augment_config(args))
    transform = FastTransform(*training_stages(augment_config(args)))
    names: list[str] = []
    boxes: list[tuple] = []

    def spied(function):
        return lambda *given, **named: names.append(function.__name__) or function(*given, **named)

    def get_params(*given):
        boxes.append(plain(*given))
        return boxes[-1]

    for operation in change.transforms[0].ops:
        operation.aug_fn = spied(operation.aug_fn)
    plain = RandomResizedCropAndInterpolation.get_params
    monkeypatch.setattr(RandomResizedCropAndInterpolation, "get_params", staticmethod(get_params))
    affine = {"rotate", "shear_x", "shear_y", "translate_x_rel", "translate_y_rel"}
    image, same, many = Image.new("RGB", (50, 40)), 600, 2400
    results = []
    for first in (0, 10_000):
        theirs, ours, extra = [], [], Counter()
        boxes.clear()
        for seed in range(many):
            names.clear()
            with seeded_rng(seed):
                change(crop(image))
            theirs.append(["bicubic" if name in affine else name for name in names])
        for seed in range(first, first + (many if first else same)):
            with seeded_rng(seed):
                plan = [OPERATIONS[int(place)] for place in transform(image).ops[:, 0]]
            ours.append([name for name in plan if name not in ("no_op", "hflip", "erase")])
            extra.update(set(plan) & {"hflip", "erase"})
        results.append((theirs, ours, boxes[:many], boxes[many:], extra))
    theirs, ours, crops, own_crops, _ = results[0]
    assert ours == theirs[:same] and own_crops == crops[:same]
    theirs, ours, crops, own_crops, extra = results[1]
    counts = [Counter(name for drawn in side for name in drawn) for side in (theirs, ours)]
    assert counts[0].keys() == counts[1].keys() and len(counts[0]) == 11
    assert stats.chi2_contingency([[side[name] for name in sorted(counts[0])] for side in counts]).pvalue > 1e-3
    assert stats.binomtest(extra["hflip"], many, 0.5).pvalue > 1e-3
    assert stats.binomtest(extra["erase"], many, 0.25).pvalue > 1e-3
    for k in range(4):  # top, left, height, width
        assert stats.ks_2samp([box[k] for box in crops], [box[k] for box in own_crops]).pvalue > 1e-3


@pytest.mark.parametrize("flags", [THREE, RAND, RESNET])
def test_pixels_have_the_mean_and_variance_of_timms(flags):
    """Of different seeds: 300 images each way, means and variances of images compared by Welch's test."""
    theirs, _, _ = items_of([*flags, "--input-size", "32"], range(300))
    _, ours, _ = items_of([*flags, "--input-size", "32"], range(600, 900))
    for channel in range(3):
        for statistic in (torch.mean, torch.var):
            values = [statistic(images[:, channel].flatten(1), dim=1).numpy() for images in (theirs, ours)]
            assert stats.ttest_ind(*values, equal_var=False).pvalue > 1e-3


def test_each_image_of_a_batch_gets_its_own_plan():
    """In a batch as alone, whatever the others drew."""
    _, together, raw = items_of([*RAND, "--hflip", "0.5", "--reprob", "0.5", "--remode", "const"], range(40))
    before = raw.pixels.clone()
    augment = create_augment(augment_config(settings("--remode", "const")), CPU)
    alone = torch.cat([augment(DeferredBatch(raw.pixels[k : k + 1], raw.ops[k : k + 1])) for k in range(40)])
    assert torch.equal(alone, together)
    assert torch.equal(raw.pixels, before), "what the loader gave is left alone"


@pytest.mark.parametrize("mode", ["rand", "pixel"])
def test_erased_regions_have_colours_drawn_on_the_device(mode):
    flags = ["--aa", "none", "--color-jitter", "0", "--recount", "1", "--remode", mode, "--reprob"]
    theirs, ours, raw = items_of([*flags, "1"], range(40))
    _, plain, _ = items_of([*flags, "0"], range(40))
    inside = torch.zeros(40, 1, 64, 64, dtype=torch.bool)
    for k, row in enumerate(raw.ops[:, -1]):
        assert OPERATIONS[int(row[0])] == "erase"
        top, left, height, width = row[1:5].int().tolist()
        inside[k, :, top : top + height, left : left + width] = True
    inside = inside.expand_as(ours)
    assert torch.equal(ours[~inside], plain[~inside]), "the same crops and flips, and nothing else is touched"
    assert ((theirs - ours).abs()[~inside] < 0.05).all(), "the regions are timm's"
    drawn = ours[inside] if mode == "pixel" else ours[inside].unique()
    assert len(drawn.unique()) == (len(drawn) if mode == "rand" else pytest.approx(len(drawn), rel=0.01))
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3


def encoded(image: Image.Image, format: str, **kwargs) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **kwargs)
    return content.getvalue()


@pytest.mark.parametrize(("mode", "format", "kwargs"), [
    ("RGB", "JPEG", {"quality": 90}), ("RGB", "JPEG", {"progressive": True}), ("RGB", "JPEG", {"subsampling": 0}),
    ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "PNG", {}), ("L", "PNG", {}), ("P", "PNG", {}), ("1", "PNG", {}),
    ("RGBA", "PNG", {}), ("RGB", "WEBP", {"lossless": True}), ("RGBA", "WEBP", {}),
    ("RGB", "BMP", {}), ("P", "GIF", {}), ("RGB", "TIFF", {}),
])  # fmt: skip
def test_files_of_every_kind_are_decoded_as_pil_does(mode, format, kwargs):
    content = encoded(photographs()[0].convert(mode), format, **kwargs)
    for given in (content, bytearray(content)):
        assert torch.equal(decoded(given), opened(content))


@pytest.mark.parametrize("kwargs", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 0}])
def test_simplejpeg_decodes_jpegs_as_pil_does_to_the_bit(kwargs):
    content = encoded(photographs()[0], "JPEG", **kwargs)
    ours = decode(content, read_jpeg_header(content))
    assert isinstance(ours, Tensor) and torch.equal(ours, opened(content))
    content = encoded(photographs()[0], "PNG")
    assert isinstance(decode(content, read_jpeg_header(content)), Image.Image), "PIL decodes all else"


def damaged(draw: np.random.Generator, content: bytes) -> bytes:
    """With one to three bytes changed, of the header or the pixels."""
    changed = bytearray(content)
    for _ in range(draw.integers(1, 4)):
        changed[draw.integers(draw.choice([2, content.index(b"\xff\xda")]), len(changed) - 2)] = draw.integers(256)
    return bytes(changed)


def test_rows_above_are_pils_to_the_bit_and_what_is_below_is_spared():
    """Of JPEGs of all kinds and sizes, and of damaged ones, of which PIL refuses some. 400 of them."""
    draw = np.random.default_rng(0)
    spared, refused_by_pil = Counter[str](), 0
    for turn in range(400):
        height, width = draw.integers(1, 90, 2)
        photo = photographs()[turn % 3].crop((0, 0, width, height))
        more: dict = {"subsampling": ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "4:2:0"][turn % 5]}
        kind = ("RGB", "RGB", "L", "progressive", "restarts", "stored as RGB")[turn % 6]
        if kind == "progressive":
            more["progressive"] = True
        if kind == "restarts":
            more["restart_marker_blocks"] = 2
        if kind == "stored as RGB":
            more = {"keep_rgb": True, "subsampling": "4:4:4"}
        content = encoded(photo.convert("L") if kind == "L" else photo, "JPEG", quality=int(draw.integers(5, 100)),
                          **more)  # fmt: skip
        content = damaged(draw, content) if turn % 4 == 0 else content
        rows = int(draw.integers(1, height + 1))
        theirs, ours = (outcome(make) for make in (partial(opened, content), partial(decoded, content, rows)))
        if theirs is None or ours is None:
            assert theirs is None and ours is None
            refused_by_pil += 1
            continue
        assert torch.equal(theirs[:, :rows], ours[:, :rows])
        if turn % 4:
            assert ours.shape[1:] == (min(rows + 4, height) if kind in ("RGB", "L", "stored as RGB") else height, width)
            spared[kind] += int(ours.shape[1] < height)
    assert refused_by_pil > 10 and min(spared[kind] for kind in ("RGB", "L", "stored as RGB")) > 10


def opened(content: bytes) -> Tensor:
    """PIL's pixels."""
    return pil_to_tensor(Image.open(io.BytesIO(content)).convert("RGB"))


def decoded(content: bytes | bytearray, rows: int | None = None) -> Tensor:
    """Ours."""
    image = decode(content, read_jpeg_header(content), rows)
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


def outcome(make: Callable[[], Tensor]) -> Tensor | None:
    """None where the file is refused."""
    try:
        return make()
    except READ_ERRORS:
        return None


@pytest.mark.parametrize("flags", [THREE, RESNET, [*RAND, "--src"]])
def test_simplejpeg_changes_no_bit(flags, jpegs, monkeypatch):
    args = settings("--data-path", str(jpegs()), *flags)
    data = open_dataset(dataset_config(args), train=True)
    views = FastAugmentedDataset(data, FastTransform(*training_stages(augment_config(args))))
    before, _, _ = collate([views[seed % len(data), seed] for seed in range(100)])
    monkeypatch.setattr(decoding, "decode_rows", lambda *given: None)  # then PIL decodes
    after, _, _ = collate([views[seed % len(data), seed] for seed in range(100)])
    assert torch.equal(before.pixels, after.pixels) and torch.equal(before.ops, after.ops)


def broken(folder) -> None:
    """Files that are no image, among those of `jpegs`: cut at many places, empty, a text, two bombs."""
    files = sorted((folder / "train" / "cat").iterdir())
    content = files[0].read_bytes()
    ends = np.linspace(1, len(content) - 1, 8).astype(int)
    for path, end in zip(files, [*ends, len(content) - 2]):  # the last one lacks the end marker alone
        path.write_bytes(content[:end])
    files[9].write_bytes(b"")
    files[10].write_text("this is no picture")
    files[11].write_bytes(encoded(Image.new("1", (20_000, 20_000)), "PNG"))
    frame = content.index(b"\xff\xc0") + 5
    files[12].write_bytes(content[:frame] + b"\x75\x30\x75\x30" + content[frame + 4 :])  # 30,000 x 30,000 pixels
    files[13].write_bytes(content + b"what follows the end is nobody's concern")


def test_what_pil_cannot_read_is_named_and_replaced_as_with_pil(jpegs):
    folder = jpegs()
    broken(folder)
    args = settings("--data-path", str(folder))
    data = open_dataset(dataset_config(args), train=True)
    pil, fast = (
        AugmentedDataset(data, evaluation_transform(preprocessing_config(args))),
        FastAugmentedDataset(data, FastTransform(*training_stages(augment_config(args)))),
    )
    found: list[tuple[str, str]] = []
    for index in range(len(data)):
        theirs, ours = pil[index, 5], fast[index, 5]
        assert ours[1:] == theirs[1:], "names and reasons"
        found += ours[2]
    assert len(found) == 13


@pytest.mark.parametrize("kind", ["folder", "shards", "digits"])
def test_the_number_of_loader_processes_changes_nothing(kind, jpegs, tmp_path):
    """Nor where an epoch is begun. Images, labels and plans are the same to the bit."""
    where = {"folder": lambda: ["--data-path", str(jpegs())], "shards": lambda: make_shards(tmp_path / "shards"),
             "digits": lambda: ["--data-set", "DIGITS"]}[kind]()  # fmt: skip
    batches: dict[str, list] = {}
    for number in ("0", "1", "2"):
        args = settings(*where, *THREE, "--reprob", "0.3", "--num-workers", number)
        data = open_dataset(dataset_config(args), train=True)
        loader, _ = build_train_loader(data, loader_config(args), augment_config(args), ONE_PROCESS)
        stream = iterate_epoch(loader, 3, 2 if number == "2" else 0)
        batches[number] = [batch for _, batch in zip(range(4), stream)]
    for number, skipped in (("1", 0), ("2", 2)):
        for (raw, labels, _), (other, other_labels, _) in zip(batches["0"][skipped:], batches[number]):
            assert torch.equal(raw.pixels, other.pixels) and torch.equal(raw.ops, other.ops)
            assert torch.equal(labels, other_labels)
    assert raw.pixels.dtype == torch.uint8 and raw.pixels.shape == (4, 3, 64, 64)


def test_shards_and_folders_give_the_images_of_pil(tmp_path, jpegs):
    for where in (make_shards(tmp_path / "shards"), ["--data-path", str(jpegs())]):
        data = open_dataset(dataset_config(settings(*where)), train=True)
        theirs, ours, _ = items_of([*where, *THREE], range(24), data)
        assert ((theirs - ours) * STD).abs().mean() < 0.1
        assert [data.read_encoded(k)[1] for k in range(24)] == [data[k][1] for k in range(24)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["--accum-iter", "2", "--reprob", "0.5", "--remode", "rand", "--num-workers", "1"]]
)
def test_a_run_that_is_asked_to_stop_goes_on_to_the_same_bits(more, jpegs, tmp_path, monkeypatch, capsys):
    flags = ["--data-path", str(jpegs()), *RANDOM, "--input", "fast", *more, "--output-dir"]
    start(*flags, str(tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3 if more else 6)
        start(*flags, str(tmp_path / "stopped"))
    assert load_checkpoint(tmp_path / "stopped")["position"]["update"] in (1, 2)
    start(*flags, str(tmp_path / "stopped"))
    assert_same_bits(tmp_path / "undisturbed", tmp_path / "stopped")
    error = run_refused(capsys, *flags, str(tmp_path / "stopped"), "--input", "pil")
    assert "holds a run with other settings (input fast → pil" in error


@pytest.mark.slow
def test_a_run_of_its_own_trains_on_shards(tmp_path):
    flags = [*make_shards(tmp_path / "shards"), "--nb-classes", "24", "--batch-size", "4", "--epochs", "1", "--input",
             "fast", "--model", "deit_pico_patch8_LS", "--input-size", "32", "--num-workers", "1", "--warmup-epochs", "0",
             *RANDOM]  # fmt: skip
    done = run(*flags, "--output-dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout and done.stderr.count("Error") == 0


@pytest.mark.parametrize(("flags", "words"), [
    (["--input", "gpu"], "--input: invalid choice: 'gpu' (choose from"),
    (["--aa", "augmix-m3"], "--aa: --input fast does not support AugMixAugment; use --input pil"),
    (["--train-interpolation", "lanczos"], "--train-interpolation lanczos: not supported by --input fast; use bicubic, bilinear,"),
])  # fmt: skip
def test_what_it_lacks_is_refused_in_a_sentence(flags, words, capsys):
    assert words in run_refused(capsys, "--data-set", "DIGITS", "--input", "fast", *flags)


def test_it_needs_simplejpeg(capsys, monkeypatch):
    """With PIL's pipeline nothing does."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert parse(RECIPE, ["--data-path", "x"]).input == "pil"
    words = "--input fast: simplejpeg is missing; pip install simplejpeg"
    assert words in run_refused(capsys, "--data-path", "x", "--input", "fast")
    with pytest.raises(ValueError, match=words):
        check_args("data", parse_modes("data", RECIPE, [])[0].args)


def test_an_operation_that_it_lacks_is_named(monkeypatch):
    monkeypatch.setitem(auto_augment.NAME_TO_OP, "Solarize", lambda image, *_, **__: image)
    with pytest.raises(ValueError, match="--aa: --input fast does not support Solarize; use --input pil"):
        FastTransform(*training_stages(augment_config(settings("--ThreeAugment"))))


def test_nothing_to_augment_is_a_crop():
    flags = ["--aa", "none", "--color-jitter", "0", "--reprob", "0", "--hflip", "0"]
    theirs, ours, raw = items_of(flags, range(6))
    assert raw.ops.shape == (6, 0, 1 + device.MAX_OP_PARAMS)
    assert ((theirs - ours) * STD).abs().max() < 2.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait_for_the_gpu_which_augments_as_the_cpu():
    _, ours, raw = items_of([*RAND, "--remode", "const", "--reprob", "0.5"], range(60))
    augment = create_augment(augment_config(settings("--remode", "const")), torch.device("cuda"))
    augment(raw)
    torch.cuda.set_sync_debug_mode("error")
    try:
        theirs = augment(raw)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ((theirs.cpu() - ours) * STD).abs().mean() < 0.05
