"""`video-r1 eval`: a checkpoint asked every question with every frame count in every frame order, and scored.

questions ─► question_loop.py ─► score_output ─► predictions-<frames>.jsonl ─► summary.json

<out>/<benchmark>/manifest.json, predictions-<frames>.jsonl, summary.json, …   see `evaluate`
<out>/summary.json        every benchmark's figures, how complete they are, and the comparison
<out>/temporal-gap.html   where questions were asked in both orders, or with all controls
<out>/reasoning.html      where they were answered with reasoning and directly
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from video_r1.console import table
from video_r1.data.answers import extract_answer, parse_number, read_answer
from video_r1.data.manifests.records import Sample, load_manifest, question_digest
from video_r1.data.prompts import Prompt, TextPrompts
from video_r1.data.rollouts import Rollout
from video_r1.errors import RequestError, writing_to
from video_r1.evaluation import paper
from video_r1.evaluation.benchmarks.loading import Questions, load_questions
from video_r1.evaluation.figures import gain_page, gap_page
from video_r1.evaluation.metrics import mean_relative_accuracy
from video_r1.evaluation.question_loop import Answers, QuestionLoop, asked_with
from video_r1.evaluation.summary import NEEDED, ORDERS, cell, check_pairs, summarise, summary_table
from video_r1.files import replace_json, replace_text
from video_r1.processes import claimed_by_first, decided_by_first, process_group, process_index
from video_r1.rewards.scoring import correctness, format_reward, overlaps
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.rollout.engine_factory import open_engine, open_prompts
from video_r1.settings.decoding import Answer, BenchmarkSettings, EvalSettings, Protocol
from video_r1.settings.frames import CONTROLS, FrameBudget


def run_eval(settings: EvalSettings, bench: BenchmarkSettings | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint on a manifest or on benchmarks, print the tables and return the summary.

    The questions are read before the model is loaded. Results go to `settings.out`, by default
    runs/eval/<model>-<manifest>; started again with the same settings, the evaluation continues. Every rank
    calls it, and rank 0 writes. Raises ManifestError, ConfigError and RequestError, and VideoR1Error when
    another rank is lost.
    """
    bench = bench or BenchmarkSettings()
    if (settings.manifest is None) == (bench.bench is None):
        raise RequestError("eval needs a manifest or benchmarks (--bench vsibench,mvbench), one of the two")
    assert settings.model is not None  # settings without it are refused
    name = "-".join([*Path(settings.model).parts[-2:], Path(settings.manifest or "benchmarks").stem])
    folder = Path(settings.out) if settings.out else Path("runs/eval") / name.replace("/", "")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"out: {folder} is a file; name a new folder or that of this evaluation")

    def questions() -> Any:
        if settings.manifest is None:
            return _load_benchmarks(settings, bench, folder)
        return load_manifest(settings.manifest, **settings.manifest_options())[: settings.limit]

    with process_group(folder):
        asked = decided_by_first(questions)
        with claimed_by_first(folder):
            summary = _run(asked, settings, bench, folder)
        print(f"\npredictions and figures: {folder}")
    return summary


def _load_benchmarks(settings: EvalSettings, bench: BenchmarkSettings, folder: Path) -> list[Questions]:
    """Return the questions of all benchmarks. Raises one RequestError that names every problem."""
    loaded, problems = [], []
    for name in bench.bench or ():
        by_paper = "reference" if settings.protocol and name in paper.COLUMNS else None
        try:
            questions = load_questions(
                name, settings.media_root, folder / Path(name).stem,
                allow_missing=bench.allow_missing, annotation=bench.annotation or by_paper,
            )  # fmt: skip
            loaded.append(questions)
        except RequestError as error:
            problems.append(str(error))
    if problems:
        raise RequestError("; ".join(problems))
    if len({questions.name for questions in loaded}) < len(loaded):
        raise RequestError("bench: two of the manifests have the same name; their folders would be one")
    return loaded


def _run(
    asked: Sequence[Any], settings: EvalSettings, bench: BenchmarkSettings, folder: Path
) -> dict[str, Any]:
    """Evaluate on `Sample`s, or with benchmarks on their `Questions`; print the tables, draw the figures."""
    if bench.controls or bench.temporal_gap:
        settings = replace(settings, order=list(CONTROLS if bench.controls else ORDERS))
    processor, builder, budget = open_prompts(settings)
    with closing(open_engine(settings, processor)) as engine, writing_to(folder):
        ask = partial(evaluate, engine=engine, prompt_builder=builder, budget=budget, settings=settings)
        if bench.bench:
            results = _benchmark_results(asked, settings, folder, ask)
            summary = _benchmark_summary(results, asked, settings, bench)
            if process_index() == 0:
                replace_json(folder / "summary.json", summary)
        else:
            title = Path(str(settings.manifest)).stem
            summary = ask(asked, folder=folder)
            results = {title: {"title": title, "frames": summary["frames"]}}
            print(summary_table(summary))
        pages = {"temporal-gap.html": gap_page} if bench.temporal_gap or bench.controls else {}
        pages |= {"reasoning.html": gain_page} if len(settings.answer) > 1 else {}
        for name, draw in pages.items():
            if process_index() == 0:
                replace_text(folder / name, draw(results, str(settings.model)))
            print(f"\nby task type: {folder / name}")
    return summary


def evaluate(
    samples: Sequence[Sample],
    engine: RolloutEngine,
    prompt_builder: TextPrompts,
    budget: FrameBudget,
    settings: EvalSettings,
    folder: Path,
) -> dict[str, Any]:
    """Evaluate `engine` on `samples`; return the summary, which is also written to `summary.json`.

    budget: frame sizes and rate; its `max_frames` is replaced by each of the settings' frame counts.
    settings: frame counts and orders (images are asked once, in order), sampling, questions of one engine
    call, and the protocol, which replaces the prompt template, the size of small frames and the scores.

    Files in `folder`: `predictions-<frames>.jsonl`, a line for each question and order, and
    `direct-<frames>.jsonl`, that of direct answers; `quarantine.jsonl`, questions that could not be asked and
    are not in the figures; `evaluation.json`, the settings that the answers depend on. Started again with the
    same settings, it continues, tries the quarantined questions again, and its figures cover all samples.
    Every rank calls it, with its own engine, and returns the summary. Raises what `QuestionLoop.run` raises,
    and RequestError for malformed `pairs`.
    """
    if settings.protocol == "reference":
        samples = [paper.as_asked(sample) for sample in samples]
        prompt_builder = prompt_builder.with_template(paper.TEMPLATE)
        budget = paper.as_sized(budget)
    for sample in samples:
        check_pairs(sample.problem_id, sample.extra.get("pairs", {}))
    sampling = SamplingSettings.of(settings)
    made_with = asked_with(samples, prompt_builder, budget, settings, sampling)
    loop = _Evaluation(
        samples, engine, prompt_builder, folder, settings.order, settings.frame_counts, sampling,
        settings.seed, settings.batch_size, settings.answer,
        settings.protocol,
    )  # fmt: skip
    loop.run(made_with, budget, settings)
    return decided_by_first(lambda: loop.summary(made_with))


@dataclass(frozen=True)
class _Evaluation(QuestionLoop):
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
            **({"pairs": sample.extra["pairs"]} if "pairs" in sample.extra else {}),
        }

    def summary(self, made_with: Mapping[str, Any]) -> dict[str, Any]:
        """On rank 0: merge the files of all ranks and write the summary."""
        merged = self.merge()
        summary = {
            "questions": len(self.samples),
            "answer": list(self.ways),
            "settings": made_with,
            "frames": {
                str(count): self.figures({way: merged[count, way] for way in self.ways})
                for count in self.counts
            },
        }
        replace_json(self.folder / "summary.json", summary)
        return summary

    def figures(self, answered: Mapping[Answer, Answers]) -> dict[str, Any]:
        """Return the figures over all samples and the orders of this run, whichever run answered them."""
        wanted = self.keys(self.samples)
        clips = {sample.problem_id: {"clip": sample.files} for sample in self.samples}
        records = {
            way: [found[key] | clips[key[0]] for key in wanted if key in found]
            for way, found in answered.items()
        }
        complete = [key for key in wanted if all(key in found for found in answered.values())]
        figures = summarise(records.get("reasoned", []), records.get("direct", []))
        return figures | {"skipped": self.skipped(complete)}


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
        score = _score(kind, prediction, truth)
    strict = _score(kind, extract_answer(output), truth)
    return Scored(prediction, score, strict, format_reward(output, kind))


def _score(problem_type: str, prediction: str, truth: str) -> float:
    if problem_type != "regression":
        return correctness(problem_type, prediction, truth)
    numbers = [parse_number(text) for text in (prediction, truth)]
    predicted, expected = (float("nan") if number is None else number for number in numbers)
    return float(mean_relative_accuracy([predicted], [expected])[0])


# ---- Benchmarks


def _benchmark_results(
    suite: Sequence[Questions], settings: EvalSettings, folder: Path, ask: Callable[..., dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Evaluate each benchmark in turn and print its figures; return them by its name."""
    results: dict[str, dict[str, Any]] = {}
    for number, questions in enumerate(suite):
        samples = questions.samples[: settings.limit]
        coverage, benchmark = questions.coverage._replace(questions=len(samples)), questions.benchmark
        summary = ask(samples, folder=folder / questions.name)
        results[questions.name] = {
            "title": questions.title,
            "coverage": str(coverage),
            "complete": coverage.complete,
            "missing_media": list(coverage.missing),
            "headline": "questions" if benchmark is None else benchmark.headline,
            "answer": summary["answer"],
            "settings": summary["settings"],
            "frames": summary["frames"],
        }
        if benchmark is not None:
            results[questions.name] |= {
                "dataset": benchmark.dataset,
                "annotation": questions.annotation,
                "metric": benchmark.metric,
                "unverified": list(benchmark.unverified),
            }
        print(f"{chr(10) * bool(number)}{questions.title}: {coverage}\n{summary_table(summary)}")
    return results


def _benchmark_summary(
    results: Mapping[str, Any], suite: Sequence[Questions], settings: EvalSettings, bench: BenchmarkSettings
) -> dict[str, Any]:
    """Return the figures of all benchmarks; print them side by side, and beside the paper's if wanted."""
    summary: dict[str, Any] = {"model": settings.model, "benchmarks": results}
    print(f"\n{overview(results)}")
    if bench.compare == "paper":
        found = paper.compare_with_paper(results)
        summary["comparison"] = [
            {**each._asdict(), "difference": each.difference, "outside": each.outside} for each in found
        ]
        titles = {name: each["title"] for name, each in results.items()}
        print(f"\n{paper.comparison_table(found, titles)}")
    if bench.compare == "paper" or settings.protocol:
        differences = paper.setup_differences(settings, suite)
        summary |= {"protocol": settings.protocol, "setup_differences": differences}
        print("differences in the set-up:\n" + "\n".join(f"- {line}" for line in differences))
    return summary


_percent = partial(cell, scale=100, digits=1)


def overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of headline figures in percent: a line for each benchmark, frame count and mean."""
    head = ["", "frames", "ordered", "strict", "unparsable", "shuffled", "temporal gap", "reasoned − direct"]
    rows: list[tuple[str, ...]] = []
    directly = ", direct answers"
    for result in results.values():
        title, part = result["title"], "" if result["complete"] else " (part)"
        own_way = directly if result.get("answer") == ["direct"] else ""
        by_task = result["headline"] == "tasks"
        for frames, figures in result["frames"].items():
            if by_task:
                rows.append(_task_row(f"{title}, mean over task types{part}", frames, figures))
            name = f"{title}, mean over questions" if by_task else title
            for way, own in ((own_way + part, figures), (directly + part, figures.get("direct"))):
                if own:
                    rows.append(_question_row(name + way, frames, own))
                for metric, pairs in (own or {}).get("by_pairs", {}).items():
                    if by_task:
                        rows.append(_task_row(f"{title}, {metric}, mean over task types{way}", frames, pairs))
                    rows.append(_question_row(f"{title}, {metric}{way}", frames, pairs))
    if all(row[-1] == "-" for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return table(head, rows)


def _task_row(title: str, frames: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    ordered, shuffled = (_percent(figures.get(order, {}).get("task_mean"), "accuracy") for order in ORDERS)
    return title, frames, ordered, "", "", shuffled, "", "-"


def _question_row(title: str, frames: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    ordered = figures.get("ordered")
    return (
        title,
        frames,
        _percent(ordered, "accuracy"),
        f"{100 * ordered['strict_accuracy']:.1f}" if ordered else "-",
        f"{100 * ordered['unparsable_rate']:.1f}" if ordered else "-",
        _percent(figures.get("shuffled"), "accuracy"),
        _percent(figures.get("temporal_gap"), "gap"),
        _percent(figures.get("reasoning_gains", {}).get("ordered"), "gain"),
    )
