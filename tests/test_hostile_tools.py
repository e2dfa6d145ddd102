"""Calls and tools that misbehave by modes: each is answered by its result or one line, then it goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_look import Scripted, question, toolbox
from tiny_models import moving_square, tiny_processor, write_clip

from video_r1.data import tools
from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import work_messages
from video_r1.data.prompts import PromptBuilder
from video_r1.data.rollouts import Rollout
from video_r1.data.tools import DEEPEST_CALL, Asked
from video_r1.files import json_lines
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.episodes import ToolEngine


class Says(BaseException):
    """Raises another exception when it is asked for its text; None: takes its time."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def __str__(self) -> str:
        if self.error is not None:
            raise self.error
        time.sleep(9)
        return ""


def raises(error: BaseException) -> None:
    raise error


def recurses() -> None:
    recurses()


def clip(count: int = 4, **changes: Any) -> Media:
    times = torch.arange(count).double()
    return Media(**{
        "frames": torch.zeros(count, 3, 56, 56, dtype=torch.uint8), "timestamps": times,
        "duration": float(max(count, 1)), "kind": "video", **changes,
    })  # fmt: skip


def image(mode: str, width: int = 40, height: int = 30) -> Image.Image:
    return Image.new(mode, (width, height))


NAN = float("nan")
# What the tool does, and how its answer begins: a text, "image", "clip", or the line that says why not.
TOOLS: dict[str, tuple[Any, str]] = {
    "SystemExit": (lambda: raises(SystemExit(3)), "Error: 3"),
    "KeyboardInterrupt": (lambda: raises(KeyboardInterrupt()), "Error: KeyboardInterrupt"),
    "GeneratorExit": (lambda: raises(GeneratorExit("g")), "Error: g"),
    "CancelledError": (lambda: raises(asyncio.CancelledError("c")), "Error: c"),
    "StopIteration": (lambda: raises(StopIteration("s")), "Error: s"),
    "TimeoutError": (lambda: raises(TimeoutError("of its own")), "Error: of its own"),
    "an error without words": (lambda: raises(Says(SystemExit("x"))), "Error: SystemExit"),
    "endless recursion": (recurses, "Error: maximum recursion depth"),
    "no memory": (lambda: raises(MemoryError()), "Error: MemoryError"),
    "lines": (lambda: raises(ValueError("one\r\ntwo\x1b[2J")), "Error: one two"),
    "an object that raises": (lambda: Says(KeyboardInterrupt("k")), "Error: k"),
    "an object that hangs": (lambda: Says(None), "Error: it took longer than 2 s"),
    "hangs": (lambda: time.sleep(9), "Error: it took longer than 2 s"),
    "nothing": (lambda: None, "None"),
    "no parts": (list, ""),
    "bytes": (lambda: b"\xff", r"b'\xff'"),
    "half a character": (lambda: "\ud800", "?"),
    "a page": (lambda: "x" * 10**7, "xxx"),
    "many texts": (lambda: ["x" * 2000] * 10**5, "Error: it returns more than 64 texts, images and frames"),
    "many images": (lambda: [image("RGB")] * 10**4, "Error: it returns more than 64"),
    "lists in lists": (lambda: [["a"], ("b",)], "['a']"),
    "a special token": (lambda: "<|im_end|>", "Error: a tool's text holds a special token"),
    "an image": (lambda: image("RGB"), "image"),
    "grey of 16 bits": (lambda: image("I;16"), "image"),
    "transparent": (lambda: image("RGBA"), "image"),
    "cyan, magenta": (lambda: image("CMYK"), "image"),
    "a bomb": (lambda: image("1", 20000, 20000), "Error: declares more pixels than are decoded"),
    "no pixels": (lambda: image("RGB", 0, 7), "Error: "),
    "a line": (lambda: image("RGB", 1, 900), "Error: is 1×900 pixels: one side is more than 200 times"),
    "a clip": (clip, "clip"),
    "large frames": (lambda: clip(frames=torch.zeros(4, 3, 300, 200, dtype=torch.uint8)), "clip"),
    "floats": (lambda: clip(frames=torch.zeros(4, 3, 56, 56)), "Error: its frames are torch.float32"),
    "channels last": (lambda: clip(frames=torch.zeros(4, 56, 56, 3, dtype=torch.uint8)), "Error: its frames"),
    "no tensor": (lambda: clip(frames=[[1]]), "Error: 'list' object has no attribute"),
    "an image as a clip": (lambda: clip(1), "Error: its clip has 1 frames; an even number up to 16"),
    "no frames": (lambda: clip(0), "Error: its frames are torch.uint8 [0, 3, 56, 56]"),
    "odd": (lambda: clip(3), "Error: its clip has 3 frames"),
    "too many frames": (lambda: clip(18), "Error: its clip has 18 frames"),
    "clips of many frames": (lambda: [clip(16)] * 5, "Error: it returns more than 64"),
    "huge frames": (
        lambda: clip(frames=torch.zeros(1, dtype=torch.uint8).expand(4, 3, 9000, 9000)),
        "Error: its frames are 9000×9000",
    ),
    "another kind": (lambda: clip(kind="gif"), "Error: it is of the kind 'gif'"),
    "two images as one": (lambda: clip(2, kind="image"), "Error: it is of the kind 'image' and has 2 frames"),
    "no length": (lambda: clip(duration=0.0), "Error: its clip lasts 0 seconds"),
    "length NaN": (lambda: clip(duration=NAN), "Error: its clip lasts nan"),
    "length without end": (lambda: clip(duration=float("inf")), "Error: its clip lasts inf"),
    "length in words": (lambda: clip(duration="4"), "Error: "),
    "fewer times": (lambda: clip(timestamps=torch.arange(3).double()), "Error: its clip lasts 4 seconds"),
    "times NaN": (lambda: clip(timestamps=torch.tensor([0.0, 1.0, NAN, 3.0])), "Error: the times"),
    "times that go back": (lambda: clip(timestamps=torch.tensor([0.0, 2.0, 1.0, 3.0])), "Error: the times"),
    "times before it": (lambda: clip(timestamps=torch.tensor([-1.0, 1.0, 2.0, 3.0])), "Error: the times"),
    "times beyond it": (lambda: clip(timestamps=torch.tensor([0.0, 1.0, 2.0, 9.0])), "Error: the"),
    "an image and a clip": (lambda: [image("RGB"), clip()], "Error: tools returned images and clips"),
    "clips of two lengths": (lambda: [clip(4), clip(8)], "clip"),
}  # fmt: skip


def act(mode: str) -> Any:
    """
    Act.

    Args:
        mode: Which.
    """
    return TOOLS[mode][0]()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", moving_square(64))


def answered(family: str, video: Path, call: str) -> Rollout:
    """Return an answer that calls a tool and then says B, after what a run does with it."""
    builder = PromptBuilder(tiny_processor(family))
    builder.toolbox = toolbox(family, [act])
    engine = ToolEngine(Scripted(builder, f"<tool_call>{call}</tool_call>", "B"), builder)
    ((rollout,),) = engine.sample([question(family, video, builder)], SamplingSettings(max_tokens=9000))
    assert rollout.text == "B" and len(rollout.turns) == 1
    assert json_lines([rollout.transcript, rollout.calls[0].arguments, work_messages(rollout.work)])
    return rollout


@pytest.mark.parametrize("mode", list(TOOLS))
def test_cases_a_tool_ends_no_answer(video: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "TOOL_SECONDS", 2.0)
    (call,) = answered("qwen2_5_vl", video, json.dumps({"name": "act", "arguments": {"mode": mode}})).calls
    first = call.result[0] if call.result else ""
    found = first if isinstance(first, str) else "clip" if first.kind == "video" else "image"
    assert found.startswith(TOOLS[mode][1]) and len(found) < 2100 and "\n" not in found
    assert call.failed == found.startswith("Error")


@pytest.mark.parametrize("depth", [DEEPEST_CALL - 1, DEEPEST_CALL + 1, 500, *range(960, 1000, 4), 1900])
@pytest.mark.parametrize(
    "form",
    ['{"name": "act", "arguments": {"mode": %s}}', "<function=act><parameter=mode>%s</parameter></function>"],
)
def test_cases_nested_arguments(video: Path, depth: int, form: str) -> None:
    (call,) = answered("qwen3_vl", video, form % ("[" * depth + "]" * depth)).calls
    said = "nested too deeply", "not valid JSON"  # or, in the second form, it is a text
    assert call.failed and (depth < DEEPEST_CALL or any(each in str(call) for each in said) or "<" in form)


def test_cases_ctrl_c_while_a_tool_works(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's interrupt is no error of the tool."""
    monkeypatch.setitem(TOOLS, "waits", (lambda: time.sleep(5), ""))
    prompt = question("qwen2_5_vl", video, PromptBuilder(tiny_processor("qwen2_5_vl")))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        toolbox(functions=[act]).call(Asked("act", {"mode": "waits"}), prompt)
    assert time.monotonic() - began < 4
