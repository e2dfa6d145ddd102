"""Decoding only the wanted frames of a clip, with PyAV.

1. The packets are listed without decoding: their presentation times give the number of frames, the real
   timestamps and the window, whatever the container's header says.
2. The caller chooses frames from that list.
3. Each chosen frame is decoded from the keyframe before it. In H.264, pictures that no other picture needs
   are skipped; only chosen frames are converted to RGB. Packets of small files stay in memory; in large
   files the decoder seeks.
4. If the list cannot be trusted (no timestamps, timestamps that start again, packets without a picture, a
   frame that does not appear), every frame is decoded instead.
"""

import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from typing import Any

import av
import av.error
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor

from video_r1.data.sources.archives import Part
from video_r1.data.sources.media_types import ClipRef

MAX_PIXELS = 8192 * 8192  # a frame or an image that declares more is not decoded
MAX_STREAMS = 64  # FFmpeg looks for the codec of each
DECODER_THREADS = 0  # for large pictures; 0: one per core
# Containers of recorded video. Playlists, which name other files, are not among them.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,gif,ivf,dv,h264,hevc"
_THREADS_FROM_PIXELS = 480 * 270  # smaller pictures decode faster without threads
_MPEG4_PICTURE = b"\0\0\1\xb6"
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = 0x18538067
_BYTES_IN_MEMORY = 32 << 20  # packets of one clip
_TIME_TOLERANCE = 1e-4  # seconds; window times are written with few digits
_PATCHING = threading.Lock()
_HIDDEN_PICTURES = ("vp8", "mpeg4", "msmpeg4v3", "msmpeg4v2")  # codecs with packets that show no picture


Choose = Callable[[int, float], list[int]]
"""From the number of frames in a window and their mean rate to the ascending indices of frames to decode."""
Finish = Callable[[Tensor], Tensor]
"""From an upright frame [3, H, W] uint8 RGB to what is kept of it (a resized copy)."""


@dataclass(slots=True)
class Clip:
    """Decoded frames of a clip's window, as the caller finished them, and their times from its start."""

    frames: list[Tensor]
    times: list[float]  # seconds
    duration: float  # seconds of the window


# Titles need not be UTF-8; from version 19 PyAV takes care of that itself.
_ANY_TITLES: Any = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class _Unlisted(Exception):
    """The packet list does not lead to the frames."""


@dataclass(slots=True)
class _Packets:
    """The packets of a video stream in decoding order."""

    pts: list[int]
    dts: list[int | None]
    keys: list[int]  # positions of keyframes
    shown: list[int]  # positions in presentation order; empty if the times do not tell the frames apart
    time_base: Fraction
    last_seconds: float  # duration of the last frame
    kept: list[Any] | None  # the packets themselves, if they are few bytes
    lost: list[int]  # positions of packets of a transport stream that lack data
    pictures_only: bool = False  # see `_packets_of`

    def times(self) -> list[float]:
        """Return presentation times in seconds from the first frame."""
        unit, per, first = self.time_base.numerator, self.time_base.denominator, self.pts[self.shown[0]]
        return [(self.pts[position] - first) * unit / per for position in self.shown]

    def sent(self) -> list[int]:
        """Return the decoding times."""
        return [time for time in self.dts if time is not None]

    def restarts(self) -> bool:
        """Return whether decoding times go back, as in joined recordings."""
        return any(a > b for a, b in pairwise(self.sent()))

    def require_whole(self, begin: int, last: int) -> None:
        """Raise ValueError if data is missing between two positions: later pictures would be wrong."""
        for position in self.lost:
            if begin <= position <= last:
                raise ValueError(f"the video is damaged: frame {position} lacks data that others depend on")

    def key_before(self, position: int) -> int:
        """Return the keyframe to start from: the last that is neither decoded nor shown after `position`."""
        before = reversed(self.keys[: bisect_right(self.keys, position)])
        return next((key for key in before if self.pts[key] <= self.pts[position]), 0)


def decode_clip(
    file: Part, clip: ClipRef, choose: Choose, finish: Finish, pictures_only: bool = False
) -> Clip:
    """Decode the chosen frames of a clip.

    Args:
        clip: its window; frames with start ≤ time < end belong to it.
        pictures_only: see `_packets_of`; tried where decoding fails, since a broken note breaks no picture.

    Raises:
        ValueError: with a reason in words: no video in the file, damaged, cut short, nothing in the window.
        av.error.FFmpegError: FFmpeg's own error where no better reason is known.
    """
    with open_video(file) as (container, stream):
        packets = _list_packets(container, stream, pictures_only)
        if packets.shown:
            chosen, times, duration = choose_frames(packets.times(), packets.last_seconds, clip, choose)
            positions = [packets.shown[index] for index in chosen]
            with suppress(_Unlisted):
                try:
                    frames = _decode_listed(container, stream, packets, positions, finish)
                    return Clip(frames, times, duration)
                except av.error.FFmpegError:
                    with suppress(av.error.FFmpegError), open_video(file, threads=1) as (again, its_stream):
                        frames = _decode_listed(again, its_stream, packets, positions, finish, lead_in=True)
                        return Clip(frames, times, duration)
    try:
        return _decode_from_beginning(file, clip, choose, finish, packets)
    except ValueError as error:
        if pictures_only or not isinstance(error.__cause__, av.error.FFmpegError):
            raise
        return decode_clip(file, clip, choose, finish, pictures_only=True)


def _packets_of(container: Any, stream: Any, pictures_only: bool) -> Iterator[Any]:
    """Yield a stream's packets. pictures_only: those of H.264 and HEVC in a file with an index without the
    units that are neither pictures nor their parameters: notes for players, and what calls itself a part of a
    keyframe that no other picture refers to, of which there is none.
    """
    header = bytes(stream.codec_context.extradata or b"")
    is_h264 = stream.codec_context.name == "h264"
    known = pictures_only and stream.codec_context.name in ("h264", "hevc") and header[:1] == b"\1"
    length = 1 + (header[4 if is_h264 else 21] & 3) if known else 0
    for packet in container.demux(stream):
        data, place, kept = bytes(packet) if length else b"", 0, []
        while place + length < len(data):
            end = place + length + int.from_bytes(data[place : place + length])
            kind = data[place + length]
            if kind & 31 in (1, 2, 3, 4, 5, 7, 8) and kind & 127 != 5 if is_h264 else kind >> 1 & 63 < 35:
                kept.append(data[place:end])
            place = end
        if data and len(whole := b"".join(kept)) < len(data):
            shorter = av.Packet(whole)
            shorter.pts, shorter.dts, shorter.duration = packet.pts, packet.dts, packet.duration
            shorter.is_keyframe, shorter.time_base = packet.is_keyframe, packet.time_base
            packet = shorter
        yield packet


def _list_packets(container: Any, stream: Any, pictures_only: bool) -> _Packets:
    """List all packets. Raise ValueError for a cut-off file."""
    declared = len(stream.index_entries) if container.format.name.startswith("mov") else 0
    pts: list[int | None] = []
    dts: list[int | None] = []
    keys, lost, hidden, durations = [], [], set(), []
    kept: list[Any] | None = []
    size = 0
    # AVI has no presentation times. With B-frames, FFmpeg's are right for MPEG-4 that is not packed, which
    # means two pictures in one packet.
    reorders = container.format.name == "avi" and stream.codec_context.has_b_frames
    has_times = not reorders or stream.codec_context.name == "mpeg4"
    for packet in _packets_of(container, stream, pictures_only):
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
        if reorders and has_times:
            has_times = bytes(packet).count(_MPEG4_PICTURE) < 2
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
    packets = _Packets(pts, dts, keys, [], stream.time_base, 0, kept, lost, pictures_only)  # type: ignore[arg-type]
    if None in pts or not has_times:
        return packets
    shown = sorted(set(range(len(pts))) - hidden, key=packets.pts.__getitem__)
    twice = any(packets.pts[a] == packets.pts[b] for a, b in pairwise(shown))
    if not shown or twice or packets.restarts():
        return packets
    packets.shown, last = shown, durations[shown[-1]]
    last = last or (packets.pts[shown[-1]] - packets.pts[shown[0]]) // max(len(shown) - 1, 1)
    packets.last_seconds = last * float(packets.time_base)
    return packets


def choose_frames(
    times: list[float], last_frame_seconds: float, clip: ClipRef, choose: Choose, rate: float | None = None
) -> tuple[list[int], list[float], float]:
    """Return the chosen frames' numbers, their times in the window and the window's seconds.

    times: of all frames, ascending from 0. rate: frames a second; None: the mean in the window. Raises
    ValueError with a reason in words.
    """
    clip_seconds = times[-1] + last_frame_seconds
    begin = clip.start or 0.0
    stop = clip_seconds if clip.end is None else min(clip.end, clip_seconds)
    if begin >= clip_seconds and clip.start is not None:
        raise ValueError(f"its window starts at {begin:g} s, but the video is {clip_seconds:.2f} s long")
    first = bisect_left(times, begin - _TIME_TOLERANCE)
    last = len(times) if stop >= clip_seconds else bisect_left(times, stop - _TIME_TOLERANCE)
    # a still of unknown duration gets a second, so that its rate is a number
    duration = stop - begin if stop > begin else 1.0
    chosen = [first + index for index in choose(last - first, rate or (last - first) / duration)]
    return chosen, [times[index] - begin for index in chosen], duration


def _decode_listed(
    container: Any,
    stream: Any,
    packets: _Packets,
    positions: list[int],
    finish: Finish,
    lead_in: bool = False,
) -> list[Tensor]:
    """Return the frames of the packets at `positions`, each decoded from the keyframe before it.

    lead_in: start one keyframe earlier and ignore errors before the usual start, for H.264 with open groups,
    where pictures after a keyframe may refer to pictures before it. Needs one thread: with more, FFmpeg
    reports an error too late to tell where it belongs.
    """
    wanted = {packets.pts[position] for position in positions}
    frames: dict[int, Tensor] = {}
    context = stream.codec_context
    may_skip = context.name == "h264"
    reformatter, latest = VideoReformatter(), -math.inf

    def collect(decoded: list[Any]) -> None:
        nonlocal latest
        for frame in decoded:
            if frame.pts is None or frame.pts <= latest:  # the file has times of decoding, not of pictures
                raise _Unlisted
            latest = frame.pts
            if frame.pts in wanted and frame.pts not in frames:
                if frame.is_corrupt:
                    raise _Unlisted
                frames[frame.pts] = finish(_upright_rgb(frame, reformatter))

    for begin, last in _runs(packets, positions):
        latest = -math.inf
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
    if len(frames) < len(wanted):
        raise _Unlisted
    return [frames[packets.pts[position]] for position in positions]


def _runs(packets: _Packets, positions: list[int]) -> list[tuple[int, int]]:
    """Return ranges (first, last) of packets in decoding order: the positions and the packets they need."""
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
    # some containers look up decoding times: if the first seek lands after the keyframe, go further back
    for seek_time in (key_time, packets.dts[begin], packets.pts[0]):
        if seek_time is None:
            continue
        container.seek(min(seek_time, key_time), stream=stream)
        position = begin
        for packet in _packets_of(container, stream, packets.pictures_only):
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
    file: Part, clip: ClipRef, choose: Choose, finish: Finish, packets: _Packets
) -> Clip:
    """Decode every frame and keep the chosen ones; once more if the frames' times are not as expected."""
    packets.require_whole(0, len(packets.pts))
    reformatter = VideoReformatter()
    expected: list[float] = []
    for _ in range(3):
        pts: list[int | None] = []
        chosen: list[int] = []
        frames: dict[int, Tensor] = {}
        try:
            with open_video(file) as (container, stream):
                rate = stream.average_rate or stream.guessed_rate or Fraction(25)
                hidden_pictures = stream.codec_context.name in _HIDDEN_PICTURES
                expected = expected or _times_as_decoded([None] * len(packets.pts), packets, rate)
                with suppress(ValueError):  # of wrong times; right ones raise it below
                    chosen, *_ = choose_frames(expected, _last_seconds(expected, rate), clip, choose)
                encoded = _packets_of(container, stream, packets.pictures_only)
                decoded = chain.from_iterable(map(stream.codec_context.decode, encoded))
                for number, frame in enumerate(decoded):
                    pts.append(frame.pts)
                    if number in chosen and not frame.is_corrupt:
                        frames[number] = finish(_upright_rgb(frame, reformatter))
        except av.error.FFmpegError as error:
            if not chosen or not frames.keys() >= set(chosen):
                raise ValueError(
                    f"the video is damaged: decoding stops after {len(pts)} frames ({error.strerror})"
                ) from error
            times = expected  # the damage comes after all chosen frames
        else:
            if not pts:
                raise ValueError("no frame of the video can be decoded")
            if len(pts) < 0.9 * len(packets.shown) and not hidden_pictures:
                raise ValueError(
                    f"the video is damaged: {len(pts)} of {len(packets.shown)} frames can be decoded"
                )
            times = _times_as_decoded(pts, packets, rate)
        if times == expected:
            chosen, chosen_times, duration = choose_frames(times, _last_seconds(times, rate), clip, choose)
            if lost := [times[number] for number in chosen if number not in frames]:
                raise ValueError(f"the video is damaged at {lost[0]:.2f} s")
            return Clip([frames[number] for number in chosen], chosen_times, duration)
        expected = times
    raise ValueError("the video is damaged: its frames have other times whenever it is decoded")


def _last_seconds(times: list[float], rate: Fraction) -> float:
    return times[-1] - times[-2] if len(times) > 1 else float(1 / rate)


def _times_as_decoded(pts: list[int | None], packets: _Packets, rate: Fraction) -> list[float]:
    """Return seconds from the first frame, of frames in the decoder's output order."""
    shown, sent = [time for time in pts if time is not None], packets.sent()
    if len(shown) == len(pts) and all(a < b for a, b in pairwise(shown)):
        ticks = shown
    elif len(sent) == len(pts) and all(a < b for a, b in pairwise(sent)):
        ticks = sent  # frames are shown as they are sent, a constant delay later
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
    _check_size(frame)
    # one converter for all frames of a clip: building one takes longer than converting a small frame
    rgb = reformatter.reformat(frame, format="rgb24", threads=1)
    pixels = torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1)
    matrix = _display_matrix(frame)
    if matrix is None:
        return pixels
    # The matrix maps a point (x, y) to (a·x + c·y, b·x + d·y), y pointing down, in 16.16 fixed point.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) < abs(b):  # a quarter turn: x becomes y
        pixels = pixels.transpose(-1, -2)
        a, d = c, b
    flipped = [dim for dim, factor in ((-1, a), (-2, d)) if factor < 0]
    return pixels.flip(flipped) if flipped else pixels


def _display_matrix(frame: Any) -> Any:
    try:
        return frame.side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # a kind of side data that PyAV 17 to 18 does not name, such as the EXIF of MJPEG
        with _all_side_data():
            return frame.side_data.get(SideDataType.DISPLAYMATRIX)


@contextmanager
def _all_side_data() -> Iterator[None]:
    """Let PyAV list side data of kinds that it does not name, inside the block."""

    def unnamed(cls: type[SideDataType], value: int) -> SideDataType:
        kind = object.__new__(cls)
        kind._name_, kind._value_ = f"UNNAMED_{value}", value
        return kind

    with _PATCHING:
        setattr(SideDataType, "_missing_", classmethod(unnamed))  # noqa: B010
        try:
            yield
        finally:
            delattr(SideDataType, "_missing_")


@contextmanager
def open_video(file: Part, threads: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a file and yield PyAV's container and its video stream. Raise ValueError, in words."""
    if missing := missing_bytes(file):
        raise ValueError(f"the video is cut short: {missing:,} bytes of it are missing")
    options = {
        "format_whitelist": _CONTAINERS,
        "protocol_whitelist": "file,subfile",
        "max_streams": str(MAX_STREAMS + 1),
    }
    try:
        opened = av.open(file.url, options=options, **_ANY_TITLES)
    except av.error.ArgumentError as error:  # FFmpeg's answer to a format outside _CONTAINERS
        raise ValueError("is not a kind of file that holds videos, or one that is not read") from error
    except av.error.MemoryError as error:  # and of some demuxers to too many streams
        raise ValueError(
            f"has more than {MAX_STREAMS} streams, or lists that need more memory than is allowed"
        ) from error
    except av.error.FFmpegError as error:
        raise ValueError(f"is not a video that FFmpeg can read ({error.strerror})") from error
    with opened as container:
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
        _check_size(context)
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


def _check_size(picture: Any) -> None:
    width, height = picture.width, picture.height
    if width * height > MAX_PIXELS:
        raise ValueError(f"has frames of {width}×{height} pixels; at most {MAX_PIXELS:,} are decoded")


def missing_bytes(file: Part) -> int:
    """Return by how many bytes a Matroska, WebM or AVI file is shorter than it declares; 0: or it does not.

    FFmpeg reads a truncated file up to its end without an error. MP4 needs no such check: its index lists
    every frame, which is compared with the frames that are read.
    """
    head, declared = file.read(4096), 0
    if head.startswith(_EBML):
        declared = _matroska_size(head)
    elif head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        size = int.from_bytes(head[4:8], "little")
        declared = 8 + size if size != 0xFFFFFFFF else 0
    return max(0, declared - file.size)


def _matroska_size(head: bytes) -> int:
    """Return the end of the segment after the EBML header (RFC 8794); 0 if unknown (a live recording)."""
    header_size, place = _variable_size(head, 4)
    place += header_size or 0
    if int.from_bytes(head[place : place + 4]) != _SEGMENT:
        return 0
    size, place = _variable_size(head, place + 4)
    return place + size if size is not None else 0


def _variable_size(data: bytes, place: int) -> tuple[int | None, int]:
    """Return an EBML size (None: unknown) and the place after it. Leading zeros give its length."""
    if place >= len(data) or data[place] == 0:
        return None, place + 1
    length = 9 - data[place].bit_length()
    marker = 1 << (7 * length)
    value = int.from_bytes(data[place : place + length]) - marker
    return (None if value == marker - 1 else value), place + length
