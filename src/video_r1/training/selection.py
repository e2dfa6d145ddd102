"""Dynamic sampling: questions that teach nothing are replaced before the update."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from video_r1.data.rollouts import Rewards, Rollouts
from video_r1.processes import gather
from video_r1.training.advantages import without_variance
from video_r1.training.questions import Slot
from video_r1.training.recording import skipped_facts


class Answered(NamedTuple):
    """A slot's question, answered and scored."""

    slot: Slot
    rollouts: Rollouts
    rewards: Rewards

    @property
    def teaches_nothing(self) -> bool:
        """Whether the rewards without the temporal rule are equal, and no teacher teaches the question."""
        is_taught = self.rollouts.question.teacher is not None
        return not is_taught and bool(without_variance(self.rewards.base[None]))


class Selection(NamedTuple):
    """Questions that a step learns from; the others as lines of left_out.jsonl, each with its slot."""

    answered: list[Answered]
    skipped: list[tuple[Slot, dict[str, Any]]]


def select(
    first: Sequence[Answered], answer: Callable[[list[Slot]], list[Answered]], rounds: int
) -> Selection:
    """Replace questions that teach nothing by further ones (DAPO, arXiv 2503.14476), for at most `rounds`
    rounds; a slot that finds none keeps its first question.

    Slot and round alone decide which question comes next (`QuestionSource.draw`): a run resumes exactly.
    answer: reads, samples and scores the questions of some slots, [] too. Every rank calls it with its own.
    """
    chosen = list(first)
    flat: list[list[Answered]] = [[one] if one.teaches_nothing else [] for one in chosen]  # of each slot
    for number in range(1, rounds + 1):
        places = [place for place, one in enumerate(chosen) if one.teaches_nothing]
        if not any(gather(len(places))):
            break
        further = answer([first[place].slot._replace(round=number) for place in places])
        for place, one in zip(places, further, strict=True):
            if one.teaches_nothing:
                flat[place].append(one)
            else:
                chosen[place] = one
    skipped = []
    for own, tried, slot in zip(chosen, flat, (one.slot for one in first), strict=True):
        by = None if own.teaches_nothing else own.rollouts.sample.problem_id
        for n, one in enumerate(tried):
            reason = "tried" if n > 0 else "no variance" if by is None else "replaced"
            facts = skipped_facts(one.rollouts.sample, one.rewards)
            skipped.append(
                (slot._replace(round=n), {**facts, "reason": reason, "round": n, "replaced_by": by})
            )
    return Selection(chosen, skipped)
