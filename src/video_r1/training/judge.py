"""The judge: a language model behind an endpoint says how right a free-form answer is.

    groups ─► answers ─► judge.jsonl (asked before?) ─► the endpoint, each new one once ─► [G] scores

A group of which an answer has no score (the judge is away and `judge_down` skip, its reply is no number, it
refuses the request) has none at all, nan throughout: compared by the other rewards alone, or where the judge
stands for accuracy by ROUGE, no answer gains or loses by it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from video_r1.data.answers import extract_answer
from video_r1.data.rollouts import RolloutGroup
from video_r1.errors import ConfigError, VideoR1Error, first_line
from video_r1.files import append_line, part_of, parts_of
from video_r1.fingerprint import digest
from video_r1.processes import decided_by_first, gather, process_index
from video_r1.rewards.group import Answered
from video_r1.rewards.judging import JUDGED_TYPE, judge_question, load_judge_template, read_score
from video_r1.rollout.chat import Completion, completions_of
from video_r1.rollout.endpoint import (
    ChatClient,
    Endpoint,
    endpoint_urls,
    models_now,
    served_model,
)
from video_r1.rollout.http_client import REFUSED_QUESTION, ServerFailure, ServerRefusal, wait_for
from video_r1.settings.training import JudgeSettings
from video_r1.training.metrics import Meter, tolerated

logger = logging.getLogger(__name__)

FILE = "judge.jsonl"
LONGEST_REPLY = 1024  # tokens; a judge that reasons needs more than a number
LOOK_AGAIN = 5.0  # seconds between two looks for a judge who is away
LAST_WORDS = 10.0  # seconds for an answer once the run is told to stop
TRIAL = ("How many legs has a cat?", "four", "It has 4 legs.")


class JudgeAway(VideoR1Error):
    """The judge does not answer, or refuses everything. passes: whether waiting may help."""

    def __init__(self, message: str, passes: bool = True) -> None:
        super().__init__(message)
        self.passes = passes


class Asked(NamedTuple):
    """What a judge is asked about an answer, its fingerprint, and whose answer it is."""

    key: str
    text: str
    problem_id: str | int
    answer: str


class Judge:
    """Scores of groups by the model at `judge_endpoint`, which is asked the same only once in a run.

    folder: where judge.jsonl remembers them (each process writes a file of its own and reads all). stopped:
    whether the run was told to stop, which ends waiting. `open` comes first.
    """

    def __init__(
        self, settings: JudgeSettings, folder: Path, meter: Meter, stopped: Callable[[], bool]
    ) -> None:
        assert settings.judge_endpoint is not None
        self.settings, self.meter, self.stopped = settings, meter, stopped
        self.template = load_judge_template(settings.judge_template)
        key = os.environ.get(settings.judge_key_variable)
        urls = endpoint_urls(settings.judge_endpoint)
        self.endpoint = Endpoint(urls, key, settings.judge_timeout, settings.judge_wait)
        self.client = ChatClient(self.endpoint, settings.judge_concurrency)
        self.path = folder / FILE
        self.scores: dict[str, float] = {}
        self.model = settings.judge_model or ""
        self.is_away = self.has_warned = False

    def open(self) -> None:
        """Asks the judge once, and reads what it said before. Raises ConfigError where it does not answer
        as a judge.
        """
        self.model = decided_by_first(self._tried)
        self.scores = remembered([self.path, *parts_of(self.path)])

    def __call__(self, groups: Sequence[RolloutGroup | Answered]) -> list[Tensor]:
        """[G] float32 in [0, 1] for each group; nan throughout where it has none. An answer that is not there
        is 0 without a question. Raises JudgeAway.
        """
        asked = [self.questions(group) if judged(group) else [] for group in groups]
        wanted = {one.key: one for group in asked for one in group if one is not None}
        missing = {key: one for key, one in wanted.items() if key not in self.scores}
        unread = self._ask(list(missing.values()))
        found = [[0.0 if one is None else self.scores.get(one.key) for one in group] for group in asked]
        if wanted:
            self.meter.add("judge/remembered", len(wanted) - len(missing), len(wanted))
            self.meter.add("judge/unread", len(unread), len(wanted))
        for group in filter(None, found):
            self.meter.add("judge/skipped", None in group)
        return [
            torch.full((len(group.ordered),), math.nan)
            if not scores or None in scores
            else torch.tensor(scores, dtype=torch.float32)
            for group, scores in zip(groups, found, strict=True)
        ]

    def questions(self, group: RolloutGroup | Answered) -> list[Asked | None]:
        """What to ask about each ordered completion's answer; None where it gives none."""
        sample = group.sample
        answers = [extract_answer(rollout.text) for rollout in group.ordered]
        return [
            self.question(sample.problem, sample.answer, answer, sample.problem_id) if answer else None
            for answer in answers
        ]

    def question(self, problem: str, truth: str, answer: str, problem_id: str | int = "") -> Asked:
        text = judge_question(self.template, problem, truth, answer)
        return Asked(digest([self.model, text, self.settings.judge_fields], 16), text, problem_id, answer)

    # ---- Asking

    def _ask(self, asked: list[Asked]) -> set[str]:
        """Gives `scores` those of all that are asked but of the unread, whose keys it returns, and, with
        `judge_down` skip, of what the judge does not answer. All processes wait or stop together: each calls
        this with its own, until nobody's judge is away. Raises JudgeAway.
        """
        unread: set[str] = set()
        while True:
            away = self._try([a for a in asked if a.key not in self.scores and a.key not in unread], unread)
            everyone = gather((away and (str(away), away.passes), self.stopped()))
            told = [said for said, _ in everyone if said is not None]
            if not told:
                if self.is_away and asked:
                    logger.warning("the judge at %s is back", self.endpoint.url)
                    self.is_away = False
                return unread
            message, down = told[0][0], self.settings.judge_down
            stops = down == "stop" or not all(passes for _, passes in told)
            if down != "skip" and (stops or any(stopped for _, stopped in everyone)):
                raise JudgeAway(message)
            if not self.is_away:
                what = "groups that it should judge learn from the other rewards alone, until it is back"
                waits = "waiting for it (Ctrl-C stops the run, with a checkpoint)"
                logger.warning("%s; %s", message, waits if down == "wait" else what)
            self.is_away = True
            if down == "skip":
                return unread
            self._rest()

    def _try(self, asked: list[Asked], unread: set[str]) -> JudgeAway | None:
        """Asks, if the judge was there last time or is there again."""
        if not asked:
            return None
        try:
            if self.is_away and not is_there(self.endpoint):
                raise JudgeAway(f"the judge at {self.endpoint.url} does not answer")
            self._ask_once(asked, unread)
        except JudgeAway as away:
            return away
        return None

    def _ask_once(self, asked: list[Asked], unread: set[str]) -> None:
        """Each is remembered as soon as it is answered. Raises JudgeAway."""
        own = self.path if process_index() == 0 else part_of(self.path, process_index())
        for finished in self.client.each(asked, self._answer):
            for one, score, said in finished:
                if score is None:
                    if not self.has_warned:
                        logger.warning(
                            "the judge %s said %r of an answer to %r, "
                            "no number from 0 to 1: its group is not judged (said once; the series "
                            "judge/unread has the share)",
                            self.model, said[:200], one.problem_id,
                        )  # fmt: skip
                    self.has_warned = True
                    unread.add(one.key)
                    continue
                self.scores[one.key] = score
                line = {"key": one.key, "score": score, "problem_id": one.problem_id, "answer": one.answer}
                with tolerated(FILE):
                    append_line(own, line)

    async def _answer(self, asked: Asked) -> tuple[Asked, float | None, str]:
        """The question, its score where the reply is one, and the reply. Raises JudgeAway."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": asked.text}],
            "temperature": 0,
            "max_tokens": LONGEST_REPLY,
            **self.settings.judge_fields,
        }
        where = f"the judge at {self.endpoint.url}"
        try:
            drawn = self.client.draw(1, lambda n, drawn: body, completions_of)
            (completion,) = await self._in_time(asyncio.ensure_future(drawn))
        except ServerRefusal as refusal:
            if refusal.status in REFUSED_QUESTION:
                return asked, None, str(refusal)
            raise JudgeAway(f"{where} refuses all requests: {refusal}", passes=False) from refusal
        except ServerFailure as failure:
            raise JudgeAway(f"{where} fails: {failure}") from failure
        except JudgeAway:
            raise
        except VideoR1Error as error:  # the client has waited for it
            raise JudgeAway(f"{where} does not answer: {first_line(error.__cause__ or error)}") from error
        return asked, score_of(completion), completion.text

    async def _in_time(self, drawn: asyncio.Future[list[Completion]]) -> list[Completion]:
        """What is drawn within `judge_wait` and one request's time, however often it is asked for; in a few
        seconds once the run is told to stop, unless it would then learn without the judge (skip).

        Raises JudgeAway.
        """
        limit = self.settings.judge_wait + self.settings.judge_timeout
        until, told = time.monotonic() + limit, self.settings.judge_down == "skip"
        try:
            while not drawn.done():
                if not told and self.stopped():
                    until, told = min(until, time.monotonic() + LAST_WORDS), True
                if time.monotonic() > until:
                    limit = LAST_WORDS if self.stopped() else limit
                    raise JudgeAway(
                        f"the judge at {self.endpoint.url} had given no answer after {limit:g} s; where "
                        "it is slow, raise judge_timeout or lower judge_concurrency"
                    )
                await asyncio.wait([drawn], timeout=0.1)
            return drawn.result()
        finally:
            drawn.cancel()

    def _rest(self) -> None:
        """Some seconds, or until the run is told to stop."""
        until = time.monotonic() + LOOK_AGAIN
        while time.monotonic() < until and not self.stopped():
            time.sleep(min(0.1, LOOK_AGAIN))

    def _tried(self) -> str:
        """The model's name, after one question. Raises ConfigError."""
        self.model, _ = served_model(self.endpoint, self.settings.judge_model, "judge_")
        where = f"judge_endpoint {self.endpoint.url}: {self.model}"
        try:
            ((_, score, said),) = next(self.client.each([self.question(*TRIAL)], self._answer))
        except JudgeAway as away:
            raise ConfigError(f"{where} was asked once before the first step: {away}") from away
        if score is None:
            raise ConfigError(
                f"{where} was asked once before the first step and said {said[:200]!r}, no number from "
                "0 to 1: change judge_template, take another model, or give it room with judge_fields "
                '(such as {"max_tokens": 4096}, or what turns its reasoning off)'
            )
        return self.model


def judged(group: RolloutGroup | Answered) -> bool:
    return group.sample.problem_type == JUDGED_TYPE


def is_there(endpoint: Endpoint) -> bool:
    """Whether it answers anything at all, asked once."""
    try:
        wait_for(models_now(endpoint))
    except ServerFailure:
        return False
    except ServerRefusal:
        pass
    return True


def score_of(completion: Completion) -> float | None:
    """None for a reply that was cut off, too."""
    return read_score(completion.text) if completion.finish_reason == "stop" else None


def remembered(paths: Sequence[Path]) -> dict[str, float]:
    """Scores by fingerprint in the files that are there; lines that a killed run did not end are left out."""
    scores: dict[str, float] = {}
    for path in paths:
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
                scores[str(record["key"])] = float(record["score"])
            except (ValueError, KeyError, TypeError):
                continue
    return scores
