"""Format, temporal and length rewards, and reward functions that users bring."""

import asyncio
from functools import partial
from typing import Any

import pytest
import torch

from video_r1.data.manifests.records import Sample
from video_r1.errors import ConfigError, RewardError
from video_r1.rewards.custom import call_reward_function, reward_columns
from video_r1.rewards.scoring import format_reward, length_reward, reward_terms
from video_r1.settings.training import TGRPOSettings
from video_r1.training.metrics import has_self_reflection


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>why</think><answer>A</answer>", 1.0),
        ("<think>why\nand so</think>\n\n <answer>A\n</answer>", 1.0),
        (" <think>why</think><answer>A</answer>", 0.0),
        ("<think>why</think><answer>A</answer><answer>B</answer>", 0.0),
        ("<answer>A</answer><think>why</think>", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion: str, reward: float) -> None:
    assert format_reward(completion) == reward


def flags(text: str) -> torch.Tensor:
    """ "1101" → [True, True, False, True]"""
    return torch.tensor([mark == "1" for mark in text], dtype=torch.bool)


def test_length_reward_bounds_belong_to_the_interval() -> None:
    lengths = torch.tensor([319, 320, 400, 512, 513, 400])
    correct = flags("111110")
    expected = torch.tensor([0.0, 0.2, 0.2, 0.2, 0.0, 0.0])
    torch.testing.assert_close(length_reward(correct, lengths), expected)
    torch.testing.assert_close(
        length_reward(correct, lengths, omega=1.0, shortest=1, longest=319),
        torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    )


def test_self_reflection() -> None:
    words = ("wait", "let me check")
    assert has_self_reflection("It is left. Wait, it is right.", words)
    assert not has_self_reflection("The waiter sits.", words)


def sample(problem_id: int | str, **extra: object) -> Sample:
    question = f"question {problem_id}"
    return Sample(
        problem_id, question, "video", "multiple choice", "<answer>A</answer>", "/v.mp4", extra=extra
    )


def call(function, samples: list[Sample], completions: list[str]) -> torch.Tensor:
    ids = [[len(text)] for text in completions]
    return call_reward_function(
        function, "mine", samples, prompts=["p"] * len(samples), completions=completions, completion_ids=ids
    )


def test_a_users_reward_function_gets_every_column() -> None:
    seen = {}

    def mine(prompts, completions, completion_ids, family, **columns):
        seen.update(columns, prompts=prompts, family=family)
        return [
            len(text) + ids[0] if kind == "order" else None
            for text, ids, kind in zip(completions, completion_ids, family, strict=True)
        ]

    rewards = call(mine, [sample(1, family="order"), sample(2)], ["abc", "de"])
    assert rewards[0] == 6.0
    assert torch.isnan(rewards[1])
    assert seen["solution"] == ["<answer>A</answer>"] * 2
    assert seen["problem_id"] == [1, 2]
    assert seen["problem_type"] == ["multiple choice"] * 2
    assert seen["family"] == ["order", None]
    assert "extra" not in seen


def test_an_extra_field_never_hides_a_record_field() -> None:
    columns = reward_columns([sample(1, path="/other", speed=2.0)])
    assert (columns["path"], columns["speed"], columns["options"]) == (["/v.mp4"], [2.0], [()])


def divide(prompts, completions, **columns):
    return [1 / len(text) for text in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (divide, r"'mine' raised ZeroDivisionError.*problem_id 1, 'b', 3"),
        (lambda **columns: [1.0], r"'mine' returned 1 rewards for 3 completions.*1, 'b'"),
        (lambda **columns: [1.0, float("nan"), 0.0], r"'mine' returned nan for problem_id 'b'"),
        (lambda **columns: [1.0, 0.0, 1e39], r"'mine' returned 1e\+39 for problem_id 3.*float32"),
        (lambda **columns: [1.0, 10**5000, 0.0], r"'mine' returned inf for problem_id 'b'"),
    ],
)
def test_what_is_wrong_with_a_reward_function_is_named(function, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        call(function, [sample(1), sample("b"), sample(3)], ["x", "", "yz"])


def near(completions, target=0, **columns):
    return [-abs(target - len(text)) for text in completions]


async def later(completions, **columns):
    await asyncio.sleep(0.001)
    return [len(text) for text in completions]


class Length:
    def __init__(self, of: int) -> None:
        self.of = of

    def __call__(self, completions, **columns):
        return [self.of * len(text) for text in completions]

    async def soon(self, completions, **columns):
        return self(completions, **columns)


chosen = partial(near, target=4)
chosen.__name__ = "close"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("functions", "names", "rewards"),
    [
        ([partial(near, target=1), partial(partial(near), target=3)], ["near", "near_2"], [0, -2]),
        ([lambda completions, **_: [1], lambda completions, **_: [2]], ["lambda", "lambda_2"], [1, 2]),
        ([Length(2), Length(3), near], ["Length", "Length_2", "near"], [2, 3, -1]),
        ([later, partial(later), Length(5).soon], ["later", "later_2", "soon"], [1, 1, 5]),
        ([chosen, near, chosen], ["close", "near", "close_2"], [-3, -1, -3]),
    ],
)
def test_cases_of_names_of_reward_functions(
    functions: list[Any], names: list[str], rewards: list[float]
) -> None:
    terms = reward_terms(["accuracy", *functions], TGRPOSettings(temporal_rule="off"))
    assert list(terms.custom) == names
    assert [call(each, [sample(1)], ["x"]).item() for each in terms.custom.values()] == rewards


def test_cases_of_rewards_that_cannot_be_called() -> None:
    def accuracy(completions, **columns):
        return [0.0]

    assert reward_terms([accuracy], TGRPOSettings(temporal_rule="off")).names == ("accuracy_2",)
    with pytest.raises(ConfigError, match="Linear is a model; pass a function that calls it"):
        reward_terms(torch.nn.Linear(1, 1), TGRPOSettings())
