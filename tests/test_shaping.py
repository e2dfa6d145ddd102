"""Format, temporal and length rewards, and reward functions that users bring."""

import pytest
import torch

from video_r1.data.manifests.records import Sample
from video_r1.errors import RewardError
from video_r1.rewards.custom import call_reward_function, reward_columns
from video_r1.rewards.scoring import format_reward, length_reward
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
