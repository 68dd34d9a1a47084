"""AugSub in transformers' Trainer: gradients against the equation on the joined batch, checkpoints, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from common.augsub import AugSub
from tests.equation import assert_gradients, free_port, gradients, set_rank, two_passes

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install augsub[transformers]"
)
from transformers import TrainerCallback, TrainingArguments  # noqa: E402

from common.integrations.transformers import AugSubTrainer  # noqa: E402

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTConfig", {"image_size": 64, "patch_size": 8, **SIZES}),
    "Dinov2": ("Dinov2Config", {"image_size": 64, "patch_size": 8, **SIZES}),
    "Swin": ("SwinConfig", {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 8}),
    "ResNet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
    "TimmWrapper": ("TimmWrapperConfig", {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    }),
}  # fmt: skip
DROPS = {"ViT": "token drop", "Dinov2": "token drop", "Swin": "mask token", "ResNet": "pixel blocks",
         "TimmWrapper": "token drop"}  # fmt: skip
IGNORED = -100


def build(name: str, **settings: Any) -> Any:
    config, sizes = CONFIGS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{"num_labels": 5} | sizes | settings)
    return getattr(transformers, f"{name}ForImageClassification")(made)


def dataset(count: int, labels: Any = None) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    labels = [IGNORED if i == 1 else i % 5 for i in range(count)] if labels is None else labels
    return [{"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": labels[i]} for i in range(count)]


class Recorder(TrainerCallback):
    """Seeds each step, and keeps the gradients of the last."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(5 + args.process_index)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        module = getattr(model, "module", model)
        self.gradients = gradients(module)


class RecordedTrainer(AugSubTrainer):
    """Takes the images in order, and keeps the batches that it computed."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.batches = [*getattr(self, "batches", []), dict(inputs)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(folder: Path, model: Any, data: Any, kind: str = "masking", **settings: Any) -> tuple[RecordedTrainer, Any]:
    """One epoch → the trainer, and the gradients of its last step."""
    augsub, recorder = AugSub(model, kind, 0.5), Recorder()
    options = {"per_device_train_batch_size": 3, "num_train_epochs": 1, "max_grad_norm": 0.0, "report_to": "none"}
    options |= {"use_cpu": True, "save_strategy": "no", "dataloader_num_workers": 0, "disable_tqdm": True}
    args = TrainingArguments(str(folder / "output"), **options | settings)
    trainer = RecordedTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, augsub=augsub, callbacks=[recorder]
    )
    trainer.train()
    return trainer, recorder.gradients


def expected_gradients(
    model: Any, kind: str, shares: list[list[dict[str, Tensor]]], smoothing: float = 0.0
) -> dict[str, Tensor]:
    """The equation on the joined batch in one graph; `shares` are the micro-batches of each process."""
    augsub = AugSub(model.train(), kind, 0.5)
    total = sum(int((batch["labels"] != IGNORED).sum()) for share in shares for batch in share)
    losses = []
    for rank, share in enumerate(shares):
        torch.manual_seed(5 + rank)
        for batch in share:
            x, y = batch["pixel_values"], batch["labels"]
            main, sub = two_passes(augsub, lambda x=x: model(pixel_values=x).logits)
            counts = y != IGNORED
            first = F.cross_entropy(main, y, reduction="sum", label_smoothing=smoothing)
            second = -(main.detach().softmax(1) * sub.log_softmax(1)).sum(1)[counts].sum()
            losses.append((first + second) / 2 / total)
    torch.stack(losses).sum().backward()
    return gradients(model)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_those_of_the_joined_batch(name, accumulate, tmp_path):
    """8 images in micro-batches of 3, 3 and 2, one of which is ignored: a mean of their means is another gradient."""
    data = dataset(8 if accumulate == 3 else 3)
    trainer, got = train(tmp_path, build(name), data, gradient_accumulation_steps=accumulate)
    assert [len(batch["labels"]) for batch in trainer.batches] == [3, 3, 2][:accumulate]
    assert trainer.augsub.drop.startswith(DROPS[name])
    assert_gradients(got, expected_gradients(build(name), "masking", [trainer.batches]))


def test_a_model_in_peft(tmp_path):
    """The adapters and the classifier train, by the classifier's own criterion."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["classifier"], init_lora_weights=False)
    models = []
    for _ in range(2):
        base = build("ViT")
        models.append(peft.get_peft_model(base, settings))
    trainer, got = train(tmp_path, models[0], dataset(3))
    assert trainer.augsub.drop.startswith("token drop") and any("lora" in name for name in got)
    assert_gradients(got, expected_gradients(models[1], "masking", [trainer.batches]))


def test_label_smoothing_is_for_labels_alone(tmp_path):
    data = dataset(3, [0, 1, 2])
    trainer, got = train(tmp_path, build("ViT"), data, label_smoothing_factor=0.2)
    assert_gradients(got, expected_gradients(build("ViT"), "masking", [trainer.batches], smoothing=0.2))


@pytest.mark.parametrize(("settings", "labels", "main_loss", "sub_loss"), [
    ({}, torch.rand(3, 5).round(), F.binary_cross_entropy_with_logits,
     lambda sub, main: F.binary_cross_entropy_with_logits(sub, main.sigmoid())),
    ({"num_labels": 1}, torch.rand(3), lambda z, y: ((z[:, 0] - y) ** 2).mean(), F.mse_loss),
])  # fmt: skip
def test_the_criterion_is_the_one_of_the_model(settings, labels, main_loss, sub_loss, tmp_path):
    model, twin = build("ViT", **settings), build("ViT", **settings).train()
    trainer, got = train(tmp_path, model, dataset(3, list(labels)))
    augsub = AugSub(twin, "masking", 0.5)
    x = trainer.batches[0]["pixel_values"]
    torch.manual_seed(5)
    main, sub = two_passes(augsub, lambda: twin(pixel_values=x).logits)
    torch.testing.assert_close(main_loss(main, labels), twin(pixel_values=x, labels=labels).loss)
    ((main_loss(main, labels) + sub_loss(sub, main.detach())) / 2).backward()
    assert_gradients(got, gradients(twin))


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_evaluation_is_the_plain_one(name, tmp_path):
    data = dataset(8, [i % 5 for i in range(8)])
    trainer, _ = train(tmp_path, build(name), data)
    x = torch.stack([row["pixel_values"] for row in data])
    with torch.no_grad():
        logits = trainer.model.eval()(pixel_values=x).logits
    loss = trainer.evaluate()["eval_loss"]
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(8) % 5).item())


def test_a_run_resumes_with_its_mask_token(tmp_path):
    """And the token does not decay. Of transformers' own Swin the Trainer of 5.24 restores few weights, AugSub or not."""
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 8}
    settings = {"architecture": "swin_tiny_patch4_window7_224", "model_args": sizes}
    data = dataset(6)
    model = build("TimmWrapper", **settings)
    whole, expected = train(tmp_path, model, data, save_strategy="steps", save_steps=1, weight_decay=0.1)
    token = whole.augsub.installed.mask_token
    assert [g["weight_decay"] for g in whole.optimizer.param_groups for p in g["params"] if p is token] == [0.0]
    model, recorder = build("TimmWrapper", **settings), Recorder()
    augsub = AugSub(model)
    trainer = RecordedTrainer(model=model, args=whole.args, train_dataset=data, augsub=augsub, callbacks=[recorder])
    trainer.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-1"))
    assert len(trainer.batches) == 1
    assert_gradients(recorder.gradients, expected)
    assert torch.equal(trainer.augsub.installed.mask_token, token)


def test_the_plain_model_is_saved_after_remove(tmp_path):
    trainer, _ = train(tmp_path, build("Swin"), dataset(3))
    trainer.augsub.remove()
    trainer.save_model(str(tmp_path / "plain"))
    loaded, report = transformers.SwinForImageClassification.from_pretrained(
        tmp_path / "plain", output_loading_info=True
    )
    assert not any(report.values()), report
    torch.testing.assert_close(loaded.state_dict(), trainer.model.state_dict())


def test_refusals(tmp_path):
    model, args = build("ViT"), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    augsub = AugSub(model)
    with pytest.raises(ValueError, match="compute_loss_func: takes the model's output; pass criterion="):
        AugSubTrainer(model=model, args=args, augsub=augsub, compute_loss_func=lambda *_, **__: None)
    with pytest.raises(ValueError, match="model_init: AugSub is made from one model"):
        AugSubTrainer(model_init=lambda: build("ViT"), args=args, augsub=augsub)
    segmenter = transformers.BeitForSemanticSegmentation(
        transformers.BeitConfig(image_size=64, out_indices=[1, 2, 3, 4], **SIZES | {"num_hidden_layers": 4})
    )
    with pytest.raises(ValueError, match="criterion: BeitForSemanticSegmentation computes its loss itself"):
        AugSubTrainer(model=segmenter, args=args, augsub=AugSub(segmenter))
    AugSubTrainer(model=segmenter, args=args, augsub=AugSub(segmenter), criterion=nn.CrossEntropyLoss())


def train_of_two(rank: int, port: int, folder: Path, names: list[str]) -> None:
    """Batches and gradients of a process → a file of each."""
    set_rank(rank, 2, port)
    results = {}
    for name in names:
        trainer, gradients = train(folder, build(name), dataset(12), gradient_accumulation_steps=2)
        assert trainer.args.world_size == 2
        results[name] = trainer.batches, gradients
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_the_equation(tmp_path):
    """Each accumulates two micro-batches, of which one has an ignored image."""
    names = ["ViT", "Swin", "Dinov2"]
    mp.spawn(train_of_two, args=(free_port(), tmp_path, names), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for name in names:
        expected = expected_gradients(build(name), "masking", [result[name][0] for result in results])
        for result in results:
            assert_gradients(result[name][1], expected)
