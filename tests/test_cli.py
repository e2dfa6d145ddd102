"""The command line: help, exit codes, refusals in one line, and that each command reaches its work."""

from __future__ import annotations

import errno
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import video_r1
from video_r1.cli import find_command, main, read_request, split_words
from video_r1.commands import COMMANDS
from video_r1.errors import MediaError, RequestError
from video_r1.processes import Interrupted
from video_r1.recipe import load_recipe, save_resolved
from video_r1.settings.base import flat_types
from video_r1.settings.decoding import AskSettings
from video_r1.settings.training import TGRPOSettings


@pytest.mark.parametrize("words", ["rl --help", "recipes"])
def test_help_imports_nothing_slow(words: str) -> None:
    code = (
        "import sys\nfrom video_r1.cli import main\ncode = main(sys.argv[1:])\n"
        "print(code, {'torch', 'transformers', 'datasets', 'matplotlib', 'httpx2'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    assert done.stdout.endswith("0 set()\n"), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_setting_with_default_and_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*name.split(), "--help"]) == 0
    usual = capsys.readouterr().out
    assert main([*name.split(), "--help", "all"]) == 0
    text = capsys.readouterr().out
    assert COMMANDS[name].summary in text
    own, flat = COMMANDS[name].types(), flat_types(COMMANDS[name].types())
    assert sorted(re.findall(r"^  --(\w+) ", text, re.MULTILINE)) == sorted(own)
    assert {*re.findall(r"^      (\w+_\w+) ", text, re.MULTILINE)} >= flat.keys() - own.keys()
    shown = re.findall(r"^  --(\w+) ", usual, re.MULTILINE)
    assert len(shown) <= 30 and {*COMMANDS[name].required} <= {*shown}
    if len(shown) < len(own):
        assert f"video-r1 {name} --help all lists the other {len(own) - len(shown)} settings" in usual
    for example in COMMANDS[name].examples:
        assert f"  video-r1 {example}\n" in text
    assert all(len(line) <= 110 for line in (text + usual).splitlines())


def test_rl_has_at_most_ninety_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """As `video-r1 rl --help all | grep -c '^  --'` counts them."""
    assert main(["rl", "--help", "all"]) == 0
    assert len(re.findall(r"^  --", capsys.readouterr().out, re.MULTILINE)) <= 90


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_of_the_help_is_a_valid_request(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("model_name_or_path: m\ntrain_manifest: t\noutput_dir: o\n")
    for example in COMMANDS[name].examples:
        found, rest = find_command(shlex.split(example))
        assert found == name
        assert read_request(name, rest).command == name


@pytest.mark.parametrize(("words", "plain", "options"), [
    (["a", "--beta", "0.1", "b"], ["a", "b"], {"beta": "0.1"}),
    (["--beta=0.1"], [], {"beta": "0.1"}),
    (["--beta", "-1"], [], {"beta": "-1"}),
    (["--use_vllm"], [], {"use_vllm": True}),
    (["--use_vllm", "false", "lab.yaml"], ["lab.yaml"], {"use_vllm": "false"}),
    (["--length_range", "1", "2", "--beta", "1"], [], {"length_range": ["1", "2"], "beta": "1"}),
    (["--save_total_limit", "3", "lab.yaml"], ["lab.yaml"], {"save_total_limit": "3"}),  # transformers'
    (["--full_determinism", "--beta", "1"], [], {"full_determinism": True, "beta": "1"}),
    (["--train_manifest=a=b"], [], {"train_manifest": "a=b"}),
])  # fmt: skip
def test_words_become_options(words: list[str], plain: list[str], options: dict[str, Any]) -> None:
    from video_r1.settings.base import own_field_types
    from video_r1.settings.shared import DataSettings
    from video_r1.settings.vllm import VLLMSettings

    sections = (TGRPOSettings, VLLMSettings, DataSettings)
    types = {name: hint for kind in sections for name, hint in own_field_types(kind).items()}
    assert split_words(words, types) == (plain, options)


@pytest.mark.parametrize("words", [
    ["First, what?", "--question", "Then, where?", "--question=Why, when?"],
    ["First, what?", "Then, where?", "Why, when?"],
    ["--question", "First, what?", "Then, where?", "--question", "Why, when?"],
])  # fmt: skip
def test_several_questions(words: list[str]) -> None:
    settings = read_request("ask", ["run", "clip.mp4", *words]).section(AskSettings)
    assert settings.question == ["First, what?", "Then, where?", "Why, when?"]
    with pytest.raises(RequestError, match="path is given twice"):
        read_request("ask", ["run", "clip.mp4", "Why?", "--path", "other.mp4"])


@pytest.mark.parametrize(("words", "said"), [
    (["rll"], "did you mean rl?"),
    (["ask", "lab-base", "no-such.mp4", "Why?"], "no-such.mp4: no such file"),
    (["data"], "say data make or data check"),
    (["rl", "no-such.yaml"], "no-such.yaml: no such recipe"),
    (["rl", "lab-tgrpo", "more"], "'more' is one word too many"),
    (["rl", "lab-tgrpo", "--beta"], "--beta needs a value"),
    (["rl", "lab-tgrpo", "--betta", "1"], "did you mean beta?"),
    (["rl", "lab-tgrpo", "--lr", "1"], "did you mean learning_rate?"),
    (["eval", "run", "m.json", "--endpoint", "http://x/v1"], "did you mean engine?"),
    (["rl", "lab-tgrpo", "--num_generations", "1"], "num_generations (option --num_generations) is 1"),
    (["eval", "run", "test.json", "--model", "other"], "model is given twice"),
    (["annotate", "train.json", "--out", "cot.json"], "teacher is missing"),
])  # fmt: skip
def test_a_wrong_request_is_one_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("video-r1: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_missing_files_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    for name in ("some.json", "run/adapter_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    requests = {
        "data make none.csv --out x.json": "none.csv: no such manifest or table",
        "data check non.json": "non.json: no such manifest or table",
        "sft lab-sft --train_manifest some.json --model_name_or_path runs/none": "runs/none: no such folder",
        "annotate some.json --teacher run --out o.json": "run: these are adapters",
        "eval run some.json": "run: these are adapters; make a checkpoint: video-r1 merge run OUT",
        "eval lab-base": "eval needs a manifest or benchmarks",
        "eval lab-base --bench mvbnch": "'mvbnch' is neither a benchmark nor a manifest file",
        "serve some.json": "some.json: this is a file",
        "merge runs/none out": "runs/none: there is no such folder",
        "plan lab-sft --model_config runs/none": "runs/none: no such folder",
    }
    code = "import sys\nfrom video_r1.cli import main\nfor words in sys.argv[1:]: main(words.split())\n"
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    done = subprocess.run(
        [sys.executable, "-c", code, *requests], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line, said in zip(done.stderr.splitlines(), requests.values(), strict=True):
        assert said in line


def test_a_file_stands_where_figures_are_to_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"problem_id": 1, "problem": "Why?", "data_type": "video", "problem_type": "free-form"}
    manifest = tmp_path / "one.json"
    manifest.write_text(json.dumps([{**row, "solution": "<answer>So</answer>", "path": "a.mp4"}]))
    before = manifest.read_bytes()
    assert main(["eval", "lab-base", str(manifest), "--out", str(manifest)]) == 2
    assert "one.json is a file; name a new folder" in capsys.readouterr().err
    assert manifest.read_bytes() == before


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MediaError("clip.mp4", "no video stream"), 1, "video-r1: clip.mp4: no video stream\n"),
        (RequestError("two\nlines"), 2, "video-r1: two lines\n"),
        (KeyboardInterrupt(), 130, "video-r1: interrupted\n"),
        (Interrupted(signal.SIGTERM), 143, "video-r1: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/e/a"),
            1,
            "video-r1: runs/e/a: No space left on device; fix that, then run the same command again\n",
        ),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**settings: Any) -> None:
        raise error

    monkeypatch.setattr("video_r1.lab.demo.run_demo", fail)
    assert main(["demo"]) == code
    assert capsys.readouterr().err == said


def test_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full has the errors of a full disk: they name no file."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert main(["report", str(tmp_path), "--out", "/dev/full"]) == 1
    assert capsys.readouterr().err.startswith("video-r1: /dev/full: No space left on device; fix that")
    assert main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize("error", [IndexError(), OSError(errno.ENOENT, "No such file", "lost")])
def test_an_error_that_nobody_expected_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**settings: Any) -> None:
        raise error

    monkeypatch.setattr("video_r1.lab.demo.run_demo", fail)
    with pytest.raises(type(error)):
        main(["demo"])


def test_a_reader_that_stops_is_no_failure() -> None:
    done = subprocess.run(
        f"{sys.executable} -m video_r1 rl --help | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage: video-r1 rl")
    assert done.stderr == ""


def test_what_would_run_is_printed_as_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("video_r1.cli.carry_out", lambda recipe: pytest.fail("it ran"))
    words = ["rl", "lab-tgrpo", "--learning_rate", "3e-5", "--warmup_steps", "7"]
    assert main([*words, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# video-r1 rl, from lab-tgrpo; video-r1 ")
    (tmp_path / "printed.yaml").write_text(text)
    printed = load_recipe("rl", tmp_path / "printed.yaml")
    assert printed.values() == read_request("rl", words[1:]).values()
    assert printed.values()["warmup_steps"] == 7
    assert main(["data", "check", "m.json", "--print-config"]) == 0
    assert "\nmanifest: m.json\n" in capsys.readouterr().out
    assert main(["rl", "lab-tgrpo", "--print_config", "--betta", "1"]) == 2


def test_secrets_are_neither_printed_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    judge = ["--judge_endpoint", "http://me:hunter2@127.0.0.1:9/v1", "--judge_fields"]
    judge += ['{"extra": {"Authorization": "Bearer hunter2"}, "max_tokens": 64}', "--reward_funcs", "judge"]
    words = ["rl", "lab-tgrpo", *judge, "--output_dir", "run"]
    assert main([*words, "--print_config"]) == 0
    said = capsys.readouterr().out
    assert "http://***@127.0.0.1:9/v1" in said and "max_tokens: 64" in said
    recipe = read_request("rl", words[1:])
    save_resolved(recipe, "run")
    settings: dict[str, Any] = recipe.arguments_for(video_r1.TGRPOConfig) | {"use_cpu": True}
    config = video_r1.TGRPOConfig(**settings)
    monkeypatch.setattr("video_r1.cli.carry_out", lambda recipe: signal.raise_signal(signal.SIGINT))
    assert main(words) == 130
    row = {"problem_id": 1, "problem": "Why?", "data_type": "image", "problem_type": "free-form"}
    (tmp_path / "m.json").write_text(
        json.dumps([{**row, "solution": "<answer>So</answer>", "path": "a.png"}])
    )
    monkeypatch.undo()
    teacher = ["annotate", str(tmp_path / "m.json"), "--teacher", "http://me:hunter2@127.0.0.1:9/v1"]
    assert main([*teacher, "--out", str(tmp_path / "o.json"), "--wait", "0"]) == 2
    said += capsys.readouterr().err
    assert "http://***@127.0.0.1:9/v1: no endpoint answered within 0 s" in said
    shown = said + (tmp_path / "run" / "config.yaml").read_text()
    assert "hunter2" not in shown + json.dumps(config.to_dict()) and shown.count("***") >= 5


def test_commands_pass_their_settings_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings reach the function that does the work by the same names."""
    import video_r1.data.check

    seen: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.json").write_text("[]")
    monkeypatch.setattr(
        video_r1.data.check, "run_check", lambda manifest, **rest: seen.update(manifest=manifest, **rest) or 1
    )
    assert main(["data", "check", "m.json", "--media", "false", "--media_root", "/data", "--allow_urls"]) == 1
    assert seen == {
        "manifest": "m.json", "media_root": "/data", "allow_urls": True, "media": False, "workers": None,
        "remote_cache": None, "remote_cache_gb": 50.0, "allowed_roots": [], "renumber": None,
    }  # fmt: skip
