"""Errors that a user can act on, and the one way our command lines report them."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags


class UserError(Exception):
    """Bad input or configuration: one line that names file or field, the value and the remedy."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs an absl `main`; a `UserError` becomes one line on stderr and exit status 1, Ctrl-C 130.

    Any other exception keeps its traceback: it is a defect of ours, not of the input.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            print(f"error: unexpected argument {argv[1]!r}; see --help", file=sys.stderr)
            sys.exit(1)
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)  # what shells report for SIGINT

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; ml_collections raises plain exceptions for fields that a config lacks."""
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        reason = str(error).strip("\"'").replace("\n", " ")
        print(f"error: command line: {reason}; see --help", file=sys.stderr)
        sys.exit(1)
