"""Alerts: signs of trouble in a run's last metrics, each with what to do. Pure functions."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

from video_r1.report.values import finite

RECENT, LETTERS_OF = 10, 20  # lines
SILENT = 600.0  # seconds
FLAT, CUT, FORMAT_LOST, COLLAPSED = 0.8, 0.25, 0.5, 0.9  # shares
ENOUGH = 100  # answers
KL_FACTOR, KL_FLOOR = 5.0, 0.1
MISMATCH = 0.05  # nats; rounding explains about 0.01
JUDGED_AFTER, UNMOVED, AGAINST = 20, 0.01, -0.2  # steps, share of the advantages, correlation

Lines = Sequence[Mapping[str, Any]]


class Alert(NamedTuple):
    """A sign of trouble: its name for tests and styles, the observation, and what to do."""

    name: str
    title: str
    advice: str


def alert_of_silence(silent: float, each: float | None) -> Alert | None:
    """Return the alert of a running run that has written nothing for `silent` s; each: seconds a step."""
    if silent <= max(SILENT, 5 * (each or 0.0)):
        return None
    advice = (
        "look at the terminal or the log of the run: it may hang in a collective, a server or a disk; "
        "py-spy dump --pid shows where"
    )
    return Alert("silent", f"nothing was written for {silent / 60:.0f} minutes", advice)


def alerts_of(lines: Lines) -> list[Alert]:
    """Return the alerts of a run. lines: the last ones of metrics.jsonl, and some from before."""
    found: list[Alert] = []

    def say(name: str, title: str, advice: str) -> None:
        found.append(Alert(name, title, advice))

    flat = recent(lines, "groups/no_variance")
    if flat is not None and flat > FLAT and not values(lines, "teacher/kl"):  # a teacher teaches them
        say("no variance", f"{flat:.0%} of the groups have no variance: their answers all earn the same",
            "these groups teach nothing; choose questions of medium difficulty (data audit, --keep), a "
            "higher temperature or more generations")  # fmt: skip
    kept, best = recent(lines, "reward/format"), highest(lines, "reward/format")
    if kept is not None and best is not None and kept < FORMAT_LOST * best and best > 0.2:
        say("format", f"the format reward fell from {best:.2f} to {kept:.2f}",
            "the policy has lost its format; resume from an earlier checkpoint with a smaller learning_rate "
            "or a larger beta")  # fmt: skip
    cut = recent(lines, "completion/truncated")
    if cut is not None and cut > CUT:
        say("truncation", f"{cut:.0%} of the completions are cut off at max_completion_length",
            "raise max_completion_length, or reward shorter completions: those cut off earn nothing"
        )  # fmt: skip
    letters = {name for line in lines[-LETTERS_OF:] for name in line if name.startswith("answers/")}
    given = {name.removeprefix("answers/"): sum(values(lines[-LETTERS_OF:], name)) for name in letters}
    most = max(given, key=lambda letter: given[letter], default="")
    if sum(given.values()) >= ENOUGH and given[most] > COLLAPSED * sum(given.values()):
        say("collapse", f"{given[most] / sum(given.values()):.0%} of the last answers are {most}",
            "the answers collapse onto one: look at the balance of the data (data check, Data), and train "
            "with shuffle_options")  # fmt: skip
    far, before = recent(lines, "policy/kl", 3), values(lines, "policy/kl")[:-3]
    usual = median(before) if len(before) >= RECENT else None
    if far is not None and usual is not None and far > KL_FLOOR and far > KL_FACTOR * usual:
        say("kl", f"KL to the reference jumped to {far:.2g} (before: {usual:.2g})",
            "read the rollouts of the last steps; if they are broken, resume from an earlier checkpoint with "
            "a smaller learning_rate, a smaller max_grad_norm or a larger beta")  # fmt: skip
    apart = recent(lines, "sampler/logprob_difference")
    if apart is not None and apart > MISMATCH:
        say("sampler", f"sampler and trainer differ by {apart:.2g} nats a token; rounding explains 0.01",
            "the sampler's weights, number format or positions differ: see docs/vllm.md, and keep "
            "vllm_importance_sampling_correction on")  # fmt: skip
    for name in sorted({name for line in lines[-RECENT:] for name in line if name.startswith("credit/")}):
        term = name.removeprefix("credit/")
        moved, sign = values(lines, name), values(lines, f"credit_sign/{term}")[-JUDGED_AFTER:]
        varies = recent(lines, f"reward_std/{term}") != 0.0  # a reward that all answers earn is no fault
        by_design = term == "temporal" and bool(
            values(lines, "temporal/drop")
        )  # a gate takes from right ones
        if len(moved) >= JUDGED_AFTER and (share := mean(moved)) < UNMOVED and varies:
            say("credit", f"the reward {term} moves {share:.1%} of the advantages: training ignores it",
                "it cancels against other terms or the deviation: change its weight or scale_rewards, or "
                "leave it out")  # fmt: skip
        elif len(sign) >= JUDGED_AFTER and mean(sign) < AGAINST and not by_design:
            say("credit sign", f"the reward {term} favours wrong answers (correlation {mean(sign):.2f})",
                "read the rollouts: right answers earn less because of it; lower its weight or correct it"
            )  # fmt: skip
    skipped = sum(values(lines, "media/skipped")[-RECENT:])
    if skipped:
        say("media", f"{skipped:,.0f} question{'s' if skipped > 1 else ''} skipped in the last lines",
            "their media cannot be read: quarantine.jsonl has the reasons; data check finds all")  # fmt: skip
    counted = values(lines, "updates/skipped")[-RECENT:]  # counts from the start of the run
    if counted and counted[-1] > counted[0]:
        say("updates", f"{counted[-1] - counted[0]:,.0f} of the last updates were skipped (not finite)",
            "lower learning_rate or max_grad_norm; skipped_updates.jsonl has the questions")  # fmt: skip
    return found


def values(lines: Lines, name: str) -> list[float]:
    return [value for line in lines if (value := finite(line.get(name))) is not None]


def recent(lines: Lines, name: str, count: int = RECENT) -> float | None:
    """Return the mean of a series' last values, None if there are fewer than three."""
    last = values(lines, name)[-count:]
    return sum(last) / len(last) if len(last) > 2 else None


def highest(lines: Lines, name: str) -> float | None:
    """Return the largest mean over RECENT neighbouring values."""
    found = values(lines, name)
    means = [sum(found[i : i + RECENT]) / RECENT for i in range(0, len(found) - RECENT + 1, RECENT)]
    return max(means, default=None)
