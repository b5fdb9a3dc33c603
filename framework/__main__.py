"""`leyden …` and `python -m leyden …`."""

from __future__ import annotations

import sys

from leyden.cli.launcher import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
