"""Episodes: completions in which tools answer, sampled turn by turn with any engine.

    prompts ─► engine: n completions each ─► calls ─► Toolbox, in threads ─► tool turns
                  ▲                                                             │
                  └── one request an answer: all tokens and pixels so far ◄─────┘     … until none calls

Engines share what the answers to a question have in common: vLLM keeps its prompt in its prefix cache, and
each answer goes on when its own tools have answered; transformers reads the prompt once a round, in which all
answers take their next turn. A completion depends on its question's seed, its number and its turn alone.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from video_r1.data.decoding.media import reordered
from video_r1.data.prompts import Prompt, TextPrompts, contrast_order
from video_r1.data.reading import derived_generator
from video_r1.data.rollouts import Rollout, ToolCall, ToolTurn
from video_r1.data.tools import Asked, Toolbox, parse_calls
from video_r1.errors import ConfigError, PromptError
from video_r1.models.families import family_names
from video_r1.rollout.engine import (
    Asking,
    ContinuingEngine,
    Counts,
    Groups,
    OnToken,
    Prompts,
    RolloutEngine,
    SamplingSettings,
    Then,
    follow_in_rounds,
    prompt_seeds,
    wanted_counts,
)
from video_r1.seeds import hashed_seed
from video_r1.settings.frames import Contrast, ContrastUnit, FrameBudget
from video_r1.settings.tools import ToolSettings

THREADS = 8  # that run tools at once: each may have a decoder
NOTICE = "No more calls are possible. Answer now."
NOTICE_TOKENS = 256  # of a turn that says so, at most
NOTHING = Rollout(torch.empty(0, dtype=torch.long), torch.empty(0), "", "stop")


def tool_tokens(settings: ToolSettings, own_tools: bool = False) -> int:
    """Return the most tokens that tools add to an answer."""
    return settings.max_tool_tokens + NOTICE_TOKENS if settings.tools or own_tools else 0


def largest_frames(budget: FrameBudget, settings: ToolSettings) -> FrameBudget:
    """Return the budget of the largest visuals: the overview's or a look's."""
    frames, pixels = max(budget.max_frames, settings.look.frames), settings.look.pixels or 0
    largest = replace(budget, max_frames=frames, frame_pixels=max(budget.frame_pixels, pixels))
    return largest if settings.tools else budget


def joined(prompt: Prompt, rollout: Rollout) -> Prompt:
    """Return a question's prompt and a completion, with what tools returned, as one prompt."""
    ids, parts, length = [], [], 0
    for piece in [prompt, *rollout.pieces()]:
        if isinstance(piece, Prompt):
            parts.append((length, piece))
        ids.append(piece.input_ids if isinstance(piece, Prompt) else piece)
        length += len(ids[-1])
    media = tuple(clip for _, part in parts for clip in part.media)
    return replace(prompt, input_ids=torch.cat(ids), features={}, media=media, parts=tuple(parts))


@dataclass(slots=True)
class Episode:
    """An answer so far."""

    prompt: Prompt  # the question's
    seed: str
    left: int  # tokens that the policy may still write
    rollout: Rollout = NOTHING  # its `turns` are complete
    is_last: bool = False  # the notice was given
    calls: list[Asked] = field(default_factory=list)  # of the last turn

    def so_far(self) -> Prompt:
        """Return everything before the policy's next turn as a prompt."""
        messages = list(self.prompt.messages)
        for turn in self.rollout.turns:
            said = {"role": "assistant", "content": [{"type": "text", "text": turn.text}]}
            messages += [said, *turn.prompt.messages]
        return replace(joined(self.prompt, self.rollout), messages=messages)


class ToolEngine(RolloutEngine):
    """Samples with `engine`, and lets tools answer the calls in a completion.

    builder: of the prompts, with a toolbox. contrast: also build each tool turn with the contrast of its
    clips, to score completions behind it. Raises ConfigError for a model on the general path.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        builder: TextPrompts,
        contrast: Contrast | None = None,
        unit: ContrastUnit = "frame",
    ) -> None:
        if not engine.takes_tool_turns:
            raise ConfigError(f"tools: need a model of {family_names()}; leave them out for this one")
        self.engine = engine
        self.builder: Any = builder
        self.is_endpoint = builder.processor is None
        self.toolbox: Toolbox = builder.toolbox
        self.threads = threading.Semaphore(THREADS)
        self.contrast: Contrast | None = contrast
        self.unit: ContrastUnit = unit
        self.has_own_weights = engine.has_own_weights
        self.scores_as_trained = engine.scores_as_trained
        self.served_model = engine.served_model

    @property
    def without_tools(self) -> RolloutEngine:
        return self.engine

    def sample(
        self, prompts: Prompts, sampling: SamplingSettings, counts: Counts = None, on_token: OnToken = None
    ) -> Groups:
        """Sample as `RolloutEngine.sample` says. `max_tokens` bounds the policy's tokens of all turns."""
        asked, episodes, on_completion = self.begin(prompts, sampling, counts)
        if isinstance(self.engine, ContinuingEngine):
            self.engine.follow(asked, on_completion)
        else:
            follow_in_rounds(self.engine, asked, on_completion, on_token)
        self.toolbox.forget()
        return [[episode.rollout for episode in answers] for answers in episodes]

    def begin(
        self, prompts: Prompts, sampling: SamplingSettings, counts: Counts = None
    ) -> tuple[Asking, list[list[Episode]], Then]:
        """Return prompts, settings and counts; an episode for each completion; and `then` of `follow`."""
        counts, seeds = wanted_counts(prompts, sampling, counts), prompt_seeds(sampling.seed, len(prompts))
        episodes = [
            [Episode(prompt, f"{seed}/{number}", sampling.max_tokens) for number in range(count)]
            for prompt, seed, count in zip(prompts, seeds, counts, strict=True)
        ]

        def on_completion(index: int, number: int, new: Rollout) -> tuple[Prompt, SamplingSettings] | None:
            episode = episodes[index][number]
            self._add(episode, new)
            if not self._calls(episode):
                return None
            with self.threads:
                turns = (*episode.rollout.turns, self._answer(episode))
            episode.rollout = replace(episode.rollout, turns=turns)
            seed = hashed_seed(f"{episode.seed}/{len(turns)}", bits=62)
            return episode.so_far(), replace(sampling, n=1, seed=(seed,), max_tokens=episode.left)

        return (prompts, replace(sampling, seed=tuple(seeds)), counts), episodes, on_completion

    def _calls(self, episode: Episode) -> bool:
        """Parse the calls of the last turn; return whether the answer goes on."""
        rollout = episode.rollout
        last: Any = rollout.pieces()[-1]
        if episode.is_last or rollout.finish_reason != "stop" or episode.left < 1:
            return False
        if self.is_endpoint:  # which counts tokens, but does not name them
            episode.calls = parse_calls(rollout.text)
        elif len(last) and int(last[-1]) == self.builder.end_token_id:
            episode.calls = parse_calls(self.builder.tokenizer.decode(last[:-1].tolist()))
        return bool(episode.calls)

    def _answer(self, episode: Episode) -> ToolTurn:
        """Run the calls of an answer and build the turn with their results."""
        rollout, prompt = episode.rollout, episode.prompt
        spent = sum(len(turn.prompt.input_ids) for turn in rollout.turns)
        left = self.toolbox.settings.max_looks - len(rollout.calls)
        refused = [ToolCall(asked.name, asked.arguments, [NOTICE], failed=True) for asked in episode.calls]
        if left > 0:
            calls = tuple(self.toolbox.call(asked, prompt) for asked in episode.calls[:left])
            if len(episode.calls) > left:
                episode.is_last = True
                calls += (refused[left],)
            try:
                turn = self._turn(rollout, calls, prompt, episode.seed)
            except PromptError as error:
                calls = tuple(replace(call, result=[f"Error: {error.reason}"], failed=True) for call in calls)
                turn = self._turn(rollout, calls, prompt, episode.seed)
            if spent + len(turn.prompt.input_ids) <= self.toolbox.settings.max_tool_tokens:
                return turn
        episode.is_last = True
        return self._turn(rollout, (refused[0],), prompt, episode.seed)

    def _turn(self, rollout: Rollout, calls: tuple[ToolCall, ...], prompt: Prompt, seed: str) -> ToolTurn:
        after, results = len(rollout.token_ids), [call.result for call in calls]
        shown = None if prompt.permutation is None else cast(Contrast, prompt.contrast)

        def build(contrast: Contrast | None) -> Prompt:
            changed = results if contrast is None else self._contrasted(results, contrast, f"{seed}/{after}")
            return self.builder.build_turn(changed, prompt)

        scored = build(self.contrast) if self.contrast and shown is None else None
        return ToolTurn(after, rollout.text, calls, build(shown), scored)

    def _contrasted(self, results: Sequence[Sequence[Any]], contrast: Contrast, seed: str) -> list[list[Any]]:
        """Return the results with the contrast of each clip, within the stretch that it shows."""
        generator = derived_generator(seed)

        def changed(part: Any) -> Any:
            if isinstance(part, str) or part.kind != "video":
                return part
            order = contrast_order(contrast, [len(part.frames)], generator, self.unit)
            return part if order is None else reordered([part], order)[0]

        keeps = str if contrast == "blind" else object  # blind: texts alone
        return [[changed(part) for part in result if isinstance(part, keeps)] for result in results]

    def _add(self, episode: Episode, new: Rollout) -> None:
        """Add a turn of the policy to an answer."""
        before, cut = episode.rollout, episode.left < len(new.token_ids) and not self.is_endpoint
        ids, logprobs = new.token_ids[: episode.left], new.logprobs[: episode.left]
        text = self.builder.tokenizer.decode(ids.tolist(), skip_special_tokens=True) if cut else new.text
        episode.left -= len(ids)
        ids, logprobs = torch.cat([before.token_ids, ids]), torch.cat([before.logprobs, logprobs])
        reason = "length" if cut else new.finish_reason
        episode.rollout = Rollout(ids, logprobs, text, reason, before.turns)

    def update_weights(self, model: Any) -> None:
        self.engine.update_weights(model)

    def rest(self) -> None:
        self.engine.rest()

    def close(self) -> None:
        self.engine.close()
