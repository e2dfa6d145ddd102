"""Time and memory of checking a manifest of the published training set's size, without opening media.

    python -m benchmarks.manifest --json

Writes a manifest with the shares of types and modalities of the field's 263,071-row set into a temporary
folder and checks it in a fresh process, so that the memory is the check's own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._command import benchmark_parser

ROWS = 263_071
VIDEO_SHARE = 116 / 262
TYPE_SHARES = {"multiple choice": 0.6, "numerical": 0.15, "OCR": 0.05, "free-form": 0.15, "regression": 0.05}
SENTENCE = "the man walks behind a red car and then opens its door before somebody calls him from the house"
WORDS = SENTENCE.split()


def write_manifest(path: Path, rows: int, seed: int = 0) -> None:
    """Writes a JSON list of `rows` correct rows with the field's record format."""
    draw = random.Random(seed)
    with path.open("w") as stream:
        for number in range(rows):
            problem_type = draw.choices(list(TYPE_SHARES), list(TYPE_SHARES.values()))[0]
            video = draw.random() < VIDEO_SHARE
            options, answer = [], " ".join(draw.choices(WORDS, k=6))
            if problem_type == "multiple choice":
                options = [f"{letter}. {' '.join(draw.choices(WORDS, k=5))}" for letter in "ABCD"]
                answer = draw.choice("ABCD")
            elif problem_type in ("numerical", "regression"):
                answer = f"{draw.uniform(0, 1000):.2f}"
            source = f"set-{draw.randrange(40)}/part_{draw.randrange(5)}"
            row = {
                "problem_id": number,
                "problem": " ".join(draw.choices(WORDS, k=40)) + "?",
                "data_type": "video" if video else "image",
                "problem_type": problem_type,
                "options": options,
                "process": "",
                "solution": f"<answer>{answer}</answer>",
                "path": f"./{source}/{draw.getrandbits(64):016x}.{'mp4' if video else 'png'}",
                "data_source": source,
            }
            stream.write(("[" if number == 0 else ",\n") + json.dumps(row))
        stream.write("]")


def measure(path: Path) -> dict[str, float]:
    """Checks the manifest at `path` in this process; seconds include the imports that the check needs."""
    start = time.perf_counter()
    from video_r1.data.manifests.records import load_manifest

    samples = load_manifest(path)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": len(samples), "seconds": round(seconds, 2), "peak_rss_gb": round(peak / 1e9, 3)}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        write_manifest(path, arguments.rows)
        size = path.stat().st_size
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.manifest", "--measure", str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
    print(json.dumps(json.loads(run.stdout) | {"manifest_mb": round(size / 1e6, 1)}))


if __name__ == "__main__":
    main()
