"""Members of tar archives as clips: where they begin, the frames that their files have, what a row may name,
indexes that are kept, archives at addresses."""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_hub import ID, made_hub
from media_files import SMALL, noise, picture, sample, saved, write_video
from PIL import Image

from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.frame_cache import cache_key
from video_r1.data.making.clip_index import ClipIndex
from video_r1.data.making.layouts import Rejected
from video_r1.data.manifests.records import check_manifest
from video_r1.data.sources import archives, remote
from video_r1.data.sources.archives import Part, members_of, split_member
from video_r1.data.sources.media_paths import MediaPaths, data_type_of, path_below
from video_r1.data.sources.remote import RemoteCache, local_file
from video_r1.errors import MediaError

ROW = {
    "problem_id": 1, "problem": "What?", "data_type": "video", "problem_type": "free-form",
    "solution": "<answer>x</answer>", "path": "tar://0001.mp4::shards/000.tar",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_copies")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of several containers and an image."""
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "0001.mp4", 40)
    write_video(folder / "0002.mkv", 40, first=7)
    write_video(folder / "0003.avi", 30, "mpeg4", first=9)
    write_video(folder / "0004.webm", 20, "libvpx-vp9")
    saved(noise(70), folder / "0005.jpg")
    return folder


def packed(path: Path, files: Path, form: int = tarfile.PAX_FORMAT, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(str(path), mode, format=form) as archive:  # type: ignore[call-overload]
        for file in sorted(files.iterdir()):
            archive.add(file, f"./{file.name}" if form == tarfile.GNU_FORMAT else file.name)
    return path


def member(name: str, archive: object) -> str:
    return f"tar://{name}::{archive}"


def test_the_index_is_that_of_tarfile(tmp_path: Path) -> None:
    """Long and odd names, links, folders, empty files, PAX fields, in each format."""
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form, pax_headers={"comment": "x" * 600}) as archive:
            names = ["./a.mp4", "d/" * 30 + "ü" * 20 + ".mp4", "d/./b.mp4", "last.mp4"]
            names += [] if form == tarfile.USTAR_FORMAT else ["é" * 300, "e/" * 200 + "x" * 300]
            for number, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = 300 * number, 1.5
                archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
            for number, kind in enumerate(
                (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
            ):
                info = tarfile.TarInfo(f"other{number}")
                info.type, info.linkname = kind, "l" * (90 if form == tarfile.USTAR_FORMAT else 190)
                archive.addfile(info)
        with tarfile.open(path) as archive:
            expected = {
                posixpath.normpath(info.name): (info.offset_data, info.size) if info.isreg() else (-1, 0)
                for info in archive
            }
        assert members_of(io.BytesIO(path.read_bytes())) == expected and len(expected) >= 8


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = vars(tarfile)["itn"](size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def whole_blocks(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


HOSTILE = {
    "negative size": (header("b.mp4", 0) + header("a.mp4", -512), "negative"),
    "huge size": (header("a.mp4", 1 << 80), "cut short"),
    "beyond the file": (header("a.mp4", 4096) + bytes(512), "cut short"),
    "digits in a PAX header": (header("x", 200_000, b"x") + whole_blocks(b"1" * 200_000), "PAX header"),
    "many digits in a PAX size": (
        header("x", 5013, b"x") + whole_blocks(b"5013 size=" + b"9" * 5002 + b"\n") + header("a", 0),
        "too long",
    ),
    "a long name of gigabytes": (header("x", 1 << 32, b"L"), "a header of 4,294,967,296 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_at_once(tmp_path: Path, name: str) -> None:
    content, reason = HOSTILE[name]
    shard = tmp_path / "000.tar"
    shard.write_bytes(content + bytes(1024))
    seconds = time.monotonic()
    with pytest.raises(MediaError, match=reason) as error:
        read_media(sample(member("a.mp4", shard)), SMALL)
    assert error.value.path == member("a.mp4", shard) and time.monotonic() - seconds < 5


def test_thousands_of_long_names_in_a_row_are_one_name() -> None:
    long = header("x", 7, b"L") + whole_blocks(b"b.mp4\0\0")
    content = long * 3000 + header("a.mp4", 0) + bytes(1024)
    assert members_of(io.BytesIO(content)) == {"b.mp4": (3001 * 512 + 3000 * 512, 0)}


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_the_same_frames_as_from_files(tmp_path: Path, files: Path, seconds: float) -> None:
    shard, budget = packed(tmp_path / "000.tar", files), replace(SMALL, seconds=seconds)
    for file in files.iterdir():
        kind = data_type_of(file.name)
        ours = read_media(sample(member(file.name, shard), kind), budget)
        theirs = read_media(sample(file, kind), budget)
        assert torch.equal(ours.frames, theirs.frames) and torch.equal(ours.timestamps, theirs.timestamps)
        assert (ours.duration, ours.kind) == (theirs.duration, theirs.kind)


def test_an_index_is_built_once(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, built = packed(tmp_path / "000.tar", files), []
    monkeypatch.setattr(remote, "members_of", lambda file: built.append(1) or members_of(file))
    for _ in range(2):  # another process, with the same folder
        cache = RemoteCache(tmp_path / "cache", 10**9)
        for name in ("0001.mp4", "0002.mkv"):
            part = cache.part(member(name, shard))
            assert isinstance(part, Part) and part.size == (files / name).stat().st_size
    assert len(built) == 1
    packed(shard, files, tarfile.USTAR_FORMAT)
    (files.parent / "other").mkdir()
    (files.parent / "other" / "9.mp4").write_bytes(b"other")
    packed(shard, files.parent / "other")  # another archive in its place
    part = cache.part(member("9.mp4", shard))
    assert isinstance(part, Part)
    assert part.read() == b"other" and len(built) == 2
    for entry in cache.folder.glob("??/*.json"):
        entry.write_text("[]")
    assert RemoteCache(tmp_path / "cache", 10**9).part(member("9.mp4", shard)) == part


def frames_packed(path: Path, folder: str, numbers: range, *more: str) -> Path:
    """A shard with a folder of frames, with or without an entry for the folder itself."""
    with tarfile.open(path, "w") as archive:
        for number in reversed(numbers):
            file = saved(Image.fromarray(picture(number)), path.parent / f"{number}.png")
            archive.add(file, f"{folder}{number}.png")
        for name in more:
            archive.addfile(tarfile.TarInfo(name))
    return path


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_folder_of_frames_in_an_archive(tmp_path: Path, seconds: float) -> None:
    budget = replace(SMALL, seconds=seconds)
    shard = frames_packed(tmp_path / "000.tar", "a/1/", range(12), "a/1/.hidden", "a/10/0.png", "b.mp4")
    whole = frames_packed(tmp_path / "one.tar", "", range(12))
    pixels = torch.stack([torch.from_numpy(picture(n)).permute(2, 0, 1) for n in range(12)])
    for path in (member("a/1/", shard), member("a/1", shard), member(".", whole), member("", whole)):
        media = read_media(sample(path), budget)
        assert torch.equal(media.frames, pixels) and media.duration == 6.0
    slow = replace(sample(member("a/1", shard)), extra={"fps": 4})
    assert read_media(slow, budget).timestamps.tolist() == [0.0, 0.5, 1.0, 1.75, 2.25, 2.75]
    assert cache_key(slow, budget, 8) != cache_key(sample(slow.path), budget, 8)
    with pytest.raises(MediaError, match="is a folder, not a media file"):
        read_media(sample(slow.path, "image"), budget)
    with pytest.raises(MediaError, match="at most"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "MOST_FRAMES", 11)
        read_media(sample(slow.path), budget)


def test_folders_in_archives_hold_frames_alone(tmp_path: Path) -> None:
    shard = frames_packed(tmp_path / "000.tar", "a/1/", range(4), "a/1/notes.txt")
    with pytest.raises(MediaError, match=r"'notes\.txt' in it, which is no image"):
        read_media(sample(member("a/1", shard)), replace(SMALL, seconds=0))
    shard = frames_packed(tmp_path / "001.tar", "a/1/", range(4))
    info = tarfile.TarInfo("a/1/4.png")
    info.type, info.linkname = tarfile.SYMTYPE, "0.png"
    with tarfile.open(shard, "a") as archive:
        archive.addfile(info)
    with pytest.raises(MediaError, match=r"'4\.png' in it, a link or a folder"):
        read_media(sample(member("a/1", shard)), replace(SMALL, seconds=0))


def broken(path: Path, files: Path, kind: str) -> str:
    """A path that cannot be read, by what is wrong with it."""
    shard = packed(path / "000.tar", files, mode="w:gz" if kind == "gzip" else "w")
    if kind == "cut":
        shard.write_bytes(shard.read_bytes()[:-20_000])
    elif kind == "text":
        shard.write_bytes(b"text" * 1000)
    elif kind in ("link", "folder", "empty"):
        with tarfile.open(shard, "w") as archive:
            info = tarfile.TarInfo("0001.mp4")
            info.type = {"link": tarfile.SYMTYPE, "folder": tarfile.DIRTYPE}.get(kind, tarfile.REGTYPE)
            info.linkname = "/etc/passwd"
            archive.addfile(info)
    return member({"missing": "no.mp4", "out": "../../etc/passwd"}.get(kind, "0001.mp4"),
                  path / "no.tar" if kind == "no archive" else shard)  # fmt: skip


BROKEN = [
    ("gzip", "the archive is compressed (gzip); decompress it"),
    ("cut", "the archive is no tar, or cut short: of "),
    ("text", "the archive is no tar, or cut short"),
    ("link", "is a folder, a link or another thing in the archive, no plain file"),
    ("empty", "the file is empty (0 bytes)"),
    ("missing", "there is no such file in the archive, which has 5"),
    ("out", "there is no such file in the archive, which has 5"),
    ("no archive", "there is no such archive"),
]


@pytest.mark.parametrize(("kind", "reason"), BROKEN)
def test_what_cannot_be_read(tmp_path: Path, files: Path, kind: str, reason: str) -> None:
    path = broken(tmp_path, files, kind)
    with pytest.raises(MediaError, match=re.escape(reason)) as error:
        read_media(sample(path), replace(SMALL, seconds=0))
    assert error.value.path == path


def test_the_archive_stays_in_the_media_root(tmp_path: Path, files: Path) -> None:
    packed(tmp_path / "outside" / "000.tar", files)
    root = tmp_path / "root"
    shard = packed(root / "shards" / "000.tar", files)
    (root / "link.tar").symlink_to(tmp_path / "outside" / "000.tar")
    (root / "inside.tar").symlink_to(shard)
    (sample_,), _, problems = check_manifest([ROW], root)
    assert (
        problems == []
        and sample_.path == member("0001.mp4", shard)
        and local_file(sample_.path) == str(shard)
    )
    assert path_below(str(root), sample_.path) == ROW["path"]
    places = MediaPaths(str(root))
    assert places.find("tar://0001.mp4::inside.tar") == member("0001.mp4", shard)
    assert places.find(f"tar://0001.mp4::file://{shard}") == member("0001.mp4", shard)
    for archive in ("link.tar", "../outside/000.tar", str(tmp_path / "outside/000.tar"), "", ".",
                    f"file://{tmp_path}/outside/000.tar", "file:///etc/passwd"):  # fmt: skip
        with pytest.raises(ValueError, match=r"leads out of the media root|is absolute"):
            places.find(member("0001.mp4", archive))
    with pytest.raises(ValueError, match="is a URL"):
        places.find("tar://0001.mp4::https://host/000.tar")
    allowed = MediaPaths(str(root), allowed_roots=[tmp_path / "outside"])
    outside = tmp_path / "outside" / "000.tar"
    assert split_member(allowed.find("tar://0001.mp4::link.tar")) == ("tar://0001.mp4", str(outside))
    assert MediaPaths("s3://b/c").find("tar://1.mp4::x/0.tar") == "tar://1.mp4::s3://b/c/x/0.tar"


def test_an_archive_that_changes_is_another_entry_of_the_cache(tmp_path: Path, files: Path) -> None:
    shard = packed(tmp_path / "000.tar", files)
    keys = {cache_key(sample(member(name, shard)), SMALL, 8) for name in ("0001.mp4", "0002.mkv")}
    packed(shard, files, tarfile.GNU_FORMAT)
    keys.add(cache_key(sample(member("0001.mp4", shard)), SMALL, 8))
    assert len(keys) == 3 and None not in keys
    shard.unlink()
    assert cache_key(sample(member("0001.mp4", shard)), SMALL, 8) is None


def test_make_finds_members(tmp_path: Path, files: Path) -> None:
    packed(tmp_path / "shards" / "000.tar", files)
    (tmp_path / "broken.tar").write_bytes(b"text")
    index = ClipIndex(str(tmp_path))
    assert index.find("0001") == index.find("clips/0001.mp4") == "tar://0001.mp4::shards/000.tar"
    assert index.find("tar://0001.mp4::shards/000.tar") == "tar://0001.mp4::shards/000.tar"
    with pytest.raises(Rejected, match=re.escape("near it: tar://0001.mp4::shards/000.tar")):
        index.find("00011.mp4")


def test_a_question_about_a_member(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from video_r1.errors import RequestError
    from video_r1.evaluation.ask import question_sample
    from video_r1.settings.decoding import AskSettings

    shard = packed(tmp_path / "000.tar", files)
    monkeypatch.chdir(tmp_path)
    found = question_sample(AskSettings(path="tar://0005.jpg::000.tar", model="m", question=["?"]), "?")
    assert (found.data_type, found.path) == ("image", member("0005.jpg", shard))
    with pytest.raises(RequestError, match="no such file"):
        question_sample(AskSettings(path="tar://0005.jpg::no.tar", model="m", question=["?"]), "?")


def test_the_studio_plays_members(tmp_path: Path, files: Path) -> None:
    pytest.importorskip("starlette", reason="the extra studio is not installed")
    from studio_server import studio_client

    packed(tmp_path / "shards" / "000.tar", files)
    frames_packed(tmp_path / "shards" / "001.tar", "clip/", range(4))
    content = (files / "0001.mp4").read_bytes()
    rows = [ROW, {**ROW, "problem_id": 2, "path": "tar://0001.mp4::shards/no.tar"}]
    rows.append({**ROW, "problem_id": 3, "path": "tar://clip::shards/001.tar"})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with studio_client(tmp_path) as client:
        shown = client.get("/api/rows", params={"manifest": "train.json"}).json()["shown"]
        assert (
            shown[0]["problems"] == shown[2]["problems"] == []
            and "there is no file" in shown[1]["problems"][0]
        )
        place = {"manifest": "train.json", "row": 0}
        whole = client.get("/api/clip", params=place)
        assert (whole.status_code, whole.headers["content-type"]) == (200, "video/mp4")
        assert whole.content == content
        for wanted, begin, end in (
            ("0-", 0, None),
            ("5-9", 5, 10),
            ("-7", -7, None),
            ("9-99999999", 9, None),
        ):
            part = client.get("/api/clip", params=place, headers={"range": f"bytes={wanted}"})
            assert part.status_code == 206 and part.content == content[begin:end]
            first = begin % len(content)
            last = len(content) - 1 if end is None else end - 1
            assert part.headers["content-range"] == f"bytes {first}-{last}/{len(content)}"
        bad = client.get("/api/clip", params=place, headers={"range": "bytes=99999999-"})
        assert bad.status_code == 416
        assert client.get("/api/clip", params={**place, "row": 1}).status_code == 404
        assert shown[2]["files"] == [{"count": 4, "fps": 2.0}] and shown[0]["files"] == [None]
        frame = client.get("/api/clip", params={**place, "row": 2, "frame": 3})
        assert frame.content == (tmp_path / "shards" / "3.png").read_bytes()
        assert client.get("/api/clip", params={**place, "row": 2, "frame": 4}).status_code == 404


def test_an_archive_at_an_address(tmp_path: Path, files: Path, memory: Any) -> None:
    shard = packed(tmp_path / "000.tar", files)
    memory.pipe("/b/000.tar", shard.read_bytes())
    budget = replace(SMALL, seconds=0, remote_cache=str(tmp_path / "cache"))
    for name in ("0001.mp4", "0005.jpg"):
        kind = data_type_of(name)
        ours = read_media(sample(member(name, "memory://b/000.tar"), kind), budget)
        assert torch.equal(ours.frames, read_media(sample(files / name, kind), budget).frames)
    kept = [path for path in (tmp_path / "cache").glob("??/*") if path.suffix != ".json"]
    assert sorted(path.stat().st_size for path in kept) == sorted(
        (files / name).stat().st_size for name in ("0001.mp4", "0005.jpg")
    )
    for path, reason in (
        ("no.mp4", "there is no such file in the archive"),
        ("0001.mp4", "there is no such file"),
    ):
        archive = "memory://b/000.tar" if path == "no.mp4" else "memory://b/no.tar"
        with pytest.raises(MediaError, match=reason) as error:
            read_media(sample(member(path, archive)), budget)
        assert error.value.path == member(path, archive)


@pytest.mark.parametrize("ranges", [True, False])
def test_only_headers_and_members_are_fetched(tmp_path: Path, files: Path, ranges: bool) -> None:
    shard = packed(tmp_path / "000.tar", files)
    filler = tmp_path / "filler.bin"
    filler.write_bytes(bytes(3_000_000))
    with tarfile.open(shard, "a") as archive:
        archive.add(filler, "0000.bin")
        archive.add(files / "0001.mp4", "0009.mp4")
    with made_hub(tmp_path, ranges) as hub:
        path = member("0009.mp4", f"{hub.endpoint}/datasets/{ID}/resolve/main/000.tar")
        budget = replace(SMALL, seconds=0, remote_cache=str(tmp_path / "cache"))
        if ranges:
            ours = read_media(sample(path), budget)
            assert torch.equal(ours.frames, read_media(sample(files / "0001.mp4"), budget).frames)
            assert hub.sent.total() < shard.stat().st_size / 4
        else:
            with pytest.raises(MediaError) as error:
                read_media(sample(path), budget)
            assert error.value.path == path and "range requests" in error.value.reason
