import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tuner import adapted
from transformers import LlamaForCausalLM

from mote.masks import attention_edges, draw_sight, positions


def by_hand(steps: list[int], sight: torch.Tensor, valid: list[bool]) -> tuple[list[list[bool]], list[int]]:
    """Edges and positions, one token at a time, from the words of decision 4."""
    n = len(steps)
    edges = [[q == k or (k <= q and valid[k] and bool(sight[steps[q], steps[k]])) for k in range(n)] for q in range(n)]
    where: list[int] = []
    for t in range(n):
        if not valid[t]:
            where.append(0)
            continue
        same = [where[k] for k in range(t) if valid[k] and steps[k] == steps[t]]
        seen = [where[k] for k in range(t) if valid[k] and steps[k] < steps[t] and sight[steps[t], steps[k]]]
        where.append(max(same) + 1 if same else (max(seen) + 1 if seen else 0))
    return edges, where


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 4), min_size=4, max_size=4), st.integers(0, 3), st.booleans(), st.integers(0, 10**6))
def test_edges_and_positions_equal_the_definition(lengths: list[int], pad: int, left: bool, seed: int) -> None:
    steps = [step for step, length in enumerate([max(lengths[0], 1), *lengths[1:]]) for _ in range(length)]
    valid = [True] * len(steps)
    steps, valid = ([0] * pad + steps, [False] * pad + valid) if left else (steps + [0] * pad, valid + [False] * pad)
    sight = draw_sight(sorted(set(steps) - {0}), 3, 0.5, random.Random(seed))
    given_ = torch.tensor([steps]), sight[None], torch.tensor([valid])
    edges, where = by_hand(steps, sight, valid)
    assert attention_edges(*given_)[0, 0].tolist() == edges
    assert positions(*given_)[0].tolist() == where


def test_draws_follow_the_probability_and_never_hide_the_question() -> None:
    rng = random.Random(0)
    drawn = torch.stack([draw_sight([1, 2, 3], 3, 0.3, rng) for _ in range(4000)])
    assert drawn[:, :, 0].all()
    share = 1 - drawn[:, [2, 3, 3], [1, 1, 2]].float().mean(0)
    torch.testing.assert_close(share, torch.full((3,), 0.3), atol=0.03, rtol=0)
    assert draw_sight([1, 2, 3], 3, 0.0, rng).all()


def logits(model: LlamaForCausalLM, ids: list[int], steps: list[int], sight: torch.Tensor) -> torch.Tensor:
    given_ = torch.tensor([steps]), sight[None], torch.ones(1, len(ids), dtype=torch.bool)
    out = model(
        input_ids=torch.tensor([ids]),
        attention_mask=attention_edges(*given_),
        position_ids=positions(*given_),
        step_ids=given_[0],
    )
    return out.logits[0]


def test_seeing_everything_is_plain_causal_attention() -> None:
    model = adapted()
    ids = torch.randint(3, 60, (12,)).tolist()
    steps = [0] * 4 + [1] * 3 + [2] * 2 + [3] * 3
    masked = logits(model, ids, steps, torch.ones(4, 4, dtype=torch.bool))
    plain = model(input_ids=torch.tensor([ids]), step_ids=torch.tensor([steps])).logits[0]
    torch.testing.assert_close(masked, plain, atol=1e-5, rtol=0)


def test_a_response_that_skips_everything_is_a_direct_answer() -> None:
    """Exactness: (x, a, g, y) with all of a and g hidden from y equals the separately built (x, y)."""
    model = adapted()
    question, analysis = [5, 6, 7, 8], [64, 9, 65]
    guidance, response = [66, 10, 11, 67], [68, 12, 13, 14, 69]
    ids = question + analysis + guidance + response
    steps = [0] * 4 + [1] * 3 + [2] * 4 + [3] * 5
    sight = torch.ones(4, 4, dtype=torch.bool)
    sight[3, 1] = sight[3, 2] = False
    masked = logits(model, ids, steps, sight)
    direct = model(input_ids=torch.tensor([question + response])).logits[0]
    torch.testing.assert_close(masked[-5:], direct[-5:], atol=1e-5, rtol=0)
    sight[3, 1] = True  # now y sees a but not g: (x, a, y)
    masked = logits(model, ids, steps, sight)
    built = model(input_ids=torch.tensor([question + analysis + response])).logits[0]
    torch.testing.assert_close(masked[-5:], built[-5:], atol=1e-5, rtol=0)
    torch.testing.assert_close(masked[:7], built[:7], atol=1e-5, rtol=0)


def test_hidden_steps_do_matter() -> None:
    """The negative control of the exactness test: without the mask the same tokens get other logits."""
    model = adapted()
    ids, steps = [5, 6, 64, 9, 65, 68, 12, 69], [0, 0, 1, 1, 1, 3, 3, 3]
    seen = logits(model, ids, steps, torch.ones(4, 4, dtype=torch.bool))
    sight = torch.ones(4, 4, dtype=torch.bool)
    sight[3, 1] = False
    assert (logits(model, ids, steps, sight)[-3:] - seen[-3:]).abs().max() > 1e-2
