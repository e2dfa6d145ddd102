"""An engine that says what a test wants it to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.data.tools import Asked
from video_r1.rollout.engine import Counts, Groups, OnToken, Prompts, RolloutEngine, SamplingSettings
from video_r1.rollout.episodes import Episode, ToolEngine


def rollout(text: str, tokens: int = 3) -> Rollout:
    return Rollout(torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens), text, "stop")


class ScriptedEngine(RolloutEngine):
    """`says`: the completions of a prompt, given how many are wanted. Each of them has as many tokens as
    `tokens` says of its prompt. Interrupts the run in place of a call after so many `calls`."""

    has_own_weights = True

    def __init__(
        self,
        says: Callable[[Prompt, int], Sequence[str]],
        calls: int = 1000,
        tokens: Callable[[Prompt], int] = lambda prompt: 3,
    ) -> None:
        self.says, self.calls_left, self.tokens, self.closed = says, calls, tokens, False
        self.prompts: list[Prompt] = []
        self.sampled: list[SamplingSettings] = []

    @property
    def seeds(self) -> list[Any]:
        return [sampling.seed for sampling in self.sampled]

    def sample(
        self, prompts: Prompts, sampling: SamplingSettings, counts: Counts = None, on_token: OnToken = None
    ) -> Groups:
        assert counts is None  # an evaluation asks for `sampling.n` completions of every prompt
        if self.calls_left == 0:
            raise KeyboardInterrupt
        self.calls_left -= 1
        self.prompts += prompts
        self.sampled.append(sampling)
        return [
            [rollout(text, self.tokens(prompt)) for text in self.says(prompt, sampling.n)]
            for prompt in prompts
        ]

    def close(self) -> None:
        self.closed = True


class Forced(ToolEngine):
    """Calls look, whatever the policy wrote: answer g of a question in its first `g % 3` turns."""

    def _calls(self, episode: Episode) -> bool:
        number = int(episode.seed.rpartition("/")[2])
        turns, episode.left = len(episode.rollout.turns), 6
        episode.calls = [Asked("look", {"start": turns + number % 2, "end": turns + 2 + number})]
        return turns < number % 3
