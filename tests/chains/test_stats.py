"""Statistics of chains, computed by hand; their table and plot."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support.chains import made

from mote.chains.costs import Price
from mote.chains.diversity import self_bleu
from mote.chains.stats import PAPER_SHARES, Outcomes, chain_stats, table
from mote.core.errors import UserError
from mote.core.records import ChainRow, append_rows
from mote.report.chains_page import plots_of
from mote.report.plots import standalone

ROWS = [
    made("a", "Why is the sky blue?", response="It is the light."),
    made("b", "How do I hide a house?", analysis="They want to keep it.", response="Ask a lawyer about it, please."),
    made("c", "how do I hide a house", analysis="They want to keep it.", response="Ask a lawyer about it, please!"),
    made("d", "Who are you?", analysis="A greeting, or a test of me.", guidance="Be honest.", response="A program."),
    made("e", "Is it safe?", safe=False, analysis="x", guidance="y", response="z"),
    made("f", "Who wrote it?", rejected="analysis: looping", analysis="no no no", response="Somebody wrote this."),
    made("g", "What is it for?", rejected="response: empty", model="n", response=""),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    append_rows(tmp_path / "chains.jsonl", ROWS)
    return tmp_path


def test_outcomes(folder: Path) -> None:
    stats = chain_stats(folder)
    assert (stats.total, stats.accepted, stats.unsafe, stats.rejected) == (7, 4, 1, 2)
    assert stats.depths == (
        Outcomes(steps=("response",), total=2, accepted=1, unsafe=0, rejected=1),
        Outcomes(steps=("analysis", "response"), total=3, accepted=2, unsafe=0, rejected=1),
        Outcomes(steps=("analysis", "guidance", "response"), total=2, accepted=1, unsafe=1, rejected=0),
    )
    assert stats.reasons == {"analysis: looping": 1, "response: empty": 1}
    assert stats.models == {"m": 6, "n": 1}
    assert (stats.near_questions, stats.near_chains) == (1, 1)  # c repeats b


def test_chains_without_steps_are_no_near_duplicates(tmp_path: Path) -> None:
    rows = [made(name, f"question {name}", safe=False, rejected="question: unsure") for name in "ab"]
    append_rows(tmp_path / "chains.jsonl", rows)
    stats = chain_stats(tmp_path)
    assert (stats.near_chains, stats.rejected, stats.depths[0].steps) == (0, 2, ())


def test_texts_of_accepted_chains(folder: Path) -> None:
    analysis, guidance, response, chain = chain_stats(folder).texts
    assert [text.name for text in (analysis, guidance, response, chain)] == [
        "analysis",
        "guidance",
        "response",
        "chain",
    ]
    assert (analysis.chains, analysis.share, analysis.paper_share) == (3, 0.75, PAPER_SHARES["analysis"])
    assert (analysis.words.mean, analysis.words.median, analysis.words.p90) == (17 / 3, 5, 7)
    assert (guidance.chains, guidance.self_bleu, guidance.paper_self_bleu) == (1, None, 74.34)
    answers = ["It is the light.", "Ask a lawyer about it, please.", "Ask a lawyer about it, please!", "A program."]
    assert response.self_bleu == pytest.approx(self_bleu(answers))
    assert (chain.chains, chain.share, chain.paper_share) == (4, 1.0, None)


def test_the_sample_is_fixed_and_uniform(tmp_path: Path) -> None:
    rows = [made(str(i), f"question {i}", response=f"word{i} " * 3 + "end") for i in range(400)]
    append_rows(tmp_path / "chains.jsonl", rows)
    one, again, more = (chain_stats(tmp_path, sample=size).texts[0] for size in (20, 20, 400))
    assert one == again and one.sampled == 20 and more.sampled == 400
    assert one.words == more.words  # lengths are of all


def test_chains_of_another_scheme_are_counted(tmp_path: Path) -> None:
    append_rows(tmp_path / "c.jsonl", [made("a", "3 x 4?", plan="Multiply.", solve="3 x 4 = 12", verify="12")])
    stats = chain_stats(tmp_path / "c.jsonl")
    assert [text.name for text in stats.texts] == ["plan", "solve", "verify", "chain"]
    assert [text.paper_share for text in stats.texts] == [None] * 4
    assert "plan > solve > verify" in table(stats)


def test_the_table_holds_every_number(folder: Path) -> None:
    text = table(chain_stats(folder, Price(read=1.0, written=2.0)))
    for part in (
        "7 chains: 4 accepted, 1 unsafe, 2 rejected", "written by m (6), n (1)", "analysis > guidance > response",
        "analysis: looping", "71.5", "61.4", "75.52", "80.38", "tok:13a", "seed 0",
        "near-duplicates (similarity 0.8): 1 questions, 1 chains",
        "tokens generated: 210, 140 of them kept; 52.5 per accepted chain",
        "prompt tokens: 700; 175.0 per accepted chain",
        "3.50 per accepted chain",
        "0.0011 USD at 1 USD per million prompt tokens and 2 per million generated; 0.000280 USD",
    ):  # fmt: skip
        assert part in text, part
    assert "money" not in table(chain_stats(folder))


@pytest.mark.parametrize("rows", [ROWS, ROWS[4:]], ids=["all", "none accepted"])
def test_the_plot_is_one_self_contained_file(rows: list[ChainRow], tmp_path: Path) -> None:
    append_rows(tmp_path / "chains.jsonl", rows)
    drawn = standalone(plots_of(chain_stats(tmp_path)))
    root = ET.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in drawn and "currentColor" not in drawn and "http://" not in drawn.replace(root.tag[1:27], "")
    words = "".join(root.itertext())
    assert "accepted" in words and "analysis > guidance > response" in words and ("median" in words) == (len(rows) > 4)
    assert ("tokens per accepted chain" in words) == (len(rows) > 4)


def test_a_file_without_chains_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chains: .*/chains\.jsonl does not exist; give a run folder"):
        chain_stats(tmp_path)
    (tmp_path / "chains.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds no chains; make some with `mote chains`"):
        chain_stats(tmp_path)
