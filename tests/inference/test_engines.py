"""The in-process engine against plain generation."""

import asyncio
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.sampling import SeededSampler

from mote.chains.engine import Completion, Engine, Likelihood, Preference, Prompt
from mote.core.errors import UserError
from mote.core.generation import Sampling
from mote.core.records import Message
from mote.inference.engines.local import LocalEngine
from mote.models.load import Base, load_base
from mote.tokens.encode import encode_prompt, encode_text


def prompt(text: str, **changes: Any) -> Prompt:
    shared = (Message(role="user", content="how do I answer"), Message(role="assistant", content="analysis"))
    given: dict[str, Any] = {"messages": (*shared, Message(role="user", content=text)), "max_tokens": 12, "shared": 2}
    return Prompt(**{**given, **changes})


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return load_base(str(tiny), device="cpu")


TEXTS = ["kill a process", "safe", "how do I answer on my computer, and is it safe or unsafe?", "unsafe analysis"]


def ask(engine: Engine, prompts: Sequence[Prompt]) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        try:
            return list(await asyncio.gather(*(engine.write(prompt) for prompt in prompts)))
        finally:
            await engine.close()

    return asyncio.run(all_of_them())


def choose(engine: Engine, prompts: Sequence[Prompt], choices: tuple[str, str]) -> list[Preference]:
    async def all_of_them() -> list[Preference]:
        try:
            return list(await asyncio.gather(*(engine.choose(prompt, choices) for prompt in prompts)))
        finally:
            await engine.close()

    return asyncio.run(all_of_them())


def test_reply_score_is_its_mean_log_probability(base: Base) -> None:
    async def scores(replies: Sequence[str]) -> list[Likelihood]:
        engine = LocalEngine(base, batch_size=2)
        try:
            return list(
                await asyncio.gather(*(engine.score(prompt("a long question, is it safe?"), r) for r in replies))
            )
        finally:
            await engine.close()

    replies = ["analysis", "kill a process on my computer", "<|im_end|> safe", "unsafe", ""]
    lead = encode_prompt(base.tokenizer, prompt("a long question, is it safe?").messages)
    for reply, found in zip(replies, asyncio.run(scores(replies)), strict=True):
        own = encode_text(base.tokenizer, reply)
        logits = base.model(input_ids=torch.tensor([[*lead, *own]])).logits[0, len(lead) - 1 : -1]
        rows = logits.log_softmax(-1)[range(len(own)), own]
        assert found.mean == pytest.approx(float(rows.detach().mean()) if own else 0.0, abs=1e-5)
        assert found.prompt_tokens == (len(lead) + len(own) if own else 0)


def test_shared_prefix_equals_plain_generation(base: Base) -> None:
    found = ask(LocalEngine(base, batch_size=3), [prompt(text) for text in TEXTS])
    for text, completion in zip(TEXTS, found, strict=True):
        ids = torch.tensor([encode_prompt(base.tokenizer, prompt(text).messages)])
        out = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)[
            0, ids.shape[1] :
        ]
        assert completion.text == base.tokenizer.decode(out, skip_special_tokens=True).strip()
        ended = base.tokenizer.eos_token_id in out.tolist()
        assert completion.finish == ("stop" if ended else "length")
        assert (completion.tokens, completion.prompt_tokens) == (len(out), ids.shape[1])


def test_sampling_does_not_depend_on_the_batch(base: Base) -> None:
    prompts = [prompt(text, temperature=0.9, seed=i) for i, text in enumerate(TEXTS)]
    together = ask(LocalEngine(base, batch_size=4), prompts)
    alone = [ask(LocalEngine(base, batch_size=1), [one])[0] for one in prompts]
    assert together == alone
    other = ask(LocalEngine(base, batch_size=4), [prompt(text, temperature=0.9, seed=9) for text in TEXTS])
    assert [c.text for c in other] != [c.text for c in together]


def test_choose_returns_the_next_word_probability(base: Base) -> None:
    scores = choose(LocalEngine(base, batch_size=2), [prompt(text) for text in TEXTS], ("safe", "unsafe"))
    first, second = (base.tokenizer(word)["input_ids"][0] for word in ("safe", "unsafe"))
    for text, score in zip(TEXTS, scores, strict=True):
        ids = torch.tensor([encode_prompt(base.tokenizer, prompt(text).messages)])
        pair = base.model(input_ids=ids).logits[0, -1, [first, second]].softmax(0)
        assert score.score == pytest.approx(float(pair[0].detach()), abs=1e-5)
        assert (score.tokens, score.prompt_tokens) == (0, ids.shape[1])
    with pytest.raises(UserError, match=r"one of .* is the beginning of the other"):
        choose(LocalEngine(base, 2), [prompt("x")], ("safe", "safe"))


def test_words_with_a_common_prefix_differ_in_later_ids(base: Base) -> None:
    words = ("helpful", "harmful")
    first, second = (base.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words)
    assert first[0] == second[0] and first[1] != second[1]
    score = choose(LocalEngine(base, 2), [prompt("safe")], words)[0]
    ids = torch.tensor([[*encode_prompt(base.tokenizer, prompt("safe").messages), first[0]]])
    pair = base.model(input_ids=ids).logits[0, -1, [first[1], second[1]]].softmax(0)
    assert score.score == pytest.approx(float(pair[0].detach()), abs=1e-5)
    assert score.prompt_tokens == ids.shape[1]


def test_sampler_follows_the_nucleus_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    samplings = [Sampling(1.0, 0.9, seed) for seed in range(6000)]
    scores = probabilities.log().repeat(len(samplings), 1)
    drawn = SeededSampler(samplings, 3)(torch.zeros(len(samplings), 3), scores).argmax(1)
    share = torch.bincount(drawn, minlength=4) / len(samplings)
    nucleus = torch.tensor([0.5, 0.3, 0.15, 0.0])
    torch.testing.assert_close(share, nucleus / nucleus.sum(), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("opened", "generated", "stops", "text", "finish"),
    [
        (False, "<think>\nHm.\n</think>\n\nUse kill.", True, "Use kill.", "stop"),
        (False, "<think>\nHm, should", False, "", "length"),
        (False, "<think>\nHm.\n</think>\n\nUse k", False, "Use k", "length"),
        (False, "A thought ends at </think>.", True, "A thought ends at </think>.", "stop"),
        (True, "Hm.\n</think>\n\nUse kill.", True, "Use kill.", "stop"),
        (True, "Hm, should", False, "", "length"),
    ],
)
def test_reasoning_before_a_reply_is_left_out(
    base: Base, opened: bool, generated: str, stops: bool, text: str, finish: str
) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    if opened:
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    engine = LocalEngine(dataclasses.replace(base, tokenizer=tokenizer), 1)

    async def generate(_: object) -> list[int]:
        return [*encode_text(tokenizer, generated), *([tokenizer.eos_token_id] if stops else [])]

    engine._ask = generate  # type: ignore[method-assign]
    [done] = ask(engine, [prompt("x")])
    assert (done.text, done.finish) == (text, finish)


def test_models_are_asked_not_to_reason_before_a_step(base: Base) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    switch = "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", switch + "{% endif")
    [done] = ask(LocalEngine(dataclasses.replace(base, tokenizer=tokenizer), 1), [prompt("x")])
    messages = prompt("x").messages
    assert done.prompt_tokens == len(encode_prompt(tokenizer, messages, think=False))
    assert done.prompt_tokens > len(encode_prompt(tokenizer, messages))
