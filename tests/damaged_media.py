"""Damaged and hostile media files drawn from a seed: as scraping finds them, and as an enemy makes them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from media_files import picture, write_video
from PIL import Image

VIDEOS = {
    "mp4": "libx264",
    "mkv": "libx264",
    "avi": "mpeg4",
    "ts": "libx264",
    "webm": "libvpx",
    "flv": "flv1",
}
IMAGES = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
FRAMES = 24

SEGMENT, TRACKS, CLUSTER = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\x1f\x43\xb6\x75"

Draw = np.random.Generator
Damage = Callable[[dict[str, bytes], str, Draw], bytes]


@dataclass(frozen=True, slots=True)
class DamagedFile:
    path: Path
    kind: str  # what was done to it
    data_type: Any  # image | video


def good_files(folder: Path) -> dict[str, bytes]:
    """The content of a small good file of each format, by suffix."""
    files = {}
    for suffix, codec in VIDEOS.items():
        write_video(folder / f"good.{suffix}", FRAMES, codec)
    for suffix, name in IMAGES.items():
        Image.fromarray(picture(3, 96, 64)).save(folder / f"good.{suffix}", name)
    for suffix in (*VIDEOS, *IMAGES):
        files[suffix] = (folder / f"good.{suffix}").read_bytes()
    return files


def damaged_files(folder: Path, count: int, seed: int = 0) -> list[DamagedFile]:
    """`count` files in `folder`: the kinds of damage in turn, each over the formats that it knows."""
    good = good_files(folder)
    files = []
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        damage, suffixes = KINDS[kind]
        suffix = suffixes[number // len(KINDS) % len(suffixes)]
        content = damage(good, suffix, np.random.default_rng([seed, number]))
        path = folder / f"{number:03}.{suffix}"
        path.write_bytes(content)
        files.append(DamagedFile(path, kind, "video" if suffix in VIDEOS else "image"))
    return files


def truncated(good: dict[str, bytes], suffix: str, draw: Draw) -> bytes:
    return good[suffix][: int(draw.integers(0, len(good[suffix])))]


def bits_flipped(good: dict[str, bytes], suffix: str, draw: Draw) -> bytes:
    data = np.frombuffer(good[suffix], np.uint8).copy()
    places = draw.integers(0, len(data), draw.integers(1, 40))
    data[places] ^= (1 << draw.integers(0, 8, len(places))).astype(np.uint8)
    return data.tobytes()


def bit_rotted(clip: bytes, number: int) -> bytes:
    """An MP4 clip of H.264 with eight bits of its pictures flipped; its index is intact."""
    draw = np.random.default_rng(number)
    data = np.frombuffer(clip, np.uint8).copy()
    places = draw.integers(clip.index(b"mdat") + 2000, clip.index(b"moov") - 4, 8)  # 2,000: x264's own text
    data[places] ^= (1 << draw.integers(0, 8, 8)).astype(np.uint8)
    return data.tobytes()


def overwritten(good: dict[str, bytes], suffix: str, draw: Draw) -> bytes:
    data = bytearray(good[suffix])
    length = int(draw.integers(1, len(data)))
    place = int(draw.integers(0, len(data) - length + 1))
    data[place : place + length] = draw.integers(0, 256, length, np.uint8).tobytes()
    return bytes(data)


def wrong_container(good: dict[str, bytes], suffix: str, draw: Draw) -> bytes:
    """The whole content of another format, its head on this body, or this head on its body."""
    other = str(draw.choice([name for name in good if name != suffix]))
    cut = int(draw.integers(4, 200))
    way = draw.integers(3)
    if way == 0:
        return good[other]
    head, body = (other, suffix) if way == 1 else (suffix, other)
    return good[head][:cut] + good[body][cut:]


def huge_declared_size(good: dict[str, bytes], suffix: str, draw: Draw) -> bytes:
    """One of the fields that say how large something is holds a number near the largest possible."""
    data = bytearray(good[suffix])
    places = {
        "mp4": mp4_sizes, "mkv": ebml_sizes, "webm": ebml_sizes, "avi": avi_sizes, "png": png_sizes,
        "gif": lambda _: [(6, 4), (14, 4), (20, 8)], "bmp": lambda _: [(18, 4), (22, 4), (18, 8), (2, 4)],
        "webp": lambda _: [(4, 4), (16, 4), (26, 4)],
    }[suffix](data)  # fmt: skip
    place, length = places[int(draw.integers(len(places)))]
    field = bytearray(b"\xff" * length)
    if draw.integers(2):  # positive where the field has a sign; and not so large as to be refused at once
        field[0 if suffix in ("mp4", "png", "mkv", "webm") else -1] = int(draw.integers(1, 128))
    data[place : place + length] = field
    if suffix == "png":
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def many_streams(good: dict[str, bytes], suffix: str, draw: Draw) -> bytes:
    """A thousand streams or more (in images: pictures, or blocks of text)."""
    data, count = good[suffix], int(draw.integers(1000, 3000))
    if suffix == "mp4":  # its index comes last, so that nothing else moves
        moov = data.index(b"moov") - 4
        trak = data.index(b"trak") - 4
        (size,) = struct.unpack_from(">I", data, trak)
        body = data[moov + 8 : trak] + data[trak : trak + size] * count + data[trak + size :]
        return data[:moov] + struct.pack(">I", len(body) + 8) + b"moov" + body
    if suffix == "mkv":  # of unknown size as a whole, each stream with its own number
        segment, tracks = data.index(SEGMENT) + 4, data.rindex(TRACKS) + 4
        start, end = ebml_start(data, tracks), ebml_end(data, tracks)
        start += 6 * (data[start] == 0xBF)  # the checksum, which may contain any byte
        entry = data.index(b"\xae", start)
        number = data.index(b"\xd7\x81", entry) + 2
        many = b"".join(
            data[entry:number] + bytes([1 + n % 126]) + data[number + 1 : end] for n in range(count)
        )
        head = data[:segment] + b"\x01" + b"\xff" * 7 + data[segment + 8 : tracks]
        return head + b"\x01" + len(many).to_bytes(7) + many + data[end:]
    if suffix == "avi":
        place = data.index(b"strl") - 8
        (size,) = struct.unpack_from("<I", data, place + 4)
        return data[:place] + data[place : place + 8 + size] * count + data[place + 8 + size :]
    if suffix == "png":
        text = b"tEXtkey\0" + b"x" * 500
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        return data[:33] + chunk * count + data[33:]
    return many_pictures(suffix)


@cache
def many_pictures(suffix: str) -> bytes:
    frames = [Image.new("L", (8, 8), 60 * (number % 4)) for number in range(1000)]
    out = BytesIO()
    frames[0].save(out, IMAGES[suffix], save_all=True, append_images=frames[1:])
    return out.getvalue()


def bomb(good: dict[str, bytes], suffix: str, draw: Draw) -> bytes:
    """A few kilobytes that hold far more than they show: pictures, text, or an index of frames."""
    if suffix == "png":
        side = int(draw.choice([8000, 20_000, 60_000]))  # the last two say more than is decoded
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        rows = zlib.compressobj(1)
        pixels = b"".join(rows.compress(bytes(1 + side // 8) * 100) for _ in range(80))
        blocks = [(b"IHDR", header), (b"IDAT", pixels + rows.flush()), (b"IEND", b"")]
        if side == 8000 or draw.integers(2):
            blocks.insert(1, (b"zTXt", b"key\0\0" + zlib.compress(bytes(16 << 20), 9)))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in blocks
        )
    if suffix in ("gif", "tif"):
        return large_picture(suffix)
    # a clip whose index speaks of some hundred million frames of one size, which takes no room in the file
    data = bytearray(good[suffix])
    start = data.index(b"stsz") + 8
    data[start : start + 8] = struct.pack(
        ">II", int(draw.integers(1, 50)), int(draw.integers(1 << 27, 1 << 31))
    )
    return bytes(data)


@cache
def large_picture(suffix: str) -> bytes:
    out = BytesIO()
    Image.new("1", (9000, 9000)).save(out, IMAGES[suffix], compression="group4")
    return out.getvalue()


def mp4_sizes(data: bytearray) -> list[tuple[int, int]]:
    entry = data.index(b"avc1") + 28
    places = [(entry, 2), (entry + 2, 2), (entry, 4)]
    places += [(data.index(name) - 4, 4) for name in (b"moov", b"mdat", b"trak", b"stbl", b"avcC")]
    places += [(data.index(name) + 8, 4) for name in (b"stts", b"stco", b"stsc")]
    return places + [(data.index(b"stsz") + 8, 8), (data.index(b"tkhd") + 80, 8)]


def ebml_sizes(data: bytearray) -> list[tuple[int, int]]:
    width, height = data.index(b"\xb0\x81\x38") + 2, data.index(b"\xba\x81\x38") + 2
    tracks, cluster, segment = data.rindex(TRACKS) + 5, data.rindex(CLUSTER) + 5, data.index(SEGMENT) + 5
    return [(width, 1), (height, 1), (tracks, 7), (cluster, 7), (segment, 7)]


def avi_sizes(data: bytearray) -> list[tuple[int, int]]:
    header, stream, format_ = data.index(b"avih") + 8, data.index(b"strh") + 8, data.index(b"strf") + 8
    places = [(header + 16, 4), (header + 24, 4), (stream + 32, 4), (format_, 4)]
    return places + [(format_ + 4, 4), (format_ + 8, 4), (format_ + 4, 8), (data.index(b"movi") - 4, 4)]


def png_sizes(data: bytearray) -> list[tuple[int, int]]:
    return [(16, 4), (20, 4), (16, 8), (data.index(b"IDAT") - 4, 4)]


def ebml_start(data: bytes, place: int) -> int:
    """Where the content of an element begins whose size stands at `place`."""
    return place + 9 - data[place].bit_length()


def ebml_end(data: bytes, place: int) -> int:
    start = ebml_start(data, place)
    return start + (int.from_bytes(data[place:start]) & ((1 << 7 * (start - place)) - 1))


KINDS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "truncated": (truncated, (*VIDEOS, *IMAGES)),
    "bits flipped": (bits_flipped, (*VIDEOS, *IMAGES)),
    "overwritten": (overwritten, (*VIDEOS, *IMAGES)),
    "wrong container": (wrong_container, (*VIDEOS, *IMAGES)),
    "huge declared size": (huge_declared_size, ("mp4", "png", "mkv", "avi", "gif", "webm", "bmp", "webp")),
    "thousands of streams": (many_streams, ("mp4", "png", "mkv", "gif", "avi")),
    "bomb": (bomb, ("png", "mp4", "gif", "tif")),
}  # fmt: skip
