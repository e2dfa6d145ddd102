"""The answer about a clip that is played backwards, by rules on the words of question and options.

    Is the red ball rolling to the left?
    ─► is [the_red_ball] rolling to the left                 a noun with its article is one word
    ─► Event("red_ball", "roll", turns={(right, left)})      what turns, from and to

A rule answers only what it reads whole: every text is an event of a subject that moves or changes, and all of
its words are in reversals.toml. States, places, times, denials and idioms are not read, and get no answer.
"""

import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from video_r1.errors import RequestError

_WHICH = r"(?:the|his|her|its|their|my|our|this|that|these|those|both)"
_ARTICLE = rf"(?:{_WHICH}|an?)"
_N = r"\[[^]]+\]"
_KNOWN = rf"\[(?:{_WHICH}_[^]]+|i|we|he|she|they)\]"  # a subject of which there is one
_THERE = r"(?!\[the_(?:picture|image|screen))"  # what is in a picture need not move
_DRAWN = r"(?!\[\w*_(?:map|flag|card|shirt|book|paper|newspaper|coin|circle|square|star|pattern)s?\])"
_SUBJECT = rf"{_N}(?: (?:in|with|wearing|of) {_THERE}{_N})?"
_CLAUSE = re.compile(rf"(?:({_SUBJECT}) )?(?:(am|is|are|was|were) )?(?:(being) )?([\w'-]+)(?: (.+))?")
_WITH = rf" (?:with|using|by) {_N}"
_PLACE = rf" ?\b(?:on|along|across|through|over|in|past|around|at) {_THERE}{_DRAWN}\[{_ARTICLE}_[^]]+\]"
_BESIDE = re.compile(rf"{_WITH}|{_PLACE}")
_FROM_TO = re.compile(
    r"(?:\[?colou?r\]? )?(from )?(?:the )?(.+?)(?: side)? (?:in)?to (?:the )?(.+?)(?: side)?"
)
_WAY = re.compile(rf"(?:(?:to|towards?|in) )?(?:{_ARTICLE} )?(.+?)(?: direction| side(?: of {_N})?)?")
_THEN = re.compile(r"(?: first)?(?: ,)? (?:(?:and )?then|followed by|before) (?:, )?")
_AFTER = re.compile(r"(?: ,)? after ")
_EITHER = re.compile(
    rf"((?:is|are|was|were|do|does|did) {_SUBJECT}(?: [\w ]+(?= \S+ or)| (?=\S+ing or))) ?(\S+) or (\S+)"
)
_COUNT = re.compile(
    rf"how many (?:times (?:do|does|did) {_SUBJECT} ([\w'-]+)|(?!\[(?:goal|shot)){_N} are (?:there|visible))"
)
_TRAIT = re.compile(rf"{_WITH}|\bfrom {_N} to {_N}")  # of a thing: "opens with a key"
_SMALL = {
    *re.split(" ", "in on at of to with by for from and or that which who as then before after followed ,")
}
_PRONOUNS = {"", "i", "we", "he", "she", "they"}
_LIVING = {"people", "animals", "flyers"}
_DO = _LIVING | {"vehicles", "bodies"}
_MOVE = _DO | {"shapes", "things", "views", "measures"}
_ABLE = {"camera": {"cameras"}, "legs": _LIVING, "spinning": _MOVE - {"vehicles"}}
"""Kinds that the verbs of a list can move; a car that turns left does so backwards, too."""
Turn = tuple[str, str]
"""Start and end of a change: moving left is (right, left)."""
Form = tuple[str, str]
"""A verb and one of its forms: base, s, ing or done."""


class Unknown(Exception):
    """The answer about the reversed clip does not follow from the words; the text says why."""


class Event(NamedTuple):
    """An event: its subject ("" if not named), a verb that does not turn, what turns, and further words."""

    subject: str
    verb: str
    turns: frozenset[Turn]
    beside: tuple[str, ...] = ()

    def backwards(self) -> "Event":
        return self._replace(turns=frozenset((there, back) for back, there in self.turns))


Story = list[set[Event]]
"""The events of a text in their order, each in all ways in which it can be read; empty if one cannot be."""


class Reversals:
    """The words of reversals.toml and of a further file. Raises RequestError for a file of another form."""

    def __init__(self, further: str | None = None) -> None:
        words = _words(further)
        asides = "|".join(re.split(r",\s+", words["questions"]["asides"]))
        self.asides = re.compile(rf"(?: ,)? \b(?:{asides})\b(?: ,)? ")
        self.lists = {name: set(text.split()) for name, text in (words["verbs"] | words["questions"]).items()}
        self.nouns: dict[str, set[str]] = {}
        for kind, text in words["nouns"].items():
            for noun in text.split():
                self.nouns.setdefault(noun, set()).add(kind)
        self.ways: dict[tuple[str, str], tuple[Turn, set[str]]] = {}
        self.turning: dict[str, list[tuple[str, str, Turn, set[str]]]] = {}
        for how, pairs in (words["events"] | words["ways"]).items():
            for start, end, kinds in [(*pair[::step], kind) for *pair, kind in pairs for step in (1, -1)]:
                for phrase in end.split(", "):
                    verb, _, particle = phrase.partition(" ")
                    if how in words["events"]:
                        self.turning.setdefault(verb, []).append(
                            (how, particle, (start, end), set(kinds.split()))
                        )
                    self.ways[how, phrase] = (start, end), set(kinds.split())
        irregular = dict(each.split() for each in re.split(r",\s+", words["verbs"]["participles"]))
        verbs = {*self.turning}.union(*(self.lists[name] for name in words["verbs"] if name != "participles"))
        self.forms: dict[str, list[Form]] = {}
        for word, form in (each for verb in sorted(verbs) for each in _forms(verb, irregular)):
            self.forms.setdefault(word, []).append(form)
        turning = {
            word for word, forms in self.forms.items() if any(verb in self.turning for verb, _ in forms)
        }
        self.stops = self.lists["never"] | turning | {word for how, word in self.ways if how == "bare"}

    def answer(self, problem: str, problem_type: str, options: Sequence[str], answer: str) -> str:
        """Return the answer about the reversed clip. Raises Unknown.

        options: texts without letters. answer: for multiple choice the text of one of them.
        """
        asked, plain = self._read(problem), _plain(answer)
        if not asked:
            raise Unknown("the question has several sentences or a quotation")
        if problem_type in ("numerical", "regression"):
            count = _COUNT.fullmatch(asked)
            if not count or (count[1] and not self._is("counted", count[1])):
                raise Unknown("the number may change")
            return answer
        if problem_type != "multiple choice" or not options:
            raise Unknown("no rule for answers of this type")
        if plain in ("yes", "no") and {"yes", "no"}.issuperset(map(_plain, options)):
            if plain == "no":
                raise Unknown("the answer no does not say what happens")
            _refuse_unturned(self._asserted(asked))
            return next(each for each in options if _plain(each) == "no")
        offered = _EITHER.fullmatch(asked)
        if offered and {offered[2], offered[3]} <= {
            word for each in options for word in _plain(each).split()
        }:
            asked = f"{offered[1]} doing way"
        kinds, way = self._asked(asked)
        stories = [self._story(self._read(option, True), kinds, way) for option in options]
        story = stories[options.index(answer)]
        _refuse_unturned(story)
        wanted = [{event.backwards() for event in events} for events in reversed(story)]
        fits = [
            option
            for option, other in zip(options, stories, strict=True)
            if len(other) == len(wanted) and all(map(set.intersection, other, wanted))
        ]
        if len(fits) != 1 or fits[0] == answer:
            raise Unknown("the reversed answer is not among the options")
        return fits[0]

    def _asserted(self, asked: str) -> Story:
        """Return what a yes/no question says happens. Raises Unknown."""
        aux, _, rest = asked.partition(" ")
        be = aux in ("am", "is", "are", "was", "were")
        if not be and aux not in ("do", "does", "did"):
            raise Unknown("the question is not read")
        subject = re.match(_SUBJECT, rest)
        first = f"{subject[0]} {aux}{rest[subject.end() :]}" if subject and be else rest
        story = self._story(first, set(), False, not be) if subject else []
        named, parts = subject[0] if subject else "", rest.split(" ")
        for i in range(1, len(parts) if not story else 0):  # "is opening it | what the man is doing"
            for what, event in ((parts[:i], parts[i:]), (parts[i:], parts[:i])):
                with suppress(Unknown):
                    if not story and (story := self._story(" ".join(event), *self._asked(" ".join(what)))):
                        named = " ".join(re.findall(_N, " ".join(what)) or re.findall(_N, " ".join(event)))
        events = {event for readings in story for event in readings}
        if not story:
            raise Unknown("the question is no event that the rules can read")
        if len(story) > 1:
            clauses = re.findall(r" (?:before|after) (?:\[|\w+ing\b)?", asked)
            if any(be or each.endswith(" ") for each in clauses):
                raise Unknown("what lasts may last before and after")
            if any(event.verb in self.lists["lasting"] for event in events) or sum(map(_turning, story)) > 1:
                raise Unknown("it may be so both ways")
            subjects = {event.subject for event in events} - _PRONOUNS
            if clauses and len(subjects) > 1 and not any(map(_turning, story)):
                raise Unknown("one may do so before and after the other")
        elif "[it]" in asked or not re.fullmatch(rf"{_KNOWN}.*", named):
            raise Unknown("the question does not say which one")
        elif any(end.startswith("appear") for event in events for _, end in event.turns):
            raise Unknown("what appears may only be seen")
        return story

    def _asked(self, text: str) -> tuple[set[str], bool]:
        """Return the kinds of the nouns of a question, and whether its answer may be a direction.

        Raises Unknown for a word that could make it ask for something else.
        """
        text = _BESIDE.sub("", text)
        leftover = re.sub(_N, " ", text).split()
        moving = {word for word in leftover if self._is("motion", word)}
        tells = moving | self.lists["tells"].intersection(leftover)
        strange = set(leftover) - self.lists["asks"] - tells - {","} | set(re.findall(r"\bto (\w+)", text))
        general = re.search(rf"\bdo (?!{_KNOWN})\[", text)  # "which way do clocks go?"
        if strange or general or not tells or sum(word in moving for word in leftover) > 1:
            raise Unknown(f"the question has “{min(strange, default=text)}”")
        kinds = set[str]().union(*map(self._kinds, re.findall(_N, text)))
        moves = self.lists["movements"].intersection(leftover)
        way = "correct" not in leftover and (moves or (moving and self.lists["ways"].intersection(leftover)))
        verbs = [verb for word in moving for verb, _ in self.forms[word] if verb in self.lists["motion"]]
        return kinds, bool(way) and all(self._can(verb, kinds) for verb in verbs or [""])

    def _story(self, text: str, kinds: set[str], way: bool, base: bool = False) -> Story:
        """Read a text. kinds: of the nouns asked about. way: read bare directions. base: as after "does"."""
        text = re.sub("^first (, )?", "", text)
        parts = [part for each in _THEN.split(text) for part in reversed(_AFTER.split(each))]
        story = [set(self._events(part, kinds, way, base and text.startswith(part))) for part in parts]
        return story if all(story) else []

    def _events(self, text: str, kinds: set[str], way: bool, base: bool) -> Iterator[Event]:
        """Yield the ways in which a text can be read as an event."""
        if way and (found := self._turns("", text, kinds)):
            yield Event("", "", *found)
        if not (clause := _CLAUSE.fullmatch(text)):
            return
        subject, be, being, word, rest = (each or "" for each in clause.groups())
        kinds = self._kinds(subject) if subject not in ("", "[it]", "[they]") else kinds
        for verb, form in self.forms.get(word, ()):
            passive = form == "done" and bool(being or (be and verb in self.lists["alike"]))
            active = form == "ing" if be else not being and (form != "done" or bool(subject or rest))
            state = form == "ing" and verb in self.lists["states"]
            trait = form in ("base", "s") and kinds and not kinds & _LIVING and _TRAIT.search(f" {rest}")
            if (passive or active) and (form == "base" or not base) and not (state or trait):
                for event in self._happens(verb, rest, kinds, passive):
                    yield event._replace(subject=_bare(subject))

    def _happens(self, verb: str, rest: str, kinds: set[str], passive: bool) -> Iterator[Event]:
        """Yield what a verb and the words after it can say happens to a subject of these kinds."""
        moved = verb in self.lists["moved"]
        if moved or not passive:
            thing = re.match(rf"({_N}) (?=.)", rest) if moved and not passive else None
            if thing and not self._kinds(thing[1]) & (_MOVE - {"people"}):
                return
            if found := self._turns(verb, rest[thing.end() :] if thing else rest, kinds):
                yield Event("", verb, found[0], (*found[1], _bare(thing[1]) if thing else ""))
        for how, particle, turn, of in self.turning.get(verb, ()):
            particle = f" {particle}" if particle else ""
            tail = _BESIDE.pattern if kinds & _LIVING else _WITH  # "grows on a wall" is a state
            alone = re.fullmatch(rf"{particle}((?:{tail})*)", f" {rest}".rstrip())
            thing = rf"(?:{particle}( {_N})|( {_N}){particle})((?:{_BESIDE.pattern})*)"
            if alone and how != ("itself" if passive else "done") and (not kinds or kinds & of):
                yield Event("", "", frozenset({turn}), ("", _bare(alone[1])))
            does = how != "itself" and not passive and (not kinds or kinds & _DO)
            if does and (to := re.fullmatch(thing, f" {rest}")) and self._thing(to[1] or to[2]) & of:
                yield Event("", "", frozenset({turn}), (_bare(to[1] or to[2]), _bare(to[3])))
        if verb in self.lists["alike"] | self.lists["lasting"] and self._neutral(rest):
            yield Event("", verb, frozenset(), (_bare(rest),))

    def _turns(self, verb: str, text: str, kinds: set[str]) -> tuple[frozenset[Turn], tuple[str, ...]] | None:
        """Return what turns by the words after a verb, and what they name beside; None for other words."""
        moves = not verb or (verb in self.lists["motion"] and self._can(verb, kinds))
        if re.search(r"\b(?:up|down|away|off|out) (?:with|by)\b", text):  # "comes up with a plan"
            return None
        beside, text = tuple(map(_bare, _BESIDE.findall(text))), _BESIDE.sub("", text).strip()
        if found := _FROM_TO.fullmatch(text):
            start, end = _bare(found[2]), _bare(found[3])
            sides = [self.ways.get(("bare", each), (("", ""),))[0] for each in (end, start)]
            if moves and sides[0] == sides[1][::-1] != ("", ""):
                return frozenset(sides[:1]), beside
            places = moves and re.fullmatch(rf"{_N} {_N}", f"{found[2]} {found[3]}")
            changes = (verb in self.lists["change"] or not verb) and self._neutral(f"{start} {end}")
            one_step = not re.search(r"\b(?:to|from|and|or)\b", f"{start} {end}")
            if found[1] and start != end and one_step and (places or changes):
                return frozenset({(start, end)}), beside
        more = re.fullmatch(rf"(.+?)(?: (?:to|from) ({_N}))?", text) if verb in self.lists["become"] else None
        if more and (way := self.ways.get(("more", more[1]))):
            if kinds and not kinds & (way[1] or kinds - {"rooms", "slopes", "surfaces"}):
                return None
            return frozenset({way[0]}), (*beside, _bare(more[2] or ""))
        turns = {turn for part in text.split(" and ") if (turn := self._way(part, verb, kinds))}
        one_way = len(set(map(frozenset, turns))) == 1 + text.count(" and ")
        return (frozenset(turns), beside) if moves and one_way else None

    def _can(self, verb: str, kinds: set[str]) -> bool:
        """Tell whether what is of these kinds (of any, if empty) can move as a verb of motion says."""
        able = next((of for name, of in _ABLE.items() if verb in self.lists[name]), _MOVE)
        return not kinds or (bool(kinds & able) and "lines" not in kinds)

    def _way(self, text: str, verb: str, kinds: set[str]) -> Turn | None:
        """Return the direction that a text names; None if it names none in which the verb can go."""
        vertical = text.split(" ")[0] in ("up", "down")
        if vertical and (verb in self.lists["spinning"] or "switches" in kinds):  # "turns down the page"
            return None
        if noun := re.fullmatch(rf"(.+) ({_N})", text):
            turn, kinds = self.ways.get(("to", noun[1]), (("", ""), set()))
            if self._kinds(noun[2]) & kinds:
                return f"{turn[0]} {_bare(noun[2])}", f"{turn[1]} {_bare(noun[2])}"
        if text in ("up", "down") and verb and verb not in self.lists["lifting"]:
            return None
        way = _WAY.fullmatch(text)
        return self.ways.get(("bare", way[1] if way else ""), (None,))[0]

    def _neutral(self, text: str) -> bool:
        """Tell whether the words of a text, at most eight, turn nothing round."""
        words = re.findall(r"[\w'-]+", text.replace("_", " "))
        return len(words) <= 8 and self.stops.isdisjoint(words)

    def _is(self, name: str, word: str) -> bool:
        """Tell whether a word is a form of a verb in a list."""
        return any(verb in self.lists[name] for verb, _ in self.forms.get(word, ()))

    def _read(self, text: str, bare: bool = False) -> str:
        """Return the words of a text, each noun with its article and modifiers as one: [the_red_ball].

        bare: the article may be missing. Return "" for a quotation and for more than one sentence.
        """
        text = re.sub(r"^question(?: \d+)?:", "", text.lower())
        if re.search(r"[^\w\s,'’.?!-]|[.?!]\s*\w", text):
            return ""
        text = text.replace("’", "'").replace("each other", "each-other")
        text = re.sub(rf"\b(both|all)( of)? (?={_WHICH}\b)", "", text)
        text = " ".join(re.findall(r"[\w'-]+|,", text))
        words, out, i = self.asides.sub(" ", f" {text} ").split(), list[str](), 0
        while i < len(words):
            k = i + bool(re.fullmatch(_ARTICLE, words[i]))
            known = self.stops | _SMALL if k > i else self.stops | _SMALL | self.lists["asks"] | {*self.forms}
            heads = range(k, min(k + (5 if k > i else 1 + 2 * bare), len(words)))
            head = next((j for j in heads if self._noun(words[j])), None)
            before = words[k:head]
            is_verb = any(re.fullmatch(r"\w*[^s]s", word) for word in before) or words[i] in self.forms
            if head is None or (k == i and is_verb) or not known.isdisjoint(before):
                out.append(words[i])
            else:
                while self._noun("".join(words[head + 1 : head + 2])) and words[head + 1] not in self.forms:
                    head += 1
                out.append(f"[{'_'.join(words[i : head + 1])}]")
                i = head
            i += 1
        return " ".join(out)

    def _noun(self, word: str) -> set[str]:
        """Return the kinds of a noun, singular or plural; none for another word."""
        word = re.sub("'s?$", "", word)
        stems = [word, *(word.removesuffix(end) for end in ("s", "es") if len(word) > 3)]
        return next((self.nouns[stem] for stem in stems if stem in self.nouns), set())

    def _thing(self, noun: str) -> set[str]:
        """Return the kinds of what something is done to; none for idioms such as "lock eyes"."""
        kinds = self._kinds(noun)
        idiom = re.fullmatch(rf" ?\[(?!{_ARTICLE}_).+s\]", noun) and kinds & {"bodies", "openings"}
        return kinds if not idiom or "clothes" in kinds else set()

    def _kinds(self, noun: str) -> set[str]:
        return self._noun(re.findall(r"[\w'-]+", noun)[0].split("_")[-1])


def _refuse_unturned(story: Story) -> None:
    """Raise Unknown for an event that does not turn, and for what is the same in either direction."""
    if not story:
        raise Unknown("the answer is no event that the rules can read")
    if len(story) == 1 and not _turning(story[0]):
        raise Unknown("nothing turns round")
    for i, earlier in enumerate(story):
        for event, other in (
            (event, other) for later in story[i + 1 :] for event in earlier for other in later
        ):
            whose = event.subject == other.subject or not (event.subject and other.subject)
            if event.backwards().turns & other.turns or (event[1:] == other[1:] and whose):
                raise Unknown("it goes both ways")


def _turning(events: set[Event]) -> bool:
    return any(event.turns for event in events)


def _bare(text: str) -> str:
    """Return a text without brackets and articles."""
    return re.sub(rf"\[(?:{_ARTICLE}_)?([^]]*)\]", r"\1", text).strip()


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[\w'-]+", text.lower()))


def _forms(verb: str, irregular: dict[str, str]) -> Iterator[tuple[str, Form]]:
    """Yield the forms of a verb, each with what it is."""
    doubles = re.fullmatch("(?:un)?[^aeiou]*[aeiou][^aeiouwxy]", verb)
    stem = verb + verb[-1] if doubles else re.sub("(?<![eoy])e$", "", verb)
    short = re.sub("(?<=[^aeiou])y$", "i", verb)
    yield verb, (verb, "base")
    yield short + ("es" if short != verb or re.search("(s|x|z|ch|sh|o)$", verb) else "s"), (verb, "s")
    yield re.sub("i$", "y", stem) + "ing", (verb, "ing")
    yield irregular.get(verb, f"{short if short != verb else stem}ed"), (verb, "done")


def _words(further: str | None) -> dict[str, dict[str, Any]]:
    """Return the words of reversals.toml and of a user's file. Raises RequestError."""
    words = tomllib.loads(files("video_r1").joinpath("data/making/reversals.toml").read_text("utf-8"))
    try:
        more: dict[str, Any] = tomllib.loads(Path(further).read_text("utf-8")) if further else {}
        for section, name, entries in (
            (s, n, each) for s, named in more.items() for n, each in named.items()
        ):
            if isinstance(words[section][name], list):
                words[section][name].extend((one, other, f"{kinds}") for one, other, kinds in entries)
            else:
                words[section][name] += (", " if "," in words[section][name] else " ") + entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{further} must be TOML with entries as in reversals.toml: {error}") from error
    return words
