"""Bad media files: each gives an error with its path and a reason, and nothing else escapes."""

import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from damaged_media import bit_rotted
from media_files import SIDE, SMALL, noise, picture, sample, saved, write_video
from PIL import Image

from video_r1.data.decoding.decoders import read_media
from video_r1.errors import MediaError


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def audio(path: Path, with_cover: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        if with_cover:
            cover = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = SIDE, SIDE, "yuvj420p"
            cover.disposition = Disposition.attached_pic
            container.mux(cover.encode(av.VideoFrame.from_ndarray(picture(0), format="rgb24")))
            container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def index_first(path: Path) -> Path:
    return write_video(path, 50, container_options={"movflags": "faststart"})


def cut_after_frames(path: Path, frames: int) -> Path:
    with av.open(str(index_first(path))) as container:
        last = list(container.demux(video=0))[frames - 1]
    path.write_bytes(path.read_bytes()[: (last.pos or 0) + last.size])
    return path


def damaged(path: Path) -> Path:
    """A clip with an intact index whose pictures are overwritten from a fifth of the file on."""
    data = bytearray(index_first(path).read_bytes())
    place = data.index(b"mdat") + 1000
    data[place:] = np.random.default_rng(0).integers(0, 256, len(data) - place, np.uint8).tobytes()
    path.write_bytes(data)
    return path


def huge_png(path: Path) -> Path:
    Image.new("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (100_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    path.write_bytes(data)
    return path


PLAY_LIST = b"ffconcat version 1.0\nfile b.mp4\n"
BAD_VIDEOS = {
    "missing": (lambda d: d / "no.mp4", "there is no such file"),
    "folder": (lambda d: d, "is a folder without frames"),
    "zero bytes": (lambda d: written(d / "a.mp4", b""), "the file is empty (0 bytes)"),
    "text": (lambda d: written(d / "a.mp4", b"some text\n" * 99), "is not a video that FFmpeg can read"),
    "play list": (lambda d: written(d / "a.mp4", PLAY_LIST), "is not a kind of file that holds videos"),
    "cover picture": (lambda d: audio(d / "a.mp4", with_cover=True), "in it, only audio and a cover picture"),
    "audio": (lambda d: audio(d / "a.mp4"), "has no video in it, only audio"),
    "image": (lambda d: saved(noise(), d / "a.jpg"), "is not a kind of file that holds videos"),
    "one frame": (lambda d: write_video(d / "a.mp4", 1), "has 1 frame, at least 2 needed"),
    "index cut off": (lambda d: cut(write_video(d / "a.mp4", 50), 0.5), "is not a video that"),
    "MP4 cut between frames": (lambda d: cut_after_frames(d / "a.mp4", 20), "20 of 50 frames are there"),
    "MP4, last byte": (lambda d: cut(index_first(d / "a.mp4"), 0.9999), "cut short"),
    "MKV cut short": (lambda d: cut(write_video(d / "a.mkv", 50), 0.7), "is cut short"),
    "AVI cut short": (lambda d: cut(write_video(d / "a.avi", 50), 0.7), "is cut short"),
    "damaged": (lambda d: damaged(d / "a.mp4"), "the video is damaged"),
    "4×808": (lambda d: write_video(d / "a.mp4", 8, size=(808, 4)), "one side is more than 200 times"),
}  # fmt: skip
BAD_IMAGES = {
    "missing": (lambda d: d / "no.png", "there is no such file"),
    "folder": (lambda d: d, "is a folder"),
    "zero bytes": (lambda d: written(d / "a.png", b""), "the file is empty"),
    "text": (lambda d: written(d / "a.heic", b"hello"), "is not an image in a format"),
    "2×2000": (lambda d: saved(Image.new("RGB", (2, 2000)), d / "a.png"), "one side is more than 200 times"),
    "PNG cut short": (lambda d: cut(saved(noise(), d / "a.png"), 0.5), "the image is damaged or cut short"),
    "bomb": (lambda d: huge_png(d / "a.png"), "declares"),
    "video": (lambda d: write_video(d / "a.mp4", 8), "is not an image"),
}


BAD = {("video", name): made for name, made in BAD_VIDEOS.items()}
BAD |= {("image", name): made for name, made in BAD_IMAGES.items()}


@pytest.mark.parametrize(("kind", "name"), BAD)
def test_each_bad_file_gives_its_named_error(tmp_path, kind, name):
    make, reason = BAD[kind, name]
    path = make(tmp_path)
    with pytest.raises(MediaError) as error:
        read_media(sample(path, kind), SMALL)
    assert error.value.path == str(path)
    assert reason in error.value.reason


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        ((5.0, 6.0), "its window starts at 5 s, but the video is 2.00 s long"),
        ((1.0, 1.02), "has 1 frame between 1 s and 1.02 s, at least 2 needed"),
        ((1.98, None), "has 0 frames between 1.98 s and its end"),
    ],
)
def test_windows_without_frames_are_errors(tmp_path, window, reason):
    with pytest.raises(MediaError, match=reason):
        read_media(sample(write_video(tmp_path / "a.mp4", 50), "video", *window), SMALL)


@pytest.fixture(scope="module")
def bit_rot(tmp_path_factory):
    """A clip whose size FFmpeg decodes with threads, and 24 copies with some bits flipped."""
    folder = tmp_path_factory.mktemp("rot")
    healthy = write_video(folder / "healthy.mp4", 48, size=(640, 360))
    content = healthy.read_bytes()
    return healthy, [written(folder / f"{n}.mp4", bit_rotted(content, n)) for n in range(24)]


def test_healthy_clips_are_read_after_damaged_ones(bit_rot):
    healthy, copies = bit_rot
    budget = replace(SMALL, seconds=6.0)
    read_media(sample(healthy), SMALL)  # starts the worker
    refused = []
    for copy in copies:
        with suppress(MediaError):
            read_media(sample(copy), budget)
        try:
            read_media(sample(healthy), budget)
        except MediaError as error:
            refused.append((copy.name, error.reason))
    assert not refused


def test_bit_rotted_h264_is_refused_each_time(bit_rot):
    for copy in bit_rot[1][:8]:
        reasons = set()
        for _ in range(2):
            with pytest.raises(MediaError, match="the video is damaged") as error:
                read_media(sample(copy), SMALL)
            reasons.add(error.value.reason)
        assert len(reasons) == 1


def broken_note(clip: bytes) -> bytes:
    """x264's note before the first picture calls itself a keyframe: its first byte was lost."""
    place = clip.index(b"\x06\x05\xff\xff")
    return clip[:place] + b"\x05" + clip[place + 1 :]


def with_times_of_decoding(path: Path, clip: Path) -> Path:
    """A copy whose B-pictures have no times of their own."""
    with av.open(str(clip)) as source, av.open(str(path), "w") as copy:
        stream: Any = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.dts += 1024  # or the first would be cut away
                packet.pts, packet.stream = packet.dts, stream
                copy.mux(packet)
    return path


@pytest.mark.parametrize("change", ["note", "times", "both", "neither"])
def test_cases_a_sound_clip_is_read(tmp_path, change):
    """A broken note is no broken picture; frames come in the order in which they are shown."""
    options = {"x264-params": "keyint=20:bframes=3:b-adapt=0"}
    path = write_video(tmp_path / "a.mp4", 48, codec_options=options)
    budget = replace(SMALL, fps=25.0, max_frames=48)
    expected = read_media(sample(path), budget)
    if change in ("times", "both"):
        path = with_times_of_decoding(tmp_path / "b.mp4", path)
    if change in ("note", "both"):
        path.write_bytes(broken_note(path.read_bytes()))
    found = read_media(sample(path), budget)
    assert torch.equal(found.frames, expected.frames)
    assert found.timestamps.tolist() == pytest.approx(expected.timestamps.tolist(), abs=0.02)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.h264", "libx264")])
def test_cases_damage_where_no_asked_frame_needs_it(tmp_path, name, codec):
    """The last second is rotten: the first one is read as before, the whole is refused each time."""
    path = write_video(tmp_path / name, 75, codec, codec_options={"g": "25", "bf": "2"})
    window = sample(path, start=0.0, end=0.8)
    expected = read_media(window, SMALL)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets: list[Any] = list(container.demux(video=0))
        for packet in packets[-12:-1]:
            content[packet.pos + 40 : packet.pos + packet.size - 4] = b"\xa5" * max(0, packet.size - 44)
    path.write_bytes(content)
    assert torch.equal(read_media(window, SMALL).frames, expected.frames)
    reasons = set()
    for _ in range(3):
        with pytest.raises(MediaError, match="the video is damaged") as error:
            read_media(sample(path), SMALL)
        reasons.add(error.value.reason)
    assert len(reasons) == 1


def test_a_transport_stream_with_lost_packets_gives_right_frames_or_an_error(tmp_path):
    options = {"x264-params": "keyint=20:bframes=3:scenecut=0"}
    path = write_video(tmp_path / "a.ts", 100, size=(320, 180), codec_options=options)
    whole = path.read_bytes()
    packets = [whole[place : place + 188] for place in range(0, len(whole), 188)]
    frames = read_media(sample(path), replace(SMALL, min_frames=100, max_frames=100)).frames
    right = {frame.numpy().tobytes() for frame in frames}
    outcomes = Counter()
    for lost in range(40, len(packets) - 20, len(packets) // 25):
        for count in (1, 8):
            path.write_bytes(b"".join(packets[:lost] + packets[lost + count :]))
            try:
                read = {frame.numpy().tobytes() for frame in read_media(sample(path), SMALL).frames}
            except MediaError as error:
                assert "the video is damaged" in error.reason
                outcomes["refused"] += 1
            else:
                outcomes["right" if read <= right else "wrong"] += 1
    assert outcomes["wrong"] == 0 and outcomes["right"] >= 5 and outcomes["refused"] >= 10
