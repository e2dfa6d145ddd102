"""Predictions: an engine asked all questions of a manifest, each output scored, and the figures over them.

questions ─► question_loop.py ─► score_output ─► predictions-<frames>.jsonl ─► summary.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from video_r1.data.answers import extract_answer, read_answer
from video_r1.data.manifests.records import Sample, question_digest
from video_r1.data.prompts import Prompt, TextPrompts
from video_r1.data.rollouts import Rollout
from video_r1.data.scores import format_reward, overlaps
from video_r1.data.tools import is_control
from video_r1.evaluation import paper
from video_r1.evaluation.metrics import answer_score
from video_r1.evaluation.question_loop import Answers, Key, QuestionLoop, asked_with
from video_r1.evaluation.summary import NEEDED, check_pairs, summarise
from video_r1.files import replace_json
from video_r1.processes import decided_by_first
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.settings.decoding import Answer, EvalSettings, Protocol
from video_r1.settings.frames import FrameBudget, Order


def evaluate(
    samples: Sequence[Sample],
    engine: RolloutEngine,
    prompt_builder: TextPrompts,
    budget: FrameBudget,
    settings: EvalSettings,
    folder: Path,
) -> dict[str, Any]:
    """Evaluate `engine` on `samples`; return the summary, which is also written to `summary.json`.

    budget: its `max_frames` is replaced by each of the settings' frame counts. settings: a protocol replaces
    the prompt template, the size of small frames and the scores. Files in `folder`: see `QuestionLoop`; those
    of no-look, which asks without tools and with more frames, are in its folder `no-look`. Every
    rank calls it, with its own engine, and returns the summary. Raises what `QuestionLoop.run` raises, and
    RequestError for malformed `pairs`.
    """
    if settings.protocol == "reference":
        samples = [paper.as_asked(sample) for sample in samples]
        prompt_builder = prompt_builder.with_template(paper.TEMPLATE)
        budget = paper.as_sized(budget)
    for sample in samples:
        check_pairs(sample.problem_id, sample.extra.get("pairs", {}))
    sampling = SamplingSettings.of(settings)
    made_with = asked_with(samples, prompt_builder, budget, settings, sampling, engine)
    orders: list[Order] = [order for order in settings.order if order != "no-look"]
    loop = _Evaluation(
        samples, engine, prompt_builder, budget, settings, folder, sampling,
        orders, settings.frame_counts, settings.answer,
    )  # fmt: skip
    loop.run(made_with)
    control = None
    if "no-look" in settings.order:
        builder, plain = prompt_builder.without_tools(), replace(settings, tools=None, order=["ordered"])
        counts = [settings.frames_without_looks(count) for count in settings.frame_counts]
        budget = replace(budget, min_frames=max(counts))  # short clips have more to show, too
        control = replace(
            loop, engine=engine.without_tools, prompt_builder=builder, budget=budget,
            settings=plain, folder=folder / "no-look", orders=["no-look"], counts=counts,
        )  # fmt: skip
        control.run(asked_with(samples, builder, budget, plain, sampling, engine))
    return decided_by_first(lambda: loop.summary(made_with, control))


@dataclass(frozen=True)
class _Evaluation(QuestionLoop):
    what: ClassVar = "an evaluation"
    doing: ClassVar = "evaluating"
    answers: ClassVar = "predictions"
    settings_file: ClassVar = "evaluation.json"
    needed: ClassVar = NEEDED
    settings: EvalSettings

    def record(
        self, sample: Sample, prompt: Prompt, rollouts: Sequence[Rollout], frames: int
    ) -> dict[str, Any]:
        (rollout,) = rollouts
        return {
            "problem_id": sample.problem_id,
            "order": prompt.order,
            "output": rollout.text,
            **self.scored(sample, rollout.text),
            "frames": frames,
            "tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            **({"calls": len(rollout.calls), "transcript": rollout.transcript} if rollout.turns else {}),
            **({} if prompt.order != "elsewhere" or is_control(prompt, rollout) else {"no_control": True}),
        }

    def scored(self, sample: Sample, output: str) -> dict[str, Any]:
        """Return what a record has from its row: scores of the output, truth and groups."""
        scored = score_output(sample, output, self.settings.protocol)
        overlap = overlaps(sample.problem_type, scored.prediction, sample.answer)
        return {
            "question": question_digest(sample.problem, sample.options, sample.answer, sample.paths),
            "problem": sample.problem,
            "options": list(sample.options),
            **scored._asdict(),
            **({"overlaps": overlap} if overlap else {}),
            "answer": sample.answer,
            "problem_type": sample.problem_type,
            "data_type": sample.data_type,
            "data_source": sample.data_source,
            "task_type": sample.extra.get("task_type", sample.extra.get("family", "")),
            **({"pairs": sample.extra["pairs"]} if "pairs" in sample.extra else {}),
        }

    def revised(self, sample: Sample, record: dict[str, Any]) -> dict[str, Any]:
        """Score the answer again if its row has another type, solution or options than when it was asked."""
        question = question_digest(sample.problem, sample.options, sample.answer, sample.paths)
        if (record.get("question"), record.get("problem_type")) == (question, sample.problem_type):
            return record
        record = {name: value for name, value in record.items() if name != "overlaps"}
        return record | self.scored(sample, record["output"])

    def summary(self, made_with: Mapping[str, Any], control: "_Evaluation | None" = None) -> dict[str, Any]:
        """On rank 0: merge the files of all ranks and write the summary. control: the questions without tools
        (no-look), with more frames for each of `counts`.
        """
        merged, wanted = self.merge(), self.keys(self.samples)
        if control is not None:
            found = control.merge()
            for own, other in zip(self.counts, control.counts, strict=True):
                for way in self.ways:
                    merged[own, way] |= found[other, way]
            wanted += control.keys(self.samples)
        summary = {
            "questions": len(self.samples),
            "answer": list(self.ways),
            "settings": made_with,
            "frames": {
                str(count): self.figures({way: merged[count, way] for way in self.ways}, wanted)
                for count in self.counts
            },
        }
        if control is not None:
            for own, other in zip(self.counts, control.counts, strict=True):
                asked = [key for way in self.ways for key in found[other, way]]
                summary["frames"][str(own)]["skipped_no_look"] = control.skipped(asked)
        replace_json(self.folder / "summary.json", summary)
        return summary

    def figures(self, answered: Mapping[Answer, Answers], wanted: Sequence[Key]) -> dict[str, Any]:
        """Return the figures over the wanted answers, whichever run gave them."""
        clips = {sample.problem_id: {"clip": sample.cluster} for sample in self.samples}
        records = {
            way: [found[key] | clips[key[0]] for key in wanted if key in found]
            for way, found in answered.items()
        }
        same = sum("no_control" in record for lines in records.values() for record in lines)
        records = {way: [r for r in lines if "no_control" not in r] for way, lines in records.items()}
        complete = [key for key in wanted if all(key in found for found in answered.values())]
        figures = summarise(records.get("reasoned", []), records.get("direct", []))
        return figures | ({"no_control": same} if same else {}) | {"skipped": self.skipped(complete)}


class Scored(NamedTuple):
    prediction: str  # the answer, "" for none
    score: float  # of that answer
    strict_score: float  # of the text in the answer tags alone
    format: float  # 1 when the whole output has the answer format


def score_output(sample: Sample, output: str, by: Protocol | None = None) -> Scored:
    """Score one output tolerantly and strictly: regression by MRA, all else by the training reward.

    by: the protocol that replaces the tolerant reading and its score.
    """
    kind, truth = sample.problem_type, sample.answer
    if by == "reference":
        prediction = paper.read_answer(output)
        score = paper.score(kind, prediction, truth)
    else:
        prediction = read_answer(output, kind, sample.options)
        score = answer_score(kind, prediction, truth)
    strict = answer_score(kind, extract_answer(output), truth)
    return Scored(prediction, score, strict, format_reward(output, kind))
