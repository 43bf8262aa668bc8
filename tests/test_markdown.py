import html
import re

import pytest

from sge_det.gain.tables import Table
from sge_det.markdown import escape, escape_line

HOSTILE = [
    "<script>alert(1)</script>",
    "![x](javascript:alert(1))",
    "[a](http://evil)",
    "a|b",
    "*a* _b_ `c` ~d~ $e$",
    "# head",
    "- item",
    "1. item",
    "2) item",
    "===",
    "    code",
    "+ item",
    "&lt;b&gt;",
    "a\nb\r\tc\x1b[2J\u202ed",
    "\\",
    "http://evil www.evil @someone",
    "",
    "sge-fixed",
    "000000000013.jpg",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_stand_in_markdown_as_they_are(text):
    escaped = escape_line(text)
    assert escaped.isprintable()
    # what a reader sees: backslashes before punctuation and entities undone, as Markdown does
    shown = html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped))
    assert shown == "".join(char if char.isprintable() else " " for char in text).lstrip()
    bare = re.sub(r"\\[!-/:-@\[-`{-~]|&#?\w+;", "", escaped)
    assert not re.search(r"[<>|*_`\[\]$~\\]|://|@|www\.", bare)
    assert not re.match(r"\s*([#+=-]|\d+[.)](\s|$))", escaped)


def test_usual_names_are_left_alone():
    for name in ("plain", "sge-fixed", "000000000013.jpg", "a b (1).png", "50.5"):
        assert escape(name) == escape_line(name) == name
    assert escape("-0.5") == "-0.5"  # in a table's cell


def test_the_report_escapes_what_it_is_given():
    table = Table(["metric", "a|b", "<i>x</i>"], [["AP-*dog*", "-0.5", "1"]])
    header, _, row = table.markdown().splitlines()
    assert re.fullmatch(r"\| metric +\| a\\\|b \| &lt;i&gt;x&lt;/i&gt; \|", header)
    assert re.fullmatch(r"\| AP-\\\*dog\\\* \| -0.5 \| +1 \|", row)
