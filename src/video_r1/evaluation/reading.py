"""Prompts of the next questions, made while the engine is busy with the present ones.

    batches ─► decoding threads ─► media of every frame count ─► one thread ─► prompts of a batch
               (a clip once)        (two batches ahead)                          with one frame count
                                                                                 (one ahead)

Prompts hold pixels as float32 and in every order, media as bytes and once: so media are kept for some
batches and prompts only for the present unit of work and the next.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from video_r1.data.frame_cache import FrameCache, read_cached_at
from video_r1.data.media import Media, shuffled_order
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.records import Sample
from video_r1.errors import MediaError, PromptError
from video_r1.settings.frames import FrameBudget

Order = Literal["ordered", "shuffled"]
Clip = list[Media] | MediaError  # one for each frame count
Loaded = list[Prompt] | MediaError | PromptError  # of one question and frame count: a prompt for each order

BATCHES_AHEAD = 2  # decoded while the engine is busy
_PROMPTS_AHEAD = 1


@dataclass(frozen=True, slots=True)
class Batch:
    number: int  # among the batches of the evaluation, from 0
    samples: Sequence[Sample]
    counts: tuple[int, ...]  # the frame counts with which it is asked


class Unit(NamedTuple):
    """A batch with one frame count: what the engine is asked in one call."""

    batch: Batch
    count: int
    questions: list[Loaded]


@dataclass(frozen=True, slots=True)
class Reader:
    """How questions become prompts. budget: its `max_frames` is not used, the batches say how many frames."""

    prompt_builder: PromptBuilder
    budget: FrameBudget
    orders: tuple[Order, ...]
    seed: int
    cache: FrameCache | None = None

    def orders_of(self, sample: Sample) -> tuple[Order, ...]:
        """An image has no frame order and is asked once."""
        return tuple(order for order in self.orders if order == "ordered" or sample.data_type == "video")

    def units(self, batches: Iterable[Batch], workers: int) -> Iterator[Unit]:
        """The units of work of the batches, in order. workers: threads that decode."""
        decoders = ThreadPoolExecutor(workers, thread_name_prefix="evaluation-media")
        builder = ThreadPoolExecutor(1, thread_name_prefix="evaluation-prompts")
        ahead: deque[tuple[Batch, int, list[Future[Loaded]]]] = deque()
        try:
            for batch, clips in self._decoded(batches, decoders):
                for place, count in enumerate(batch.counts):
                    pairs = zip(batch.samples, clips, strict=True)
                    loading = [builder.submit(self._load, sample, clip, place) for sample, clip in pairs]
                    ahead.append((batch, count, loading))
                    if len(ahead) > _PROMPTS_AHEAD:
                        yield _unit(*ahead.popleft())
            while ahead:
                yield _unit(*ahead.popleft())
        finally:
            for pool in (builder, decoders):
                pool.shutdown(wait=False, cancel_futures=True)
            for pool in (decoders, builder):
                pool.shutdown(wait=True)

    def _decoded(
        self, batches: Iterable[Batch], decoders: ThreadPoolExecutor
    ) -> Iterator[tuple[Batch, list[Future[Clip]]]]:
        """Batches whose clips are being decoded, together with those of the next ones."""
        clips: OrderedDict[tuple[Any, ...], Future[Clip]] = OrderedDict()
        waiting: deque[tuple[Batch, list[Future[Clip]]]] = deque()
        for batch in batches:
            futures = []
            for sample in batch.samples:
                key = (sample.path, sample.data_type, sample.start, sample.end, batch.counts)
                if key not in clips:
                    clips[key] = decoders.submit(self._read, sample, batch.counts)
                clips.move_to_end(key)
                futures.append(clips[key])
            while len(clips) > len(batch.samples):  # neighbouring questions may be about one clip
                clips.popitem(last=False)
            waiting.append((batch, futures))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _read(self, sample: Sample, counts: tuple[int, ...]) -> Clip:
        try:
            return read_cached_at(sample, self.budget, counts, self.cache)
        except MediaError as error:
            return error

    def _load(self, sample: Sample, clip: Future[Clip], place: int) -> Loaded:
        """The sample's prompts in each order, with the frame count at `place`."""
        found = clip.result()
        if isinstance(found, MediaError):
            return found
        media, prompts = found[place], []
        try:
            for order in self.orders_of(sample):
                permutation = None
                if order == "shuffled":
                    if len(media.frames) < 2:
                        raise MediaError(sample.path, "has one frame, which cannot be shuffled")
                    generator = torch.Generator().manual_seed(derived_seed(self.seed, sample.problem_id))
                    permutation = shuffled_order(len(media.frames), generator)
                prompts.append(self.prompt_builder.build(sample, media, permutation))
        except (MediaError, PromptError) as error:
            return error
        return prompts


def _unit(batch: Batch, count: int, loading: list[Future[Loaded]]) -> Unit:
    return Unit(batch, count, [future.result() for future in loading])


def derived_seed(*parts: Any) -> int:
    """A seed in [0, 2^63) that follows from `parts` alone, on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
