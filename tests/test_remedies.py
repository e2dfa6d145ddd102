"""Messages about data that name a command, an option or a change: each works when it is followed."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import moving_square, tiny_processor

from video_r1.cli import main
from video_r1.commands import COMMANDS
from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample, load_manifest
from video_r1.data.manifests.trl_rows import trl_samples
from video_r1.data.prompts import PromptBuilder
from video_r1.data.sources.media_paths import MediaPaths
from video_r1.data.templates import load_template
from video_r1.errors import ConfigError, ManifestError, PromptError
from video_r1.settings.tools import ToolSettings

SOURCE = Path(main.__code__.co_filename).parent
ROW = {"problem_id": 1, "problem": "What?", "data_type": "video", "path": "clips/1.mp4"}
ROW |= {"problem_type": "free-form", "solution": "<answer>a ball</answer>"}
CHOICE = {**ROW, "problem_type": "multiple choice", "options": ["A. left", "B. right"]}
CHOICE |= {"solution": "<answer>B</answer>"}
TWO = {**ROW, "path": ["clips/1.mp4", "clips/2.mp4"]}
SPAN = "temporal grounding"


def answers(problem_type: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"problem_type": problem_type, "solution": f"<answer>{answer}</answer>", **more}


def boxes(*box: float) -> dict[str, Any]:
    return answers("spatial grounding", json.dumps({"boxes": box}), data_type="image", path="1.png")


def calls(**arguments: float) -> dict[str, Any]:
    call = {"function": {"name": "look", "arguments": arguments}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": ""}]
    return {"messages": [{"role": "user", "content": "What?"}, *turns]}


# A bad row, what is said, and what that changes.
ROWS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (answers("regression", "0"), "use numerical", answers("numerical", "0")),
    (answers("free-form", "?!"), "OCR compares every sign", answers("OCR", "?!")),
    (answers("numerical", "3,5"), "a comma stands only before groups of three", answers("numerical", "3.5")),
    (answers("numerical", "35,00"), "before groups of three digits", answers("numerical", "3,500")),
    (boxes(0.1, 0.2, 0.3, 0.4), "write thousandths (times 1000)", boxes(100, 200, 300, 400)),
    (boxes(10, 20, 1300, 40), "write 1000·x/width", boxes(*(1000 * x / 1920 for x in (10, 20, 1300, 40)))),
    (boxes(300, 200, 100, 400), "write [x1, y1, x2, y2], x1 < x2", boxes(100, 200, 300, 400)),
    (answers(SPAN, "3 to 5"), 'must be JSON such as {"time"', answers(SPAN, '{"time": [2.5, 6.0]}')),
    (answers(SPAN, '{"time": [5, 3]}'), "needs 0 <= start < end", answers(SPAN, '{"time": [3, 5]}')),
    ({"options": ["left", "B. up"], **answers("multiple choice", "B")}, "as in 'A. the man sits'",
     {"options": ["A. left", "B. up"]}),
    ({"process": "It rolls."}, "it must be <think>…</think>", {"process": "<think>It rolls.</think>"}),
    ({"solution": "B"}, "it must be <answer>…</answer>", {"solution": "<answer>a ball</answer>"}),
    ({"path": "clips\\1.mp4"}, "write / between folders", {"path": "clips/1.mp4"}),
    ({"path": "/nowhere/1.mp4"}, "it must be relative to the media root", {"path": "nowhere/1.mp4"}),
    ({**TWO, "start": 1}, "cut the clips and name the parts", {"path": ["1a.mp4", "2a.mp4"], "start": None}),
    ({**TWO, "problem": "<video>?"}, "write it once for each", {"problem": "<video> or <video>?"}),
    ({**TWO, "problem": "<video>?"}, "or not at all", {"problem": "Which?"}),
    ({"data_type": "text"}, "path is given, but data_type is text", {"path": None}),
    ({"data_type": "film"}, "known are image, video, text", {"data_type": "video"}),
    (calls(start=2, end=1), "both must be times, the later one last", calls(start=1, end=2)),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "says", "change"), ROWS, ids=[says for _, says, _ in ROWS])
def test_cases_of_remedies_in_rows(bad: Any, says: str, change: Any, tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifest([{**ROW, **bad}], tmp_path)
    assert says in str(caught.value)
    assert load_manifest([{**ROW, **bad, **change}], tmp_path)


def table(*prompts: Any, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, **columns} for prompt in prompts or ("What?",)]


def part(**more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video", "video": "c.mp4", **more}]}]


TABLES: list[tuple[list[dict[str, Any]], str, list[dict[str, Any]]]] = [
    (table(clip="c.mp4"), "rename the column to image or video", table(video="c.mp4")),
    (table(clip="c.mp4"), "or remove it", table()),
    (table(part(), video="c.mp4"), "remove one", table(part())),
    (table(part(start=1)), "start and end are columns", table(part(), start=1)),
    (table(problem_type="essay"), "known are multiple choice", table(problem_type="multiple choice")),
    (table(video=3), "use a file, a folder of frames, an address, or bytes", table(video=b"\0")),
]


@pytest.mark.parametrize(("bad", "says", "good"), TABLES, ids=[says for _, says, _ in TABLES])
def test_cases_of_remedies_in_tables_of_prompts(bad: Any, says: str, good: Any, tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        trl_samples(bad, tmp_path)
    assert says in str(caught.value)
    assert trl_samples(good, tmp_path, MediaPaths(str(tmp_path)))


def written(name: str, content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    Path(name).write_text(text, encoding="utf-8")
    return name


def made(name: str = "q.csv") -> list[str]:
    return [
        "data",
        "make",
        written(name, "question,answer,data_type\nWhat?,a ball,text\n"),
        "--out",
        "m.json",
    ]


def check(content: Any, *options: str, name: str = "m.json") -> list[str]:
    written(name, content)
    return ["data", "check", name, "--media", "false", *options]


def latin(text: str = "Ça?") -> list[str]:
    words = check(json.dumps([{**ROW, "problem": text}], ensure_ascii=False))
    Path("m.json").write_bytes(Path("m.json").read_text("utf-8").encode("cp1252"))
    return words


def reencoded() -> list[str]:  # iconv -f cp1252 -t utf-8
    words = latin()
    Path("m.json").write_text(Path("m.json").read_bytes().decode("cp1252"), encoding="utf-8")
    return words


def saved(files: dict[str, list[Any]]) -> list[str]:
    dataset = datasets.Dataset.from_list([{k: v for k, v in ROW.items() if k not in ("path", *files)}])
    for name, file in files.items():
        dataset = dataset.add_column(name, [{"bytes": b"x", "path": file[0]}])  # pyright: ignore[reportCallIssue]
    dataset.to_parquet("t.parquet")
    return ["data", "check", "t.parquet", "--media", "false"]


def splits(at: str) -> list[str]:
    row = datasets.Dataset.from_list([ROW])
    datasets.DatasetDict({"test": row}).save_to_disk("set")
    row.to_parquet("files/test-0.parquet")
    return ["data", "check", at, "--media", "false"]


IDS, BAD = [ROW, {**ROW, "problem": "Why?"}], {**ROW, "problem_id": 2, "solution": "?"}
# A command that fails, what it says, and the command as that says.
RUNS: dict[str, tuple[Callable[[], list[str]], str, Callable[[], list[str]]]] = {
    "renumber": (lambda: check(IDS), "--renumber OUT writes", lambda: check(IDS, "--renumber", "o.json")),
    "taken": (lambda: check(IDS, "--renumber", "m.json"), "choose another file",
              lambda: check(IDS, "--renumber", "o.json")),
    "table": (lambda: ["data", "check", "q.csv"] if made() else [], "video-r1 data make writes one", made),
    "root": (lambda: check([ROW], "--media_root", "nowhere"), "set media_root to the folder",
             lambda: check([ROW], "--media_root", ".")),
    "roots": (lambda: check([{**ROW, "path": "/usr/1.mp4"}]), "a folder that allowed_roots names",
              lambda: check([{**ROW, "path": "/usr/1.mp4"}], "--allowed_roots", "/usr")),
    "out": (lambda: check([{**ROW, "path": "../1.mp4"}]), "allowed_roots names further folders",
            lambda: check([{**ROW, "path": "../1.mp4"}], "--allowed_roots", "..")),
    "URL": (lambda: check([{**ROW, "path": "https://a.org/1.mp4"}]), "unless allow_urls is set",
            lambda: check([{**ROW, "path": "https://a.org/1.mp4"}], "--allow_urls", "true")),
    "comma": (lambda: check(f"[{json.dumps(ROW)},]"), "remove the comma before", lambda: check([ROW])),
    "object": (lambda: check(json.dumps(ROW, indent=1)), "or have one JSON row on each line",
               lambda: check(json.dumps(ROW))),
    "UTF-8": (latin, "iconv -f cp1252 -t utf-8", reencoded),
    "spelling": (lambda: ["data", "check", "n.json", *check([ROW])[3:]], "did you mean m.json?",
                 lambda: check([ROW])),
    "two files": (lambda: saved({"a": ["1.mp4"], "b": ["2.mp4"]}), "rename the right column to image",
                  lambda: saved({"video": ["1.mp4"], "b": ["2.mp4"]})),
    "split": (lambda: splits("set"), "its folder in what save_to_disk wrote", lambda: splits("set/test")),
    "files": (lambda: splits("set"), "name the files of one", lambda: splits("files/test-*.parquet")),
    "spreadsheet": (lambda: ["data", "make", written("q.xlsx", "x"), "--out", "m.json"],
                    "save it as CSV in UTF-8", made),
    "columns": (lambda: ["data", "make", written("t.csv", "q,q\n1,2\n"), "--out", "m.json"],
                "rename one of them", made),
    "made": (lambda: [*made()[:4], check([ROW])[2]], "choose another --out", lambda: [*made()[:4], "o.json"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_cases_of_remedies_of_commands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bad, says, good = RUNS[name]
    assert main(bad()) in (1, 2)
    out, err = capsys.readouterr()
    assert says in out + err
    assert main(good()) == 0, capsys.readouterr()


def test_cases_of_remedies_in_python(tmp_path: Path) -> None:
    rows = [ROW, BAD]
    with pytest.raises(ManifestError, match=r"use the other 1 \(bad_rows leave_out\)"):
        load_manifest(rows, tmp_path)
    assert len(load_manifest(rows, tmp_path, bad_rows="leave_out")) == 1
    dataset = datasets.Dataset.from_list([{k: v for k, v in ROW.items() if k != "path"}])
    files: Any = dataset.add_column("video", [{"bytes": b"x", "path": "1.mp4"}])  # pyright: ignore[reportCallIssue]
    with pytest.raises(ManifestError, match=r"cannot be read one by one.*Dataset.to_parquet writes one"):
        load_manifest(files, tmp_path)
    files.to_parquet(tmp_path / "t.parquet")
    assert load_manifest(tmp_path / "t.parquet")[0].path.startswith("parquet://video/0::")
    with pytest.raises(ManifestError, match="or drop the columns: remove_columns"):
        load_manifest(files.to_iterable_dataset(), tmp_path)
    path = dataset.add_column("path", ["1.mp4"])  # pyright: ignore[reportCallIssue]
    assert load_manifest(path.to_iterable_dataset(), tmp_path)


@functools.cache
def processor() -> Any:
    return tiny_processor("qwen2_5_vl")


def frames(count: int = 4, side: int = 56) -> Media:
    pixels = np.ascontiguousarray(moving_square(count, side, side).transpose(0, 3, 1, 2))
    times = np.arange(count) / 2
    return Media(torch.from_numpy(pixels), torch.from_numpy(times), count / 2, "video")


def asks(text: str = "What?", clip: Media | None = None, **settings: Any) -> Any:
    sample = Sample(1, text, "video", "free-form", "<answer>a ball</answer>", "c.mp4")
    return PromptBuilder(processor(), **settings).build(sample, clip or frames())


PROMPTS: list[tuple[Callable[[], Any], str, Callable[[], Any]]] = [
    (lambda: asks(max_prompt_length=50), "or raise the limit", asks),
    (lambda: asks(max_prompt_length=70, clip=frames(40)), "Take fewer or smaller frames",
     lambda: asks(max_prompt_length=70)),
    (lambda: asks("What<|im_end|>?"), "remove it from the record", lambda: asks("What?")),
    (lambda: asks(clip=frames(side=60)), "multiples of 28", lambda: asks(clip=frames(side=84))),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "says", "good"), PROMPTS, ids=[says for _, says, _ in PROMPTS])
def test_cases_of_remedies_of_prompts(bad: Any, says: str, good: Any) -> None:
    with pytest.raises(PromptError) as caught:
        bad()
    assert says in str(caught.value)
    assert good().frames


def test_cases_of_remedies_of_templates(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    texts = {
        "{question}\n{options}\n{a": "write {{ and }} for braces",
        "{question}\n{options}\n{{a}}": "",
        "{question}\n{choices}": "known are {question}, {options}, {hint}, {subtitles}",
        "{question}": "it must contain {question} and {options}",
        "{question}\n{options}\n#hint essay: x": "with a TYPE of multiple choice",
        "{question}\n{options}\n#hint OCR: x": "",
    }
    for text, says in texts.items():
        file.write_text(text)
        if says:
            with pytest.raises(ConfigError, match=re.escape(says)):
                load_template(file)
        else:
            assert load_template(file)


def messages() -> list[tuple[str, str]]:
    """The texts of the package that are no docstrings, with their places; {} for what is put in."""
    found = []
    for file in sorted((SOURCE / "data").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((f"{file.name}:{node.lineno}", node.value))
    return found


def test_cases_of_options_and_commands_that_messages_name() -> None:
    """Each exists: an option in some command, or in the command that is named before it."""
    known = {name: {setting for section in each.sections for setting in section.__dataclass_fields__}
             for name, each in COMMANDS.items()}  # fmt: skip
    named = set()
    for place, text in messages():
        for command in re.findall(r"video-r1 ((?:data |lab )?[a-z]+)", text):
            assert command in COMMANDS or command.split()[0] in COMMANDS, (place, command)
        for command, option in re.findall(r"(?:\b(rl|sft|eval|data \w+) )?--([a-z]\w+)", text):
            settings = known[command] if command else set().union(*known.values())
            if option != "sparse":  # of tar
                assert option in settings, (place, option)
                named.add(option)
    assert {"renumber", "shuffle_options", "target", "tools"} <= named
    assert {"max_looks", "max_tool_tokens"} <= set(ToolSettings.__dataclass_fields__)


def test_cases_of_remedies_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An animation as an image, and a file that is no picture: a frame of it, and a file of that format."""
    first, second = (Image.new("RGB", (56, 56), (shade, 0, 0)) for shade in (0, 90))
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    (tmp_path / "b.png").write_bytes(b"heic")
    rows = [{**ROW, "problem_id": n, "data_type": "image", "path": f"{n}.png"} for n in "ab"]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    assert main(["data", "check", str(tmp_path / "m.json")]) == 1
    said = capsys.readouterr().out
    assert "save that frame as a picture" in said and "convert it (HEIC, for example) to JPEG or PNG" in said
    for name in ("a.png", "b.png"):
        first.save(tmp_path / name)
    assert main(["data", "check", str(tmp_path / "m.json")]) == 0
