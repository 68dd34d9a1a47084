"""DeiT-III pretraining and finetuning, plain or with AugSub.

    torchrun --nproc-per-node 8 deit/main.py --variant small_400 --augsub masking --data-path /data/imagenet \
        --output-dir output/small_400_masking

Recipe: Touvron et al., "DeiT III", arXiv 2204.07118; AugSub: arXiv 2306.11339. The paper's ViT-S/16 after 400 epochs:
80.4 % top-1 plain, 81.1 % with AugMask. Without --data-path a small model trains on embedded digits in minutes.
"""

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the imports, which take seconds, without a traceback

from common.cli import run  # noqa: E402
from deit.recipe import RECIPE  # noqa: E402

if __name__ == "__main__":
    run(RECIPE)
