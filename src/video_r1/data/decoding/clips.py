"""Decoding the wanted frames of a clip, and only these, with PyAV.

1. The clip's packets are listed without decoding: their presentation times give the number of frames,
   the real timestamps and the window, whatever the container's header says. Variable frame rates need no
   care.
2. The caller chooses frames from that list.
3. Each chosen frame is decoded from the keyframe before it. Pictures that no other picture needs are
   skipped (H.264), and only chosen frames are converted to RGB. The packets of small files stay in
   memory; in large files the decoder seeks.
4. Where the list cannot be trusted (no timestamps, timestamps that start again, packets without a picture,
   a frame that does not appear), the clip is decoded from its beginning instead.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, BinaryIO

import av
import av.error
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor

from video_r1.data.sources.archives import Part, open_file

MAX_PIXELS = 8192 * 8192  # a frame or an image that declares more is not decoded
MAX_STREAMS = 64  # pictures, sound, subtitles; FFmpeg looks for the codec of each
DECODER_THREADS = 0  # of one clip of large pictures; 0: one per core
# Containers of recorded video. Play lists, which name other files, are not among them.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,gif,ivf,dv,h264,hevc"
_THREADS_FROM_PIXELS = 480 * 270  # below this a picture decodes faster than threads hand it over
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = 0x18538067
_BYTES_IN_MEMORY = 32 << 20  # packets of one clip
_TIME_TOLERANCE = 1e-4  # seconds; window times are written with few digits
# Codecs whose packets need not show a picture each.
_HIDDEN_PICTURES = ("vp8", "mpeg4", "msmpeg4v3", "msmpeg4v2")


@dataclass(slots=True)
class Clip:
    """Decoded frames of a clip's window: as the caller finished them, and their times from its start."""

    frames: list[Tensor]
    times: list[float]  # seconds
    duration: float  # seconds of the window


class _Unlisted(Exception):
    """The packet list does not lead to the frames; the clip is decoded from its beginning."""


def _unknown_side_data(cls: type[SideDataType], value: int) -> SideDataType:
    kind = object.__new__(cls)
    kind._name_, kind._value_ = f"UNKNOWN_{value}", value
    return kind


# FFmpeg has more kinds of side data than PyAV names (a view of spatial video, EXIF of MJPEG). A frame with
# one of them would otherwise have no side data at all, and its display matrix is among these.
setattr(SideDataType, "_missing_", classmethod(_unknown_side_data))  # noqa: B010


@dataclass(slots=True)
class _Packets:
    """The packets of a video stream in decoding order."""

    pts: list[int]
    dts: list[int | None]
    keys: list[int]  # positions of keyframes
    # positions in presentation order, without those that are decoded but not shown; empty when the times do
    # not tell the frames apart
    shown: list[int]
    time_base: Fraction
    last_seconds: float  # of the last frame
    kept: list[Any] | None  # the packets themselves, when they are few bytes
    lost: list[int]  # positions of packets of a transport stream that lack data

    def times(self) -> list[float]:
        """Return presentation times in seconds from the first frame."""
        unit, per, first = self.time_base.numerator, self.time_base.denominator, self.pts[self.shown[0]]
        return [(self.pts[position] - first) * unit / per for position in self.shown]

    def sent(self) -> list[int]:
        """Return the decoding times."""
        return [time for time in self.dts if time is not None]

    def restarts(self) -> bool:
        """Return whether decoding times go back, as they do where recordings were joined."""
        return any(a > b for a, b in pairwise(self.sent()))

    def require_whole(self, begin: int, last: int) -> None:
        """Raise ValueError where data is missing between two positions: later pictures would be wrong."""
        for position in self.lost:
            if begin <= position <= last:
                raise ValueError(f"the video is damaged: frame {position} lacks data that others depend on")

    def key_before(self, position: int) -> int:
        """Find the keyframe to start from: the last that is neither decoded nor shown after `position`."""
        for key in reversed(self.keys[: bisect_right(self.keys, position)]):
            if self.pts[key] <= self.pts[position]:
                return key
        return 0


def decode_clip(
    file: str | Part,
    choose: Callable[[int, float], list[int]],
    finish: Callable[[Tensor], Tensor],
    start: float | None = None,
    end: float | None = None,
) -> Clip:
    """Decode the chosen frames of a clip.

    Args:
        file: its path, or a part of another file.
        choose: given the number of frames in the window and their mean rate, the ascending indices to decode.
        finish: given one frame [3, H, W] uint8 RGB, upright, what to keep of it (a resized copy).
        start, end: the window in seconds from the first frame; frames with start ≤ time < end belong to it.

    Raises:
        ValueError: with a reason in words: no video in the file, damaged, cut short, nothing in the window.
        av.error.FFmpegError: FFmpeg's own error where no better reason is known.
    """
    with open_video(file) as (container, stream):
        packets = _list_packets(container, stream)
        if packets.shown:
            times = packets.times()
            first, last, duration = clip_window(times, packets.last_seconds, start, end)
            chosen = choose(last - first, (last - first) / duration)
            positions = [packets.shown[first + index] for index in chosen]
            frames = None
            with suppress(_Unlisted):
                try:
                    frames = _decode_listed(container, stream, packets, positions, finish)
                except av.error.FFmpegError:
                    with suppress(av.error.FFmpegError), open_video(file, threads=1) as (again, its_stream):
                        frames = _decode_listed(again, its_stream, packets, positions, finish, lead_in=True)
            if frames is not None:
                return Clip(frames, [times[first + index] - (start or 0.0) for index in chosen], duration)
    return _decode_from_beginning(file, choose, finish, start, end, packets)


def _list_packets(container: Any, stream: Any) -> _Packets:
    """List all packets. Raise ValueError for a cut-off file."""
    declared = len(stream.index_entries) if container.format.name.startswith("mov") else 0
    pts: list[int | None] = []
    dts: list[int | None] = []
    keys, lost, hidden, durations = [], [], set(), []
    kept: list[Any] | None = []
    size = 0
    for packet in container.demux(stream):
        if packet.size == 0 and packet.dts is None:  # the end
            continue
        if packet.is_corrupt:
            if container.format.name != "mpegts":  # there it may be one lost packet of many
                raise ValueError(f"the video is damaged or cut short after {len(pts)} frames")
            lost.append(len(pts) + 1)  # FFmpeg's parser passes the mark on one packet too early
        if packet.is_keyframe:
            keys.append(len(pts))
        if packet.is_discard:
            hidden.add(len(pts))
        pts.append(packet.pts)
        dts.append(packet.dts)
        durations.append(packet.duration or 0)
        if kept is not None:
            size += packet.size
            kept.append(packet)
            if size > _BYTES_IN_MEMORY:
                kept = None
    if len(pts) < declared:
        raise ValueError(f"the video is cut short: {len(pts)} of {declared} frames are there")
    if not pts:
        raise ValueError("the video has no frames")
    lost = [position for position in lost if position + 1 not in keys]  # a keyframe: recordings were joined
    packets = _Packets(pts, dts, keys, [], stream.time_base, 0, kept, lost)  # type: ignore[arg-type]
    # AVI has no presentation times: FFmpeg numbers the packets as they come
    if None in pts or (container.format.name == "avi" and stream.codec_context.has_b_frames):
        return packets
    shown = sorted(set(range(len(pts))) - hidden, key=packets.pts.__getitem__)
    twice = any(packets.pts[a] == packets.pts[b] for a, b in pairwise(shown))
    if not shown or twice or packets.restarts():
        return packets
    packets.shown, last = shown, durations[shown[-1]]
    last = last or (packets.pts[shown[-1]] - packets.pts[shown[0]]) // max(len(shown) - 1, 1)
    packets.last_seconds = last * float(packets.time_base)
    return packets


def _ascend(times: list[int]) -> bool:
    return all(a < b for a, b in pairwise(times))


def clip_window(
    times: list[float],
    last_frame_seconds: float,
    start: float | None,
    end: float | None,
) -> tuple[int, int, float]:
    """Return (first frame, frame after the last, seconds) of a window. `times` ascend from 0. Raise
    ValueError.
    """
    clip_seconds = times[-1] + last_frame_seconds
    begin = start or 0.0
    stop = clip_seconds if end is None else min(end, clip_seconds)
    if begin >= clip_seconds and start is not None:
        raise ValueError(f"its window starts at {start:g} s, but the video is {clip_seconds:.2f} s long")
    first = bisect_left(times, begin - _TIME_TOLERANCE)
    last = len(times) if stop >= clip_seconds else bisect_left(times, stop - _TIME_TOLERANCE)
    # a still of unknown duration gets a second, so that its rate is a number
    return first, last, stop - begin if stop > begin else 1.0


def _decode_listed(
    container: Any,
    stream: Any,
    packets: _Packets,
    positions: list[int],
    finish: Callable[[Tensor], Tensor],
    lead_in: bool = False,
) -> list[Tensor]:
    """Return the frames of the packets at `positions`, each decoded from the keyframe before it.

    lead_in: start one keyframe earlier and ignore errors up to that keyframe. H.264 with open groups of
    pictures needs this: its pictures after a keyframe may name pictures before it. With more than one thread
    FFmpeg reports an error too late to tell where it belongs.
    """
    wanted = {packets.pts[position]: place for place, position in enumerate(positions)}
    frames: list[Tensor | None] = [None] * len(positions)
    context = stream.codec_context
    may_skip = context.name == "h264"
    missing = len(positions)
    reformatter = VideoReformatter()

    def collect(decoded: list[Any]) -> None:
        nonlocal missing
        for frame in decoded:
            place = wanted.get(frame.pts)
            if place is not None and frames[place] is None:
                if frame.is_corrupt:
                    raise _Unlisted
                frames[place] = finish(_upright_rgb(frame, reformatter))
                missing -= 1

    for begin, last in _runs(packets, positions):
        packets.require_whole(begin, last)
        earlier = packets.keys[: bisect_left(packets.keys, begin)] if lead_in else []
        for position, packet in _packets_from(container, stream, packets, (earlier or [begin])[-1], last):
            if may_skip:
                # NONREF drops pictures that no other picture refers to, so the rest stays exact
                context.skip_frame = "DEFAULT" if packets.pts[position] in wanted else "NONREF"
            try:
                decoded = context.decode(packet)
            except av.error.FFmpegError:
                if position >= begin:
                    raise
                continue
            collect(decoded)
        collect(context.decode(None))
        context.flush_buffers()
    if missing:
        raise _Unlisted
    return frames  # type: ignore[return-value]


def _runs(packets: _Packets, positions: list[int]) -> list[tuple[int, int]]:
    """Return stretches of packets (first, last) in decoding order: the positions and the packets that they
    need.
    """
    runs: list[tuple[int, int]] = []
    for position in sorted(positions):
        begin, last = packets.key_before(position), position
        while runs and begin <= runs[-1][1] + 1:  # pictures shown before a keyframe may come after it
            begin, last = min(begin, runs[-1][0]), max(last, runs[-1][1])
            runs.pop()
        runs.append((begin, last))
    return runs


def _packets_from(
    container: Any, stream: Any, packets: _Packets, begin: int, last: int
) -> Iterator[tuple[int, Any]]:
    """Yield the packets from a keyframe to position `last`, with their positions."""
    if packets.kept is not None:
        yield from zip(range(begin, last + 1), packets.kept[begin : last + 1], strict=True)
        return
    key_time = packets.pts[begin]
    # some containers look up decoding times: where the first seek lands behind the keyframe, go further back
    for seek_time in (key_time, packets.dts[begin], packets.pts[0]):
        if seek_time is None:
            continue
        container.seek(min(seek_time, key_time), stream=stream)
        position = begin
        for packet in container.demux(stream):
            if packet.pts == packets.pts[position]:
                yield position, packet
                if position == last:
                    return
                position += 1
            elif position > begin or packet.pts is None:
                raise _Unlisted
            elif packet.pts > key_time:
                break
    raise _Unlisted


def _decode_from_beginning(
    file: str | Part,
    choose: Callable[[int, float], list[int]],
    finish: Callable[[Tensor], Tensor],
    start: float | None,
    end: float | None,
    packets: _Packets,
) -> Clip:
    """Decode every frame twice: to count them and get their times, then to keep the chosen ones."""
    packets.require_whole(0, len(packets.pts))
    pts: list[int | None] = []
    try:
        with open_video(file) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            hidden_pictures = stream.codec_context.name in _HIDDEN_PICTURES
            for frame in container.decode(stream):
                pts.append(frame.pts)
    except av.error.FFmpegError as error:
        raise ValueError(
            f"the video is damaged: decoding stops after {len(pts)} frames ({error.strerror})"
        ) from error
    if not pts:
        raise ValueError("no frame of the video can be decoded")
    if len(pts) < 0.9 * len(packets.shown) and not hidden_pictures:
        raise ValueError(f"the video is damaged: {len(pts)} of {len(packets.shown)} frames can be decoded")
    times = _times_as_decoded(pts, packets, rate)
    last_seconds = times[-1] - times[-2] if len(times) > 1 else float(1 / rate)
    first, last, duration = clip_window(times, last_seconds, start, end)
    chosen = choose(last - first, (last - first) / duration)
    wanted = {first + index: place for place, index in enumerate(chosen)}
    frames: list[Any] = [None] * len(chosen)
    reformatter = VideoReformatter()
    with open_video(file) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                if frame.is_corrupt:
                    raise ValueError(
                        f"the video is damaged: the frame at {times[number]:.2f} s cannot be decoded"
                    )
                frames[wanted[number]] = finish(_upright_rgb(frame, reformatter))
    return Clip(frames, [times[first + index] - (start or 0.0) for index in chosen], duration)


def _times_as_decoded(pts: list[int | None], packets: _Packets, rate: Fraction) -> list[float]:
    """Return seconds from the first frame, of frames in the order in which the decoder gives them."""
    shown, sent = [time for time in pts if time is not None], packets.sent()
    if len(shown) == len(pts) and _ascend(shown):
        ticks = shown
    elif len(sent) == len(pts) and _ascend(sent):
        ticks = sent  # frames are shown as they are sent, one after the other and a constant delay later
    elif len(shown) == len(pts) and packets.restarts():  # each recording goes on where the last one ended
        ticks, step = [0], 1
        for before, time in pairwise(shown):
            step = time - before if time > before else step
            ticks.append(ticks[-1] + step)
    else:
        return [float(number / rate) for number in range(len(pts))]
    return [float((time - ticks[0]) * packets.time_base) for time in ticks]


def _upright_rgb(frame: Any, reformatter: VideoReformatter) -> Tensor:
    """Return [3, H, W] uint8 RGB of a decoded frame, rotated and mirrored as its display matrix says."""
    if frame.width * frame.height > MAX_PIXELS:
        raise ValueError(
            f"has a frame of {frame.width}×{frame.height} pixels; at most {MAX_PIXELS:,} are decoded"
        )
    # one converter for all frames of a clip: building one takes longer than converting a small frame
    rgb = reformatter.reformat(frame, format="rgb24", threads=1)
    pixels = torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1)
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    # The matrix maps a point (x, y) to (a·x + c·y, b·x + d·y), y pointing down, in 16.16 fixed point.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) < abs(b):  # a quarter turn: x becomes y
        pixels = pixels.transpose(-1, -2)
        a, d = c, b
    flipped = [dim for dim, factor in ((-1, a), (-2, d)) if factor < 0]
    return pixels.flip(flipped) if flipped else pixels


@contextmanager
def open_video(file: str | Part, threads: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a file and yield PyAV's container and its video stream. Raise ValueError, in words, for a file
    without a whole one.
    """
    if missing := missing_bytes(file):
        raise ValueError(f"the video is cut short: {missing:,} bytes of it are missing")
    with (
        nullcontext(file) if isinstance(file, str) else file.open() as opened,
        _container(opened) as container,
    ):
        if len(container.streams) > MAX_STREAMS:
            raise ValueError(f"has more than {MAX_STREAMS} streams")
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            kinds = {other.type for other in container.streams}
            others = ["a cover picture" if kind == "video" else kind for kind in sorted(kinds)]
            raise ValueError(f"has no video in it, only {' and '.join(others) or 'nothing'}")
        context: Any = stream.codec_context
        if context is None:
            raise ValueError("its video has a codec that this FFmpeg cannot decode")
        if context.width * context.height > MAX_PIXELS:
            raise ValueError(
                f"declares frames of {context.width}×{context.height} pixels; at most {MAX_PIXELS:,} "
                "are decoded"
            )
        for other in container.streams:
            if other.index != stream.index:
                other.discard = Discard.all
        if threads == 1 or context.width * context.height < _THREADS_FROM_PIXELS:
            context.thread_count = 1
        else:
            context.thread_type, context.thread_count = "AUTO", DECODER_THREADS
        # explode: an error where FFmpeg would otherwise make up a damaged picture, not the same one each time
        context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
        yield container, stream


def _container(file: str | BinaryIO) -> Any:
    options = {
        "format_whitelist": _CONTAINERS,
        "protocol_whitelist": "file",
        "max_streams": str(MAX_STREAMS + 1),
    }
    try:
        return av.open(
            file,
            options=options,
            metadata_errors="ignore",  # titles in another encoding than UTF-8 are of no concern here
        )
    except av.error.ArgumentError as error:  # FFmpeg says so of a file that is none of _CONTAINERS
        raise ValueError("is not a kind of file that holds videos") from error
    except av.error.MemoryError as error:  # and some demuxers of too many streams
        raise ValueError(
            f"has more than {MAX_STREAMS} streams, or lists that need more memory than is allowed"
        ) from error
    except av.error.FFmpegError as error:
        raise ValueError(f"is not a video that FFmpeg can read ({error.strerror})") from error


def missing_bytes(file: str | Part) -> int:
    """Return by how many bytes a Matroska, WebM or AVI file is shorter than it declares; 0 if it declares
    nothing.

    FFmpeg reads a file that was cut off up to the cut without a word. MP4 needs no such check: its index
    lists every frame, which is compared with the frames that are read.
    """
    with open_file(file) as opened:
        head = opened.read(4096)
        length = opened.seek(0, os.SEEK_END)
    declared = 0
    if head.startswith(_EBML):
        declared = _matroska_size(head)
    elif head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        size = int.from_bytes(head[4:8], "little")
        declared = 8 + size if size != 0xFFFFFFFF else 0
    return max(0, declared - length)


def _matroska_size(head: bytes) -> int:
    """Return the end of the segment after the EBML header (RFC 8794); 0 if its size is unknown (a live
    recording).
    """
    header_size, place = _variable_size(head, 4)
    place += header_size or 0
    if int.from_bytes(head[place : place + 4]) != _SEGMENT:
        return 0
    size, place = _variable_size(head, place + 4)
    return place + size if size is not None else 0


def _variable_size(data: bytes, place: int) -> tuple[int | None, int]:
    """Read an EBML size (None: unknown) and return it with the place after it. The zeros of its first byte
    give its length.
    """
    if place >= len(data) or data[place] == 0:
        return None, place + 1
    length = 9 - data[place].bit_length()
    marker = 1 << (7 * length)
    value = int.from_bytes(data[place : place + length]) - marker
    return (None if value == marker - 1 else value), place + length
