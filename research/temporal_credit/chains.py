"""How often the reasoning of right answers about lab clips implies them.

    python -m research.temporal_credit.chains DEMO

A chain lists what is seen at each moment ("colours: red, blue, green, white.") and concludes. The oracle
reads the answer off the list alone: a chain that reads a caption, or guesses, lists nothing.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from research.temporal_credit.oracle import true_answer
from video_r1.console import table
from video_r1.data.answers import LETTERS, read_answer
from video_r1.data.scores import correctness, is_correct
from video_r1.lab.questions import IMAGE_FAMILIES
from video_r1.lab.scenes import COLOURS, MOMENTS, PLACES, SHAPES, SIZES, Look

_LISTED = re.compile(r"\b(colours|shapes|sizes|places|columns|digits): ([^.]+)\.")
_SHOWN = (*SHAPES, "nothing")
_LOOKS: dict[str, Callable[[str], Look | None]] = {
    "colours": lambda value: Look(colour=value) if value in COLOURS else None,
    "shapes": lambda value: (
        Look(shape=value.replace("nothing", "")) if value in (*SHAPES, "nothing") else None
    ),
    "sizes": lambda value: Look(size=value) if value in SIZES else None,
    "places": lambda value: Look().at(value) if value in PLACES else None,
    "columns": lambda value: Look(x=int(value) / 10 + 0.05) if value in "0123456789" else None,
    "digits": lambda value: Look(shape=value) if re.fullmatch(r"\d", value) else None,
}


class Chains(NamedTuple):
    """Numbers of right answers: all; with a list of every moment; with a list that implies them; and with a
    conclusion from it that says so, too.
    """

    right: int
    listed: int
    implied: int
    concluded: int


def implied_answer(family: str, problem: str, chain: str) -> str | None:
    """Return the answer that follows from what a chain lists, in the family's words; None without a list of
    every moment, or if nothing follows from it.
    """
    found = _LISTED.search(chain)
    looks = [_LOOKS[found[1]](value.strip()) for value in found[2].split(",")] if found else []
    seen = [look for look in looks if look is not None]
    if len(seen) < len(looks) or len(looks) != (1 if family in IMAGE_FAMILIES else MOMENTS):
        return None
    if family == "direction":  # a list has only corners: from the first to the last
        x, y = seen[-1].x - seen[0].x, seen[-1].y - seen[0].y
        ways = ("left" if x < 0 else "right" if x else "", "up" if y < 0 else "down" if y else "")
        return "".join(ways) if "" in ways else None
    return true_answer(family, problem, seen)


def follows(question: Mapping[str, Any], text: str) -> bool | None:
    """Return whether the answer in a text follows from its chain; None if the chain lists no timeline.

    question: a recorded group or prediction of the lab.
    """
    family, kind = str(question["data_source"]).removeprefix("lab/"), question["problem_type"]
    implied = implied_answer(family, question["problem"], text)
    if implied is None:
        return None if _LISTED.search(text) is None else False
    said = read_answer(text, kind, question["options"])
    if kind == "multiple choice":
        choices = [option.partition(". ")[2] for option in question["options"]]
        return implied in choices and said == LETTERS[choices.index(implied)]
    if kind == "free-form":  # a story: its list has no shape
        implied = re.sub(r"^the \w+", " ".join(said.split()[:2]), implied)
    return is_correct(kind, correctness(kind, said, implied), 0.99)


def concludes(question: Mapping[str, Any], text: str) -> bool:
    """Return whether the answer follows from the chain's list and every sentence after it names that answer,
    the first one of them for the colour that the question names.
    """
    found = _LISTED.search(text)
    if found is None or not follows(question, text):
        return False
    family = str(question["data_source"]).removeprefix("lab/")
    said = [each for each in text[found.end() :].partition("</think>")[0].split(".") if each.strip()]
    named = question["problem"].rstrip("?").split()[-1]
    about = f"{family.removeprefix('count_')} {named}" if named in COLOURS else ""
    implied = implied_answer(family, question["problem"], text) or ""
    in_words = question["problem_type"] in ("multiple choice", "numerical", "regression")
    named_right = not said or about in said[0]
    return not in_words or (named_right and all(re.search(rf"\b{implied}\b", each) for each in said))


def count(answers: Iterable[tuple[Mapping[str, Any], str, float]]) -> Chains:
    """Count the right ones among answers: (question, text, score)."""
    right = [(question, text) for question, text, score in answers if score > 0.5]
    found = [follows(*one) for one in right]
    listed, implied = sum(one is not None for one in found), sum(one is True for one in found)
    return Chains(len(right), listed, implied, sum(concludes(*one) for one in right))


def answers_of(folder: Path) -> list[tuple[Mapping[str, Any], str, float]]:
    """Return the answers in order of an evaluation, or of the last tenth of a run's recorded groups."""
    predictions = sorted(folder.glob("predictions-*.jsonl"))
    path = predictions[-1] if predictions else folder / "rollouts.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if predictions:
        return [(line, line["output"], line["score"]) for line in lines if line["order"] == "ordered"]
    late = [line for line in lines if line["step"] > 0.9 * lines[-1]["step"]]
    return [(line, one["text"], one["rewards"]["accuracy"]) for line in late for one in line["ordered"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("demo", type=Path, help="a folder of `video-r1 demo`")
    demo = parser.parse_args().demo
    folders = [folder for folder in sorted(demo.iterdir()) if folder.name.startswith("eval-")]
    rows = []
    for folder in [*folders, *(demo / name for name in ("grpo", "tgrpo"))]:
        found = count(answers_of(folder))
        shares = (f"{part / max(1, found.right):.1%}" for part in found[1:])
        rows.append((folder.name, f"{found.right:,}", *shares))
    print(table(("", "right answers", "list every moment", "imply the answer", "and say so"), rows))


if __name__ == "__main__":
    main()
