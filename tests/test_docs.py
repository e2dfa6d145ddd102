"""Every command, link, file and make target that the documents name is there and would be accepted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_commands import FENCED, PAGES, ROOT, command_lines, request

from video_r1.cli import find_command, read_request, split_words
from video_r1.commands import COMMANDS, TRAINS
from video_r1.errors import RequestError
from video_r1.settings.training_arguments import training_argument_types

DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE_NAME = re.compile(r"[\w./-]+\.(?:py|yaml)")
ELSEWHERE = {"my.yaml"}  # the reader's own


def complaints(path: Path, text: str) -> Iterator[str]:
    """What is wrong in a document."""
    for words in command_lines(text):
        if (found := request(words)) is None:
            continue
        try:
            name, rest = find_command(found)
            read_request(name, [word for word in rest if word != "--smoke"])
        except RequestError as error:
            yield f"{shlex.join(words)}: {error}"
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", FENCED.sub("", text))
    for span in spans:
        yield from complaints_of_span(span)
    for words in [*command_lines(text), *(span.split() for span in spans)]:
        yield from complaints_of_module(words)
    for target in LINK.findall(text):
        yield from complaints_of_link(path, text, target)


def complaints_of_span(span: str) -> Iterator[str]:
    """A command in a sentence may lack settings that it needs; those that it has must be known."""
    words = span.split()
    if words[0] == "video-r1" and len(words) > 1 and words[1].islower():
        try:
            name, rest = find_command(words[1:])
        except RequestError as error:
            yield f"{span}: {error}"
            return
        types = COMMANDS[name].types()
        known = {*types, "smoke"} | (set(training_argument_types()) if name in TRAINS else set())
        try:
            yield from (
                f"{span}: no setting {key}" for key in split_words(rest, types)[1] if key not in known
            )
        except RequestError:
            pass  # an option whose value the sentence leaves to the reader
    elif words[0] == "make" and len(words) == 2:
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if words[1] not in targets:
            yield f"{span}: no such target"
    elif FILE_NAME.fullmatch(span) and span not in ELSEWHERE:
        files = (
            path
            for folder in ("src", "tests", "benchmarks", "setup")
            for path in (ROOT / folder).rglob("*.*")
        )
        if not any(str(path).endswith(f"/{span}") for path in files):
            yield f"{span}: no such file"


def complaints_of_module(words: list[str]) -> Iterator[str]:
    """Benchmarks that are there, with options that they have."""
    for module in words:
        if not module.startswith("benchmarks.") or module == "benchmarks.…":
            continue
        path = ROOT / f"{module.replace('.', '/')}.py"
        source = path.read_text() + (ROOT / "benchmarks" / "_command.py").read_text() if path.exists() else ""
        if not source:
            yield f"{module}: no such module"
        for word in words[words.index(module) :] if source else ():
            if word.startswith("--") and not re.search(rf"\b{word[2:]}\b", source):
                yield f"{module}: no option {word}"


def complaints_of_link(path: Path, text: str, target: str) -> Iterator[str]:
    if "://" in target:
        return
    file, _, anchor = target.partition("#")
    page = path.parent / file if file else path
    if file and not page.exists():
        yield f"link to {target}: no such file"
    elif anchor:
        headings = re.findall(r"^#+ (.+)$", text if page == path else page.read_text(), re.MULTILINE)
        if anchor not in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}:
            yield f"link to {target}: no such heading"


@pytest.fixture(autouse=True)
def my_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("model_name_or_path: m\ntrain_manifest: t\noutput_dir: o\n")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(path: Path) -> None:
    assert list(complaints(path, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```bash\nvideo-r1 rl video-r1-7b-tgrpo --learning_rat 1\n```\n", "did you mean learning_rate"),
        ("```\nvideo-r1 eval RUN my.json \\\n  --order sideways\n```\n", "it must be ordered | shuffled"),
        ("```\naccelerate launch -m video_r1 rl no-such\n```\n", "no-such: no such recipe"),
        ("As in:\n\n    X=1 video-r1 evil CHECKPOINT\n", "did you mean eval"),
        ("`video-r1 plan RECIPE --gpux h100`", "no setting gpux"),
        ("`video-r1 evaluate`", "evaluate is not a command"),
        ("`python -m benchmarks.updates`", "benchmarks.updates: no such module"),
        ("`python -m benchmarks.update --sise lab`", "no option --sise"),
        ("`make tests`", "no such target"),
        ("`tests/test_nothing.py`", "no such file"),
        ("[a](nowhere.md)", "link to nowhere.md: no such file"),
        ("[a](README.md#no-such-part)", "no such heading"),
        ("# One\n[a](#two)", "no such heading"),
    ],
)
def test_what_is_not_there_is_noticed(text: str, said: str) -> None:
    found = list(complaints(ROOT / "x.md", text))
    assert len(found) == 1 and said in found[0]


def test_documents_have_commands() -> None:
    """The search finds what there is: a lost pattern would find nothing, and complain of nothing."""
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    found = [words for text in texts for line in command_lines(text) if (words := request(line))]
    assert len(found) > 25 and {find_command(words)[0] for words in found} > {
        "rl",
        "sft",
        "eval",
        "ask",
        "serve",
    }
    assert set(COMMANDS) >= {find_command(words)[0] for words in found}
