"""The page in a real browser, without a network."""

import json
import sys
import time

import pytest

from kanllama_lightning.dashboard.contents import Column
from kanllama_lightning.dashboard.dashboard_page import write_dashboard
from kanllama_lightning.dashboard.unpack import read_dashboard
from tests.browser import Browser, find_browser
from tests.dashboard.made_up import HOSTILE, made_up

CHROME = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROME is None, reason="no Chromium on the path; name one in CHROME"),
]
READY = "document.documentElement.dataset.ready"
LATENT = "document.querySelector('h1').textContent"
ROWS = "[...document.querySelectorAll('.index tbody tr td:first-child')].map(c => +c.textContent)"
COUNT = "document.getElementById('count').textContent"
SEARCHED = "document.getElementById('count').dataset.done === 'true'"


@pytest.fixture(scope="module")
def browser():
    with Browser(CHROME) as made:
        yield made


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    path = tmp_path_factory.mktemp("usual") / "dashboard.html"
    write_dashboard(path, made_up(300))
    return path, read_dashboard(path)


@pytest.fixture
def shown(browser, usual):
    """A browser with the usual dashboard; at the end it must have had nothing to say."""
    browser.messages.clear()
    browser.requests.clear()
    browser.resize(1280)
    browser.open(usual[0])
    browser.wait(READY)
    yield browser
    assert browser.messages == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data", "about"}


def search(browser, text):
    browser.evaluate("document.getElementById('search').select()")
    browser.type(text)
    browser.wait(f"document.getElementById('search').value === {json.dumps(text)}")
    browser.wait(SEARCHED)


def at(browser, latent):
    browser.wait(f"{LATENT}.startsWith('Latent {latent} ') && location.hash.includes('/{latent}')")


def back_at_index(browser):
    browser.wait("document.getElementById('of-index') && !location.hash.includes('latent')")


def text_of(dashboard, j):
    latent = dashboard["latent"](j)
    return [
        "".join(window["tokens"]).lower() for band in latent["bands"] for window in band["windows"]
    ]


def found_by(dashboard, text):
    text = text.lower()
    words = [c["values"] for c in dashboard["columns"].values() if c["form"] == "text"][1:]
    return [
        j
        for j in range(dashboard["n"])
        if any(text in part.lower() for part in dashboard["labels"][j])
        or any(v[j] and text in v[j].lower() for v in words)
        or any(text in window for window in text_of(dashboard, j))
    ]


def test_the_index_shows_the_latents(shown, usual):
    assert shown.evaluate(ROWS) == list(range(50))
    assert shown.evaluate(COUNT) == "300 latents"
    row = shown.evaluate("document.querySelectorAll('.index tbody tr')[2].innerText")
    for label in usual[1]["labels"][2]:
        assert label.strip() in row
    assert f"{100 * usual[1]['columns']['frequency']['values'][2]:.3g}%" in row


def test_it_opens_on_latents_worth_seeing(browser, tmp_path):
    data = made_up(60)
    (kurtosis,) = (c.values for c in data.columns if c.key == "kurtosis")
    same = Column("same", "all alike", [0.37 + 0.0001 * j for j in range(60)], "help", "number")
    columns = [*data.columns, same]
    path = tmp_path / "dashboard.html"
    start = [5, 7]
    write_dashboard(
        path, data._replace(columns=columns, order="kurtosis", start=start), "index.html"
    )
    browser.messages.clear()
    browser.open(path)
    browser.wait(READY)
    there = [j for j in range(60) if kurtosis[j] is not None]
    order = sorted(there, key=lambda j: kurtosis[j], reverse=True)
    assert browser.evaluate(ROWS) == order[:50]
    hrefs = browser.evaluate("[...document.querySelectorAll('.start a')].map(a => a.hash)")
    assert hrefs == [f"#latent/{j}" for j in start]
    heads = browser.evaluate("document.querySelector('.index thead').innerText")
    assert "kurtosis" in heads
    assert "all alike" not in heads
    assert browser.evaluate("document.querySelector('.top a[href=\"index.html\"]') !== null")
    browser.evaluate("location.hash = '#sort=latent'")
    browser.wait(f"{ROWS}[0] === 0")
    assert browser.evaluate(ROWS) == list(range(50))
    assert browser.messages == []


@pytest.mark.parametrize("key", ["kurtosis", "explanation", "score", "frequency"])
def test_columns_sort_both_ways_none_last(shown, usual, key):
    values = usual[1]["columns"][key]["values"]
    title = usual[1]["columns"][key]["title"]
    button = f"[...document.querySelectorAll('th button')].find(b => b.textContent === '{title}')"
    for turn in range(2):
        shown.evaluate(f"{button}.focus()")
        shown.press("Enter")
        falls = (turn == 0) == (key != "explanation")
        state = "descending" if falls else "ascending"
        shown.wait(f"{button}.parentElement.getAttribute('aria-sort') === '{state}'")
        there = [j for j in range(300) if values[j] is not None]
        order = sorted(there, key=lambda j: values[j], reverse=falls)
        assert shown.evaluate(ROWS) == order[:50]
        address = f"#sort={key}{'-' * falls}"
        shown.wait(f"location.hash === '{address}'")
        shown.evaluate(f"location.hash = '{address}&page=6'")
        shown.wait("document.querySelector('.pages').textContent.includes('6 of 6')")
        assert shown.evaluate(ROWS)[-15:] == list(range(285, 300))


def test_filters_narrow_the_index_down(shown, usual):
    kurtosis = usual[1]["columns"]["kurtosis"]["values"]
    frequency = usual[1]["columns"]["frequency"]["values"]
    set_it = (
        "(name, v) => { const i = document.querySelector(`input[aria-label='${name}']`);"
        "i.value = v; i.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    shown.evaluate(f"({set_it})('least kurtosis', '8')")
    shown.evaluate(f"({set_it})('most frequency, %', '0.1')")
    wanted = [j for j in range(285) if kurtosis[j] >= 8 and frequency[j] <= 0.001]
    assert 5 < len(wanted) < 200
    assert shown.evaluate(ROWS) == wanted[:50]
    assert shown.evaluate(COUNT) == f"{len(wanted)} latents of 300"
    shown.wait("location.hash.includes('min.kurtosis=8')")
    # the address alone brings the same rows
    address = shown.evaluate("location.hash")
    shown.open(usual[0], address)
    shown.wait(READY)
    assert shown.evaluate(ROWS) == wanted[:50]
    assert (
        shown.evaluate("document.querySelector(`[aria-label='most frequency, %']`).value") == "0.1"
    )
    shown.open(usual[0])
    shown.wait(READY)
    shown.evaluate("document.querySelector('input[value=dead]').click()")
    assert shown.evaluate(ROWS) == list(range(285, 300))


@pytest.mark.parametrize("text", ["river", " the of", "漢", "Captain", "n g", "no such words"])
def test_search_finds_labels_words_and_contexts(shown, usual, text):
    wanted = found_by(usual[1], text)
    search(shown, text)
    assert shown.evaluate(ROWS) == wanted[:50]
    assert shown.evaluate(COUNT).split()[0] == str(len(wanted))


def test_search_finds_a_number(shown):
    search(shown, "#123")
    assert shown.evaluate(ROWS) == [123]


def test_search_needs_the_contexts_for_what_only_they_hold(shown, usual):
    latent, text = next(
        (j, t[4:28])
        for j in range(5, 285)
        for t in text_of(usual[1], j)
        if len(found_by(usual[1], t[4:28].strip())) == 1
    )
    search(shown, text.strip())
    assert shown.evaluate(ROWS) == [latent]
    shown.evaluate("document.querySelector('.index tbody a').click()")
    at(shown, latent)
    hit = shown.evaluate("document.querySelector('li.hit .text').textContent")
    assert text.strip() in hit.lower()


def test_keys_go_through_the_order_of_the_index(shown, usual):
    values = usual[1]["columns"]["kurtosis"]["values"]
    order = sorted(range(285), key=lambda j: -values[j])
    shown.evaluate("location.hash = '#sort=kurtosis-'")
    shown.wait(f"{ROWS}[0] === {order[0]}")
    shown.evaluate("document.querySelectorAll('.index tbody a')[1].click()")
    at(shown, order[1])
    shown.press("ArrowRight")
    at(shown, order[2])
    shown.press("ArrowRight")
    at(shown, order[3])
    shown.press("ArrowLeft")
    at(shown, order[2])
    shown.evaluate("history.back()")
    at(shown, order[3])
    shown.press("Escape")
    back_at_index(shown)
    assert shown.evaluate(ROWS) == order[:50]
    shown.evaluate("history.back()")
    at(shown, order[3])
    shown.press("u")
    back_at_index(shown)
    shown.press("/")
    shown.wait("document.activeElement.id === 'search'")
    shown.type("a")
    shown.press("ArrowLeft")
    shown.press("u")
    shown.wait("document.activeElement.value.includes('u')")
    back_at_index(shown)


def test_going_back_right_after_typing_keeps_what_was_typed(shown):
    shown.evaluate("document.getElementById('search').focus()")
    shown.type("river")
    shown.evaluate("document.querySelector('.index tbody a').click()")
    shown.wait("location.hash.startsWith('#latent/')")
    shown.evaluate("history.back()")
    back_at_index(shown)
    assert shown.evaluate("document.getElementById('search').value") == "river"


@pytest.mark.parametrize("j", [0, 21, 84])
def test_a_latent_s_page_says_what_is_known(shown, usual, j):
    shown.evaluate(f"location.hash = '#latent/{j}'")
    at(shown, j)
    latent = usual[1]["latent"](j)
    windows = [w for band in latent["bands"] for w in band["windows"]]
    lines = shown.evaluate(
        "[...document.querySelectorAll('.text')].map(p => [...p.children].map("
        "s => [s.textContent, s.style.getPropertyValue('--a'), s.className]))"
    )
    assert len(lines) == len(windows) == 20
    largest = max(v for w in windows for v in w["values"].values())
    for line, window in zip(lines, windows, strict=True):
        assert len(line) == window["length"]
        for place, (text, shade, names) in enumerate(line):
            token = window["tokens"][place]
            assert text == {"": "·", "\n": "↵"}.get(token, token)
            value = window["values"].get(place)
            assert ("on" in names.split()) == (value is not None)
            assert ("peak" in names.split()) == (place == window["peak"])
            if value is not None:
                assert float(shade) == pytest.approx(value / largest)
    text = shown.evaluate("document.getElementById('main').innerText")
    assert latent["scores"][0] in text
    for other, jaccard, joint, _ in latent["related"]:
        row = shown.evaluate(
            "[...document.querySelectorAll('.side tr')].map(r => r.innerText)"
            f".find(t => t.startsWith('{other}\\t'))"
        )
        assert f"{joint:,}" in row
        assert f"{jaccard:.3g}".rstrip("0") in row
    for index, *_ in latent["coordinates"]:
        assert f"\n{index}\t" in text
    if latent["ablation"] is not None:
        assert "0.0312 nats" in text
    # what is not there has no section, but a line
    lacking = shown.evaluate("document.getElementById('lacking')?.innerText ?? ''")
    assert ("Without it" in text) == (latent["ablation"] is not None)
    assert ("--dashboard.ablated" in lacking) == (latent["ablation"] is None)
    assert ("Learned curve" in text) == (latent["curve"] is not None)


def test_the_value_shows_on_hover_and_on_focus(shown, usual):
    shown.evaluate("location.hash = '#latent/7'")
    at(shown, 7)
    window = usual[1]["latent"](7)["bands"][0]["windows"][0]
    value, token = window["values"][window["peak"]], window["tokens"][window["peak"]]
    tip = "document.getElementById('tip')"
    assert shown.evaluate(f"{tip}.hidden")
    shown.evaluate("document.querySelector('.t.peak').focus()")
    assert not shown.evaluate(f"{tip}.hidden")
    assert f"{value:#.3g} · 100%" in shown.evaluate(f"{tip}.textContent")
    assert token.strip() in shown.evaluate(f"{tip}.textContent")
    shown.evaluate("document.activeElement.blur()")
    assert shown.evaluate(f"{tip}.hidden")
    x, y = shown.evaluate(
        "(() => { const r = document.querySelector('.t.peak').getClientRects()[0];"
        "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    shown.move(x, y)
    shown.wait(f"!{tip}.hidden")
    assert f"{value:#.3g}" in shown.evaluate(f"{tip}.textContent")


def test_a_dead_latent_and_one_that_is_not_there(shown, usual):
    shown.open(usual[0], "#latent/299")
    shown.wait(READY)
    text = shown.evaluate("document.getElementById('main').innerText")
    assert "it never fired on these tokens" in text
    assert "NaN" not in text
    assert "undefined" not in text
    shown.open(usual[0], "#latent/300")
    shown.wait(READY)
    assert shown.evaluate(LATENT) == "No such latent"


def test_the_theme_is_chosen_or_the_system_s(shown):
    paper = "getComputedStyle(document.body).backgroundColor"
    assert shown.evaluate(paper) == "rgb(255, 255, 255)"
    shown.dark(True)
    dark = shown.evaluate(paper)
    assert dark != "rgb(255, 255, 255)"
    shown.evaluate("document.getElementById('theme').click()")
    assert shown.evaluate(paper) == "rgb(255, 255, 255)"
    shown.dark(False)
    shown.evaluate("document.getElementById('theme').click()")
    assert shown.evaluate(paper) == dark
    shown.evaluate("document.getElementById('theme').click()")
    assert shown.evaluate(paper) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("address", ["", "#latent/21", "#latent/299"])
def test_nothing_is_wider_than_a_phone(shown, usual, address):
    shown.resize(390, 844)
    shown.open(usual[0], address)
    shown.wait(READY)
    shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert shown.evaluate("document.documentElement.scrollWidth") == 390


def test_a_file_that_broke_off_says_so(shown, usual, tmp_path):
    html = usual[0].read_text()
    path = tmp_path / "short.html"
    path.write_text(html[: html.index('<script type="text/plain" id="latents-2">')])
    shown.open(path, "#latent/290")
    shown.wait("document.querySelector('[role=alert]')")
    assert "not complete" in shown.evaluate("document.querySelector('[role=alert]').textContent")
    shown.evaluate("location.hash = '#'")
    shown.wait("document.getElementById('of-index')")
    assert shown.evaluate(ROWS) == list(range(50))


@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_text_is_shown_as_text(browser, tmp_path, width):
    path = tmp_path / "dashboard.html"
    write_dashboard(path, made_up(40, texts=HOSTILE, words=HOSTILE, pool=2_000, width=12))
    browser.messages.clear()
    browser.resize(width)
    tags = set()
    for address in ("", *(f"#latent/{j}" for j in range(20)), "#q=%3Cscript%3E&sort=__proto__"):
        browser.open(path, address)
        browser.wait(READY)
        assert browser.evaluate("document.querySelector('[role=alert]')") is None
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        browser.evaluate("document.querySelectorAll('.t').forEach(t => t.focus())")
        tags |= set(browser.evaluate("[...new Set([...document.body.querySelectorAll('*')].map("
                                     "e => e.localName))]"))  # fmt: skip
        assert browser.evaluate("document.documentElement.scrollWidth") <= browser.evaluate(
            "document.documentElement.clientWidth"
        )
        odd = r"/[\u202a-\u202e\u2066-\u2069\u200e\u200f\u0000-\u0008\u001b\u007f-\u009f]/u"
        assert not browser.evaluate(f"{odd}.test(document.body.innerText + document.title)")
    assert browser.evaluate("window.ran") is None
    assert not tags & {"img", "iframe", "object", "base", "link", "style"}
    assert browser.evaluate("document.scripts.length") == 1 + 4
    assert browser.messages == []

    browser.open(path)
    browser.wait(READY)
    text = browser.evaluate("document.getElementById('main').textContent")
    for piece in HOSTILE[:7]:
        assert piece in text
    assert "\\u202e" in text
    browser.open(path, "#latent/3")
    browser.wait(READY)
    kept = [t for t in HOSTILE if 0 < len(t) < 80 and t.isprintable()]
    lines = browser.evaluate("[...document.querySelectorAll('.t')].map(t => t.textContent)")
    assert set(kept) <= set(lines)
    # long ones are cut, and whole on demand
    assert max(map(len, lines)) < 700
    browser.evaluate(
        "[...document.querySelectorAll('.t.cut')].find(t => /^x/.test(t.textContent)).click()"
    )
    assert browser.evaluate("document.getElementById('full').open")
    assert browser.evaluate("document.getElementById('full-text').textContent") == "x" * 10_000
    assert (
        browser.evaluate("getComputedStyle(document.querySelector('.t')).unicodeBidi") == "isolate"
    )


def test_the_policy_stops_what_is_put_into_the_page(browser, usual):
    browser.open(usual[0])
    browser.wait(READY)
    put = "<img src=x onerror='window.ran=1'><p style='color:red' id=put>x</p>"
    browser.evaluate(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(put)})")
    run = "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
    browser.evaluate(f"(() => {{ {run} document.body.append(s); }})()")
    time.sleep(0.2)
    assert browser.evaluate("window.ran") is None
    assert (
        browser.evaluate("getComputedStyle(document.getElementById('put')).color")
        != "rgb(255, 0, 0)"
    )
    # and the console is heard
    assert any("Content Security Policy" in message for message in browser.messages)


def test_sixteen_thousand_latents_are_small_and_quick(browser, tmp_path, capsys):
    path = tmp_path / "dashboard.html"
    n, width = 1 << 14, 32
    write_dashboard(path, made_up(n, n_texts=50_000, pool=20 * n * width, width=width))
    size = path.stat().st_size / 1e6
    browser.resize(1280)
    browser.messages.clear()
    start = time.perf_counter()
    browser.open(path, whole=False)
    browser.wait(f"{READY} && {ROWS}.length === 50")
    first = time.perf_counter() - start
    start = time.perf_counter()
    browser.evaluate("[...document.querySelectorAll('th button')][2].click()")
    browser.evaluate(ROWS)
    sort = time.perf_counter() - start
    start = time.perf_counter()
    browser.evaluate("location.hash = '#latent/9999'")
    at(browser, 9999)
    latent = time.perf_counter() - start
    browser.press("u")
    back_at_index(browser)
    start = time.perf_counter()
    search(browser, "mountain captain")
    whole = time.perf_counter() - start
    with capsys.disabled():
        sys.stdout.write(
            f"\n{size:.1f} MB; first view {first:.2f} s, sort {sort:.2f} s, latent {latent:.2f} s, "
            f"search of all contexts {whole:.1f} s\n"
        )
    assert size < 50
    assert first < 3
    assert browser.messages == []
