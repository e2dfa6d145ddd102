"""`video-r1 eval`: from settings to printed tables."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from video_r1.errors import RequestError, writing_to
from video_r1.settings.benchmarks import BenchmarkSettings
from video_r1.settings.decoding import EvalSettings


def run_eval(settings: EvalSettings, bench: BenchmarkSettings | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint on a manifest or on benchmarks, print the tables and return the summary.

    Reads the questions before it loads the model. Writes what `video_r1.evaluation.runner.evaluate` or
    `video_r1.evaluation.suite.run_suite` writes, to `settings.out` or `evaluation_folder(…)`. Raises
    ManifestError, ConfigError and RequestError.
    """
    bench = bench or BenchmarkSettings()
    if (settings.manifest is None) == (bench.bench is None):
        raise RequestError("eval needs a manifest or benchmarks (--bench vsibench,mvbench), one of the two")
    from video_r1.evaluation.suite import asked_by, evaluate_manifest, load_manifest_of, load_suite, run_suite
    from video_r1.rollout.choice import open_engine, open_prompts

    assert settings.model is not None  # settings without it are refused
    name = settings.manifest or "benchmarks"
    folder = Path(settings.out) if settings.out else evaluation_folder(settings.model, name)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"out: {folder} is a file; name a folder that is new or has this evaluation")
    suite = load_suite(settings, bench, folder) if bench.bench else []
    samples = load_manifest_of(settings) if settings.manifest else []
    processor, builder, budget = open_prompts(settings)
    with closing(open_engine(settings, processor)) as engine, writing_to(folder):
        asked = asked_by(settings, bench, engine, builder, budget)
        if bench.bench:
            summary = run_suite(suite, settings, bench, folder, asked)
        else:
            summary = evaluate_manifest(samples, settings, bench, folder, asked)
    print(f"\npredictions and figures: {folder}")
    return summary


def evaluation_folder(model: str, manifest: str) -> Path:
    """Where the figures of a checkpoint on a manifest go: `runs/eval/<model>-<manifest>`."""
    return Path("runs/eval") / "-".join([*Path(model).parts[-2:], Path(manifest).stem]).replace("/", "")
