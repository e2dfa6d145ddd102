"""Help texts of the command line, written from the settings' own names, types, defaults and help."""

import dataclasses
import itertools
import textwrap
from collections.abc import Container, Iterable

from video_r1.commands import COMMANDS, TRAINS
from video_r1.recipe_files import packaged_recipes
from video_r1.settings.base import Settings, own_field_types
from video_r1.settings.types import default_text, describe_type

WIDTH = 110
COLUMN = 44
HELP_STYLES = {
    r"(?m)^  (--\w+|[a-z]+( [a-z]+)?(?=  ))": "cyan",
    r"(?m)^\S.*:$": "bold",
    r"\[[^\]]+\]$": "dim",
}


def overview(names: Iterable[str]) -> str:
    """These commands with a line each."""
    lines = ["usage: video-r1 COMMAND [RECIPE] [--key value ...]", ""]
    lines += [f"  {name:<12} {COMMANDS[name].summary}" for name in names]
    lines += ["", "video-r1 COMMAND --help lists a command's settings."]
    lines += ["Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 Ctrl-C, 143 SIGTERM."]
    return "\n".join(lines)


def command_help(name: str) -> str:
    """Usage, examples and every setting of one command, grouped by section."""
    command = COMMANDS[name]
    lines = [f"usage: {usage(name)}", "", command.summary, ""]
    if command.required:
        needs = [section_help(kind, command.required, only=command.required) for kind in command.sections]
        lines += ["required (a recipe may give it):", *itertools.chain(*needs), ""]
    lines += ["examples:", *(f"  video-r1 {example}" for example in command.examples), ""]
    if command.plans_training:
        paragraphs = [
            "A recipe is a YAML file of `key: value` lines; options override it. With the package come "
            f"{', '.join(packaged_recipes())}.",
            "Every field of transformers.TrainingArguments is a setting too, for example warmup_steps, "
            "eval_strategy, eval_steps, save_total_limit, deepspeed, fsdp.",
        ]
        if name in TRAINS:
            paragraphs.append(
                "--smoke tries the recipe for two steps with the small packaged model, on the first rows of "
                "its manifest or, where there is none, on made-up clips; it prints what it replaced, and "
                "leaves its report (OUTPUT_DIR-smoke.html). --print_config prints what would run."
            )
        lines += [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, WIDTH)]
        lines.append("")
    for kind in command.sections:
        lines += [f"{kind.__doc__}:", *section_help(kind, command.required), ""]
    return "\n".join(lines).rstrip()


def usage(name: str) -> str:
    """The command with what stands without `--`; in brackets what may be left out."""
    command = COMMANDS[name]
    words = ["[RECIPE]"] if command.sections else []
    words += [w.upper() if w in command.required else f"[{w.upper()}]" for w in command.positionals]
    if not command.plans_training:
        words += [f"--{word} {word.upper()}" for word in command.required if word not in command.positionals]
    return " ".join(["video-r1", name, *words, *["[--key value ...]"] * bool(command.sections)])


def section_help(
    kind: type[Settings], required: tuple[str, ...], only: Container[str] | None = None
) -> list[str]:
    """One entry for each setting: name, type, help and default. only: of these, default of all that the
    command can do without.
    """
    lines: list[str] = []
    types, defaults, indent = own_field_types(kind), kind(), " " * COLUMN
    for field in dataclasses.fields(kind):
        if field.name in required if only is None else field.name not in only:
            continue
        default = "required" if field.name in required else default_text(getattr(defaults, field.name))
        left = f"  --{field.name} {describe_type(types[field.name]).removesuffix(' or none')}"
        if len(left) >= COLUMN:
            lines += textwrap.wrap(left.strip(), WIDTH, initial_indent="  ", subsequent_indent=" " * 6)
            left = ""
        right = field.metadata["help"] + (f" [{default}]" if default else "")
        lines += textwrap.wrap(right, WIDTH, initial_indent=left.ljust(COLUMN), subsequent_indent=indent)
    return lines
