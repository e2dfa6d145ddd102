"""Settings of tools that a model may call while it answers."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

from video_r1.settings.base import Problem, Settings, flat, own_field_types, setting


@dataclass(kw_only=True)
class LookSettings(Settings):
    """The tool look"""

    frames: int = setting(16, "most frames of a look", at_least=2)
    pixels: int | None = setting(None, "area of one of its frames (default: frame_pixels)", above=0)
    fps: float = setting(4.0, "frames per second of a look whose call names none", above=0)


@dataclass(kw_only=True)
class ToolSettings(Settings):
    """Tools"""

    tools: Literal["look"] | None = setting(
        None, "look: the model may ask for a stretch of the clip and gets its frames (docs/look.md)"
    )
    max_looks: int = setting(2, "calls of tools in one answer; then it has to end", above=0)
    look: LookSettings = setting(LookSettings, "frames that the tool look returns")
    max_tool_tokens: int = setting(
        8192, "tokens that tools may return to one answer, visual ones included; then it has to end", above=0
    )

    def tool_values(self) -> dict[str, Any]:
        """Return the values that answers depend on; {} without tools."""
        values = {f.name: getattr(self, f.name) for f in fields(ToolSettings)} if self.tools else {}
        return flat(values, own_field_types(ToolSettings))


@dataclass(kw_only=True)
class TrainingToolSettings(ToolSettings):
    """Tools"""

    overview_frames: list[int] | None = setting(
        None, "fewest and most frames of a video at first, drawn for each question (default: max_frames)"
    )

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        bounds = self.overview_frames
        if bounds is not None and (len(bounds) != 2 or not 2 <= bounds[0] <= bounds[1]):
            yield "overview_frames", f"is {bounds}; it must be two frame counts from 2 up, smaller one first"
