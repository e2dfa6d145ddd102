"""Variants of the temporal rules that the experiment compares and the package does not have.

`with variant("likelihood"):` puts one in the place of `likelihood_gate`. They have the statistic of the runs
in results.json.gz, the mean of the largest fifth of a completion's d_t (`key_drops`), and no floor. (The runs
of `gate-floor` had 0.1 added to the deviation of every group.) d_it: rewards/temporal.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from video_r1.data.rollouts import Correct, Group, Rewards, Rollouts
from video_r1.rewards import temporal
from video_r1.rewards.temporal import TemporalRule
from video_r1.settings.training import TGRPOSettings
from video_r1.training import tgrpo
from video_r1.training.advantages import TaskMoments

KEY_SHARES = {"gate-tenth": 10, "gate-all": 1}
"""A gate reads one token in so many, those that drop most; by default one in five."""
_advantages = tgrpo.advantages


def key_drops(token_contrasts: Sequence[Tensor], share: int = 5) -> Tensor:
    """[G] float32: the mean of the largest ⌈L/share⌉ of each completion's drops d_t [L], in nats."""
    largest = (drops.sort(descending=True).values[: -(-len(drops) // share)] for drops in token_contrasts)
    return torch.stack([drops.sum() / max(1, len(drops)) for drops in largest])


def likelihood(rollouts: Rollouts, correct: Correct, settings: TGRPOSettings) -> Tensor:
    """r_t = α·(1 − exp(−Δ_i)) if Δ_i > 0, else 0, for a correct completion, Δ_i the mean of all d_t: the
    share of its tokens' probability that the contrast clip takes away.
    """
    if rollouts.token_contrasts is None:
        return torch.zeros(len(correct.ordered))
    mean = key_drops(rollouts.token_contrasts, share=1)
    return settings.alpha * correct.ordered.float() * -torch.expm1(-mean.clamp(min=0.0)).float()


def key_gate(share: int, rollouts: Rollouts, correct: Correct, settings: TGRPOSettings) -> Tensor:
    """1 − α·exp(−Δ_i) with the statistic `key_drops`; 1 − α for a wrong completion, which earns 0 anyway."""
    if rollouts.token_contrasts is None:
        return torch.ones(len(correct.ordered))
    kept = torch.exp(-key_drops(rollouts.token_contrasts, share).clamp(min=0.0))
    return 1.0 - settings.alpha * torch.where(correct.ordered, kept, torch.ones_like(kept))


def apart(
    rollouts: Sequence[Rollouts],
    rewards: Sequence[Rewards],
    settings: TGRPOSettings,
    moments: TaskMoments | None = None,
) -> list[Group]:
    """A + (b − mean(b)) with the advantages A of the rewards without the bonus b: the group's deviation can
    neither cancel b nor enlarge it.
    """
    groups = []
    for group in _advantages(rollouts, rewards, settings, moments):
        bonus = group.rewards.total - group.rewards.base
        groups.append(replace(group, advantages=group.advantages_without["temporal"] + bonus - bonus.mean()))
    return groups


@contextmanager
def variant(rule: str) -> Iterator[None]:
    """Make the temporal rule `likelihood_gate` the experiment's rule of this name."""
    if rule == "likelihood" or rule.startswith("apart-"):
        changed = TemporalRule("scored", bonus=likelihood)
    else:
        gate = partial(key_gate, KEY_SHARES.get(rule, 5))
        changed = TemporalRule("scored", gate=gate, floor=0.1 if rule == "gate-floor" else 0.0)
    with ExitStack() as changes:
        changes.enter_context(patch.dict(temporal.RULES, likelihood_gate=changed))
        if rule == "gate-apart" or rule.startswith("apart-"):
            changes.enter_context(patch.object(tgrpo, "advantages", apart))
        yield
