"""Facts: findings of the program of a stage, passed to ``gpu_check.py`` as soon as they are known.

A fact is a line of standard output that holds a JSON object. Its ``text``, if any, is for people: it is shown at once
and repeated in the summary. ``gpu_check.py`` needs no other entry but keeps them all. It knows ``machine`` (a mapping,
whose ``gpu`` names the files that are written), and ``case`` with ``cells`` (a row of the benchmark table: its numbers,
and how they are printed).
"""

from __future__ import annotations

import json
import os
from typing import Any

MARK = "@fact "
LISTENING = "GMP_GPU_CHECK_FACTS"  # set by gpu_check.py for the programs it starts


def tell(text: str = "", **data: Any) -> None:
    """Print a fact; if ``gpu_check.py`` is not listening, print only its text."""
    print(as_line(text, **data), flush=True)


def as_line(text: str, **data: Any) -> str:
    """Return the line to print for a fact."""
    if not os.environ.get(LISTENING):
        return text
    # The line break keeps it apart from earlier output that did not end in one.
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
