"""The page of a run in a browser without a window, from disk: views, filters, keys, hostile text.

Needs Chromium, of Debian (`apt install chromium`) or of `playwright install chromium`.
"""

import dataclasses
import json
import os
import shutil
import time

import pytest

from paravt_jax.records import VideoRef
from tests.support.page_run import GOLD, some_groups, write_long_run, write_run
from train.report.page.write import write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPENS_WITHIN = 2.0
"""Seconds."""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, BROWSERS)), own)
        if not os.path.exists(found):
            pytest.skip("no Chromium: apt install chromium, or playwright install chromium")
        opened = playwright.chromium.launch(executable_path=found)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Opens a page at an address; what its console says must be nothing."""
    context, said = browser.new_context(viewport={"width": 1280, "height": 900}), []

    def go(index, address="", wait="main h1"):
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda asked: asked.url.startswith(("file:", "data:")) or said.append(asked.url),
        )
        page.goto(index.as_uri() + address)
        page.wait_for_selector(wait)
        return page

    yield go
    context.close()
    assert said == []


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_page(write_run(tmp_path_factory.mktemp("pages") / "a run"))


def until(page, expression):
    """Wait for JavaScript to hold. The page forbids the `eval` of `wait_for_function`."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(30)
    raise AssertionError(f"{expression}: {page.evaluate('location.hash')}")


def address(page):
    return page.evaluate("location.hash")


def rows(page):
    return page.locator("table.rollouts tbody tr").count()


def test_a_run_shows_its_curves_and_leads_to_the_worst_rollout(visit, index):
    """From the page of the run to why its worst rollout failed: two clicks."""
    page = visit(index)
    assert page.inner_text("h1") == "a run"
    assert page.locator("figure svg").count() >= 6
    page.click("text=See the worst rollouts")
    page.wait_for_selector("table.rollouts")
    assert rows(page) == 12 and "reward" in page.inner_text("thead")
    page.click("table.rollouts tbody tr:first-child")
    page.wait_for_selector("text=What it wrote")
    assert "reward 0" in page.inner_text("main") and "It made no call." in page.inner_text("main")


def test_filters_are_in_the_address(visit, index):
    page = visit(index, "#/rollouts?wrong=1&step=0")
    assert rows(page) == 4
    page.check("input[name=notool]")
    until(page, "document.querySelector('.lead').dataset.count == '3'")
    assert address(page) == "#/rollouts?wrong=1&notool=1&step=0"
    for query, count in [
        ("missed=1", 2),
        ("type=tvg", 6),
        ("min=0.5&max=1", 6),
        ("malformed=1", 0),
    ]:
        shown = visit(index, f"#/rollouts?{query}", ".lead[data-count]")
        assert rows(shown) == count, query


def test_another_run_beside_and_the_way_to_its_page(visit, tmp_path):
    own, other = (write_run(tmp_path / name, steps=2) for name in ("own run", "other #1"))
    index = write_page(own, other)
    page = visit(index)
    assert "other #1" in page.inner_text(".lead") and page.locator(".lead a").count() == 1
    write_page(other)
    page = visit(write_page(own, other))
    assert "other #1: " in page.inner_text(".tiles")
    page.click(".lead >> text=its rollouts")
    page.wait_for_selector("table.rollouts")
    assert page.title() == "rollouts · other #1"


def test_a_group_is_sorted_by_reward(visit, index):
    page = visit(index, "#/group?step=0&group=0")
    assert page.locator(".lane .reward").all_inner_texts() == ["2", "1", "0.5"]
    page.locator(".lane").nth(2).click()
    page.wait_for_selector("text=What it wrote")
    assert address(page) == "#/rollout?step=0&group=0&rollout=1"


def test_a_rollout_shows_calls_frames_and_tokens(visit, index):
    page = visit(index, "#/rollout?step=0&group=0&rollout=0")
    assert "IoU 0.5 · sees 100 %" in page.inner_text(".call")
    assert page.locator(".call .frame").count() == 3
    page.locator("figure svg a").nth(1).click()
    until(page, "document.querySelector('.call strong').textContent == 'Call 2'")
    assert address(page).endswith("call=1") and "miss" in page.inner_text(".call header")
    page.keyboard.press("c")
    page.wait_for_selector('[data-color="sampler"][aria-pressed=true]')
    assert "color=sampler" in address(page)
    told = json.loads((index.parent / "data" / "step_000000.json").read_text())
    token = page.locator('[data-kind="thought"] .t').nth(7)
    token.hover()
    rollout = told["groups"][0]["rollouts"][0]
    value = rollout["values"]["sampler"][7]
    assert f"{value:.4g}".replace("-", "−") in page.inner_text("#tip")


def test_keys_walk_through_what_filters_leave(visit, index):
    page = visit(index, "#/rollout?step=1&group=0&rollout=1&wrong=1&sort=first")
    for key, step, group, rollout in [("Right", 1, 1, 0), ("Left", 1, 0, 1), ("Down", 1, 0, 2)]:
        page.keyboard.press(f"Arrow{key}")
        until(page, f"location.hash.includes('step={step}&group={group}&rollout={rollout}')")
        until(page, "location.hash.includes('wrong=1')")
        page.wait_for_timeout(150)
    page.keyboard.press("g")
    page.wait_for_selector(".lanes")
    page.keyboard.press("r")
    page.wait_for_selector(".tiles")
    page.keyboard.press("b")
    page.wait_for_selector("table.rollouts")
    dark = page.evaluate("document.documentElement.dataset.theme")
    page.keyboard.press("d")
    assert page.evaluate("document.documentElement.dataset.theme") != dark
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


@pytest.mark.parametrize("width", [390, 1600])
def test_nothing_is_wider_than_the_screen(visit, index, width):
    for view in ("", "#/rollouts", "#/group?step=0&group=0", "#/rollout?step=0&group=0&rollout=0"):
        page = visit(index, view)
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view


HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
    "\u202egnidaer thgir\u202c\u200b\u200d\u0000'\"&amp;</pre></script>"
)


def test_hostile_text_stays_text(visit, tmp_path):
    video = VideoRef("/videos/a 'quoted\" <b>name.mp4", 64.0)
    row = dataclasses.replace(GOLD, video=video, question=f"What? {HOSTILE}", answer=HOSTILE)
    groups = some_groups(row)
    write_run(tmp_path, groups, steps=1)
    for path in (tmp_path / "rollouts").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0] |= {"text": f"<think>{HOSTILE}" + "a" * 2**20 + "</think>", "said": HOSTILE}
        lines[0]["tool_calls"][0] |= {"report": HOSTILE, "name": HOSTILE, "error": HOSTILE}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "details" / "step_000000.jsonl").unlink()
    index = write_page(tmp_path)
    for view in (
        "#/rollouts",
        "#/group?step=0&group=0",
        "#/rollout?step=0&group=0&rollout=0&call=0",
    ):
        page = visit(index, view)
        page.wait_for_timeout(200)
        assert page.evaluate("window.hit") is None
        assert page.locator("main img, main script").count() == 0
        assert HOSTILE[:40] in page.evaluate("document.querySelector('main').textContent")
    assert page.locator("button:has-text('more')").count() == 1, (
        "a megabyte is shown piece by piece"
    )
    assert "a 'quoted\" <b>name.mp4" in page.evaluate(
        "document.querySelector('.facts').textContent"
    )


@pytest.mark.study
def test_a_long_run_opens_at_once(visit, tmp_path):
    """500 steps of 128 rollouts. The best of three, for other work may be beside."""
    index = write_page(write_long_run(tmp_path / "long", 500, 128))
    for view, wait in [("", "figure svg"), ("#/rollouts?max=0.1", "table.rollouts tbody tr")]:
        best = min(seconds_to_open(visit, index, view, wait) for _ in range(3))
        print(f"{view or 'the run'} opens in {best:.2f} s")
        assert best < OPENS_WITHIN


def seconds_to_open(visit, *where):
    began = time.perf_counter()
    page = visit(*where)
    seconds = time.perf_counter() - began
    page.close()
    return seconds
