"""Ctrl-C and SIGTERM end a run with a checkpoint."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from video_r1.processes import Interrupted, gather, process_index, told_of_signals
from video_r1.training.checkpoints import last_whole_checkpoint

SAME_PRESS = 1.0  # seconds; a launcher passes on the Ctrl-C that the terminal has sent to all processes


class StopWhenAsked(TrainerCallback):
    """On Ctrl-C or SIGTERM, ends training with a checkpoint after the current step, on all ranks after the
    same step even if only one rank got the signal. A second Ctrl-C ends it at once.

    every: a checkpoint is possible after this many steps (num_iterations: updates on the same rollouts).
    """

    def __init__(self, folder: Path, every: int = 1) -> None:
        self.folder = folder
        self.every = every
        self.number: int | None = None
        self.asked_at = 0.0
        self.stopping = self.saved = False

    @contextmanager
    def listening(self, ended: Callable[[], Any]) -> Iterator[None]:
        """Handle signals during training; raise Interrupted if it was stopped. `ended` informs trackers."""
        self.number, self.stopping, self.saved = None, False, False
        with told_of_signals(self.ask):
            try:
                yield
            except Interrupted:
                if self.saved:
                    ended()
                raise
            if self.stopping:  # without a checkpoint, with save_strategy best for example
                raise self.interrupted()

    def ask(self, number: int) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self.asked_at = number, now
            say(
                f"{signal.Signals(number).name}: finishing this step, then saving a checkpoint; press Ctrl-C "
                "again to stop at once"
            )
        elif number == signal.SIGINT and now - self.asked_at >= SAME_PRESS * ("LOCAL_RANK" in os.environ):
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        checkpoint = last_whole_checkpoint(self.folder)
        saved = f"{checkpoint} is the last checkpoint" if checkpoint else "there is no checkpoint yet"
        return Interrupted(self.number or signal.SIGTERM, saved)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        told = [number for number in gather(self.number) if number is not None]
        if told and state.global_step % self.every == 0:
            self.number, self.stopping = max(told), True
            control.should_log = control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if self.stopping:
            self.saved = True
            raise self.interrupted()


def say(text: str) -> None:
    """Write a line to standard error from a signal handler, which may have interrupted a print."""
    if process_index() == 0:
        os.write(2, f"\nvideo-r1: {text}\n".encode())
