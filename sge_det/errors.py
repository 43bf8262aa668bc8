"""How a user's mistake, a stop, or a fault is told: a sentence and an exit code."""

import errno
import functools
import logging
import signal
import sys
import tempfile
import traceback
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

    Any other error is a fault of ours or of the environment: a line that names it and where its traceback is, code 1.
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
        except Exception as error:
            lacking = shortage(error)
            print(f"error: {f'{lacking}, then {go_on or GO_ON}' if lacking else _fault(error)}", file=sys.stderr)
            sys.exit(2 if lacking else 1)

    return wrapper


# What torch says where no memory is left, in the several kinds of RuntimeErrors that it raises.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")
_LIMITS = {
    errno.EMFILE: "too many files are open: raise the limit on them (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: end what else has them open",
    errno.EFBIG: "a file may not become as large as it has to: raise the limit on sizes (ulimit -f)",
}


def shortage(error: BaseException) -> str | None:
    """What the machine, or a limit on it, lacks where that is what an error comes from, and what to do about it."""
    text = " ".join(str(error).split())[:200]
    number = error.errno if isinstance(error, OSError) else None
    of_torch = text if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(word in of_torch for word in _NO_MEMORY):
        return f"there is too little memory ({text or 'MemoryError'}): end what else uses it"
    if "Too many open files" in of_torch:
        number = errno.EMFILE
    if "can't start new thread" in of_torch:
        return "no more threads may be started: raise the limits on them and on memory (ulimit -u, ulimit -v)"
    return _LIMITS.get(number)


def _fault(error: Exception) -> str:
    # an error of another process brings its traceback as its text, whose last line is the error
    lines = str(error).strip().splitlines()
    text = " ".join(lines[-1].split())[:500] if lines else "it says no more"
    place = _log_traceback(error)
    return (
        f"a fault of sge_det or of the environment, not of what you gave: {type(error).__name__}: {text}; "
        f"{f'the traceback is in {place}' if place else 'the traceback could not be written anywhere'}"
    )


def _log_traceback(error: Exception) -> str | None:
    """Writes the traceback to the run's log, or to a file of its own where there is none; returns the file's name."""
    for handler in logging.getLogger("sge_det").handlers:
        name = getattr(getattr(handler, "stream", None), "name", None)
        if isinstance(name, str) and not name.startswith("<"):
            kind = (type(error), error, error.__traceback__)
            handler.handle(logging.LogRecord("sge_det", logging.ERROR, __file__, 0, "a fault", (), kind))
            handler.flush()
            return name
    try:
        with tempfile.NamedTemporaryFile("w", prefix="sge_det_", suffix=".log", delete=False) as file:
            traceback.print_exception(error, file=file)
            return file.name
    except OSError:
        return None
