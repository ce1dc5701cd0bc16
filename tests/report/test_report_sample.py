"""Which judged answers the page shows."""

from support.evals import judged, small

from mote.report.sample import as_rows, draw_sample

COLUMNS = (("base", "base"), ("ours", "direct"), ("ours", "full@8"))


def test_small_evaluation_is_shown_in_full() -> None:
    found = draw_sample(small(), COLUMNS)
    assert (len(found.shown), found.prompts, found.answers, found.answers_shown) == (10, 10, 30, 30)
    row = as_rows(found)[-1]
    shown = [row[name] for name in ("task", "technique", "prompt", "question")]
    assert shown == ["strongreject", "cached_pair", "shown cached_pair", "question s1"]
    assert [answer["column"] for answer in row["answers"]] == [0, 1, 2]
    assert row["answers"][1]["steps"] == [["analysis", "a thought"]] and row["answers"][1]["label"] == "full_refusal"


def test_missing_answer_leaves_its_column_empty() -> None:
    rows = [row for row in small() if not (row.id == "h1" and row.mode == "direct")]
    found = next(prompt for prompt in draw_sample(rows, COLUMNS).shown if prompt.first.id == "h1")
    assert [answer is None for answer in found.answers] == [False, True, False]


def large() -> list[object]:
    many = [judged("base", "base", "hh-harm", f"h{n}", "full_refusal") for n in range(300)]
    attacks = [
        judged("base", "base", "strongreject", f"s{n}", "full_refusal", technique=f"t{t}")
        for n in range(40)
        for t in range(5)
    ]
    few = [judged("base", "base", "xstest", f"x{n}", "full_compliance", kind="benign", type="rare") for n in range(2)]
    return [*many, *attacks, *few]


def test_large_evaluation_is_sampled_from_all_strata() -> None:
    found = draw_sample(large(), COLUMNS[:1], prompts=22)
    assert (len(found.shown), found.prompts, found.answers) == (22, 502, 502)
    tasks = [prompt.first.task for prompt in found.shown]
    assert {task: tasks.count(task) for task in set(tasks)} == {"hh-harm": 10, "strongreject": 10, "xstest": 2}
    techniques = [prompt.first.technique for prompt in found.shown if prompt.first.technique]
    assert {techniques.count(name) for name in set(techniques)} == {2} and len(set(techniques)) == 5
    assert [prompt.first.id for prompt in found.shown if prompt.first.task == "hh-harm"] != [f"h{n}" for n in range(10)]
    assert draw_sample(large(), COLUMNS[:1], prompts=22) == found


def test_text_length_is_capped_but_one_prompt_remains() -> None:
    rows = [judged("base", "base", "hh-harm", f"h{n}", "safe", answer="x" * 1000) for n in range(50)]
    assert len(draw_sample(rows, COLUMNS[:1], characters=10_300).shown) == 10
    assert len(draw_sample(rows, COLUMNS[:1], characters=10).shown) == 1
