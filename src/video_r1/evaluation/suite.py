"""Several benchmarks with one checkpoint: all are checked before the model is loaded, then asked in turn.

<out>/<benchmark>/manifest.json, predictions-<frames>.jsonl, summary.json, …   as `runner.evaluate` has it
<out>/summary.json        every benchmark's figures, how complete they are, and the comparison
<out>/temporal-gap.html   where questions were asked in both orders, or with all controls
<out>/reasoning.html      where they were answered with reasoning and directly
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from video_r1.errors import RequestError, writing_to
from video_r1.evaluation.benchmarks.loading import Questions, load_questions
from video_r1.evaluation.gap_figure import gain_page, gap_page
from video_r1.evaluation.paper import COLUMNS, compare_with_paper, comparison_table, setup_differences
from video_r1.evaluation.runner import evaluate
from video_r1.evaluation.summary import ORDERS, cell, summary_table
from video_r1.files import replace_json, replace_text
from video_r1.processes import process_index
from video_r1.rollout.engine_factory import open_engine, open_prompts
from video_r1.settings.decoding import BenchmarkSettings, EvalSettings
from video_r1.settings.frames import CONTROLS
from video_r1.tables import table


def load_suite(settings: EvalSettings, bench: BenchmarkSettings, folder: Path) -> list[Questions]:
    """The questions of all benchmarks. Raises one RequestError with what is wrong with any of them."""
    loaded, problems = [], []
    for name in bench.bench or ():
        try:
            questions = load_questions(
                name,
                settings.media_root,
                folder / Path(name).stem,
                allow_missing=bench.allow_missing,
                annotation=bench.annotation
                or ("reference" if settings.protocol and name in COLUMNS else None),
            )
        except RequestError as error:
            problems.append(str(error))
        else:
            loaded.append(questions)
    if problems:
        raise RequestError("; ".join(problems))
    if len({questions.name for questions in loaded}) < len(loaded):
        raise RequestError("bench: two of the manifests have the same name; their folders would be one")
    return loaded


def run_questions(
    asked: Sequence[Any], settings: EvalSettings, bench: BenchmarkSettings, folder: Path
) -> dict[str, Any]:
    """Evaluates `Sample`s or, with benchmarks, `Questions`, prints the tables and returns the summary that is
    in `folder`/summary.json. Started again with the same settings it continues, as `evaluate` does. Every
    process of the command calls it; the first one writes."""
    if bench.controls:
        settings = replace(settings, order=list(CONTROLS))
    elif bench.temporal_gap:
        settings = replace(settings, order=["ordered", "shuffled"])
    processor, builder, budget = open_prompts(settings)
    with closing(open_engine(settings, processor)) as engine, writing_to(folder):
        ask = partial(evaluate, engine=engine, prompt_builder=builder, budget=budget, settings=settings)
        if bench.bench:
            results = _results(asked, settings, folder, ask)
            summary = _summary_of(results, asked, settings, bench)
            if process_index() == 0:
                replace_json(folder / "summary.json", summary)
        else:
            title = Path(str(settings.manifest)).stem
            summary = ask(asked, folder=folder)
            results = {title: {"title": title, "frames": summary["frames"]}}
            print(summary_table(summary))
        if bench.temporal_gap or bench.controls:
            _draw(folder / "temporal-gap.html", gap_page(results, str(settings.model)))
        if len(settings.answer) > 1:
            _draw(folder / "reasoning.html", gain_page(results, str(settings.model)))
    return summary


def _draw(page: Path, text: str) -> None:
    if process_index() == 0:
        replace_text(page, text)
    print(f"\nby task type: {page}")


def _results(
    suite: Sequence[Questions], settings: EvalSettings, folder: Path, ask: Callable[..., dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Each benchmark's figures by its name, printed as they come."""
    results: dict[str, dict[str, Any]] = {}
    for number, questions in enumerate(suite):
        samples = questions.samples[: settings.limit]
        coverage = questions.coverage._replace(questions=len(samples))
        questions = questions._replace(samples=samples, coverage=coverage)
        summary = ask(samples, folder=folder / questions.name)
        results[questions.name] = described(questions, summary)
        print(f"{chr(10) * bool(number)}{questions.title}: {questions.coverage}")
        print(summary_table(summary))
    return results


def _summary_of(
    results: Mapping[str, Any], suite: Sequence[Questions], settings: EvalSettings, bench: BenchmarkSettings
) -> dict[str, Any]:
    """The figures of all benchmarks, printed side by side, and beside the paper's where that is asked for."""
    summary: dict[str, Any] = {"model": settings.model, "benchmarks": results}
    print(f"\n{overview(results)}")
    if bench.compare == "paper":
        comparisons = compare_with_paper(results)
        summary["comparison"] = [
            {**each._asdict(), "difference": each.difference, "outside": each.outside} for each in comparisons
        ]
        print(f"\n{comparison_table(comparisons, {name: each['title'] for name, each in results.items()})}")
    if bench.compare == "paper" or settings.protocol:
        differences = setup_differences(settings, suite)
        summary |= {"protocol": settings.protocol, "setup_differences": differences}
        print("what differs in the set-up:\n" + "\n".join(f"- {line}" for line in differences))
    return summary


def described(questions: Questions, summary: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark's summary with what the figures are of."""
    coverage, benchmark = questions.coverage, questions.benchmark
    facts: dict[str, Any] = {
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
        facts |= {
            "dataset": benchmark.dataset,
            "annotation": questions.annotation,
            "metric": benchmark.metric,
            "unverified": list(benchmark.unverified),
        }
    return facts


def overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each benchmark, frame count and mean: headline figures in percent."""
    head = ["", "frames", "ordered", "strict", "unparsable", "shuffled", "temporal gap", "reasoned − direct"]
    rows: list[tuple[str, ...]] = []
    directly = ", direct answers"
    for result in results.values():
        title, part = result["title"], "" if result["complete"] else " (part)"
        own_way = directly if result.get("answer") == ["direct"] else ""
        for frames, figures in result["frames"].items():
            if result["headline"] == "tasks":
                rows.append(_task_row(f"{title}, mean over task types{part}", frames, figures))
                title = f"{result['title']}, mean over questions"
            for way, own in ((own_way, figures), (directly, figures.get("direct"))):
                if own:
                    rows.append(_question_row(title + way + part, frames, own))
                    rows += _pair_rows(result, way + part, frames, own)
    if all(row[-1] == "-" for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return table(head, rows)


def _task_row(title: str, frames: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    ordered, shuffled = (_percent(figures.get(order, {}).get("task_mean"), "accuracy") for order in ORDERS)
    return title, frames, ordered, "", "", shuffled, "", "-"


def _pair_rows(
    result: Mapping[str, Any], way: str, frames: str, figures: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    rows = []
    for name, pairs in figures.get("by_pairs", {}).items():
        title = f"{result['title']}, {name}"
        if result["headline"] == "tasks":
            rows.append(_task_row(f"{title}, mean over task types{way}", frames, pairs))
        rows.append(_question_row(title + way, frames, pairs))
    return rows


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


_percent = partial(cell, scale=100, digits=1)
