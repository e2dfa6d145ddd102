"""`video-r1 eval`: from settings to printed tables."""

from pathlib import Path
from typing import Any

from video_r1.errors import RequestError
from video_r1.settings.decoding import BenchmarkSettings, EvalSettings


def run_eval(settings: EvalSettings, bench: BenchmarkSettings | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint on a manifest or on benchmarks, print the tables and return the summary.

    Reads the questions before it loads the model. Writes what `video_r1.evaluation.runner.evaluate` or
    `video_r1.evaluation.suite.run_questions` writes, to `settings.out` or `evaluation_folder(…)`. Raises
    ManifestError, ConfigError and RequestError, and VideoR1Error when another process of the evaluation (by
    `accelerate launch`) is lost.
    """
    bench = bench or BenchmarkSettings()
    if (settings.manifest is None) == (bench.bench is None):
        raise RequestError("eval needs a manifest or benchmarks (--bench vsibench,mvbench), one of the two")
    from video_r1.data.manifests.records import load_manifest  # these import torch
    from video_r1.evaluation.suite import load_suite, run_questions
    from video_r1.processes import claimed_by_first, decided_by_first, process_group

    assert settings.model is not None  # settings without it are refused
    name = settings.manifest or "benchmarks"
    folder = Path(settings.out) if settings.out else evaluation_folder(settings.model, name)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"out: {folder} is a file; name a folder that is new or has this evaluation")

    def questions() -> Any:
        if settings.manifest is None:
            return load_suite(settings, bench, folder)
        return load_manifest(settings.manifest, **settings.manifest_options())[: settings.limit]

    with process_group(folder):
        asked = decided_by_first(questions)
        with claimed_by_first(folder):
            summary = run_questions(asked, settings, bench, folder)
        print(f"\npredictions and figures: {folder}")
    return summary


def evaluation_folder(model: str, manifest: str) -> Path:
    """Where the figures of a checkpoint on a manifest go: `runs/eval/<model>-<manifest>`."""
    return Path("runs/eval") / "-".join([*Path(model).parts[-2:], Path(manifest).stem]).replace("/", "")
