"""Filters of a teacher's rationales, and the choice among a question's rationales. Pure functions.

Each filter returns None, or the fault in a few words. The main filter is the score of the answer.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from video_r1.chat_client import Completion
from video_r1.data.answers import extract_answer, read_answer
from video_r1.data.manifests.records import Sample
from video_r1.data.scores import above, correctness, format_reward
from video_r1.settings.decoding import AnnotateSettings

FILTERS = (
    "cut off", "refusal", "tags", "length", "language", "repetition", "tool", "score", "majority",
)  # in the order in which they are applied  # fmt: skip

MAX_FOREIGN = 0.05  # largest share of letters in a script that neither question nor answer has
PHRASE = 8  # words in a counted phrase
MAX_REPEATED = 0.3  # largest share of phrases that occurred before
_FREE_SCRIPTS = {"GREEK", "MATHEMATICAL", "FULLWIDTH", "HALFWIDTH", "MODIFIER", "SUPERSCRIPT", "SUBSCRIPT"}
_CJK = {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"}

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_TAG = re.compile(r"</?think>")
_WORD = re.compile(r"[一-鿿぀-ヿ가-힣]|[^\W_一-鿿぀-ヿ가-힣]+(?:['’.,]\w+)*")
_REFUSAL = re.compile(
    r"(?i)\bi(?:['’]m| am)? (?:cannot|can['’]?t|can not|do not|don['’]?t|unable to|not able to) "
    r"(?:actually |directly |really )?(?:have access to|have the ability to \w+|see|view|watch|access|play|"
    r"open|process|analy[sz]e) (?:any |the |this |your |actual )*(?:videos?|images?|clips?|pictures?|"
    r"media|files?|visual content)\b(?! (?:in|at|during|well|clearly|beyond))"
    r"|\bas an ai (?:language )?(?:model|assistant)\b"
    r"|\bno (?:video|image|clip|picture) (?:was|is|has been) (?:provided|attached|given|included|uploaded)\b"
)


def rationale_of(text: str) -> str:
    """Return the text inside the first `<think>…</think>`, stripped; "" without such tags."""
    match = _THINK.search(text)
    return match.group(1).strip() if match else ""


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; each Chinese, Japanese or Korean character is a word."""
    return _WORD.findall(text.lower())


def refusal(text: str, finish_reason: str = "stop") -> str | None:
    """Reject a teacher that says that it sees no media; one that declines has no tags or no right answer."""
    if finish_reason == "content_filter":
        return "the endpoint's content filter ended it"
    found = _REFUSAL.search(text)
    return f"it says {found.group()!r}" if found else None


def tags(text: str) -> str | None:
    """Require `<think>…</think>` then `<answer>…</answer>`, each tag once, neither empty, nothing else."""
    if format_reward(text.strip()) != 1.0:
        return "it is not <think>…</think> <answer>…</answer>, each tag once"
    if not rationale_of(text) or not extract_answer(text):
        return "its rationale or its answer is empty"
    return None


def language(rationale: str, references: Iterable[str]) -> str | None:
    """Reject a rationale in another script than the question and its answer: the teacher changed language.

    Letters of mathematics are allowed. References without letters allow any script.
    """
    known = set().union(*(scripts(reference) for reference in references))
    if not known:
        return None
    counts = scripts(rationale)
    foreign = {name: count for name, count in counts.items() if name not in known}
    share = sum(foreign.values()) / max(1, sum(counts.values()))
    if share <= MAX_FOREIGN:
        return None
    return f"{share:.0%} of its letters are {max(foreign, key=lambda name: foreign[name]).title()}"


def scripts(text: str) -> Counter[str]:
    """Count the letters of each script, by the first word of their Unicode names.

    Letters of mathematics are not counted; the scripts of Japanese count as Chinese.
    """
    names: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            name = unicodedata.name(character, "UNKNOWN").partition(" ")[0]
            if name not in _FREE_SCRIPTS:
                names["CJK" if name in _CJK else name] += count
    return names


def repetition(rationale: str) -> str | None:
    """Reject too many repetitions among all phrases of eight words."""
    words = words_of(rationale)
    phrases = [tuple(words[place : place + PHRASE]) for place in range(len(words) - PHRASE + 1)]
    repeated = len(phrases) - len(set(phrases))
    if phrases and repeated > MAX_REPEATED * len(phrases):
        return f"{repeated / len(phrases):.0%} of its phrases of {PHRASE} words are repetitions"
    return None


def _tool_fault(sample: Sample, completion: Completion) -> str | None:
    if completion.failed_calls:
        return f"{completion.failed_calls} of its calls got no answer"
    if any(
        turn["content"].count("<think>") != turn["content"].count("</think>") for turn in _said(completion)
    ):
        return "a turn with a call leaves <think> open"
    return None if completion.work or sample.data_type != "video" else "it calls no tool"


def _said(completion: Completion) -> list[Any]:
    """Return the messages with calls that stand before a completion's last turn."""
    return [turn for turn in completion.work if turn["role"] == "assistant"]


class Judged(NamedTuple):
    """A rationale's outcome."""

    answer: str
    score: float  # of its answer, in [0, 1]
    rejected: str  # the first filter that it did not pass, "" if it passed all
    detail: str  # in words


class Verdict(NamedTuple):
    """A question's outcome."""

    kept: int | None  # index of the rationale, None for none
    reason: str  # filter that stopped the best rationale, "" if one is kept
    judged: list[Judged]


def judge(sample: Sample, completions: Sequence[Completion], settings: AnnotateSettings) -> Verdict:
    """Apply all filters to a question's K rationales and choose one of those that pass.

    best: the highest score, then the answer that most of the K agree with, then the earliest. majority: the
    same among answers that more than half of the K agree with; a rare right answer was luck. Answers agree if
    one scores above the threshold against the other.
    """
    kind = sample.problem_type
    judged = [judge_one(sample, completion, settings) for completion in completions]
    votes = [  # answers that agree with each one, itself included
        sum(above(correctness(kind, other.answer, one.answer), settings.threshold) for other in judged)
        for one in judged
    ]
    if settings.choose == "majority":
        judged = [
            one._replace(rejected="majority", detail=f"{count} of {len(judged)} answers agree")
            if not one.rejected and 2 * count <= len(judged)
            else one
            for one, count in zip(judged, votes, strict=True)
        ]
    passed = [place for place, one in enumerate(judged) if not one.rejected]
    if passed:
        return Verdict(max(passed, key=lambda i: (judged[i].score, votes[i], -i)), "", judged)
    return Verdict(None, max((one.rejected for one in judged), key=FILTERS.index), judged)


def judge_one(sample: Sample, completion: Completion, settings: AnnotateSettings) -> Judged:
    """Return the first filter that a rationale does not pass (except majority, which needs all of them)."""
    text, options, kind = completion.text, sample.options, sample.problem_type
    rationale = rationale_of(text)
    before = [turn["content"] for turn in _said(completion)]
    whole = "\n".join([*before, text])
    thoughts = "\n".join([*(_TAG.sub("", turn) for turn in before), rationale])
    answer = read_answer(text, kind, options) if extract_answer(text) else ""
    truth = sample.answer
    score = correctness(kind, answer, truth)
    count, (shortest, longest) = len(words_of(rationale)), settings.length_range
    faults = {
        "cut off": "it reached the token limit" if completion.finish_reason == "length" else None,
        "refusal": refusal(whole, completion.finish_reason),
        "tags": tags(text),
        "length": None if shortest <= count <= longest else f"its rationale has {count} words",
        "language": language(thoughts, (sample.problem, *options, truth)),
        "repetition": repetition(thoughts),
        "tool": _tool_fault(sample, completion) if settings.tools else None,
        "score": None if above(score, settings.threshold) else f"its answer {answer!r} scores {score:.2f}",
    }
    found = ((name, detail) for name, detail in faults.items() if detail)
    return Judged(answer, score, *next(found, ("", "")))
