"""Benchmark specs and converters: each published format, the reference's JSON, and the checks on load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import tiny_questions
from benchmark_fixtures import lab_clips, reference_row, write_benchmarks

from video_r1.data.answers import answer_of, options_of
from video_r1.errors import ManifestError, RequestError
from video_r1.evaluation.benchmarks import BENCHMARKS
from video_r1.evaluation.benchmarks.loading import Questions, load_questions


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder, lab_clips(tmp_path_factory.mktemp("lab")))
    return folder


def load(name: str, root: Path, out: Path, **settings: Any) -> Questions:
    return load_questions(name, root, out / name, **{"allow_missing": True, **settings})


def brief(questions: Questions, root: Path) -> list[tuple[Any, ...]]:
    """id, type, answer, options, path below the root, window, task."""
    return [
        (
            sample.problem_id,
            sample.problem_type,
            sample.answer,
            len(sample.options),
            str(Path(sample.path).relative_to(root.resolve())),
            (sample.start, sample.end),
            sample.extra.get("task_type"),
        )
        for sample in questions.samples
    ]


WHOLE = (None, None)
CHOICE = "multiple choice"
KIT, ART = "vsibench/arkitscenes/41069025.mp4", "videommmu/Art/validation_Art_Theory_3.mp4"
CASTLE_CLIP = "tvqa/frames_fps3_hq/castle_s07e04_seg02_clip_14.mp4"
DIRECTION, ART_ID = "object_rel_direction", "validation_Art_Theory_3"
DUNK, HOLMES, EPISODE = (
    "tempcompass/videos/1034419625.mp4",
    "videoholmes/videos/RSmjqss0XKQ.mp4",
    "data/fFjv93ACGo8",
)
CASES: dict[str, list[tuple[Any, ...]]] = {
    "vsibench": [
        ("vsibench-0", "regression", "4", 0, KIT, WHOLE, "object_counting"),
        ("vsibench-1", "regression", "19.6", 0, KIT, WHOLE, "room_size_estimation"),
        *((f"vsibench-{n}", CHOICE, "A", 2, KIT, WHOLE, f"{DIRECTION}_{hard}")
          for n, hard in ((10, "easy"), (11, "medium"), (12, "hard"))),
        ("vsibench-2", CHOICE, "C", 3, "vsibench/scannet/scene0011_00.mp4", WHOLE, "route_planning"),
    ],
    "videommmu": [
        *((f"videommmu-{track}-{ART_ID}", CHOICE, letter, 3, ART, WHOLE, track)
          for track, letter in (("Adaptation", "B"), ("Comprehension", "C"), ("Perception", "A"))),
        ("videommmu-Adaptation-dev_Biology_3", "numerical", "12.97", 0, "videommmu/Science/dev_Biology_3.mp4",
         WHOLE, "Adaptation"),
    ],
    "mmvu": [("mmvu-validation_1", CHOICE, "D", 5, "mmvu/videos/Chemistry/0.mp4", WHOLE, "Chemistry")],
    "mvbench": [
        (f"mvbench-{number}", CHOICE, letter, options, f"mvbench/{path}", window, task)
        for number, letter, options, path, window, task in (
            (1, "C", 3, "ssv2_video_mp4/166583.mp4", WHOLE, "action_antonym"),
            (2, "A", 2, "star/Charades_v1_480/ZS9XR.mp4", (1.0, 3.5), "action_sequence"),
            (3, "A", 1, "video/clevrer/video_validation/video_10978.mp4", WHOLE, "counterfactual_inference"),
            (4, "A", 2, CASTLE_CLIP, (0.0, 2.5), "episodic_reasoning"),
            (5, "B", 2, "star/Charades_segment/USNP1_1.0_3.5.mp4", WHOLE, "object_interaction"),
        )
    ],
    "tempcompass": [
        (f"tempcompass-{n}", CHOICE, letter, options, DUNK, WHOLE, "action")
        for n, letter, options in ((1, "B", 2), (2, "B", 3), (3, "A", 3), (4, "A", 2))
    ],
    "videomme": [
        (f"videomme-001-{n}", CHOICE, letter, 4, "videomme/data/fFjv93ACGo8.mp4", WHOLE, task)
        for n, letter, task in ((1, "C", "Counting Problem"), (2, "A", "Temporal Reasoning"))
    ],
    "videoholmes": [
        (f"videoholmes-RSmjqss0XKQ-{n}", CHOICE, letter, 6, HOLMES, WHOLE, task)
        for n, letter, task in ((1, "A", "SR"), (2, "F", "TA"))
    ],
    "tomato": [
        ("tomato-rotation-0", CHOICE, "B", 3, "tomato/videos/human/0001-00.mp4", WHOLE, "rotation"),
        ("tomato-shape_trend-7", CHOICE, "C", 3, "tomato/videos/human/0002-03.mp4", WHOLE, "shape_trend"),
    ],
    "tvbench": [
        ("tvbench-1", CHOICE, "B", 2, "tvbench/video/action_antonym/a.mp4", WHOLE, "action_antonym"),
        ("tvbench-2", CHOICE, "A", 2, "tvbench/video/action_sequence/a.mp4", (0.5, 2.0), "action_sequence"),
    ],
    "longvideobench": [("longvideobench-x_0", CHOICE, "C", 3, "longvideobench/videos/x.mp4", WHOLE, "S2E")],
    "vinoground": [
        (f"vinoground-{idx}-{kind}", CHOICE, "AB"[idx.endswith("neg")], 2, f"vinoground/{folder}/{clip}.mp4",
         WHOLE, "object" if idx.startswith("1") else "action")
        for kind, folder, clips in (
            ("text", "vinoground_videos", ("0_pos", "0_neg", "1_pos", "1_neg")),
            ("video", "vinoground_videos_concated", ("0", "0_reverse", "1", "1_reverse")),
        )
        for idx, clip in zip(("0_pos", "0_neg", "1_pos", "1_neg"), clips, strict=True)
    ],
    **{
        name: [
            (f"{name}-{task}-{pair}_{one}", CHOICE, "AB"[one], 2, f"{name}/videos/star/{pair}_{one}.mp4",
             WHOLE, task)
            for task, pair in (("intuitive_physics", 8), ("intuitive_physics", 9), ("temporal_reasoning", 7))
            for one in (0, 1)
        ]
        for name in ("mvp", "mvp_mini")
    },
    "charades_sta": [
        (f"charades_sta-{number}", "temporal grounding", f'{{"time": {time}}}', 0,
         f"charades_sta/Charades_v1_480/{clip}.mp4", WHOLE, "")
        for number, time, clip in ((1, [0.7, 2.3], "3MSZA"), (2, [1.1, 3.4], "0BX9N"))
    ],
    "timeblind": [  # grouped by clip
        (f"timeblind-{number}", CHOICE, letter, 2, f"timeblind/videos/{clip}.mp4", WHOLE, kind)
        for kind, clips in (
            ("yes_no", ((0, "A", "vid_00000_0"), (2, "B", "vid_00000_0"),
                        (1, "B", "vid_00000_1"), (3, "A", "vid_00000_1"))),
            ("multiple_choice", ((4, "A", "mcq_vid_00000_0"), (6, "B", "mcq_vid_00000_0"),
                                 (5, "B", "mcq_vid_00000_1"), (7, "A", "mcq_vid_00000_1"))),
        )
        for number, letter, clip in clips
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_published_format_becomes_our_manifest(name: str, root: Path, tmp_path: Path) -> None:
    questions = load(name, root, tmp_path)
    assert brief(questions, root) == CASES[name]
    assert questions.annotation == "published"
    benchmark = BENCHMARKS[name]
    assert questions.coverage == (len(CASES[name]), benchmark.questions, ())
    assert str(questions.coverage) == f"{len(CASES[name])} of {benchmark.questions:,} questions"


def test_a_declaration_of_ones_own(root: Path, tmp_path: Path) -> None:
    """A TOML file anywhere declares a benchmark; one of the package needs no name in code either."""
    copy = tmp_path / "own.toml"
    declared = Path(str(files("video_r1")), "evaluation/benchmarks/timeblind.toml").read_text()
    copy.write_text(declared.replace('title = "TimeBlind"', 'title = "Ours"'))
    shutil.copytree(root / "timeblind", tmp_path / "media/own")
    found = load_questions(str(copy), tmp_path / "media", tmp_path / "out", allow_missing=True)
    assert (found.name, found.title) == ("own", "Ours")
    assert [sample.problem_id for sample in found.samples] == [
        str(case[0]).replace("timeblind", "own") for case in CASES["timeblind"]
    ]
    for wrong, said in {"titel": "titel", "read = 'os'": "os", "title = 1 2": "line 1"}.items():
        copy.write_text(wrong if "=" in wrong else f"{wrong} = 1\n{declared}")
        with pytest.raises(RequestError, match=f"own.toml declares no benchmark: .*{said}"):
            load_questions(str(copy), tmp_path, tmp_path / "out")


def test_texts_and_prompts(root: Path, tmp_path: Path) -> None:
    vsi = load("vsibench", root, tmp_path).samples
    assert vsi[0].problem == "These are frames of a video.\nHow many table(s) are in this room?"
    assert vsi[2].options == ("A. left", "B. right")
    *tracks, sums = load("videommmu", root, tmp_path).samples
    lectures = {sample.extra["task_type"]: sample for sample in tracks}
    assert lectures["Perception"].problem.endswith(
        "Please ignore the Quiz question in last frame of the video."
    )
    learned = (
        "You should watch and learn the video content. Then apply what you learned to answer the following "
    )
    image = " question. The image for this question is at the end of the video.\n"
    assert lectures["Adaptation"].problem == f"{learned}multi-choice{image}What is shown?"
    assert sums.problem == f"{learned}open-ended{image}How many?"
    assert lectures["Adaptation"].options == ("A. first", "B. second", "C. third")
    forms = {sample.data_source: sample for sample in load("tempcompass", root, tmp_path).samples}
    assert forms["TempCompass/yes_no"].options == ("A. yes", "B. no")
    assert forms["TempCompass/captioning"].options[1] == "B. {'subject': 'man', 'action': 'dunking'}"
    assert "Generated" not in forms["TempCompass/captioning"].problem
    assert forms["TempCompass/caption_matching"].options == ("A. A man is dunking.", "B. A man is passing.")
    assert forms["TempCompass/multi-choice"].problem == "What is the man doing?"


COUNTING = {"original_question_type": "object_counting", "problem_type": "regression", "options": None}
REFERENCE = [
    ("vsibench", COUNTING | {"solution": "<answer>4</answer>"}, "VSIBench/arkitscenes/4.mp4",
     ("object_counting", WHOLE)),
    ("videommmu", {"problem_id": 300}, "VideoMMMU/validation_Art_Theory_3.mp4", ("Adaptation", WHOLE)),
    ("videommmu", {"problem_id": 900}, "VideoMMMU/dev_Biology_3.mp4", ("Perception", WHOLE)),
    ("mmvu", {}, "MMVU/videos/Computer_Science/7.mp4", ("Computer Science", WHOLE)),
    ("mvbench", {"problem_id": 778, "start": 1.0, "end": 2.5}, "MVBench/star/Charades_v1_480/A.mp4",
     ("action_prediction", (1.0, 2.5))),
    ("mvbench", {"problem_id": 1601, "data_type": "frame"}, "MVBench/tvqa/frames_fps3_hq/c.mp4",
     ("episodic_reasoning", WHOLE)),
    ("mvbench", {"problem_id": 1600}, "MVBench/clevrer/v.mp4", ("egocentric_navigation", WHOLE)),
    ("videomme", {"task_type": "OCR Problems", "data_source": None}, "VideoMME/f.mp4",
     ("OCR Problems", WHOLE)),
]  # fmt: skip


def test_the_references_json(tmp_path: Path) -> None:
    """Media are where the JSON says, without `Evaluation`, or in our own folder of the benchmark."""
    for case, (name, row, path, expected) in enumerate(REFERENCE):
        places = Path("Evaluation") / path, Path(path), Path(name, *Path(path).parts[1:])
        for place in places if case in (0, 4) else places[case % 3 :][:1]:
            root = tmp_path / f"{case}-{place.parts[0]}"
            (root / place).parent.mkdir(parents=True)
            (root / place).write_bytes(b"a clip")
            rows = [reference_row(row.get("problem_id", 7), f"./Evaluation/{path}", **row)]
            (root / f"eval_{name}.json").write_text(json.dumps(rows))
            questions = load(name, root, root / "out")
            assert questions.annotation == "reference"
            (found,) = questions.samples
            assert Path(found.path) == (root / place).resolve()
            assert (found.extra.get("task_type"), (found.start, found.end)) == expected
            assert found.problem == "What will the person do next?"  # no prompt of the benchmark's own
            assert found.data_type == "video"


CASTLE = {"problem_id": 1601, "video": "castle_s07", "data_type": "frame", "start": 0.0, "end": 2.0, "fps": 3}


@pytest.mark.parametrize(("name", "row", "path", "place"), [
    ("videommmu", {}, "VideoMMMU/validation_Art_Theory_3.mp4", "Art/validation_Art_Theory_3.mp4"),
    ("mvbench", {"video": "1.webm"}, "MVBench/ssv2_video/1.mp4", "video/data0613/ssv2_video/1.webm"),
    ("mvbench", {"problem_id": 2001}, "MVBench/nturgbd/S_rgb.mp4", "video/nturgbd_convert/S_rgb.mp4"),
    ("mvbench", {"problem_id": 801, "video": "Z.mp4", "start": 1.5, "end": 17.1},
     "MVBench/star/Charades_v1_480/Z.mp4", "video/star/Charades_segment/Z_1.5_17.1.mp4"),
    ("mvbench", CASTLE, "MVBench/tvqa/frames_fps3_hq/castle_s07.mp4",
     "video/tvqa/frames_fps3_hq/castle_s07/00001.jpg"),
])  # fmt: skip
def test_the_references_json_beside_copies_of_the_hub(
    name: str, row: dict[str, Any], path: str, place: str, tmp_path: Path
) -> None:
    """Clips are where the archives of the benchmark's own dataset put them."""
    rows = [reference_row(row.get("problem_id", 7), f"./Evaluation/{path}", **row)]
    (tmp_path / f"eval_{name}.json").write_text(json.dumps(rows))
    file = tmp_path / name / place
    file.parent.mkdir(parents=True)
    file.write_bytes(b"a clip or a frame")
    (found,) = load(name, tmp_path, tmp_path / "out").samples
    is_folder = file.suffix == ".jpg"
    assert Path(found.path) == (file.parent if is_folder else file).resolve()
    assert found.fps == (3 if is_folder else None)
    assert (found.start is not None) == is_folder  # a clip that is cut to its window has none


def test_which_annotation_counts(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "mmvu", tmp_path / "mmvu")
    row = reference_row(1, "./Evaluation/MMVU/videos/Chemistry/0.mp4")
    (tmp_path / "eval_mmvu.json").write_text(json.dumps([row]))
    assert load("mmvu", tmp_path, tmp_path / "out").samples[0].problem_id == "mmvu-validation_1"
    chosen = load("mmvu", tmp_path, tmp_path / "out", annotation="reference")
    assert chosen.samples[0].problem_id == "mmvu-1"
    with pytest.raises(RequestError, match=r"eval_vsibench\.json is not there"):
        load("vsibench", tmp_path, tmp_path / "out", annotation="reference")
    with pytest.raises(RequestError, match=r"none of test\.jsonl.*hf download nyu-visionx/VSI-Bench"):
        load("vsibench", tmp_path, tmp_path / "out")


def test_what_is_missing_is_listed_with_where_to_get_it(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        load("vsibench", root, tmp_path / "out", allow_missing=False)
    assert "the annotation has 6 questions, not 5,130" in str(refused.value)
    shutil.copytree(root / "vsibench", tmp_path / "vsibench", ignore=shutil.ignore_patterns("scannet"))
    with pytest.raises(RequestError) as refused:
        load("vsibench", tmp_path, tmp_path / "out", allow_missing=False)
    for part in ("1 media files are missing: ", "scannet/scene0011_00.mp4", "hf download nyu", "unzip ark"):
        assert part in str(refused.value)
    rest = load("vsibench", tmp_path, tmp_path / "out")
    assert len(rest.samples) == 5
    assert str(rest.coverage) == "5 of 5,130 questions, 1 media files missing"
    (tmp_path / "vsibench/arkitscenes/41069025.mp4").unlink()
    with pytest.raises(RequestError, match="2 media files are missing"):  # nothing is left to evaluate
        load("vsibench", tmp_path, tmp_path / "out")


def test_options_are_counted(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mmvu"
    (folder / "videos/Chemistry").mkdir(parents=True)
    (folder / "videos/Chemistry/0.mp4").write_bytes(b"a clip")
    (row,) = [row for row in json.loads((root / "mmvu/validation.json").read_text()) if row["answer"] == "D"]
    del row["choices"]["E"]
    (folder / "validation.json").write_text(json.dumps([row]))
    with pytest.raises(RequestError, match="questions have 5 to 5 options, but here are 1 with 4"):
        load("mmvu", tmp_path, tmp_path / "out", allow_missing=False)
    row["answer"] = "E"  # no option: the question is broken, whatever is allowed
    (folder / "validation.json").write_text(json.dumps([row]))
    with pytest.raises(ManifestError, match="E is not among the options"):
        load("mmvu", tmp_path, tmp_path / "out")


def test_a_manifest_of_ones_own(tmp_path: Path) -> None:
    clips = {1: "a.mp4", 2: "b.mp4", 3: "a.mp4"}
    rows = [tiny_questions.row(number, "free-form", "video", clip) for number, clip in clips.items()]
    manifest = tmp_path / "mine.json"
    manifest.write_text(json.dumps(rows))
    (tmp_path / "a.mp4").write_bytes(b"a clip")
    with pytest.raises(RequestError, match=r"b\.mp4"):
        load_questions(str(manifest), None, tmp_path / "out")
    questions = load_questions(str(manifest), None, tmp_path / "out", allow_missing=True)
    assert [sample.problem_id for sample in questions.samples] == [1, 3]
    assert (questions.name, str(questions.coverage)) == ("mine", "2 of 3 questions, 1 media files missing")
    with pytest.raises(RequestError, match=r"benchmarks: charades_sta, .*, vsibench"):
        load_questions("vsi-bench", None, tmp_path / "out")


def test_wrong_requests_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[{}]")
    wrong = [[], ["--bench", "mvbnch"], ["--bench", "mvbench"], ["bad.json"], ["bad.json", "--bench", "mvp"]]
    code = (
        "import sys; from video_r1.cli import main; "
        f"print([main(['eval', 'model', *words]) for words in {wrong}], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[2, 2, 2, 2, 2] False", done.stderr


def test_lettered_options_and_answers() -> None:
    both = ["A. left", "B. right"]
    for options, expected in (
        (["left", "right"], both), (both, both), (["(A) left", "(B) right"], both),
        (["A. ", "B. "], ["A. ", "B. "]), ({"B": "right", "A": "left"}, both),
        (["B. left", "A. right"], ["A. B. left", "B. A. right"]),  # these letters are part of the text
        (["I. Newton", "C. Darwin"], ["A. I. Newton", "B. C. Darwin"]), ([], []),
    ):  # fmt: skip
        assert options_of(options) == expected and options_of(options, "regression") == []
    letters = ["B", "(B)", "B.", "right", "B. right", "B. wrong", "C", 4]
    assert [answer_of(answer, both) for answer in letters] == [*"BBBBB", "B. wrong", "C", "4"]
    assert answer_of("B. right", []) == "B. right"


def test_an_answer_that_is_one_options_letter_and_anothers_text() -> None:
    """The benchmark says which it is: "What letter is written first?" of MVBench, whose answers are texts."""
    letters = options_of(["E", "A", "I"])
    assert answer_of("A", letters) == "A"
    assert answer_of("A", letters, "text") == "B"
    assert answer_of("C", letters, "text") == "C"  # no option's text
    texts = {name for name, benchmark in BENCHMARKS.items() if benchmark.answers_are == "text"}
    assert texts == {"mvbench", "tvbench", "mvp", "mvp_mini"}
