"""The last lines of a command: the next command, ready to paste, or how to resume after an interruption."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from video_r1.commands import COMMANDS, TRAINS
from video_r1.data.sources.media_paths import media_root_of
from video_r1.errors import without_secrets
from video_r1.recipe import Recipe
from video_r1.recipe_files import MERGED, MadeFor, counterpart, launcher
from video_r1.settings.decoding import EvalSettings

RESUMED = {name: "resumes" for name in TRAINS}
RESUMED |= {name: "continues with the remaining questions" for name in ("eval", "data audit", "annotate")}
"""Commands that resume when they are run again, and how."""


def next_steps(recipe: Recipe) -> list[str]:
    values, command = recipe.values(), recipe.command
    if command == "lab make":
        return [then("sft", "lab-sft", "--train_manifest", Path(values["folder"], "sft.json"))]
    if command == "annotate":
        media = ["--media_root", media_root_of(values["manifest"], values["media_root"])]
        start = then("sft", "qwen3-vl-4b-sft-lora", "--train_manifest", values["out"], *media)
        return [start, "(for one GPU of 24 GB; see video-r1 recipes for other machines)"]
    if command == "eval":
        folder = recipe.section(EvalSettings).folder  # both pages show every order; the studio also questions
        return [then("studio", folder), then("report", folder)]
    if command in TRAINS:
        return after_training(recipe)
    return after_plan(recipe) if command == "plan" else []


def after_training(recipe: Recipe) -> list[str]:
    """Return the merge of a LoRA run, then RL after SFT, or an evaluation and a report after RL."""
    values = recipe.values()
    run, train = values["output_dir"], Path(values["train_manifest"])
    rl = train.with_name("rl.json")  # as `lab make` writes it, and test.json; `data make`: held-out.json
    media = ["--media_root", values["media_root"]] if values["media_root"] else []
    model = run.rstrip("/") + MERGED if values["use_peft"] else run
    lines = [then("merge", run, model)] if values["use_peft"] else []
    if recipe.command == "rl":
        beside = [one for name in ("test", "held-out") if (one := train.with_name(f"{name}.json")).is_file()]
        held_out = values["eval_manifest"] or (beside[0] if beside else "held-out.json")
        evaluate = then("eval", model, held_out, *media, "--order", "ordered,shuffled")
        return [*lines, evaluate, then("report", run)]
    name = counterpart("rl", values["model_name_or_path"], recipe.made_for) or "RECIPE"
    words = ["rl", name, "--model_name_or_path", model, "--train_manifest"]
    words += [rl if rl.is_file() else "MANIFEST", *media]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    machine = replace(recipe.made_for, gpus=processes) if processes > 1 else recipe.made_for
    return [*lines, then(*words, on=machine)]


def after_plan(recipe: Recipe) -> list[str]:
    """Return the command that trains as planned, with the settings that the plan was given."""
    values, usual = recipe.values(), recipe.made_for.gpus or 1
    command, gpus = recipe.made_for.command, values["gpus"] or usual
    if recipe.source is None or command is None:
        return []
    words = [command, recipe.source]
    for name, value in recipe.overrides.items():
        if name in COMMANDS[command].types() or name not in COMMANDS["plan"].types():
            several = value if isinstance(value, list) else [value]
            words += [f"--{name}", *([] if value is True else several)]
    sharding = values["sharding"] or (recipe.made_for.sharding if gpus > 1 else "none")
    note, passes = [], usual * values["gradient_accumulation_steps"]
    if gpus != usual and "gradient_accumulation_steps" not in recipe.overrides:
        each = max(1, round(passes / gpus))
        words += ["--gradient_accumulation_steps", each]
        batch = values["per_device_train_batch_size"]
        kept = f"{batch * each * gpus} questions a step, the recipe's {batch * passes}"
        note = [f"(gradient_accumulation_steps {each} on {gpus} GPUs: {kept} on {usual})"]
    return [then(*words, on=MadeFor(command, gpus, sharding=sharding)), *note]


def then(*words: object, on: MadeFor | None = None) -> str:
    """Return the next command as it is pasted into a shell, with the launcher of several GPUs."""
    start = launcher(on, on.gpus) if on and on.gpus and on.gpus > 1 else ["video-r1"]
    return without_secrets("next: " + shlex.join([*start, *map(str, words)]))


def again(command: str, words: Sequence[str], saved: str) -> str:
    """Return what an interrupted command says: what is saved, and how to resume."""
    everywhere = (
        ", with the same launcher on every machine," if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    )
    how = f"the same command{everywhere} {RESUMED.get(command)}: {shlex.join(['video-r1', *words])}"
    return "; ".join(["interrupted", *filter(None, (saved, how if command in RESUMED else ""))])
