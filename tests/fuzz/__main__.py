"""Fuzzes the probe protocol with atheris: `python -m tests.fuzz [libFuzzer options] [corpus directories]`.

    nice -n 10 .venv/bin/python -m tests.fuzz -max_total_time=600 build/fuzz tests/fuzz/corpus

New finds go to the first directory, which must exist. A crash is written to the working directory; minimise
it, add it to tests/fuzz/corpus under a name that says what it broke, and the unit tests keep it.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["scope.wire", "scope.channel"]):
    from tests.fuzz.probe import MAX_INPUT, check

BOUNDS = (f"-max_len={MAX_INPUT}", "-timeout=5", "-rss_limit_mb=512")

if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *BOUNDS, *sys.argv[1:]], check)
    atheris.Fuzz()
