"use strict";
// The page's script: sorting, filters kept in the address, charts. Everything it shows stands in the element #data.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.groups.flat();
  const form = document.querySelector(".controls");
  const tip = document.getElementById("tip");
  const FIELDS = ["dataset", "network", "schedule", "layer"];
  const MARKS = ["M0,-5A5,5 0 1 1 0,5A5,5 0 1 1 0,-5Z", "M-4.5,-4.5H4.5V4.5H-4.5Z", "M0,-5.5L5.5,4.5H-5.5Z", "M5.5,0L-4.5,5.5V-5.5Z",
    "M0,-6.5L6.5,0L0,6.5L-6.5,0Z", "M0,5.5L5.5,-4.5H-5.5Z"];
  const DASHES = ["", "7 4", "2 3", "9 3 2 3", "9 3 2 3 2 3", "4 2"];
  document.documentElement.classList.add("script");

  // Small helpers ---------------------------------------------------------------------------------------------------

  function element(name, attributes, parent, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }
  const color = (layer) => `color: var(--${layer}, var(--ink))`;
  const mark = (layer) => MARKS[data.layers.indexOf(layer) % MARKS.length];
  const name = (row) => [row.network, row.layer, row.setting === "dense" ? "" : row.setting].filter(Boolean).join(", ");
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const short = (value) => {
    const [size, unit] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => Math.abs(value) >= size) || [1, ""];
    return `${Number((value / size).toPrecision(3))}${unit}`;
  };

  // State: what is shown, in the address ------------------------------------------------------------------------------

  const layers = [...form.querySelectorAll("[name=layer]")].map((box) => box.value);
  const first = Object.fromEntries([...form.querySelectorAll("select")].map((select) => [select.name, select.options[0].value]));
  let state = { ...first, layer: "" };

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    state = { ...first, layer: "" };
    for (const select of form.querySelectorAll("select"))
      if ([...select.options].some((option) => option.value === given.get(select.name))) state[select.name] = given.get(select.name);
    state.layer = layers.filter((layer) => (given.get("layer") || "").split(",").includes(layer)).join(",");
    if (location.hash.length > 1) goTo(given.get("at") || [...given.keys()][0]);
  }

  function writeAddress(at) {
    const kept = Object.entries(state).filter(([key, value]) => value !== (first[key] ?? ""));
    const hash = new URLSearchParams(at ? [...kept, ["at", at]] : kept);
    history[at ? "pushState" : "replaceState"](null, "", `#${hash}`);
  }

  const matches = (row, wanted = state) =>
    FIELDS.every((field) => !wanted[field] || (field === "layer" ? wanted.layer.split(",") : [wanted[field]]).includes(row[field]));

  function goTo(id) {
    const target = document.getElementById(id);
    if (!target) return;
    if (target.closest("[hidden]")) state = { ...state, dataset: "", network: "", schedule: "", layer: "" };
    show();
    for (let outer = target; outer; outer = outer.parentElement) if (outer.tagName === "DETAILS") outer.open = true;
    target.scrollIntoView();
  }

  function show() {
    for (const select of form.querySelectorAll("select")) {
      select.value = state[select.name];
      if (!FIELDS.includes(select.name)) continue;
      for (const option of select.options)
        option.disabled = !rows.some((row) => matches(row, { ...state, [select.name]: option.value }));
    }
    for (const box of form.querySelectorAll("[name=layer]")) box.checked = !state.layer || state.layer.split(",").includes(box.value);
    const shown = rows.filter((row) => matches(row));
    const ids = new Set(shown.map((row) => row.id));
    for (const item of document.querySelectorAll("[data-row]")) item.hidden = !ids.has(item.dataset.row);
    for (const group of document.querySelectorAll("[data-group]")) {
      group.hidden = !data.groups[group.dataset.group].some((row) => ids.has(row.id));
      draw(group);
    }
    const runs = shown.reduce((sum, row) => sum + row.runs.length, 0);
    const all = rows.reduce((sum, row) => sum + row.runs.length, 0);
    form.querySelector("output").value = shown.length ? `${runs} of ${all} runs` : "no run is like that";
    form.querySelector("[name=reset]").hidden = runs === all;
  }

  form.addEventListener("change", () => {
    for (const select of form.querySelectorAll("select")) state[select.name] = select.value;
    const chosen = layers.filter((layer) => form.querySelector(`[name=layer][value="${CSS.escape(layer)}"]`).checked);
    state.layer = chosen.length === layers.length ? "" : chosen.join(",");
    writeAddress();
    show();
  });
  form.querySelector("[name=reset]").addEventListener("click", () => {
    state = { ...state, dataset: "", network: "", schedule: "", layer: "" };
    writeAddress();
    show();
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const id = decodeURIComponent(link.hash.slice(1));
    goTo(id);
    writeAddress(id);
  });

  // Tables ------------------------------------------------------------------------------------------------------------

  for (const table of document.querySelectorAll(".sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const numbers = head.classList.contains("number");
        const before = head.getAttribute("aria-sort") || (numbers ? "ascending" : "descending");
        const down = before === "ascending"; // numbers start with the largest, words with A
        const value = (row) => (numbers ? row.cells[column].dataset.value : row.cells[column].textContent);
        const order = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "") - (y === ""); // nothing comes last either way
          return (down ? -1 : 1) * (numbers ? x - y : x.localeCompare(y, "en", { numeric: true }));
        });
        table.tBodies[0].append(...order);
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
      });
    });
  }

  // Charts ------------------------------------------------------------------------------------------------------------

  function ticks(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const m of high / low > 200 ? [1] : [1, 2, 5]) found.push(m * 10 ** power);
    return found.filter((value) => value >= low && value <= high);
  }

  function scale(values, from, to, { log = false, limits = [-Infinity, Infinity], count = 5 } = {}) {
    let [low, high] = [Math.min(...values), Math.max(...values)];
    const way = log ? Math.log : (value) => value;
    if (log) [low, high] = [low / 1.15, high * 1.15];
    else {
      const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      [low, high] = [Math.max(low - room, Math.min(limits[0], low)), Math.min(high + room, Math.max(limits[1], high))];
    }
    const at = (value) => from + ((way(value) - way(low)) / (way(high) - way(low))) * (to - from);
    return Object.assign(at, { ticks: log ? logTicks(low, high) : ticks(low, high, count) });
  }

  /** Axes in an empty plot; x and y are scales made from its size. */
  function axes(plot, label, xTitle, makeX, makeY) {
    const width = plot.clientWidth;
    const height = Math.round(Math.min(300, Math.max(230, width * 0.65)));
    const box = { left: 46, right: width - 8, top: 8, bottom: height - 36 };
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label });
    const [x, y] = [makeX(box), makeY(box)];
    for (const tick of y.ticks) {
      element("path", { class: "grid", d: `M${box.left},${y(tick)}H${box.right}` }, svg);
      element("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, svg, short(tick));
    }
    for (const tick of x.ticks) element("text", { x: x(tick), y: box.bottom + 16, "text-anchor": "middle" }, svg, short(tick));
    element("text", { x: (box.left + box.right) / 2, y: height - 3, "text-anchor": "middle" }, svg, xTitle);
    plot.replaceChildren(svg);
    return { svg, box, x, y };
  }

  function costChart(plot, shown, cost) {
    const title = cost === "flops" ? "FLOPs" : "parameters";
    const points = shown.map((row) => ({ row, cost: row.numbers[cost], ...row.numbers })).filter((p) => p.top1 !== null && p.cost);
    if (!points.length) return plot.replaceChildren("nothing to draw");
    const costs = points.map((p) => p.cost);
    const log = Math.max(...costs) / Math.min(...costs) > 8;
    const heights = points.flatMap((p) => [p.top1, p.top1_low ?? p.top1, p.top1_high ?? p.top1]).map((v) => Math.min(100, Math.max(0, v)));
    const { svg, box, x, y } = axes(plot, `Top-1 against ${title}`, `${title}${log ? ", logarithmic" : ""}`,
      (b) => scale(costs, b.left + 14, b.right - 14, { log, count: plot.clientWidth / 90 }),
      (b) => scale(heights, b.bottom, b.top, { limits: [0, 100] }));

    const front = points.filter((p) => !points.some((q) => q !== p && q.top1 >= p.top1 && q.cost <= p.cost && (q.top1 > p.top1 || q.cost < p.cost)));
    front.sort((a, b) => a.cost - b.cost);
    const steps = front.map((p, i) => `${i ? "H" : "M"}${x(p.cost)}${i ? "V" : ","}${y(p.top1)}`).join("");
    element("path", { class: "front", d: `${steps}H${box.right}` }, svg);

    // What would lie on another is moved aside, by lanes: the best stays where it is.
    const lanes = [];
    for (const point of points.sort((a, b) => b.top1 - a.top1)) {
      const [top, bottom] = [Math.min(100, point.top1_high ?? point.top1), Math.max(0, point.top1_low ?? point.top1)];
      const at = { point, x: x(point.cost), top: y(top) - 4, bottom: y(bottom) + 4 };
      const free = (lane) => lane.every((other) => Math.abs(other.x - at.x) > 12 || other.top > at.bottom || other.bottom < at.top);
      const lane = lanes.find(free);
      if (lane) lane.push(at);
      else lanes.push([at]);
    }
    const gap = Math.min(12, 60 / lanes.length);
    lanes.forEach((lane, i) => {
      const aside = (i % 2 ? 1 : -1) * Math.ceil(i / 2) * gap;
      for (const at of lane) drawPoint(svg, at.point, at.x + aside, y);
    });
  }

  function drawPoint(svg, { row, top1, top1_low: low, top1_high: high }, x, y) {
    const { text } = row;
    const lines = [`top-1 ${text["top-1 %"]} %${text["95 % interval"] && ` ${text["95 % interval"]}`}, n = ${text.n}`,
      text["vs Conv2d"] && `against Conv2d ${text["vs Conv2d"]}`, `${text.params} parameters, ${text.MFLOPs} MFLOPs`].filter(Boolean);
    const point = element("g", { class: "point", style: color(row.layer), tabindex: 0, role: "img", "data-point": row.id,
      "aria-label": [name(row), ...lines].join("; ") }, svg);
    if (low !== null) {
      const [bottom, top] = [y(Math.max(0, low)), y(Math.min(100, high))];
      element("path", { class: "bar", d: `M${x - 3},${bottom}h6M${x},${bottom}V${top}M${x - 3},${top}h6` }, point);
    }
    element("circle", { cx: x, cy: y(top1), r: 12, fill: "transparent" }, point);
    const shape = element("path", { d: mark(row.layer), transform: `translate(${x},${y(top1)})` }, point);
    const open = () => showTip(shape, name(row), lines);
    for (const kind of ["pointerenter", "focus", "click"]) point.addEventListener(kind, open);
    point.addEventListener("pointerleave", (event) => event.pointerType === "touch" || hideTip());
    point.addEventListener("blur", hideTip);
  }

  /** Lines to draw of a row: one a run, or the seeds' mean with their range. */
  function series(row, metric, dash) {
    const lines = row.runs.filter((run) => run[metric]?.some((value) => value !== null)).map((run) => ({
      row, dash, label: `${name(row)}, seed ${run.seed}`,
      points: run.epoch.map((epoch, i) => ({ epoch, value: run[metric][i] })).filter((p) => p.value !== null) }));
    if (state.seeds !== "band" || lines.length < 2) return lines;
    const byEpoch = new Map();
    for (const point of lines.flatMap((line) => line.points)) byEpoch.set(point.epoch, [...(byEpoch.get(point.epoch) || []), point.value]);
    const points = [...byEpoch].sort((a, b) => a[0] - b[0]).map(([epoch, values]) => (
      { epoch, value: mean(values), low: Math.min(...values), high: Math.max(...values), n: values.length }));
    return [{ row, dash, label: `${name(row)}, mean of ${lines.length} seeds`, points }];
  }

  function curveChart(plot, shown, dashes) {
    const { metric } = state;
    const title = form.metric ? [...form.metric.options].find((option) => option.value === metric).text : "";
    plot.parentElement.querySelector("figcaption").textContent = title ? `Training: ${title}` : "Training";
    const lines = shown.flatMap((row) => series(row, metric, dashes.get(row.id)));
    const points = lines.flatMap((line) => line.points);
    if (!points.length) return plot.replaceChildren("no such metric was recorded");
    const { svg, box, x, y } = axes(plot, `${title} over epochs`, "epoch",
      (b) => scale(points.map((p) => p.epoch), b.left + 4, b.right - 8, { limits: [0, Infinity], count: plot.clientWidth / 70 }),
      (b) => scale(points.flatMap((p) => [p.low ?? p.value, p.high ?? p.value]), b.bottom, b.top, { limits: [0, metric.endsWith("top1") ? 100 : Infinity] }));
    const path = (line, key) => line.points.map((p) => `${x(p.epoch)},${y(p[key])}`);
    const spot = element("circle", { class: "spot", r: 4, visibility: "hidden" });
    const point = (line, i) => {
      const p = line.points[i];
      for (const [key, value] of Object.entries({ cx: x(p.epoch), cy: y(p.value), style: color(line.row.layer), visibility: "visible" })) spot.setAttribute(key, value);
      const range = p.n > 1 ? ` (${short(p.low)} to ${short(p.high)}, ${p.n} seeds)` : "";
      showTip(spot, line.label, [`epoch ${p.epoch}: ${Number(p.value.toPrecision(4))}${range}`]);
    };
    const leave = () => { spot.setAttribute("visibility", "hidden"); hideTip(); };
    for (const line of lines) {
      if (line.points[0].n) element("path", { class: "band", style: color(line.row.layer), d: `M${[...path(line, "low"), ...path(line, "high").reverse()].join("L")}Z` }, svg);
    }
    for (const line of lines) {
      const drawn = element("path", { class: "curve", style: color(line.row.layer), "stroke-dasharray": line.dash, tabindex: 0, role: "img", "data-curve": line.row.id,
        "aria-label": `${line.label}: ${title} ${Number(line.points.at(-1).value.toPrecision(4))} at the end`, d: `M${path(line, "value").join("L")}` }, svg);
      let at = line.points.length - 1;
      drawn.addEventListener("focus", () => point(line, at));
      drawn.addEventListener("blur", leave);
      drawn.addEventListener("keydown", (event) => {
        const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!way) return;
        event.preventDefault();
        at = Math.min(line.points.length - 1, Math.max(0, at + way));
        point(line, at);
      });
    }
    svg.append(spot);
    const nearest = (event) => {
      const corner = svg.getBoundingClientRect();
      const [px, py] = [event.clientX - corner.left, event.clientY - corner.top];
      if (px < box.left - 8 || py > box.bottom + 8) return leave();
      let best = [Infinity];
      for (const line of lines) line.points.forEach((p, i) => {
        const distance = Math.hypot(x(p.epoch) - px, y(p.value) - py);
        if (distance < best[0]) best = [distance, line, i];
      });
      if (best[0] < 60) point(best[1], best[2]);
      else leave();
    };
    for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, nearest);
    svg.addEventListener("pointerleave", (event) => event.pointerType === "touch" || leave());
  }

  function draw(group) {
    if (group.hidden || !group.querySelector("figure")) return;
    hideTip();
    const all = data.groups[group.dataset.group];
    const shown = all.filter((row) => matches(row));
    // One layer type's rows have one colour: dashes tell them apart, by their place among all, so that a filter changes none.
    const dashes = new Map(all.map((row) => [row.id, DASHES[all.filter((other) => other.layer === row.layer).indexOf(row) % DASHES.length]]));
    for (const figure of group.querySelectorAll("figure")) {
      const [plot, kind] = [figure.querySelector(".plot"), figure.dataset.chart];
      if (kind === "curves") curveChart(plot, shown, dashes);
      else costChart(plot, shown, kind);
    }
    const oneNetwork = all.every((row) => row.network === all[0].network);
    group.querySelector(".legend").replaceChildren(...shown.map((row) => {
      const item = document.createElement("li");
      const sample = element("svg", { width: 30, height: 12, style: color(row.layer), "aria-hidden": "true" });
      element("path", { class: "curve", d: "M0,6H30", "stroke-dasharray": dashes.get(row.id) }, sample);
      element("path", { d: mark(row.layer), transform: "translate(15,6) scale(0.8)", fill: "currentColor" }, sample);
      item.append(sample, oneNetwork ? name(row).slice(row.network.length + 2) : name(row));
      return item;
    }));
  }

  let pointed;
  function showTip(anchor, title, lines) {
    const head = document.createElement("b");
    head.textContent = title;
    tip.replaceChildren(head, ...lines.map((line) => Object.assign(document.createElement("span"), { textContent: line })));
    tip.hidden = false;
    pointed = anchor;
    placeTip();
  }
  function placeTip() {
    if (tip.hidden) return;
    const at = pointed.getBoundingClientRect();
    const above = at.top - tip.offsetHeight - 10;
    const left = (at.left + at.right) / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${above > 4 ? above : at.bottom + 10}px`;
  }
  function hideTip() {
    tip.hidden = true;
  }

  // Start -------------------------------------------------------------------------------------------------------------

  for (const place of document.querySelectorAll(".mark")) {
    const svg = element("svg", { viewBox: "-7 -7 14 14", style: color(place.dataset.layer), "aria-hidden": "true" }, place);
    element("path", { d: mark(place.dataset.layer), fill: "currentColor" }, svg);
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  document.addEventListener("pointerdown", (event) => event.target.closest(".plot") || hideTip());
  addEventListener("scroll", placeTip, { passive: true });
  addEventListener("hashchange", () => { readAddress(); show(); });
  let [width, waiting] = [innerWidth, 0];
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar comes and goes
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(show, 100);
  });
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details.claim:not([open])")];
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
  readAddress();
  show();
})();
