"""What follows a command: what it wrote, the next command with real paths, and how to go on with this one."""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from video_r1.commands import COMMANDS
from video_r1.data.sources.media_paths import media_root_of
from video_r1.recipe import Recipe
from video_r1.recipe_files import MERGED, MadeFor, counterpart, launcher, read_recipe
from video_r1.settings.training import SFTSettings, TGRPOSettings

Values = Mapping[str, Any]
CONTINUED = {
    "sft": "goes on from there",
    "rl": "goes on from there",
    "eval": "goes on with the questions that are left",
    "data audit": "goes on with the questions that are left",
    "annotate": "goes on with the questions that are left",
}
"""Commands that take up their work when they are started again, and how."""


def next_steps(recipe: Recipe) -> list[str]:
    """Lines for the end of a command that has done its work; none of a command that has nothing to follow."""
    follow = FOLLOWS.get(recipe.command)
    return [] if follow is None else follow(recipe, recipe.values())


def again(command: str, words: Sequence[str], saved: str) -> str:
    """What an interrupted command says: what is saved, and how to go on."""
    on_all = ", by the same launcher on every machine" if several() else ""
    how = f"the same command{on_all} {CONTINUED[command]}: {line(*words)}" if command in CONTINUED else ""
    return "; ".join(["interrupted", *filter(None, (saved, how))])


def line(*words: object) -> str:
    """A command as it is pasted into a shell."""
    return shlex.join(["video-r1", *map(str, words)])


def launched(made_for: MadeFor, gpus: int, *words: object) -> str:
    """As `line`, on several GPUs by accelerate with the file of the sharding."""
    if gpus < 2:
        return line(*words)
    return shlex.join([*launcher(made_for, gpus), *map(str, words)])


def options(given: Values) -> list[str]:
    """Settings as the words of a command line; true alone stands without a word after it."""
    words: list[str] = []
    for name, value in given.items():
        if isinstance(value, str) and value.startswith("--"):
            words.append(f"--{name}={value}")
        else:
            behind = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, behind)]
    return words


def same_questions(source: str, made_for: MadeFor, gpus: int, given: Values) -> tuple[list[str], list[str]]:
    """The option by which a step of a recipe has as many questions on other GPUs than those it is made for,
    and a line that has both numbers where it has not.

    Accumulation is divided, never multiplied: that may need more memory than the recipe was planned with.
    """
    values = {**read_recipe(source)[0], **given}
    usual = made_for.gpus or 1
    if gpus == usual or "gradient_accumulation_steps" in given:
        return [], []
    defaults = (SFTSettings if made_for.command == "sft" else TGRPOSettings)()
    batch = int(values.get("per_device_train_batch_size", defaults.per_device_train_batch_size))
    passes = int(values.get("gradient_accumulation_steps", defaults.gradient_accumulation_steps))
    wanted, kept = divmod(passes * usual, gpus)
    fewer = min(passes, max(1, wanted))
    option = options({"gradient_accumulation_steps": fewer}) if fewer != passes else []
    if fewer * gpus == passes * usual:
        return option, []
    here, there = batch * fewer * gpus, batch * passes * usual
    said = f"a step has {here} questions with {gpus} processes, {there} on the machine that the recipe is for"
    remedy = f"; --gradient_accumulation_steps {wanted} keeps them, if it fits" if wanted and not kept else ""
    return option, [said + remedy]


def several() -> int:
    """Processes of this run, where a launcher has started more than one; else 0."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    return count if count > 1 else 0


def beside(manifest: str | None, name: str) -> str | None:
    """Another manifest of the same folder, where it is there."""
    path = Path(manifest or "").with_name(name) if manifest else None
    return str(path) if path is not None and path.is_file() else None


def after_lab(recipe: Recipe, values: Values) -> list[str]:
    manifest = Path(values["folder"], "sft.json")
    return [f"next: {line('sft', 'lab-sft', '--train_manifest', manifest)}"]


def after_annotate(recipe: Recipe, values: Values) -> list[str]:
    root = media_root_of(values["manifest"], values["media_root"])
    words = ("sft", "qwen3-vl-4b-sft-lora", "--train_manifest", values["out"], "--media_root", root)
    return [
        f"next: {line(*words)}",
        "that is for one GPU of 24 GB; video-r1 recipes lists recipes for other models and machines",
        "the same command asks again what was not answered",
    ]


def after_sft(recipe: Recipe, values: Values) -> list[str]:
    out, start = values["output_dir"], values["model_name_or_path"]
    lines, made = _model(out, values["use_peft"])
    other = counterpart("rl", start, recipe.made_for)
    if other is not None:
        given = {"model_name_or_path": made}
        own = read_recipe(other)[0]["train_manifest"]
        manifest = beside(values["train_manifest"], "rl.json") or (None if Path(own).exists() else "MANIFEST")
        given |= {"train_manifest": manifest} if manifest else {}
        given |= {"media_root": values["media_root"]} if values["media_root"] else {}
        made_for = replace(recipe.made_for, command="rl")
        gpus = several() or (made_for.gpus or 1)
        option, said = same_questions(other, made_for, gpus, given)
        lines += [f"next: {launched(made_for, gpus, 'rl', other, *options(given), *option)}", *said]
    else:
        lines.append(f"next: {line('rl', 'RECIPE', '--model_name_or_path', made)}; see video-r1 recipes")
    return [*lines, LENGTHEN]


def after_rl(recipe: Recipe, values: Values) -> list[str]:
    out = values["output_dir"]
    lines, made = _model(out, values["use_peft"])
    test = values["eval_manifest"] or beside(values["train_manifest"], "test.json")
    asked = [test] if test else ["--bench", "mvbench,tempcompass"]
    return [
        *lines,
        f"next: {line('eval', made, *asked, '--order', 'ordered,shuffled')}",
        f"      {line('report', out)}",
        LENGTHEN,
    ]


LENGTHEN = "the same command with a larger --max_steps or --num_train_epochs makes the run longer"


def _model(out: str, adapters: bool) -> tuple[list[str], str]:
    """What a run wrote, and the folder of the model that is used next."""
    if not adapters:
        return [f"{out}: the model, its checkpoints and metrics.jsonl"], out
    merged = out.rstrip("/") + MERGED
    return [f"{out}: adapters, checkpoints and metrics.jsonl", f"next: {line('merge', out, merged)}"], merged


def after_merge(recipe: Recipe, values: Values) -> list[str]:
    """As the run that made the adapters goes on."""
    out = values["out"]
    return [
        f"next, after SFT: {line('rl', 'RECIPE', '--model_name_or_path', out)} (see video-r1 recipes)",
        f"next, after RL:  {line('eval', out, '--bench', 'mvbench,tempcompass', '--temporal_gap')}",
    ]


def after_eval(recipe: Recipe, values: Values) -> list[str]:
    is_run = Path(values["model"], "metrics.jsonl").is_file()
    lines = [f"next: {line('report', values['model'])}"] if is_run else []
    return [*lines, "the same command asks nothing again; another --order or --frames adds to these figures"]


def after_plan(recipe: Recipe, values: Values) -> list[str]:
    """The command that trains as planned, with the settings that the plan was given."""
    command = values["stage"] or recipe.made_for.command
    if recipe.source is None or command is None:
        return []
    gpus = values["gpus"] or recipe.made_for.gpus or 1
    sharding = values["sharding"] or (recipe.made_for.sharding if gpus > 1 else "none")
    known = {*COMMANDS[command].types(), *recipe.training}
    given = {name: value for name, value in recipe.overrides.items() if name in known}
    option, said = same_questions(recipe.source, replace(recipe.made_for, command=command), gpus, given)
    words = [command, recipe.source, *options(given), *option]
    return [f"next: {launched(MadeFor(command, gpus, sharding=sharding), gpus, *words)}", *said]


FOLLOWS: dict[str, Callable[[Recipe, Values], list[str]]] = {
    "lab make": after_lab,
    "annotate": after_annotate,
    "sft": after_sft,
    "rl": after_rl,
    "merge": after_merge,
    "eval": after_eval,
    "plan": after_plan,
}
