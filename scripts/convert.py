"""Takes the weights out of a checkpoint that holds objects beside tensors, without running anything of it.

    python scripts/convert.py ckpt_epoch_299.pth swin.safetensors

Objects such as the configuration in Swin's own checkpoints (yacs' CfgNode), paths and defaultdicts are left empty. A
file with an average of the weights beside them gives the weights themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

from common.flag_types import nonempty_path  # noqa: E402
from common.parser import Parser  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.cli_errors import check_writable, cli_errors, write_output  # noqa: E402


def main() -> None:
    """Convert one file."""
    protect_output()
    parser = Parser(description=__doc__, prog="convert.py", raw_description=True)
    parser.add_argument("source", metavar="IN", type=nonempty_path, help="a checkpoint in torch's format")
    parser.add_argument("target", metavar="OUT.safetensors", type=nonempty_path, help="the file to write")
    args = parser.parse_args()
    with cli_errors(parser):
        convert(args.source, Path(args.target))


def convert(source: str, target: Path) -> None:
    """Write the weights in a checkpoint as safetensors.

    Raises:
        ValueError: there are none, or the file is not a checkpoint.
        OSError: the result cannot be written.
    """
    from safetensors.torch import save  # here, as it imports torch

    from common.checkpoint.io import load
    from common.checkpoint.weights import find_state_dict

    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: expected a name that ends in .safetensors")
    check_writable("OUT.safetensors", target)
    content = load(source, stand_ins=True)
    try:
        state, key = find_state_dict(content)
    except ValueError as error:
        advice = "of a whole pickled model, save model.state_dict() with the code that made it"
        raise ValueError(f"{source}: {error}; {advice}") from error
    # safetensors takes no two names for the same memory
    write_output(target, save({name: weight.contiguous().clone() for name, weight in state.items()}))
    size = sum(weight.numel() * weight.element_size() for weight in state.values())
    print(f"{target}: {len(state)} tensors, {size / 1e6:.1f} MB" + (f", of {key} in {source}" if key else ""))


if __name__ == "__main__":
    main()
