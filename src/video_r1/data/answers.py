"""Options and answers: read from datasets, and from model outputs strictly (training) or tolerantly
(evaluation)."""

import ast
import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from video_r1.data.grounding import GROUNDING_FORMS, read_located

_LONGEST = 10_000  # characters; of a longer answer, which may be made to be slow, the middle is not read
_THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
# No sign: the dash of "20-30", "20%-30%", "f(x)-3", "COVID-19". A sign: "= -30", "$-30", and "约-30".
_SIGN = r"(?:(?<![\dA-Za-z.)%°])[-+])?"
# "= - 5", no list's "- 5".
_SPACED_SIGN = re.compile(r"(\A(?!.*\n)|[=:(≈]|\bis\b)[ \t]*([-+])[ \t]+(?=[\d.])")
_SPACE = "[ \u00a0\u2007\u2009\u202f]"  # between thousands: plain, no-break, figure, thin, narrow no-break
_PLAIN_NUMBER = re.compile(
    rf"[-+]?(?:[1-9]\d{{0,2}}(?:(?:,\d{{3}})+|(?:{_SPACE}\d{{3}})+)(?:\.\d*)?|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
)
_MINUS = re.compile(r"[−－﹣]|(?<!\S)–(?=[\d.])")
_PARTED = r"\d+(?:[.,'’_٫٬]\d+)*"  # a number, or what looks like one: "3,5", "1'200"
_NUMBER = re.compile(  # 1: number, 2: part behind a whole number, 3: denominator, 4: power
    rf"(?<![\d^])({_SIGN}(?:(?:[1-9]\d{{0,2}}(?:{_SPACE}\d{{3}})*{_SPACE}(?=\d{{3}}(?!\d)))?{_PARTED}|(?<!\.)\.\d+)"
    rf"(?:[eE][-+]?\d+)?)(?:(?: +(\d+))? ?/ ?({_PARTED})(?![\d/])|\^([-+]?\d{{1,3}})(?!\d))?"
)
_LATEX = (  # 2 \times 10^{3}, \frac{1}{2}
    (re.compile(r"\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*\{?([-+]?\d+)\}?"), r"e\1"),
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\^\s*\{([-+]?\d+)\}"), r"^\1"),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d)"), ","),  # 1{,}200
)
# "Answer: B", "the final answer is (B)", "**Answer**: 12"
_CUE = re.compile(r"(?i)answer\W{0,4}(?:\s+is\b|\s*[:=])\W*?(?=[\w(.+-])")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Labels of options: "A. text", "(a) text", "1) text", "A、text" (after `NARROW`); "3.5" and "3:15" are none.
_LABEL = re.compile(r"(?<![A-Za-z0-9])(\(?)(?:([A-Za-z])|(\d{1,2}))([.):])(?(3)(?!\d))\s*")
_FIRST_LABELS, _SERIES_TRIED = ("A", "a", "0", "1"), 20
NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | str.maketrans("、【】[]", ".()()")
_SEPARATOR = re.compile(r"(?:[\s;,；，、|/]|\b(?:or|and)\b|或){1,8}\Z")
_INSTRUCTION = re.compile(
    r"(?is)(?:(?<=[.;?!)。；？！\n])|\A)\s*(?:please|answer|choose|select|respond|reply|pick|give|only|请|回答|选择).*"
)
_LETTERS_WITHOUT_OPTIONS = LETTERS[:10]
# Statements of a choice, with the letter in group 1. Firm (_STATED): "the answer is (B)", "best option: B",
# "\boxed{B}", "B is the right one". Loose (_NAMED): "option B", "I choose B", "so B".
_LETTER = (
    r"[\s*_:\"'(\[{$\\]*(?:(?:the\s+)?(?:option|choice|letter|text)\b[\s{]*)?([A-Za-z])(?![A-Za-z0-9'’])"
)
_STATED = (
    re.compile(rf"(?i)(?:(?:answer|option|choice)\W{{0,4}}(?:\s+is\b|\s*[:=])|\\boxed\b){_LETTER}"),
    re.compile(
        r"(?i)(?<![A-Za-z0-9'’])([A-Za-z])[*_)\]\"']*\s+(?:is|seems|must be|should be)(?:\s+\w+ly)?"
        r"\s+(?:the\s+)?(?:(?:only\s+)?(?:correct|right|best|true)(?:\s+(?:answer|option|choice|one))?|answer)"
        r"\s*(?:[.,;:!)]|$|\b(?:because|since|as)\b)"
    ),
)
_NAMED = re.compile(
    rf"(?i)\b(?:option|choice|choose|pick|select|go with|going with|so|thus|hence|therefore),?{_LETTER}"
)
_LEADING = re.compile(r"[\s*_`(\[{\"']*([A-Z])[*_`\])}\"']*\s*(?:[.:)\],]|\n|\b(?:because|since|as|due)\b)")
# Words that follow the letter A and hardly ever the word "a".
_AFTER_A_LETTER = (
    " is was are were and or nor but because since as for from with in on at by of to due based if when where"
    " which that than it this the there here we has had does would could should seems appears looks fits"
    " matches makes describes shows states says explains applies remains not isn instead then also only too"
    " however therefore although though while whereas "
)
_JOINED = re.compile(r"(?:[\W_]|\b(?:or|and|maybe|perhaps|possibly|also|even|either|both|option|choice)\b)*")
_VERB = re.compile(r"\s+(?:is|isn|was|does|doesn|shows|would|can|cannot|has|seems|looks)\b")
_NEW_CLAUSE = re.compile(r"[^,]*[.:(\n,][^,]*")  # "B. A is wrong", "B (A is wrong)" name one answer
_CLAUSE_END = re.compile(r"[.!?;:,\n]|\b(?:but|so|thus|hence|therefore|then|because|since|and|while)\b")
_DENIAL = re.compile(
    r"(?i)\b(?:not|never|no(?! doubt| question)|neither|nor|cannot|rather than|instead of|except|unlike|"
    r"exclud\w*|eliminat\w*|rul\w+ out)\b|n['’]t\b"
)
# Between an answer and the one that takes its place: "B. No, A", "B, actually it is A", "B, but it is A".
_WITHDRAWN = re.compile(
    r"(?i)(?:(?:\A|[^\w\s])\s*no\b(?=\W*[,.:;!]|\W*\Z)|\b(?:wait|actually|sorry|scratch that|correction"
    r"|i mean|but (?:now )?it|on second thoughts?)\b)(?:\W+(?:no|wait|actually|but|so|i|it|s|that|the|answer"
    r"|correct|is|was|should|must|be|think|mean|choose|pick|option|choice))*\W*\Z"
)
_STANDING = re.compile(r"(?<![A-Za-z0-9'’])([A-Za-z])(?![A-Za-z0-9'’])")
_DENIED = re.compile(
    r"(?i)[*_)\]\"']*\s+(?:(?:is|are|was|were|seems?|looks?|(?:can|must|would) be)\s+(?:\w+ly\s+)?"
    r"(?:not|never|no|wrong|incorrect|false|out|excluded|eliminated|ruled|impossible|unlikely)\b"
    r"|(?:is|are|was|were|does|do|did|would|could|ca|wo)n['’]t\b"
    r"|(?:does|do|did|can|could|would|should|will)\s+not\b|cannot\b)"
)


class _Chain(NamedTuple):
    """Options that are named together, "A" or "(A) or (B)", between `start` and `end` of the text."""

    letters: frozenset[str]
    start: int
    end: int


def lettered(options: Iterable[str]) -> list[str]:
    """Put a letter before each option: `A. red`."""
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def option_prefix(option: str) -> str:
    """Return the label, punctuation and spaces before an option's text; "" without a label."""
    match = _LABEL.match(option.translate(NARROW), len(option) - len(option.lstrip()))
    return option[: match.end()] if match else ""


def label_of(option: str) -> str:
    """Return the letter or number before an option's text; "" without a label."""
    return option_prefix(option).translate(NARROW).strip(" \n\t().:")


def options_of(options: Any, problem_type: str = "multiple choice") -> list[str]:
    """Return options as `"A. text"`, from a list of texts, labelled in order or not, or a mapping of letters
    (or of other names) to texts."""
    if problem_type != "multiple choice":
        return []
    if isinstance(options, Mapping):
        by_letter = sorted((str(name).strip().upper(), text) for name, text in options.items())
        in_letters = [name for name, _ in by_letter] == list(LETTERS[: len(options)])
        return lettered([text for _, text in by_letter] if in_letters else options.values())
    texts = [str(option) for option in options]
    labels = [label_of(text) for text in texts]
    if labels and labels[0] in _FIRST_LABELS and all(_next_label(a) == b for a, b in pairwise(labels)):
        texts = [text[len(option_prefix(text)) :] for text in texts]
    return lettered(texts)


def answer_of(answer: Any, options: Sequence[str], read_as: Literal["letter", "text"] = "letter") -> str:
    """Return the option's letter for an answer given as a letter, as `"B. text"` or as the option's text.

    read_as: how to read an answer that is one option's letter and another one's text ("A" of "A. E", "B. A").
    """
    text = str(answer).strip()
    if not options:
        return text
    letters = [option[0] for option in options]
    texts = [option[len(option_prefix(option)) :].strip() for option in options]
    bare = text.strip("().: ")
    if bare in letters and not (read_as == "text" and text in texts):
        return bare
    if text in texts:
        return letters[texts.index(text)]
    prefix = option_prefix(text)
    return prefix.strip("(.): ") if prefix and text[len(prefix) :].strip() in texts else text


def parse_options(cell: Any) -> Any:
    """Split options that stand in one cell: a list in JSON or Python, or texts separated by line breaks, "|",
    ";" or their letters. A value that is no text is returned as it is."""
    if not isinstance(cell, str):
        return cell
    text = cell.strip()
    if text.startswith(("[", "{")):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(text)
            except (ValueError, SyntaxError, RecursionError):
                continue
    question, options, _, _ = _listed(text)
    if options and not question:
        return options
    for separator in ("\n", "|", ";"):
        if separator in text:
            return [part.strip() for part in text.split(separator) if part.strip()]
    return [text]


def _next_label(label: str) -> str:
    return str(int(label) + 1) if label.isdigit() else chr(ord(label) + 1)


def _listed(text: str) -> tuple[str, list[str], str, bool]:
    """Return the text before options with labels, the options ("A. red"), the text after them, and whether
    each has its own line. The longest series of labels in one style, such as "(A)" and "(B)", counts."""
    plain = text.translate(NARROW)
    labels = [*_LABEL.finditer(plain)]
    before = [plain[max(0, label.start() - 8) : label.start()].rpartition("\n")[2] for label in labels]
    begin_lines = [label for label, gap in zip(labels, before, strict=True) if not gap.strip()]
    for some in (begin_lines, labels):
        series: dict[tuple[str, ...], list[re.Match[str]]] = {}  # to its end, by first label and style
        found = []
        for match in reversed(some):
            label, style = match[2] or match[3], (match[1], match[4])
            series[label, *style] = [match, *series.get((_next_label(label), *style), [])]
            found += [series[label, *style]] if label in _FIRST_LABELS else []
        for one in sorted((one for one in found if len(one) > 1), key=len, reverse=True)[:_SERIES_TRIED]:
            ends = [match.start() for match in one[1:]]
            *parts, last = (
                text[match.end() : end] for match, end in zip(one, [*ends, len(text)], strict=True)
            )
            last, _, after = last.partition("\n")
            if some is labels and (instruction := _INSTRUCTION.search(last, 1)):
                last, after = last[: instruction.start()], f"{instruction[0]}\n{after}"
            on_lines = some is begin_lines and not any("\n" in part.strip() for part in parts)
            parts = [_SEPARATOR.sub("", " ".join(part.split("\n"))).strip() for part in (*parts, last)]
            if some is labels and len({part[-1:] in ".。?？" for part in parts}) > 1:
                parts = [part.rstrip(".。?？") for part in parts]
            if all(parts):
                options = [f"{match[2] or match[3]}. {part}" for match, part in zip(one, parts, strict=True)]
                return text[: one[0].start()].strip(), options, after.strip(), on_lines
    return text, [], "", False


def split_options(question: str, answer: str = "") -> tuple[str, list[str]]:
    """Split a question that contains its options into question and options; without options: [].

    Options with upper-case letters on lines of their own count by themselves; others, such as "(a) red (b)
    blue", only if `answer` is the label or the text of one. An instruction after them is left out.
    """
    before, options, after, on_lines = _listed(question)
    said = {answer.translate(NARROW).strip(" \n.():").casefold(), label_of(answer).casefold()} - {""}
    names = {name.rstrip(".").casefold() for option in options for name in option.split(". ", 1)}
    if said.isdisjoint(names) and not (on_lines and options[0][0] == "A"):
        return question, []
    rest = "" if _INSTRUCTION.match(after) else after
    return "\n".join(filter(None, (before, rest))), options


def extract_answer(text: str) -> str:
    """Return the stripped text inside the first `<answer>…</answer>`; "" without such a pair of tags."""
    answer, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return answer.strip() if closed else ""


def plain_number(text: str) -> str | None:
    """Return the digits of a text that is one finite decimal number, without separators; None for others.

    Commas or spaces may separate thousands, and "−" or "–" is a minus. A comma that is not before groups
    of three digits is no separator: "3,5", "0,500" and "1.234,5" are no numbers.
    """
    text = _MINUS.sub("-", text.strip())
    if not _PLAIN_NUMBER.fullmatch(text):
        return None
    plain = re.sub(r"[,\s]", "", text)
    return plain if math.isfinite(float(plain)) else None


def parse_number(text: str) -> float | None:
    """Return the value of `plain_number`; None for other texts."""
    return None if (plain := plain_number(text)) is None else float(plain)


def is_doubtful_number(text: str) -> bool:
    """Return whether a text seems to be a number, but it is not sure which: "3,5", "1.234,5", "1'200"."""
    bare = re.sub(_SPACE, "", _MINUS.sub("-", text.strip()))
    marked = re.search(r"\d[,'’_٫٬]\d", text)  # others are dates and versions
    return bool(marked and re.fullmatch(rf"[-+]?{_PARTED}", bare)) and plain_number(text) is None


def read_answer(output: str, problem_type: str, options: Sequence[str] = ()) -> str:
    """Return the answer that a human reader would take from `output`, for evaluation; "" if there is none.

    The answer is searched inside the first answer tags (an unclosed tag counts); without tags, in everything
    but the reasoning (a truncated output is all reasoning). The result depends on the problem type:

    - multiple choice: the option's letter. "(B)", "B.", "Answer: B", "B is correct" and the option's text are
      understood; two options named together are no answer, nor is a denied option;
    - numerical, regression: the number, in digits;
    - grounding types: their exact JSON (`grounding.read_located` lists the accepted forms);
    - other types: the text itself.
    """
    _, tagged, answer = output.partition("<answer>")
    text = answer.partition("</answer>")[0] if tagged else _THINK.sub(" ", output)
    text = _TAG.sub(" ", text).strip()
    if len(text) > _LONGEST and problem_type not in ("OCR", "free-form", "math"):
        text = f"{text[: _LONGEST // 2]}\n{text[-_LONGEST // 2 :]}"
    if problem_type == "multiple choice":
        return _read_choice(text, options)
    if problem_type in ("numerical", "regression"):
        return _read_number(text, first=bool(tagged))
    if problem_type == "math" and "\\boxed" in text:
        return text[text.rindex("\\boxed") :]
    if problem_type in GROUNDING_FORMS:
        stated = text if tagged else _after_cue(text)
        located = read_located(stated, problem_type, last=stated == text and not tagged)
        return str(located) if located else ""
    return text if tagged else _after_cue(text)


def _after_cue(text: str) -> str:
    cues = list(_CUE.finditer(text))
    return text[cues[-1].end() :].strip() if cues else text


def _read_number(text: str, first: bool) -> str:
    """Return the first number of a tagged answer; in free text the number after a cue, or else the last. ""
    for one that cannot be read for sure, such as "3,5".
    """
    if (plain := plain_number(text)) is not None:
        return plain
    text = _SPACED_SIGN.sub(r"\1 \2", _MINUS.sub("-", text))
    for written, value in _LATEX:
        text = written.sub(value, text)
    stated = _after_cue(text)
    numbers = list(_NUMBER.finditer(stated))
    if not numbers:
        return ""
    return _in_digits(numbers[0] if first or stated != text else numbers[-1])


def _in_digits(match: re.Match[str]) -> str:
    """Return a number without spaces in it, a fraction or power as its value; "" if it has none."""
    number, part, below, power = match.groups()
    plain, divisor = plain_number(number), parse_number(below or "1")
    if plain is None or divisor is None:
        return ""
    if not (below or power):
        return plain
    if match.string[: match.start()].endswith("/"):  # a date
        return ""
    value = float(plain)
    try:
        if power:
            value = value ** int(power)
        elif part:  # "1 1/2"
            value += math.copysign(float(part) / divisor, value)
        else:
            value /= divisor
    except ArithmeticError:
        return ""
    return f"{value:.12g}"


def _plain(text: str) -> str:
    """Reduce a text to its words in lower case, to compare an answer with an option's text. Vowel signs and
    emoji count."""
    return " ".join("".join(map(_in_word, unicodedata.normalize("NFC", text.lower()))).split())


@cache
def _in_word(character: str) -> str:
    kind = unicodedata.category(character)[0]
    is_part = character.isalnum() or character == "_" or kind == "M" or (kind == "S" and character > "\x7f")
    return character if is_part else " "


def _read_choice(text: str, options: Sequence[str]) -> str:
    named: dict[str, str] = {}
    for position, option in enumerate(options):
        match = re.match(r"\s*\(?([A-Za-z])\s*[.):]\s*", option)  # "B. the man sits"
        letter = match[1].upper() if match else chr(ord("A") + position)
        named[letter] = _plain(option[match.end() if match else 0 :])
    letters = "".join(named) or _LETTERS_WITHOUT_OPTIONS

    bare = re.sub(r"\\boxed|\\text|[\s*_`$(){}\[\]\"'.:,;!]", "", text)
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    said = _plain(text)
    whole = [
        letter for letter, words in named.items() if words and said in (words, f"{letter.lower()} {words}")
    ]
    if len(whole) == 1:
        return whole[0]

    leading = {match.start(1) for match in [_LEADING.match(text)] if match}
    stated = {match.start(1) for cue in _STATED for match in cue.finditer(text)}
    loosely = {match.start(1) for match in _NAMED.finditer(text)}
    chains = _chains(text, letters, named, stated | loosely)
    chains = [chain for chain in chains if not _is_denied(text, chain)]
    # The first kind of statement that names one option counts; a firm statement of two is no answer.
    everywhere = {chain.start for chain in chains}
    for places, last in ((leading, False), (stated, True), (loosely, False), (everywhere, False)):
        here = [chain for chain in chains if not places.isdisjoint(range(chain.start, chain.end))]
        found = frozenset[str]().union(*(chain.letters for chain in (here[-1:] if last else here)))
        if len(found) == 1 or (found and last):
            later = [chain for chain in chains if chain.start >= here[-1].end and chain.letters != found]
            if not any(
                _WITHDRAWN.search(text[max(here[-1].end, chain.start - 80) : chain.start]) for chain in later
            ):
                return "".join(found) if len(found) == 1 else ""
    return ""


def _chains(text: str, letters: str, named: Mapping[str, str], stated: Collection[int]) -> list[_Chain]:
    """Find the options that a text names by letter or by text; options joined by "or", "and", commas and the
    like make one chain. stated: positions at which lower-case letters count too."""
    spoken = _texts_in(text, named)
    found = [(letter, start, end, True) for letter, start, end in spoken]
    for match in _STANDING.finditer(text):
        letter, (place, end) = match.group().upper(), match.span()
        inside = any(start <= place < stop for _, start, stop in spoken)
        if letter in letters and not inside and not _is_word(text, place):
            found.append((letter, place, end, match.group().isupper() or place in stated))
    chains: list[tuple[_Chain, bool]] = []
    for letter, start, end, counts in sorted(found, key=lambda each: each[1:]):
        if chains:
            (before, before_counts), gap = chains[-1], text[chains[-1][0].end : start]
            clause = letter not in before.letters and _NEW_CLAUSE.fullmatch(gap) and _VERB.match(text, end)
            if _JOINED.fullmatch(gap) and not clause:
                joined = _Chain(before.letters | {letter}, before.start, end)
                chains[-1] = (joined, counts or before_counts)
                continue
        chains.append((_Chain(frozenset(letter), start, end), counts))
    return [chain for chain, counts in chains if counts]


def _texts_in(text: str, named: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """Find options by their words: (letter, start, end). A longer option hides those that it contains."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for letter, words in named.items():
        if words and words.upper() not in named:
            spelled = r"(?<!\w)" + r"\W+".join(map(re.escape, words.split())) + r"(?!\w)"
            if matches := list(re.finditer(spelled, text, re.IGNORECASE)):
                # "A. dog" is a letter and a text, not the words "a dog".
                spoken = [match for match in matches if not re.match(r"[A-Z][.:)]", match.group())]
                found[letter] = [(letter, *match.span()) for match in spoken]
    hidden = {
        letter
        for letter in found
        for other in found
        if named[letter] != named[other] and f" {named[letter]} " in f" {named[other]} "
    }
    return [place for letter, places in found.items() if letter not in hidden for place in places]


def _is_word(text: str, place: int) -> bool:
    """Tell whether the letter at `place` is the word "a" or "I" ("the answer is a dog", "I think")."""
    after = text[place + 1 : place + 40]
    if text[place] in "Aa" and (word := re.match(r"\s+(?:(?:best|correctly|clearly)\s+)?([a-z]+)", after)):
        before = text[max(0, place - 20) : place]
        named = text[place] == "A" and re.search(r"\b(?:option|choice|letter)\W*$", before, re.IGNORECASE)
        follows = f" {word.group(1)} " in _AFTER_A_LETTER or after.lstrip().startswith("rather than ")
        return not named and not follows
    return text[place] in "Ii" and bool(re.match(r"\s+(?!is\b)[a-z]|['’]", after))


def _is_denied(text: str, chain: _Chain) -> bool:
    """Tell whether the text denies that the options are the answer: "not B", "B is wrong"."""
    clause = _CLAUSE_END.split(text[max(0, chain.start - 200) : chain.start])[-1]
    return bool(_DENIAL.search(clause) or _DENIED.match(text, chain.end))
