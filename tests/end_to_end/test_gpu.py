"""What runs on a GPU against the CPU reference, in float32 and bfloat16: `pytest -m gpu` on a machine with CUDA.

Each test records its relative errors; `benchmarks/gpu.py --part correct` collects them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import QUESTIONS, config, some_ids
from support.chain_tokens import some_chains
from support.gpu import DEVICE, LIMITS, Measure, gradients, llama, on_both, relative_error
from support.reference import slow_layer
from support.training import SCHEME, chains, recipe, rows_of
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StaticCache

import mote
from mote.core.generation import Sampling
from mote.inference.batching import Batcher
from mote.inference.grammar import FreeText
from mote.inference.request import Request
from mote.models.load import load_base
from mote.tokens.encode import IGNORED
from mote.tokens.masks import Layout, block_mask, sdpa_mask, skip_probabilities
from mote.tokens.packing import ChainDataset, collate
from mote.tokens.routing import step_ids
from mote.train import train
from mote.train.trainer import token_weights
from mote.tuner.experts import plain
from mote.tuner.layer import MoteLinear

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")]
both_dtypes = pytest.mark.parametrize("dtype", list(LIMITS), ids=lambda dtype: str(dtype).removeprefix("torch."))
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
MASKS = {"sdpa": sdpa_mask, "flex_attention": block_mask}
HALF = skip_probabilities(0.5, {}, ("analysis", "guidance", "response"))


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Each shape and dtype is compiled again, and beyond a limit FlexAttention would run uncompiled."""
    torch._dynamo.reset()


def packed(draws: int = 1, row_length: int | None = 160, count: int = 6) -> dict[str, Tensor]:
    """A batch of packed chains with skipped steps."""
    data = ChainDataset(some_chains(count, seed=3), HALF, 3, row_length, draws)
    return collate([data[row] for row in range(len(data))], pad_id=0)


def weighted_loss(model: Any, batch: dict[str, Tensor], make_mask: Any, device: str) -> Tensor:
    """The trainer's loss: of each label, weighted, over the sum of weights."""
    inputs = {name: value.to(device) for name, value in batch.items()}
    weights = token_weights(inputs, torch.ones(4))
    labels = inputs.pop("labels")[:, 1:]
    mask = make_mask(Layout(inputs.pop("segment_ids"), inputs.pop("visibility"), inputs["document_ids"]))
    del inputs["weights"]
    logits = model(**inputs, attention_mask=mask, use_cache=False).logits[:, :-1].transpose(1, 2)
    losses = cross_entropy(logits.to(weights.dtype), labels, reduction="none", ignore_index=IGNORED)
    return (losses * weights).sum() / weights.sum()


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The loss on ids whose question is read by the experts of steps 1, 2 and 3."""
    ids = ids.to(model.device)
    loss: Tensor = model(input_ids=ids, labels=ids, question_experts=torch.arange(1, len(ids) + 1)).loss
    return loss


# --- equation, routing, gradients


@both_dtypes
def test_each_layer_equals_the_equation(dtype: torch.dtype, measure: Measure) -> None:
    model, reference = on_both(dtype)
    ids = some_ids()
    steps = step_ids(ids, config().routing)
    wanted = {name: layer for name, layer in reference.named_modules() if isinstance(layer, MoteLinear)}
    pairs: list[tuple[Tensor, Tensor]] = []

    def compare(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, out: Tensor) -> None:
            given = config(r=8, lora_alpha=16)
            pairs.append((out, slow_layer(wanted[name], given, args[0].double().cpu(), steps)))

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, MoteLinear):
            layer.register_forward_hook(compare(name))
    with torch.no_grad():
        model(input_ids=ids.to(DEVICE), use_cache=False)
    assert len(pairs) == len(wanted) == 14
    measure("layers", *zip(*pairs, strict=True), limit=LIMITS[dtype])


def test_steps_of_ids_on_the_device_are_those_of_the_cpu() -> None:
    ids = some_ids(8, 64)
    documents = (torch.arange(64) // 24).expand(8, -1)
    for given in (None, documents):
        there = None if given is None else given.to(DEVICE)
        found = step_ids(ids.to(DEVICE), config().routing, there)
        assert found.device.type == DEVICE and torch.equal(found.cpu(), step_ids(ids, config().routing, given))


@both_dtypes
def test_logits_and_gradients_equal_those_of_the_cpu(dtype: torch.dtype, measure: Measure) -> None:
    model, reference = on_both(dtype)
    ids = some_ids()
    with torch.no_grad():
        measure("logits", model(ids.to(DEVICE)).logits, reference(ids).logits, limit=LIMITS[dtype])
    for each in (model, reference):
        loss_of(each.train(), ids).backward()  # type: ignore[no-untyped-call]
    measure("gradients", gradients(model), gradients(reference), limit=LIMITS[dtype])


@both_dtypes
def test_checkpointed_gradients_equal_those_of_the_cpu(dtype: torch.dtype, measure: Measure) -> None:
    """Two forward passes before one backward pass, so that the steps of the other one would be seen."""
    model, reference = on_both(dtype)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (model, reference):
        each.train()
        first, second = loss_of(each, some_ids()), loss_of(each, some_ids().flip(1))
        (first + 2 * second).backward()  # type: ignore[no-untyped-call]
    measure("gradients", gradients(model), gradients(reference), limit=LIMITS[dtype])


@both_dtypes
def test_compiled_gradients_equal_those_of_the_cpu(dtype: torch.dtype, measure: Measure) -> None:
    model, reference = on_both(dtype)
    for block in model.get_base_model().model.layers:
        block.compile(dynamic=False, backend="inductor" if DEVICE == "cuda" else "eager")
    for each in (model, reference):
        loss_of(each.train(), some_ids()).backward()  # type: ignore[no-untyped-call]
    measure("gradients", gradients(model), gradients(reference), limit=LIMITS[dtype])


# --- masks, packing, draws


def test_masks_made_on_the_device_are_those_of_the_cpu() -> None:
    batch = packed(draws=2)
    given = Layout.of(batch)
    there = Layout.of({name: value.to(DEVICE) for name, value in batch.items()})
    wanted = sdpa_mask(given)
    assert torch.equal(sdpa_mask(there).cpu(), wanted)
    blocks = block_mask(there)
    length = torch.arange(wanted.shape[-1], device=DEVICE)
    row = torch.arange(len(wanted), device=DEVICE)[:, None, None]
    assert blocks.kv_num_blocks.device.type == DEVICE
    assert torch.equal(blocks.mask_mod(row, 0, length[:, None], length).cpu(), wanted[:, 0])


@both_dtypes
def test_flex_attention_equals_masked_attention(
    dtype: torch.dtype, with_flex: Callable[..., Tensor], measure: Measure
) -> None:
    """Output and gradients, with grouped heads, on rows of several blocks some of which have no edge."""
    batch = packed(row_length=600, count=40)
    given = Layout.of(batch)
    rows, length = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(rows, n, length, 64, generator=generator).to(dtype) for n in (4, 2, 2)]
    upstream = torch.randn(rows, 4, length, 64, generator=generator).to(dtype)
    here = [head.double().requires_grad_() for head in heads]
    there = [head.to(DEVICE).requires_grad_() for head in heads]
    blocks = block_mask(Layout.of({name: value.to(DEVICE) for name, value in batch.items()}))
    assert blocks.sparsity() > 50
    found = with_flex(*there, block_mask=blocks, enable_gqa=True)
    wanted = scaled_dot_product_attention(*here, attn_mask=sdpa_mask(given), enable_gqa=True)
    measure("output", found, wanted, limit=max(LIMITS[dtype], 1e-3))  # float32 scores are computed in TF32
    measure(
        "gradients",
        torch.autograd.grad(found, there, upstream.to(DEVICE)),
        torch.autograd.grad(wanted, here, upstream.double()),
        limit=max(LIMITS[dtype], 1e-3),
    )


@both_attentions
@both_dtypes
@pytest.mark.parametrize("draws", [1, 2], ids=["one draw", "two draws"])
def test_packed_rows_have_the_loss_and_gradients_of_the_cpu(
    dtype: torch.dtype, attention: str, draws: int, with_flex: Any, measure: Measure
) -> None:
    model, reference = on_both(dtype)
    model.get_base_model().set_attn_implementation(attention)
    batch = packed(draws)
    found = weighted_loss(model.train(), batch, MASKS[attention], DEVICE)
    wanted = weighted_loss(reference.train(), batch, sdpa_mask, "cpu")
    found.backward()  # type: ignore[no-untyped-call]
    wanted.backward()  # type: ignore[no-untyped-call]
    limit = max(LIMITS[dtype], 1e-3 if attention == "flex_attention" else 0)
    measure("loss", found, wanted, limit=limit)
    measure("gradients", gradients(model), gradients(reference), limit=limit)


@both_dtypes
def test_gradients_of_another_mask_are_beyond_the_limit(dtype: torch.dtype) -> None:
    """Negative control: with nothing skipped."""
    model, reference = on_both(dtype)
    batch = packed()
    others = {**batch, "visibility": torch.ones_like(batch["visibility"])}
    weighted_loss(model.train(), others, sdpa_mask, DEVICE).backward()  # type: ignore[no-untyped-call]
    weighted_loss(reference.train(), batch, sdpa_mask, "cpu").backward()  # type: ignore[no-untyped-call]
    assert relative_error(gradients(model), gradients(reference)) > 2 * LIMITS[dtype]


# --- training, saving, loading


@both_attentions
def test_a_training_run_follows_that_of_the_cpu(
    attention: str, tmp_path: Path, with_flex: Any, monkeypatch: pytest.MonkeyPatch, measure: Measure
) -> None:
    """`mote train` in float32 with step skipping, packing and held-out chains; then its adapter is loaded."""
    if DEVICE == "cpu":
        monkeypatch.setattr("mote.train.stage.uses_flex_attention", lambda given, _: given.train.attention != "sdpa")
    folder = model_with_tokenizer(tmp_path)
    losses = {}
    for place, device, kind in (("there", DEVICE, attention), ("here", "cpu", "sdpa")):
        given = recipe(folder, attention=kind, packing=True, max_length=256, skip_p=0.5, num_train_epochs=3)
        base = load_base(str(folder), device=device, dtype="float32")
        train(base, chains(12), SCHEME, given.model_copy(update={"device": device}), tmp_path / place)
        losses[place] = [row["eval_loss"] for row in rows_of(tmp_path / place, "eval_loss")]
    assert len(losses["here"]) == 3 and losses["here"][0] > losses["here"][-1]
    measure("held-out losses", torch.tensor(losses["there"]), torch.tensor(losses["here"]), limit=2e-3)
    answers = {
        device: mote.load(str(folder), tmp_path / "there" / "adapter", device=device, dtype="float32")
        .answer(QUESTIONS, mode="full", max_step_tokens=12)
        for device in (DEVICE, "cpu")
    }  # fmt: skip
    assert [answer.steps for answer in answers[DEVICE]] == [answer.steps for answer in answers["cpu"]]


@both_dtypes
def test_saved_and_loaded_logits_are_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = on_both(dtype)
    ids = some_ids().to(DEVICE)
    with torch.no_grad():
        before = model(ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(llama().to(dtype).to(DEVICE), tmp_path, autocast_adapter_dtype=False).eval()
        assert again.device.type == DEVICE and torch.equal(again(ids).logits, before)
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, before)


def test_experts_in_the_dtype_of_the_model_give_equal_logits(tmp_path: Path) -> None:
    """As `mote.load` stores them on a GPU; training keeps them in float32."""
    model, _ = on_both(torch.float32)
    model.save_pretrained(tmp_path)
    ids = some_ids().to(DEVICE)
    logits = []
    for as_trained in (True, False):
        base = llama().to(torch.bfloat16).to(DEVICE)
        again = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=as_trained).eval()
        kinds = {p.dtype for name, p in again.named_parameters() if "mote_" in name}
        assert kinds == {torch.float32 if as_trained else torch.bfloat16}
        with torch.no_grad():
            logits.append(again(ids).logits)
    assert torch.equal(*logits)


# --- decoding


@both_dtypes
@pytest.mark.parametrize("static", [False, True], ids=["growing cache", "static cache"])
def test_decoded_logits_equal_those_of_the_whole_text(dtype: torch.dtype, static: bool, measure: Measure) -> None:
    model, reference = on_both(dtype)
    ids = some_ids()
    there = ids.to(DEVICE)
    with torch.no_grad():
        cache = StaticCache(config=llama().config, max_cache_len=ids.shape[1]) if static else None
        found = []
        for begin, end in ((0, 8), *((t, t + 1) for t in range(8, ids.shape[1]))):
            out = model(
                input_ids=there[:, begin:end], past_key_values=cache, use_cache=True, context_ids=there[:, :end]
            )
            cache = out.past_key_values
            found.append(out.logits)
        measure("logits", torch.cat(found, 1), reference(ids).logits, limit=LIMITS[dtype])


def requests(scored: int = 0) -> list[Request]:
    """Prompts of several lengths; two of three share their beginning."""
    rows = some_ids(9, 40)
    rows[3:6, :20] = rows[3, :20]
    made = []
    for i, row in enumerate(rows):
        ids = row[: 24 + i].tolist()
        shared = 18 if 3 <= i < 6 else 0
        made.append(Request(ids, FreeText(()), 0 if scored else 6 + i, shared, Sampling(), scored=scored))
    return made


def test_running_batch_generates_the_tokens_of_generate() -> None:
    model, _ = on_both(torch.float32)
    running = Batcher(model, 4, config().routing)
    written = [future.result(120) for future in [running.submit(request) for request in requests()]]
    for request, tokens in zip(requests(), written, strict=True):
        ids = torch.tensor([list(request.ids)], device=DEVICE)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.limit, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert tokens == out[0, ids.shape[1] :].tolist()


@both_dtypes
def test_running_batch_scores_texts_as_the_cpu(dtype: torch.dtype, measure: Measure) -> None:
    model, reference = on_both(dtype)
    running = Batcher(model, 4, config().routing)
    asked = requests(scored=5)
    found = [future.result(120) for future in [running.submit(request) for request in asked]]
    wanted = []
    with torch.no_grad():
        for request in asked:
            ids = torch.tensor([list(request.ids)])
            scores = reference(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            wanted.append(scores[-5:].mean())
    measure("log-probabilities", torch.tensor(found), torch.stack(wanted), limit=LIMITS[dtype])


@pytest.mark.parametrize("mode", ["direct", "full", "adaptive", "base"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_of_a_mode_are_those_of_the_cpu(tiny: Path, adapter: Path, mode: str, temperature: float) -> None:
    answers = {}
    for device in (DEVICE, "cpu"):
        model = mote.load(str(tiny), adapter, device=device, dtype="float32")
        answers[device] = model.answer(QUESTIONS, mode=mode, max_step_tokens=12, temperature=temperature)
    for found, wanted in zip(answers[DEVICE], answers["cpu"], strict=True):
        assert (found.steps, found.answer, found.tokens) == (wanted.steps, wanted.answer, wanted.tokens)


# --- 4-bit weights


@pytest.mark.parametrize("bits", ["8-bit", "4-bit"])
def test_quantised_layers_train_like_dequantised_ones(bits: str, tmp_path: Path, measure: Measure) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    llama().save_pretrained(tmp_path)
    kind = BitsAndBytesConfig(
        load_in_8bit=bits == "8-bit", load_in_4bit=bits == "4-bit", bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=kind, dtype=torch.float32, device_map={"": DEVICE}
    )
    torch.manual_seed(1)
    model = get_peft_model(base, config(r=8, lora_alpha=16)).train()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    if bits == "8-bit":
        weight = layer.base_layer.weight.data.float() * layer.base_layer.weight.SCB[:, None] / 127
    else:
        weight = bnb.functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    seen: dict[str, Any] = {}

    def look(module: Any, args: Any, out: Tensor) -> None:
        seen.update(x=args[0].detach(), out=out.detach(), gate=layer.router.route("default", 8).weights)

    layer.register_forward_hook(look)
    loss_of(model, some_ids()).backward()  # type: ignore[no-untyped-call]
    experts = [layer.mote_A["default"].weight, layer.mote_B["default"].weight]
    x, gate, weight, *ab = (part.double().cpu() for part in (seen["x"], seen["gate"], weight, *experts))
    # The 8-bit layer rounds its input as well, by up to 1/254 of a row's largest value.
    limit = 2e-2 if bits == "8-bit" else 1e-4
    measure("output", seen["out"], plain(x, x @ weight.t(), *ab, gate), limit=limit)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model))


def model_with_tokenizer(folder: Path) -> Path:
    """Folder of a model with heads of 16 and the tiny model's tokenizer."""
    from support.tiny import make_tiny_model
    from transformers import AutoTokenizer

    where = make_tiny_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(where)
    model = llama(len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(where)
    return where
