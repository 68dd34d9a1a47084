"""Where a model has a place for each drop, and which attribute of which module switches it on.

Dropout       of attention projections and MLPs.
Drop path     stochastic depth of every residual branch; at rate 0 timm and transformers leave an Identity or None in
              its place, which becomes a `DropPath`.
Masking       as `common.masking` says; token drop through timm's `patch_drop`, or a hook on the module that gives the
              tokens.

A timm model is prepared in itself, also inside a wrapper. Names of other libraries' layers are in `common.foreign`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from torch import nn

from . import foreign
from .drop_layers import check_rate_acts, find_drop_paths, find_dropouts
from .masking import BLOCK, EmbeddingMask, PixelMask, TokenMask, patch_embedding
from .token_drop import NaFlexTokenDrop, NaFlexValid, TokenDrop

KINDS = ("none", "masking", "dropout", "droppath")
DROPOUT = "dropout of attention projections and MLPs"
DROP_PATH = "stochastic depth of every block"
SAME_COST = "the sub pass costs as much as the main pass"


class Switch(NamedTuple):
    """An attribute of a module that holds a drop rate, and its value in the sub-model."""

    module: Any
    name: str
    sub_value: Any


class InstalledDrop(NamedTuple):
    """A drop that a model was prepared for.

    Args:
        name: how it works in this model, such as "token drop".
        switches: turn it on.
        undo: restore the model, called in reverse order.
        mask_token: the parameter that the model gained, if one.
        note: what the user should know of it.
    """

    name: str
    switches: list[Switch]
    undo: list[Callable[[], None]]
    mask_token: nn.Parameter | None = None
    note: str = ""


class _Place(NamedTuple):
    """Where patches are hidden: a timm model, or a module that gives tokens or patches."""

    drop: str
    module: nn.Module
    prefix: int | None = None  # of the tokens that the module gives; None for a model with a place of its own
    layout: str | None = None  # of the patches that the module gives, as TokenMask's; None as before
    note: str = ""


def find_drops(model: nn.Module) -> dict[str, str]:
    """List the drops that the model has a place for, with how each works there, e.g. {"masking": "token drop"}.

    The model is left unchanged.

    Raises:
        ValueError: several models inside, or stochastic depth or dropout that is not in every block.
    """
    offered = {"masking": _find_place(model).drop}
    if find_dropouts(model):
        offered["dropout"] = DROPOUT
    if find_drop_paths(model):
        offered["droppath"] = DROP_PATH
    return offered


def install_drop(
    model: nn.Module,
    kind: str,
    ratio: float,
    block: int = BLOCK,
    *,
    tokens: nn.Module | str | None = None,
    prefix: int | None = None,
    patches: nn.Module | str | None = None,
) -> InstalledDrop:
    """Prepare the model in place for a drop.

    Args:
        tokens: module, or its name, that gives tokens (B, prefix + N, D), for masking to drop some of the N; or a timm
            model inside the model.
        prefix: how many tokens at the start are no patches; None is 1, or as many as a module of `foreign` has.
        patches: module, or its name, that turns images into a grid of patches, for masking to put the mask token
            there.

    Raises:
        ValueError: the model has no place for the drop, or not in every block.
    """
    if tokens is None and prefix is not None:
        raise ValueError("prefix: belongs to the module that tokens= names; give both")
    if kind != "masking":
        if tokens is not None or patches is not None:
            raise ValueError(f"tokens, patches: belong to masking, not to {kind}; leave them out")
        switches, undo = (_install_dropouts if kind == "dropout" else _install_drop_paths)(model, ratio)
        return InstalledDrop(DROPOUT if kind == "dropout" else DROP_PATH, switches, undo)
    place = _find_place(model) if tokens is None and patches is None else _named_place(model, tokens, prefix, patches)
    if ratio == 0:  # the sub-model is the main model; a mask token would be a parameter without a gradient
        return InstalledDrop(place.drop, [], [])
    return _install_mask(model, place, ratio, block)


def _restore(module: nn.Module, name: str, value: Any) -> None:
    if not (isinstance(value, nn.Module) and name in module._modules):  # else it keeps its place among the others
        delattr(module, name)
    setattr(module, name, value)


def _remove_hook(model: nn.Module, mask: Any) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is mask]:
                del hooks[key]
                for flags in (module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs):
                    flags.pop(key, None)


# masking


def _mask_name(model: nn.Module) -> str:
    # a model that keeps its tokens in a grid, as SAM's does, has no `num_prefix_tokens` and cannot leave tokens out
    sequence = hasattr(model, "patch_drop") and hasattr(model, "num_prefix_tokens")
    if sequence or (hasattr(model, "patch_drop_rate") and foreign.is_timm_model(model)):
        return TokenDrop.name
    return TokenMask.name if patch_embedding(model) is not None else PixelMask.name


def _find_place(model: nn.Module) -> _Place:
    """Find where a model's patches are hidden: in itself, in the one model inside it with a place, or in its input."""
    name = _mask_name(model)
    if foreign.is_timm_model(model):
        return _Place(name, model)
    if name != PixelMask.name:
        return _Place(name, model, note="" if name == TokenDrop.name else _cost_note(model, name))
    places = list(_places_inside(model, ""))
    if all(place.drop == PixelMask.name for _, place in places):
        return _Place(PixelMask.name, model, note=_cost_note(model, PixelMask.name))
    if len(places) > 1:
        names = ", ".join(name for name, _ in places)
        raise ValueError(f"model: has several models inside: {names}; name the one to drop tokens of as tokens=")
    if places[0][1].drop == TokenDrop.name and _needs_every_patch(model):
        return _Place(PixelMask.name, model, note=_cost_note(model, PixelMask.name))
    return places[0][1]


def _needs_every_patch(model: nn.Module) -> bool:
    return any(foreign.needs_every_patch(module) for module in model.modules())


def _places_inside(module: nn.Module, name: str) -> Iterable[tuple[str, _Place]]:
    """Yield the outermost models inside one: timm's, and those that `common.foreign` knows, with their names."""
    if foreign.is_timm_model(module):
        yield name, _Place(_mask_name(module), module)
    elif tokens := foreign.find_place(foreign.TOKENS, module):
        yield name, _Place(TokenDrop.name, module.get_submodule(tokens.module), prefix=tokens.prefix(module))
    elif patches := foreign.find_place(foreign.PATCHES, module):
        yield name, _Place(TokenMask.name, module.get_submodule(patches), layout="NHWC")
    elif foreign.find_place(foreign.MASKED_EMBEDDINGS, module):
        yield name, _Place(EmbeddingMask.name, module)
    else:
        for child, submodule in module.named_children():
            yield from _places_inside(submodule, f"{name}.{child}" if name else child)


def _cost_note(model: nn.Module, drop: str) -> str:
    """Return what to say of a drop that computes every patch, where the model seems to take a sequence of tokens."""
    if _needs_every_patch(model):
        return f"{type(model).__name__} needs every patch, so masking is by {drop} and {SAME_COST}"
    attention = re.compile(r"\w*(Attention|TransformerEncoder)\w*")
    if not any(attention.fullmatch(type(module).__name__) for module in model.modules()):
        return ""
    return (
        f"masking is by {drop}, and {SAME_COST}; where a module gives tokens (B, prefix + N, D) of which any may be "
        "missing, name it as tokens="
    )


def _named_place(
    model: nn.Module, tokens: nn.Module | str | None, prefix: int | None, patches: nn.Module | str | None
) -> _Place:
    if tokens is not None and patches is not None:
        raise ValueError("tokens, patches: are two ways to hide patches; give one of them")
    flag, given = ("tokens", tokens) if patches is None else ("patches", patches)
    assert given is not None
    module = _get_module(model, flag, given)
    if patches is not None:
        return _Place(TokenMask.name, module, layout="")
    if prefix is not None and prefix < 0:
        raise ValueError(f"prefix: {prefix} is below 0; give the number of tokens that are no patches")
    inside = list(_places_inside(module, ""))
    if prefix is None and len(inside) == 1 and inside[0][1].drop != PixelMask.name:
        return inside[0][1]
    return _Place(TokenDrop.name, module, prefix=1 if prefix is None else prefix)


def _get_module(model: nn.Module, flag: str, given: nn.Module | str) -> nn.Module:
    if isinstance(given, nn.Module):
        if not any(module is given for module in model.modules()):
            raise ValueError(f"{flag}: {type(given).__name__} is no module of {type(model).__name__}; name one that is")
        return given
    try:
        return model.get_submodule(given)
    except AttributeError:
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"{flag}: the model has no module {given!r}; its own are {names}") from None


def _install_mask(root: nn.Module, place: _Place, ratio: float, block: int) -> InstalledDrop:
    model = place.module
    token: nn.Parameter | None = None
    undo: list[Callable[[], None]] = []
    mask: Any
    if place.drop == TokenDrop.name and place.prefix is None:
        return _install_patch_drop(model, ratio)
    if place.drop == TokenDrop.name:
        mask = TokenDrop(model, int(place.prefix or 0))
    elif place.drop == PixelMask.name:
        mask = PixelMask.on(model, block)
    elif foreign.find_place(foreign.MASKED_EMBEDDINGS, model):
        mask = EmbeddingMask.on(model, block)
        if (token := mask.added) is not None:
            undo.append(partial(_restore, model, "mask_token", None))
    else:
        owner = model if place.layout is None else root
        blank = hasattr(owner, "mask_token")  # one that is None, as another is refused
        mask = TokenMask.on(model, block) if place.layout is None else TokenMask(root, block, model, place.layout)
        token = mask.model.mask_token
        undo.append(partial(_restore, owner, "mask_token", None) if blank else partial(delattr, owner, "mask_token"))
    undo.append(partial(_remove_hook, root, mask))
    return InstalledDrop(place.drop, [Switch(mask, "ratio", ratio)], undo, token, place.note)


def _install_patch_drop(model: nn.Module, ratio: float) -> InstalledDrop:
    """Prepare a timm model for its token drop."""
    name = TokenDrop.name
    if not hasattr(model, "patch_drop"):  # Hiera drops whole mask units itself
        return InstalledDrop(name, [Switch(model, "patch_drop_rate", ratio)], [])
    placeholder, prefix = model.patch_drop, int(model.num_prefix_tokens)  # type: ignore[arg-type]
    if any(each == "timm.NaFlexVit" for each in foreign.class_names(model)):
        # it fails on its own input where a layer is there and drops nothing, as one at rate 0 in the main model would
        layer = NaFlexTokenDrop(ratio, num_prefix_tokens=prefix)
        embeds: Any = model.embeds
        handle = embeds.register_forward_pre_hook(NaFlexValid(layer), with_kwargs=True)
        undo = [partial(_restore, model, "patch_drop", placeholder), handle.remove]
        if placeholder is None:  # torch.compile guards on where an attribute is: among the submodules, once it was one
            model.patch_drop = layer
            model.patch_drop = None
        return InstalledDrop(name, [Switch(model, "patch_drop", layer)], undo)
    if isinstance(placeholder, (PatchDropout, PatchDropoutWithIndices)):
        return InstalledDrop(name, [Switch(placeholder, "prob", ratio)], [])
    # a model with rotary positions holds None here and needs the indices of the kept tokens
    new = (PatchDropoutWithIndices if placeholder is None else PatchDropout)(0.0, num_prefix_tokens=prefix)
    model.patch_drop = new.train(model.training)
    switch = Switch(model.patch_drop, "prob", ratio)
    return InstalledDrop(name, [switch], [partial(_restore, model, "patch_drop", placeholder)])


# dropout and stochastic depth


def _install_dropouts(model: nn.Module, ratio: float) -> tuple[list[Switch], list[Callable[[], None]]]:
    places = find_dropouts(model)
    if not places:
        raise _no_place(model, "dropout")
    return [Switch(module, name, ratio) for module, name in places if ratio], []


def _install_drop_paths(model: nn.Module, ratio: float) -> tuple[list[Switch], list[Callable[[], None]]]:
    places = find_drop_paths(model)
    if not places:
        raise _no_place(model, "droppath")
    switches: list[Switch] = []
    undo: list[Callable[[], None]] = []
    for block, name in places if ratio else []:
        placeholder = getattr(block, name)
        if foreign.drop_path_rate(placeholder) is None:
            setattr(block, name, DropPath(0.0).train(block.training))
            undo.append(partial(_restore, block, name, placeholder))
        layer = getattr(block, name)
        check_rate_acts(layer, f"{type(block).__name__}.{name}")
        switches.append(Switch(layer, str(foreign.drop_path_rate(layer)), ratio))
    return switches, undo


def _no_place(model: nn.Module, kind: str) -> ValueError:
    offered = ["masking"]
    other = "droppath" if kind == "dropout" else "dropout"
    with suppress(ValueError):  # it cannot reach every block
        if (find_dropouts if other == "dropout" else find_drop_paths)(model):
            offered.append(other)
    return ValueError(f"--augsub {kind}: {type(model).__name__} has no place for it; use {' or '.join(offered)}")
