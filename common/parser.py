"""An ArgumentParser with one-sentence errors, in whose flags `-` and `_` are alike."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any, NoReturn

from common.errors import CleanExit, is_rank_zero_from_env


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints defaults, except those that go without saying."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, "", []) or isinstance(action, argparse._StoreTrueAction)
        return action.help if plain else super()._get_help_string(action)


class RawDefaultsFormatter(DefaultsFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, such as commands."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that exits with one sentence from rank 0, and takes `--batch_size` for `--batch-size`.

    Args:
        raw_description: keep the line breaks of the description in `--help`.
    """

    def __init__(self, raw_description: bool = False, **kwargs: Any):
        formatter = RawDefaultsFormatter if raw_description else DefaultsFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        if not is_rank_zero_from_env():
            raise CleanExit("", 2)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise CleanExit(message, 2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            if not word.startswith("--"):
                continue
            flag = word.partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7)
            self.error(f"unknown flag {flag}" + (f": did you mean {close[0]}?" if close else "; --help lists them all"))
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}; --help lists the flags")
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [normalize_flag(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(words, namespace)

    def check_values(self, args: argparse.Namespace) -> None:
        """Check values against the types and choices of their flags. argparse does that for the command line only, not
        for what `set_defaults` takes from a recipe, a variant or a file.

        Exits with status 2 and argparse's sentence, which names the flag.
        """
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if value is None or action.nargs == 0:
                continue
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            try:
                if isinstance(action.nargs, int) and len(values) != action.nargs:
                    raise argparse.ArgumentError(action, f"expected {action.nargs} arguments")
                for item in values:
                    self._check_value(action, self._get_value(action, str(item)))
            except argparse.ArgumentError as error:
                self.error(str(error))


def normalize_flag(word: str) -> str:
    """`--output_dir=a_b` → `--output-dir=a_b`; a word that is no flag stays."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def format_flag(setting: str) -> str:
    """A setting's flag: `batch_size` → `--batch-size`."""
    return normalize_flag(f"--{setting}")
