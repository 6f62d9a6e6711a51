"""The web page in a real browser: what a person does with it, by mouse and by keyboard, in light, dark and on a phone.

With BEACON_MEMORY_SCREENSHOTS set to a folder, the pictures for the documentation are written there; they are of the
default model.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from file_samples import pdf
from langchain_samples import OWLS, ROOF, WELL, filled_memory
from playwright.sync_api import Browser, Page, expect, sync_playwright
from servers import client, put, running

from beacon_memory import BeaconMemory, BeaconModel
from beacon_memory.generation.decode_loop import DecodeLoop
from beacon_memory.server.keys import Right, add_key
from beacon_memory.server.run import RunningServer
from beacon_memory.server.settings import ServerSettings

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SECONDS = 60_000  # in ms, as Playwright counts

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab; whatever its console says is wrong, and so is a request to any other server."""
    tab = browser.new_page(viewport={"width": 1200, "height": 800})
    tab.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    wrong: list[str] = []
    asked: set[str] = set()
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    tab.on("request", lambda request: asked.add(request.url.split("/")[2].split(":")[0]))
    yield tab
    tab.close()
    assert wrong == []
    assert asked <= {"127.0.0.1"}


def ask(page: Page, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")


def test_a_person_adds_a_text_and_a_file_and_sees_them_read(page: Page, fresh: RunningServer, tmp_path: Path) -> None:
    page.goto(fresh.url)
    documents = page.get_by_role("list", name="Documents in memory").get_by_role("listitem")
    expect(documents).to_have_count(3)

    page.get_by_role("button", name="Add…").click()
    page.get_by_label("Name").fill("contracts/lease of the mill")
    page.get_by_label("Text", exact=True).fill("The rent is paid by Ada Flint.")
    page.get_by_label("Tags").fill("contract, 2031")
    page.get_by_role("dialog").get_by_role("button", name="Add").click()
    row = documents.filter(has_text="contracts/lease of the mill")
    expect(row.locator(".tag")).to_have_text(["2031", "contract"])
    expect(page.get_by_role("dialog")).to_have_count(0)

    (tmp_path / "report.pdf").write_bytes(pdf("The owls were counted in 2030."))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    page.get_by_role("button", name="Add…").click()
    page.get_by_label("Files").set_input_files([tmp_path / "report.pdf", tmp_path / "photo.png"])
    page.get_by_role("dialog").get_by_role("button", name="Add").click()
    expect(page.get_by_role("alert")).to_contain_text("photo.png: files of type 'image/png' are not read")
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(documents.filter(has_text="report.pdf")).to_have_count(1)
    assert fresh.service.memory.store.text("report.pdf") == "The owls were counted in 2030."

    page.get_by_label("Show only ids that begin with").fill("contracts/")
    expect(documents).to_have_count(1)


def test_reading_is_shown_as_it_goes_and_can_be_cancelled(page: Page, fresh: RunningServer) -> None:
    page.goto(fresh.url)
    with client(fresh) as http:
        http.put("/v1/documents/long", json={"text": WELL * 2000}).raise_for_status()
    page.reload()  # a job that was there before is shown, too
    row = page.get_by_role("list", name="Documents that are being read").get_by_role("listitem")
    expect(row).to_contain_text(re.compile(r"long.*tokens? read"))
    expect(row.get_by_role("progressbar", name="Reading long")).to_have_attribute("value", re.compile(r"^0?\.?[0-9]"))
    row.get_by_role("button", name="Cancel reading long").click()
    expect(row).to_have_count(0)
    assert "long" not in fresh.service.memory.store


def test_an_answer_comes_with_what_was_loaded_and_its_shaded_text(page: Page, server: RunningServer) -> None:
    page.goto(server.url)
    ask(page, "Who paid for the roof?")
    answer = page.locator("article.answer")
    expect(answer.locator(".costs")).to_contain_text(re.compile(r"From .*roof.*slots.*first token after"))
    assert answer.locator(".text").first.inner_text().strip()

    why = answer.get_by_role("button", name="Why this answer?")
    why.click()
    expect(why).to_have_attribute("aria-expanded", "true")
    expect(answer.get_by_role("cell", name="roof", exact=True)).to_be_visible()
    marks = answer.locator("figure mark")
    expect(marks.first).to_be_visible()
    said = "".join(answer.locator("figure .text").all_inner_texts())
    assert "".join(said.split()) in "".join((ROOF + WELL + OWLS).split())
    shares = marks.evaluate_all("marks => marks.map(mark => +mark.style.getPropertyValue('--loaded'))")
    assert any(0 < share <= 1 for share in shares)
    why.click()
    expect(answer.locator(".why")).to_be_hidden()


def test_chosen_documents_are_asked_and_no_others(page: Page, server: RunningServer) -> None:
    page.goto(server.url)
    page.get_by_role("checkbox", name="well").check()
    expect(page.get_by_role("radio", name="Chosen (1)")).to_be_checked()
    ask(page, "Who paid for the roof?")
    expect(page.locator(".costs").first).to_contain_text("From well:")
    page.get_by_role("radio", name="None").check(force=True)
    ask(page, "Who paid for the roof?")
    expect(page.locator(".costs").nth(1)).to_contain_text("From no document")
    page.get_by_role("checkbox", name="well").uncheck()
    expect(page.get_by_role("radio", name="Find documents")).to_be_checked()


def test_everything_can_be_done_by_keyboard(page: Page, fresh: RunningServer) -> None:
    page.goto(fresh.url)
    expect(page.get_by_role("checkbox", name="roof")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the question")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type("Who?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("And when?")
    assert page.locator("#question").input_value() == "Who?\nAnd when?"
    page.get_by_role("button", name="Add…").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Add a document")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="Forget owls").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("owls will be removed")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("checkbox", name="owls")).to_have_count(0)
    assert "owls" not in fresh.service.memory.store


def test_an_answer_is_stopped_and_another_conversation_begins(
    page: Page, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DecodeLoop._step

    def slow_step(loop: DecodeLoop) -> None:  # a tiny model's answer is whole before a browser has looked
        time.sleep(0.1)
        step(loop)

    page.goto(server.url)
    monkeypatch.setattr(DecodeLoop, "_step", slow_step)
    ask(page, "Who paid for the roof?")
    page.get_by_role("button", name="Stop").click()
    monkeypatch.undo()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    expect(page.locator("article.answer.is-coming")).to_have_count(0)
    ask(page, "And when?")
    expect(page.locator(".costs").last).to_contain_text("first token after")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article.answer")).to_have_count(0)


def test_what_documents_and_models_say_is_never_run(page: Page, fresh: RunningServer) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    with client(fresh) as http:
        put(http, "evil", evil, tags=["<b>tag"])
    page.goto(fresh.url)
    page.get_by_role("checkbox", name="evil").check()
    ask(page, evil)
    expect(page.locator(".costs").first).to_contain_text("From evil:")
    page.get_by_role("button", name="Why this answer?").click()
    expect(page.locator("figure .text").first).to_contain_text("onerror")
    assert page.title() == "Beacon Memory"


def test_a_server_with_keys_asks_for_one(page: Page, model: BeaconModel, tmp_path: Path) -> None:
    memory = filled_memory(tmp_path / "store", model)
    key = add_key(tmp_path / "keys.json", "ada", "", Right)
    with running(memory, ServerSettings(keys=tmp_path / "keys.json")) as server:
        page.goto(server.url)
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("does not know this key")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.get_by_text(re.compile("Answers by"))).to_be_visible()
        ask(page, "Who paid for the roof?")
        expect(page.locator("article.answer .costs")).to_contain_text("From roof")


def test_the_page_allows_nothing_from_elsewhere(http: httpx.Client) -> None:
    for path in ("/", "/page/app.js", "/page/style.css", "/page/icon.svg"):
        reply = http.get(path)
        assert reply.status_code == 200
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in reply.text
    for path in ("/page/", "/page/index.html", "/page/nothing.js", "/page/..%2fapp.py", "/page/../app.py"):
        assert http.get(path).status_code == 404, path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_on_a_phone_and_colours_are_readable(
    browser: Browser, server: RunningServer, scheme: str
) -> None:
    phone = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)  # type: ignore[arg-type]
    phone.set_default_timeout(SECONDS)
    phone.goto(server.url)
    expect(phone.get_by_role("checkbox", name="roof")).to_be_visible()
    ask(phone, "Who paid for the roof?")
    expect(phone.locator(".costs").first).to_be_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    contrast = phone.evaluate(_CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast
    phone.close()


# The contrast of texts with what is behind them, as WCAG computes it
_CONTRAST = """() => {
  const bright = (color) => {
    const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map((one) => one / 255)
      .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!color.endsWith(", 0)") && color !== "transparent") return color;
    }
  };
  const found = {};
  for (const name of [".costs", ".facts", ".id", ".asked p", "#send", "#add", "fieldset span", ".load", "h1"]) {
    const element = document.querySelector(name);
    const [one, other] = [bright(getComputedStyle(element).color), bright(behind(element))].sort((a, b) => b - a);
    found[name] = (one + 0.05) / (other + 0.05);
  }
  return found;
}"""


@pytest.mark.slow
@pytest.mark.skipif("BEACON_MEMORY_SCREENSHOTS" not in os.environ, reason="BEACON_MEMORY_SCREENSHOTS names no folder")
def test_pictures_for_the_documentation(browser: Browser, tmp_path: Path) -> None:
    folder = Path(os.environ["BEACON_MEMORY_SCREENSHOTS"])
    memory = BeaconMemory(tmp_path / "store")
    with running(memory) as server, client(server) as http:
        put(http, "contracts/mill", LEASE, tags=["contract"])
        put(http, "notes/owls.md", OWLS, tags=["nature"])
        put(http, "notes/roof.md", ROOF)
        for name, scheme, size in (
            ("page-light", "light", (1280, 860)),
            ("page-dark", "dark", (1280, 860)),
            ("page-phone", "light", (390, 844)),
        ):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)  # type: ignore[arg-type]
            page.set_default_timeout(SECONDS)
            page.goto(server.url)
            expect(page.get_by_role("checkbox", name="contracts/mill")).to_be_visible()
            ask(page, "When does the lease end?")
            page.get_by_role("button", name="Why this answer?").click()
            expect(page.locator("figure mark").first).to_be_visible()
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"{name}.png")
            page.close()


LEASE = """The lease of the mill at Corran was signed on 3 May 2026. It ends on 3 May 2031.

The rent of the mill is forty pounds a year. The rent is paid by the miller, Ada Flint, at midsummer.

The barn owls above the hayloft are not to be disturbed. The well behind the mill may be used by the village, as it \
always was.
"""
