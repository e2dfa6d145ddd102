"""Records of a question's sampled completions and their rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample, Work
from video_r1.data.prompts import Prompt


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool as the policy wrote it, and what came back."""

    name: str
    arguments: Mapping[str, Any]
    result: Sequence[str | Media]
    failed: bool = False  # then the result is one line that says why

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        result = (p if isinstance(p, str) else f"{len(p.frames)} frames" for p in self.result)
        return f"{self.name}({given}): {' '.join(result)}"


@dataclass(frozen=True, slots=True)
class ToolTurn:
    """Answers of tools, in the middle of a completion."""

    after: int  # tokens of the policy before it
    text: str  # of the policy's turn that ends with the calls
    calls: tuple[ToolCall, ...]
    prompt: Prompt  # tokens and pixels of the turn
    contrast: Prompt | None = None  # the same with the contrast of its clips, where it was asked for


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled completion: L tokens of the policy, and the turns in which tools answered.

    Log-probs, lengths and losses are of the policy's tokens. An answer without tools has one turn.
    """

    token_ids: Tensor  # [L] int64
    logprobs: Tensor  # [L] float32, of the sampler
    text: str  # of the last turn
    finish_reason: Literal["stop", "length"]
    turns: tuple[ToolTurn, ...] = ()

    @property
    def calls(self) -> list[ToolCall]:
        return [call for turn in self.turns for call in turn.calls]

    @property
    def failed_calls(self) -> int:
        return sum(call.failed for call in self.calls)

    @property
    def work(self) -> tuple[Work, ...]:
        """The turns with calls, as a manifest row has them."""
        return tuple(
            Work(
                turn.text.partition("<tool_call>")[0].strip(),
                tuple((call.name, call.arguments) for call in turn.calls),
                tuple(" ".join(part for part in call.result if isinstance(part, str)) for call in turn.calls),
            )
            for turn in self.turns
        )

    @property
    def transcript(self) -> str:
        """The text of all turns, with each call's answer in brackets."""
        said = [turn.text + "".join(f"\n[{call}]\n" for call in turn.calls) for turn in self.turns]
        return "".join([*said, self.text])

    def pieces(self, contrast: bool = False) -> list[Tensor | Prompt]:
        """Return the completion in order: the policy's tokens of a turn, a tool turn, and so on."""
        pieces: list[Tensor | Prompt] = []
        done = 0
        for turn in self.turns:
            answer = turn.contrast if contrast else turn.prompt
            pieces += [self.token_ids[done : turn.after], answer or turn.prompt]
            done = turn.after
        return [*pieces, self.token_ids[done:]]


@dataclass(slots=True)
class RolloutGroup:
    """Rollouts of a question (G ordered, G_s shuffled), their rewards and advantages.

    Rewards are unweighted terms by name ("accuracy", "format", "temporal", "length", …); advantages are
    computed from their weighted sum, `total_reward`. Only the ordered completions are trained on; the
    shuffled ones measure the share of correct answers without the frame order. `rewards_without` and
    `advantages_without` leave one term out, to show its effect.
    """

    sample: Sample
    # fmt: off
    prompt: Prompt                      # the ordered prompt
    ordered: list[Rollout]              # G
    shuffled_prompt: Prompt | None      # None: an image, or no temporal reward
    shuffled: list[Rollout]             # G_s, empty where shuffled_prompt is None
    rewards: dict[str, Tensor]          # each term [G] float32, of the ordered completions
    total_reward: Tensor                # [G] float32
    advantages: Tensor                  # [G] float32
    shuffled_rewards: dict[str, Tensor] = field(default_factory=dict)  # each term [G_s] float32
    p: float = float("nan")             # share of correct ordered completions
    p_shuffled: float | None = None     # share of correct shuffled completions; None: not sampled
    token_drops: list[Tensor] | None = None  # G of [L] float32, nats that each token loses with the contrast
    teacher_prompt: Prompt | None = None  # with the clips that the teacher sees
    teacher_logprobs: list[Tensor] | None = None  # G of [L] float32, log π_teacher of each token
    correct: Tensor | None = None       # [G] bool, of the ordered completions
    rewards_without: dict[str, Tensor] = field(default_factory=dict)  # by term: total [G] without it
    advantages_without: dict[str, Tensor] = field(default_factory=dict)  # by term: [G] float32
    gate_deviation: float = 0.0         # of a temporal gate among the correct completions
    # fmt: on

    @property
    def margin(self) -> float | None:
        """p − p̃; None where no contrast was sampled."""
        return None if self.p_shuffled is None else self.p - self.p_shuffled

    @property
    def base_reward(self) -> Tensor:
        """[G] float32, the total reward without the temporal term."""
        return self.rewards_without.get("temporal", self.total_reward)
