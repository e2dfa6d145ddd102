"""Opening a video file: which containers and streams are read, and whether all of the file is there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

import av
import av.error
from av.stream import Discard, Disposition

from video_r1.data.sources.tar_index import Part, open_file

MAX_PIXELS = 8192 * 8192  # a frame or an image that declares more is not decoded
MAX_STREAMS = 64  # pictures, sound, subtitles; FFmpeg looks for the codec of each
DECODER_THREADS = 0  # of one clip of large pictures; 0: one per core
# Containers of recorded video. Play lists, which name other files, are not among them.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,gif,ivf,dv,h264,hevc"
_THREADS_FROM_PIXELS = 480 * 270  # below this a picture decodes faster than threads hand it over
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = 0x18538067


@contextmanager
def open_video(file: str | Part, threads: int | None = None) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its video stream. Raises ValueError, in words, for a file without a whole one."""
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
    """Bytes by which a Matroska, WebM or AVI file is shorter than it declares; 0 when it declares nothing.

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
    """End of the segment after the EBML header (RFC 8794); 0 when its size is unknown (a live recording)."""
    header_size, place = _variable_size(head, 4)
    place += header_size or 0
    if int.from_bytes(head[place : place + 4]) != _SEGMENT:
        return 0
    size, place = _variable_size(head, place + 4)
    return place + size if size is not None else 0


def _variable_size(data: bytes, place: int) -> tuple[int | None, int]:
    """An EBML size (None: unknown) and the place after it. The zeros of its first byte give its length."""
    if place >= len(data) or data[place] == 0:
        return None, place + 1
    length = 9 - data[place].bit_length()
    marker = 1 << (7 * length)
    value = int.from_bytes(data[place : place + length]) - marker
    return (None if value == marker - 1 else value), place + length
