"""Self-contained HTML pages: template, style and script in one file, under a policy that forbids all requests.

Formats numbers; independent of the content of the pages.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
from markupsafe import Markup

from mote.evals.statistics import Estimate
from mote.report import plots

TEMPLATES = Path(__file__).parent / "templates"
DASH = "–"  # noqa: RUF001 (means "not recorded")
RATED = ("help", "harm-help", "analysis-quality", "guidance-quality")  # ratings from 1 to 10
PLAIN = ("tokens", "loss")  # numbers without a unit; all other metrics are shares


def render(template: str, styles: Sequence[str], scripts: Sequence[str], **values: Any) -> str:
    """Render a page; deterministic.

    Args:
        template: File name of the template.
        styles: File names of its stylesheets.
        scripts: File names of its scripts; their hash is in the page's content security policy.
        values: Variables of the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "share": share,
        "seconds": seconds,
        "hue": plots.hue,
        "flat": flat,
        "measured": measured,
        "interval": interval,
        "change": change,
        "p": p_value,
        "data": as_data,
    }
    script = "\n".join(_text(name) for name in scripts)
    return environment.get_template(template).render(
        **values,
        style=Markup("".join(_text(name) for name in styles)),
        script=Markup(script),
        policy=_policy(script),
    )


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f" script-src 'sha256-{digest}';" if script else ""
    return f"default-src 'none'; style-src 'unsafe-inline';{scripts} img-src data:; base-uri 'none'; form-action 'none'"


def as_data(value: Any) -> Markup:
    """JSON for a script element; its content cannot close the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def number(value: float | None, digits: int = 0) -> str:
    """A number with thousands separators."""
    return DASH if value is None else f"{value:,.{digits}f}"


def share(part: float) -> str:
    """A share in percent."""
    return f"{100 * part:.1f}\u202f%"


def seconds(value: float | None) -> str:
    """A duration."""
    if value is None or value < 60:
        return DASH if value is None else f"{value:.1f}\u202fs" if value >= 0.1 else f"{value:.3f}\u202fs"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u202fh {minutes}\u202fmin" if hours else f"{minutes}\u202fmin {rest}\u202fs"


def flat(value: Any) -> str:
    """Any value on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def measured(value: float | None, metric: str) -> str:
    """A metric with its unit."""
    return DASH if value is None else f"{_digits(value, metric)}{_unit(metric)}"


class HasInterval(Protocol):
    """A number or difference with a 95 % interval."""

    @property
    def low(self) -> float | None:
        """Lower end."""

    @property
    def high(self) -> float | None:
        """Upper end."""


def interval(number: HasInterval, metric: str) -> str:
    """The interval of a metric, or of a difference with signs."""
    if number.low is None or number.high is None:
        return DASH
    signed = not isinstance(number, Estimate)
    return f"[{_digits(number.low, metric, signed)}, {_digits(number.high, metric, signed)}]"


def change(value: float | None, metric: str) -> str:
    """A difference with its sign; of shares in percentage points."""
    if value is None:
        return DASH
    return _digits(value, metric, signed=True) + ("\u202fpoints" if _unit(metric) else "")


def p_value(value: float | None) -> str:
    """A p value."""
    return DASH if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _unit(metric: str) -> str:
    return "" if metric in RATED or metric.startswith(PLAIN) else "\u202f%"


def _digits(value: float, metric: str, signed: bool = False) -> str:
    sign = "+" if signed else ""
    digits = 1 if _unit(metric) or metric == "tokens" else 2
    text = f"{100 * value if _unit(metric) else value:{sign}.{digits}f}"
    return text.replace("-", "\u2212")
