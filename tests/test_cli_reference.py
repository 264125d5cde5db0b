"""docs/cli.md is generated, and up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_parser_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "cli_reference.py", "--check"], check=False
    )
    assert done.returncode == 0, "run: python tools/cli_reference.py"


def test_the_check_notices_a_change(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "docs").mkdir()
    script = tmp_path / "tools" / "cli_reference.py"
    script.write_bytes((ROOT / "tools" / "cli_reference.py").read_bytes())
    (tmp_path / "docs" / "cli.md").write_text("something else")
    done = subprocess.run([sys.executable, script, "--check"], check=False)
    assert done.returncode == 1
