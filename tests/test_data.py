"""Data: the same augmented images whatever the number of loader processes, each evaluation image once, broken files."""

from __future__ import annotations

import io
import json
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
from timm.data import ImageDataset, create_transform
from timm.data.auto_augment import rand_augment_transform
from torchvision import datasets

from common import loader as loaders
from common.args import parse
from common.data import Digits, check_classes, open_data_set
from common.dist import Process
from common.engine import StopTraining, Unreadable, evaluate
from common.loader import (
    NONE,
    FastViews,
    Views,
    create_mixup,
    evaluation_loader,
    evaluation_transform,
    set_epoch,
    training_loader,
    training_transform,
)
from deit.recipe import RECIPE
from swin.recipe import RECIPE as SWIN
from tests.conftest import ROOT, make_shards, write_shard

ALONE = Process(torch.device("cpu"))


def one_of(processes: int, rank: int) -> Process:
    return Process(torch.device("cpu"), rank, processes)


def settings(*flags: str):
    return parse(RECIPE, ["--num-workers", "0", "--batch-size", "4", "--input-size", "32", *flags])


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


@pytest.fixture
def random_views(jpegs):
    """Flags of a training set whose images are augmented in every way at hand."""
    return ["--data-path", str(jpegs()), "--color-jitter", "0.3", "--reprob", "0.5", "--aa", "rand-m9-mstd0.5-inc1",
            "--no-repeated-aug"]  # fmt: skip


def test_augmentation_follows_from_seed_epoch_and_place_alone(random_views):
    data = open_data_set(settings(*random_views), train=True)
    epochs = []
    for flags in ([], ["--num-workers", "1"], ["--num-workers", "2"], ["--seed", "1"]):
        loader, batches = training_loader(settings(*random_views, *flags), data, ALONE)
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
        loader, _ = training_loader(args, open_data_set(args, train=True), ALONE)
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            drawn |= {seed for _, seed in loader.sampler}
    assert len(drawn) == 2 * 3 * 32


def test_two_processes_augment_each_in_its_own_way_and_share_the_images(random_views):
    args = settings(*random_views)
    data = open_data_set(args, train=True)
    places: list[list] = []
    for rank in range(2):
        loader, batches = training_loader(args, data, one_of(2, rank))
        assert batches == 4
        places.append(list(loader.sampler))
    assert sorted(index for part in places for index, _ in part) == list(range(32))
    assert len({seed for part in places for _, seed in part}) == 32


def test_augmentation_leaves_the_global_generators_alone(random_views):
    args = settings(*random_views)
    views = Views(open_data_set(args, train=True), training_transform(args))
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
        loader, batches = training_loader(args, data, one_of(processes, rank))
        assert batches == 1280 // processes // 4
        places += loader.sampler
    times = Counter(Counter(index for index, _ in places).values())
    assert times == {3: 426, 2: 1}
    assert len({seed for _, seed in places}) == 1280
    twice = [places[i] for i in range(len(places)) if places[i][0] == places[0][0]]
    views = [Views(data, training_transform(args))[place][0] for place in twice]
    assert len(views) == 3 and not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 400])
def test_evaluation_shares_hold_each_image_once(processes):
    args = settings("--data-set", "DIGITS", "--batch-size", "50")
    data = Digits(train=False)
    transform = evaluation_transform(args)
    expected = Counter(transform(image).numpy().tobytes() for image in data.images)
    found: Counter = Counter()
    for rank in range(processes):
        for images, _, bad in evaluation_loader(args, data, one_of(processes, rank)):
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


@pytest.mark.parametrize("reader", ["torchvision", "timm"])
def test_unreadable_images_are_named_and_replaced(reader, jpegs):
    folder = jpegs()
    broken = break_files(folder)
    args = settings("--data-path", str(folder))
    data = open_data_set(args, train=True) if reader == "torchvision" else ImageDataset(str(folder / "train"))
    views = Views(data, evaluation_transform(args))
    whole = [views[index, 0] for index in range(len(broken), len(views))]
    assert {item[2] for item in whole} == {()}
    for index, path in enumerate(broken):
        image, label, unreadable = views[index, 7]
        assert unreadable == (str(path),)
        taken = [item[1] for item in whole if torch.equal(item[0], image)]
        assert taken == [label], "one of the others takes the place, with its own label"
        assert torch.equal(views[index, 7][0], image), "the same one for the same seed"


@pytest.mark.parametrize("reader", ["torchvision", "timm"])
def test_one_unreadable_image_is_not_passed_over_by_the_reader(reader, jpegs):
    """timm's own tries the next ones without a word."""
    folder = jpegs()
    broken = folder / "train" / "dog" / "005.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    args = settings("--data-path", str(folder))
    data = open_data_set(args, train=True) if reader == "torchvision" else ImageDataset(str(folder / "train"))
    views = Views(data, evaluation_transform(args))
    assert [views[index, 0][2] for index in range(32)] == [(str(broken),) if index == 21 else () for index in range(32)]


def test_unreadable_images_are_counted_once_each_and_stop_the_run_above_one_percent():
    said: list[str] = []
    few = Unreadable(400, "training", said.append)
    few.add(["a", "b", "c", "d", "a"])
    few.check(0.01)
    assert said == [f"unreadable training image, another takes its place: {name}" for name in "abcd"]
    for _ in range(2):
        few.add(["a", "b"])
        few.check(0.01)
    assert len(said) == 4
    many = Unreadable(399, "training", said.append)
    many.add(["a", "b"])
    many.check(0.01)
    many.add(["c", "d"])
    with pytest.raises(StopTraining, match="4 of 399 training images could not be read, more than 1 %"):
        many.check(0.01)
    assert len(said) == 8, "the last straw is named too"


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
    data = open_data_set(args, train=False)
    parts = [evaluate(SaysCat(), evaluation_loader(args, data, one_of(processes, r)), ALONE) for r in range(processes)]
    assert sum(part["images"] for part in parts) == 9
    assert sum(part["acc1"] * part["images"] for part in parts) == pytest.approx(100 * 4)


def test_not_one_evaluation_image_that_can_be_read_is_a_reason_to_stop(jpegs):
    folder = jpegs()
    for path in folder.glob("val/*/*"):
        path.write_bytes(b"")
    args = settings("--data-path", str(folder))
    with pytest.raises(StopTraining):
        evaluate(SaysCat(), evaluation_loader(args, open_data_set(args, train=False), ALONE), ALONE)


def test_many_unreadable_images_in_a_row_are_replaced_too():
    """One broken folder of 120 among 20,000 images is below 1 %."""

    class Broken:
        def __len__(self):
            return 20_000

        def __getitem__(self, index):
            if 50 <= index < 170:
                raise OSError("input/output error")
            return Image.new("RGB", (8, 8)), 0

    assert Views(Broken(), evaluation_transform(settings()))[60, 0][1:] == (0, ("image 60",))


def test_folders_that_will_not_do(jpegs, tmp_path):
    def refused(words, *flags, train=True):
        with pytest.raises(ValueError, match=words) as error:
            open_data_set(settings(*flags), train=train)
        assert "\n" not in str(error.value)

    refused("none: there is no such folder", "--data-path", str(tmp_path / "none"))
    refused("has no folder train: train/<class>", "--data-path", str(tmp_path))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    refused("no images could be read from .*empty", "--data-path", str(tmp_path / "empty"))
    (tmp_path / "empty" / "train" / "cat").mkdir()
    refused("no images could be read from .*empty", "--data-path", str(tmp_path / "empty"))
    refused("has no folder val or validation", "--data-path", str(tmp_path / "empty"), train=False)
    for name in ("CIFAR10", "CIFAR", "INAT", "INAT19", "wds/x", "torch/nothing"):
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
    packed, plain = open_data_set(args, train=False), datasets.ImageFolder(str(archives / "val"))
    assert check_classes(open_data_set(args, train=True), packed) == 2
    expected = [(evaluation_transform(args)(image.convert("RGB")), label) for image, label in plain]
    found = [(image, int(label)) for images, labels, _ in evaluation_loader(args, packed, ALONE)
             for image, label in zip(images, labels)]  # fmt: skip
    assert len(found) == len(expected) == 8
    assert all(label == wanted and torch.equal(image, like) for (image, label), (like, wanted) in zip(found, expected))
    loader, batches = training_loader(args, open_data_set(args, train=True), ALONE)
    assert len(list(loader)) == batches == 3


def test_archives_that_will_not_do(archives):
    with open(archives / "val_map.txt", "a") as file:
        file.write("cat/none.jpg\t0\n")
    with pytest.raises(ValueError, match=r"val\.zip does not hold cat/none\.jpg"):
        open_data_set(zipped(archives), train=False)
    (archives / "train.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="no images could be read from"):
        open_data_set(zipped(archives), train=True)
    (archives / "train_map.txt").unlink()
    with pytest.raises(ValueError, match=r"train_map\.txt"):
        open_data_set(zipped(archives), train=True)


def test_a_broken_image_of_an_archive_is_named(archives):
    with zipfile.ZipFile(archives / "val.zip", "a") as archive:
        archive.writestr("cat/broken.jpg", b"no JPEG")
    with open(archives / "val_map.txt", "a") as file:
        file.write("cat/broken.jpg\t0\n")
    args = zipped(archives, "--num-workers", "0")
    names = [name for _, _, names in evaluation_loader(args, open_data_set(args, train=False), ALONE) for name in names]
    assert names == ["cat/broken.jpg"]


def test_a_missing_cifar_folder_comes_without_advice_that_is_no_flag(tmp_path):
    with pytest.raises(ValueError) as error:
        open_data_set(settings("--data-set", "CIFAR10", "--data-path", str(tmp_path)), train=True)
    assert "download=True" not in str(error.value)


def test_a_data_set_that_timm_does_not_know_is_refused(jpegs, capsys):
    with pytest.raises(SystemExit):
        settings("--data-set", "wsd/imagenet", "--data-path", str(jpegs()))
    assert "unknown data set 'wsd/imagenet'" in capsys.readouterr().err


def test_train_and_val_need_the_same_classes(jpegs):
    folder = jpegs()
    args = settings("--data-path", str(folder))
    train, val = (open_data_set(args, train=t) for t in (True, False))
    assert check_classes(train, val) == 2
    (folder / "train" / "dog").rename(folder / "train" / "hen")
    with pytest.raises(ValueError, match="1 of train, such as 'hen', are not in val"):
        check_classes(open_data_set(args, train=True), val)
    shutil.rmtree(folder / "train" / "hen")
    with pytest.raises(ValueError, match="1 of val, such as 'dog', are not in train"):
        check_classes(open_data_set(args, train=True), val)


def test_validation_may_be_called_validation(jpegs):
    folder = jpegs()
    (folder / "val").rename(folder / "validation")
    assert len(open_data_set(settings("--data-path", str(folder)), train=False)) == 12


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
    train, val = (open_data_set(args, train=t) for t in (True, False))
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
    by_name = open_data_set(settings(*flags), train=True)
    by_class = open_data_set(settings(*flags, "--inat-category", "class"), train=False)
    assert [by_name[i][1] for i in range(3)] == [1, 2, 0]
    assert [by_class[i][1] for i in range(3)] == [1, 1, 0]
    assert abs(by_class[2][0].getpixel((5, 5))[0] - 180) < 3
    assert check_classes(by_name, open_data_set(settings(*flags), train=False)) == 3
    assert Views(by_name, evaluation_transform(settings())).name_of(2) == str(inaturalist / "train" / "2.jpg")
    with pytest.raises(ValueError, match=r"no images could be read from .*train2018\.json"):
        open_data_set(settings("--data-set", "INAT", "--data-path", str(inaturalist)), train=True)


def test_inaturalists_parts_need_the_same_classes(inaturalist):
    train = json.loads((inaturalist / "train2019.json").read_text())
    train["annotations"].pop()
    (inaturalist / "train2019.json").write_text(json.dumps(train))
    args = settings("--data-set", "INAT19", "--data-path", str(inaturalist))
    with pytest.raises(ValueError, match=r"different classes: .*frog"):
        check_classes(open_data_set(args, train=True), open_data_set(args, train=False))


@pytest.fixture
def shards(tmp_path):
    """Shards in which every image has a label of its own."""
    return [*make_shards(tmp_path / "shards"), "--no-repeated-aug"]


def labels_of(loader) -> list[int]:
    return [int(label) for _, labels, _ in loader for label in labels if label != NONE]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_shards_are_trained_on(shards, workers):
    args = settings(*shards, "--num-workers", workers)
    loader, batches = training_loader(args, open_data_set(args, train=True), ALONE)
    assert batches == 6
    images, labels, bad = next(iter(loader))
    assert (images.shape, labels.shape, bad) == ((4, 3, 32, 32), (4,), [])
    loader, _ = training_loader(args, open_data_set(args, train=True), ALONE)
    epochs = []
    for epoch in (0, 1, 0):
        set_epoch(loader, epoch)
        epochs.append(labels_of(loader))
    assert epochs[2] == epochs[0], "an epoch's order does not hang on the epochs before it"
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24)), "each image once an epoch"
    assert epochs[0] != epochs[1] != list(range(24)), "shuffled"


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shards_are_evaluated_once_each(shards, workers, processes):
    args = settings(*shards, "--num-workers", workers)
    found: list[int] = []
    for rank in range(processes):
        found += labels_of(evaluation_loader(args, open_data_set(args, train=False), one_of(processes, rank)))
    assert sorted(found) == list(range(10))


def test_broken_images_of_shards_are_left_out_of_evaluation(tmp_path):
    args = settings(*make_shards(tmp_path / "shards", {("validation", 1, 2)}))
    found: list[int] = []
    names: list[str] = []
    for rank in range(2):
        batches = list(evaluation_loader(args, open_data_set(args, train=False), one_of(2, rank)))
        found += labels_of(batches)
        names += [name for _, _, unreadable in batches for name in unreadable]
    assert sorted(found) == [i for i in range(10) if i != 7]
    assert len(names) == 1 and re.fullmatch(r"1002 of .*/digits-validation-0001\.tar", names[0])


@pytest.mark.parametrize("broken", [0, 4, 11])
def test_broken_images_of_shards_are_replaced_in_training(broken, tmp_path):
    args = settings(*make_shards(tmp_path / "shards", {("train", 0, broken)}), "--no-repeated-aug")
    loader, batches = training_loader(args, open_data_set(args, train=True), ALONE)
    for epoch in range(3):
        set_epoch(loader, epoch)
        found = list(loader)
        assert len(found) == batches
        assert {*range(24)} - set(labels_of(found)) == {broken} and len(labels_of(found)) == 24
        assert [name.split()[0] for _, _, names in found for name in names] == [f"0{broken:03}"]


def test_a_shard_that_is_cut_short_counts_what_is_missing(shards, tmp_path):
    """In the data of its eighth image."""
    path = tmp_path / "shards" / "digits-train-0001.tar"
    with tarfile.open(path) as shard:
        cut = shard.getmember("1007.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    args = settings(*shards)
    loader, batches = training_loader(args, open_data_set(args, train=True), ALONE)
    found = list(loader)
    assert len(found) == batches
    names = sorted(name.partition(" of ")[0] for _, _, names in found for name in names)
    assert names == ["1007", "image 10", "image 11", "image 8", "image 9"]


def test_what_one_process_finds_in_a_shard_all_know(shards, monkeypatch):
    """Loader processes that each look through each shard take longer for that than for its images."""
    args = settings(*shards, "--num-workers", "2")
    data = open_data_set(args, train=True)
    first = labels_of(training_loader(args, data, ALONE)[0])
    monkeypatch.setattr("common.data.samples_in", None)
    args.num_workers = 0  # a loader process that fails here would leave the other one waiting
    assert labels_of(training_loader(args, data, ALONE)[0]) == first


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
    """The names of the shards that are looked through, in order."""
    names: list[str] = []
    real = tarfile.open

    def count(path, *args):
        names.append(Path(path).name)
        return real(path, *args)

    monkeypatch.setattr("common.data.tarfile.open", count)
    return names


def test_a_shard_of_unknown_length_is_looked_through_once(shards, tmp_path, opened):
    folder = tmp_path / "shards"
    names = [f"digits-train-000{i}.tar" for i in range(4)]  # more than are kept for their names
    for source, copy in zip(names, names[2:]):
        shutil.copy(folder / source, folder / copy)
    split_as(folder, filenames=names, shard_lengths=[])
    data = open_data_set(settings(*shards), train=True)
    assert [data[i][1] for i in range(len(data))] == [*range(24), *range(24)]
    assert opened == names


def test_shards_need_no_room_in_dev_shm(shards, tmp_path):
    """Loader processes know what one of them found, where Docker's 64 MB, here 1 MB, are too few for all places."""
    mount = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    small = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount]
    if shutil.which("unshare") is None or subprocess.run([*small, "sh", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a /dev/shm of their own")
    split_as(tmp_path / "shards", shard_lengths=[12, 100_000])
    code = f"""
import os
from common.data import open_data_set
from tests.test_data import settings
data = open_data_set(settings(*{shards}), train=True)
if os.fork() == 0:
    data.bytes_of(23)
    os._exit(0)
os.wait()
print(data.places[:24].gt(0).all(dim=1).tolist() == [False] * 12 + [True] * 12, os.listdir("/dev/shm"))
"""
    done = subprocess.run([*small, "sh", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True []\n", done.stderr


def test_a_shard_may_hold_more_than_its_length(shards, tmp_path):
    split_as(tmp_path / "shards", shard_lengths=[7, 12], num_samples=19)
    data = open_data_set(settings(*shards), train=True)
    assert [data[i][1] for i in reversed(range(19))] == [*range(23, 11, -1), *range(6, -1, -1)]


def test_a_label_that_is_cut_short_is_no_label(shards, tmp_path):
    """Of the label 22 the shard has the first digit."""
    path = tmp_path / "shards" / "digits-train-0001.tar"
    with tarfile.open(path) as shard:
        cut = shard.getmember("1010.cls").offset_data + 1
    path.write_bytes(path.read_bytes()[:cut])
    data = open_data_set(settings(*shards), train=True)
    assert data[21][1] == 21
    for read in (data.bytes_of, data.__getitem__):
        with pytest.raises(OSError, match=r"0001\.tar ends within 1010 of"):
            read(22)


@pytest.mark.parametrize(("member", "kept", "words"), [
    ("1004.jpg", 100, "image 4 of .* has no jpg;png;webp"), ("1004.jpg", 512, "1004 of .* has no label"),
    ("1004.cls", 100, "1004 of .* has no label"), ("1004.cls", 512, "ends within 1004 of")])  # fmt: skip
def test_what_a_short_read_hid_is_found_later(member, kept, words, shards, tmp_path):
    """It ended within or after a header of the fifth sample."""
    path = tmp_path / "shards" / "digits-train-0001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as shard:
        cut = shard.getmember(member).offset + kept
    path.write_bytes(whole[:cut])
    data = open_data_set(settings(*shards), train=True)
    assert [data[i][1] for i in range(12, 16)] == [12, 13, 14, 15]
    for index, reason in ((16, words), (23, "image 11 of .* has no jpg;png;webp")):
        with pytest.raises(OSError, match=reason):
            data[index]
    path.write_bytes(whole)
    assert [data[i][1] for i in range(12, 24)] == [*range(12, 24)]


def test_a_short_read_takes_nothing_from_other_processes(shards, tmp_path):
    path = tmp_path / "shards" / "digits-train-0001.tar"
    whole = path.read_bytes()
    data = open_data_set(settings(*shards), train=True)
    assert data[23][1] == 23
    with tarfile.open(path) as shard:
        path.write_bytes(whole[: shard.getmember("1004.cls").offset])
    data.note(1, data.places_in(path))  # as another process that came to the shard at once
    path.write_bytes(whole)
    assert data.places[12:].gt(0).all()


def test_a_sample_that_lacks_a_part_is_looked_for_once(shards, tmp_path, opened):
    write_shard(tmp_path / "shards" / "digits-train-0001.tar", {"a.jpg": jpeg(), "b.jpg": jpeg(), "b.cls": b"1"})
    split_as(tmp_path / "shards", shard_lengths=[12, 2], num_samples=14)
    data = open_data_set(settings(*shards), train=True)
    opened.clear()
    for _ in range(3):
        with pytest.raises(OSError, match=r"a of .* has no label"):
            data[12]
    assert opened == ["digits-train-0001.tar"]


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
    data: Any = open_data_set(settings(*shards), train=True)
    for read in (data.bytes_of, data.__getitem__):
        with pytest.raises(OSError, match=r"^a of .*0001\.tar cannot be read \(\w+: ") as error:
            read(12)
        assert "None'" not in str(error.value)
    for kind in (Views, FastViews):
        views = kind(data, None, replace=False)  # type: ignore[arg-type]  # it does not come to a transform
        assert views[12, 0][1:] == (NONE, (data.filename(12),))


def test_a_label_that_the_class_map_lacks_is_an_unreadable_image(shards):
    data = open_data_set(settings(*shards), train=True)
    data.reader.remap_class, data.reader.class_to_idx = True, {3: 5, 4: "x", 5: 1.7}
    assert data[3][1] == data.bytes_of(3)[1] == 5
    for read in (data.bytes_of, data.__getitem__):
        for index, words in ((4, "TypeError"), (5, "TypeError: 'float'"), (6, "KeyError: 6")):
            with pytest.raises(OSError, match=rf"00{index} of .*0000\.tar cannot be read \({words}"):
                read(index)


def test_an_image_that_pil_cannot_read_is_named_with_its_shard(tmp_path):
    data = open_data_set(settings(*make_shards(tmp_path / "shards", {("train", 1, 2)})), train=True)
    with pytest.raises(OSError, match=r"^1002 of .*0001\.tar cannot be read \(UnidentifiedImageError: "):
        data[14]


def test_memory_that_runs_out_is_no_unreadable_image(shards, monkeypatch):
    data = open_data_set(settings(*shards), train=True)
    monkeypatch.setattr(Image, "open", lambda *args: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        data[0]


def test_a_shard_that_vanishes_is_counted_image_by_image(shards, tmp_path):
    args = settings(*shards)
    data = open_data_set(args, train=False)
    (tmp_path / "shards" / "digits-validation-0001.tar").unlink()
    names = [name for _, _, names in evaluation_loader(args, data, ALONE) for name in names]
    assert [name.partition(" of ")[0] for name in names] == [f"image {place}" for place in range(5)]


def test_shards_without_images_are_refused(shards, tmp_path):
    split_as(tmp_path / "shards", shard_lengths=[0, 0])
    with pytest.raises(ValueError, match=r"no images could be read from .*its shards hold no images"):
        open_data_set(settings(*shards), train=True)


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
    data = open_data_set(settings(*shards), train=True)
    for index, size, label, content in ((12, photo().size, 7, png), (15, (30, 40), 5, jpeg())):
        assert (data[index][0].size, data[index][1]) == (size, label)
        assert data.bytes_of(index) == (content, label)
    for index, words in ((13, "b of .*0001.tar has no jpg;png;webp"), (14, "c of .*0001.tar has no label"),
                         (16, r"e of .*0001.tar cannot be read \(ValueError: timm takes the label for none\)")):  # fmt: skip
        for read in (data.bytes_of, data.__getitem__):
            with pytest.raises(OSError, match=words):
                read(index)


def test_shards_that_are_not_there_are_named(shards, tmp_path):
    (tmp_path / "shards" / "digits-train-0001.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 shards are not on this disk, such as .*digits-train-0001\.tar"):
        open_data_set(settings(*shards), train=True)


def test_an_epoch_of_shards_is_all_of_them_on_two_processes(shards):
    args = settings(*shards)
    found: list[int] = []
    for rank in range(2):
        loader, batches = training_loader(args, open_data_set(args, train=True), one_of(2, rank))
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
            loader, _ = training_loader(args, open_data_set(args, train=True), ALONE)
            batches.append(list(loaders.batches_of(loader, 3, 0 if number == "0" else 5)))
        assert len(batches[0]) == len(batches[1]) + 5 > 8
        for (images, labels, _), (others, other_labels, _) in zip(batches[0][5:], batches[1]):
            assert torch.equal(images, others) and torch.equal(labels, other_labels)


def test_images_of_shards_are_shuffled_within_few_at_a_time(monkeypatch):
    """Ten shards of a hundred images, of which three and a half are in the shuffle at a time."""
    monkeypatch.setattr(loaders, "TOGETHER", 350)
    ends = np.arange(100, 1001, 100)
    epochs = []
    for epoch in (0, 1):
        order = loaders.ShardOrder(ends, range(1000), seed=0)
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
    three = training_transform(settings(*flags, "--reprob", "0"))
    assert operations(three) == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "AutoAugment",
                                 "ColorJitter", "MaybeToTensor", "Normalize"]  # fmt: skip
    policy = three.transforms[1].transforms[0].policy
    assert sorted(op.name for (op,) in policy) == ["Desaturate", "GaussianBlurRand", "Solarize"]
    assert operations(training_transform(settings(*flags, "--reprob", "0.1")))[-1] == "RandomErasing"
    assert three(photo()).shape == (3, 32, 32)


def test_src_is_a_resize_and_a_crop_after_padding():
    src = training_transform(settings("--src", "--ThreeAugment", "--data-path", "x"))
    simple, flip = src.transforms[0].transforms
    assert [type(op).__name__ for op in simple.transforms] == ["Resize", "RandomCrop"]
    assert (simple.transforms[1].padding, simple.transforms[1].padding_mode) == (4, "reflect")
    assert type(flip).__name__ == "RandomHorizontalFlip"
    for size in ((50, 40), (40, 50), (20, 33)):
        assert src(photo(*size)).shape == (3, 32, 32)


@pytest.mark.parametrize("ratio", [0.875, 1.0, 0.9])
def test_evaluation_resizes_and_crops_the_centre(ratio):
    """Against the same by PIL and numpy."""
    ours = evaluation_transform(settings("--eval-crop-ratio", str(ratio), "--data-path", "x"))(photo())
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
    with pytest.raises(ValueError, match="are fewer than one batch: --batch-size 2048 must shrink"):
        training_loader(args, Digits(train=True), ALONE)
    with pytest.raises(ValueError, match="2000 processes for 1437 training images"):
        training_loader(args, Digits(train=True), one_of(2000, 0))


def test_timms_transform_is_what_the_flags_say():
    """The reference: timm's own call with the facts' arguments, drawn from the same state."""
    args = settings("--data-path", "x", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25")
    ours = training_transform(args)
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
    assert create_mixup(settings("--data-path", "x", "--mixup", "0", "--cutmix", "0"), 5) is None
    mixed = create_mixup(settings("--data-path", "x", "--cutmix", "0", "--smoothing", "0.1"), 5)
    assert mixed is not None
    np.random.seed(0)
    images, labels = mixed(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]), torch.tensor([0, 3]))
    share = images[1, 0, 0, 0].item()
    assert labels[1, 3].item() == pytest.approx(share * 0.92 + (1 - share) * 0.02, abs=1e-5)
    assert labels.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
