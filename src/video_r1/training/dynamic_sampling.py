"""Groups that teach nothing give their places in a step to further questions (DAPO, arXiv 2503.14476).

    a step's questions ─► groups ─► those of equal rewards ─► further questions for their places ─► groups …

until every place has a group with variance or the rounds are used up; a place that is still without one keeps
its own question. Which question comes next for a place follows from the place and the round alone
(`QuestionSource.draw`), not from other places, processes or earlier steps: a run can be continued exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from video_r1.data.rollouts import RolloutGroup
from video_r1.models.group_forward import VisualFeatures
from video_r1.processes import gather
from video_r1.training.advantages import without_variance
from video_r1.training.questions import Slot


class Asked(NamedTuple):
    """Scored groups, and the features of their ordered prompts where these are there (see PolicyBatch)."""

    groups: list[RolloutGroup]
    vision: list[VisualFeatures | None] | None


def fill_places(
    slots: Sequence[Slot], asked: Asked, ask: Callable[[list[Slot]], Asked], rounds: int
) -> tuple[Asked, int]:
    """The groups of these places after at most so many rounds, and how many places have another question.

    ask: reads, samples and scores the questions of some slots ([] too: processes that sample together call it
    together). Every process calls this with its own places.
    """
    groups, vision = list(asked.groups), asked.vision and list(asked.vision)
    replaced = 0
    for number in range(1, rounds + 1):
        flat = [place for place, group in enumerate(groups) if teaches_nothing(group)]
        if not any(gather(len(flat))):
            break
        further = ask([slots[place]._replace(round=number) for place in flat])
        for n, place in enumerate(flat):
            if teaches_nothing(further.groups[n]):
                continue
            groups[place] = further.groups[n]
            if vision is not None and further.vision is not None:
                vision[place] = further.vision[n]
            replaced += 1
    return Asked(groups, vision), replaced


def teaches_nothing(group: RolloutGroup) -> bool:
    """Whether all its completions earn the same."""
    return bool(without_variance(group.total_reward[None]))
