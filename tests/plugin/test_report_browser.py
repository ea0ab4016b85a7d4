"""The listening report in a real browser: headless Chromium, the page opened from the disk.

Skipped where there is no Chromium (Debian's package: chromium), unless REQUIRE_BROWSER=1.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from eval.report.__main__ import app

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
REQUIRED = os.environ.get("REQUIRE_BROWSER") == "1"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NUM_ROWS = 1000
NASTY = "</script><script>window.harm=1</script><img src=x onerror='window.harm=1'><b id=harm>\u2028{{ 7*7 }}"
PLAYER = "document.getElementById('player')"
PLAYING = f"!{PLAYER}.paused && {PLAYER}.currentTime > 0.2"
PAUSED = f"{PLAYER}.paused"

Open = Callable[..., Any]


def prediction(number: int, folder: str) -> dict[str, Any]:
    """Every third is wrong, every tenth refused a segment, every twentieth has three; one is full of markup."""
    segments = [{"start": 0.2, "end": 0.6, "inserted": True}]
    response = "<think>First <seg>0.2, 0.6</seg>"
    if number % 10 == 0:
        segments.append({"start": 7.0, "end": 8.0, "inserted": False, "refusal": "past_end", "text": "<seg>7, 8</seg>"})
        response += " then <seg>7, 8</seg>"
    if number % 20 == 0:
        segments.append({"start": 1.0, "end": 1.5, "inserted": True})
        response += " and <seg>1, 1.5</seg>"
    answer = "two" if number % 3 == 0 else "one"
    row = {
        "id": f"row-{number}",
        "audio": f"{folder}/{number % 5}.wav",
        "question": f"How often is bell {number} heard?",
        "choices": ["one", "two"],
        "answer": "one",
        "model_response": f"{response} a bell.</think><answer>{answer}</answer>",
        "segments": segments,
        "answer_prediction": answer,
        "stop_reason": "answered",
        "meta": {"kind": "even" if number % 2 == 0 else "odd"},
        "events": [{"label": "bell", "start": 0.5, "end": 1.0}],
    }
    if number == 7:
        row |= {"question": NASTY, "choices": [NASTY, "one"], "answer_prediction": NASTY, "error": NASTY}
        row |= {"model_response": NASTY + response, "events": [{"label": NASTY, "start": 0.0, "end": 1.0}]}
        row["segments"][0] |= {"refusal": NASTY, "text": NASTY}
    return row


def write_run(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    identity = {"benchmark": "audio-qa", "questions_sha256": "", "sampling": {}}
    sidecar = {"identity": identity, "questions": "", "num_rows": len(rows), "audio_root": str(file.parent)}
    file.with_suffix(".run.json").write_text(json.dumps(sidecar))
    return file


def make(output: Path, *arguments: str) -> Path:
    done = CliRunner().invoke(app, [*arguments, "-o", str(output)])
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one`: 1,000 rows, sound linked but for the first three. `two`: against a run that is wrong elsewhere."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "a #1").mkdir()
    for number in range(5):
        beat = np.sin(2 * np.pi * 220 * (number + 1) * np.arange(2 * 16_000) / 16_000) / 2
        soundfile.write(folder / f"a #1/{number}.wav", beat, 16_000)
    rows = [prediction(number, "a #1") for number in range(NUM_ROWS)]
    others = [{**row, "answer_prediction": "one" if number < 6 else "two"} for number, row in enumerate(rows[:40])]
    first, second = write_run(folder / "first.jsonl", rows), write_run(folder / "second.jsonl", others)
    return {
        "one": make(folder / "one.html", str(first), "--embed", "3"),
        "two": make(folder / "two.html", str(first), str(second), "--embed", "1"),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None:
        message = "no Chromium: apt-get install --no-install-recommends chromium, or CHROMIUM=/its/path"
        pytest.fail(message) if REQUIRED else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")),
            executable_path=CHROMIUM,
            args=list(FLAGS),
            viewport={"width": 1200, "height": 900},
        )
        context.set_default_timeout(10_000)
        yield context
        context.close()


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Open]:
    """Open a page. At the end: nothing in the console, and nothing asked for but files beside the page."""
    tab = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))

    def open_page(name: str) -> Any:
        tab.goto(pages[name].as_uri())
        return tab

    yield open_page
    tab.close()
    folder = pages["one"].parent.as_uri()
    assert not said
    assert asked and not [url for url in asked if not url.startswith((folder, "data:", "blob:"))]


def until(tab: Any, condition: str, seconds: float = 10.0) -> None:
    """Wait for a JavaScript expression. The page forbids eval, which wait_for_function uses."""
    deadline = time.monotonic() + seconds
    while not tab.evaluate(condition):
        assert time.monotonic() < deadline, f"not after {seconds:g} s: {condition}"
        tab.wait_for_timeout(20)


def question(tab: Any) -> str:
    return tab.inner_text("#detail .question")


def found(tab: Any) -> str:
    return tab.inner_text("#found").replace("\u2013", "-")


def search(tab: Any, words: str, count: int) -> None:
    tab.fill("#search", words)
    until(tab, f"document.getElementById('found').textContent.endsWith('of {count}')")


def test_a_thousand_rows_open_a_page_at_a_time(opened: Open) -> None:
    tab = opened("one")
    assert tab.locator("#rows button").count() == 50 and found(tab) == "1-50 of 1,000"
    tab.click("#page-on")
    assert found(tab) == "51-100 of 1,000" and question(tab) == "How often is bell 50 heard?"
    timing = tab.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    print(f"\n{NUM_ROWS} rows: interactive after {timing:.0f} ms")


def test_filters_and_search_find_what_they_say(opened: Open) -> None:
    tab = opened("one")
    tab.click("[data-filter=wrong]")
    assert found(tab).endswith("of 335") and tab.get_attribute("#detail .side", "data-verdict") == "wrong"
    tab.click("[data-filter=all]")
    tab.click("[data-filter=refused]")
    assert found(tab).endswith("of 101")
    tab.click("[data-filter=many]")
    assert found(tab).endswith("of 50") and tab.locator("#detail .transport .play").count() == 4
    tab.click("[data-filter=many]")
    tab.click("[data-filter=refused]")
    tab.select_option("[data-field=kind]", "odd")
    assert found(tab).endswith("of 500")
    tab.select_option("[data-field=kind]", "")
    search(tab, "BELL 999 heard", 1)
    assert question(tab) == "How often is bell 999 heard?"
    tab.fill("#search", "no such thing")
    tab.wait_for_selector("#detail .nothing")
    assert found(tab) == "nothing found"


def test_the_keyboard_goes_through_rows_and_search(opened: Open) -> None:
    tab = opened("one")
    for key, number in (("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0), ("k", 0)):
        tab.keyboard.press(key)
        assert question(tab) == f"How often is bell {number} heard?"
    assert tab.get_attribute("#rows button >> nth=0", "aria-current") == "true"
    for _ in range(50):
        tab.keyboard.press("j")
    assert found(tab).startswith("51-100")
    tab.keyboard.press("/")
    tab.keyboard.type("bell 3")
    until(tab, "document.getElementById('found').textContent.endsWith('of 271')")
    tab.keyboard.press("Escape")
    tab.keyboard.press("j")
    assert question(tab) == "How often is bell 13 heard?"


@pytest.mark.parametrize("row", ["941", "994"], ids=["embedded", "linked"])
def test_a_segment_is_played_from_its_start_to_its_end(opened: Open, row: str) -> None:
    tab = opened("one")
    search(tab, f"bell {row} heard", 1)
    tab.click("#detail .words .play")
    until(tab, PLAYING)
    source = tab.evaluate(f"{PLAYER}.src")
    assert source.startswith("blob:" if row == "941" else "file:")
    until(tab, PAUSED)
    assert 0.6 <= tab.evaluate(f"{PLAYER}.currentTime") < 0.9
    assert tab.locator("#detail .on").count() == 0


def test_keys_play_the_whole_and_a_segment_and_another_row_stops_it(opened: Open) -> None:
    tab = opened("one")
    tab.keyboard.press("Space")
    until(tab, PLAYING)
    tab.keyboard.press("Space")
    until(tab, PAUSED)
    tab.keyboard.press("3")
    until(tab, f"{PLAYER}.currentTime >= 1.0")
    assert not tab.evaluate(PAUSED) and tab.locator("#detail .band.on").count() == 1
    tab.keyboard.press("j")
    assert tab.evaluate(PAUSED)


def test_a_refused_segment_says_why_and_stands_hatched_where_it_was(opened: Open) -> None:
    tab = opened("one")
    refused = tab.locator("#detail .words .play.no")
    assert refused.inner_text().endswith("starts after the audio ends") and refused.is_disabled()
    assert tab.locator("#detail .scene .band.no").count() == 1
    assert [tag.inner_text() for tag in tab.locator("#detail .lanes .tag").all()] == ["1", "2", "3"]


def test_markup_in_model_output_is_shown_and_not_run(opened: Open) -> None:
    tab = opened("one")
    tab.fill("#search", "window.harm")
    tab.wait_for_selector("#detail .id:text-is('row-7')")
    assert re.sub(r"\s", "", question(tab)) == re.sub(r"\s", "", NASTY)
    assert NASTY.partition("\u2028")[0] in tab.inner_text("#detail .words")
    assert tab.evaluate("window.harm") is None and tab.locator("#harm").count() == 0


def test_two_runs_stand_side_by_side(opened: Open) -> None:
    tab = opened("two")
    assert tab.locator("#detail .side").count() == 2
    assert tab.locator("#rows button").first.locator(".sign").count() == 2
    assert [side.get_attribute("data-verdict") for side in tab.locator("#detail .side").all()] == ["wrong", "right"]
    tab.click("[data-filter=gained]")
    assert found(tab).endswith("of 2")
    tab.click("[data-filter=lost]")
    assert found(tab).endswith("of 21")
    left, right = (side.bounding_box() for side in tab.locator("#detail .side").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    tab.click("[data-filter=all]")
    tab.fill("#search", "row-41")
    tab.wait_for_selector("#detail .absent >> text=This run has no such row")


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("width", [1000, 390])
def test_nothing_is_wider_than_the_window(opened: Open, name: str, width: int) -> None:
    tab = opened(name)
    tab.set_viewport_size({"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_dark_where_the_system_is(opened: Open) -> None:
    tab = opened("one")
    ground = "getComputedStyle(document.body).backgroundColor"
    tab.emulate_media(color_scheme="light")
    light = tab.evaluate(ground)
    tab.emulate_media(color_scheme="dark")
    assert sum(map(int, re.findall(r"\d+", tab.evaluate(ground)))) < 150 < sum(map(int, re.findall(r"\d+", light)))
