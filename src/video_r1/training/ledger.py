"""Credit ledger: what each reward term did to the advantages of a step.

    share_k = Σ|A − A₋ₖ| ÷ Σ(|A| + |A₋ₖ|)      A₋ₖ: advantages of the rewards without term k
    sign_k  = corr(A − A₋ₖ, c)                 c: 1 for a correct completion of a group, 0 for another

Both sums and the correlation are over all completions of the step. share is 0 for a term that moved nothing
and 1 for one that moved everything. sign is below 0 for a term that pays wrong answers.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import chain
from statistics import fmean

import torch

from video_r1.data.rollouts import Group
from video_r1.processes import gather_lists, process_index
from video_r1.training.advantages import without_variance

logger = logging.getLogger(__name__)
STEPS = 20  # that a warning looks back on
NOTHING, AGAINST = 0.01, -0.2  # a smaller mean share; a smaller mean sign


class Ledger:
    """Shares and signs of the last steps, and warnings of terms that do nothing or pay wrong answers."""

    def __init__(self) -> None:
        self.shares: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=STEPS))
        self.signs: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=STEPS))
        self.warned: set[str] = set()

    def add(self, groups: Sequence[Group], gated: bool = False) -> dict[str, float]:
        """Return a step's series `credit/<term>` and `credit_sign/<term>`. Every rank calls it.

        gated: `temporal` is a gate. Its sign is below 0 by design: it takes from right answers, but never
        makes them worth less than wrong ones. Warns once of each term that did nothing, or paid wrong
        answers, in 20 steps.
        """
        mine = [
            (
                group.advantages,
                group.advantages_without,
                group.rewards.correct.ordered,
                {
                    name: not bool(without_variance((group.rewards.total - without)[None]))
                    for name, without in group.rewards.without.items()
                },
            )
            for group in groups
        ]
        all_advantages, parts, right, varying = zip(*gather_lists(mine)[0], strict=True)
        advantages, correct = torch.stack(all_advantages), torch.stack(right).double()
        right_minus_mean = correct - correct.mean(dim=1, keepdim=True)
        series = {}
        for name in dict.fromkeys(chain(*parts)):
            without = [part.get(name, whole) for part, whole in zip(parts, all_advantages, strict=True)]
            others = torch.stack(without)
            moved, size = (advantages - others).double(), (advantages.abs() + others.abs()).double().sum()
            share = float(moved.abs().sum() / size) if size > 0 else 0.0
            self.shares[name].append(share)
            series[f"credit/{name}"] = share
            norms = float((moved.square().sum() * right_minus_mean.square().sum()).sqrt())
            if norms > 1e-9:
                series[f"credit_sign/{name}"] = sign = float((moved * right_minus_mean).sum()) / norms
                if not (gated and name == "temporal"):
                    self.signs[name].append(sign)
            varies = any(own.get(name, False) for own in varying)
            if name not in self.warned and (problem := self._problem(name, varies)) is not None:
                self.warned.add(name)
                if process_index() == 0:
                    logger.warning("reward %s %s", name, problem)
        return series

    def _problem(self, name: str, varies: bool) -> str | None:
        shares, signs = self.shares[name], self.signs[name]
        if len(shares) == STEPS and fmean(shares) < NOTHING:
            why = "it cancels (docs/t-grpo.md)" if varies else "all answers to a question earn the same of it"
            return f"moved {fmean(shares):.1%} of the advantages in {STEPS} steps: {why}"
        if len(signs) == STEPS and fmean(signs) < AGAINST:
            agreement = f"its credit and right answers correlate by {fmean(signs):.2f} over {STEPS} steps"
            return f"works against accuracy: {agreement}; lower its weight, or read its answers in the report"
        return None
