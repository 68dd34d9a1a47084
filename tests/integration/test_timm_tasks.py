"""AugSub in the tasks of timm.task: gradients against the equation written out, EMA, compile, DDP, checkpoints."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from common.augsub import AugSub
from common.integrations.timm_task import AugSubTask
from tests.equation import assert_gradients, gradients, soft_cross_entropy, two_passes
from tests.processes import count_reductions

pytestmark = pytest.mark.slow

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 8, "num_classes": 5}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "resnet18": {"layers": (1, 1, 1, 1), "num_classes": 5},
}
LABELS = torch.arange(6) % 5


def build(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **MODELS[name] | kwargs).train()


def images(name: str) -> Tensor:
    size = MODELS[name].get("img_size", 64)
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1))


def teacher_of(name: str) -> nn.Module:
    """Of another width than any student, without random layers."""
    size = MODELS[name].get("img_size", 64)
    torch.manual_seed(9)
    return timm.create_model("vit_tiny_patch16_224", **VIT | {"img_size": size, "embed_dim": 16})


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher | student) of tempered softmaxes, mean over the batch, times the squared temperature."""
    t, s = (teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    return (t.exp() * (t - s)).sum(1).mean() * temperature**2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
@pytest.mark.parametrize("kind", ["masking", "droppath", "none"])
def test_classification(name, kind):
    model, x = build(name), images(name)
    task = AugSubTask(ClassificationTask(model, LabelSmoothingCrossEntropy(0.1), verbose=False), kind, 0.5)
    torch.manual_seed(3)
    result = task(x, LABELS)
    result["loss"].backward()
    got = gradients(model)

    model.zero_grad()
    torch.manual_seed(3)
    main, sub = two_passes(task.augsub, lambda: model(x))
    first = F.cross_entropy(main, LABELS, label_smoothing=0.1)
    second = soft_cross_entropy(sub, main.detach().softmax(1))
    (first if kind == "none" else (first + second) / 2).backward()
    assert_gradients(got, gradients(model))
    torch.testing.assert_close(result["output"], main)
    if kind != "none":
        torch.testing.assert_close((result["main_loss"], result["sub_loss"]), (first.detach(), second.detach()))


def test_a_batch_of_the_naflex_loader():
    """Patches, their coordinates and which of them are real, as a mapping."""
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("naflexvit_base_patch16_gap", **sizes).train()
    grid = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).reshape(1, 64, 2)
    x = {"patches": torch.randn(6, 64, 48), "patch_coord": grid.expand(6, -1, -1), "patch_valid": torch.ones(6, 64) > 0}
    task = AugSubTask(ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False), "masking", 0.5)
    torch.manual_seed(3)
    task(x, LABELS)["loss"].backward()
    got = gradients(model)

    model.zero_grad()
    torch.manual_seed(3)
    main, sub = two_passes(task.augsub, lambda: model(x))
    ((F.cross_entropy(main, LABELS) + soft_cross_entropy(sub, main.detach().softmax(1))) / 2).backward()
    assert_gradients(got, gradients(model))
    assert not torch.allclose(main, sub)


def test_multi_label():
    name = "vit_tiny_patch16_224"
    model, x = build(name), images(name)
    y = torch.eye(5)[LABELS] + torch.eye(5)[(LABELS + 1) % 5]
    task = AugSubTask(MultiLabelClassificationTask(model, verbose=False), "masking", 0.5)
    torch.manual_seed(3)
    task(x, y)["loss"].backward()
    got = gradients(model)

    model.zero_grad()
    torch.manual_seed(3)
    main, sub = two_passes(task.augsub, lambda: model(x))
    criterion = MultiLabelClassificationTask(copy.deepcopy(model), verbose=False).criterion
    soft = F.binary_cross_entropy_with_logits(sub, main.detach().sigmoid())
    ((criterion(main, y) + soft) / 2).backward()
    assert_gradients(got, gradients(model))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_logit_distillation(name):
    model, teacher, x = build(name), teacher_of(name), images(name)
    task = LogitDistillationTask(model, teacher, nn.CrossEntropyLoss(), task_loss_weight=0.3, temperature=2.0)
    task = AugSubTask(task, "masking", 0.5)
    task.train()
    calls: list[int] = []
    teacher.register_forward_hook(lambda *args: calls.append(1))
    torch.manual_seed(3)
    task(x, LABELS)["loss"].backward()
    got = gradients(task.get_trainable_module())
    assert calls == [1], "both passes see the same images, so the teacher computes once"

    model.zero_grad()
    torch.manual_seed(3)
    main, sub = two_passes(task.augsub, lambda: model(x))
    with torch.no_grad():
        logits = teacher(task.teacher.normalize_input(x, task.student_mean, task.student_std))
    first = 0.3 * F.cross_entropy(main, LABELS) + 0.7 * divergence(main, logits, 2.0)
    second = 0.3 * soft_cross_entropy(sub, main.detach().softmax(1)) + 0.7 * divergence(sub, logits, 2.0)
    ((first + second) / 2).backward()
    assert_gradients(got, gradients(model))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_feature_distillation(name):
    """Its trainable module calls parts of the student, so a hook on the student's forward would never run."""
    teacher, x = teacher_of(name), images(name)
    task = FeatureDistillationTask(build(name), teacher, nn.CrossEntropyLoss(), distill_loss_weight=2.0)
    task = AugSubTask(task, "masking", 0.5)
    task.train()
    module = task.get_trainable_module()
    torch.manual_seed(3)
    result = task(x, LABELS)
    result["loss"].backward()
    got = gradients(module)
    assert result["sub_loss"] != result["main_loss"]

    module.zero_grad()
    torch.manual_seed(3)
    (main, features), (sub, sub_features) = two_passes(task.augsub, lambda: module(x))
    with torch.no_grad():
        seen = task.teacher.normalize_input(x, task.student_mean, task.student_std)
        wanted = teacher.forward_head(teacher.forward_features(seen), pre_logits=True)
    first = F.cross_entropy(main, LABELS) + 2 * F.mse_loss(features, wanted)
    second = soft_cross_entropy(sub, main.detach().softmax(1)) + 2 * F.mse_loss(sub_features, wanted)
    ((first + second) / 2).backward()
    assert_gradients(got, gradients(module))
    assert not torch.allclose(main, sub), "the sub-model's images are masked"


@pytest.mark.parametrize("distill", ["soft", "hard"])
def test_token_distillation(distill):
    name = "deit_tiny_distilled_patch16_224"
    model, teacher, x = build(name), teacher_of(name), images(name)
    task = TokenDistillationTask(model, teacher, nn.CrossEntropyLoss(), distill_type=distill, temperature=3.0)
    task = AugSubTask(task, "masking", 0.5)
    task.train()
    torch.manual_seed(3)
    task(x, LABELS)["loss"].backward()
    got = gradients(model)

    model.zero_grad()
    torch.manual_seed(3)
    (main, token), (sub, sub_token) = two_passes(task.augsub, lambda: model(x))
    with torch.no_grad():
        logits = teacher(task.teacher.normalize_input(x, task.student_mean, task.student_std))
    if distill == "soft":
        first, second = divergence(token, logits, 3.0), divergence(sub_token, logits, 3.0)
    else:
        first, second = (F.cross_entropy(each, logits.argmax(1)) for each in (token, sub_token))
    first = first + F.cross_entropy(main, LABELS)
    second = second + soft_cross_entropy(sub, main.detach().softmax(1))
    ((first + second) / 2).backward()
    assert_gradients(got, gradients(model))


def test_the_task_is_still_the_task():
    name = "vit_tiny_patch16_224"
    plain = ClassificationTask(build(name), nn.CrossEntropyLoss(), verbose=False)
    task = AugSubTask(plain, "masking", 0.5)
    assert task is plain and isinstance(task, ClassificationTask) and isinstance(task, AugSubTask)
    task.eval()
    assert set(task(images(name), LABELS)) == {"loss", "output"}, "the plain loss, as validation computes it"


def test_refusals():
    name = "vit_tiny_patch16_224"
    model = build(name)
    with pytest.raises(ValueError, match=r"criterion: timm.JsdCrossEntropy compares"):
        AugSubTask(ClassificationTask(model, JsdCrossEntropy(), verbose=False))
    task = AugSubTask(ClassificationTask(build(name), nn.CrossEntropyLoss(), verbose=False), "droppath")
    task.get_trainable_module().set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="activation checkpointing would recompute"):
        task(images(name), LABELS)
    task = AugSubTask(ClassificationTask(build(name), nn.CrossEntropyLoss(), verbose=False))
    task.get_trainable_module().eval()
    with pytest.raises(ValueError, match="is in eval mode"):
        task(images(name), LABELS)
    with pytest.raises(ValueError, match="task: trains with AugSub already"):
        AugSubTask(task)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_compiles_into_two_graphs_and_no_more(name):
    torch._dynamo.reset()
    counter = CompileCounter()
    task = AugSubTask(ClassificationTask(build(name), nn.CrossEntropyLoss(), verbose=False), "masking", 0.5)
    task.compile(backend=counter)
    for _ in range(3):
        task(images(name), LABELS)["loss"].backward()
    assert counter.frame_count == 2


@pytest.mark.parametrize("make", [ClassificationTask, FeatureDistillationTask])
def test_a_checkpoint_holds_the_plain_model_and_its_task_the_mask_token(make, tmp_path):
    name = "swin_tiny_patch4_window7_224"

    def create(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        student = build(name, seed)
        inner = make(student, *([teacher_of(name)] if make is FeatureDistillationTask else []), nn.CrossEntropyLoss())
        task = AugSubTask(inner, "masking", 0.5)
        optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=0.01, weight_decay=0.1)
        task.setup_ema(decay=0.5)
        return task, optimizer

    task, optimizer = create(0)
    token = task.augsub.installed.mask_token
    assert [group["weight_decay"] for group in optimizer.param_groups for p in group["params"] if p is token] == [0.0]
    task.train()
    for step in range(3):
        task(images(name), LABELS)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 2)
    CheckpointSaver(task.get_trainable_module(), optimizer, task=task)._save(tmp_path / "last.pth.tar", epoch=1)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    for key in ("state_dict", "state_dict_ema"):
        build(name, 1).load_state_dict(saved[key])  # strict
    assert torch.equal(saved["task_state"]["mask_token"], token)
    assert not torch.equal(saved["task_state_ema"]["mask_token"], token)

    resumed, its_optimizer = create(2)
    assert resume_task_checkpoint(resumed, tmp_path / "last.pth.tar", its_optimizer) == 2
    load_task_ema_checkpoint(resumed, tmp_path / "last.pth.tar")
    for each in (task, resumed):
        torch.manual_seed(4)
        each.train()
        each(images(name), LABELS)["loss"].backward()
    assert_gradients(gradients(resumed.get_trainable_module()), gradients(task.get_trainable_module()))
    torch.testing.assert_close(resumed.get_checkpoint_state(ema=True), task.get_checkpoint_state(ema=True))


def test_a_checkpoint_of_plain_training_is_taken():
    name = "swin_tiny_patch4_window7_224"
    plain = ClassificationTask(build(name, 1), nn.CrossEntropyLoss(), verbose=False)
    task = AugSubTask(ClassificationTask(build(name), nn.CrossEntropyLoss(), verbose=False))
    token = task.augsub.installed.mask_token.clone()
    task.load_checkpoint_state(plain.get_checkpoint_state()["state_dict"])
    torch.testing.assert_close(task.get_checkpoint_state()["state_dict"], plain.get_checkpoint_state()["state_dict"])
    assert torch.equal(task.augsub.installed.mask_token, token)


def test_remove_leaves_nothing():
    name = "swin_tiny_patch4_window7_224"
    task = AugSubTask(ClassificationTask(build(name), nn.CrossEntropyLoss(), verbose=False))
    task.augsub.remove()
    model = task.get_trainable_module()
    assert "mask_token" not in model.no_weight_decay() and "no_weight_decay" not in vars(model)


def ddp_steps(rank: int, world: int, folder: Path) -> None:
    """Gradients of a step of two processes, and how often they were reduced → a file of the first.

    Accumulated, or with a static graph, which torch does not let accumulate in its first step.
    """
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    name = "swin_tiny_patch4_window7_224"
    x, y = images(name)[3 * rank :][:3], LABELS[3 * rank :][:3]
    results = {}
    for static, parts in ((False, [1, 2]), (True, [3])):
        task = AugSubTask(ClassificationTask(build(name), BinaryCrossEntropy(0.1), verbose=False), "masking", 0.5)
        task.prepare_distributed(bucket_cap_mb=1000, static_graph=static)
        reduced: list[int] = []
        task.get_trainable_module().register_comm_hook(reduced, count_reductions)
        task.train()
        torch.manual_seed(rank)
        for x_part, y_part in zip(x.split(parts), y.split(parts)):
            last = len(y_part) == parts[-1]
            with nullcontext() if last else task.no_sync():
                (task(x_part, y_part)["loss"] * len(y_part) / 3).backward()
        results[static] = gradients(task.get_trainable_module().module), reduced
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def test_two_processes_equal_the_equation(tmp_path):
    mp.spawn(ddp_steps, args=(2, tmp_path), nprocs=2)
    results = torch.load(tmp_path / "results.pt")
    name = "swin_tiny_patch4_window7_224"
    for static, parts in ((False, [1, 2]), (True, [3])):
        model = build(name)
        augsub = AugSub(model, "masking", 0.5)
        for rank in range(2):
            torch.manual_seed(rank)
            for x, y in zip(images(name)[3 * rank :][:3].split(parts), LABELS[3 * rank :][:3].split(parts)):
                main, sub = two_passes(augsub, lambda x=x, model=model: model(x))
                first = BinaryCrossEntropy(0.1)(main, y)
                second = F.binary_cross_entropy_with_logits(sub, main.detach().sigmoid())
                ((first + second) / 2 * len(y) / 6).backward()
        got, reduced = results[static]
        assert_gradients(got, gradients(model))
        assert reduced == [0]
