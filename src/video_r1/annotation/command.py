"""`video-r1 annotate`: from settings to a manifest for SFT and the closing table."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from video_r1.annotation.endpoint import EndpointTeacher
from video_r1.annotation.judging import Rules
from video_r1.annotation.runner import Counts, annotate
from video_r1.annotation.teachers import EngineTeacher, Teacher
from video_r1.data.frame_cache import open_frame_cache
from video_r1.data.prompts import PromptBuilder, load_template
from video_r1.data.reading import Reader
from video_r1.data.records import Sample, load_manifest
from video_r1.errors import VideoR1Error, writing_to
from video_r1.files import digest
from video_r1.rollout.chat import FramesAs
from video_r1.rollout.endpoint import Endpoint, endpoint_url, form_of_frames, served_model
from video_r1.rollout.engine import SamplingSettings
from video_r1.settings.annotation import AnnotateSettings
from video_r1.settings.decoding import DecodingSettings
from video_r1.settings.frames import FrameBudget

BUDGET_FIELDS = ("fps", "min_frames", "max_frames", "frame_pixels", "image_pixels")
SAMPLING_FIELDS = ("samples", "temperature", "top_p", "max_new_tokens", "seed", "frames_as", "request_fields")


def run_annotate(settings: AnnotateSettings) -> Counts:
    """Annotate a manifest, print the table and return the counts.

    The manifest, the journal and an endpoint are looked at before a model is loaded; no teacher is started
    when every question has its answer. Raises ManifestError, ConfigError, RequestError, and VideoR1Error when
    the teacher fails or nothing is kept.
    """
    assert settings.manifest is not None and settings.teacher is not None and settings.out is not None
    samples = load_manifest(settings.manifest, settings.media_root, settings.allow_urls)
    out = Path(settings.out)
    root = settings.media_root or (
        Path(settings.manifest).parent if Path(settings.manifest).is_file() else "."
    )
    first, last = settings.length_range
    rules = Rules(settings.threshold, (first, last), settings.choose)
    drawn_with = {"teacher": settings.teacher, **drawing(settings, samples)}
    endpoint = endpoint_of(settings) if settings.at_endpoint else None
    if endpoint is not None:
        name, is_vllm = served_model(endpoint, settings.model)
        frames_as = form_of_frames(endpoint, name, is_vllm, settings.frames_as)
        drawn_with |= {"teacher": name, "frames_as": frames_as}

    def open_teacher() -> Teacher:
        if endpoint is None:
            return local_teacher(settings)
        return endpoint_teacher(settings, endpoint, drawn_with["teacher"], drawn_with["frames_as"])

    with writing_to(out):
        counts = annotate(
            samples[: settings.limit], open_teacher, out, media_root=root, rules=rules, settings=drawn_with
        )
    print(f"{counts.table()}\n\nmanifest for SFT: {out}; its media root is {root}")
    rejected = out.with_name(f"{out.stem}.rejected.jsonl")
    print(f"rejected, with the reason: {rejected}")
    if counts.questions["endpoint"]:
        print(
            f"{counts.questions['endpoint']:,} questions were not answered; the same command asks them again"
        )
    if not counts.questions["kept"]:
        raise VideoR1Error(f"no rationale was kept; {rejected} has the reasons")
    return counts


def drawing(settings: AnnotateSettings, samples: list[Sample]) -> dict[str, Any]:
    """What the teacher's answers depend on, beside the teacher: answers with another are not mixed."""
    template = load_template(settings.prompt_template)
    engine = "server" if settings.engine.startswith("http") else settings.engine
    return {
        "manifest": digest(
            [[s.problem_id, s.problem, s.options, s.solution, s.path, s.start, s.end] for s in samples]
        ),
        "prompt_template": digest(asdict(template)),
        "engine": "endpoint" if settings.at_endpoint else engine,
        **{name: getattr(settings, name) for name in (*BUDGET_FIELDS, *SAMPLING_FIELDS)},
    }


def sampling_of(settings: AnnotateSettings) -> SamplingSettings:
    return SamplingSettings(
        n=settings.samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_new_tokens,
    )


def local_teacher(settings: AnnotateSettings) -> Teacher:
    """A checkpoint, on the engine that the settings name."""
    from video_r1.models.loading import load_processor, size_multiple
    from video_r1.rollout.choice import open_engine

    assert settings.teacher is not None  # settings without it are refused
    values = {field.name: getattr(settings, field.name) for field in fields(DecodingSettings)}
    decoding = DecodingSettings(**{**values, "model": settings.teacher})
    processor = load_processor(settings.teacher, settings.trust_remote_code)
    return EngineTeacher(
        open_engine(decoding, processor),
        PromptBuilder(processor, settings.prompt_template, settings.max_prompt_length),
        Reader(
            settings.frame_budget(size_multiple(processor)),
            open_frame_cache(settings.frame_cache, settings.frame_cache_gb),
            settings.workers,
        ),
        sampling_of(settings),
        settings.seed,
        settings.batch_size,
    )


def endpoint_of(settings: AnnotateSettings) -> Endpoint:
    assert settings.teacher is not None  # settings without it are refused
    key = os.environ.get(settings.key_variable)
    return Endpoint(endpoint_url(settings.teacher), key, settings.timeout, settings.wait)


def endpoint_teacher(
    settings: AnnotateSettings, endpoint: Endpoint, model: str, frames_as: FramesAs
) -> Teacher:
    """The model at an OpenAI-compatible endpoint."""
    return EndpointTeacher(
        endpoint,
        model,
        load_template(settings.prompt_template),
        settings.frame_budget(FrameBudget().size_multiple),
        sampling_of(settings),
        seed=settings.seed,
        concurrency=settings.concurrency,
        held=2 * settings.workers,
        frames_as=frames_as,
        request_fields=settings.request_fields,
        frame_cache=open_frame_cache(settings.frame_cache, settings.frame_cache_gb),
    )
