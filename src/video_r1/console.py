"""Terminal output of a command: progress bars, tables, colours, this package's warnings.

Where standard error is no terminal (a log file, a pipe), progress is plain lines, and the bars of other
libraries are off.
"""

import atexit
import functools
import io
import logging
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TextIO

from video_r1.errors import without_secrets

SECONDS_BETWEEN_LINES = 10.0
COLUMNS = 80  # of a plain line
BARS_OFF = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Environment variables that turn bars off. The first also turns off transformers' ("Loading weights")."""
NOISE = {"bitsandbytes.backends.cpu.ops": "kernels", "DeepSpeed": "Setting accelerator to"}
"""Loggers of libraries that comment on a machine without a GPU, and a word of the comment to suppress."""


class Progress(AbstractContextManager):
    """Progress of long work on standard error: how much is done, its rate and the time left.

    On a terminal this is a bar. Elsewhere it is a plain line about every 10 seconds and one at the end; a
    line of more than 80 columns is folded. quiet: write nothing. done: units of an earlier run, which do not
    count for the rate. slow: always show seconds a unit instead of units a second.

        with Progress(1200, "training", "steps") as bar:
            bar.update(loss=0.31)
    """

    def __init__(
        self, total: int, description: str, unit: str, quiet: bool = False, done: int = 0, slow: bool = False
    ) -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, done
        self._before, self._slow, self._quiet, self._closed = done, slow, quiet, False
        self._started = self._last_line = time.monotonic()
        self._figures: list[str] = []
        self._bar = _terminal_bar() if sys.stderr.isatty() and not quiet else None
        if self._bar is not None:
            self._task = self._bar.add_task(f"{description}:", total=total, completed=done, line=self._rows())

    def update(self, count: int = 1, **figures: Any) -> None:
        """Add `count` finished units; show `figures` (loss=0.3) after the rate."""
        self.done += count
        if figures:
            self._figures = [f"{name} {value}" for name, value in figures.items()]
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, line=self._rows())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def close(self) -> None:
        """End the bar, or print the last line. A second call does nothing."""
        if not self._closed:
            self._closed = True
            if self._bar is not None:
                self._bar.stop()
            else:
                self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        if not self._quiet:
            parts = (part.replace(" ", "\xa0") for part in self._parts())  # folded between parts
            line = textwrap.fill(
                f"{self.description}: {', '.join(parts)}",
                COLUMNS,
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
            print(line.replace("\xa0", " "), file=sys.stderr, flush=True)

    def _rows(self) -> str:
        parts = self._parts()
        return "\n".join(", ".join(row) for row in (parts[:3], parts[3:]) if row)

    def _parts(self) -> list[str]:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._before) / elapsed
        left = self.total - self.done
        going = left > 0 and rate > 0 and not self._closed
        when = f"{_clock(left / rate)} left" if going else f"{_clock(elapsed)} taken"
        count = f"{self.done}/{self.total}"
        if self._slow and rate:
            return [count, f"{1 / rate:.1f} s/{self.unit.removesuffix('s')}", when, *self._figures]
        speed = f"{rate:.2f} {self.unit}/s" if rate >= 0.1 or not rate else f"{1 / rate:.1f} s each"
        return [f"{count} {self.unit}", speed, when, *self._figures]

    def __exit__(self, *error: object) -> None:
        self.close()


@functools.cache
def _terminal() -> Any:
    """Return the console of standard error; what is printed on it stands above the bars."""
    from rich.console import Console

    return Console(stderr=True)


def _terminal_bar() -> Any:
    """Start rich's display of tasks that have a field `line`."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        TaskProgressColumn(),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[line]}", markup=False, table_column=Column(ratio=1, overflow="fold")),
        console=_terminal(),
        refresh_per_second=4,
        redirect_stdout=False,  # a process forked meanwhile would write through a lock that the bar's
        redirect_stderr=False,  # thread may hold
    )
    bar.start()
    atexit.register(bar.stop)  # restores the cursor after an error too
    return bar


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
    if not any(isinstance(handler, Warnings) for handler in own.handlers):
        own.addHandler(Warnings(logging.WARNING))


class Warnings(logging.Handler):
    """Handler that prints this package's warnings on standard error, on a terminal above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if any(getattr(other, "stream", None) is sys.stderr for other in logging.getLogger().handlers):
            return  # a library (wandb, for one) has set up logging, and prints it
        message = without_secrets(record.getMessage())
        if not sys.stderr.isatty():
            print(message, file=sys.stderr, flush=True)
            return
        from rich.text import Text

        _terminal().print(Text(message, style="yellow"), soft_wrap=True)


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
        grid.add_column(Text(name), justify="right" if grid.columns and not words else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=10_000, force_terminal=sys.stdout.isatty()).print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def show(text: str, styles: dict[str, str], stream: TextIO) -> None:
    """Print the text; on a terminal, style the matches of the regular expressions in `styles`."""
    if not stream.isatty():
        print(text, file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    for pattern, style in styles.items():
        styled.highlight_regex(pattern, style)
    Console(file=stream).print(styled, soft_wrap=True)
