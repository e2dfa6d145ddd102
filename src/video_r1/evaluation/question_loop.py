"""The question loop: many questions asked of an engine, with resume, and shared over ranks.

    samples ─► open batches ─► own share ─► Reader ─────────► prompts ─► engine ─► record
                                            (decodes ahead)              (one call a batch and round)

`QuestionLoop` asks for an evaluation or an audit. A round is one frame count and one way of answering. The
contrast clip and the sampling seeds of a question follow from the seed and the question alone. Each rank
writes to its own files, part-<rank>.<answers>-<frames>.jsonl, and rank 0 merges them in the manifest's order,
so the number of ranks leaves no trace.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_args

from video_r1.console import Progress, tell
from video_r1.data.decoding.frame_cache import media_state, open_frame_cache
from video_r1.data.decoding.media import Shown, clips_of
from video_r1.data.manifests.records import Sample, samples_digest
from video_r1.data.prompts import Prompt, TextPrompts, blind_prompt, contrast_prompt
from video_r1.data.reading import Batch, Clips, Reader, Unusable, derived_generator, quarantined
from video_r1.data.rollouts import Rollout
from video_r1.errors import MediaError, RequestError
from video_r1.files import json_lines, part_of, parts_of, replacing, whole_lines, without_links
from video_r1.fingerprint import REMEDY, Changes, contents, continue_or_refuse, digest, refuse_changed
from video_r1.processes import decided_by_first, own_share, process_count, process_index, wait_for_everyone
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.rollout.engine_factory import inference_dtype, is_endpoint
from video_r1.seeds import derived_seed
from video_r1.settings.decoding import Answer, AuditSettings, DecodingSettings, EvalSettings
from video_r1.settings.frames import FrameBudget, Order

# Fields that decide a prompt's pixels, without the frame count: each has its own file.
_BUDGET_FIELDS = ("fps", "min_frames", "frame_pixels", "image_pixels", "size_multiple")
CLIP_FIELDS = ("problem_id", "data_type", "start", "end", "fps", "play")
_BATCHES_AHEAD = 3  # batches whose media are decoded while the engine is busy
DIRECT_TOKENS = 128  # longest direct answer

Key = tuple[str | int, str]  # problem_id, order
Round = tuple[int, Answer]  # frame count, way of answering
Answers = dict[Key, dict[str, Any]]  # records
Work = TypeVar("Work")
Built = TypeVar("Built")


def run_share(
    work: Sequence[Work],
    size: Callable[[Work], int],
    answer: Callable[[Sequence[Work]], Generator[int]],
    doing: str,
    answered: int = 0,
) -> None:
    """Answer this rank's share of the work, with a progress bar.

    size: questions in a piece of work. answer: records answers, and yields the numbers of questions that are
    done. doing: title of the bar; answered: questions of earlier runs.
    """
    own = own_share(work)
    title = doing + (f" (process 1 of {process_count()})" if process_count() > 1 else "")
    total = answered + sum(map(size, own))
    with (
        closing(answer(own)) as finished,
        Progress(total, title, "questions", quiet=process_index() > 0, done=answered) as bar,
    ):
        for count in finished:
            bar.update(count)


class BatchRead(NamedTuple, Generic[Built]):
    """A batch with one frame count. usable: samples with their prompts; failed: samples that have none."""

    frames: int
    samples: Sequence[Sample]
    usable: list[tuple[Sample, Built]]
    failed: list[tuple[Sample, Unusable]]


def read_batches(
    reader: Reader, batches: Sequence[Batch], build: Callable[[Sample, Clips], Built], ahead: int = 1
) -> Iterator[BatchRead[Built]]:
    """Yield each batch with each of its frame counts; media are decoded `ahead` batches before their turn."""
    units = [(b.samples, count) for b in batches for count in b.counts or (reader.budget.max_frames,)]
    for (samples, count), built in zip(units, reader.batches(batches, build, ahead), strict=True):
        pairs = list(zip(samples, built, strict=True))
        failed: Any = [pair for pair in pairs if isinstance(pair[1], Unusable)]
        usable: Any = [pair for pair in pairs if not isinstance(pair[1], Unusable)]
        yield BatchRead(count, samples, usable, failed)


def build_prompt(sample: Sample, media: Shown, builder: TextPrompts, order: Order, seed: int) -> Prompt:
    """Build a sample's prompt in one frame order. Raises PromptError, and MediaError for too few frames."""
    if order == "ordered":
        return builder.build(sample, media)
    if order in ("elsewhere", "no-look"):
        return builder.build(sample, media, contrast=order)
    if order == "blind":
        return blind_prompt(sample, media, builder)
    prompt = contrast_prompt(sample, media, builder, order, derived_generator(seed, sample.problem_id))
    if prompt is None:
        frames = max(len(clip.frames) for clip in clips_of(media))
        what = "an image" if sample.data_type == "image" else f"a clip of {frames} frame(s)"
        raise MediaError(sample.path, f"is {what}, which cannot be {order}; ask in order, or blind")
    return prompt


def sampling_seed(seed: int, frames: int, sample: Sample, order: Order, way: Answer = "reasoned") -> int:
    """Return the seed of one prompt's answers, whatever else is in the batch."""
    ways = [way] if way == "direct" else []
    return derived_seed(seed, frames, sample.problem_id, order, *ways, bits=62)


def asked_with(
    samples: Sequence[Sample],
    prompt_builder: TextPrompts,
    budget: FrameBudget,
    settings: DecodingSettings,
    sampling: SamplingSettings,
    engine: RolloutEngine | None = None,
    fields: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the settings that answers depend on, as JSON values by name (see fingerprint.py).

    engine: knows the name of the model at an endpoint. fields: of the samples, that count besides the clips
    and the prompts. Every rank calls it.
    """
    sizes = {name: getattr(budget, name) for name in _BUDGET_FIELDS}
    model = (engine.served_model if engine is not None else None) or settings.model
    return {
        "seed": settings.seed,
        "sampling": asdict(sampling),
        "budget": sizes | ({"least_pixels": budget.least_pixels} if budget.least_pixels else {}),
        "questions": samples_digest(samples, (*CLIP_FIELDS, *fields)),
        "prompts": digest([prompt_builder.question(sample) for sample in samples]),
        **settings.tool_values(),
        "model": model,
        **engine_facts(settings, model),
    }


def engine_facts(settings: DecodingSettings, model: str | None) -> dict[str, Any]:
    """Return the kind of engine and, except for an endpoint, the model's contents and the number format."""
    if is_endpoint(settings.engine):
        return {"engine": "endpoint"}
    files = decided_by_first(lambda: contents(str(model)))
    dtype = settings.dtype if files is None else inference_dtype(settings, str(model))
    kind = "server" if settings.engine.startswith("http") else settings.engine
    return {"engine": kind, "model_files": files, "dtype": dtype}


def changed_media(samples: Sequence[Sample], recorded: Mapping[Any, Any], budget: FrameBudget) -> Changes:
    """Return up to three media that have changed since their question was answered; a missing file has not.

    recorded: the `media_state` at that time by problem_id.
    """
    asked = (sample for sample in samples if recorded.get(sample.problem_id))
    states = ((one, recorded[one.problem_id], media_state(one, budget)) for one in asked)
    other = ((f"media {one.path}", (old, now)) for one, old, now in states if now not in (None, old))
    return dict(islice(other, 3))


@dataclass(frozen=True)
class QuestionLoop(ABC):
    """Every sample, asked in each of `orders` with at most each of `counts` frames, answered into `folder`.

    budget: its `max_frames` is replaced by each of `counts`. Files: `<answers>-<frames>.jsonl` (direct
    answers: `direct-<frames>.jsonl`), a line for each question and order; `quarantine.jsonl`, questions that
    could not be asked; `<settings_file>`, what answers depend on.
    """

    samples: Sequence[Sample]
    engine: RolloutEngine
    prompt_builder: TextPrompts
    budget: FrameBudget
    settings: EvalSettings | AuditSettings
    folder: Path
    sampling: SamplingSettings
    orders: Sequence[Order]
    counts: Sequence[int]
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
        """Return the record of the answers to one prompt, with all `needed` fields."""

    def revised(self, sample: Sample, record: dict[str, Any]) -> dict[str, Any]:
        """Return an earlier record, scored again if the sample's row is scored in another way now."""
        return record

    def orders_of(self, sample: Sample) -> list[Order]:
        """Return the orders in which the sample is asked: images only in their own."""
        return [order for order in self.orders if order == "ordered" or sample.data_type == "video"]

    def run(self, made_with: Mapping[str, Any]) -> None:
        """Ask what is not answered yet or in quarantine; return when every rank has asked its share.

        made_with: see `asked_with`. Raises RequestError when the folder holds answers made with other
        settings, when a file of answers is damaged, for no samples, for two with one problem_id, and for
        direct answers to samples with `messages`; VideoR1Error when a rank is lost.
        """
        if not self.samples:
            raise RequestError(f"nothing to ask for {self.what}: the manifest has no samples")
        if len({sample.problem_id for sample in self.samples}) < len(self.samples):
            raise RequestError("problem_id occurs twice among the samples; each needs its own")
        if "direct" in self.ways and any(sample.messages for sample in self.samples):
            raise RequestError(
                "answer: direct replaces the prompt's wording, but the manifest has rows with `messages`, "
                "which are asked word for word; remove direct from --answer"
            )
        self.folder.mkdir(parents=True, exist_ok=True)

        def begin() -> dict[Round, set[Key]]:
            continue_or_refuse(self.folder / self.settings_file, made_with, self.what)
            for path in (self.quarantine, *parts_of(self.quarantine)):
                path.unlink(missing_ok=True)
            found = {each: self.answered(each) for each in self.rounds}
            states = {key[0]: one.get("media") for each in found.values() for key, one in each.items()}
            other = changed_media(self.samples, states, self.budget)
            refuse_changed(f"{self.folder} holds {self.what}", other, REMEDY)
            return {each: set(records) for each, records in found.items()}

        done = decided_by_first(begin)
        batches = self.open_batches(done)
        answered = len(self.samples) * len(self.counts) - sum(map(_asked, batches))
        cache = open_frame_cache(self.settings.frame_cache, self.settings.frame_cache_gb)
        with Reader(self.budget, cache) as reader:
            run_share(batches, _asked, lambda own: self.ask(reader, own, done), self.doing, answered)
        wait_for_everyone()

    @property
    def rounds(self) -> list[Round]:
        return [(count, way) for count in self.counts for way in self.ways]

    def answers_path(self, current: Round) -> Path:
        count, way = current
        return self.folder / f"{'direct' if way == 'direct' else self.answers}-{count}.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.folder / "quarantine.jsonl"

    def answered(self, current: Round) -> Answers:
        """Return the round's records, also those that are not merged yet."""
        records = _with_parts(self.answers_path(current), self.needed)
        return {(record["problem_id"], record["order"]): record for record in records}

    def keys(self, samples: Sequence[Sample]) -> list[Key]:
        return [(sample.problem_id, order) for sample in samples for order in self.orders_of(sample)]

    def skipped(self, answered: Iterable[Key]) -> int:
        """Return how many questions could not be asked."""
        asked = {sample.problem_id for sample in self.samples if self.orders_of(sample)}
        return len(asked - {problem_id for problem_id, _ in answered})

    def open_batches(self, done: Mapping[Round, Set[Key]]) -> list[Batch]:
        """Return the batches with an open question, each with the frame counts in which it has one."""
        batches, size = [], self.settings.batch_size
        for chosen in (self.samples[at : at + size] for at in range(0, len(self.samples), size)):
            keys = set(self.keys(chosen))
            counts = dict.fromkeys(count for count, way in self.rounds if not keys <= done[count, way])
            if counts:
                batches.append(Batch(chosen, tuple(counts)))
        return batches

    def ask(self, reader: Reader, batches: Sequence[Batch], done: Mapping[Round, Set[Key]]) -> Generator[int]:
        """Ask the batches and append what is not done to this rank's files.

        A round of a batch is asked again as a whole or not at all, so that padding is the same.
        """
        builder, seed = self.prompt_builder, self.settings.seed
        direct = builder.with_template(builder.template.direct())
        builders: dict[Answer, TextPrompts] = {
            way: direct if way == "direct" else builder for way in self.ways
        }

        def build(sample: Sample, media: Shown) -> dict[Answer, list[Prompt]]:
            orders = self.orders_of(sample)
            return {
                way: [build_prompt(sample, media, builder, order, seed) for order in orders]
                for way, builder in builders.items()
            }

        for read in read_batches(reader, batches, build, _BATCHES_AHEAD):
            for way in self.ways:
                current = (read.frames, way)
                asked = [(sample, prompt) for sample, prompts in read.usable for prompt in prompts[way]]
                if any((sample.problem_id, prompt.order) not in done[current] for sample, prompt in asked):
                    self.ask_round(current, asked, done[current])
            failed = [{**quarantined(sample, error), "frames": read.frames} for sample, error in read.failed]
            append_records(own_file(self.quarantine), failed)
            yield len(read.samples)

    def ask_round(self, current: Round, asked: Sequence[tuple[Sample, Prompt]], done: Set[Key]) -> None:
        (count, way), seed = current, self.settings.seed
        seeds = tuple(sampling_seed(seed, count, sample, prompt.order, way) for sample, prompt in asked)
        longest = self.sampling.max_tokens
        longest = min(longest, DIRECT_TOKENS) if way == "direct" else longest
        sampling = replace(self.sampling, seed=seeds, max_tokens=longest)
        outputs = self.engine.sample([prompt for _, prompt in asked], sampling)
        records = [
            {**self.record(sample, prompt, rollouts, count), "media": media_state(sample, self.budget)}
            for (sample, prompt), rollouts in zip(asked, outputs, strict=True)
            if (sample.problem_id, prompt.order) not in done
        ]
        append_records(own_file(self.answers_path(current)), records)

    def merge(self) -> dict[Round, Answers]:
        """On rank 0: merge the files of all ranks in the manifest's order; return the answers by round."""
        places = {sample.problem_id: place for place, sample in enumerate(self.samples)}
        found = {}

        def place(record: Mapping[str, Any]) -> tuple[int, int]:  # questions not asked now come last
            rank = get_args(Order).index(record["order"]) if "order" in record else record["frames"]
            return places.get(record["problem_id"], len(places)), rank

        for each in self.rounds:
            path, answered = self.answers_path(each), self.answered(each)
            before, here = list(answered.values()), [key for key in answered if key[0] in places]
            answered |= {key: self.revised(self.samples[places[key[0]]], answered[key]) for key in here}
            found[each], now = answered, sorted(answered.values(), key=place)
            if anew := sum(one is not other for one, other in zip(before, answered.values(), strict=True)):
                tell(f"{path}: {anew:,} answers are scored anew: their rows have changed")
            _replace_if_new(path, before, now)
        bad = _with_parts(self.quarantine, {"problem_id", "frames"})
        _replace_if_new(self.quarantine, bad, sorted(bad, key=place))
        return found


def _asked(batch: Batch) -> int:
    return len(batch.samples) * len(batch.counts)


def own_file(path: Path) -> Path:
    """Return the file to which this rank writes its share of `path`."""
    return path if process_count() == 1 else part_of(path, process_index())


def _replace_if_new(path: Path, before: list[Any], records: list[Any]) -> None:
    """Write the records to `path` unless they are its content (`before`), and remove its parts."""
    if (parts := parts_of(path)) or records != before:
        with replacing(path) as file:
            file.write(json_lines(records).decode())
    for part in parts:
        part.unlink()


def _with_parts(path: Path, needed: Set[str]) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file and its parts, if they exist; each has the fields `needed`.

    Removes a last line that was cut off. Raises RequestError for any other line that is no record.
    """
    records = []
    for each in filter(Path.is_file, (path, *parts_of(path))):
        with each.open("r+b") as file:
            for number, _, record in whole_lines(file):
                if record is None or not record.keys() >= needed:
                    raise RequestError(f"{each}, line {number} is not a prediction; delete it to ask again")
                records.append(record)
    return records


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append a line for each record and flush them to the disk; write nothing if there are none."""
    if lines := json_lines(records):
        with open(path, "ab", opener=without_links) as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
