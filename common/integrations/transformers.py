"""AugSub in transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import unwrap_peft_model

from ..augsub import AugSub, Criterion


class AugSubTrainer(Trainer):
    """A Trainer whose training loss is the mean of the main model's and the sub-model's.

    Gradient accumulation and several processes give the gradient of the joined batch, whether or not the model's
    `forward` takes `num_items_in_batch`. Evaluation is the Trainer's own.

        trainer = AugSubTrainer(model=model, args=args, train_dataset=data, augsub=AugSub(model, "masking", 0.5))

    Checkpoints hold AugSub's mask token, if the model has gained one, so that training resumes with it; after
    `augsub.remove()` `save_model` writes the plain model.

    Args:
        augsub: made from the same model, before the trainer.
        criterion: logits and labels → loss, mean over the batch. By default that of the model's `problem_type`, or of
            the labels where it is None, for classes named …ForImageClassification, with `label_smoothing_factor`.
        args, kwargs: of Trainer. Neither `model_init` nor `compute_loss_func`.

    Raises:
        ValueError: names the argument that does not go with AugSub.
    """

    augsub: AugSub

    def __init__(self, *args: Any, augsub: AugSub, criterion: Criterion | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.augsub, self.criterion = augsub, criterion
        if self.model_init is not None:
            raise ValueError("model_init: AugSub is made from one model; pass model=")
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: takes the model's output; pass criterion=, a function of the logits")
        if self.args.n_gpu > 1:
            raise ValueError("AugSubTrainer: does not work with DataParallel; start one process per GPU with torchrun")
        if criterion is None and getattr(self.classifier, "loss_type", None) != "ForImageClassification":
            name = type(self.classifier).__name__
            raise ValueError(f"criterion: {name} computes its loss itself; pass criterion=, a function of the logits")
        # The Trainer counts the labels of an accumulated batch only for models that take the count, and divides by the
        # number of micro-batches otherwise. Here `compute_loss` weighs each micro-batch by its labels for any model.
        self.model_accepts_loss_kwargs = True

    @property
    def classifier(self) -> nn.Module:
        """The model with the head, without wrappers such as PEFT's."""
        return unwrap_peft_model(self.accelerator.unwrap_model(self.model))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch as its part of the accumulated batch's, and the outputs if asked for.

        Args:
            num_items_in_batch: labels of the accumulated batch that are not -100, over all processes where the
                Trainer averages over them.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        if "labels" not in inputs:
            raise ValueError(f"labels: the batch has none but {', '.join(inputs)}; have the data collator name them so")
        labels = inputs["labels"]
        images = {name: value for name, value in inputs.items() if name != "labels"}
        criterion = self.criterion
        if criterion is None:
            criterion, labels = self.choose_criterion(labels)
        step = self.augsub.step(model, images, labels, criterion)
        loss = step.loss
        if num_items_in_batch is not None:
            loss = loss * (labels.ne(-100).sum() / num_items_in_batch)
            if self.args.average_tokens_across_devices:  # DDP divides by the number of processes
                loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss, "logits": step.logits}) if return_outputs else loss

    def choose_criterion(self, labels: Tensor) -> tuple[Criterion, Tensor]:
        """Return the criterion that the model itself would take for these labels, and the labels in its shape."""
        config: Any = self.classifier.config
        problem = config.problem_type
        if problem is None and config.num_labels == 1:
            problem = "regression"
        elif problem is None:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if problem == "regression":
            return nn.MSELoss(), labels.reshape(-1, config.num_labels)
        if problem == "multi_label_classification":
            return nn.BCEWithLogitsLoss(), labels
        return nn.CrossEntropyLoss(label_smoothing=self.args.label_smoothing_factor), labels.view(-1)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that decay, without the mask token."""
        added = self.augsub.no_weight_decay()
        return [name for name in super().get_decay_parameter_names(model) if name not in added]
