"""``python -m polyseme.cli``."""

import sys

from polyseme.cli.commands import main

sys.exit(main())
