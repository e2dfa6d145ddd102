"""Records of a question's sampled completions and their rewards."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled completion of L tokens."""

    token_ids: Tensor  # [L] int64
    logprobs: Tensor  # [L] float32, of the sampler
    text: str
    finish_reason: Literal["stop", "length"]


@dataclass(slots=True)
class RolloutGroup:
    """Rollouts of a question (G ordered, G_s shuffled), their rewards and advantages.

    Rewards are unweighted terms by name ("accuracy", "format", "temporal", "length", …); advantages are
    computed from their weighted sum, `total_reward`. Only the ordered completions are trained on; the
    shuffled ones measure the share of correct answers without the frame order. `base_reward` and
    `base_advantages` leave the temporal term out, to show its effect.
    """

    sample: Sample
    # fmt: off
    prompt: Prompt                      # the ordered prompt
    ordered: list[Rollout]              # G
    shuffled_prompt: Prompt | None      # None: an image, or no temporal reward
    shuffled: list[Rollout]             # G_s, empty where shuffled_prompt is None
    rewards: dict[str, Tensor]          # each term [G] float32, of the ordered completions
    total_reward: Tensor                # [G] float32
    advantages: Tensor                  # [G] float32
    shuffled_rewards: dict[str, Tensor] = field(default_factory=dict)  # each term [G_s] float32
    p: float = float("nan")             # share of correct ordered completions
    p_shuffled: float | None = None     # share of correct shuffled completions; None: not sampled
    token_drops: list[Tensor] | None = None  # G of [L] float32, nats that each token loses with the contrast
    base_reward: Tensor | None = None   # [G] float32; None as `base_advantages`: nothing was compared yet
    base_advantages: Tensor | None = None  # [G] float32
    # fmt: on

    @property
    def margin(self) -> float | None:
        """p − p̃; None where no contrast was sampled."""
        return None if self.p_shuffled is None else self.p - self.p_shuffled

    @property
    def drops(self) -> Tensor | None:
        """[G] float32, nats a token that each response loses with the contrast; None: not asked."""
        if self.token_drops is None:
            return None
        return torch.stack([drops.sum() / max(1, len(drops)) for drops in self.token_drops])
