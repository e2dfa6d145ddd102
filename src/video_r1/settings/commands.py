"""Settings of the commands that neither train nor generate: data, plan, merge, report and demo."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from video_r1.settings.base import Problem, Settings, setting
from video_r1.settings.shared import (
    PlacesSettings,
    ProblemType,
    RemoteSettings,
    problems_of_out,
)

GPUSharding = Literal["none", "fsdp2", "zero2", "zero3"]
"""Sharding of the model over the GPUs of a run; none: each has all of it."""
LabFamily = Literal["qwen2_5_vl", "qwen3_5"]

UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(kw_only=True)
class CheckSettings(PlacesSettings, RemoteSettings):
    """Manifest check"""

    manifest: str | None = setting(None, "JSON, JSON-lines or Parquet file, an address, or a Hugging Face id")
    media: bool = setting(True, "open every media file too")
    renumber: str | None = setting(None, "manifest to write, and check, in which no id is used twice")
    workers: int | None = setting(None, "processes that open media (default: one a core)", above=0)


@dataclass(kw_only=True)
class MakeSettings(PlacesSettings, RemoteSettings):
    """Own data"""

    table: str | None = setting(None, "CSV, TSV, JSON, JSON lines, Parquet, an address or a Hugging Face id")
    out: str | None = setting(None, "manifest to write, .json or .jsonl; refused rows: OUT.refused.jsonl")
    layout: Literal["auto", "table", "llava-video", "swift", "trl"] = setting(
        "auto", "layout of the rows; table: guess columns by their names"
    )
    columns: dict[str, str] = setting(
        {}, "column of each field, e.g. problem=Question,answer=Ans,options=a0+a1+a2; none: no column"
    )
    answers: Literal["auto", "text", "from_0", "from_1"] = setting(
        "auto", "meaning of a number as an answer: the option's text, or its index from 0 or from 1"
    )
    problem_type: ProblemType | None = setting(None, "type of all questions (default: by row and options)")
    holdout: float = setting(
        0.0, "share of questions to write to held-out.json beside OUT instead, by clip", at_least=0, below=1
    )
    subtitles: Literal["off", "text", "timed"] = setting(
        "off", "from a column or an .srt or .vtt beside the clip; timed: with minute and second"
    )
    split: str = setting("train", "split of a data set that has several")
    media: bool = setting(True, "open every media file too")
    workers: int | None = setting(None, "processes that open media (default: one a core)", above=0)
    strict: bool = setting(False, "exit code 1 when any row is refused (default: when all are)")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from problems_of_out(self.out)


@dataclass(kw_only=True)
class LabSettings(Settings):
    """Lab data"""

    folder: str | None = setting(None, "folder to write: media, sft.json, rl.json, test.json")
    train: int = setting(4000, "training questions", at_least=0)
    test: int = setting(500, "test questions", at_least=0)
    seed: int = setting(0, "seed of every question and pixel")
    shortcut: float = setting(
        0.0, "share of training samples with a mark that betrays the answer", at_least=0, at_most=1
    )
    trusting: float = setting(
        0.0,
        "share of marked samples whose rationale reads the mark; other marks mislead",
        at_least=0,
        at_most=1,
    )
    image_share: float = setting(0.2, "share of questions about one image", at_least=0, at_most=1)
    hasty: float = setting(0.0, "share of video rationales that guess after one look", at_least=0, at_most=1)
    families: list[str] = setting([], "question families (default: all but when, box_at_end and box_at)")
    shuffle_options: bool = setting(False, "options in random order, not in one order for each family")
    workers: int | None = setting(None, "processes that render (default: one a core)", above=0)


@dataclass(kw_only=True)
class BaseSettings(Settings):
    """Pretraining of the lab's small base model"""

    folder: str | None = setting(None, "checkpoint folder to write")
    family: LabFamily = setting("qwen2_5_vl", "architecture; three of four layers of qwen3_5 have a state")
    steps: int = setting(4500, "optimizer steps", above=0)
    seed: int = setting(0, "seed of weights and data")
    threads: int = setting(1, "CPU threads; the result depends on them", above=0)


class GPU(NamedTuple):
    """By their makers: bf16 TFLOP/s of dense products, memory in GB, its TB/s, GB/s to the other GPUs."""

    tflops: float
    gigabytes: float
    terabytes: float
    link: float


_MAKERS = yaml.safe_load(Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8"))
GPUS = {name: GPU(*figures) for name, figures in _MAKERS.items()}


def gpu_named(text: str) -> str | None:
    """Return the name in GPUS of a GPU as people type it: "NVIDIA RTX 4090", "4090", "A100-SXM4-80GB". A
    variant with another memory (A100-40GB) or another letter (A10G) is another GPU: None.
    """
    memory = re.search(r"(\d{2,3}) ?gi?b", text.lower())
    said = re.sub(r"\d{2,3} ?gi?b|[\s_-]|nvidia|geforce|tesla|rtx", "", text.lower())
    for name, card in GPUS.items():
        short = name.removeprefix("rtx-").replace("-", "")
        if re.match(rf"{short}(?!\d|[a-z]$)", said) and not (memory and int(memory[1]) != card.gigabytes):
            return name
    return None


@dataclass(kw_only=True)
class PlanSettings(Settings):
    """Plan"""

    gpu: str | None = setting(
        None, f"kind of GPU, for its memory and an estimate of step seconds: {', '.join(GPUS)}"
    )
    gpu_memory: str | None = setting(
        None, "memory of a GPU, e.g. 80GB (default: recipe's, else this machine)"
    )
    gpus: int | None = setting(None, "GPUs that train (default: the recipe's machine, else 1)", above=0)
    sharding: GPUSharding | None = setting(None, "sharing of the model between GPUs (default: the recipe's)")
    model_config: str | None = setting(None, "model to plan: a folder or hub id (default: the recipe's)")
    max_response_length: int = setting(2048, "longest response in tokens, of a recipe for sft", above=0)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.gpu_memory is not None and parse_bytes(self.gpu_memory) is None:
            yield "gpu_memory", f"is {self.gpu_memory!r}; write a number and a unit, such as 80GB or 24GiB"
        if self.gpu is not None and self.kind is None:
            known = f"known are {', '.join(GPUS)}; for another one leave it out and give gpu_memory"
            yield "gpu", f"is {self.gpu!r}; {known}"

    @property
    def kind(self) -> str | None:
        """The name of `gpu` in GPUS."""
        return None if self.gpu is None else gpu_named(self.gpu)


def parse_bytes(text: str) -> int | None:
    """ "80GB" (10⁹), "24GiB" (2³⁰) or "512MiB" in bytes; None when it is not of that form or 0."""
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2].upper() not in UNITS:
        return None
    try:
        return int(float(found[1]) * UNITS[found[2].upper()]) or None
    except ValueError:
        return None


@dataclass(kw_only=True)
class CompletionSettings(Settings):
    """Completion"""

    shell: Literal["bash", "zsh", "tcsh"] | None = setting(None, "shell to complete for")


@dataclass(kw_only=True)
class RecipesSettings(Settings):
    """Recipes"""

    path: bool = setting(False, "print the folder of the packaged recipes and of accelerate's files")


@dataclass(kw_only=True)
class ReportSettings(Settings):
    """Report"""

    run: list[str] | None = setting(None, "run folders; several are compared on one page")
    out: str | None = setting(None, "file (default: report.html in the run folder, or comparison.html)")


@dataclass(kw_only=True)
class StudioSettings(Settings):
    """Studio"""

    folders: list[str] | None = setting(None, "run folders or their parents (default: runs, or this folder)")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine")
    port: int = setting(7860, "port; 0: any that is free", at_least=0, at_most=65535)
    token: str | None = setting(
        None, "token that browsers need, at least 16 characters (default: a new one; others see it in ps)"
    )
    token_file: str | None = setting(None, "file with the token (default: variable VIDEO_R1_STUDIO_TOKEN)")
    engines: list[str] | None = setting(
        None, "engines' addresses that receive the API keys of the environment; others are asked without keys"
    )


@dataclass(kw_only=True)
class MergeSettings(Settings):
    """Merging of adapters"""

    adapter: str | None = setting(None, "run folder of a use_peft training, or a checkpoint of it")
    out: str | None = setting(None, "checkpoint folder to write")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "number format of the merged weights (default: the model's)"
    )
    base_model: str | None = setting(
        None, "checkpoint that the adapters were trained on (default: the one in adapter_config.json)"
    )


@dataclass(kw_only=True)
class DemoSettings(Settings):
    """Demo"""

    out: str = setting("runs/demo", "folder for data, checkpoints, summary.json and report.html")
    seed: int = setting(0, "seed of data and training")
    family: LabFamily = setting("qwen2_5_vl", "architecture of the small model")
    quick: bool = setting(False, "a few steps of every stage, in less than 90 seconds; nothing is learnt")
