"""Help texts and shell completion, made from the settings' names, types, defaults and help.

The command line is not read by argparse (see cli.py); the parser here only describes the commands to shtab.
"""

import argparse
import dataclasses
import inspect
import textwrap
from collections.abc import Collection, Iterable
from typing import Any, Literal, get_args, get_origin

from video_r1.commands import COMMANDS, TRAINS
from video_r1.recipe import training_argument_types
from video_r1.recipe_files import catalogue
from video_r1.settings.base import Settings, is_group, own_field_types
from video_r1.settings.commands import CompletionSettings
from video_r1.settings.types import FALSE_WORDS, TRUE_WORDS, alternatives, default_text, describe_type

USUAL = (
    "model", "manifest", "model_name_or_path", "train_manifest", "media_root", "out", "output_dir", "teacher",
    "reward_funcs", "temporal_rule", "num_generations", "max_completion_length", "beta", "learning_rate",
    "max_response_length", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_steps", "save_steps", "engine", "use_peft", "order", "frames", "answer", "bench", "compare",
    "temporal_gap", "controls", "limit", "samples", "max_new_tokens", "temperature", "max_frames",
    "frame_pixels", "prompt_template", "eval_manifest", "gpu", "gpus", "batch_size", "bf16", "seed",
)  # fmt: skip
"""Settings that `--help` shows of a long list, the first twenty that a command has."""
WIDTH = 110
COLUMN = 44


def overview(names: Iterable[str]) -> str:
    """List these commands, a line each."""
    lines = ["usage: video-r1 COMMAND [RECIPE] [--key value ...]", ""]
    lines += [f"  {name:<12} {COMMANDS[name].summary}" for name in names]
    lines += ["", "video-r1 COMMAND --help lists a command's settings."]
    lines += ["Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 Ctrl-C, 143 SIGTERM."]
    return "\n".join(lines)


def command_help(name: str, everything: bool = False) -> str:
    """Return usage, examples and the usual settings of one command, or every setting by section."""
    command = COMMANDS[name]
    types = command.types()
    common = (word for word in USUAL if word in types and not is_group(types[word]))
    usual = [*dict.fromkeys([*command.required, *common])][:20]
    others = types.keys() - usual
    lines = [f"usage: {usage(name)}", "", command.summary, ""]
    lines += ["examples:", *(f"  video-r1 {example}" for example in command.examples), ""]
    if command.plans_training:
        paragraphs = [
            "A recipe is a YAML file of `key: value` lines; options override it. video-r1 recipes lists the "
            "packaged ones.",
            "Every field of transformers.TrainingArguments is a setting too, for example "
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
    if everything or len(others) <= 10:
        for kind in command.sections:
            lines += [f"{kind.__doc__}:", *section_help(kind, command.required), ""]
        return "\n".join(lines).rstrip()
    lines.append("usual settings:")
    for kind in command.sections:
        lines += section_help(kind, command.required, others)
    return "\n".join([*lines, "", f"video-r1 {name} --help all lists the other {len(others)} settings too."])


def usage(name: str) -> str:
    """Return the usage line: positional words, optional ones in brackets."""
    command = COMMANDS[name]
    words = ["[RECIPE]"] if command.sections else []
    words += [w.upper() if w in command.required else f"[{w.upper()}]" for w in command.positionals]
    if not command.plans_training:
        words += [f"--{word} {word.upper()}" for word in command.required if word not in command.positionals]
    return " ".join(["video-r1", name, *words, *["[--key value ...]"] * bool(command.sections)])


def section_help(
    kind: type[Settings], required: Collection[str], hidden: Collection[str] = (), group: str = ""
) -> list[str]:
    """Return an entry for each setting that is not hidden, the class's own first: name, type, help, default.
    Entries of groups are indented.
    """
    lines: list[str] = []
    types, defaults, indent = own_field_types(kind), kind(), " " * COLUMN
    shown = [field for field in dataclasses.fields(kind) if field.name not in hidden]
    for field in sorted(shown, key=lambda field: field.name not in inspect.get_annotations(kind)):
        name, hint = field.name, types[field.name]
        default = "required" if name in required else default_text(getattr(defaults, name))
        left = f"  --{name}" if not group else f"      {group}_{name}"
        left += f" {describe_type(hint).removesuffix(' or none')}"
        if len(left) >= COLUMN:
            start = " " * (len(left) - len(left.lstrip()))
            lines += textwrap.wrap(left.strip(), WIDTH, initial_indent=start, subsequent_indent=" " * 6)
            left = ""
        right = field.metadata["help"] + (f" [{default}]" if default else "")
        lines += textwrap.wrap(right, WIDTH, initial_indent=left.ljust(COLUMN), subsequent_indent=indent)
        if is_group(hint):
            lines += section_help(hint, (), (), name)
    return lines


# ---- video-r1 completion


def run_completion(settings: CompletionSettings) -> None:
    """Print the completion script of a shell."""
    import shtab

    print(shtab.complete(completed_words(), shell=str(settings.shell)))


def completed_words() -> argparse.ArgumentParser:
    """Return a parser of all commands, recipes and settings. Text is completed with file names."""
    top = argparse.ArgumentParser("video-r1", add_help=False)
    add_flags(top, "help", "version")
    groups = {"": top.add_subparsers()}
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        if second and first not in groups:
            groups[first] = groups[""].add_parser(first, add_help=False, help=first).add_subparsers()
        group = groups[first if second else ""]
        parser = group.add_parser(second or first, add_help=False, help=command.summary)
        add_flags(parser, "help", "print_config", *(["smoke"] if name in TRAINS else []))
        commands = TRAINS if name == "plan" else (name,)
        if recipes := [entry.name for entry in catalogue() if entry.made_for.command in commands]:
            parser.add_argument("recipe", nargs="?", choices=recipes)
        types = command.types()
        for setting in command.positionals:
            add_value(parser.add_argument(setting, nargs="?"), types[setting])
        for setting, hint in ((training_argument_types() if name in TRAINS else {}) | types).items():
            add_value(parser.add_argument(f"--{setting}", help=setting), hint)
    return top


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        parser.add_argument(f"--{name}", action="store_true", help=name)


def add_value(action: Any, hint: Any) -> None:
    """Set the completions of a value: a Literal's choices, true or false, file names for text."""
    import shtab

    options = alternatives(hint)
    choices = [value for option in options if get_origin(option) is Literal for value in get_args(option)]
    if choices:
        action.choices = [str(choice) for choice in choices]
    elif bool in options:
        action.choices = [TRUE_WORDS[0], FALSE_WORDS[0]]
    elif str in options:
        action.complete = shtab.FILE
