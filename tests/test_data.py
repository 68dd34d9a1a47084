"""Data: the same augmented images whatever the number of loader processes, each evaluation image once, broken files."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform

from common.args import parse
from common.data import (
    Digits,
    Views,
    check_classes,
    evaluation_loader,
    evaluation_transform,
    open_data_set,
    training_loader,
    training_transform,
)
from common.dist import Process
from common.engine import StopTraining, Unreadable, evaluate
from deit.recipe import RECIPE

ALONE = Process(torch.device("cpu"))


def settings(*flags: str):
    return parse(RECIPE, ["--num-workers", "0", "--batch-size", "4", "--input-size", "32", *flags])


def first_batches(args, data, epoch=0, batches=3):
    loader, _ = training_loader(args, data, ALONE)
    loader.sampler.set_epoch(epoch)
    return [(images, labels) for _, (images, labels, _) in zip(range(batches), loader)]


def same(some, others) -> bool:
    return all(torch.equal(a, b) for one, other in zip(some, others) for a, b in zip(one, other))


def test_digits_are_split_once_for_all():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    assert set(Counter(val.targets).values()) <= {35, 36, 37}
    assert val.targets[:6] == Digits(train=False).targets[:6]
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in val.images) == 0
    assert (val[0][0].size, val[0][0].mode) == ((32, 32), "RGB")


def test_augmentation_follows_from_seed_epoch_and_place_alone(jpegs):
    flags = ["--data-path", str(jpegs()), "--ThreeAugment", "--color-jitter", "0.3"]
    data = open_data_set(settings(*flags), train=True)
    alone = first_batches(settings(*flags), data)
    for workers in ("1", "3"):
        assert same(alone, first_batches(settings(*flags, "--num-workers", workers), data))
    assert not same(alone, first_batches(settings(*flags), data, epoch=1))
    assert not same(alone, first_batches(settings(*flags, "--seed", "1"), data))


def test_augmentation_leaves_the_global_generators_alone(jpegs):
    args = settings("--data-path", str(jpegs()))
    data = open_data_set(args, train=True)
    states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: E731
    before = states()
    Views(data, training_transform(args))[0, 123]
    assert states() == before


def test_repeated_augmentation_works_on_one_process():
    args = settings("--data-set", "DIGITS", "--repeated-aug")
    loader, batches = training_loader(args, Digits(train=True), ALONE)
    places = list(loader.sampler)
    assert set(Counter(index for index, _ in places).values()) == {3, 2} or max(
        Counter(index for index, _ in places).values()) == 3  # fmt: skip
    assert len({seed for _, seed in places}) == len(places), "three different views of an image"
    assert batches == 1280 // 4


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_evaluation_shares_hold_each_image_once(processes):
    args = settings("--data-set", "DIGITS", "--batch-size", "50")
    data = Digits(train=False)
    labels: list[int] = []
    for rank in range(processes):
        loader = evaluation_loader(args, data, Process(torch.device("cpu"), rank, processes))
        labels += [int(label) for _, batch, _ in loader for label in batch]
    assert Counter(labels) == Counter(data.targets)
    assert len(labels) == 360


def break_files(folder: Path) -> list[Path]:
    """A cut, an empty, a text and a decompression-bomb file among JPEGs."""
    files = sorted((folder / "train" / "cat").iterdir())[:4]
    files[0].write_bytes(files[0].read_bytes()[:300])
    files[1].write_bytes(b"")
    files[2].write_text("this is no picture")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    files[3].write_bytes(bomb.getvalue())
    return files


def test_unreadable_images_are_named_replaced_and_counted(jpegs):
    folder = jpegs()
    broken = break_files(folder)
    args = settings("--data-path", str(folder))
    views = Views(open_data_set(args, train=True), evaluation_transform(args))
    for index, path in enumerate(broken):
        image, label, unreadable = views[index, 0]
        assert (image.shape, label, unreadable) == ((3, 32, 32), 0, index)
        assert views.name_of(unreadable) == str(path)
    assert views[4, 0][2] == -1
    said: list[str] = []
    few = Unreadable(400, views.name_of, said.append)
    few.add(torch.tensor([-1, 0, 1, 2, 3, 0]))
    few.check()
    assert [line.endswith(str(path)) for line, path in zip(said, broken)] == [True] * 4
    few.add(torch.tensor([0, 1]))
    few.check()
    assert len(said) == 4, "each is named once"
    many = Unreadable(399, views.name_of, said.append)
    many.add(torch.tensor([0, 1, 2, 3]))
    with pytest.raises(StopTraining, match="4 of 399 training images could not be read, more than 1 %"):
        many.check()


def test_evaluation_leaves_unreadable_images_out(jpegs):
    folder = jpegs(val=6)
    (folder / "val" / "dog" / "002.jpg").write_text("broken")
    args = settings("--data-path", str(folder), "--batch-size", "2")
    loader = evaluation_loader(args, open_data_set(args, train=False), ALONE)

    class SaysCat(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    result = evaluate(SaysCat(), loader, ALONE)
    assert (result["images"], result["acc1"]) == (11, pytest.approx(100 * 6 / 11))


def test_folders_that_will_not_do(jpegs, tmp_path):
    def refused(words, *flags, train=True):
        with pytest.raises(ValueError, match=words):
            open_data_set(settings(*flags), train=train)

    refused("there is no such folder", "--data-path", str(tmp_path / "none"))
    refused("has no folder train: train/<class>", "--data-path", str(tmp_path))
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    refused("no images could be read", "--data-path", str(tmp_path / "empty"))
    refused("has no folder val or validation", "--data-path", str(tmp_path / "empty"), train=False)
    refused("no images could be read", "--data-set", "CIFAR10", "--data-path", str(tmp_path))
    refused("no images could be read", "--data-set", "INAT", "--data-path", str(tmp_path))
    refused("no images could be read", "--data-set", "wds/x", "--data-path", str(tmp_path))
    refused("no images could be read", "--data-set", "torch/nothing", "--data-path", str(tmp_path))


def test_train_and_val_need_the_same_classes(jpegs):
    folder = jpegs()
    args = settings("--data-path", str(folder))
    train, val = (open_data_set(args, train=t) for t in (True, False))
    assert check_classes(train, val) == 2
    (folder / "train" / "dog").rename(folder / "train" / "hen")
    with pytest.raises(ValueError, match="1 of train, such as 'hen', are not in val"):
        check_classes(open_data_set(args, train=True), val)


def test_validation_may_be_called_validation(jpegs):
    folder = jpegs()
    (folder / "val").rename(folder / "validation")
    assert len(open_data_set(settings("--data-path", str(folder)), train=False)) == 12


def test_inaturalist_is_read_at_the_level_asked_for(tmp_path):
    names = [{"id": 0, "name": "robin", "class": "bird"}, {"id": 1, "name": "wren", "class": "bird"},
             {"id": 2, "name": "frog", "class": "amphibian"}]  # fmt: skip
    (tmp_path / "categories.json").write_text(json.dumps(names))
    for split in ("train", "val"):
        entries = [{"id": 10 + i, "file_name": f"{split}/{i}.jpg"} for i in range(3)]
        links = [{"image_id": 10 + i, "category_id": i} for i in range(3)]
        (tmp_path / f"{split}2019.json").write_text(json.dumps({"images": entries, "annotations": links}))
        (tmp_path / split).mkdir()
        for i in range(3):
            Image.new("RGB", (40, 40), (i * 90, 0, 0)).save(tmp_path / split / f"{i}.jpg")
    flags = ["--data-set", "INAT19", "--data-path", str(tmp_path)]
    by_name = open_data_set(settings(*flags), train=True)
    by_class = open_data_set(settings(*flags, "--inat-category", "class"), train=False)
    assert [by_name[i][1] for i in range(3)] == [1, 2, 0]
    assert [by_class[i][1] for i in range(3)] == [1, 1, 0]
    assert abs(by_class[2][0].getpixel((5, 5))[0] - 180) < 3


@pytest.fixture
def shards(tmp_path):
    """Two WebDataset shards a split, of real JPEGs, with timm's _info.json."""
    pytest.importorskip("webdataset")
    info = {}
    for split, count in (("train", 24), ("validation", 10)):
        names, lengths = [], []
        for shard in range(2):
            name = f"digits-{split}-{shard:04}.tar"
            with tarfile.open(tmp_path / name, "w") as tar:
                for i in range(count // 2):
                    jpeg = io.BytesIO()
                    Image.new("RGB", (40, 40), (20 * i, 100 * shard, 0)).save(jpeg, "JPEG")
                    for suffix, content in (("jpg", jpeg.getvalue()), ("cls", str(i % 3).encode())):
                        entry = tarfile.TarInfo(f"{shard}{i:03}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
            names.append(name)
            lengths.append(count // 2)
        info[split] = {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": count}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    return tmp_path


@pytest.mark.parametrize("workers", ["0", "2"])
def test_shards_are_trained_on_and_evaluated_once_each(shards, workers):
    args = settings("--data-set", "wds/digits", "--data-path", str(shards), "--num-workers", workers)
    loader, batches = training_loader(args, open_data_set(args, train=True), ALONE)
    assert batches == 6
    images, labels, bad = next(iter(loader))
    assert (images.shape, labels.shape, bad.tolist()) == ((4, 3, 32, 32), (4,), [-1] * 4)
    counted: Counter = Counter()
    for rank in range(2):
        share = evaluation_loader(args, open_data_set(args, train=False), Process(torch.device("cpu"), rank, 2))
        counted += Counter(int(label) for _, batch, _ in share for label in batch)
    assert counted == {0: 4, 1: 4, 2: 2}


def test_transforms_are_the_recipes(jpegs):
    names = lambda t: [type(op).__name__ for part in t.transforms for op in part.transforms]  # noqa: E731
    three = names(
        training_transform(settings("--ThreeAugment", "--color-jitter", "0.3", "--data-path", "x", "--reprob", "0"))
    )
    assert three == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "AutoAugment", "ColorJitter",
                     "MaybeToTensor", "Normalize"]  # fmt: skip
    src = training_transform(settings("--src", "--ThreeAugment", "--data-path", "x"))
    assert [type(op).__name__ for op in src.transforms[0].transforms[0].transforms] == ["Resize", "RandomCrop"]
    assert src(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    ours = evaluation_transform(settings("--eval-crop-ratio", "0.875", "--data-path", "x"))(image)
    resized = image.resize((int(36 * 120 / 90), 36), Image.Resampling.BICUBIC)  # int(32 / 0.875) = 36
    crop = np.asarray(resized.crop((8, 2, 40, 34)), dtype=np.float32) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    torch.testing.assert_close(ours, torch.from_numpy((crop - mean) / std).permute(2, 0, 1).float(), atol=1e-5, rtol=0)


def test_rand_augment_draws_20000_times_with_this_pillow():
    """Posterize to 0 bits, which it sometimes draws, is refused by Pillow 13."""
    random.seed(0)
    augment = rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 3, "img_mean": (124, 116, 104)})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    for _ in range(20_000):
        augment(image)


def test_more_processes_or_larger_batches_than_images():
    args = settings("--data-set", "DIGITS", "--batch-size", "2048")
    with pytest.raises(ValueError, match="are fewer than one batch: --batch-size 2048 must shrink"):
        training_loader(args, Digits(train=True), ALONE)
    with pytest.raises(ValueError, match="2000 processes for 1437 training images"):
        training_loader(args, Digits(train=True), Process(torch.device("cpu"), 0, 2000))


def test_timms_transform_is_what_the_flags_say():
    """The reference: timm's own call with the facts' arguments, drawn from the same state."""
    args = settings("--data-path", "x", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25")
    ours = training_transform(args)
    theirs = create_transform(32, is_training=True, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1",
                              interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1)  # fmt: skip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    for seed in range(20):
        results = []
        for transform in (ours, theirs):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            results.append(transform(image))
        assert torch.equal(*results)
