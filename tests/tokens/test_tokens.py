from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mote.core.errors import UserError
from mote.core.records import ChainRow, Message
from mote.models.load import load_base
from mote.tokens.encode import (
    IGNORED,
    add_markers,
    check_markers,
    decode_steps,
    encode_chain,
    encode_prompt,
    encode_text,
    stop_ids,
    turn_ids,
)
from mote.tuner import MoteConfig

STEPS = ("analysis", "guidance", "response")


@pytest.fixture(scope="module")
def prepared(tiny: Path) -> tuple[Any, MoteConfig]:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = MoteConfig()
    add_markers(tokenizer, config)
    return tokenizer, config


def chain(*steps: tuple[str, str], question: str = "how do I kill a process") -> ChainRow:
    return ChainRow.model_validate(
        {
            "id": "1", "messages": [{"role": "user", "content": question}], "safe": True, "checks": [], "model": "m",
            "prompts": "p", "seed": 0, "tokens": {"made": 1, "kept": 1}, "seconds": 0,
            "steps": [{"name": name, "text": text} for name, text in steps],
        }
    )  # fmt: skip


def test_markers_get_ids_once_and_turns_are_found(prepared: tuple[Any, MoteConfig]) -> None:
    tokenizer, config = prepared
    size = len(tokenizer)
    assert config.markers["response"] == tokenizer.convert_tokens_to_ids(["<|response|>", "<|/response|>"])
    assert config.turn_ids == [tokenizer.convert_tokens_to_ids("<|im_start|>")]
    again = MoteConfig()
    add_markers(tokenizer, again)
    assert again.markers == config.markers and len(tokenizer) == size == config.vocab_size


def test_marker_rows_begin_as_prompt_end_and_end_of_turn(tiny: Path) -> None:
    base = load_base(str(tiny), device="cpu")
    config = MoteConfig()
    add_markers(base.tokenizer, config, base.model)
    weight = base.model.get_input_embeddings().weight
    assert weight.shape[0] == len(base.tokenizer)
    newline = base.tokenizer("\n")["input_ids"][0]
    for start, end in config.markers.values():
        assert torch.equal(weight[end], weight[base.tokenizer.eos_token_id])
        assert torch.equal(weight[start], weight[newline])


def test_a_chain_becomes_prompt_and_marked_steps(prepared: tuple[Any, MoteConfig]) -> None:
    tokenizer, config = prepared
    markers = config.routing
    assert markers is not None
    row = encode_chain(tokenizer, chain(("analysis", "safe"), ("response", "answer")), markers, config.experts)
    prompt = encode_prompt(tokenizer, (Message(role="user", content="how do I kill a process"),))
    a, r = config.markers["analysis"], config.markers["response"]
    written = [a[0], *encode_text(tokenizer, "safe"), a[1], r[0], *encode_text(tokenizer, "answer"), r[1]]
    assert row.ids == [*prompt, *written, tokenizer.eos_token_id]
    assert row.labels == [IGNORED] * len(prompt) + row.ids[len(prompt) :]
    middle = written.index(r[0])
    assert row.steps == [0] * len(prompt) + [1] * middle + [3] * (len(written) - middle + 1)
    assert [(s.name, s.text) for s in decode_steps(tokenizer, written, markers, config.experts)] == [
        ("analysis", "safe"), ("response", "answer")
    ]  # fmt: skip


def test_plain_text_is_tokenised_as_the_chat_template_does(prepared: tuple[Any, MoteConfig]) -> None:
    tokenizer, _ = prepared
    dialogue = [("user", "how do I"), ("assistant", "safe answer"), ("user", "kill a process?")]
    rows = [{"role": role, "content": text} for role, text in dialogue]
    expected = tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]
    assert encode_prompt(tokenizer, tuple(Message.model_validate(row) for row in rows)) == expected


pieces = st.sampled_from(
    ["<|response|>", "<|/response|>", "<|analysis|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|", "|>", "re",
     "sponse", "assistant\n", "\n", " ", "\u200b", "<|respon\u0073e|>", "kill", "\ud7ff", "🙂"]
)  # fmt: skip


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(pieces, st.text(max_size=4)), min_size=1, max_size=10))
def test_user_text_never_becomes_a_marker_or_a_turn(prepared: tuple[Any, MoteConfig], parts: list[str]) -> None:
    tokenizer, config = prepared
    text = "".join(parts)
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert not special & set(encode_text(tokenizer, text))
    for role in ("user", "system"):
        messages = (Message.model_validate({"role": role, "content": text}), Message(role="user", content=text))
        plain = tuple(message.model_copy(update={"content": "x"}) for message in messages)
        found = [id_ for id_ in encode_prompt(tokenizer, messages) if id_ in special]
        assert found == [id_ for id_ in encode_prompt(tokenizer, plain) if id_ in special]
        assert not {id_ for pair in config.markers.values() for id_ in pair} & set(found)


def test_what_the_user_wrote_stays_readable(prepared: tuple[Any, MoteConfig]) -> None:
    tokenizer, _ = prepared
    text = "say <|response|> and <|im_end|> now"
    ids = encode_prompt(tokenizer, (Message(role="user", content=text),))
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_a_foreign_tokenizer_is_refused(tiny: Path, prepared: tuple[Any, MoteConfig]) -> None:
    with pytest.raises(UserError, match=r"adapter: its marker <\|analysis\|> has id"):
        check_markers(AutoTokenizer.from_pretrained(tiny), prepared[1].markers)


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
)
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["refuses", "drops"])
def test_without_a_system_role_its_text_joins_the_user_turn(tiny: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    system, user = Message(role="system", content="be brief"), Message(role="user", content="how?")
    rest = (Message(role="assistant", content="so"), Message(role="user", content="kill a <|im_end|> process"))
    with_role = tokenizer.decode(encode_prompt(tokenizer, (system, user, *rest)))
    assert with_role.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhow?")
    tokenizer.chat_template = template
    folded = (Message(role="user", content="be brief\n\nhow?"), *rest)
    assert encode_prompt(tokenizer, (system, user, *rest)) == encode_prompt(tokenizer, folded)
    assert "be brief\n\nhow?" in tokenizer.decode(encode_prompt(tokenizer, (system, user, *rest)))


@pytest.mark.parametrize("template", [NO_SYSTEM.split("{% for", 1)[0] + DROPS_SYSTEM, DROPS_SYSTEM])
def test_system_text_never_becomes_an_assistant_turn(tiny: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = template
    system, greeting = Message(role="system", content="be brief"), Message(role="assistant", content="hello")
    ask = Message(role="user", content="how?")
    asked = Message(role="user", content="be brief\n\nhow?")
    assert encode_prompt(tokenizer, (system, greeting, ask)) == encode_prompt(tokenizer, (greeting, asked))
    assert encode_prompt(tokenizer, (system, system, ask)) == encode_prompt(
        tokenizer, (Message(role="user", content="be brief\n\nbe brief\n\nhow?"),)
    )
    assert encode_prompt(tokenizer, (ask, greeting, system, ask)) == encode_prompt(tokenizer, (ask, greeting, asked))
    assert encode_prompt(tokenizer, (system,)) == encode_prompt(tokenizer, (Message(role="user", content="be brief"),))


TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def own_end_of_turn(tiny: Path) -> Any:
    """As Gemma-it and Phi-3: the turn ends with a token that only the generation config names."""
    base = load_base(str(tiny), device="cpu")
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]})
    base.tokenizer.chat_template = TURNS
    base.model.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    end = base.tokenizer.convert_tokens_to_ids("<|end|>")
    base.model.generation_config.eos_token_id = [base.tokenizer.eos_token_id, end]
    return base


def test_stop_ids_are_the_tokenizers_and_the_generation_configs(own_end_of_turn: Any) -> None:
    tokenizer, model = own_end_of_turn.tokenizer, own_end_of_turn.model
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert stop_ids(tokenizer, model) == (tokenizer.eos_token_id, end)
    model.generation_config.eos_token_id = end
    assert stop_ids(tokenizer, model) == (tokenizer.eos_token_id, end)
    for nothing in (None, []):
        model.generation_config.eos_token_id = nothing
        assert stop_ids(tokenizer, model) == stop_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_turn_ids_do_not_depend_on_a_default_system_prompt(own_end_of_turn: Any) -> None:
    tokenizer = own_end_of_turn.tokenizer
    without = turn_ids(tokenizer)
    tokenizer.chat_template = "My first, second and third duty is to help.\n" + tokenizer.chat_template
    assert turn_ids(tokenizer) == without != []


def test_chains_and_end_markers_follow_the_models_end_of_turn(own_end_of_turn: Any) -> None:
    tokenizer, model = own_end_of_turn.tokenizer, own_end_of_turn.model
    end, user = tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    config = MoteConfig()
    add_markers(tokenizer, config, model)
    assert config.turn_ids == [user] and config.end_of_turn == end
    weight = model.get_input_embeddings().weight
    assert all(torch.equal(weight[pair[1]], weight[end]) for pair in config.markers.values())
    assert config.routing is not None
    row = encode_chain(tokenizer, chain(("response", "answer")), config.routing, config.experts)
    assert row.ids[-1] == row.labels[-1] == end and row.steps[-1] == 3
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # a template's own separator ends no turn
    add_markers(tokenizer, config, model)
    assert config.turn_ids == [end, user] and config.end_of_turn == tokenizer.eos_token_id
