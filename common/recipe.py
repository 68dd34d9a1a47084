"""Recipe: values that differ from the common defaults, and methods to override.

`common/` knows no recipe by name: what differs between the four is in a subclass of `Recipe`. Methods import PyTorch
inside, so that `--help` and a misspelled flag answer without it.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from common.flag_types import EMBEDDED, KEYED_DATA_SETS
from common.train_args import TrainArgs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from common.augsub import AugSub
    from common.cosub import CoSub
    from common.optim import SetLR

Settings = Mapping[str, Any]
Args = TypeVar("Args", bound=TrainArgs)


def check_fast_input() -> None:
    """Refuse `--input fast` where its decoder is not installed.

    Raises:
        ValueError: simplejpeg is missing.
    """
    if importlib.util.find_spec("simplejpeg") is None:
        raise ValueError("--input fast: simplejpeg is missing; pip install simplejpeg")


class Recipe(Generic[Args]):
    """One published training recipe, as a delta over the defaults in `common.args`.

    Attributes:
        args_class: `TrainArgs`, or a subclass with the flags that only this recipe has.
        name: folder of the recipe.
        about: one line for `--help`.
        defaults: settings that differ from the common defaults.
        variants: rows of the paper's tables, as settings over `defaults`.
        digits: settings for the embedded digits, used without a data path and a variant.
        model_settings: settings besides `model` that say which model it is.
        settings_of_config: settings that take another value where the model comes from a config.json.
        classes: of the head, where neither a flag nor the data set says; None asks for the flag.
        new_head_std: standard deviation of a classifier that `--finetune` leaves new; None keeps the model's own.
        from_pretrained_cfg: settings that timm's pretrained_cfg of the model decides, where nothing else sets them.
        curve_steps: points of an epoch on TensorBoard's axis; None counts optimizer steps.
        writes_summary: whether summary.csv is kept beside log.txt.
    """

    args_class: type[Args]
    name: str
    about: str
    defaults: Settings = MappingProxyType({})
    variants: Mapping[str, Settings] = MappingProxyType({})
    digits: Settings = MappingProxyType({})
    model_settings: Collection[str] = ()
    settings_of_config: Settings = MappingProxyType({})
    classes: int | None = None
    new_head_std: float | None = None
    from_pretrained_cfg: Sequence[str] = ("mean", "std", "interpolation")
    curve_steps: int | None = None
    writes_summary: bool = False

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags that only this recipe has."""

    def read_config(self, args: Args) -> Settings:
        """Return settings that this recipe's flags stand for, such as those in a configuration file.

        Raises:
            ValueError: a file is missing or wrong.
        """
        return {}

    def finalize_args(self, args: Args) -> None:
        """Fill in settings that follow from others, then check settings against each other.

        Raises:
            ValueError: settings that do not go together.
        """
        self.fill_args(args)
        self.check_args(args)

    def fill_args(self, args: Args) -> None:
        """Fill in settings that follow from others."""

    def check_args(self, args: Args) -> None:
        """Check settings against each other; the types of flags have checked each alone.

        Raises:
            ValueError: settings that do not go together.
        """
        if args.data_set not in EMBEDDED and not args.data_path and not args.data_set.startswith("hf"):
            raise ValueError(f"--data-set {args.data_set}: needs --data-path, the folder that holds it")
        if (args.input_key or args.target_key) and not args.data_set.lower().startswith(KEYED_DATA_SETS):
            flag = "--input-key" if args.input_key else "--target-key"
            raise ValueError(f"{flag}: --data-set {args.data_set} has no columns; remove the flag")
        if args.input == "fast":
            check_fast_input()
        if args.lr_noise is not None and len(args.lr_noise) > 2:
            raise ValueError(f"--lr-noise: {len(args.lr_noise)} values; give one or two, start [end]")
        betas = 3 if "adan" in args.opt else 2
        if args.opt_betas and len(args.opt_betas) != betas:
            raise ValueError(f"--opt-betas {' '.join(map(str, args.opt_betas))}: --opt {args.opt} takes {betas} values")
        for flag, (least, most) in (("--scale", args.scale), ("--ratio", args.ratio)):
            if least > most:
                raise ValueError(f"{flag} {least} {most}: expected 0 < min <= max")
        if args.cutmix_minmax is not None:
            least, most = (int(share * args.input_size) for share in args.cutmix_minmax)
            if least >= most:
                raise ValueError(
                    f"--cutmix-minmax {' '.join(map(str, args.cutmix_minmax))}: expected min < max by a pixel or more, "
                    "such as 0.2 0.8"
                )
        if args.mixup_active and args.batch_size % 2:
            raise ValueError(f"--batch-size {args.batch_size}: odd, but mixup needs pairs of images; use an even one")

    def pretrained_cfg(self, args: Args) -> Settings:
        """Return timm's pretrained_cfg of `args.model`; empty for a model that timm has none of, as the published ones.

        Raises:
            ValueError: the name has a tag that timm does not know.
        """
        import timm

        try:
            cfg = timm.get_pretrained_cfg(args.model)
        except RuntimeError as error:
            raise ValueError(f"--model {args.model}: {error}") from error
        return {} if cfg is None else cfg.to_dict()

    def create_model(self, args: Args, classes: int) -> nn.Module:
        """Build the model `args.model`."""
        from common.models import create_timm_model

        return create_timm_model(args, classes)

    def create_augsub(self, model: nn.Module, args: Args) -> AugSub | CoSub:
        """Prepare the model for the drop of its sub-model."""
        from common.augsub import AugSub

        return AugSub(model, args.augsub, args.augsub_ratio, block=args.augsub_block, batch_norm=args.augsub_bn)

    def hub_architecture(self, args: Args) -> tuple[str, dict[str, Any]] | None:
        """Return the name in timm of a model that the recipe builds itself, and the arguments that give its shape.

        None where the model is one of timm's, which knows both.
        """
        return None

    def adapt_weights(self, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Turn a state dict with upstream's names and shapes into one with the model's."""
        return state

    def initial_weights_limit(self, args: Args) -> float:
        """Return the share of the initial weights in their average after training above which a run warns."""
        return 0.05

    def scale_lr(self, args: Args, global_batch: int) -> Args:
        """Return the arguments with learning rates for this batch; by default `--lr` is for 512 images a step."""
        assert args.lr is not None
        return args.replace(lr=args.lr * global_batch / 512)

    def param_groups(self, model: nn.Module, args: Args) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups."""
        from common.optim import weight_decay_groups

        return weight_decay_groups(model, args.weight_decay)

    def schedule(self, optimizer: torch.optim.Optimizer, args: Args, updates_per_epoch: float) -> SetLR:
        """Return the function that sets the learning rates for an update, counted from 0.

        Args:
            updates_per_epoch: batches / micro-batches, which may not divide.
        """
        from common.optim import epoch_schedule

        return epoch_schedule(optimizer, args, updates_per_epoch)

    def loss(self, args: Args, mixed: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the main model's loss, mean over the batch; `mixed` labels are probabilities."""
        from common.optim import classification_loss

        return classification_loss(mixed, args.smoothing, args.bce_loss, args.bce_target_thresh)
