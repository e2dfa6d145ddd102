"""Our reading and scoring of answers against lmms-eval's, on some thousand generated outputs.

Its modules are loaded file by file: the package itself imports dozens of others. Where the two disagree on
purpose, the test says how, and fails when that changes.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from video_r1.data.manifests.records import Sample
from video_r1.evaluation.metrics import mean_relative_accuracy
from video_r1.evaluation.predictions import score_output

_SPEC = importlib.util.find_spec("lmms_eval")
pytestmark = pytest.mark.skipif(
    _SPEC is None, reason="lmms-eval is not installed (pip install lmms-eval==0.7.3)"
)

OPTIONS = ("A. the man sits down", "B. the man stands up", "C. a dog runs away", "D. the door is closed")
# As docs/evaluation.md has it: the reasoning goes with its tags, and the answer's tags go alone.
TAGS = [["<think>", "</think>"], ["<answer>", "<answer>"], ["</answer>", "</answer>"]]
THOUGHT = "<think>First {t}. It is not {M}.</think>\n"
# {L}, {t}: the letter and the text of the answer; {M}: another letter.
FORMS = {
    "tagged": THOUGHT + "<answer>{L}</answer>",
    "tagged, with a full stop": THOUGHT + "<answer>{L}.</answer>",
    "tagged, with its text": THOUGHT + "<answer>{L}. {t}</answer>",
    "letter": "{L}",
    "full stop": "{L}.",
    "letter and text": "{L}. {t}",
    "bold": "**{L}**",
    "answer is": "The answer is {L}.",
    "option": "Option {L}",
    "boxed": "\\boxed{{{L}}}",
    "reasoned": "First a man enters. Then he moves. The answer is {L}",
    "no answer": "I cannot tell.",
    # From here on the two are known to differ.
    "text": THOUGHT + "<answer>{t}</answer>",
    "sentence": "It shows that {t}.",
    "two letters": "{L} or {M}",
    "small letter": "{l}",
}
DIFFER = {"text", "sentence", "two letters", "small letter"}


@pytest.fixture(scope="module")
def lmms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Loads one of lmms-eval's modules by its path in the package."""
    assert _SPEC is not None and _SPEC.origin is not None
    package = Path(_SPEC.origin).parent
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))

    def load(path: str) -> Any:
        spec = importlib.util.spec_from_file_location("lmms_" + path.replace("/", "_")[:-3], package / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.partition(".")[0] == "video_r1":
                raise
            pytest.skip(f"lmms-eval's {path} needs {error.name}, which is not installed")
        return module

    yield load
    patch.undo()


def outputs(count: int, form: str) -> list[tuple[str, str]]:
    """Generated outputs of a form, each with its right letter; in half of them the answer is a wrong one."""
    rng = random.Random(form)
    made = []
    for _ in range(count):
        said, other = rng.sample(range(4), 2)
        truth = said if rng.random() < 0.5 else rng.choice([k for k in range(4) if k != said])
        text = OPTIONS[said][3:]
        made.append(
            (FORMS[form].format(L="ABCD"[said], l="abcd"[said], M="ABCD"[other], t=text), "ABCD"[truth])
        )
    return made


def choice(truth: str) -> Sample:
    return Sample(1, "?", "video", "multiple choice", f"<answer>{truth}</answer>", "a.mp4", OPTIONS)


@pytest.mark.parametrize("form", FORMS)
def test_multiple_choice(form: str, lmms: Callable[[str], Any]) -> None:
    """Video-MME, VideoMMMU, MMVU and TempCompass' captions all read letters with this one function."""
    extract = lmms("tasks/_task_utils/mcq_extract.py").extract_mcq_answer
    strip = lmms("api/reasoning.py").strip_reasoning_tags
    letters = [option[0] for option in OPTIONS]
    pairs = []
    for output, truth in outputs(200, form):
        ours = score_output(choice(truth), output)
        theirs = extract(strip(output, TAGS), letters)
        pairs.append((ours.prediction == theirs, ours.score == float(theirs == truth)))
    agreement = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
    if form in DIFFER:
        assert (
            agreement[0] == 0
        )  # ours reads an option's text and a small letter, and no answer in two letters
    else:
        assert agreement == [1.0, 1.0]


def number_pairs(count: int) -> list[tuple[float, float]]:
    """Predictions and truths as VSI-Bench has them: counts, metres, centimetres and square metres."""
    rng = random.Random("numbers")
    made = []
    while len(made) < count:
        truth = rng.choice(
            [rng.randint(1, 20), rng.uniform(0.2, 9), rng.uniform(20, 300), rng.uniform(5, 60)]
        )
        truth = round(truth, rng.choice([0, 1, 2]))
        if truth:
            made.append((round(truth * rng.uniform(0.2, 1.9), rng.choice([0, 1, 2])), truth))
    return made


def test_mean_relative_accuracy(lmms: Callable[[str], Any]) -> None:
    """Theirs counts an error of exactly 1 − θ as within it; the paper and ours do not. All else is equal."""
    theirs = lmms("tasks/vsibench/utils.py").mean_relative_accuracy
    pairs = number_pairs(5000)
    ours = [mean_relative_accuracy(*pair) for pair in pairs]
    different = 0
    for (predicted, truth), score in zip(pairs, ours, strict=True):
        other = theirs(predicted, truth, 0.5, 0.95, 0.05)
        if abs(score - other) > 1e-12:
            different += 1
            twentieths = 20 * abs(predicted - truth) / truth
            assert abs(twentieths - round(twentieths)) < 1e-9, (predicted, truth)
            assert abs(score - other) == pytest.approx(0.1)  # one θ of ten
    assert 0 < different < 0.05 * len(pairs)
