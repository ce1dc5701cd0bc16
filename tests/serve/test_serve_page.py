"""The chat page in a real browser."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.adapters import save_random_adapter
from support.checked import EXPERTS
from support.checked import QUESTIONS as CHECKED_QUESTIONS
from support.servers import served, wait_until

import mote
from mote.core.recipe import AnswerSettings
from mote.core.scheme import CHECKED
from mote.inference.model import Model
from mote.serve.server import Server

PAGE = Path(mote.__file__).parent / "serve" / "page.html"


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return mote.load(str(tiny), save_random_adapter(tiny, tmp_path_factory.mktemp("adapter")), device="cpu")


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[tuple[str, Server]]:
    with served(model, answers=AnswerSettings(max_step_tokens=700)) as running:
        yield running


@pytest.fixture
def page(browser: Any, running: tuple[str, Server]) -> Iterator[Any]:
    """The page on a phone; anything that it asks elsewhere, and any complaint of the browser, is an error."""
    context = browser.new_context(viewport={"width": 400, "height": 760})
    page = context.new_page()
    wrong = []
    page.on("request", lambda request: None if request.url.startswith(running[0]) else wrong.append(request.url))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(running[0])
    page.wait_for_selector("#mode option", state="attached")
    yield page
    context.close()
    assert not wrong


def send(page: Any, text: str, mode: str) -> None:
    page.select_option("#mode", mode)
    page.fill("#text", text)
    page.press("#text", "Enter")


def ended(page: Any, replies: int) -> None:
    page.locator(".retry").nth(replies - 1).wait_for(timeout=60_000)


def test_page_loads_nothing_external_and_escapes_text() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"https?://|//cdn|@import|<link|<img|\bsrc=", page)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", page)
    assert not re.findall(r"\son\w+=|\sstyle=", page)


def test_steps_unfold_and_show_the_models_answer(page: Any, model: Model) -> None:
    send(page, "my computer <b>&amp;</b>", "full")
    ended(page, 1)
    answer = model.answer("my computer <b>&amp;</b>", "full", max_step_tokens=700)
    names = page.locator("details summary b").all_text_contents()
    assert names == ["analysis", "guidance", "response"]
    assert page.locator("details .text").all_text_contents() == [step.text for step in answer.steps]
    tokens = [int(text.split()[0]) for text in page.locator("details summary span").all_text_contents()]
    assert tokens == list(answer.tokens.steps.values())
    assert page.locator(".top span").text_content().startswith(f"{answer.tokens.total} tokens")
    assert page.locator(".user").text_content() == "my computer <b>&amp;</b>"
    colours = page.eval_on_selector_all("details summary b", "nodes => nodes.map(n => getComputedStyle(n).color)")
    assert len(set(colours)) == 3


def test_page_shows_checks_and_dropped_answers(browser: Any, tiny: Path, tmp_path: Path) -> None:
    checking = mote.load(str(tiny), save_random_adapter(tiny, tmp_path, experts=EXPERTS), device="cpu")
    given: dict[str, Any] = {"max_step_tokens": 8, "check_threshold": 1.0}
    with served(checking, answers=AnswerSettings(**given)) as (address, _):
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#mode option", state="attached")
        text, answer = max(
            ((text, checking.answer(text, CHECKED, **given)) for text in CHECKED_QUESTIONS),
            key=lambda pair: len(pair[1].checks),
        )
        send(page, text, CHECKED)
        ended(page, 1)
        names = page.locator("details summary b").all_text_contents()
        texts = page.locator("details .text").all_text_contents()
        assert names == ["response", "check", "analysis", "response", "check", "guidance", "response", "check"]
        scores = [f"harmful ({check.score:.2f})" for check in answer.checks]
        assert [t for n, t in zip(names, texts, strict=True) if n == "check"] == [
            f"{scores[0]}, retry with analysis", f"{scores[1]}, retry with full", scores[2]
        ]  # fmt: skip
        dropped = "dropped by the check"
        assert [t for n, t in zip(names, texts, strict=True) if n == "response"] == [dropped, dropped, answer.answer]
        assert page.locator(".bad").text_content() == "Its own check finds this answer unsafe."
        assert page.locator(".top span").text_content().startswith(f"{answer.tokens.total} tokens")
        ink = page.eval_on_selector_all("details summary b", "nodes => nodes.map(n => getComputedStyle(n).color)")
        assert len(set(ink)) == 4 and len({ink[i] for i in (1, 4, 7)}) == 1
        page.close()


def test_stop_frees_the_slot_and_retry_is_shown_beside_it(
    page: Any, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.batcher._forward

    def slow(*given: Any) -> Any:  # so that there is something left to stop
        time.sleep(0.02)
        return forward(*given)

    monkeypatch.setattr(model.batcher, "_forward", slow)
    page.set_viewport_size({"width": 1100, "height": 760})
    send(page, "kill", "base")
    wait_until(lambda: len("".join(page.locator(".text").all_text_contents())) > 20)
    page.click("#stop")
    ended(page, 1)
    wait_until(lambda: model.batcher.rows == (0, 0))
    monkeypatch.undo()
    assert page.locator(".reply").text_content().find("stopped") > 0
    page.select_option(".bottom select", "direct")
    page.click(".bottom .retry")
    ended(page, 2)
    assert page.locator(".reply .top b").all_text_contents() == ["base", "direct"]
    first, second = (page.locator(".reply").nth(i).bounding_box() for i in (0, 1))
    assert first["y"] == second["y"] and first["x"] < second["x"]


def test_conversation_continues_with_the_chosen_answer(page: Any, model: Model) -> None:
    send(page, "how", "direct")
    ended(page, 1)
    send(page, "safe?", "direct")
    ended(page, 2)
    history = [{"role": "user", "content": "how"},
               {"role": "assistant", "content": model.answer("how", "direct", max_step_tokens=700).answer},
               {"role": "user", "content": "safe?"}]  # fmt: skip
    expected = model.answer(history, "direct", max_step_tokens=700).answer
    assert page.locator(".turn").nth(1).locator(".text").text_content() == expected
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.locator("#hint").is_visible()


def test_page_fits_a_phone_in_light_and_dark(page: Any) -> None:
    send(page, "x" * 300, "analysis")
    ended(page, 1)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        assert ink != paper
    for box in [page.locator(name).bounding_box() for name in ("#send", "#mode", "#text", "#new")]:
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400 and box["height"] >= 30


def test_page_asks_for_the_api_key(browser: Any, model: Model) -> None:
    with served(model, api_key="secret") as (address, _):
        page = browser.new_page()
        page.on("dialog", lambda dialog: dialog.accept("secret"))
        page.goto(address)
        page.wait_for_selector("#mode option", state="attached")
        assert page.title() == "tiny"
        page.close()


def test_page_shows_errors(browser: Any, model: Model) -> None:
    with served(model, max_request_chars=5) as (address, _):
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#mode option", state="attached")
        send(page, "too long a question", "direct")
        ended(page, 1)
        assert "19 characters, more than the 5" in page.locator(".bad").text_content()
        page.close()
