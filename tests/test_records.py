"""Manifests: what is read, what is refused, and that every problem is named with its row."""

import json
import os
from pathlib import Path

import datasets
import pytest
from datasets import config as datasets_config

from video_r1.data.grounding import GROUNDING_FORMS
from video_r1.data.manifests.records import PROBLEM_TYPES, Sample, check_manifest, load_manifest
from video_r1.data.scores import correctness, format_reward
from video_r1.data.sources.media_paths import path_below
from video_r1.errors import ManifestError
from video_r1.evaluation.metrics import answer_score

CHOICE = {
    "problem_id": 7,
    "problem": "Which way does the ball move?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. left", "B. right"],
    "solution": "<answer>B</answer>",
    "path": "./clips/7.mp4",
    "data_source": "lab/direction",
}
NUMBER = {
    "problem_id": "n-1",
    "problem": "How many balls?",
    "data_type": "image",
    "problem_type": "numerical",
    "options": [],
    "solution": "<answer>1,204.5</answer>",
    "path": "images/1.png",
    "data_source": "lab/count",
}


def write(folder: Path, content, name: str = "manifest.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def problems_of(folder: Path, *changed: dict) -> list[str]:
    found = check_manifest(write(folder, list(changed))).problems
    return [str(problem) for problem in found]


def test_a_row_becomes_a_sample(tmp_path):
    row = CHOICE | {
        "process": "<think>It goes right.</think>",
        "start": 1,
        "end": 2.5,
        "family": "direction",
        "key_frames": [0, 3],
        "nothing": None,
    }
    [sample] = load_manifest(write(tmp_path, [row]))
    assert sample == Sample(
        problem_id=7,
        problem="Which way does the ball move?",
        data_type="video",
        problem_type="multiple choice",
        solution="<answer>B</answer>",
        path=str(tmp_path.resolve() / "clips" / "7.mp4"),
        options=("A. left", "B. right"),
        process="<think>It goes right.</think>",
        data_source="lab/direction",
        start=1.0,
        end=2.5,
        extra={"family": "direction", "key_frames": [0, 3]},
    )
    assert sample.answer == "B"


def as_lines(made):
    return "\n".join(json.dumps(row) for row in made) + "\n\n"


def as_indented_list(made):
    return "\ufeff" + json.dumps(made, indent=2, ensure_ascii=False)


@pytest.mark.parametrize("spell", [json.dumps, as_indented_list, as_lines])
def test_spellings_of_one_manifest_agree(tmp_path, spell):
    made = [CHOICE, NUMBER | {"problem": "Wie viele Bälle? \u2603 \U0001f3c0 }, {"}]
    samples = load_manifest(write(tmp_path, spell(made)))
    assert [(s.problem_id, s.problem) for s in samples] == [(r["problem_id"], r["problem"]) for r in made]


TEXT = {"options": [], "problem_type": "free-form"}
PROBLEMS = [
    ({"problem_id": None}, "problem_id is missing"),
    ({"problem_id": 7.5}, "problem_id is 7.5; it must be an integer or a string"),
    ({"problem": "  "}, "problem is '  '; it must be a text"),
    ({"problem_type": "essay"}, f"problem_type is 'essay'; known are {', '.join(PROBLEM_TYPES)}"),
    ({"solution": "B"}, "solution is 'B'; it must be <answer>…</answer> with a text inside"),
    (
        {"solution": "<answer>A</answer><answer>B</answer>"},
        "it must be <answer>…</answer> with a text inside",
    ),
    ({"solution": "<answer>C</answer>"}, "the solution C is not among the options A, B"),
    ({"solution": "<answer>right</answer>"}, "must be an option's letter, not 'right'"),
    ({"solution": "<answer>B. left</answer>"}, "the solution 'B. left' is not the text of option B"),
    ({"options": ["left", "B. right"]}, "option 'left' does not begin with its letter"),
    ({"options": ["A. left", "A. right", "B. up"]}, "options use the letter A more than once"),
    ({"options": ["B. right"]}, "needs two options or more, found 1"),
    ({"options": "A. left"}, "options is 'A. left'; it must be a list of strings"),
    ({"problem_type": "free-form"}, "options are given, but the problem is free-form"),
    ({"process": "because"}, "process is 'because'; it must be <think>…</think>"),
    ({"start": "1"}, "start is '1'; it must be a time in seconds"),
    ({"start": 4, "end": 3}, "the window ends (3 s) before it starts (4 s)"),
    ({"data_type": "image", "end": 3}, "start and end are for videos"),
    ({"path": "/etc/passwd"}, "path '/etc/passwd' is absolute; it must be relative to the media root"),
    ({"problem_type": "numerical", "options": [], "solution": "<answer>1e999</answer>"}, "finite number"),
    ({**TEXT, "solution": "<answer>¿…?</answer>"}, "must have a word or a symbol to compare, unlike '¿…?'"),
    (
        {**TEXT, "problem_type": "OCR", "solution": "<answer>\u200b\x07</answer>"},
        "has nothing that can be seen",
    ),
    ({**TEXT, "solution": "<answer>a <think> b</answer>"}, "has a tag in it, so that no completion with it"),
    ({**TEXT, "problem_type": "OCR", "solution": "<answer></think></answer>"}, "has a tag in it"),
    ({"options": ["A. a  ball", "B.  a ball "]}, "the options A and B are the same, 'a ball'"),
    ({"path": "../7.mp4"}, "path '../7.mp4' leads out of the media root"),
    ({"path": "clips\\7.mp4"}, "path 'clips\\\\7.mp4' has backslashes; write / between folders"),
    ({"path": "a\0.mp4"}, "contains a null character"),
]


@pytest.mark.parametrize(("change", "text"), PROBLEMS, ids=[json.dumps(c)[:50] for c, _ in PROBLEMS])
def test_each_problem_is_found_alone_and_named(tmp_path, change, text):
    found = problems_of(tmp_path, NUMBER, CHOICE | change)
    assert len(found) == 1
    assert found[0].startswith("row 2")
    assert text in found[0]


@pytest.mark.parametrize(
    "process",
    [
        "<think>a</think><think>b</think>",
        "<think>first <think>nested</think>",
        "<think>so it is <answer>A</answer></think>",
        "<think>I see.</think> Revised: <think>really</think>",
        "<think>a</think> so",
        "<think>a</answer></think>",
    ],
)
def test_cases_rationales_with_further_tags(tmp_path, process):
    (found,) = problems_of(tmp_path, CHOICE | {"process": process})
    assert "it must be <think>…</think>, without further tags" in found


NUMBERS = [
    ("3,5", "must be a finite number, not '3,5'; a comma stands only before groups of three digits"),
    ("1.234,5", "a comma stands only before"),
    ("three", "must be a finite number, not 'three'"),
    ("−5", ""),
    ("1 200", ""),
    ("1,200", ""),
]


@pytest.mark.parametrize(("number", "text"), NUMBERS)
@pytest.mark.parametrize("problem_type", ["numerical", "regression"])
def test_cases_numbers_are_read_in_one_way(tmp_path, number, text, problem_type):
    row = NUMBER | {"problem_type": problem_type, "solution": f"<answer>{number}</answer>"}
    found = check_manifest([row], tmp_path)
    assert len(found.problems) == bool(text) and text in "".join(map(str, found.problems))
    if not text:
        plain = "".join(number.split()).replace("−", "-")
        assert correctness(problem_type, plain, found.samples[0].answer) == pytest.approx(1)


def test_a_regression_truth_of_zero_is_paid_by_an_evaluation_only(tmp_path):
    row = NUMBER | {"problem_type": "regression", "solution": "<answer>0.0</answer>"}
    (problem,) = check_manifest([row], tmp_path).problems
    assert "is '0.0': errors are relative to it, so that no answer is paid; use numerical" in problem.text
    assert load_manifest([row], tmp_path, score=answer_score)[0].answer == "0.0"
    assert load_manifest([row | {"problem_type": "numerical"}], tmp_path)


def test_cases_truths_in_any_script_are_paid(tmp_path):
    """Whatever a row's type accepts as its truth, a copy of it earns the full reward (one word: 2/3)."""
    texts = [
        "黑白条纹",
        "Чёрная кошка",
        "القطة السوداء",
        "แมวดำ",
        "काली बिल्ली",
        "검은 고양이",
        "café noir",
        "👍 → 😀",
    ]
    truths = [(kind, text) for kind in ("free-form", "OCR") for text in texts] + [("free-form", "ball")]
    truths += [("math", r"\frac{1}{2}"), ("regression", "1e-3"), ("numerical", "0"), ("numerical", "1e-9")]
    truths += GROUNDING_FORMS.items()
    rows = [
        CHOICE
        | {"problem_id": n, "options": [], "problem_type": kind, "solution": f"<answer>{truth}</answer>"}
        for n, (kind, truth) in enumerate(truths)
    ]
    samples, _, problems = check_manifest(rows, tmp_path)
    assert problems == []
    for sample in samples:
        least = 2 / 3 if sample.answer == "ball" else 0.999
        assert correctness(sample.problem_type, sample.answer, sample.answer) >= least
        assert format_reward(f"<think>x</think>{sample.solution}", sample.problem_type) == 1


@pytest.mark.parametrize(("solution", "first"), [("B.", "A: left"), ("(B)", "(A) left"), ("B. right", "A")])
def test_option_letters_in_their_usual_spellings(tmp_path, solution, first):
    options = [first, "B. right"]
    row = CHOICE | {"solution": f"<answer>{solution}</answer>", "options": options}
    (sample,) = load_manifest(write(tmp_path, [row]))
    assert (sample.solution, sample.answer) == ("<answer>B</answer>", "B")  # training compares it exactly
    assert sample.options == tuple(options)


def test_all_problems_of_all_rows_are_reported_together(tmp_path):
    made = [
        CHOICE | {"solution": "<answer>Z</answer>", "path": "/x.mp4"},
        NUMBER,
        [1, 2],
        NUMBER,
        {"problem_id": 3},
    ]
    with pytest.raises(ManifestError) as error:
        load_manifest(write(tmp_path, made))
    expected = [
        "row 1 (id 7): path '/x.mp4' is absolute; it must be relative to the media root, "
        "or lie in a folder that allowed_roots names",
        "row 1 (id 7): the solution Z is not among the options A, B",
        "row 3: is [1, 2], not an object with fields",
        "row 4 (id n-1): problem_id is used before, in row 2; each row needs its own",
        *(
            f"row 5 (id 3): {name} is missing"
            for name in ("problem", "data_type", "problem_type", "solution", "path")
        ),
    ]
    assert [str(problem) for problem in error.value.problems] == expected
    message = str(error.value)
    assert "9 problems" in message and "\n" not in message
    assert all(text in message for text in expected)


def test_a_missing_file_of_the_lab_says_what_makes_it(tmp_path):
    with pytest.raises(ManifestError, match=r"no such manifest or table; video-r1 lab make .*lab makes it$"):
        load_manifest(tmp_path / "lab" / "rl.json")
    with pytest.raises(ManifestError, match=r"other.json: no such manifest or table$"):
        load_manifest(tmp_path / "other.json")


def test_a_mistyped_name_is_not_taken_for_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "question,answer", "questions.csv")
    with pytest.raises(ManifestError, match=r"question.csv: no such .*; did you mean questions.csv\?"):
        load_manifest("question.csv")
    with pytest.raises(ManifestError, match=r"questions.csv: a table, not a manifest; video-r1 data make"):
        load_manifest("questions.csv")


def test_a_long_list_of_problems_is_cut_in_the_message_only(tmp_path):
    with pytest.raises(ManifestError) as error:
        load_manifest(write(tmp_path, [CHOICE | {"problem_id": n, "problem": None} for n in range(50)]))
    assert len(error.value.problems) == 50
    assert "row 20 " in str(error.value) and "row 21 " not in str(error.value)
    assert "and 30 more (`video-r1 data check` lists all)" in str(error.value)


BROKEN = [
    ("", "the manifest has no rows"),
    ("[]", "the manifest has no rows"),
    ('[{"a": 1}', "the JSON is broken at line 1, column 10: a comma or ] is missing"),
    ('[{"a": 1} {"a": 2}]', "a comma or ] is missing"),
    ('[\n{"a": 1},\n{"a": }\n]', "the JSON is broken at line 3, column 7"),
    ('[\n{"a": 1} ,\n]', "line 2, column 10: remove the comma before the end of the list"),
    ('[{"a": 1}] and more', "there is text after the end of the list"),
    ("[" * 100_000, "the JSON is broken at line 1"),
    ('{\n  "rows": []\n}', "the file is one JSON object spread over lines"),
    ('{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    ("not json", "line 1 is not JSON"),
]


@pytest.mark.parametrize(("content", "text"), BROKEN, ids=[repr(content[:20]) for content, _ in BROKEN])
def test_broken_json_is_named_with_its_place(tmp_path, content, text):
    with pytest.raises(ManifestError) as error:
        load_manifest(write(tmp_path, content))
    assert text in str(error.value.problems[-1])


def test_broken_json_lines_do_not_hide_the_others(tmp_path):
    content = "\n".join([json.dumps(CHOICE), "{", "", json.dumps(NUMBER | {"path": "/x"})])
    samples, _, problems = check_manifest(write(tmp_path, content, "manifest.jsonl"))
    assert [s.problem_id for s in samples] == [7]
    assert [problem.row for problem in problems] == [2, 4]


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(json.dumps(CHOICE).encode() + b"\n\xff\xfe\n")
    assert "line 2, column 1 is not UTF-8" in str(check_manifest(path).problems[-1])


@pytest.mark.parametrize("spell", [json.dumps, as_lines])
@pytest.mark.parametrize(
    ("field", "text"),
    [
        ('"\\ud83d alone"', "half a character"),
        ('{"\\uDC00": 1}', "half a character"),
        ("[" * 900 + "]" * 900, "nested deeper than 100 levels"),
        ('"\\ud83d\\ude00 " ', ""),
        ("[" * 98 + "]" * 98, ""),
    ],
)
def test_a_row_that_others_cannot_read_is_refused_alone(tmp_path, spell, field, text):
    content = spell([CHOICE, NUMBER | {"note": "HERE"}]).replace('"HERE"', field)
    samples, _, problems = check_manifest(write(tmp_path, content))
    assert [sample.problem_id for sample in samples] == ([7] if text else [7, "n-1"])
    assert [text in problem.text for problem in problems] == [True] * bool(text)


def test_allowed_roots_admit_absolute_paths_and_links(tmp_path):
    root, shelf, secret = (tmp_path / name for name in ("root", "shelf", "secret"))
    for folder in (root, shelf, secret):
        folder.mkdir()
        (folder / "a.mp4").touch()
    os.symlink(shelf / "a.mp4", root / "link.mp4")
    os.symlink(shelf, root / "folder")
    os.symlink(root / "a.mp4", root / "inner.mp4")
    os.symlink(secret / "a.mp4", shelf / "out.mp4")
    paths = ["link.mp4", str(shelf / "a.mp4"), f"file://{shelf}/a.mp4", "folder/a.mp4", "inner.mp4"]
    paths += ["folder/../root/inner.mp4", str(shelf / "out.mp4"), "/etc/passwd"]
    made = [CHOICE | {"problem_id": n, "path": path} for n, path in enumerate(paths)]
    manifest = write(root, made)
    samples, _, problems = check_manifest(manifest, allowed_roots=[shelf])
    found = [str((folder / "a.mp4").resolve()) for folder in (*[shelf] * 4, *[root] * 2)]
    assert [(s.problem_id, s.path) for s in samples] == list(enumerate(found))
    assert [problem.problem_id for problem in problems] == [6, 7]
    assert all("leads out of the media root and the allowed roots" in problem.text for problem in problems)
    assert path_below(str(root.resolve()), samples[1].path) == samples[1].path  # it is found there again
    assert [s.problem_id for s in check_manifest(manifest).samples] == [4, 5]  # without the setting
    with pytest.raises(ManifestError, match=r"allowed_roots: .*nowhere is not a folder"):
        check_manifest(manifest, allowed_roots=[tmp_path / "nowhere"])


def test_a_list_of_rows_is_checked_like_a_manifest(tmp_path):
    (sample,) = load_manifest([CHOICE], media_root=tmp_path)
    assert sample == load_manifest(write(tmp_path, [CHOICE]))[0]
    with pytest.raises(ManifestError, match=r"list: 2 problems: row 1 \(id 7\): .*; row 2: is 3"):
        load_manifest([CHOICE | {"problem": None}, 3], media_root=tmp_path)


def test_a_media_root_that_is_no_folder(tmp_path):
    with pytest.raises(ManifestError, match="is not a folder"):
        load_manifest(write(tmp_path, [CHOICE]), media_root=tmp_path / "nowhere")


def test_a_datasets_dataset_with_null_columns(tmp_path):
    rows_made = [
        CHOICE | {"problem_id": "c", "family": "direction", "start": 0.5, "end": None},
        NUMBER | {"family": None, "start": None, "end": None},
    ]
    dataset = datasets.Dataset.from_list(rows_made)
    samples = load_manifest(dataset, media_root=tmp_path)
    assert [s.problem_id for s in samples] == ["c", "n-1"]
    assert [(s.start, s.options, dict(s.extra)) for s in samples] == [
        (0.5, ("A. left", "B. right"), {"family": "direction"}),
        (None, (), {}),
    ]
    with_a_format = load_manifest(dataset.with_format("torch"), media_root=tmp_path)
    assert with_a_format == samples


def test_parquet_and_a_data_set_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    dataset = datasets.Dataset.from_list([CHOICE, CHOICE | {"problem_id": 8}])
    dataset.to_parquet(folder / "train.parquet")
    dataset.select([1]).to_parquet(folder / "test.parquet")
    assert [s.problem_id for s in load_manifest(folder / "train.parquet")] == [7, 8]
    assert [s.problem_id for s in load_manifest(folder, media_root=tmp_path)] == [7, 8]
    assert [s.problem_id for s in load_manifest(folder, media_root=tmp_path, split="test")] == [8]
    with pytest.raises(ManifestError, match="no split 'dev', only"):
        load_manifest(folder, media_root=tmp_path, split="dev")


def test_a_source_that_is_nothing_known(monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ManifestError, match="neither a manifest file nor a loadable dataset"):
        load_manifest("nobody-knows/this-set")
    with pytest.raises(ManifestError, match="not int"):
        load_manifest(3)  # type: ignore[arg-type]
