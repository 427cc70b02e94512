"""Text that came from outside, made safe to show: no character of it moves a cursor or hides another."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str, *, keep: str = "") -> str:
    """Return ``text`` with everything escaped that has no glyph: controls, bidi overrides, separators, surrogates.

    Parameters
    ----------
    text : str
    keep : str
        Characters to leave as they are, such as a newline.

    Examples
    --------
    >>> printable("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
