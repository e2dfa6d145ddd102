"""Questions to a model: the choices, an answer as it is written, sent clips, and rows made of questions."""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, get_args
from urllib.parse import urlsplit

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from video_r1.data.answers import LETTERS
from video_r1.data.manifests.problem_types import PROBLEM_TYPES
from video_r1.data.manifests.records import check_manifest
from video_r1.data.sources.media_paths import data_type_of
from video_r1.data.sources.remote import local_file
from video_r1.errors import ManifestError, RequestError
from video_r1.evaluation.ask import labelled, solution_of
from video_r1.files import append_line, draft_of
from video_r1.fingerprint import digest, model_stamps
from video_r1.report.values import as_list, as_table, finite, parse, text, whole
from video_r1.settings.decoding import addresses, has_path
from video_r1.settings.frames import Contrast
from video_r1.studio.manifests import asked_clip
from video_r1.studio.requests import Answer, body_of

MOST_SAMPLES, MOST_TOKENS = 64, 16_384
QUESTION = 20_000  # characters
ADDED = "asked.jsonl"  # the manifest that questions are added to
ADDED_CLIPS = "asked"  # the folder of clips that a browser has sent
LINE = 64 << 20  # bytes of an event: the frames of a long clip
ANSWERER = (sys.executable, "-m", "video_r1.studio.answerer")
STOPPING = 5.0  # seconds a model has to stop before its process is killed
SECRETS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")  # ends of variables' names
TOLD = 2000  # bytes of a dead process's last messages


class ModelProcess:
    """The one open model, in a process of its own (answerer.py); used on the server's event loop.

    Another model, or other settings of it, replaces the process: all memory is freed, and a model that takes
    the process down leaves the page as it is.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._opened: tuple[Any, ...] = ()
        self._said: BinaryIO | None = None  # standard error

    async def ask(
        self, opened: tuple[Any, ...], asked: Mapping[str, Any], keys: bool = True
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of one question; the last is `end`, or `error` if the process died.

        opened: identifies the model; a process with another one is replaced. keys: whether the process gets
        the API keys of the environment. A caller that stops listening stops the answer.
        """
        async with self._turn:
            process = await self._started(opened, keys)
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            ended = False
            try:
                while line := await process.stdout.readline():
                    event = json.loads(line)
                    ended = event["event"] == "end"
                    yield event
                    if ended:
                        return
                ended = True
                yield {"event": "error", "error": await self._why_it_ended()}
            finally:
                if not ended:
                    with anyio.CancelScope(shield=True):
                        await self._stop(process)

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        """Stop the answer, or the process if the answer does not end in time: it may wait for a server."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b'"stop"\n')
        try:
            async with asyncio.timeout(STOPPING):
                while line := await process.stdout.readline():
                    if json.loads(line)["event"] == "end":
                        return
        except TimeoutError:
            await self.close()

    async def _started(self, opened: tuple[Any, ...], keys: bool) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None and self._opened == opened:
            return self._process
        await self.close()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._opened = opened
        self._process = await asyncio.create_subprocess_exec(
            *ANSWERER, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=self._said, limit=LINE, start_new_session=True,
            env={name: value for name, value in os.environ.items() if keys or not name.endswith(SECRETS)},
        )  # fmt: skip
        return self._process

    async def _why_it_ended(self) -> str:
        assert self._process is not None and self._said is not None
        code = await self._process.wait()
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - TOLD))
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", as the system does when memory runs out"
        last = f": {lines[-1]}" if lines else ""
        return f"the model's process ended {how}{last}. The next question starts another one"

    async def close(self) -> None:
        """Kill the process and free its memory."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._said is not None:
            self._said.close()
        self._process = self._said = None


def choices(request: Request) -> Answer:
    library = request.app.state.library
    return Answer({
        "checkpoints": list(library.checkpoints()), "manifests": list(library.manifests()),
        "types": list(PROBLEM_TYPES), "contrasts": list(get_args(Contrast)),
    })  # fmt: skip


async def ask(request: Request) -> Response:
    """Answer a question with server-sent events; answerer.py lists them."""
    asked = await body_of(request)
    opened, question = await run_in_threadpool(_question, request, asked)
    engine = question["settings"]["engine"]
    keys = engine == "transformers" or origins_of(engine) <= request.app.state.key_origins

    async def lines() -> AsyncIterator[bytes]:
        async for event in request.app.state.model.ask(opened, question, keys):
            yield b"data: " + json.dumps(event).encode("ascii") + b"\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


def origins_of(engine: str) -> set[tuple[str, str, int]]:
    """Return scheme, host and port of each address of an engine: API keys go only to named origins.

    Raises RequestError for text that is no http:// or https:// address.
    """
    try:
        parts = [urlsplit(address) for address in addresses(engine)]
        return {(p.scheme, p.hostname or "", p.port or {"http": 80, "https": 443}[p.scheme]) for p in parts}
    except (KeyError, ValueError) as error:
        message = f"{engine[:200]!r}: an engine's address begins with http:// or https://"
        raise RequestError(message) from error


def _question(request: Request, asked: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what identifies the model, and the question as answerer.py takes it. Raises HTTPException."""
    said = text(asked.get("question", "")).strip()
    if not said or len(said) > QUESTION:
        raise HTTPException(400, "type a question" if not said else "the question is too long")
    model = _model(request, asked)
    path, window = _clip(request, as_table(asked.get("clip")))
    # A question of text alone has no path: nothing to reorder or to look at.
    contrasts = [name for name in get_args(Contrast) if path and name in as_list(asked.get("contrasts"))]
    settings: dict[str, Any] = {
        **model, **window, "path": path, "question": [said], "options": _options(asked),
        "samples": min(MOST_SAMPLES, max(1, whole(asked.get("samples")))),
        "max_new_tokens": min(MOST_TOKENS, whole(asked.get("tokens")) or 512),
    }  # fmt: skip
    if path and asked.get("tools") is True:
        settings["tools"] = "look"
    if asked.get("type") in PROBLEM_TYPES:
        settings["problem_type"] = asked["type"]
    if answer := text(asked.get("answer", "")).strip():
        settings["answer"] = answer
    temperature = finite(asked.get("temperature"))
    if temperature is not None:
        settings |= {"temperature": temperature, "top_p": 1.0}
    written = model_stamps(Path(model["model"]))  # a training may replace the checkpoint's weights
    return (*model.values(), *written, "tools" in settings), {
        "settings": settings,
        "orders": ["ordered", *contrasts],
    }


def _model(request: Request, asked: dict[str, Any]) -> dict[str, str]:
    """Return the settings `model` and `engine`: a checkpoint of the list, or the model at an address."""
    folder = request.app.state.library.checkpoints().get(text(asked.get("checkpoint", "")))
    address = text(asked.get("engine", "")).strip()
    if address:
        try:
            origins_of(address)
        except RequestError as error:
            raise HTTPException(400, str(error)) from error
        name = text(asked.get("model", "")).strip()  # none: the only one that an endpoint serves
        if not name and not has_path(address):
            if folder is None:
                raise HTTPException(400, "choose the checkpoint that the vLLM server serves")
            name = str(folder)
        return {"model": name, "engine": address}
    if folder is None:
        raise HTTPException(404, "there is no such checkpoint below the folders: choose another")
    return {"model": str(folder), "engine": "transformers"}


def _clip(request: Request, clip: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the file of a question's clip ("" for text alone), its window, rate and further files."""
    if "upload" in clip:
        return str(request.app.state.uploads.path(text(clip["upload"]))), {}
    sample = request.app.state.manifests.sample(text(clip.get("manifest", "")), whole(clip.get("row")))
    more = {"start": sample.start, "end": sample.end, "clip_fps": sample.fps, "play": sample.play}
    more |= {"more_paths": [*sample.more_paths] or None}
    return sample.path, {name: value for name, value in more.items() if value is not None}


def _options(asked: dict[str, Any]) -> list[str]:
    options = [text(option).strip() for option in as_list(asked.get("options"))]
    return [option for option in options if option][: len(LETTERS)]


async def stills(request: Request) -> Answer:
    """Answer the frames that a model gets of a file which the browser does not play. Raises HTTPException."""
    clip = await run_in_threadpool(asked_clip, request)
    if local_file(clip.path) is None:
        raise HTTPException(404, "the file is not on this machine")
    events = request.app.state.decoder.ask((), {"clip": asdict(clip)}, keys=False)
    found, *_ = [event async for event in events]  # to the end, so that the process takes the next one
    return Answer(found, 415 if "error" in found else 200)


async def upload(request: Request) -> Answer:
    """Take a clip: the body is the file, `name` its name."""
    name = await request.app.state.uploads.take(request.query_params.get("name", ""), request.stream())
    return Answer({"upload": name})


async def add(request: Request) -> Answer:
    """Append a question to the manifest `asked.jsonl`.

    The manifest is in the folder of the clip's manifest; for a sent clip, in the first folder that was given,
    where the clip is kept too.
    """
    asked = await body_of(request)
    async with request.app.state.adding:
        return Answer(await run_in_threadpool(_add, request, asked))


def _add(request: Request, asked: dict[str, Any]) -> dict[str, Any]:
    clip = as_table(asked.get("clip"))
    source, _ = _clip(request, clip)
    row: dict[str, Any] = {"data_source": "studio"}
    if "upload" in clip:
        folder = request.app.state.library.roots[0]
        row["path"] = f"{ADDED_CLIPS}/{Path(source).name}"
        keep_clip(Path(source), folder / row["path"])
    else:
        index = request.app.state.manifests.index(text(clip.get("manifest", "")))
        folder = index.manifest.found.folder
        taken = index.row(whole(clip.get("row"))) or {}
        row |= {
            name: taken[name]
            for name in ("path", "start", "end", "fps", "data_type", "play")
            if name in taken
        }
    row = _row(asked, source) | row
    row["problem_id"] = f"asked-{digest([row.get('path'), row['problem'], row['solution']], 6)}"
    target = folder / ADDED
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise HTTPException(409, f"{target} is a link or no regular file, so nothing is written to it")
    try:
        problems = check_manifest([row], folder).problems
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
    request.app.state.library.files.renew()
    return {"manifest": str(target), "problem_id": row["problem_id"]}


def _row(asked: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of a row that the question gives. Raises HTTPException 422 without an answer."""
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
        "problem": text(asked.get("question", "")).strip()[:QUESTION], "problem_type": kind,
        "data_type": data_type_of(source), "options": options, "solution": solution,
    }  # fmt: skip


def keep_clip(source: Path, copied: Path) -> None:
    """Copy a clip, whole or not at all. Raises HTTPException."""
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
    Route("/api/stills", stills),
    Route("/api/upload", upload, methods=["POST"]),
    Route("/api/add", add, methods=["POST"]),
]
