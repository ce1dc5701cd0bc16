"""Token-gated experts against a slow loop over tokens, and their balance loss against its formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mote.baselines.token_gated import (
    TokenGatedConfig,
    TokenGatedLinear,
    add_token_gated,
    balance_loss,
    choose,
    gated_layers,
    load_token_gated,
    save_token_gated,
    switch_loss,
)

DISPATCHES: tuple[Any, ...] = ("gather", "dense")


def gated(**changes: Any) -> TokenGatedLinear:
    torch.manual_seed(0)
    layer = TokenGatedLinear(nn.Linear(12, 20), TokenGatedConfig(**{"r": 3, "lora_alpha": 6, **changes}))
    nn.init.normal_(layer.experts_B)
    return layer


def tiny_llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
        )
    )  # fmt: skip


def slow(layer: TokenGatedLinear, x: Tensor) -> Tensor:
    """One token, one expert at a time."""
    out = layer.base_layer(x).clone()
    for row, token in [(row, token) for row in range(x.shape[0]) for token in range(x.shape[1])]:
        vector = x[row, token]
        probabilities = torch.softmax(layer.gate.weight @ vector, dim=0).tolist()
        best = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])[: layer.config.top_k]
        total = sum(probabilities[e] for e in best)
        for e in best:
            hidden = layer.experts_A[e] @ vector
            out[row, token] += probabilities[e] / total * layer.scaling * (layer.experts_B[e].t() @ hidden)
    return out


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (4, 1), (3, 3), (1, 1)])
def test_layer_equals_a_loop_over_tokens(dispatch: Any, experts: int, top_k: int) -> None:
    layer = gated(dispatch=dispatch, experts=experts, top_k=top_k)
    x = torch.randn(3, 5, 12)
    assert torch.allclose(layer(x), slow(layer, x), atol=1e-5)
    if top_k < experts:
        other = gated(dispatch=dispatch, experts=experts, top_k=top_k + 1)
        assert not torch.allclose(other(x), slow(layer, x), atol=1e-2)


def test_both_dispatches_have_the_same_outputs_and_gradients() -> None:
    x = torch.randn(2, 9, 12)
    gradients = []
    for dispatch in DISPATCHES:
        layer = gated(dispatch=dispatch)
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        assert layer.balance is not None
        (out.square().mean() + layer.balance).backward()
        parts = (out, inputs.grad, layer.gate.weight.grad, layer.experts_A.grad, layer.experts_B.grad)
        assert all(part is not None and bool(part.any()) for part in parts)
        gradients.append(parts)
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_layer_runs_under_autocast(dispatch: Any) -> None:
    layer, x = gated(dispatch=dispatch), torch.randn(2, 9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.allclose(out.float(), layer(x), atol=0.1)
    out.sum().backward()


def test_an_expert_that_no_token_chose_is_left_alone() -> None:
    layer = gated(top_k=1)
    nn.init.zeros_(layer.gate.weight)
    nn.init.ones_(layer.gate.weight[0])
    layer(torch.rand(2, 4, 12)).sum().backward()
    assert layer.experts_A.grad is not None and layer.experts_A.grad[0].any() and not layer.experts_A.grad[1:].any()


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


def test_a_model_gets_gates_on_all_linear_layers_and_trains_nothing_else() -> None:
    model = tiny_llama()
    logits = model(torch.arange(6)[None]).logits
    add_token_gated(model, TokenGatedConfig(r=2, balance=0.5))
    assert len(list(gated_layers(model))) == 2 * 7 and isinstance(model.lm_head, nn.Linear)
    assert torch.equal(model(torch.arange(6)[None]).logits, logits)  # B is zero
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"weight", "experts_A", "experts_B"}
    assert all("gate." in n or "experts_" in n for n, p in model.named_parameters() if p.requires_grad)
    few = add_token_gated(tiny_llama(), TokenGatedConfig(target_modules=("q_proj", "v_proj")))
    assert len(list(gated_layers(few))) == 2 * 2
    with pytest.raises(ValueError, match="names no linear layer"):
        add_token_gated(tiny_llama(), TokenGatedConfig(target_modules=("flux",)))


def test_the_loss_of_a_model_is_the_mean_of_its_layers_and_reaches_the_gates() -> None:
    model = add_token_gated(tiny_llama(), TokenGatedConfig(r=2, balance=0.5)).train()
    with pytest.raises(RuntimeError, match="no balance loss yet"):
        balance_loss(model)
    model(torch.arange(12).reshape(2, 6))
    single = [layer.balance for layer in gated_layers(model)]
    loss = balance_loss(model)
    assert loss.item() == pytest.approx(0.5 * sum(s.item() for s in single if s is not None) / len(single))
    loss.backward()
    assert all(layer.gate.weight.grad is not None and layer.gate.weight.grad.any() for layer in gated_layers(model))
    model.eval()(torch.arange(12).reshape(2, 6))
    with pytest.raises(RuntimeError, match="in training mode first"):
        balance_loss(model)


def test_what_was_trained_comes_back(tmp_path: Path) -> None:
    config = TokenGatedConfig(r=2)
    model = add_token_gated(tiny_llama(), config).eval()
    for layer in gated_layers(model):
        nn.init.normal_(layer.experts_B)
    save_token_gated(model, tmp_path / "gated.safetensors")
    torch.manual_seed(5)
    again = add_token_gated(tiny_llama(), config).eval()
    ids = torch.arange(6)[None]
    assert not torch.allclose(again(ids).logits, model(ids).logits)
    load_token_gated(again, tmp_path / "gated.safetensors")
    assert torch.equal(again(ids).logits, model(ids).logits)
    few = add_token_gated(tiny_llama(), TokenGatedConfig(r=2, target_modules=("q_proj",)))
    with pytest.raises(ValueError, match="differs from the model"):
        load_token_gated(few, tmp_path / "gated.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"r": 0}, "r=0"), ({"top_k": 5}, "top_k=5: use 1 to 4"), ({"dispatch": "fast"}, "dispatch='fast'")],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGatedConfig(**changes)
