"""Write the tables of README.md and docs from the committed results.

    python -m benchmarks.tables            rewrite the tables
    python -m benchmarks.tables --check    exit 1 if a table is not what the results say

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import re
import sys

from . import layers, networks, study, temporal
from .records import ROOT

_FILES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/block-sparse.md",
    "docs/peers.md",
    "docs/cpu-kernels.md",
    "docs/gpu-kernels.md",
    "docs/gpu-benchmarks.md",
    "docs/predict.md",
    "docs/study.md",
    "docs/temporal.md",
)
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLES = networks.TABLES | layers.TABLES | study.TABLES | temporal.TABLES


def rendered(text: str) -> str:
    """``text`` with every table as the results say."""
    return _BLOCK.sub(lambda match: match[1] + "\n" + _TABLES[match[2]]() + "\n" + match[3], text)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for name in _FILES:
        path = ROOT / name
        text = path.read_text()
        if rendered(text) != text:
            stale.append(name)
            if not options.check:
                path.write_text(rendered(text))
    print(("stale: " if options.check else "rewritten: ") + (", ".join(stale) or "none"))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
