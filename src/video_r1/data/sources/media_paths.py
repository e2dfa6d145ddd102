"""Where the media of a manifest may lie: below the media root, in an allowed root, at an address."""

import functools
import glob
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from video_r1.availability import is_hub_id
from video_r1.data.sources.archives import TABLE, split_member
from video_r1.data.sources.media_types import IMAGE_EXTENSIONS, MANIFEST_EXTENSIONS
from video_r1.data.sources.remote import (
    below,
    check_schemes,
    folder_of,
    from_rows,
    hosts_of,
    is_address,
    on_this_machine,
    relative_to,
)
from video_r1.errors import ManifestError

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # C:\clips or \\server\clips; "x:y.mp4" is a name


def data_type_of(path: str) -> Literal["image", "video"]:
    """Tell image from video by the extension, or by the name of a table's column. Others are videos, and so
    is a GIF, unless it is a file on this machine that does not move.
    """
    if path.startswith(TABLE):
        return "image" if re.search("image|img|picture|photo", path.partition("::")[0].lower()) else "video"
    name = path.partition("::")[0].partition("?")[0] if is_address(path) else path
    ending = os.path.splitext(name)[1].lower()
    if ending == ".gif" and os.path.isfile(name):
        from PIL import Image

        with suppress(Exception), Image.open(name) as picture:  # damaged: its decoder says why
            return "video" if getattr(picture, "is_animated", True) else "image"
    return "image" if ending in IMAGE_EXTENSIONS else "video"


def is_pattern(source: str) -> bool:
    """Return whether `source` is a pattern of Parquet tables, here or at an address."""
    first = source.partition("::")[0]
    is_table = first.endswith(".parquet") and not first.startswith(("http://", "https://"))
    return is_table and glob.has_magic(first) and not os.path.exists(source)


def is_saved(folder: str) -> bool:
    """Return whether a folder is a Dataset or DatasetDict that `save_to_disk` wrote."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def media_root_of(source: object, media_root: str | Path | None) -> str:
    """Return the media root of a manifest, links followed, or its address.

    Default: the folder of the manifest's file (of a pattern: the deepest folder that contains all), the
    manifest itself if it is a folder or a hub dataset (above it if `save_to_disk` wrote it), or else the
    current folder.
    """
    source = on_this_machine(str(source)) if isinstance(source, (str, Path)) else ""
    if media_root is None:
        if os.path.isfile(source) or is_address(source) or is_pattern(source):
            above = folder_of if is_address(source) else os.path.dirname
            media_root = above(source)
            while is_pattern(source) and glob.has_magic(media_root):
                media_root = above(media_root)
        elif is_hub_id(source) and not (os.path.exists(source) or source.endswith(MANIFEST_EXTENSIONS)):
            return f"hf://datasets/{source}"
        else:
            media_root = source if os.path.isdir(source) else ""
            while is_saved(media_root):  # it has no files but its own: paths are those beside it
                media_root = os.path.dirname(media_root.rstrip("/")) or "."
    root = on_this_machine(str(media_root))
    return root if is_address(root) else os.path.realpath(root or ".")


def path_below(media_root: str, path: str) -> str:
    """Return a path relative to the media root; the whole path of a file outside it."""
    if is_address(path):
        below = relative_to(path, media_root)
        if below is None and (member := split_member(path)):
            return f"{member[0]}::{path_below(media_root, member[1])}"
        return below or path
    return os.path.relpath(path, media_root) if path.startswith(_inside(media_root)) else path


def _inside(root: str) -> str:
    return root.rstrip(os.sep) + os.sep


class MediaPaths:
    """Resolver of rows' paths to files below the media root or an allowed root.

    Raises ManifestError for an allowed root that is no folder.
    """

    def __init__(self, root: str, allow_urls: bool = False, allowed_roots: Sequence[str | Path] = ()) -> None:
        self.root = root
        for allowed in allowed_roots:
            if not os.path.isdir(allowed):
                raise ManifestError(f"allowed_roots: {allowed} is not a folder of this machine")
        self.allowed = tuple(_inside(os.path.realpath(allowed)) for allowed in allowed_roots)
        self.inside = (*(() if is_address(root) else (_inside(root),)), *self.allowed)
        self.allow_urls = allow_urls
        self._real = functools.cache(os.path.realpath)

    def find(self, path: str) -> str:
        """Return the absolute path of a row's file, links followed; of a member, its archive is resolved.
        Raise ValueError with the reason in words.
        """
        if (inside := split_member(path)) and relative_to(path, self.root) is None:
            return f"{inside[0]}::{self.find(inside[1])}"
        if path.startswith(("file://", "local://")):
            real = os.path.realpath(on_this_machine(path))
            return self._checked(real, path)
        if is_address(path):
            return self._address(path)
        if "\0" in path:
            raise ValueError(f"path {path!r} contains a null character")
        if os.path.isabs(path) and self.allowed:
            return self._checked(os.path.realpath(path), path)
        if os.path.isabs(path) or (
            _WINDOWS.match(path) and not os.path.lexists(os.path.join(self.root, path))
        ):
            raise ValueError(
                f"path {path!r} is absolute; it must be relative to the media root, "
                "or lie in a folder that allowed_roots names"
            )
        if is_address(self.root):
            return below(self.root, path)
        folder, name = os.path.split(path)
        real = os.path.join(self._real(os.path.join(self.root, folder)), name)
        if name in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(real)
        return self._checked(real, path)

    def _checked(self, real: str, path: str) -> str:
        if not real.startswith(self.inside):
            allowed = " and the allowed roots" if self.allowed else ""
            raise ValueError(
                f"path {path!r} leads out of the media root{allowed}; allowed_roots names further folders"
            )
        return real

    def _address(self, address: str) -> str:
        """Check an address outside the media root; those below it are the user's own."""
        if relative_to(address, self.root) is None:
            try:
                check_schemes(address, may_be_local=False)
            except ValueError as error:
                raise ValueError(f"path {address!r} {error}") from None
            if not self.allow_urls:
                raise ValueError(f"path {address!r} is a URL; these are refused unless allow_urls is set")
            from_rows.update(hosts_of(address) - hosts_of(self.root))
        return address
