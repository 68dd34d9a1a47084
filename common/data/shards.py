"""Images in WebDataset shards on disk, with random access.

webdataset and timm read a shard from front to back, so that an epoch's order depends on the number of workers and no
image can be read again. Here each shard's tar headers are read once, when the dataset is opened; an image is then read
by its offset. The index is kept beside the run's output, since it takes minutes for ImageNet's 1.28 million images.
"""

from __future__ import annotations

import json
import operator
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from timm.data.readers.reader_wds import ReaderWds
from timm.data.readers.targets import get_field, has_field

from common.data.bad_samples import UnreadableSampleError, explain_read_error
from common.data.images import open_image, to_rgb
from common.run_dir import atomic_write

INDEX_FORMAT = 1
INDEX_THREADS = 8  # shards that are indexed at a time: on a network file system most of the time is spent waiting
END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)


class ShardIndex(NamedTuple):
    """Where the samples of a shard lie."""

    size: int  # of the shard's file when it was indexed, in bytes
    mtime_ns: int  # when it was changed last
    keys: np.ndarray  # (samples,) bytes; what the names of a sample's files have in common
    places: np.ndarray  # (samples, 4) int64: offset and size of the image, and of the label; 0 where there is none
    complete: bool  # whether it could be read to its end; else it is indexed again at the next start


class ShardDataset:
    """An `EncodedDataset` and `ShardedDataset`. Image i is the i-th of all shards, one after the other.

    Args:
        reader: timm's, which tells the shards and what in them is image and label.
        index_file: of an earlier start, and to be written by `save_index`.

    Raises:
        OSError: a shard is missing, there are no images or no labels, or an image has several labels, where training
            needs one. Reading an item raises it, with the names of image and shard, where image or label are missing,
            truncated or not valid.
    """

    notes: ClassVar[Sequence[str]] = ()

    def __init__(self, reader: ReaderWds, index_file: Path | None = None):
        if reader.target_keys or reader.dense_target:
            raise OSError("its images have several labels each; one is needed")
        split = reader.split_info
        self.paths = [Path(reader.root, name) for name in split.filenames]
        self.image_suffixes = reader.input_key  # of a sample's files the first of these is its image
        self.label_field = reader.target_key or split.alt_label or None  # of a .json file; None for a number in .cls
        self.class_map = reader.class_to_idx if reader.remap_class else None  # label in the shards → of the model
        self.index_file = index_file
        lengths = split.shard_lengths
        missing = [path for path in self.paths if not path.is_file()]
        if missing:
            raise OSError(f"{len(missing)} of {len(self.paths)} shards are not on this disk, such as {missing[0]}")
        cached = read_index(index_file, self._index_kind) if index_file is not None else {}
        self.indices = self._index_shards(cached, skip_unreadable=len(lengths) == len(self.paths))
        self.index_changed = any(index is not cached.get(str(path)) for path, index in zip(self.paths, self.indices))
        if len(lengths) != len(self.paths):
            lengths = [len(index.keys) for index in self.indices]
        self.shard_ends = np.cumsum(lengths)
        if not self.shard_ends.any():
            raise OSError("its shards hold no images")
        self._check_suffixes()

    def __len__(self) -> int:
        return int(self.shard_ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content, label = self.read_encoded(index)
        with self._errors_name_sample(index):
            return to_rgb(open_image(content)), label

    def read_encoded(self, index: int) -> tuple[bytes, int]:
        content, label = self._read_files(index)
        with self._errors_name_sample(index, "label: "):
            return content, self._decode_label(label)

    @property
    def class_names(self) -> list[str] | None:
        return list(self.class_map) if self.class_map is not None else None

    def sample_name(self, index: int) -> str:
        """Its key, or its position where the shard does not hold it, and its shard."""
        shard, position = self._locate(index)
        keys = self.indices[shard].keys
        name = os.fsdecode(keys[position]) if position < len(keys) else f"image {position}"
        return f"{name} of {self.paths[shard]}"

    def save_index(self) -> None:
        """Write the index of all complete shards to `index_file`, if it does not hold them; without it the next start
        only takes longer."""
        complete = {str(path): index for path, index in zip(self.paths, self.indices) if index.complete}
        if self.index_file is not None and self.index_changed and complete:
            with suppress(OSError):
                write_index(self.index_file, complete, self._index_kind)

    @property
    def _label_suffix(self) -> str:
        return "cls" if self.label_field is None else "json"

    @property
    def _index_kind(self) -> list[Any]:
        """What an index depends on beside the shards."""
        return [INDEX_FORMAT, self.image_suffixes, self._label_suffix]

    def _check_suffixes(self) -> None:
        """Raise OSError where no sample at all has an image, or a label, in a file of the suffix that is read."""
        places = [index.places for index in self.indices if len(index.places)]
        if places and not any(place[:, 0].any() for place in places):
            suffixes = self.image_suffixes.replace(";", ", .")
            raise OSError(f"its samples have no .{suffixes}; name the suffix of their images with --input-key")
        if places and not any(place[:, 2].any() for place in places):
            raise OSError(
                f"its samples have no .{self._label_suffix} with their label; a field of their .json is named with "
                "--target-key"
            )

    def _index_shards(self, cached: Mapping[str, ShardIndex], skip_unreadable: bool) -> list[ShardIndex]:
        def index(path: Path) -> ShardIndex:
            try:
                stat = path.stat()
                known = cached.get(str(path))
                if known is not None and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                    return known
                return index_shard(path, self.image_suffixes.split(";"), self._label_suffix)
            except OSError:
                if not skip_unreadable:
                    raise
                return ShardIndex(0, 0, *_as_arrays([]), complete=False)

        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            return list(pool.map(index, self.paths))

    def _locate(self, index: int) -> tuple[int, int]:
        """The shard that holds an image, and its position in it."""
        shard = int(np.searchsorted(self.shard_ends, index, side="right"))
        return shard, index - (int(self.shard_ends[shard - 1]) if shard else 0)

    def _read_files(self, index: int) -> tuple[bytes, bytes]:
        """The contents of an image's file and of its label's.

        Raises:
            OSError: the shard lacks one of them, is truncated or cannot be read.
        """
        shard, position = self._locate(index)
        places = self.indices[shard].places
        start, size, label_start, label_size = places[position].tolist() if position < len(places) else (0, 0, 0, 0)
        if not start or not label_start:
            missing = f".{self._label_suffix} with its label" if start else self.image_suffixes
            raise UnreadableSampleError(self.sample_name(index), f"no {missing}")
        with open(self.paths[shard], "rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, start)
            label = os.pread(file.fileno(), label_size, label_start)
        if (len(content), len(label)) != (size, label_size):
            raise UnreadableSampleError(self.sample_name(index), "the shard ends within it")
        return content, label

    def _decode_label(self, content: bytes) -> int:
        """The label in a .cls or .json file, as timm's reader decodes it, and as a class of the model."""
        if self.label_field is None:
            label = int(content)
        else:
            fields = json.loads(content)
            if not has_field(fields, self.label_field):
                raise KeyError(self.label_field)
            label = int(get_field(fields, self.label_field))
            if label < 0:
                raise ValueError(f"{label} stands for no label")
        if self.class_map is not None:
            label = self.class_map[label]
        label = operator.index(label)
        if not 0 <= label < 2**63:  # a tensor cannot hold it, or it would be taken for `NO_IMAGE`
            raise ValueError(f"label {label} is out of range")
        return label

    @contextmanager
    def _errors_name_sample(self, index: int, part: str = "") -> Iterator[None]:
        """Turn what an image or a label raises into an OSError that names it."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # PIL and json raise errors of many kinds for bytes that they cannot decode
            raise UnreadableSampleError(self.sample_name(index), part + explain_read_error(error)) from error


def index_shard(path: Path, image_suffixes: Sequence[str], label_suffix: str) -> ShardIndex:
    """Read the tar headers of a shard.

    As in WebDataset, consecutive files whose names are alike up to the first dot are a sample. Of a truncated shard the
    samples up to the end are indexed.
    """
    stat = path.stat()
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    complete = False
    with suppress(tarfile.TarError), tarfile.open(path, "r:") as shard:
        for member in shard:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if member.isfile() and suffix:
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1][suffix.lower()] = member.offset_data, member.size
        # tarfile ends without an error at a truncated header; only what closes an archive shows that it is whole
        assert shard.fileobj is not None
        shard.fileobj.seek(shard.offset)
        complete = shard.fileobj.read(tarfile.BLOCKSIZE) == END_OF_ARCHIVE
    missing = (0, 0)
    rows = []
    for key, files in samples:
        image = next((files[suffix] for suffix in image_suffixes if suffix in files), missing)
        rows.append((key, *image, *files.get(label_suffix, missing)))
    return ShardIndex(stat.st_size, stat.st_mtime_ns, *_as_arrays(rows), complete)


def _as_arrays(rows: list[tuple[Any, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """(key, offset, size, offset, size) of each sample → keys, places. Forked workers share the memory of arrays, but
    not that of Python's objects, which they write reference counts into."""
    keys = np.array([os.fsencode(key) for key, *_ in rows], dtype=np.bytes_)
    return keys, np.array([place for _, *place in rows], dtype=np.int64).reshape(-1, 4)


def write_index(path: Path, indices: Mapping[str, ShardIndex], kind: list[Any]) -> None:
    """Write indices of shards, by the paths of their files."""
    shards = [[shard, index.size, index.mtime_ns, len(index.keys)] for shard, index in indices.items()]
    header = json.dumps({"kind": kind, "shards": shards}).encode()
    with atomic_write(path) as file:
        np.savez(
            file,
            header=np.frombuffer(header, dtype=np.uint8),
            keys=np.concatenate([index.keys for index in indices.values()]),
            places=np.concatenate([index.places for index in indices.values()]),
        )


def read_index(path: Path, kind: list[Any]) -> dict[str, ShardIndex]:
    """What `write_index` wrote; nothing where the file is absent, damaged or of another kind."""
    indices = {}
    try:
        with np.load(path) as arrays:  # as a zip archive it has checksums
            header, keys, places = json.loads(arrays["header"].tobytes()), arrays["keys"], arrays["places"]
        if header["kind"] != kind:
            return {}
        start = 0
        for shard, size, mtime_ns, count in header["shards"]:
            part = slice(start, start + count)
            indices[shard] = ShardIndex(size, mtime_ns, keys[part], places[part], complete=True)
            start += count
    except Exception:  # numpy and zipfile raise errors of many kinds for a damaged file, which can be built anew
        return {}
    return indices
