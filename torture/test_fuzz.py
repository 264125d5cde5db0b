"""A hundred thousand damaged and hostile files, of every kind that polyseme reads.

Each is refused in a sentence or read, in little memory and time, and nothing in it is run. They
are the same each time. ``FUZZ=0.1`` takes a tenth of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from fuzzing import TARGETS, run

SHARE = float(os.environ.get("FUZZ", "1"))


def test_every_reader_refuses_or_reads():
    assert sum(target.share for target in TARGETS.values()) >= 100_000
    inputs = {name: range(int(target.share * SHARE)) for name, target in TARGETS.items()}
    assert run(inputs) == []
