"""Which frames, which size, images and shuffling."""

import itertools
import math
import random
import struct
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from media_files import SIDE, SMALL, picture, sample
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.media import fitted_size, frame_indices, resize
from video_r1.data.prompts import shuffled_order
from video_r1.errors import ConfigError
from video_r1.evaluation.paper import as_sized
from video_r1.settings.decoding import PROTOCOLS
from video_r1.settings.frames import FrameBudget

INDICES = [
    # frames, fps, expected
    (100, 25.0, [0, 14, 28, 42, 57, 71, 85, 99]),  # 4 s × 2 = 8; steps of 99/7
    (300, 30.0, [0, 20, 40, 60, 80, 100, 120, 140, 159, 179, 199, 219, 239, 259, 279, 299]),  # 20, at most 16
    (85, 25.0, [0, 17, 34, 50, 67, 84]),  # 6.8, down to an even number
    (5, 1.0, [0, 1, 3, 4]),  # 10, but there are 5, down to 4
    (3, 25.0, [0, 2]),
    (1, 25.0, []),
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
    "change",
    [{"max_frames": 1}, {"frame_pixels": 783}],
)
def test_budgets_without_sense_are_refused(change):
    with pytest.raises(ConfigError):
        FrameBudget(**change)


SIZES = [
    # height, width, squares, expected rows and columns of squares
    (1080, 1920, 128, (8, 15)),  # √(128·9/16) = 8.49, √(128·16/9) = 15.08
    (720, 1280, 256, (12, 21)),  # exactly 12; 21.33
    (56, 56, 4, (2, 2)),  # has the budget's size already
    (20, 30, 6, (2, 3)),  # scaled up
    (10, 2000, 128, (1, 128)),  # √(128/200) < 1: one row, and no more columns than the area allows
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


@given(st.integers(28, 4000), st.integers(28, 4000))
@example(240, 427)  # 9 × 15 squares: 135 visual tokens for two frames, scaled up to the budget 231
@example(320, 480)  # between the two: 11 × 17, the nearest multiples
@example(360, 640)
def test_sizes_agree_with_the_qwen_processor_where_the_least_is_given(height, width):
    least, most = 128 * 784, 256 * 784
    assume(max(height, width) <= 200 * min(height, width))
    fitted = fitted_size(height, width, most, 28, least)
    assert fitted == smart_resize(height, width, 28, least, most)


def reference_size(height: int, width: int) -> tuple[int, int]:
    """Of an image in the reference's code: qwen_vl_utils with its MAX_PIXELS of 256 · 28 · 28."""
    low, high, sides = 4 * 784, 256 * 784, (height, width)
    size = [max(28, round(side / 28) * 28) for side in sides]
    if math.prod(size) > high:
        size = [math.floor(side / math.sqrt(height * width / high) / 28) * 28 for side in sides]
    elif math.prod(size) < low:
        size = [math.ceil(side * math.sqrt(low / (height * width)) / 28) * 28 for side in sides]
    return size[0], size[1]


def test_images_are_sized_as_in_the_references_protocol(tmp_path):
    draw = random.Random(0)
    sizes = [(draw.randint(20, 3000), draw.randint(20, 3000)) for _ in range(20_000)]
    sized = [fitted_size(*size, 256 * 784, 28, 4 * 784) for size in sizes]
    assert [size for size, ours in zip(sizes, sized, strict=True) if ours != reference_size(*size)] == []
    protocol = {name: PROTOCOLS["reference"][name] for name in ("frame_pixels", "image_pixels")}
    for height, width in [(40, 60), (43, 100), (10, 10), (43, 1500), (300, 500), (900, 700)]:
        Image.new("L", (width, height)).save(tmp_path / "image.png")
        image = sample(tmp_path / "image.png", data_type="image")
        shown = read_media(image, as_sized(FrameBudget(**protocol)))
        assert shown.frames.shape[-2:] == reference_size(height, width), (height, width)
        assert read_media(image, FrameBudget()).frames.shape[-2] <= max(height, 28)


def test_frames_are_scaled_up_to_the_least_area(tmp_path):
    for number in range(4):
        Image.new("RGB", (100, 60)).save(tmp_path / f"{number}.png")
    for least, size in ((None, (224, 392)), (4 * 784, (56, 112)), (16 * 784, (112, 168))):
        media = read_media(sample(tmp_path), FrameBudget(least_pixels=least))
        assert media.frames.shape[-2:] == size


def test_resizing_is_that_of_the_qwen_processor():
    frames = torch.stack([torch.from_numpy(picture(n, 320, 180)).permute(2, 0, 1) for n in range(4)])
    pixels = 32 * 784
    processor = Qwen2VLVideoProcessor(size={"shortest_edge": pixels, "longest_edge": pixels})
    theirs = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    resized = resize(frames, *fitted_size(180, 320, pixels, 28))
    ours = processor(videos=[resized], do_resize=False, do_sample_frames=False, return_tensors="pt")
    assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])
    assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])


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


def grey_32_bit(most: int) -> Image.Image:
    return Image.fromarray(
        np.full((SIDE, SIDE), most // 2, np.int32) + np.eye(SIDE, dtype=np.int32) * most // 2
    )


def floats(most: float) -> Image.Image:
    return Image.fromarray(
        np.full((SIDE, SIDE), most / 2, np.float32) + np.eye(SIDE, dtype=np.float32) * most / 2
    )


MODES_OF_IMAGES = [
    (grey_16_bit, (0x80, 0x80, 0x80)),
    (half_transparent, (255, 204, 204)),  # a fifth of red on white
    (palette_with_transparency, (255, 255, 255)),
    (lambda: Image.new("1", (SIDE, SIDE), 1), (255, 255, 255)),
]


def twelve_bits() -> Image.Image:
    """[SIDE, SIDE] of 0x7F0, with the largest possible value in the tag MaxSampleValue."""
    image = Image.fromarray(np.full((SIDE, SIDE), 0x7F0, np.uint16))
    image.encoderinfo = {"tiffinfo": {281: 0xFFF}}
    return image


DEEP_GREYS = {
    # suffix, image, grey of a pixel that is half as bright as the brightest
    "16-bit PNG": ("png", lambda: grey_16_bit(), 0x80),
    "16-bit PGM": ("pgm", lambda: grey_16_bit(), 0x80),
    "dark 16-bit PGM": ("pgm", lambda: Image.fromarray(np.full((SIDE, SIDE), 0xFF, np.uint16)), 0),
    "int32 TIFF of 8 bits": ("tif", lambda: grey_32_bit(0xFE), 0x7F),
    "int32 TIFF": ("tif", lambda: grey_32_bit(2**30), 0x7F),
    "float TIFF, 0 to 1": ("tif", lambda: floats(1.0), 0x7F),
    "float TIFF, 0 to 255": ("tif", lambda: floats(254.0), 0x7F),
    "float TIFF, large": ("tif", lambda: floats(1e9), 0x7F),
    "float TIFF, -1 to 1": (
        "tif",
        lambda: Image.fromarray(np.eye(SIDE, dtype=np.float32) - np.eye(SIDE, dtype=np.float32)[::-1]),
        0x7F,
    ),
    "12-bit values in a TIFF of 16 bits": ("tif", lambda: twelve_bits(), 0x7F),
}


@pytest.mark.parametrize("name", DEEP_GREYS)
def test_greys_of_many_bits_are_scaled(tmp_path, name):
    suffix, make, grey = DEEP_GREYS[name]
    image = make()
    image.save(tmp_path / f"image.{suffix}", **getattr(image, "encoderinfo", {}))
    media = read_media(sample(tmp_path / f"image.{suffix}", "image"), SMALL)
    assert media.frames[0, :, 5, 6].tolist() == [grey] * 3


def test_a_tiff_of_12_bits_keeps_its_upper_eight(tmp_path):
    """Pillow writes none: two pixels of 0x7F0 are three bytes."""
    size, rows = SIDE.to_bytes(4, "little"), bytes([0x7F, 0x07, 0xF0]) * (SIDE * SIDE // 2)
    entries = {
        256: size,
        257: size,
        258: b"\x0c",
        259: b"\1",
        262: b"\1",
        273: b"\x7a",
        277: b"\1",
        278: size,
    }
    entries[279] = len(rows).to_bytes(4, "little")
    fields = [struct.pack("<HHI4s", tag, 4, 1, value.ljust(4, b"\0")) for tag, value in entries.items()]
    head = b"II*\0" + struct.pack("<IH", 8, len(fields)) + b"".join(fields) + bytes(4)
    assert len(head) == 0x7A
    (tmp_path / "a.tif").write_bytes(head + rows)
    assert read_media(sample(tmp_path / "a.tif", "image"), SMALL).frames.unique().tolist() == [0x7F]


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_with_damaged_exif_is_read_as_stored(tmp_path, suffix, exif):
    for name, fields in (("plain", {}), ("damaged", {"exif": exif})):
        Image.fromarray(picture(3)).save(tmp_path / f"{name}.{suffix}", **fields)
    plain, damaged = (
        read_media(sample(tmp_path / f"{n}.{suffix}", "image"), SMALL) for n in ("plain", "damaged")
    )
    assert torch.equal(plain.frames, damaged.frames)


# width, height, image_pixels -> width, height
IMAGE_SIZES = [
    ((56, 56), 100 * 784, (56, 56)),
    ((100, 60), 100 * 784, (84, 56)),
    ((20, 20), 100 * 784, (28, 28)),  # one multiple is the least
    ((560, 560), 100 * 784, (280, 280)),
    ((1000, 500), FrameBudget().image_pixels, (616, 308)),
]


@pytest.mark.parametrize(("size", "most", "expected"), IMAGE_SIZES)
def test_images_are_never_scaled_up(tmp_path, size, most, expected):
    Image.new("RGB", size).save(tmp_path / "image.png")
    media = read_media(sample(tmp_path / "image.png", "image"), FrameBudget(image_pixels=most))
    assert tuple(media.frames.shape[:-3:-1]) == expected
    assert FrameBudget().image_pixels == 256 * 28 * 28


@pytest.mark.parametrize(("make", "colour"), MODES_OF_IMAGES)
def test_images_of_any_mode_become_rgb(tmp_path, make, colour):
    make().save(tmp_path / "image.png")
    media = read_media(sample(tmp_path / "image.png", "image"), SMALL)
    assert media.frames.shape == (1, 3, SIDE, SIDE)
    assert media.frames[0, :, 5, 5].tolist() == list(colour)


def test_shuffled_orders_are_uniform_over_all_but_the_identity():
    generator = torch.Generator().manual_seed(0)
    counts = Counter(tuple(shuffled_order(3, generator).tolist()) for _ in range(5000))
    assert set(counts) == set(itertools.permutations(range(3))) - {(0, 1, 2)}
    assert all(abs(count - 1000) < 120 for count in counts.values())  # 4 standard deviations
    assert shuffled_order(2, generator).tolist() == [1, 0]
    with pytest.raises(ValueError, match="no order to shuffle"):
        shuffled_order(1, generator)
