"""Drops on models of transformers and torchvision, in wrappers and written by hand: where they act, and the gradients."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import DropPath
from torch import nn

from common.augsub import AugSub
from common.drops import install_drop

transformers = pytest.importorskip("transformers")

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SQUARE = {"image_size": 32, "patch_size": 8, "num_labels": 5}  # 16 patches
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


@cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "torchvision VisionTransformer":
        model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
        nn.init.normal_(model.heads.head.weight)  # zero from the start
        return model
    if name.startswith("torchvision Swin"):
        make = torchvision.models.swin_transformer
        v2 = {"block": make.SwinTransformerBlockV2, "downsample_layer": make.PatchMergingV2}
        return make.SwinTransformer(
            [2, 2], 8, [2, 2], [1, 2], [4, 4], num_classes=5, **(v2 if name.endswith("V2") else {})
        )
    if name == "Siglip" or name == "CLIP":
        vision = VIT | {"image_size": 32, "patch_size": 8}
        config = getattr(transformers, f"{name}Config")(vision_config=vision, num_labels=5)
        return getattr(transformers, f"{name}ForImageClassification")(config)
    if name == "BEiT with relative positions":
        return transformers.BeitForImageClassification(
            transformers.BeitConfig(**VIT, **SQUARE, use_relative_position_bias=True)
        )
    if name == "AST":
        config = transformers.ASTConfig(**VIT, patch_size=8, frequency_stride=8, time_stride=8, max_length=32,
                                        num_mel_bins=16, num_labels=5)  # fmt: skip
        return transformers.ASTForAudioClassification(config)
    if name in ("Vivit", "VideoMAE"):
        tube = {"tubelet_size": [2, 8, 8]} if name == "Vivit" else {"patch_size": 8}
        config = getattr(transformers, f"{name}Config")(**VIT, image_size=32, num_frames=4, num_labels=5, **tube)
        return getattr(transformers, f"{name}ForVideoClassification")(config)
    settings = SWIN | {"num_labels": 5} if "Swin" in name else VIT | SQUARE
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def build(name: str) -> Any:
    return copy.deepcopy(built(name)).train()


def logits_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = model(x)
    return getattr(output, "logits", output)


TOKENS = {
    "ViT": ("vit.embeddings", 1),
    "DeiT": ("deit.embeddings", 2),
    "Dinov2": ("dinov2.embeddings", 1),
    "Dinov2WithRegisters": ("dinov2_with_registers.embeddings", 5),
    "Beit": ("beit.embeddings", 1),
    "Data2VecVision": ("data2vec_vision.embeddings", 1),
    "ViTMSN": ("vit.embeddings", 1),
    "IJepa": ("ijepa.embeddings", 0),
    "Siglip": ("vision_model.embeddings", 0),
    "CLIP": ("vision_model.embeddings", 1),
    "torchvision VisionTransformer": ("encoder.dropout", 1),
    "AST": ("audio_spectrogram_transformer.embeddings", 2),
    "Vivit": ("vivit.embeddings", 1),
    "VideoMAE": ("videomae.embeddings", 0),
}
INPUTS = {"AST": (3, 32, 16), "Vivit": (3, 4, 3, 32, 32), "VideoMAE": (3, 4, 3, 32, 32)}


def equation(model: nn.Module, kind_hook: Any, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of 1/2 l(f(x), y) + 1/2 l(f_p(x), softmax(f(x))) in one graph, with f_p by a hook of the test's own."""
    main = logits_of(model, x)
    module, hook = kind_hook
    handle = module.register_forward_hook(hook)
    sub = logits_of(model, x)
    handle.remove()
    loss = 0.5 * F.cross_entropy(main, y) + 0.5 * F.cross_entropy(sub, main.detach().softmax(1))
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_gradients(augsub: AugSub, model: nn.Module, x: Any, y: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in augsub.losses(model, x, y, nn.CrossEntropyLoss()):
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def keep_tokens(prefix: int, ratio: float):
    def hook(module, inputs, output):
        if isinstance(output, tuple):
            return (hook(module, inputs, output[0]), *output[1:])
        patches = output[:, prefix:]
        kept = torch.randn(patches.shape[:2]).argsort(dim=-1)[:, : int(patches.shape[1] * (1 - ratio))]
        chosen = torch.stack([image[indices] for image, indices in zip(patches, kept)])
        return torch.cat((output[:, :prefix], chosen), dim=1)

    return hook


@pytest.mark.parametrize("name", TOKENS)
def test_token_drop_is_the_equation(name):
    model, (place, prefix) = build(name), TOKENS[name]
    for module in model.modules():  # the main model's own, so that the same numbers are drawn in both
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    x, y = torch.randn(INPUTS.get(name, (3, 3, 32, 32))), torch.tensor([0, 3, 1])
    torch.manual_seed(5)
    expected = equation(model, (model.get_submodule(place), keep_tokens(prefix, 0.75)), x, y)
    with warnings.catch_warnings(action="error"):
        augsub = AugSub(model, "masking", 0.75)
    assert augsub.drop == "token drop"
    torch.manual_seed(5)
    got = step_gradients(augsub, model, x, y)
    assert got.keys() == expected.keys()
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, expected[parameter], msg=parameter)
    state = list(model.state_dict())
    augsub.remove()
    assert not any(module._forward_hooks for module in model.modules()) and list(model.state_dict()) == state


@pytest.mark.parametrize("name", ["Swin", "Swinv2", "torchvision Swin", "torchvision SwinV2"])
def test_mask_token_is_the_equation(name):
    """16 x 16 patches in 4 blocks of 8 x 8, of which 2 are one vector after the embedding's norm."""
    model = build(name)
    for module in model.modules():
        for rate in ("drop_prob", "p"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 1])
    before = set(model.state_dict())
    augsub = AugSub(model, "masking", 0.5, block=16)
    assert augsub.drop == "mask token"
    token = augsub.installed.mask_token
    flat = name.startswith("Swin")
    place = model.get_submodule(f"{name.lower()}.embeddings.norm") if flat else model.features[0]

    def hide(module, inputs, output):
        chosen = torch.rand(3, 4).argsort(dim=1)[:, :2]
        hidden = torch.zeros(3, 2, 2, dtype=torch.bool)
        for image, blocks in enumerate(chosen.tolist()):
            for block in blocks:
                hidden[image, block // 2, block % 2] = True
        hidden = hidden.repeat_interleave(8, 1).repeat_interleave(8, 2)
        hidden = hidden.flatten(1) if flat else hidden
        return torch.where(hidden[..., None], token, output)

    torch.manual_seed(5)
    expected = equation(model, (place, hide), x, y)
    torch.manual_seed(5)
    got = step_gradients(augsub, model, x, y)
    assert got.keys() == expected.keys() and any(name.endswith("mask_token") for name in got)
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, expected[parameter], msg=parameter)
    assert augsub.plain_state_dict(model).keys() == before
    augsub.remove()
    assert set(model.state_dict()) == before


def drop_path_places(model: nn.Module) -> dict[str, list[nn.Module]]:
    names = ("drop_path", "stochastic_depth")
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}


@pytest.mark.parametrize("name", ["Swin", "Swinv2", "Dinov2", "Dinov2WithRegisters", "Beit", "torchvision Swin"])
def test_stochastic_depth_is_in_every_block(name):
    """Also in the first block, where transformers leaves an Identity; what was put there goes when AugSub does."""
    model = build(name)
    before = {n: type(m) for n, m in drop_path_places(model).items()}
    augsub = AugSub(model, "droppath", 0.5)
    places = drop_path_places(model)
    assert {id(s.module) for s in augsub.switches} == {id(m) for m in places.values()}
    assert len(places) == len(before) and not any(isinstance(m, nn.Identity) for m in places.values())
    dropped: dict[str, int] = dict.fromkeys(places, 0)

    def count(name):
        return lambda module, inputs, output: dropped.__setitem__(
            name, dropped[name] + int((output.flatten(1) == 0).all(1).sum())
        )

    handles = [module.register_forward_hook(count(n)) for n, module in places.items()]
    for module in places.values():  # the main model's own rates
        setattr(module, "drop_prob" if hasattr(module, "drop_prob") else "p", 0.0)
    model(torch.randn(16, 3, 32, 32))
    assert not any(dropped.values())
    with augsub.sub_model():
        model(torch.randn(16, 3, 32, 32))
    assert all(dropped.values()), dropped
    for handle in handles:
        handle.remove()
    augsub.remove()
    assert {n: type(m) for n, m in drop_path_places(model).items()} == before


def test_stochastic_depth_of_torchvisions_convnets():
    for model in (torchvision.models.convnext_tiny(), torchvision.models.efficientnet_b0()):
        blocks = [m for m in model.modules() if hasattr(m, "stochastic_depth")]
        augsub = AugSub(model, "droppath", 0.3)
        assert [s.module for s in augsub.switches] == [block.stochastic_depth for block in blocks]
        assert {s.name for s in augsub.switches} == {"p"}


class Block(nn.Module):
    """A block with stochastic depth under a name of its own, with a placeholder for it, or without it."""

    def __init__(self, path: nn.Module | None):
        super().__init__()
        if path is not None:
            self.path = path


def test_a_placeholder_under_a_name_of_its_class_is_replaced():
    model = nn.Sequential(Block(nn.Identity()), Block(DropPath(0.1)))
    augsub = AugSub(model, "droppath", 0.5)
    assert [s.module for s in augsub.switches] == [block.path for block in model] and model[0].path.drop_prob == 0
    augsub.remove()
    assert isinstance(model[0].path, nn.Identity)


def test_stochastic_depth_in_some_of_the_blocks_is_refused():
    model = nn.Sequential(Block(DropPath(0.1)), Block(None))
    with pytest.raises(ValueError, match="cannot reach every block of the model, not 1; use masking"):
        AugSub(model, "droppath", 0.5)
    model = nn.Sequential(nn.Sequential(Block(None)), nn.Sequential(Block(DropPath(0.1))))
    with pytest.raises(ValueError, match=r"cannot reach every block of the model, not 0\.0; use masking"):
        AugSub(model, "droppath", 0.5)
    with pytest.raises(ValueError, match=r"Block\.path is outside of the model of timm"):
        AugSub(nn.Sequential(timm_vit(), Block(DropPath(0.1))), "droppath", 0.5)
    with pytest.raises(ValueError, match=r"1\.0\.path is outside of the model of timm"):
        AugSub(nn.Sequential(timm_vit(), nn.Sequential(Block(nn.Dropout(0.1)))), "dropout", 0.5)
    head = nn.Sequential(nn.Dropout(0.1), nn.Linear(5, 5))
    augsub = AugSub(nn.Sequential(timm_vit(), head), "dropout", 0.5)
    assert len(augsub.switches) == 6 and head[0] not in [switch.module for switch in augsub.switches]
    with pytest.raises(ValueError, match="has no place for it; use masking"):
        AugSub(build("Siglip"), "droppath", 0.5)


class CachedRate(nn.Module):
    """Stochastic depth that keeps another number than its rate."""

    def __init__(self, drop_prob: float, keep_prob: float):
        super().__init__()
        self.drop_prob, self.keep_prob = drop_prob, keep_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(self.keep_prob) / self.keep_prob


class CachedDropPath(CachedRate):
    """By its name a drop path."""


def test_stochastic_depth_that_does_not_follow_its_rate_is_refused():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for layer in (CachedDropPath(0.0, 1.0), CachedDropPath(0.1, 0.9)):
        with pytest.raises(ValueError, match=r"droppath: Block\.path does not follow its drop_prob, so the sub-model"):
            AugSub(nn.Sequential(Block(layer)), "droppath", 0.5)
        assert layer.drop_prob in (0.0, 0.1)
    assert torch.equal(torch.get_rng_state(), state)


class BatchPath(nn.Module):
    """Stochastic depth that drops a whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(torch.rand(()) >= self.p)


class StochasticDepthOfBatch(BatchPath):
    """By its name stochastic depth."""


def test_stochastic_depth_of_a_whole_batch_is_used():
    assert len(AugSub(nn.Sequential(Block(StochasticDepthOfBatch())), "droppath").switches) == 1


class Mlp(nn.Module):
    """A block whose MLP has the name of a head."""

    def __init__(self, name: str):
        super().__init__()
        self.drop = nn.Dropout(0.0)
        self.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)))


def test_names_of_heads_in_blocks_are_no_heads():
    for name in ("fc", "embed", "pool", "multihead"):
        assert len(AugSub(nn.Sequential(nn.ModuleList([Mlp(name), Mlp(name)])), "dropout").switches) == 4
    for stack in ("pooled_blocks", "embedder_layers2", "multihead"):
        model = nn.ModuleDict({"blocks": nn.ModuleList([Mlp("a")]), stack: nn.ModuleList([Mlp("a"), Mlp("a")])})
        assert len(AugSub(model, "dropout").switches) == 6, stack


def test_a_frozen_teacher_in_the_model_is_left_alone():
    model = nn.ModuleDict({"student": timm_vit(), "teacher": timm_vit().requires_grad_(False)})
    for kind in ("dropout", "droppath"):
        switched = {switch.module for switch in AugSub(model, kind).switches}
        assert switched and switched <= set(model["student"].modules())


def test_hand_written_blocks_may_have_a_flag_has_skip():
    class WithFlag(Block):
        has_skip = False

    assert len(AugSub(nn.Sequential(WithFlag(DropPath(0.1)), WithFlag(nn.Identity())), "droppath").switches) == 2


@pytest.mark.parametrize(("name", "suffixes"), [
    ("ViT", {"dropout"}), ("Swinv2", {"attention.output.dropout", "output.dropout"}),
    ("torchvision VisionTransformer", {"dropout", "mlp.2", "mlp.4"}),
    ("torchvision Swin", {"mlp.2", "mlp.4", "attn"}),
])  # fmt: skip
def test_dropout_is_behind_attention_and_mlp(name, suffixes):
    """Not in attention weights, position embeddings or the head."""
    model = build(name)
    names = {id(m): n for n, m in model.named_modules()}
    augsub = AugSub(model, "dropout", 0.5)
    got = {names[id(s.module)] for s in augsub.switches}
    blocks = [n for n, m in model.named_modules() if any(f"{n}.{s}" in names.values() for s in suffixes - {"attn"})]
    blocks = [
        n for n in blocks if n and ("layer" in n or "blocks" in n or "features" in n) and n.count("attention") == 0
    ]
    assert got == {f"{n}.{s}" for n in blocks for s in suffixes}
    with augsub.sub_model():
        assert {getattr(s.module, s.name) for s in augsub.switches} == {0.5}


def test_stochastic_depth_is_told_from_dropout_of_transformers():
    """SwiftFormer has an nn.Dropout under its name, PoolFormer its layer in the MLP, as dropout."""
    with torch.device("meta"):
        swiftformer = transformers.SwiftFormerForImageClassification(transformers.SwiftFormerConfig())
        poolformer = transformers.PoolFormerForImageClassification(transformers.PoolFormerConfig())
    with pytest.raises(ValueError, match=r"ConvEncoder.drop_path is a Dropout, not stochastic depth, .* use masking"):
        AugSub(swiftformer, "droppath", 0.5)
    places = {id(m) for n, m in drop_path_places(poolformer).items()}
    switches = AugSub(poolformer, "droppath", 0.5).switches
    assert len(switches) == len(places) == sum(poolformer.config.depths)


def test_dropout_that_would_miss_the_attention_is_refused():
    video = torchvision.models.video
    with torch.device("meta"):
        with pytest.raises(ValueError, match="MViT has no place for it; use masking or droppath"):
            AugSub(video.mvit_v1_b(), "dropout", 0.5)  # behind the MLPs alone
        with pytest.raises(ValueError, match="GoogLeNet has no place for it"):
            AugSub(torchvision.models.googlenet(init_weights=False), "dropout", 0.5)  # in its auxiliary heads alone
        model = video.swin3d_t()
        blocks = [m for m in model.modules() if type(m).__name__ == "SwinTransformerBlock"]
        assert len(AugSub(model, "dropout", 0.5).switches) == 3 * len(blocks)


def test_a_model_that_needs_every_patch_gets_pixel_blocks_and_a_warning():
    model = build("BEiT with relative positions")
    with pytest.warns(UserWarning, match="needs every patch.*costs as much"):
        augsub = AugSub(model, "masking", 0.5, block=8)
    assert augsub.drop == "pixel blocks"
    step_gradients(augsub, model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    segmentation = transformers.BeitForSemanticSegmentation(
        transformers.BeitConfig(**VIT | {"num_hidden_layers": 4}, **SQUARE, out_indices=[1, 2, 3, 4])
    )
    with pytest.warns(UserWarning, match="needs every patch"):
        assert AugSub(segmentation, "masking", 0.5).drop == "pixel blocks"


# wrappers


class WithHead(nn.Module):
    """A backbone and a head."""

    def __init__(self, **backbones: nn.Module):
        super().__init__()
        self.backbones = nn.ModuleDict(backbones)
        self.head = nn.LazyLinear(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([backbone(x) for backbone in self.backbones.values()], dim=1))


def timm_vit(name: str = "vit_tiny_patch16_224", **settings: Any) -> nn.Module:
    return timm.create_model(name, **TIMM_VIT | settings)


@pytest.mark.parametrize("kind", ["masking", "dropout", "droppath"])
def test_a_timm_model_in_a_wrapper_drops_what_it_drops_alone(kind):
    torch.manual_seed(0)
    inner = timm_vit()
    wrapper = nn.Sequential(inner)
    alone = copy.deepcopy(inner)
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 1])
    one, other = AugSub(alone, kind, 0.5), AugSub(wrapper, kind, 0.5)
    assert one.drop == other.drop
    torch.manual_seed(3)
    expected = step_gradients(one, alone, x, y)
    torch.manual_seed(3)
    got = step_gradients(other, wrapper, x, y)
    assert {name.removeprefix("0."): g.tolist() for name, g in got.items()} == {
        name: g.tolist() for name, g in expected.items()
    }
    other.remove()
    assert {n: type(m) for n, m in wrapper[0].named_modules()} == {n: type(m) for n, m in timm_vit().named_modules()}


def test_several_models_in_a_wrapper_are_named():
    model = WithHead(student=timm_vit(), teacher=timm_vit())
    with pytest.raises(ValueError, match=r"several models inside: backbones.student, backbones.teacher; .* tokens="):
        AugSub(model, "masking", 0.5)
    augsub = AugSub(model, "masking", 0.5, tokens="backbones.student")
    assert [s.module for s in augsub.switches] == [model.backbones.student.patch_drop]


def test_transformers_wrapper_of_a_timm_model():
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        num_labels=5,
        model_args={k: v for k, v in TIMM_VIT.items() if k != "num_classes"},
    )
    model = transformers.TimmWrapperForImageClassification(config)
    augsub = AugSub(model, "masking", 0.5)
    assert augsub.drop == "token drop" and [s.module for s in augsub.switches] == [model.timm_model.patch_drop]


def test_peft_leaves_the_embeddings_where_they_are():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("ViT"), peft.LoraConfig(target_modules=["q_proj", "query"], r=2))
    augsub = AugSub(model, "masking", 0.5)
    seen = []
    model.base_model.model.vit.layers[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[1]))
    step_gradients(augsub, model, {"pixel_values": torch.randn(2, 3, 32, 32)}, torch.tensor([0, 1]))
    assert seen == [17, 9]


# written by hand


class HandWritten(nn.Module):
    """A ViT that knows nothing of AugSub, with a mark where its tokens have their positions."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 16, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.mark = nn.Identity()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x).flatten(2).mT
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1) + self.positions
        return self.head(self.encoder(self.mark(x))[:, 0])


@pytest.mark.parametrize("by_name", [True, False])
def test_a_hand_written_vit_drops_tokens_at_its_mark(by_name):
    torch.manual_seed(0)
    model, x, y = HandWritten(), torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 1])
    with pytest.warns(UserWarning, match="costs as much as the main pass; .* name it as tokens="):
        AugSub(copy.deepcopy(model), "masking", 0.5)
    torch.manual_seed(5)
    expected = equation(model, (model.mark, keep_tokens(1, 0.5)), x, y)
    augsub = AugSub(model, "masking", 0.5, tokens="mark" if by_name else model.mark)
    torch.manual_seed(5)
    got = step_gradients(augsub, model, x, y)
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, expected[parameter], msg=parameter)


def test_a_prefix_that_is_given_counts_more_than_the_tables():
    """As for a subclass with more tokens that are no patches; and it belongs to a module that is named."""
    model = build("ViT")
    for prefix, kept in ((None, 1 + 8), (5, 5 + 6)):
        augsub = AugSub(model, "masking", 0.5, tokens="vit.embeddings", prefix=prefix)
        with torch.no_grad(), augsub.sub_model():
            assert model.vit.embeddings(torch.randn(2, 3, 32, 32)).shape[1] == kept
        augsub.remove()
    with pytest.raises(ValueError, match="prefix: belongs to the module that tokens= names; give both"):
        AugSub(model, "masking", 0.5, prefix=5)


def test_an_attribute_that_has_timms_name_is_not_timms_token_drop():
    model = HandWritten()
    model.patch_drop_rate = 0.0
    with pytest.warns(UserWarning, match="masking is by pixel blocks"):
        assert AugSub(model, "masking", 0.5).drop == "pixel blocks"


def test_a_mask_token_of_none_is_given_back():
    model = nn.Sequential(nn.Conv2d(3, 6, 4, 4))
    model.mask_token = None
    augsub = AugSub(model, "masking", 0.5, block=8, patches="0")
    assert isinstance(model.mask_token, nn.Parameter)
    augsub.remove()
    assert model.mask_token is None and not dict(model.named_parameters()).keys() & {"mask_token"}


def test_a_grid_that_is_named_gets_the_mask_token():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Flatten(), nn.LazyLinear(5))
    x, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 1])
    model(x)
    augsub = AugSub(model, "masking", 0.5, block=8, patches="0")
    assert augsub.drop == "mask token"
    got = step_gradients(augsub, model, x, y)
    assert got["mask_token"].abs().sum() > 0
    augsub.remove()
    assert "mask_token" not in model.state_dict()


@pytest.mark.parametrize(("settings", "match"), [
    ({"tokens": "nowhere"}, "tokens: the model has no module 'nowhere'; its own are proj, mark, encoder, head"),
    ({"tokens": nn.Identity()}, "tokens: Identity is no module of HandWritten"),
    ({"tokens": "mark", "prefix": -1}, "prefix: -1 is below 0"),
    ({"tokens": "mark", "patches": "proj"}, "give one of them"),
    ({"patches": "mark"}, "patches: Identity has no convolution"),
])  # fmt: skip
def test_a_wrong_place_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        install_drop(HandWritten(), "masking", 0.5, **settings)


def test_a_module_that_gives_no_tokens_is_refused_in_the_step():
    model = HandWritten()
    augsub = AugSub(model, "masking", 0.5, tokens="proj")
    with pytest.raises(ValueError, match=r"tokens: Conv2d gave \(2, 16, 4, 4\), not \(B, 1 \+ N, D\)"):
        step_gradients(augsub, model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="belong to masking, not to dropout"):
        AugSub(HandWritten(), "dropout", 0.5, tokens="mark")
