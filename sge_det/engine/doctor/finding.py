"""A finding of the doctor, and how findings are told."""

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.utils import comm

from ...errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """Something wrong with a config.

    Attributes:
        severity: "error": it cannot work or ruins the result; "warning": it may be meant.
        key: the config key or option that it is about.
        problem: what is wrong.
        remedy: what to set or do.
    """

    severity: str
    key: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}{f'; {self.remedy}' if self.remedy else ''}"


def tell(findings: Sequence[Finding]) -> None:
    """Logs each warning once a process, and ends where there are errors.

    Raises:
        UserError: the first error, and how many more there are.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more: tools/check_config.py lists them)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")
    # the process that started this one has told them
    if comm.get_world_size() == 1:
        for finding in findings:
            _warn(str(finding))


@functools.cache
def _warn(text: str) -> None:
    logger.warning(text)


def finding_of(error: UserError, default_key: str) -> Finding:
    """The error of a check as a finding, under the key that it names or else under ``default_key``."""
    message = str(error)
    key = re.search(r"\b[A-Z]+(\.[A-Z][A-Z0-9_]*)+", message)
    return Finding("error", key[0] if key else default_key, message, "")
