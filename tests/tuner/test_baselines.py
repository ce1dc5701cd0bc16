"""Token-gated experts against a slow loop over tokens, and their balance loss against its formula."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mote.tokens.masks import PADDING
from mote.tokens.routing import NO_STEP
from mote.tuner.token_gated import TokenGatedConfig, gate_loss, gated_layers
from mote.tuner.token_gated.layer import TokenGatedLinear, choose, contrastive_loss, switch_loss

DISPATCHES: tuple[Any, ...] = ("gather", "dense")


def gated(**changes: Any) -> TokenGatedLinear:
    torch.manual_seed(0)
    layer = TokenGatedLinear(nn.Linear(12, 20))
    layer.update_layer("default", TokenGatedConfig(**{"r": 3, "lora_alpha": 6, "init_weights": False, **changes}))
    return layer.train()


def parts(layer: TokenGatedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, A and B."""
    return layer.token_gated_gate["default"], layer.token_gated_A["default"], layer.token_gated_B["default"]


def on_tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(), TokenGatedConfig(**{"r": 2, **changes}))


def tiny_llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
        )
    )  # fmt: skip


def slow(layer: TokenGatedLinear, x: Tensor) -> Tensor:
    """Reference: a loop over tokens and experts."""
    out = layer.base_layer(x).clone()
    config = layer.configs["default"]
    (gate, first, second) = parts(layer)
    for row, token in [(row, token) for row in range(x.shape[0]) for token in range(x.shape[1])]:
        vector = x[row, token]
        probabilities = torch.softmax(gate @ vector, dim=0).tolist()
        best = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])[: config.top_k]
        total = sum(probabilities[e] for e in best)
        for e in best:
            hidden = first[e] @ vector
            out[row, token] += probabilities[e] / total * config.lora_alpha / config.r * (second[e].t() @ hidden)
    return out


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (4, 1), (3, 3), (1, 1)])
def test_layer_equals_a_loop_over_tokens(dispatch: Any, experts: int, top_k: int) -> None:
    layer = gated(dispatch=dispatch, gated_experts=experts, top_k=top_k)
    x = torch.randn(3, 5, 12)
    assert torch.allclose(layer(x), slow(layer, x), atol=1e-5)
    if top_k < experts:
        other = gated(dispatch=dispatch, gated_experts=experts, top_k=top_k + 1)
        assert not torch.allclose(other(x), slow(layer, x), atol=1e-2)


def test_both_dispatches_have_the_same_outputs_and_gradients() -> None:
    x = torch.randn(2, 9, 12)
    gradients = []
    for dispatch in DISPATCHES:
        layer = gated(dispatch=dispatch)
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        assert layer.loss is not None
        (out.square().mean() + layer.loss).backward()
        found = (out, inputs.grad, *(part.grad for part in parts(layer)))
        assert all(part is not None and bool(part.any()) for part in found)
        gradients.append(found)
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_layer_runs_under_autocast(dispatch: Any) -> None:
    layer = gated(dispatch=dispatch)
    x = torch.randn(2, 9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.allclose(out.float(), layer(x), atol=0.1)
    out.sum().backward()


def test_an_expert_that_no_token_chose_is_left_alone() -> None:
    layer = gated(top_k=1)
    gate, first, _ = parts(layer)
    nn.init.zeros_(gate)
    nn.init.ones_(gate[0])
    layer(torch.rand(2, 4, 12)).sum().backward()
    assert first.grad is not None and first.grad[0].any() and not first.grad[1:].any()
    assert layer.use_E is not None and layer.use_E.tolist() == [1, 0, 0, 0]


def test_balance_loss_equals_its_formula() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    weights, chosen = choose(probabilities, 2)
    assert chosen.tolist() == [[0, 1], [0, 2], [0, 1], [2, 1]]
    assert torch.allclose(weights[0], torch.tensor([0.7, 0.2]) / 0.9)
    by_hand = 3 * (3 / 8 * 1.9 / 4 + 3 / 8 * 0.9 / 4 + 2 / 8 * 1.2 / 4)
    assert float(switch_loss(probabilities, chosen)) == pytest.approx(by_hand)


def test_balance_loss_is_least_where_all_experts_are_used_evenly() -> None:
    even = torch.full((4, 4), 0.25)
    pairs = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    assert float(switch_loss(even, pairs)) == pytest.approx(1)
    for skew in torch.rand(20, 1, 4, generator=torch.Generator().manual_seed(0)):
        probabilities = skew.softmax(-1).expand(4, 4)  # all tokens lean to the same experts
        assert float(switch_loss(probabilities, choose(probabilities, 2)[1])) > 1


def test_contrastive_loss_equals_its_formula() -> None:
    outputs = torch.tensor([[3.0, 0.0], [0.0, 0.5], [2.0, 2.0], [0.0, 0.0], [1.0, -1.0]])
    experts = [0, 1, 0, 1, 2]
    temperature = 0.5
    total = 0.0
    count = 0
    vectors = [row / max(1.0, float(row.norm())) for row in outputs]
    for i, own in enumerate(experts):
        others = [j for j in range(5) if j != i]
        score = {j: math.exp(float(vectors[i] @ vectors[j]) / temperature) for j in others}
        alike = [score[j] for j in others if experts[j] == own]
        if alike:
            total, count = total - math.log(sum(alike) / sum(score.values())), count + 1
    assert count == 4  # expert 2 has one output
    assert float(contrastive_loss(outputs, torch.tensor(experts), temperature)) == pytest.approx(total / count)
    assert float(contrastive_loss(outputs[:2], torch.tensor([0, 1]), temperature)) == 0


def test_contrastive_loss_prefers_experts_that_differ() -> None:
    experts = torch.arange(12) % 3
    alike = torch.ones(12, 8)
    distinct = 4 * torch.eye(8)[experts]
    assert float(contrastive_loss(distinct, experts, 0.1)) < 1e-3 < 1 < float(contrastive_loss(alike, experts, 0.1))
    start = torch.zeros(12, 8).requires_grad_()
    contrastive_loss(start, experts, 0.1).backward()
    assert start.grad is not None and start.grad.isfinite().all()


def test_contrastive_loss_trains_the_experts() -> None:
    layer, plain = gated(contrast=0.5), gated()
    x = torch.randn(2, 9, 12)
    layer(x)
    plain(x)
    assert layer.loss is not None and plain.loss is not None and layer.loss > plain.loss
    layer.loss.backward()
    assert all(part.grad is not None and part.grad.any() for part in parts(layer))


def test_only_gates_and_experts_of_linear_layers_are_trained() -> None:
    logits = tiny_llama()(torch.arange(6)[None]).logits
    model = on_tiny_llama()
    assert len(list(gated_layers(model))) == 2 * 7 and isinstance(model.lm_head, nn.Linear)
    assert torch.equal(model(torch.arange(6)[None]).logits, logits)  # B is zero
    assert all("token_gated_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert len(list(gated_layers(on_tiny_llama(target_modules=["q_proj", "v_proj"])))) == 2 * 2


def test_steps_may_be_given_and_change_nothing() -> None:
    """As in training, where the batch holds what step experts need."""
    model = on_tiny_llama(init_weights=False).eval()
    ids = torch.arange(12).reshape(2, 6)
    steps = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)
    given = {"step_ids": steps, "document_ids": steps.clamp_max(PADDING), "question_experts": steps.clamp_max(0)}
    assert torch.equal(model(ids, **given).logits, model(ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    steps[0] = NO_STEP  # a row of the base model in a running batch
    mixed = model(ids, step_ids=steps).logits
    plain = tiny_llama()(ids).logits
    assert torch.allclose(mixed[0], plain[0], atol=1e-6) and torch.allclose(mixed[1], model(ids).logits[1], atol=1e-5)


def test_gate_loss_is_the_mean_over_layers_and_reaches_the_gates() -> None:
    model = on_tiny_llama(balance=0.5).train()
    with pytest.raises(RuntimeError, match="no loss of the gates yet"):
        gate_loss(model)
    model(torch.arange(12).reshape(2, 6))
    single = [layer.loss.item() for layer in gated_layers(model) if layer.loss is not None]
    assert len(single) == 14 and all(0.4 < value < 2 for value in single)
    loss = gate_loss(model)
    assert loss.item() == pytest.approx(sum(single) / len(single))
    loss.backward()
    assert all(parts(layer)[0].grad is not None for layer in gated_layers(model))
    model.eval()(torch.arange(12).reshape(2, 6))
    with pytest.raises(RuntimeError, match="in training mode first"):
        gate_loss(model)


def test_trained_weights_survive_saving_and_loading(tmp_path: Path) -> None:
    model = on_tiny_llama(init_weights=False, top_k=1).eval()
    ids = torch.arange(6)[None]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TOKEN_GATED"
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not torch.allclose(again(ids).logits, tiny_llama()(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"r": 0}, "r=0"), ({"top_k": 5}, "top_k=5: use 1 to 4"), ({"dispatch": "fast"}, "dispatch='fast'")],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGatedConfig(**changes)
