"""Terminal output of a command: progress, tables, this package's warnings.

Where standard error is no terminal (a log file, a pipe), progress is plain lines, and the bars of other
libraries are off.
"""

import io
import logging
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from video_r1.errors import without_secrets

SECONDS_BETWEEN_LINES = 10.0
SECONDS_ON_TERMINAL = 0.2
CLEAR_LINE = "\r\x1b[K"
COLUMNS = 80  # of a plain line
BARS_OFF = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Environment variables that turn bars off. The first also turns off transformers' ("Loading weights")."""
NOISE = {"bitsandbytes.backends.cpu.ops": "kernels", "DeepSpeed": "Setting accelerator to"}
"""Loggers of libraries that comment on a machine without a GPU, and a word of the comment to suppress."""


# Control characters but tab and newline, marks that turn the direction of text, halves of surrogate pairs.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_STYLE = re.compile("(\x1b\\[[01]m)")  # of the heads of tables on a terminal


def printable(text: str) -> str:
    r"""Return the text with escapes in place of characters that a terminal would obey.

    >>> print(printable("clip\x1b]0;title\x07.mp4"))
    clip\x1b]0;title\x07.mp4
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _Printed:
    """Standard output whose text is `printable`: much of it comes from manifests, servers and models."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        parts = _STYLE.split(text) if self._stream.isatty() else [text]
        self._stream.write("".join(part if _STYLE.fullmatch(part) else printable(part) for part in parts))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Print only printable text on standard output inside the block."""
    before, sys.stdout = sys.stdout, _Printed(sys.stdout)
    try:
        yield
    finally:
        sys.stdout = before


class Progress(AbstractContextManager):
    """Progress of long work on standard error: how much is done, its rate and the time left.

    On a terminal this is one line that is rewritten. Elsewhere it is a plain line about every 10 seconds, and
    one at the end. quiet: write nothing. done: units of an earlier run, which do not count for the rate.

        with Progress(1200, "training", "steps") as progress:
            progress.update(loss=0.31)
    """

    def __init__(self, total: int, description: str, unit: str, quiet: bool = False, done: int = 0) -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, done
        self._before, self._quiet = done, quiet
        self._started = self._last_line = time.monotonic()
        self._figures: list[str] = []
        if sys.stderr.isatty():
            self._print_line()

    def update(self, count: int = 1, **figures: Any) -> None:
        """Add `count` finished units; show `figures` (loss=0.3) after the rate."""
        self.done += count
        if figures:
            self._figures = [f"{name} {value}" for name, value in figures.items()]
        pause = SECONDS_ON_TERMINAL if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
        if time.monotonic() - self._last_line >= pause:
            self._print_line()

    def close(self) -> None:
        """Print the last line."""
        self._print_line(last=True)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _print_line(self, last: bool = False) -> None:
        self._last_line = now = time.monotonic()
        if self._quiet:
            return
        elapsed = max(now - self._started, 1e-9)
        rate = (self.done - self._before) / elapsed
        left = self.total - self.done
        going = left > 0 and rate > 0 and not last
        when = f"{_clock(left / rate)} left" if going else f"{_clock(elapsed)} taken"
        if 0 < rate < 1:
            speed = f"{1 / rate:.1f} s/{self.unit.removesuffix('s')}"
        else:
            speed = f"{rate:.2f} {self.unit}/s"
        parts = [f"{self.done}/{self.total}", speed, when, *self._figures]
        line = f"{self.description}: {', '.join(parts)}"
        if sys.stderr.isatty() and not last:
            shown = printable(line)[: shutil.get_terminal_size().columns - 1]
            print(f"{CLEAR_LINE}{shown}", end="", file=sys.stderr, flush=True)
        else:
            tell(textwrap.fill(line, COLUMNS, subsequent_indent="  ", break_on_hyphens=False))


def tell(text: str) -> None:
    """Print text on standard error, on a terminal in place of the line of progress."""
    print(f"{CLEAR_LINE if sys.stderr.isatty() else ''}{printable(text)}", file=sys.stderr, flush=True)


def tidy_output() -> None:
    """Set up a command's output, before libraries are imported: print this package's warnings, suppress NOISE
    and, where standard error is no terminal, other libraries' bars. Variables that are set stay as they are.
    """
    if not sys.stderr.isatty():
        for name in BARS_OFF:
            os.environ.setdefault(name, "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns where no parameter is unused
    for name, word in NOISE.items():
        library = logging.getLogger(name)
        if not library.filters:
            library.addFilter(lambda record, word=word: word not in record.getMessage())
    own = logging.getLogger(__package__)
    if not own.handlers:
        own.addHandler(Warnings(logging.WARNING))


class Warnings(logging.Handler):
    """Handler that prints this package's warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        if any(getattr(other, "stream", None) is sys.stderr for other in logging.getLogger().handlers):
            return  # a library (wandb, for one) has set up logging, and prints it
        tell(without_secrets(record.getMessage()))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """Format an aligned table: first column left, the others right (left if `words`)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        grid.add_column(
            Text(printable(name)), justify="right" if grid.columns and not words else "left", no_wrap=True
        )
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    text = io.StringIO()
    Console(file=text, width=10_000, force_terminal=sys.stdout.isatty()).print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
