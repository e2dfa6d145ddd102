"""Filters of a teacher's rationales, and the choice among a question's rationales. Pure functions.

Each filter returns None, or the fault in a few words. Filters are cheap and keep what they cannot judge for
sure: the main filter is the score of the answer.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from video_r1.chat_client import Completion
from video_r1.data.answers import extract_answer, parse_number, read_answer
from video_r1.data.manifests.records import Sample
from video_r1.rewards.scoring import above, correctness, format_reward
from video_r1.settings.decoding import AnnotateSettings

FILTERS = (
    "cut off", "refusal", "tags", "length", "characters", "language", "repetition", "prompt leak", "score",
    "contradiction", "majority",
)  # fmt: skip
"""Names of the filters, in the order in which they are applied."""

MIN_READABLE = 0.4  # least share of letters and digits in the visible text; LaTeX has more
MAX_FOREIGN = 0.05  # largest share of letters in a script that neither question nor answer has
LOOP_TIMES = 4  # repetitions in a row that make a loop …
LOOP_WORDS = 12  # … if they have at least this many words in all
PHRASE = 8  # words in a counted phrase
MAX_REPEATED = 0.3  # largest share of phrases that occurred before
ROUNDING = {"numerical": 0.01, "regression": 0.05}  # relative difference of numbers that mean the same
_FREE_SCRIPTS = {"GREEK", "MATHEMATICAL", "FULLWIDTH", "HALFWIDTH", "MODIFIER", "SUPERSCRIPT", "SUBSCRIPT"}
_CJK = {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"}

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_WORD = re.compile(r"[一-鿿぀-ヿ가-힣]|[^\W_一-鿿぀-ヿ가-힣]+(?:['’.,]\w+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+|(?<=[。！？])")
_REFUSAL_OPENING = re.compile(
    r"(?i)(?:<think>|<answer>)?\W*(?:"
    r"(?:i['’]?m (?:really |very |so )?sorry|i am (?:really |very |so )?sorry|sorry|i apologi[sz]e|"
    r"my apologies|unfortunately)\b[^.!?]{0,80}"
    r"\b(?:cannot|can['’]?t|can not|unable|not able|won['’]?t|do not|don['’]?t)\b"
    r"|as an ai\b|i (?:cannot|can['’]?t|can not|won['’]?t|must decline to|am unable to|am not able to) "
    r"(?:help|assist|comply|answer|provide|fulfil|do that|continue)"
    r"|(?:很?抱歉|对不起)[，,]?.{0,20}(?:无法|不能)|我(?:无法|不能)(?:回答|提供|查看|观看|访问))"
)
_REFUSAL_ANYWHERE = re.compile(
    r"(?i)\bi(?:['’]m| am)? (?:cannot|can['’]?t|can not|do not|don['’]?t|unable to|not able to) "
    r"(?:actually |directly |really )?(?:have access to|have the ability to \w+|see|view|watch|access|play|"
    r"open|process|analy[sz]e) (?:any |the |this |your |actual )*(?:videos?|images?|clips?|pictures?|"
    r"media|files?|visual content)\b(?! (?:in|at|during|well|clearly|beyond))"
    r"|\bas an ai (?:language )?(?:model|assistant)\b"
    r"|\bno (?:video|image|clip|picture) (?:was|is|has been) (?:provided|attached|given|included|uploaded)\b"
)
_GIVEN_ANSWER = re.compile(
    r"(?i)\b(?:ground[- ]truth|answer key|(?:the )?(?:given|provided|reference|supplied|official|annotated) "
    r"(?:correct )?(?:answer|solution)|(?:answer|solution) (?:that )?(?:was |is |has been )?(?:already )?"
    r"(?:given|provided|stated|supplied|revealed) (?:to (?:me|us)|in the (?:prompt|question|instructions?))"
    r"|(?:prompt|question|instructions?|system message) (?:already )?(?:tells?|says?|states?|gives?|reveals?|"
    r"mentions?)(?: (?:me|us))?(?: that)? the (?:correct |right )?(?:answer|solution))\b"
)
_CONCLUDES = re.compile(
    r"(?i)\b(?:answer|option|choice)\b|^\W*(?:so|thus|therefore|hence|consequently|in conclusion|in total|"
    r"overall|finally|this means)\b"
)
_HEDGED = re.compile(
    r"(?i)\b(?:not|no|never|neither|nor|cannot|rather|instead|unlike|except|wrong|incorrect|false|however|although|"
    r"but|if|either|or|eliminat\w*|exclud\w*|ruled?|versus|before|after|while|than)\b|n['’]t\b"
)


def rationale_of(text: str) -> str:
    """Return the text inside the first `<think>…</think>`, stripped; "" without such tags."""
    match = _THINK.search(text)
    return match.group(1).strip() if match else ""


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; each Chinese, Japanese or Korean character is a word."""
    return _WORD.findall(text.lower())


def refusal(text: str, finish_reason: str = "stop") -> str | None:
    """Reject a teacher that declines, or says that it sees no media."""
    if finish_reason == "content_filter":
        return "the endpoint's content filter ended it"
    opening = _REFUSAL_OPENING.match(text.strip()) or _REFUSAL_OPENING.match(extract_answer(text))
    found = opening or _REFUSAL_ANYWHERE.search(text)
    return f"it says {_shown(found.group())}" if found else None


def tags(text: str) -> str | None:
    """Require `<think>…</think>` then `<answer>…</answer>`, each tag once, neither empty, nothing else."""
    if not text.strip():
        return "it is empty"
    if format_reward(text.strip()) != 1.0:
        return "it is not <think>…</think> <answer>…</answer>, each tag once"
    if not rationale_of(text) or not extract_answer(text):
        return "its rationale or its answer is empty"
    return None


def characters(text: str) -> str | None:
    """Reject broken encodings, control characters, and text that is mostly punctuation."""
    visible = readable = 0
    for character, count in Counter(text).items():
        category = unicodedata.category(character)
        broken = character == "\N{REPLACEMENT CHARACTER}" or category in ("Co", "Cs")
        if broken or (category == "Cc" and character not in "\n\r\t"):
            return f"it holds the character U+{ord(character):04X}"
        if not character.isspace():
            visible += count
            readable += count * (category[0] in "LMN")
    if readable < MIN_READABLE * visible:
        return f"only {readable / visible:.0%} of it are letters or digits"
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
    """Reject a phrase repeated in a row, and too many repetitions among all phrases of eight words."""
    words = words_of(rationale)
    for size in range(1, min(LOOP_WORDS * 2, len(words) // LOOP_TIMES) + 1):
        wanted = max(LOOP_TIMES, -(-LOOP_WORDS // size)) * size - size  # equal words at a distance of `size`
        run = 0
        for place in range(len(words) - size):
            run = run + 1 if words[place] == words[place + size] else 0
            if run >= wanted:
                return f"it repeats {_shown(' '.join(words[place + 1 : place + 1 + size]))} in a row"
    phrases = [tuple(words[place : place + PHRASE]) for place in range(len(words) - PHRASE + 1)]
    repeated = len(phrases) - len(set(phrases))
    if phrases and repeated > MAX_REPEATED * len(phrases):
        return f"{repeated / len(phrases):.0%} of its phrases of {PHRASE} words are repetitions"
    return None


def prompt_leak(rationale: str, question: str) -> str | None:
    """Reject rationales that refer to a given answer, unless the question is about one."""
    found = _GIVEN_ANSWER.search(rationale)
    return f"it refers to {_shown(found.group())}" if found and not _GIVEN_ANSWER.search(question) else None


def contradiction(rationale: str, answer: str, problem_type: str, options: Sequence[str] = ()) -> str | None:
    """Reject a rationale whose own conclusion is another option or number than its answer.

    The conclusion is its last sentence that concludes ("so …", "the answer is …"). Sentences with a negation
    or an alternative, and those that name no answer or several, are not judged.
    """
    concluding = [part for part in _SENTENCE_END.split(rationale) if _CONCLUDES.search(part)]
    if not concluding or _HEDGED.search(concluding[-1]):
        return None
    sentence = concluding[-1].strip()
    if problem_type == "multiple choice":
        said = read_answer(sentence, problem_type, options)
        agrees = not said or said == answer.strip(" ().").upper() or _names_option(sentence, answer, options)
    elif problem_type in ROUNDING and (value := parse_number(answer)) is not None:
        numbers = {number for word in words_of(sentence) if (number := parse_number(word)) is not None}
        off = [abs(number - value) > ROUNDING[problem_type] * abs(value) for number in numbers]
        agrees = off != [True]
    else:
        return None
    return None if agrees else f"it concludes {_shown(sentence)} and answers {_shown(answer)}"


def _names_option(sentence: str, letter: str, options: Sequence[str]) -> bool:
    """Return whether the sentence has the option's letter or text ("the right option is A" names A)."""
    if re.search(rf"(?<!\w){re.escape(letter)}(?!\w)", sentence):
        return True
    texts = [words_of(option)[1:] for option in options if option.strip(" (")[:1].upper() == letter.upper()]
    said = f" {' '.join(words_of(sentence))} "
    return any(f" {' '.join(text)} " in said for text in texts if text)


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "…")


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
    same among answers that more than half of the K agree with, because a right answer that the teacher mostly
    does not give was luck. Answers agree if one scores above the threshold against the other.
    """
    kind = sample.problem_type
    judged = [judge_one(sample, completion, settings) for completion in completions]
    answers = [one.answer for one in judged if one.answer]
    votes = [  # answers that agree with each one, itself included; 0 for an empty one
        sum(above(correctness(kind, other, one.answer), settings.threshold) for other in answers)
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
    answer = read_answer(text, kind, options) if extract_answer(text) else ""
    truth = sample.answer
    score = correctness(kind, answer, truth)
    references = (sample.problem, *options, truth)
    count, (shortest, longest) = len(words_of(rationale)), settings.length_range
    checks = {
        "cut off": lambda: "it reached the token limit" if completion.finish_reason == "length" else None,
        "refusal": lambda: refusal(text, completion.finish_reason),
        "tags": lambda: tags(text),
        "length": lambda: None if shortest <= count <= longest else f"its rationale has {count} words",
        "characters": lambda: characters(text),
        "language": lambda: language(rationale, references),
        "repetition": lambda: repetition(rationale),
        "prompt leak": lambda: prompt_leak(rationale, sample.problem),
        "score": lambda: (
            None if above(score, settings.threshold) else f"its answer {answer!r} scores {score:.2f}"
        ),
        "contradiction": lambda: contradiction(rationale, answer, kind, options),
    }
    for name, check in checks.items():
        if detail := check():
            return Judged(answer, score, name, detail)
    return Judged(answer, score, "", "")
