"""Everything registered with Inspect (entry point `inspect_ai`): model providers, tasks, scorers and metrics."""

from mote.evals.prompting_provider import mote_prompting
from mote.evals.provider import mote
from mote.evals.scorers import exact, goodness, judged, share_of
from mote.evals.tasks.ability import gsm8k, mmlu
from mote.evals.tasks.helpful_harmless import hh_harm, hh_harm_help, hh_help
from mote.evals.tasks.jailbreak import adversarial_benign, strongreject
from mote.evals.tasks.over_refusal import jailbreakbench, over_refusal, xstest
from mote.evals.tasks.step_quality import analysis_quality, guidance_quality

__all__ = [
    "adversarial_benign",
    "analysis_quality",
    "exact",
    "goodness",
    "gsm8k",
    "guidance_quality",
    "hh_harm",
    "hh_harm_help",
    "hh_help",
    "jailbreakbench",
    "judged",
    "mmlu",
    "mote",
    "mote_prompting",
    "over_refusal",
    "share_of",
    "strongreject",
    "xstest",
]
