
"use strict";
// Whatever comes from the data is set as text, never as markup.
(() => {
  const PAGE_ROWS = 50;
  const CUT = 80;
  const KINDS = ["alive", "dense", "dead"];

  // ---------------------------------------------------------------- text

  const ODD = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u00a0\u1680\u2000-\u200a\u202f\u205f\u034f\u115f\u1160\u3164\uffa0\u2800\ufe00-\ufe0f\u{e0000}-\u{e01ef}]/gu;
  // letters of Arabic and the like that only count as format characters
  const FINE = /[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u{110bd}\u{110cd}]/u;
  const JOINER = /[\u200c\u200d]/;
  const SELECTOR = /[\ufe00-\ufe0f\u{e0100}-\u{e01ef}]/u;
  const SIGNS = { "\n": "↵", "\t": "⇥" };

  /** A character that does not show, as Python writes it. */
  function escaped(c) {
    const code = c.codePointAt(0);
    const [mark, width] = code < 0x100 ? ["\\x", 2] : code < 0x10000 ? ["\\u", 4] : ["\\U", 8];
    return mark + code.toString(16).padStart(width, "0");
  }

  /** The text in parts: [shown, whether it stands for something that does not show]. */
  function parts(text) {
    const made = [];
    let from = 0;
    for (const found of text.matchAll(ODD)) {
      const c = found[0], at = found.index, before = text.slice(Math.max(0, at - 28), at);
      const after = at > 0 && !/\s$/u.test(before);
      const last = [...before.slice(-2)].pop() || "";
      const joins = JOINER.test(c) && after && !JOINER.test(last);
      const selects = SELECTOR.test(c) && after && !SELECTOR.test(last);
      const tag = /[\u{e0020}-\u{e007f}]/u.test(c)
        && /\u{1f3f4}[\u{e0020}-\u{e007f}]{0,12}$/u.test(before);
      if (joins || selects || tag || FINE.test(c)) continue;
      if (at > from) made.push([text.slice(from, at), false]);
      const sign = SIGNS[c] || escaped(c);
      if (made.length && at === from && made.at(-1)[1]) made.at(-1)[0] += sign;
      else made.push([sign, true]);
      from = at + c.length;
    }
    if (from < text.length) made.push([text.slice(from), false]);
    return made;
  }

  const plain = (text) => parts(text).map(([shown]) => shown).join("");

  function cut(text, most = CUT) {
    if (text.length <= most) return text;
    return text.slice(0, most).replace(/[\ud800-\udbff]$/, "");
  }

  /** An element; strings among the children become text. */
  function el(tag, attributes, ...children) {
    const made = document.createElement(tag);
    set(made, attributes);
    made.append(...children.flat(3).filter((c) => c !== null && c !== undefined));
    return made;
  }

  function svg(tag, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    set(made, attributes);
    made.append(...children.flat(3));
    return made;
  }

  function set(element, attributes) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : value);
    }
  }

  /** Text from the data, what does not show made visible. */
  function shown(text, most = Infinity) {
    const short = cut(text, most);
    const made = parts(short).map(([s, odd]) => (odd ? el("span", { class: "x" }, s) : s));
    if (short.length < text.length) made.push(el("span", { class: "x" }, "…"));
    return made;
  }

  /** A run of text of its own direction; what is too long opens on demand. */
  function words(text, most = 600) {
    const made = el("bdi", {}, ...shown(text, most));
    if (text.length <= most) return made;
    const all = el("button", { class: "linkish", type: "button" }, "show all");
    all.addEventListener("click", () => openFull(text));
    return el("span", {}, made, " ", all);
  }

  /** A token in a list: blanks at its ends show. */
  function chip(text, most = 40) {
    const ends = /^( *)(.*?)( *)$/s.exec(cut(text, most));
    const blank = (s) => (s ? [el("span", { class: "x" }, "␣".repeat(s.length))] : []);
    const inner = [...blank(ends[1]), ...shown(ends[2]), ...blank(ends[3])];
    if (text.length > most) {
      const more = el("button", { class: "linkish", type: "button", "aria-label": "Full token" }, "…");
      more.addEventListener("click", () => openFull(text));
      inner.push(more);
    }
    return el("bdi", { class: "tok" }, inner.length ? inner : el("span", { class: "x" }, "·"));
  }

  // ---------------------------------------------------------------- numbers

  const grouped = (v, digits = 0) => v.toLocaleString("en", { maximumFractionDigits: digits });

  function number(v) {
    if (v === null || v === undefined) return "–";
    const size = Math.abs(v);
    if (size === 0) return "0";
    if (size >= 1e7 || size < 1e-4) return v.toExponential(2);
    if (size >= 999.5) return grouped(Number(v.toPrecision(3)));
    return v.toPrecision(3);
  }

  function percent(v) {
    if (v === null || v === undefined) return "–";
    return (v === 1 ? "100" : number(100 * v)) + "%";
  }

  function formatted(column, v) {
    if (v === null || v === undefined) return "–";
    if (typeof v === "string") return plain(v);
    if (column.form === "percent") return percent(v);
    return column.form === "integer" ? grouped(v, 2) : number(v);
  }

  // ---------------------------------------------------------------- packed data

  function bytesOf(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  }

  let parsed = document.readyState !== "loading";
  const complete = new Promise((done) => {
    if (parsed) done();
    else addEventListener("DOMContentLoaded", () => { parsed = true; done(); });
  });

  async function unpack(name) {
    // while the file is still being read a block may be there in part
    const there = document.getElementById(name);
    if (!parsed && !(there && there.nextElementSibling)) await complete;
    const block = document.getElementById(name);
    if (!block) throw new Error("The file is not complete: its part " + name + " is missing.");
    const stream = new Blob([bytesOf(block.textContent)]).stream()
      .pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  const unpackJson = async (name) => JSON.parse(new TextDecoder().decode(await unpack(name)));

  let index, byKey, numeric, texts = null, lower = null, pool = null;
  const poolParts = new Map(), chunks = new Map(), stretches = new Map();

  function loadTexts() {
    texts ||= unpackJson("texts");
    return texts;
  }

  /** Fills in one block of the pool. */
  function loadPool(i) {
    if (!poolParts.has(i)) {
      poolParts.set(i, unpack("pool-" + i).then((buffer) => {
        const planes = new Uint8Array(buffer), n = planes.length / index.planes;
        pool ||= new (index.planes > 2 ? Uint32Array : Uint16Array)(index.pool);
        const first = i * index.pool_chunk;
        for (let plane = 0; plane < index.planes; plane++) {
          for (let t = 0; t < n; t++) pool[first + t] |= planes[plane * n + t] << (8 * plane);
        }
      }));
    }
    return poolParts.get(i);
  }

  async function chunk(i) {
    const found = chunks.get(i) || unpackJson("latents-" + i);
    chunks.delete(i);
    chunks.set(i, found); // the most recent ones last
    if (chunks.size > 12) chunks.delete(chunks.keys().next().value);
    return found;
  }

  async function latentOf(j) {
    const fields = (await chunk(Math.floor(j / index.chunk)))[j % index.chunk];
    const [bands, density, boosted, suppressed, lens, coordinates, cosine, related, ablation,
      curve, scores, concepts] = fields;
    const windows = bands.flatMap(([, own]) => own);
    const needed = new Set();
    for (const [start, length] of windows) {
      const last = Math.floor((start + length - 1) / index.pool_chunk);
      for (let i = Math.floor(start / index.pool_chunk); i <= last; i++) needed.add(i);
    }
    await Promise.all([loadTexts(), ...[...needed].map(loadPool)]);
    return { bands, density, boosted, suppressed, lens, coordinates, cosine, related, ablation,
      curve, scores, concepts };
  }

  /** Where the windows of a block's latents are: [latent, start, length, ...]. */
  async function stretchesOf(i) {
    if (!stretches.has(i)) {
      const flat = [];
      (chunks.has(i) ? await chunks.get(i) : await unpackJson("latents-" + i)).forEach((fields, k) => {
        for (const [, own] of fields[0]) {
          for (const w of own) flat.push(i * index.chunk + k, w[0], w[1]);
        }
      });
      stretches.set(i, Int32Array.from(flat));
    }
    return stretches.get(i);
  }

  function textOf(table, start, length) {
    let made = "";
    for (let t = start; t < start + length; t++) made += table[pool[t]];
    return made;
  }

  // ---------------------------------------------------------------- state, in the address

  /** The order that the index opens in; before it is read, that of the numbers. */
  const opening = () => (index && byKey.has(index.order) ? index.order : "latent");
  const initial = () => ({ q: "", sort: opening(), desc: opening() !== "latent", kinds: new Set(),
    ranges: {}, page: 0, latent: null });
  let state = initial();

  function query(s) {
    const made = new URLSearchParams();
    if (s.q) made.set("q", s.q);
    if (s.sort !== opening() || s.desc !== (s.sort !== "latent")) {
      made.set("sort", s.sort + (s.desc ? "-" : ""));
    }
    if (s.kinds.size) made.set("kind", [...s.kinds].join(","));
    for (const [key, [low, high]] of Object.entries(s.ranges)) {
      if (low !== null) made.set("min." + key, low);
      if (high !== null) made.set("max." + key, high);
    }
    if (s.page) made.set("page", s.page + 1);
    return made.toString();
  }

  function hashOf(changes) {
    const s = { ...state, ...changes }, q = query(s);
    return s.latent === null ? "#" + q : "#latent/" + s.latent + (q ? "?" + q : "");
  }

  function read(hash) {
    const made = initial();
    const [, number, rest] = /^#(?:latent\/(\d+)(?:\?|$))?(.*)$/s.exec(hash || "#");
    if (number !== undefined) made.latent = Number(number);
    const q = new URLSearchParams(rest);
    made.q = q.get("q") || "";
    const sort = q.get("sort") || "", key = sort.replace(/-$/, "");
    if (key === "latent" || byKey.has(key)) [made.sort, made.desc] = [key, sort.endsWith("-")];
    for (const kind of (q.get("kind") || "").split(",")) if (KINDS.includes(kind)) made.kinds.add(kind);
    for (const column of numeric) {
      const ends = ["min.", "max."].map((end) => toNumber(q.get(end + column.key)));
      if (ends[0] !== null || ends[1] !== null) made.ranges[column.key] = ends;
    }
    made.page = Math.max(0, Math.floor(Number(q.get("page")) || 1) - 1);
    return made;
  }

  function toNumber(text) {
    if (text === null || text.trim() === "") return null;
    const v = Number(text);
    return Number.isFinite(v) ? v : null;
  }

  let unsaved = 0, followed = location.hash;

  /** Put the state of the index into the address. */
  function save() {
    if (!unsaved) return;
    clearTimeout(unsaved);
    unsaved = 0;
    // the address may have moved on, with the page yet to follow
    if (location.hash !== followed) return;
    history.replaceState(null, "", hashOf({}));
    followed = location.hash;
  }

  /** Another state of the index, without a step in the history. */
  function change(changes) {
    state = { ...state, page: 0, ...changes };
    clearTimeout(unsaved);
    unsaved = setTimeout(save, 250);
    renderIndex();
  }

  // ---------------------------------------------------------------- which latents, in which order

  let sorted = { key: null, order: null };

  function sortedAll() {
    const key = state.sort + (state.desc ? "-" : "");
    if (sorted.key === key) return sorted.order;
    const order = Array.from({ length: index.n }, (_, j) => j);
    const sign = state.desc ? -1 : 1;
    if (state.sort === "latent") {
      if (state.desc) order.reverse();
    } else {
      const values = byKey.get(state.sort).values;
      const collator = new Intl.Collator("en", { numeric: true });
      const compare = typeof values.find((v) => v !== null) === "string"
        ? (a, b) => collator.compare(a, b) : (a, b) => a - b;
      order.sort((a, b) => {
        const [va, vb] = [values[a], values[b]];
        if (va === null || vb === null) return (va === null) - (vb === null) || a - b;
        return sign * compare(va, vb) || a - b;
      });
    }
    sorted = { key, order };
    return order;
  }

  let haystack = null;

  /** What the search looks into without the contexts: labels and columns of words. */
  function haystacks() {
    if (!haystack) {
      const columns = index.columns.filter((c) => c.form === "text" && c.key !== "kind");
      haystack = index.labels.map((labels, j) => [...labels,
        ...columns.map((c) => c.values[j]).filter((v) => v !== null)].join("\n").toLowerCase());
    }
    return haystack;
  }

  let hits = { q: "", latents: new Set(), done: true, part: 0 };

  function order() {
    const q = state.q.trim().toLowerCase();
    const byNumber = /^#?\d+$/.test(q) ? Number(q.replace("#", "")) : -1;
    const kind = byKey.get("kind");
    const ranges = Object.entries(state.ranges)
      .map(([key, [low, high]]) => [byKey.get(key).values, low ?? -Infinity, high ?? Infinity]);
    const own = q ? haystacks() : null;
    return sortedAll().filter((j) => {
      if (state.kinds.size && kind && !state.kinds.has(kind.values[j])) return false;
      for (const [values, low, high] of ranges) {
        if (values[j] === null || values[j] < low || values[j] > high) return false;
      }
      return !q || j === byNumber || own[j].includes(q) || (hits.q === q && hits.latents.has(j));
    });
  }

  const pause = () => new Promise((done) => setTimeout(done));

  /** Looks for the words in all contexts, a little at a time. */
  async function searchTexts(q) {
    hits = { q, latents: new Set(), done: !q, part: 0 };
    if (!q) return;
    const mine = hits;
    const n = Math.ceil(index.n / index.chunk), nPool = Math.ceil(index.pool / index.pool_chunk);
    let rest = performance.now(), told = rest;
    const breathe = async (part) => {
      mine.part = part;
      if (performance.now() - rest > 14) {
        await pause();
        rest = performance.now();
        if (hits === mine && rest - told > 300) {
          told = rest;
          renderHits();
        }
      }
      return hits === mine;
    };
    try {
      const table = await loadTexts();
      lower ||= table.map((t) => t.toLowerCase());
      for (let i = 0; i < nPool; i++) {
        await loadPool(i);
        if (!await breathe(0.4 * i / nPool)) return;
      }
      for (let i = 0; i < n; i++) {
        const flat = await stretchesOf(i);
        for (let w = 0; w < flat.length; w += 3) {
          if (mine.latents.has(flat[w])) continue;
          if (textOf(lower, flat[w + 1], flat[w + 2]).includes(q)) mine.latents.add(flat[w]);
        }
        if (!await breathe(0.4 + 0.6 * i / n)) return;
      }
    } catch (error) {
      mine.error = error.message;
    }
    mine.done = true;
    if (hits === mine) renderHits();
  }

  function renderHits() {
    if (state.latent === null) renderRows();
    else renderPlace();
  }

  let searchTimer = 0;

  function searchSoon() {
    const q = state.q.trim().toLowerCase();
    clearTimeout(searchTimer);
    if (hits.q === q) return;
    hits = { q, latents: new Set(), done: !q, part: 0 };
    searchTimer = setTimeout(() => searchTexts(q), 200);
  }

  // ---------------------------------------------------------------- index

  const main = document.getElementById("main");
  let view = null, scrolled = 0;

  /** Whether a column tells latents apart: its numbers differ by a tenth, its words at all. */
  function telling(column) {
    const values = column.values.filter((v) => v !== null);
    if (column.key === "kind" || new Set(column.values).size > 1 && values.length < index.n) return true;
    if (column.form === "text") return new Set(values).size > 1;
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)],
      [Infinity, -Infinity]);
    return high - low > 0.1 * Math.max(Math.abs(low), Math.abs(high));
  }

  let seen = [];

  /** A few latents to begin with. */
  function startRow() {
    const why = byKey.get(index.order);
    return index.start.length ? [el("h2", {}, "Start here"), el("ul", { class: "start" },
      index.start.map((j) => el("li", {}, el("a", { href: hashOf({ latent: j }) }, "Latent " + j), " ",
        why ? el("span", { class: "none" }, plain(why.title) + " " + formatted(why, why.values[j])) : null,
        el("div", {}, words(byKey.get("label")?.values[j] || index.labels[j].slice(0, 4).join(" "), 90)),
        spark(index.sparklines[j]))))] : null;
  }

  function buildIndex() {
    seen = index.columns.filter(telling);
    const alike = index.columns.filter((c) => !seen.includes(c));
    const input = el("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false",
      placeholder: "Number, token, words of an explanation or a context", "aria-label": "Search",
      oninput: () => change({ q: input.value }) });
    const kind = byKey.get("kind");
    const kinds = el("fieldset", { class: "kinds", "aria-label": "Kind" });
    if (kind) {
      for (const name of KINDS) {
        const n = kind.values.filter((v) => v === name).length;
        const box = el("input", { type: "checkbox", value: name, onchange: () => {
          const chosen = new Set(state.kinds);
          if (box.checked) chosen.add(name); else chosen.delete(name);
          change({ kinds: chosen });
        } });
        kinds.append(el("label", {}, box, name + " (" + grouped(n) + ")"));
      }
    }
    const select = el("select", { id: "sort", onchange: () => change({ sort: select.value }) },
      el("option", { value: "latent" }, "number"),
      seen.map((c) => el("option", { value: c.key }, plain(cut(c.title, 40)))));
    const turn = el("button", { type: "button", onclick: () => change({ desc: !state.desc }) });
    const ranges = new Map();
    const filters = el("div", { class: "filters" }, numeric.map((c) => {
      const factor = c.form === "percent" ? 100 : 1;
      const present = c.values.filter((v) => v !== null);
      const [low, high] = present.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)],
        [Infinity, -Infinity]);
      const title = plain(cut(c.title, 40)) + (factor === 100 ? ", %" : "");
      const field = (name, hint) => el("input", { type: "number", step: "any",
        "aria-label": name + " " + title, placeholder: present.length ? number(factor * hint) : "",
        oninput: () => {
          const ends = fields.map((f) => {
            const v = toNumber(f.value);
            return v === null ? null : v / factor;
          });
          const { [c.key]: _, ...others } = state.ranges;
          change({ ranges: ends.some((v) => v !== null) ? { ...others, [c.key]: ends } : others });
        } });
      const fields = [field("least", low), field("most", high)];
      ranges.set(c.key, [fields, factor]);
      return el("fieldset", { class: "range", title: plain(c.help) }, el("span", {}, title), fields);
    }));
    const filterBox = el("details", {}, el("summary", {}, "Filter by numbers"), filters,
      el("p", { class: "note" }, "Least and most; latents without a value are left out."));
    const clear = el("button", { type: "button", class: "quiet",
      onclick: () => change({ ...initial(), sort: state.sort, desc: state.desc }) }, "Clear all");
    const count = el("p", { id: "count", role: "status" });
    const before = el("button", { type: "button", class: "quiet", onclick: () => turnPage(-1) }, "← Page");
    const after = el("button", { type: "button", class: "quiet", onclick: () => turnPage(1) }, "Page →");
    const place = el("span", {});
    const body = el("tbody", { role: "rowgroup" });
    const heads = new Map();
    const head = (key, title, help, side) => {
      const button = el("button", { type: "button", title: help, onclick: () => sortBy(key) }, title);
      const cell = el("th", { scope: "col", role: "columnheader", class: side }, button);
      heads.set(key, cell);
      return cell;
    };
    const plainHead = (title) => el("th", { scope: "col", role: "columnheader" },
      el("span", { class: "pad" }, title));
    const row = el("tr", { role: "row" }, head("latent", "latent", "number of the latent", "n"),
      plainHead("tokens"), plainHead("activations"),
      seen.map((c) => head(c.key, plain(cut(c.title, 40)), plain(c.help), side(c))));
    const table = el("table", { class: "index", role: "table" },
      el("caption", { class: "note", hidden: true }, "Latents"),
      el("thead", { role: "rowgroup" }, row), body);
    const about = el("details", {}, el("summary", {}, "What the figures mean"),
      index.about.slice(1).map((p) => el("p", {}, words(p, 3000))),
      el("p", {}, "Tokens: those it fires on most. Activations: their density, weak to strong."),
      alike.length ? el("p", {}, "Much the same for all latents, so no column: ",
        alike.map((c) => plain(cut(c.title, 40))).join(", ") + ".") : null,
      el("dl", {}, index.columns.map((c) => [el("dt", {}, el("b", {}, words(c.title, 80))),
        el("dd", {}, words(c.help))])));
    const keys = el("p", { class: "note keys" }, "Keys: ", el("kbd", {}, "/"), " search; on a latent ",
      el("kbd", {}, "←"), " ", el("kbd", {}, "→"), " the latents beside it in this order, ",
      el("kbd", {}, "Esc"), " or ", el("kbd", {}, "u"), " back here.");
    const root = el("div", { id: "of-index" }, el("h1", {}, ...shown(index.title, 200)),
      index.about.slice(0, 1).map((p) => el("p", {}, words(p, 1500))), about, startRow(),
      el("div", { class: "search", role: "search" }, input, kinds,
        el("span", { class: "sorting" }, el("label", { for: "sort" }, "Sort by"), select, turn), clear),
      filterBox,
      el("div", { class: "count" }, count, el("span", { class: "pages" }, before, place, after)),
      el("div", { class: "wide" }, table), keys);
    return { root, input, kinds, select, turn, ranges, filterBox, clear, count, before, after, place,
      body, heads };
  }

  const side = (column) => (column.form === "text" ? "" : "n");

  function sortBy(key) {
    if (state.sort === key) change({ desc: !state.desc });
    else change({ sort: key, desc: key !== "latent" && byKey.get(key).form !== "text" });
  }

  function turnPage(by) {
    change({ page: state.page + by });
    view.count.scrollIntoView({ block: "nearest" });
  }

  function renderIndex() {
    view ||= buildIndex();
    searchSoon();
    if (view.input.value !== state.q) view.input.value = state.q;
    for (const box of view.kinds.querySelectorAll("input")) box.checked = state.kinds.has(box.value);
    view.select.value = state.sort;
    view.turn.textContent = state.desc ? "▼" : "▲";
    view.turn.setAttribute("aria-label", state.desc ? "Falling; make it rise" : "Rising; make it fall");
    for (const [key, [fields, factor]] of view.ranges) {
      const ends = state.ranges[key] || [null, null];
      fields.forEach((field, i) => {
        const now = toNumber(field.value);
        if ((now === null ? null : now / factor) !== ends[i]) {
          field.value = ends[i] === null ? "" : Number((ends[i] * factor).toPrecision(12));
        }
      });
    }
    if (Object.keys(state.ranges).length) view.filterBox.open = true;
    for (const [key, cell] of view.heads) {
      if (key === state.sort) cell.setAttribute("aria-sort", state.desc ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    renderRows();
    if (!view.root.isConnected) {
      main.replaceChildren(view.root);
      document.title = plain(cut(index.title, 200));
      scrollTo(0, scrolled);
    }
  }

  function renderRows() {
    const found = order(), pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
    state.page = Math.min(Math.max(0, state.page), pages - 1);
    const first = state.page * PAGE_ROWS;
    const focused = view.body.contains(document.activeElement)
      ? document.activeElement.getAttribute("href") : null;
    view.body.replaceChildren(...found.slice(first, first + PAGE_ROWS).map(rowOf));
    if (focused) {
      [...view.body.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused)?.focus();
    }
    let text = grouped(found.length) + (found.length === 1 ? " latent" : " latents");
    if (found.length < index.n) text += " of " + grouped(index.n);
    if (hits.error) text += "; contexts not searched: " + hits.error;
    else if (!hits.done) text += ", searching contexts: " + Math.floor(100 * hits.part) + "%";
    view.count.textContent = text;
    view.count.dataset.done = hits.done;
    view.clear.disabled = found.length === index.n && !state.q && !state.kinds.size
      && !Object.keys(state.ranges).length;
    view.before.disabled = state.page === 0;
    view.after.disabled = state.page >= pages - 1;
    view.place.textContent = grouped(state.page + 1) + " of " + grouped(pages);
  }

  function rowOf(j) {
    const cell = (attributes, ...children) => el("td", { role: "cell", ...attributes }, ...children);
    const labels = index.labels[j].slice(0, 8).map((t) => chip(t, 24));
    return el("tr", { role: "row" },
      cell({ class: "n" }, el("a", { href: hashOf({ latent: j }) }, String(j))),
      cell({ class: "toks" + (labels.length ? "" : " missing") }, labels),
      cell({ class: index.sparklines[j].match(/[^0]/) ? "" : "missing" }, spark(index.sparklines[j])),
      seen.map((c) => {
        const v = c.values[j], missing = v === null ? " missing" : "";
        if (c.key === "kind") return cell({}, kindOf(j));
        const title = plain(cut(c.title, 40));
        if (typeof v === "string") {
          return cell({ class: "words", "data-title": title }, el("bdi", {}, ...shown(v, 110)));
        }
        return cell({ class: side(c) + missing, "data-title": title }, formatted(c, v));
      }));
  }

  function kindOf(j) {
    const kind = byKey.get("kind")?.values[j] ?? "";
    return el("span", { class: "kind " + (KINDS.includes(kind) ? kind : "") }, ...shown(kind, 20));
  }

  /** Bins as one small shape; heights come as letters. */
  function spark(bins) {
    if (!/[^0]/.test(bins)) return el("span", { class: "none" }, "–");
    let d = "";
    for (let i = 0; i < bins.length; i++) {
      const height = parseInt(bins[i], 36) / 35 * 22;
      if (height) d += `M${i},24v${-Math.max(height, 1.2)}h.85V24z`;
    }
    return svg("svg", { class: "spark", viewBox: `0 0 ${bins.length} 25`, preserveAspectRatio: "none",
      "aria-hidden": "true" }, svg("path", { d }),
    svg("line", { x1: 0, x2: bins.length, y1: 24.5, y2: 24.5 }));
  }

  // ---------------------------------------------------------------- figures

  const W = 380, H = 168, LEFT = 44, BOTTOM = 34, TOP = 8, RIGHT = 8;

  function ticks(low, high, n = 5) {
    if (!(high > low)) return [low];
    const raw = (high - low) / n, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * ([1, 2, 5, 10].find((m) => m * power >= raw) || 10);
    const made = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
      made.push(Number((i * step).toPrecision(12)));
    }
    return made;
  }

  const tick = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3
    ? v.toExponential(0) : String(Number(v.toPrecision(4))));

  function frame(label, xAxis, yAxis, xTicks, yTicks, ...inner) {
    return svg("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label },
      ...inner,
      svg("path", { class: "axis", d: `M${LEFT},${H - BOTTOM}H${W - RIGHT}` }),
      xTicks.map(([x, text]) => [svg("path", { class: "axis", d: `M${x},${H - BOTTOM}v4` }),
        svg("text", { x, y: H - BOTTOM + 15, "text-anchor": "middle" }, text)]).flat(),
      yTicks.map(([y, text]) => svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, text)),
      svg("text", { x: (LEFT + W - RIGHT) / 2, y: H - 3, "text-anchor": "middle" }, plain(cut(xAxis, 60))),
      svg("text", { x: 10, y: (H - BOTTOM) / 2, "text-anchor": "middle",
        transform: `rotate(-90 10 ${(H - BOTTOM) / 2})` }, plain(cut(yAxis, 32))));
  }

  const xAt = (share) => LEFT + share * (W - LEFT - RIGHT);
  const yAt = (share) => H - BOTTOM - share * (H - BOTTOM - TOP);

  function bars(heights, titles) {
    return svg("g", { class: "bars" }, heights.map((height, i) => {
      const y = yAt(height), x = xAt(i / heights.length), width = (W - LEFT - RIGHT) / heights.length;
      return height > 0 ? svg("rect", { x: x + 0.04 * width, width: 0.92 * width,
        y: Math.min(y, H - BOTTOM - 1), height: Math.max(1, H - BOTTOM - y) },
      svg("title", {}, titles[i])) : "";
    }));
  }

  /** Labels that keep their distance. */
  function apart(marks, least = 40) {
    const made = [];
    for (const mark of marks) if (!made.length || mark[0] - made.at(-1)[0] >= least) made.push(mark);
    return made;
  }

  function densityChart(counts) {
    const used = counts.map((c, i) => (c > 0 ? i : -1)).filter((i) => i >= 0);
    let first = Math.max(0, used[0] - 1), last = Math.min(counts.length, used.at(-1) + 2);
    while (last - first < 8 && (first > 0 || last < counts.length)) {
      first = Math.max(0, first - 1);
      last = Math.min(counts.length, last + 1);
    }
    const own = counts.slice(first, last), edges = index.edges.slice(first, last + 1);
    const most = Math.max(...own), total = own.reduce((a, b) => a + b, 0);
    const titles = own.map((c, i) => `${number(edges[i])} to ${number(edges[i + 1])}: ${grouped(c)}`);
    const xTicks = apart(edges.map((e, i) => [xAt(i / own.length), number(e)]), 46)
      .filter(([x]) => x < W - 16);
    const yTicks = ticks(0, most, 4).filter(Number.isInteger).map((v) => [yAt(v / most), grouped(v)]);
    return frame(`Histogram of ${grouped(total)} activations from ${number(edges[0])} to `
      + number(edges.at(-1)), "activation (log scale)", "tokens", xTicks, yTicks,
    bars(own.map((c) => c / most), titles));
  }

  function lensChart([low, high, counts]) {
    const most = Math.max(...counts, 1), height = (c) => Math.log1p(c) / Math.log1p(most);
    const at = (i) => low + (high - low) * i / counts.length;
    const titles = counts.map((c, i) => `${number(at(i))} to ${number(at(i + 1))}: ${grouped(c)}`);
    const place = (v) => xAt(high > low ? (v - low) / (high - low) : 0.5);
    const yTicks = [1, 10, 100, 1000, 10000, 100000, 1000000].filter((v) => v <= most)
      .map((v) => [yAt(height(v)), v < 1000 ? String(v) : v < 1e6 ? v / 1000 + "k" : v / 1e6 + "M"]);
    const zero = low < 0 && high > 0
      ? svg("path", { class: "zero", d: `M${place(0)},${TOP}V${H - BOTTOM}` }) : "";
    return frame(`Histogram of logits from ${number(low)} to ${number(high)}`, "logit per unit",
      "tokens (log scale)", ticks(low, high).map((v) => [place(v), tick(v)]), yTicks,
      bars(counts.map(height), titles), zero);
  }

  function curveChart({ xAxis, yAxis, x, y, density }) {
    const pairs = x.map((v, i) => [v, y[i], density[i] ?? 0])
      .filter(([a, b]) => a !== null && b !== null);
    if (pairs.length < 2) return null;
    const xs = pairs.map((p) => p[0]), ys = pairs.map((p) => p[1]);
    const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    let [y0, y1] = [Math.min(...ys, 0), Math.max(...ys, 0)];
    if (y0 === y1) y1 = y0 + 1;
    const px = (v) => xAt((v - x0) / (x1 - x0 || 1)), py = (v) => yAt((v - y0) / (y1 - y0));
    const most = Math.max(...pairs.map((p) => p[2])) || 1;
    const join = (points) => points.map(([a, b]) => a.toFixed(1) + "," + b.toFixed(1)).join("L");
    const area = "M" + join([[px(xs[0]), yAt(0)], ...pairs.map((p) => [px(p[0]), yAt(p[2] / most)]),
      [px(xs.at(-1)), yAt(0)]]) + "z";
    return frame(`Learned curve from ${number(x0)} to ${number(x1)}, values ${number(y0)} to `
      + number(y1), xAxis, yAxis, ticks(x0, x1).map((v) => [px(v), tick(v)]),
    ticks(y0, y1, 4).map((v) => [py(v), tick(v)]),
    svg("path", { class: "area", d: area }),
    svg("path", { class: "zero", d: `M${LEFT},${py(0)}H${W - RIGHT}` }),
    svg("path", { class: "line", d: "M" + join(pairs.map((p) => [px(p[0]), py(p[1])])) }));
  }

  // ---------------------------------------------------------------- a latent

  const none = (text) => el("p", { class: "none" }, text);

  function section(title, ...inner) {
    return el("section", {}, el("h2", {}, title), ...inner);
  }

  /** A table; every cell is [content, class]. */
  function table(heads, rows) {
    return el("table", {},
      el("thead", {}, el("tr", {}, heads.map(([title, kind, help]) =>
        el("th", { scope: "col", class: kind, title: help }, title)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map(([inner, kind]) =>
        el("td", { class: kind }, inner))))));
  }

  function tokenTable(title, rows) {
    if (!rows.length) return el("div", {}, el("h3", {}, title), none("none"));
    const most = Math.max(...rows.map(([, v]) => Math.abs(v ?? 0))) || 1;
    return el("div", { class: "toks" }, el("h3", {}, title), el("table", { "aria-label": title },
      el("tbody", {}, rows.map(([text, v]) => {
        const meter = el("span", { class: "meter" + (v < 0 ? " minus" : "") });
        meter.style.width = 100 * Math.abs(v ?? 0) / most + "%";
        return el("tr", {}, el("td", {}, chip(text), meter), el("td", { class: "n" }, number(v)));
      }))));
  }

  function windowOf(table, [start, length, peak, ...flat], largest, q) {
    const values = new Map();
    for (let i = 0; i < flat.length; i += 2) values.set(flat[i], flat[i + 1]);
    const line = el("p", { class: "text", dir: "auto" });
    for (let i = 0; i < length; i++) {
      const text = table[pool[start + i]], v = values.get(i);
      const kind = ["t"];
      if (v !== undefined) kind.push("on");
      if (v < 0) kind.push("minus");
      if (i === peak) kind.push("peak");
      if (text.length > CUT) kind.push("cut");
      const span = el("span", { class: kind.join(" "), tabindex: v !== undefined || text.length > CUT ? 0 : null,
        role: v !== undefined || text.length > CUT ? "button" : null },
      ...(text ? shown(text, CUT) : [el("span", { class: "x" }, "·")]));
      if (v !== undefined) span.style.setProperty("--a", Math.abs(v) / largest);
      tokenOf.set(span, { text, value: v ?? 0, largest });
      line.append(span);
    }
    const hit = q && textOf(lower || table.map((t) => t.toLowerCase()), start, length).includes(q);
    return el("li", { class: hit ? "hit" : null },
      el("span", { class: "v", title: "activation of the underlined token" }, number(values.get(peak) ?? 0)),
      line);
  }

  const tokenOf = new WeakMap();

  function contexts(table, found) {
    if (!found.bands.length) return none("No contexts: it never fired on these tokens.");
    let largest = 0;
    for (const [, windows] of found.bands) {
      for (const w of windows) {
        for (let i = 4; i < w.length; i += 2) largest = Math.max(largest, Math.abs(w[i]));
      }
    }
    const q = state.q.trim().toLowerCase();
    return [el("p", { class: "note" }, `Shaded by activation, as a share of the largest shown `
      + `(${number(largest)}). Underlined: the token the window was taken for. Point at, tap or focus `
      + `a token for its value. A small dot is a token inside a character.`),
    ...found.bands.flatMap(([title, windows]) => [el("h3", {}, words(title, 200)),
      windows.length ? el("ol", { class: "windows" },
        windows.map((w) => windowOf(table, w, largest || 1, q))) : none("none")])];
  }

  function figures(j) {
    return el("dl", { class: "figures" }, index.columns
      .filter((c) => !["kind", "explanation", "concept"].includes(c.key))
      .map((c) => el("div", { title: plain(c.help) }, el("dt", {}, ...shown(c.title, 60)),
        el("dd", {}, typeof c.values[j] === "string" ? words(c.values[j], 100)
          : formatted(c, c.values[j])))));
  }

  function explanation(scores) {
    const [text, category, score, detection, judge] = scores;
    const facts = [
      category ? ["Category: ", el("bdi", {}, ...shown(category, 80)), ". "] : [],
      score === null ? "No score: the judge failed. " : `Score ${score} of 5. `,
      detection === null ? "No detection: the judge failed. "
        : `Detection ${percent(detection)} (50% is chance). `,
      judge ? ["By ", el("bdi", {}, ...shown(judge, 80)), "."] : []];
    return el("div", { class: "said" }, el("p", { class: "what" }, words(text)),
      el("p", { class: "note" }, facts));
  }

  function concepts(list) {
    return table([["fact", ""], ["F1", "n"], ["precision", "n"], ["recall", "n"]],
      list.map(([fact, f1, precision, recall]) => [[words(fact, 300), ""], [number(f1), "n"],
        [percent(precision), "n"], [percent(recall), "n"]]));
  }

  function curveSection(curve) {
    const [title, xAxis, yAxis, x, y, density] = curve;
    return [el("p", { class: "note" }, words(title, 300)),
      curveChart({ xAxis, yAxis, x, y, density }) || none("Nothing in the sample reaches it."),
      el("p", { class: "note" }, "Grey: where the data lies.")];
  }

  function relatedTable(list) {
    return table([["latent", "n"], ["tokens", ""],
      ["Jaccard", "n", "both fire, out of either fires"], ["both", "n", "tokens on which both fire"],
      ["Pearson", "n", "correlation of the activations"]],
    list.map(([other, jaccard, joint, pearson]) => [
      [el("a", { href: hashOf({ latent: other }) }, String(other)), "n"],
      [(index.labels[other] || []).slice(0, 2).map((t) => chip(t, 16)), ""],
      [number(jaccard), "n"], [grouped(joint), "n"], [number(pearson), "n"]]));
  }

  function ablationSection(found) {
    const [n, kl, rise, raised, lowered] = found;
    return [el("p", {}, `Set to zero at ${grouped(n)} positions where it fires most: the next token's `
      + `distribution moves by ${number(kl)} nats (KL), its loss by ${number(rise)} nats.`),
    el("div", { class: "pair" }, tokenTable("likelier without it", raised),
      tokenTable("less likely without it", lowered))];
  }

  /** One line on what is not shown, and what would show it. */
  function lacking(found, dead) {
    const said = [
      found.scores || dead ? null : "an explanation (--reports interpretability asks a language model)",
      found.concepts.length || dead ? null : byKey.has("concept") ? "a known fact that it tells best"
        : "known facts (--reports concepts, where the text's are known)",
      found.curve || !byKey.has("bend") ? null : "a learned curve",
      found.ablation || dead ? null : "the next token without it (--dashboard.ablated N measures more latents)",
      found.related.length || dead ? null : "latents that fire on enough of the same tokens",
    ].filter(Boolean);
    return said.length ? el("p", { class: "none", id: "lacking" }, "Not there: " + said.join("; ") + ".") : null;
  }

  let placed = null;

  /** Where the latent is in the order of the index, and its neighbours there. */
  function neighbours(j) {
    const list = order(), at = list.indexOf(j);
    if (at < 0) return [null, j > 0 ? j - 1 : null, j < index.n - 1 ? j + 1 : null];
    return [`${grouped(at + 1)} of ${grouped(list.length)}`, list[at - 1] ?? null, list[at + 1] ?? null];
  }

  function renderPlace() {
    if (!placed) return;
    const [place, before, after] = neighbours(state.latent);
    const link = (to, text, rel) => (to === null ? el("span", { class: "none" }, text)
      : el("a", { href: hashOf({ latent: to }), rel }, text));
    placed.replaceChildren(el("a", { href: hashOf({ latent: null }), id: "up" }, "Index"),
      link(before, "← previous", "prev"), el("span", { class: "none" }, place || "not among the hits"),
      link(after, "next →", "next"));
  }

  let showing = 0;

  async function renderLatent() {
    const j = state.latent, mine = ++showing;
    if (j >= index.n) {
      placed = null;
      document.title = "No such latent";
      main.replaceChildren(el("h1", {}, "No such latent"), el("p", {}, "There are " + grouped(index.n)
        + ", numbered from 0. ", el("a", { href: hashOf({ latent: null }) }, "To the index")));
      return;
    }
    searchSoon();
    let found, pieces;
    try {
      [found, pieces] = await Promise.all([latentOf(j), loadTexts()]);
    } catch (error) {
      fail(error);
      return;
    }
    if (mine !== showing) return;
    const dead = byKey.get("kind")?.values[j] === "dead";
    placed = el("nav", { class: "bar", "aria-label": "Latents" });
    const fired = found.density.some((c) => c > 0);
    const lead = [el("h1", { tabindex: "-1" }, "Latent " + j + " ", kindOf(j)),
      dead ? el("p", {}, "Dead: it never fired on these tokens.") : null, figures(j)];
    const sides = [
      fired ? section("Density of activations", densityChart(found.density)) : null,
      section("Logit lens", found.lens || found.boosted.length ? [
        el("div", { class: "pair" }, tokenTable("boosted", found.boosted),
          tokenTable("suppressed", found.suppressed)),
        found.lens ? [el("h3", {}, "logits over the vocabulary"), lensChart(found.lens)]
          : none("No histogram.")] : none("It writes in no single direction.")),
      found.curve ? section("Learned curve", curveSection(found.curve)) : null,
      found.ablation ? section("Without it", ablationSection(found.ablation)) : null,
      found.related.length ? section("Related latents", relatedTable(found.related)) : null,
      section("Coordinates of what it writes", found.coordinates.length
        ? table([["index", "n"], ["value", "n"], ["share of L1", "n"]], found.coordinates.map(
          ([i, v, share]) => [[String(i), "n"], [number(v), "n"], [percent(share), "n"]]))
        : none("It writes in no single direction."),
      el("p", { class: "note" }, found.cosine === null
        ? "Cosine with what it reads: it reads through no single direction."
        : "Cosine with what it reads: " + number(found.cosine) + ".")),
    ];
    const middle = [found.scores ? section("Explanation", explanation(found.scores)) : null,
      found.concepts.length ? section("Known facts", concepts(found.concepts)) : null,
      section("Contexts", contexts(pieces, found))];
    main.replaceChildren(placed, ...lead.filter(Boolean), el("div", { class: "latent" },
      el("div", {}, middle), el("div", { class: "side" }, sides, lacking(found, dead))));
    renderPlace();
    document.title = "Latent " + j + " – " + plain(cut(index.title, 150));
    scrollTo(0, 0);
    main.querySelector("h1").focus({ preventScroll: true });
  }

  // ---------------------------------------------------------------- over and above

  const tip = document.getElementById("tip"), full = document.getElementById("full");

  function showTip(span) {
    const { text, value, largest } = tokenOf.get(span);
    tip.replaceChildren(el("bdi", {}, "“", ...shown(text, 300), "”"), " ",
      el("b", {}, number(value)), value ? ` · ${Math.round(100 * Math.abs(value) / largest)}% of the largest` : "",
      text ? "" : " · inside a character", text.length > CUT ? " · click for all of it" : "");
    tip.hidden = false;
    const box = span.getClientRects()[0] || span.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(6, box.left), document.documentElement.clientWidth - own.width - 6);
    const above = box.top - own.height - 6;
    tip.style.left = left + scrollX + "px";
    tip.style.top = (above > 4 ? above : box.bottom + 6) + scrollY + "px";
    span.setAttribute("aria-describedby", "tip");
    showTip.of = span;
  }

  function hideTip() {
    showTip.of?.removeAttribute("aria-describedby");
    tip.hidden = true;
  }

  function openFull(text) {
    document.getElementById("full-text").replaceChildren(...shown(text));
    full.showModal();
  }

  const spanOf = (target) => (target instanceof Element ? target.closest(".t") : null);

  main.addEventListener("pointerover", (e) => { const t = spanOf(e.target); if (t) showTip(t); });
  main.addEventListener("pointerout", (e) => { if (spanOf(e.target)) hideTip(); });
  main.addEventListener("focusin", (e) => {
    const t = spanOf(e.target);
    if (t) showTip(t); else hideTip();
  });
  main.addEventListener("focusout", hideTip);
  main.addEventListener("click", (e) => {
    const t = spanOf(e.target);
    if (!t) return;
    if (t.classList.contains("cut")) openFull(tokenOf.get(t).text);
    else showTip(t);
  });

  let lastKey = 0;

  addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.defaultPrevented || full.open) return;
    const typing = e.target instanceof Element && e.target.closest("input, select, textarea");
    const span = spanOf(e.target);
    if (span && (e.key === "Enter" || e.key === " ")) {
      e.preventDefault();
      span.click();
      return;
    }
    if (typing) return;
    if (e.key === "/") {
      e.preventDefault();
      if (state.latent !== null) go({ latent: null });
      setTimeout(() => { view?.input.focus(); view?.input.select(); }, 30);
    }
    if (state.latent === null) return;
    if (e.key === "Escape" || e.key === "u") {
      e.preventDefault();
      go({ latent: null });
    } else if (e.key === "ArrowLeft" || e.key === "ArrowRight") {
      e.preventDefault();
      // browsers complain about more than 200 steps of history in 30 s
      if (e.repeat && e.timeStamp - lastKey < 250) return;
      lastKey = e.timeStamp;
      const to = neighbours(state.latent)[e.key === "ArrowLeft" ? 1 : 2];
      if (to !== null) go({ latent: to });
    }
  });

  main.addEventListener("click", save, true);

  function go(changes) {
    save();
    location.hash = hashOf(changes);
  }

  function follow() {
    clearTimeout(unsaved);
    unsaved = 0;
    if (state.latent === null && view?.root.isConnected) scrolled = scrollY;
    const was = state.latent;
    followed = location.hash;
    state = read(followed);
    hideTip();
    if (full.open) full.close();
    if (state.latent === null) {
      showing++;
      placed = null;
      renderIndex();
      if (was !== null) view.root.querySelector(`a[href="${hashOf({ latent: was })}"]`)
        ?.focus({ preventScroll: true });
    } else {
      renderLatent();
    }
  }

  function fail(error) {
    main.replaceChildren(el("h1", {}, "This page cannot be shown"),
      el("p", { role: "alert" }, String(error.message || error)));
  }

  // ---------------------------------------------------------------- theme

  const THEMES = ["auto", "light", "dark"];
  const themeButton = document.getElementById("theme");

  function stored(value) {
    try {
      if (value === undefined) return localStorage.getItem("dashboard-theme");
      localStorage.setItem("dashboard-theme", value);
    } catch {
      // pages from disk may have no storage
    }
    return null;
  }

  function setTheme(theme) {
    if (theme === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.setAttribute("data-theme", theme);
    themeButton.textContent = "Theme: " + theme;
    themeButton.setAttribute("aria-label", "Theme: " + (theme === "auto" ? "as the system" : theme));
    themeButton.value = theme;
  }

  setTheme(THEMES.includes(stored()) ? stored() : "auto");
  themeButton.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(themeButton.value) + 1) % THEMES.length];
    setTheme(next);
    stored(next);
  });

  // ---------------------------------------------------------------- start

  async function start() {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("This browser is too old for this page: it cannot unpack its data.");
    }
    index = await unpackJson("index");
    byKey = new Map(index.columns.map((c) => [c.key, c]));
    numeric = index.columns.filter((c) => c.form !== "text");
    addEventListener("hashchange", follow);
    state = read(location.hash);
    if (state.latent === null) renderIndex();
    else await renderLatent();
    document.documentElement.dataset.ready = Math.round(performance.now());
  }

  start().catch(fail);
})();
