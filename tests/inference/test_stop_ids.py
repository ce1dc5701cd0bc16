"""A model stops at all ids that its own `generate` stops at."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.adapters import QUESTIONS
from transformers import GenerationConfig

import mote
from mote.chains.engine import Prompt
from mote.core.generation import Limits
from mote.core.records import Message
from mote.inference.engines.local import LocalEngine
from mote.inference.events import Event
from mote.inference.inputs import as_question
from mote.models.load import load_base
from mote.serve.export import export_merged
from mote.tokens.encode import encode_prompt

STOP_AT = 4  # generated tokens before the second stop id


@pytest.fixture(scope="module")
def stopping(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model whose generation config names a second stop id, and the text that it generates before that id."""
    base = load_base(str(tiny), device="cpu")
    ids = torch.tensor([encode_prompt(base.tokenizer, as_question(QUESTIONS[0]).messages)])
    generated = base.model.generate(input_ids=ids, max_new_tokens=12)[0, ids.shape[1] :].tolist()
    stop = generated[STOP_AT]
    assert stop not in generated[:STOP_AT] and base.tokenizer.eos_token_id not in generated[: STOP_AT + 1]
    folder = tmp_path_factory.mktemp("stopping") / "model"
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [base.tokenizer.eos_token_id, stop]}))
    return folder, base.tokenizer.decode(generated[:STOP_AT], skip_special_tokens=True).strip()


def test_base_mode_stops_at_each_stop_id_of_the_model(stopping: tuple[Path, str]) -> None:
    folder, text = stopping
    model = mote.load(str(folder), device="cpu")
    events: list[Event] = []
    answer = model.answer(QUESTIONS[0], "base", max_step_tokens=12, on_event=events.append)
    assert (answer.answer, answer.finish, answer.tokens.total) == (text, "stop", STOP_AT + 1)
    assert "".join(event.text for event in events).strip() == text


def test_chain_writing_stops_at_each_stop_id_of_the_model(stopping: tuple[Path, str]) -> None:
    folder, text = stopping
    engine = LocalEngine(load_base(str(folder), device="cpu"), 2)
    done = asyncio.run(engine.write(Prompt((Message(role="user", content=QUESTIONS[0]),), max_tokens=12)))
    assert (done.text, done.finish, done.tokens) == (text, "stop", STOP_AT + 1)


def test_no_step_contains_a_stop_id(stopping: tuple[Path, str], adapter: Path) -> None:
    model = mote.load(str(stopping[0]), adapter, device="cpu")
    output = model.submit(as_question(QUESTIONS[0]), "full", Limits(20)).result(60)
    assert len(model.stop_ids) == 2 and not set(model.stop_ids).intersection(output)


def test_merged_export_keeps_each_stop_id(stopping: tuple[Path, str], adapter: Path, tmp_path: Path) -> None:
    export_merged(str(adapter), tmp_path / "merged", "direct", str(stopping[0]))
    model = mote.load(str(stopping[0]), adapter, device="cpu")
    end_of_response = model.config.markers["response"][1] if model.config else 0
    ends = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert ends == [end_of_response, *model.stop_ids]
