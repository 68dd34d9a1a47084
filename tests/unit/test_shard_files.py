"""wds/… from shards as people have them: without _info.json, with labels in .json files, with other suffixes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.args import parse
from common.data.datasets import open_dataset
from common.data_config import dataset_config
from deit.recipe import RECIPE
from tests.runs import start
from tests.sample_data import make_shards, write_shard

pytest.importorskip("webdataset")


def open_data(*flags: str, train: bool = True) -> Any:
    return open_dataset(dataset_config(parse(RECIPE, flags)), train)


def jpeg(level: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 40), (level, 0, 0)).save(content, "JPEG")
    return content.getvalue()


def make_files(folder: Path, suffix: str = "jpg", label: str = "json", count: int = 12) -> list[str]:
    """Write shards without a file that says what is in them, of twice `count` images for training → their flags."""
    for name, images in (("train-0000", count), ("train-0001", count), ("val-0000", 4)):
        files = {}
        for i in range(images):
            files[f"{i:03}.{suffix}"] = jpeg(20 * i)
            files[f"{i:03}.{label}"] = json.dumps({"label": i % 2}).encode() if label == "json" else b"%d" % (i % 2)
        write_shard(folder / f"{name}.tar", files)
    return ["--data-set", "wds/x", "--data-path", str(folder), "--nb-classes", "2", "--train-split",
            "train-{0000..0001}.tar", "--val-split", "val-{0000..0000}.tar"]  # fmt: skip


def test_shards_count_their_samples_where_no_file_does(tmp_path, capsys):
    flags = make_files(tmp_path, label="cls")
    train, val = (open_data(*flags, train=t) for t in (True, False))
    assert (len(train), len(val)) == (24, 4)
    assert [train[i][1] for i in (0, 11, 12, 23)] == [0, 1, 0, 1]
    start(*flags, "--epochs", "1")
    assert "1 epoch of 3 steps of 8 images" in capsys.readouterr().out


def test_a_number_of_samples_in_the_split_changes_nothing(tmp_path):
    flags = make_files(tmp_path, label="cls")
    flags[flags.index("--train-split") + 1] += "|20"
    assert len(open_data(*flags)) == 24


def test_labels_are_read_from_the_field_that_is_named(tmp_path):
    flags = make_files(tmp_path)
    data = open_data(*flags, "--target-key", "label")
    assert [data[i][1] for i in range(4)] == [0, 1, 0, 1]


def test_shards_without_a_single_label_are_refused(tmp_path):
    words = r"its samples have no \.cls with their label; a field of their \.json is named with --target-key"
    with pytest.raises(ValueError, match=words):
        open_data(*make_files(tmp_path))
    with pytest.raises(ValueError, match=r"no \.json with their label"):
        open_data(*make_files(tmp_path, label="cls"), "--target-key", "label")


def test_images_have_the_suffix_that_is_named(tmp_path):
    flags = make_files(tmp_path, suffix="jpeg", label="cls")
    with pytest.raises(ValueError, match=r"its samples have no \.jpg, \.png, \.webp; name .* with --input-key"):
        open_data(*flags)
    data = open_data(*flags, "--input-key", "jpeg;jpg")
    assert data[5][0].getpixel((9, 9))[0] == pytest.approx(100, abs=3) and len(data) == 24


def test_a_split_of_no_known_shards_is_refused_by_its_flag(tmp_path):
    flags = make_files(tmp_path)[:6]
    for train, flag in ((True, "--train-split train"), (False, "--val-split validation")):
        with pytest.raises(ValueError, match=rf"{flag}: {tmp_path} has no _info\.json with the shards of this split"):
            open_data(*flags, train=train)


def test_why_a_sample_of_a_shard_cannot_be_read_is_told(tmp_path, capsys):
    flags = make_shards(tmp_path / "shards", {("train", 1, 3)})
    path = tmp_path / "shards" / "digits-train-0000.tar"
    files = {f"{i:03}.jpg": jpeg(i) for i in range(12)} | {f"{i:03}.cls": b"%d" % i for i in range(2, 12)}
    write_shard(path, dict(sorted(files.items())) | {"013.jpg": jpeg(0), "013.cls": b"x"})
    start(*flags, "--nb-classes", "24", "--epochs", "1", "--batch-size", "24")
    lines = [line for line in capsys.readouterr().out.splitlines() if "unreadable training" in line]
    assert lines == [
        f"000 of {path}: unreadable training image (no .cls with its label); replaced by another image",
        f"001 of {path}: unreadable training image (no .cls with its label); replaced by another image",
        f"1003 of {path.parent}/digits-train-0001.tar: unreadable training image (not an image); replaced by another image",
    ]
