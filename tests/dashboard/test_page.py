"""The page as a file: what is packed comes back, and nothing in it can get out of its place."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from itertools import chain

import numpy as np
import pytest

from kanllama_lightning.dashboard import dashboard_page as page
from kanllama_lightning.dashboard.dashboard_page import write_dashboard
from kanllama_lightning.dashboard.unpack import blocks, read_dashboard
from tests.dashboard.made_up import HOSTILE, made_up


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of scripts and styles as browsers see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.inner, self.title = [], [], ""
        self.within = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.within = tag
        if tag in ("script", "style"):
            self.inner.append((tag, dict(attributes), ""))

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within in ("script", "style"):
            tag, attributes, text = self.inner[-1]
            self.inner[-1] = (tag, attributes, text + data)
        if self.within == "title":
            self.title += data


def hostile(n=24):
    return made_up(n, texts=HOSTILE, words=HOSTILE, pool=2_000, width=12)


def written(tmp_path, data):
    path = tmp_path / "dashboard.html"
    write_dashboard(path, data)
    return path


@pytest.mark.parametrize("n_texts", [200, 3_000, 70_000])
def test_what_is_packed_comes_back(tmp_path, monkeypatch, n_texts):
    monkeypatch.setattr(page, "CHUNK", 8)
    monkeypatch.setattr(page, "POOL_CHUNK", 1_000)
    got = read_dashboard(written(tmp_path, made_up(30, n_texts=n_texts, pool=4_500)))
    was = made_up(30, n_texts=n_texts, pool=4_500)
    assert got["planes"] == {200: 1, 3_000: 2, 70_000: 3}[n_texts]
    assert (got["n"], got["title"], got["about"]) == (30, was.title, was.about)
    assert got["labels"] == was.labels
    assert list(got["columns"]) == [c.key for c in was.columns]
    for column in was.columns:
        mine = got["columns"][column.key]
        assert (mine["title"], mine["help"], mine["form"]) == column[1:2] + column[3:]
        for a, b in zip(mine["values"], column.values, strict=True):
            assert a == b if b is None or isinstance(b, str) else a == pytest.approx(b, rel=1e-5)
    assert [got["texts"][i] for i in got["pool"]] == [was.texts[i] for i in was.pool]
    for j, latent in enumerate(was.latents):
        mine = got["latent"](j)
        assert len(mine["bands"]) == len(latent.bands)
        for (title, windows), band in zip(latent.bands, mine["bands"], strict=True):
            assert title == band["title"]
            for window, shown in zip(windows, band["windows"], strict=True):
                assert window[:3] == (shown["start"], shown["length"], shown["peak"])
                assert {k: f"{v:.3g}" for k, v in window.values} == {
                    k: f"{v:.3g}" for k, v in shown["values"].items()
                }
                pieces = was.pool[window.start : window.start + window.length]
                assert shown["tokens"] == [was.texts[i] for i in pieces]
        assert mine["density"] == latent.density
        for name in ("boosted", "suppressed"):
            assert [t for t, _ in mine[name]] == [t for t, _ in getattr(latent, name)]
        for name in ("lens", "coordinates", "encoder_cosine", "related", "ablation", "curve",
                     "scores", "concepts"):  # fmt: skip
            alike(mine[name], getattr(latent, name))
    assert j == 29


def alike(a, b):
    if isinstance(b, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            alike(x, y)
    else:
        assert a == (pytest.approx(b, rel=6e-3) if isinstance(b, float) else b)


def test_sparklines_tell_empty_bins_from_small_ones(tmp_path):
    data = made_up(2)._replace(sparklines=[[0, 1, 100_000, 50_000], [0, 0, 0, 0]])
    assert read_dashboard(written(tmp_path, data))["sparklines"] == ["01zi", "0000"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_missing(tmp_path, value):
    data = made_up(3)
    data.columns[1].values[1] = value
    (latent, *rest) = data.latents
    latents = [latent._replace(encoder_cosine=value), *rest]
    got = read_dashboard(written(tmp_path, data._replace(latents=latents)))
    assert got["columns"]["frequency"]["values"][1] is None
    assert got["latent"](0)["encoder_cosine"] is None


def test_numbers_of_numpy_are_numbers(tmp_path):
    data = made_up(3)
    data.columns[1].values[0] = np.float32(0.25)
    data.columns[2].values[0] = np.int64(7)
    got = read_dashboard(written(tmp_path, data))["columns"]
    assert (got["frequency"]["values"][0], got["max"]["values"][0]) == (0.25, 7)


def test_nothing_but_the_page_itself_is_markup(tmp_path):
    plain = Tags(written(tmp_path, made_up(24, pool=2_000, width=12)).read_text())
    bad = Tags(written(tmp_path, hostile()).read_text())
    shape = [(tag, sorted(a)) for tag, a in plain.tags]
    assert [(tag, sorted(a)) for tag, a in bad.tags] == shape
    inert = [(a["id"], text) for tag, a, text in bad.inner if a.get("type") == "text/plain"]
    assert len(inert) == 4
    for _, text in inert:
        assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    # what the title holds is text, and bidi marks in it are spelled out
    assert "<script>window.ran=1</script>" in bad.title
    assert "\\u202e" in bad.title
    assert "\u202e" not in bad.title


def test_only_its_own_script_and_style_may_run(tmp_path):
    tags = Tags(written(tmp_path, hostile()).read_text())
    (policy,) = (
        a["content"] for _, a in tags.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    hashes = {
        kind: [
            f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
            for tag, a, text in tags.inner
            if tag == kind and "type" not in a
        ]
        for kind in ("script", "style")
    }
    assert rules == {
        "default-src": ["'none'"],
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    assert len(hashes["script"]) == len(hashes["style"]) == 1
    # the policy is in force before anything it is about
    names = [tag for tag, _ in tags.tags]
    assert [a for _, a in tags.tags[:5] if "http-equiv" in a]
    assert "style" not in names[:5]


def test_nothing_is_fetched_and_no_text_becomes_markup(tmp_path):
    tags = Tags(written(tmp_path, made_up(3)).read_text())
    links = [v for _, a in tags.tags for k, v in a.items() if k in ("href", "src", "action")]
    assert sorted(links) == ["#", "#main", "data:,"]
    assert not [k for _, a in tags.tags for k in a if k.startswith("on") or k == "style"]
    (script,) = (text for tag, a, text in tags.inner if tag == "script" and "type" not in a)
    banned = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser"
    )
    assert not re.search(banned + r"|fetch\(|XMLHttpRequest|import\(|https?://(?!www\.w3\.org/2000)",
                         script)  # fmt: skip
    (style,) = (text for tag, _, text in tags.inner if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_latents_are_made_one_block_at_a_time(tmp_path, monkeypatch):
    data = made_up(40, pool=2_000)
    part = tmp_path / "dashboard.html.tmp"
    monkeypatch.setattr(page, "CHUNK", 4)
    sizes, blocks_, made = [], page._blocks, []

    def counted():
        for latent in data.latents:
            made.append(latent)
            yield latent

    def noted(*given):
        for name, packed in blocks_(*given):
            yield name, packed
            if name.startswith("latents-"):  # the block is written
                sizes.append(len(made))

    monkeypatch.setattr(page, "_blocks", noted)
    write_dashboard(tmp_path / "dashboard.html", data._replace(latents=counted()))
    assert sizes == list(range(4, 41, 4))
    assert not part.exists()


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(tmp_path):
    path = written(tmp_path, made_up(3))
    before = path.read_bytes()
    data = made_up(3)

    def fails():
        yield next(iter(data.latents))
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        write_dashboard(path, data._replace(latents=fails()))
    assert path.read_bytes() == before


@pytest.mark.parametrize("n", [2, 4])
def test_as_many_latents_as_rows(tmp_path, n):
    data = made_up(3)
    latents = list(chain(data.latents, made_up(3).latents))[:n]
    with pytest.raises(ValueError, match=f"{n} latents, but the index has 3 rows"):
        write_dashboard(tmp_path / "dashboard.html", data._replace(latents=latents))
    assert not (tmp_path / "dashboard.html").exists()


def test_a_head_none_of_whose_latents_fired(tmp_path):
    data = made_up(3)
    dead = list(made_up(40).latents)[-3:]
    empty = data._replace(texts=[], pool=np.zeros(0, dtype=np.int32), latents=dead)
    got = read_dashboard(written(tmp_path, empty))
    assert got["latent"](2)["bands"] == []
    assert (len(got["pool"]), got["texts"]) == (0, [])


def test_size_per_token_and_firing(tmp_path):
    path = written(tmp_path, made_up(640, n_texts=20_000, pool=200_000))
    found = {name: len(raw) for name, raw in blocks(path.read_text()).items()}
    packed = dict(re.findall(r'id="(pool-\d+|latents-\d+)">([^<]*)<', path.read_text()))
    pool = sum(len(text) for name, text in packed.items() if name.startswith("pool"))
    latents = sum(len(text) for name, text in packed.items() if name.startswith("latents"))
    assert sum(size for name, size in found.items() if name.startswith("pool")) == 400_000
    # 16,384 latents with 10.5 million tokens then stay under 50 MB
    assert pool / 200_000 < 2.3
    assert latents / 640 < 1_500
    assert json.loads(blocks(path.read_text())["index"])["n"] == 640
