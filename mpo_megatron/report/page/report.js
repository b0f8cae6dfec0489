"use strict";
// The page: `content` (report/content.py) → sections, charts (plotly.js) and tables.
// Texts of prompts and responses reach the page through `textContent` only, so they are never parsed as HTML.

const content = JSON.parse(document.getElementById("content").textContent);
const runs = content.runs;
const COLOURS = ["#3b6fd4", "#e0812b", "#2f9e62", "#b5489a", "#7a63d2", "#8a6d3b"];
const colour = (index) => COLOURS[index % COLOURS.length];
const LABELS = {
  chosen_log_ratio: "preferred", rejected_log_ratio: "others", seconds: "step", data_wait: "waiting for data",
};
const state = { smooth: 4, log: false, groupsRun: 0 };
const drawings = []; // functions that draw every chart again

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined).map((child) =>
    child instanceof Node ? child : document.createTextNode(String(child))));
  return element;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Plotly interprets some HTML in labels.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const known = (value) => value !== null && value !== undefined;

// A rendered prompt's last words before the answer, without the template's markers.
function excerpt(prompt) {
  const roles = new Set(["", "system", "user", "assistant"]);
  const parts = (prompt ?? "").split(/<\|[^|>]*\|>/).map((part) => part.replace(/^(system|user|assistant)\n/, "").trim());
  return parts.filter((part) => !roles.has(part)).pop() ?? prompt ?? "";
}

function number(value, signed = false) {
  if (!known(value)) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && !signed) return value.toLocaleString("en").replace("-", "−");
  const text = size >= 1000 ? Math.round(size).toLocaleString("en")
    : size !== 0 && size < 0.001 ? size.toExponential(1)
    : size.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
  return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + text;
}

function measured(metric, value) {
  if (metric === "accuracy" || metric === "mfu") return (100 * value).toFixed(1) + "\u00a0%";
  return number(value, metric === "margin" || metric === "kl");
}

function section(title, id, about, ...children) {
  document.getElementById("nav").append(make("a", { href: "#" + id }, title));
  const heading = make("h2", { id }, title, about ? make("small", {}, about) : null);
  const whole = make("section", {}, heading, ...children);
  document.getElementById("main").append(whole);
  return whole;
}

// ------------------------------------------------------------------------------------------------ overview

function overview() {
  const whole = section("Overview", "overview", null);
  whole.querySelector("h2").remove();
  whole.id = "overview";
  runs.forEach((run, index) => {
    const share = run.total_steps ? Math.min(1, run.step / run.total_steps) : 0;
    const bar = make("i");
    bar.style.width = 100 * share + "%";
    const swatch = make("i", { class: "swatch" });
    swatch.style.background = colour(index);
    whole.append(make("div", { class: "run" },
      make("div", { class: "head" },
        runs.length > 1 ? swatch : null,
        make("h1", {}, run.name),
        make("span", { class: "chip " + run.status }, run.status),
        run.total_steps ? make("div", { class: "progress" }, bar) : null,
        make("span", { class: "soft" }, `step ${run.step}` + (run.total_steps ? ` of ${run.total_steps}` : "")),
        make("span", { class: "soft mono" }, run.config["loss.name"] ? `loss ${run.config["loss.name"]}` : ""),
      ),
      make("div", { class: "tiles" }, run.tiles.map((tile) => make("div", { class: "card tile" },
        make("span", {}, tile.name + (tile.held_out ? ", held out" : "")),
        make("b", {}, measured(tile.metric, tile.value)), " ",
        known(tile.first) ? make("em", {}, "from " + measured(tile.metric, tile.first)) : null))),
      make("div", { class: "findings" }, run.findings.map((finding) => make("div", { class: "card finding " + finding.level },
        make("h3", {}, finding.title), make("p", {}, finding.text.replaceAll(" %", "\u00a0%"))))),
    ));
  });
}

function comparison() {
  if (runs.length < 2) return;
  const metrics = new Map(runs.flatMap((run) => run.tiles.map((tile) => [tile.metric, tile])));
  const head = make("tr", {}, make("th", {}, "Run"), [...metrics.values()].map((tile) =>
    make("th", { class: "num" }, tile.name + (tile.held_out ? ", held out" : ""))), make("th", { class: "num" }, "Step"));
  const values = (metric) => runs.map((run) => run.tiles.find((tile) => tile.metric === metric)?.value);
  const rows = runs.map((run, index) => {
    const swatch = make("i", { class: "swatch" });
    swatch.style.background = colour(index);
    const cells = [...metrics.values()].map((tile) => {
      const all = values(tile.metric).filter(known);
      const best = tile.better === "largest" ? Math.max(...all) : tile.better === "smallest" ? Math.min(...all) : null;
      const value = values(tile.metric)[index];
      return make("td", { class: "num" + (known(value) && value === best ? " best" : "") },
        known(value) ? measured(tile.metric, value) : "–");
    });
    return make("tr", {}, make("td", {}, swatch, " ", run.name), cells, make("td", { class: "num" }, run.step));
  });
  const whole = section("Comparison", "comparison", "the better value of each column in green",
    make("div", { class: "card scroll" }, make("table", { id: "compared" }, make("thead", {}, head), make("tbody", {}, rows))));
  if (content.differences.length) {
    const header = make("tr", {}, make("th", {}, "Option"), runs.map((run) => make("th", {}, run.name)));
    const lines = content.differences.map((row) => make("tr", {}, make("td", { class: "mono" }, row.option),
      row.values.map((value) => make("td", { class: "mono" }, value))));
    whole.append(make("h2", {}, "Differing options"), make("div", { class: "card scroll" },
      make("table", {}, make("thead", {}, header), make("tbody", {}, lines))));
  }
}

// -------------------------------------------------------------------------------------------------- charts

function layout(changes) {
  const axis = { gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true,
    tickfont: { size: 11 }, titlefont: { size: 11 } };
  const { xaxis = {}, yaxis = {}, ...rest } = changes;
  return {
    margin: { l: 44, r: 8, t: 6, b: 34 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--soft"), family: "system-ui, DejaVu Sans, sans-serif", size: 11 }, hovermode: "x unified",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    legend: { orientation: "h", traceorder: "normal", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

function chart(title, about, draw, wide = false) {
  const plot = make("div", { class: "plot" });
  const card = make("div", { class: "card chart" + (wide ? " wide" : "") }, make("h3", {}, title), make("p", {}, about), plot);
  drawings.push(() => {
    const { traces, ...rest } = draw();
    Plotly.react(plot, traces, layout(rest), { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
      displayModeBar: matchMedia("(hover: hover)").matches && "hover" }); // on touch screens it would always cover the legend
  });
  return card;
}

// A centred mean over `width` neighbours on each side, shorter at the ends.
function smoothed(values, width) {
  if (!width) return values;
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, place) => {
    const from = Math.max(0, place - width), to = Math.min(values.length, place + width + 1);
    return (sums[to] - sums[from]) / (to - from);
  });
}

function curveTraces(spec) {
  const traces = [];
  const several = spec.metrics.length > 1;
  runs.forEach((run, index) => spec.metrics.forEach((metric, which) => {
    const curve = run.curves[metric];
    if (!curve) return;
    const pair = metric === "chosen_log_ratio" ? css("--chosen") : metric === "rejected_log_ratio" ? css("--rejected") : null;
    const single = pair ?? colour(which);
    const line = runs.length > 1 ? colour(index) : single;
    const name = plain([runs.length > 1 ? run.name : "", several ? LABELS[metric] ?? metric : ""].filter(Boolean).join(", "));
    const group = run.name + metric;
    const dash = runs.length > 1 && which > 0 ? "dot" : "solid";
    if (curve.training) {
      const [steps, values] = curve.training;
      const width = Math.round(state.smooth * steps.length / 400) || (state.smooth > 0 && steps.length > 20 ? 1 : 0);
      if (width) traces.push({ x: steps, y: values, mode: "lines", line: { color: line, width: 1 }, opacity: 0.22,
        hoverinfo: "skip", showlegend: false, legendgroup: group });
      traces.push({ x: steps, y: smoothed(values, width), mode: "lines", name: name ? name + ", training" : "training",
        line: { color: line, width: 1.8, dash }, legendgroup: group });
    }
    if (curve.held_out) {
      const dots = runs.length > 1 || several ? line : colour(1);
      traces.push({ x: curve.held_out[0], y: curve.held_out[1], mode: "lines+markers", legendgroup: group,
        name: name ? name + ", held out" : "held out",
        line: { color: dots, width: 1.4, dash: "dash" }, marker: { color: dots, size: 6, line: { color: css("--card"), width: 1 } } });
    }
  }));
  return traces;
}

const positive = (spec) => runs.every((run) => spec.metrics.every((metric) =>
  Object.values(run.curves[metric] ?? {}).every(([, values]) => values.every((value) => value > 0))));

function curvesSections() {
  for (const name of new Set(content.charts.map((spec) => spec.section))) {
    const specs = content.charts.filter((spec) => spec.section === name && spec.metrics.some((metric) =>
      runs.some((run) => run.curves[metric])));
    if (!specs.length) continue;
    const cards = specs.map((spec) => chart(spec.title, spec.about, () => ({
      traces: curveTraces(spec),
      xaxis: { title: { text: "step" } },
      yaxis: { title: { text: spec.unit }, type: state.log && positive(spec) ? "log" : "linear" },
      shapes: runs.length > 1 ? [] : runs[0].starts.map((step) => ({ type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1,
        line: { color: css("--note"), width: 1, dash: "dot" } })),
    }), spec.wide));
    section(name, name.toLowerCase(), name === "Learning" ? "lines: training; dots: held-out groups" : null,
      make("div", { class: "charts" }, cards));
  }
}

const middles = (edges) => edges.slice(1).map((edge, place) => (edge + edges[place]) / 2);
const widths = (edges) => edges.slice(1).map((edge, place) => edge - edges[place]);

function distributions() {
  const cards = [];
  runs.forEach((run, index) => {
    const prefix = runs.length > 1 ? run.name + ": " : "";
    if (run.drift) cards.push(driftCard(run, prefix));
    if (run.lengths.some((part) => part.tokens.length)) {
      cards.push(chart(prefix + "Log-ratio against length", "A slope in both colours alike means that the policy goes by length.", () => ({
        traces: run.lengths.map((part) => ({ x: part.tokens, y: part.ratios, mode: "markers", type: "scatter",
          name: part.set ? "preferred" : "others",
          marker: { size: 5, opacity: 0.5, color: css(part.set ? "--chosen" : "--rejected") } })),
        hovermode: "closest", xaxis: { title: { text: "tokens of the response" } }, yaxis: { title: { text: "log π/π_ref, nats" } },
      })));
    }
    // Runs on the same data have the same histograms: show them once.
    const same = runs.slice(0, index).some((other) => JSON.stringify(other.data) === JSON.stringify(run.data));
    if (!same) {
      run.data.forEach((spec) => cards.push(chart(prefix + spec.title, "Shares of the training data, and of the held-out data.", () => ({
        traces: Object.entries(spec.series).map(([name, shares], which) => ({ type: "bar", x: middles(spec.edges), y: shares,
          width: widths(spec.edges), name, opacity: 0.55, marker: { color: colour(which) } })),
        barmode: "overlay", bargap: 0, xaxis: { title: { text: spec.unit } }, yaxis: { title: { text: "share" }, tickformat: ".0%" },
      }))));
    }
  });
  if (cards.length) section("Distributions", "distributions", null, make("div", { class: "charts" }, cards));
}

function driftCard(run, prefix) {
  const { steps, edges, counts } = run.drift;
  const top = Math.max(...counts.slice(-1)[0].flat()) * 1.15;
  let place = steps.length - 1;
  const label = make("b", {}, steps[place]);
  const card = chart(prefix + "Distribution of log-ratios",
    "log π/π_ref of all held-out responses; before training they are all 0. Drag to select an evaluation.", () => ({
    traces: ["preferred", "others"].map((name, which) => ({ type: "bar", x: middles(edges), y: counts[place][which], name,
      width: widths(edges), opacity: 0.6, marker: { color: css(which ? "--rejected" : "--chosen") } })),
    barmode: "overlay", bargap: 0, xaxis: { title: { text: "log π/π_ref, nats" } },
    yaxis: { title: { text: "responses" }, range: place ? [0, top] : null },
  }), true);
  const draw = drawings[drawings.length - 1];
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: place, "aria-label": "evaluation" });
  slider.addEventListener("input", () => {
    place = Number(slider.value);
    label.textContent = steps[place];
    draw();
  });
  if (steps.length > 1) card.append(make("div", { class: "row soft" }, "after step ", label, slider));
  return card;
}

// -------------------------------------------------------------------------------------------------- groups

const SVG = "http://www.w3.org/2000/svg";

function spark(values, stroke) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 120 28");
  picture.classList.add("spark");
  const there = values.map((value, place) => [place, value]).filter((pair) => known(pair[1]));
  if (there.length < 2) return picture;
  const low = Math.min(0, ...there.map((pair) => pair[1])), high = Math.max(0, ...there.map((pair) => pair[1]));
  const x = (place) => 2 + 116 * place / (values.length - 1), y = (value) => 26 - 24 * (value - low) / ((high - low) || 1);
  const zero = document.createElementNS(SVG, "line");
  for (const [name, value] of Object.entries({ x1: 0, x2: 120, y1: y(0), y2: y(0) })) zero.setAttribute(name, value);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", "M" + there.map(([place, value]) => `${x(place).toFixed(1)},${y(value).toFixed(1)}`).join("L"));
  path.style.stroke = stroke;
  picture.append(zero, path);
  return picture;
}

const last = (values) => values.length ? values[values.length - 1] : null;
const setName = (own) => ({ 1: "preferred", 0: "other", "-1": "not used" })[own];
const setColour = (own) => css({ 1: "--chosen", 0: "--rejected", "-1": "--note" }[own]);

function responseCard(response) {
  return make("div", { class: "response s" + response.set },
    make("header", {}, make("span", { class: "badge" }, setName(response.set)), spark(response.ratios, setColour(response.set))),
    make("div", { class: "numbers" },
      make("span", {}, "reward ", make("b", {}, number(response.reward))),
      make("span", {}, "log π/π_ref ", make("b", {}, number(last(response.ratios), true))),
      make("span", {}, "log π ", make("b", {}, number(response.policy))),
      make("span", {}, "log π_ref ", make("b", {}, number(response.reference))),
      make("span", {}, make("b", {}, number(response.tokens)), " tokens")),
    make("div", { class: "text" }, response.text ?? "(the text is no longer available)"));
}

const COLUMNS = [
  { key: "id", name: "Group" },
  { key: "prompt", name: "Prompt" },
  { key: "k", name: "K", numeric: true },
  { key: "spread", name: "Reward spread", numeric: true },
  { key: "accuracy", name: "Accuracy", numeric: true },
  { key: "began", name: "Margin, first", numeric: true },
  { key: "margin", name: "Margin, last", numeric: true },
  { key: "change", name: "Change", numeric: true },
];
const FILTERS = {
  all: ["all", () => true],
  wrong: ["mostly wrong", (row) => known(row.accuracy) && row.accuracy < 0.5],
  worse: ["getting worse", (row) => known(row.change) && row.change < 0],
};
const AT_ONCE = 50;

function groups() {
  if (!runs.some((run) => run.groups.length)) {
    section("Groups", "groups", null, make("p", { class: "card pad soft" },
      "No run has saved held-out groups. Set data.eval to save them at every evaluation."));
    return;
  }
  let key = "margin", down = false, filter = "all", shown = AT_ONCE, search = "";
  const body = make("tbody", { id: "groups-body" });
  const count = make("span", { class: "soft", id: "groups-count" });
  const more = make("button", { type: "button", onclick: () => { shown += AT_ONCE; fill(); } }, "show more");
  const heads = COLUMNS.map((column) => make("th", { "data-key": column.key, class: column.numeric ? "num" : null, tabindex: 0,
    onclick: () => { down = key === column.key ? !down : false; key = column.key; fill(); } }, column.name));

  function rows() {
    return runs[state.groupsRun].groups.map((group) => ({ ...group,
      change: known(group.margin) && known(group.began) ? group.margin - group.began : null }));
  }
  function matches(row) {
    const text = [row.id, row.prompt, ...row.responses.map((response) => response.text)].join("\n").toLowerCase();
    return FILTERS[filter][1](row) && text.includes(search);
  }
  function compare(a, b) {
    const [left, right] = [a[key], b[key]];
    if (!known(left) || !known(right)) return known(right) - known(left); // missing values come last in both orders
    return (typeof left === "number" ? left - right : String(left).localeCompare(String(right), "en", { numeric: true })) * (down ? -1 : 1);
  }
  function line(row) {
    const signed = (value) => make("td", { class: "num " + (value < 0 ? "neg" : value > 0 ? "pos" : "") }, number(value, true));
    const whole = make("tr", { class: "group", tabindex: 0 },
      make("td", { class: "mono" }, row.id), make("td", {}, make("div", { class: "excerpt" }, excerpt(row.prompt))),
      make("td", { class: "num" }, row.k), make("td", { class: "num" }, number(row.spread)),
      make("td", { class: "num" }, known(row.accuracy) ? (100 * row.accuracy).toFixed(0) + " %" : "–"),
      signed(row.began), signed(row.margin), signed(row.change));
    const toggle = () => {
      if (whole.classList.toggle("open")) {
        const order = [...row.responses].sort((a, b) => (b.reward ?? b.set) - (a.reward ?? a.set));
        whole.after(make("tr", {}, make("td", { class: "detail", colspan: COLUMNS.length },
          make("div", { class: "prompt" }, row.prompt ?? "(the prompt is no longer available)"),
          selection(row), make("div", { class: "responses" }, order.map(responseCard)))));
      } else whole.nextSibling.remove();
    };
    whole.addEventListener("click", toggle);
    whole.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
    return whole;
  }
  function fill() {
    const found = rows().filter(matches).sort(compare);
    body.replaceChildren(...found.slice(0, shown).map(line));
    heads.forEach((head) => head.setAttribute("aria-sort", head.dataset.key !== key ? "none" : down ? "descending" : "ascending"));
    const run = runs[state.groupsRun];
    count.textContent = `${found.length} of ${run.groups.length} groups` + (run.num_groups > run.groups.length ?
      ` here (the run evaluates ${run.num_groups}; the worst and a selection of the others are in this page)` : "");
    more.parentElement.hidden = found.length <= shown;
  }
  const buttons = Object.entries(FILTERS).map(([name, [label]]) => make("button", { type: "button", "data-filter": name,
    "aria-pressed": String(name === filter), onclick: (event) => {
      filter = name; shown = AT_ONCE;
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button === event.target)));
      fill();
    } }, label));
  const box = make("input", { type: "search", placeholder: "search ids, prompts, responses", id: "search" });
  box.addEventListener("input", () => { search = box.value.toLowerCase(); shown = AT_ONCE; fill(); });
  const choice = make("select", { "aria-label": "run" }, runs.map((run, index) => make("option", { value: index }, run.name)));
  choice.addEventListener("change", () => { state.groupsRun = Number(choice.value); shown = AT_ONCE; fill(); });
  section("Groups", "groups", "held-out groups, worst margin first; a click shows the responses",
    make("div", { class: "card" },
      make("div", { class: "pad row" }, runs.length > 1 ? choice : null, box, buttons, count),
      make("div", { class: "scroll" }, make("table", { id: "groups-table" },
        make("thead", {}, make("tr", {}, heads)), body)),
      make("div", { class: "more" }, more)));
  state.groupsRun = Math.max(0, runs.findIndex((run) => run.groups.length));
  choice.value = state.groupsRun;
  fill();
}

// --------------------------------------------------------------------------------------- incidents and facts

// A note above responses of a large group, of which the page holds some.
function selection(group) {
  return group.responses.length < group.k ?
    make("p", { class: "soft" }, `${group.responses.length} of ${group.k} responses, spread evenly over their rewards`) : null;
}

function incidentGroup(incident) {
  return make("details", {},
    make("summary", {}, make("span", { class: "mono" }, incident.group_id ?? "?"), " ",
      make("span", { class: "soft" }, `loss ${number(incident.loss)} · ${excerpt(incident.prompt).slice(0, 100)}`)),
    make("div", { class: "pad" }, make("div", { class: "prompt" }, incident.prompt), selection(incident),
      make("div", { class: "responses" }, incident.responses.map((response) => make("div", { class: "response" },
        make("div", { class: "numbers" }, make("span", {}, "reward ", make("b", {}, number(response.reward))),
          make("span", {}, "log π ", make("b", {}, number(response.logp))),
          make("span", {}, "log π_ref ", make("b", {}, number(response.reference_logp))),
          make("span", {}, make("b", {}, number(response.tokens)), " tokens")),
        make("div", { class: "text" }, response.text))))));
}

function incidents() {
  const cards = runs.flatMap((run) => [...new Set(run.incidents.map((incident) => incident.step))].map((step) => {
    const found = run.incidents.filter((incident) => incident.step === step);
    return make("details", { class: "card incident" },
      make("summary", {}, `${runs.length > 1 ? run.name + ", " : ""}step ${step ?? "?"}: ${found[0].wrong ?? ""} `,
        make("span", { class: "soft" }, `${found.length} groups, gradient norm ${number(found[0].grad_norm)}`)),
      found.map(incidentGroup));
  }));
  if (cards.length) section("Incidents", "incidents", "suspicious steps; groups with the highest loss first", ...cards);
}

function facts() {
  const cards = runs.map((run) => make("div", { class: "card facts" },
    runs.length > 1 ? make("div", { class: "pad" }, make("h3", {}, run.name)) : null,
    make("div", { class: "scroll" }, make("table", {}, make("tbody", {},
      make("tr", {}, make("th", {}, "Folder"), make("td", { class: "mono" }, run.folder)),
      run.facts.map(([name, text]) => make("tr", {}, make("th", {}, name), make("td", { class: "mono" }, text)))))),
    make("details", {}, make("summary", {}, "Configuration"), make("div", { class: "scroll" }, make("table", {}, make("tbody", {},
      Object.entries(run.config).map(([name, value]) => make("tr", {}, make("td", { class: "mono" }, name),
        make("td", { class: "mono" }, value)))))))));
  section("Facts", "facts", null, ...cards);
}

// ---------------------------------------------------------------------------------------------------- start

const redraw = () => drawings.forEach((draw) => draw());

function theme(name) {
  document.documentElement.dataset.theme = name;
  redraw();
}

document.getElementById("main").replaceChildren();
overview();
comparison();
curvesSections();
distributions();
groups();
incidents();
facts();
document.getElementById("foot").textContent = `Made ${content.made} by mpo report.`;
document.getElementById("smooth").addEventListener("input", (event) => { state.smooth = Number(event.target.value); redraw(); });
document.getElementById("log").addEventListener("change", (event) => { state.log = event.target.checked; redraw(); });
document.getElementById("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.dataset.ready = "true";
