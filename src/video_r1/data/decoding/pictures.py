"""Images, and folders of frames as clips, read with Pillow."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE
from torch import Tensor

from video_r1.data.decoding.clips import MAX_PIXELS, Choose, Clip, Finish, choose_frames
from video_r1.data.sources.archives import Part
from video_r1.data.sources.media_types import FOLDER_FPS, ClipRef

# Pillow reads more formats, some of them by starting other programs (EPS).
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # pages of a TIFF and second views of a JPEG are no animation
_MAX_SAMPLE_VALUE = 281  # TIFF's tag


def decode_frames(files: Sequence[Part], clip: ClipRef, choose: Choose, finish: Finish) -> Clip:
    """Run `decode_clip` for frames that are pictures. Raise ValueError with a reason in words."""
    fps = clip.fps or FOLDER_FPS
    times = [place / fps for place in range(len(files))]
    chosen, chosen_times, duration = choose_frames(times, 1 / fps, clip, choose, fps)
    frames: list[Tensor] = []
    sizes: dict[torch.Size, str] = {}
    for file in (files[index] for index in chosen):
        try:
            picture = read_picture(file)
        except ValueError as error:
            raise ValueError(f"its frame {file.name}: {error}") from error
        sizes.setdefault(picture.shape, file.name)
        if len(sizes) > 1:
            shapes = " and ".join(f"{shape[2]}×{shape[1]} ({of})" for shape, of in sizes.items())
            raise ValueError(f"its frames have different sizes, {shapes}; make them alike")
        frames.append(finish(picture))
    return Clip(frames, chosen_times, duration)


def read_picture(file: Part | Image.Image) -> Tensor:
    """Return [3, H, W] uint8 RGB of a file or an open picture, upright as EXIF says. Raise ValueError with a
    reason in words.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            is_open = isinstance(file, Image.Image)
            opened = (
                nullcontext(file) if is_open else Image.open(BytesIO(file.read()), formats=_image_formats())
            )
            with opened as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width}×{image.height}; limit {MAX_PIXELS:,}")
                frames = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
                image.load()
                pixels = np.asarray(upright(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"declares more pixels than are decoded ({error})") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            "is not an image in a format that Pillow reads; convert it (HEIC, for example) to JPEG or PNG"
        ) from error
    except ValueError as error:  # for example compressed text that unpacks to more than Pillow allows
        raise ValueError(f"the image is damaged or unpacks to too much ({error})") from error
    except (OSError, SyntaxError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"the image is damaged or cut short ({error})") from error
    if frames > 1:
        raise ValueError(
            f"is an animation of {frames} frames, of which an image shows only the first: save that frame as "
            "a picture, or the clip as a video (MP4 or GIF, data_type video)"
        )
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@cache
def _image_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _IMAGE_FORMATS if name in Image.OPEN)  # AVIF is not in every Pillow


def upright(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, upright as EXIF says: transparency on white; greys of more than 8 bits are
    scaled, not clipped.
    """
    with suppress(Exception):  # damaged EXIF: the picture is read as stored
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Any) -> np.ndarray:
    """Return [H, W] uint8 of greys with more bits: 16 bits lose their lower eight, 12 bits their lower four.

    Files do not state the range of 32-bit numbers. It is taken to be 0 to 1 (floats only), 8 or 16 bits, the
    first that holds all of them, or else the smallest (at most 0) to the largest.
    """
    values = np.nan_to_num(np.asarray(image, np.float64))
    least, most = min(values.min(), 0.0), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        tags = getattr(image, "tag_v2", {})
        (bits,), (largest,) = tags.get(BITSPERSAMPLE, (16,))[:1], tags.get(_MAX_SAMPLE_VALUE, (0,))[:1]
        least, scale = 0.0, 256 / ((largest or 2**bits - 1) + 1)
    elif least < 0:
        scale = 255 / (most - least)
    elif image.mode == "F" and most <= 1:
        scale = 255.0
    elif most <= 0xFF:
        scale = 1.0
    else:
        scale = 1 / 256 if most <= 0xFFFF else 255 / most
    return ((values - least) * scale).clip(0, 255).astype(np.uint8)
