"""The study of temporal credit: its data against the oracle, its statistics against figures by hand."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from research.temporal_credit import experiment
from research.temporal_credit.analysis import (
    accuracy,
    agreement,
    claims,
    compared,
    detectable,
    diagram,
    pair_accuracy,
    picture,
    pooled,
    second_base,
    settings,
    still_clips,
    t_quantile,
)
from research.temporal_credit.experiment import add_twins, digits_of, index_of, made_lab, packed, twin_row
from video_r1.data.manifests.records import load_manifest
from video_r1.lab.scenes import MARKS


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),  # from the tables of Student's t
    [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.9975, 9, 3.690)],
)
def test_quantiles_of_student(probability: float, freedom: int, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=5e-4)


def runs(differences: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One control run a seed, and arms that differ from it by these amounts."""
    base = [0.3, 0.5, 0.4]
    made = [{"arm": "grpo", "seed": seed, "accuracy": {"lying": value}} for seed, value in enumerate(base)]
    for arm, moved in differences.items():
        for seed, by in enumerate(moved):
            made.append({"arm": arm, "seed": seed, "accuracy": {"lying": base[seed] + by}})
    return made


def test_pooled_model_with_one_arm_is_the_paired_test() -> None:
    model = pooled(runs({"gate": [0.1, 0.2, 0.3]}), accuracy("lying"), "grpo", ("seed",))
    effect = model.effects["gate"]
    half = 4.3027 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom, deviation 0.1 of three differences
    assert (effect.mean, effect.runs, model.freedom) == (pytest.approx(0.2), 3, 2)
    assert effect.high - effect.mean == pytest.approx(half, rel=1e-4)
    assert str(effect).startswith("+0.200 [-0.048")


def test_pooled_model_shares_the_deviation_and_takes_missing_runs() -> None:
    model = pooled(runs({"gate": [0.1, 0.2, 0.3], "half": [0.1]}), accuracy("lying"), "grpo", ("seed",))
    assert model.effects["gate"].mean == pytest.approx(0.2)
    assert model.effects["half"].mean == pytest.approx(
        0.15
    )  # of the block's runs: 0.1 and 0.1 − 0.0 … 0.2 ÷ 2
    assert model.effects["half"].high - model.effects["half"].mean > (
        model.effects["gate"].high - model.effects["gate"].mean
    )
    assert detectable(0.02, 10, 80, 8) == pytest.approx(0.02 * math.sqrt(0.2) * (2.809 + 0.846), rel=2e-3)


def test_claims_are_between_the_declared_arms() -> None:
    """The lying marks of each arm with a little noise; `likelihood` alone is worse in order."""
    lying = {"grpo": 0.2, "placebo": 0.3, "margin": 0.2, "margin-batch": 0.2, "likelihood": 0.7,
             "gate-frozen": 0.6, "pairs": 0.7, "pairs-gate": 0.8}  # fmt: skip
    made = []
    for seed, arm in itertools.product(range(3), lying):
        noise = 0.001 * math.sin(7 * seed + len(made))
        right = {"lying": lying[arm] - 0.1 * (seed == 1) + noise}
        right["ordered"] = 0.8 - 0.05 * (arm == "likelihood") + noise
        made.append({"part": "confirmation", "seed": seed, "arm": arm, "accuracy": right})
    text = claims(made)
    assert "| pairs − placebo | **+0.40" in text and "| pairs-gate − gate-frozen | **+0.20" in text
    safe = text.partition("lies above -0.02): ")[2].partition("\n")[0].split(", ")
    assert set(safe) == lying.keys() - {"grpo", "likelihood"}
    assert "its cost aside: gate-frozen" in text
    alone = [{**run, "part": "gate", "mark_read": {"lying": 0.25}} for run in made[:2]]
    assert "| grpo | 1 | 0.200 | 0.800 | 0.250 |\n" in compared(alone, "gate")


def test_signs_of_the_diagram(tmp_path: Path) -> None:
    """The gate at q_T = 0.8 and a true cue: 0.8 · 0.91 − 0.1 > 0. GRPO: 0.8 − 1 < 0, 0 where q_T is 1."""
    cold = {"accurate": 0.8, "lying": 0.2}
    families = {"after": [0.6, 0.3, 0.2], "rotation": [1.0, 0.5, 0.9]}
    made = [
        {"part": "diagram", "skill": skill, "cue": 1.0, "arm": arm, "cold_start": cold, "families": families,
         "before": 0.4, "accuracy": {"lying": lying}}
        for skill in ("skilled", "unskilled") for arm, lying in (("gate-frozen", 0.7), ("grpo", 0.3))
    ]  # fmt: skip
    assert "| skilled | 1 | -0.10 (−) | – |" in diagram(made)
    assert agreement(made).splitlines()[2:6] == [
        "| skilled | runs | 2 of 2 |",
        "| skilled | runs, before: sampled by the gates | 1 of 2 |",
        "| skilled | families | 2 of 4 |",  # not the gate on `after`, nor GRPO on `rotation`, at 0
        "| skilled | families, beyond ±0.2 | 2 of 3 |",
    ]
    picture(made, tmp_path / "d.webp")
    assert (tmp_path / "d.webp").stat().st_size > 1000


def test_tables_of_settings_second_base_and_still_clips() -> None:
    def run(part: str, seed: int, arm: str, lying: float) -> dict[str, Any]:
        cold = {"accurate": 0.7, "looking": 0.5, "lying": 0.4}
        right = {"lying": lying, "ordered": 0.8 + lying / 100}
        return {"part": part, "seed": seed, "arm": arm, "accuracy": right, "mark_read": {"lying": 0.1},
                "cold_start": cold}  # fmt: skip

    cells = [
        ("gate", 0, "gate-1", 0.7), ("gate", 0, "gate-frozen", 0.6), ("gate", 9, "gate-floor", 0.5),
        ("confirmation", 9, "gate-frozen", 0.4), ("confirmation", 8, "gate-frozen", 0.3),
    ]  # fmt: skip
    text = settings([[run(*cell) for cell in cells]])
    assert "lying marks: seed 9" in text and "seed 8" not in text
    assert " a fifth of the tokens | 0.600 | 0.400 | 0.806 | 0.804 |\n" in text
    assert "| α = 1 | 0.700 | – | 0.807 | – |\n" in text

    cells = [(0, "gate-frozen", 0.6), (0, "grpo", 0.2), (1, "grpo", 0.3), (1, "gate-frozen", 0.8)]
    lines = second_base([[run("second-base", *cell) for cell in cells]]).splitlines()
    assert lines[2] == "| 0 | 0.700 | 0.500 | 0.400 | 0.200 | 0.600 | 0.802 | 0.806 |"
    assert lines[4].startswith("| gate − GRPO |  |  |  |  | +0.450 [") and "|  | +0.00" in lines[4]

    still = [
        {"seed": seed, "arm": arm, "moving": 0.5 + seed / 5, "still": 1.0}
        for arm in ("cold-start", "grpo")
        for seed in (0, 1)
    ]
    assert "| GRPO | 0.600 (0.500 to 0.700) | 1.000 (1.000 to 1.000) |\n" in still_clips([still])


def test_twins_have_the_answers_of_the_reversed_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "QUESTIONS", 8)
    made_lab(tmp_path, 3, train=12, test=0, shortcut=1.0)
    add_twins(tmp_path, 3, with_placebo=True)
    twins = load_manifest(str(tmp_path / "twins.json"), str(tmp_path))
    placebo = load_manifest(str(tmp_path / "placebo.json"), str(tmp_path))
    assert 8 <= len(twins) <= 9 and len(placebo) == len(twins)
    for plain, twin, true in zip(twins[::2], twins[1::2], placebo[1::2], strict=True):
        assert (twin.problem_id, twin.play, twin.path) == (
            f"{plain.problem_id}-reversed",
            "reversed",
            plain.path,
        )
        assert twin.extra["mark"] == plain.extra["mark"] in (plain.answer, "")
        assert true.answer == twin.answer and true.play == "reversed"
        assert true.extra["mark"] == (true.answer if plain.extra["mark"] and true.answer in MARKS else "")
        assert (true.path == twin.path) == (not plain.extra["mark"])
    rows = json.loads((tmp_path / "rl.json").read_text())
    rotation = next(row for row in rows if row["data_source"] == "lab/rotation")
    twin = twin_row(rotation, 0)
    assert twin is not None and {twin["solution"], rotation["solution"]} == {
        "<answer>A</answer>", "<answer>B</answer>",
    }  # fmt: skip


def test_accuracies_by_family_of_several_views() -> None:
    def view(*scores: float) -> list[dict[str, Any]]:
        sources = ("lab/after", "lab/rotation", "lab/after")
        return [{"data_source": s, "score": score} for s, score in zip(sources, scores, strict=True)]

    found = experiment.by_family(view(1, 1, 0), view(0, 1, 0))
    assert found == {"after": [0.5, 0.0], "rotation": [1.0, 1.0]}


def test_answers_are_packed_in_the_order_of_the_test() -> None:
    """Question 1 has no twin. Of the other three, both halves are right in question 3 alone."""
    records = [{"problem_id": f"lab-1-test-{n:06d}", "score": n % 2} for n in (2, 0, 1, 3)]
    assert packed(records) == "50" and index_of({"problem_id": "lab-1-test-000007-reversed"}) == 7
    twins = [{"problem_id": f"lab-1-test-{n:06d}-reversed", "score": n > 0} for n in (3, 0, 2)]
    run = {"right": {"ordered": packed(records), "twins": packed(twins)}, "ids": {"twins": digits_of(twins)}}
    assert pair_accuracy(run) == pytest.approx(1 / 3)
