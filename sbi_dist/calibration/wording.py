"""Sentences about findings: what a deviation means, and what to try. Only text."""

from __future__ import annotations

from collections.abc import Sequence

from sbi_dist.calibration.finding import Part

__all__ = ["SUBJECTS", "is_unlike", "joined", "sentence"]

# What each test looks at, as the subject of a sentence.
SUBJECTS = {
    "held_out": "the held-out simulations",
    "sbc": "ranks of each parameter",
    "coverage": "coverage of regions of highest density",
    "tarp": "coverage of balls around random points (TARP)",
    "tarp_data": "coverage of balls around guesses from the data (TARP)",
    "shrinkage": "width compared with a regression on the data",
    "tails": "truths beyond 5 sd",
    "data_averaged": "the average posterior compared with the prior",
    "local": "the posterior of the observed data (l-C2ST)",
}

_NARROW = (
    "train on more simulations or average an ensemble; a smaller network or more held-out "
    "simulations to stop by help where training has overfitted"
)
_WIDE = "train longer, with more simulations, or take a larger network"
_MEANING = {
    "over": (
        "the posterior is over-confident: credible regions hold up to {effect:.2g} less of the "
        "true values than they say",
        _NARROW,
    ),
    "under": (
        "the posterior is wider than it should be: credible regions hold up to {effect:.2g} more "
        "of the true values than they say",
        _WIDE,
    ),
    "bias_high": (
        "the posterior lies too high: its one-sided limits are off by up to {effect:.2g} in "
        "probability",
        "train on more simulations, take a larger network, or an embedding that fits the data",
    ),
    "bias_low": (
        "the posterior lies too low: its one-sided limits are off by up to {effect:.2g} in "
        "probability",
        "train on more simulations, take a larger network, or an embedding that fits the data",
    ),
    # A ball around a point does not tell a posterior's width from its place.
    "tarp_over": (
        "true values lie nearer to random points than draws do, or farther, more often than they "
        "should (by up to {effect:.2g}): the posterior is too narrow, or off to a side",
        _NARROW,
    ),
    "tarp_under": (
        "true values lie among the draws' distances from random points more often than they should "
        "(by up to {effect:.2g}): the posterior is too wide",
        _WIDE,
    ),
    "tarp_bias_high": (
        "true values lie nearer to random points than draws do, by up to {effect:.2g} in "
        "probability: the posterior is too wide, or off to a side",
        _WIDE,
    ),
    "tarp_bias_low": (
        "true values lie farther from random points than draws do, by up to {effect:.2g} in "
        "probability: the posterior is too narrow, or off to a side",
        _NARROW,
    ),
    "tarp_data_over": (
        "true values lie farther from guesses from the data than draws do, by up to {effect:.2g} "
        "in probability: the posterior is over-confident, or follows the guesses too closely",
        _NARROW,
    ),
    "tarp_data_under": (
        "true values lie nearer to guesses from the data than draws do, by up to {effect:.2g} in "
        "probability: the posterior is too wide, off to a side, or does not use what the data say",
        _WIDE,
    ),
    "prior": (
        "draws lie {percent:.0f} % farther from the guesses of a plain regression on the data than "
        "true values do: the posterior does not use what the data say",
        "check the scale and the embedding of x, take a larger network, and train longer",
    ),
    "prior_alone": (
        "the posterior is hardly narrower than the prior: the data say nothing about the "
        "parameters, or the network has not learnt it",
        "check the scale and the embedding of x, and train longer",
    ),
    "tail": (
        "{share:.2g} of the true values lie beyond 5 sd of their posterior, {draws:.2g} of its own "
        "draws do: it misses the truth altogether at times",
        "average an ensemble, train on more simulations, or take more bins or transforms",
    ),
    "average": (
        "the posterior averaged over simulations differs from the prior by {effect:.2g} in "
        "probability",
        _WIDE,
    ),
    "local": (
        "for data like these, a classifier tells true values from draws, with probabilities "
        "{effect:.2g} away from a guess",
        "train on more simulations, or with simulate.rounds=2 on more that are like these data",
    ),
}
# Below, data are so unlike the simulations that no test on simulations says much about them.
_UNLIKE = 0.01


def sentence(test: str, verdict: str, parts: Sequence[Part], worst: Part, rows: int) -> str:
    """What a test says: of its parts with the test's verdict, of which one is the worst."""
    text = _sentence(test, verdict, parts, worst, rows)
    if is_unlike(worst):
        text += (
            f" The data are unlike the simulations (p = {worst.more['out_of_distribution_p']:.2g})"
            ", so that this says little about them: check the data, the prior and the simulator."
        )
    return text


def is_unlike(part: Part) -> bool:
    """Whether the observation that a part is about can hardly be one of the simulator's."""
    p_value = part.more.get("out_of_distribution_p")
    return p_value is not None and p_value < _UNLIKE


def _sentence(test: str, verdict: str, parts: Sequence[Part], worst: Part, rows: int) -> str:
    subject = SUBJECTS[test]
    whose = joined([part.name for part in parts if part.name])
    if verdict == "pass":
        if worst.p_value is None:
            return f"No sign against the posterior in {subject}."
        return f"{_upper(subject)}: nothing that chance does not explain."
    kind = "prior_alone" if worst.kind == "prior" and worst.p_value is None else worst.kind
    own = f"{test}_{kind}"
    meaning, advice = _MEANING[own if own in _MEANING else kind]
    meaning = meaning.format(
        effect=worst.effect,
        percent=100 * worst.effect,
        share=worst.statistic,
        draws=worst.more.get("of_draws") or 0.0,
    )
    place = f" for {whose}" if whose else ""
    if verdict == "fail":
        return f"{_upper(subject)}{place}: {meaning}. Try to {advice}."
    if worst.p_value is not None and worst.severity < 1:
        return (
            f"{_upper(subject)}{place}: {meaning}; that is real, and small enough to live with "
            f"(below {worst.bound:.2g})."
        )
    sure = f"as far as {rows:,} simulations tell"
    return f"{_upper(subject)}{place}: {meaning}, {sure}. {_upper(advice)}."


def joined(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``; of more than five, how many more."""
    if len(items) > 5:
        items = [*items[:4], f"{len(items) - 4} more"]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
