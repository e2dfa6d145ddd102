"""Questions asked of an engine in one order of their frames after another: restartable, shared by processes.

    samples ─► batches ─► media, prompts ─► engine ─► record ─► <answers>-<frames>.jsonl
                          (data/reading.py) (one call a batch   direct-<frames>.jsonl
                                             and round)

A round is one frame count and one way of answering; the unit of work is a batch of consecutive questions in
one round. The contrast clip of a question and
its sampling seeds follow from the seed and the question alone, so that a question which is asked again, in
whatever batch, is asked as it was before.

Several processes share the batches and write to files of their own, part-<process>.<answers>-<frames>.jsonl,
which the first one merges in the manifest's order: how many there were, and which of them were killed, leaves
no trace. What is asked for and what is kept of the answers is said by evaluation (runner.py) and audit.py.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, get_args

from video_r1.console import Progress
from video_r1.data.contrasts import blind_prompt, contrast_prompt
from video_r1.data.decoding.frame_cache import open_frame_cache
from video_r1.data.decoding.media import Shown, clips_of
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, TextPrompts
from video_r1.data.reading import Batch, Reader, Unusable, derived_generator, quarantined
from video_r1.data.rollouts import Rollout
from video_r1.errors import MediaError, PromptError, RequestError
from video_r1.files import json_lines, part_of, parts_of, replacing, whole_lines, without_links
from video_r1.fingerprint import continue_or_refuse, digest
from video_r1.processes import decided_by_first, own_share, process_count, process_index, wait_for_everyone
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.seeds import derived_seed
from video_r1.settings.decoding import Answer, DecodingSettings
from video_r1.settings.frames import FrameBudget, Order

# What decides the pixels of a prompt besides the frame count, which has files of its own.
_BUDGET_FIELDS = ("fps", "min_frames", "frame_pixels", "image_pixels", "size_multiple")
_BATCHES_AHEAD = 3  # whose media are read while the engine is busy

DIRECT_TOKENS = 128  # at most, of an answer without reasoning

Key = tuple[str | int, str]  # problem_id and order
Round = tuple[int, Answer]  # frame count and way of answering
Answers = dict[Key, dict[str, Any]]  # the record of each


def asked_with(
    samples: Sequence[Sample],
    prompt_builder: TextPrompts,
    budget: FrameBudget,
    settings: DecodingSettings,
    sampling: SamplingSettings,
) -> dict[str, Any]:
    """What answers depend on, JSON values by name: those to other settings are never mixed."""
    return {
        "seed": settings.seed,
        "sampling": asdict(sampling),
        "budget": {name: getattr(budget, name) for name in _BUDGET_FIELDS}
        | ({"least_pixels": budget.least_pixels} if budget.least_pixels else {}),
        "questions": digest(
            [
                [s.problem_id, s.path, s.solution, s.start, s.end, *([s.fps] if s.fps else []), *s.more_paths]
                for s in samples
            ]
        ),
        "prompts": digest([_question_text(prompt_builder, sample) for sample in samples]),
        "model": settings.model,
    }


@dataclass(frozen=True)
class QuestionLoop(ABC):
    """Asks every sample in each of `orders` with each of `counts` frames at most.

    sampling: of each answer, without a seed; seed: of the contrast clips and all answers. batch_size:
    questions that the engine is given at once, each in every order. Files in `folder`:
    `<answers>-<frames>.jsonl`, a line for each question and order; `quarantine.jsonl`, the questions that
    could not be asked; `<settings_file>`, what the answers depend on. ways: of answering; direct answers are
    in `direct-<frames>.jsonl`.
    """

    samples: Sequence[Sample]
    engine: RolloutEngine
    prompt_builder: TextPrompts
    folder: Path
    orders: Sequence[Order]
    counts: Sequence[int]
    sampling: SamplingSettings
    seed: int
    batch_size: int
    ways: Sequence[Answer] = ("reasoned",)

    what: ClassVar[str]  # "an evaluation"
    doing: ClassVar[str]  # "evaluating"
    answers: ClassVar[str]
    settings_file: ClassVar[str]
    needed: ClassVar[Set[str]]  # fields of a record

    @abstractmethod
    def record(
        self, sample: Sample, prompt: Prompt, rollouts: Sequence[Rollout], frames: int
    ) -> dict[str, Any]:
        """What is kept of the answers to one prompt: `problem_id`, `order` and whatever is `needed`."""

    def orders_of(self, sample: Sample) -> list[Order]:
        """An image has no order but its own."""
        return [order for order in self.orders if order == "ordered" or sample.data_type == "video"]

    def run(self, made_with: Mapping[str, Any], budget: FrameBudget, settings: DecodingSettings) -> None:
        """Asks what is not answered yet; returns when every process has asked its share.

        made_with: see `asked_with`. budget: frame sizes and rate; its `max_frames` is replaced by each of
        `counts`. Questions in quarantine are tried again. Raises RequestError when the folder holds answers
        to other settings, when a file of answers is damaged, for no samples or two of one name, and for
        direct answers to samples that are chats of their own; VideoR1Error when another process is lost.
        """
        if not self.samples:
            raise RequestError(f"there is nothing to ask for {self.what}: the manifest has no samples")
        if len({sample.problem_id for sample in self.samples}) < len(self.samples):
            raise RequestError("problem_id occurs twice among the samples; each needs its own")
        if "direct" in self.ways and any(sample.messages for sample in self.samples):
            raise RequestError(
                "answer: direct asks in words of its own, but the manifest has rows with `messages`, "
                "which are asked as they stand; leave direct out"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        done = decided_by_first(lambda: self.begin(made_with))
        with Reader(budget, open_frame_cache(settings.frame_cache, settings.frame_cache_gb)) as reader:
            self.ask_all(reader, {each: set(keys) for each, keys in done.items()})
        wait_for_everyone()

    @cached_property
    def places(self) -> dict[str | int, int]:
        """Of each question, in the manifest."""
        return {sample.problem_id: place for place, sample in enumerate(self.samples)}

    @property
    def rounds(self) -> list[Round]:
        return [(count, way) for count in self.counts for way in self.ways]

    @cached_property
    def builders(self) -> dict[Answer, TextPrompts]:
        """Of the prompts of each way."""
        builder = self.prompt_builder
        return {"reasoned": builder, "direct": builder.with_template(builder.template.direct())}

    def answers_path(self, current: Round) -> Path:
        count, way = current
        return self.folder / f"{'direct' if way == 'direct' else self.answers}-{count}.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.folder / "quarantine.jsonl"

    def begin(self, made_with: Mapping[str, Any]) -> dict[Round, list[Key]]:
        """For the first process: what is answered already, by round. See `run`."""
        continue_or_refuse(self.folder / self.settings_file, made_with, self.what)
        for path in (self.quarantine, *parts_of(self.quarantine)):
            path.unlink(missing_ok=True)
        return {each: list(self.answered(each)) for each in self.rounds}

    def merged(self) -> dict[Round, Answers]:
        """For the first process, when all are done: merges their files. The answers by round."""
        found = {each: self.answered(each) for each in self.rounds}
        for each, answered in found.items():
            merge_parts(self.answers_path(each), answered.values(), self.place)
        if parts := parts_of(self.quarantine):
            lines = [json.loads(line) for part in parts for line in part.read_bytes().splitlines()]
            append_records(self.quarantine, sorted(lines, key=self.place_in_quarantine))
            for part in parts:
                part.unlink()
        return found

    def place(self, record: Mapping[str, Any]) -> tuple[int, int]:
        """Where a record stands in its file: one of a question that is not asked now stands at the end."""
        places = [*self.orders, *(name for name in get_args(Order) if name not in self.orders)]
        return self.places.get(record["problem_id"], len(self.places)), places.index(record["order"])

    def place_in_quarantine(self, record: Mapping[str, Any]) -> tuple[int, int, int]:
        place = self.places[record["problem_id"]]
        return place // self.batch_size, list(self.counts).index(record["frames"]), place

    def answered(self, current: Round) -> Answers:
        records = read_with_parts(self.answers_path(current), self.needed)
        return {(record["problem_id"], record["order"]): record for record in records}

    def keys(self, samples: Sequence[Sample]) -> list[Key]:
        """What has to be answered about the samples in one round."""
        return [(sample.problem_id, order) for sample in samples for order in self.orders_of(sample)]

    def skipped(self, answered: Mapping[Key, Any]) -> int:
        """How many of the questions could not be asked."""
        asked = {sample.problem_id for sample in self.samples if self.orders_of(sample)}
        return len(asked - {problem_id for problem_id, _ in answered})

    def prompts(self, sample: Sample, media: Shown) -> dict[Answer, list[Prompt]]:
        """The sample's prompts of each way, one in each order. Raises MediaError and PromptError."""
        orders = self.orders_of(sample)
        return {
            way: [self.prompt(sample, media, order, self.builders[way]) for order in orders]
            for way in self.ways
        }

    def prompt(self, sample: Sample, media: Shown, order: Order, builder: TextPrompts) -> Prompt:
        if order == "ordered":
            return builder.build(sample, media)
        if order == "blind":
            return blind_prompt(sample, media, builder)
        generator = derived_generator(self.seed, sample.problem_id)
        prompt = contrast_prompt(sample, media, builder, order, generator)
        if prompt is None:
            most = max(len(clip.frames) for clip in clips_of(media))
            raise MediaError(sample.path, f"has {most} frame{'s' * (most != 1)}, which cannot be {order}")
        return prompt

    def ask_all(self, reader: Reader, done: Mapping[Round, Set[Key]]) -> None:
        """Asks this process's share of what is not done, and appends it to its files."""
        samples, size = self.samples, self.batch_size
        open_batches = []
        for chosen in (samples[start : start + size] for start in range(0, len(samples), size)):
            keys = set(self.keys(chosen))
            counts = dict.fromkeys(count for count, way in self.rounds if not keys <= done[count, way])
            if counts:
                open_batches.append(Batch(chosen, tuple(counts)))
        own = own_share(open_batches)
        answered = len(samples) * len(self.counts) - _questions(open_batches)
        title = self.doing + (f" (process 1 of {process_count()})" if process_count() > 1 else "")
        quiet = process_index() > 0
        with Progress(answered + _questions(own), title, "questions", quiet=quiet) as bar:
            bar.update(answered)
            units = ((batch.samples, count) for batch in own for count in batch.counts)
            read = reader.batches(own, self.prompts, _BATCHES_AHEAD)
            for (chosen, count), questions in zip(units, read, strict=True):
                self.ask(list(zip(chosen, questions, strict=True)), count, done)
                bar.update(len(chosen))

    def ask(
        self,
        questions: Sequence[tuple[Sample, dict[Answer, list[Prompt]] | Unusable]],
        count: int,
        done: Mapping[Round, Set[Key]],
    ) -> None:
        """Asks a batch with one frame count, one way after the other.

        A round of it is done again as a whole or not at all: padding then is what it was. A batch whose only
        open questions still cannot be read has nothing to add.
        """
        usable = [(sample, made) for sample, made in questions if not isinstance(made, Unusable)]
        for way in self.ways:
            asked = [(sample, prompt) for sample, made in usable for prompt in made[way]]
            self.ask_round((count, way), asked, done[count, way])
        failed = [
            {**quarantined(sample, made), "frames": count}
            for sample, made in questions
            if isinstance(made, Unusable)
        ]
        append_records(own_file(self.quarantine), failed)

    def ask_round(self, current: Round, asked: Sequence[tuple[Sample, Prompt]], done: Set[Key]) -> None:
        count, way = current
        if all((sample.problem_id, prompt.order) in done for sample, prompt in asked):
            return
        seeds = tuple(sampling_seed(self.seed, count, sample, prompt.order, way) for sample, prompt in asked)
        longest = self.sampling.max_tokens
        longest = min(longest, DIRECT_TOKENS) if way == "direct" else longest
        outputs = self.engine.generate(
            [prompt for _, prompt in asked], replace(self.sampling, seed=seeds, max_tokens=longest)
        )
        records = [
            self.record(sample, prompt, rollouts, count)
            for (sample, prompt), rollouts in zip(asked, outputs, strict=True)
            if (sample.problem_id, prompt.order) not in done
        ]
        append_records(own_file(self.answers_path(current)), records)


def own_file(path: Path) -> Path:
    """Where this process writes its share of `path`."""
    return path if process_count() == 1 else part_of(path, process_index())


def _questions(batches: Sequence[Batch]) -> int:
    """How often a question is asked, over all frame counts."""
    return sum(len(batch.samples) * len(batch.counts) for batch in batches)


def sampling_seed(seed: int, frames: int, sample: Sample, order: Order, way: Answer = "reasoned") -> int:
    """The seed of one prompt's answers: of the settings' seed and what is asked, whatever is asked beside."""
    ways = [way] if way == "direct" else []
    return derived_seed(seed, frames, sample.problem_id, order, *ways, bits=62)


def _question_text(prompt_builder: TextPrompts, sample: Sample) -> str:
    try:
        return prompt_builder.question(sample)
    except PromptError as error:  # met again, and listed, when its prompt is made
        return str(error)


def read_predictions(path: Path, needed: Set[str]) -> list[dict[str, Any]]:
    """The records of a predictions file, if there is one; each has the fields `needed`. A last line that was
    cut off as it was written is removed, so that its question is asked again. Raises RequestError for any
    other line that is no record."""
    if not path.is_file():
        return []
    records = []
    with path.open("r+b") as file:
        for number, _, record in whole_lines(file):
            if record is None or not record.keys() >= needed:
                raise RequestError(f"{path}, line {number} is no prediction; delete it to have it made again")
            records.append(record)
    return records


def read_with_parts(path: Path, needed: Set[str]) -> list[dict[str, Any]]:
    """The records of a predictions file and of those parts of it that are not merged yet; see
    `read_predictions`."""
    return [record for file in (path, *parts_of(path)) for record in read_predictions(file, needed)]


def merge_parts(
    path: Path, records: Iterable[Mapping[str, Any]], place: Callable[[Mapping[str, Any]], Any]
) -> None:
    """Makes `path` hold the records, which are its own and those of its parts, in the order of `place`, in
    one step; then the parts go. A file that is in this order already is left as it is."""
    records, parts = list(records), parts_of(path)
    ordered = sorted(records, key=place)
    if parts or ordered != records:
        with replacing(path) as file:
            file.write(json_lines(ordered).decode())
        for part in parts:
            part.unlink()


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends one line for each record and waits until the disk has them; writes nothing for no records."""
    if lines := json_lines(records):
        with open(path, "ab", opener=without_links) as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
