"""Stages ``memcheck`` and ``racecheck``: compute-sanitizer over the smoke test, for this project's kernels alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

from gpu_stages.facts import tell

ERROR_EXIT_CODE = 9
MOST_ERRORS = 10  # reported ones; the log has more
FILTERS = ("--kernel-name", "--kernel-regex")  # the option's name differs between versions


def kernel_filter(help_text: str) -> list[str]:
    """Return the option that leaves out torch's kernels, each of which would take many times as long, if it exists."""
    option = next((name for name in FILTERS if re.search(rf"{name}\b(?!-)", help_text)), None)
    return [option, "kns=gmp"] if option else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool that the first argument names; the other arguments go to the smoke test."""
    tool, *options = sys.argv[1:] if arguments is None else arguments
    done = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True, check=False)
    chosen = kernel_filter(done.stdout + done.stderr)
    if not chosen:
        tell("compute-sanitizer has no option to choose kernels; torch's are checked as well, and slowed down")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERROR_EXIT_CODE), *chosen]
    command += [sys.executable, "-m", "gpu_stages.smoke", "--few", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    summaries = told = 0
    for line in process.stdout:
        print(line, end="", flush=True)
        if not line.startswith("========="):
            continue
        if "SUMMARY" in line:
            summaries += 1
            tell(line.strip("= \n"))
        elif re.search(r"Invalid|Error|error|hazard|Race|Misaligned|Out-of|Leaked", line) and told < MOST_ERRORS:
            told += 1
            tell(line.strip("= \n"))
    code = process.wait()
    if not summaries:
        tell(f"{tool} ended without a summary (exit code {code}): nothing can be concluded")
    return code or int(not summaries)


if __name__ == "__main__":
    sys.exit(main())
