"""Credit ledger: what each reward term did to the advantages of a step.

    share_k = Σ|A − A₋ₖ| ÷ Σ(|A| + |A₋ₖ|)      A₋ₖ: advantages of the rewards without term k
    sign_k  = corr(A − A₋ₖ, c)                 c: 1 for a correct completion of a group, 0 for another

Both sums and the correlation are over all completions of the step. share is 0 for a term that moved nothing
and 1 for one that moved everything. sign is below 0 for a term that pays wrong answers.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from statistics import fmean

from torch import Tensor

from video_r1.files import warn_once

STEPS = 20  # that a warning looks back on
NOTHING, AGAINST = 0.01, -0.2  # a smaller mean share; a smaller mean sign


class Ledger:
    """Shares and signs of the last steps, and warnings of terms that do nothing or pay wrong answers."""

    def __init__(self) -> None:
        self.shares: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=STEPS))
        self.signs: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=STEPS))

    def add(
        self, advantages: Tensor, without: Mapping[str, Tensor], correct: Tensor, varies: Mapping[str, bool]
    ) -> dict[str, float]:
        """Return a step's series `credit/<term>` and `credit_sign/<term>`.

        advantages, without: [Q, G] of all ranks. correct: [Q, G] bool. varies: whether a term's rewards
        differ within any group. Warns once of each term that did nothing, or paid wrong answers, in 20 steps.
        """
        series = {}
        for name, others in without.items():
            moved, size = (advantages - others).double(), (advantages.abs() + others.abs()).double().sum()
            share = float(moved.abs().sum() / size) if size > 0 else 0.0
            self.shares[name].append(share)
            series[f"credit/{name}"] = share
            right = correct.double() - correct.double().mean(dim=1, keepdim=True)
            norms = float((moved.square().sum() * right.square().sum()).sqrt())
            if norms > 1e-9:
                series[f"credit_sign/{name}"] = sign = float((moved * right).sum()) / norms
                self.signs[name].append(sign)
            self._warn(name, varies[name])
        return series

    def _warn(self, name: str, varies: bool) -> None:
        shares, signs = self.shares[name], self.signs[name]
        if len(shares) == STEPS and fmean(shares) < NOTHING:
            why = (
                "it cancels: see 'When the temporal reward cancels' in docs/t-grpo.md, and scale_rewards"
                if varies
                else "all answers to a question earn the same of it"
            )
            warn_once(f"reward {name} moved {fmean(shares):.1%} of the advantages in {STEPS} steps: {why}")
        if len(signs) == STEPS and fmean(signs) < AGAINST and fmean(shares) >= NOTHING:
            warn_once(
                f"reward {name} works against accuracy: the correlation of its credit with right answers is "
                f"{fmean(signs):.2f} over {STEPS} steps; lower its weight, or read its answers in the report"
            )
