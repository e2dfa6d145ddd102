"""Settings of `video-r1 annotate`. Importing this module does not import torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from video_r1.settings.base import Problem, setting
from video_r1.settings.decoding import SCHEMES, DecodingSettings, addresses
from video_r1.settings.shared import ManifestSettings, problems_of_out


@dataclass(kw_only=True)
class AnnotateSettings(DecodingSettings, ManifestSettings):
    """Annotation"""

    manifest: str | None = setting(None, "JSON, JSON-lines or Parquet file, an address, or a Hugging Face id")
    teacher: str | None = setting(
        None, "checkpoint, model id, or address(es) of an OpenAI-compatible endpoint"
    )
    out: str | None = setting(None, "manifest for SFT, .json or .jsonl; journal and rejected beside it")
    limit: int | None = setting(None, "annotate the first N questions only; may grow on resume", above=0)
    samples: int = setting(1, "K: rationales drawn for each question", above=0)
    choose: Literal["best", "majority"] = setting(
        "best", "keep the best rationale of all, or of the majority answer"
    )
    threshold: float = setting(0.6, "keep rationales whose answer scores above this", at_least=0, below=1)
    length_range: list[int] = setting([20, 1000], "shortest and longest rationale, in words")
    temperature: float = setting(0.7, "sampling temperature; 0 is greedy", at_least=0)
    top_p: float = setting(0.95, "nucleus sampling; 1 is off", above=0, at_most=1)
    batch_size: int = setting(8, "questions in a batch of a local teacher", above=0)
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
        if len(self.length_range) != 2 or not 0 <= self.length_range[0] <= self.length_range[1]:
            yield "length_range", f"is {self.length_range}; it must be two word counts, smaller one first"
        if self.samples > 1 and self.temperature == 0:
            yield "temperature", f"is 0, so that all {self.samples} samples would be the same; raise it"
        if self.choose == "majority" and self.samples < 3:
            yield "samples", f"is {self.samples}; a majority needs at least 3"
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
