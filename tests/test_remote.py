"""Manifests and media at addresses: what a row may name, local copies, their limit, and what breaks off."""

from __future__ import annotations

import http.server
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from media_files import SMALL, sample, write_video
from PIL import Image

from video_r1.cli import main
from video_r1.data.check import check_media
from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.frame_cache import FrameCache
from video_r1.data.manifests.records import check_manifest, load_manifest
from video_r1.data.sources import remote
from video_r1.data.sources.media_paths import media_root_of, path_below
from video_r1.data.sources.remote import NoAnswer, RemoteCache, below, folder_of, is_address, relative_to
from video_r1.errors import ConfigError, ManifestError, MediaError, VideoR1Error

LARGE = 10**9
pytestmark = pytest.mark.usefixtures("own_copies")

ROW = {
    "problem_id": 1, "problem": "What?", "data_type": "video", "problem_type": "free-form",
    "solution": "<answer>x</answer>", "path": "clip.mp4",
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("media") / "clip.mp4", 50)


class Handler(http.server.BaseHTTPRequestHandler):
    """The path says what becomes of a request; `asked` counts them."""

    content: bytes
    asked: Counter[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.strip("/").partition(".")[0]
        self.asked[name] += 1
        status = {"missing": 404, "secret": 403, "odd": 418}.get(name, 200)
        if name == "broken" or (name == "once" and self.asked[name] == 1):
            self.close_connection = True
        if name == "busy" and self.asked[name] < 3:
            status = 503
        if name == "redirect":
            self.send_response(302)
            port = self.headers["Host"].rpartition(":")[2]
            self.send_header("Location", f"http://127.0.0.1:{port}/secret.mp4")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if name == "silent":
            time.sleep(5)
            self.close_connection = True
            return
        body = self.content if status == 200 else b"no"
        self.send_response(status)
        if name == "open":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if name == "broken" or (name == "once" and self.asked[name] == 1):
            self.wfile.write(body[: len(body) // 2])
            return
        for start in range(0, len(body), 1 + len(body) // 10):
            self.wfile.write(body[start : start + 1 + len(body) // 10])
            self.wfile.flush()
            time.sleep(0.05 if name.startswith("slow") else 0)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # whoever asked has had enough
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(clip: Path) -> Iterator[tuple[str, Counter[str]]]:
    asked: Counter[str] = Counter()
    handler = type("Handler", (Handler,), {"content": clip.read_bytes(), "asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def kept(folder: Path) -> list[Path]:
    """All files of a cache, drafts and locks too."""
    return sorted(path for path in folder.glob("??/*") if path.is_file())


@pytest.mark.parametrize(
    ("root", "path", "address"),
    [
        ("s3://bucket/clips", "a/1.mp4", "s3://bucket/clips/a/1.mp4"),
        ("s3://bucket/clips/", "./1.mp4", "s3://bucket/clips/1.mp4"),
        ("memory://", "1.mp4", "memory://1.mp4"),
        ("zip://::s3://bucket/clips.zip", "a/1.mp4", "zip://a/1.mp4::s3://bucket/clips.zip"),
        ("zip://a::https://host/x.zip", "1.mp4", "zip://a/1.mp4::https://host/x.zip"),
    ],
)
def test_paths_below_an_address(root: str, path: str, address: str) -> None:
    assert below(root, path) == address
    assert relative_to(address, root) == path.removeprefix("./")
    assert path_below(root, address) == path.removeprefix("./")


def test_what_is_an_address() -> None:
    assert all(map(is_address, ("s3://a/b", "simplecache::https://a/b", "dir://x::memory://y", "a+b://c")))
    assert not any(map(is_address, ("a.mp4", "/a/b.mp4", "C:\\a", "a::b.mp4", Path("s3://a"), None, "://x")))
    for path in ("..", "../x", "a/../..", "../clips2/x", "%2e%2e/x", "a/%2E%2E/../x", "", ".", "/x"):
        with pytest.raises(ValueError, match="leads out"):
            below("s3://bucket/clips", path)
    for address in ("s3://bucket/clips2/x", "s3://bucket/clips/../x", "s3://bucket/clips/%2e%2e/x", "hf://x"):
        assert relative_to(address, "s3://bucket/clips") is None
    assert folder_of("https://host/data/train.json?x=a/b") == "https://host/data"
    assert folder_of("zip://train.json::s3://b/x.zip") == "zip://::s3://b/x.zip"
    assert media_root_of("s3://b/sets/train.json", None) == "s3://b/sets"


def test_what_a_row_may_name(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    inside = (tmp_path / "clips" / "a.mp4").resolve()
    cases: list[tuple[str, str, str]] = [  # path, said without allow_urls, said with it
        ("https://host/a.mp4?x=1", "refused unless allow_urls is set", ""),
        ("s4://bucket/a.mp4", "unknown scheme, s4://", "unknown scheme, s4://"),
        ("memory://a.mp4", "refused unless allow_urls", ""),
        ("memory://a.mp4/../b.mp4", "refused unless allow_urls", ""),
        (f"file://{inside}", "", ""),
        ("file:///etc/passwd", "leads out of the media root", "leads out of the media root"),
        (f"file://{tmp_path}/clips/../../x.mp4", "leads out", "leads out"),
        ("zip://a.mp4::file:///etc/x.zip", "reads files of this machine", "reads files of this machine"),
        ("zip://a.mp4::/etc/x.zip", "unknown scheme", "unknown scheme"),
        ("reference::https://host/a.json", "reads files of this machine", "reads files of this machine"),
        ("simplecache::https://host/a.mp4", "refused unless allow_urls", ""),
    ]
    for allowed in (False, True):
        rows = [ROW | {"problem_id": number, "path": path} for number, (path, *_) in enumerate(cases)]
        (tmp_path / "train.json").write_text(json.dumps(rows))
        found = check_manifest(tmp_path / "train.json", allow_urls=allowed)
        said = {problem.problem_id: problem.text for problem in found.problems}
        for number, (path, *texts) in enumerate(cases):
            text = said.get(number, "")
            assert texts[allowed] in text and bool(text) == bool(texts[allowed]), path
        paths = [question.path for question in found.samples]
        assert str(inside) in paths and (cases[0][0] in paths) == allowed


@pytest.mark.parametrize(
    "address", ["http://169.254.169.254/a.mp4", "http://localhost:9/a.mp4", "ftp://127.0.0.1/a.mp4"]
)
def test_rows_do_not_lead_to_this_machine_or_its_network(address: str, tmp_path: Path) -> None:
    for root, refused in ((tmp_path, True), (address.rpartition("/")[0], False)):
        remote.from_rows.clear()
        (found,), *_ = check_manifest([ROW | {"path": address}], root, allow_urls=True)
        assert bool(remote.from_rows) == refused
        if refused:
            with pytest.raises(MediaError, match="leads to this machine or its network") as error:
                read_media(found, SMALL)
            assert error.value.path == address
    for ip in ("::1", "::ffff:10.0.0.1", "fe80::1%eth0", "0.0.0.0", "100.64.0.1"):
        with pytest.raises(MediaError):
            remote.require_public(ip)


@pytest.mark.parametrize("by", ["redirect", "DNS"])
def test_nor_after_a_redirect_or_another_answer_of_dns(
    server: tuple[str, Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """example.org stands for a public host: the server here, whose address counts as public until then."""
    real, port = socket.getaddrinfo, server[0].rpartition(":")[2]
    asked = Counter[str]()

    def answer(host: Any, *rest: Any, **options: Any) -> Any:
        asked[str(host)] += 1
        own = by == "redirect" or asked[str(host)] > 1
        return real(("127.0.0.1" if own else "1.1.1.1") if host == "example.org" else host, *rest, **options)

    def require_public(ip: str, allowed: int = 2) -> None:
        if by == "redirect" and asked["checks"] < allowed:  # of the address, and of the first connection
            asked["checks"] += 1
            return
        check(ip)

    check = remote.require_public
    monkeypatch.setattr(socket, "getaddrinfo", answer)
    monkeypatch.setattr(remote, "require_public", require_public)
    monkeypatch.setattr(remote, "getproxies", dict)
    (found,), *_ = check_manifest(
        [ROW | {"path": f"http://example.org:{port}/{by}.mp4"}], tmp_path, allow_urls=True
    )
    with pytest.raises(MediaError, match="leads to this machine or its network"):
        read_media(found, replace(SMALL, remote_cache=str(tmp_path / "copies")))
    assert server[1]["secret"] == 0 and server[1]["DNS"] == 0


def test_a_row_below_an_address_that_the_user_named(memory: Any) -> None:
    rows = [ROW | {"problem_id": n, "path": p} for n, p in enumerate(["a.mp4", "memory://clips/b.mp4"])]
    rows += [ROW | {"problem_id": 2, "path": "../c.mp4"}, ROW | {"problem_id": 3, "path": "memory://d.mp4"}]
    rows += [ROW | {"problem_id": 4, "path": "file:///etc/passwd"}]
    memory.pipe("/clips/train.jsonl", "\n".join(map(json.dumps, rows)).encode())
    for root in (None, "memory://clips", "memory://clips/"):
        found = check_manifest("memory://clips/train.jsonl", root)
        assert [question.path for question in found.samples] == [
            "memory://clips/a.mp4",
            "memory://clips/b.mp4",
        ]
        texts = ["leads out", "refused unless allow_urls", "leads out"]
        assert all(text in p.text for text, p in zip(texts, found.problems, strict=True))


def test_a_scheme_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    (tmp_path / "train.json").write_text(json.dumps([ROW | {"path": "s3://bucket/a.mp4"}, ROW]))
    said = "s3:// needs a package that is not installed: Install s3fs"
    for read in (
        lambda: load_manifest(tmp_path / "train.json", allow_urls=True),
        lambda: load_manifest(tmp_path / "train.json", "s3://bucket"),
        lambda: load_manifest("s3://bucket/train.json"),
        lambda: read_media(sample("s3://bucket/a.mp4"), SMALL),
    ):
        with pytest.raises(ConfigError, match=said):
            read()
    with pytest.raises(ManifestError, match="the media root s4://x has an unknown scheme"):
        load_manifest(tmp_path / "train.json", "s4://x")
    with pytest.raises(ManifestError, match=r"memory://none.json: there is no such file"):
        load_manifest("memory://none.json")


def test_a_manifest_and_its_media_are_checked_where_they_are(
    clip: Path, tmp_path: Path, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    memory.put_file(str(clip), "/set/clips/1.mp4")
    memory.put_file(str(tmp_path / "a.png"), "/set/a.png")
    rows = [
        ROW | {"path": "clips/1.mp4"},
        ROW | {"path": "a.png", "problem_id": 2, "data_type": "image"},
        ROW | {"path": "memory://set/clips/1.mp4", "problem_id": 3, "start": 0.5, "end": 1.0},
        ROW | {"path": "none.mp4", "problem_id": 4},
        ROW | {"path": "train.json", "problem_id": 5},
    ]
    memory.pipe("/set/train.json", json.dumps(rows).encode())
    folder = tmp_path / "copies"
    words = ["data", "check", "memory://set/train.json", "--workers", "2", "--remote_cache", str(folder)]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "usable questions: 3" in said
    assert "row 4 (id 4): memory://set/none.mp4: there is no such file" in said
    assert "row 5 (id 5): memory://set/train.json: is not a" in said
    assert sorted(path.suffix for path in kept(folder)) == [".json", ".mp4", ".png"]
    memory.pipe("/set/train.json", json.dumps(rows[:3]).encode())  # a manifest is read anew, clips are not
    memory.rm("/set/clips", recursive=True)
    assert main(words) == 0


def test_frames_are_those_of_the_file(clip: Path, tmp_path: Path, memory: Any) -> None:
    memory.put_file(str(clip), "/clip.mp4")
    archive = tmp_path / "clips.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(clip, "a/clip.mp4")
    memory.put_file(str(archive), "/clips.zip")
    here = read_media(sample(clip), SMALL)
    budget = replace(SMALL, remote_cache=str(tmp_path / "copies"))
    for address in ("memory://clip.mp4", "zip://a/clip.mp4::memory://clips.zip"):
        there = read_media(sample(address), budget)
        assert torch.equal(here.frames, there.frames) and torch.equal(here.timestamps, there.timestamps)
        there = read_media(sample(address), replace(budget, seconds=0))
        assert torch.equal(here.frames, there.frames)
    assert len(kept(tmp_path / "copies")) == 2
    read_media(sample("memory://clip.mp4"), SMALL)
    assert len(kept(tmp_path / "xdg" / "video-r1" / "media")) == 1
    # Frames that are kept need no clip.
    frames = FrameCache(tmp_path / "frames", LARGE)
    frames.read(sample("memory://clip.mp4"), budget, (16,))
    memory.store.clear()
    for path in kept(tmp_path / "copies"):
        path.unlink()
    assert torch.equal(frames.read(sample("memory://clip.mp4"), budget, (16,))[0].frames, here.frames)
    with pytest.raises(MediaError, match=r"^memory://clip.mp4: there is no such file$"):
        read_media(sample("memory://clip.mp4"), budget)


@pytest.mark.parametrize(
    ("name", "requests", "reason"),
    [
        ("clip.mp4", 1, ""),
        ("slow.mp4", 1, ""),
        ("clip.mp4?version=2", 1, ""),
        ("once.mp4", 2, ""),
        ("busy.mp4", 3, ""),
        ("missing.mp4", 1, "there is no such file"),
        ("secret.mp4", 1, "may not be read"),
        ("odd.mp4", 1, "is refused"),
        ("broken.mp4", 3, "cannot be fetched (ClientPayloadError"),
        ("silent.mp4", 3, "cannot be fetched (FSTimeoutError; 3 attempts)"),
    ],
)
def test_a_server_that_gives_takes_its_time_or_breaks_off(
    server: tuple[str, Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, requests: int, reason: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(remote.HTTP_SECONDS, "sock_read", 0.5)
    address, asked = server
    budget = replace(SMALL, remote_cache=str(tmp_path / "copies"))
    for _ in range(2):
        if reason:
            with pytest.raises(MediaError) as error:
                read_media(sample(f"{address}/{name}"), budget)
            assert error.value.path == f"{address}/{name}" and reason in error.value.reason
            assert kept(tmp_path / "copies") == []
            break
        assert len(read_media(sample(f"{address}/{name}"), budget).frames) == 4
        assert [path.suffix for path in kept(tmp_path / "copies")] == [".mp4"]
    assert asked[name.partition(".")[0]] == requests


@pytest.mark.parametrize("declared", [True, False])
def test_a_file_larger_than_the_limit_is_refused_while_it_comes(
    server: tuple[str, Counter[str]], tmp_path: Path, memory: Any, declared: bool
) -> None:
    memory.pipe("/big.mp4", bytes(1001))
    cache = RemoteCache(tmp_path, 1000)
    address = "memory://big.mp4" if declared else f"{server[0]}/open.mp4"
    with pytest.raises(MediaError, match="is larger than remote_cache_gb"), cache.file(address):
        pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100]


def test_the_least_recently_used_copies_go_but_none_in_use(tmp_path: Path, memory: Any) -> None:
    cache = RemoteCache(tmp_path, 1000)
    for number in range(6):
        memory.pipe(f"/{number}", bytes([number]) * 300)

    def copy(number: int) -> bytes:
        with cache.file(f"memory://{number}") as path:
            os.utime(path, (number, number))
            return Path(path).read_bytes()

    for number in range(3):
        assert copy(number) == bytes([number]) * 300
    with cache.file("memory://1"):
        pass  # used just now
    with cache.file("memory://0") as held:
        os.utime(held, (0, 0))  # the oldest, and in use
        assert copy(3) == bytes([3]) * 300
        assert Path(held).read_bytes() == bytes(300)
        assert {path.read_bytes()[0] for path in kept(tmp_path)} == {0, 1, 3}
        with cache.file("memory://1"), cache.file("memory://3"), cache.file("memory://4") as path:
            assert Path(path).read_bytes() == bytes([4]) * 300  # all others are in use: it is not kept
        assert {path.read_bytes()[0] for path in kept(tmp_path)} == {0, 1, 3}
    assert copy(5) == bytes([5]) * 300
    assert sum(path.stat().st_size for path in kept(tmp_path)) <= 1000


@pytest.mark.slow
def test_processes_and_threads_fetch_a_file_once(
    server: tuple[str, Counter[str]], clip: Path, tmp_path: Path
) -> None:
    address, asked = server
    size = clip.stat().st_size
    program = (
        "import sys; from pathlib import Path; from video_r1.data.sources.remote import RemoteCache\n"
        f"with RemoteCache({str(tmp_path)!r}, {LARGE}).file('{address}/slow.mp4') as path:\n"
        f"    assert Path(path).stat().st_size == {size}\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    cache, found = RemoteCache(tmp_path, LARGE), []

    def read() -> None:
        with cache.file(f"{address}/slow.mp4") as path:
            found.append(os.path.getsize(path))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    assert found == [size] * 3
    assert asked["slow"] == 1 and len(kept(tmp_path)) == 1


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_fetches(
    server: tuple[str, Counter[str]], clip: Path, tmp_path: Path
) -> None:
    address, asked = server
    program = (
        "from video_r1.data.sources.remote import RemoteCache\n"
        f"with RemoteCache({str(tmp_path)!r}, {LARGE}).file('{address}/slow.mp4'): pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    while not asked["slow"]:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = kept(tmp_path)
    assert left and all(".partial" in path.name for path in left)
    cache = RemoteCache(tmp_path, LARGE)
    with cache.file(f"{address}/slow.mp4") as path:
        assert Path(path).read_bytes() == clip.read_bytes()
    assert asked["slow"] == 2
    for path in left:
        if path.exists():
            os.utime(path, (1, 1))
    (tmp_path / ".size").write_text("")  # the next one measures the folder
    with cache.file(f"{address}/clip.mp4"):
        pass
    assert all(".partial" not in path.name for path in kept(tmp_path)) and len(kept(tmp_path)) == 2


def test_a_place_out_of_reach_stops_the_command(server: tuple[str, Counter[str]], tmp_path: Path) -> None:
    """Files that one does not get are problems of their own; ten in a row of one place are the place's."""
    address, _ = server
    budget = replace(SMALL, remote_cache=str(tmp_path / "copies"))

    def files(name: str, numbers: range) -> list[Any]:
        return [sample(f"{address}/{name}.mp4?{number}") for number in numbers]

    def problems(questions: list[Any]) -> int:
        return len(check_media(questions, budget, workers=1).problems)

    for answered, bad in (("clip", 12), ("missing", 24)):  # a file that is missing is an answer as well
        pairs = zip(files("broken", range(12)), files(answered, range(12)), strict=True)
        assert problems([question for pair in pairs for question in pair]) == bad
    assert problems(files("broken", range(9))) == 9
    with pytest.raises(VideoR1Error, match=f"{address} is out of reach: 10 files in a row") as error:
        problems(files("broken", range(9, 11)))
    assert not isinstance(error.value, MediaError)
    with pytest.raises(VideoR1Error, match=r"http://127.0.0.1:9 is out of reach") as error:
        check_media([sample(f"http://127.0.0.1:9/{n}.mp4") for n in range(30)], budget, workers=2)
    assert "Cannot connect" in str(error.value) and "\n" not in str(error.value)


def test_a_disk_that_takes_no_more_stops_the_command(tmp_path: Path, memory: Any) -> None:
    memory.pipe("/a.mp4", bytes(30_000))
    cache = RemoteCache(tmp_path, LARGE)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        with (
            pytest.raises(VideoR1Error, match=r"memory://a.mp4 cannot be kept") as error,
            cache.file("memory://a.mp4"),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not isinstance(error.value, NoAnswer) and kept(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="remote_cache"):
        RemoteCache(tmp_path / "file" / "below", LARGE)


def test_a_folder_is_no_file(tmp_path: Path, memory: Any) -> None:
    memory.pipe("/set/a.mp4", b"x")
    with pytest.raises(MediaError, match="is a folder"), RemoteCache(tmp_path, LARGE).file("memory://set"):
        pass
    assert kept(tmp_path) == []
