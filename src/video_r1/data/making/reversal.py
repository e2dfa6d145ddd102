"""The answer about a clip that is played backwards, by rules on the words of question and options.

A rule answers only where the words leave no choice: "moving left" turns into "moving right", "from green to
red" into "from red to green", "A, then B" into "B, then A". The words are in reversals.toml.
"""

import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from importlib.resources import files
from itertools import product
from pathlib import Path

from video_r1.errors import RequestError

_THEN = re.compile(r",?\s+(?:and\s+)?(?:then|followed by|before)\s+")
_AFTER = re.compile(r",?\s+after\s+")
_FROM_TO = re.compile(r"\bfrom (.+?) (to|into) (.+)")


class Unknown(Exception):
    """The answer about the reversed clip does not follow from the words; the text says why."""


class Reversals:
    """The words of reversals.toml and of a further file. Raises RequestError for a file of another form."""

    def __init__(self, further: str | None = None) -> None:
        own = files("video_r1").joinpath("data/making/reversals.toml").read_text("utf-8")
        words: dict[str, list] = tomllib.loads(own)
        if further is not None:
            for name, entries in _read(further, words).items():
                words[name] = words[name] + entries
        self.opposites: dict[str, list[str]] = {}
        for one, other in words["change"] + words["motion"]:
            self.opposites.setdefault(one, []).append(other)
            self.opposites.setdefault(other, []).append(one)
        self.turning = _pattern(self.opposites)
        self.change = _pattern(each for pair in words["change"] for each in pair)
        self.moving, self.places, self.order, self.ends, self.denials = (
            _pattern(words[name]) for name in ("moving", "places", "order", "ends", "denials")
        )

    def answer(self, problem: str, problem_type: str, options: Sequence[str], answer: str) -> str:
        """Return the answer about the reversed clip. Raises Unknown.

        options: texts without letters. answer: for multiple choice the text of one of them.
        """
        asked, said = self.places.sub(" ", problem.lower()), _plain(answer)
        _refuse(self.denials, asked)
        if said in ("yes", "no") and {"yes", "no"}.issuperset(map(_plain, options)):
            if said == "no":
                raise Unknown("the answer no does not say what happens")
            if not self.order.search(asked):
                _refuse(self.ends, asked)
                if asked in self._turned(asked, asked):
                    raise Unknown("no word of the question turns round")
            return next((each for each in options if _plain(each) == "no"), "no")
        _refuse(self.order, asked)
        _refuse(self.ends, asked)
        self._refuse_one_sided(asked)
        if problem_type in ("numerical", "regression"):
            return answer
        if problem_type != "multiple choice":
            raise Unknown("no rule for answers of this type")
        events = _events(answer)
        wanted = [set(map(_plain, self._turned(event, asked))) for event in reversed(events)]
        if len(events) == 1 and said in wanted[0]:
            raise Unknown("no word of the answer turns round")
        fits = [option for option in options if _matches(_events(option), wanted)]
        if len(fits) != 1:
            raise Unknown("the reversed answer is not among the options")
        return fits[0]

    def _refuse_one_sided(self, text: str) -> None:
        """Raise Unknown if the text names a change or a direction without its opposite."""
        found = set(self.turning.findall(text))
        if alone := [word for word in found if found.isdisjoint(self.opposites[word])]:
            raise Unknown(f"the question has “{alone[0]}”")

    def _turned(self, event: str, asked: str) -> Collection[str]:
        """Return the texts that an event may turn into: itself if it has no word that turns round.

        Raises Unknown if it names a place as a direction, or a change together with its opposite.
        """
        if ends := _FROM_TO.search(event):
            start = event[: ends.start()]
            parts = product(self._turned(start, asked), *(self._changed(ends[i]) for i in (3, 1)))
            return {f"{before}from {one} {ends[2]} {other}" for before, one, other in parts}
        found = self.turning.findall(event)
        if any(opposite in found for word in found for opposite in self.opposites[word]):
            raise Unknown(f"“{event.strip()}” goes both ways")
        moves = self.moving.search(asked) or self.moving.search(event)
        if not moves and any(not self.change.fullmatch(word) for word in found):
            raise Unknown(f"“{found[0]}” may be a place: nothing moves")
        return self._replaced(event, self.turning)

    def _changed(self, end: str) -> Collection[str]:
        """Return an end of "from … to …", whose directions are places."""
        return self._replaced(end, self.change)

    def _replaced(self, text: str, words: re.Pattern[str]) -> Collection[str]:
        pieces = words.split(text)  # the words stand at odd places
        choices = [self.opposites[piece] if i % 2 else [piece] for i, piece in enumerate(pieces)]
        return {"".join(chosen) for chosen in product(*choices[:13])}


def _events(text: str) -> list[str]:
    """Split a text at its words of order, as in "A, then B" or "B after A"."""
    events = _THEN.split(text.lower().removeprefix("first ").removeprefix("first, "))
    return [part for event in events for part in reversed(_AFTER.split(event))]


def _matches(events: Sequence[str], wanted: Sequence[Collection[str]]) -> bool:
    return len(events) == len(wanted) and all(_plain(e) in w for e, w in zip(events, wanted, strict=True))


def _refuse(words: re.Pattern[str], text: str) -> None:
    if found := words.search(text):
        raise Unknown(f"the question has “{found[0]}”")


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[\w'-]+", text.lower()))


def _pattern(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest_first))})(?![\w-])")


def _read(path: str, known: Collection[str]) -> dict[str, list]:
    """Read a user's words. Raises RequestError."""
    try:
        words = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read as TOML: {error}") from error
    for name, entries in words.items():
        pair = name in ("change", "motion")
        fine = isinstance(entries, list) and all(
            (isinstance(each, list) and len(each) == 2 and all(isinstance(word, str) for word in each))
            if pair
            else isinstance(each, str)
            for each in entries
        )
        if name not in known or not fine:
            form = f"a list of {'pairs of words' if pair else 'words'}"
            raise RequestError(f"{path}: {name} must be one of {', '.join(known)} and {form}")
    return words
