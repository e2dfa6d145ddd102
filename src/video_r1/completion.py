"""Shell completion, `video-r1 completion bash`: shtab's scripts for the commands, their settings and recipes.

The command line is not read by argparse (see cli.py); the parser here only tells shtab what there is.
"""

import argparse
from typing import Any, Literal, get_args, get_origin

import shtab

from video_r1.catalogue import catalogue
from video_r1.commands import COMMANDS, TRAINS, Command
from video_r1.settings.base import own_field_types
from video_r1.settings.commands import CompletionSettings
from video_r1.settings.training_arguments import training_argument_types
from video_r1.settings.types import FALSE_WORDS, TRUE_WORDS, alternatives


def run_completion(settings: CompletionSettings) -> None:
    """Prints the script of the settings' shell."""
    print(shtab.complete(completed_words(), shell=str(settings.shell)))


def completed_words() -> argparse.ArgumentParser:
    """All commands with their settings. Text is completed with file names."""
    top = argparse.ArgumentParser("video-r1", add_help=False)
    top.add_argument("--help", action="store_true", help="list the commands")
    top.add_argument("--version", action="store_true", help="print the version")
    groups = {"": top.add_subparsers()}
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        if second and first not in groups:
            groups[first] = groups[""].add_parser(first, add_help=False, help=first).add_subparsers()
        group = groups[first if second else ""]
        add_settings(group.add_parser(second or first, add_help=False, help=command.summary), name, command)
    return top


def add_settings(parser: argparse.ArgumentParser, name: str, command: Command) -> None:
    """The settings of a command as options; recipes and positional settings where they stand."""
    commands = TRAINS if name == "plan" else (name,)
    recipes = [entry.name for entry in catalogue() if entry.made_for.command in commands]
    if recipes:
        parser.add_argument("recipe", nargs="?", choices=recipes)
    types = command.types()
    for setting in command.positionals:
        add_value(parser.add_argument(setting, nargs="?"), types[setting])
    help_texts = {
        field: kind.__dataclass_fields__[field].metadata["help"]
        for kind in command.sections
        for field in own_field_types(kind)
    }
    for setting, hint in ((training_argument_types() if name in TRAINS else {}) | types).items():
        text = help_texts.get(setting, "a setting of transformers.TrainingArguments").replace("%", "%%")
        add_value(parser.add_argument(f"--{setting}", help=text), hint)
    for flag in ("help", "print_config", *(["smoke"] if name in TRAINS else [])):
        parser.add_argument(f"--{flag}", action="store_true", help=f"see video-r1 {name} --help")


def add_value(action: Any, hint: Any) -> None:
    """Tells shtab what may follow: the choices of a Literal, true or false, file names for text."""
    options = alternatives(hint)
    choices = [value for option in options if get_origin(option) is Literal for value in get_args(option)]
    if choices:
        action.choices = [str(choice) for choice in choices]
    elif bool in options:
        action.choices = [TRUE_WORDS[0], FALSE_WORDS[0]]
    elif str in options:
        action.complete = shtab.FILE
