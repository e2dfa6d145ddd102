"""A session with a model, of `ask` and the studio: loaded once, a clip decoded once.

clip ─► frames (kept) ─► prompts: ordered, and of each contrast ─► K answers to each ─► shares
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from video_r1.data.answers import read_answer
from video_r1.data.decoding.frame_cache import cache_key, open_frame_cache
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt
from video_r1.data.reading import Clips, Reader
from video_r1.data.rollouts import Rollout
from video_r1.data.scores import correctness, is_correct
from video_r1.evaluation.metrics import Figure, share_difference, share_figure
from video_r1.evaluation.question_loop import build_prompt, sampling_seed
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.rollout.engine_factory import open_engine, open_prompts
from video_r1.settings.decoding import AskSettings
from video_r1.settings.frames import Order

CLIPS_KEPT = 4  # clips whose frames stay in memory

# Called with a prompt's number and a piece of its first completion, or "" when another completion has grown.
Hear = Callable[[int, str], object]


@dataclass(frozen=True, slots=True)
class View:
    """The K answers to one question in one frame order."""

    prompt: Prompt
    rollouts: list[Rollout]
    answers: list[str]  # the parsed answers, "" for none
    counted: list[bool]  # right answers; without a known one, those equal to the majority of the ordered view
    share: Figure  # of the counted, with its Wilson interval
    gap: Figure | None  # share of the ordered view minus this one; None for the ordered view


class ModelSession:
    """A model, loaded with the first question, and the clips that it was asked about. Raises ConfigError."""

    def __init__(self, settings: AskSettings) -> None:
        self.settings = settings
        self.builder, self.budget = open_prompts(settings)
        cache = open_frame_cache(settings.frame_cache, settings.frame_cache_gb)
        self._reader = Reader(self.budget, cache)
        self._engine: RolloutEngine | None = None
        self._clips: dict[tuple[str | None, ...], Clips] = {}

    def has(self, sample: Sample) -> bool:
        """Whether the clip's frames are in memory."""
        return self._key(sample) in self._clips

    def media(self, sample: Sample) -> Clips:
        """Return the frames of the sample's clip, decoded at the first question. Raises MediaError."""
        key = self._key(sample)
        if (media := self._clips.pop(key, None)) is None:
            media = self._reader.media(sample)
        self._clips[key] = media
        while len(self._clips) > CLIPS_KEPT:
            self._clips.pop(next(iter(self._clips)))
        return media

    def _key(self, sample: Sample) -> tuple[str | None, ...]:
        """Return a key that changes when a file is replaced."""
        return tuple(cache_key(file, self.budget, self.budget.max_frames) for file in sample.files)

    def prompts(self, sample: Sample, orders: Sequence[Order]) -> list[Prompt]:
        """Build the prompts. Raises PromptError, and MediaError, also for a clip too short for a contrast."""
        media = self.media(sample)
        return [build_prompt(sample, media, self.builder, order, self.settings.seed) for order in orders]

    def load(self) -> None:
        """Open the engine, unless it is open."""
        self._engine = self._engine or open_engine(self.settings, self.builder)

    def ask(
        self, sample: Sample, prompts: Sequence[Prompt], samples: int, sampling: SamplingSettings, hear: Hear
    ) -> list[View]:
        """Sample `samples` answers to each prompt; the first prompt is the ordered one."""
        self.load()
        assert self._engine is not None
        seed, frames = self.settings.seed, prompts[0].frames
        seeds = tuple(sampling_seed(seed, frames, sample, prompt.order) for prompt in prompts)
        sampling = replace(sampling, n=samples, seed=seeds)
        return views_of(sample, prompts, heard(self._engine, self.builder.tokenizer, prompts, sampling, hear))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def sampling_of(settings: AskSettings) -> SamplingSettings:
    """Return the sampling settings: at temperature 1 for several answers, unless the settings say how."""
    sampling = SamplingSettings.of(settings)
    if settings.samples > 1:
        usual = {name: 1.0 for name in ("temperature", "top_p") if name not in settings.given}
        sampling = replace(sampling, **usual)
    return sampling


def heard(
    engine: RolloutEngine, tokenizer: Any, prompts: Sequence[Prompt], sampling: SamplingSettings, hear: Hear
) -> list[list[Rollout]]:
    """Return the engine's completions; pass the first of each prompt to `hear`, in pieces if possible."""
    streams = [TextStream(tokenizer, partial(hear, prompt)) for prompt in range(len(prompts))]

    def on_token(prompt: int, completion: int, token: int) -> None:
        hear(prompt, "") if completion else streams[prompt].add(token)

    groups = engine.sample(prompts, sampling, on_token=on_token)
    for stream, rollouts in zip(streams, groups, strict=True):
        stream.write(rollouts[0].transcript[stream.written :])
    return groups


def views_of(sample: Sample, prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]]) -> list[View]:
    """Return the view of each prompt; the first prompt is the ordered one."""
    kind, options = sample.problem_type, sample.options
    read = [[read_answer(rollout.text, kind, options) for rollout in rollouts] for rollouts in groups]
    truth = sample.answer or majority(read[0])
    counted = [
        [bool(answer and truth) and is_correct(kind, correctness(kind, answer, truth)) for answer in answers]
        for answers in read
    ]
    shares = [share_figure(sum(found), len(found)) for found in counted]
    return [
        View(prompt, list(rollouts), answers, found, share, share_difference(shares[0], share) if i else None)
        for i, (prompt, rollouts, answers, found, share) in enumerate(
            zip(prompts, groups, read, counted, shares, strict=True)
        )
    ]


def verdict(sample: Sample, views: Sequence[View]) -> str:
    """Return what the intervals say about the clip and the order of its frames; "" without contrasts."""
    first, *others = views
    right = "right" if sample.answer else "those given in order"
    for view in sorted(others, key=lambda view: -view.share.mean):
        if sample.answer and view.gap and view.gap.high < 0:
            order = view.prompt.order
            shown = "without the clip" if order == "blind" else f"with its frames {order}"
            share, ordered = f"{100 * view.share.mean:.0f} %", f"{100 * first.share.mean:.0f} %"
            return f"The model answers better {shown}: {share} are right, {ordered} with the clip in order."
    moved = [view for view in others if view.gap and view.prompt.order in ("shuffled", "reversed")]
    if seen := [view.prompt.order for view in moved if view.gap and view.gap.low > 0]:
        shown = " and ".join(seen)
        return f"The order of the frames matters here: with its frames {shown}, fewer answers are {right}."
    more = "; more answers narrow the intervals" if len(first.answers) < 16 else ""
    return f"These answers do not show that the order of the frames matters{more}." if moved else ""


def majority(answers: Sequence[str]) -> str:
    """Return the most frequent answer, the earliest among equals; "" if there is none."""
    given = Counter(answer for answer in answers if answer)
    return given.most_common(1)[0][0] if given else ""


class TextStream:
    """A stream of tokens written as text; an incomplete character waits for its next token."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], object]) -> None:
        self._tokenizer, self._hear = tokenizer, hear
        self._token_ids: list[int] = []
        self.written = 0  # characters

    def add(self, token_id: int) -> None:
        self._token_ids.append(token_id)
        text = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.write(text[self.written :])

    def write(self, piece: str) -> None:
        if piece:
            self._hear(piece)
            self.written += len(piece)
