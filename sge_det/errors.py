"""The one way in which a user's mistake is told: a sentence and exit code 2."""

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what the user gave: names the file, key or value and says what to do about it."""


def user_errors(main: Callable) -> Callable:
    """Makes a tool's ``main`` print a :class:`UserError` as one line on stderr and exit with code 2.

    Ctrl-C ends with the shell's usual 130 and no traceback: long runs are meant to be interrupted and resumed.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted: run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    return wrapper
