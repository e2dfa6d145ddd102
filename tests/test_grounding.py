"""Answers that say where and when: their forms, what is read of others, and overlaps worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_r1.data.answers import read_answer
from video_r1.data.grounding import GROUNDING_FORMS, Located, parse_located, read_located, truth_problems
from video_r1.data.manifests.records import check_manifest
from video_r1.data.scores import (
    box_iou,
    common_iou,
    correctness,
    format_reward,
    overlaps,
    span_iou,
    track_iou,
)

TEMPORAL, SPATIAL, BOTH, TRACKING = GROUNDING_FORMS
BOX = (100.0, 200.0, 300.0, 400.0)

seconds = st.floats(0, 1e4).map(lambda value: round(value, 3))
spans = st.tuples(seconds, seconds)
sides = st.floats(0, 1000).map(lambda value: round(value, 1))
boxes = st.tuples(sides, sides, sides, sides)


@pytest.mark.parametrize(
    ("first", "second", "iou"),
    [
        ((2, 6), (2, 6), 1.0),
        ((2, 6), (4, 8), 2 / 6),  # 4 to 6 of 2 to 8
        ((4, 8), (2, 6), 2 / 6),
        ((0, 10), (4, 5), 1 / 10),
        ((0, 2), (2, 4), 0.0),  # they touch
        ((0, 1), (5, 9), 0.0),
        ((6, 2), (2, 6), 0.0),  # ends before it begins
        ((3, 3), (3, 3), 0.0),
        ((-1e308, 1e308), (2, 6), 0.0),
    ],
)
def test_spans(first, second, iou):
    assert span_iou(first, second) == pytest.approx(iou)


@pytest.mark.parametrize(
    ("first", "second", "iou"),
    [
        (BOX, BOX, 1.0),
        # 100 wide and 100 high of two areas of 40,000 each: 10,000 ÷ 70,000
        (BOX, (200, 300, 400, 500), 1 / 7),
        (BOX, (100, 200, 200, 400), 1 / 2),
        (BOX, (300, 200, 500, 400), 0.0),  # they touch
        (BOX, (300, 400, 100, 200), 0.0),  # the corners the wrong way round
        (BOX, (100, 200, 100, 400), 0.0),
        ((-1e308, -1e308, 1e308, 1e308), BOX, 0.0),
    ],
)
def test_boxes(first, second, iou):
    assert box_iou(first, second) == pytest.approx(iou)
    assert box_iou(second, first) == pytest.approx(iou)


def test_boxes_over_time():
    half = (100, 200, 200, 400)  # of BOX: 1/2
    truth = {1.0: BOX, 2.0: BOX, 3.0: BOX, 4.0: BOX}
    assert track_iou({1.0: BOX, 2.0: half, 9.0: BOX}, truth) == pytest.approx((1 + 1 / 2) / 4)
    assert common_iou({1.0: BOX, 2.0: half, 9.0: BOX}, truth) == pytest.approx((1 + 1 / 2) / 2)
    assert track_iou({}, truth) == common_iou({}, truth) == common_iou({9.0: BOX}, truth) == 0


@given(spans, spans)
def test_overlap_of_spans_is_a_share(first, second):
    iou = span_iou(first, second)
    assert 0 <= iou <= 1
    assert iou == span_iou(second, first)
    assert span_iou(first, first) == (first[1] > first[0])


@pytest.mark.parametrize(
    ("kind", "answer", "truth", "score"),
    [
        (TEMPORAL, '{"time": [4, 8]}', '{"time": [2.0, 6]}', 1 / 3),
        (TEMPORAL, "[4, 8]", '{"time": [2, 6]}', 0.0),  # strict: the keys have to be there
        (TEMPORAL, '{"time": [4, 8, 9]}', '{"time": [2, 6]}', 0.0),
        (TEMPORAL, '{"time": [2, 1e999]}', '{"time": [2, 6]}', 0.0),
        (TEMPORAL, f'{{"time": [2, 1{"0" * 400}]}}', '{"time": [2, 6]}', 0.0),  # too large for a float
        (TEMPORAL, "", '{"time": [2, 6]}', 0.0),
        (SPATIAL, '{"boxes": [200, 300, 400, 500]}', '{"boxes": [100, 200, 300, 400]}', 1 / 7),
        # ½ · 1/3 + ½ · (1 + 1/2) ÷ 2: second 9 is not in the truth, second 5 is missing
        (
            BOTH,
            '{"time": [4, 8], "boxes": {"3": [10, 20, 30, 40], "4": [10, 20, 20, 40], "9": [0, 0, 1, 1]}}',
            '{"time": [2, 6], "boxes": {"3": [10, 20, 30, 40], "4": [10, 20, 30, 40], "5": [1, 2, 3, 4]}}',
            1 / 6 + 3 / 8,
        ),
        (BOTH, '{"time": [2, 6]}', '{"time": [2, 6], "boxes": {"3": [1, 2, 3, 4]}}', 0.0),
        # three of four seconds, one of them half: (1 + 1 + 1/2) ÷ 4; "2.0" is second 2
        (
            TRACKING,
            '{"boxes": {"1": [1, 2, 3, 4], "2.0": [1, 2, 3, 4], "3": [1, 2, 2, 4]}}',
            '{"boxes": {"1": [1, 2, 3, 4], "2": [1, 2, 3, 4], "3": [1, 2, 3, 4], "4": [1, 2, 3, 4]}}',
            2.5 / 4,
        ),
        (TRACKING, '{"boxes": [1, 2, 3, 4]}', '{"boxes": {"1": [1, 2, 3, 4]}}', 0.0),
    ],
)
def test_rewards(kind, answer, truth, score):
    assert correctness(kind, answer, truth) == pytest.approx(score)


def test_parts_of_a_score():
    answer = '{"time": [4, 8], "boxes": {"3": [100, 200, 200, 400]}}'
    truth = '{"time": [2, 6], "boxes": {"3": [100, 200, 300, 400]}}'
    assert overlaps(BOTH, answer, truth) == pytest.approx({"tIoU": 1 / 3, "IoU": 1 / 2})
    assert overlaps(BOTH, "", truth) == {"tIoU": 0, "IoU": 0}
    assert overlaps("OCR", "a", "a") == overlaps(BOTH, answer, "") == {}


@pytest.mark.parametrize(
    ("kind", "said", "read"),
    [
        (TEMPORAL, '{"time": [3.2, 5]}', (3.2, 5)),
        (TEMPORAL, "{'time': [3.2, 5]}", (3.2, 5)),
        (TEMPORAL, '{"time": [3.2, 5]', (3.2, 5)),  # cut off
        (TEMPORAL, '{"time": ["3.2s", "0:05"]}', (3.2, 5)),
        (TEMPORAL, '[{"time": [3.2, 5], "label": "the dog\'s jump"}]', (3.2, 5)),
        (TEMPORAL, "[3.2, 5]", (3.2, 5)),
        (TEMPORAL, "from 3.2s to 5s", (3.2, 5)),
        (TEMPORAL, "3.2 - 5 seconds", (3.2, 5)),
        (TEMPORAL, "01:05 to 1:10.5", (65, 70.5)),
        (TEMPORAL, "3.2 s to 5 s, then 8 s to 9 s", (3.2, 5)),
        (TEMPORAL, "1, 2 or 3: no idea; 4", (1, 2)),
        (TEMPORAL, "(3.2,5)", (3.2, 5)),
        (TEMPORAL, "2,5 s to 4,5 s", None),
        (TEMPORAL, "from 2,5 to 4", None),
        (SPATIAL, '{"boxes": [100, 200, 300, 400]}', BOX),
        (SPATIAL, '[{"bbox_2d": [100, 200, 300, 400], "label": "ball"}]', BOX),
        (SPATIAL, "[100, 200, 300, 400]", BOX),
        (SPATIAL, "(100,200),(300,400)", BOX),
        (SPATIAL, "100 200 300", None),
    ],
)
def test_what_evaluation_reads(kind, said, read):
    answer = read_answer(f"<think>It moves.</think>\n<answer>{said}</answer>", kind)
    wanted = None if read is None else Located(time=read) if kind == TEMPORAL else Located(box=read)
    assert parse_located(answer, kind) == wanted
    assert bool(answer) == (wanted is not None)


@pytest.mark.parametrize(
    ("kind", "said", "read"),
    [
        (
            TRACKING,
            "{'boxes': {'1': [1, 2, 3, 4], '0:02': [5, 6, 7, 8]}}",
            {1: (1, 2, 3, 4), 2: (5, 6, 7, 8)},
        ),
        (BOTH, "{'time': ['3s', '5s'], 'boxes': {'3s': [1, 2, 3, 4]}}", {3: (1, 2, 3, 4)}),
        (BOTH, '{"time": [3, 5]}', {}),
        (BOTH, '{"boxes": {"3": [1, 2, 3, 4]}}', None),
    ],
)
def test_what_evaluation_reads_of_boxes_over_time(kind, said, read):
    found = read_located(said, kind)
    assert (found and found.boxes) == read
    if kind == BOTH and found:
        assert found.time == (3, 5)


def test_without_tags_the_last_span_outside_of_the_reasoning_counts():
    said = "<think>1 s to 2 s?</think> Not 3 s to 4 s but 5 s to 6 s"
    assert read_answer(said, TEMPORAL) == '{"time": [5.0, 6.0]}'
    assert (
        read_answer("It is 1 s to 2 s. The answer is 3 to 4, not 5 to 6.", TEMPORAL) == '{"time": [3.0, 4.0]}'
    )


@given(st.text(st.sampled_from("[]{}\"':,.-0123456789 stimeboxandto\n")), st.sampled_from([*GROUNDING_FORMS]))
def test_any_text_is_read(text, kind):
    answer = read_answer(f"<answer>{text}</answer>", kind)
    assert answer == read_answer(f"<answer>{answer}</answer>", kind)
    assert (parse_located(answer, kind) is not None) == bool(answer)
    assert 0 <= correctness(kind, text, GROUNDING_FORMS[kind]) <= 1


@pytest.mark.parametrize("text", ["[", "{", "1", "1:", '{"a":', "[1,"])
def test_long_nonsense_is_read_at_once(text):
    text *= 100_000
    assert all(read_located(text, kind) is None for kind in GROUNDING_FORMS)


@given(spans, boxes, st.dictionaries(st.integers(0, 99).map(float), boxes, min_size=1))
def test_forms_are_their_own_reading(span, box, frames):
    for kind, located in (
        (TEMPORAL, Located(time=span)),
        (SPATIAL, Located(box=box)),
        (BOTH, Located(time=span, boxes=frames)),
        (TRACKING, Located(boxes=frames)),
    ):
        assert parse_located(str(located), kind) == read_located(str(located), kind) == located


@pytest.mark.parametrize(("kind", "form"), GROUNDING_FORMS.items())
def test_the_format_reward_wants_an_answer_of_the_form(kind, form):
    assert format_reward(f"<think>x</think>\n<answer>\n{form}\n</answer>", kind) == 1
    assert format_reward(f"<think>x</think><answer>{form[:-1]}</answer>", kind) == 0
    assert format_reward(f"<answer>{form}</answer>", kind) == 0


@pytest.mark.parametrize(
    ("kind", "answer", "problem"),
    [
        (TEMPORAL, "3 to 5", "must be JSON such as {\"time\": [2.5, 6.0]}, not '3 to 5'"),
        (TEMPORAL, '{"time": [5, 3]}', "goes from 5 s to 3 s"),
        (TEMPORAL, '{"time": [12, 14]}', "the window lasts 10 s; its seconds count from the window's start"),
        (TEMPORAL, '{"time": [8, 12]}', "goes from 8 s to 12 s, and the window lasts 10 s"),
        (TRACKING, '{"boxes": {"1": [1, 2, 3, 4], "19": [1, 2, 3, 4]}}', "goes from 0 s to 19 s"),
        (SPATIAL, '{"boxes": [0.1, 0.2, 0.3, 0.4]}', "shares of the picture; write thousandths"),
        (SPATIAL, '{"boxes": [100, 200, 1300, 400]}', "1000·x/width and 1000·y/height"),
        (SPATIAL, '{"boxes": [300, 200, 100, 400]}', "has no area; write [x1, y1, x2, y2]"),
        (TRACKING, '{"boxes": {}}', "has no box"),
        (BOTH, '{"time": [2, 4], "boxes": {"3": [5, 6, 5, 8]}}', "has no area"),
    ],
)
def test_truths_are_checked(tmp_path, kind, answer, problem):
    row = {"problem_id": 1, "problem": "When?", "data_type": "video", "problem_type": kind, "path": "x.mp4"}
    row |= {"solution": f"<answer>{answer}</answer>", "start": 5, "end": 15}
    [found] = check_manifest([row], tmp_path).problems
    assert problem in str(found)
    good = row | {"solution": f"<answer>{GROUNDING_FORMS[kind]}</answer>"}
    assert not check_manifest([good], tmp_path).problems


def test_only_boxes_are_asked_of_images():
    found = [list(truth_problems(form, kind, "image", None)) for kind, form in GROUNDING_FORMS.items()]
    assert [bool(problems) for problems in found] == [True, False, True, True]
    assert found[0] == ["temporal grounding is for videos, and this is an image"]
