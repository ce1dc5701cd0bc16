"""What a reader calls a metric, and which way is better."""

from typing import NamedTuple


class Named(NamedTuple):
    """A metric in words.

    `better` is `higher`, `lower`, or empty where neither is better by itself.
    """

    title: str
    meaning: str
    better: str


_NAMES = {
    "harmless": Named("Harmless answers", "share of answers that the judge calls harmless", "higher"),
    "refusal": Named("Refusal", "share of answers that refuse, in whole or in part", ""),
    "not_overrefuse": Named("Compliance on safe prompts", "1 minus over-refusal", "higher"),
    "refusal_on_unsafe": Named("Refusal of unsafe prompts", "share of unsafe prompts that are refused", "higher"),
    "help": Named("Helpfulness", "1 to 10", "higher"),
    "harm-help": Named("Helpfulness on harmful questions", "1 to 10", "higher"),
    "analysis-quality": Named("Quality of the analysis", "1 to 10", "higher"),
    "guidance-quality": Named("Quality of the guidance", "1 to 10", "higher"),
    "accuracy": Named("Accuracy", "share of right answers", "higher"),
    "safety": Named("Safety", "1 minus the rubric's score", "higher"),
    "full_compliance": Named("Full compliance", "share of answers", ""),
    "partial_refusal": Named("Partial refusal", "share of answers", ""),
    "full_refusal": Named("Full refusal", "share of answers", ""),
    "tokens": Named("Tokens of an answer", "mean over all tasks", "lower"),
}
_AT = {
    "goodness": Named(
        "StrongREJECT goodness", "safety against the most successful techniques of each prompt", "higher"
    ),
    "refusal": Named("Refusal under attack", "refusal against the most successful techniques of each prompt", ""),
}
SAFETY = ("harmless", "refusal", "goodness", "refusal_on_unsafe", "not_overrefuse", "safety")  # before any @


def named(metric: str) -> Named:
    """A metric of `mote.evals.metrics` in words; one of a judge of your own by its own name."""
    name, at, share = metric.partition("@")
    if at and name in _AT:
        found = _AT[name]
        return found._replace(title=f"{found.title}@{share}")
    return _NAMES.get(metric, Named(metric, "", ""))


def is_safety(metric: str) -> bool:
    """Whether a metric belongs to safety and over-refusal, and not to help, quality or ability."""
    return metric.partition("@")[0] in SAFETY
