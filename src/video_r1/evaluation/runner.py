"""Evaluation: every question with every frame count in every frame order, scored.

asking.py ─► score ─► predictions-<frames>.jsonl ─► summary.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from video_r1.data.manifests.records import Sample, question_digest
from video_r1.data.prompts import Prompt, TextPrompts
from video_r1.data.rollouts import Rollout
from video_r1.evaluation import protocol
from video_r1.evaluation.asking import Answers, Asking, asked_with
from video_r1.evaluation.predictions import NEEDED
from video_r1.evaluation.scoring import score_output
from video_r1.evaluation.summary import check_pairs, summarise
from video_r1.files import replace_json
from video_r1.processes import decided_by_first
from video_r1.rewards.correctness import overlaps
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.settings.decoding import Answer, EvalSettings, Protocol
from video_r1.settings.frames import FrameBudget


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
    how many questions the engine is given at once, each of them in every order, and the protocol, which
    replaces the prompt's template, the size of small frames and the scores.

    Files in `folder`: `predictions-<frames>.jsonl`, one line for each question and order, and of direct
    answers `direct-<frames>.jsonl`;
    `quarantine.jsonl`, the questions that could not be asked, which are left out of the figures;
    `evaluation.json`, what makes the figures.
    Started again with the same settings it continues, tries the quarantined questions again, and its figures
    cover all samples. Every process of the command calls it, with an engine of its own, and has the summary.
    Raises what `Asking.run` raises, and RequestError for `pairs` that are no sets.
    """
    if settings.protocol == "reference":
        samples = [protocol.as_asked(sample) for sample in samples]
        prompt_builder = prompt_builder.with_template(protocol.TEMPLATE)
        budget = protocol.as_sized(budget)
    for sample in samples:
        check_pairs(sample.problem_id, sample.extra.get("pairs", {}))
    sampling = SamplingSettings.of(settings)
    made_with = asked_with(samples, prompt_builder, budget, settings, sampling)
    asking = _Evaluation(
        samples, engine, prompt_builder, folder, settings.order, settings.frame_counts, sampling,
        settings.seed, settings.batch_size, settings.answer,
        settings.protocol,
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

    protocol: Protocol | None = None

    def record(
        self, sample: Sample, prompt: Prompt, rollouts: Sequence[Rollout], frames: int
    ) -> dict[str, Any]:
        (rollout,) = rollouts
        scored = score_output(sample, rollout.text, self.protocol)
        overlap = overlaps(sample.problem_type, scored.prediction, sample.answer)
        return {
            "problem_id": sample.problem_id,
            "question": question_digest(sample.problem, sample.options, sample.answer, sample.paths),
            "order": prompt.order,
            "output": rollout.text,
            **scored._asdict(),
            **({"overlaps": overlap} if overlap else {}),
            "answer": sample.answer,
            "frames": frames,
            "tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            "problem_type": sample.problem_type,
            "data_type": sample.data_type,
            "data_source": sample.data_source,
            "task_type": sample.extra.get("task_type", sample.extra.get("family", "")),
            **{name: sample.extra[name] for name in ("pairs",) if name in sample.extra},
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
        clips = {sample.problem_id: {"clip": sample.shown} for sample in self.samples}
        records = {
            way: [found[key] | clips[key[0]] for key in wanted if key in found]
            for way, found in answered.items()
        }
        keys = [key for key in wanted if all(key in found for found in answered.values())]
        return summarise(records.get("reasoned", []), records.get("direct", [])) | {
            "skipped": self.skipped(dict.fromkeys(keys))
        }
