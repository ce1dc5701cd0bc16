"""The entry `mote` of a served folder's config.json."""

from typing import Any

import pytest

from mote.serve.vllm.folder_config import ServedConfig

SERVED = ServedConfig(
    experts=("analysis", "response"), markers={"analysis": (10, 11), "response": (12, 13)}, turns=(1,), opening=(1, 14),
    gates=((0.5, 0.25, 0.25), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5)), rank=4,
    modes={"adaptive": (("response",), ("analysis", "response")), "analysis": (("analysis", "response"),)},
    mode="adaptive", answer="response", max_step_tokens=5, special=(1, 2), eos=2,
)  # fmt: skip


def test_config_survives_a_json_round_trip() -> None:
    assert ServedConfig.model_validate(SERVED.model_dump(mode="json")) == SERVED
    assert SERVED.reserved == {10, 11, 12, 13, 14}
    assert (SERVED.routing.starts, SERVED.routing.ends, SERVED.routing.turns) == ((10, 12), (11, 13), (1,))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"mode": "deep"}, r"mode='deep': use one of \['base', 'adaptive', 'analysis'\]"),
        ({"mode": "base"}, r"mode='base': .* give it as chat_template_kwargs=\{'mode': 'base'\}"),
        ({"max_step_tokens": 0}, "max_step_tokens=0: give a whole number of tokens, 1 or more"),
        ({"max_step_tokens": True}, "max_step_tokens=True: give a whole number"),
    ],
)
def test_unservable_request_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SERVED.check(request_)


def test_request_sets_mode_and_budgets() -> None:
    request: dict[str, Any] = {"mode": "analysis", "max_step_tokens": 7, "of_another": "x"}
    SERVED.check(request)
    grammar = SERVED.grammar(request, 8)
    assert (grammar.chains, grammar.max_step_tokens, grammar.max_tokens, grammar.eos_id) == (((0, 1),), 7, 8, 2)
    assert grammar.allowed([]) == ([10], True)
    SERVED.check({})  # may be a base-model request
    default = SERVED.grammar({}, None)
    assert (default.max_step_tokens, default.allowed([])) == (5, ([10, 12], True))
