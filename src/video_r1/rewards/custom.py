"""Reward functions of the user, with the signature of TRL's trainers."""

import inspect
import math
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn

from video_r1.availability import imported
from video_r1.chat_client import wait_for
from video_r1.data.manifests.records import FIELDS, Sample
from video_r1.data.manifests.trl_rows import PROMPT
from video_r1.errors import ConfigError, RewardError

# reward(prompts=[str] * N, completions=[str] * N, completion_ids=…, <column>=…) -> N numbers or None
RewardFunction = Callable[..., Sequence[float | None]]


def reward_name(function: RewardFunction, taken: Container[str]) -> str:
    """Return a reward function's name, numbered if it is in `taken`: near, near_2.

    The name is `function.__name__`, which can be set on a partial or an instance too, else that of the
    wrapped function or of the class. Raises ConfigError for a model.
    """
    named: Any = function
    while isinstance(named, partial) and not hasattr(named, "__name__"):
        named = named.func
    name = str(getattr(named, "__name__", type(named).__name__)).strip("<>")
    if isinstance(named, nn.Module):
        raise ConfigError(f"reward_funcs: {name} is a model; pass a function that calls it")
    numbered = (f"{name}_{number}" for number in count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def named_rewards(entries: Iterable[Any], built_in: Collection[str]) -> dict[str, RewardFunction | None]:
    """Return rewards by name, in order: None for a name, which must be one of `built_in`.

    `module:function` and `file.py:function` are imported. Raises ConfigError.
    """
    rewards: dict[str, RewardFunction | None] = {}
    for entry in entries:
        is_place = isinstance(entry, str) and ":" in entry
        found = imported(entry, "reward_funcs") if is_place else entry
        if callable(found):
            function = cast(RewardFunction, found)
            rewards[reward_name(function, {*rewards, *built_in})] = function
        elif entry in built_in:
            rewards[entry] = None
        else:
            raise ConfigError(
                f"reward_funcs names {entry}; known are {', '.join(built_in)}, functions, and their places "
                "as module:function or file.py:function"
            )
    return rewards


def reward_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Return every field of the samples, extra ones too, as a column; None where a row lacks it.

    Extra fields replace fields of Sample only in a TRL table. The `path` of several clips is a list.
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
    """Return the rewards of N completions by a user's function, [N] float32, nan where it gave None.

    samples: of each completion, whose fields the function gets as well (`reward_columns`). columns: prompts,
    completions and completion_ids. Raises RewardError, which names function and sample, for an exception, a
    wrong number of rewards, or one that is not finite.
    """
    arguments = reward_columns(samples) | columns
    try:
        rewards: Any = function(**arguments)
        given = list(wait_for(rewards) if inspect.iscoroutine(rewards) else rewards)
    except Exception as error:  # the function is the user's: whatever it raises is reported as its error
        reason = f"{type(error).__name__}: {error}"
        raise RewardError(f"reward function {name!r} raised {reason} (problem_id {_ids(samples)})") from error
    if len(given) != len(samples):
        raise RewardError(
            f"reward function {name!r} returned {len(given)} rewards for {len(samples)} completions of "
            f"problem_id {_ids(samples)}; return a list with one number or None for each"
        )
    numbers = [_number(reward, name, sample) for reward, sample in zip(given, samples, strict=True)]
    return torch.tensor(numbers, dtype=torch.float32)


def _number(reward: Any, name: str, sample: Sample) -> float:
    if reward is None:
        return math.nan
    try:
        number = float(torch.tensor(float(reward), dtype=torch.float32))  # 1e39 is infinite there
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:  # 10**400
        number = reward = math.inf
    if not math.isfinite(number):
        raise RewardError(
            f"reward function {name!r} returned {reward!r} for problem_id {sample.problem_id!r}; "
            "a reward is a finite number (float32), or None where the function does not apply"
        )
    return number


def _ids(samples: Sequence[Sample]) -> str:
    unique = list(dict.fromkeys(repr(sample.problem_id) for sample in samples))
    return ", ".join(unique[:10]) + (", …" if len(unique) > 10 else "")
