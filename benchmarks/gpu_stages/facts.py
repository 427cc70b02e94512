"""Facts: what the program of a stage has found out, told to ``gpu_check.py`` as soon as it is known.

A fact is a line of standard output that holds a JSON object. Its ``text``, where there is one, is what people read: it
is shown at once and stands in the summary. ``gpu_check.py`` needs no other entry but keeps them all; of them it knows
``machine`` (a mapping, of which ``gpu`` names the files that are written), and ``case`` with ``cells`` (a row of the
benchmark table: its numbers, and how they are printed).
"""

from __future__ import annotations

import json
import os
from typing import Any

MARK = "@fact "
LISTENING = "GMP_GPU_CHECK_FACTS"  # set by gpu_check.py for the programs it starts


def tell(text: str = "", **data: Any) -> None:
    """Print a fact; only its text, where nobody but a person is there to read it."""
    print(as_line(text, **data), flush=True)


def as_line(text: str, **data: Any) -> str:
    """Return what is printed of a fact."""
    if not os.environ.get(LISTENING):
        return text
    # The line break keeps it apart from whatever was printed before without one.
    return f"\n{MARK}{json.dumps({'text': text, **data})}"


def parsed(line: str) -> dict[str, Any] | None:
    """Return the fact that a line of output holds; None if it is anything else."""
    if not line.startswith(MARK):
        return None
    try:
        fact = json.loads(line.removeprefix(MARK))
    except ValueError:
        return None
    return fact if isinstance(fact, dict) else None
