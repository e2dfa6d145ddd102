"""Resized frames on disk, for work that reads the same clips again: SFT, RL, evaluation, and the next run.

    <folder>/ab/ab12….safetensors   the frames of one clip window under one budget, with a checksum

An entry's name is a digest of everything that decides its pixels: the file's path, size and modification time
(of a folder of frames: of every frame; of a table or archive: of the container), the window, the budget and
`VERSION`. Many processes may share a folder (bounded_folder.py). An entry that fails its checksum is removed,
and the clip is decoded again. Frames are not compressed: 16 frames at the training budget are 4.8 MB, at the
evaluation budget 9.6 MB.
"""

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from video_r1.data.decoding.decoders import read_media_at
from video_r1.data.decoding.media import Media
from video_r1.data.sources.archives import split_member
from video_r1.data.sources.bounded_folder import BoundedFolder
from video_r1.data.sources.media_types import ClipRef, ShowsClips, clip_of, frame_stamps
from video_r1.data.sources.remote import local_file, open_remote_cache
from video_r1.fingerprint import digest
from video_r1.settings.frames import FrameBudget

VERSION = 3  # raise it when the same file and budget give other pixels


class FrameCache(BoundedFolder):
    """A folder of decoded media of at most `limit` bytes. Safe for threads and processes."""

    def __init__(self, folder: str | Path, limit: int) -> None:
        super().__init__(folder, limit, "frame_cache")

    def read(self, source: ShowsClips, budget: FrameBudget, counts: Sequence[int]) -> list[Media]:
        """Return `read_media_at`; decode, in one pass, only the counts that are missing. Raise MediaError."""
        keys = {count: cache_key(source, budget, count) for count in counts}
        kept = ((count, self.get(key)) for count, key in keys.items() if key is not None)
        by_count = {count: media for count, media in kept if media is not None}
        wanted = [count for count in keys if count not in by_count]
        for count, media in zip(wanted, read_media_at(source, budget, wanted) if wanted else [], strict=True):
            by_count[count] = media
            if (key := keys[count]) is not None:
                self.put(key, media)
        return [by_count[count] for count in counts]

    def get(self, key: str) -> Media | None:
        """Return the media of an entry; None if there is none or it is damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                media = Media(
                    file.get_tensor("frames"),
                    file.get_tensor("timestamps"),
                    float(facts["duration"]),
                    facts["kind"],  # type: ignore[arg-type]
                )
            self.used(path)
            if facts["checksum"] == _checksum(media):
                return media
        except (FileNotFoundError, RuntimeError):  # RuntimeError: torch opens the file again, and it has gone
            return None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            pass
        path.unlink(missing_ok=True)
        return None

    def put(self, key: str, media: Media) -> None:
        """Store the media of an entry."""
        facts = {"duration": repr(media.duration), "kind": media.kind, "checksum": _checksum(media)}
        tensors = {"frames": media.frames.contiguous(), "timestamps": media.timestamps}
        self.store(self._path(key), save(tensors, facts))

    def _path(self, key: str) -> Path:
        return self.place(f"{key}.safetensors")


def open_frame_cache(folder: str | None, gigabytes: float) -> FrameCache | None:
    """Open the cache of the settings `frame_cache` and `frame_cache_gb`; None without a folder."""
    return None if folder is None else FrameCache(folder, int(gigabytes * 1e9))


def cache_key(source: ShowsClips, budget: FrameBudget, count: int) -> str | None:
    """Return the frame-cache key for at most `count` frames; None for a missing file."""
    clip = clip_of(source)
    if (state := file_state(clip, budget)) is None:
        return None
    rule: tuple[object, ...] = ("image", budget.image_pixels)
    if clip.data_type == "video":
        frames = (budget.fps, budget.min_frames, count)
        rule = ("video", budget.frame_pixels, *frames, clip.start, clip.end)
        rule = (*rule, clip.play) if clip.play != "forward" else rule
    rule = (*rule, budget.least_pixels) if budget.least_pixels else rule
    return digest((VERSION, clip.path, *state, budget.size_multiple, *rule), size=20)


def file_state(clip: ClipRef, budget: FrameBudget) -> tuple[object, ...] | None:
    """Return what changes when a file does: its size and time of change; None for a missing file. The file at
    an address never changes, except tables and archives.
    """
    if (local := local_file(clip.path)) is not None:
        try:
            facts = os.stat(local)
            if local != clip.path:  # inside that file, and perhaps a folder of frames there
                return facts.st_size, facts.st_mtime_ns, clip.fps
            if stat.S_ISDIR(facts.st_mode):
                return clip.fps, *frame_stamps(clip.path)
            return facts.st_size, facts.st_mtime_ns
        except OSError:
            return None
    if inside := split_member(clip.path):
        return open_remote_cache(budget.remote_cache, budget.remote_bytes).state(inside[1])
    return ()


def media_state(source: ShowsClips, budget: FrameBudget) -> str | None:
    """Return a digest of the `file_state` of a sample's files, wherever they lie; None if one is missing."""
    states = [file_state(clip, budget) for clip in source.files]
    return None if None in states else digest(states)


def _checksum(media: Media) -> str:
    digest = hashlib.sha256(f"{tuple(media.frames.shape)} {media.duration!r} {media.kind}".encode())
    digest.update(media.timestamps.numpy().data)
    digest.update(media.frames.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
