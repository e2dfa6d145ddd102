"""Count the weight of the code: `python -m benchmarks.weight [--commit 8ee8f0e] [--json]`.

Prints one table: files and lines by room, tests, modules with one importer, short functions, and docstrings
by their first word. --commit adds a column for that commit, read with `git cat-file`; nothing is checked out.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST_WORDS = ("What", "Of", "One", "Another", "As in", "In the place of")
"""Beginnings that ENGLISH rules out: a docstring begins with a verb or names the thing."""
PAGE = (".js", ".css", ".html")
Tree = dict[str, str]  # path: text


def read_tree(commit: str | None) -> Tree:
    """Read the tracked Python and page files of a commit (default: the working tree)."""
    listed = (
        ["git", "ls-tree", "-r", "--name-only", commit]
        if commit
        else ["git", "ls-files", "-co", "--exclude-standard"]
    )
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = [
        name
        for name in names
        if name.endswith((".py", *PAGE)) and name.startswith(("src/", "tests/", "benchmarks/", "research/"))
    ]
    if commit is None:
        return {name: (ROOT / name).read_text("utf-8") for name in wanted if (ROOT / name).is_file()}
    asked = "".join(f"{commit}:{name}\n" for name in wanted).encode()
    found = subprocess.run(
        ["git", "cat-file", "--batch"], cwd=ROOT, check=True, capture_output=True, input=asked
    ).stdout
    tree, place = {}, 0
    for name in wanted:
        end = found.index(b"\n", place)
        size = int(found[place:end].split()[2])
        tree[name] = found[end + 1 : end + 1 + size].decode()
        place = end + size + 2
    return tree


def count_lines(tree: Tree, start: str, endings: tuple[str, ...] = (".py",)) -> tuple[int, int]:
    """Return (files, lines) of the paths that begin with `start`."""
    texts = [text for name, text in tree.items() if name.startswith(start) and name.endswith(endings)]
    return len(texts), sum(text.count("\n") for text in texts)


def importers(parsed: dict[str, ast.Module]) -> Counter[str]:
    """Count, for each module of the package, the other modules of the package that import it."""
    modules = {
        name.removeprefix("src/").removesuffix(".py").replace("/", "."): tree for name, tree in parsed.items()
    }
    found: Counter[str] = Counter()
    for module, tree in modules.items():
        used = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found.update(used & (modules.keys() - {module}))
    return found


def docstring_words(parsed: dict[str, ast.Module]) -> Counter[str]:
    """Count docstrings, those of fields included, by the ruled-out word that they begin with."""
    found: Counter[str] = Counter()
    for tree in parsed.values():
        for node in ast.walk(tree):
            for part in getattr(node, "body", []) if not isinstance(node, (ast.Lambda, ast.IfExp)) else []:
                if (
                    isinstance(part, ast.Expr)
                    and isinstance(part.value, ast.Constant)
                    and isinstance(part.value.value, str)
                ):
                    text = part.value.value.strip()
                    found.update(
                        word for word in FIRST_WORDS if text.startswith((f"{word} ", f"{word},", f"{word}:"))
                    )
    return found


def measure(tree: Tree) -> dict[str, int]:
    """Return every figure of the table by its name."""
    parsed = {name: ast.parse(text) for name, text in tree.items() if name.endswith(".py")}
    package = {name: each for name, each in parsed.items() if name.startswith("src/")}
    files, lines = count_lines(tree, "src/")
    figures = {
        "src: files": files,
        "src: lines": lines,
        "src: lines of JavaScript, CSS, HTML": count_lines(tree, "src/", PAGE)[1],
    }
    parts = [name.removeprefix("src/video_r1/").split("/") for name in package]
    for room in sorted({part[0] for part in parts if len(part) > 1}):
        files, lines = count_lines(tree, f"src/video_r1/{room}/")
        figures |= {f"src/{room}: files": files, f"src/{room}: lines": lines}
    single = [part for part in parts if len(part) == 1]
    figures["src/*.py: files"] = len(single)
    figures["src/*.py: lines"] = sum(tree["src/video_r1/" + part[0]].count("\n") for part in single)
    figures["modules with one importer"] = sum(count == 1 for count in importers(package).values())
    functions = [
        node for each in package.values() for node in ast.walk(each) if isinstance(node, ast.FunctionDef)
    ]
    bodies = [(node.body[-1].end_lineno or 0) - node.body[0].lineno + 1 for node in functions]
    figures["functions with a body of three lines or fewer"] = sum(length <= 3 for length in bodies)
    words = docstring_words(package)
    figures |= {f"docstrings that begin with “{word}”": words[word] for word in FIRST_WORDS}
    for folder in ("tests", "benchmarks", "research"):
        files, lines = count_lines(tree, f"{folder}/")
        figures |= {f"{folder}: files": files, f"{folder}: lines": lines}
    tests = [each for name, each in parsed.items() if name.startswith("tests/")]
    named = (node for each in tests for node in ast.walk(each) if isinstance(node, ast.FunctionDef))
    figures["tests: functions"] = sum(node.name.startswith("test_") for node in named)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", help="a commit to compare with")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    columns = {"now": measure(read_tree(None))}
    if given.commit:
        columns = {given.commit: measure(read_tree(given.commit))} | columns
    if given.json:
        print(json.dumps(columns, indent=1, ensure_ascii=False))
        return
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    width = max(map(len, names))
    print(" " * width, *(f"{name:>9}" for name in columns))
    for name in names:
        print(f"{name:<{width}}", *(f"{figures.get(name, 0):>9,}" for figures in columns.values()))


if __name__ == "__main__":
    main()
