"""Some of the damaged files of ``torture/test_fuzz.py``: each is refused in a sentence, or read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fuzzing import TARGETS, run

# The SAEs are left to the long test: a process that loads torch takes longer than all others.
FEW = {"image run": 25, "text run": 10, "idx": 100, "arrays": 100, "pictures": 100, "texts": 100}


def test_every_reader_refuses_or_reads():
    # None of those of the long test.
    inputs = {name: range(few, few + n) for name, n in FEW.items() for few in [TARGETS[name].share]}
    assert run(inputs, say=lambda said: None) == []


def test_failures_of_a_reader_are_reported(tmp_path):
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
        "    if n == 4: fuzzing.kept = b'x' * (900 * 2**20)\n"
        "    if n == 5: os.abort()\n"
        "fuzzing.TARGETS['idx'] = fuzzing.Target(fuzzing.make_idx, read, 1)\n"
        "fuzzing.work('idx', 0, 1)\n"
    )
    messages = ["KeyError: 'raw'", "subprocess.Popen", "exec(", "open(", "took ", "-6"]
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "DOES": str(does)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for does in range(len(messages))
    ]
    for process, message in zip(started, messages, strict=True):
        said, _ = process.communicate()
        told = [line["failed"] for line in map(json.loads, said.splitlines()) if "failed" in line]
        assert message in f"{''.join(told)} {process.returncode}"
