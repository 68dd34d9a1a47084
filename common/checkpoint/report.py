"""What a run says of the weights that it took from a file: how many tensors, renamed, resized, new and left out."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

SHOWN = 3  # names in a list
KINDS = {
    "": "",
    "model": ", raw (model)",
    "state_dict": ", raw (state_dict)",
    "model_ema": ", average (model_ema)",
    "state_dict_ema": ", average (state_dict_ema)",
    "teacher": ", average (teacher)",
}
POSITIONS, RELATIVE_POSITIONS = "pos_embed", "relative_position_bias_table"
COMPUTED = ("relative_position_index", "attn_mask")  # tables of Swin and BEiT that a model makes itself


@dataclass(frozen=True)
class LoadReport:
    """How a file's tensors became a model's."""

    path: str
    kind: str  # raw or an average, and its key in the file; "" where the file does not say
    prefix: str  # removed from the names
    tensors: int  # of the model
    taken: int  # of them from the file
    renamed: int  # of those taken, beside the prefix
    resized: list[str] = field(default_factory=list)  # in words
    classifier: str = ""  # in words, if it is new
    new: list[str] = field(default_factory=list)  # names in the model, beside the classifier's
    left_out: list[str] = field(default_factory=list)  # names in the file

    def lines(self) -> Iterator[str]:
        """One or two lines for the terminal."""
        taken = f"all {self.tensors}" if self.taken == self.tensors else f"{self.taken} of {self.tensors}"
        parts = [f"{taken} tensors taken"]
        parts += [f"prefix {self.prefix} removed"] if self.prefix else []
        parts += [f"{self.renamed} renamed"] if self.renamed else []
        yield f"weights: {self.path}{self.kind}: {', '.join([*parts, *self.resized])}"
        new = [*filter(None, [self.classifier]), *summarize(self.new)]
        rest = [f"new: {', '.join(new)}"] if new else []
        rest += [f"left out: {', '.join(summarize(self.left_out))}"] if self.left_out else []
        if rest:
            yield f"weights: {'; '.join(rest)}"


def report_load(
    path: str,
    key: str,
    prefix: str,
    weights: dict[str, Tensor],
    state: dict[str, Tensor],
    model: nn.Module,
    new_head: Collection[str] = (),
) -> LoadReport:
    """Compare a file's weights with the state dict that was made of them, before the model is overwritten.

    Args:
        key: of the weights in the file; "" if the file is a state dict.
        prefix: removed from the names.
        weights: as the file has them.
        state: for the model, with its own tensors where the file has none.
        new_head: names of a classifier that is new.
    """
    file = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    names = state.keys()
    state = {name: weight for name, weight in state.items() if name != "mask_token"}  # AugSub's is not the file's
    own = {weight.data_ptr() for weight in model.state_dict().values()}
    new = [name for name, weight in state.items() if weight.data_ptr() in own and name not in new_head]
    taken = [name for name in state if name not in new and name not in new_head]
    names_by_memory = {weight.data_ptr(): name for name, weight in file.items()}
    used = {names_by_memory.get(state[name].data_ptr()) for name in taken} | names
    combined = any(name not in file and state[name].data_ptr() not in names_by_memory for name in taken)
    unused = [name for name in file if name not in used and not name.endswith(COMPUTED)]
    return LoadReport(
        path=path,
        kind=KINDS[key],
        prefix=prefix,
        tensors=len(state),
        taken=len(taken),
        renamed=sum(name not in file for name in taken),
        resized=describe_resized({name: file[name] for name in taken if name in file}, state, model),
        classifier=describe_classifier(new_head, file, state),
        new=new,
        left_out=[] if combined else unused,  # it cannot be told what tensors of other names were combined into
    )


def check_complete(report: LoadReport) -> None:
    """Refuse to evaluate a model of which a file lacks weights.

    Raises:
        ValueError: names them.
    """
    missing = [name for name in report.new if not name.endswith(COMPUTED)]
    if missing:
        raise ValueError(
            f"{report.path}: lacks {', '.join(summarize(missing))} of the model; pass the flags of its training, such "
            "as --cls-token, or leave out --model where a folder or repository names it"
        )


def describe_resized(file: dict[str, Tensor], state: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Name or count the tensors whose shape is not the file's, with both sizes."""
    changed = {name: weight for name, weight in file.items() if weight.shape != state[name].shape}
    tables: Counter[tuple[int, int]] = Counter()
    lines = []
    for name, weight in changed.items():
        if name.endswith(RELATIVE_POSITIONS):
            tables[find_window(weight), find_window(state[name])] += 1
        elif name == POSITIONS and weight.ndim == 3:
            lines.append(f"positions resized from {find_grid(weight, model)} to {find_grid(state[name], model)}")
        else:
            lines.append(f"{name} resized from {tuple(weight.shape)} to {tuple(state[name].shape)}")
    for (old, new), count in tables.items():
        lines.append(f"{count} tables of relative positions resized from windows of {old}x{old} to {new}x{new}")
    return lines


def find_window(table: Tensor) -> int:
    """Side of the window of a table of relative positions, ((2 · side − 1)², heads); BEiT's has three rows more."""
    return (math.isqrt(table.shape[0]) + 1) // 2


def find_grid(positions: Tensor, model: Any) -> str:
    """The grid of a position embedding, (1, tokens, dim), such as 14x14, or its tokens where it is not square."""
    tokens = positions.shape[1]
    patches = tokens - (0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0))
    side = math.isqrt(patches)
    return f"{side}x{side}" if side**2 == patches else f"{tokens} tokens"


def describe_classifier(names: Collection[str], file: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Says of how many classes a new classifier is, and the file's where it has one."""
    name = next((name for name in names if state[name].ndim > 1), None)
    if name is None:
        return ""
    theirs = f" (the file's: {len(file[name]):,})" if name in file and file[name].ndim else ""
    return f"classifier of {len(state[name]):,} classes{theirs}"


def summarize(names: Collection[str]) -> list[str]:
    """Names with * for a block's number and with their count; by their first part where that would be many."""
    patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    if len(patterns) > SHOWN:
        patterns = Counter(name.partition(".")[0] for name in names)
    shown = [f"{name} ({count})" if count > 1 else name for name, count in list(patterns.items())[:SHOWN]]
    return [*shown, f"and {len(patterns) - SHOWN} more"] if len(patterns) > SHOWN else shown
