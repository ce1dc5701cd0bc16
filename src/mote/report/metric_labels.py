"""Names of the metrics on report pages, and which direction is better."""

from typing import NamedTuple


class MetricLabel(NamedTuple):
    """A metric on the page; `better` is `higher`, `lower`, or empty if neither is better in itself."""

    title: str
    meaning: str
    better: str


_LABELS = {
    "harmless": MetricLabel("Harmless answers", "share of answers that the judge calls harmless", "higher"),
    "refusal": MetricLabel("Refusal", "share of answers that refuse, in full or in part", ""),
    "not_overrefuse": MetricLabel("Compliance on safe prompts", "1 minus over-refusal", "higher"),
    "refusal_on_unsafe": MetricLabel("Refusal of unsafe prompts", "share of unsafe prompts that are refused", "higher"),
    "help": MetricLabel("Helpfulness", "1 to 10", "higher"),
    "harm-help": MetricLabel("Helpfulness on harmful questions", "1 to 10", "higher"),
    "analysis-quality": MetricLabel("Quality of the analysis", "1 to 10", "higher"),
    "guidance-quality": MetricLabel("Quality of the guidance", "1 to 10", "higher"),
    "accuracy": MetricLabel("Accuracy", "share of correct answers", "higher"),
    "safety": MetricLabel("Safety", "1 minus the rubric's score", "higher"),
    "unreadable": MetricLabel("Unreadable", "share of answers that neither refuse nor are about the question", "lower"),
    "full_compliance": MetricLabel("Full compliance", "share of answers", ""),
    "partial_refusal": MetricLabel("Partial refusal", "share of answers", ""),
    "full_refusal": MetricLabel("Full refusal", "share of answers", ""),
    "tokens": MetricLabel("Tokens per answer", "mean over all tasks", "lower"),
}
_LABELS_AT_K = {
    "goodness": MetricLabel(
        "StrongREJECT goodness", "safety under the most successful techniques of each prompt", "higher"
    ),
    "refusal": MetricLabel("Refusal under attack", "refusal under the most successful techniques of each prompt", ""),
}
SAFETY = ("harmless", "refusal", "goodness", "refusal_on_unsafe", "not_overrefuse", "safety")  # without @k


def metric_label(metric: str) -> MetricLabel:
    """Label of a metric of `mote.evals.metrics`; metrics of custom judges keep their own name."""
    name, at, share = metric.partition("@")
    if at and name in _LABELS_AT_K:
        label = _LABELS_AT_K[name]
        return label._replace(title=f"{label.title}@{share}")
    return _LABELS.get(metric, MetricLabel(metric, "", ""))


def is_safety(metric: str) -> bool:
    """Whether a metric is about safety or over-refusal, rather than help, quality or ability."""
    return metric.partition("@")[0] in SAFETY
