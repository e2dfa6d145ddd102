"""Settings of the reward `judge`: a language model that says how right an answer is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from video_r1.settings.base import Problem, Settings, setting
from video_r1.settings.decoding import SCHEMES, addresses


@dataclass(kw_only=True)
class JudgeSettings(Settings):
    """Judge"""

    judge_endpoint: str | None = setting(
        None,
        "address of an OpenAI-compatible endpoint (http://host:8000/v1) whose model judges free-form "
        "answers; several, with commas between, share the requests",
    )
    judge_as: Literal["reward", "accuracy"] = setting(
        "reward",
        "reward: its score is a reward of its own, beside accuracy; accuracy: it is the accuracy of "
        "free-form answers, in place of ROUGE, also for the temporal and length rewards",
    )
    judge_model: str | None = setting(None, "name of the model there (default: the only one it serves)")
    judge_key_variable: str = setting("OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    judge_template: str | None = setting(
        None, "file with what the judge is asked: {question}, {truth}, {answer}; it wants a number, 0 to 1"
    )
    judge_fields: dict[str, Any] = setting({}, "more fields of a request, as JSON; null leaves one out")
    judge_down: Literal["wait", "stop", "skip"] = setting(
        "wait",
        "while the judge does not answer: wait for it; stop, with a checkpoint; skip, so that groups that it "
        "should have judged learn from the other rewards alone",
    )
    judge_wait: float = setting(
        60.0, "seconds to wait for it before the run begins, and before stop or skip", at_least=0
    )
    judge_timeout: float = setting(
        120.0, "seconds for one request to it; more for a judge that reasons at length", above=0
    )
    judge_concurrency: int = setting(64, "requests to it at once, of each process", above=0)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.judge_endpoint is None:
            if self.judge_as == "accuracy":
                yield "judge_as", "is accuracy while judge_endpoint is not set; give the judge's address"
            return
        named = addresses(self.judge_endpoint)
        if not named or not all(address.startswith(SCHEMES) for address in named):
            yield "judge_endpoint", f"is {self.judge_endpoint!r}; give an address with http:// or https://"
