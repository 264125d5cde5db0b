"""The long tests, run by `make torture`: fuzzed files, killed processes, many clients at once."""

import sys
from pathlib import Path

# They share what the tests are made of.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
