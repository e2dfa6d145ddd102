"""Variants of the temporal rules that the experiment compares and the package does not have.

`with variant("likelihood"):` puts one in the place of `likelihood_gate`; all but `gate-floor` are without its
floor. Δ_i and d_it: rewards/temporal.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from video_r1.data.rollouts import RolloutGroup
from video_r1.rewards import temporal
from video_r1.settings.training import TGRPOSettings
from video_r1.training import tgrpo
from video_r1.training.callbacks import TaskMoments

KEY_SHARES = {"gate-tenth": 10, "gate-all": 1}
"""A gate reads one token in so many, those that drop most; by default one in five."""
_credit, _gate = tgrpo.credit, temporal.RULES["likelihood_gate"]


def likelihood(group: RolloutGroup, accuracy: Tensor, correct: Tensor, settings: TGRPOSettings) -> Tensor:
    """r_t = α·(1 − exp(−Δ_i)) if Δ_i > 0, else 0, for a correct completion: the share of its tokens'
    probability that the contrast clip takes away.
    """
    if group.drops is None:
        return torch.zeros(len(correct))
    return settings.alpha * correct.float() * -torch.expm1(-group.drops.clamp(min=0.0)).float()


def apart(
    groups: Sequence[RolloutGroup], settings: TGRPOSettings, moments: TaskMoments | None = None
) -> None:
    """A + (b − mean(b)) with the advantages A of the rewards without the bonus b: the group's deviation can
    neither cancel b nor enlarge it.
    """
    _credit(groups, settings, moments)
    for group in groups:
        assert group.base_advantages is not None and group.base_reward is not None
        bonus = group.total_reward - group.base_reward
        group.advantages = group.base_advantages + bonus - bonus.mean()


@contextmanager
def variant(rule: str) -> Iterator[None]:
    """Make the temporal rule `likelihood_gate` the experiment's rule of this name."""
    with ExitStack() as changes:
        if rule != "gate-floor":  # the package's
            scored = replace(_gate, floor=temporal.TemporalRule.floor)
            if rule == "likelihood" or rule.startswith("apart-"):
                scored = replace(scored, reward=likelihood)
            changes.enter_context(patch.dict(temporal.RULES, likelihood_gate=scored))
        if rule == "gate-apart" or rule.startswith("apart-"):
            changes.enter_context(patch.object(tgrpo, "credit", apart))
        if rule in KEY_SHARES:
            changes.enter_context(patch.object(temporal, "KEY_SHARE", KEY_SHARES[rule]))
        yield
