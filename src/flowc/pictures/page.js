"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;

  // Every text goes through here or through textContent. What turns the direction of text around is made visible.
  const BIDI = /[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
  const shown = (text) => String(text).replace(BIDI, (c) => "⟨U+" + c.charCodeAt(0).toString(16).toUpperCase() + "⟩");
  function el(tag, attrs, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attrs || {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    for (const child of children.flat()) {
      if (child !== null && child !== undefined) node.append(child instanceof Node ? child : shown(child));
    }
    return node;
  }
  function svg(tag, attrs, ...children) {
    const node = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attrs || {})) node.setAttribute(key, value);
    for (const child of children.flat()) node.append(child instanceof Node ? child : shown(child));
    return node;
  }
  const seconds = (s) =>
    s === 0 ? "0" : s >= 9.95 ? s.toFixed(1) + " s" : s >= 1 ? s.toFixed(2) + " s" : s >= 1e-3 ? +(s * 1e3).toPrecision(3) + " ms" : +(s * 1e6).toPrecision(2) + " µs";
  const many = (n, word) => n + " " + word + (n === 1 ? "" : "s");
  const swatch = (cls) => svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, svg("rect", { class: cls, width: 10, height: 10, rx: 2.5 }));

  // -- light and dark
  const media = matchMedia("(prefers-color-scheme: dark)");
  let theme = null;
  const paint = () => root.classList.toggle("dark", theme === null ? media.matches : theme === "dark");
  media.addEventListener("change", paint);
  $("theme").addEventListener("click", () => { theme = root.classList.contains("dark") ? "light" : "dark"; paint(); });
  paint();

  // -- tabs
  const tabs = [...document.querySelectorAll("nav button")];
  function open(name) {
    for (const tab of tabs) {
      const on = tab.dataset.view === name;
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      $(tab.dataset.view).hidden = !on;
    }
    if (name === "graph") requestAnimationFrame(() => panes.forEach((p) => p.settle()));
    if (name === "timeline") timeline();
  }
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => open(tab.dataset.view));
    tab.addEventListener("keydown", (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (step) { const next = tabs[(i + step + tabs.length) % tabs.length]; next.focus(); open(next.dataset.view); }
    });
  });

  // -- panes: pan and zoom
  class Pane {
    constructor(side) {
      this.side = side;
      this.host = $("pane-" + side);
      this.svg = this.host.querySelector("svg");
      this.world = this.svg.querySelector(".world");
      this.w = +this.svg.dataset.w; this.h = +this.svg.dataset.h;
      this.x = 0; this.y = 0; this.k = 1; this.fresh = true;
      this.edges = [...this.svg.querySelectorAll(".edge")];
      this.nodes = [...this.svg.querySelectorAll(".node")];
      this.listen();
    }
    apply() { this.world.setAttribute("transform", `translate(${this.x.toFixed(2)} ${this.y.toFixed(2)}) scale(${this.k.toFixed(4)})`); }
    settle() { if (this.fresh && this.svg.clientWidth) this.fit(); }
    fit() {
      const W = this.svg.clientWidth, H = this.svg.clientHeight, top = 44;
      if (!W) return;
      const whole = Math.min((W - 40) / this.w, (H - top - 30) / this.h);
      this.k = whole >= 0.62 ? Math.min(whole, 1.1) : Math.min(Math.max((W - 40) / this.w, 0.42), 1);
      this.x = (W - this.w * this.k) / 2;
      this.y = top + Math.max(0, (H - top - 30 - this.h * this.k) / 2 * 0.35);
      if (this.w * this.k > W) this.x = 20;
      this.fresh = false;
      this.apply();
    }
    zoom(factor, cx, cy) {
      const k = Math.min(Math.max(this.k * factor, 0.05), 4), box = this.svg.getBoundingClientRect();
      const px = cx === undefined ? box.width / 2 : cx - box.left, py = cy === undefined ? box.height / 2 : cy - box.top;
      this.x = px - (px - this.x) * (k / this.k); this.y = py - (py - this.y) * (k / this.k); this.k = k; this.apply();
    }
    pan(dx, dy) { this.x += dx; this.y += dy; this.apply(); }
    reveal(node) {
      const box = this.svg.getBoundingClientRect(), at = node.getBoundingClientRect(), pad = 50;
      let dx = 0, dy = 0;
      if (at.left < box.left + pad) dx = box.left + pad - at.left; else if (at.right > box.right - pad) dx = box.right - pad - at.right;
      if (at.top < box.top + pad) dy = box.top + pad - at.top; else if (at.bottom > box.bottom - pad && at.height < box.height) dy = box.bottom - pad - at.bottom;
      if (dx || dy) this.pan(dx, dy);
    }
    listen() {
      let from = null, moved = false;
      this.svg.addEventListener("wheel", (e) => {
        e.preventDefault();
        const unit = e.deltaMode === 1 ? 18 : 1;
        if (e.ctrlKey || e.metaKey) this.zoom(Math.exp(-e.deltaY * unit * 0.006), e.clientX, e.clientY);
        else this.pan(-(e.shiftKey ? e.deltaY : e.deltaX) * unit, e.shiftKey ? 0 : -e.deltaY * unit);
      }, { passive: false });
      this.svg.addEventListener("pointerdown", (e) => { if (e.button === 0) { from = [e.clientX, e.clientY]; moved = false; active = this; } });
      this.svg.addEventListener("pointermove", (e) => {
        if (!from) return;
        const dx = e.clientX - from[0], dy = e.clientY - from[1];
        if (!moved && Math.hypot(dx, dy) < 4) return;
        if (!moved) { moved = true; this.svg.classList.add("drag"); this.svg.setPointerCapture(e.pointerId); }
        this.pan(dx, dy); from = [e.clientX, e.clientY];
      });
      const up = () => { from = null; this.svg.classList.remove("drag"); };
      this.svg.addEventListener("pointerup", up); this.svg.addEventListener("pointercancel", up);
      this.svg.addEventListener("dblclick", (e) => this.zoom(1.5, e.clientX, e.clientY));
      this.svg.addEventListener("click", (e) => {
        if (moved) { moved = false; return; }
        const node = e.target.closest(".node");
        select(node ? node.id : null);
      });
      this.svg.addEventListener("keydown", (e) => {
        const node = e.target.closest && e.target.closest(".node");
        if (node && (e.key === "Enter" || e.key === " ")) { e.preventDefault(); select(node.id); }
        const step = { ArrowUp: [0, 60], ArrowDown: [0, -60], ArrowLeft: [60, 0], ArrowRight: [-60, 0] }[e.key];
        if (step) { e.preventDefault(); this.pan(...step); }
      });
      this.svg.addEventListener("focusin", (e) => { active = this; const node = e.target.closest(".node"); if (node && node.matches(":focus-visible")) { this.reveal(node); hot(node.id); } });
      this.svg.addEventListener("pointerover", (e) => { const node = e.target.closest(".node"); hot(node ? node.id : null); });
      this.svg.addEventListener("pointerleave", () => hot(null));
    }
  }
  const panes = ["before", "after"].filter((s) => $("pane-" + s)).map((s) => new Pane(s));
  let active = panes[panes.length - 1];
  const visible = () => (active.host.hidden ? panes.find((p) => !p.host.hidden) : active);
  $("zoom-in").addEventListener("click", () => panes.forEach((p) => p.zoom(1.25)));
  $("zoom-out").addEventListener("click", () => panes.forEach((p) => p.zoom(0.8)));
  $("zoom-fit").addEventListener("click", () => panes.forEach((p) => p.fit()));
  addEventListener("resize", () => panes.forEach((p) => p.fit()));
  addEventListener("keydown", (e) => {
    if (e.target.closest("input") || e.ctrlKey || e.metaKey || e.altKey || $("graph").hidden) return;
    if (e.key === "Escape") select(null);
    else if (e.key === "+" || e.key === "=") visible().zoom(1.25);
    else if (e.key === "-") visible().zoom(0.8);
    else if (e.key === "0") visible().fit();
  });
  const show = [...document.querySelectorAll(".show button")];
  function sides(which) {
    for (const button of show) button.setAttribute("aria-pressed", button.dataset.show === which);
    for (const p of panes) p.host.hidden = which !== "both" && p.side !== which;
    document.querySelector(".panes").classList.toggle("one", which !== "both");
    requestAnimationFrame(() => panes.forEach((p) => p.fit()));
  }
  show.forEach((b) => b.addEventListener("click", () => sides(b.dataset.show)));

  // -- what belongs to what
  const ops = data.ops, byLine = new Map();
  for (const [id, op] of Object.entries(ops)) {
    if (!op.loc) continue;
    const key = op.loc[0] + ":" + op.loc[1];
    if (!byLine.has(key)) byLine.set(key, []);
    byLine.get(key).push(id);
  }
  const sideOf = (id) => panes.find((p) => p.side === (id[0] === "b" ? "before" : "after"));
  let chosen = null, filter = null;
  function hot(id) {
    for (const p of panes) for (const e of p.edges) e.classList.toggle("hot", id !== null && (e.dataset.s === id || e.dataset.d === id));
    if (!chosen) light(id && ops[id] ? ops[id].loc : null, false);
  }
  function light(loc, scroll) {
    for (const line of document.querySelectorAll(".line.lit")) line.classList.remove("lit");
    if (!loc) return;
    const line = document.querySelector(`.line[data-at="${CSS.escape(loc[0] + ":" + loc[1])}"]`);
    if (line) { line.classList.add("lit"); if (scroll) line.scrollIntoView({ block: "nearest" }); }
  }
  function select(id) {
    chosen = id && ops[id] ? id : null;
    const op = chosen ? ops[chosen] : null;
    for (const p of panes) for (const n of p.nodes) {
      n.classList.toggle("on", n.id === chosen);
      const other = ops[n.id];
      n.classList.toggle("twin", !!op && n.id[0] !== chosen[0] && !!other && other.name === op.name && !!op.loc && !!other.loc && other.loc.slice(0, 3).join() === op.loc.slice(0, 3).join());
    }
    if (chosen) { const node = document.getElementById(chosen); if (node && !sideOf(chosen).host.hidden) sideOf(chosen).reveal(node); }
    panel();
    light(op ? op.loc : null, !!op);
  }

  // -- side panel
  const remarkView = (r) => el("div", { class: "remark" + (r.fired ? " fired" : "") },
    el("b", {}, r.pass), el("span", { class: r.fired ? "yes" : "no" }, r.fired ? "fired" : "did not fire"),
    el("div", { class: "why" }, [r.verdict, r.detail, r.gain_s ? "predicted gain " + seconds(r.gain_s) : ""].filter(Boolean).join("; ")));
  function panel() {
    const aside = $("panel");
    aside.replaceChildren(...(chosen ? details(ops[chosen]) : summary()), ...sources());
    aside.scrollTop = 0;
  }
  function summary() {
    const t = data.timeline, out = [], both = t.before && t.after;
    const best = (t.after || t.before).expected;
    out.push(el("h2", {}, "Predicted time of one program"));
    const faster = both && best > 0 ? t.before.expected / best : 0;
    out.push(el("div", { class: "big" }, seconds(best), faster >= 1.05 ? el("small", {}, (faster >= 10 ? faster.toFixed(0) : faster.toFixed(2)) + " times as fast as written") : null));
    if (both) {
      const longest = Math.max(t.before.expected, t.after.expected) || 1;
      const row = (name, s, cls) => el("div", { class: "row" }, el("span", {}, name),
        svg("svg", { viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("rect", { class: cls, width: Math.max((100 * s) / longest, 0.5), height: 12 })),
        el("span", { class: "num" }, seconds(s)));
      out.push(el("div", { class: "figure" }, row("captured", t.before.expected, "c-before"), row(data.level || "compiled", t.after.expected, "c-after")));
    }
    out.push(el("p", { class: "note" }, "Expected by the cost model: " + data.assumed + "."));
    const fired = new Map();
    for (const r of data.remarks) if (r.fired) fired.set(r.pass, (fired.get(r.pass) || 0) + 1);
    const quiet = data.remarks.filter((r) => !r.fired).length;
    if (data.passes.length) {
      out.push(el("h2", {}, "Rewrites"));
      const list = el("dl", {});
      for (const p of data.passes) if (p.changed) list.append(el("dt", {}, el("button", { onclick: () => { open("passes"); pick(p.index); } }, p.name)), el("dd", {}, fired.has(p.name) ? many(fired.get(p.name), "place") : "changed the graph"));
      out.push(list.children.length ? list : el("p", { class: "note" }, "No pass changed the graph."));
      if (quiet) out.push(el("p", { class: "note" }, "In " + many(quiet, "place") + " a rewrite was looked at and left; see Remarks."));
    }
    out.push(el("p", { class: "note" }, "Choose an operation to see its source line, attributes, remarks and cost. Drag or scroll to move, Ctrl and scroll to zoom; Tab, Enter and Esc work too."));
    return out;
  }
  function details(op) {
    const out = [el("div", { class: "head" }, el("b", {}, op.name), el("span", { class: "lane bg-" + op.lane }, op.lane), el("button", { class: "close", "aria-label": "close", onclick: () => select(null) }, "×"))];
    out.push(el("p", { class: "sub" }, op.doc));
    if (op.line !== null && op.line !== undefined) out.push(el("h2", {}, op.loc[0].split(/[\\/]/).pop() + ", line " + op.loc[1]), el("pre", {}, op.line));
    out.push(el("h2", {}, "Operation"), el("pre", {}, op.text));
    const facts = el("dl", {});
    const fact = (name, value, mono) => facts.append(el("dt", {}, name), el("dd", mono ? { class: "m" } : {}, value));
    fact("cost", op.cost_s === null ? "that of what is inside" : seconds(op.cost_s) + " predicted");
    if (op.wave !== null) fact("wavefront", op.wave);
    if (op.batch) fact("batch", op.batch, true);
    fact("effect", op.effect);
    for (const [key, value] of op.attrs) fact(key, value, true);
    for (const [name, value] of op.consts) fact("%" + name, value, true);
    out.push(el("h2", {}, "Attributes and cost"), facts);
    const mine = op.remarks.map((i) => data.remarks[i]);
    if (mine.length) out.push(el("h2", {}, "Remarks at this line"), ...mine.map(remarkView));
    return out;
  }
  function sources() {
    const out = [];
    for (const file of data.sources) {
      const code = el("div", { class: "code source" }, el("div", { class: "file", title: file.file }, file.file));
      file.lines.forEach((text, i) => {
        const at = file.file + ":" + (file.first + i), ids = byLine.get(at);
        code.append(el(ids ? "button" : "div", { class: "line" + (ids ? " has" : ""), "data-at": at,
          onclick: ids ? () => { const list = ids.filter((id) => !sideOf(id).host.hidden), next = list[(list.indexOf(chosen) + 1) % list.length]; if (next) select(next); } : () => {},
          onpointerenter: () => { if (ids) mark(ids); }, onpointerleave: () => mark([]) },
          el("i", {}, file.first + i), el("span", { dir: "ltr" }, text || " ")));
      });
      out.push(el("h2", {}, "Source"), code);
    }
    return out;
  }
  function mark(ids) { for (const p of panes) for (const n of p.nodes) if (n.id !== chosen) n.classList.toggle("twin", ids.includes(n.id)); }

  // -- legend
  function keep(test, button) {
    const off = filter === button;
    filter = off ? null : button;
    for (const k of document.querySelectorAll(".key")) k.setAttribute("aria-pressed", k === filter);
    for (const p of panes) { p.svg.classList.toggle("faded", !off); for (const n of p.nodes) n.classList.toggle("keep", !off && !!ops[n.id] && test(ops[n.id])); }
  }
  function legend(by) {
    root.classList.toggle("by-wave", by === "wave");
    for (const b of document.querySelectorAll(".by button")) b.setAttribute("aria-pressed", b.dataset.by === by);
    const keys = $("keys"), last = Object.values(ops).filter((o) => o.side === (panes.length > 1 ? "after" : panes[0].side) && !o.boxed);
    if (filter) keep(() => true, filter);
    keys.replaceChildren();
    const add = (cls, text, test) => {
      const n = last.filter(test).length;
      if (!n) return;
      const button = el("button", { class: "key", "aria-pressed": "false", onclick: () => keep(test, button) }, swatch(cls), el("span", {}, text), el("span", {}, n));
      keys.append(button);
    };
    if (by === "lane") for (const lane of data.lanes) add("l-" + lane, lane, (o) => o.lane === lane);
    else { for (const wave of data.waves) add("f-w" + (wave % data.palette), "wavefront " + wave, (o) => o.wave === wave); add("l-none", "in no wavefront", (o) => o.wave === null); }
  }
  for (const b of document.querySelectorAll(".by button")) b.addEventListener("click", () => legend(b.dataset.by));

  // -- passes
  function pick(index) {
    const p = data.passes[index], host = $("diff");
    if (!p) { host.replaceChildren(el("p", { class: "empty" }, "No pass has run.")); return; }
    for (const b of document.querySelectorAll(".pass")) b.setAttribute("aria-selected", +b.dataset.i === index);
    const table = el("table", { class: "cmp" }, el("colgroup", {}, el("col", { class: "n" }), el("col"), el("col", { class: "n" }), el("col")));
    for (const row of p.diff) {
      if (row.length === 1) { table.append(el("tr", {}, el("td", { class: "skip", colspan: 4 }, many(row[0], "equal line")))); continue; }
      const [ln, left, rn, right] = row, same = left === right;
      const cell = (text, cls, other) => {
        if (text === null) return el("td", { class: cls === "d" ? "" : "mid" });
        const td = el("td", { class: (same ? "" : cls) + (cls === "a" ? " mid" : "") });
        if (same || other === null) { td.append(shown(text)); return td; }
        let a = 0, b = 0;
        while (a < Math.min(text.length, other.length) && text[a] === other[a]) a++;
        while (b < Math.min(text.length, other.length) - a && text[text.length - 1 - b] === other[other.length - 1 - b]) b++;
        td.append(shown(text.slice(0, a)), el("mark", {}, text.slice(a, text.length - b)), shown(text.slice(text.length - b)));
        return td;
      };
      table.append(el("tr", {}, el("td", { class: "n" }, ln === null ? "" : ln), cell(left, "d", right), el("td", { class: "n mid" }, rn === null ? "" : rn), cell(right, "a", left)));
    }
    const mine = data.remarks.filter((r) => r.pass === p.name);
    host.replaceChildren(el("h3", {}, p.name), el("p", { class: "sub" }, p.doc || (p.changed ? "" : "Nothing to do here.")),
      p.diff.length ? table : el("p", { class: "empty" }, p.note || "This pass left the graph as it was."),
      ...(mine.length ? [el("h2", {}, "Remarks"), ...mine.map(remarkView)] : []));
    host.scrollTop = 0;
  }
  $("passlist").replaceChildren(...data.passes.map((p) => el("button", { class: "pass" + (p.changed ? "" : " same"), "data-i": p.index, onclick: () => pick(p.index) },
    el("b", {}, p.name), el("span", {}, seconds(p.seconds)),
    p.changed ? el("span", { class: "what" }, p.before === p.after ? many(p.after, "operation") : p.before + " → " + many(p.after, "operation")) : null)));
  pick(Math.max(0, data.passes.findIndex((p) => p.changed)));

  // -- timeline
  let drawn = 0;
  function timeline() {
    const host = $("gantts"), width = Math.max(host.clientWidth - 38, 400);
    if (drawn === width) return;
    drawn = width;
    const charts = ["before", "after", "measured"].filter((k) => data.timeline[k]);
    const predicted = charts.filter((k) => k !== "measured"), longest = Math.max(...predicted.map((k) => data.timeline[k].makespan), 1e-9);
    $("assumed").textContent = "Predicted by the cost model: " + data.assumed + ", the slower branch of each if. Bars of one lane that stand below each other run at the same time.";
    const names = { before: "As captured", after: "After " + (data.level || "compilation"), measured: "Measured" };
    host.replaceChildren(...charts.map((k) => {
      const t = data.timeline[k], scale = k === "measured" ? Math.max(t.makespan, 1e-9) : longest;
      return el("div", { class: "gantt" }, el("div", { class: "cap" }, el("b", {}, names[k]), el("span", {}, seconds(t.makespan))), gantt(t, scale, width));
    }));
  }
  function gantt(t, scale, width) {
    const left = 62, room = width - left - 8, H = 20, rows = [], ends = [];
    const lanes = [...new Set([...data.lanes, ...t.bars.map((b) => b[2])])].filter((lane) => t.bars.some((b) => b[2] === lane && b[4] - b[3] > scale / 2000));
    let y = 4;
    const out = svg("svg", { role: "img", "aria-label": "timeline" });
    const step = [1, 2, 5].flatMap((m) => [-6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4].map((e) => m * 10 ** e)).sort((a, b) => a - b).find((s) => scale / s <= 9) || scale;
    const grid = svg("g", {});
    out.append(grid);
    for (const lane of lanes) {
      const tracks = [];
      out.append(svg("text", { x: 0, y: y + 14 }, lane));
      for (const b of t.bars.filter((b) => b[2] === lane && b[4] - b[3] > scale / 2000)) {
        let row = tracks.findIndex((end) => end <= b[3] + 1e-9);
        if (row < 0) { row = tracks.length; tracks.push(0); }
        tracks[row] = b[4];
        const x = left + (room * b[3]) / scale, w = Math.max((room * (b[4] - b[3])) / scale - 1, 1.5);
        const slice = svg("rect", { class: "slice l-" + (data.lanes.includes(lane) ? lane : "python"), x: x.toFixed(1), y: y + row * (H + 3), width: w.toFixed(1), height: H, rx: 4 },
          svg("title", {}, `${b[1]}: ${seconds(b[4] - b[3])}, from ${seconds(b[3])} to ${seconds(b[4])}`));
        slice.addEventListener("click", () => { if (b[0] && ops[b[0]]) { open("graph"); select(b[0]); } });
        out.append(slice);
        if (w > b[1].length * 6 + 12) out.append(svg("text", { class: "in", x: (x + 7).toFixed(1), y: y + row * (H + 3) + 14 }, b[1]));
      }
      y += Math.max(tracks.length, 1) * (H + 3) + 6;
    }
    for (let s = 0; s <= scale * 1.0001; s += step) {
      const x = left + (room * s) / scale;
      grid.append(svg("line", { class: "grid", x1: x, x2: x, y1: 0, y2: y }), svg("text", { x: x, y: y + 13, "text-anchor": s ? "middle" : "start" }, step >= 1 && s ? Math.round(s) + " s" : seconds(s)));
    }
    out.setAttribute("viewBox", `0 0 ${width} ${y + 20}`);
    out.setAttribute("height", y + 20);
    return out;
  }
  addEventListener("resize", () => { if (!$("timeline").hidden) timeline(); });

  // -- remarks
  function remarks() {
    const word = $("find").value.toLowerCase(), only = $("fired").checked, body = $("rows");
    const rows = data.remarks.filter((r) => (!only || r.fired) && (!word || [r.pass, r.op, r.verdict, r.detail, r.at].join(" ").toLowerCase().includes(word)));
    body.replaceChildren(...rows.map((r) => el("tr", { class: r.ids.length ? "go" : "", onclick: () => { if (r.ids.length) { open("graph"); select(r.ids[r.ids.length - 1]); } } },
      el("td", {}, r.pass), el("td", {}, el("span", { class: r.fired ? "yes" : "no" }, r.fired ? "fired" : "no")), el("td", {}, r.op), el("td", { class: "q" }, r.at),
      el("td", {}, r.verdict, r.detail ? el("div", { class: "why q" }, r.detail) : null), el("td", { class: "num" }, r.gain_s ? seconds(r.gain_s) : ""))));
    $("none").hidden = rows.length > 0;
    $("remtable").hidden = rows.length === 0;
  }
  $("find").addEventListener("input", remarks);
  $("fired").addEventListener("change", remarks);
  remarks();
  legend("lane");
  panel();
  open("graph");
  const at = decodeURIComponent(location.hash.slice(1));
  if (tabs.some((t) => t.dataset.view === at)) open(at);
  else if (at === "wave") legend("wave");
  else if (ops[at]) select(at);
})();
