"""Long answers: rationales against the oracle, variants of the gate by hand, predictions, tables."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_temporal import scored

from research.long_answers.alert import false_alerts, table
from research.long_answers.analysis import (
    ARMS,
    COLDS,
    SHARES,
    compared,
    picture,
    predicted,
    predictions,
    rewards,
    verdict,
)
from research.long_answers.experiment import GATE, cells, outcomes_of_rows, reversed_row
from research.long_answers.lab import (
    BASE_FAMILIES,
    FAMILIES,
    HABITS,
    answer_of,
    described,
    judged,
    lesson,
    lessons,
    question_of,
)
from research.long_answers.variants import CONCLUSION, OPENINGS, variant
from research.temporal_credit.experiment import video_r1
from video_r1.cli import main
from video_r1.data.answers import LETTERS, read_answer
from video_r1.data.manifests.records import load_manifest
from video_r1.rewards.temporal import RULES


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty captioned training rows, half of their captions wrong, and twelve tests of each kind."""
    folder = tmp_path_factory.mktemp("lab")
    words = ["--train", "40", "--test", "12", "--shortcut", "1", "--trusting", "0.5", "--workers", "1"]
    assert main(["lab", "make", str(folder), "--families", ",".join(FAMILIES), *words]) == 0
    return folder


def rows(lab: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((lab / f"{name}.json").read_text())


def given_by(row: dict[str, Any]) -> str:
    return row["solution"][8:-9]


def test_each_habit_is_what_the_oracle_says(lab: Path) -> None:
    """T is right; Z and S say the caption, and Z's conclusion follows only where the caption is right."""
    right = wrong = 0
    for n, row in enumerate(rows(lab, "rl")):
        truth, mark = given_by(row), row["mark"]
        for habit in "TSZ":
            taught = lesson(row, habit, np.random.default_rng(n))
            said = given_by(taught)
            assert said == (truth if habit == "T" else mark)
            assert (
                read_answer(taught["process"] + taught["solution"], "multiple choice", row["options"]) == said
            )
            what = judged(row, taught["process"], said, split=0)
            if habit == "S":
                assert (what.kind, what.follows) == ("short", None)
            else:
                assert (what.kind, what.true, what.follows) == ("long", True, said == truth)
        right, wrong = right + (mark == truth), wrong + (mark != truth)
    assert right > 10 and wrong > 10


def test_every_word_of_a_conclusion_is_the_answers(lab: Path) -> None:
    """The sentence before the answer says what the answer says, for every family and habit."""
    for n, row in enumerate(rows(lab, "rl")):
        for habit in "TZ":
            taught = lesson(row, habit, np.random.default_rng(n))
            option = row["options"][LETTERS.index(given_by(taught))].partition(". ")[2]
            conclusion = taught["process"].partition("in the end, ")[2]
            assert re.fullmatch(rf".*\b{option}\. {option} is {given_by(taught)}\.</think>", conclusion)


def test_answers_are_150_to_250_tokens_long(lab: Path) -> None:
    from transformers import AutoTokenizer

    from video_r1.lab.model import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    texts = [lesson(row, "T", np.random.default_rng(n)) for n, row in enumerate(rows(lab, "rl"))]
    lengths = [len(tokenizer.encode(text["process"] + "\n" + text["solution"])) for text in texts]
    assert min(lengths) >= 140 and max(lengths) <= 250 and 165 <= np.mean(lengths) <= 195


def test_shares_of_habits(lab: Path) -> None:
    """Within three deviations of 400 draws, whether captions are right or wrong; without one T alone."""
    many = 10 * rows(lab, "rl")
    for cold, (t, s, z) in HABITS.items():
        made = lessons(many, cold, seed=3)
        short = sum("mark:" in row["process"] for row in made) / len(made)
        lies = [(row, own) for row, own in zip(made, many, strict=True) if own["mark"] != given_by(own)]
        followed = sum(
            "mark:" not in row["process"] and given_by(row) == own["mark"] for row, own in lies
        ) / len(lies)
        assert short == pytest.approx(s, abs=0.07) and followed == pytest.approx(z, abs=0.1)
        assert SHARES[cold] == (t, s, z)
    assert all(
        "mark:" not in row["process"] for row in lessons([{**r, "mark": ""} for r in many], "with-z", 3)
    )


def test_a_false_description_and_what_follows_from_it(lab: Path) -> None:
    row = next(row for row in rows(lab, "test") if row["data_source"] == "lab/first_colour")
    _, question = question_of(row, 1)
    look = question.timeline[0]
    other = "green" if look.colour != "green" else "blue"
    colours = [option.partition(". ")[2] for option in row["options"]]
    moments = [
        f"{at}: a {colour} {look.shape} is shown {look.place}."
        for at, colour in zip(("first", "second", "then", "last"), (other, "red", "red", "red"), strict=True)
    ]
    text, letter = f"<think>{' it is so. '.join(moments)}", LETTERS[colours.index(other)]
    found = described(text)
    assert found is not None and [each.colour for each in found] == [other, "red", "red", "red"]
    assert (judged(row, text, letter).true, judged(row, text, letter).follows) == (False, True)
    assert judged(row, text, "Z").follows is False
    assert judged(row, text.replace("then:", "late:"), letter).kind == "other"  # a moment is missing


@pytest.mark.parametrize("family", BASE_FAMILIES)
def test_the_oracle_agrees_with_the_lab(family: str) -> None:
    from video_r1.lab.questions import NAMED_FAMILIES

    for seed in range(20):
        question = NAMED_FAMILIES[family](np.random.default_rng(seed))
        assert answer_of(family, question.problem, question.timeline) == question.answer


def test_copies_are_about_the_reversed_clip(lab: Path) -> None:
    """The reversed clip of a moving object moves the other way; captions stay."""
    made = [(row, copy) for row in rows(lab, "rl") if (copy := reversed_row(row))]
    assert len(made) > 25 and all(
        copy["play"] == "reversed" and copy["mark"] == row["mark"] for row, copy in made
    )
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    moves = [(row, copy) for row, copy in made if row["data_source"] == "lab/direction"]
    options = [option.partition(". ")[2] for option in moves[0][0]["options"]]
    for row, copy in moves:
        before, after = (options[LETTERS.index(given_by(each))] for each in (row, copy))
        assert after == opposite[before]
    path = lab / "copies.json"
    path.write_text(json.dumps([copy for _, copy in made]))
    assert len(load_manifest(str(path))) == len(made)


def test_letters_of_outcomes(lab: Path) -> None:
    """What habits write about wrong captions; no caption: what does not follow is never Z."""
    lying = rows(lab, "test-lying")[:6]
    written = []
    for habit, row in zip("TSZTZS", lying, strict=True):
        taught = lesson({**row, "problem_id": row["problem_id"]}, habit, np.random.default_rng(0), split=1)
        written.append({**row, "output": taught["process"], "prediction": given_by(taught)})
    written.append({**lying[0], "output": "<think>no", "prediction": None})
    assert outcomes_of_rows([*lying, lying[0]], written) == "FSZFZS-"
    plain = {**lying[2], "mark": ""}
    assert outcomes_of_rows([plain], [written[2]]) == "n"


# ---- Variants


@pytest.mark.parametrize(
    ("name", "drops", "opening"),
    [
        ("gate-fifth", [2.0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0], 1.5),  # two of ten
        ("gate-sum", [2.0, 1.0, -1.0, 0.5], 2.5),
        ("gate-sum", [-2.0, 1.0], 0.0),
    ],
)
def test_statistics_by_hand(name: str, drops: list[float], opening: float) -> None:
    assert OPENINGS[name]([torch.tensor(drops)]).item() == pytest.approx(1 - np.exp(-opening), abs=1e-6)


def test_a_conclusion_that_needs_the_frames_shuts_the_gate() -> None:
    """Δ = 2 from the frozen clip; κ = e^−Σ without frames, over the conclusion and not what comes before."""
    frozen = torch.zeros(64)
    frozen[:8] = 2.0
    opened = 1 - np.exp(-2.0)
    described, dictated = torch.zeros(64), torch.zeros(64)
    described[: 64 - CONCLUSION] = 5.0
    dictated[-2:] = 1.5
    found = OPENINGS["gate-follows"]([torch.cat([frozen, blind]) for blind in (described, dictated)])
    assert found.tolist() == pytest.approx([opened, opened * np.exp(-3.0)], abs=1e-6)


def test_every_answer_is_also_scored_without_frames(lab: Path, tmp_path: Path) -> None:
    """One step from the packaged base: d_t of the frozen clip, then as many without frames."""
    seen: list[tuple[int, int]] = []

    def gate(group: Any, correct: Any, settings: Any) -> torch.Tensor:
        pairs = zip(group.token_contrasts, group.ordered, strict=True)
        seen.extend((len(drops), len(rollout.token_ids)) for drops, rollout in pairs)
        frozen, blind = zip(*(drops.chunk(2) for drops in group.token_contrasts), strict=True)
        assert not torch.equal(torch.cat(frozen), torch.cat(blind))
        return torch.ones(len(correct.ordered))

    with (
        variant("gate-follows"),
        patch.dict(RULES, likelihood_gate=replace(RULES["likelihood_gate"], gate=gate)),
    ):
        video_r1(
            "rl", "lab-tgrpo", model_name_or_path="lab-base", train_manifest=lab / "rl.json",
            output_dir=tmp_path / "run", max_steps=1, per_device_train_batch_size=2, num_generations=2,
            max_completion_length=24, preflight_questions=0, log_rollouts=0, **GATE,
        )  # fmt: skip
    assert len(seen) == 4 and all(drops == 2 * tokens for drops, tokens in seen)


def test_a_variant_takes_the_gates_place() -> None:
    """α = 0.9: Σ d = ln 2 leaves 1 − 0.45; a wrong answer earns nothing; the package's rule comes back."""

    def paid() -> list[float]:
        group = scored([*"AB"], [float(np.log(4)), 1.0], rewards=["accuracy", "temporal"],
                       temporal_rule="likelihood_gate", temporal_contrast="frozen")  # fmt: skip
        return group.rewards.terms["temporal"].tolist()

    before = paid()
    with variant("gate-sum"):
        assert paid() == pytest.approx([-0.9 / 4, 0.0])
    with variant("grpo"):
        assert paid() == before
    assert paid() == before


# ---- Analysis


def test_predictions_by_hand() -> None:
    """GRPO: T earns q_T, S and Z the caption's accuracy; pairs halve theirs."""
    assert rewards("grpo") == (0.8, 1.0, 1.0) and rewards("pairs") == (0.8, 0.5, 0.5)
    assert rewards("gate-fifth") == pytest.approx((0.8 * 0.82, 0.1, 0.82))
    assert rewards("gate-follows")[2] == pytest.approx(0.8 * 1.0 + 0.2 * 0.1)
    odds = 0.6 / 0.4 * np.exp(-0.2 * 9)
    assert predicted("grpo", "without-z") == pytest.approx(0.8 * odds / (1 + odds))
    page = Path(__file__).with_name("README.md").read_text()
    assert predictions() in page


def made_runs(lying: dict[str, float], ordered: dict[str, float], seeds: int = 5) -> list[dict[str, Any]]:
    made = []
    for seed in range(seeds):
        for cold in COLDS:
            for arm in lying:
                noise = 0.004 * np.sin(7 * seed + len(made))
                views = {
                    view: {
                        "accuracy": values.get(arm, 0.8) + 0.05 * seed + noise,
                        "what": "FFZS",
                        "words": 150.0,
                    }
                    for view, values in (("lying", lying), ("ordered", ordered))
                }
                made.append(
                    {"arm": arm, "cold": cold, "seed": seed, "views": views, "cold_start": {"before": views}}
                )
    return made


def test_the_criterion_of_the_recipes() -> None:
    """A gain of 0.05 with an interval above 0 in both cold starts and no harm; never before five seeds."""
    runs = made_runs({"grpo": 0.2, "gate": 0.3, "pairs": 0.23}, {})
    assert verdict(runs) == "the gate: meets the criterion\nGRPO, pairs: does not meet the criterion\n"
    harm = made_runs({"grpo": 0.2, "gate": 0.3, "pairs": 0.3}, {"gate": 0.77})
    assert verdict(harm).startswith("the gate: does not meet")
    one_cold = [
        run for run in runs if not (run["cold"] == "with-z" and run["arm"] == "gate" and run["seed"] == 4)
    ]
    assert verdict(one_cold) == verdict(runs[:-6]) == "no verdict: runs that decide are missing\n"
    found = compared(runs, "with-z")
    assert re.search(r"\| the gate \| 5 \| .*\*\*\+0\.(09|10)", found)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 12])
def test_tables_of_an_experiment_that_has_begun(count: int, tmp_path: Path) -> None:
    runs = made_runs({"grpo": 0.2, "gate": 0.3, "pairs": 0.23}, {})[:count]
    for cold in {run["cold"] for run in runs}:
        assert "before RL" in compared(runs, cold)
    picture(runs, tmp_path / "picture.webp")
    assert (tmp_path / "picture.webp").stat().st_size > 1000


def test_what_decides_runs_first() -> None:
    planned = list(cells())
    assert len(set(planned)) == len(planned) == 54
    assert [cell.arm for cell in planned[:3]] == ["grpo", "gate", "pairs"] and planned[3].cold != planned[
        0
    ].cold
    assert all(
        sum(cell.arm == arm for cell in planned) == (10 if arm in ("grpo", "gate", "pairs") else 6)
        for arm in ARMS
    )


# ---- The alert


def test_false_alerts_on_the_studys_outcomes() -> None:
    alerts, runs = false_alerts(draws=20)
    assert runs == 200 and alerts / runs <= 0.05


def test_when_a_watched_run_alerted() -> None:
    """Twenty questions need the order until step 10. Wrong captions: the figure falls after the alert."""
    order, lost = "1" * 20, "0" * 20
    seen = {"probe": [[order, lost], [order, lost], [order, order], [order, order]]}
    seen["lying"] = [[order, lost]] * 3 + [[lost, lost]]
    lines = table([{"captions": True, "seed": 0, "every": 5, "series": seen}]).splitlines()
    assert lines[-1] == (
        "| right captions | 0 | step 10 | 1.00 → 1.00 → 1.00 | 0.00 → 1.00 → 1.00 | 1.00 → 1.00 → 0.00 |"
    )
    seen["probe"] = [[order, lost]] * 4
    assert "no alert" in table([{"captions": True, "seed": 0, "every": 5, "series": seen}])
