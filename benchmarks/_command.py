"""The command line that all benchmarks share."""

from __future__ import annotations

import argparse


def benchmark_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser with `--json`; `about`: the benchmark's module docstring, its help."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the default)")
    return parser
