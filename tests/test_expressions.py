"""Mathematical answers: one value in its many forms, and answers that no library ends with."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from video_r1.data import expressions
from video_r1.data.scores import correctness, is_correct
from video_r1.errors import VideoR1Error

pytest.importorskip("math_verify")


@pytest.fixture(autouse=True)
def afresh() -> None:
    expressions.same_expression.cache_clear()


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("1/2", r"\frac{1}{2}", 1.0),
        (r"\boxed{7}", "7", 1.0),
        ("x = 3", "3", 1.0),
        (r"2\sqrt{2}", r"\sqrt{8}", 1.0),
        (r"\{2, 1\}", r"\{1, 2\}", 1.0),
        ("(0,1)", "[0, 1)", 0.0),
        ("0.333", r"\frac{1}{3}", 0.0),  # agrees at three decimals, not at six
        (r"\frac{1}{", "4", 0.0),
        ("1 200", "1200", 1.0),
        ("−5", "-5", 1.0),
        ("5,3", "3,5", 1.0),  # a set
        ("35", "3,5", 0.0),
    ],
)
def test_one_value_in_its_forms(answer: str, truth: str, score: float) -> None:
    assert correctness("math", answer, truth) == score
    assert is_correct("math", score) == (score == 1.0)


def test_an_answer_that_never_ends_is_wrong_and_the_next_one_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expressions, "_PROGRAM", expressions._PROGRAM.replace("alarm(5)", "alarm(1)"))
    monkeypatch.setattr(expressions._comparer, "one", expressions._Comparer())
    began = time.monotonic()
    assert correctness("math", "9^{9^{9^{9}}}", "3") == 0.0
    assert time.monotonic() - began < 20
    assert correctness("math", "1/2", "0.5") == 1.0
    expressions._comparer.one.close()


def test_threads_and_a_forked_process_ask_too() -> None:
    found: list[float] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(correctness("math", f"{n}/2", f"{n / 2}")))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1.0] * 8
    ours = expressions._comparer.one.process
    comparer = expressions._comparer.one
    comparer.lock.acquire()  # as if another thread was asking just then
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        right = correctness("math", "9/2", "4.5") == 1.0
        own = expressions._comparer.one.process
        os._exit(0 if right and own and ours and own.pid != ours.pid else 1)
    comparer.lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "_PROGRAM", "import math_verify_is_not_here")
    monkeypatch.setattr(expressions._comparer, "one", expressions._Comparer())
    with pytest.raises(VideoR1Error, match=r"math_verify_is_not_here.*video-r1\[math\]"):
        correctness("math", "1", "2")
