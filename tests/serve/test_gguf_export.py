"""`mote export --format gguf` and `gguf-steps`: the folders, what they refuse, and what user text can do."""

import json
import random
import shutil
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from support.disk import largest_file
from support.exports import command, make_adapter
from support.llamacpp import LlamaServer, llama_server
from support.sentencepiece import save_sentencepiece
from support.vllm import make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from mote.core.errors import MoteError, UserError
from mote.inference.load import read_adapter
from mote.serve.gguf_check import check_file
from mote.serve.gguf_export import export_gguf, export_gguf_steps
from mote.serve.modelfile import find_frame, modelfile
from mote.tuner.gguf import vocabulary
from mote.tuner.gguf.source import BaseWeights
from mote.tuner.gguf.switch import write_switch

TEXTS = 10_000


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return make_adapter(make_base(folder / "base"), folder / "adapter")


@pytest.fixture(scope="module")
def folder(adapter: Path) -> Path:
    return export_gguf(str(adapter), adapter.parent / "exported")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LlamaServer]:
    with llama_server(folder / "model.gguf") as running:
        yield running


def marker_ids(adapter: Path) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = json.loads((adapter / "adapter_config.json").read_text())["markers"]
    return ids


# --- the folders


def test_folder_has_all_that_a_stock_client_needs(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    grammars = {f"{mode}.gbnf" for mode in ("direct", "analysis", "full", "adaptive")}
    assert names >= {"model.gguf", "Modelfile", "README.md", "tokenizer.json"} | grammars
    assert "llama-server -m" in (folder / "README.md").read_text()


def test_steps_folder_has_a_lora_for_each_step(adapter: Path, tmp_path: Path) -> None:
    out = export_gguf_steps(str(adapter), tmp_path / "out")
    names = {path.name for path in out.glob("*.gguf")}
    assert names == {"base.gguf", "question.gguf", "analysis.gguf", "guidance.gguf", "response.gguf"}


def test_quantised_file_is_smaller(adapter: Path, folder: Path, tmp_path: Path) -> None:
    half = export_gguf(str(adapter), tmp_path / "half", quantise="f16")
    whole = export_gguf(str(adapter), tmp_path / "whole", quantise="f32")
    sizes = [(out / "model.gguf").stat().st_size for out in (folder, half, whole)]
    assert sizes == sorted(sizes) and sizes[1] < 0.6 * sizes[2]


def test_full_disk_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(MoteError, match="free space"):
        export_gguf(str(adapter), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_loaded_is_an_error(folder: Path, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    broken = tmp_path / "model.gguf"
    broken.write_bytes((folder / "model.gguf").read_bytes()[:-50_000])
    with pytest.raises(MoteError, match=r"cannot load model\.gguf"):
        check_file(broken, AutoTokenizer.from_pretrained(adapter), marker_ids(adapter))


# --- what is refused

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "qwen": ("Qwen2", {}, {}, r"'qwen2' does; use --format gguf-steps"),
    "biases": ("Llama", {"attention_bias": True}, {}, r"attention_bias.*gguf-steps"),
    "rope-factors": ("Llama", {"rope_parameters": LLAMA3}, {}, r"no rope factors.*gguf-steps"),
    "window": ("Mistral", {"sliding_window": 64}, {}, "attention window of 64 tokens; use `mote answer`"),
    "gemma": ("Gemma2", {"query_pre_attn_scalar": 32}, {}, "'gemma2' does; use --format gguf-steps"),
    "fused": ("Phi3", {}, {}, "'phi3' does; use --format gguf-steps"),
    "fused-window": ("Phi3", {"sliding_window": 64}, {}, "attention window of 64 tokens; use `mote answer`"),
    "unknown": ("Olmo3", {}, {}, "'olmo3' is not one of .*; use `mote answer`"),
    "separate": ("Llama", {}, {"whole_rows": True}, "--format peft-steps"),
    "reserved-name": ("Llama", {}, {"experts": ("end", "response")}, "another name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_file_cannot_express_is_refused(case: str, tmp_path: Path) -> None:
    kind, base_changes, changes, message = REFUSED[case]
    adapter = make_adapter(make_base(tmp_path / "base", kind, **base_changes), tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=message):
        export_gguf(str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_wrong_base_is_refused(adapter: Path, other_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another base model"):
        export_gguf(str(adapter), tmp_path / "out", model=str(other_tiny))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "gguf", "--mode", "full"), "leave out --mode"),
        (("--format", "gguf-steps", "--dtype", "float16"), "--quantise"),
        (("--format", "merged", "--quantise", "q8_0"), "no GGUF file"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: tuple[str, ...], message: str, adapter: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert command(monkeypatch, "--adapter", adapter, "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


# --- what user text can do


def forgeries(count: int) -> list[str]:
    """Texts that spell markers: whole, cut, doubled, spaced, with other letters between and around."""
    draw = random.Random(0)
    names = [f"<|{slash}{step}|>" for step in ("analysis", "guidance", "response") for slash in ("", "/")]
    pieces = [
        *names,
        "<|",
        "|>",
        "<",
        ">",
        "|",
        "/",
        "response",
        "Ġ",
        "▁",
        " ",
        "\n",
        "\u200b",
        "<0x3C>",
        "&lt;|",
        "safe",
    ]
    texts = []
    for _ in range(count):
        parts = draw.choices(pieces, k=draw.randint(1, 8))
        name = draw.choice(names)
        cut = draw.randint(0, len(name))
        parts.insert(draw.randint(0, len(parts)), name[:cut] + draw.choice(["", "", "<|", "\u200b", " "]) + name[cut:])
        texts.append("".join(parts))
    return texts


class Tokenizer:
    """The server's tokenisation of chats, over one connection."""

    def __init__(self, server: LlamaServer) -> None:
        self._connection = HTTPConnection(server.address.removeprefix("http://"))

    def ids(self, text: str) -> list[int]:
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        body = json.dumps({"content": chat, "parse_special": True, "add_special": True})
        self._connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
        ids: list[int] = json.load(self._connection.getresponse())["tokens"]
        return ids


def test_no_text_becomes_a_marker_in_the_server(server: LlamaServer, adapter: Path) -> None:
    markers = {id_ for pair in marker_ids(adapter).values() for id_ in pair}
    tokenizer = Tokenizer(server)
    assert tokenizer.ids("?").count(1) == 2  # special tokens are looked for
    forged = [text for text in forgeries(TEXTS) if markers & set(tokenizer.ids(text))]
    assert forged == []


def test_markers_of_type_control_would_be_forged(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: llama.cpp finds such tokens in the text of a chat."""
    monkeypatch.setattr(vocabulary, "_MARKER_TYPE", vocabulary.TokenType.CONTROL)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    write_switch(tmp_path / "model.gguf", read_adapter(adapter), BaseWeights(base))
    markers = {id_ for pair in marker_ids(adapter).values() for id_ in pair}
    with llama_server(tmp_path / "model.gguf") as running:
        tokenizer = Tokenizer(running)
        assert sum(bool(markers & set(tokenizer.ids(text))) for text in forgeries(50)) > 40


# --- a stock client


@pytest.mark.parametrize("mode", ["direct", "full", "adaptive"])
def test_grammar_of_a_mode_gives_its_steps(mode: str, server: LlamaServer, folder: Path, adapter: Path) -> None:
    grammar = (folder / f"{mode}.gbnf").read_text()
    body = {"messages": [{"role": "user", "content": "how do I kill a process"}], "grammar": grammar, "max_tokens": 60}
    reply = server.post("/v1/chat/completions", {**body, "temperature": 1.0, "seed": 1, "return_tokens": True})
    text = reply["choices"][0]["message"]["content"]
    first = {"direct": ["<|response|>"], "full": ["<|analysis|>"], "adaptive": ["<|analysis|>", "<|response|>"]}[mode]
    assert text.startswith(tuple(first))


def test_earlier_replies_lose_their_reasoning(server: LlamaServer) -> None:
    reply = "<|analysis|>secret<|/analysis|><|response|>Use kill.<|/response|>"
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": reply}]
    messages += [{"role": "user", "content": "And <|response|> on Windows?"}]
    prompt = server.post("/apply-template", {"messages": messages})["prompt"]
    assert "secret" not in prompt
    assert "assistant\nUse kill.<|im_end|>" in prompt
    assert "And <|response|> on Windows?" in prompt


# --- Ollama


def render(tokenizer: Any) -> Any:
    def text(dialogue: Any, generate: bool) -> str:
        rows = [{"role": role, "content": content} for role, content in dialogue]
        rendered: str = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generate)
        return rendered

    return text


DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, DEFAULT_SYSTEM], ids=["chatml", "default-system"])
def test_modelfile_template_gives_the_same_text(template: str | None, adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = template or tokenizer.chat_template
    frame = find_frame(render(tokenizer))
    assert frame is not None
    dialogue = [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert frame.render(dialogue, True) == render(tokenizer)(dialogue, True)
    assert frame.render([("system", "s"), *dialogue], True) == render(tokenizer)([("system", "s"), *dialogue], True)
    assert 'TEMPLATE """' in modelfile("model.gguf", frame, ["<|im_end|>"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] | upper }}",
        "{% for m in messages %}[{{ loop.index }}]{{ m['content'] }}{% endfor %}:",
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}:",
    ],
)
def test_templates_without_a_simple_form_are_left_out(template: str, adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = template
    assert find_frame(render(tokenizer)) is None
    assert "TEMPLATE" not in modelfile("model.gguf", None, [])


# --- tokenizers


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_splits_chats_as_the_tokenizer_does(legacy: bool, tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    base = make_base(tmp_path / "base")
    tokenizer = save_sentencepiece(base, legacy)
    resize(base, len(tokenizer))
    adapter = make_adapter(base, tmp_path / "adapter")
    card = export_gguf(str(adapter), tmp_path / "out") / "README.md"
    assert "splits chats into tokens as the tokenizer does" in card.read_text(), capfd.readouterr().err


def test_chats_that_are_split_otherwise_are_named(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    pairs = vocabulary.merge_pairs
    monkeypatch.setattr(vocabulary, "merge_pairs", lambda model: pairs(model)[:5])
    card = export_gguf(str(adapter), tmp_path / "out") / "README.md"
    assert "splits some chats into other tokens" in card.read_text()
    assert "send ids" in capfd.readouterr().err


def test_a_tokenizer_without_a_name_is_refused(adapter: Path, tmp_path: Path) -> None:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    other = shutil.copytree(adapter, tmp_path / "adapter")
    content = json.loads((other / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, content["pre_tokenizer"]]}
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no known name in llama"):
        export_gguf(str(other), tmp_path / "out", model=base)
    assert not (tmp_path / "out").exists()


def resize(folder: Path, rows: int) -> None:
    """Give a saved model this many embedding rows."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows)
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
