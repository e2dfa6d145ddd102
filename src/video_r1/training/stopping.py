"""A run that is told to stop: the step is finished, a checkpoint written, and the command ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from video_r1.processes import gather, process_index
from video_r1.signals import Interrupted, told_of_signals
from video_r1.training.checkpoints import last_whole_checkpoint

# Seconds in which a launcher passes on the Ctrl-C that the terminal has sent to all processes.
SAME_PRESS = 1.0


class StopWhenAsked(TrainerCallback):
    """On Ctrl-C or SIGTERM, ends training with a checkpoint after the present step: in all processes after
    the same one, whichever of them the signal has reached. A second Ctrl-C ends it at once. (A checkpoint
    amid a step could not be continued exactly.)

    every: a checkpoint is possible after so many steps (num_iterations: updates on the same rollouts).
    """

    def __init__(self, folder: Path, every: int = 1) -> None:
        self.folder = folder
        self.every = every
        self.number: int | None = None
        self.asked_at = self.begun_at = 0.0
        self.step_seconds = 0.0
        self.stopping = self.saved = False

    @contextmanager
    def listening(self, ended: Callable[[], Any]) -> Iterator[None]:
        """For the time of the training. Raises Interrupted where it was stopped; `ended` lets trackers
        and the progress bar know, unless it has to be at once.
        """
        self.number, self.stopping, self.saved = None, False, False
        with told_of_signals(self.ask):
            try:
                yield
            except Interrupted:
                if self.saved:
                    ended()
                raise
            if self.stopping:  # without a checkpoint, as save_strategy best may want it
                raise self.interrupted()

    def ask(self, number: int) -> None:
        """What a signal does."""
        now = time.monotonic()
        if self.number is None:
            self.number, self.asked_at = number, now
            took = f" (the one before took {self.step_seconds:.0f} s)" if self.step_seconds else ""
            say(
                f"{signal.Signals(number).name}: this step is finished{took} and a checkpoint written; "
                "Ctrl-C once more ends the run at once"
            )
        elif number == signal.SIGINT and now - self.asked_at >= SAME_PRESS * ("LOCAL_RANK" in os.environ):
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        checkpoint = last_whole_checkpoint(self.folder)
        saved = f"{checkpoint} is the last checkpoint" if checkpoint else "there is no checkpoint yet"
        return Interrupted(self.number or signal.SIGTERM, saved)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.begun_at = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.step_seconds = time.monotonic() - self.begun_at
        told = [number for number in gather(self.number) if number is not None]
        if told and state.global_step % self.every == 0:
            self.number, self.stopping = max(told), True
            control.should_log = control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if self.stopping:
            self.saved = True
            raise self.interrupted()


def say(text: str) -> None:
    """Writes a line to standard error from a signal's handler, which may have interrupted a print."""
    if process_index() == 0:
        os.write(2, f"\nvideo-r1: {text}\n".encode())
