"""Reward functions of the user, with the signature of TRL's trainers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from video_r1.data.manifests.records import FIELDS, Sample
from video_r1.data.manifests.trl_rows import PROMPT
from video_r1.errors import RewardError

# reward(prompts=[str] * N, completions=[str] * N, completion_ids=…, <column>=…) -> N numbers or None
RewardFunction = Callable[..., Sequence[float | None]]


def reward_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Return every field of the samples as a column, also the rows' extra fields; None where a row lacks it.

    A row of a TRL table has its own columns; in other rows no extra field replaces a field of Sample. The
    `path` of several clips is a list.
    """

    def column(sample: Sample, name: str) -> Any:
        if name == "path" and sample.more_paths:
            return [*sample.paths]
        if name in FIELDS and PROMPT not in sample.extra:
            return getattr(sample, name)
        return sample.extra.get(name, getattr(sample, name, None))

    names = dict.fromkeys((*FIELDS, *(name for sample in samples for name in sample.extra)))
    return {name: [column(sample, name) for sample in samples] for name in names}


def as_said(sample: Sample, text: str, role: str) -> Any:
    """Return a prompt or completion for a reward function: a text, or messages if the row's `prompt` is."""
    prompt = sample.extra.get(PROMPT)
    if not sample.messages or not isinstance(prompt, list):
        return text
    return prompt if role == "user" else [{"role": role, "content": text}]


def call_reward_function(
    function: RewardFunction, name: str, samples: Sequence[Sample], **columns: list[Any]
) -> Tensor:
    """Return the rewards of N completions by a user's function, checked.

    function: called once as `function(prompts=…, completions=…, completion_ids=…, **columns)`, every argument
    a list of length N (see `reward_columns`); returns N numbers, or None where it does not apply.
    samples: the sample of each completion (length N). columns: prompts, completions and completion_ids.
    Returns [N] float32, nan where the function gave None. Raises RewardError, which names the function and
    the sample, when it raises, returns another number of rewards, or a reward that is no finite number.
    """
    arguments = reward_columns(samples) | columns
    for column, values in arguments.items():
        if len(values) != len(samples):
            raise ValueError(f"{len(samples)} samples but {len(values)} {column}")
    try:
        rewards = function(**arguments)
    except Exception as error:  # the function is the user's: whatever it raises is reported as its error
        where = _culprit(function, arguments, samples)
        kind = type(error).__name__
        raise RewardError(f"reward function {name!r} raised {kind}: {error} ({where})") from error
    try:
        given = list(rewards)
    except TypeError:
        raise RewardError(
            f"reward function {name!r} returned {type(rewards).__name__}; "
            f"return a list with one number or None for each of the {len(samples)} completions"
        ) from None
    if len(given) != len(samples):
        raise RewardError(
            f"reward function {name!r} returned {len(given)} rewards for {len(samples)} completions "
            f"of problem_id {_ids(samples)}; return one number or None for each"
        )
    return torch.tensor(
        [_number(reward, name, sample) for reward, sample in zip(given, samples, strict=True)],
        dtype=torch.float32,
    )


def _number(reward: Any, name: str, sample: Sample) -> float:
    if reward is None:
        return math.nan
    try:
        number = float(reward)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward function {name!r} returned {reward!r} for problem_id {sample.problem_id!r}; "
            "a reward is a finite number, or None where the function does not apply"
        )
    return number


def _culprit(function: RewardFunction, arguments: Mapping[str, list[Any]], samples: Sequence[Sample]) -> str:
    """Find the sample that makes the function raise, by passing one at a time."""
    for row, sample in enumerate(samples):
        try:
            function(**{column: values[row : row + 1] for column, values in arguments.items()})
        except Exception:  # the user's function again
            return f"problem_id {sample.problem_id!r}, completion {arguments['completions'][row][:200]!r}"
    return f"with problem_id {_ids(samples)} together, not with any of them alone"


def _ids(samples: Sequence[Sample]) -> str:
    unique = list(dict.fromkeys(repr(sample.problem_id) for sample in samples))
    return ", ".join(unique[:10]) + (", …" if len(unique) > 10 else "")
