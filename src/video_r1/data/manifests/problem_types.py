"""Names that others give the problem types, in one table for `data make`, `data check` and TRL's tables."""

import re
from collections.abc import Mapping
from typing import Any, get_args

from video_r1.console import tell
from video_r1.data.answers import answer_of, extract_answer, options_of
from video_r1.processes import process_index
from video_r1.settings.shared import ProblemType

YES_NO, BY_ROW = "yes/no", "by row"
PROBLEM_TYPES: tuple[str, ...] = get_args(ProblemType)
YES_OR_NO = {"yes": ["Yes", "No"], "no": ["Yes", "No"], "true": ["True", "False"], "false": ["True", "False"]}
"""The options of a question without options, by its answer."""
# In small letters, without spaces and signs.
_NAMES = {
    "multiple choice": "multichoice mcq mc choice choices",  # one of the options is right
    "numerical": "numeric number num integer int float count counting",  # equal numbers are right
    "free-form": "openended open oe freetext text shortanswer short caption captioning",  # texts are compared
    "math": "mathematical mathematics latex",
    "temporal grounding": "momentretrieval",
    "spatial-temporal grounding": "spatiotemporalgrounding",
    YES_NO: "yesno yn binary boolean bool truefalse tf",  # multiple choice of two, made from the row
    BY_ROW: "other auto",  # says nothing; `data make` looks at the row
}
_TYPES = {re.sub(r"[\W_]", "", name.lower()): name for name in PROBLEM_TYPES}
_TYPES |= {name: problem_type for problem_type, names in _NAMES.items() for name in names.split()}


def type_of(text: str) -> str | None:
    """Return the problem type, YES_NO or BY_ROW, that a text names; None for other texts."""
    return _TYPES.get(re.sub(r"[\W_]", "", text.lower()))


def renaming(given: Any, problem_type: str) -> str:
    return f"{given} → {problem_type}{' (a judge is advised)' * ('caption' in str(given).lower())}"


def in_our_words(row: Any) -> tuple[Any, str]:
    """Return a manifest's row with a known problem type, and what was renamed ("mcq → multiple choice").

    Other rows are returned as they are, with "".
    """
    given = row.get("problem_type") if isinstance(row, Mapping) else None
    named = type_of(given) if isinstance(given, str) and given not in PROBLEM_TYPES else None
    if named in (None, BY_ROW):
        return row, ""
    if named != YES_NO:
        return {**row, "problem_type": named}, renaming(given, named)
    answer = extract_answer(str(row.get("solution")))
    options = options_of(row.get("options") or YES_OR_NO.get(answer.strip(". ").lower(), ()))
    by_text = {option[3:].strip(". ").lower(): option[0] for option in options}
    letter = by_text.get(answer.strip(". ").lower()) or answer_of(answer, options)
    if len(options) != 2:
        return row, ""
    made = {"problem_type": "multiple choice", "options": options, "solution": f"<answer>{letter}</answer>"}
    return {**row, **made}, renaming(given, "multiple choice of two")


def tell_renamings(renamings: Mapping[str, int]) -> None:
    """Print what was renamed in how many rows, in one line, on rank 0."""
    if renamings and process_index() == 0:
        shown = ", ".join(f"{renamed}: {count:,}" for renamed, count in renamings.items())
        tell(f"problem types read by other names: {shown}")
