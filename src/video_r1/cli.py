"""The command line: `video-r1 {data,annotate,sft,rl,plan,eval,ask,serve,merge,report,demo}`.

Words are split into setting names and text here; `recipe` turns them into checked settings, and `commands`
runs them. Whatever needs torch is imported inside a command, so that help and refusals come at once.

Exit codes: 0 done; 1 the work failed; 2 the request was wrong (one line on stderr).
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from video_r1 import commands
from video_r1.command_help import command_help, overview
from video_r1.errors import RequestError, VideoR1Error
from video_r1.recipe import RECIPES_OF_TRAINING, SECTIONS, TRAINS, Recipe, find_recipe, load_recipe
from video_r1.settings.base import own_field_types
from video_r1.settings.types import FALSE_WORDS, TRUE_WORDS, takes_list


@dataclass(frozen=True)
class Command:
    """One command: what it does, the settings that may stand without `--`, examples, and what runs it."""

    summary: str
    positionals: tuple[str, ...]
    examples: tuple[str, ...]
    run: Callable[[Recipe], int]


# fmt: off
COMMANDS: dict[str, Command] = {
    "data check": Command(
        "check a manifest and open its media", ("manifest",),
        ("data check train.json --media_root /data", "data check train.json --media false"),
        commands.data_check),
    "data lab": Command(
        "write made-up clips with questions that need frame order", ("folder",),
        ("data lab lab --train 4000 --test 500 --seed 1",), commands.data_lab),
    "data base": Command(
        "pretrain the lab's small base model", ("folder",), ("data base base --steps 4500 --seed 0",),
        commands.data_base),
    "annotate": Command(
        "write rationales with a teacher and filter them into a manifest for SFT", ("manifest",),
        ("annotate train.json --teacher Qwen/Qwen2.5-VL-7B-Instruct --engine vllm --out cot.json",
         "annotate train.json --teacher http://host:8000/v1 --out cot.json --concurrency 2000",
         "annotate train.json --teacher http://host:8000/v1 --out cot.json --samples 4 --choose majority"),
        commands.annotate),
    "sft": Command(
        "supervised cold start on rationales", (),
        ("sft lab-sft", "sft video-r1-7b-sft --train_manifest cot.json --media_root /data"),
        commands.sft),
    "rl": Command(
        "T-GRPO or GRPO", (),
        ("rl lab-tgrpo --learning_rate 1e-5",
         "rl video-r1-7b-tgrpo --model_name_or_path runs/sft --max_steps 1000",
         "rl my.yaml --temporal_rule off --num_generations 16"), commands.rl),
    "plan": Command(
        "tokens and GPU memory that a recipe of sft or rl needs", (),
        ("plan video-r1-7b-tgrpo --model_config Qwen/Qwen2.5-VL-7B-Instruct --gpu_memory 80GB",
         "plan my.yaml --gpu_memory 24GB --processes 4 --use_peft"), commands.plan),
    "eval": Command(
        "score a checkpoint on a manifest or on benchmarks, with frames in order and shuffled",
        ("model", "manifest"),
        ("eval runs/rl test.json --order ordered,shuffled --frames 16,32,64",
         "eval runs/rl --bench vsibench,mvbench --frames 16,32,64 --compare paper",
         "eval runs/rl --bench tempcompass --allow_missing --temporal_gap"), commands.evaluate),
    "ask": Command(
        "ask a checkpoint about one video or image", ("model", "path", "question"),
        ('ask runs/rl clip.mp4 "Which way does the ball roll?" --options "A. left" "B. right"',),
        commands.ask),
    "serve": Command(
        "a vLLM server for training, evaluation and questions", ("model",),
        ("serve runs/sft --port 8000", "serve runs/sft --hand_over nccl --vllm_options='-tp 2'"),
        commands.serve),
    "merge": Command(
        "a plain checkpoint from a LoRA run", ("adapter", "out"),
        ("merge runs/lora runs/merged", "merge runs/lora/checkpoint-500 out --dtype bfloat16"),
        commands.merge),
    "report": Command("one HTML page from a run folder", ("run",), ("report runs/rl",), commands.report),
    "demo": Command("the whole pipeline on made-up clips", (), ("demo", "demo --seed 1"), commands.demo),
}
# fmt: on
# Not the program's fault: a full disk, a folder without permission, a file in a folder's place.
NOT_WRITTEN = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)
RECIPE_FIRST = RECIPES_OF_TRAINING  # their first word can be nothing but a recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Where it is installed, it tells everyone without a GPU that it would like one more package.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except RequestError as error:
        return failed(error, 2)
    except VideoR1Error as error:
        return failed(error, 1)
    except KeyboardInterrupt:
        return failed("interrupted", 1)
    except BrokenPipeError:  # the reader (`| head`) has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        return failed(f"{where}{error.strerror}; mend that, then start the same command again", 1)


def failed(message: object, code: int) -> int:
    """Print the message as one line on stderr and return the exit code."""
    print(f"video-r1: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def run(words: list[str]) -> int:
    """Find the command, and run it or print its help. Raises RequestError when there is no such command."""
    if not words or words[0] in ("-h", "--help"):
        print(overview({name: command.summary for name, command in COMMANDS.items()}))
        return 0
    if words[0] == "--version":
        print(f"video-r1 {metadata.version('video-r1')}")
        return 0
    name, rest = find_command(words)
    command = COMMANDS[name]
    if any(word in ("-h", "--help") for word in rest):
        print(command_help(name, command.summary, command.positionals, command.examples))
        return 0
    smoke = name in TRAINS and "--smoke" in rest
    recipe = read_request(name, [word for word in rest if not smoke or word != "--smoke"])
    if smoke:
        from video_r1.lab.smoke import run_smoke

        return run_smoke(recipe, command.run)
    return command.run(recipe)


def find_command(words: list[str]) -> tuple[str, list[str]]:
    """The command's name and the words after it."""
    if words[0] in COMMANDS:
        return words[0], words[1:]
    below = [name for name in COMMANDS if name.startswith(words[0] + " ")]
    if below and len(words) > 1 and f"{words[0]} {words[1]}" in COMMANDS:
        return f"{words[0]} {words[1]}", words[2:]
    if below and len(words) > 1 and words[1] in ("-h", "--help"):
        print(overview({name: COMMANDS[name].summary for name in below}))
        raise SystemExit(0)
    if below:
        said = f"{words[0]} {words[1]}" if len(words) > 1 else words[0]
        raise RequestError(f"{said} is not a command; say {' or '.join(below)}")
    close = difflib.get_close_matches(words[0], [name.split()[0] for name in COMMANDS], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise RequestError(f"{words[0]} is not a command; {hint}see video-r1 --help")


def read_request(name: str, words: list[str]) -> Recipe:
    """The resolved settings of a command line: an optional recipe, positional settings, and overrides."""
    types = {setting: hint for kind in SECTIONS[name] for setting, hint in own_field_types(kind).items()}
    plain, overrides = split_words(words, types)
    positionals, source = COMMANDS[name].positionals, None
    if plain and (name in RECIPE_FIRST or is_recipe(plain[0])):
        source, plain = plain[0], plain[1:]
    if len(plain) > len(positionals):
        takes = " ".join(["[RECIPE]", *(word.upper() for word in positionals)])
        raise RequestError(f"{plain[len(positionals)]!r} is one word too many; video-r1 {name} takes {takes}")
    for setting, word in zip(positionals, plain, strict=False):
        if setting in overrides:
            raise RequestError(f"{setting} is given twice: {word!r} and --{setting} {overrides[setting]}")
        overrides[setting] = word
    return load_recipe(name, source, overrides)


def is_recipe(word: str) -> bool:
    """Whether the word names a recipe: a YAML file, or a packaged recipe that no file or folder hides."""
    return word.endswith((".yaml", ".yml")) or (not Path(word).exists() and find_recipe(word) is not None)


def split_words(words: Sequence[str], types: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Words without `--`, and options: `--key value`, `--key=value`, `--flag`, `--list a b c`.

    A setting that takes a list has all words up to the next option; a true/false setting may stand alone.
    """
    plain: list[str] = []
    options: dict[str, Any] = {}
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--"):
            plain.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if equals:
            options[key] = value
            continue
        end = at
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        hint = types.get(key)
        if hint is bool:
            following = words[at] if at < end else ""
            taken = [following] if following.lower() in TRUE_WORDS + FALSE_WORDS else []
        else:
            taken = list(words[at:end]) if hint is not None and takes_list(hint) else list(words[at:end])[:1]
        at += len(taken)
        if not taken and hint is not None and hint is not bool:
            raise RequestError(f"--{key} needs a value; see video-r1 --help")
        options[key] = (taken[0] if len(taken) == 1 else taken) if taken else True
    return plain, options
