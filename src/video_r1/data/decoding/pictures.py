"""Pictures as Pillow reads them: an image, or a folder of frames as the clip that they are of."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from video_r1.data.decoding.clips import MAX_PIXELS, Clip, clip_window
from video_r1.data.sources.archives import Part, open_file
from video_r1.data.sources.media_types import FOLDER_FPS
from video_r1.errors import MediaError

# Formats of pictures. Pillow reads more, some of them by starting other programs (EPS).
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Brands of HEIF files that hold HEVC pictures, as phones take them.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def decode_frames(
    files: Sequence[tuple[str, str | Part]],
    fps: float | None,
    choose: Callable[[int, float], list[int]],
    finish: Callable[[Tensor], Tensor],
    start: float | None = None,
    end: float | None = None,
) -> Clip:
    """Run `decode_clip` for frames that are pictures, `fps` of them a second (None: FOLDER_FPS).

    files: name and place of each. Raises ValueError, with a reason in words.
    """
    fps = fps or FOLDER_FPS
    times = [place / fps for place in range(len(files))]
    first, last, duration = clip_window(times, 1 / fps, start, end)
    chosen = choose(last - first, fps)
    frames: list[Tensor] = []
    size: tuple[str, torch.Size] | None = None
    for index in chosen:
        name, file = files[first + index]
        try:
            picture = read_picture(file)
        except MediaError as error:
            raise ValueError(f"its frame {name}: {error.reason}") from error
        size = size or (name, picture.shape)
        if picture.shape != size[1]:
            sizes = [f"{shape[2]}×{shape[1]} ({of})" for of, shape in (size, (name, picture.shape))]
            raise ValueError(f"its frames have different sizes, {sizes[0]} and {sizes[1]}; make them alike")
        frames.append(finish(picture))
    return Clip(frames, [times[first + index] - (start or 0.0) for index in chosen], duration)


def read_picture(file: str | Part) -> Tensor:
    """Return [3, H, W] uint8 RGB, upright as EXIF says. Raise MediaError."""
    path = file if isinstance(file, str) else file.path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with open_file(file) as opened, Image.open(opened, formats=_image_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise MediaError(
                        path,
                        f"declares {image.width}×{image.height} pixels; at most {MAX_PIXELS:,} are decoded",
                    )
                pixels = np.asarray(_as_rgb(ImageOps.exif_transpose(image), image.format))
    except Image.DecompressionBombError as error:
        raise MediaError(path, f"declares more pixels than are decoded ({error})") from error
    except UnidentifiedImageError as error:
        reason = "is not an image in a format that Pillow reads"
        if _is_heic(file):
            reason = "is a HEIC picture, a format that Pillow does not read; convert it to JPEG or PNG"
        raise MediaError(path, reason) from error
    except ValueError as error:  # for example compressed text that unpacks to more than Pillow allows
        raise MediaError(path, f"the image is damaged or unpacks to too much ({error})") from error
    except (OSError, SyntaxError) as error:  # SyntaxError: a broken PNG
        raise MediaError(path, f"the image is damaged or cut short ({error})") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@cache
def _image_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _IMAGE_FORMATS if name in Image.OPEN)  # AVIF is not in every Pillow


def _is_heic(file: str | Part) -> bool:
    with open_file(file) as opened:
        head = opened.read(12)
    return head[4:8] == b"ftyp" and head[8:] in _HEIC


def _as_rgb(image: Any, file_format: str | None) -> Any:
    """Convert to RGB: transparency on white; greys of more than 8 bits are scaled, not clipped."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image, file_format)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Any, file_format: str | None) -> np.ndarray:
    """Return [H, W] uint8 of greys with more bits: 16 bits lose their lower eight.

    No file tells the range of 32-bit numbers. It is taken to be that of a share (floats only: 0 to 1), of 8
    or of 16 bits, the first that holds all of them, or else 0 to the largest.
    """
    values = np.nan_to_num(np.asarray(image, np.float64))
    most = values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PPM", "PNG")):
        scale = 1 / 256
    elif image.mode == "F" and most <= 1:
        scale = 255.0
    elif most <= 0xFF:
        scale = 1.0
    else:
        scale = 1 / 256 if most <= 0xFFFF else 255 / most
    return (values * scale).clip(0, 255).astype(np.uint8)
