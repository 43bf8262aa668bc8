"""Names from outside, in Markdown."""

import re


def escape(text: object) -> str:
    """``text``, an arm's or a file's name for instance, so that Markdown shows it as it is: on one line, no effect.

    What has a meaning in Markdown, in a row of a table or in the HTML that Markdown lets through becomes an entity or
    is escaped; line ends and other characters that do not print become spaces.
    """
    line = "".join(char if char.isprintable() else " " for char in str(text))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]|~$^])", r"\\\1", line)
    # a mention or a link needs no markup in many viewers
    return line.replace("@", "&#64;").replace("://", "&#58;//").replace("www.", "www&#46;")


def escape_line(text: object) -> str:
    """As :func:`escape`, where ``text`` begins a line: as no heading, list, rule or code, which spaces make."""
    line = escape(text).lstrip()
    return re.sub(r"^([#+=-]|\d(?=\d*[.)](\s|$)))", lambda found: f"&#{ord(found[1])};", line)
