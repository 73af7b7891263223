"""The page in a real browser: type, move the slider, see both answers."""

import json
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; on Debian: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page, problems = context.new_page(), []
    # Chromium itself tells of an answer that is an error.
    page.on("console", lambda message: "400 (Bad Request)" in message.text or problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: "abort" in request.failure.lower() or problems.append(request.url))
    page.goto(server.url)
    page.wait_for_function("() => document.getElementById('ref-title').textContent === 'small'")
    yield page
    assert problems == []
    context.close()


def ask(page, text="How many eggs?"):
    page.fill("#prompt", text)
    page.fill("#tokens", "20")
    page.click("#ask")
    wait_for_answers(page)


def wait_for_answers(page):
    whole = "() => ['ref', 'guided'].every(id => (document.getElementById(id).tokens || {}).isWhole)"
    page.wait_for_function(whole, timeout=60_000)


def tokens(page, name):
    return page.eval_on_selector(
        f"#{name}",
        "x => x.tokens.map(({token, logprob, ref_logprob, kl, value}) => ({token, logprob, ref_logprob, kl, value}))",
    )


def test_both_answers_come_and_the_slider_changes_the_guided_one(page):
    ask(page)
    reference, guided = tokens(page, "ref"), tokens(page, "guided")
    assert page.inner_text("#eta-text") == "0.1"
    assert all(token["kl"] == 0 and token["value"] is None for token in reference)
    assert sum(token["kl"] for token in guided) > 0 and any(token["value"] for token in guided)
    kl = sum(token["kl"] for token in guided)
    assert page.inner_text("#guided-figures") == f"{len(guided)} tokens, KL {kl:.2f} nats"

    page.focus("#eta")
    page.keyboard.press("End")
    assert page.inner_text("#eta-text") == "0.02" and page.get_attribute("#eta", "aria-valuetext") == "0.02"
    page.wait_for_timeout(600)
    wait_for_answers(page)
    assert sum(token["kl"] for token in tokens(page, "guided")) > kl
    assert tokens(page, "ref") == reference

    page.keyboard.press("Home")  # off: with the same seed the same answer
    page.wait_for_timeout(600)
    wait_for_answers(page)
    assert [token["token"] for token in tokens(page, "guided")] == [token["token"] for token in reference]


def test_a_token_tells_its_probabilities_by_mouse_and_by_keyboard(page):
    ask(page)
    place = page.eval_on_selector_all("#guided span", "x => x.findIndex((y, i) => i && y.textContent.trim())")
    page.hover(f"#guided span:nth-child({place + 1})")
    by_mouse = page.inner_text("#token")
    assert "guided" in by_mouse and "reference" in by_mouse and "KL" in by_mouse
    page.focus("#guided")
    for _ in range(place + 1):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#token") == by_mouse
    shades = page.eval_on_selector_all("#guided span", "x => x.map(y => y.style.backgroundColor)")
    assert len(set(shades)) > 2


def test_the_request_is_copied_as_curl_and_as_python(page, server):
    ask(page, "It's 1 egg")
    page.click("#curl")
    page.wait_for_function("() => document.getElementById('copied').textContent === 'Copied.'")
    curl = page.evaluate("navigator.clipboard.readText()")
    assert curl.startswith(f"curl {server.url}/v1/chat/completions") and "It'\\''s 1 egg" in curl
    page.click("#python")
    page.wait_for_timeout(200)
    python = page.evaluate("navigator.clipboard.readText()")
    answers = {}
    exec(compile(python.replace("print(", "answers['text'] = ("), "page", "exec"), {"answers": answers})
    shown = page.inner_text("#guided")
    assert answers["text"].strip() == shown.strip()


def test_a_character_of_several_tokens_is_shown_whole_and_a_stop_token_not_at_all(page):
    def entry(token):
        return {"token": token, "logprob": -1.0, "ref_logprob": -1.0, "kl": 0.0, "value": None}

    chunks = [(["\ufffd"], ""), (["\ufffd", " a", "b"], "é ab"), ([" <b>"], " <b>"), (["<end>"], "")]
    events = [
        {
            "choices": [
                {"delta": {"content": text}, "logprobs": {"content": [*map(entry, names)]}, "finish_reason": None}
            ]
        }
        for names, text in chunks
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page)
    assert page.text_content("#guided") == "é ab <b>"
    assert page.eval_on_selector_all("#guided span", "x => x.map(y => y.textContent)") == ["", "", "é a", "b", " <b>", ""]


def test_an_error_is_shown(page):
    page.fill("#prompt", "eggs " * 200)
    page.click("#ask")
    page.wait_for_function("() => document.getElementById('problem').textContent.includes('context')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(browser, server, scheme, tmp_path):
    """Text and background differ by at least 4.5 to 1, as WCAG 2 asks; every field has a label."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(server.url)
    colors = page.evaluate(
        "['body', '.faint', 'button', '#ask'].map(s => {"
        " const of = getComputedStyle(document.querySelector(s));"
        " let e = document.querySelector(s), back = of.backgroundColor;"
        " while (back === 'rgba(0, 0, 0, 0)') { e = e.parentElement; back = getComputedStyle(e).backgroundColor; }"
        " return [of.color, back]; })"
    )
    for text, back in colors:
        lighter, darker = sorted((luminance(text), luminance(back)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, back)
    unlabeled = "[...document.querySelectorAll('input, textarea, select')].filter(x => !x.labels.length).length"
    assert page.evaluate(unlabeled) == 0
    page.close()


def luminance(color):
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
