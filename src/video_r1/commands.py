"""What each command does with its resolved settings. Heavy imports stand inside the functions."""

from __future__ import annotations

from pathlib import Path

from video_r1.errors import RequestError, writing_to
from video_r1.recipe import Recipe
from video_r1.settings.annotation import AnnotateSettings
from video_r1.settings.benchmarks import BenchmarkSettings
from video_r1.settings.commands import (
    BaseSettings,
    CheckSettings,
    DemoSettings,
    LabSettings,
    MergeSettings,
    ReportSettings,
)
from video_r1.settings.decoding import AskSettings, EvalSettings
from video_r1.settings.vllm import ServeSettings


def data_check(recipe: Recipe) -> int:
    from video_r1.data.check import run_check

    settings = recipe.section(CheckSettings)
    assert settings.manifest is not None  # settings without it are refused
    return run_check(
        settings.manifest,
        media_root=settings.media_root,
        allow_urls=settings.allow_urls,
        media=settings.media,
        workers=settings.workers,
    )


def data_lab(recipe: Recipe) -> int:
    from video_r1.lab.clips import write_lab

    settings = recipe.section(LabSettings)
    write_lab(
        folder(settings.folder),
        settings.train,
        settings.test,
        settings.seed,
        shortcut=settings.shortcut,
        image_share=settings.image_share,
        hasty=settings.hasty,
        families=settings.families,
        shuffle_options=settings.shuffle_options,
        workers=settings.workers,
    )
    print(f"{settings.folder}: {settings.train} training and {settings.test} test questions")
    return 0


def data_base(recipe: Recipe) -> int:
    from video_r1.lab.pretraining import pretrain_base

    settings = recipe.section(BaseSettings)
    pretrain_base(folder(settings.folder), settings.steps, settings.seed, threads=settings.threads)
    return 0


def annotate(recipe: Recipe) -> int:
    from video_r1.annotation.command import run_annotate

    run_annotate(recipe.section(AnnotateSettings))
    return 0


def sft(recipe: Recipe) -> int:
    from video_r1.training.sft import run_sft

    run_sft(recipe)
    return 0


def rl(recipe: Recipe) -> int:
    from video_r1.training.tgrpo import run_rl

    run_rl(recipe)
    return 0


def plan(recipe: Recipe) -> int:
    from video_r1.plan.memory import run_plan

    return run_plan(recipe)


def evaluate(recipe: Recipe) -> int:
    from video_r1.evaluation.command import run_eval

    run_eval(recipe.section(EvalSettings), recipe.section(BenchmarkSettings))
    return 0


def ask(recipe: Recipe) -> int:
    from video_r1.evaluation.ask import run_ask

    run_ask(recipe.section(AskSettings))
    return 0


def serve(recipe: Recipe) -> int:
    from video_r1.rollout.vllm.serve import run_serve

    run_serve(recipe.section(ServeSettings))
    return 0


def report(recipe: Recipe) -> int:
    from video_r1.report.page import build_report

    settings = recipe.section(ReportSettings)
    run = folder(settings.run)
    if not run.is_dir():
        raise RequestError(f"{run}: no such run folder")
    with writing_to(settings.out or run):
        print(build_report(run, Path(settings.out) if settings.out else None))
    return 0


def merge(recipe: Recipe) -> int:
    from video_r1.models.loading import merge_adapter

    settings = recipe.section(MergeSettings)
    print(merge_adapter(folder(settings.adapter), folder(settings.out), settings.dtype))
    return 0


def demo(recipe: Recipe) -> int:
    from video_r1.lab.demo import run_demo

    settings = recipe.section(DemoSettings)
    run_demo(Path(settings.out), settings.seed)
    return 0


def folder(name: str | None) -> Path:
    """The path of a required setting."""
    assert name is not None  # settings without it are refused
    return Path(name)
