"""Table of commands: purpose, settings, examples, and the function that does the work.

Functions are named, not imported, so that help and refusals need no torch.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from video_r1.settings.base import Settings, own_field_types
from video_r1.settings.commands import (
    BaseSettings,
    CheckSettings,
    CompletionSettings,
    DemoSettings,
    LabSettings,
    MakeSettings,
    MergeSettings,
    PlanSettings,
    RecipesSettings,
    ReportSettings,
    StudioSettings,
)
from video_r1.settings.decoding import (
    AnnotateSettings,
    AskSettings,
    AuditSettings,
    BenchmarkSettings,
    EvalSettings,
    PairsSettings,
)
from video_r1.settings.shared import DataSettings, ModelSettings, PromptSettings
from video_r1.settings.tools import TrainingToolSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings
from video_r1.settings.vllm import EngineSettings, ServeSettings


@dataclass(frozen=True)
class Command:
    """A command of `video-r1`.

    work: module and function below `video_r1`. given: its arguments, all settings by name ("values"), an
    object for each section ("sections") or the whole Recipe ("recipe"). positionals: settings without `--`.
    """

    summary: str
    work: str
    given: Literal["values", "sections", "recipe"]
    sections: tuple[type[Settings], ...]
    positionals: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    @property
    def plans_training(self) -> bool:
        """Whether the command takes a training recipe, with every field of TrainingArguments as a setting."""
        return self.given == "recipe"

    def types(self) -> dict[str, Any]:
        """Return name and type of the command's own settings."""
        return {name: hint for kind in self.sections for name, hint in own_field_types(kind).items()}

    def function(self) -> Callable[..., Any]:
        """Import the function that does the work."""
        module, _, name = self.work.partition(":")
        return getattr(importlib.import_module(f"video_r1.{module}"), name)


_TRAINING = ("model_name_or_path", "train_manifest", "output_dir")
# fmt: off
COMMANDS: dict[str, Command] = {
    "data make": Command(
        "make a checked manifest of a folder of clips and a table of questions",
        "data.making.make:run_make", "sections", (MakeSettings,), ("table",), ("table", "out"),
        ("data make questions.csv --media_root clips --out train.json",
         "data make my.parquet --out my.json --columns problem=Q,options=a+b+c --answers from_1")),
    "data check": Command(
        "check a manifest and open its media", "data.check:run_check", "values", (CheckSettings,),
        ("manifest",), ("manifest",),
        ("data check train.json --media_root /data", "data check train.json --media false")),
    "data audit": Command(
        "measure which questions can be answered without the video, from one frame or without its order",
        "evaluation.audit:run_audit", "sections", (AuditSettings,), ("manifest",), ("manifest", "model"),
        ("data audit train.json --model Qwen/Qwen2.5-VL-7B-Instruct --engine vllm",
         "data audit train.json --model runs/sft --limit 500 --temporal_contrast reversed")),
    "data pairs": Command(
        "add to a manifest the reversed twin of each question whose answer is then known",
        "annotation.pairs:run_pairs", "sections", (PairsSettings,), ("manifest",), ("manifest", "out"),
        ("data pairs train.json --out pairs.json",
         "data pairs train.json --out pairs.json --teacher http://host:8000/v1 --samples 8")),
    "lab make": Command(
        "write made-up clips with questions that need frame order", "lab.clips:write_lab", "sections",
        (LabSettings,), ("folder",), ("folder",), ("lab make lab --train 4000 --test 500 --seed 1",)),
    "lab base": Command(
        "pretrain the lab's small base model", "lab.model:pretrain_base", "sections", (BaseSettings,),
        ("folder",), ("folder",),
        ("lab base base --steps 4500 --seed 0", "lab base base-qwen3_5 --family qwen3_5")),
    "annotate": Command(
        "write rationales with a teacher and filter them into a manifest for SFT",
        "annotation.annotate:run_annotate", "sections", (AnnotateSettings,),
        ("manifest",), ("manifest", "teacher", "out"),
        ("annotate train.json --teacher Qwen/Qwen2.5-VL-7B-Instruct --engine vllm --out cot.json",
         "annotate train.json --teacher http://host:8000/v1 --out cot.json --samples 4 --choose majority")),
    "sft": Command(
        "supervised cold start on rationales", "training.sft:run_sft", "recipe",
        (SFTSettings, DataSettings, ModelSettings, PromptSettings, TrainingToolSettings), (), _TRAINING,
        ("sft lab-sft", "sft qwen3-vl-4b-sft-lora --train_manifest cot.json --media_root /data")),
    "rl": Command(
        "T-GRPO or GRPO", "training.tgrpo:run_rl", "recipe",
        (TGRPOSettings, DataSettings, ModelSettings, PromptSettings, TrainingToolSettings, EngineSettings),
        (), _TRAINING,
        ("rl qwen3-vl-4b-tgrpo-lora --model_name_or_path Qwen/Qwen3-VL-4B-Instruct --train_manifest my.json",
         "rl my.yaml --temporal_rule off --num_generations 16")),
    "plan": Command(
        "tokens, GPU memory and hours that a recipe of sft or rl needs", "plan.plan:run_plan", "recipe",
        (PlanSettings, TGRPOSettings, DataSettings, ModelSettings, PromptSettings, TrainingToolSettings,
         EngineSettings), (), (),
        ("plan video-r1-7b-tgrpo", "plan my.yaml --gpus 4 --gpu_memory 24GB --sharding none --use_peft",
         "plan my.yaml --model_config Qwen/Qwen2.5-VL-32B-Instruct --gpus 16 --gpu h200 --sharding zero3")),
    "recipes": Command(
        "the recipes that come with the package: machine, model and what for", "recipe_files:run_recipes",
        "values", (RecipesSettings,), examples=("recipes", "recipes --path")),
    "eval": Command(
        "score a checkpoint on a manifest or on benchmarks, with frames in order and shuffled",
        "evaluation.evaluate:run_eval", "sections", (EvalSettings, BenchmarkSettings),
        ("model", "manifest"), ("model",),
        ("eval runs/rl test.json --order ordered,shuffled --frames 16,32,64",
         "eval runs/rl --bench vsibench,mvbench --frames 16,32,64 --compare paper")),
    "ask": Command(
        "ask a checkpoint about one video or image", "evaluation.ask:run_ask", "sections", (AskSettings,),
        ("model", "path", "question"), ("model", "path", "question"),
        ('ask runs/rl clip.mp4 "Which way does the ball roll?" --options "A. left" "B. right"',
         'ask runs/rl clip.mp4 "What happens first?" --contrast shuffled,reversed --samples 8')),
    "serve": Command(
        "a vLLM server for training, evaluation and questions", "rollout.vllm.serve:run_serve", "sections",
        (ServeSettings,), ("model",), ("model",),
        ("serve runs/sft --port 8000", "serve runs/sft --hand_over nccl --vllm_options='-tp 2'")),
    "merge": Command(
        "a plain checkpoint from a LoRA run", "models.loading:merge_adapter", "values", (MergeSettings,),
        ("adapter", "out"), ("adapter", "out"),
        ("merge runs/lora runs/merged", "merge runs/lora/checkpoint-500 out --dtype bfloat16")),
    "report": Command(
        "one HTML page from a run folder, or from several to compare", "report.page:build_report", "values",
        (ReportSettings,), ("run",), ("run",), ("report runs/rl", "report runs/grpo runs/tgrpo")),
    "studio": Command(
        "a local page over run folders that follows them while they train", "studio.server:run_studio",
        "values", (StudioSettings,), ("folders",), (),
        ("studio", "studio runs --host 0.0.0.0 --port 8080")),
    "demo": Command(
        "the whole pipeline on made-up clips", "lab.demo:run_demo", "values", (DemoSettings,),
        examples=("demo", "demo --quick")),
    "completion": Command(
        "a script by which a shell completes commands, settings and recipes", "command_help:run_completion",
        "sections", (CompletionSettings,), ("shell",), ("shell",),
        ("completion bash", "completion zsh")),
}
# fmt: on
TRAINS = ("sft", "rl")
"""Commands that have `--smoke`."""
