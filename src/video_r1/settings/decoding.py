"""Settings of generation with a trained model: evaluation, audit, benchmarks, single questions."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from video_r1.settings.base import Problem, Settings, setting
from video_r1.settings.frames import LOOK_CONTROLS, TEMPORAL_PATCH, Contrast, Order
from video_r1.settings.shared import (
    LoadingSettings,
    ManifestSettings,
    ProblemType,
    PromptSettings,
    problems_of_out,
)
from video_r1.settings.tools import ToolSettings
from video_r1.settings.types import Sentence

SCHEMES = ("http://", "https://")
Answer = Literal["reasoned", "direct"]
"""Kind of answer: reasoned as the prompt template asks, or the answer only."""
Protocol = Literal["reference"]
"""Evaluation of another program (evaluation/paper.py)."""
PROTOCOLS: dict[str, dict[str, Any]] = {
    "reference": {
        **{"fps": 2.0, "min_frames": 4, "max_frames": 16},
        **{"frame_pixels": 256 * 28 * 28, "image_pixels": 256 * 28 * 28, "prompt_template": None},
        **{"temperature": 0.1, "top_p": 0.001, "max_new_tokens": 1024},
    }
}
"""Defaults of each protocol, which a recipe or an option overrides."""


def addresses(text: str) -> tuple[str, ...]:
    """Split a setting into its addresses, which commas separate; drop duplicates."""
    return tuple(dict.fromkeys(part.strip().rstrip("/") for part in text.split(",") if part.strip()))


def has_path(address: str) -> bool:
    """Return whether the address is an OpenAI-compatible endpoint and not one of our vLLM servers."""
    return urlsplit(address).path.strip("/") != ""


@dataclass(kw_only=True)
class DecodingSettings(ToolSettings, PromptSettings, LoadingSettings):
    """Decoding"""

    frame_pixels: int = setting(256 * 28 * 28, "area of one video frame after resizing, in pixels", above=0)
    model: str | None = setting(None, "checkpoint folder, model id, or the model's name at an endpoint")
    engine: str = setting(
        "transformers",
        "transformers, vllm, a vLLM server (http://host:8000), OpenAI-compatible endpoints (http://host/v1), "
        "or module:function; several addresses, separated by commas, share requests",
    )
    concurrency: int = setting(16, "simultaneous requests to an endpoint", above=0)
    key_variable: str = setting("OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    timeout: float = setting(600.0, "seconds for one request to an endpoint or a server", above=0)
    device: str | None = setting(None, "device to run on, such as cpu or cuda:0 (default: automatic)")
    max_new_tokens: int = setting(1024, "longest output in tokens", above=0)
    temperature: float = setting(0.01, "sampling temperature; 0 is greedy", at_least=0)
    top_p: float = setting(0.001, "nucleus sampling; 1 is off", above=0, at_most=1)
    seed: int = setting(42, "seed of sampling and of the shuffled orders")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        found = addresses(self.engine)
        are_addresses = found != () and all(address.startswith(SCHEMES) for address in found)
        home, _, name = self.engine.rpartition(":")
        names_function = home != "" and not home.startswith(SCHEMES) and name.isidentifier()
        if self.engine not in ("transformers", "vllm") and not are_addresses and not names_function:
            allowed = "transformers, vllm, module:function, or addresses with http://, separated by commas"
            yield "engine", f"is {self.engine!r}; it must be {allowed}"
        if are_addresses and len(set(map(has_path, found))) > 1:
            yield "engine", f"is {self.engine!r}; either all addresses or none are endpoints with a path"


@dataclass(kw_only=True)
class QuestionsSettings(DecodingSettings, ManifestSettings):
    """Questions"""

    manifest: str | None = setting(None, "JSON, JSON-lines or Parquet file, an address, or a Hugging Face id")
    limit: int | None = setting(
        None, "take the first N questions only (audit, annotate: may grow on resume)", above=0
    )
    batch_size: int = setting(8, "questions that a model here answers together", above=0)


@dataclass(kw_only=True)
class EvalSettings(QuestionsSettings):
    """Evaluation"""

    out: str | None = setting(None, "folder for predictions and scores")
    frames: list[int] | None = setting(
        None, "frame counts, such as 16,32,64 (default: max_frames)", distinct=True
    )
    order: list[Order] = setting(
        ["ordered"],
        "frame orders; ordered with another one gives a gap (elsewhere and no-look: what looks are worth)",
        distinct=True,
    )
    answer: list[Answer] = setting(
        ["reasoned"], "direct: only the answer; direct,reasoned: both, compared", distinct=True
    )
    protocol: Protocol | None = setting(None, "reference: Video-R1's public prompt, settings and scores")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if min(self.frame_counts, default=1) < 1:
            yield "frames", f"is {self.frames}; it must be frame counts above 0"
        controls = [order for order in self.order if order in LOOK_CONTROLS]
        if controls and not self.tools:
            yield "order", f"names {controls[0]}, which is about looks; add --tools look"
        if self.order == ["no-look"]:
            yield "order", "is no-look alone, which is no evaluation with tools; leave --tools out for that"
        for name in ("prompt_template", "subtitles"):
            if self.protocol and getattr(self, name):
                yield name, f"is set, but protocol {self.protocol} has a prompt of its own; leave one out"

    def frames_without_looks(self, frames: int) -> int:
        """Return the frames of an overview that has as many visual tokens as `frames` and all looks."""
        size = (self.look.pixels or self.frame_pixels) / self.frame_pixels
        return TEMPORAL_PATCH * round((frames + self.max_looks * self.look.frames * size) / TEMPORAL_PATCH)

    @property
    def folder(self) -> Path:
        """The folder of predictions and figures: `out`, or by default a name after model and manifest."""
        name = "-".join([*Path(self.model or "").parts[-2:], Path(self.manifest or "benchmarks").stem])
        return Path(self.out) if self.out else Path("runs/eval") / name.replace("/", "")

    @property
    def frame_counts(self) -> list[int]:
        return [self.max_frames] if self.frames is None else self.frames


@dataclass(kw_only=True)
class AuditSettings(QuestionsSettings):
    """Audit"""

    out: str | None = setting(None, "manifest with pass rates (default: NAME.audited.json beside NAME.json)")
    samples: int = setting(8, "K: answers to each question, of each kind", above=0)
    temporal_contrast: Contrast = setting("shuffled", "contrast clip; a later run with another adds its rate")
    correct_threshold: float = setting(0.5, "accuracy above this counts as correct", at_least=0, below=1)
    frame_pixels: int = setting(128 * 28 * 28, "area of one video frame after resizing, in pixels", above=0)
    temperature: float = setting(1.0, "sampling temperature; 0 is greedy", at_least=0)
    top_p: float = setting(1.0, "nucleus sampling; 1 is off", above=0, at_most=1)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from problems_of_out(self.out)


@dataclass(kw_only=True)
class BenchmarkSettings(Settings):
    """Benchmarks"""

    bench: list[str] | None = setting(
        None, "benchmarks: names (vsibench, mvbench, ...), TOML declarations or manifest files", distinct=True
    )
    annotation: Literal["published", "reference"] | None = setting(
        None, "the benchmark's own annotation or Video-R1's eval_<name>.json (default: whichever exists)"
    )
    allow_missing: bool = setting(False, "evaluate what exists when media or questions are missing")
    compare: Literal["paper"] | None = setting(None, "also print the paper's figures for the same frames")
    temporal_gap: bool = setting(False, "evaluate ordered and shuffled, and plot the gap")
    controls: bool = setting(False, "also evaluate shuffled, reversed, frozen, single, blind; plot the gaps")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.bench is None and (self.compare or self.annotation):
            name = "compare" if self.compare else "annotation"
            yield name, "is about benchmarks; name some with bench"


@dataclass(kw_only=True)
class AskSettings(DecodingSettings):
    """Question"""

    path: str | None = setting(None, "video or image file, a folder of frames, or an address")
    more_paths: list[str] = setting([], "further clips or images that the question is about")
    clip_fps: float | None = setting(None, "frame rate of a folder of frames (default: 2)", above=0)
    question: list[Sentence] | None = setting(None, "the question; several are asked about the same frames")
    options: list[str] = setting([], "options of a multiple-choice question")
    answer: str | None = setting(None, "the right answer (a letter for multiple choice); counts the matches")
    contrast: list[Contrast] = setting(
        [], "also ask with: shuffled, reversed, frozen, single, dropped, blind"
    )
    samples: int = setting(1, "K: answers to each; several have temperature and top_p 1 by default", above=0)
    problem_type: ProblemType | None = setting(None, "kind of answer (default: by the options)")
    start: float | None = setting(None, "start of the window of the clip, in seconds")
    end: float | None = setting(None, "end of the window of the clip, in seconds")
    play: Literal["forward", "reversed"] = setting("forward", "reversed: show the clip backwards")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.start is not None and self.end is not None and self.end <= self.start:
            yield "end", f"is {self.end} s, not after start ({self.start} s)"
        if self.more_paths and (self.start, self.end) != (None, None):
            yield "more_paths", "is given with start or end, which are a window of one clip"
        if self.problem_type == "multiple choice" and len(self.options) < 2:
            yield "options", f"has {len(self.options)} entries; a multiple-choice question needs at least 2"
        if len(set(self.contrast)) < len(self.contrast):
            yield "contrast", f"is {self.contrast}; name each once"
        if self.samples > 1 and self.temperature == 0 and "temperature" in self.given:
            yield "samples", f"is {self.samples} at temperature 0, where all are the same; raise temperature"


@dataclass(kw_only=True)
class TeacherSettings(QuestionsSettings):
    """A teacher of a manifest's questions"""

    teacher: str | None = setting(
        None, "checkpoint, model id, or address(es) of an OpenAI-compatible endpoint"
    )
    out: str | None = setting(None, "manifest to write, .json or .jsonl; journal and rejected beside it")
    samples: int = setting(1, "K: responses drawn for each question", above=0)
    temperature: float = setting(0.7, "sampling temperature; 0 is greedy", at_least=0)
    top_p: float = setting(0.95, "nucleus sampling; 1 is off", above=0, at_most=1)
    workers: int = setting(4, "threads that decode; they hold twice as many clips in memory", above=0)
    model: str | None = setting(None, "name of the model at an endpoint (default: the only one it serves)")
    concurrency: int = setting(64, "simultaneous requests to an endpoint", above=0)
    frames_as: Literal["auto", "images", "video"] = setting(
        "auto", "how an endpoint gets a clip: images with times, or a video (vLLM); auto: video if possible"
    )
    wait: float = setting(240.0, "seconds to wait for an endpoint that does not answer", at_least=0)
    request_fields: dict[str, Any] = setting({}, "more fields of a request, as JSON; null removes one")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.samples > 1 and self.temperature == 0:
            yield "temperature", f"is 0, so that all {self.samples} samples would be the same; raise it"
        yield from problems_of_out(self.out)
        named = addresses(self.teacher or "") if self.at_endpoint else ()
        if not all(address.startswith(SCHEMES) for address in named):
            yield "teacher", f"is {self.teacher!r}; several endpoints are addresses with http://, each"
        if self.engine != "transformers" and self.at_endpoint:
            yield "engine", "is set while the teacher is an endpoint, which has its own; leave it out"
        if self.model is not None and not self.at_endpoint:
            yield "model", "is set while the teacher is no endpoint; name the checkpoint with --teacher"

    @property
    def at_endpoint(self) -> bool:
        return (self.teacher or "").startswith(SCHEMES)


@dataclass(kw_only=True)
class AnnotateSettings(TeacherSettings):
    """Annotation"""

    choose: Literal["best", "majority"] = setting(
        "best", "keep the best rationale of all, or of the majority answer"
    )
    threshold: float = setting(0.6, "keep rationales whose answer scores above this", at_least=0, below=1)
    length_range: list[int] = setting([20, 1000], "shortest and longest rationale, in words")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if len(self.length_range) != 2 or not 0 <= self.length_range[0] <= self.length_range[1]:
            yield "length_range", f"is {self.length_range}; it must be two word counts, smaller one first"
        if self.choose == "majority" and self.samples < 3:
            yield "samples", f"is {self.samples}; a majority needs at least 3"


@dataclass(kw_only=True)
class PairsSettings(TeacherSettings):
    """Reversed twins"""

    samples: int = setting(4, "K: answers of the teacher to each question, which must all agree", at_least=2)
    words: str | None = setting(None, "TOML file with more words that turn round (form: reversals.toml)")
