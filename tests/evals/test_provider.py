"""The provider through Inspect itself: `eval` in this process, real logs, a tiny random model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import (
    CachePolicy,
    ChatMessageAssistant,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
    get_model,
)
from inspect_ai.solver import generate
from support.adapters import QUESTIONS, save_random_adapter

import mote
from mote.core.errors import UserError
from mote.evals.provider import _MODELS, MoteAPI, dialogue
from mote.evals.systems import fingerprint
from mote.inference.inputs import as_question
from mote.tokens.encode import encode_prompt


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"))


def get_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def answered(log_dir: Path, model: Any, questions: list[str], **given: Any) -> EvalLog:
    task = Task(dataset=[Sample(input=question) for question in questions], solver=generate(**given))
    (log,) = inspect_eval(task, model=model, log_dir=str(log_dir), display="none", log_level="error")
    return log


def provider(tiny: Path, adapter: Path | None = None, **given: Any) -> Any:
    args = {"adapter": str(adapter)} if adapter else {}
    return get_model(f"mote/{tiny}", device="cpu", max_step_tokens=6, **args, **given)


def test_answers_equal_those_of_the_library(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    model = provider(tiny, adapter, mode="full")
    log = answered(tmp_path, model, QUESTIONS)
    assert log.status == "success" and log.samples
    wanted = mote.load(str(tiny), adapter, device="cpu").answer(QUESTIONS, "full", max_step_tokens=6)
    for sample, answer in zip(log.samples, wanted, strict=True):
        content = sample.output.message.content
        assert sample.output.completion == answer.answer and not isinstance(content, str)
        reasoning = [part for part in content if isinstance(part, ContentReasoning)]
        assert (
            [(part.internal["step"], part.reasoning) for part in reasoning]
            == [  # type: ignore[index, call-overload]
                (step.name, step.text) for step in answer.steps[:-1]
            ]
        )
        usage, metadata = sample.output.usage, sample.output.metadata
        assert usage and metadata and metadata["tokens"] == answer.tokens.steps and metadata["mode"] == "full"
        assert usage.output_tokens == answer.tokens.total
        assert usage.reasoning_tokens == answer.tokens.total - answer.tokens.steps["response"]
        assert usage.input_tokens > 5
    model.api.close()


def test_self_checked_answer_reports_its_checks(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    own = save_random_adapter(tiny, tmp_path / "own", experts=("analysis", "guidance", "response", "check"))
    model = provider(tiny, own, mode="adaptive+check", check_threshold=1.0)
    log = answered(tmp_path, model, QUESTIONS)
    given: dict[str, Any] = {"mode": "adaptive+check", "check_threshold": 1.0, "max_step_tokens": 6}
    for sample, answer in zip(log.samples or [], mote.load(str(tiny), own).answer(QUESTIONS, **given), strict=True):
        usage, metadata = sample.output.usage, sample.output.metadata
        assert sample.output.completion == answer.answer and usage and metadata
        assert metadata["safe"] is False and [check["depth"] for check in metadata["checks"]][-1] == "full"
        assert usage.output_tokens == answer.tokens.total == sum(metadata["tokens"].values())
    assert model.api.base_url != provider(tiny, own, mode="adaptive+check").api.base_url
    model.api.close()
    with pytest.raises(UserError, match="needs an adapter with a trained check"):
        provider(tiny, adapter, mode="adaptive+check")


def test_the_base_model_needs_no_adapter(tiny: Path, tmp_path: Path) -> None:
    model = provider(tiny)
    log = answered(tmp_path, model, QUESTIONS)
    wanted = mote.load(str(tiny), device="cpu").answer(QUESTIONS, "base", max_step_tokens=6)
    assert [s.output.completion for s in log.samples or []] == [answer.answer for answer in wanted]
    assert model.api.mode == "base"
    model.api.close()


def test_modes_share_a_model_and_prefill_a_prompt_once(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    def computed(*modes: str) -> int:
        models = [provider(tiny, adapter, mode=mode) for mode in modes]
        assert len({id(model.api.shared_model()) for model in models}) == 1
        task = Task(dataset=[Sample(input=question) for question in QUESTIONS])
        logs = inspect_eval(task, model=models, log_dir=str(tmp_path), display="none", log_level="error", max_tasks=4)
        wanted = mote.load(str(tiny), adapter, device="cpu")
        for log, mode in zip(logs, modes, strict=True):
            answers = wanted.answer(QUESTIONS, mode, max_step_tokens=6)
            assert [s.output.completion for s in log.samples or []] == [answer.answer for answer in answers]
        tokens: int = models[0].api.shared_model().tokens_computed
        models[0].api.close()
        return tokens

    separately = computed("direct") + computed("adaptive") + computed("full") + computed("base")
    prompts = sum(len(encode_prompt(get_tokenizer(adapter), as_question(text).messages)) - 1 for text in QUESTIONS)
    assert computed("direct", "adaptive", "full", "base") == separately - 2 * prompts


def test_adapter_retrained_in_place_gives_fresh_answers(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_random_adapter(tiny, folder)
    cache = CachePolicy(scopes={"test": str(tmp_path)})

    def ask() -> list[str]:
        model = provider(tiny, folder, mode="direct")
        log = answered(tmp_path / "logs", model, QUESTIONS, cache=cache)
        return [sample.output.completion for sample in log.samples or []]

    first = ask()
    before = fingerprint(str(folder))
    tokens = provider(tiny, folder, mode="direct").api.shared_model().tokens_computed
    assert ask() == first  # from the cache: nothing is generated
    assert provider(tiny, folder, mode="direct").api.shared_model().tokens_computed == tokens > 0
    other = tmp_path / "other"
    save_random_adapter(tiny, other, seed=9)
    shutil.copy(other / "adapter_model.safetensors", folder)
    assert fingerprint(str(folder)) != before
    fresh = mote.load(str(tiny), folder, device="cpu").answer(QUESTIONS, "direct", max_step_tokens=6)
    assert ask() == [answer.answer for answer in fresh] != first
    assert len([loaded for loaded in _MODELS if loaded.adapter == str(folder)]) == 1  # the old weights are freed
    assert provider(tiny, folder, mode="full").api.base_url != provider(tiny, folder, mode="direct").api.base_url


SECRET = ContentReasoning(reasoning="secret")


@pytest.mark.parametrize(
    "content",
    [
        [SECRET, ContentText(text="open")],
        [SECRET, ContentText(text="\nopen")],
        [ContentText(text=""), SECRET, ContentText(text="open")],
        [ContentText(text="\n"), ContentText(text="open")],
        [ContentText(text="<think>secret</think>\nopen")],
        "<think>secret</think>\n\nopen",
        '\n<think signature="s">\nsecret\n</think>\nopen',
        "\nopen",
    ],
)
def test_second_turn_reads_the_history_without_reasoning(tiny: Path, content: Any) -> None:
    turns = [
        ChatMessageUser(content="a"),
        ChatMessageAssistant(content=content),
        ChatMessageUser(content="b <think>x</think>"),
    ]
    own = as_question(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "open"},
            {"role": "user", "content": "b <think>x</think>"},
        ]
    ).messages
    tokenizer = get_tokenizer(tiny)
    assert encode_prompt(tokenizer, dialogue(turns)) == encode_prompt(tokenizer, own)


def test_literal_think_tag_in_an_earlier_answer_is_kept() -> None:
    said = [SECRET, ContentText(text="Write <think> and </think> around it.")]
    assert dialogue([ChatMessageAssistant(content=said)])[0].content == "Write <think> and </think> around it."


def test_invalid_arguments_are_refused_at_construction(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'full' needs a trained adapter"):
        provider(tiny, mode="full")
    with pytest.raises(UserError, match="'deep' is not a mode"):
        provider(tiny, adapter, mode="deep")
    with pytest.raises(UserError, match="holds no adapter that can be read"):
        provider(tiny, tmp_path)


def test_a_failing_model_fails_the_log(tmp_path: Path) -> None:
    log = answered(tmp_path, provider(tmp_path / "nothing"), QUESTIONS[:1])
    assert log.status == "error" and log.error and "there is no folder" in log.error.message


def test_prompting_provider_generates_a_schemes_steps(tiny: Path, tmp_path: Path) -> None:
    """What the chain loop writes greedily, stage by stage; the steps are reasoning, and the first answer counts."""
    import asyncio

    from mote.chains.make import make_chain
    from mote.core.recipe import ChainSettings
    from mote.core.records import Message, Question
    from mote.core.scheme import load_scheme
    from mote.inference.engines.local import LocalEngine
    from mote.models.load import load_base

    model = get_model(f"mote-prompting/{tiny}", scheme="analysis-guidance", examples=1, max_step_tokens=8, device="cpu")
    log = answered(tmp_path, model, QUESTIONS)
    assert log.status == "success" and log.samples
    settings = ChainSettings(max_tokens=8, temperature=0.0, examples=1, retries=0)
    engine = LocalEngine(load_base(str(tiny), device="cpu"), 4)
    scheme = load_scheme("analysis-guidance")
    for sample, text in zip(log.samples, QUESTIONS, strict=True):
        question = Question(id="other", messages=(Message(role="user", content=text),))
        row = asyncio.run(make_chain(question, engine, None, scheme, settings, 7))
        content = sample.output.message.content
        assert not isinstance(content, str)
        assert [part.reasoning for part in content if isinstance(part, ContentReasoning)] == [
            step.text for step in row.steps[:-1]
        ]
        assert sample.output.completion == row.steps[-1].text
        assert sample.output.usage and sample.output.usage.output_tokens == row.tokens.made
    model.api.close()
    with pytest.raises(UserError, match="'safety' has several chains"):
        get_model(f"mote-prompting/{tiny}", scheme="safety", memoize=False)


def test_provider_is_found_by_name(tiny: Path) -> None:
    assert isinstance(provider(tiny).api, MoteAPI)
