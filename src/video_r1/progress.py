"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import atexit
import sys
import time
from contextlib import AbstractContextManager
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 10.0


class Progress(AbstractContextManager):
    """Shows how far long work has come, with its rate and the time left.

    On a terminal this is a bar; elsewhere (a log file, a pipe) it is a plain line about every 10 seconds and
    one at the end. It writes to standard error unless `stream` is given; `quiet`, it writes nothing.

        with Progress(1200, "training", "steps") as bar:
            bar.update(loss=0.31)
    """

    def __init__(
        self, total: int, description: str, unit: str, stream: TextIO | None = None, quiet: bool = False
    ) -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, 0
        self._stream = stream or sys.stderr
        self._started = self._last_line = time.monotonic()
        self._note = ""
        self._closed, self._quiet = False, quiet
        self._bar = _terminal_bar(self._stream) if self._stream.isatty() and not quiet else None
        if self._bar is not None:
            self._task = self._bar.add_task(f"{description}:", total=total, line=self._line())

    def update(self, count: int = 1, **figures: Any) -> None:
        """Adds `count` finished units; `figures` (loss=0.3) stand behind the rate."""
        self.done += count
        if figures:
            self._note = ", ".join(f"{name} {value}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, line=self._line())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def close(self) -> None:
        """Ends the bar, or prints the last line. Calling it twice does nothing more."""
        if not self._closed:
            self._closed = True
            if self._bar is not None:
                self._bar.stop()
            else:
                self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        if self._quiet:
            return
        print(f"{self.description}: {self._line()}", file=self._stream, flush=True)

    def _line(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = self.done / elapsed
        left = self.total - self.done
        going = left > 0 and rate > 0 and not self._closed
        when = f"{_clock(left / rate)} left" if going else f"{_clock(elapsed)} taken"
        speed = f"{rate:.2f} {self.unit}/s" if rate >= 0.1 or not rate else f"{1 / rate:.1f} s each"
        note = f", {self._note}" if self._note else ""
        return f"{self.done}/{self.total} {self.unit}, {speed}, {when}{note}"

    def __exit__(self, *error: object) -> None:
        self.close()


def _terminal_bar(stream: TextIO) -> Any:
    """rich's display of a task, with a field `line`; it has been started."""
    from rich import progress
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn

    bar = progress.Progress(
        TextColumn("{task.description}", markup=False),
        TaskProgressColumn(),
        BarColumn(),
        TextColumn("{task.fields[line]}", markup=False),
        console=Console(file=stream),
        refresh_per_second=4,
        redirect_stdout=False,  # what goes to a file stays there, and no process that is forked meanwhile
        redirect_stderr=False,  # writes through a lock that the bar's thread may hold
    )
    bar.start()
    atexit.register(bar.stop)  # the cursor comes back after an error too
    return bar


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
