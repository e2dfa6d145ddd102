const data = JSON.parse(document.getElementById("data").textContent);
data.runs = data.runs.map((run) => charted(run));

const INTRODUCTION = "T-GRPO compares every clip with a contrast clip: one of its frames repeated, or all of them in another order, as the "
  + "settings say. With the rule likelihood_gate a right answer earns the more, the less likely the model finds it with the contrast clip. "
  + "With margin and threshold the model also answers the contrast clip: p is the share of right answers in order, p\u0303 the share with "
  + "the contrast clip, and p − p\u0303 the temporal gap. Each rewards right answers that need the order of the frames, so that a model "
  + "should not get by on single frames.";
const DISTILLATION = "A teacher scores every token that the model samples, perhaps with more frames of the clip than the model sees. Training makes "
  + "tokens likelier that the teacher finds likelier than the model does, and others less likely.";
const GLOSSARY = {
  "T-GRPO": "GRPO with the temporal reward. GRPO samples a group of answers to each question, and makes those that earn more than their group's mean likelier.",
  "p, p\u0303": "shares of right answers to one question: with the frames in order, and with the contrast clip. Curves show their means over the questions.",
  "temporal gap": "p − p\u0303; in an evaluation accuracy in order minus accuracy shuffled, on the same questions. Near 0, the model answers without the order of the frames.",
  "look gap": "accuracy in order minus accuracy when each look shows another stretch of the clip. Near 0, the model does not use what it asks to see.",
  "temporal reward": "what temporal_rule adds to right answers in order: α·(p − p\u0303) where that is above 0 (margin), α wherever p ≥ μ·p\u0303 (threshold); or what it takes away: the share α·exp(−Δ) of their reward (likelihood_gate).",
  "log-prob contrast": "Δ: how much less likely the model finds an answer’s decisive words with the contrast clip, in nats.",
  "contrast clip": "the same clip with its frames shuffled, reversed, frozen, half of them dropped, one alone (single), or none (blind).",
  "accuracy, format, length reward": "1 for a right answer; 1 for <think>…</think><answer>…</answer> and nothing else; a little for right answers of a wanted length.",
  advantage: "how much better an answer is than the others of its group: what the update weighs its tokens by. Positive ones become likelier.",
  credit: "the share of a step’s advantages that a reward term moved. Near 0 the term cancels: training goes on as without it.",
  "KL to the reference": "how far the model has moved from the one that training started with.",
  "without variance": "groups whose answers all earn the same: their rewards teach nothing.",
};

const drawn = (data.overlay ? overlaid(data.runs) : data.runs).filter((run) => chartSpecs(run).length);
const several = drawn.length > 1;

/** One stand-in for all runs of a kind, whose charts have a line for each. */
function overlaid(runs) {
  const kinds = [...new Set(runs.map((run) => run.kind))];
  return kinds.map((kind) => ({ name: KINDS[kind], kind, about: [], series: {}, specs: overlaySpecs(runs.filter((run) => run.kind === kind)) }));
}

function header() {
  const figures = data.figures.map((figure) => make("div", {},
    make("dt", {}, figure.caption), make("dd", {}, figure.value, make("small", {}, figure.note))));
  const single = data.runs.length === 1 ? data.runs[0] : null;
  document.getElementById("header").append(
    make("p", { class: "over" }, "video-r1", single ? ` · ${KINDS[single.kind]}` : ""),
    make("h1", { dir: "auto" }, data.title),
    single && single.about.length ? make("p", { class: "about" }, single.about.join(" · ")) : "",
    ...introduction(data.runs.filter((run) => run.kind === "rl")),
    figures.length ? make("dl", { class: "figures" }, figures) : "",
    figures.length && !data.scores.length ? make("p", { class: "about" }, "Means over the last tenth of the steps, and over the first.") : "",
    data.notes.length ? make("ul", { class: "notes" }, data.notes.map((note) => make("li", {}, note))) : "");
}

const introduction = (runs) => !runs.length ? [] : [
  runs.some((run) => run.config.temporal_rule !== "off" || !run.series["teacher/kl"]) ? make("p", { class: "intro" }, INTRODUCTION) : "",
  runs.some((run) => run.series["teacher/kl"]) ? make("p", { class: "intro" }, DISTILLATION) : "",
  make("details", { class: "glossary" }, make("summary", {}, "Glossary"),
    make("dl", {}, Object.entries(GLOSSARY).flatMap(([word, meaning]) => [make("dt", {}, word), make("dd", {}, meaning)]))),
];

/** How several runs differ: where their series ended, and their settings. */
function comparison() {
  if (!data.overlay || !(data.ends.length || data.differing.length)) return null;
  return section("comparison", "Comparison",
    data.ends.length ? plainTable("Means over the last tenth of each run", data.ends) : "",
    data.differing.length ? plainTable("Settings that differ", data.differing) : "");
}

// Evaluation -----------------------------------------------------------------------------------------------------

// Every order in which questions were asked, in the order of the columns.
const askedOrders = ["ordered", ...Object.keys(CONTRASTS), "elsewhere", "no-look"].filter((order) => data.scores.some((row) => row.orders[order]));
const tintOf = (order) => (order === "ordered" ? "ordered" : "shuffled");
const many = askedOrders.length > 3; // narrow columns
const gapName = (order) => (!many && { shuffled: "temporal gap", elsewhere: "look gap" }[order]) || "gap";

const rangeOf = ({ low, high }) => (low === null ? "" : ` ${show(low, 2)} to ${show(high, 2)}`);

function scoreCells({ orders, gaps }) {
  const lanes = askedOrders.map((order) => ({ score: orders[order], tint: tintOf(order), hollow: order !== "ordered" }));
  return [make("td", { class: "picture" }, dotPlot(lanes)), ...askedOrders.map((order) => (!orders[order] ? make("td", {}, "–")
    : make("td", {}, make("b", {}, show(orders[order].mean, 2)), make("small", {}, rangeOf(orders[order])),
      gaps[order] ? make("div", { class: "gap" }, make("small", {}, `${gapName(order)} `), signed(gaps[order].mean), make("small", {}, rangeOf(gaps[order]))) : "")))];
}

const askedOf = ({ orders }) => make("td", {}, show((orders.ordered || Object.values(orders)[0] || {}).n));

function scoreTable(caption, bodies, withFormat) {
  const heads = askedOrders.map((order) => make("th", { scope: "col", class: tintOf(order) }, order === "ordered" ? "in order" : order));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, headed(make("table", { class: many ? "scores many" : "scores" },
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "checkpoint"),
      make("th", { scope: "col", class: "picture" }, make("span", { class: "ends" }, make("span", {}, "0"), make("span", {}, "0.5"), make("span", {}, "1"))),
      heads, withFormat ? make("th", { scope: "col" }, "format") : "", make("th", { scope: "col" }, "questions"))),
    bodies)));
}

function evaluation() {
  if (!data.scores.length) return null;
  const about = [...new Set(data.scores.map((row) => row.about))].filter(Boolean).join(", ");
  const rows = data.scores.map((row) => make("tr", {}, make("th", { scope: "row", dir: "auto" }, row.name), scoreCells(row),
    make("td", {}, row.format === null ? "–" : show(row.format, 2)), askedOf(row)));
  const titles = { by_modality: "By modality", by_type: "By problem type", by_task: "By task, largest gap first", by_pairs: "Pairs that are right as a whole", by_source: "By source" };
  const parts = Object.entries(titles).map(([field, title]) => {
    const all = data.scores.flatMap((row) => row.by[field]);
    const names = [...new Set(all.map((part) => part.name))];
    if (names.length < (field === "by_pairs" ? 1 : 2)) return "";
    const largest = (name) => Object.values(all.findLast((part) => part.name === name).gaps)[0]?.mean ?? -Infinity;
    if (field === "by_task") names.sort((a, b) => largest(b) - largest(a));
    const bodies = names.map((name) => make("tbody", {},
      make("tr", { class: "part" }, make("th", { scope: "rowgroup", colspan: askedOrders.length + 3, dir: "auto" }, name)),
      data.scores.map((row) => {
        const part = row.by[field].find((item) => item.name === name);
        return part ? make("tr", {}, make("th", { scope: "row", dir: "auto" }, row.name), scoreCells(part), askedOf(part)) : "";
      })));
    return make("details", {}, make("summary", {}, title), scoreTable(title, bodies, false));
  });
  const contrasts = askedOrders.filter((order) => order !== "ordered");
  return section("evaluation", "Evaluation",
    make("p", { class: "lead" }, "Mean scores with the frames ", make("span", { class: "ordered" }, "● in order"),
      contrasts.length ? [" and ", make("span", { class: "shuffled" }, `○ ${contrasts.join(", ")}`)] : "", ", from 0 to 1, with 95 % intervals.",
      contrasts.length ? " A gap is the score in order minus that of the column, on the same questions. If its interval contains 0, these questions do not show that the model uses the order." : ""),
    scoreTable(`Scores of each checkpoint${about ? ` on ${about}` : ""}`, make("tbody", {}, rows), true), overlapTable(data.scores), parts);
}

// The page itself ----------------------------------------------------------------------------

function page() {
  header();
  const trained = drawn.map((run) => curves(run, { overlay: data.overlay, several }));
  const sections = [...trained.slice(0, 1), comparison(), evaluation(), rollouts(data.runs), ...trained.slice(1), leftOut(data.runs), quarantine(data.runs), skippedUpdates(data.runs), settings(data.runs)].filter(Boolean);
  document.getElementById("main").append(...sections, sections.length ? "" : make("p", { class: "lead" }, "There is nothing to draw yet."));
  if (sections.length > 1) {
    document.getElementById("header").append(make("nav", { "aria-label": "Sections" }, sections.map((node) =>
      make("a", { href: `#${node.id}` }, node.querySelector("h2").textContent))));
  }
  const phases = Object.entries(data.seconds || {}).filter(([name, value]) => name !== "total" && typeof value === "number");
  document.getElementById("footer").append(make("p", {}, "Written by video-r1 report. ",
    phases.length ? `Seconds of each stage: ${phases.map(([name, value]) => `${name} ${show(Math.round(value))}`).join(", ")}.` : ""));
}

page();
