"""The packaged recipes: what they build on, that they fit their machines, and that they run (`--smoke`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_questions import read_lines, write_manifest

from video_r1.cli import carry_out, main
from video_r1.commands import COMMANDS
from video_r1.data.manifests.records import load_manifest
from video_r1.errors import ManifestError, RequestError
from video_r1.lab.smoke import smoke_recipe
from video_r1.plan.memory import memory_plan, sharding_of
from video_r1.plan.shapes import published, published_config
from video_r1.recipe import load_recipe
from video_r1.recipe_files import (
    MadeFor,
    catalogue,
    packaged_recipes,
)
from video_r1.settings.base import flat

GB = 10**9
ONE, SMALL, LAPTOP, FOUR, EIGHT = (1, 80), (1, 24), (1, 8), (4, 96), (8, 80)
MACHINES = {
    # recipe without sft/tgrpo: checkpoint, (GPUs, GB of each)
    "video-r1-7b-{}": ("Qwen/Qwen2.5-VL-7B-Instruct", EIGHT),
    "video-r1-7b-{}-4x96": ("Qwen/Qwen2.5-VL-7B-Instruct", FOUR),
    "video-r1-7b-{}-lora": ("Qwen/Qwen2.5-VL-7B-Instruct", ONE),
    "video-r1-3b-{}": ("Qwen/Qwen2.5-VL-3B-Instruct", ONE),
    "video-r1-3b-{}-lora": ("Qwen/Qwen2.5-VL-3B-Instruct", SMALL),
    "qwen3-vl-8b-{}": ("Qwen/Qwen3-VL-8B-Instruct", EIGHT),
    "qwen3-vl-8b-{}-4x96": ("Qwen/Qwen3-VL-8B-Instruct", FOUR),
    "qwen3-vl-8b-{}-lora": ("Qwen/Qwen3-VL-8B-Instruct", ONE),
    "qwen3-vl-4b-{}": ("Qwen/Qwen3-VL-4B-Instruct", ONE),
    "qwen3-vl-4b-{}-lora": ("Qwen/Qwen3-VL-4B-Instruct", SMALL),
    "qwen3.5-9b-{}": ("Qwen/Qwen3.5-9B", EIGHT),
    "qwen3.5-9b-{}-lora": ("Qwen/Qwen3.5-9B", ONE),
    "qwen3.5-4b-{}-lora": ("Qwen/Qwen3.5-4B", SMALL),
    "smolvlm2-500m-{}-lora": ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", LAPTOP),
}
LOOKS = [("qwen3-vl-8b-look", "qwen3-vl-8b-{}"), ("qwen3-vl-8b-look-lora", "qwen3-vl-8b-{}-lora")]
DISTILLED = ("video-r1-3b-distill", "video-r1-3b-{}")
GATE = ("video-r1-7b-tgrpo-gate", "video-r1-7b-{}")
STAGES = [(form.format(stage), form) for form in MACHINES for stage in ("sft", "tgrpo")]
RECIPES = [*LOOKS, DISTILLED, GATE, *STAGES]


def command_of(name: str) -> str:
    return "sft" if "-sft" in name else "rl"


RUN = [
    ("qwen3-vl-4b-tgrpo-lora", "qwen3-vl-4b-{}-lora"),
    pytest.param("video-r1-7b-tgrpo", "video-r1-7b-{}", marks=pytest.mark.slow),
    pytest.param("qwen3.5-4b-tgrpo-lora", "qwen3.5-4b-{}-lora", marks=pytest.mark.slow),
    pytest.param(*DISTILLED, marks=pytest.mark.slow),
    pytest.param("smolvlm2-500m-sft-lora", "smolvlm2-500m-{}-lora", marks=pytest.mark.slow),
]


def test_every_packaged_recipe_is_known_here() -> None:
    assert {name for name in packaged_recipes() if not name.startswith("lab-")} == {
        name for name, _ in RECIPES
    }


@pytest.mark.parametrize(("name", "form"), RECIPES)
def test_a_recipe_trains_its_checkpoint_with_the_papers_settings(name: str, form: str) -> None:
    checkpoint, _ = MACHINES[form]
    command = command_of(name)
    values = load_recipe(command, name).values()
    start = values["model_name_or_path"]
    if "look" in name:  # from a checkpoint that knows calls
        assert (values["tools"], values["overview_frames"], values["max_steps"]) == ("look", [4, 16], 1000)
    elif command == "rl":  # from what the cold start of the same size wrote
        cold_start = load_recipe("sft", re.sub("tgrpo-gate|tgrpo|distill", "sft", name)).values()
        merged = "-merged" if values["use_peft"] else ""
        assert start == cold_start["output_dir"] + merged
        start = cold_start["model_name_or_path"]
        sampled, beta = (4, 0.0) if name == DISTILLED[0] else (8, 0.04)
        assert (values["num_generations"], values["beta"]) == (sampled, beta)
        assert (values["max_completion_length"], values["max_steps"]) == (768, 1000)
    if command == "rl":
        is_measured_with_margin = "look" in name or name.startswith("video-r1")
        rule = "margin" if is_measured_with_margin and name != GATE[0] else "likelihood_gate"
        assert values["temporal_rule"] == ("off" if name == DISTILLED[0] else rule)
    assert start == checkpoint
    side = 32 if "Qwen3" in checkpoint else 28
    wanted = (512**2, 512**2) if "SmolVLM2" in checkpoint else (128 * side**2, 256 * side**2)
    assert (values["frame_pixels"], values["image_pixels"]) == wanted
    assert values["use_peft"] == name.endswith("-lora")
    # float32 weights wherever steps of 1e-6 are added to them
    assert (values["dtype"], values["learning_rate"] > 1e-6) in (("float32", False), ("bfloat16", True))
    assert values["output_dir"] == f"runs/{name}".removesuffix("-4x96")

    gpus, memory = MACHINES[form][1]
    entry = next(entry for entry in catalogue() if entry.name == name)
    assert entry.made_for == MadeFor(command_of(name), gpus, f"{memory}GB", "fsdp2" if gpus > 1 else "none")
    assert entry.checkpoint == checkpoint
    assert ("LoRA" in entry.about) == name.endswith("-lora")


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert {*packaged_recipes(), "recipe"} == {*rows}
    assert all(entry.about and entry.about in rows[entry.name] for entry in catalogue())
    for name, words in {
        "video-r1-7b-tgrpo-4x96": "rl       4 × 96 GB  Qwen/Qwen2.5-VL-7B-Instruct ",
        "qwen3-vl-4b-tgrpo-lora": "rl       1 × 24 GB  Qwen/Qwen3-VL-4B-Instruct ",
        "lab-tgrpo": "rl       CPU        lab-base ",
    }.items():  # fmt: skip
        assert words in rows[name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sft video-r1-7b-tgrpo", "for rl, not for sft; video-r1-7b-sft is the one for sft"),
        ("sft mine.yaml", "for rl, not for sft; video-r1-7b-sft is the one for sft"),
        ("sft bare.yaml", "for rl, not for sft; see video-r1 recipes"),
        ("rl bare-sft.yaml", "for sft, not for rl; see video-r1 recipes"),
        ("plan lab-eval", "for eval; a plan is of one for sft or rl"),
    ],
)
def test_a_recipe_of_another_command_is_one_sentence(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("base: video-r1-7b-tgrpo\nbetta: 1\n")
    Path("bare.yaml").write_text("num_generations: 8\nepsilon: 0.1\n")
    Path("bare-sft.yaml").write_text("max_response_length: 8\n")
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"video-r1: {words.split()[1]} is a recipe {said}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("made_for: rl", "made_for is rl; write {command: rl, gpus: 4"),
        ("made_for: {gpu: 8}", "'gpu': 8} ('gpu'); write"),
        ("made_for: {gpu_memory: 80}", "(gpu_memory); write"),
    ],
)
def test_what_a_recipe_says_of_itself_is_checked(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(f"base: video-r1-7b-tgrpo\n{line}\n")
    with pytest.raises(RequestError, match=re.escape("recipe a.yaml, line 2: made_for")) as caught:
        load_recipe("rl", tmp_path / "a.yaml")
    assert said in str(caught.value)


def test_a_recipe_for_gpus_is_refused_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("video_r1.recipe.may_have_gpu", lambda: False)
    monkeypatch.setattr("video_r1.commands.Command.function", None)  # nothing is imported
    for name, machine in {"video-r1-7b-sft": "8 × 80 GB", "qwen3-vl-4b-tgrpo-lora": "1 × 24 GB"}.items():
        assert main([command_of(name), name]) == 2
        said = capsys.readouterr().err
        assert said.startswith(
            f"video-r1: {name} needs a GPU (it is made for {machine}), and this machine has"
        )
        assert "--smoke" in said and "--use_cpu --bf16 false" in said
    monkeypatch.setattr("video_r1.recipe.may_have_gpu", lambda: True)
    assert main(["rl", name]) == 2 and "needs a GPU" not in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert main(["rl", "video-r1-7b-tgrpo"]) == 2
    assert (
        "vllm_tensor_parallel_size is 4, which must divide the number of processes (6)"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), RECIPES)
def test_a_recipe_fits_its_machine(name: str, form: str) -> None:
    checkpoint, (gpus, memory) = MACHINES[form]
    billions, config = (
        published()[checkpoint.removesuffix("-Instruct")]["total"],
        published_config(checkpoint),
    )
    sharding = sharding_of({}, gpus, "fsdp2" if gpus > 1 else "none")
    recipe = load_recipe(command_of(name), name)
    plan = memory_plan(config, recipe, gpu_memory=memory * GB, sharding=sharding)
    adapters = plan.traced.trainable if name.endswith("-lora") else 0
    assert (plan.traced.parameters - adapters) / 1e9 == pytest.approx(billions, abs=0.01)
    assert plan.fits, f"{plan.peak / GB:.1f} GB: {plan.phases}, {plan.parts}"


@pytest.mark.parametrize(("name", "form"), RUN)
def test_a_recipe_runs_with_the_small_model(name: str, form: str, lab: Path, tmp_path: Path) -> None:
    command = command_of(name)
    recipe = load_recipe(command, name)
    smoked, replaced = smoke_recipe(recipe, lab, tmp_path / "run")
    before, after = (flat(one.values(), COMMANDS[command].types()) for one in (recipe, smoked))
    changed = {setting for setting in after if before.get(setting) != after[setting]}
    assert changed <= {*replaced, "use_cpu"}
    assert {"learning_rate", "beta", "use_peft", "dtype", "lora_r"}.isdisjoint(replaced)
    assert carry_out(smoked) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").is_file()


def test_the_smoke_option_says_what_it_replaces_and_leaves_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def notice(recipe: Any) -> int:
        seen.append(recipe.values())
        assert len(json.loads(Path(recipe.values()["train_manifest"]).read_text())) == 8
        run = Path(recipe.values()["output_dir"])
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("video_r1.training.sft.run_sft", notice)
    monkeypatch.setattr("video_r1.availability.has_bitsandbytes", lambda: False)
    assert main(["sft", "video-r1-3b-sft", "--smoke", "--learning_rate", "2e-6"]) == 0
    out = capsys.readouterr().out
    assert "smoke: 2 steps of video-r1-3b-sft with the small packaged model; replaced settings:\n" in out
    assert "  optim: adamw_8bit → adamw_torch\n" in out
    assert "  model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct → " in out
    assert "learning_rate" not in out and seen[0]["learning_rate"] == 2e-6
    assert not Path(seen[0]["train_manifest"]).exists()
    assert [str(path) for path in Path().rglob("*.*")] == ["runs/video-r1-3b-sft-smoke.html"]
    assert "smoke: done; report: runs/video-r1-3b-sft-smoke.html" in out


def test_a_dry_run_takes_the_first_rows_of_the_manifest(lab: Path, tmp_path: Path) -> None:
    """Those of validation too where they have the same media root, else the same ones twice."""
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
        write_manifest(tmp_path / folder, videos=6, images=6)
    train, other = tmp_path / "own" / "manifest.json", tmp_path / "other" / "manifest.json"
    held_out = train.with_name("test.json")
    for path in (held_out, other):
        path.write_text(json.dumps(json.loads(train.read_text())[::-1]))
    for number, (validation, ids) in enumerate(((held_out, range(11, 3, -1)), (other, range(8)))):
        named = {"train_manifest": str(train), "eval_manifest": str(validation)}
        recipe = load_recipe("rl", "video-r1-7b-tgrpo", {**named, "output_dir": "x"})
        values = smoke_recipe(recipe, lab, tmp_path / str(number) / "run")[0].values()
        samples = load_manifest(values["train_manifest"], **places(values))
        assert [sample.problem_id for sample in samples] == list(range(8))
        assert samples[0].path == str(train.with_name("0.mp4").resolve())
        assert [s.problem_id for s in load_manifest(values["eval_manifest"], **places(values))] == list(ids)
    train.write_text('[{"problem_id": 1}, {"problem_id": 2')
    with pytest.raises(ManifestError, match=r"own/manifest.json: row 2: "):
        smoke_recipe(recipe, lab, tmp_path / "run")


def places(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("media_root", "allow_urls", "allowed_roots")}


# ---- base:


def test_a_recipe_overrides_its_base_and_its_base_overrides_that_ones_base(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\nlearning_rate: 3e-6\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("base: video-r1-7b-tgrpo\nseed: 2\nbeta: 0\n")
    recipe = load_recipe("rl", tmp_path / "a.yaml", {"num_generations": "4"})
    values = recipe.values()
    assert (values["learning_rate"], values["seed"], values["beta"]) == (3e-6, 1, 0)
    assert (values["num_generations"], values["max_steps"]) == (4, 1000)
    assert "base" not in values


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("base: none.yaml", r"recipe a.yaml, line 1: base is none.yaml; no file .*none.yaml nor a packaged"),
        ("base: [b, c]", r"recipe a.yaml, line 1: base is \['b', 'c'\]; it must be the name of a recipe"),
        ("base: a.yaml", r"recipe a.yaml, line 1: base leads back to a.yaml"),
    ],
)
def test_a_base_that_is_no_recipe_is_refused(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(line + "\n")
    with pytest.raises(RequestError, match=said):
        load_recipe("rl", tmp_path / "a.yaml")
