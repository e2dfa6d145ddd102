"""Credit ledger: what each reward term did to the advantages of a step.

    share_k = Σ|A − A₋ₖ| ÷ Σ(|A| + |A₋ₖ|)      A₋ₖ: advantages of the rewards without term k
    sign_k  = corr(A − A₋ₖ, c)                 c: 1 for a correct completion of a group, 0 for another

Both sums and the correlation are over all completions of the step. share is 0 for a term that moved nothing
and 1 for one that moved everything. sign is below 0 for a term that pays wrong answers.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Mapping
from statistics import fmean

from torch import Tensor

from video_r1.processes import process_index

logger = logging.getLogger(__name__)
STEPS = 20  # that a warning looks back on
NOTHING, AGAINST = 0.01, -0.2  # a smaller mean share; a smaller mean sign


class Ledger:
    """Shares and signs of the last steps, and warnings of terms that do nothing or pay wrong answers."""

    def __init__(self) -> None:
        self.shares: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=STEPS))
        self.signs: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=STEPS))
        self.warned: set[str] = set()

    def add(
        self,
        advantages: Tensor,
        without: Mapping[str, Tensor],
        correct: Tensor,
        varies: Mapping[str, bool],
        gated: bool = False,
    ) -> dict[str, float]:
        """Return a step's series `credit/<term>` and `credit_sign/<term>`.

        advantages, without: [Q, G] of all ranks. correct: [Q, G] bool. varies: whether a term's rewards
        differ within any group. gated: `temporal` is a gate. Its sign is below 0 by design: it takes from
        right answers, but never makes them worth less than wrong ones. Warns once of each term that did
        nothing, or paid wrong answers, in 20 steps.
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
                if not (gated and name == "temporal"):
                    self.signs[name].append(sign)
            if name not in self.warned and (said := self._problem(name, varies[name])) is not None:
                self.warned.add(name)
                if process_index() == 0:
                    logger.warning("reward %s %s", name, said)
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
