"""The one way in which a user's mistake, or a stop, is told: a sentence and an exit code."""

import functools
import signal
import sys
from collections.abc import Callable

GO_ON = "run the same command again to go on"


class UserError(ValueError):
    """A mistake in what the user gave: names the file, key or value and says what to do about it."""


class Resumable(UserError):
    """What stops a run that goes on once it is put right: says what to put right, and the tool says how to go on."""


class Stopped(BaseException):
    """A signal asked for the end, and what it interrupts is in order.

    Attributes:
        exit_code: 130 after SIGINT, 143 after any other, whatever its number: the run can be resumed.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.exit_code = exit_code(signum)


def exit_code(signum: int) -> int:
    """What a process that such a signal stops exits with."""
    return 128 + (signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)


def user_errors(main: Callable | None = None, *, go_on: str = GO_ON) -> Callable:
    """Makes a tool's ``main`` print a :class:`UserError` as one line on stderr and exit with code 2.

    Ctrl-C ends with the shell's usual 130 and no traceback: long runs are meant to be interrupted and resumed.

    Args:
        go_on: what to do to go on after an interruption, said after each; "" says nothing.
    """
    if main is None:
        return functools.partial(user_errors, go_on=go_on)

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            advice = f", then {go_on}" if isinstance(error, Resumable) and go_on else ""
            print(f"error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
            sys.exit(2)
        except (KeyboardInterrupt, Stopped) as stop:
            print(f"interrupted: {go_on}" if go_on else "interrupted", file=sys.stderr)
            sys.exit(getattr(stop, "exit_code", 130))

    return wrapper
