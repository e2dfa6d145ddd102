"""Evaluation: every question with every frame count in every frame order, restartable.

    samples ─► batches ─► media, prompts ─► engine ─► score ─► predictions-<frames>.jsonl ─► summary.json
                          (data/reading.py) (one call a batch
                                             and frame count)

The unit of work is a batch of consecutive questions with one frame count. The shuffled order of a question
and its sampling seeds follow from the evaluation's seed and the question alone, so that a question which is
asked again, in whatever batch, is asked as it was before.

Several processes share the batches and write to files of their own,
part-<process>.predictions-<frames>.jsonl, which the first one merges in the manifest's order: how many there
were, and which of them were killed, leaves no trace.
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

from video_r1.data.answers import extract_answer, parse_number, read_answer
from video_r1.data.contrasts import contrast_prompt
from video_r1.data.frame_cache import open_frame_cache
from video_r1.data.media import Media
from video_r1.data.prompts import Prompt, TextPrompts
from video_r1.data.reading import Batch, Reader, Unusable, derived_generator, quarantined
from video_r1.data.records import Sample
from video_r1.data.rollouts import Rollout
from video_r1.errors import MediaError, PromptError, RequestError
from video_r1.evaluation.metrics import mean_relative_accuracy
from video_r1.evaluation.predictions import append_records, merge_parts, read_with_parts
from video_r1.evaluation.summary import summarise
from video_r1.files import differences, digest, part_of, parts_of, replace_json
from video_r1.processes import decided_by_first, own_share, process_count, process_index, wait_for_everyone
from video_r1.progress import Progress
from video_r1.rewards.correctness import correctness
from video_r1.rewards.shaping import format_reward
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.seeds import derived_seed
from video_r1.settings.decoding import EvalSettings
from video_r1.settings.frames import FrameBudget, Order

# What decides the pixels of a prompt besides the frame count, which has files of its own.
_BUDGET_FIELDS = ("fps", "min_frames", "frame_pixels", "image_pixels", "size_multiple")
_BATCHES_AHEAD = 3  # whose media are read while the engine is busy

_Key = tuple[str | int, str]  # problem_id and order


class Scored(NamedTuple):
    prediction: str  # the answer that was read, "" for none
    score: float  # of that answer
    strict_score: float  # of the text in the answer tags alone
    format: float  # 1 when the whole output has the answer format


def score_output(sample: Sample, output: str) -> Scored:
    """Scores one output, tolerantly and strictly: regression by MRA, all else by the training reward."""
    prediction = read_answer(output, sample.problem_type, sample.options)
    return Scored(
        prediction,
        _score(sample.problem_type, prediction, sample.answer),
        _score(sample.problem_type, extract_answer(output), sample.answer),
        format_reward(output),
    )


def _score(problem_type: str, prediction: str, truth: str) -> float:
    if problem_type != "regression":
        return correctness(problem_type, prediction, truth)
    numbers = [parse_number(text) for text in (prediction, truth)]
    predicted, expected = (float("nan") if number is None else number for number in numbers)
    return float(mean_relative_accuracy([predicted], [expected])[0])


def evaluate(
    samples: Sequence[Sample],
    engine: RolloutEngine,
    prompt_builder: TextPrompts,
    budget: FrameBudget,
    settings: EvalSettings,
    folder: Path,
) -> dict[str, Any]:
    """Evaluates `engine` on `samples` and returns the summary, which is also written to `summary.json`.

    budget: frame sizes and rate; its `max_frames` is replaced by each of the settings' frame counts.
    settings: the frame counts and orders (images have no shuffled order and are asked once), the sampling,
    and how many questions the engine is given at once, each of them in every order.

    Files in `folder`: `predictions-<frames>.jsonl`, one line for each question and order;
    `quarantine.jsonl`, the questions that could not be asked, which are left out of the figures;
    `evaluation.json`, what makes the figures.
    Started again with the same settings it continues, tries the quarantined questions again, and its figures
    cover all samples. Every process of the command calls it, with an engine of its own, and has the summary.
    Raises RequestError when the folder holds an evaluation with other settings, when a predictions file is
    damaged, and for no samples or two of one name; VideoR1Error when another process is lost.
    """
    if not samples:
        raise RequestError("there is nothing to evaluate: the manifest has no samples")
    if len({sample.problem_id for sample in samples}) < len(samples):
        raise RequestError("problem_id occurs twice among the samples; each needs its own")
    folder.mkdir(parents=True, exist_ok=True)
    made_with = {
        "seed": settings.seed,
        "sampling": asdict(SamplingSettings.of(settings)),
        "budget": {name: getattr(budget, name) for name in _BUDGET_FIELDS},
        "questions": digest([[s.problem_id, s.path, s.solution, s.start, s.end] for s in samples]),
        "prompts": digest([_question_text(prompt_builder, sample) for sample in samples]),
        "model": settings.model,
    }
    run = _Run(samples, engine, prompt_builder, settings, folder)
    done = decided_by_first(lambda: run.begin(made_with))
    with Reader(budget, open_frame_cache(settings.frame_cache, settings.frame_cache_gb)) as reader:
        run.ask_all(reader, {count: set(keys) for count, keys in done.items()})
    wait_for_everyone()
    return decided_by_first(lambda: run.finish(made_with))


@dataclass(frozen=True)
class _Run:
    samples: Sequence[Sample]
    engine: RolloutEngine
    prompt_builder: TextPrompts
    settings: EvalSettings
    folder: Path

    @cached_property
    def places(self) -> dict[str | int, int]:
        """Of each question, in the manifest."""
        return {sample.problem_id: place for place, sample in enumerate(self.samples)}

    def predictions_path(self, frames: int) -> Path:
        return self.folder / f"predictions-{frames}.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.folder / "quarantine.jsonl"

    def begin(self, made_with: dict[str, Any]) -> dict[int, list[_Key]]:
        """For the first process: what is answered already, by frame count. See `evaluate`."""
        path = self.folder / "evaluation.json"
        if path.is_file():
            changed = differences(json.loads(path.read_text(encoding="utf-8")), made_with)
            if changed:
                raise RequestError(  # its predictions would be mixed with these
                    f"{self.folder} holds an evaluation with other settings ({', '.join(changed)}); "
                    "choose another output folder, or delete this one"
                )
        replace_json(path, made_with)
        for path in (self.quarantine, *parts_of(self.quarantine)):
            path.unlink(missing_ok=True)
        return {count: list(self.answered(count)) for count in self.settings.frame_counts}

    def finish(self, made_with: dict[str, Any]) -> dict[str, Any]:
        """For the first process, when all are done: merges their files and writes the summary."""
        figures = {}
        for count in self.settings.frame_counts:
            answered = self.answered(count)
            figures[str(count)] = self.figures(answered)
            merge_parts(self.predictions_path(count), answered.values(), self.place)
        if parts := parts_of(self.quarantine):
            lines = [json.loads(line) for part in parts for line in part.read_bytes().splitlines()]
            append_records(self.quarantine, sorted(lines, key=self.place_in_quarantine))
            for part in parts:
                part.unlink()
        summary = {"questions": len(self.samples), "settings": made_with, "frames": figures}
        replace_json(self.folder / "summary.json", summary)
        return summary

    def place(self, record: Mapping[str, Any]) -> tuple[int, int]:
        """Where a prediction stands in its file."""
        order = self.settings.order
        places = [*order, *(name for name in get_args(Order) if name not in order)]
        return self.places[record["problem_id"]], places.index(record["order"])

    def place_in_quarantine(self, record: Mapping[str, Any]) -> tuple[int, int, int]:
        place = self.places[record["problem_id"]]
        batch = place // self.settings.batch_size
        return batch, self.settings.frame_counts.index(record["frames"]), place

    def answered(self, frames: int) -> dict[_Key, dict[str, Any]]:
        records = read_with_parts(self.predictions_path(frames))
        return {(record["problem_id"], record["order"]): record for record in records}

    def keys(self, samples: Sequence[Sample]) -> list[_Key]:
        """What has to be answered about the samples with one frame count."""
        return [(sample.problem_id, order) for sample in samples for order in self.orders_of(sample)]

    def orders_of(self, sample: Sample) -> list[Order]:
        return [order for order in self.settings.order if order == "ordered" or sample.data_type == "video"]

    def prompts(self, sample: Sample, media: Media) -> list[Prompt]:
        """The sample's prompt in each order. Raises MediaError and PromptError."""
        prompts = []
        for order in self.orders_of(sample):
            if order == "ordered":
                prompts.append(self.prompt_builder.build(sample, media))
                continue
            generator = derived_generator(self.settings.seed, sample.problem_id)
            prompt = contrast_prompt(sample, media, self.prompt_builder, order, generator)
            if prompt is None:
                count = f"{len(media.frames)} frame{'s' * (len(media.frames) != 1)}"
                raise MediaError(sample.path, f"has {count}, which cannot be {order}")
            prompts.append(prompt)
        return prompts

    def ask_all(self, reader: Reader, done: Mapping[int, Set[_Key]]) -> None:
        """Asks this process's share of what is not done, and appends it to its files."""
        samples, frames, size = self.samples, self.settings.frame_counts, self.settings.batch_size
        open_batches = []
        for chosen in (samples[start : start + size] for start in range(0, len(samples), size)):
            keys = set(self.keys(chosen))
            if counts := tuple(count for count in frames if not keys <= done[count]):
                open_batches.append(Batch(chosen, counts))
        own = own_share(open_batches)
        answered = len(samples) * len(frames) - _questions(open_batches)
        title = "evaluating" if process_count() == 1 else f"evaluating (process 1 of {process_count()})"
        quiet = process_index() > 0
        with Progress(answered + _questions(own), title, "questions", quiet=quiet) as bar:
            bar.update(answered)
            units = ((batch.samples, count) for batch in own for count in batch.counts)
            read = reader.batches(own, self.prompts, _BATCHES_AHEAD)
            for (chosen, count), questions in zip(units, read, strict=True):
                self.ask(list(zip(chosen, questions, strict=True)), count, done[count])
                bar.update(len(chosen))

    def ask(
        self, questions: Sequence[tuple[Sample, list[Prompt] | Unusable]], count: int, done: Set[_Key]
    ) -> None:
        """Asks a batch with one frame count.

        It is done again as a whole or not at all: padding then is what it was. A batch whose only open
        questions still cannot be read has nothing to add.
        """
        failed, asked = [], []
        for sample, made in questions:
            if isinstance(made, Unusable):
                failed.append({**quarantined(sample, made), "frames": count})
            else:
                asked += [(sample, prompt) for prompt in made]
        records = []
        if any((sample.problem_id, prompt.order) not in done for sample, prompt in asked):
            seed, sampling = self.settings.seed, SamplingSettings.of(self.settings)
            seeds = tuple(sampling_seed(seed, count, sample, prompt.order) for sample, prompt in asked)
            outputs = self.engine.generate([prompt for _, prompt in asked], replace(sampling, seed=seeds))
            records = [
                _record(sample, prompt, rollouts[0], count)
                for (sample, prompt), rollouts in zip(asked, outputs, strict=True)
                if (sample.problem_id, prompt.order) not in done
            ]
        append_records(own_file(self.predictions_path(count)), records)
        append_records(own_file(self.quarantine), failed)

    def figures(self, answered: Mapping[_Key, dict[str, Any]]) -> dict[str, Any]:
        """Figures over all samples and the orders of this run, whichever run answered them."""
        records = [answered[key] for key in self.keys(self.samples) if key in answered]
        asked = sum(bool(self.orders_of(sample)) for sample in self.samples)
        return summarise(records) | {"skipped": asked - len({record["problem_id"] for record in records})}


def own_file(path: Path) -> Path:
    """Where this process writes its share of `path`."""
    return path if process_count() == 1 else part_of(path, process_index())


def _questions(batches: Sequence[Batch]) -> int:
    """How often a question is asked, over all frame counts."""
    return sum(len(batch.samples) * len(batch.counts) for batch in batches)


def sampling_seed(seed: int, frames: int, sample: Sample, order: Order) -> int:
    """The seed of one answer: of the evaluation's seed and what is asked, whatever it is asked with."""
    return derived_seed(seed, frames, sample.problem_id, order, bits=62)


def _record(sample: Sample, prompt: Prompt, rollout: Rollout, frames: int) -> dict[str, Any]:
    return {
        "problem_id": sample.problem_id,
        "order": prompt.order,
        "output": rollout.text,
        **score_output(sample, rollout.text)._asdict(),
        "answer": sample.answer,
        "frames": frames,
        "tokens": len(rollout.token_ids),
        "finish_reason": rollout.finish_reason,
        "problem_type": sample.problem_type,
        "data_type": sample.data_type,
        "data_source": sample.data_source,
        "task_type": sample.extra.get("task_type", sample.extra.get("family", "")),
    }


def _question_text(prompt_builder: TextPrompts, sample: Sample) -> str:
    try:
        return prompt_builder.question(sample)
    except PromptError as error:  # met again, and listed, when its prompt is made
        return str(error)
