"""One architecture of each of timm's families takes a step with each drop that `--list` says it offers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._registry import _model_to_module

from common.augsub import AugSub
from common.drops import find_drops
from common.survey import survey
from tests.commands import ROOT

# where timm has no small one: the smallest, shrunk
SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}
SMALL_IMAGES = {"img_size": 64}
SHRUNK: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": VIT,
    "cait_xxs24_224": VIT,
    "coat_tiny": SMALL_IMAGES,
    "convit_tiny": SMALL_IMAGES,
    "crossvit_tiny_240": {"depth": ((1, 1, 0),) * 3},
    "deepseek_vit_412m": VIT,
    "gcvit_xxtiny": SMALL_IMAGES,
    "gemma4_vit_167m": VIT,
    "gmlp_ti16_224": SMALL_IMAGES,
    "hiera_tiny_224": {"stages": (1, 1, 1, 1), "img_size": (64, 64)},
    "hieradet_small": {"embed_dim": 16, "stages": (1, 1, 2, 1), "num_heads": 2, "global_att_blocks": (3,)},
    "mvitv2_tiny": SMALL_IMAGES,
    "naflexvit_base_patch16_gap": VIT,
    "nest_tiny": SMALL_IMAGES,
    "qwen3_vit_88m": VIT,
    "res2net50_26w_4s": {"layers": (1, 1, 1, 1)},
    "samvit_base_patch16_224": VIT | {"global_attn_indexes": (1,)},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_cr_tiny_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "tnt_s_legacy_patch16_224": {"depth": 2},
    "tresnet_m": {"layers": (1, 1, 1, 1)},
    "twins_svt_small": {"depths": (1, 1, 1, 1)},
    "vitamin_small_224": SMALL_IMAGES,
    "volo_d1_224": SMALL_IMAGES,
    "xcit_nano_12_p8_224": {"depth": 2},
}
# those that take images of any size, at less than their usual one
SIZES = {
    32: "mobilenetv5_base vgg11",
    64: """convmixer_768_32 csatv2 davit_tiny densenet121 dpn48b fastvit_t8 focalnet_tiny_srf ghostnet_050 hardcorenas_a
        hrnet_w18_small iformer_t lambda_resnet26t naflexvit_base_patch16_gap nasnetalarge nextvit_small pnasnet5large poolformerv2_s12
        rdnet_tiny repvit_m1 res2net50_26w_4s resnest14d rexnet_100 selecsls42 shvit_s1 swiftformer_xs tresnet_m
        xcit_nano_12_p8_224 xception41p""",
    96: "inception_resnet_v2 inception_v3 inception_v4 legacy_xception qwen3_vit_88m",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
NAMES = """
beit_base_patch16_224 lambda_resnet26t test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121
dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1
efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_next_atto lcnetv2_small levit_128s lowformer_b0
test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilevit_xxs mvitv2_tiny nest_tiny
nextvit_small test_nfnet pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 resnest14d test_resnet
resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_svt_small visformer_tiny test_vit
vit_tiny_r_s16_p8_224 test_vit_relpos volo_d1_224 ese_vovnet19b_slim_dw xcit_nano_12_p8_224 deepseek_vit_412m
gemma4_vit_167m hardcorenas_a hieradet_small iformer_t inception_resnet_v2 inception_v3 inception_v4 mobilenetv5_base
naflexvit_base_patch16_gap nasnetalarge pnasnet5large qwen3_vit_88m res2net50_26w_4s sequencer2d_s swinv2_tiny_window8_256
swinv2_cr_tiny_224 tresnet_m vgg11 samvit_base_patch16_224 vitamin_small_224 legacy_xception xception41p
""".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_family_does_what_the_list_says(name):
    ((listed, offered),) = survey(name)
    assert listed == name and offered is not None
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **SHRUNK.get(name, {}))
    assert find_drops(model) == offered, "the list is made without weights"
    cfg = model.pretrained_cfg
    size = cfg["input_size"] if cfg.get("fixed_input_size") else cfg.get("min_input_size") or cfg["input_size"]
    if "img_size" in SHRUNK.get(name, {}):
        size = (3, 64, 64)
    elif name in SIZE_OF:
        size = (3, SIZE_OF[name], SIZE_OF[name])
    x = torch.randn(2, *size)
    for kind in offered:
        augsub = AugSub(model, kind, 0.5, block=16)  # blocks that images of 32 pixels have several of
        model.zero_grad()
        for loss in augsub.losses(model, x, torch.tensor([0, 1]), F.cross_entropy):
            loss.backward()
            assert loss.isfinite(), kind
        unused = [parameter for parameter, value in model.named_parameters() if value.grad is None]
        assert [parameter for parameter in unused if parameter != "mask_token"] == [], kind
        assert (kind == "masking" and offered[kind] == "mask token") == (
            "mask_token" not in unused and hasattr(model, "mask_token")
        )


def test_the_list_covers_timms_families():
    covered = [_model_to_module[name] for name in NAMES]
    assert len(set(covered)) == len(NAMES), "one of each"
    ours = {
        name for name in timm.list_models() if not timm.models.model_entrypoint(name).__module__.startswith("timm.")
    }
    every = {_model_to_module[name] for name in timm.list_models() if name not in ours}
    assert sorted(every - set(covered)) == []


def test_dropout_is_where_timms_projection_dropout_is():
    rate, compared = 0.123, 0
    for name in NAMES:
        try:
            with torch.device("meta"):
                model = timm.create_model(name, proj_drop_rate=rate, **SHRUNK.get(name, {}))
        except TypeError:  # it has no such setting
            continue
        theirs = {id(m): n for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p == rate}
        if not theirs:  # a convolutional one
            continue
        ours = {id(switch.module) for switch in AugSub(model, "dropout", 0.5).switches}
        missed = [name for key, name in theirs.items() if key not in ours]
        assert missed == [], name
        compared += 1
    assert compared > 30


@pytest.mark.slow
def test_the_command_prints_the_list():
    done = subprocess.run(
        [sys.executable, "-m", "common.augsub", "--list", "resnet1*"], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["architecture", "masking", "by", "dropout", "droppath"]
    assert any(line.split() == ["resnet18", "pixel", "blocks", "-", "yes"] for line in lines), done.stderr
    none = subprocess.run(
        [sys.executable, "-m", "common.augsub", "--list", "xyz"], cwd=ROOT, capture_output=True, text=True
    )
    assert (none.returncode, none.stderr) == (2, "no timm architecture matches 'xyz'\n")
