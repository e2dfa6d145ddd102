"""The reader: what samples are about, decoded ahead of whoever needs it.

    batches ─► reading threads ─► media of every frame count ─► one thread ─► what the caller builds of them
               (a clip once)       (`ahead` batches, as bytes)   (one batch ahead)

A thread waits for a worker process, which is killed over a file that takes too long (decoders.py), or finds
the frames in the frame cache. What is built has pixels as float32 and in every order, media are bytes and
there once: so media may be held for some batches, and what is built only for the present one and the next.
Training, which draws its questions one by one, has its own work done in the same threads (`submit`).
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

import torch

from video_r1.data.decoding.frame_cache import FrameCache, read_cached, read_cached_at
from video_r1.data.decoding.media import Media, Shown
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder, contrast_prompt
from video_r1.errors import MediaError, PromptError
from video_r1.seeds import derived_seed
from video_r1.settings.frames import Contrast, ContrastUnit, FrameBudget

Item = TypeVar("Item")
Built = TypeVar("Built")
Clips = tuple[Media, ...]  # of a sample: one, or as many as its files
Clip = list[Clips] | MediaError  # one for each frame count
Reading = list[tuple[Sample, Future[Clip]]]  # of one batch
Unusable = MediaError | PromptError
"""Why nothing can be made of a question: an answer like any other where questions are counted."""


class Batch(NamedTuple):
    """Samples that are read together, with each of `counts` as max_frames (empty: the budget's)."""

    samples: Sequence[Sample]
    counts: tuple[int, ...] = ()


class Reader:
    """Reads media under one budget, in `threads` threads. Thread-safe; used `with`, or closed at the end."""

    def __init__(self, budget: FrameBudget, frame_cache: FrameCache | None = None, threads: int = 2) -> None:
        self.budget = budget
        self.frame_cache = frame_cache
        self.threads = threads
        self._open()

    def _open(self) -> None:
        """Threads are started when there is something to do."""
        self._reading = ThreadPoolExecutor(self.threads, thread_name_prefix="media")
        self._building = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    def media(self, sample: Sample) -> Clips:
        """What a sample is about, read while the caller waits. Raises MediaError."""
        return tuple(read_cached(file, self.budget, self.frame_cache) for file in sample.files)

    def submit(self, work: Callable[..., Item], *arguments: Any) -> Future[Item]:
        """`work(*arguments)` in a reading thread, after what was asked for before."""
        return self._reading.submit(work, *arguments)

    def batches(
        self, batches: Iterable[Batch], build: Callable[[Sample, Clips], Built], ahead: int = 1
    ) -> Iterator[list[Built | Unusable]]:
        """For each batch and frame count, in order: what `build` makes of every sample, or why it cannot.

        build: called in one thread; what it raises beside MediaError and PromptError is raised here. ahead:
        batches whose media are read meanwhile, from 1. Neighbouring samples about one clip are decoded once,
        and so is a clip for all frame counts of its batch.
        """
        building = (
            [self._building.submit(_built, build, sample, clip, place) for sample, clip in clips]
            for batch, clips in _held_back(self._decoding(batches), ahead - 1)
            for place in range(max(1, len(batch.counts)))
        )
        for futures in _held_back(building, 1):
            yield [future.result() for future in futures]

    def _decoding(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Reading]]:
        """Batches whose clips begin to be read."""
        clips: OrderedDict[tuple[Any, ...], Future[Clip]] = OrderedDict()
        for batch in batches:
            counts = batch.counts or (self.budget.max_frames,)
            pairs = []
            for sample in batch.samples:
                key = (sample.shown, counts)
                if key not in clips:
                    clips[key] = self.submit(self._clip, sample, counts)
                clips.move_to_end(key)
                pairs.append((sample, clips[key]))
            while len(clips) > len(batch.samples):  # neighbouring questions may be about one clip
                clips.popitem(last=False)
            yield batch, pairs

    def _clip(self, sample: Sample, counts: tuple[int, ...]) -> Clip:
        try:
            files = [read_cached_at(file, self.budget, counts, self.frame_cache) for file in sample.files]
            return list(zip(*files, strict=True))
        except MediaError as error:
            return error

    def close(self) -> None:
        """Forgets what has not begun, and waits for what has. The reader may be used again."""
        for pool in (self._building, self._reading):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._reading, self._building):
            pool.shutdown(wait=True)
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended_by: object) -> None:
        self.close()


def _held_back(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, each when the next `count` of them are there as well."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _built(
    build: Callable[[Sample, Clips], Built], sample: Sample, clip: Future[Clip], place: int
) -> Built | Unusable:
    found = clip.result()
    if isinstance(found, MediaError):
        return found
    try:
        return build(sample, found[place])
    except (MediaError, PromptError) as error:
        return error


def quarantined(sample: Sample, error: Unusable) -> dict[str, Any]:
    """A line of quarantine.jsonl: which question cannot be used, for which of its files, and why."""
    path = error.path if isinstance(error, MediaError) else sample.path
    return {"problem_id": sample.problem_id, "path": path, "kind": error.kind, "reason": error.reason}


def derived_generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derived_seed(*parts)`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@dataclass(frozen=True, slots=True)
class Question:
    """A sample with its prompts."""

    sample: Sample
    ordered: Prompt
    shuffled: Prompt | None  # with the contrast clip; None where nothing is compared with one
    seed: int  # fixes its completions, whichever questions it is sampled with


def build_question(
    sample: Sample,
    media: Shown,
    builder: PromptBuilder,
    generator: torch.Generator,
    contrast: Contrast | None,
    unit: ContrastUnit = "frame",
) -> Question:
    """A sample's prompt, and that with the contrast clip, which images have not. Raises PromptError."""
    seed = int(torch.randint(2**62, (), generator=generator))
    shuffled = None
    if contrast is not None:
        shuffled = contrast_prompt(sample, media, builder, contrast, generator, unit)
    return Question(sample, builder.build(sample, media), shuffled, seed)
