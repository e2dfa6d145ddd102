"""Groups that teach nothing give their places in a step to further questions (DAPO, arXiv 2503.14476).

    a step's questions ─► groups ─► those of equal rewards ─► further questions for their places ─► groups …

until every place has a group with variance or the rounds are used up; a place that is still without one keeps
its own question. Which question comes next for a place follows from the place and the round alone
(`QuestionSource.draw`), not from other places, processes or earlier steps: a run can be continued exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from video_r1.data.rollouts import RolloutGroup
from video_r1.models.group_forward import VisualFeatures
from video_r1.processes import gather
from video_r1.training.advantages import without_variance
from video_r1.training.questions import Slot
from video_r1.training.recording import group_facts


class Asked(NamedTuple):
    """Scored groups, and the features of their ordered prompts where these are there (see PolicyBatch)."""

    groups: list[RolloutGroup]
    vision: list[VisualFeatures | None] | None


class LeftOut(NamedTuple):
    """A group without variance: its place and round, what is written down of it (`group_facts`), and the
    question that has the place in the end (None: no further one had variance, and the first one keeps it).
    """

    slot: Slot
    facts: dict[str, Any]
    replaced_by: str | int | None

    @property
    def reason(self) -> str:
        if self.slot.round > 0:
            return "tried"
        return "no variance" if self.replaced_by is None else "replaced"

    def line(self, step: int) -> dict[str, Any]:
        """Its line of left_out.jsonl."""
        told = {"reason": self.reason, "round": self.slot.round, "replaced_by": self.replaced_by}
        return {"step": step, **self.facts, **told}


def fill_places(
    slots: Sequence[Slot], asked: Asked, ask: Callable[[list[Slot]], Asked], rounds: int
) -> tuple[Asked, list[LeftOut]]:
    """The groups of these places after at most so many rounds, and all that had no variance.

    ask: reads, samples and scores the questions of some slots ([] too: processes that sample together call it
    together). Every process calls this with its own places.
    """
    groups, vision = list(asked.groups), asked.vision and list(asked.vision)
    in_vain = [[group_facts(group)] if teaches_nothing(group) else [] for group in groups]  # by round
    for number in range(1, rounds + 1):
        flat = [place for place, group in enumerate(groups) if teaches_nothing(group)]
        if not any(gather(len(flat))):
            break
        further = ask([slots[place]._replace(round=number) for place in flat])
        for n, place in enumerate(flat):
            if teaches_nothing(further.groups[n]):
                in_vain[place].append(group_facts(further.groups[n]))
                continue
            groups[place] = further.groups[n]
            if vision is not None and further.vision is not None:
                vision[place] = further.vision[n]
    left_out = []
    for slot, group, tried in zip(slots, groups, in_vain, strict=True):
        by = None if teaches_nothing(group) else group.sample.problem_id
        left_out += [LeftOut(slot._replace(round=n), facts, by) for n, facts in enumerate(tried)]
    return Asked(groups, vision), left_out


def teaches_nothing(group: RolloutGroup) -> bool:
    """Whether all its completions earn the same."""
    return bool(without_variance(group.total_reward[None]))
