// Two evaluations side by side, or two orders of one, and the questions that one side answers better.

const GROUP_NAMES = { "": "All questions", order: "By order of the frames", task: "By task", type: "By type", media: "By media", source: "By source" };
const TINTS = [["left", "right"], ["shuffled", "ordered"]]; // colours of the sides: of two evaluations, of one whose right side is in order
const WHO = { left: "left wins", right: "right wins", both: "both right", neither: "neither right" };

/** Whether two evaluations have a benchmark in common, and a number of frames (of a folder with several it is not known). */
const comparable = (a, b) => a !== b && a.benchmarks.some((name) => b.benchmarks.includes(name))
  && (!a.frames.length || !b.frames.length || a.frames.some((count) => b.frames.includes(count)));
const sameQuestions = (a, b) => comparable(a, b) && Boolean(a.questions) && a.questions === b.questions;

/** The table of two sides, and below it the questions of one of its rows. sides(): their names; own: both are one evaluation, the left side in another order. */
function versusPanel(view, sides, own = false) {
  const frames = choice("versus-frames", "Frames", [], () => load());
  const order = choice("versus-order", own ? "In order against" : "Order", [], () => load());
  const drawn = make("div", {});
  const stage = make("div", {});
  const chosen = () => order.select.value || "ordered";
  const query = (more = {}) => ({ ...sides(), ...(frames.select.value ? { frames: frames.select.value } : {}), [own ? "against" : "order"]: chosen(), ...more });
  const names = () => (own ? [orderName(chosen()), orderName("ordered")] : [sides().left, sides().right]);

  async function load() {
    try {
      const answer = await ask("/api/versus", query());
      if (!view.open) return;
      const contrasts = answer.orders.filter((name) => !own || name !== "ordered");
      const first = own && !order.select.value && contrasts.length;
      options(frames, answer.frames, frames.select.value || answer.frames[answer.frames.length - 1]);
      options(order, contrasts, order.select.value || (own ? "shuffled" : "ordered"));
      if (first) { load(); return; }
      drawn.replaceChildren(!answer.rows.length ? make("p", { class: "lead" }, "Both have answered no question in this order yet.")
        : own && !contrasts.length ? "" : versusTable(answer, names(), own, list),
        answer.notes.length ? make("ul", { class: "notes" }, answer.notes.map((note) => make("li", {}, note))) : "");
      const [row] = answer.rows;
      if (row) list(row, row.right_wins ? "right" : row.left_wins ? "left" : "neither");
      trouble("");
    } catch (error) { trouble(error.message); }
  }

  /** The questions of a row of the table by who answers them right. */
  async function list(row, who, at = 0) {
    try {
      const found = await ask("/api/questions", query({ benchmark: row.benchmark, group: row.group, name: row.name, who, at }));
      if (!view.open) return;
      const [left, right] = names();
      const said = { left: `${left} answers better, the largest difference first`, right: `${right} answers better, the largest difference first`, both: "both answer right", neither: "neither answers right" }[who];
      const button = (text, to) => make("button", { type: "button", disabled: to === null, click: () => list(row, who, to) }, text);
      stage.replaceChildren(section("questions", "Questions",
        make("p", { class: "lead" }, `${plural(found.total, "question")}${row.name ? ` ${row.group === "order" ? "with the frames" : "of"} ${rowName(row)}` : ""} that ${said}.`),
        make("div", { class: "controls" }, Object.entries(WHO).map(([name, words]) => make("button", { type: "button", "aria-pressed": String(who === name), click: () => list(row, name) },
          own ? words.replace("left wins", `only ${left} right`).replace("right wins", `only ${right} right`) : words)),
        found.total > 20 ? [button("← Previous", at ? Math.max(0, at - 20) : null), button("Next →", found.next), `${show(at + 1)} to ${show(at + found.shown.length)}`] : ""),
        make("div", { class: "versus-questions" }, found.shown.map((item) => questionNode(item, left, right, TINTS[+own])))));
    } catch (error) { trouble(error.message); }
  }

  return { load, node: make("div", {}, make("div", { class: "controls" }, frames.node, order.node), drawn, stage) };
}

/** The scores and questions of one evaluation, on its page. */
async function ownPanel(view, name, node) {
  const { evaluations } = await ask("/api/evaluations");
  const own = evaluations.find((item) => [name, `${name} (direct)`].includes(item.name));
  if (!own) { node.replaceChildren(make("p", { class: "lead" }, "It has answered no question yet.")); return; }
  const panel = versusPanel(view, () => ({ left: own.name, right: own.name }), true);
  node.replaceChildren(section("scores", "Scores", make("p", {}, make("a", { href: `#/evaluations//${encodeURIComponent(own.name)}` }, "Compare it with another evaluation")), panel.node));
  await panel.load();
}

function versusView(view, [first, second]) {
  header("Evaluations");
  const left = choice("versus-left", "Left", [], () => go());
  const right = choice("versus-right", "Right", [], () => go());
  const go = () => { location.hash = `#/evaluations/${encodeURIComponent(left.select.value)}/${encodeURIComponent(right.select.value)}`; };
  const panel = versusPanel(view, () => ({ left: left.select.value, right: right.select.value }));
  document.getElementById("main").replaceChildren(make("div", { class: "controls" }, left.node, right.node), panel.node);

  (async () => {
    try {
      const found = (await ask("/api/evaluations")).evaluations;
      if (!view.open) return;
      if (found.length < 2) {
        document.getElementById("main").replaceChildren(make("p", { class: "lead" }, "Two evaluations are needed to compare: folders that video-r1 eval wrote below these."));
        return;
      }
      const newest = [...found].sort((a, b) => b.written - a.written);
      const [before, after] = [first, second].map((name) => found.find((item) => item.name === name));
      const best = (fits) => newest.find((item) => fits(item, sameQuestions)) ?? newest.find((item) => fits(item, comparable));
      const now = after ?? best((item, test) => (before ? [before] : found).some((other) => test(item, other))) ?? newest.find((item) => item !== before);
      const other = before ?? best((item, test) => test(item, now)) ?? newest.find((item) => item !== now);
      options(left, found.map((item) => item.name), other.name);
      options(right, found.map((item) => item.name), now.name);
      await panel.load();
    } catch (error) { trouble(error.message); }
  })();
}

function options(chooser, values, wanted) {
  chooser.select.replaceChildren(...values.map((value) => make("option", { value }, value)));
  if (values.includes(wanted)) chooser.select.value = wanted;
}

function versusTable(answer, [left, right], own, list) {
  const cell = (write, score, ...more) => make("td", {}, make("b", {}, write(score.mean)),
    score.low === null ? "" : make("small", {}, ` ${write(score.low)} to ${write(score.high)}`), more.filter(Boolean).map((words) => make("small", { class: "also" }, words)));
  const plain = (score) => show(score, 2);
  const side = (row, i) => cell(plain, i ? row.right : row.left, tokenWords(row.tokens[i]), row.gaps?.[i] ? gainWords(row.gaps[i], "gap") : "");
  const longer = ([first, second]) => (first === null || second === null || Math.round(first) === Math.round(second) ? "" : `${second > first ? "+" : ""}${tokenWords(second - first)}`);
  const count = (row, who, n) => make("td", {}, n ? make("button", { type: "button", class: "title", click: () => list(row, who) }, show(n)) : "0");
  const groups = new Map();
  for (const row of answer.rows) {
    const key = JSON.stringify([row.benchmark, row.group]);
    groups.set(key, [...(groups.get(key) || []), row]);
  }
  const heads = [["questions", ""], ["", "picture"], [left, TINTS[+own][0], own ? left : "left"], [right, TINTS[+own][1], own ? right : "right"], [own ? (left === "elsewhere" ? "look gap" : "temporal gap") : "right minus left", ""], [own ? `only ${left}` : "left wins", ""], [own ? `only ${right}` : "right wins", ""]];
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Scores" }, headed(make("table", { class: "scores versus" },
    make("caption", {}, own ? "Mean scores, 0 to 1, over the questions asked in both orders, with 95 % intervals; the gap is in order minus the other order, question by question."
      : `Mean scores, 0 to 1, over the questions that both have answered, with 95 % intervals; differences are taken question by question.${answer.rows.some((row) => row.gaps?.[0]) ? " Gap: score in order minus that of the row’s order." : ""}`),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, ""), heads.map(([name, style, short]) => make("th", { scope: "col", class: style, dir: "auto", "data-short": short }, style === "picture" ? make("span", { class: "ends" }, ["0", "0.5", "1"].map((end) => make("span", {}, end))) : name)))),
    [...groups.values()].map((rows) => make("tbody", {},
      rows[0].group || rows[0].benchmark ? make("tr", { class: "part" }, make("th", { scope: "rowgroup", colspan: 8, dir: "auto" }, [rows[0].benchmark, GROUP_NAMES[rows[0].group]].filter(Boolean).join(" · "))) : "",
      rows.map((row) => make("tr", {}, make("th", { scope: "row", dir: "auto" }, rowName(row, own)), make("td", {}, show(row.questions)), make("td", { class: "picture" }, dotPlot(["left", "right"].map((side, i) => ({ score: row[side], tint: TINTS[+own][i] })))),
        side(row, 0), side(row, 1), cell(signed, row.difference, longer(row.tokens)), count(row, "left", row.left_wins), count(row, "right", row.right_wins))))))));
}

const orderName = (name) => (name === "ordered" ? "in order" : name);
const rowName = (row, own) => (row.group === "order" ? orderName(row.name) : row.name || `${own ? "asked in both orders" : "answered by both"}, ${row.frames} frames`);
const gainWords = ({ mean, low, high }, what) => `${what} ${signed(mean)}${low === null ? "" : ` (${signed(low)} to ${signed(high)})`}`;
const tokenWords = (count) => (count === null ? "" : `${show(Math.round(count))} tokens`);

function questionNode(item, left, right, tints) {
  const row = item.row;
  const side = (name, output, style) => make("section", { class: `column ${style}`, "aria-label": name }, make("h4", { dir: "auto" }, name), make("div", { class: "cards" }, card(output, [])));
  const clip = make("div", {});
  // Twenty players at once would read twenty files: a clip comes when somebody wants to see it.
  if (row) {
    const shown = { manifest: row.manifest, row: row.row };
    clip.append(row.media === "text" ? "" : make("button", { type: "button", click: () => clip.replaceChildren(player(shown, row.media === "image", row)) }, row.media === "image" ? "Show the image" : "Show the clip"),
      " ", make("a", { href: `#/ask/${encodeURIComponent(row.manifest)}/${row.row}` }, "Ask a model about it"));
  }
  return make("article", { class: "group versus-question", "aria-label": `Question ${item.id}` },
    make("p", { class: "facts", dir: "auto" }, [`question ${item.id}`, item.type, item.task, row ? row.manifest : "no clip: in no manifest below these folders", row ? playedHow(row) : ""].filter(Boolean).join(" · ")),
    item.problem ? make("h3", { class: "question", dir: "auto" }, item.problem) : "",
    item.options.length ? make("ul", { class: "options" }, item.options.map((option) => make("li", { class: isRight(option, item.answer) ? "right" : null, dir: "auto" }, option))) : "",
    make("p", { class: "answer", dir: "auto" }, make("span", {}, "Right answer "), item.answer), row ? oneOfSeveral(row) : "", clip,
    make("div", { class: left === right ? "columns alone" : "columns" }, left === right ? "" : side(left, item.left, tints[0]), side(right, item.right, tints[1])));
}
