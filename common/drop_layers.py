"""Which layers of a model are dropout or stochastic depth of its blocks, by timm's names or by what a layer does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

from . import foreign

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# modules whose dropout is not that of blocks: by a name before a block's number, and by one anywhere
BESIDE_BLOCKS = re.compile(
    r".*\b((\w+_)?heads?(_\w+)?|aux\w*|\w*classifier\w*|fc\d*|(\w+_)?(attn)?pool(er|ing)?\d*|pre_logits|"
    r"(\w+_)?embed(der|dings?)?(_drop\w*)?)\b.*"
)
NOT_OF_BLOCKS = re.compile(
    r".*\b(pos_\w+|\w*rel_pos\w*|\w*position\w*|cpb\w*|attn_drop\w*|attention_drop\w*|\w*drop_path\w*)\b.*"
)


def find_dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find dropouts of attention projections and MLPs, and the attribute with their rate.

    Not those of attention weights, positions, pooling or the head.
    """
    places: list[tuple[nn.Module, str]] = []
    for root, timm_names in _parts(model):
        places += _timm_dropouts(root) if timm_names else _other_dropouts(root)
    _check_no_dropout_outside(model)
    return places


def _parts(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """List the timm models in a model, or itself where there are none; and whether timm's names hold there."""
    inside = list(_timm_models(model))
    trained = [module for module in inside if any(p.requires_grad for p in module.parameters())]
    inside = trained or inside  # a frozen one beside others is a teacher
    return [(module, True) for module in inside] or [(model, False)]


def _timm_models(module: nn.Module) -> Iterator[nn.Module]:
    if foreign.is_timm_model(module):
        yield module
    else:
        for child in module.children():
            yield from _timm_models(child)


def _outside_of_timm(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules beside the models of timm in a model, by name; none where there are no models of timm."""
    inside = {module for each in _timm_models(model) for module in each.modules()}
    return {name: module for name, module in model.named_modules() if inside and module not in inside}


def _timm_dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    pattern = re.compile(
        r"(?!.*\b(head|attn_pool|\w*rel_pos|cpb_mlp|meta_mlp)\b).*"
        r"\b(proj_drop|drop[123]|mlp_drop|out_drop|mlp\.drop|linear\.drop|main\.\d+)"
    )
    return [(m, "p") for name, m in model.named_modules() if isinstance(m, nn.Dropout) and pattern.fullmatch(name)]


def _other_dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    names = dict(model.named_modules())
    if any(foreign.lacks_dropout(module) for module in names.values()):
        return []
    tokens = [(module, foreign.find_place(foreign.TOKENS, module)) for module in names.values()]
    inputs = {id(module.get_submodule(place.module)) for module, place in tokens if place}
    places: list[tuple[nn.Module, str]] = []
    for name, module in names.items():
        parent = names[name.rpartition(".")[0]] if name else model
        weights = "Attention" in type(parent).__name__ and name.endswith((".dropout", ".drop"))
        parents = (names[name[: dot.start()]] for dot in re.finditer(r"\.", name))
        in_blocks = any(isinstance(parent, CONTAINERS) for parent in parents)
        elsewhere = _is_beside_blocks(name) or weights or id(module) in inputs or not in_blocks
        if isinstance(module, nn.Dropout) and not elsewhere:
            places.append((module, "p"))
        if rate := foreign.find_place(foreign.DROPOUT_RATES, module):
            places.append((module, rate))
    _check_every_block(model, "dropout", {id(module) for module, _ in places})
    return places


def _is_beside_blocks(name: str) -> bool:
    beside, _, _ = re.sub(r"(^|\.)\d+(\.|$)", "/", name, count=1).partition("/")  # before the number of a block
    return bool(BESIDE_BLOCKS.fullmatch(beside) or NOT_OF_BLOCKS.fullmatch(name))


def check_rate_acts(layer: Any, name: str) -> None:
    """Try whether a layer of unknown code drops as often as its rate says after it was set.

    Raises:
        ValueError: it does not, as where it keeps another number that it made of the rate.
    """
    attribute, package = str(foreign.drop_path_rate(layer)), type(layer).__module__.partition(".")[0]
    if package in ("timm", "torchvision", "transformers"):
        return
    rate, training = getattr(layer, attribute), layer.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            setattr(layer, attribute, 0.5)
            layer.train()
            dropped = [(layer(torch.ones(4, 3, 1)) == 0).float().mean().item() for _ in range(100)]
        except (RuntimeError, TypeError):  # it takes something else
            return
        finally:
            setattr(layer, attribute, rate)
            layer.train(training)
    if not 0.25 < sum(dropped) / len(dropped) < 0.75:
        raise ValueError(
            f"--augsub droppath: {name} does not follow its {attribute}, so the sub-model cannot be made of it; let "
            "its forward read the rate, or use masking"
        )


def find_drop_paths(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find where residual branches have their stochastic depth, or a placeholder for it: (block, attribute)."""
    places = []
    for root, timm_names in _parts(model):
        names = {} if timm_names else _drop_path_names_of_classes(root)
        in_root = [(block, name) for block in root.modules() for name in _drop_path_names(block, timm_names, names)]
        if not timm_names:
            blocks = {id(block) for block, _ in in_root}
            _check_every_block(root, "droppath", blocks)
            _check_every_class(root, blocks)
        places += in_root
    _check_none_outside(model)
    return places


def _drop_path_names_of_classes(model: nn.Module) -> dict[type, set[str]]:
    """Return under which names the blocks of a class have their stochastic depth, where any of them has a layer."""
    names: dict[type, set[str]] = {}
    for block in model.modules():
        if type(block) not in CONTAINERS:
            layers = {name for name, layer in block._modules.items() if foreign.drop_path_rate(layer) is not None}
            names.setdefault(type(block), set()).update(layers)
    return names


def _drop_path_names(block: nn.Module, timm_names: bool, names_of_classes: dict[type, set[str]]) -> list[str]:
    pattern = re.compile(r"(\w+_)?drop_path\d*") if timm_names else foreign.DROP_PATH_NAMES
    own = names_of_classes.get(type(block), set())
    names: list[str] = []
    of_timm = type(block).__module__.startswith("timm.")
    if of_timm and getattr(block, "has_skip", True) is False:  # without a residual branch the layer is never called
        return names
    for name, layer in (vars(block) | block._modules).items():
        if layer is None or isinstance(layer, (DropPath, nn.Identity)):
            if name in own or pattern.fullmatch(name):
                names.append(name)
        elif timm_names or not isinstance(layer, nn.Module):
            continue
        elif foreign.drop_path_rate(layer) is not None:
            if not foreign.find_place(foreign.DROPOUTS_BY_DROP_PATH, block):
                names.append(name)
        elif pattern.fullmatch(name):
            raise ValueError(
                f"--augsub droppath: {type(block).__name__}.{name} is a {type(layer).__name__}, not stochastic "
                "depth, so not every block can be reached; use masking"
            )
    return names


def _check_no_dropout_outside(model: nn.Module) -> None:
    """Refuse dropout in blocks beside the models of timm in a model.

    Raises:
        ValueError: names a layer.
    """
    names = dict(model.named_modules())
    for name, module in _outside_of_timm(model).items():
        if not isinstance(module, nn.Dropout) or _is_beside_blocks(name):
            continue
        parents = [names[name[: dot.start()]] for dot in re.finditer(r"\.", name)]
        in_list = (isinstance(outer, CONTAINERS) for outer in [model, *parents])
        if any(listed and not isinstance(parent, CONTAINERS) for listed, parent in zip(in_list, parents)):
            raise ValueError(
                f"--augsub dropout: {name} is outside of the model of timm, so not every block can be reached; use "
                "masking"
            )


def _check_none_outside(model: nn.Module) -> None:
    """Refuse stochastic depth in modules beside the models of timm in a model.

    Raises:
        ValueError: names a layer.
    """
    for block in _outside_of_timm(model).values():
        for name, layer in block._modules.items():
            if foreign.drop_path_rate(layer) is not None:
                raise ValueError(
                    f"--augsub droppath: {type(block).__name__}.{name} is outside of the model of timm, so not every "
                    "block can be reached; use masking"
                )


def _check_every_class(model: nn.Module, places: set[int]) -> None:
    """Refuse stochastic depth that some blocks of a class have and others have not, wherever they are.

    Raises:
        ValueError: names a block without.
    """
    classes = {type(block) for block in model.modules() if id(block) in places} - set(CONTAINERS)
    for name, block in model.named_modules():
        if type(block) in classes and id(block) not in places:
            raise ValueError(f"--augsub droppath: cannot reach every block of the model, not {name}; use masking")


def _check_every_block(model: nn.Module, kind: str, places: set[int]) -> None:
    """Refuse a drop that some blocks of a kind have and others have not.

    Raises:
        ValueError: names a block without.
    """
    for name, container in model.named_modules():
        blocks = list(container.named_children())
        reached = {child: any(id(m) in places for m in module.modules()) for child, module in blocks}
        with_drop = {type(module) for child, module in blocks if reached[child]} - {*CONTAINERS, nn.Dropout}
        for child, module in blocks:
            if type(module) in with_drop and not reached[child]:
                where = f"{name}.{child}" if name else child
                raise ValueError(f"--augsub {kind}: cannot reach every block of the model, not {where}; use masking")
