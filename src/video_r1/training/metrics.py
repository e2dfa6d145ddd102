"""Metrics of a run, gathered between two logging steps for trackers and metrics.jsonl."""

import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

from video_r1.data.answers import extract_answer, option_prefix
from video_r1.data.rollouts import Group, Rollout
from video_r1.models.group_forward import GroupLogprobs
from video_r1.processes import gather, process_count, process_index
from video_r1.rewards.temporal import logprob_contrast
from video_r1.training.advantages import without_variance
from video_r1.training.objective import SurrogateLoss
from video_r1.training.questions import pair_of

SKIPPED_GROUPS = "left_out.jsonl"  # in a run folder: groups that its steps learnt nothing from


class Meter:
    """Series over some steps and all ranks: quotients of two sums, sums, peaks."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)  # of quotients only
        self.peaks: dict[str, float] = {}
        self.steps = 0  # optimizer steps, counted by StepSeconds

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Add to a quotient: `value` is a sum over `count` things."""
        self.sums[name] += float(value)
        self.counts[name] += float(count)

    def total(self, name: str, value: float) -> None:
        self.sums[name] += float(value)

    def peak(self, name: str, value: float) -> None:
        self.peaks[name] = max(value, self.peaks.get(name, value))

    @contextmanager
    def seconds(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.total(f"seconds/{phase}", time.perf_counter() - start)

    def speeds(self, rollouts: Sequence[Rollout], seconds: float) -> None:
        share = seconds / process_count()
        self.add("speed/rollouts_per_second", len(rollouts), share)
        self.add("speed/tokens_per_second", sum(len(rollout.token_ids) for rollout in rollouts), share)

    def drain(self) -> dict[str, float]:
        """Return the series since the last call, over all ranks, and reset; seconds are per step."""
        steps = max(1, self.steps)
        parts = gather((self.sums, self.counts, self.peaks))
        self.__init__()
        for sums, counts, peaks in parts:
            for name, value in sums.items():
                self.sums[name] += value
            for name, count in counts.items():
                self.counts[name] += count
            for name, peak in peaks.items():
                self.peak(name, peak)
        series: dict[str, float] = {}
        for name, value in sorted(self.sums.items()):
            if name.startswith("seconds/"):
                series[name] = value / len(parts) / steps
            elif name not in self.counts:
                series[name] = value
            elif self.counts[name] > 0:
                series[name] = value / self.counts[name]
        series |= sorted(self.peaks.items())
        self.__init__()
        return series


def describe_groups(
    meter: Meter, groups: Sequence[Group], phrases: Sequence[str], tools: bool = False
) -> None:
    """Add one step's rewards, their deviations inside a group, temporal gap, completions, groups without
    variance before the temporal term; calls, if there are tools.
    """
    pairs: dict[tuple[str, int], list[float]] = defaultdict(list)
    for group in groups:
        sample, rewards, correct = group.sample, group.rewards, group.rewards.correct
        if pair := pair_of(sample):
            pairs[pair].append(correct.p)
        for term, values in {**rewards.terms, "total": rewards.total}.items():
            # A user's function may return no reward for a completion (nan).
            total, given = float(values.nansum()), int(values.isfinite().sum())
            for name in (term, f"{term}/{sample.problem_type}", f"{term}/{sample.data_type}"):
                meter.add(f"reward/{name}", total, given)
            if given > 1:
                meter.add(f"reward_std/{term}", float(values[values.isfinite()].std()))
        if correct.p_contrast is not None:
            meter.add("temporal/p", correct.p)
            meter.add("temporal/p_contrast", correct.p_contrast)
            meter.add("temporal/gap", correct.p - correct.p_contrast)
            meter.add("temporal/share_ordered_better", correct.p > correct.p_contrast)
        if (contrasts := group.rollouts.token_contrasts) is not None:
            meter.add("temporal/drop", float(logprob_contrast(contrasts).mean()))
        letters = {option_prefix(option).strip(" (.):") for option in sample.options}
        for rollout in group.ordered:
            if (answer := extract_answer(rollout.text)) in letters:
                meter.total(f"answers/{answer}", 1)
            if tools:
                calls = rollout.calls
                meter.add("tools/calls", len(calls))
                meter.add("tools/share", bool(calls))
                meter.add("tools/failed", rollout.failed_calls, len(calls))
            meter.add("completion/length", len(rollout.token_ids))
            meter.add("completion/truncated", rollout.finish_reason == "length")
            meter.add("completion/self_reflection", has_self_reflection(rollout.text, phrases))
        if rewards.terms:  # a teacher alone needs none
            meter.add("groups/no_variance", bool(without_variance(rewards.base[None])))
    everywhere: dict[tuple[str, int], list[float]] = defaultdict(list)
    for pair, shares in chain(*(part.items() for part in gather(dict(pairs)))):
        everywhere[pair] += shares
    for (_, size), shares in everywhere.items():
        if len(shares) == size and process_index() == 0:  # all of them in this step
            meter.add("temporal/pair_accuracy", math.prod(shares))


def describe_update(meter: Meter, policy: GroupLogprobs, result: SurrogateLoss) -> None:
    """Add one micro-batch's means over completion tokens."""
    tokens = len(policy.logprobs)
    assert policy.entropy is not None
    meter.add("policy/clip_ratio", float(result.clip_ratio) * tokens, tokens)
    meter.add("policy/kl", float(result.kl) * tokens, tokens)
    meter.add("policy/entropy", float(policy.entropy.detach().sum()), tokens)


def has_self_reflection(text: str, phrases: Sequence[str]) -> bool:
    """Whether any of the phrases occurs in the text as whole words, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) for phrase in phrases)
