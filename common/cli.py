"""What an entry point calls: parse the command line, import PyTorch if there is something to do, map errors to exit
codes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from common.args import parse
from common.errors import CleanExit, StopTraining, is_rank_zero_from_env
from common.recipe import Recipe
from common.run_dir import LAST
from common.signals import handle_stop_signals
from common.streams import protect_output, silence_stdout
from common.train_args import TrainArgs

if TYPE_CHECKING:
    from common.run import Run


def run(recipe: Recipe, argv: Sequence[str] | None = None) -> str | None:
    """Train or evaluate as the command line says.

    Returns:
        None at the end, or the name of the signal that stopped training before.

    Exits with status 2 and one sentence on bad input and where training cannot go on, 130 on Ctrl-C, 141 on a closed
    pipe. Any other failure to print, as on a full disk, is ignored: the files of the run have it all.
    """
    protect_output()
    try:
        try:
            args = parse(recipe, argv)
        finally:
            sys.stdout.flush()  # else a closed pipe (`| head`) would be noticed at exit, with a traceback
    except BrokenPipeError:
        silence_stdout()
        raise CleanExit("", 141) from None
    return execute(recipe, args)


def execute(recipe: Recipe, args: TrainArgs) -> str | None:
    """Build the run and do what the arguments ask for, as `run`."""
    from common import distributed
    from common.run import build_run

    current: Run | None = None
    with ExitStack() as stack:
        try:
            stop = stack.enter_context(handle_stop_signals(is_rank_zero_from_env()))
            process = stack.enter_context(distributed.init_distributed(args.device))
            current = build_run(recipe, args, process, stop)
            signal_name = run_mode(current)
            current = None
            gc.collect()  # DDP must go before its process group does
            return signal_name
        except ValueError as error:
            if current is not None:  # after the start it is a fault, not bad input
                raise
            exit_with_message(str(error), 2)
        except StopTraining as error:
            exit_with_message(f"training stopped: {error}", 2)
        except KeyboardInterrupt:
            saved = current is not None and current.folder is not None and (current.folder / LAST).exists()
            exit_with_message("interrupted" + ("; re-run the command to resume" if saved else ""), 130)
        except BrokenPipeError:
            silence_stdout()
            raise CleanExit("", 141) from None
        except Exception as error:
            explanation = explain_failure(current, error)
            if explanation is not None:
                exit_with_message(f"training stopped: {explanation}", 2)
            if not distributed.claim_error_report():  # another rank failed first and prints its traceback
                raise CleanExit("", 2) from None
            raise


def run_mode(run: Run) -> str | None:
    """Train, evaluate or measure; then close the run, whatever happened."""
    from common.evaluation import evaluate_only, measure_throughput
    from common.train import fit

    drain_s = None
    try:
        if run.args.throughput:
            measure_throughput(run)
        elif run.args.eval:
            evaluate_only(run)
        else:
            return fit(run)
        return None
    except KeyboardInterrupt:
        drain_s = 1.0  # who pressed Ctrl-C twice does not want to wait for a large checkpoint
        raise
    finally:
        run.close(drain_s)


def explain_failure(run: Run | None, error: Exception) -> str | None:
    """What to say of a DataLoader worker that died or hangs; None where the error is another."""
    from common.data.loader import explain_worker_failure

    loaders = [run.train_loader, run.val_loader] if run is not None else []
    return next(filter(None, (explain_worker_failure(loader, error) for loader in loaders)), None)


def exit_with_message(message: str, code: int) -> NoReturn:
    """End the process and its DataLoader workers; the first rank to fail prints the message."""
    from common import distributed
    from common.data.loader import kill_workers

    kill_workers()
    if not distributed.claim_error_report():
        raise CleanExit("", code)
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise CleanExit(message, code)
