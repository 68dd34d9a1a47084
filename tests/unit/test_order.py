"""Mistakes of order are told in a sentence, before a step is computed; what is right is not refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from common.augsub import AugSub

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32, "window_size": 4, "num_classes": 5}
LABELS = torch.tensor([0, 1, 2, 4])


def vit(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit3_small_patch16_224", **VIT | kwargs)


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", **SWIN)


def make(model: nn.Module, kind: str = "masking", **kwargs: Any) -> AugSub:
    return AugSub(model, kind, block=8, **kwargs)


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def losses(augsub: AugSub, model: Any, **kwargs: Any) -> Any:
    return augsub.losses(model, images(), LABELS, F.cross_entropy, **kwargs)


def take_step(augsub: AugSub, model: Any, **kwargs: Any) -> None:
    for loss in losses(augsub, model, **kwargs):
        loss.backward()


@pytest.fixture
def process_group(tmp_path):
    torch_dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch_dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["masking", "dropout", "droppath"])
@pytest.mark.parametrize("build", [vit, swin, lambda: timm.create_model("resnet18", layers=(1, 1, 1, 1))])
def test_a_model_in_eval_mode_is_refused(build, kind):
    model = build()
    if kind == "dropout" and not hasattr(model, "patch_embed"):
        return
    augsub = make(model, kind)
    model.eval()
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    for step in (augsub.losses, augsub.step):
        with pytest.raises(
            ValueError, match=r"model: is in eval mode and no drop acts in it; call model.train\(\) before"
        ):
            step(model, images(), LABELS, F.cross_entropy)
    assert not forwards
    take_step(augsub, model.train())


def test_frozen_parts_may_be_in_eval_mode_where_the_drop_acts():
    model = vit()
    augsub = make(model, "droppath")
    model.patch_embed.eval()
    model.blocks[0].eval()
    take_step(augsub, model)
    model = swin()
    augsub = make(model)
    model.patch_embed.eval()  # where the mask token is put in
    with pytest.raises(ValueError, match="eval mode"):
        losses(augsub, model)


def test_eval_mode_is_no_mistake_without_a_drop():
    for kind, ratio in (("none", 0.5), ("masking", 0.0)):
        model = vit().eval()
        take_step(AugSub(model, kind, ratio), model)


@pytest.mark.parametrize(("wrap", "name"), [
    (nn.DataParallel, "DataParallel"), (torch.compile, "OptimizedModule"), (AveragedModel, "AveragedModel"),
    (DistributedDataParallel, "DistributedDataParallel"),
])  # fmt: skip
def test_a_wrapped_model_is_refused(wrap, name, process_group):
    for kind in ("masking", "none"):
        with pytest.raises(ValueError, match=f"make AugSub from the bare model, before {name} wraps it"):
            AugSub(wrap(vit()), kind)


def test_a_sharded_model_is_refused(process_group):
    model = vit()
    mesh = torch_dist.init_device_mesh("cpu", (1,))
    fully_shard(model.blocks[0], mesh=mesh)
    with pytest.raises(ValueError, match="model: is sharded by FSDP already; make AugSub from the bare model"):
        AugSub(model)


def test_another_model_than_augsubs_is_refused():
    model = vit()
    augsub = make(model)
    for other in (vit(), copy.deepcopy(model)):
        with pytest.raises(ValueError, match="model: lacks layers that AugSub was made for; pass AugSub's model"):
            losses(augsub, other)
    for wrapper in (nn.Sequential(model), nn.DataParallel(model), lambda x: model(x)):
        take_step(augsub, wrapper)


def test_replicas_that_lack_the_mask_token_are_refused():
    for build, has_token in ((swin, True), (vit, False)):
        model = build()
        augsub, wrapper = make(model), nn.DataParallel(model)
        wrapper.device_ids = [0, 1]
        if not has_token:
            augsub.losses(wrapper, images(), LABELS, F.cross_entropy)
            continue
        with pytest.raises(ValueError, match="model: DataParallel has replicas without the mask token; start a proc"):
            augsub.losses(wrapper, images(), LABELS, F.cross_entropy)


def compile_a_block(model: Any) -> None:
    model.blocks[0].compile()


def compile_in_a_wrapper(model: Any) -> nn.Module:
    compiled: Any = torch.compile(model)
    return nn.Sequential(compiled)


@pytest.mark.parametrize("compile_it", [
    compile_in_a_wrapper, lambda m: m.compile(), lambda m: torch.compile(m.blocks), compile_a_block,
])  # fmt: skip
def test_a_model_that_is_compiled_already_is_refused(compile_it):
    """Its graphs were made without the drop, and a hook that comes later is not looked for."""
    model = vit()
    compiled = compile_it(model)
    before = str(model)
    with pytest.raises(
        ValueError, match="model: is compiled already and would go on without the drop; make AugSub bef"
    ):
        AugSub(model, "droppath", 0.5)
    assert str(model) == before
    AugSub(model, "none")
    del compiled


def test_a_part_that_is_compiled_is_no_mistake_where_no_drop_acts_in_it():
    pair = nn.ModuleDict({"student": vit(), "teacher": torch.compile(vit())})
    AugSub(pair, "masking", 0.5, tokens="student")
    model = vit()
    compile_a_block(model)  # tokens are dropped before it
    AugSub(model, "masking", 0.5)


def test_a_compiled_model_that_is_gone_is_no_mistake():
    model = vit()
    torch.compile(model)
    take_step(make(model), model)


class Unused(nn.Module):
    """A model of blocks, each with a stochastic depth that its forward does not call, and a mark likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.mark = nn.Identity()
        self.blocks = nn.Sequential(*(UnusedBlock() for _ in range(2)))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class UnusedBlock(nn.Module):
    """Convolution, with dropout and stochastic depth left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(4, 1)
        self.drop_path, self.dropout = DropPath(0.0), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize(("kind", "options", "layer"), [
    ("masking", {"tokens": "mark"}, "Identity"), ("droppath", {}, "DropPath"), ("dropout", {}, "Dropout"),
])  # fmt: skip
def test_a_drop_that_no_forward_reaches_is_told(kind, options, layer):
    model = Unused()
    model(images())
    augsub = AugSub(model, kind, 0.5, **options)
    with pytest.warns(
        UserWarning, match=rf"the first forward pass called no layer that makes the .* \({layer}\)"
    ) as told:
        take_step(augsub, model)
    assert told[0].filename == __file__
    take_step(augsub, model)  # said once
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert not any(hooks)
    take_step(AugSub(model, "masking", block=8), model)


def test_calls_are_counted_in_the_first_step_alone():
    model = vit()
    augsub = make(model)
    seen: list[int] = []
    model.patch_drop.register_forward_hook(lambda module, *_: seen.append(len(module._forward_pre_hooks)))
    for _ in range(2):
        take_step(augsub, model)
    assert seen == [1, 0, 0, 0]


@pytest.mark.parametrize("kind", ["masking", "dropout", "droppath"])
def test_a_second_augsub_of_a_kind_takes_the_firsts_place(kind):
    for build in (vit, swin):
        model = build()
        first = AugSub(model, kind, 0.5, **({"block": 8} if kind == "masking" else {}))
        take_step(first, model)
        second = AugSub(nn.Sequential(model), kind, 0.75) if build is vit else make(model, kind)
        with pytest.raises(ValueError, match="AugSub: was removed from its model, or replaced"):
            losses(first, model)
        first.remove()
        first.remove()
        take_step(second, model)
        torch.manual_seed(0)
        with torch.no_grad(), second.sub_model():
            masked = model(images())
        assert not torch.equal(masked, model(images()))
        second.remove()
        assert str(model) == str(build())


def test_a_second_augsub_that_cannot_be_made_leaves_the_first():
    model = vit()
    augsub = make(model)
    with pytest.raises(ValueError, match="tokens: the model has no module 'typo'"):
        AugSub(model, "masking", 0.5, tokens="typo")
    take_step(augsub, model)


def test_after_step_a_model_can_be_pickled_and_removal_leaves_no_hook():
    model = vit()
    augsub = make(model)
    augsub.step(model, images(), LABELS, F.cross_entropy).loss.backward()
    hook = pickle.loads(pickle.dumps(model)).patch_drop._forward_pre_hooks
    assert [function(None, None) for function in hook.values()] == [None]
    augsub.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_module_that_is_being_made_is_no_obstacle():
    class Outer(nn.Module):
        def __init__(self) -> None:
            model = swin()
            augsub = make(model)
            take_step(augsub, model)
            super().__init__()

    Outer()


def test_augsubs_of_two_kinds_go_side_by_side():
    model = vit()
    masking, droppath = make(model), make(model, "droppath")
    for augsub in (masking, droppath, masking):
        take_step(augsub, model)
    masking.remove()
    take_step(droppath, model)


class Checkpointed(nn.Module):
    """A model that computes its backbone anew in backward."""

    def __init__(self, backbone: nn.Module, reentrant: bool):
        super().__init__()
        self.backbone, self.reentrant = backbone, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.backbone, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["masking", "dropout", "droppath"])
def test_step_refuses_recomputation_by_the_models_own_code(kind, reentrant):
    plain = Checkpointed(vit(), reentrant)
    augsub = make(plain, kind)
    x = images().requires_grad_()
    with pytest.raises(ValueError, match="step: activation checkpointing recomputes the sub-model"):
        augsub.step(plain, x, LABELS, F.cross_entropy).loss.backward()
    for loss in augsub.losses(plain, x, LABELS, F.cross_entropy):
        loss.backward()
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_an_augsub_is_not_pickled_and_is_copied_with_its_model():
    model = vit()
    augsub = make(model)
    with pytest.raises(TypeError, match="AugSub: cannot be pickled, since its hooks stay behind; make it in each proc"):
        pickle.dumps(augsub)
    take_step(augsub, model)
    copied_model, copied = copy.deepcopy((model, augsub))
    assert copied.model is copied_model and copied.switches[0].module is copied_model.patch_drop
    with copied.sub_model():
        assert copied_model.patch_drop.prob == 0.5 and model.patch_drop.prob == 0
    take_step(copied, copied_model)
    copied.remove()
    assert isinstance(copied_model.patch_drop, nn.Identity) and not isinstance(model.patch_drop, nn.Identity)


def test_what_is_printed():
    assert repr(make(vit())) == "AugSub(masking, ratio=0.5, token drop)"
    assert repr(AugSub(vit(), "none")) == "AugSub(none)"


@pytest.mark.parametrize("make_optimizer", [
    lambda m: torch.optim.SGD(m.parameters(), 0.1), lambda m: create_optimizer_v2(m, "adamw", 0.1),
    lambda m: torch.optim.SGD(m.patch_embed.parameters(), 0.1),
])  # fmt: skip
def test_an_optimizer_made_before_the_mask_token_is_refused(make_optimizer):
    model = swin()
    optimizer = make_optimizer(model)
    augsub = make(model)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="optimizer: does not hold the mask token mask_token; make it after AugSub with all parameters",
        ):
            losses(augsub, model)
    assert optimizer
    model.mask_token.requires_grad_(False)
    take_step(augsub, model)
    assert model.mask_token.grad is None


def test_other_optimizers_are_no_mistake():
    model, other = swin(), swin()
    first, unrelated = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    augsub = make(model)
    second = torch.optim.SGD([model.mask_token], 0.1)
    take_step(augsub, model)
    del first, second
    model = vit()
    third = torch.optim.SGD(model.parameters(), 0.1)  # token drop adds no parameter
    take_step(make(model), model)
    take_step(augsub := make(other := swin()), other)  # no optimizer yet
    assert unrelated and third and augsub


@pytest.mark.parametrize("average", [ModelEmaV2, ModelEmaV3, AveragedModel])
def test_an_average_made_before_the_mask_token_is_refused(average):
    model = swin()
    ema = average(model)
    augsub = make(model)
    with pytest.raises(
        ValueError, match="EMA: its average of the model lacks the mask token mask_token; make it after"
    ):
        losses(augsub, model)
    ema = average(model)
    take_step(augsub, model)
    assert "mask_token" in ema.module.state_dict()
    ema = average(nn.Sequential(inner := swin()))
    augsub = make(inner)
    with pytest.raises(ValueError, match="EMA: its average of the model lacks the mask token mask_token; make it"):
        losses(augsub, inner)


def test_an_average_of_another_model_is_no_mistake():
    """Of a plain twin beside it with the same seed; and of one that is gone, and has trained."""
    plain, model = swin(), swin()
    ema = ModelEmaV3(plain)
    take_step(make(model), model)
    plain.patch_embed.proj.weight.data += 1
    ema.set(plain)
    del plain
    other = swin()
    take_step(make(other), other)


def test_a_step_that_was_not_finished_is_told_and_the_model_restored():
    model = vit()
    augsub = make(model)
    unfinished = losses(augsub, model)
    (next(unfinished) + next(unfinished)).backward()
    assert model.patch_drop.prob == 0.5
    with pytest.raises(ValueError, match="losses: the step before was not finished and the model was still its"):
        losses(augsub, model)
    assert model.patch_drop.prob == 0
    take_step(augsub, model)
    assert list(unfinished) == []


def test_the_model_is_given_back_in_the_middle_of_a_step():
    model = vit(drop_path_rate=0.1)
    augsub = make(model, "droppath")
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    unfinished = losses(augsub, model)
    next(unfinished), next(unfinished)
    augsub.remove()
    after = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath" and m.drop_prob]
    assert after == [rate for rate in rates if rate]


def test_steps_that_overlap_are_refused():
    """Else the second would end as the sub-model of the first, for good."""
    model = vit()
    augsub = make(model)
    with pytest.raises(ValueError, match="the step before was not finished"):
        for first, second in zip(losses(augsub, model), losses(augsub, model)):
            (first + second).backward()
    assert model.patch_drop.prob == 0


def test_finished_steps_are_no_mistake():
    model = vit()
    augsub = make(model)
    main, sub = losses(augsub, model)
    (main + sub).backward()
    sum(losses(augsub, model)).backward()
    for _, loss in zip(("main", "sub"), losses(augsub, model)):
        loss.backward()
    for loss in losses(augsub, model):  # a step given up
        loss.backward()
        break
    created = losses(augsub, model)  # and one that is never begun
    take_step(augsub, model)
    assert created


@pytest.mark.parametrize("kind", ["dropout", "droppath", "masking"])
def test_one_backward_under_activation_checkpointing(kind):
    """AugDrop and AugPath would be off in the recomputation; masking is before the layers that are recomputed."""
    plain, thrifty = vit(), vit()
    thrifty.set_grad_checkpointing(True)
    augsub = make(thrifty, kind)
    if kind != "masking":
        with pytest.raises(ValueError, match="step: activation checkpointing would recompute the sub-model without"):
            augsub.step(thrifty, images(), LABELS, F.cross_entropy)
        return
    for model in (plain, thrifty):
        augsub = make(model, kind)
        torch.manual_seed(3)
        augsub.step(model, images(), LABELS, F.cross_entropy).loss.backward()
    for one, other in zip(plain.parameters(), thrifty.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


class Reductions(nn.Module):
    """Hides DDP's `no_sync`, so that both backwards reduce."""

    def __init__(self, ddp: DistributedDataParallel):
        super().__init__()
        self.ddp = ddp

    def forward(self, x: Tensor) -> Tensor:
        return self.ddp(x)


@pytest.mark.parametrize("build", [swin, vit])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("way", ["losses", "step", "hidden no_sync"])
def test_ddp_finds_a_gradient_of_each_parameter_in_each_backward(way, static, build, process_group):
    """Three steps of two micro-batches, as DDP notices in a step that the one before missed a parameter."""
    found = []
    for wrap in (False, True):
        model: Any = build()
        torch.manual_seed(2)
        augsub = make(model)
        called = DistributedDataParallel(model, static_graph=static) if wrap else model
        if wrap and way == "hidden no_sync":
            called = Reductions(called)
        for part in range(6):
            torch.manual_seed(part)
            if way == "step":
                augsub.step(called, images(), LABELS, F.cross_entropy, sync=part % 2 == 1).loss.backward()
            else:
                take_step(augsub, called, sync=part % 2 == 1)
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def leaves_no_process_group():
    """Lightning leaves its process group to the end of the process, where the next test makes its own."""
    yield
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
def test_lightnings_manual_optimization_in_ddp(static, tmp_path, leaves_no_process_group):
    """Its DDP is around the LightningModule, and AugSub sees the bare model within."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.strategies import DDPStrategy

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = swin()
            torch.manual_seed(2)
            self.augsub = make(self.net)

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            torch.manual_seed(index)
            for loss in self.augsub.losses(self.net, *batch, F.cross_entropy):
                self.manual_backward(loss)
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.TensorDataset(images().repeat(3, 1, 1, 1), LABELS.repeat(3))
    task: Any = Task()
    lightning.Trainer(
        accelerator="cpu", devices=1, strategy=DDPStrategy(process_group_backend="gloo", static_graph=static),
        max_epochs=1, logger=False, use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    ).fit(task, torch.utils.data.DataLoader(data, 4))  # fmt: skip
    plain = Task()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step)
        take_step(plain.augsub, plain.net)
        optimizer.step()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(task.state_dict()[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_a_ddp_made_before_the_mask_token_is_refused(process_group):
    """It would neither broadcast the token nor reduce its gradient."""
    model = swin()
    wrapped = DistributedDataParallel(model)
    augsub = make(model)
    with pytest.raises(ValueError, match="model: DDP was made before the mask token mask_token; make it after AugSub"):
        losses(augsub, wrapped)


def test_batch_norms_that_were_replaced_are_told():
    model = timm.create_model("resnet18", num_classes=5)
    augsub = AugSub(model, "masking", batch_norm="main")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(ValueError, match="model: lacks layers that AugSub was made for"):
        losses(augsub, model)


def test_an_optimizer_that_could_not_be_made_is_no_mistake():
    """An exception that is kept, as notebooks do, keeps it alive without its groups."""
    model = swin()
    augsub = make(model)
    with pytest.raises(ValueError) as kept:
        torch.optim.SGD(model.parameters(), lr=-1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    take_step(augsub, model)
    assert kept is not None and optimizer.param_groups
