"""The one model that is open for questions, in a process of its own (answerer.py).

Another model, or other settings of it, ends the process and begins another: what the last one held is given
back as a whole, and a model that takes the process down leaves the page as it is.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping
from typing import Any, BinaryIO

LINE = 64 << 20  # bytes of an event: the frames of a long clip
ANSWERER = (sys.executable, "-m", "video_r1.studio.answerer")
STOPPING = 5.0  # seconds that a model has to stop; then its process is ended
SECRETS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")  # ends of names of variables
TOLD = 2000  # bytes of what a process that ended has said last


class ModelProcess:
    """Questions to a process, one at a time. Used on the server's event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._opened: tuple[Any, ...] = ()
        self._said: BinaryIO | None = None  # its standard error
        self._number = 0
        self._unended: int | None = None  # the question whose answer nobody waited for

    async def ask(
        self, opened: tuple[Any, ...], asked: Mapping[str, Any], keys: bool = True
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events of one question, as they come; the last is `end`, or `error` of a process that is gone.

        opened: what the process was begun for; one that was begun for something else is replaced. A caller
        that stops listening stops the answer. keys: whether the process gets the API keys of the environment.
        """
        async with self._turn:
            process = await self._free(opened, keys)
            assert process.stdin is not None and process.stdout is not None
            self._number = number = self._number + 1
            process.stdin.write(json.dumps({"number": number, **asked}).encode() + b"\n")
            ended = False
            try:
                while line := await process.stdout.readline():
                    event = json.loads(line)
                    if event.pop("number") != number:  # of an answer that nobody waited for
                        continue
                    ended = event["event"] == "end"
                    yield event
                    if ended:
                        return
                ended = True
                yield {"event": "error", "error": await self._why_it_ended()}
            finally:
                if not ended and process.returncode is None:
                    self._unended = number
                    process.stdin.write(json.dumps({"stop": number}).encode() + b"\n")

    async def _free(self, opened: tuple[Any, ...], keys: bool) -> asyncio.subprocess.Process:
        """The process, done with the answer that was stopped. One that does not stop is ended: it may wait
        for a server that says nothing.
        """
        process = await self._begun(opened, keys)
        if self._unended is None:
            return process
        assert process.stdout is not None
        try:
            async with asyncio.timeout(STOPPING):
                while line := await process.stdout.readline():
                    event = json.loads(line)
                    if (event["number"], event["event"]) == (self._unended, "end"):
                        break
        except TimeoutError:
            await self.close()
        self._unended = None
        return await self._begun(opened, keys)

    async def _begun(self, opened: tuple[Any, ...], keys: bool) -> asyncio.subprocess.Process:
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
        return f"the model's process was ended {how}{last}. The next question begins another"

    async def close(self) -> None:
        """Ends the process, with all that it holds."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._said is not None:
            self._said.close()
        self._process = self._said = self._unended = None
