"""Compares mathematical answers by the library math-verify, in a process that can be killed.

An answer such as 9^{9^9} keeps sympy busy for hours, in C code that no signal handler and no thread
interrupts: the kernel ends the process by an alarm, and the answers count as different.
"""

import json
import subprocess
import sys
import threading
from functools import lru_cache

from video_r1.data.answers import plain_number
from video_r1.errors import VideoR1Error
from video_r1.processes import OneAProcess

SECONDS = 5  # for one comparison
MEMORY = 4 << 30  # bytes of address space
_DELIMITERS = ("$", "\\(", "\\[", "\\boxed")
_PROGRAM = f"""
import json, logging, os, resource, signal, sys
from math_verify import parse, verify
logging.disable()
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
print(flush=True)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides messages about single answers
for line in sys.stdin:
    signal.alarm({SECONDS})  # without a handler: the kernel ends the process
    truth, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))
    print(int(bool(truth and answer) and verify(truth, answer, timeout_seconds=None)), flush=True)
    signal.alarm(0)
"""


@lru_cache(100_000)
def same_expression(answer: str, truth: str) -> bool:
    """Whether both texts are the same value, expression, set, interval or equation, LaTeX or plain.

    "\\frac{1}{2}", "$0.5$", "1/2" and "50%" are one value; "x = 3" answers "3". Floats agree at six decimals.
    Plain numbers are read as `plain_number` reads them; "3,5" is a set.
    Texts that cannot be parsed or compared within `SECONDS` are different. Raises VideoR1Error without the
    package.
    """
    answer, truth = (plain_number(text) or text.strip() for text in (answer, truth))
    if not answer or not truth:
        return False
    return answer == truth or _comparer.one.ask(_delimited(truth), _delimited(answer))


def _delimited(text: str) -> str:
    return text if any(sign in text for sign in _DELIMITERS) else f"${text}$"


class _Comparer:
    """The comparing process, started again after it was killed. Serves all threads, one at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, truth: str, answer: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = _started()
            assert self.process.stdin is not None and self.process.stdout is not None
            try:
                self.process.stdin.write(json.dumps([truth, answer]) + "\n")
                self.process.stdin.flush()
                said = self.process.stdout.readline()
            except BaseException as error:  # Ctrl-C during a reply, which the next question must not get
                self._end()
                if isinstance(error, BrokenPipeError):
                    return False
                raise
            if not said:
                self._end()
            return said.strip() == "1"

    def close(self) -> None:
        with self.lock:
            self._end()

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _started() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C reaches this process, which then ends that one
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        said = process.communicate()[1].strip().splitlines() or ["it says nothing"]
        raise VideoR1Error(
            f"the process that compares mathematical answers does not start: {said[-1]}; if math_verify is "
            "missing: pip install 'video-r1[math]'"
        )
    return process


_comparer = OneAProcess(_Comparer)
