"""`examples/mote_from_scratch.py` against the package: the same method, written twice."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.adapters import QUESTIONS, save_random_adapter, some_ids
from support.paths import ROOT
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

import mote
from mote.core.records import ChainRow, ChainTokens, Message, StepText
from mote.inference.model import Model
from mote.tokens.encode import decode_steps, encode_chain, encode_prompt, encode_text
from mote.tokens.masks import Layout, draw_visibility, positions, sdpa_mask, skip_probabilities
from mote.tokens.routing import Markers, step_ids

EXPERTS = ("analysis", "guidance", "response")
TEXTS = {"analysis": "is it safe", "guidance": "answer how", "response": "kill a process on my computer"}


@pytest.fixture(scope="module")
def scratch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mote_from_scratch", ROOT / "examples" / "mote_from_scratch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    adapter = save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"))
    return mote.load(str(tiny), adapter, device="cpu")


@pytest.fixture(scope="module")
def vocabulary(scratch: ModuleType, loaded: Model) -> Any:
    markers = loaded.markers
    eos = loaded.tokenizer.eos_token_id
    return scratch.Vocabulary(starts=markers.starts, ends=markers.ends, turn=markers.turns[0], eos=eos)


@pytest.fixture(scope="module")
def rebuilt(scratch: ModuleType, loaded: Model, tiny: Path) -> tuple[Any, Any]:
    """The example's model and routing, with the weights of the package's."""
    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        rows = loaded.model.get_input_embeddings().weight.shape[0]
        embedding = loaded.model.get_input_embeddings()(torch.arange(rows)[None])[0]
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.get_input_embeddings().weight.copy_(embedding)
        routing = scratch.add_experts(model, r=4, lora_alpha=loaded.config.lora_alpha)
        theirs = {n.split("model.", 1)[1]: m for n, m in loaded.model.named_modules() if hasattr(m, "mote_A")}
        ours = {n: m for n, m in model.named_modules() if isinstance(m, scratch.StepLinear)}
        assert len(ours) == len(theirs) == 14
        for name, layer in ours.items():
            other = next(module for full, module in theirs.items() if full.endswith(name))
            for expert, rows_A in enumerate(other.mote_A["default"].weight.split(4)):
                layer.lora_A[expert].copy_(rows_A)
            for expert, columns_B in enumerate(other.mote_B["default"].weight.split(4, dim=1)):
                layer.lora_B[expert].copy_(columns_B)
    return model.eval(), routing


@pytest.fixture(scope="module")
def chain() -> ChainRow:
    return ChainRow(
        id="1", messages=(Message(role="user", content=QUESTIONS[0]),), kind="harmful", source="hand",
        steps=tuple(StepText(name=name, text=text) for name, text in TEXTS.items()), safe=True, checks=(),
        rejected=None, model="m", prompts="p", seed=0, tokens=ChainTokens(made=1, kept=1), seconds=0,
    )  # fmt: skip


def encoded(scratch: ModuleType, loaded: Model, vocabulary: Any) -> tuple[list[int], list[int]]:
    prompt = encode_prompt(loaded.tokenizer, (Message(role="user", content=QUESTIONS[0]),))
    steps = {EXPERTS.index(name) + 1: encode_text(loaded.tokenizer, text) for name, text in TEXTS.items()}
    ids, labels = scratch.chain_ids(prompt, steps, vocabulary)
    return ids, labels


def test_ids_labels_and_steps_of_a_chain_agree(
    scratch: ModuleType, loaded: Model, vocabulary: Any, chain: ChainRow
) -> None:
    ids, labels = encoded(scratch, loaded, vocabulary)
    theirs = encode_chain(loaded.tokenizer, chain, loaded.markers, EXPERTS)
    assert ids == theirs.ids and labels == theirs.labels
    assert scratch.step_ids(ids, vocabulary) == theirs.steps


def test_step_ids_agree_on_several_turns(scratch: ModuleType) -> None:
    markers = Markers(starts=(64, 66, 68), ends=(65, 67, 69), turns=(2,))
    vocabulary = scratch.Vocabulary(starts=markers.starts, ends=markers.ends, turn=2, eos=1)
    ids_B_T = some_ids()
    assert [scratch.step_ids(row, vocabulary) for row in ids_B_T.tolist()] == step_ids(ids_B_T, markers).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_masks_and_positions_agree(scratch: ModuleType, seed: int) -> None:
    steps = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    mask, position = scratch.mask_and_positions(steps, scratch.draw_visibility(steps, 0.5, random.Random(seed)))
    visibility = draw_visibility([1, 2, 3], skip_probabilities(0.5, {}, EXPERTS), random.Random(seed))
    steps_T = torch.tensor(steps)
    documents = torch.zeros(1, len(steps), dtype=torch.long)
    assert torch.equal(mask, sdpa_mask(Layout(steps_T[None], visibility[steps_T][None], documents)))
    assert torch.equal(position[0], positions(steps_T, visibility))


@pytest.mark.parametrize("question_expert", [None, 1, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_and_losses_agree_under_step_skipping(
    scratch: ModuleType, loaded: Model, rebuilt: Any, vocabulary: Any, seed: int, question_expert: int | None
) -> None:
    ids, labels = encoded(scratch, loaded, vocabulary)
    steps = scratch.step_ids(ids, vocabulary)
    mask, position = scratch.mask_and_positions(steps, scratch.draw_visibility(steps, 0.5, random.Random(seed)))
    model, routing = rebuilt
    routing.set(steps, question_expert=question_expert)
    given = {"attention_mask": mask, "position_ids": position, "use_cache": False}
    drawn = {} if question_expert is None else {"question_experts": torch.tensor([question_expert])}
    with torch.no_grad():
        ours = model(torch.tensor([ids]), **given).logits[0]
        theirs = loaded.model(input_ids=torch.tensor([ids]), **given, **drawn).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    losses = [cross_entropy(each[:-1], torch.tensor(labels[1:]), ignore_index=-100) for each in (ours, theirs)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    routing.set([min(step + 1, 3) for step in steps], question_expert=question_expert)
    with torch.no_grad():
        wrong = model(torch.tensor([ids]), **given).logits[0]
    assert (wrong - theirs).abs().max() > 0.1  # routed to other experts the logits are others


@pytest.mark.parametrize("mode", ["adaptive", "direct", "full"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_agree(
    scratch: ModuleType, loaded: Model, rebuilt: Any, vocabulary: Any, mode: str, question: str
) -> None:
    chains = {"adaptive": scratch.DEPTHS, "direct": ((3,),), "full": ((1, 2, 3),)}[mode]
    prompt = encode_prompt(loaded.tokenizer, (Message(role="user", content=question),))
    written = scratch.answer(*rebuilt, prompt, vocabulary, chains, max_step_tokens=8)
    theirs = loaded.answer(question, mode, max_step_tokens=8)
    assert tuple(decode_steps(loaded.tokenizer, written, loaded.markers, EXPERTS)) == theirs.steps
    assert len(written) == theirs.tokens.total


def test_the_example_learns_chains_of_every_length(scratch: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    scratch.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:] == [
        "wrote response (word for word)",
        "wrote analysis -> response (word for word)",
        "wrote analysis -> guidance -> response (word for word)",
    ]
