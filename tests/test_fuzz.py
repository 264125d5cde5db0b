"""Some of the damaged files of ``torture/test_fuzz.py``: each is refused in a sentence, or read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzzing import TARGETS, run

# The SAEs are left to the long test: a process that loads torch takes longer than all others.
FEW = {"image run": 60, "text run": 40, "idx": 100, "arrays": 100, "pictures": 100, "texts": 100}


@pytest.mark.parametrize("name", FEW)
def test_every_reader_refuses_or_reads(name):
    first = TARGETS[name].share  # none of those of the long test
    assert list(run({name: range(first, first + FEW[name])}, say=lambda said: None)) == []


def test_what_goes_wrong_is_told(tmp_path):
    """The watch over a reader that does wrong: one of each kind."""
    script = tmp_path / "reader.py"
    script.write_text(
        "import sys, os, subprocess, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import fuzzing\n"
        "def read(folder):\n"
        "    if folder.name == 'whole': return\n"
        "    n = int(os.environ['DOES'])\n"
        "    if n == 0: raise KeyError('raw')\n"
        "    if n == 1: subprocess.run(['true'])\n"
        "    if n == 2: exec('1')\n"
        "    if n == 3: open('/tmp/polyseme-fuzzing-outside', 'w')\n"
        "    if n == 4: bytearray(700 * 2**20)\n"
        "    if n == 5: os.abort()\n"
        "fuzzing.TARGETS['idx'] = fuzzing.Target(fuzzing.make_idx, read, 1)\n"
        "fuzzing.work('idx', 0, 1)\n"
    )
    for does, message in enumerate(
        ["KeyError: 'raw'", "subprocess.Popen", "exec(", "open(", "took 7", "-6"]
    ):
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "DOES": str(does)},
            capture_output=True,
            text=True,
            check=False,
        )
        failed = [
            told["failed"] for told in map(json.loads, done.stdout.splitlines()) if "failed" in told
        ]
        assert message in "".join(failed) or message == str(done.returncode)
