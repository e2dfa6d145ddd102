"""`video-r1 eval`: from settings to a printed table."""
from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from video_r1.config import EvalSettings


def run_eval(settings: EvalSettings) -> dict[str, Any]:
    """Evaluate a checkpoint on a manifest, print the table and return the summary.

    Reads the manifest before it loads the model. Writes what `video_r1.evaluation.runner.evaluate` writes, to
    `settings.out` or `evaluation_folder(settings)`. Raises ManifestError, ConfigError and RequestError.
    """
    from video_r1.data.prompts import PromptBuilder
    from video_r1.data.records import load_manifest
    from video_r1.evaluation.runner import evaluate
    from video_r1.evaluation.summary import summary_table
    from video_r1.models.loading import load_processor, size_multiple
    from video_r1.rollout.choice import open_engine
    from video_r1.rollout.engine import SamplingSettings

    assert settings.manifest is not None and settings.model is not None  # settings without them are refused
    samples = load_manifest(settings.manifest, settings.media_root, settings.allow_urls)[: settings.limit]
    processor = load_processor(settings.model, settings.trust_remote_code)
    builder = PromptBuilder(processor, settings.prompt_template, settings.max_prompt_length)
    folder = Path(settings.out) if settings.out else evaluation_folder(settings.model, settings.manifest)
    with closing(open_engine(settings, processor)) as engine:
        summary = evaluate(
            samples,
            engine,
            builder,
            settings.frame_budget(size_multiple(processor)),
            output_dir=folder,
            orders=settings.order,
            frames=settings.frame_counts,
            sampling=SamplingSettings(
                temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_new_tokens
            ),
            batch_size=settings.batch_size,
            seed=settings.seed,
            description={"model": settings.model},
        )
    print(summary_table(summary))
    print(f"\npredictions and figures: {folder}")
    return summary


def evaluation_folder(model: str, manifest: str) -> Path:
    """Where the figures of a checkpoint on a manifest go: `runs/eval/<model>-<manifest>`."""
    return Path("runs/eval") / "-".join([*Path(model).parts[-2:], Path(manifest).stem]).replace("/", "")
