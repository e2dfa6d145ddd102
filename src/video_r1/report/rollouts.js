// The browser of recorded groups: one question at a time, its frames and completions in both orders. A run's
// `groups` are whole groups, or entries that name them, of which one is loaded when it is looked at.

const OUTCOMES = {
  any: ["any", () => true],
  all: ["all right", (group) => share(group) >= 1],
  some: ["some right", (group) => share(group) > 0 && share(group) < 1],
  none: ["none right", (group) => share(group) === 0],
  gap: ["more right in order than with the contrast", (group) => gap(group) > 0],
  flat: ["no variance: rewards teach nothing", (group) => group.flat ?? new Set(group.ordered.map((c) => c.total)).size <= 1],
};
const SORTS = {
  step: ["by step", (a, b) => a.step - b.step],
  best: ["highest reward first", (a, b) => meanTotal(b) - meanTotal(a)],
  worst: ["lowest reward first", (a, b) => meanTotal(a) - meanTotal(b)],
  gap: ["largest temporal gap first", (a, b) => gap(b) - gap(a)],
};
const COMPLETION_SORTS = {
  reward: ["highest reward first", (a, b) => (b.total ?? accuracy(b)) - (a.total ?? accuracy(a))],
  length: ["longest first", (a, b) => b.tokens - a.tokens],
  sampled: ["as sampled", () => 0],
};
const COMPLETION_FILTERS = {
  all: ["all", () => true],
  right: ["right ones", (completion) => accuracy(completion) > 0.5],
  wrong: ["wrong ones", (completion) => accuracy(completion) <= 0.5],
  cut: ["cut off", (completion) => completion.truncated],
};
const CONTRASTS = {
  shuffled: "Frames shuffled",
  reversed: "Frames reversed",
  frozen: "One frame throughout",
  single: "One frame alone",
  dropped: "Half of the frames",
  blind: "No frames",
};
const MEDIA_TITLES = { image: "Image", text: "Text alone" }; // what has no order of frames
const COLLAPSED_CHARACTERS = 900;

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : 0);
const accuracy = (completion) => completion.rewards.accuracy ?? 0;
const shareRight = (completions) => mean((completions || []).map((c) => Number(accuracy(c) > 0.5)));
const share = (group) => group.p ?? shareRight(group.ordered);
const isCompared = (group) => Boolean(group.shuffled ? group.shuffled.length : group.pShuffled !== null);
const gap = (group) => (isCompared(group) ? share(group) - (group.pShuffled ?? shareRight(group.shuffled)) : 0);
const meanTotal = (group) => group.total ?? mean(group.ordered.map((c) => c.total ?? accuracy(c)));

function choice(id, label, entries, onChange) {
  const select = make("select", { id, change: () => onChange(select.value) }, entries.map(([value, text]) => make("option", { value }, text)));
  return { select, node: make("span", { class: "choice" }, make("label", { for: id }, label), select) };
}

const optionEntries = (table) => Object.entries(table).map(([value, [text]]) => [value, text]);

/**
 * live: for the studio, {load(run, group): a promise of the whole group, clip(group, order): a player}. `section.update()`: there are more groups.
 */
function rollouts(runs, live = {}) {
  const withGroups = runs.filter((run) => run.groups.length);
  if (!withGroups.length) return null;
  const state = { run: withGroups[0], type: "any", media: "any", source: "any", outcome: "any", sort: "step", completions: "reward", kept: "all", list: [], at: 0, shown: null, live };
  const map = make("div", { class: "map" });
  const stage = make("div", { class: "stage" });
  const position = make("output", { class: "position", "aria-live": "polite" });
  const change = (name) => (value) => { state[name] = value; filter(); };
  const all = () => withGroups.flatMap((run) => run.groups);
  const distinct = (field) => [["any", "any"], ...[...new Set(all().map((group) => group[field]))].filter(Boolean).map((v) => [v, v])];

  const runChoice = choice("pick-run", "Run", withGroups.map((run, i) => [i, run.name]), (i) => { state.run = withGroups[Number(i)]; filter(); });
  const type = choice("pick-type", "Type", distinct("type"), change("type"));
  const media = choice("pick-media", "Media", distinct("media"), change("media"));
  const source = choice("pick-source", "Source", distinct("source"), change("source"));
  const outcome = choice("pick-outcome", "Outcome", optionEntries(OUTCOMES), change("outcome"));
  const sort = choice("pick-sort", "Order", optionEntries(SORTS), change("sort"));
  const step = choice("pick-step", "Step", [], (value) => go(state.list.findIndex((group) => group.step === Number(value))));
  const question = choice("pick-question", "Question", [], (value) => go(Number(value)));
  const previous = make("button", { type: "button", click: () => go(state.at - 1) }, "← Previous");
  const next = make("button", { type: "button", click: () => go(state.at + 1) }, "Next →");

  function filter() {
    const kept = state.list[state.at];
    state.list = state.run.groups.filter((group) => (state.type === "any" || group.type === state.type)
      && (state.media === "any" || group.media === state.media) && (state.source === "any" || group.source === state.source) && OUTCOMES[state.outcome][1](group)).sort(SORTS[state.sort][1]);
    const steps = [...new Set(state.list.map((group) => group.step))].sort((a, b) => a - b);
    step.select.replaceChildren(...steps.map((value) => make("option", { value }, show(value))));
    drawMap();
    go(state.sort === "step" ? Math.max(0, state.list.indexOf(kept)) : 0);
  }

  function go(at) {
    if (at < 0 || (at >= state.list.length && state.list.length)) return;
    state.at = at;
    const group = state.list[at];
    previous.disabled = at === 0;
    next.disabled = at >= state.list.length - 1;
    position.textContent = group ? `${show(at + 1)} of ${show(state.list.length)}` : "nothing matches";
    step.select.disabled = question.select.disabled = !group;
    if (!group) {
      state.shown = null;
      stage.replaceChildren(make("p", { class: "lead" }, "No recorded question matches these filters."));
      return;
    }
    step.select.value = String(group.step);
    const beside = state.list.map((item, i) => [item, i]).filter(([item]) => item.step === group.step);
    question.select.replaceChildren(...beside.map(([item, i]) => make("option", { value: i }, `${item.id} · ${item.problem.slice(0, 60)}`)));
    question.select.value = String(at);
    map.querySelectorAll("circle").forEach((dot) => dot.classList.toggle("chosen", dot.group === group));
    const chosen = map.querySelector(".chosen");
    if (chosen) chosen.parentNode.append(chosen);
    if (state.shown === group) return;
    if (live.load) load(group);
    else display(group, group);
  }

  function display(entry, group) {
    state.shown = entry;
    stage.replaceChildren(groupView(group, state, () => display(entry, group)));
  }

  /** Shows a group when it has come, unless somebody has turned the page meanwhile. */
  async function load(entry) {
    try {
      const group = await live.load(state.run, entry);
      if (state.list[state.at] !== entry) return;
      display(entry, group);
    } catch (error) {
      if (state.list[state.at] === entry) stage.replaceChildren(make("p", { class: "bad", role: "alert" }, error.message));
    }
  }

  /** Every recorded group as a dot: its step across, its mean reward up. */
  function drawMap() {
    const width = map.clientWidth || 900;
    const height = 84;
    const margin = { left: 46, right: 10, top: 8, bottom: 18 };
    const groups = state.run.groups;
    if (!groups.length) return;
    const totals = groups.map(meanTotal);
    const [first, last] = [groups[0].step, groups[groups.length - 1].step];
    const low = Math.min(0, ...totals);
    const high = Math.max(...totals, low + 0.1);
    const x = (value) => margin.left + ((value - first) / (last - first || 1)) * (width - margin.left - margin.right);
    const y = (value) => margin.top + (1 - (value - low) / (high - low)) * (height - margin.top - margin.bottom);
    const shown = new Set(state.list);
    const dots = groups.map((group, i) => {
      const dot = draw("circle", { cx: x(group.step).toFixed(1), cy: y(totals[i]).toFixed(1), r: groups.length > 400 ? 1.8 : 2.8,
        class: `${group.media === "image" ? "image" : "video"}${shown.has(group) ? "" : " out"}` });
      dot.group = group;
      return dot;
    });
    const labels = ticks(low, high, 2).map((v) => draw("text", { class: "tick", x: margin.left - 6, y: y(v) + 4, "text-anchor": "end" }, show(v)));
    const ends = [...new Set([first, last])].map((v, i) => draw("text", { class: "tick", x: x(v), y: height - 4, "text-anchor": i ? "end" : "start" }, `${i ? "" : "step "}${show(v)}`));
    const picture = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, ...labels, ...ends, draw("g", {}, ...dots));
    picture.addEventListener("click", (event) => {
      const box = picture.getBoundingClientRect();
      const distance = (group) => Math.hypot(x(group.step) - (event.clientX - box.left), y(meanTotal(group)) - (event.clientY - box.top));
      const found = state.list.reduce((a, b) => (a && distance(a) <= distance(b) ? a : b), null);
      if (found) go(state.list.indexOf(found));
    });
    map.replaceChildren(picture);
    map.querySelectorAll("circle").forEach((dot) => dot.classList.toggle("chosen", dot.group === state.list[state.at]));
  }

  const turn = (event) => {
    if (!node.isConnected) document.removeEventListener("keydown", turn);
    else if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)
      || document.querySelector("dialog[open]") || event.target.closest?.("[role=slider]")) return;
    else if (event.key === "ArrowLeft") go(state.at - 1);
    else if (event.key === "ArrowRight") go(state.at + 1);
  };
  document.addEventListener("keydown", turn);
  const recorded = withGroups.reduce((sum, run) => sum + (run.groupsTotal ?? run.groups.length), 0);
  const said = () => recorded > all().length
    ? `${show(all().length)} of ${show(recorded)} recorded questions are in this page, spread evenly over the run to keep it small.`
    : `${plural(all().length, "recorded question")}.`;
  const lead = make("span", {}, said());
  const node = make("div", { class: "rollouts" },
    make("p", { class: "lead" }, lead, ` Each dot is one: its step across, its mean reward up (○ image). The arrow keys ← and → turn pages.`),
    map,
    make("div", { class: "controls" }, withGroups.length > 1 ? runChoice.node : "", type.node, media.node, source.node, outcome.node, sort.node),
    make("div", { class: "controls pager" }, previous, next, position, step.node, question.node),
    stage);
  let width = 0;
  new ResizeObserver(() => { if (map.clientWidth !== width) { width = map.clientWidth; drawMap(); } }).observe(map);
  filter();
  // The first page is a late one whose group teaches: some answers are right, some wrong, and their rewards differ.
  const teaches = (group) => !OUTCOMES.flat[1](group);
  const telling = [(group) => teaches(group) && OUTCOMES.some[1](group) && isCompared(group), (group) => teaches(group) && OUTCOMES.some[1](group), teaches, () => true]
    .map((test) => state.list.findLastIndex(test)).find((at) => at >= 0);
  go(telling ?? 0);
  const made = section("rollouts", "Rollouts", node);
  made.update = () => {
    lead.textContent = said();
    for (const [field, picked] of [["type", type], ["media", media], ["source", source]]) {
      const entries = distinct(field);
      if (entries.length === picked.select.options.length) continue;
      picked.select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));
      picked.select.value = state[field];
    }
    filter();
  };
  return made;
}

// One group ------------------------------------------------------------------------------------------------------

function groupView(group, state, refresh) {
  const sorts = choice("pick-completions", "Completions", optionEntries(COMPLETION_SORTS), (value) => { state.completions = value; refresh(); });
  sorts.select.value = state.completions;
  const keeps = choice("pick-kept", "Show", optionEntries(COMPLETION_FILTERS), (value) => { state.kept = value; refresh(); });
  keeps.select.value = state.kept;
  const facts = [`step ${show(group.step)}`, `question ${group.id}`, group.type, group.media, group.source, group.path, playedHow(group)].filter(Boolean);
  const columns = make("div", { class: group.shuffled.length ? "columns" : "columns alone" },
    column(group, "ordered", state), group.shuffled.length ? column(group, "shuffled", state) : "");
  const view = make("article", { class: "group", "aria-label": `Question ${group.id} at step ${group.step}` },
    make("p", { class: "facts", dir: "auto" }, facts.join(" · ")),
    make("h3", { dir: "auto", class: "question" }, group.problem),
    group.options.length ? make("ul", { class: "options" }, group.options.map((option) => {
      const right = isRight(option, group.answer);
      return make("li", { class: right ? "right" : null, dir: "auto" }, option, right ? make("span", { class: "tick-mark" }, " ✓ right answer") : "");
    })) : "",
    group.options.some((option) => isRight(option, group.answer)) ? "" : make("p", { class: "answer", dir: "auto" }, make("span", {}, "Right answer "), group.answer),
    columns);
  columns.before(make("div", { class: "controls" }, sorts.node, keeps.node));
  for (const kind of ["pointerover", "focusin"]) view.addEventListener(kind, (event) => highlight(view, group.permutation && event.target.closest(".tile")));
  for (const kind of ["pointerleave", "focusout"]) view.addEventListener(kind, () => highlight(view, null));
  return view;
}

const isRight = (option, answer) => answer !== "" && (option.trim() === answer || option.trim().split(/[.):\s]/)[0] === answer);

/** The same frame in both orders is marked together. */
function highlight(view, tile) {
  view.querySelectorAll(".tile").forEach((other) => other.classList.toggle("same", Boolean(tile) && other.dataset.frame === tile.dataset.frame));
}

function column(group, order, state) {
  const completions = group[order];
  const right = completions.filter((c) => accuracy(c) > 0.5).length;
  const isJudged = completions.some((c) => "accuracy" in c.rewards); // not without the accuracy reward
  const p = order === "ordered" ? group.p : group.pShuffled;
  const alone = order === "ordered" && !group.shuffled.length;
  const marks = markers(order === "ordered" ? completions : []);
  const cards = completions.map((completion, i) => ({ completion, i })).sort((a, b) => COMPLETION_SORTS[state.completions][1](a.completion, b.completion))
    .filter(({ completion }) => COMPLETION_FILTERS[state.kept][1](completion))
    .map(({ completion, i }) => card(completion, marks[i] || [], spanBars(group, completion)));
  const title = Object.hasOwn(MEDIA_TITLES, group.media) ? MEDIA_TITLES[group.media] : order === "ordered" ? "Frames in order" : CONTRASTS[group.contrast];
  const hint = order === "shuffled" && group.contrast !== "blind" ? "the bar under a frame is stronger the later it comes in the clip" : "";
  return make("section", { class: `column ${order}`, "aria-label": alone ? "Completions" : title },
    make("h4", {}, title, make("small", {}, hint)), state.live.clip ? state.live.clip(group, order) : "", tiles(group, order),
    make("p", { class: "tally" },
      isJudged ? make("span", { class: "pips", "aria-hidden": "true" }, completions.map((c) => make("span", { class: accuracy(c) > 0.5 ? "pip full" : "pip" }))) : "",
      isJudged ? ` ${right} of ${completions.length} right` : "",
      p === null ? "" : make("span", { class: "quiet" }, `${isJudged ? ", " : ""}${order === "ordered" ? "p" : "p\u0303"} = ${show(p)}`),
      make("span", { class: "quiet" }, ` · answers: ${answersGiven(completions)}`)),
    legend(completions, group.contrast),
    make("div", { class: "cards" }, cards));
}

function answersGiven(completions) {
  const counts = new Map();
  for (const completion of completions) {
    const found = /<answer>([\s\S]*?)<\/answer>/.exec(completion.text);
    const answer = found ? found[1].trim().slice(0, 30) || "empty" : "none";
    counts.set(answer, (counts.get(answer) || 0) + 1);
  }
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  return sorted.slice(0, 4).map(([answer, count]) => (count > 1 ? `${answer} ×${count}` : answer)).join(", ") + (sorted.length > 4 ? ", …" : "");
}

/** Which completions are best, worst, longest and shortest; nothing where all are alike. */
function markers(completions) {
  const marks = completions.map(() => []);
  for (const [value, most, least] of [[(c) => c.total, "best", "worst"], [(c) => c.tokens, "longest", "shortest"]]) {
    const values = completions.map(value);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (values.length < 2 || low === high || values.includes(null)) continue;
    marks[values.indexOf(high)].push(most);
    marks[values.indexOf(low)].push(least);
  }
  return marks;
}

function card(completion, marks, spans = "") {
  const right = "accuracy" in completion.rewards ? (accuracy(completion) > 0.5 ? "correct" : "wrong") : "";
  const advantage = completion.advantage;
  const tone = advantage === null ? "" : advantage > 0.005 ? "positive" : advantage < -0.005 ? "negative" : "zero";
  const terms = Object.entries(completion.rewards).map(([name, value]) =>
    make("span", { class: value ? "term" : "term none" }, `${name.replaceAll("_", " ")} `, make("b", {}, show(value))));
  const long = completion.text.length > COLLAPSED_CHARACTERS;
  const text = make("div", { class: long ? "text cut" : "text", dir: "auto" }, worded(completion));
  const toggle = long ? make("button", { type: "button", class: "more", "aria-expanded": "false", click: () => {
    const cut = text.classList.toggle("cut");
    toggle.textContent = cut ? "Show all" : "Show less";
    toggle.setAttribute("aria-expanded", String(!cut));
  } }, "Show all") : "";
  const node = make("article", { class: `card ${right} ${tone}` },
    make("header", {},
      advantage === null ? "" : make("span", { class: "advantage" }, make("small", {}, "advantage "), signed(advantage)),
      (completion.without ?? null) === null ? "" : make("span", { class: "total" }, "without the temporal term ", make("b", {}, signed(completion.without))),
      completion.total === null ? "" : make("span", { class: "total" }, "total ", make("b", {}, show(completion.total))),
      terms,
      make("span", { class: "tokens" }, completion.tokens === null ? "" : plural(completion.tokens, "token"),
        completion.truncated ? make("span", { class: "bad" }, ", cut off") : "")),
    spans,
    marks.length ? make("p", { class: "marks" }, marks.join(", ")) : "",
    (completion.turns || []).map(lookTurn), text, toggle);
  return node;
}

/** A turn that ends with calls of tools: what was written, what came back, and its frames. */
function lookTurn(turn) {
  const times = turn.times ? `${plural(turn.count, "frame")}, ${clock(turn.times[0])} to ${clock(turn.times[1])}` : "";
  return make("div", { class: "turn" },
    make("div", { class: "text", dir: "auto" }, worded(turn)),
    make("p", { class: turn.failed ? "result bad" : "result" }, turn.results.join(" ")),
    turn.strip ? make("img", { src: turn.strip, alt: `The look: ${times}`, title: times, loading: "lazy" }) : "");
}

/** The text of a turn, with the colours of its words if they were scored. */
const worded = (turn) => (turn.scored ? taught(turn.scored) : turn.words ? shaded(turn.words) : styled(turn.text));

/** What the colours of the words mean. */
function legend(completions, contrast) {
  const has = (field) => completions.some((completion) => completion[field]);
  const sample = (style, words) => make("span", { class: `shaded ${style}` }, words);
  if (has("scored")) return make("p", { class: "quiet legend" }, "Words that the teacher finds ", sample("wanted", "likelier"), " or ", sample("unwanted", "less likely"), " than the policy");
  return has("words") ? make("p", { class: "quiet legend" }, "Words that are ", sample("", "less likely"), ` with the contrast clip: ${CONTRASTS[contrast].toLowerCase()}`) : "";
}

/** A completion whose words are the darker the more their log-probability drops with the contrast clip. */
function shaded(words) {
  const most = Math.max(0.5, ...words.map(([, drop]) => drop));
  return words.map(([word, drop]) => {
    const share = Math.max(0, drop) / most;
    const node = make("span", { class: "shaded", title: `${show(drop)} nats less likely with the contrast` }, word);
    node.style.setProperty("--drop", `${Math.round(45 * share)}%`);
    return node;
  });
}

/** A completion whose words have the colour of the teacher's advantage: by how much it finds them more or less likely. */
function taught(words) {
  return words.map(([word, own, teacher]) => {
    const gain = teacher - own;
    const node = make("span", { class: gain > 0 ? "shaded wanted" : "shaded unwanted", title: `policy ${show(Math.exp(own))}, teacher ${show(Math.exp(teacher))}` }, word);
    node.style.setProperty("--drop", `${Math.round(45 * Math.min(1, Math.abs(gain) / 2))}%`);
    return node;
  });
}

/** A completion with its tags muted, its reasoning and its answer set apart. */
function styled(text) {
  let part = "outside";
  return text.split(/(<\/?(?:think|answer)>)/).filter(Boolean).map((piece) => {
    const tag = /^<(\/?)(think|answer)>$/.exec(piece);
    if (!tag) return make("span", { class: part }, piece);
    part = tag[1] ? "outside" : tag[2];
    return make("span", { class: "tag" }, piece);
  });
}
