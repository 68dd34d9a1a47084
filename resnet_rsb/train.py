"""ResNet strikes back: training of ResNets, or of any timm model, plain or with AugSub.

    torchrun --nproc-per-node 8 resnet_rsb/train.py /data/imagenet --variant resnet50 --augsub masking \
        --output output/resnet50_masking

Recipe: Wightman et al., "ResNet strikes back", arXiv 2110.00476; AugSub: arXiv 2306.11339. The paper's ResNet-50 after
300 epochs: 79.7 % top-1 plain, 80.0 % with AugMask. Without a data path a small ResNet trains on embedded digits in
minutes.
"""

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the imports, which take seconds, without a traceback

from common.cli import run  # noqa: E402
from resnet_rsb.recipe import RECIPE  # noqa: E402

if __name__ == "__main__":
    run(RECIPE)
