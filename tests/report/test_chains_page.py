"""The page of chains: what it holds, that nothing breaks out of it, and that it asks nobody for anything."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.chains import made

from mote.core.errors import UserError
from mote.core.records import append_rows
from mote.report.chains_page import write_page

NASTY = "</script><script>alert(1)</script> <!-- <img src=x onerror=alert(1)> \u2028 {{ 7 * 7 }} & \u202e שלום"


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.fixture
def page(tmp_path: Path) -> str:
    rows = [
        made("one", "How do I clean it?", response="Use soap."),
        made("two", NASTY, kind="harmful", safe=False, score=0.1, analysis=NASTY, response="No."),
        made("three", "Why?", rejected="response: empty", response=""),
    ]
    append_rows(tmp_path / "run" / "chains.jsonl", rows)
    write_page(tmp_path / "run", tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def data(page: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Page(page).scripts[0])
    return found


def test_rows_round_trip(page: str) -> None:
    one, two, three = data(page)
    assert one["turns"] == [["user", "How do I clean it?"]] and one["steps"] == [["response", "Use soap."]]
    assert (two["turns"][0][1], two["steps"][0]) == (NASTY, ["analysis", NASTY])
    assert two["checks"] == [["direct", False, 0.1, "No."]] and two["kind"] == "harmful"
    assert [row["verdict"] for row in (one, two, three)] == ["accepted", "unsafe", "response: empty"]
    assert one["tokens"] == [30, 20, 100] and one["seconds"] == 2.0 and one["source"] == "hand" and one["model"] == "m"


def test_text_is_escaped(page: str) -> None:
    parsed = Page(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 2 and "img" not in [tag for tag, _ in parsed.tags]
    assert "alert(1)" not in parsed.scripts[1] and "innerHTML" not in parsed.scripts[1]
    assert "\u2028" not in page


def test_chains_page_makes_no_requests(page: str) -> None:
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "data:,") in ("data:,",), (tag, attributes)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", page.replace(parsed.scripts[0], ""))
    (policy,) = [a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert policy is not None and f"'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_script_and_page_use_the_same_names(page: str) -> None:
    """The script reads elements and columns by name; a typing error would be an empty page."""
    parsed = Page(page)
    script = parsed.scripts[1]
    ids = {a["id"] for _, a in parsed.tags if "id" in a}
    assert set(re.findall(r'getElementById\("(\w+)"\)', script)) == ids
    names = {a["name"] for tag, a in parsed.tags if tag in ("input", "select") and "name" in a}
    filters = set(re.findall(r"^  (\w+): \(row\)", script, re.M))
    assert filters == {"depth", "verdict", "kind", "source"}
    assert filters | set(re.findall(r"form\.elements\.(\w+)", script)) == names
    columns = {name for name in re.findall(r"\brow\.(\w+)", script) if name != "depth"}
    assert columns == set(data(page)[0])


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chains.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no chains"):
        write_page(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
