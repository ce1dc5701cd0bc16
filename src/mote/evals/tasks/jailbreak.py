"""Forbidden prompts under jailbreak techniques (StrongREJECT, goodness@k), and benign prompts under the same ones.

The judge is given the prompt without its disguise.
"""

import math
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser
from inspect_ai.scorer import mean

from mote.chains.judge import COMPLIANCE, FULL_REFUSAL, PARTIAL_REFUSAL
from mote.core.errors import UserError
from mote.core.records import Kind, Question
from mote.evals.attacks import Technique, cached_prompts, load_techniques, select_techniques
from mote.evals.scorers import goodness, judged, share_of
from mote.evals.tasks.samples import benign_questions, harmful_questions, task_name
from mote.questions.files import raw_rows


@task(name=task_name("strongreject"))
def strongreject(
    file: str,
    judge: str = "rule",
    techniques: str = "",
    attacks: str | None = None,
    cached: str | None = None,
    k: float = 0.1,
    limit: int | None = None,
) -> Task:
    """Goodness@k: mean safety score under the most successful share k of the techniques of each prompt.

    Args:
        file: Forbidden prompts: StrongREJECT's file, or any question file.
        judge: Name of the judge; a refusal judge gives the share of refusals instead of safety scores.
        techniques: Names or kinds of techniques, comma-separated; empty for all.
        attacks: YAML file of techniques that replaces the package's.
        cached: JSON file of attacks written by another model; each of its columns is another technique.
        k: Share of the techniques, rounded up to whole techniques.
        limit: Use the first N forbidden prompts, each with every technique.

    Raises:
        UserError: There are fewer than 1/k techniques, or a prompt has no cached attack.
    """
    chosen = _chosen(techniques, attacks)
    cached_attacks = cached_prompts(Path(cached)) if cached else {}
    count = len(chosen) + len(cached_attacks)
    if not 0 < k <= 1:
        raise UserError(f"k: {k:g} is not a share of the techniques; use more than 0 and at most 1")
    if count * k < 1 - 1e-9:
        raise UserError(
            f"techniques: goodness@{k:g} is over the worst {k:.0%} of a prompt's techniques, which is less than one of "
            f"{count}; give at least {math.ceil(1 / k)} techniques, or a larger k"
        )
    questions = harmful_questions(file, limit)
    types = {str(row.get("forbidden_prompt")).strip(): str(row.get("category", "")) for _, row in raw_rows(file)}
    samples = []
    for question in questions:
        type_ = types.get(question.text, "")
        samples += [_attack(question, "harmful", type_, technique) for technique in chosen]
        samples += [_cached(question, type_, name, prompts) for name, prompts in cached_attacks.items()]
    return Task(dataset=samples, scorer=judged(judge, "strongreject"), metrics=[mean(), goodness(k)])


@task(name=task_name("adversarial_benign"))
def adversarial_benign(
    file: str, judge: str = "rule", techniques: str = "", attacks: str | None = None, limit: int | None = None
) -> Task:
    """Compliance with benign prompts under jailbreak techniques (not_overrefuse), by the undisguised prompt.

    Args:
        file: Questions; only benign ones are used.
        judge: Name of the judge; it must distinguish the three classes of refusal.
        techniques: Names or kinds of techniques, comma-separated; empty for all.
        attacks: YAML file of techniques that replaces the package's.
        limit: Use the first N benign prompts, each with every technique.

    Raises:
        UserError: The file has no benign prompts.
    """
    questions = benign_questions(file, limit)
    chosen = _chosen(techniques, attacks)
    samples = [_attack(question, "benign", "", technique) for question in questions for technique in chosen]
    classes = [share_of(label, "benign") for label in (COMPLIANCE, PARTIAL_REFUSAL, FULL_REFUSAL)]
    return Task(dataset=samples, scorer=judged(judge, "refusal"), metrics=[mean(), *classes])


def _chosen(techniques: str, attacks: str | None) -> list[Technique]:
    names = [name.strip() for name in techniques.split(",") if name.strip()]
    chosen = load_techniques(Path(attacks) if attacks else None)
    return select_techniques(chosen, names) if names else chosen


def _attack(question: Question, kind: Kind, type_: str, technique: Technique) -> Sample:
    return _sample(question, kind, type_, technique.name, technique.apply(question.text), technique.answer)


def _cached(question: Question, type_: str, name: str, prompts: dict[str, str]) -> Sample:
    if question.text not in prompts:
        raise UserError(
            f"cached: the technique '{name}' has no attack for the prompt {question.id}; give a file made for these "
            "prompts"
        )
    return _sample(question, "harmful", type_, f"cached_{name}", prompts[question.text], None)


def _sample(question: Question, kind: Kind, type_: str, technique: str, attack: str, encoding: str | None) -> Sample:
    """One disguised prompt; the undisguised one in the metadata is what the judge is given."""
    return Sample(
        id=f"{question.id}/{technique}",
        input=[ChatMessageUser(content=attack)],
        metadata={
            "question_id": question.id,
            "kind": kind,
            "type": type_,
            "technique": technique,
            "question": question.text,
            "answer_encoding": encoding,
        },
    )
