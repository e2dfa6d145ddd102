"""Pass rates: how often a model answers a question with all of the clip, with less of it, and with nothing.

    "pass_rates": {"blind": 0.25, "frozen": 0.5, "shuffled": 0.375, "ordered": 0.875}

`video-r1 data audit` writes them into the rows of a manifest, under the names of data/contrasts.py; `keep`
reads them.
"""

import difflib
import sys
from collections.abc import Mapping, Sequence

from video_r1.data.manifests.records import Sample
from video_r1.errors import ConfigError, ManifestError
from video_r1.processes import process_index
from video_r1.settings.keep import PASS_RATES, parse_keep


def pass_rates(sample: Sample) -> dict[str, float]:
    """A sample's pass rates by name, {} where it has none. Raises ManifestError when they are none."""
    found = sample.extra.get(PASS_RATES, {})
    if not isinstance(found, Mapping):
        raise ManifestError(f"question {sample.problem_id!r}: {PASS_RATES} is no mapping of names to numbers")
    rates = {str(name): value for name, value in found.items() if value is not None}
    for name, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ManifestError(
                f"question {sample.problem_id!r}: the pass rate {name!r} is {value!r}, no number from 0 to 1"
            )
    return rates


def kept_samples(samples: Sequence[Sample], expression: str, quiet: bool = False) -> list[Sample]:
    """The samples that the expression keeps (settings/keep.py), in their order.

    The first process says how many they are, unless `quiet`. Raises ConfigError for an expression that is not
    understood, for a rate that no sample has, and where no sample is kept; ManifestError for damaged rates.
    """
    keep = parse_keep(expression)
    rates = [pass_rates(sample) for sample in samples]
    there = sorted({name for each in rates for name in each})
    if not there:
        raise ConfigError(
            f"keep {expression!r}: the manifest has no pass rates; video-r1 data audit writes one that has"
        )
    for name in sorted(keep.names.difference(there)):
        near = difflib.get_close_matches(name, there, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"keep {expression!r}: no question has a pass rate {name!r}; {hint}There are {', '.join(there)}"
        )
    kept = [place for place, each in enumerate(rates) if keep.keeps(each)]
    if not kept:
        raise ConfigError(f"keep {expression!r}: none of the {len(samples):,} questions is kept")
    if process_index() == 0 and not quiet:
        lacking = sum(not keep.names <= rates[place].keys() for place in kept)
        unknown = f", {lacking:,} of them without a rate that it names" if lacking else ""
        said = f"keep {expression!r}: {len(kept):,} of {len(samples):,} questions are trained on{unknown}"
        print(said, file=sys.stderr)
    return [samples[place] for place in kept]
