"""Mistakes in how model, sub-model and optimizer were put together, told before a step is computed."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .drops import Switch
from .masking import Mask

WRAPPERS = {"DataParallel", "DistributedDataParallel"}
SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
AVERAGES = {"ModelEmaV2", "ModelEmaV3", "AveragedModel"}  # timm's ModelEma is none of them: it pairs by name


def unwrap(model: Any) -> nn.Module:
    """Return the module in DDP, DataParallel, a compiled model or an average of weights, and in several of them."""
    *_, inner = _unwrap_stepwise(model)
    return inner


def _unwrap_stepwise(model: Any) -> Iterator[Any]:
    """Yield a model, what is in it, and so on to the module that wraps nothing."""
    yield model
    while _class_names(model) & (WRAPPERS | AVERAGES) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        yield model


def check_bare(model: nn.Module) -> None:
    """Refuse a model that is wrapped or sharded: its drop would change modules that the wrapper has taken stock of.

    Raises:
        ValueError: names the wrapper.
    """
    if unwrap(model) is not model or hasattr(model, "no_sync"):
        name = type(model).__name__
        raise ValueError(f"model: is wrapped already; make AugSub from the bare model, before {name} wraps it")
    if any(_class_names(module) & SHARDED for module in model.modules()):
        raise ValueError("model: is sharded by FSDP already; make AugSub from the bare model, before FSDP shards it")


def find_related(model: nn.Module, others: Iterable[Any], kind: str) -> list[Any]:
    """List those of several AugSubs that are of this kind and whose model contains this one, or is in it."""
    inside = set(model.modules())
    alike = [other for other in list(others) if other.kind == kind]
    return [other for other in alike if other.model in inside or model in set(other.model.modules())]


def is_compiled(model: Any) -> bool:
    """Return whether torch.compile has, or will, put a graph in the place of a model's calls or of some of them."""
    if any(hasattr(wrapper, "_orig_mod") for wrapper in _unwrap_stepwise(model)):
        return True
    return isinstance(model, nn.Module) and any(_compiles_itself(module) for module in model.modules())


def _compiles_itself(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def check_not_compiled(model: nn.Module, acting: list[nn.Module]) -> None:
    """Refuse a drop in layers that are compiled already: their graphs would go on without it.

    Raises:
        ValueError: the model, a part of it or what contains it is compiled, with a layer of the drop inside.
    """
    if not _are_compiled(model, acting):
        return
    gc.collect()  # a compiled model that is gone is part of a cycle
    if _are_compiled(model, acting):
        raise ValueError(
            "model: is compiled already and would go on without the drop; make AugSub before torch.compile, or delete "
            "the compiled model before AugSub"
        )


def _are_compiled(model: nn.Module, acting: list[nn.Module]) -> bool:
    compiled = [module for module in model.modules() if _compiles_itself(module)]
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    if kind is not None:  # else nothing has been compiled in this process
        compiled += [o for o in gc.get_referrers(kind) if type(o) is kind]  # instances refer to their class
    return any(not set(acting).isdisjoint(module.modules()) for module in compiled)


def find_acting_modules(model: nn.Module, switches: Iterable[Switch]) -> list[nn.Module]:
    """List the modules of which the training mode makes the drop act: the drop layers, or where its hooks are."""
    drops = [switch.module for switch in switches]
    return [drop for drop in drops if isinstance(drop, nn.Module)] + _find_hosts(model, drops)


def _find_hosts(model: nn.Module, drops: list[Any]) -> list[nn.Module]:
    return [m for m in model.modules() if any(_belongs_to(hook, drops) for hook in _forward_hooks(m))]


def _forward_hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _belongs_to(hook: Any, drops: list[Any]) -> bool:
    return any(drop is hook or drop is getattr(hook, "__self__", None) for drop in drops)


@contextmanager
def calls_checked(model: nn.Module, switches: Iterable[Switch]) -> Iterator[None]:
    """Warn where the model is called inside and none of the drop's layers is: the sub-model is the main model then.

    A warning, since a layer may be left out of one step by chance, or its rate be read where it is not called.
    """
    drops = [switch.module for switch in switches]
    layers = [drop for drop in drops if isinstance(drop, nn.Module)]  # a model with a rate of its own has layers in it
    watched = {module for layer in layers for module in layer.modules()} | set(_find_hosts(model, drops))
    called: list[None] = []
    handles = [module.register_forward_pre_hook(lambda *_: called.append(None)) for module in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if watched and not called:
        names = ", ".join(sorted({type(module).__name__ for module in watched}))
        warnings.warn(
            f"AugSub: the first forward pass called no layer that makes the sub-model ({names}), which may be the main "
            "model; use another kind of drop, or for masking name a module that is called as tokens= or patches=",
            stacklevel=8,
        )


class _RefuseInBackward:
    """A forward pre-hook that a model may be pickled with."""

    def __call__(self, *_: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "step: activation checkpointing recomputes the sub-model without its drop; call backward() on each of "
                "losses(), or turn checkpointing off"
            )

    __reduce__ = Mask.__reduce__  # of a hook that does nothing


def refuse_calls_in_backward(layers: Iterable[Any]) -> list[RemovableHandle]:
    """Have layers of the drop raise a ValueError where they are called in a backward pass: activation checkpointing
    recomputes the sub pass there, after its rates were restored."""
    modules = {layer for layer in layers if isinstance(layer, nn.Module)}
    return [module.register_forward_pre_hook(_RefuseInBackward()) for module in modules]


def check_mode(acting: list[nn.Module]) -> None:
    """Refuse a step in which no drop acts.

    Raises:
        ValueError: all of the drop's modules are in eval mode.
    """
    if acting and not any(module.training for module in acting):
        raise ValueError("model: is in eval mode and no drop acts in it; call model.train() before the step")


def check_first_step(bare: nn.Module, called: Any, token: nn.Parameter | None, layers: Iterable[Any]) -> None:
    """Refuse a model without the drop, and an optimizer or average made before the model gained its mask token.

    Args:
        bare: the model that AugSub was made from.
        called: the model of the step, which contains it.
        token: the mask token that it gained, if one.
        layers: modules and hooks that make the sub-model, of which the modules have to be in `called`.

    Raises:
        ValueError: names what was made too early.
    """
    modules = {layer for layer in layers if isinstance(layer, nn.Module)}
    if isinstance(called, nn.Module) and not modules <= set(called.modules()):
        raise ValueError("model: lacks layers that AugSub was made for; pass AugSub's model, or what wraps it")
    names = [name for name, parameter in bare.named_parameters() if parameter is token]
    if token is None or not names or not token.requires_grad:  # frozen, or sharded into other parameters
        return
    check_ddp(called, token, names[0])
    check_replicas(called)
    objects = gc.get_objects()  # optimizers and averages know the model, not the reverse
    optimizers = [o for o in objects if issubclass(type(o), torch.optim.Optimizer)]
    groups = (group for optimizer in optimizers for group in getattr(optimizer, "param_groups", []))
    held = {id(p) for group in groups for p in group["params"]}
    if not held.isdisjoint(map(id, bare.parameters())) and id(token) not in held:
        raise ValueError(
            f"optimizer: does not hold the mask token {names[0]}; make it after AugSub with all parameters, or "
            "freeze the token with requires_grad_(False)"
        )
    if _averaged_before(bare, names[0], objects):
        raise ValueError(f"EMA: its average of the model lacks the mask token {names[0]}; make it after AugSub")


def _averaged_before(bare: nn.Module, token_name: str, objects: list[Any]) -> bool:
    """Return whether there is an average of this model from before it had its mask token.

    An average does not know its model. A copy of it has its class, its other names and, before the first update, its
    values; where another model like that is alive, the average may be that one's.
    """
    names = [name for name, _ in bare.named_parameters() if name != token_name]
    alike = [o for o in objects if type(o) is type(bare) and "_modules" in vars(o)]
    alike = [o for o in alike if [name for name, _ in o.named_parameters()] == names]
    averages = [o for o in objects if issubclass(type(o), nn.Module) and _class_names(o) & AVERAGES]
    averaged = {id(module) for average in averages for module in average.modules()}  # a wrapper's holds it deeper
    others = [model for model in alike if id(model) not in averaged]
    return not others and any(
        all(torch.equal(model.get_parameter(name).cpu(), bare.get_parameter(name).cpu()) for name in names)
        for model in alike
    )


def check_ddp(called: Any, token: nn.Parameter, name: str) -> None:
    """Refuse a DDP that does not know the mask token, which it would neither broadcast nor reduce.

    Raises:
        ValueError: it was made before AugSub.
    """
    for wrapper in _unwrap_stepwise(called):
        is_ddp = "DistributedDataParallel" in _class_names(wrapper)
        if is_ddp and all(parameter is not token for parameter in wrapper._module_parameters):
            raise ValueError(f"model: DDP was made before the mask token {name}; make it after AugSub")


def check_replicas(called: Any) -> None:
    """Refuse DataParallel on several devices, whose replicas have no mask token of their own.

    Raises:
        ValueError: it is what a step calls, or in it.
    """
    for wrapper in _unwrap_stepwise(called):
        if "DataParallel" in _class_names(wrapper) and len(wrapper.device_ids) > 1:
            raise ValueError(
                "model: DataParallel has replicas without the mask token; start a process per GPU with torchrun, and "
                "wrap the model in DistributedDataParallel"
            )


def check_recomputation(bare: nn.Module, kind: str) -> None:
    """Refuse one backward for both passes where it would recompute the sub pass at the main model's rates.

    Raises:
        ValueError: activation checkpointing is on, and the drop is in the layers that it recomputes.
    """
    attributes = ("grad_checkpointing", "gradient_checkpointing")  # timm's and transformers'
    if kind in ("dropout", "droppath") and any(getattr(m, a, False) for m in bare.modules() for a in attributes):
        raise ValueError(
            f"step: activation checkpointing would recompute the sub-model without its {kind}; call backward() on each "
            "of losses(), or turn checkpointing off"
        )


def _class_names(module: nn.Module) -> set[str]:
    return {c.__name__ for c in type(module).__mro__}
