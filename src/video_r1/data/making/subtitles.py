"""Subtitles beside a clip: SubRip (.srt) and WebVTT (.vtt), read into lines of text."""

import re
from collections.abc import Iterator
from typing import NamedTuple

SUBTITLE_ENDINGS = (".srt", ".vtt")
# Both formats give each cue a line with its times; SubRip has a comma before the milliseconds, WebVTT may
# lack hours (https://www.w3.org/TR/webvtt1/).
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
_CUE = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")
_MARKUP = re.compile(r"<[^>\n]*>|\{\\[^}\n]*\}")


class Cue(NamedTuple):
    """What is shown from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str


def read_cues(text: str) -> Iterator[Cue]:
    """The cues of a file's text, each on one line, without markup. A line that the one before it has, as
    rolling captions repeat it, is left out."""
    said = ""
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip().split("\n")
        at = next((place for place, line in enumerate(lines[:2]) if _CUE.match(line)), None)
        if at is None:
            continue
        match = _CUE.match(lines[at])
        assert match is not None
        spoken = [" ".join(_MARKUP.sub("", line).split()) for line in lines[at + 1 :]]
        words = " ".join(line for line in spoken if line and line != said)
        said = spoken[-1] if spoken else ""
        if words:
            yield Cue(_seconds(*match.groups()[:4]), _seconds(*match.groups()[4:]), words)


def subtitle_lines(text: str, timed: bool, start: float | None = None, end: float | None = None) -> str:
    """What is said in the window from `start` to `end`, a line for each cue, with the minute and second of
    the window where it begins if `timed`: "0:03 Hello."."""
    lines = []
    for cue in read_cues(text):
        if cue.end > (start or 0.0) and (end is None or cue.start < end):
            second = int(max(0.0, cue.start - (start or 0.0)))
            lines.append(f"{second // 60}:{second % 60:02} {cue.text}" if timed else cue.text)
    return "\n".join(lines)


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000
