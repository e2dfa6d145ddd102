"""The tables of figures in docs/, from the JSON files that commands wrote.

    python -m benchmarks.docs_tables [NAME … | all]

A table stands behind a comment that says what makes it and of which files, beside the page:

    <!-- figures demo: demo/seed-0.json demo/seed-1.json demo/seed-2.json -->

Without a name every table whose files are there is written anew. A NAME of RUNS (`all`: each of them) is run
first, and what it prints becomes docs/figures/NAME.json. A demo's file is its summary.json, an audit's its
audit.json, as they were written. Tables of research/temporal_credit are made by its analysis.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.temporal_credit.analysis import (
    confirmation,
    first_study,
    first_study_power,
    second_base,
    settings,
    still_clips,
)
from video_r1.evaluation.audit import audit_sentences
from video_r1.files import replace_json, replace_text

DOCS = Path(__file__).parents[1] / "docs"
STUDY = DOCS.parent / "research" / "temporal_credit"
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(STUDY.glob("*.md"))]
RUNS = {
    "update": "update",
    "update-256": "update --completion 256",
    "update-lab": "update --size lab --completion 60 --questions 8",
    "update-lab-256": "update --size lab --completion 256",
    "update-lab-ragged": "update --size lab --completion 256 --ragged 39 --questions 4",
    "update-qwen3_5": "update --family qwen3_5 --rounds 3",
    "rollout": "rollout",
    "rollout-4": "rollout --questions 4",
    "rollout-qwen3_5": "rollout --family qwen3_5 --rounds 3",
    "step": "step",
    "gate": "step --gate",
    "gate-frozen": "step --gate --frozen",
    "gate-256": "step --gate --completion 256",
    "gate-256-frozen": "step --gate --completion 256 --frozen",
    "gate-lab": "step --gate --size lab --rounds 15",
    "gate-lab-frozen": "step --gate --size lab --frozen --rounds 15",
    "annotation": "annotation --requests 500,2000",
    "complexity": "complexity", "contrast_units": "contrast_units",
    "decode": "decode", "evaluation": "evaluation", "launches": "launches", "manifest": "manifest",
    "memory": "memory", "scale": "scale", "sft": "sft", "studio": "studio", "trl": "trl", "vllm": "vllm",
    "workers": "workers",
}  # fmt: skip
"""Figures by name, and the words behind `python -m benchmarks.` that print them."""
ONE_THREAD = ("sft", "evaluation")
Figures = dict[str, Any]
_BLOCK = re.compile(
    r"^<!-- figures (?P<maker>\w+): (?P<files>[^\n]+?) -->\n(?P<body>(?:\|[^\n]*\n)+|```\w*\n.*?^```\n)",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A table of a page, or a block of text, and what makes it."""

    maker: str
    files: tuple[Path, ...]
    body: str
    place: slice  # of the body in the page

    @property
    def is_there(self) -> bool:
        """Whether somebody has its files."""
        return all(path.is_file() for path in self.files)

    def made(self) -> str:
        """The body as its files say. Raises KeyError where they are of another form."""
        texts = [gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in self.files]
        return MAKERS[self.maker]([json.loads(text) for text in texts])


def blocks(text: str, folder: Path = DOCS) -> Iterator[Block]:
    """Every block of figures of a page in this folder."""
    for found in _BLOCK.finditer(text):
        files = tuple(folder / name for name in found["files"].split())
        yield Block(found["maker"], files, found["body"], slice(*found.span("body")))


def written_anew(text: str, folder: Path = DOCS) -> str:
    """A page with its blocks as their files say; those without files stay as they are."""
    for block in reversed([*blocks(text, folder)]):
        if block.is_there and block.maker in MAKERS:
            text = text[: block.place.start] + block.made() + text[block.place.stop :]
    return text


def rows_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, *rows]
    texts = ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(head), *texts[1:]]) + "\n"


def with_interval(value: float, interval: Sequence[float]) -> str:
    """`0.464 [0.419, 0.509]`"""
    low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def ratio(found: Figures, digits: int = 2) -> str:
    """`6.20 (5.89 to 6.27)`"""
    middle, low, high = (f"{found[name]:.{digits}f}" for name in ("ratio", "ratio_min", "ratio_max"))
    return f"{middle} ({low} to {high})"


# --- what makes which table -----------------------------------------------------------------------


def demo(seeds: Sequence[Figures]) -> str:
    """Accuracies and gaps of the demo's three checkpoints."""
    names = {"sft": "SFT", "grpo": "GRPO", "tgrpo": "T-GRPO"}
    rows = [
        [
            str(seed),
            names[stage],
            *(
                with_interval(found["accuracy"][stage][view], found["interval95"][stage][view])
                for view in ("lying", "ordered", "shuffled")
            ),
            with_interval(found["temporal_gap"][stage]["gap"], found["temporal_gap"][stage]["interval95"]),
        ]
        for seed, found in enumerate(seeds)
        for stage in names
    ]
    return rows_of(("seed", "checkpoint", "lying marks", "in order", "shuffled", "temporal gap"), rows)


def demo_seconds(seeds: Sequence[Figures]) -> str:
    """Seconds of the demo's stages."""
    rows = []
    for seed, found in enumerate(seeds):
        took = found["seconds"]
        evaluations = sum(value for name, value in took.items() if name.startswith("eval"))
        stages = [took[name] for name in ("total", "lab", "sft", "grpo", "tgrpo")]
        rows.append(
            [str(seed), *(f"{value:.0f}" for value in (*stages, evaluations, found["test_questions"]))]
        )
    head = ("seed", "seconds in all", "lab", "SFT", "GRPO", "T-GRPO", "evaluations", "test questions")
    return rows_of(head, rows)


def audit(found: Sequence[Figures]) -> str:
    """What an audit says in sentences."""
    return "\n".join(["```text", *audit_sentences(found[0]), "```\n"])


def update(runs: Sequence[Figures]) -> str:
    """A group in one row against the expanded batch."""
    rows = []
    for found in runs:
        sizes, lengths = found["sizes"], found["sizes"]["completions"]
        longest = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(max(lengths))
        questions = f", {sizes['questions']} questions" if sizes["questions"] > 1 else ""
        said = f"{sizes['model']}: prompt {sizes['prompt']}, completions of {longest}, G = {len(lengths)}"
        measured = [ratio(found), *(f"{found[n]:.2f}" for n in ("flop_ratio", "share_of_flop_ratio"))]
        differ = (f"{found[name]:.0e}" for name in ("largest_logprob_difference", "largest_gradient_error"))
        rows.append([said + questions, *measured, f"{found['peak_memory_ratio']:.3f}", *differ])
    head = ("size", "time ratio", "FLOP ratio", "share of it", "peak memory", "log-probs differ by")
    return rows_of((*head, "gradients, relative"), rows)


def states(runs: Sequence[Figures]) -> str:
    """An update and a rollout of a family whose layers have a state."""
    rows = [
        [
            f"`python -m benchmarks.{name} --json --family {found['sizes']['family']} "
            f"--rounds {found['rounds']}`",
            f"{found['seconds']:.1f} s",
            f"{found['seconds_other']:.1f} s",
            ratio(found, 1),
        ]
        for name, found in zip(("update", "rollout"), runs, strict=True)
    ]
    head = ("", "group in one row or shared prefill", "separate rows or `generate`")
    return rows_of((*head, "ratio (lowest to highest)"), rows)


def sft(found: Sequence[Figures]) -> str:
    """The head and the whole step of SFT."""
    parts = {
        "head: logits, loss and their gradients": found[0]["head"],
        "the whole step, forward and backward": found[0],
    }
    rows = [
        [
            name,
            f"{part['peak_mib']:,.0f} MiB",
            f"{part['peak_mib_other']:,.0f} MiB, {1 / part['peak_memory_ratio']:.1f} times",
            ratio(part),
        ]
        for name, part in parts.items()
    ]
    return rows_of(("part", "peak memory", "against the padded batch", "time ratio"), rows)


def launches(found: Sequence[Figures]) -> str:
    """What is dispatched."""

    def said(name: str) -> str:
        return f"{found[0][name]['kernels']:,} kernels, {found[0][name]['views']:,} views"

    tower, calls = (
        "vision tower, a clip of 16 frames, forward, recomputation and backward",
        "its calls of attention",
    )
    rows = [
        ["a decoded token, all weights", "", f"{said('decode')}; on a GPU one recorded step"],
        ["a decoded token, LoRA on all linear layers", "", said("decode_lora")],
        [tower, said("vision_transformers"), said("vision")],
        [calls, *(f"{found[0][name]['calls']:,}" for name in ("vision_transformers", "vision"))],
        ["update of a group in one row, forward, recomputation and backward", "", said("update")],
    ]
    return rows_of(("", "transformers alone", "here"), rows)


def gpu_steps(found: Sequence[Figures]) -> str:
    """Return the estimated steps on GPUs."""
    rows = []
    for name, case in found[0]["estimated, not measured"].items():
        seconds, questions = case["seconds"], case["questions"]
        cells = [f"{case['peak_gib']} GiB", f"{seconds:.1f} s", f"{case['parts']['decoding']:.1f} s"]
        hours = 8000 / questions * seconds / 3600
        rows.append([name, str(questions), *cells, f"{seconds / questions:.2f} s", f"{hours:.1f}"])
    heads = ("", "questions a step", "peak", "step", "of it decoding", "a question", "hours, 8,000 questions")
    return rows_of(heads, rows)


def ratios(runs: Sequence[Figures]) -> str:
    """What is compared with what is usual, a row for each benchmark."""
    updated, one, four, step, tuned, trl, decoded, vllm, evaluated, workers, memory = runs
    clips = decoded["parts"].values()
    media = ", ".join(f"{clip['ratio']:.2f} ({name})" for name, clip in workers["clips"].items())
    planned = 100 * max(abs(memory[name] - 1) for name in ("ratio_min", "ratio_max"))

    def peak(found: Figures) -> str:
        return f"{ratio(found)}, peak memory {found['peak_memory_ratio']:.3f}"

    rows = [
        ("`update`", "a group in one row, with the expanded batch (pixels and prompt G times, all logits)",
         "5", peak(updated)),
        ("`rollout`", "one prefill a question, with `model.generate(num_return_sequences=G)`",
         "3", f"{ratio(one)} for one question; {ratio(four)} for four"),
        ("`step`", "decoding, both rollouts, rewards, update, with the reference's algorithm",
         "4", peak(step)),
        ("`sft`", "an SFT step with responses in one row and logits in chunks, with a padded batch and all "
         "logits", "–", peak(tuned)),
        ("`trl`", f"whole trainers on image questions, with TRL {trl['trl']}'s `GRPOTrainer`", "2",
         ratio(trl)),
        ("`decode`", "16 frames of a 10-minute 1080p clip and of short 360p clips, with decord",
         "1", " and ".join(map(ratio, clips))),
        ("`vllm`", "our engine, with a bare `LLM.generate` of the same requests", "0.95", ratio(vllm, 3)),
        ("`evaluation`", "decoding beside generation, with decode-then-generate (decoding "
         f"{100 * evaluated['decoding_share']:.0f} % of its time)", "1.5",
         f"{ratio(evaluated)}; {evaluated['ratio_one_count']:.2f} with one frame count; "
         f"{evaluated['ratio_cached']:.2f} from the frame cache"),
        ("`workers`", "reading media in a process that can be killed, with reading in this one", "–", media),
        ("`memory`", "the plan's peaks with measured ones, 315 million weights, full and LoRA",
         "within 15 %", f"within {planned:.1f} %"),
        ("`complexity`", "growth with G, frames and length", "–", "below"),
    ]  # fmt: skip
    return rows_of(("command `python -m benchmarks.…`", "what is compared", "bar", "measured"), rows)


def gate(runs: Sequence[Figures]) -> str:
    """A step with `temporal_rule: likelihood_gate` over one with `margin`: counted FLOPs, and time."""
    rows = []
    for found in runs:
        sizes, units = found["sizes"], found["gate_to_margin"].values()
        rows.append([
            f"{sizes['model']}, {sizes['completion']}", "frozen" if sizes["frozen"] else "trained",
            *(f"{unit['flops']:.3f}" for unit in units), *map(ratio, units),
        ])  # fmt: skip
    head = ("model, completions", "tower", "FLOPs, frames", "patches", "time, frames", "patches")
    return rows_of(head, rows)


def decode(found: Sequence[Figures]) -> str:
    """Frames of clips against decord."""
    rows = [
        [
            f"{name}, {part['clips']} clip{'s' * (part['clips'] > 1)}",
            f"{part['cpu_milliseconds']:,.0f} ms a clip",
            ratio(part),
            f"{part['cpu_ratio']:.2f}",
            f"{part['ratio_everything']:.2f}",
        ]
        for name, part in found[0]["parts"].items()
    ]
    head = (
        "clip",
        "ours, processor time",
        "against decord, wall",
        "processor",
        "against decoding everything",
    )
    return rows_of(head, rows)


def annotation(found: Sequence[Figures]) -> str:
    """What annotation needs while an endpoint works on many requests."""
    rows = [
        [
            f"{each['requests']:,}",
            f"{each['under_way']:,}",
            str(each["threads"]),
            f"{each['cpu_seconds']:.1f} s",
            f"{each['seconds']:.1f} s",
            f"{each['peak_mb'] / 1e3:.2f} GB",
        ]
        for each in found[0]["runs"]
    ]
    head = ("questions", "under way at once", "threads", "processor's time", "seconds", "peak")
    return rows_of(head, rows)


def contrast_units(found: Sequence[Figures]) -> str:
    """Frames against patches as the unit of a contrast, and two draws of shuffled frames."""
    names = ("correlation", "rank_correlation", "tokens", "same_key_tokens")
    compared = {
        "shuffled: frames, patches": found[0]["units"]["shuffled"],
        "shuffled: frames, frames in another order": found[0]["two_orders"],
        "reversed: frames, patches": found[0]["units"]["reversed"],
    }
    rows = [[name, *(f"{values[each]:.2f}" for each in names)] for name, values in compared.items()]
    return rows_of(("", "Δ", "ranks of Δ", "tokens", "same key tokens"), rows)


MAKERS: dict[str, Callable[[Sequence[Any]], str]] = {
    made.__name__: made
    for made in (
        demo, demo_seconds, audit, ratios, update, states, gate, sft, decode, annotation, launches,
        gpu_steps, contrast_units, confirmation, first_study, first_study_power,
        second_base, settings, still_clips,
    )
}  # fmt: skip
"""By the name behind `figures`."""


def run(name: str) -> None:
    """Runs a benchmark and keeps what it prints."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if name in ONE_THREAD else {})
    words = [sys.executable, "-m", *f"benchmarks.{RUNS[name]} --json".split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"benchmarks.{RUNS[name]} failed:\n{done.stderr}")
    print(done.stdout, end="", flush=True)
    (DOCS / "figures").mkdir(exist_ok=True)
    replace_json(DOCS / "figures" / f"{name}.json", json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*RUNS, "all", []], metavar="NAME")
    names = parser.parse_args().names
    for name in RUNS if "all" in names else names:
        run(name)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (anew := written_anew(text, page.parent)) != text:
            replace_text(page, anew)
            print(f"{page.name}: written anew")


if __name__ == "__main__":
    main()
