"""Twins by the rules of `data pairs` on TempCompass (arXiv 2403.00476) and MVBench (arXiv 2311.17005).

    git clone https://github.com/llyx97/TempCompass
    python -m benchmarks.reversed_questions TempCompass/questions --json [--sample 50]
    python -m benchmarks.reversed_questions MVBench/json --json       # of OpenGVLab/MVBench

For multiple-choice and yes/no questions: how many there are and how many get a twin, also by dimension
(`[twins, questions]`). TempCompass has reversed copies of clips. `compared`: twins whose question it asks
about the reversed copy too; `same`: those with its answer there. --sample prints questions to stderr.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._command import benchmark_parser
from video_r1.data.answers import option_prefix
from video_r1.data.making.reversal import Reversals, Unknown

Question = tuple[str, str, str, list[str], str]
"""Clip, dimension, text, options without letters, and answer."""


def tempcompass(path: Path) -> Iterator[Question]:
    for clip, dimensions in json.loads(path.read_text("utf-8")).items():
        for dimension, rows in dimensions.items():
            for row in rows:
                problem, *lines = row["question"].split("\n")
                options = [line.removeprefix(option_prefix(line)).strip() for line in lines] or ["yes", "no"]
                answer = row["answer"].removeprefix(option_prefix(row["answer"])).strip()
                yield clip, dimension, problem, options, answer


def mvbench(folder: Path) -> Iterator[Question]:
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text("utf-8")):
            yield row.get("video", ""), path.stem, row["question"], row["candidates"], row["answer"]


def count(asked: list[Question], sample: int) -> dict[str, Any]:
    rules, total, twins, result, shown = Reversals(), Counter(), Counter(), Counter(), []
    known = {(clip, text, frozenset(options)): said for clip, _, text, options, said in asked}
    for clip, dimension, problem, options, answer in asked:
        total[dimension] += 1
        try:
            reverse = rules.answer(problem, "multiple choice", options, answer)
        except Unknown:
            continue
        twins[dimension] += 1
        other = clip.removesuffix("_reverse") if clip.endswith("_reverse") else f"{clip}_reverse"
        said = known.get((other, problem, frozenset(options)))
        result["compared"] += said is not None
        result["same"] += said == reverse
        shown.append(
            f"{problem} {options}: {answer} -> {reverse}{'' if said in (None, reverse) else f' ({said})'}"
        )
    for line in random.Random(0).sample(shown, min(sample, len(shown))):
        print(line, file=sys.stderr)
    by = {name: [twins[name], total[name]] for name in total}
    return {"questions": total.total(), "twins": twins.total(), **result, "by_dimension": by}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("folder", type=Path, help="TempCompass' questions or MVBench's json")
    parser.add_argument("--sample", type=int, default=0, help="questions to print")
    given = parser.parse_args()
    forms = {name: given.folder / f"{name}.json" for name in ("multi-choice", "yes_no")}
    if forms["yes_no"].exists():
        asked = {name: list(tempcompass(path)) for name, path in forms.items()}
    else:
        asked = {"mvbench": list(mvbench(given.folder))}
        if not asked["mvbench"]:
            parser.error(f"{given.folder} has neither yes_no.json nor questions of MVBench")
    found = {name: count(rows, given.sample) for name, rows in asked.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
