"""How far an answer that says where and when overlaps the truth, in [0, 1].

Equations of OneThinker (arXiv 2512.03043): spans by their tIoU, boxes by their IoU, boxes over time by the
mean of their IoUs: over the seconds that both have (spatial-temporal grounding), or over the truth's seconds,
a missing one counting 0 (tracking).
"""

from collections.abc import Mapping

from video_r1.data.grounding import Box, Located, Span, parse_located


def span_iou(first: Span, second: Span) -> float:
    """tIoU: |first ∩ second| ÷ |first ∪ second| of two spans [s, e]; 0 where one ends before it begins."""
    both = min(first[1], second[1]) - max(first[0], second[0])
    return _ratio(both, first[1] - first[0], second[1] - second[0])


def box_iou(first: Box, second: Box) -> float:
    """IoU: area(first ∩ second) ÷ area(first ∪ second) of two boxes [x1, y1, x2, y2]; 0 without an area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return _ratio(max(0.0, width) * max(0.0, height), _area(first), _area(second))


def common_iou(boxes: Mapping[float, Box], truth: Mapping[float, Box]) -> float:
    """Mean IoU over the seconds that both have; 0 where they have none in common."""
    common = boxes.keys() & truth.keys()
    return sum(box_iou(boxes[second], truth[second]) for second in common) / max(1, len(common))


def track_iou(boxes: Mapping[float, Box], truth: Mapping[float, Box]) -> float:
    """Mean IoU over the truth's seconds; one that is missing counts 0."""
    ious = (box_iou(boxes[second], box) for second, box in truth.items() if second in boxes)
    return sum(ious) / max(1, len(truth))


def temporal_grounding(answer: Located, truth: Located) -> dict[str, float]:
    """{"tIoU": `span_iou`} of both times."""
    assert answer.time and truth.time
    return {"tIoU": span_iou(answer.time, truth.time)}


def spatial_grounding(answer: Located, truth: Located) -> dict[str, float]:
    """{"IoU": `box_iou`} of both boxes."""
    assert answer.box and truth.box
    return {"IoU": box_iou(answer.box, truth.box)}


def spatial_temporal_grounding(answer: Located, truth: Located) -> dict[str, float]:
    """{"tIoU": `span_iou`, "IoU": `common_iou`} of both times and boxes."""
    assert answer.boxes is not None and truth.boxes is not None
    return temporal_grounding(answer, truth) | {"IoU": common_iou(answer.boxes, truth.boxes)}


def tracking(answer: Located, truth: Located) -> dict[str, float]:
    """{"IoU": `track_iou`} of the boxes."""
    assert answer.boxes is not None and truth.boxes is not None
    return {"IoU": track_iou(answer.boxes, truth.boxes)}


_OVERLAPS = {
    "temporal grounding": temporal_grounding,
    "spatial grounding": spatial_grounding,
    "spatial-temporal grounding": spatial_temporal_grounding,
    "tracking": tracking,
}


def overlaps(problem_type: str, answer: str, truth: str) -> dict[str, float]:
    """The overlaps that a grounding type is scored by, by name: {"tIoU": 0.4, "IoU": 0.7}. Zeros for an
    answer that is none; {} for other types and for a truth that is none. answer, truth: in the exact form."""
    expected = parse_located(truth, problem_type) if problem_type in _OVERLAPS else None
    if expected is None:
        return {}
    said = parse_located(answer, problem_type)
    measure = _OVERLAPS[problem_type]
    return measure(said, expected) if said else dict.fromkeys(measure(expected, expected), 0.0)


def grounding(problem_type: str, answer: str, truth: str) -> float:
    """The score of a grounding type: tIoU, IoU, or with a span and boxes (tIoU + IoU) ÷ 2."""
    found = overlaps(problem_type, answer, truth)
    return sum(found.values()) / max(1, len(found))


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _ratio(both: float, first: float, second: float) -> float:
    """both ÷ (first + second − both); 0 where one of them is empty, or where sizes are infinite."""
    if min(both, first, second) <= 0:
        return 0.0
    union = first + second - both
    return min(1.0, both / union) if union > 0 else 0.0
