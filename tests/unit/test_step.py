"""A step as others' trainers take it: inputs and outputs of any form, one backward, and the model given back."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from common.augsub import AugSub, StepResult
from common.criteria import logits_of
from common.drops import InstalledDrop
from tests.commands import environment

SMALL: dict[str, dict[str, Any]] = {
    "deit3_small_patch16_224": {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32,
                                     "window_size": 4, "drop_path_rate": 0.0},
    "resnet18": {"layers": (1, 1, 1, 1), "drop_path_rate": 0.0},
}  # fmt: skip
LABELS = torch.tensor([0, 1, 2, 4])


def small(name: str = "deit3_small_patch16_224") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **SMALL[name])


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make(model: nn.Module, kind: str = "masking", **kwargs: Any) -> AugSub:
    """With blocks of which these small images have several, and the same mask token each time."""
    torch.manual_seed(2)
    return AugSub(model, kind, block=8, **kwargs)


def two_backwards(augsub: AugSub, called: nn.Module, x: Any) -> list[float]:
    torch.manual_seed(3)
    values = []
    for loss in augsub.losses(called, x, LABELS, F.cross_entropy):
        loss.backward()
        values.append(loss.item() / augsub.weight)
    return values


@pytest.mark.parametrize("kind", ["masking", "droppath", "none"])
@pytest.mark.parametrize("name", SMALL)
def test_step_is_losses_with_one_backward(name, kind):
    model = small(name)
    twin = copy.deepcopy(model)
    expected = two_backwards(make(model, kind), model, images())
    augsub = make(twin, kind)
    torch.manual_seed(3)
    result = augsub.step(twin, images(), LABELS, F.cross_entropy)
    result.loss.backward()
    assert isinstance(result, StepResult)
    losses = [result.main_loss] if result.sub_loss is None else [result.main_loss, result.sub_loss]
    assert [loss.item() for loss in losses] == pytest.approx(expected)
    assert result.loss.item() == pytest.approx(sum(expected) / len(expected))
    assert not any(tensor.requires_grad for tensor in (*losses, result.logits))
    torch.testing.assert_close(F.cross_entropy(result.logits, LABELS), result.main_loss)
    for parameter, gradient in gradients(twin).items():
        torch.testing.assert_close(gradient, gradients(model)[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


class Wrapper(nn.Module):
    """Takes its images by keyword or position, and gives its logits in one of the forms of other libraries."""

    def __init__(self, form: Any = None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
        self.form = form

    def forward(self, pixel_values: Tensor, scale: float = 1.0) -> Any:
        logits = scale * self.body(pixel_values)
        return self.form(logits) if self.form else logits


def image_classifier_output(logits: Tensor) -> Any:
    modeling_outputs = pytest.importorskip("transformers.modeling_outputs")
    return modeling_outputs.ImageClassifierOutput(logits=logits, hidden_states=(logits[:, :2], logits))


def inception_outputs(logits: Tensor) -> Any:
    inception = pytest.importorskip("torchvision.models.inception")
    return inception.InceptionOutputs(logits, logits[:2])


FORMS = {
    "transformers": image_classifier_output,
    "torchvision's Inception": inception_outputs,
    "torchvision's segmentation": lambda z: OrderedDict(out=z),
    "mapping": lambda z: {"loss": z.sum(), "logits": z},
    "tuple of one": lambda z: (z,),
    "tuple of one and None": lambda z: [None, z],
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in_what_a_model_returns(form):
    model, twin = Wrapper(FORMS[form]), Wrapper()
    two_backwards(make(model), model, images())
    two_backwards(make(twin), twin, images())
    for name, gradient in gradients(twin).items():
        assert torch.equal(gradients(model)[name], gradient), name


@pytest.mark.parametrize(("output", "parts"), [
    ((torch.ones(2, 5), torch.ones(2, 5)), "a tuple with 2 tensors"),
    ({"out": torch.ones(2, 5), "aux": torch.ones(2, 5)}, "a dict with out, aux"),
    (None, "a NoneType with 0 tensors"),
])  # fmt: skip
def test_other_outputs_are_refused(output, parts):
    with pytest.raises(ValueError, match=f"logits: the model returns {parts}; pass logits="):
        logits_of(output)


def test_a_function_gives_the_logits_of_any_other_output():
    model, twin = Wrapper(lambda z: (z[:, :2], z)), Wrapper()
    two_backwards(make(model, logits=lambda output: output[1]), model, images())
    two_backwards(make(twin), twin, images())
    assert torch.equal(gradients(model)["body.3.weight"], gradients(twin)["body.3.weight"])


class Dropped(Wrapper):
    """With dropout that AugSub finds by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(3, nn.ModuleDict())
        self.body[3] = nn.Sequential(OrderedDict(proj_drop=nn.Dropout(0.0)))


@pytest.mark.parametrize("x", [(images(), 2.0), {"pixel_values": images(), "scale": 2.0}], ids=["tuple", "mapping"])
def test_several_inputs_come_as_a_tuple_or_by_keyword(x):
    model, twin = Dropped(), Dropped()
    two_backwards(make(model, "dropout"), model, x)
    augsub = make(twin, "dropout")
    torch.manual_seed(3)
    logits = twin(images(), scale=2.0)
    target = logits.detach().softmax(1)
    with augsub.sub_model():
        sub_logits = twin(images(), scale=2.0)
    (0.5 * F.cross_entropy(logits, LABELS) + 0.5 * F.cross_entropy(sub_logits, target)).backward()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("given", [True, False])
def test_no_sync_is_the_callers_or_the_models(given):
    """Around forward and backward of the main pass alone; with sync=False around both."""
    log: list[str] = []

    @contextmanager
    def no_sync():
        log.append("enter")
        yield
        log.append("exit")

    model = Wrapper()
    augsub = make(model)
    model.register_forward_hook(lambda *_: log.append("forward"))
    kwargs = {"no_sync": no_sync} if given else {}
    if not given:
        object.__setattr__(model, "no_sync", no_sync)
    main, sub = ["enter", "forward", "backward", "exit"], ["forward", "backward"]
    for sync, expected in ((True, main + sub), (False, [*main, "enter", *sub, "exit"])):
        log.clear()
        for loss in augsub.losses(model, images(), LABELS, F.cross_entropy, sync=sync, **kwargs):
            loss.backward()
            log.append("backward")
        assert log == expected


def describe(model: nn.Module) -> list[Any]:
    """Everything that a drop may change: modules with their order, attributes, hooks, parameters."""
    modules = sorted(
        (name, str(type(m)), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), m.extra_repr())
        for name, m in model.named_modules()
    )
    return [modules, {name: type(value) for name, value in vars(model).items()}, list(model.state_dict())]


@pytest.mark.parametrize("kind", ["masking", "dropout", "droppath"])
@pytest.mark.parametrize("name", SMALL)
def test_remove_gives_the_model_back(name, kind):
    model = small(name)
    if kind == "dropout" and name == "resnet18":
        pytest.skip("ResNet has no place for it")
    before, plain = describe(model), copy.deepcopy(model)
    augsub = make(model, kind)
    two_backwards(augsub, model, images())
    augsub.remove()
    assert describe(model) == before
    plain.load_state_dict(model.state_dict())  # batch statistics
    assert torch.equal(model(images()), plain(images()))
    with pytest.raises(ValueError, match="AugSub: was removed from its model, or replaced"):
        augsub.losses(model, images(), LABELS, F.cross_entropy)
    two_backwards(make(model, kind), model, images())


@pytest.mark.parametrize("wrap", [
    lambda m: m, torch.compile, nn.DataParallel, AveragedModel, ModelEmaV2, ModelEmaV3,
    lambda m: torch.compile(nn.DataParallel(m)),
])  # fmt: skip
def test_plain_state_dict_is_the_plain_models(wrap):
    model = small("swin_tiny_patch4_window7_224")
    names = list(model.state_dict())
    augsub = make(model)
    assert "mask_token" in model.state_dict()
    state = augsub.plain_state_dict(wrap(model))
    assert list(state) == names
    small("swin_tiny_patch4_window7_224").load_state_dict(state)


def test_plain_state_dict_keeps_other_mask_tokens_and_blocks_have_plain_names():
    model = small("swin_tiny_patch4_window7_224")
    model.layers[0].mask_token = nn.Parameter(torch.zeros(1))  # BEiT's, SimMIM's
    names = list(model.state_dict())
    augsub = make(model)
    model.layers[0] = torch.compile(model.layers[0])
    outer = nn.Sequential(OrderedDict(net=model))
    assert sorted(augsub.plain_state_dict(outer)) == sorted(f"net.{name}" for name in names)
    assert augsub.no_weight_decay() == {"mask_token"}
    assert make(small()).no_weight_decay() == set()


LOAD = """
import sys, torch
sys.modules["common"] = sys.modules["augsub"] = None  # an import of either fails
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
assert not [name for name, module in sys.modules.items() if name.startswith("common.")]
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_pickled_model_loads_without_this_package(name, tmp_path: Path):
    """Saved while it trains, in the middle of a step too; the copy is the main model."""
    model = small(name)
    augsub = make(model)
    two_backwards(augsub, model, images())
    files = [tmp_path / file for file in ("model.pt", "images.pt", "output.pt")]
    torch.save(model, files[0])
    torch.save(images(), files[1])
    subprocess.run([sys.executable, "-c", LOAD, *map(str, files)], cwd=tmp_path, env=environment(), check=True)
    assert torch.equal(torch.load(files[2]), model(images()))


def test_a_copy_of_the_model_keeps_its_mask():
    model = small("swin_tiny_patch4_window7_224")
    augsub = make(model)
    twin, twins_augsub = copy.deepcopy((model, augsub))
    assert two_backwards(twins_augsub, twin, images()) == two_backwards(augsub, model, images())
    assert torch.equal(twin.mask_token.grad, model.mask_token.grad)


@pytest.mark.parametrize(("name", "drop"), zip(SMALL, ("token drop", "mask token", "pixel blocks")))
def test_it_says_what_was_chosen(name, drop):
    augsub = make(small(name))
    assert augsub.drop == drop
    assert str(augsub) == f"AugSub(masking, ratio=0.5, {drop})"


def test_a_note_of_the_drop_is_a_warning(monkeypatch):
    note = "pixel blocks: the sub pass costs as much as the main one; pass tokens="
    installed = InstalledDrop("pixel blocks", [], [], None, note)
    monkeypatch.setattr("common.augsub.install_drop", lambda *args, **kwargs: installed)
    with pytest.warns(UserWarning, match=note) as caught:
        make(nn.Linear(2, 2))
    assert caught[0].filename == __file__
    monkeypatch.undo()
    with warnings.catch_warnings(action="error"):
        make(small())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_mask_token_is_frozen_where_everything_is(frozen):
    model = small("swin_tiny_patch4_window7_224").requires_grad_(False)
    model.head.requires_grad_(not frozen)
    make(model)
    assert model.mask_token.requires_grad is not frozen


@pytest.mark.parametrize("name", SMALL)
def test_an_optimizer_that_evaluates_a_step_several_times_may_hold_its_drop(name):
    """L-BFGS with a line search: every evaluation at the same weights has the same loss, and others have others."""
    model = small(name)
    with torch.no_grad():  # branches that start at almost 0 would hide what is dropped
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    augsub = make(model)
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], 0.1, max_iter=4)
    held: list[float] = []

    def closure(step: int, log: list[float]) -> float:
        optimizer.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(step)
            losses = [loss.detach() for loss in backward(augsub, model)]
        log.append(torch.stack(losses).sum().item())
        return log[-1]

    def backward(augsub: AugSub, model: nn.Module) -> Iterator[Tensor]:
        for loss in augsub.losses(model, images(), LABELS, F.cross_entropy):
            loss.backward()
            yield loss

    assert closure(0, held) == closure(0, held) != closure(1, held)
    before = torch.get_rng_state()
    optimizer.step(lambda: closure(0, held))
    assert torch.equal(torch.get_rng_state(), before)
    assert closure(0, held) < held[0]


def test_plain_state_dict_knows_the_token_by_its_name_too():
    """Where loading with assign=True has put another parameter in its place, and in an average of a wrapper."""
    model = small("swin_tiny_patch4_window7_224")
    names = set(model.state_dict())
    augsub = AugSub(model, "masking", 0.5)
    outer = nn.ModuleDict({"net": model})
    average = AveragedModel(outer)
    assert set(augsub.plain_state_dict(average)) == {f"net.{name}" for name in names}
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert set(augsub.plain_state_dict(model)) == names and augsub.no_weight_decay() == {"mask_token"}
