"use strict";
// The page's script: sorting, and filters, kept in the address, for the tables, the runs and the charts in #data.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.groups.flat();
  const form = document.querySelector(".controls");
  const FIELDS = ["dataset", "network", "schedule", "layer"];
  document.documentElement.classList.add("script");

  // State: what is shown, in the address ------------------------------------------------------------------------------

  const layers = [...form.querySelectorAll("[name=layer]")].map((box) => box.value);
  const selects = [...form.querySelectorAll("select")];
  const first = Object.fromEntries(selects.map((select) => [select.name, select.options[0].value]));
  let state = { ...first, layer: "" };
  let wanted = {}; // the charts' parameters
  const updates = [];

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    state = { ...first, layer: "" };
    for (const { name, options } of selects)
      if ([...options].some((option) => option.value === given.get(name))) state[name] = given.get(name);
    state.layer = layers.filter((layer) => (given.get("layer") || "").split(",").includes(layer)).join(",");
    if (location.hash.length > 1) goTo(given.get("at") || [...given.keys()][0]);
  }

  function writeAddress(at) {
    const kept = Object.entries(state).filter(([key, value]) => value !== (first[key] ?? ""));
    const hash = new URLSearchParams(at ? [...kept, ["at", at]] : kept);
    history[at ? "pushState" : "replaceState"](null, "", `#${hash}`);
  }

  function matches(row, chosen = state) {
    const values = (field) => (field === "layer" ? chosen.layer.split(",") : [chosen[field]]);
    return FIELDS.every((field) => !chosen[field] || values(field).includes(row[field]));
  }

  function goTo(id) {
    const target = document.getElementById(id);
    if (!target) return;
    if (target.closest("[hidden]")) state = { ...state, dataset: "", network: "", schedule: "", layer: "" };
    show();
    for (let outer = target; outer; outer = outer.parentElement) if (outer.tagName === "DETAILS") outer.open = true;
    target.scrollIntoView();
  }

  function lead(id) {
    goTo(id);
    writeAddress(id);
  }

  function show() {
    for (const select of selects) {
      select.value = state[select.name];
      if (!FIELDS.includes(select.name)) continue;
      for (const option of select.options)
        option.disabled = !rows.some((row) => matches(row, { ...state, [select.name]: option.value }));
    }
    for (const box of form.querySelectorAll("[name=layer]"))
      box.checked = !state.layer || state.layer.split(",").includes(box.value);
    const shown = rows.filter((row) => matches(row));
    const ids = new Set(shown.map((row) => row.id));
    for (const item of document.querySelectorAll("[data-row]")) item.hidden = !ids.has(item.dataset.row);
    for (const group of document.querySelectorAll("[data-group]"))
      group.hidden = !data.groups[group.dataset.group].some((row) => ids.has(row.id));
    const title = form.metric?.selectedOptions[0].text;
    for (const caption of document.querySelectorAll("[data-metric]")) caption.textContent = `Training: ${title}`;
    wanted = { shown: [...ids], metric: state.metric, seeds: state.seeds };
    for (const update of updates) update();
    dispatchEvent(new Event("resize")); // a chart that was hidden had no width
    const [runs, all] = [shown, rows].map((some) => some.reduce((sum, row) => sum + row.n, 0));
    form.querySelector("output").value = shown.length ? `${runs} of ${all} runs` : "no run is like that";
    form.querySelector("[name=reset]").hidden = runs === all;
  }

  form.addEventListener("change", () => {
    for (const select of selects) state[select.name] = select.value;
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
    lead(decodeURIComponent(link.hash.slice(1)));
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

  /** Runs the script that an element holds as base64 of gzip. */
  async function unpack(element) {
    const packed = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt());
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  /** Draws a chart; `updates` gets what tells it of other filters. */
  async function draw(figure) {
    const plot = figure.querySelector(".plot");
    const spec = data.charts[figure.dataset.chart];
    // The page's Content-Security-Policy has no eval; `ast` does without.
    const options = { mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false, logLevel: 1 };
    const { view } = await vegaEmbed(plot, spec, { ...options, tooltip: { disableDefaultStyle: true } });
    const update = async () => {
      if (figure.closest("[hidden]")) return;
      for (const { name } of spec.params) view.signal(name, wanted[name]);
      await view.runAsync();
      for (const point of plot.querySelectorAll(".points_marks path")) point.tabIndex = 0;
    };
    view.addEventListener("click", (event, item) => {
      if (event.target.closest(".points_marks")) lead(`runs-${item.datum.row}`);
    });
    // The keyboard does on a point what a pointer does there.
    for (const [key, pointer] of Object.entries({ focusin: "pointermove", focusout: "mouseout", keydown: "click" }))
      plot.addEventListener(key, (event) => {
        if (!event.target.closest(".points_marks") || (event.key && event.key !== "Enter")) return;
        const box = event.target.getBoundingClientRect();
        const at = { clientX: (box.left + box.right) / 2, clientY: (box.top + box.bottom) / 2 };
        event.target.dispatchEvent(new PointerEvent(pointer, { bubbles: true, ...at }));
      });
    updates.push(update);
    await update();
  }

  // Start -------------------------------------------------------------------------------------------------------------

  addEventListener("hashchange", () => { readAddress(); show(); });
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details.claim:not([open])")];
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
  readAddress();
  show();
  (async () => {
    await unpack(document.getElementById("vega"));
    for (const figure of document.querySelectorAll("figure")) await draw(figure);
  })();
})();
