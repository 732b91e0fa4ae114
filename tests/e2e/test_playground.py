"""The playground in a real browser, against the model and the adapters that come along. PICTURES=docs keeps the
pictures that it takes, which are those of docs/playground.md."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from loraplex.cli.samples import Change, Samples
from loraplex.cli.top import frame
from tests.client.scrapes import BEFORE, NOW
from tests.e2e.processes import Server
from tests.tools import needs_chromium

pytestmark = needs_chromium

ROOT = Path(__file__).parents[2]
KEY = "the key of the page"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "Last year Angela Jones left Microsoft and bought a house in Spain."
SCHEMA = {"type": "object", "properties": {"happy": {"type": "boolean"}}, "required": ["happy"]}

expect.set_options(timeout=60_000)  # a busy machine is slow


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    hashed = hashlib.sha256(KEY.encode()).hexdigest()
    keys.write_text(json.dumps({"tenants": {"page": {"keys": [hashed], "admin": True}}}))
    # In bfloat16, a near tie may fall otherwise beside other requests than alone.
    flags = "--dtype=float32", f"--adapters={ROOT}/examples/adapters", "--kv-blocks=512", f"--api-keys={keys}"
    with Server(*flags, env={"HF_HUB_OFFLINE": "1"}) as running:
        yield running
        running.assert_nothing_is_held()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, served: Server) -> Iterator[Page]:
    """The page, which loads nothing from elsewhere, and whose policy stops nothing of it."""
    context = browser.new_context(
        viewport={"width": 1100, "height": 760},
        color_scheme="light",
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(60_000)
    opened, problems, loaded = context.new_page(), list[str](), list[str]()

    def keep(message: ConsoleMessage) -> None:
        if message.type == "error" and "the server responded with a status of" not in message.text:
            problems.append(message.text)

    opened.on("console", keep)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: loaded.append(request.url))
    opened.goto(served.url)
    yield opened
    context.close()
    assert not problems
    assert loaded and all(url.startswith((f"{served.url}/", "data:")) for url in loaded)


def enter(page: Page) -> None:
    page.get_by_label("This server requires an API key.").fill(KEY)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#model")).to_have_text(MODEL)


def set_fields(page: Page, **values: str) -> None:
    for name, value in values.items():
        page.locator(f"[name={name}]").evaluate("(field, value) => { field.value = value; }", value)


def toggle(page: Page, *names: str) -> None:
    for name in names:
        page.get_by_role("group", name="Who answers").get_by_role("button", name=name).click()


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("All have answered.")


def text_of(page: Page, name: str) -> str:
    """The last answer."""
    return card(page, name).get_by_label("Answer").text_content() or ""


def card(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=name, exact=True).last


CODES = {
    "curl": lambda answer: json.loads(answer)["choices"][0]["message"]["content"],
    "Python (loraplex)": lambda answer: answer.removesuffix("\n"),
    "Python (openai)": lambda answer: answer.removesuffix("\n"),
    "gRPC": lambda answer: json.loads(answer)["sequences"][0]["text"],
}


def call(page: Page, served: Server, name: str, language: str) -> str:
    """The answer to the code that the page gives to copy."""
    card(page, name).get_by_role("button", name="Code").click()
    page.get_by_role("button", name=language, exact=True).click()
    page.get_by_role("button", name="Copy").click()
    code = page.evaluate("navigator.clipboard.readText()")
    page.get_by_role("button", name="Close").click()
    assert KEY not in code
    command = [sys.executable, "-c"] if language.startswith("Python") else ["bash", "-euc"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "LORAPLEX_API_KEY": KEY, "PYTHONIOENCODING": "utf-8"}
    code = code.replace("127.0.0.1:50051", served.address).replace("curl 'http", "curl --silent 'http")
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return CODES[language](done.stdout)


def describe(token: dict[str, Any]) -> str:
    """A row of the tooltip."""
    share = math.exp(token["logprob"])
    visible = token["token"].replace("\n", "⏎").replace(" ", "␣")
    return f"{visible}{100 * share:.{1 if share < 0.1 else 0}f}%"


def post(page: Page, served: Server, path: str, body: dict[str, Any]) -> Any:
    return page.request.post(f"{served.url}{path}", data=body, headers={"Authorization": f"Bearer {KEY}"}).json()


def take_picture(page: Page, name: str, tmp_path: Path) -> None:
    page.screenshot(path=Path(os.environ.get("PICTURES", tmp_path)) / f"{name}.png")


def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab(page: Page) -> None:
    page.get_by_label("This server requires an API key.").fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("alert")).to_have_text("unknown API key")
    enter(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    page.reload()
    expect(page.get_by_role("button", name="sentiment")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0 and not page.context.cookies()


FORBIDDEN = {
    "require-trusted-types-for": "document.body.innerHTML = '<b>'",
    "style-src-attr": "document.body.setAttribute('style', 'color: red')",
    "img-src": "new Image().src = 'https://elsewhere.example/'",
    "connect-src": "fetch('https://elsewhere.example/').catch(() => {})",
}
VIOLATED = """new Promise((resolve) => {
    addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
    try { %s } catch {}
})"""


def test_the_policy_keeps_html_styles_and_other_places_out(browser: Browser, served: Server) -> None:
    for directive, attempt in FORBIDDEN.items():
        with browser.new_context() as context:
            other = context.new_page()
            other.goto(served.url)
            assert other.evaluate(VIOLATED % attempt) == directive


def test_the_base_model_and_adapters_answer_side_by_side(page: Page, served: Server, tmp_path: Path) -> None:
    enter(page)
    toggle(page, "sentiment", "entities")
    set_fields(page, temperature="0", max_tokens="40", top_k="9", repetition_penalty="1.1")
    ask(page, QUESTION)
    assert text_of(page, "sentiment") == "neutral"
    assert json.loads(text_of(page, "entities"))["person"] == ["Angela Jones"]
    expect(card(page, "base model").locator(".figures")).to_contain_text("40 tokens")

    ask(page, 'It\'s a "test" of $HOME,\n`quotes` and \\ 🙂.')  # these answers have the first ones as their context
    for code in CODES:
        assert call(page, served, "entities", code) == text_of(page, "entities")
    assert "Angela Jones" in page.locator("#calls pre").inner_text()

    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)


def test_a_token_shows_how_likely_it_was(page: Page, served: Server, tmp_path: Path) -> None:
    enter(page)
    toggle(page, "sentiment", "entities", "sql")
    set_fields(page, temperature="0", max_tokens="48")
    with page.expect_response(lambda response: MODEL in (response.request.post_data or "")) as response:
        ask(page, QUESTION)
    events = [json.loads(line.removeprefix("data: ")) for line in response.value.text().splitlines() if "{" in line]
    choices = [choice for event in events for choice in event["choices"]]
    expected = [token for choice in choices if choice.get("logprobs") for token in choice["logprobs"]["content"]]
    tokens = card(page, "base model").locator(".token")
    assert len(expected) == 48
    assert tokens.all_text_contents() == [token["token"] for token in expected]
    assert text_of(page, "base model") == "".join(choice["delta"].get("content", "") for choice in choices)

    shown = page.get_by_role("tooltip")
    tokens.nth(3).hover()
    expect(shown.locator(":scope > div")).to_have_text([describe(token) for token in expected[3]["top_logprobs"]])
    take_picture(page, "playground", tmp_path)
    card(page, "base model").get_by_label("Answer").focus()
    page.keyboard.press("ArrowRight")
    expect(shown.locator(":scope > div")).to_have_text([describe(token) for token in expected[4]["top_logprobs"]])
    page.keyboard.press("Escape")
    expect(shown).to_be_hidden()


CHUNKS = """async (chunks) => {
    const { TokenText } = await import("/playground/tokens.js");
    const sections = [document.createElement("div"), document.createElement("div")];
    const text = new TokenText(...sections);
    for (const [thoughts, content, tokens] of chunks)
        text.add({ reasoning_content: thoughts, content }, tokens.map((bytes) => ({ bytes, logprob: -1 })));
    const spans = (section) => [...section.querySelectorAll(".token")].map((span) => span.textContent);
    return sections.flatMap((section) => [section.textContent, spans(section)]);
}"""
HALVES = "🙂".encode()[:2], "🙂".encode()[2:]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([("", " a", [b" a"]), ("", " 🙂b", [b" ", *HALVES, b"b"])], ["", [], " a 🙂b", [" a", " ", "🙂", "b"]]),
        ([("", "a", [b" a", b" b"]), ("", " b", [])], ["", [], "a b", ["a", " b"]]),  # the text comes later
        ([("", "ab", [b"abc"]), ("", "", [])], ["", [], "ab", []]),  # a stop text begins within the token
        (
            [("", "", [b"<think>", b"\n"]), ("So", "", [b"So"]), ("", "Yes", [b"\n", b"</think>", b"\n\n", b"Yes"])],
            ["So", ["So"], "Yes", ["Yes"]],
        ),
        ([("", "a", [b"a"]), ("", "b", [b"x"]), ("", "c", [b"c"])], ["", [], "abc", ["a"]]),  # not the tokens' text
    ],
)
def test_tokens_are_found_in_thoughts_and_content(page: Page, chunks: Any, expected: list[Any]) -> None:
    sent = [(thoughts, content, [list(token) for token in tokens]) for thoughts, content, tokens in chunks]
    assert page.evaluate(CHUNKS, sent) == expected


def test_a_schema_holds_for_all_and_an_error_is_in_its_own_answer(page: Page, served: Server) -> None:
    enter(page)
    page.get_by_text("JSON schema").click()
    set_fields(page, schema='{"type": ', max_tokens="40", temperature="0")
    page.get_by_label("Message", exact=True).fill("Is Maria happy?")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status")).to_contain_text("The JSON schema is not JSON")
    expect(page.get_by_role("article")).to_have_count(0)

    set_fields(page, schema=json.dumps(SCHEMA))
    toggle(page, "sentiment")
    for name in ("absent/one", "absent/two", "absent/three"):
        page.get_by_label("Another adapter").fill(name)
        page.keyboard.press("Enter")
    expect(page.get_by_label("Another adapter")).to_be_disabled()
    page.get_by_role("link", name="Adapters", exact=True).click()
    page.get_by_role("row", name="sql").get_by_role("button", name="Chat").click()
    expect(page.get_by_role("status")).to_have_text("4 adapters answer already.")
    ask(page, "Is Maria happy?")
    expect(page.get_by_role("article")).to_have_count(5)
    for name in ("base model", "sentiment"):
        jsonschema.validate(json.loads(text_of(page, name)), SCHEMA)
    expect(card(page, "absent/two").get_by_role("alert")).to_contain_text("absent/two")
    for code in ("Python (loraplex)", "gRPC"):
        assert call(page, served, "base model", code) == text_of(page, "base model")


def test_adapters_and_the_live_picture_are_those_of_the_server(page: Page, served: Server, tmp_path: Path) -> None:
    enter(page)
    loaded = post(page, served, "/adapters/load", {"id": "sentiment"})
    page.get_by_role("link", name="Adapters", exact=True).click()
    row = page.get_by_role("row", name="sentiment")
    used = page.request.get(f"{served.url}/usage", headers={"Authorization": f"Bearer {KEY}"}).json()["usage"]
    tokens = sum(one["prompt_tokens"] + one["generated_tokens"] for one in used if one["adapter"] == "sentiment")
    expect(row).to_contain_text(f"sentiment{loaded['tier']}loaded{loaded['lora_rank']}1.4 MB{tokens}")
    row.get_by_role("button", name="Chat").click()
    set_fields(page, max_tokens="1000", temperature="1")
    toggle(page, "sql")
    page.get_by_label("Message", exact=True).fill("Write a very long story.")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Live").click()
    running = page.locator("dl > div").filter(has_text="running").locator("dd")
    expect(running).not_to_have_text("0")
    expect(page.locator("dl > div").filter(has_text="tokens/s").locator("dd")).not_to_have_text("0.0")
    expect(page.get_by_role("row", name="base")).to_be_visible()
    assert "NaN" not in page.locator("main").inner_text()
    take_picture(page, "playground-live", tmp_path)
    page.get_by_role("link", name="Chat").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")


def test_adapters_say_what_is_with_them(page: Page, served: Server) -> None:
    enter(page)
    listed = page.request.get(f"{served.url}/adapters", headers={"Authorization": f"Bearer {KEY}"}).json()
    changes: list[dict[str, Any]] = [
        {"id": "<b>", "state": "broken", "tier": None, "reason": "a folder"},
        {"state": "fetching", "tier": None, "fetched_bytes": 4, "total_bytes": 10},
        {"state": "alias", "targets": [{"adapter": "x@1", "percent": 90}, {"adapter": "x@2", "percent": 10}]},
    ]
    rows = [{**listed[0], **change} for change in changes] * 100
    page.route("**/adapters?limit=*", lambda route: route.fulfill(json=rows[: int(route.request.url.split("=")[1])]))
    page.get_by_role("link", name="Adapters", exact=True).click()
    shown = page.locator("#adapter-table tbody tr")
    expect(shown).to_have_count(200)
    page.get_by_role("button", name="More").click()
    expect(shown).to_have_count(300)
    for row, text in enumerate(("<b>a folder", "fetching 40%", "stands for x@1 (90%) or x@2 (10%)")):
        expect(shown.nth(row)).to_contain_text(text)


def test_a_model_that_does_not_chat_says_so(page: Page) -> None:
    enter(page)
    page.route(
        "**/info", lambda route: route.fulfill(json={"model_id": "m", "model_pipeline_tag": "feature-extraction"})
    )
    page.reload()
    expect(page.locator("#hint")).to_have_text("This model does not chat: it is for feature-extraction.")
    expect(page.get_by_role("button", name="Send")).to_be_hidden()


LIVE = """async () => {
    const { showLive } = await import("/playground/live.js");
    for (const now of [0, 2000]) {
        performance.now = () => now;
        await showLive();
    }
    const words = (part) => [...part.childNodes].map((node) => node.textContent).join(" ").trim();
    return [...document.querySelectorAll("#live-view :is(dl > div, th, td, p)")].map(words);
}"""


def test_the_live_picture_is_that_of_the_command(page: Page) -> None:
    enter(page)
    scrapes = iter((BEFORE, NOW))
    page.route("**/metrics", lambda route: route.fulfill(body=next(scrapes)))
    text = frame(Change(Samples(0, BEFORE), Samples(2, NOW)), columns=400)
    _, *lines = re.sub("[█▒░]+ ", "", text).splitlines()  # the page has the model's name elsewhere
    cells = [cell for line in lines for cell in re.split(" {2,}", line.strip()) if cell]
    assert [shown for shown in page.evaluate(LIVE) if shown] == cells


def test_it_fits_a_phone_and_works_below_a_path_of_a_proxy(page: Page, served: Server, tmp_path: Path) -> None:
    page.route("**/below/**", lambda route: route.continue_(url=route.request.url.replace("/below/", "/")))
    page.goto(f"{served.url}/below/")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    enter(page)
    toggle(page, "sentiment", "entities")
    set_fields(page, temperature="0", max_tokens="24")
    ask(page, QUESTION)
    take_picture(page, "playground-phone", tmp_path)
    card(page, "entities").get_by_role("button", name="Code").click()
    for name in ("Close", "Chat", "Adapters", "Live"):
        page.get_by_role("button" if name == "Close" else "link", name=name, exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
