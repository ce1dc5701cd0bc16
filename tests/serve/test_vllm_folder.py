"""The exported vLLM folder, checked without vLLM."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.exports import command, logits, make_adapter
from support.vllm import SMALL, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import mote
from mote.core.errors import UserError
from mote.inference.model import Model
from mote.serve.vllm.export_folder import export_vllm
from mote.serve.vllm.folder_config import ServedConfig
from mote.tokens.encode import special_ids
from mote.tuner.expert_weights import expert_weight_table

WIDE = "\uff1c|response|\uff1e"  # full-width signs
PIECES = ["<|response|>", "<|/response|>", "<|analysis|>", "<|/analysis|>", "<|guidance|>", "<|im_start|>",
          "<|im_end|>", "<|endoftext|>", "<|", "|>", "response", "/", "<", "|", ">", "\u200b", "\ufeff", " ", "\n",
          "\x00", "🙂", "é", WIDE, "&lt;|response|&gt;", "<|RESPONSE|>", "\\u003c|response|\\u003e",
          "kill a process"]  # fmt: skip


@pytest.fixture(scope="module", params=["tied", "untied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "base", tie_word_embeddings=request.param == "tied")
    make_adapter(base, folder / "adapter", rank_pattern={"q_proj": 2}, question_expert="guidance")
    export_vllm(str(folder / "adapter"), folder / "out", "full", dtype="float32", max_step_tokens=9)
    return folder


@pytest.fixture(scope="module")
def model(folders: Path) -> Model:
    loaded: Model = mote.load(str(folders / "base"), folders / "adapter", device="cpu")
    return loaded


@pytest.fixture(scope="module")
def served(folders: Path) -> ServedConfig:
    config = json.loads((folders / "out" / "config.json").read_text())
    assert config["architectures"] == ["MoteLlamaForCausalLM"] and config["model_type"] == "llama"
    return ServedConfig.model_validate(config["mote"])


def test_routing_is_the_adapters(served: ServedConfig, model: Model) -> None:
    assert served.routing == replace(model.markers, end_of_turn=None)  # only training needs it
    assert served.mode == "full" and served.max_step_tokens == 9
    torch.testing.assert_close(torch.tensor(served.gates), expert_weight_table(model.config))
    assert served.modes["adaptive"] == model.scheme.chains_of("adaptive") and "base" not in served.modes
    assert set(served.special) == special_ids(model.tokenizer)


def test_embedding_has_marker_rows_and_the_twin(folders: Path, served: ServedConfig, model: Model) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folders / "out")  # as a plain Llama, without experts
    ids = torch.tensor([[5, 6, served.markers["analysis"][0], 7, served.markers["analysis"][1]]])
    with model.model.disable_adapter():
        inside = [5, 6, 7]
        torch.testing.assert_close(
            logits(plain, torch.tensor([inside]))[..., :300], logits(model.model, torch.tensor([inside]))[..., :300]
        )
    rows = plain.get_input_embeddings()(ids)
    torch.testing.assert_close(rows, model.model.get_input_embeddings()(ids))
    opening, twin = served.opening
    assert twin == len(model.tokenizer)
    assert served.unused == tuple(
        range(twin + 1, plain.config.vocab_size)
    )  # vLLM would copy logits of an unpadded vocabulary
    assert plain.config.vocab_size % 64 == 0 and served.reserved.issuperset(served.unused)
    for matrix in (plain.get_input_embeddings(), plain.get_output_embeddings()):
        assert torch.equal(matrix.weight[twin], matrix.weight[opening])


def test_padded_experts_compute_what_the_adapter_does(folders: Path, served: ServedConfig, model: Model) -> None:
    tensors = load_file(folders / "out" / "experts.safetensors")
    gates = torch.tensor(served.gates).repeat_interleave(served.rank, 1)
    ids = torch.randint(3, 300, (1, 4), generator=torch.Generator().manual_seed(0))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = model.model.base_model.model.get_submodule(name)
        first = tensors[f"{name}.mote_A"]
        second = tensors[f"{name}.mote_B"]
        assert first.shape[0] == second.shape[1] == 4 * served.rank
        seen: list[tuple[Any, Any]] = []
        hook = layer.register_forward_hook(lambda _, given, out, seen=seen: seen.append((given[0], out)))
        for step in range(4):
            logits(model.model, ids, step_ids=torch.full_like(ids, step))
            x, out = seen.pop()
            expected = layer.base_layer(x) + ((x @ first.T) * gates[step]) @ second.T
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        hook.remove()


def test_no_text_encodes_to_a_marker(folders: Path, served: ServedConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders / "out")
    assert not served.reserved & set(tokenizer.get_vocab().values())  # so no text can encode to one
    draw = random.Random(0)
    texts = ["".join(draw.choice(PIECES) for _ in range(draw.randint(1, 8))) for _ in range(10_000)]
    assert all(not served.reserved.intersection(ids) for ids in tokenizer(texts)["input_ids"])
    messages = [{"role": "user", "content": "".join(PIECES)}]
    assert not served.reserved & set(tokenizer.apply_chat_template(messages)["input_ids"])


def test_other_text_is_tokenised_as_by_the_adapter(folders: Path, model: Model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders / "out")
    messages = [{"role": "user", "content": "how do I kill\na process? 🙂"}]
    for add in (True, False):
        ids = [
            t.apply_chat_template(messages, add_generation_prompt=add)["input_ids"]
            for t in (tokenizer, model.tokenizer)
        ]
        assert ids[0] == ids[1]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (model.tokenizer.eos_token, model.tokenizer.pad_token)
    assert special_ids(tokenizer) == special_ids(model.tokenizer) - {
        id_ for pair in model.config.markers.values() for id_ in pair
    }


def test_folder_keeps_all_stop_ids_of_the_base_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "generation_config.json").read_text())
    stop = 7  # an ordinary token at which the model's own generate stops
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], stop]}))
    make_adapter(base, tmp_path / "adapter")
    export_vllm(str(tmp_path / "adapter"), tmp_path / "out")
    served = ServedConfig.model_validate(json.loads((tmp_path / "out" / "config.json").read_text())["mote"])
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [served.markers["response"][1], served.eos, stop] and {served.eos, stop} <= set(served.special)


def test_sharded_models_index_names_the_experts(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda self, to: save(self, to, max_shard_size="100KB"))
    export_vllm(str(folders / "adapter"), tmp_path / "out")
    named = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert named["model.layers.0.self_attn.q_proj.mote_A"] == "experts.safetensors"
    assert set(load_file(tmp_path / "out" / "experts.safetensors")) < set(named)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "base"], "mode: 'base' cannot be the served model's own; use one of"),
        (["--mode", "deep"], "mode: 'deep' cannot be the served model's own; use one of"),
        (["--mode", "full", "--mode", "direct"], "an exported model has one default mode; give --mode once"),
    ],
)
def test_unservable_modes_are_refused(
    folders: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    given = ["--adapter", folders / "adapter", "--format", "vllm", "--out", out, *arguments]
    assert command(monkeypatch, *given) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    from support.exports import make_base as make_other

    make_adapter(make_other("gpt2", tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"vLLM serves step experts on llama, mistral, .* not on gpt2; use mote serve"):
        export_vllm(str(tmp_path / "adapter"), tmp_path / "out")


def test_separate_models_are_refused(folders: Path, tmp_path: Path) -> None:
    make_adapter(folders / "base", tmp_path / "adapter", whole_rows=True, mix=1.0)
    with pytest.raises(UserError, match=r"is a model for each step .* use `mote answer`, or --format engine-steps"):
        export_vllm(str(tmp_path / "adapter"), tmp_path / "out")


def test_export_command_writes_the_folder(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "--adapter",
        folders / "adapter",
        "--format",
        "vllm",
        "--out",
        tmp_path / "out",
        "answer.max_step_tokens=11",
    ]
    assert command(monkeypatch, *given) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mote"]["mode"], config["mote"]["max_step_tokens"]) == ("adaptive", 11)
    assert config["hidden_size"] == SMALL["hidden_size"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "experts.safetensors", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
