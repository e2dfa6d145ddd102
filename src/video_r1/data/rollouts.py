"""Records of a question's completions, rewards and advantages. Each is made once, by one function of
training/step.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample, Work
from video_r1.data.prompts import Prompt
from video_r1.data.reading import Question


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


class Correct(NamedTuple):
    """Whether each completion of a question is right: [G] bool with the frames in order, [H] bool without."""

    ordered: Tensor
    contrast: Tensor

    @property
    def p(self) -> float:
        """Share of right completions with the frames in order."""
        return int(self.ordered.sum()) / len(self.ordered)

    @property
    def p_contrast(self) -> float | None:
        """p̃, the share of right completions of the contrast clip; None where none was sampled."""
        return int(self.contrast.sum()) / len(self.contrast) if len(self.contrast) else None


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Completions of one question: G with its frames in order, which are trained on, and H of its contrast.

    H is 0 without a contrast clip, and for rules that sample none.
    """

    question: Question
    ordered: Sequence[Rollout]  # G
    contrast: Sequence[Rollout] = ()  # H
    token_contrasts: Sequence[Tensor] | None = None  # d_it: G of [L] float32, nats (rewards/temporal.py)
    vision: Sequence[Any] | None = (
        None  # features of prompt and tool turns, where a frozen tower has made them
    )

    @property
    def sample(self) -> Sample:
        return self.question.sample


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards of one question's G ordered completions; each term [G] float32, before its weight."""

    terms: Mapping[str, Tensor]  # "accuracy", "format", "temporal", …; nan: does not apply
    total: Tensor  # R_i, the weighted sum
    without: Mapping[str, Tensor]  # by term: the total without it
    correct: Correct
    contrast_terms: Mapping[str, Tensor] = field(default_factory=dict)  # each [H], of the contrast clip
    gate_deviation: float = 0.0  # what a gate adds to the deviation of the total (`gate_deviation`)

    @property
    def base(self) -> Tensor:
        """[G] float32, the total without the temporal rule."""
        return self.without.get("temporal", self.total)


@dataclass(frozen=True, slots=True)
class Group:
    """A question's rollouts, rewards and advantages, which the update trains on."""

    rollouts: Rollouts
    rewards: Rewards
    advantages: Tensor  # A_i, [G] float32
    advantages_without: Mapping[str, Tensor] = field(default_factory=dict)  # by term: [G] without it

    @property
    def sample(self) -> Sample:
        return self.rollouts.question.sample

    @property
    def prompt(self) -> Prompt:
        return self.rollouts.question.ordered

    @property
    def ordered(self) -> Sequence[Rollout]:
        return self.rollouts.ordered
