"""Decoding real files: the right frames at the right times, and no more work than they need."""

import functools
import itertools
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import av.logging
import numpy as np
import pytest
import torch
from av.sidedata.sidedata import Type as SideDataType
from media_files import SIDE, SMALL, decoded_frames, picture, sample, write_video
from PIL import Image

from video_r1.data.decoding import clips
from video_r1.data.decoding.media import decode_media, frame_indices, resize
from video_r1.settings.frames import FrameBudget

FORMATS = {
    "H.264, B-frames": ("clip.mp4", "libx264", {}),
    "H.264, pyramid": (
        "clip.mp4",
        "libx264",
        {"x264-params": "bframes=7:b-pyramid=normal:keyint=60:scenecut=0"},
    ),
    "H.264, open groups, pyramid": (
        "clip.mkv",
        "libx264",
        {"x264-params": "keyint=20:open-gop=1:bframes=7:b-pyramid=normal:b-adapt=0:scenecut=0"},
    ),
    "H.264, no B-frames": ("clip.mp4", "libx264", {"tune": "zerolatency", "x264-params": "keyint=30"}),
    "H.264, keyframes only": ("clip.mp4", "libx264", {"x264-params": "keyint=1"}),
    "H.264, no keyframe but one": ("clip.mp4", "libx264", {"x264-params": "keyint=infinite:intra-refresh=1"}),
    "H.264, transport stream": ("clip.ts", "libx264", {"x264-params": "keyint=25"}),
    "H.264, AVI": ("clip.avi", "libx264", {"x264-params": "keyint=25"}),
    "HEVC": ("clip.mp4", "libx265", {"x265-params": "keyint=20:bframes=4:log-level=none"}),
    "MPEG-4": ("clip.avi", "mpeg4", {"g": "20"}),
    "MPEG-4, B-frames": ("clip.avi", "mpeg4", {"g": "20", "bf": "2"}),
    "VP9": ("clip.webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "VP8": ("clip.webm", "libvpx", {"g": "20", "deadline": "realtime"}),
    "GIF": ("clip.gif", "gif", {}),
}
MODES = {
    "in memory": {},
    "seeking": {(clips, "_BYTES_IN_MEMORY"): 0},
    "threads": {(clips, "_THREADS_FROM_PIXELS"): 0},
}


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """Each format's file with 90 frames, and all its frames."""

    @functools.cache
    def made(name: str) -> tuple[Path, list[torch.Tensor]]:
        file, codec, options = FORMATS[name]
        path = tmp_path_factory.mktemp("clips") / file
        if codec == "gif":
            images = [Image.fromarray(picture(number)) for number in range(90)]
            images[0].save(path, save_all=True, append_images=images[1:], duration=40)
        else:
            write_video(path, 90, codec, codec_options=options)
        return path, decoded_frames(path)

    return made


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "in memory") for name in FORMATS),
        *(
            (name, mode)
            for name in [*list(FORMATS)[1:4], "MPEG-4, B-frames"]
            for mode in ("seeking", "threads")
        ),
    ],
)
def test_chosen_frames_equal_those_of_decoding_everything(formats, monkeypatch, name, mode):
    path, everything = formats(name)
    assert len(everything) == 90
    for (module, setting), value in MODES[mode].items():
        monkeypatch.setattr(module, setting, value)
    if name not in ("GIF", "H.264, AVI"):  # the others must do without decoding everything
        monkeypatch.setattr(clips, "_decode_from_beginning", None)
    budgets = [
        FrameBudget(max_frames=most, min_frames=most, frame_pixels=SIDE * SIDE) for most in (4, 16, 64)
    ]
    for budget, (start, end) in itertools.product(budgets, [(None, None), (1.0, 3.0), (2.48, None)]):
        first = round((start or 0) * 25)
        last = round(end * 25) if end else 90
        media = decode_media(sample(path, start=start, end=end), budget)
        chosen = [first + index for index in frame_indices(last - first, 25.0, budget)]
        assert torch.equal(media.frames, torch.stack([everything[index] for index in chosen]))
        assert media.timestamps.tolist() == pytest.approx(
            [index / 25 - (start or 0) for index in chosen], abs=2e-3
        )
        assert media.duration == pytest.approx((end or 3.6) - (start or 0), abs=0.02)


def test_few_frames_of_a_long_clip_need_few_decoded_pictures(tmp_path, monkeypatch):
    path = write_video(
        tmp_path / "clip.mp4", 400, codec_options={"x264-params": "keyint=20:bframes=0:scenecut=0"}
    )
    sent = []
    original = clips._packets_from

    def counted(*arguments):
        for item in original(*arguments):
            sent.append(item[0])
            yield item

    monkeypatch.setattr(clips, "_packets_from", counted)
    decode_media(sample(path), FrameBudget(max_frames=4, frame_pixels=SIDE * SIDE))
    # frames 0, 133, 266 and 399 from the keyframes 0, 120, 260 and 380
    assert sent == [0, *range(120, 134), *range(260, 267), *range(380, 400)]


def test_variable_frame_rate_gives_frames_in_order_with_their_own_times(tmp_path):
    pts = [0, 1, 2, 3, 4, 50, 51, 100, 160, 161]  # 10 frames in 6.48 s
    path = write_video(tmp_path / "clip.mp4", 10, pts=pts)
    media = decode_media(sample(path), FrameBudget(frame_pixels=SIDE * SIDE))
    assert media.timestamps.tolist() == [place / 25 for place in pts]
    everything = decoded_frames(path)
    assert torch.equal(media.frames, torch.stack(everything))
    window = decode_media(sample(path, start=1.0, end=6.42), FrameBudget(frame_pixels=SIDE * SIDE))
    assert window.timestamps.tolist() == pytest.approx([1.0, 1.04, 3.0, 5.4])
    assert torch.equal(window.frames, torch.stack(everything[5:9]))
    assert window.duration == pytest.approx(5.42)
    assert window.fps == pytest.approx(4 / 5.42)


def test_frames_before_an_edit_list_are_not_shown(tmp_path, monkeypatch):
    """A clip that was cut without encoding again starts before its first shown frame, at a keyframe."""
    whole = write_video(tmp_path / "whole.mp4", 90, codec_options={"x264-params": "keyint=100:scenecut=0"})
    cut = tmp_path / "cut.mp4"
    with (
        av.open(str(whole)) as source,
        av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.pts is not None and packet.dts is not None and packet.time_base is not None:
                shift = round(2 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    everything = decoded_frames(cut)
    assert len(everything) == 40
    monkeypatch.setattr(clips, "_decode_from_beginning", None)
    media = decode_media(sample(cut), FrameBudget(min_frames=40, max_frames=40, frame_pixels=SIDE * SIDE))
    assert torch.equal(media.frames, torch.stack(everything))
    assert media.duration == pytest.approx(1.6)


def test_the_container_may_lie_about_its_duration(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 50)
    data = bytearray(path.read_bytes())
    place = data.index(b"mdhd") + 4 + 16  # version and flags, two dates, the time scale
    data[place : place + 4] = (2**30).to_bytes(4)
    path.write_bytes(data)
    media = decode_media(sample(path), SMALL)
    assert (len(media.frames), media.duration, media.fps) == (4, 2.0, 2.0)


def test_a_raw_stream_without_times_is_decoded_from_its_beginning(tmp_path):
    path = write_video(tmp_path / "clip.h264", 50)
    everything = decoded_frames(path)
    media = decode_media(sample(path), SMALL)
    assert torch.equal(media.frames, torch.stack([everything[index] for index in (0, 16, 33, 49)]))
    assert media.timestamps.tolist() == [0.0, 0.64, 1.32, 1.96]


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv"])
def test_a_title_that_is_not_utf_8_does_not_matter(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", 20, "mpeg4", metadata={"title": "caf(e)s"})
    whole = decoded_frames(path)
    data = path.read_bytes()
    assert b"caf(e)s" in data
    path.write_bytes(data.replace(b"caf(e)s", "café ès".encode("latin-1")))
    assert torch.equal(decode_media(sample(path), SMALL).frames[0], whole[0])


def test_joined_transport_streams_follow_each_other(tmp_path):
    """The second recording's clock starts again, so by their times the two are interleaved."""
    parts = [
        write_video(tmp_path / f"{part}.ts", 75, fps=50, pts=list(range(part, 150, 2)), first=100 * part)
        for part in (0, 1)
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    everything = [frame for part in parts for frame in decoded_frames(part)]
    media = decode_media(sample(path), SMALL)
    indices = frame_indices(150, 25.0, SMALL)
    assert len(indices) == 12
    assert torch.equal(media.frames, torch.stack([everything[index] for index in indices]))
    assert media.timestamps.tolist() == pytest.approx([index / 25 for index in indices])
    assert media.duration == pytest.approx(6.0)
    window = decode_media(sample(path, start=2.0, end=4.0), SMALL)
    assert torch.equal(window.frames[0], everything[50])


def test_a_header_may_say_twice_the_rate(tmp_path):
    """An AVI file of H.264 with B-frames, written with two places for each frame, one of them empty."""
    path = write_video(
        tmp_path / "clip.avi",
        80,
        fps=16,
        pts=list(range(0, 160, 2)),
        codec_options={"x264-params": "bframes=3"},
    )
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 16
    media = decode_media(sample(path), FrameBudget(frame_pixels=SIDE * SIDE))
    indices = frame_indices(80, 8.0, FrameBudget())
    assert len(indices) == 16
    everything = decoded_frames(path)
    assert torch.equal(media.frames, torch.stack([everything[index] for index in indices]))
    assert media.duration == pytest.approx(10.0)
    assert media.timestamps.tolist() == pytest.approx([index / 8 for index in indices], abs=0.07)


def test_pictures_packed_into_one_packet(tmp_path, monkeypatch):
    """Two pictures in a packet and none in the next, as DivX and XviD write B-frames in AVI: decoded once."""
    whole = write_video(tmp_path / "whole.avi", 61, "mpeg4", codec_options={"bf": "1"})
    path = tmp_path / "a.avi"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        first, *others = [bytes(packet) for packet in source.demux(video=0) if packet.size]
        begin = first.index(b"\0\0\1\xb6")
        packets = [first[:begin] + b"\0\0\1\xb2DivX503b1393p" + first[begin:]]
        for place in range(0, len(others), 2):
            packets += [b"".join(others[place : place + 2]), b"\0\0\1\xb6\x51\x40\0"]  # a picture not coded
        for number, content in enumerate(packets):
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            packet.is_keyframe = number == 0
            target.mux(packet)
    everything, opened, real = decoded_frames(whole), [], clips.open_video
    monkeypatch.setattr(clips, "open_video", lambda *file: opened.append(file) or real(*file))
    media = decode_media(sample(path), SMALL)
    assert len(opened) == 2  # for the list of packets, and to decode
    assert torch.equal(
        media.frames, torch.stack([everything[index] for index in frame_indices(61, 25.0, SMALL)])
    )


TURNS = {
    # display matrix (a, b, u, c, d, v, x, y, w): a point (x, y) goes to (a·x + c·y, b·x + d·y)
    "quarter clockwise": ([0, 1, 0, -1, 0, 0, 0, 0, 1], lambda frame: frame.rot90(-1, (1, 2))),
    "quarter anticlockwise": ([0, -1, 0, 1, 0, 0, 0, 0, 1], lambda frame: frame.rot90(1, (1, 2))),
    "mirrored": ([-1, 0, 0, 0, 1, 0, 0, 0, 1], lambda frame: frame.flip(2)),
    "upside down": ([1, 0, 0, 0, -1, 0, 0, 0, 1], lambda frame: frame.flip(1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_the_display_matrix_is_respected(tmp_path, turn):
    matrix, expected = TURNS[turn]
    fixed = [value << (30 if place % 3 == 2 else 16) for place, value in enumerate(matrix)]
    path = write_video(tmp_path / "clip.mp4", 4, size=(112, 56), matrix=fixed)
    media = decode_media(sample(path), FrameBudget(frame_pixels=112 * 56))
    assert torch.equal(media.frames, torch.stack([expected(frame) for frame in decoded_frames(path)]))
    with av.open(str(path)) as container:  # FFmpeg's own reading of the matrix, where it is a plain turn
        rotation = next(container.decode(video=0)).rotation
    if turn.startswith("quarter"):
        assert torch.equal(expected(media.frames[0]), media.frames[0].rot90(rotation // 90, (1, 2)))


@pytest.mark.parametrize(("orientation", "flipped"), [(1, []), (3, [1, 2])])
def test_side_data_that_pyav_does_not_know_is_no_obstacle(tmp_path, orientation, flipped):
    """EXIF in MJPEG, as cameras write it: its orientation is the frame's display matrix."""
    path = tmp_path / "clip.avi"
    exif = Image.Exif()
    exif[0x0112] = orientation
    pictures = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuvj420p"
        for number in range(4):
            jpeg = BytesIO()
            Image.fromarray(picture(number)).save(jpeg, "JPEG", quality=95, exif=exif)
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            packet.is_keyframe = True
            container.mux(packet)
            pictures.append(torch.from_numpy(np.asarray(Image.open(jpeg)).copy()).permute(2, 0, 1))
    media = decode_media(sample(path), SMALL)
    expected = torch.stack(pictures).flip([dim + 1 for dim in flipped]) if flipped else torch.stack(pictures)
    difference = (media.frames.float() - expected.float()).abs()
    assert difference.mean() < 4
    assert "_missing_" not in vars(SideDataType)  # PyAV is as it was


def test_frames_are_resized_to_the_budget(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 30, size=(160, 90))
    media = decode_media(sample(path), FrameBudget(frame_pixels=32 * 784))
    assert media.frames.shape == (4, 3, 4 * 28, 7 * 28)
    assert (media.kind, media.frames.dtype, media.timestamps.dtype) == ("video", torch.uint8, torch.float64)
    frames = decoded_frames(path)
    assert torch.equal(media.frames[3], resize(frames[29][None], 112, 196)[0])
    assert media.frames.is_contiguous()


WINDOWS = [
    ((None, 1.0), 25, 1.0),
    ((1.0, None), 25, 1.0),
    ((0.5, 1.5), 25, 1.0),
    ((0.51, 1.5), 24, 0.99),  # frame 13 is the first at or after 0.51 s
    ((1.0, 99.0), 25, 1.0),  # ends with the clip
    ((0.0, 0.08), 2, 0.08),  # the frame at its end is not in it
]


@pytest.mark.parametrize(("window", "frames", "seconds"), WINDOWS)
def test_windows_hold_the_frames_from_start_to_before_end(tmp_path, window, frames, seconds):
    path = write_video(tmp_path / "clip.mp4", 50)
    media = decode_media(sample(path, "video", *window), FrameBudget(min_frames=50, max_frames=50))
    assert len(media.frames) == frames // 2 * 2
    assert media.duration == pytest.approx(seconds)
