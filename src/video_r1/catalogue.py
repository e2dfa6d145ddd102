"""The packaged recipes: which trains what on which machine (`video-r1 recipes`); which belong together."""

from dataclasses import dataclass
from functools import cache

from video_r1.recipe_files import MadeFor, model_folder, packaged_recipes, read_recipe, take_facts
from video_r1.tables import table

MERGED = "-merged"
"""What the recipes put behind the name of a LoRA run's folder for its merged checkpoint."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A packaged recipe. start: the checkpoint that it names; output_dir: None of one that does not train."""

    name: str
    about: str
    made_for: MadeFor
    start: str
    output_dir: str | None

    @property
    def checkpoint(self) -> str:
        """The published model that it starts from, itself or by way of another recipe."""
        return checkpoint_behind(self.start)


@cache
def catalogue() -> tuple[Entry, ...]:
    """All packaged recipes."""
    entries = []
    for name in packaged_recipes():
        values, origins = read_recipe(name)
        about = str(values.get("about", ""))
        made_for = take_facts(values, origins)
        start = values.get("model_name_or_path") or values["model"]
        entries.append(Entry(name, about, made_for, start, values.get("output_dir")))
    return tuple(entries)


def checkpoint_behind(start: str) -> str:
    """The published model from which packaged recipes make the folder `start`; else `start` itself."""
    for entry in catalogue():
        if entry.output_dir and start in (entry.output_dir, entry.output_dir + MERGED):
            return checkpoint_behind(entry.start)
    return start


def counterpart(command: str, start: str | None, made_for: MadeFor) -> str | None:
    """The recipe of the command for the model and the machine of another one; None where there is none."""
    model = None if start is None else model_folder(checkpoint_behind(start))
    for entry in catalogue():
        facts = entry.made_for
        same = facts.command == command and facts.machine == made_for.machine
        if same and model_folder(entry.checkpoint) == model:
            return entry.name
    return None


def run_recipes() -> None:
    """Prints the table of packaged recipes, those of a CPU first."""
    entries = sorted(catalogue(), key=lambda entry: (entry.made_for.gpus != 0, entry.name))
    rows = (
        (entry.name, str(entry.made_for.command), entry.made_for.machine, entry.checkpoint, entry.about)
        for entry in entries
    )
    print(table(("recipe", "command", "machine", "model", "what"), rows, words=True))
    print(
        "\nvideo-r1 COMMAND RECIPE --print_config shows a recipe's settings, video-r1 plan RECIPE its memory."
    )
