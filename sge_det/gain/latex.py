"""Names from outside, in LaTeX."""

_SPECIAL = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    # after the end of a row these would be arguments of that end
    "[": "{[}",
    "*": "{*}",
    "±": r"$\pm$",
}


def escape_latex(text: object) -> str:
    """``text`` so that LaTeX shows it as it is, in a cell of a table; what does not print becomes a space."""
    return "".join(_SPECIAL.get(char, char) if char.isprintable() else " " for char in str(text))
