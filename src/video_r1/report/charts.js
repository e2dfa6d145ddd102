"use strict";

// Elements. What a run's files hold is only ever set as text or as a number, so that it cannot become markup.

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** A number as a reader wants it: three significant digits, true minus sign, thin spaces between thousands. */
function show(value, digits) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  let text;
  if (digits !== undefined) text = value.toFixed(digits);
  else if (value === 0) text = "0";
  else if (size >= 1000) text = Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, "\u2009");
  else if (size < 0.001) text = value.toExponential(1).replace(".0e", "e");
  else text = String(Number(value.toPrecision(3)));
  return (Number(text) === 0 ? text.replace("-", "") : text).replaceAll("-", "−"); // not "−0.00"
}

/** Content shown over the page until it is closed. */
function showLarge(label, ...content) {
  const dialog = make("dialog", { "aria-label": label, close: () => dialog.remove() }, ...content,
    make("button", { type: "button", class: "close", click: () => dialog.close() }, "Close"));
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

const signed = (value) => (value >= 0.005 ? "+" : "") + show(value, 2);
const plural = (count, noun) => `${show(count)} ${noun}${count === 1 ? "" : "s"}`;

/** Round axis values inside [low, high], about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.7);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(Number((i * step).toPrecision(12)));
  return values;
}

/** Gaussian average over neighbours at most `radius` points away; at the ends over those that exist. */
function smooth(values, radius) {
  if (!radius) return values;
  const weights = Array.from({ length: radius + 1 }, (_, i) => Math.exp(-0.5 * (i / (radius / 2)) ** 2));
  return values.map((_, i) => {
    let sum = 0;
    let total = 0;
    for (let j = Math.max(0, i - radius); j <= Math.min(values.length - 1, i + radius); j++) {
      const weight = weights[Math.abs(i - j)];
      sum += weight * values[j];
      total += weight;
    }
    return sum / total;
  });
}

/** The index of the value nearest to `target` in an ascending list. */
function nearest(sorted, target) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < target) low = middle + 1;
    else high = middle;
  }
  return low > 0 && target - sorted[low - 1] <= sorted[low] - target ? low - 1 : low;
}

// A series has the same paint in every chart of its kind: by type or modality, letters, reward terms. The ninth has
// the first one's colour, dashed.
const LINES = { "": ["multiple choice", "numerical", "OCR", "free-form", "regression", "video", "image"] };
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "14 4", "5 2 2 2"];
const paintOf = (number) => ({ colour: `var(--line${number % 8})`, dash: DASHES[Math.floor(number / 8) % DASHES.length] });

/** What a chart's x is: how a value is written, and which values may have a tick. */
const AXES = {
  step: { name: "step", show: (value) => show(value), whole: true },
  time: { name: "after", show: (seconds) => clockTime(seconds), marks: timeMarks },
};

/** Ticks of a time axis as [seconds, text], in the largest unit of which it has four. */
function timeMarks(first, last, count) {
  const [name, unit] = [["h", 3600], ["min", 60]].find(([, seconds]) => last - first >= 4 * seconds) ?? ["s", 1];
  return ticks(first / unit, last / unit, count).map((value) => [value * unit, `${show(value)} ${name}`]);
}

const clockTime = (seconds) => (seconds < 60 ? `${Math.round(seconds)} s` : seconds < 3600 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`);

const LABEL_GAP = 14; // pixels between labels at the ends of lines
const LABEL_SHARE = 0.36; // of a chart's width for them, at most
const measured = document.createElement("canvas").getContext("2d");
measured.font = "12px sans-serif";
const widthOf = (text) => 1.08 * measured.measureText(text).width;

function linePaint(label, kind) {
  if (!label) return { colour: "var(--ink)", dash: "" };
  if (label === "ordered") return { colour: "var(--ordered)", dash: "" };
  if (label === "contrast" || Object.hasOwn(CONTRASTS, label)) return { colour: "var(--shuffled)", dash: DASHES[Object.keys(CONTRASTS).indexOf(label)] ?? "" };
  const labels = LINES[kind] ??= [];
  if (!labels.includes(label)) labels.push(label);
  return paintOf(labels.indexOf(label));
}

/** A run with its `series`, each with its own points alone, from the columns `points`. axis: steps or times. */
function charted(run, axis = "steps") {
  const { points } = run;
  return { ...run, series: Object.fromEntries(Object.entries(points.series).map(([name, values]) => {
    const known = values.flatMap((value, i) => (value === null ? [] : [i]));
    const bad = Object.hasOwn(points.bad, name) ? points.bad[name] : 0;
    return [name, { x: known.map((i) => points[axis][i]), y: known.map((i) => values[i]), bad, averaged: points.averaged }];
  })) };
}

/**
 * Which series share a chart: `group/name` with its `group/name/part` lines, and `x` with `x_shuffled` or another
 * contrast (or `x_video` with it, where `x` is over images, too). Validation is logged as `eval_x`; a gap has the ends of
 * its interval in `x_low` and `x_high`.
 */
function chartSpecs(run) {
  if (run.specs) return run.specs;
  const names = Object.keys(run.series).filter((name) => run.series[name].y.length > 1);
  const orderedTwin = (stem) => [`${stem}_video`, stem].find((name) => names.includes(name));
  const contrasts = Object.keys(CONTRASTS);
  const endings = [...contrasts, "contrast"]; // of series: the contrast itself, or whichever the settings name
  const specs = new Map();
  for (const name of names) {
    const parts = name.split("/");
    let base = parts.slice(0, 2).join("/");
    let label = parts.slice(2).join("/");
    const contrast = endings.find((ending) => base.endsWith(`_${ending}`));
    const stem = base.replace(new RegExp(`_(video|${contrast})$`), "");
    const compared = endings.some((ending) => names.includes(`${stem}_${ending}`));
    const paired = compared && (contrast !== undefined || base === orderedTwin(stem));
    if (paired && !label) label = contrast || "ordered";
    const [, gap, end] = /^(eval_.*_gap)_(low|high)$/.exec(name) || [];
    if (gap) [base, label] = [gap, end];
    const together = Object.hasOwn(TOGETHER, parts[0]) ? TOGETHER[parts[0]] : "";
    if (together) [base, label] = [together, parts.slice(1).join("/").replaceAll("_", " ")];
    if (label === "contrast" && contrasts.includes(run.config?.temporal_contrast)) label = run.config.temporal_contrast;
    if (paired) base = orderedTwin(stem) || base;
    if (!specs.has(base)) specs.set(base, { base, group: groupOf(name), lines: [] });
    specs.get(base).lines.push({ ...run.series[name], label, ...linePaint(label, together ? groupOf(name) : ""), main: !label || paired });
  }
  const place = (line) => (line.main ? 0 : 2) + (Object.hasOwn(CONTRASTS, line.label) ? 1 : 0);
  for (const spec of specs.values()) spec.lines.sort((a, b) => place(a) - place(b));
  return [...specs.values()];
}

// Series `group/part` whose parts are lines of one chart.
const TOGETHER = { answers: "answers/letters", credit: "credit/share", credit_sign: "credit_sign/right" };

const groupOf = (name) => (name.includes("/") ? name.split("/")[0].replace("credit_sign", "credit") : name.startsWith("eval_") ? "eval" : "");

/** Runs laid over each other: a chart for each series `name` or `group/name`, with a line for each run. */
function overlaySpecs(runs) {
  const specs = new Map();
  runs.forEach((run, i) => {
    for (const [base, data] of Object.entries(run.series)) {
      if (data.y.length < 2 || base.split("/").length > 2 || /_gap_(low|high)$/.test(base)) continue;
      if (!specs.has(base)) specs.set(base, { base, group: groupOf(base), overlay: true, lines: [] });
      specs.get(base).lines.push({ ...data, label: run.name, ...paintOf(i), main: true });
    }
  });
  return [...specs.values()];
}

/** The end of a label, which tells runs apart, in as many characters as have room. */
function shortened(text, room) {
  let from = 0;
  while (from < text.length - 1 && widthOf(`${from ? "…" : ""}${text.slice(from)}`) > room) from++;
  return from ? `…${text.slice(from)}` : text;
}

/**
 * One chart: `node` to place, `redraw(radius)` after a change of width or smoothing, `point(step)` to move the
 * cursor (null: to the last step), `update(spec, radius)` for lines that have grown. `onPoint(step)` is called when a
 * reader moves the cursor.
 */
function chart(spec, title, options) {
  const large = options.large;
  const across = options.axis || AXES.step;
  const readout = make("output", {});
  const plot = make("div", large
    ? { class: "plot", tabindex: 0, role: "slider", "aria-orientation": "horizontal", "aria-label": `${title}: step` }
    : { class: "plot", role: "img" });
  const key = make("ul", { class: "key" });
  const single = spec.lines.length === 1 && !spec.overlay;
  const keyless = single || (!large && spec.lines.length > 2); // a small chart has no room for a long key
  const name = large ? make("span", { class: "title" }, title)
    : make("button", { type: "button", class: "title", title: "show large", click: options.onEnlarge }, title);
  const node = make("figure", { class: large ? "chart large" : "chart" },
    make("figcaption", {}, name, large ? make("code", {}, spec.base) : "", readout), plot, keyless ? null : key,
    Object.hasOwn(SERIES_ABOUT, spec.base) ? make("p", { class: "meaning" }, SERIES_ABOUT[spec.base]) : null);
  let state = null;
  let axis, first, last, at = null;

  function update(grown, radius) {
    spec = grown;
    axis = spec.lines.reduce((a, b) => (b.x.length > a.length ? b.x : a), []);
    first = Math.min(...spec.lines.map((line) => line.x[0]));
    last = Math.max(...spec.lines.map((line) => line.x[line.x.length - 1]));
    if (radius !== undefined) redraw(radius);
  }

  function redraw(radius) {
    const width = plot.clientWidth || 300;
    const height = large ? options.height : 84;
    const direct = large && width > 620 && !single && spec.lines.length * LABEL_GAP < height;
    const room = widthOf(" −0.00") + 18;
    const wanted = 1 + room + Math.max(...spec.lines.map((line) => widthOf(line.label || "all")));
    const margin = { left: large ? 46 : 42, right: direct ? Math.min(wanted, LABEL_SHARE * width) : 8, top: 8, bottom: 18 };
    const lines = spec.lines.map((line) => ({ ...line, s: smooth(line.y, line.x.length > 8 ? radius : 0), short: shortened(line.label || "all", margin.right - room) }));
    const seen = lines.flatMap((line) => (line.main ? line.y : line.s));
    let low = seen.reduce((a, b) => Math.min(a, b), Infinity);
    let high = seen.reduce((a, b) => Math.max(a, b), -Infinity);
    if (options.large && RANGES[spec.base]) [low, high] = [Math.min(low, RANGES[spec.base][0]), Math.max(high, 1)];
    else if (low > 0 && low < 0.35 * high) low = 0;
    if (low === high) [low, high] = [Math.min(low, 0), Math.max(high, 0) || 1];
    const x = (step) => margin.left + ((step - first) / (last - first || 1)) * (width - margin.left - margin.right);
    const y = (value) => margin.top + (1 - (value - low) / (high - low)) * (height - margin.top - margin.bottom);
    const path = (xs, ys) => xs.map((step, i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(ys[i]).toFixed(1)}`).join("");
    const right = width - margin.right;

    const marks = [];
    // A small chart names the range of its data, a large one has an axis.
    for (const value of large ? ticks(low, high, 4) : [low, high]) {
      marks.push(draw("line", { class: "grid", x1: margin.left, x2: right, y1: y(value), y2: y(value) }));
      marks.push(draw("text", { class: "tick", x: margin.left - 6, y: y(value) + 4, "text-anchor": "end" },
        show(large ? value : Number(value.toPrecision(2)))));
    }
    const count = Math.max(3, width / 130);
    const steps = large && across.marks ? across.marks(first, last, count) : (large ? ticks(first, last, count) : [first, last]).map((step) => [step, across.show(step)]);
    steps.filter(([s]) => !across.whole || Number.isInteger(s)).forEach(([step, text], i) => {
      const anchor = x(step) > right - 12 ? "end" : x(step) < margin.left + 14 ? "start" : "middle";
      marks.push(draw("text", { class: "tick", x: x(step), y: height - 4, "text-anchor": anchor }, i ? text : `${across.name} ${text}`));
    });
    for (const line of lines.filter((l) => l.main && radius && l.s !== l.y)) {
      marks.push(draw("path", { class: "raw", d: path(line.x, line.y), stroke: line.colour }));
    }
    for (const line of [...lines].reverse()) {
      marks.push(draw("path", { class: line.main ? "line main" : "line", d: path(line.x, line.s), stroke: line.colour, "stroke-dasharray": line.dash || null }));
    }
    const cursor = draw("line", { class: "cursor", y1: margin.top, y2: height - margin.bottom });
    const dots = lines.map((line) => draw("circle", { r: line.main ? 3 : 2, fill: line.colour }));
    const labels = direct ? lines.map((line) => draw("text", { class: "label", fill: `color-mix(in srgb, ${line.colour} 70%, var(--ink))`, x: right + 10 })) : [];
    const picture = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": large ? "true" : null },
      ...marks, cursor, ...dots, ...labels);
    plot.replaceChildren(picture);
    state = { x, y, lines, cursor, dots, labels, width, margin, height, right };
    key.hidden = direct;
    point(at);
  }

  function point(step) {
    at = step;
    if (!state) return;
    const here = step === null ? last : step;
    const values = state.lines.map((line) => {
      const i = nearest(line.x, here);
      return { line, step: line.x[i], raw: line.y[i], shown: line.s[i] };
    });
    state.cursor.classList.toggle("off", step === null);
    fill(state.cursor, { x1: state.x(here), x2: state.x(here) }, []);
    values.forEach((v, i) => fill(state.dots[i], { cx: state.x(v.step), cy: state.y(v.shown) }, []));
    const averaged = spec.lines[0].averaged;
    const bad = spec.lines.reduce((sum, line) => sum + line.bad, 0);
    readout.replaceChildren(
      single || (spec.lines[0].main && !spec.overlay) ? make("b", {}, show(values[0].raw)) : "",
      large || step !== null ? ` ${across.name} ${across.show(spec.overlay ? here : values[0].step)}` : "",
      averaged > 1 ? ` (mean of ${averaged})` : "",
      bad ? make("span", { class: "bad" }, ` · ${plural(bad, "value")} not finite`) : "");
    if (large) {
      const text = values.map((v) => `${v.line.label || title} ${show(v.raw)}`).join(", ");
      fill(plot, { "aria-valuemin": first, "aria-valuemax": last, "aria-valuenow": here, "aria-valuetext": `${across.name} ${across.show(here)}: ${text}` }, []);
    } else {
      const start = spec.lines[0];
      fill(plot, { "aria-label": `${title}, ${across.name} ${across.show(first)} to ${across.show(last)}: from ${show(start.y[0])} to ${show(start.y[start.y.length - 1])}` }, []);
    }
    if (state.labels.length) placeLabels(values);
    else if (!keyless) {
      key.replaceChildren(...values.map((v) => make("li", {},
        swatch(v.line), `${v.line.label || "all"} `, make("b", {}, show(v.shown)))));
    }
  }

  /** Labels stand beside the line's end with the line's own, smoothed value, pushed apart where ends are close. */
  function placeLabels(values) {
    const order = values.map((v, i) => ({ i, v, top: state.y(v.shown) })).sort((a, b) => a.top - b.top);
    order.forEach((item, n) => {
      if (n) item.top = Math.max(item.top, order[n - 1].top + LABEL_GAP);
    });
    let floor = state.height - 4;
    for (const item of [...order].reverse()) {
      item.top = Math.min(item.top, floor);
      floor = item.top - LABEL_GAP;
    }
    for (const { i, v, top } of order) {
      state.labels[i].textContent = `${v.line.short} ${show(v.shown, Math.abs(v.shown) < 10 ? 2 : 0)}`;
      state.labels[i].setAttribute("y", top + 4);
    }
  }

  plot.addEventListener("pointermove", (event) => {
    if (!state) return;
    const share = (event.clientX - plot.getBoundingClientRect().left - state.margin.left) / (state.right - state.margin.left);
    const step = first + Math.max(0, Math.min(1, share)) * (last - first);
    options.onPoint(axis[nearest(axis, step)]);
  });
  plot.addEventListener("pointerleave", () => options.onPoint(null));
  plot.addEventListener("blur", () => options.onPoint(null));
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -axis.length, End: axis.length }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const now = nearest(axis, Number(plot.getAttribute("aria-valuenow")));
    options.onPoint(axis[Math.max(0, Math.min(axis.length - 1, now + move))]);
  });
  update(spec);
  return { node, redraw, point, update, spec: () => spec };
}

/** Means on a line from 0 to 1, with their intervals. lanes: {score, tint, hollow} from top to bottom. */
function dotPlot(lanes) {
  const [width, edge, lane] = [260, 5, 9];
  const height = 8 + lane * lanes.length;
  const x = (value) => edge + Math.max(0, Math.min(1, value)) * (width - 2 * edge);
  const marks = [0, 0.25, 0.5, 0.75, 1].map((v) => draw("line", { class: "grid", x1: x(v), x2: x(v), y1: 0, y2: height }));
  lanes.forEach(({ score, tint, hollow }, i) => {
    if (!score) return;
    const [y, paint] = [8 + lane * i, `var(--${tint})`];
    if (score.low !== null && score.high !== null) marks.push(draw("line", { class: "bar", stroke: paint, x1: x(score.low), x2: x(score.high), y1: y, y2: y }));
    marks.push(draw("circle", { cx: x(score.mean), cy: y, r: 3.6, stroke: paint, "stroke-width": 1.6, fill: hollow ? "var(--paper)" : paint }));
  });
  return draw("svg", { class: "dotplot", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, ...marks);
}

/** A piece of a line. */
const swatch = ({ colour, dash }) => draw("svg", { class: "swatch", width: 20, height: 8, "aria-hidden": "true" },
  draw("line", { x1: 0, x2: 20, y1: 4, y2: 4, stroke: colour, "stroke-width": 2, "stroke-dasharray": dash || null }));
