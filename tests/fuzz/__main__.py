"""Fuzzes with atheris: `python -m tests.fuzz [keys] [libFuzzer options] [corpora]`.

The probe protocol, or with `keys` the messages about post-quantum keys and the parts that they travel in.

    nice -n 10 .venv/bin/python -m tests.fuzz -max_total_time=600 build/fuzz tests/fuzz/corpus
    nice -n 10 .venv/bin/python -m tests.fuzz keys -max_total_time=600 build/fuzz-keys tests/fuzz/corpus-keys

New finds go to the first directory, which must exist. A crash is written to the working directory; minimise
it, add it to the corpus under a name that says what it broke, and the unit tests keep it.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(
    include=["scope.wire", "scope.channel", "scope_agent.psk.messages", "scope_agent.psk.parts"]
):
    from tests.fuzz import keys, probe

if __name__ == "__main__":
    is_keys = sys.argv[1:2] == ["keys"]
    target = keys if is_keys else probe
    bounds = (f"-max_len={target.MAX_INPUT}", "-timeout=5", "-rss_limit_mb=512")
    atheris.Setup([sys.argv[0], *bounds, *sys.argv[2 if is_keys else 1 :]], target.check)
    atheris.Fuzz()
