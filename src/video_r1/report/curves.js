// What a page of runs is made of: names of series, sections, the charts of a run, tables.

// Names of groups of series and of series, where the logged name is not the best one.
const GROUP_TITLES = {
  reward: "Rewards", credit: "Credit: which reward moved the advantages", reward_std: "Deviation of rewards in a group", temporal: "Frame order", teacher: "Teacher", completion: "Completions", answers: "Answers", policy: "Policy", tools: "Tools", groups: "Groups",
  "": "Optimisation", eval: "Validation", speed: "Speed", seconds: "Seconds of each phase", media: "Media", updates: "Updates",
  memory: "Memory", sampler: "Sampler against trainer",
};
const GROUP_ORDER = Object.keys(GROUP_TITLES);
const SERIES_TITLES = {
  "reward/accuracy": "Accuracy reward", "reward/temporal": "Temporal reward", "completion/length": "Response length, tokens", "answers/letters": "letters answered, count",
  "credit/share": "share of the advantages", "credit_sign/right": "correlation with being right",
  loss: "Loss", "accuracy/token": "Token accuracy", learning_rate: "Learning rate", grad_norm: "Gradient norm",
  "temporal/p": "share right of videos, p and p\u0303", "temporal/p_contrast": "share right with the contrast, p\u0303", "temporal/gap": "temporal gap", "temporal/drop": "log-prob contrast, nats",
  "temporal/credit": "credit of the temporal term", "temporal/credit_groups": "groups with temporal credit, share", "policy/kl": "KL to the reference, nats a token", "policy/entropy": "entropy, nats a token", "completion/truncated": "cut off, share", "completion/self_reflection": "self-reflection, share", "policy/clip_ratio": "share clipped", "teacher/kl": "KL to the teacher", "teacher/agreement": "tokens likeliest to it, share", "teacher/clipped": "share clipped",
  "groups/no_variance": "share without variance", "media/skipped": "questions skipped", "updates/skipped": "updates skipped",
  "memory/peak_gib": "peak, GiB", "sampler/logprob_difference": "log-prob difference, nats", "sampler/share_capped": "share capped",
};
// What a series measures, below its chart.
const SERIES_ABOUT = {
  "temporal/gap": "p − p\u0303: share of right answers in order minus the share with the contrast clip.",
  "temporal/drop": "How much less likely the model finds its answers with the contrast clip.",
  "temporal/credit": "Change of the advantages by the temporal term, divided by the advantages without it. At 0 it cancels.",
  "temporal/credit_groups": "Of the groups that it pays, those in which it changed an advantage by more than 0.01.",
  "credit/share": "Share of each step’s advantages that would change without the term. At 0 the term does nothing.",
  "credit_sign/right": "Below 0 the term favours wrong answers; a gate takes from right ones by design.",
};
const RANGES = { "reward/accuracy": [0, 1], "credit/share": [0, 1], "credit_sign/right": [-1, 1] }; // of large charts, at least
const HEADLINE = { rl: ["reward/accuracy", "reward/temporal", "teacher/kl", "completion/length"], sft: ["loss", "accuracy/token", "completion/length"] };
const KINDS = { rl: "reinforcement learning", sft: "supervised fine-tuning", evaluation: "evaluation", data: "data" };

const OVERLAY_HEADLINE = { ...HEADLINE, rl: ["reward/accuracy", "temporal/gap", "teacher/kl", "completion/length"] };

function seriesTitle({ base, overlay }) {
  if (overlay && base === "temporal/p") return "share right in order, p";
  if (Object.hasOwn(SERIES_TITLES, base)) return SERIES_TITLES[base];
  const name = base.split("/").slice(1).join("/") || base.replace(/^eval_/, "");
  return name.replaceAll("_", " ");
}

const slug = (text) => text.replace(/[^A-Za-z0-9]+/g, "-");

function section(id, title, ...content) {
  return make("section", { id, "aria-labelledby": `${id}-title` }, make("h2", { id: `${id}-title` }, title), ...content);
}

// Curves ---------------------------------------------------------------------------------------------------------

/**
 * The section of a run's charts, which share one cursor and one amount of smoothing. options: overlay (its lines are
 * runs), several (it is one of several sections). `section.update(run)` draws what a run that goes on has logged since.
 */
function curves(run, { overlay = false, several = false, radius = null, axis = AXES.step } = {}) {
  let specs = chartSpecs(run);
  const charts = [];
  const onPoint = (step) => charts.forEach((item) => item.point(step));
  const place = (spec, options) => {
    const drawn = chart(spec, seriesTitle(spec), { ...options, onPoint, axis,
      onEnlarge: () => enlarge(drawn.spec(), Number(slider.value), axis) });
    charts.push(drawn);
    return drawn.node;
  };
  const wanted = (overlay ? OVERLAY_HEADLINE : HEADLINE)[run.kind] || [];
  const found = wanted.map((base) => specs.find((spec) => spec.base === base)).filter(Boolean).slice(0, 3);
  const head = found.length ? found : specs.slice(0, 1);
  const longest = Math.max(...specs.map((spec) => spec.lines[0].x.length));
  const usual = longest < 40 ? 0 : Math.min(40, Math.round(longest / 30));
  const text = make("output", {});
  let queued = 0;
  const slider = make("input", { type: "range", min: 0, max: 60, step: 1, value: radius ?? usual, id: `smooth-${slug(run.name)}`,
    input: () => { cancelAnimationFrame(queued); queued = requestAnimationFrame(redraw); } });
  const redraw = () => {
    const value = Number(slider.value);
    text.textContent = value ? `mean over ± ${value} points; faint lines, and the figures beside titles, are as logged` : "off";
    charts.forEach((item) => item.redraw(value));
  };

  const large = make("div", { class: "headline" }, head.map((spec, i) => place(spec, { large: true, height: i ? 170 : 250 })));
  const groups = new Map();
  for (const spec of specs.filter((item) => !head.includes(item))) {
    groups.set(spec.group, [...(groups.get(spec.group) || []), spec]);
  }
  const rank = ([group]) => (GROUP_ORDER.includes(group) ? GROUP_ORDER.indexOf(group) : GROUP_ORDER.length);
  const families = [...groups].sort((a, b) => rank(a) - rank(b));
  const small = make("div", { class: "families" }, families.map(([group, members]) => {
    const large = group === "credit" && !overlay;
    const keyed = new Map(members.flatMap((spec) => (large || spec.lines.length < 3 ? [] : spec.lines.map((line) => [line.label || "all", line]))));
    return make("div", { class: `family of${large ? 4 : Math.min(4, members.length)}` },
      make("h3", {}, Object.hasOwn(GROUP_TITLES, group) ? GROUP_TITLES[group] : group),
      keyed.size ? make("ul", { class: "key shared" }, [...keyed].map(([label, line]) => make("li", {}, swatch(line), label))) : "",
      make("div", { class: large ? "pair" : "multiples" }, members.map((spec) => place(spec, { large, height: 170 }))));
  }));
  const once = Object.entries(run.series).filter(([, series]) => series.y.length === 1);
  const node = make("div", { class: "curves" },
    several ? make("p", { class: "about" }, run.about.join(" · ")) : "",
    make("p", { class: "control" }, make("label", { for: slider.id }, "Smoothing"), slider, text),
    large,
    small,
    once.length ? make("p", { class: "once" }, "Logged once: ",
      once.map(([name, series], i) => [i ? " · " : "", `${name} `, make("b", {}, show(series.y[0]))]).flat()) : "");
  new ResizeObserver(redraw).observe(node);
  const made = section(`curves-${slug(run.name)}`, several ? `Curves · ${run.name}` : "Curves", node);
  made.radius = () => Number(slider.value);
  /** False where there are series that have no chart yet: then the section has to be made anew. */
  made.update = (grown) => {
    const found = chartSpecs(grown);
    if (found.length !== specs.length || found.some((spec, i) => spec.base !== specs[i].base || spec.lines.length !== specs[i].lines.length)) return false;
    const radius = Number(slider.value);
    for (const item of charts) item.update(found.find((spec) => spec.base === item.spec().base), radius);
    specs = found;
    return true;
  };
  return made;
}

/** A small chart, shown large over the page. */
function enlarge(spec, radius, axis) {
  const big = chart(spec, seriesTitle(spec), { large: true, height: 360, axis, onPoint: (step) => big.point(step) });
  showLarge(seriesTitle(spec), big.node);
  big.redraw(radius);
}

// Tables ---------------------------------------------------------------------------------------------------------

/** A table each of whose cells knows its column, by its `data-short` where it has one: a narrow screen shows the rows as cards. */
function headed(table) {
  const heads = [...table.tHead.rows[0].cells].map((head) => ({ head: head.dataset.short ?? head.textContent, tint: head.className }));
  for (const body of table.tBodies) for (const row of body.rows) [...row.cells].forEach((cell, i) => { if (cell.tagName === "TD") Object.assign(cell.dataset, heads[i]); });
  return table;
}

/** Ends a scrolling table below the last whole row within `most` pixels. */
function wholeRows(scroll, most) {
  new ResizeObserver(() => {
    const top = scroll.getBoundingClientRect().top - scroll.scrollTop;
    const ends = [...scroll.querySelectorAll("tbody tr")].map((row) => row.getBoundingClientRect().bottom - top);
    scroll.style.maxHeight = `${Math.ceil(Math.max(ends[0] ?? 0, ...ends.filter((end) => end <= most)))}px`;
  }).observe(scroll.querySelector("table"));
  return scroll;
}

function plainTable(caption, rows) {
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, headed(make("table", { class: "plain" },
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, columns.map((name) => make("th", { scope: "col" }, name.replaceAll("_", " "))))),
    make("tbody", {}, rows.map((row) => make("tr", {}, columns.map((name) => make("td", { dir: "auto" }, Object.hasOwn(row, name) ? row[name] : ""))))))));
}

/** Tables of what runs set aside: rows of a file of theirs, by `field`. */
function asideSection(all, id, title, lead, field, noun) {
  const runs = all.filter((run) => run[field].shown.length);
  if (!runs.length) return null;
  return section(id, title, make("p", { class: "lead" }, lead), runs.map((run) => {
    const { shown, total } = run[field];
    const last = `the last ${plural(shown.length, noun)}`;
    const table = plainTable(`${run.name}: ${total === undefined ? last : `${plural(total, noun)}${shown.length < total ? `, ${last} shown` : ""}`}`, shown);
    return wholeRows(table, 430);
  }));
}

const quarantine = (runs) => asideSection(runs, "media", "Media that could not be used",
  "Their questions were skipped; nothing was put in their place.", "quarantine", "question");
const leftOut = (runs) => asideSection(runs, "left-out", "Skipped groups",
  "Groups whose answers all earned the same: they taught the run nothing, or another question replaced them.", "leftOut", "group");
const skippedUpdates = (runs) => asideSection(runs, "updates", "Skipped updates",
  "Loss or gradient was not finite in these steps, and the weights were left as they were.", "skippedUpdates", "update");

function settings(all) {
  const runs = all.filter((run) => Object.keys(run.config).length);
  if (!runs.length) return null;
  return section("settings", "Settings", runs.map((run) => make("details", {},
    make("summary", {}, `config.yaml${runs.length > 1 ? ` · ${run.name}` : ""}`),
    make("dl", { class: "settings" }, Object.entries(run.config).map(([name, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", { dir: "auto" }, value)))))));
}
