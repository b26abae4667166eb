
"use strict";
// The drawings of the page become figures that answer to the pointer, where plotly.js is beside it.
(() => {
  const packed = document.getElementById("figures").textContent;
  const boxes = [...document.querySelectorAll(".plot")];
  const dark = matchMedia("(prefers-color-scheme: dark)"), narrow = matchMedia("(max-width: 40rem)");

  function look(layout, columns) {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const clear = "rgba(0,0,0,0)", margin = layout.margin || {};
    const made = { ...layout, paper_bgcolor: clear, plot_bgcolor: clear,
      font: { ...layout.font, color: colour("--ink") },
      modebar: { bgcolor: clear, color: colour("--soft"), activecolor: colour("--ink") } };
    delete made.title; // it stands above the figure, where no button covers it
    const above = layout.legend?.y >= 1 ? 66 : 40; // a legend there keeps clear of the buttons
    made.margin = { ...margin, t: Math.max(above, (margin.t || 0) - 20) };
    for (const name of Object.keys(made).filter((key) => /^[xy]axis/.test(key))) {
      made[name] = { ...made[name], gridcolor: colour("--line"), zerolinecolor: colour("--soft"),
        zerolinewidth: 1, linecolor: colour("--soft") };
      const said = made[name].title?.text;
      if (said && narrow.matches) made[name].title = { ...made[name].title, text: folded(said, 42) };
    }
    if (narrow.matches && columns === 1) {
      made.margin = { ...made.margin, l: 62, r: 8 };
      made.legend = { orientation: "h", x: 0, y: -0.28, yanchor: "top" };
      made.height = (layout.height || 420) + 30;
    }
    return made;
  }

  function folded(text, most) {
    const lines = [""];
    for (const word of text.split(" ")) {
      if (lines.at(-1).length + word.length >= most) lines.push("");
      lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
    }
    return lines.join("<br>");
  }

  function draw() {
    const shown = dark.matches ? packed.replace(/"#(444444|444|333)"/g, '"#a3abb3"') : packed;
    JSON.parse(shown).forEach(({ data, layout }, i) => {
      const columns = Number(boxes[i].dataset.columns);
      boxes[i].querySelector("svg[role=img]")?.remove();
      Plotly.react(boxes[i], data, look(layout, columns), { responsive: true, displaylogo: false,
        displayModeBar: narrow.matches ? false : "hover", modeBarButtonsToRemove: ["lasso2d", "select2d"] });
    });
    document.documentElement.dataset.ready = "1";
  }

  /** Run the library that the file beside the page holds packed. */
  async function load() {
    const bytes = Uint8Array.from(atob(plotlyPacked), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const url = URL.createObjectURL(new Blob([await new Response(stream).arrayBuffer()],
      { type: "text/javascript" }));
    const script = document.createElement("script");
    script.src = url;
    await new Promise((done, failed) => {
      [script.onload, script.onerror] = [done, failed];
      document.head.append(script);
    });
    URL.revokeObjectURL(url);
    draw();
    for (const media of [dark, narrow]) media.addEventListener("change", draw);
  }

  if (boxes.length) load().catch(() => { document.getElementById("missing").hidden = false; });
})();
