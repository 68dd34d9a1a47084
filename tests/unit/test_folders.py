"""Folders and lists of images: what is a class, what is an image, and labels that are no class."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from timm.data import create_dataset

from common.args import parse
from common.data.datasets import check_classes, open_dataset
from common.data.folders import ClassFolders
from common.data_config import dataset_config
from deit.recipe import RECIPE
from swin.recipe import RECIPE as SWIN
from tests.runs import run_refused, start


def open_data(folder: Path, train: bool = True, *flags: str, recipe: Any = RECIPE) -> Any:
    return open_dataset(dataset_config(parse(recipe, ["--data-path", str(folder), *flags])), train)


def jpeg(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40)).save(path, "JPEG")
    return path


LEFTOVERS = (
    "train/.ipynb_checkpoints/a.jpg", "val/__MACOSX/b.jpg", "train/@eaDir/c.jpg", "val/.hidden/d.jpg",
    "train/cat/.ipynb_checkpoints/e-checkpoint.jpg", "val/dog/@eaDir/f.jpg/g.jpg", "train/cat/._000.jpg",
    "val/cat/__MACOSX/h.jpg",
)  # fmt: skip


@pytest.mark.parametrize("data_set", ["IMNET", "torch/image_folder"])
def test_what_systems_and_notebooks_leave_is_no_class_and_no_image(data_set, jpegs):
    folder = jpegs()
    flags = ["--data-set", data_set]
    before = [open_data(folder, train, *flags).samples for train in (True, False)]
    for name in LEFTOVERS:
        jpeg(folder / name)
    after = [open_data(folder, train, *flags) for train in (True, False)]
    assert [data.samples for data in after] == before
    assert check_classes(*after) == 2 and [data.notes for data in after] == [[], []]


def test_hidden_folders_are_left_out_of_the_comparison_of_classes(jpegs):
    folder = jpegs()
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "val" / "__MACOSX").mkdir()
    assert len(open_data(folder, False)) == 12


def test_folders_in_a_class_are_read_through(jpegs):
    """As torchvision's; also where a folder above the images is hidden."""
    folder = jpegs()
    jpeg(folder / "train" / "cat" / "more" / "x.jpg")
    shutil.move(folder, folder.parent / ".cache")
    data = open_data(folder.parent / ".cache")
    assert len(data) == 33 and data.samples[16] == (str(folder.parent / ".cache/train/cat/more/x.jpg"), 0)


def test_files_that_are_skipped_are_counted_by_extension_at_the_start(jpegs, capsys):
    folder = jpegs()
    for name in ("a.gif", "b.GIF", "c.avif", "d.jfif", "e.heic", "notes", ".DS_Store", "f.JPG", "g.tif", "._h.gif"):
        jpeg(folder / "train" / "cat" / name)
    jpeg(folder / "val" / "dog" / "i.gif")
    taken = "images end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp"
    skipped = f"{folder}/train: files skipped by their extension: 2 .gif, 1 .avif, 1 .jfif, 1 .heic, 1 without extension; {taken}"
    data = open_data(folder)
    assert data.notes == [skipped] and len(data) == 34
    start("--data-path", str(folder), "--batch-size", "32")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "skipped by" in line] == [
        skipped,
        f"{folder}/val: files skipped by their extension: 1 .gif; {taken}",
    ]


def test_a_class_whose_files_are_all_skipped_is_refused(jpegs):
    folder = jpegs()
    for path in (folder / "train" / "dog").iterdir():
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(ValueError, match=r"no valid file for the classes dog.*; images end in \.jpg, \.jpeg"):
        open_data(folder)


def test_the_one_folder_that_an_archive_was_unpacked_into_is_no_class(jpegs, capsys):
    folder = jpegs(classes=("cat", "cow", "dog", "owl"))
    for split in ("train", "val"):
        (folder / split).rename(folder / "x")
        (folder / split).mkdir()
        (folder / "x").rename(folder / split / "dataset")
    error = run_refused(capsys, "--data-path", str(folder))
    assert (
        f"{folder}/val: holds one class only, dataset; its folders (cat, cow, dog, …) are likely to be the classes: move "
        f"them up into {folder}/val\n"
    ) in error
    for split in ("train", "val"):
        (folder / split / "dataset" / "cat").rename(folder / split / "cat")
        shutil.rmtree(folder / split / "dataset")
    error = run_refused(capsys, "--data-path", str(folder), "--nb-classes", "1000")
    assert f"{folder}/val: holds one class only, cat; two or more are needed: val/<class>/*.jpg\n" in error


@pytest.mark.parametrize("classes", ["1", "0", "-3"])
def test_one_class_is_not_enough(classes, tmp_path, capsys):
    """Where the data set does not say how many it has."""
    pytest.importorskip("webdataset")
    from tests.sample_data import make_shards

    flags = [*make_shards(tmp_path / "shards"), "--nb-classes", classes]
    assert f"--nb-classes {classes}: two or more are needed" in run_refused(capsys, *flags)


@pytest.fixture
def archives(tmp_path):
    """train.zip and val.zip with four images each, of classes 0 and 1 → a function that sets a line of a map."""
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for i in range(4):
                content = io.BytesIO()
                Image.new("RGB", (8, 8)).save(content, "JPEG")
                archive.writestr(f"{i}.jpg", content.getvalue())
        (tmp_path / f"{split}_map.txt").write_text("".join(f"{i}.jpg\t{i % 2}\n" for i in range(4)))

    def set_line(split: str, number: int, text: str) -> Path:
        path = tmp_path / f"{split}_map.txt"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[: number - 1], text, *lines[number:]]))
        return path

    return set_line


@pytest.mark.parametrize(("text", "problem"), [
    ("2.jpg\tcat", "'cat' is not a class number; expected <image>, a tab, <number>"),
    ("2.jpg 1", "'' is not a class number; expected <image>, a tab, <number>"),
    ("2.jpg\t-1", "label -1 stands for no class; remove the line"),
])  # fmt: skip
@pytest.mark.parametrize("train", [True, False])
def test_a_label_of_a_map_that_is_no_class_is_named_with_its_line(train, text, problem, archives):
    path = archives("train" if train else "val", 3, text)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {problem}")):
        open_data(path.parent, train, "--zip", recipe=SWIN)


def test_labels_of_a_map_are_below_the_classes(archives):
    """Those of the flag, and for evaluation those of training."""
    path = archives("train", 2, "1.jpg\t5")
    with pytest.raises(ValueError, match=r"train_map\.txt, line 2: label 5 is beyond the 5 classes of --nb-classes"):
        open_data(path.parent, True, "--zip", "--opts", "MODEL.NUM_CLASSES", "5", recipe=SWIN)
    archives("train", 2, "1.jpg\t1")
    path = archives("val", 4, "3.jpg\t2")
    with pytest.raises(ValueError, match=r"val_map\.txt, line 4: label 2 is beyond the 2 classes of train_map\.txt"):
        open_data(path.parent, False, "--zip", recipe=SWIN)


def test_a_list_without_images_is_refused(archives):
    path = archives("train", 1, "")
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"train_map\.txt: lists no images"):
        open_data(path.parent, True, "--zip", recipe=SWIN)


@pytest.fixture
def lists(tmp_path) -> Path:
    """iNaturalist's JSON files, of two classes and three images a split."""
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 4, "name": "wren"}, {"id": 9, "name": "frog"}]))
    for split in ("train", "val"):
        images = [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(3)]
        annotations = [{"image_id": 10 + i, "category_id": (4, 9, 4)[i]} for i in range(3)]
        (tmp_path / f"{split}2018.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


@pytest.mark.parametrize(("key", "value", "source"), [
    ("category_id", -1, "categories.json"), ("category_id", 5, "categories.json"), ("category_id", None, "categories.json"),
    ("image_id", 13, "the images of train2018.json"),
])  # fmt: skip
def test_an_annotation_of_no_class_or_image_is_named(key, value, source, lists):
    content = json.loads((lists / "train2018.json").read_text())
    content["annotations"][1][key] = value
    (lists / "train2018.json").write_text(json.dumps(content))
    words = f"{lists}/train2018.json, annotation 2: {key} {value} is not among those of {source}"
    with pytest.raises(ValueError, match=re.escape(words)):
        open_data(lists, True, "--data-set", "INAT")


def test_a_level_that_the_categories_lack_is_named(lists):
    with pytest.raises(ValueError, match=r"categories\.json: an entry has no 'order'"):
        open_data(lists, True, "--data-set", "INAT", "--inat-category", "order")


def test_evaluation_alone_compares_the_classes_of_both_lists(lists):
    """Labels are numbers of the classes of both."""
    content = json.loads((lists / "val2018.json").read_text())
    del content["annotations"][1]
    (lists / "val2018.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="val lacks 1 of the classes of train, such as 'frog'; both need"):
        open_data(lists, False, "--data-set", "INAT")


def test_the_listing_is_torchvisions_where_nothing_is_hidden(jpegs):
    folder = jpegs(classes=("b", "a", "10", "2"))
    theirs = create_dataset("torch/image_folder", str(folder), "train")
    ours = ClassFolders(folder / "train")
    assert (ours.samples, ours.classes) == (theirs.samples, theirs.classes)
    natural = ClassFolders(folder / "train", natural_order=True)
    assert (ours.classes, natural.classes) == (["10", "2", "a", "b"], ["2", "10", "a", "b"])
    assert {path.split("/")[-2]: label for path, label in natural.samples} == {"2": 0, "10": 1, "a": 2, "b": 3}
