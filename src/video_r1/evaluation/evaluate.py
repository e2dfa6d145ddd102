"""`video-r1 eval`: a checkpoint asked every question with every frame count in every frame order, and scored.

questions ─► predictions.py ─► <out>/<benchmark>/predictions-<frames>.jsonl, summary.json, …
                               <out>/summary.json

torch and the model's code are imported when the questions are read, so that wrong requests fail at once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from video_r1.console import table
from video_r1.data.manifests.records import load_manifest
from video_r1.errors import RequestError, writing_to
from video_r1.evaluation import paper
from video_r1.evaluation.benchmarks.loading import Questions, load_questions
from video_r1.evaluation.metrics import answer_score
from video_r1.evaluation.summary import ORDERS, cell, summary_table
from video_r1.files import replace_json
from video_r1.processes import claimed_by_first, decided_by_first, process_group, process_index
from video_r1.settings.decoding import BenchmarkSettings, EvalSettings
from video_r1.settings.frames import CONTROLS


def run_eval(settings: EvalSettings, bench: BenchmarkSettings | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint on a manifest or on benchmarks, print the tables and return the summary.

    Results go to `settings.out`, by default runs/eval/<model>-<manifest>; started again with the same
    settings, the evaluation continues. Raises ManifestError, ConfigError and RequestError, and VideoR1Error
    when another rank is lost.
    """
    bench = bench or BenchmarkSettings()
    assert (settings.manifest is None) != (bench.bench is None)  # the command line refuses others
    assert settings.model is not None  # settings without it are refused
    folder = settings.folder
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"out: {folder} is a file; name a new folder or that of this evaluation")

    def questions() -> Any:
        if settings.manifest is None:
            return _load_benchmarks(settings, bench, folder)
        options = settings.manifest_options()
        return load_manifest(settings.manifest, **options, score=answer_score)[: settings.limit]

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
    """Evaluate on `Sample`s, or with benchmarks on their `Questions`; print the tables."""
    from video_r1.evaluation.predictions import evaluate
    from video_r1.rollout.engine_factory import open_engine, open_prompts

    if bench.controls or bench.temporal_gap:
        settings = replace(settings, order=list(CONTROLS if bench.controls else ORDERS))
    builder, budget = open_prompts(settings)
    with closing(open_engine(settings, builder)) as engine, writing_to(folder):
        ask = partial(evaluate, engine=engine, prompt_builder=builder, budget=budget, settings=settings)
        if bench.bench:
            results = _benchmark_results(asked, settings, folder, ask)
            summary = _benchmark_summary(results, settings, bench)
            if process_index() == 0:
                replace_json(folder / "summary.json", summary)
        else:
            summary = ask(asked, folder=folder)
            print(summary_table(summary))
    return summary


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
    results: Mapping[str, Any], settings: EvalSettings, bench: BenchmarkSettings
) -> dict[str, Any]:
    """Return the figures of all benchmarks; print them side by side, and beside the paper's if wanted."""
    summary: dict[str, Any] = {"model": settings.model, "benchmarks": results}
    print(f"\n{overview(results)}")
    if bench.compare == "paper":
        found = paper.compare_with_paper(results)
        summary["comparison"] = [each._asdict() for each in found]
        titles = {name: each["title"] for name, each in results.items()}
        print(f"\n{paper.comparison_table(found, titles)}")
    if bench.compare == "paper" or settings.protocol:
        differences = paper.setup_differences(settings)
        summary |= {"protocol": settings.protocol, "setup_differences": differences}
        print("differences in the set-up:\n" + "\n".join(f"- {line}" for line in differences))
    return summary


_percent = partial(cell, scale=100, digits=1)


def overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of headline figures in percent: a line for each benchmark, frame count and mean."""
    rows = []
    for result in results.values():
        direct = ", direct answers" if result.get("answer") == ["direct"] else ""
        end = direct + ("" if result["complete"] else " (part)")
        for frames, figures in result["frames"].items():
            for metric, own in {"": figures, **figures.get("by_pairs", {})}.items():
                title = ", ".join(filter(None, (result["title"], metric)))
                means = [own.get(order, {}) for order in ORDERS]
                if result["headline"] == "tasks":
                    cells = [_percent(mean.get("task_mean"), "accuracy") for mean in means]
                    rows.append((f"{title}, mean over task types{end}", frames, *cells, ""))
                    title += ", mean over questions"
                cells = [_percent(mean, "accuracy") for mean in means]
                rows.append((f"{title}{end}", frames, *cells, _percent(own.get("temporal_gap"), "gap")))
    return table(["", "frames", *ORDERS, "temporal gap"], rows)
