"""Media on real files: the right frames at the right times, the right sizes, a named error for a bad file."""

import functools
import http.server
import itertools
import threading
import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
import pytest
import torch
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from video_r1.data import clips
from video_r1.data.media import (
    FrameBudget,
    Media,
    fitted_size,
    frame_indices,
    read_media,
    resize,
    shuffled_order,
)
from video_r1.data.records import Sample
from video_r1.errors import ConfigError, MediaError

SIDE = 56
SMALL = FrameBudget(frame_pixels=SIDE * SIDE, image_pixels=SIDE * SIDE)


def sample(path: Path | str, data_type: Any = "video", start: float | None = None, end: float | None = None):
    return Sample(1, "What?", data_type, "free-form", "<answer>x</answer>", str(path), start=start, end=end)


def picture(number: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """[height, width, 3]: a picture that differs from those of all other numbers, with movement."""
    draw = np.random.default_rng(number)
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[:, :, 0] = (np.arange(width) * 3 + number * 5) % 256
    place = (number * 3) % (width - 16)
    patch = pixels[8:24, place : place + 16]
    patch[:] = draw.integers(0, 256, patch.shape)
    return pixels


def write_video(
    path: Path,
    frames: int,
    codec: str = "libx264",
    fps: int = 25,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    size: tuple[int, int] = (SIDE, SIDE),
    matrix: list[int] | None = None,
) -> Path:
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if matrix:
            stream.set_display_matrix(matrix)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts = pts[number] if pts else number
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded_frames(path: Path) -> list[torch.Tensor]:
    """Every frame of a file, [3, H, W], decoded from first to last with nothing left out."""
    with av.open(str(path)) as container:
        return [
            torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1) for f in container.decode(video=0)
        ]


# --- which frames ---------------------------------------------------------------------------------

INDICES = [
    # frames, fps, expected
    (100, 25.0, [0, 14, 28, 42, 57, 71, 85, 99]),  # 4 s × 2 = 8; steps of 99/7
    (300, 30.0, [0, 20, 40, 60, 80, 100, 120, 140, 159, 179, 199, 219, 239, 259, 279, 299]),  # 20, at most 16
    (25, 25.0, [0, 8, 16, 24]),  # 2, at least 4
    (85, 25.0, [0, 17, 34, 50, 67, 84]),  # 6.8, down to an even number
    (5, 1.0, [0, 1, 3, 4]),  # 10, but there are 5, down to 4
    (3, 25.0, [0, 2]),
    (2, 25.0, [0, 1]),
    (1, 25.0, []),
    (120, 30000 / 1001, [0, 17, 34, 51, 68, 85, 102, 119]),  # 4.004 s
    (240, 240 / 7.999999999999999, [0, 16, 32, 48, 64, 80, 96, 112, 127, 143, 159, 175, 191, 207, 223, 239]),
]


@pytest.mark.parametrize(("total", "fps", "expected"), INDICES)
def test_frame_indices_worked_by_hand(total, fps, expected):
    assert frame_indices(total, fps, FrameBudget()) == expected


@given(total=st.integers(2, 5000), fps=st.sampled_from([1.0, 12.5, 25.0, 50.0]), most=st.integers(2, 64))
def test_frame_indices_are_even_in_number_and_spread_over_the_whole_clip(total, fps, most):
    indices = frame_indices(total, fps, FrameBudget(max_frames=most))
    wanted = min(max(Fraction(total) / Fraction(fps) * 2, 4), most, total)
    assert len(indices) == int(wanted // 2) * 2
    assert indices[0] == 0 and indices[-1] == total - 1
    ideal = [Fraction(place * (total - 1), len(indices) - 1) for place in range(len(indices))]
    assert all(abs(index - place) < Fraction(1, 2) for index, place in zip(indices, ideal, strict=True))


@pytest.mark.parametrize(
    "change", [{"fps": 0}, {"fps": float("inf")}, {"max_frames": 1}, {"frame_pixels": 783}]
)
def test_budgets_without_sense_are_refused(change):
    with pytest.raises(ConfigError):
        FrameBudget(**change)


# --- which size -----------------------------------------------------------------------------------

SIZES = [
    # height, width, squares, expected rows and columns of squares
    (1080, 1920, 128, (8, 15)),  # √(128·9/16) = 8.49, √(128·16/9) = 15.08
    (720, 1280, 256, (12, 21)),  # exactly 12; 21.33
    (56, 56, 4, (2, 2)),  # has the budget's size already
    (112, 112, 4, (2, 2)),
    (20, 30, 6, (2, 3)),  # scaled up
    (1920, 1080, 128, (15, 8)),
    (10, 2000, 128, (1, 128)),  # √(128/200) < 1: one row, and no more columns than the area allows
    (2000, 10, 128, (128, 1)),
]


@pytest.mark.parametrize(("height", "width", "squares", "expected"), SIZES)
def test_fitted_size_worked_by_hand(height, width, squares, expected):
    assert fitted_size(height, width, squares * 784, 28) == (expected[0] * 28, expected[1] * 28)


@given(
    st.integers(28, 4000),
    st.integers(28, 4000),
    st.sampled_from([28, 32]),
    st.sampled_from([4, 128, 256, 512]),
)
def test_sizes_agree_with_the_qwen_processor_when_it_shrinks(height, width, multiple, squares):
    pixels = squares * multiple**2
    fitted = fitted_size(height, width, pixels, multiple)
    assert fitted[0] * fitted[1] <= pixels
    assert fitted[0] % multiple == fitted[1] % multiple == 0
    rounded = round(height / multiple) * round(width / multiple)
    if rounded > squares and min(fitted) > multiple:
        # theirs divides in floats: 72 × 72 within 56 × 56 becomes 55.99… and then 28
        assert fitted == smart_resize(height, width, multiple, pixels, pixels * (1 + 1e-9))


def test_resizing_is_that_of_the_qwen_processor():
    frames = torch.stack([torch.from_numpy(picture(n, 320, 180)).permute(2, 0, 1) for n in range(4)])
    pixels = 32 * 784
    processor = Qwen2VLVideoProcessor(size={"shortest_edge": pixels, "longest_edge": pixels})
    theirs = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    resized = resize(frames, *fitted_size(180, 320, pixels, 28))
    ours = processor(videos=[resized], do_resize=False, do_sample_frames=False, return_tensors="pt")
    assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])
    assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])


# --- the right frames -----------------------------------------------------------------------------

FORMATS = {
    "H.264, B-frames": ("clip.mp4", "libx264", {}),
    "H.264, pyramid": (
        "clip.mp4",
        "libx264",
        {"x264-params": "bframes=7:b-pyramid=normal:keyint=60:scenecut=0"},
    ),
    "H.264, short groups": ("clip.mp4", "libx264", {"x264-params": "keyint=12:bframes=3"}),
    "H.264, open groups": (
        "clip.mkv",
        "libx264",
        {"x264-params": "keyint=20:open-gop=1:bframes=3:scenecut=0"},
    ),
    "H.264, no B-frames": ("clip.mp4", "libx264", {"tune": "zerolatency", "x264-params": "keyint=30"}),
    "H.264, keyframes only": ("clip.mp4", "libx264", {"x264-params": "keyint=1"}),
    "H.264, no keyframe but one": ("clip.mp4", "libx264", {"x264-params": "keyint=infinite:intra-refresh=1"}),
    "H.264, Matroska": ("clip.mkv", "libx264", {"x264-params": "keyint=25"}),
    "H.264, transport stream": ("clip.ts", "libx264", {"x264-params": "keyint=25"}),
    "H.264, AVI": ("clip.avi", "libx264", {"x264-params": "keyint=25"}),
    "HEVC": ("clip.mp4", "libx265", {"x265-params": "keyint=20:bframes=4:log-level=none"}),
    "MPEG-4": ("clip.avi", "mpeg4", {"g": "20"}),
    "VP9": ("clip.webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "VP8": ("clip.webm", "libvpx", {"g": "20", "deadline": "realtime"}),
    "GIF": ("clip.gif", "gif", {}),
}
MODES = {"in memory": {}, "seeking": {"_BYTES_IN_MEMORY": 0}, "threads": {"_THREADS_FROM_PIXELS": 0}}


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_chosen_frames_equal_those_of_decoding_everything(formats, monkeypatch, name, mode):
    path, everything = formats(name)
    assert len(everything) == 90
    for setting, value in MODES[mode].items():
        monkeypatch.setattr(clips, setting, value)
    if name not in ("GIF", "H.264, AVI"):  # the others must do without decoding everything
        monkeypatch.setattr(clips, "_decode_from_beginning", None)
    budgets = [
        FrameBudget(max_frames=most, min_frames=most, frame_pixels=SIDE * SIDE) for most in (4, 16, 64)
    ]
    for budget, (start, end) in itertools.product(budgets, [(None, None), (1.0, 3.0), (2.48, None)]):
        first = round((start or 0) * 25)
        last = round(end * 25) if end else 90
        media = read_media(sample(path, start=start, end=end), budget)
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
    read_media(sample(path), FrameBudget(max_frames=4, frame_pixels=SIDE * SIDE))
    # frames 0, 133, 266 and 399 from the keyframes 0, 120, 260 and 380
    assert sent == [0, *range(120, 134), *range(260, 267), *range(380, 400)]


def test_variable_frame_rate_gives_frames_in_order_with_their_own_times(tmp_path):
    pts = [0, 1, 2, 3, 4, 50, 51, 100, 160, 161]  # 10 frames in 6.48 s
    path = write_video(tmp_path / "clip.mp4", 10, pts=pts)
    media = read_media(sample(path), FrameBudget(frame_pixels=SIDE * SIDE))
    assert media.timestamps.tolist() == [place / 25 for place in pts]
    everything = decoded_frames(path)
    assert torch.equal(media.frames, torch.stack(everything))
    window = read_media(sample(path, start=1.0, end=6.42), FrameBudget(frame_pixels=SIDE * SIDE))
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
    media = read_media(sample(cut), FrameBudget(min_frames=40, max_frames=40, frame_pixels=SIDE * SIDE))
    assert torch.equal(media.frames, torch.stack(everything))
    assert media.duration == pytest.approx(1.6)


@pytest.mark.parametrize("field", [b"mvhd", b"mdhd"])
def test_the_container_may_lie_about_its_duration(tmp_path, field):
    path = write_video(tmp_path / "clip.mp4", 50)
    data = bytearray(path.read_bytes())
    place = data.index(field) + 4 + 16  # version and flags, two dates, the time scale
    data[place : place + 4] = (2**30).to_bytes(4)
    path.write_bytes(data)
    media = read_media(sample(path), SMALL)
    assert (len(media.frames), media.duration, media.fps) == (4, 2.0, 2.0)


def test_a_raw_stream_without_times_is_decoded_from_its_beginning(tmp_path):
    path = write_video(tmp_path / "clip.h264", 50)
    everything = decoded_frames(path)
    media = read_media(sample(path), SMALL)
    assert torch.equal(media.frames, torch.stack([everything[index] for index in (0, 16, 33, 49)]))
    assert media.timestamps.tolist() == [0.0, 0.64, 1.32, 1.96]


TURNS = {
    # display matrix (a, b, u, c, d, v, x, y, w): a point (x, y) goes to (a·x + c·y, b·x + d·y)
    "quarter clockwise": ([0, 1, 0, -1, 0, 0, 0, 0, 1], lambda frame: frame.rot90(-1, (1, 2))),
    "quarter anticlockwise": ([0, -1, 0, 1, 0, 0, 0, 0, 1], lambda frame: frame.rot90(1, (1, 2))),
    "half": ([-1, 0, 0, 0, -1, 0, 0, 0, 1], lambda frame: frame.rot90(2, (1, 2))),
    "mirrored": ([-1, 0, 0, 0, 1, 0, 0, 0, 1], lambda frame: frame.flip(2)),
    "upside down": ([1, 0, 0, 0, -1, 0, 0, 0, 1], lambda frame: frame.flip(1)),
    "transposed": ([0, 1, 0, 1, 0, 0, 0, 0, 1], lambda frame: frame.transpose(1, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_the_display_matrix_is_respected(tmp_path, turn):
    matrix, expected = TURNS[turn]
    fixed = [value << (30 if place % 3 == 2 else 16) for place, value in enumerate(matrix)]
    path = write_video(tmp_path / "clip.mp4", 4, size=(112, 56), matrix=fixed)
    media = read_media(sample(path), FrameBudget(frame_pixels=112 * 56))
    assert torch.equal(media.frames, torch.stack([expected(frame) for frame in decoded_frames(path)]))
    with av.open(str(path)) as container:  # FFmpeg's own reading of the matrix, where it is a plain turn
        rotation = next(container.decode(video=0)).rotation
    if turn.startswith(("quarter", "half")):
        assert torch.equal(expected(media.frames[0]), media.frames[0].rot90(rotation // 90, (1, 2)))


def test_frames_are_resized_to_the_budget(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 30, size=(160, 90))
    media = read_media(sample(path), FrameBudget(frame_pixels=32 * 784))
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
    media = read_media(sample(path, "video", *window), FrameBudget(min_frames=50, max_frames=50))
    assert len(media.frames) == frames // 2 * 2
    assert media.duration == pytest.approx(seconds)


# --- images ---------------------------------------------------------------------------------------


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    pixels = picture(3, 112, 56)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    media = read_media(sample(tmp_path / "image.png", "image"), FrameBudget(image_pixels=112 * 56))
    assert torch.equal(media.frames[0], torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1))
    assert (media.kind, media.timestamps.tolist(), media.duration, media.fps) == ("image", [0.0], 0.0, 0.0)


def grey_16_bit() -> Image.Image:
    return Image.fromarray(np.full((SIDE, SIDE), 0x8040, np.uint16))


def half_transparent() -> Image.Image:
    return Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 51))


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = 1
    return image


MODES_OF_IMAGES = [
    (grey_16_bit, (0x80, 0x80, 0x80)),
    (half_transparent, (255, 204, 204)),  # a fifth of red on white
    (palette_with_transparency, (255, 255, 255)),
    (lambda: Image.new("L", (SIDE, SIDE), 77), (77, 77, 77)),
    (lambda: Image.new("1", (SIDE, SIDE), 1), (255, 255, 255)),
]


@pytest.mark.parametrize(("make", "colour"), MODES_OF_IMAGES)
def test_images_of_any_mode_become_rgb(tmp_path, make, colour):
    make().save(tmp_path / "image.png")
    media = read_media(sample(tmp_path / "image.png", "image"), SMALL)
    assert media.frames.shape == (1, 3, SIDE, SIDE)
    assert media.frames[0, :, 5, 5].tolist() == list(colour)


# --- bad files ------------------------------------------------------------------------------------


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def audio_with_a_cover(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        sound, cover = container.add_stream("aac", rate=16000), container.add_stream("mjpeg", rate=1)
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


def saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def noise(side: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


PLAY_LIST = b"ffconcat version 1.0\nfile b.mp4\n"
BAD_VIDEOS = {
    "missing": (lambda d: d / "no.mp4", "there is no such file"),
    "folder": (lambda d: d, "is a folder, not a media file"),
    "zero bytes": (lambda d: written(d / "a.mp4", b""), "the file is empty (0 bytes)"),
    "text": (lambda d: written(d / "a.mp4", b"some text\n" * 99), "is not a video that FFmpeg can read"),
    "play list": (lambda d: written(d / "a.mp4", PLAY_LIST), "is not a kind of file that holds videos"),
    "cover picture": (lambda d: audio_with_a_cover(d / "a.mp4"), "in it, only audio and a cover picture"),
    "audio": (lambda d: audio_only(d / "a.mp4"), "has no video in it, only audio"),
    "image": (lambda d: saved(noise(), d / "a.jpg"), "is not a kind of file that holds videos"),
    "one frame": (lambda d: write_video(d / "a.mp4", 1), "has 1 frame, at least 2 needed"),
    "index cut off": (lambda d: cut(write_video(d / "a.mp4", 50), 0.5), "is not a video that"),
    "MP4 cut at a half": (lambda d: cut(index_first(d / "a.mp4"), 0.5), "cut short"),
    "MP4 cut between frames": (lambda d: cut_after_frames(d / "a.mp4", 20), "20 of 50 frames are there"),
    "MP4, last byte": (lambda d: cut(index_first(d / "a.mp4"), 0.9999), "cut short"),
    "MKV cut short": (lambda d: cut(write_video(d / "a.mkv", 50), 0.7), "is cut short"),
    "WebM cut short": (lambda d: cut(write_video(d / "a.webm", 20, "libvpx"), 0.7), "is cut short"),
    "AVI cut short": (lambda d: cut(write_video(d / "a.avi", 50), 0.7), "is cut short"),
    "damaged": (lambda d: damaged(d / "a.mp4"), "the video is damaged"),
    "4×808": (lambda d: write_video(d / "a.mp4", 8, size=(808, 4)), "one side is more than 200 times"),
}  # fmt: skip
BAD_IMAGES = {
    "missing": (lambda d: d / "no.png", "there is no such file"),
    "folder": (lambda d: d, "is a folder"),
    "zero bytes": (lambda d: written(d / "a.png", b""), "the file is empty"),
    "text": (lambda d: written(d / "a.png", b"hello"), "is not an image"),
    "2×2000": (lambda d: saved(Image.new("RGB", (2, 2000)), d / "a.png"), "one side is more than 200 times"),
    "JPEG cut short": (lambda d: cut(saved(noise(), d / "a.jpg"), 0.5), "the image is damaged or cut short"),
    "PNG cut short": (lambda d: cut(saved(noise(), d / "a.png"), 0.5), "the image is damaged or cut short"),
    "bomb": (lambda d: huge_png(d / "a.png"), "declares"),
    "video": (lambda d: write_video(d / "a.mp4", 8), "is not an image"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_each_bad_video_gives_its_named_error(tmp_path, name):
    make, reason = BAD_VIDEOS[name]
    path = make(tmp_path)
    with pytest.raises(MediaError) as error:
        read_media(sample(path), SMALL)
    assert error.value.path == str(path)
    assert reason in error.value.reason


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_each_bad_image_gives_its_named_error(tmp_path, name):
    make, reason = BAD_IMAGES[name]
    path = make(tmp_path)
    with pytest.raises(MediaError) as error:
        read_media(sample(path, "image"), SMALL)
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


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_random_damage_is_an_error_or_whole_media_never_something_else(tmp_path, suffix):
    av.logging.set_level(av.logging.PANIC)
    good = write_video(tmp_path / f"good.{suffix}", 50).read_bytes()
    draw = np.random.default_rng(7)
    seen = Counter()
    for _ in range(25):
        data = np.frombuffer(good, np.uint8).copy()
        places = draw.integers(0, len(data), 12)
        data[places] = draw.integers(0, 256, 12)
        path = written(tmp_path / f"bad.{suffix}", data.tobytes())
        try:
            media = read_media(sample(path), SMALL)
        except MediaError as error:
            seen["error"] += 1
            assert error.reason and "\n" not in error.reason
        else:
            seen["media"] += 1
            assert len(media.frames) % 2 == 0 and len(media.frames) == len(media.timestamps)
    assert seen["error"] >= 3


# --- shuffling ------------------------------------------------------------------------------------


def test_shuffled_orders_are_uniform_over_all_but_the_identity():
    generator = torch.Generator().manual_seed(0)
    counts = Counter(tuple(shuffled_order(3, generator).tolist()) for _ in range(5000))
    assert set(counts) == set(itertools.permutations(range(3))) - {(0, 1, 2)}
    assert all(abs(count - 1000) < 120 for count in counts.values())  # 4 standard deviations
    assert shuffled_order(2, generator).tolist() == [1, 0]
    with pytest.raises(ValueError, match="no order to shuffle"):
        shuffled_order(1, generator)


def test_shuffled_orders_follow_the_generator():
    orders = [shuffled_order(16, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@given(st.integers(2, 32), st.integers(0, 10))
@settings(max_examples=20)
def test_reordering_moves_frames_and_leaves_times(frames, seed):
    media = Media(
        torch.arange(frames * 3).view(frames, 3, 1, 1), torch.arange(frames) / 2, frames / 2, "video"
    )
    order = shuffled_order(frames, torch.Generator().manual_seed(seed))
    moved = media.reordered(order)
    assert [moved.frames[place, 0, 0, 0].item() // 3 for place in range(frames)] == order.tolist()
    assert torch.equal(moved.timestamps, media.timestamps)
    assert (moved.duration, moved.kind) == (media.duration, media.kind)


# --- URLs -----------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_media_behind_urls(tmp_path, server):
    local = write_video(tmp_path / "clip.mp4", 50)
    saved(noise(SIDE), tmp_path / "image.png")
    assert torch.equal(
        read_media(sample(f"{server}/clip.mp4"), SMALL).frames, read_media(sample(local), SMALL).frames
    )
    image = read_media(sample(f"{server}/image.png", "image"), SMALL).frames[0]
    assert torch.equal(image, torch.from_numpy(np.asarray(noise(SIDE)).copy()).permute(2, 0, 1))
    for kind in ("image", "video"):
        with pytest.raises(MediaError) as error:
            read_media(sample(f"{server}/missing", kind), SMALL)
        assert "404" in error.value.reason or "Not Found" in error.value.reason
