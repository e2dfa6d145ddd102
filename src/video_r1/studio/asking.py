"""The addresses of questions: what can be asked, an answer as it is written, a clip from the browser, and the
row that a question becomes.
"""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from video_r1.data.answers import LETTERS
from video_r1.data.manifests.records import PROBLEM_TYPES, check_manifest
from video_r1.data.sources.media_paths import data_type_of
from video_r1.errors import ManifestError, RequestError
from video_r1.evaluation.ask import labelled, solution_of
from video_r1.files import append_line, draft_of
from video_r1.fingerprint import digest
from video_r1.report.run_data import as_list, as_table, finite, text, whole
from video_r1.settings.decoding import addresses, has_path
from video_r1.settings.frames import Contrast
from video_r1.studio.answers import Answer, body_of
from video_r1.studio.data import Manifests, manifests
from video_r1.studio.folders import Found
from video_r1.studio.tail import parse

MOST_SAMPLES, MOST_TOKENS = 64, 16_384
QUESTION = 20_000  # characters
ADDED = "asked.jsonl"  # the manifest that questions are added to
ADDED_CLIPS = "asked"  # the folder of clips that a browser has sent


def choices(request: Request) -> Answer:
    finder = manifests(request).finder
    return Answer({
        "checkpoints": list(finder.checkpoints()), "manifests": list(finder.manifests()),
        "types": list(PROBLEM_TYPES), "contrasts": list(get_args(Contrast)),
    })  # fmt: skip


async def ask(request: Request) -> Response:
    """The events of an answer as server-sent events; see answerer.py for what they are."""
    asked = await body_of(request)
    opened, question = await run_in_threadpool(_question, request, asked)
    engine = question["settings"]["engine"]
    keys = engine == "transformers" or origins_of(engine) <= request.app.state.key_origins

    async def lines() -> AsyncIterator[bytes]:
        async for event in request.app.state.model.ask(opened, question, keys):
            yield b"data: " + json.dumps(event).encode("ascii") + b"\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


def origins_of(engine: str) -> set[tuple[str, str, int]]:
    """Return scheme, host and port of each address of an engine: keys go only to origins that were named.

    Raises RequestError for what is no http:// or https:// address.
    """
    try:
        parts = [urlsplit(address) for address in addresses(engine)]
        return {(p.scheme, p.hostname or "", p.port or {"http": 80, "https": 443}[p.scheme]) for p in parts}
    except (KeyError, ValueError) as error:
        raise RequestError(
            f"{engine[:200]!r}: an engine's address begins with http:// or https://"
        ) from error


def _question(request: Request, asked: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What has to be open for a question, and the question as answerer.py takes it. Raises HTTPException."""
    said = text(asked.get("question", "")).strip()
    if not said or len(said) > QUESTION:
        raise HTTPException(400, "type a question" if not said else "the question is too long")
    model = _model(request, asked)
    path, window = _clip(request, as_table(asked.get("clip")))
    contrasts = [name for name in get_args(Contrast) if name in as_list(asked.get("contrasts"))]
    samples = min(MOST_SAMPLES, max(1, whole(asked.get("samples")) or 1))
    settings: dict[str, Any] = {
        **model, **window, "path": path, "question": [said], "samples": samples,
        "options": _options(asked), "max_new_tokens": min(MOST_TOKENS, whole(asked.get("tokens")) or 512),
    }  # fmt: skip
    if asked.get("type") in PROBLEM_TYPES:
        settings["problem_type"] = asked["type"]
    if answer := text(asked.get("answer", "")).strip():
        settings["answer"] = answer
    temperature = finite(asked.get("temperature"))
    if temperature is not None:
        settings |= {"temperature": temperature, "top_p": 1.0}
    opened = (*model.values(), _written(Path(model["model"])))
    return opened, {"settings": settings, "orders": ["ordered", *contrasts]}


def _model(request: Request, asked: dict[str, Any]) -> dict[str, str]:
    """The settings `model` and `engine`: a checkpoint of the list, or what an address serves."""
    folder = manifests(request).finder.checkpoints().get(text(asked.get("checkpoint", "")))
    address = text(asked.get("engine", "")).strip()
    if address:
        try:
            origins_of(address)
        except RequestError as error:
            raise HTTPException(400, str(error)) from error
        name = text(asked.get("model", "")).strip()  # none: the one that an endpoint serves
        if not name and not has_path(address):
            if folder is None:
                raise HTTPException(400, "choose the checkpoint that the vLLM server serves")
            name = str(folder)
        return {"model": name, "engine": address}
    if folder is None:
        raise HTTPException(404, "there is no such checkpoint below the folders: choose another")
    return {"model": str(folder), "engine": "transformers"}


def _clip(request: Request, clip: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The file of a question's clip, and its window, rate and further files where it has some."""
    if "upload" in clip:
        return str(request.app.state.uploads.path(text(clip["upload"]))), {}
    sample = manifests(request).sample(text(clip.get("manifest", "")), whole(clip.get("row")))
    more = {"start": sample.start, "end": sample.end, "clip_fps": sample.fps}
    more |= {"more_paths": [*sample.more_paths] or None}
    return sample.path, {name: value for name, value in more.items() if value is not None}


def _options(asked: dict[str, Any]) -> list[str]:
    options = [text(option).strip() for option in as_list(asked.get("options"))]
    return [option for option in options if option][: len(LETTERS)]


def _written(model: Path) -> int:
    """When a checkpoint's weights were written last: a training may replace them."""
    try:
        return max((path.stat().st_mtime_ns for path in model.glob("*.safetensors")), default=0)
    except OSError:
        return 0


async def upload(request: Request) -> Answer:
    """Takes a clip; the body is the file, `name` what it is called."""
    name = await request.app.state.uploads.take(request.query_params.get("name", ""), request.stream())
    return Answer({"upload": name})


async def add(request: Request) -> Answer:
    """Appends a question to the manifest `asked.jsonl` in the folder of its clip's manifest, or, for a clip
    that a browser has sent, in the first folder that was given, where the clip is kept.
    """
    asked = await body_of(request)
    async with request.app.state.adding:
        return Answer(await run_in_threadpool(_add, request, asked))


def _add(request: Request, asked: dict[str, Any]) -> dict[str, Any]:
    found: Manifests = manifests(request)
    clip = as_table(asked.get("clip"))
    source, _ = _clip(request, clip)
    row: dict[str, Any] = {"data_source": "studio"}
    if "upload" in clip:
        root = found.finder.library.roots[0]
        place, copied = Found("", root, root), root / ADDED_CLIPS / Path(source).name
        row["path"] = f"{ADDED_CLIPS}/{copied.name}"
        _keep_clip(Path(source), copied)
    else:
        index = found.index(text(clip.get("manifest", "")))
        place = index.manifest.found
        taken = index.row(whole(clip.get("row"))) or {}
        row |= {name: taken[name] for name in ("path", "start", "end", "fps", "data_type") if name in taken}
    row = _row(asked, source) | row
    row["problem_id"] = f"asked-{digest([row['path'], row['problem'], row['solution']], 6)}"
    target = place.folder / ADDED
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise HTTPException(409, f"{target} is a link or no plain file, so nothing is written to it")
    try:
        problems = check_manifest([row], place.folder).problems
    except ManifestError as error:
        raise HTTPException(400, str(error)) from error
    if problems:
        raise HTTPException(422, "; ".join(problem.text for problem in problems)[:2000])
    try:
        if target.exists():
            with target.open("rb") as file:
                if any((parse(line) or {}).get("problem_id") == row["problem_id"] for line in file):
                    raise HTTPException(409, f"this question is in {target} already")
        append_line(target, row)
    except OSError as error:
        raise HTTPException(507, f"{target} cannot be written: {error.strerror}") from error
    found.finder.looks_again()
    return {"manifest": str(target), "problem_id": row["problem_id"]}


def _row(asked: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields of a row that the question gives. Raises HTTPException 422 without an answer."""
    answer = text(asked.get("answer", "")).strip()
    if not answer:
        raise HTTPException(422, "a row of a manifest needs the right answer: fill it in")
    kind = asked.get("type") if asked.get("type") in PROBLEM_TYPES else None
    try:
        options = list(labelled(_options(asked)))
        kind = kind or ("multiple choice" if options else "free-form")
        solution = solution_of(answer, kind, options)
    except RequestError as error:
        raise HTTPException(422, str(error)) from error
    return {
        "problem": text(asked.get("question", "")).strip()[:QUESTION],
        "problem_type": kind,
        "data_type": data_type_of(source),
        "options": options,
        "solution": solution,
    }


def _keep_clip(source: Path, copied: Path) -> None:
    """Copies the clip, whole or not at all. Raises HTTPException."""
    try:
        copied.parent.mkdir(exist_ok=True)
        if copied.parent.is_symlink() or copied.is_symlink():
            raise HTTPException(409, f"{copied} is or lies in a link, so nothing is written to it")
        if not copied.exists():
            with draft_of(copied) as draft:
                shutil.copyfile(source, draft)
    except OSError as error:
        raise HTTPException(507, f"{copied} cannot be written: {error.strerror}") from error


ROUTES = [
    Route("/api/choices", choices),
    Route("/api/ask", ask, methods=["POST"]),
    Route("/api/upload", upload, methods=["POST"]),
    Route("/api/add", add, methods=["POST"]),
]
