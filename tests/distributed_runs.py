"""Runs of two processes by the command line, killed and started again; see test_distributed_runs.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distributed_process import SERVER, exit_codes, last_words, start_processes
from distributed_work import let_accelerate_shard_on_cpu
from resume_runs import command, wait_for_phase


def command_line(folder: Path, words: list[str], phases: Any) -> None:
    """One process's `video-r1 WORDS`, which says in `phases` what it is at (see resume_runs.PHASES)."""
    let_accelerate_shard_on_cpu()
    rank = int(os.environ.get("RANK", "0"))
    command(words, str(folder / f"process-{rank}.log"), phases[rank])


class Run:
    """`video-r1 rl RECIPE --output_dir RUN` in `count` processes."""

    def __init__(
        self,
        recipe: Path,
        run: Path,
        environment: dict[str, str],
        count: int = 2,
        work: str = "distributed_runs:command_line",
    ) -> None:
        self.phases = [SERVER.Value("i", 0) for _ in range(count)]
        words = ["rl", str(recipe), "--output_dir", str(run)]
        run.mkdir(exist_ok=True)
        self.processes, self.logs = start_processes(
            count, work, run, words, self.phases, environment=environment
        )
        for process, phase in zip(self.processes, self.phases, strict=True):
            process.phase = phase

    def kill(self, phase: str, ranks: tuple[int, ...], times: int = 1) -> list[int | None]:
        """kill -9 of these processes when the first of them is at that work for the `times`th time.

        Returns how each process ended; None for one that did not within a minute.
        """
        first = self.processes[ranks[0]]
        for _ in range(times):
            wait_for_phase(phase, first)
            if times > 1:
                wait_for_phase("between", first)
        assert first.is_alive(), last_words(self.logs)
        for rank in ranks:
            self.processes[rank].kill()
        return exit_codes(self.processes, 60)

    def finish(self, limit: float = 240) -> None:
        codes = exit_codes(self.processes, limit)
        assert codes == [0] * len(codes), f"exit codes {codes} (None: it hung)\n{last_words(self.logs)}"
