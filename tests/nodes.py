"""Two "machines": network namespaces with addresses of their own, joined by a virtual cable."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29511


class Nodes:
    """Start, kill and cut off what runs on two machines; `ip` needs the right to make namespaces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = tuple(f"video-r1-{os.getpid()}-{node}" for node in (0, 1))
        self.cables = tuple(f"vr{os.getpid() % 100000}-{node}" for node in (0, 1))
        self.logs = [folder / f"node-{node}.log" for node in (0, 1)]

    def join(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "netns", self.names[0], "type", "veth",
           "peer", "name", self.cables[1], "netns", self.names[1])  # fmt: skip
        for name, cable, address in zip(self.names, self.cables, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            for device in ("lo", cable):
                ip("-n", name, "link", "set", device, "up")

    def start(self, node: int, words: list[str]) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "GLOO_SOCKET_IFNAME": self.cables[node], "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }  # fmt: skip
        with self.logs[node].open("wb") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], sys.executable, "-m", *words],
                env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def switch_off(self, node: int) -> None:
        """kill -9 of everything on the machine."""
        for number in ip("netns", "pids", self.names[node]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-4000:] for log in self.logs if log.exists())

    def remove(self) -> None:
        for node, name in enumerate(self.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.switch_off(node)
                ip("netns", "delete", name)  # takes the cable with it


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Skips the test where the machine does not let it make networks."""
    if shutil.which("ip") is None:
        pytest.skip("no command ip (package iproute2)")
    nodes = Nodes(folder)
    try:
        try:
            nodes.join()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield nodes
    finally:
        nodes.remove()
