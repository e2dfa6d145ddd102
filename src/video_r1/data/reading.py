"""The reader: decodes the media of samples ahead of training, evaluation and teachers.

    batches ─► reading threads ─► media of every frame count ─► one thread ─► built by the caller (prompts)
               (a clip once)       (`ahead` batches, as bytes)   (one batch ahead)

A reading thread waits for a worker process that decodes (decoders.py), or finds frames in the frame cache.
Prompts hold pixels as float32 in every order, media hold bytes once: media are therefore prefetched for
several batches, prompts only for the current and the next one. Training draws its questions one by one and
submits its own work to the same threads (`submit`).
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

import torch

from video_r1.data.decoding.decoders import read_media_at
from video_r1.data.decoding.frame_cache import FrameCache
from video_r1.data.decoding.media import Media, Shown
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder, contrast_prompt
from video_r1.errors import MediaError, PromptError
from video_r1.seeds import derived_seed
from video_r1.settings.frames import Contrast, ContrastUnit, FrameBudget

Item = TypeVar("Item")
Built = TypeVar("Built")
Clips = tuple[Media, ...]  # of one sample: one for each of its files
Unusable = MediaError | PromptError
"""Reason why a question cannot be used; returned in its place."""
_Decoded = Future[list[Clips]]  # for each frame count


class Batch(NamedTuple):
    """Samples that are read together, for each max_frames in `counts` (empty: the budget's)."""

    samples: Sequence[Sample]
    counts: tuple[int, ...] = ()


class Reader:
    """Threads that read media under one budget. Thread-safe; use `with`, or close it at the end."""

    def __init__(self, budget: FrameBudget, frame_cache: FrameCache | None = None, threads: int = 2) -> None:
        self.budget = budget
        self.frame_cache = frame_cache
        self.threads = threads
        self._open()

    def _open(self) -> None:
        self._reading = ThreadPoolExecutor(self.threads, thread_name_prefix="media")
        self._building = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    def media(self, sample: Sample) -> Clips:
        """Read a sample's media in the caller's thread. Raises MediaError."""
        return self._read(sample, (self.budget.max_frames,))[0]

    def _read(self, sample: Sample, counts: tuple[int, ...]) -> list[Clips]:
        """Read the media for each frame count."""
        read = self.frame_cache.read if self.frame_cache else read_media_at
        files = [read(file, self.budget, counts) for file in sample.files]
        return list(zip(*files, strict=True)) or [()] * len(counts)  # text alone

    def submit(self, work: Callable[..., Item], *arguments: Any) -> Future[Item]:
        """Run `work(*arguments)` in a reading thread, after earlier requests."""
        return self._reading.submit(work, *arguments)

    def batches(
        self, batches: Iterable[Batch], build: Callable[[Sample, Clips], Built], ahead: int = 1
    ) -> Iterator[list[Built | Unusable]]:
        """Yield, for each batch and frame count, the result of `build` for every sample, or its `Unusable`.

        build: called in one thread; other exceptions than MediaError and PromptError are raised here. ahead:
        batches to prefetch, from 1. A clip is decoded once for neighbouring samples and for all frame counts
        of its batch.
        """
        building = (
            [self._building.submit(_built, build, sample, clip, place) for sample, clip in clips]
            for batch, clips in _delayed(self._decoding(batches), ahead - 1)
            for place in range(max(1, len(batch.counts)))
        )
        for futures in _delayed(building, 1):
            yield [future.result() for future in futures]

    def _decoding(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[tuple[Sample, _Decoded]]]]:
        """Start to read the clips of each batch and yield it."""
        clips: OrderedDict[tuple[Any, ...], _Decoded] = OrderedDict()
        for batch in batches:
            counts = batch.counts or (self.budget.max_frames,)
            pairs = []
            for sample in batch.samples:
                key = (sample.files, counts)
                if key not in clips:
                    clips[key] = self.submit(self._read, sample, counts)
                clips.move_to_end(key)
                pairs.append((sample, clips[key]))
            while len(clips) > len(batch.samples):  # neighbouring questions may be about one clip
                clips.popitem(last=False)
            yield batch, pairs

    def close(self) -> None:
        """Cancel pending work and wait for running work. The reader may be used again."""
        for pool in (self._building, self._reading):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._reading, self._building):
            pool.shutdown(wait=True)
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended_by: object) -> None:
        self.close()


def _delayed(items: Iterable[Item], count: int) -> Iterator[Item]:
    """Yield each item when the next `count` items have been drawn."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _built(
    build: Callable[[Sample, Clips], Built], sample: Sample, clip: _Decoded, place: int
) -> Built | Unusable:
    try:
        return build(sample, clip.result()[place])
    except (MediaError, PromptError) as error:
        return error


def quarantined(sample: Sample, error: Unusable) -> dict[str, Any]:
    """Return the line of quarantine.jsonl for a question: which file cannot be used, and why."""
    path = error.path if isinstance(error, MediaError) else sample.path
    return {"problem_id": sample.problem_id, "path": path, "kind": error.kind, "reason": error.reason}


def derived_generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by `derived_seed(*parts)`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@dataclass(frozen=True, slots=True)
class Question:
    """A sample with its prompts."""

    sample: Sample
    ordered: Prompt
    contrast: Prompt | None  # with the contrast clip; None without one
    seed: int  # of its completions, independent of the other questions in the batch
    teacher: Prompt | None = None  # with the teacher's clips


def build_question(
    sample: Sample,
    media: Shown,
    builder: PromptBuilder,
    generator: torch.Generator,
    contrast: Contrast | None,
    unit: ContrastUnit = "frame",
) -> Question:
    """Build a sample's prompts: ordered, and with the contrast clip (images: None). Raises PromptError."""
    seed = int(torch.randint(2**62, (), generator=generator))
    changed = None
    if contrast is not None:
        changed = contrast_prompt(sample, media, builder, contrast, generator, unit)
    return Question(sample, builder.build(sample, media), changed, seed)
