"""`video-r1 annotate`: from settings to a manifest for SFT and the closing table."""

import os
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from video_r1.annotation.endpoint import EndpointTeacher
from video_r1.annotation.runner import Counts, annotate, rejected_path
from video_r1.annotation.teachers import EngineTeacher, Teacher
from video_r1.data.decoding.frame_cache import open_frame_cache
from video_r1.data.manifests.records import Sample, load_manifest
from video_r1.data.reading import Reader
from video_r1.data.sources.places import media_root_of
from video_r1.data.templates import load_template
from video_r1.errors import VideoR1Error, writing_to
from video_r1.fingerprint import digest
from video_r1.processes import decided_by_first, process_group
from video_r1.rollout.endpoint import Endpoint, endpoint_urls, open_endpoint
from video_r1.settings.annotation import AnnotateSettings

# What the teacher's answers depend on, beside the teacher, the manifest and the template.
DRAWN_WITH = (
    "fps", "min_frames", "max_frames", "frame_pixels", "image_pixels",
    "samples", "temperature", "top_p", "max_new_tokens", "seed", "frames_as", "request_fields",
)  # fmt: skip


def run_annotate(settings: AnnotateSettings) -> Counts:
    """Annotate a manifest, print the table and return the counts.

    The manifest, the journal and an endpoint are looked at before a model is loaded; no teacher is started
    when every question has its answer. Raises ManifestError, ConfigError, RequestError, and VideoR1Error when
    the teacher fails, nothing is kept, or another process of the annotation (by `accelerate launch`) is lost.
    """
    assert settings.manifest is not None and settings.teacher is not None and settings.out is not None
    with process_group(Path(settings.out).parent):
        return _annotate(settings, settings.manifest, settings.teacher, settings.out)


def _annotate(settings: AnnotateSettings, manifest: str, teacher: str, out: str) -> Counts:
    samples = decided_by_first(lambda: load_manifest(manifest, **settings.manifest_options()))
    drawn_with = {"teacher": teacher, **drawing(settings, samples)}
    if settings.at_endpoint:
        key = os.environ.get(settings.key_variable)
        endpoint = Endpoint(endpoint_urls(teacher), key, settings.timeout, settings.wait)
        name, frames_as = open_endpoint(endpoint, settings.model, settings.frames_as)
        drawn_with |= {"teacher": name, "frames_as": frames_as}

    def open_teacher() -> Teacher:
        if settings.at_endpoint:
            return EndpointTeacher(settings, endpoint, name, frames_as)
        return local_teacher(settings)

    with writing_to(out):
        counts = annotate(samples[: settings.limit], open_teacher, settings, drawn_with)
    root = media_root_of(manifest, settings.media_root)
    print(f"{counts.table()}\n\nmanifest for SFT: {out}; its media root is {root}")
    print(f"rejected, with the reason: {rejected_path(out)}")
    if counts.questions["endpoint"]:
        print(f"{counts.questions['endpoint']:,} questions were not answered; the same command asks again")
    if not counts.questions["kept"]:
        raise VideoR1Error(f"no rationale was kept; {rejected_path(out)} has the reasons")
    return counts


def drawing(settings: AnnotateSettings, samples: list[Sample]) -> dict[str, Any]:
    """What the teacher's answers depend on, beside the teacher: answers with another are not mixed."""
    engine = "server" if settings.engine.startswith("http") else settings.engine
    return {
        "manifest": digest(
            [
                [s.problem_id, s.problem, s.options, s.solution, s.path, s.start, s.end]
                + ([s.subtitles] if settings.subtitles else [])
                + ([s.fps] if s.fps else [])
                + [*s.more_paths]
                + [[turn["role"], turn["content"]] for turn in s.messages]
                for s in samples
            ]
        ),
        "prompt_template": digest(asdict(load_template(settings.prompt_template, settings.subtitles))),
        "engine": "endpoint" if settings.at_endpoint else engine,
        **{name: getattr(settings, name) for name in DRAWN_WITH},
    }


def local_teacher(settings: AnnotateSettings) -> Teacher:
    """A checkpoint, on the engine that the settings name."""
    from video_r1.rollout.engine_factory import open_engine, open_prompts

    decoding = copy(settings)
    decoding.model = settings.teacher
    processor, builder, budget = open_prompts(decoding)
    cache = open_frame_cache(settings.frame_cache, settings.frame_cache_gb)
    engine = open_engine(decoding, processor)
    return EngineTeacher(engine, builder, Reader(budget, cache, settings.workers), settings)
