"""Evaluation: every question with every frame count in every frame order, scored.

asking.py ─► score ─► predictions-<frames>.jsonl ─► summary.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from video_r1.data.answers import extract_answer, parse_number, read_answer
from video_r1.data.prompts import Prompt, TextPrompts
from video_r1.data.records import Sample
from video_r1.data.rollouts import Rollout
from video_r1.evaluation.asking import Answers, Asking, asked_with
from video_r1.evaluation.metrics import mean_relative_accuracy
from video_r1.evaluation.predictions import NEEDED
from video_r1.evaluation.summary import summarise
from video_r1.files import replace_json
from video_r1.processes import decided_by_first
from video_r1.rewards.correctness import correctness
from video_r1.rewards.shaping import format_reward
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.settings.decoding import Answer, EvalSettings
from video_r1.settings.frames import FrameBudget


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

    Files in `folder`: `predictions-<frames>.jsonl`, one line for each question and order, and of direct
    answers `direct-<frames>.jsonl`;
    `quarantine.jsonl`, the questions that could not be asked, which are left out of the figures;
    `evaluation.json`, what makes the figures.
    Started again with the same settings it continues, tries the quarantined questions again, and its figures
    cover all samples. Every process of the command calls it, with an engine of its own, and has the summary.
    Raises what `Asking.run` raises.
    """
    sampling = SamplingSettings.of(settings)
    made_with = asked_with(samples, prompt_builder, budget, settings, sampling)
    asking = _Evaluation(
        samples, engine, prompt_builder, folder, settings.order, settings.frame_counts, sampling,
        settings.seed, settings.batch_size, settings.answer,
    )  # fmt: skip
    asking.run(made_with, budget, settings)
    return decided_by_first(lambda: asking.summary(made_with))


@dataclass(frozen=True)
class _Evaluation(Asking):
    what: ClassVar = "an evaluation"
    doing: ClassVar = "evaluating"
    answers: ClassVar = "predictions"
    settings_file: ClassVar = "evaluation.json"
    needed: ClassVar = NEEDED

    def record(
        self, sample: Sample, prompt: Prompt, rollouts: Sequence[Rollout], frames: int
    ) -> dict[str, Any]:
        (rollout,) = rollouts
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

    def summary(self, made_with: Mapping[str, Any]) -> dict[str, Any]:
        """For the first process, when all are done: merges their files and writes the summary."""
        merged = self.merged()
        frames = {
            str(count): self.figures({way: merged[count, way] for way in self.ways}) for count in self.counts
        }
        summary = {
            "questions": len(self.samples),
            "answer": list(self.ways),
            "settings": made_with,
            "frames": frames,
        }
        replace_json(self.folder / "summary.json", summary)
        return summary

    def figures(self, answered: Mapping[Answer, Answers]) -> dict[str, Any]:
        """Figures over all samples and the orders of this run, whichever run answered them."""
        wanted = self.keys(self.samples)
        records = {way: [found[key] for key in wanted if key in found] for way, found in answered.items()}
        keys = [key for key in wanted if all(key in found for found in answered.values())]
        return summarise(records.get("reasoned", []), records.get("direct", [])) | {
            "skipped": self.skipped(dict.fromkeys(keys))
        }
