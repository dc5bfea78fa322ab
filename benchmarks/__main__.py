"""The command line: `python -m benchmarks` measures everything, `--quick` holds the main ratios to their floors."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    """Returns the exit code: 1 if a ratio is under its floor."""
    # Imported here, since each load generator's process imports this module.
    from rich.console import Console

    from benchmarks import report

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only the main ratios, in under a minute; fails under their floors",
    )
    parser.add_argument(
        "--only", metavar="PART", choices=report.PARTS, help=f"only one of {', '.join(report.PARTS)}"
    )
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    return (
        report.quick(console)
        if options.quick
        else report.full(console, [options.only] if options.only else [*report.PARTS])
    )


if __name__ == "__main__":
    sys.exit(main())
