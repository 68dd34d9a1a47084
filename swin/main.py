"""Training of Swin transformers, plain or with AugSub.

    torchrun --nproc-per-node 8 swin/main.py --cfg configs/swin/swin_tiny_patch4_window7_224.yaml --augsub masking \
        --data-path /data/imagenet --output output/swin

Recipe: Liu et al., "Swin Transformer", arXiv 2103.14030; AugSub: arXiv 2306.11339. The paper's Swin-T after 300 epochs:
81.3 % top-1 plain, 81.4 % with AugMask. Without --data-path a small model trains on embedded digits in minutes.
"""

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the imports, which take seconds, without a traceback

from common.cli import run  # noqa: E402
from swin.recipe import RECIPE  # noqa: E402

if __name__ == "__main__":
    run(RECIPE)
