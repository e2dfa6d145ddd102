"""The addresses of manifests: which there are, pages of their rows, counts of each kind, and media."""

import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from video_r1.data.manifests.records import Sample, question_digest
from video_r1.data.sources.archives import TAR, Part, split_member
from video_r1.data.sources.media_types import FOLDER_FPS, frame_names
from video_r1.data.sources.remote import local_file, open_remote_cache
from video_r1.errors import ConfigError, ManifestError, MediaError
from video_r1.report.run_data import as_list, as_table, finite, short_path, text
from video_r1.settings.filters import PASS_RATES, Keep, parse_keep
from video_r1.studio.answers import Answer, number
from video_r1.studio.finding import Finder
from video_r1.studio.manifest_index import COLUMNS, ManifestIndex, paths_of, pattern_of

OPEN_MANIFESTS = 12  # whose indexes are kept in memory
PAGE = 50  # rows of one answer
SEARCH_SECONDS = 1.0  # of one answer
TEXT = 2000  # characters of a field
_CACHE_BYTES = 50 * 10**9  # of the user's cache folder, where indexes of archives and copies of cells are
_MAGIC = (
    (0, b"\xff\xd8", ".jpg"), (0, b"\x89PNG", ".png"), (0, b"GIF8", ".gif"), (8, b"WEBP", ".webp"),
    (4, b"ftyp", ".mp4"), (0, b"\x1a\x45\xdf\xa3", ".webm"),
)  # fmt: skip
_PIECE = 1 << 18
_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?", re.ASCII)
_KEPT = {"cache-control": "private, max-age=600"}


class Manifests:
    """Indexes of the manifests that somebody looks at."""

    def __init__(self, finder: Finder) -> None:
        self.finder = finder
        self._open: dict[str, ManifestIndex] = {}
        self._lock = threading.Lock()

    def index(self, name: str | None) -> ManifestIndex:
        """Raises HTTPException 404 where there is no such manifest."""
        manifest = self.finder.manifests().get(name or "")
        if manifest is None:
            raise HTTPException(404, "there is no such manifest below the folders: it was moved or removed")
        with self._lock:
            index = self._open.pop(manifest.name, None)
            if index is None or index.manifest != manifest:
                try:
                    index = ManifestIndex(manifest)
                except ManifestError as error:
                    raise HTTPException(400, str(error)) from error
            self._open[manifest.name] = index
            while len(self._open) > OPEN_MANIFESTS:
                self._open.pop(next(iter(self._open)))
            return index

    def indexes(self, seconds: float = 0.5) -> list[ManifestIndex]:
        """Those of all manifests, as far as they are read; a little further with each call."""
        indexes = [self.index(name) for name in list(self.finder.manifests())[:OPEN_MANIFESTS]]
        for index in indexes:
            with index.lock:
                index.read(seconds)
        return indexes

    def sample(self, name: str | None, row: int) -> Sample:
        """A checked row. Raises HTTPException 404, and 422 for a row that cannot be used."""
        index = self.index(name)
        with index.lock:
            index.read(0.0)
            while row >= len(index) and index.tail.more:
                index.read()
            sample, problems = index.sample(row)
        if sample is None:
            raise HTTPException(422, f"row {row + 1} cannot be used: {'; '.join(problems)}"[:1000])
        return sample


def manifests(request: Request) -> Manifests:
    return request.app.state.manifests


def list_manifests(request: Request) -> Answer:
    found = manifests(request).finder.manifests()
    return Answer({"manifests": [{"name": m.name, "bytes": _size(m.path)} for m in found.values()]})


def rows(request: Request) -> Answer:
    """Rows that fit, 50 from number `at` of them on, and how far the index is.

    Asked for by `manifest`, `type`, `media`, `source`, `problems`, `keep` (on pass rates) and `words` (in any
    field; then `at` is the row where the search goes on).
    """
    asked = request.query_params
    wanted = {name: asked[name] for name in COLUMNS if name in asked}
    keep, words, at = _keep(asked.get("keep", "")), asked.get("words", "").strip(), number(asked, "at")
    index = manifests(request).index(asked.get("manifest"))
    with index.lock:
        index.read()
        chosen = index.chosen(wanted, asked.get("problems") == "1", keep)
        answer: dict[str, Any] = {
            "life": index.life, "rows": len(index), "more": index.tail.more, "notes": index.tail.notes,
            "behind": index.tail.behind, "bad": index.bad.count(1), "rates": sorted(index.rates),
        }  # fmt: skip
        if words:
            found, searched = _search(index, chosen[chosen >= at].tolist(), words)
            answer |= {"total": None, "next": searched}
        else:
            found = chosen[max(0, at) : max(0, at) + PAGE].tolist()
            after = at + PAGE
            answer |= {"total": len(chosen), "next": after if after < len(chosen) else None}
        answer["shown"] = [shown for row in found if (shown := _shown(index, row))]
        if asked.get("counts") == "1":
            answer["counts"] = index.counts()
    return Answer(answer)


def _search(index: ManifestIndex, chosen: list[int], words: str) -> tuple[list[int], int | None]:
    """Rows with the words, a page of them at most, and the row from which the search goes on."""
    pattern, until, found = pattern_of(words), time.monotonic() + SEARCH_SECONDS, []
    for row, line in index.lines(chosen):
        if pattern.search(line):
            found.append(row)
        if len(found) == PAGE or time.monotonic() > until:
            return found, row + 1
    return found, None


def _shown(index: ManifestIndex, number: int) -> dict[str, Any] | None:
    row = index.row(number)
    if row is None:
        return None
    sample, problems = index.sample(number) if index.bad[number] else (None, [])
    paths = paths_of(row)
    files: list[dict[str, float] | None] = [None] * len(paths)
    if sample is None and not problems:
        try:
            found = [index.places.find(path) for path in paths]
            files = [frames_of(file, row) for file in found]
            problems = [
                f"there is no file {short_path(path)}"
                for path, file in zip(paths, found, strict=True)
                if not os.path.exists(local_file(file) or file)
            ]
        except ValueError as error:
            problems = [str(error)]
    rates = {name: finite(rate) for name, rate in as_table(row.get(PASS_RATES)).items()}
    return {
        "row": number,
        "id": text(row.get("problem_id", ""))[:TEXT],
        "problem": text(row.get("problem", ""))[:TEXT],
        "type": text(row.get("problem_type", ""))[:TEXT],
        "media": text(row.get("data_type", ""))[:TEXT],
        "source": text(row.get("data_source", ""))[:TEXT],
        "options": [text(option)[:TEXT] for option in as_list(row.get("options"))[:50]],
        "answer": text(row.get("solution", ""))[:TEXT].removeprefix("<answer>").removesuffix("</answer>"),
        "process": text(row.get("process") or "")[:TEXT],
        "path": ", ".join(map(short_path, paths))[:TEXT],
        "files": files,  # what is known of each: frames_of
        "start": finite(row.get("start")),
        "end": finite(row.get("end")),
        "rates": {str(name)[:80]: rate for name, rate in rates.items() if rate is not None},
        "problems": [problem[:TEXT] for problem in problems],
    }


def frames_of(path: str, row: dict[str, Any]) -> dict[str, float] | None:
    """Of a folder of frames: how many (`count`), and how many of them a second (`fps`). Raises ValueError."""
    count = 0
    if os.path.isdir(path):
        count = len(frame_names(path))
    elif path.startswith(TAR) and local_file(path) and not os.path.splitext(path.partition("::")[0])[1]:
        try:
            parts = _places(path)
        except MediaError as error:
            raise ValueError(error.reason) from error
        count = len(parts) if isinstance(parts, list) else 0
    return {"count": count, "fps": finite(row.get("fps")) or FOLDER_FPS} if count else None


def _places(path: str) -> Part | list[Part]:
    """Where a member of an archive lies, or the copy of a cell of a table. Raises MediaError."""
    cache = open_remote_cache(None, _CACHE_BYTES)
    if path.startswith(TAR):
        return cache.part(path)
    with cache.file(path) as copy, open(copy, "rb") as file:
        head = file.read(12)
        ending = next((ending for at, magic, ending in _MAGIC if head[at:].startswith(magic)), "")
        return Part(copy, 0, file.seek(0, os.SEEK_END), f"cell{ending}")


def row_of(
    indexes: Sequence[ManifestIndex], problem_id: str, answer: str, question: str
) -> dict[str, Any] | None:
    """The row of a manifest that has this question, for a page that shows its clip. `others`: how many more
    there are that it may be and that show something else. Rows whose files are there come before the others.

    question: of `question_digest`; "" where it is not known, and only the name and the answer are compared.
    """
    playing: dict[object, tuple[ManifestIndex, int, Sample]] = {}
    missing: dict[object, tuple[ManifestIndex, int, Sample]] = {}
    for index in indexes:
        with index.lock:
            for row, sample in index.questions(problem_id):
                facts = (sample.problem, sample.options, sample.answer, sample.paths)
                own = question_digest(*facts)
                if sample.answer == answer and question in ("", own):
                    if _are_there(index, sample):
                        playing.setdefault((*sample.shown, *facts), (index, row, sample))
                    else:
                        missing.setdefault(own, (index, row, sample))
    if not (found := playing or missing):
        return None
    index, row, sample = next(iter(found.values()))
    with index.lock:
        return {**_clip_of(index, row, sample), "others": len(found) - 1}


def _are_there(index: ManifestIndex, sample: Sample) -> bool:
    """Whether its files are, as far as can be told without a request."""
    files = filter(None, map(local_file, sample.paths))
    return all(os.path.exists(os.path.join(index.manifest.path.parent, file)) for file in files)


def _clip_of(index: ManifestIndex, row: int, sample: Sample) -> dict[str, Any]:
    fields = index.row(row) or {}
    try:
        files = [frames_of(index.places.find(path), fields) for path in paths_of(fields)]
    except ValueError:  # the page says that it does not play
        files = [None] * len(sample.paths)
    return {
        "manifest": index.manifest.name,
        "row": row,
        "problem": sample.problem[:TEXT],
        "options": [option[:TEXT] for option in sample.options[:26]],
        "media": sample.data_type,
        "start": sample.start,
        "end": sample.end,
        "files": files,
    }


def clip(request: Request) -> Response:
    """A row's clip, or one that a browser has sent, as a file that plays (with Range). Of a row with several
    the one with the number `file`, of a folder of frames the one with the number `frame`."""
    asked = request.query_params
    if "upload" in asked:
        return media_file(request.app.state.uploads.path(asked["upload"]))
    paths = manifests(request).sample(asked.get("manifest"), number(asked, "row")).paths
    if not 0 <= number(asked, "file") < len(paths):
        raise HTTPException(404, f"the row has {len(paths)} files")
    found = paths[number(asked, "file")]
    if split_member(found):
        return member_file(found, number(asked, "frame"), request.headers.get("range"))
    path = Path(found)
    return media_file(path / _frame(path, number(asked, "frame")) if path.is_dir() else path)


def _frame(folder: Path, number: int) -> str:
    """The name of a frame by its number. Raises HTTPException."""
    try:
        names = frame_names(str(folder))
    except (ValueError, OSError) as error:
        raise HTTPException(415, f"the folder cannot be shown: {error}") from error
    if not 0 <= number < len(names):
        raise HTTPException(404, f"there is no frame {number}, only {len(names)}")
    return names[number]


def media_file(path: Path) -> Response:
    """A picture or video that a browser may show; nothing else, whatever a row says. Raises HTTPException."""
    kind = _kind(path.name)
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise HTTPException(404, "the clip is no plain file")
    except OSError as error:
        raise HTTPException(404, f"there is no file {path.name[:200]}") from error
    return FileResponse(path, media_type=kind, headers=_KEPT)


def member_file(path: str, frame: int, wanted: str | None) -> Response:
    """`media_file` of a member of a tar archive, or a cell of a table. frame: which one of a folder; wanted:
    the request's Range. Raises HTTPException.
    """
    try:
        part = _places(path)
    except MediaError as error:
        raise HTTPException(404, error.reason) from error
    if isinstance(part, list):
        if not 0 <= frame < len(part):
            raise HTTPException(404, f"there is no frame {frame}, only {len(part)}")
        part = part[frame]
    kind, begin, end = _kind(part.name), 0, part.size
    if match := _RANGE.fullmatch(wanted or ""):
        first, last = match.groups()
        begin = int(first) if first else max(0, part.size - int(last or 0))
        end = min(int(last) + 1, part.size) if first and last else part.size
        if begin >= end:
            raise HTTPException(416, f"the clip has {part.size} bytes")

    def pieces() -> Iterator[bytes]:
        with part.open() as file:
            file.seek(begin)
            for at in range(begin, end, _PIECE):
                yield file.read(min(_PIECE, end - at))

    headers = {**_KEPT, "accept-ranges": "bytes", "content-length": str(end - begin)}
    if match:
        headers["content-range"] = f"bytes {begin}-{end - 1}/{part.size}"
    return StreamingResponse(pieces(), 206 if match else 200, headers, kind)


def _kind(name: str) -> str:
    """The media type of what a browser shows. Raises HTTPException 415."""
    kind = guess_type(name)[0] or ""
    if not kind.startswith(("video/", "image/")) or kind == "image/svg+xml":
        raise HTTPException(415, f"{Path(name).suffix[:20]} is no video or image that a browser shows")
    return kind


def _keep(expression: str) -> Keep | None:
    if not expression.strip():
        return None
    try:
        return parse_keep(expression)
    except ConfigError as error:
        raise HTTPException(400, str(error)) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


ROUTES = [
    Route("/api/manifests", list_manifests),
    Route("/api/rows", rows),
    Route("/api/clip", clip),
]
