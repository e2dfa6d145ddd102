"""The process that holds the model: it reads questions as JSON lines and writes events as JSON lines.

    {"settings": {…}, "orders": ["ordered", "shuffled"]}, or "stop"; an empty `path` asks without a clip
    {"clip": {…}}, the fields of a `ClipRef`: its frames alone, without a model
    ◄ {"event": "state" | "frames" | "text" | "answers" | "error" | "end", …}

Started by ask.py, which imports neither torch nor a model. Every failure of a model or a server becomes an
`error`; ask.py reports the death of this process. It ends with the server.
"""

import base64
import json
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.rollouts import Rollout
from video_r1.data.sources.media_types import ClipRef
from video_r1.errors import VideoR1Error, first_line
from video_r1.evaluation.ask import named_answer, question_sample
from video_r1.evaluation.session import ModelSession, View, sampling_of, verdict
from video_r1.recipe import load_recipe
from video_r1.report.run_data import place_of, turn_of
from video_r1.settings.decoding import AskSettings
from video_r1.settings.frames import FrameBudget
from video_r1.training.recording import recorded_turns, save_shown

WITH_LOOKS = 8  # answers of a view whose looks are shown: an event has a limit (ask.py)


class Stopped(Exception):
    """Raised when nobody listens to this answer any more."""


class Answerer:
    """A model that answers one question after the other."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._session: ModelSession | None = None

    def say(self, event: str, **what: Any) -> None:
        self._out.write(json.dumps({"event": event, **what}) + "\n")
        self._out.flush()

    def answer(self, asked: dict[str, Any], stopped: threading.Event) -> None:
        """Write all events of one question, `end` last; no further text once `stopped` is set."""
        try:
            self._answer(asked, stopped)
        except Stopped:
            pass
        except VideoR1Error as error:
            self.say("error", error=str(error))
        except Exception as error:  # a stranger's checkpoint or a server may raise anything
            self.say("error", error=f"{type(error).__name__}: {first_line(error)}"[:1000])
        stopped.set()  # an endpoint may still write
        self.say("end")

    def _answer(self, asked: dict[str, Any], stopped: threading.Event) -> None:
        if "clip" in asked:
            clip = ClipRef(**asked["clip"])
            self.say("frames", media=clip.data_type, **strip_of([read_media(clip, FrameBudget())]))
            return
        settings = load_recipe("ask", None, asked["settings"]).section(AskSettings)
        sample = question_sample(settings, asked["settings"]["question"][0], is_text=not settings.path)
        if self._session is None:
            self.say("state", text="opening the model")
            self._session = ModelSession(settings)
        session = self._session
        decoded = bool(sample.paths) and not session.has(sample)
        if decoded:
            self.say("state", text="decoding the clip")
        prompts = session.prompts(sample, asked["orders"])
        shown = prompts[0].media
        self.say(
            "frames", decoded=decoded, media=sample.data_type, type=sample.problem_type, **strip_of(shown),
            **place_of(f"<answer>{sample.answer}</answer>", sample.problem_type),
            views=[
                {
                    "order": prompt.order,
                    "permutation": None if prompt.permutation is None else prompt.permutation.tolist(),
                }
                for prompt in prompts
            ],
        )  # fmt: skip
        self.say("state", text="loading the model")
        session.load()
        self.say("state", text="answering")

        def hear(view: int, text: str) -> None:
            if stopped.is_set():
                raise Stopped
            if text:
                self.say("text", view=view, text=text)

        views = session.ask(sample, prompts, settings.samples, sampling_of(settings), hear)
        shown, said = [_view(sample, view) for view in views], verdict(sample, views)
        self.say("answers", right=bool(sample.answer), verdict=said, views=shown)


def strip_of(shown: Sequence[Media]) -> dict[str, Any]:
    """Return the frames as one JPEG, the size of each, and their times."""
    if not shown:
        return {"strip": "", "count": 0, "timestamps": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "strip", "frames.jpg")
        facts = save_shown(shown, path)
        strip = base64.b64encode(path.read_bytes()).decode("ascii")
    times = [round(float(time), 3) for media in shown for time in media.timestamps]
    return {**facts, "strip": strip, "timestamps": times}


def _view(sample: Sample, view: View) -> dict[str, Any]:
    return {
        "share": view.share._asdict(), "gap": None if view.gap is None else view.gap._asdict(),
        "counted": sum(view.counted),
        "completions": [
            {
                "text": rollout.text,
                **(_turns_of(rollout) if number < WITH_LOOKS else {}),
                "answer": named_answer(sample, rollout.text) or answer,
                "counted": counted,
                "tokens": len(rollout.token_ids),
                "truncated": rollout.finish_reason == "length",
                **place_of(rollout.text, sample.problem_type),
            }
            for number, (rollout, answer, counted) in enumerate(
                zip(view.rollouts, view.answers, view.counted, strict=True)
            )
        ],
    }  # fmt: skip


def _turns_of(rollout: Rollout) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        turns = [turn_of(turn, Path(folder)) for turn in recorded_turns(rollout, f"{folder}/frames/look")]
    return {"turns": turns} if turns else {}


def main() -> None:
    """Read questions, and "stop" for the last one, from standard input until it is closed."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries is not an event
    answerer = Answerer(out)
    waiting: queue.SimpleQueue[tuple[dict[str, Any], threading.Event]] = queue.SimpleQueue()

    def listen() -> None:
        stopped = threading.Event()
        for line in sys.stdin:
            if (asked := json.loads(line)) == "stop":
                stopped.set()
            else:
                stopped = threading.Event()
                waiting.put((asked, stopped))
        os._exit(0)  # the server is gone

    threading.Thread(target=listen, daemon=True).start()
    while True:
        answerer.answer(*waiting.get())


if __name__ == "__main__":
    main()
