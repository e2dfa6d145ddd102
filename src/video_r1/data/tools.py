"""Tools that a model calls while it answers, and `look`, which shows a stretch of the clip.

    the policy's turn ─► parse_calls ─► Toolbox.call ─► texts and Media ─► PromptBuilder.build_turn

A call that cannot be parsed, has wrong arguments, raises or takes too long is answered by one line that says
so: nothing that a model writes ends a run. Decoding errors that are not the file's fault end the run.
"""

import ctypes
import inspect
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)

from video_r1.data.decoding.decoders import read_media_at
from video_r1.data.decoding.frame_cache import FrameCache
from video_r1.data.decoding.media import Media, fitted
from video_r1.data.decoding.pictures import read_picture
from video_r1.data.manifests.records import Sample, is_deep
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.rollouts import Rollout, ToolCall
from video_r1.data.sources.media_types import ClipRef
from video_r1.data.templates import calls_text
from video_r1.errors import ConfigError, MediaError, PromptError
from video_r1.files import warn_once
from video_r1.seeds import derived_seed
from video_r1.settings.frames import TEMPORAL_PATCH, FrameBudget
from video_r1.settings.tools import ToolSettings

LONGEST_CALL, LONGEST_TEXT = 4000, 2000  # characters of a call, and of a text that a tool returns
DEEPEST_CALL = 20  # levels of its arguments: they are written to files and prompts
MOST_PARTS = 64  # texts, images and frames that a call returns, or look_frames if these are more
TOOL_SECONDS = 60.0  # for a tool of the user's
_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>]+)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class Unreadable(Exception):
    """A call that is answered by this message."""


class Asked(NamedTuple):
    """A call as it was parsed; `problem`: why it could not be."""

    name: str
    arguments: dict[str, Any]
    problem: str = ""


def parse_calls(text: str) -> list[Asked]:
    """Return the calls in a policy's turn, in either form of the Qwen families:

    <tool_call>{"name": "look", "arguments": {"start": 3, "end": 5}}</tool_call>
    <tool_call><function=look><parameter=start>3</parameter><parameter=end>5</parameter></function></tool_call>
    """
    found = []
    for call in _CALL.finditer(text):
        try:
            asked = _parsed(call[1]) if call[2] else Asked("", {}, "the call has no </tool_call>")
            # No infinity, no half of a character: it is written to files and prompts.
            json.dumps(asked, allow_nan=False, ensure_ascii=False).encode()
            deep = is_deep(asked.arguments, DEEPEST_CALL)
            found.append(Asked("", {}, "the call is nested too deeply") if deep else asked)
        except (ValueError, RecursionError):
            found.append(Asked("", {}, "the call is not valid JSON"))
    return found


def _parsed(body: str) -> Asked:
    if len(body) > LONGEST_CALL:
        return Asked("", {}, f"the call is longer than {LONGEST_CALL} characters")
    if function := _FUNCTION.fullmatch(body):
        arguments = {name.strip(): _value(value) for name, value in _PARAMETER.findall(function[2])}
        return Asked(function[1].strip(), arguments)
    call = json.loads(body)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Asked("", {}, 'the call is not {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return Asked(call["name"], {}, "arguments is not an object")
    return Asked(call["name"], arguments)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


def look(start: float, end: float, fps: float | None = None) -> None:
    """
    Show the frames of the video between two times.

    Args:
        start: Start in seconds of the video.
        end: End in seconds of the video.
        fps: Frames per second. Leave it out for as many as fit.
    """


class Toolbox:
    """The tools that a model is offered.

    functions: with type hints and a docstring, as TRL's `tools`: they return text, a PIL image, Media, or a
    list of these. budget: of the overview; the settings' own frames and pixels replace it for a look.
    Thread-safe: a stretch that several answers ask for is decoded once until `forget` is called.
    """

    def __init__(
        self,
        settings: ToolSettings,
        budget: FrameBudget,
        functions: Sequence[Callable[..., Any]] = (),
        frame_cache: FrameCache | None = None,
    ) -> None:
        self.settings = settings
        self.budget = replace(
            budget,
            fps=settings.look.fps,
            min_frames=TEMPORAL_PATCH,
            max_frames=settings.look.frames,
            frame_pixels=settings.look.pixels or budget.frame_pixels,
        )
        offered = [look] if settings.tools == "look" else []
        self.functions = {function.__name__: function for function in (*offered, *functions)}
        if len(self.functions) < len(offered) + len(functions):
            raise ConfigError("tools: two have one name; rename a function")
        try:
            self.schemas = [get_json_schema(function) for function in self.functions.values()]
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise ConfigError(f"tools: {error}") from error
        self.frame_cache = frame_cache
        self.reads: dict[tuple[ClipRef, float], Future[Media]] = {}
        self.lock = threading.Lock()

    def forget(self) -> None:
        """Drop the stretches that were read."""
        with self.lock:
            self.reads.clear()

    def _read(self, window: ClipRef, budget: FrameBudget) -> Media:
        key = (window, budget.fps)
        with self.lock:
            known = self.reads.get(key)
            future = self.reads[key] = known or Future()
        if known is None:
            read = self.frame_cache.read if self.frame_cache else read_media_at
            try:
                future.set_result(read(window, budget, (budget.max_frames,))[0])
            except BaseException as error:  # the other askers wait for it
                future.set_exception(error)
        return future.result()

    def call(self, asked: Asked, prompt: Prompt) -> ToolCall:
        """Run one call about the clip of `prompt`, the question's.

        Raises VideoR1Error if decoding fails for a reason other than the call or the file.
        """
        try:
            return ToolCall(asked.name, asked.arguments, self._result(asked, prompt))
        except Unreadable as error:
            line = " ".join(str(error).split())[:LONGEST_TEXT]
            return ToolCall(asked.name, asked.arguments, [f"Error: {line}"], failed=True)

    def _result(self, asked: Asked, prompt: Prompt) -> list[str | Media]:
        function = self.functions.get(asked.name)
        if asked.problem or function is None:
            unknown = f"there is no tool {asked.name!r}; there is {', '.join(self.functions)}"
            raise Unreadable(asked.problem or unknown)
        try:
            given = inspect.signature(function).bind(**asked.arguments)
        except TypeError as error:
            raise Unreadable(f"{asked.name}: {error}") from error
        if function is look:
            return self._look(prompt, **given.arguments)
        result, raised, said = _within(
            TOOL_SECONDS, lambda: self._shown(function(*given.args, **given.kwargs))
        )
        if raised:
            warn_once(f"tool {asked.name}: raises {raised}; the model is told what it says")
            raise Unreadable(said or raised)
        return result

    def _look(self, prompt: Prompt, start: Any, end: Any, fps: Any = None) -> list[str | Media]:
        if len(prompt.files) != 1 or prompt.files[0].data_type != "video" or not prompt.media:
            raise Unreadable("look: the question is not about one video")
        said = (start, end) if fps is None else (start, end, fps)
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) or abs(v) > 1e9 for v in said):
            raise Unreadable("look: start, end and fps are numbers, in seconds and frames a second")
        clip, length = prompt.files[0], prompt.media[0].duration
        end = min(end, length) if start < length else end
        if not 0 <= start < end <= length:
            raise Unreadable(f"look: {start:g} to {end:g} s is no part of the clip, which has {length:.1f} s")
        most = self.budget.max_frames
        if fps is not None and not 0 < fps * (end - start) <= most + 1e-6:
            raise Unreadable(f"look: at most {most} frames at once; lower fps, or leave it out")
        shown = elsewhere(start, end, length) if prompt.order == "elsewhere" else start
        first = length - shown - (end - start) if clip.play == "reversed" else shown
        first = max(0.0, first) + (clip.start or 0.0)
        window = replace(clip, start=first, end=first + end - start)
        try:
            budget = self.budget if fps is None else replace(self.budget, fps=float(fps))
            media = self._read(window, budget)
        except MediaError as error:
            raise Unreadable(f"look: this part of the clip {error.reason}") from error
        return [f"{start:g} to {end:g} s:", replace(media, timestamps=media.timestamps + start)]

    def _shown(self, result: Any) -> list[str | Media]:
        """Return what a user's tool gave, in a form that fits the model. Raises ValueError."""
        shown: list[str | Media] = []
        for part in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(part, Image.Image):
                part = Media(read_picture(part)[None], torch.zeros(1, dtype=torch.float64), 0.0, "image")
            if not isinstance(part, Media):
                text = str(part).encode(errors="replace").decode()
                part = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " (cut)"
            shown.append(part if isinstance(part, str) else fitted(part, self.budget))
            most = max(MOST_PARTS, self.budget.max_frames)
            if sum(1 if isinstance(each, str) else len(each.frames) for each in shown) > most:
                raise ValueError(f"it returns more than {most} texts, images and frames")
        return shown


def worked_pieces(builder: PromptBuilder, sample: Sample, prompt: Prompt) -> list[Tensor | Prompt]:
    """Return the turns of a row's `work`: token ids of the assistant, then the answers of tools.

    `look` is called; the results of other tools are those of the row. Raises PromptError, also for a tool
    that is not offered and for more calls or tokens than the settings allow.
    """
    if not sample.work:
        return []
    toolbox: Toolbox | None = builder.toolbox
    about = f"question {sample.problem_id!r}: its messages call"
    if toolbox is None:
        raise PromptError(f"{about} tools; set --tools look")
    names = [name for turn in sample.work for name, _ in turn.calls]
    if unknown := set(names) - set(toolbox.functions):
        raise PromptError(f"{about} {sorted(unknown)[0]}, which is not offered (tools)")
    if len(names) > toolbox.settings.max_looks:
        raise PromptError(f"{about} tools {len(names)} times; max_looks is {toolbox.settings.max_looks}")
    pieces: list[Tensor | Prompt] = []
    returned, limit = 0, toolbox.settings.max_tool_tokens
    for text, calls, texts in sample.work:
        results: list[list[str | Media]] = [[text] for text in texts]
        for place, (name, arguments) in enumerate(calls):
            if name == look.__name__:
                answered = toolbox.call(Asked(name, dict(arguments)), prompt)
                if answered.failed:
                    raise PromptError(f"question {sample.problem_id!r}: {answered.result[0]}")
                results[place] = list(answered.result)
        answer = builder.build_turn(results, prompt)
        returned += len(answer.input_ids)
        if returned > limit:
            raise PromptError(f"{about} tools that return {returned} tokens; max_tool_tokens is {limit}")
        called = calls_text(builder.processor, calls)
        pieces += [builder.turn_ids(sample, text + called if text else called.lstrip("\n")), answer]
    toolbox.forget()
    return pieces


def overview(clip: Media, bounds: Sequence[int], generator: torch.Generator) -> Media:
    """Return some of a video's frames, from its first to its last; their number is drawn from `bounds`."""
    fewest, most = (min(bound, len(clip.frames)) // TEMPORAL_PATCH for bound in bounds)
    if clip.kind != "video" or fewest < 1:
        return clip
    count = TEMPORAL_PATCH * int(torch.randint(fewest, most + 1, (), generator=generator))
    kept = torch.linspace(0, len(clip.frames) - 1, count).round().long()
    return replace(clip, frames=clip.frames[kept], timestamps=clip.timestamps[kept])


def elsewhere(start: float, end: float, length: float) -> float:
    """Return the start of another stretch of the clip as long as [start, end], in seconds: drawn from those
    that do not overlap it; where there is none, the farthest.
    """
    size = end - start
    before, behind = max(0.0, start - size), max(0.0, length - size - end)
    if before + behind == 0.0:
        return 0.0 if start > length - end else length - size
    place = (before + behind) * derived_seed("elsewhere", start, end, length, bits=32) / 2**32
    return place if place < before else end + place - before


def is_control(prompt: Prompt, rollout: Rollout) -> bool:
    """Whether all looks of an answer to a prompt `elsewhere` showed another stretch than they asked for: what
    was shown overlaps at most half of the window.
    """
    for call in rollout.calls:
        if call.name == look.__name__ and not call.failed:
            length = prompt.media[0].duration
            start, end = call.arguments["start"], min(call.arguments["end"], length)
            if abs(elsewhere(start, end, length) - start) < (end - start) / 2:
                return False
    return True


def _within(seconds: float, work: Callable[[], Any]) -> tuple[Any, str, str]:
    """Return what `work` does, or the name and the text of what it raises; after `seconds` its thread is told
    to stop. Ctrl-C is raised here, in the main thread: what is raised in the other one is the tool's own.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            try:
                future.set_result((work(), "", ""))
            except BaseException as error:
                future.set_result((None, type(error).__name__, str(error)))
        except BaseException as error:  # raised by the __str__ of the first
            future.set_result((None, type(error).__name__, ""))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return future.result(seconds)
    except TimeoutError:
        number = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(SystemExit))
        raise Unreadable(f"it took longer than {seconds:g} s") from None
