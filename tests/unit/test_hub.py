"""hfds/…: real data sets of the `datasets` library, in files on this disk: columns, labels, images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.args import parse
from common.data.bad_samples import NO_IMAGE
from common.data.datasets import check_classes, open_dataset
from common.data.images import to_rgb
from common.data.loader import AugmentedDataset
from common.data.protocols import EncodedDataset
from common.data_config import dataset_config
from common.errors import StopTraining
from common.trainer import check_labels
from deit.recipe import RECIPE
from tests.runs import run_refused, start

hf = pytest.importorskip("datasets")
CLASSES = hf.ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)
    hf.disable_progress_bars()


def png(index: int, bits: int = 8) -> dict[str, Any]:
    grey = np.full((20, 24), index * (257 if bits == 16 else 1), np.uint16 if bits == 16 else np.uint8)
    content = io.BytesIO()
    Image.fromarray(grey).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def make_dataset(folder: Path, columns: dict[str, tuple[Any, list]], splits=("train", "validation")) -> list[str]:
    """Write a data set in Parquet files → the flags that name it. `columns`: name → feature, values."""
    folder.mkdir()
    features = hf.Features({name: feature for name, (feature, _) in columns.items()})
    values = {name: values for name, (_, values) in columns.items()}
    for split in splits:
        hf.Dataset.from_dict(values, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return ["--data-set", f"hfds/{folder}", "--data-path", str(folder.parent / "cache")]


def images(count: int = 8, bits: int = 8) -> tuple[Any, list]:
    return hf.Image(), [png(10 * i, bits) for i in range(count)]


def labels(*values: Any, feature: Any = CLASSES) -> tuple[Any, list]:
    return feature, list(values or [0, 1] * 4)


def open_data(flags: list[str], train: bool = True) -> Any:
    (Path(flags[3])).mkdir(exist_ok=True)
    return open_dataset(dataset_config(parse(RECIPE, flags)), train)


@pytest.mark.parametrize(("columns", "keys", "named"), [
    ({"image": images(), "label": labels()}, [], ("image", "label")),
    ({"img": images(), "kind": labels(), "id": labels(*range(8), feature=hf.Value("int64"))}, [], ("img", "kind")),
    ({"img": images(), "number": labels(feature=hf.Value("int8"))}, ["--nb-classes", "2"], ("img", "number")),
    ({"img": images(), "number": labels(feature=hf.Value("uint8"))}, ["--nb-classes", "2"], ("img", "number")),
    ({"a": images(), "b": images(), "c": labels(), "d": labels()}, ["--input-key", "b", "--target-key", "d"], ("b", "d")),
])  # fmt: skip
def test_the_columns_are_those_that_are_named_or_the_only_ones(columns, keys, named, tmp_path):
    flags = make_dataset(tmp_path / "data", columns)
    train, val = (open_data([*flags, *keys], t) for t in (True, False))
    assert (len(train), check_classes(train, val)) == (8, 2 if CLASSES in [f for f, _ in columns.values()] else None)
    assert train.notes == [
        f"hfds/{tmp_path}/data, split train: images of column {named[0]}, labels of column {named[1]}"
    ]
    for index in range(8):
        image, label = train[index]
        assert (to_rgb(image).getpixel((3, 3)), label) == ((10 * index,) * 3, index % 2)
    assert isinstance(train, EncodedDataset) and train.read_encoded(3) == (images()[1][3]["bytes"], 1)
    assert train.sample_name(3) == f"hfds/{tmp_path}/data, split train, row 3"


@pytest.mark.parametrize(("columns", "keys", "words"), [
    ({"a": images(), "b": images(), "label": labels()}, [], "--input-key: 2 columns may hold the image; name one of a, b"),
    ({"img": images(), "fine": labels(), "coarse": labels()}, [], "--target-key: 2 columns may hold the label; name one of fine, coarse"),
    ({"img": images(), "text": labels(*"abcdefgh", feature=hf.Value("string"))}, [],
     "--target-key: no columns may hold the label; name one of img, text"),
    ({"image": images(), "label": labels()}, ["--target-key", "labels"], "--target-key labels: no such column; the data set has image, label"),
    ({"image": images(), "label": labels()}, ["--target-key", "label,image"], "--target-key label,image: several columns; name one"),
    ({"image": images(), "text": labels(*"abcdefgh", feature=hf.Value("string"))}, ["--target-key", "text"],
     "column text holds string values; name a column of class numbers with --target-key"),
    ({"image": images(), "label": labels(0, 1, 0, -1, 0, -1, 1, 1)}, [], "split train, row 3: label -1 stands for no class (2 such rows)"),
    ({"image": images(), "label": labels(0, 1, 0, 1, 0, None, 1, 1)}, [], "split train, row 5: label None stands for no class (1 such rows)"),
    ({"image": images(), "label": labels(0, 1, 0, 1, 7, 1, 1, 1, feature=hf.Value("int64"))}, ["--nb-classes", "5"],
     "split train, row 4: label 7 is beyond the 5 classes (1 such rows)"),
])  # fmt: skip
def test_columns_and_labels_that_will_not_do(columns, keys, words, tmp_path):
    with pytest.raises(ValueError) as error:
        open_data([*make_dataset(tmp_path / "data", columns), *keys])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_split_or_a_data_set_that_is_not_there_is_named(tmp_path):
    flags = make_dataset(tmp_path / "data", {"image": images(), "label": labels()}, ("train", "test"))
    with pytest.raises(
        ValueError, match=r"hfds/.*data: no images could be read from .* \(Unknown split .validation.*test"
    ):
        open_data(flags, train=False)
    (tmp_path / "data" / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"no images could be read from .*Parquet"):
        open_data(flags)
    with pytest.raises(ValueError, match="hfds/none/such: no images could be read"):
        open_data(["--data-set", "hfds/none/such", *flags[2:]])


def test_flags_of_columns_need_a_data_set_with_columns(capsys):
    for flag in ("--input-key", "--target-key"):
        assert f"{flag}: --data-set IMNET has no columns" in run_refused(capsys, "--data-path", "x", flag, "img")


@pytest.mark.parametrize("pipeline", ["pil", "fast"])
def test_images_of_16_bits_and_broken_ones_come_in_training(pipeline, tmp_path, capsys):
    feature, values = images(16, bits=16)
    values[5] = {"bytes": b"no image", "path": None}
    flags = make_dataset(tmp_path / "data", {"img": (feature, values), "kind": labels(*[0, 1] * 8)})
    data = open_data(flags)
    assert to_rgb(data[9][0]).getpixel((3, 3)) == (90, 90, 90)
    start(*flags, "--input", pipeline, "--epochs", "1")
    output = capsys.readouterr().out
    assert "images of column img, labels of column kind" in output
    assert f"hfds/{tmp_path}/data, split train, row 5: unreadable training image (not an image); replaced" in output


def test_a_label_below_zero_that_no_check_has_seen_is_told_with_its_image():
    """As of a data set whose labels are known only with its images."""

    class Unlabelled:
        class_names, notes = None, ()

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (4, 4)), -1

        def sample_name(self, index: int) -> str:
            return "row 0"

    views = AugmentedDataset(Unlabelled(), lambda image: image, replace=False)
    assert views[0, 0][1:] == (NO_IMAGE, (("row 0", "label -1 stands for no class"),))
    with pytest.raises(StopTraining, match="label -1 stands for no class; choose a split with labels"):
        check_labels(torch.tensor([0, -1]), 5)
