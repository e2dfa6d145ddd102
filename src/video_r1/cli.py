"""The command line: `video-r1 {data,annotate,sft,rl,plan,eval,ask,serve,merge,report,studio,lab,demo}`.

This module splits words into settings, `recipe` checks them, and `commands` names the function that does the
work. The function is imported last, so that help and refusals come at once.

Exit codes: 0 done; 1 the work failed; 2 the request was wrong (one line on stderr); 130 and 143 after Ctrl-C
and SIGTERM.
"""

import difflib
import errno
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from video_r1.availability import check_adapters, check_checkpoint
from video_r1.command_help import command_help, overview
from video_r1.commands import COMMANDS, TRAINS
from video_r1.console import printable_output, tell, tidy_output
from video_r1.errors import RequestError, VideoR1Error, without_secrets
from video_r1.files import check_place
from video_r1.processes import Interrupted, ended_by_signals, number_of
from video_r1.recipe import Recipe, check_machine, load_recipe, resolved_text
from video_r1.recipe_files import find_recipe
from video_r1.settings.base import flat_types
from video_r1.settings.decoding import SCHEMES, addresses, has_path
from video_r1.settings.types import FALSE_WORDS, TRUE_WORDS, takes_list, takes_sentences

# No fault of the program: a folder without permission, a file in its place, a full or read-only disk.
NOT_ALLOWED = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SECONDS_TO_BE_ENDED = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    tidy_output()
    try:
        with ended_by_signals(), printable_output():
            return run(list(sys.argv[1:] if argv is None else argv))
    except RequestError as error:
        return failed(error, 2)
    except VideoR1Error as error:
        return failed(error, 1)
    except KeyboardInterrupt as stop:
        return failed(str(stop) or "interrupted", 128 + number_of(stop))
    except BrokenPipeError:  # the reader (`| head`) has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if not isinstance(error, NOT_ALLOWED) and error.errno not in NOT_WRITTEN:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        return failed(f"{where}{error.strerror}; fix that, then run the same command again", 1)


def failed(message: object, code: int) -> int:
    """Print the message as one line on stderr and return the exit code.

    A wrong request (2) is wrong in all processes: one on each machine prints it, and ends the others.
    """
    if code == 2 and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SECONDS_TO_BE_ENDED)
    if code < 128 or os.environ.get("LOCAL_RANK", "0") == "0":  # a signal reaches all processes
        tell(without_secrets(f"video-r1: {' '.join(str(message).split())}"))
    return code


def run(words: list[str]) -> int:
    """Find the command, and run it or print its help. Raises RequestError when there is no such command."""
    if not words or words[0] in ("-h", "--help"):
        print(overview(COMMANDS))
        return 0
    if words[0] == "--version":
        print(f"video-r1 {metadata.version('video-r1')}")
        return 0
    name, rest = find_command(words)
    if any(word in ("-h", "--help") for word in rest):
        print(command_help(name, "all" in rest))
        return 0
    flags = {"--print_config", "--print-config", *(["--smoke"] if name in TRAINS else [])} & set(rest)
    recipe = read_request(name, [word for word in rest if word not in flags])
    if flags == {"--smoke"}:
        from video_r1.lab.smoke import run_smoke

        return run_smoke(recipe, carry_out)
    if flags:
        print(resolved_text(recipe), end="")
        return 0
    from video_r1.next_steps import again, next_steps  # not for help: it imports fsspec

    try:
        code = carry_out(recipe)
    except KeyboardInterrupt as stop:
        raise Interrupted(number_of(stop), again(name, words, str(stop))) from stop
    if code == 0 and os.environ.get("RANK", "0") == "0":
        for line in next_steps(recipe):
            print(line)
    return code


def check_sources(recipe: Recipe) -> None:
    """Raise RequestError for manifests, checkpoints and benchmarks that are not there."""
    from video_r1.data.manifests.records import check_source

    values, command = recipe.values(), recipe.command
    if command == "eval":
        if (values["manifest"] is None) == (values["bench"] is None):
            raise RequestError(
                "eval needs a manifest or benchmarks (--bench vsibench,mvbench), one of the two"
            )
        if values["bench"]:
            from video_r1.evaluation.benchmarks.loading import find_benchmark

            for name in values["bench"]:
                find_benchmark(name)
    if command == "merge":
        check_adapters(Path(values["adapter"]))
    sources = ("table", "manifest", "train_manifest", "eval_manifest")
    checkpoints = ("model_name_or_path", "teacher", "model")
    if command == "plan":  # it needs neither questions nor weights
        sources, checkpoints = (), ("model_config",)
    for source in filter(None, map(values.get, sources)):
        check_source(source)
    checkpoint, engine = next(filter(None, map(values.get, checkpoints)), ""), values.get("engine") or ""
    at_endpoint = engine.startswith(SCHEMES) and has_path(addresses(engine)[0])  # then `model` is its name
    if checkpoint and not at_endpoint and not checkpoint.startswith(SCHEMES):
        check_checkpoint(checkpoint, with_weights=command != "plan")


def carry_out(recipe: Recipe) -> int:
    """Run the command's function. Return its number as the exit code, or 0. A returned path is printed."""
    check_machine(recipe)  # first: torch takes seconds to import
    check_sources(recipe)
    for name in ("output_dir", "out"):
        if place := recipe.values().get(name):
            check_place(name, Path(place))
    command = COMMANDS[recipe.command]
    work = command.function()
    if command.given == "values":
        result = work(**recipe.values())
        if isinstance(result, Path):
            print(result)
    else:
        result = work(*(recipe.sections if command.given == "sections" else [recipe]))
    return result if isinstance(result, int) else 0


def find_command(words: list[str]) -> tuple[str, list[str]]:
    """Return the command's name and the words after it."""
    if words[0] in COMMANDS:
        return words[0], words[1:]
    said = " ".join(words[:2])
    if said in COMMANDS:
        return said, words[2:]
    below = [name for name in COMMANDS if name.startswith(words[0] + " ")]
    if below and words[1:2] in (["-h"], ["--help"]):
        print(overview(below))
        raise SystemExit(0)
    if below:
        raise RequestError(f"{said} is not a command; say {' or '.join(below)}")
    close = difflib.get_close_matches(words[0], [name.split()[0] for name in COMMANDS], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise RequestError(f"{words[0]} is not a command; {hint}see video-r1 --help")


def read_request(name: str, words: list[str]) -> Recipe:
    """Resolve the settings of a command line: optional recipe, positional settings, overrides."""
    command, source = COMMANDS[name], None
    positionals = command.positionals
    plain, overrides = split_words(words, flat_types(command.types()))
    hidden = plain and Path(plain[0]).exists()  # a file or folder hides a packaged recipe of its name
    named = plain and (plain[0].endswith((".yaml", ".yml")) or (not hidden and find_recipe(plain[0])))
    if plain and (command.plans_training or named):
        source, plain = plain[0], plain[1:]
    last = len(positionals) - 1
    if len(plain) > last >= 0 and takes_list(command.types()[positionals[last]]):
        plain = [*plain[:last], plain[last:]]
    if len(plain) > len(positionals):
        takes = " ".join(["[RECIPE]", *(word.upper() for word in positionals)])
        raise RequestError(f"{plain[len(positionals)]!r} is one word too many; video-r1 {name} takes {takes}")
    for setting, word in zip(positionals, plain, strict=False):
        if setting not in overrides:
            overrides[setting] = word
        elif takes_sentences(command.types()[setting]):
            overrides[setting] = [*word, *overrides[setting]]
        else:
            raise RequestError(f"{setting} is given twice: {word!r} and --{setting} {overrides[setting]}")
    return load_recipe(name, source, overrides)


def split_words(words: Sequence[str], types: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Split into words without `--` and options: `--key value`, `--key=value`, `--flag`, `--list a b c`.

    A list takes all words up to the next option, a true/false setting needs none, a list of sentences may be
    repeated.
    """
    plain: list[str] = []
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            plain.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        hint = types.get(key)
        if equals:
            options[key] = [*options.get(key, []), value] if takes_sentences(hint) else value
            continue
        taken = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
        if hint is None or not takes_list(hint):
            taken = taken[:1]
        if hint is bool and taken and taken[0].lower() not in TRUE_WORDS + FALSE_WORDS:
            taken = []
        del rest[: len(taken)]
        if not taken and hint is not None and hint is not bool:
            raise RequestError(f"--{key} needs a value; see video-r1 --help")
        if takes_sentences(hint):
            options[key] = [*options.get(key, []), *taken]
        else:
            options[key] = (taken[0] if len(taken) == 1 else taken) if taken else True
    return plain, options
