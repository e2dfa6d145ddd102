// Two evaluations side by side, and the questions that one wins and the other loses.

const GROUP_NAMES = { "": "All questions", order: "By order of the frames", task: "By task", type: "By type", media: "By media", source: "By source" };

function versusView(view, [first, second]) {
  header("Evaluations");
  const left = choice("versus-left", "Left", [], () => go());
  const right = choice("versus-right", "Right", [], () => go());
  const frames = choice("versus-frames", "Frames", [], () => load());
  const order = choice("versus-order", "Order", [], () => load());
  const drawn = make("div", {});
  const stage = make("div", {});
  document.getElementById("main").replaceChildren(make("div", { class: "controls" }, left.node, right.node, frames.node, order.node), drawn, stage);
  const go = () => { location.hash = `#/evaluations/${encodeURIComponent(left.select.value)}/${encodeURIComponent(right.select.value)}`; };
  const query = (more = {}) => ({ left: left.select.value, right: right.select.value, ...(frames.select.value ? { frames: frames.select.value } : {}), order: order.select.value || "ordered", ...more });

  async function load() {
    try {
      const answer = await ask("/api/versus", query());
      if (!view.open) return;
      options(frames, answer.frames, frames.select.value || answer.frames[answer.frames.length - 1]);
      options(order, answer.orders, order.select.value || "ordered");
      drawn.replaceChildren(answer.rows.length ? versusTable(answer, left.select.value, right.select.value, list) : make("p", { class: "lead" }, "Both have answered no question in this order yet."));
      if (answer.rows.length) list(answer.rows[0], answer.rows[0].wins ? "left" : "right");
      trouble("");
    } catch (error) { trouble(error.message); }
  }

  /** The questions of a row of the table that one of the two answers better. */
  async function list(row, who, at = 0) {
    try {
      const found = await ask("/api/questions", query({ benchmark: row.benchmark, group: row.group, name: row.name, who, at }));
      if (!view.open) return;
      const winner = who === "left" ? left.select.value : right.select.value;
      const button = (text, to) => make("button", { type: "button", disabled: to === null, click: () => list(row, who, to) }, text);
      stage.replaceChildren(section("questions", "Questions",
        make("p", { class: "lead" }, `${plural(found.total, "question")}${row.name ? ` ${row.group === "order" ? "with the frames" : "of"} ${rowName(row)}` : ""} that ${winner} answers better, the largest difference first.`),
        make("div", { class: "controls" }, make("button", { type: "button", "aria-pressed": String(who === "left"), click: () => list(row, "left") }, "left wins"),
          make("button", { type: "button", "aria-pressed": String(who === "right"), click: () => list(row, "right") }, "right wins"),
          found.total > 20 ? [button("← Previous", at ? Math.max(0, at - 20) : null), button("Next →", found.next), `${show(at + 1)} to ${show(at + found.shown.length)}`] : ""),
        make("div", { class: "versus-questions" }, found.shown.map((item) => questionNode(item, left.select.value, right.select.value)))));
    } catch (error) { trouble(error.message); }
  }

  (async () => {
    try {
      const found = (await ask("/api/evaluations")).evaluations.map((item) => item.name);
      if (!view.open) return;
      if (found.length < 2) {
        document.getElementById("main").replaceChildren(make("p", { class: "lead" }, "Two evaluations are needed to compare: folders that video-r1 eval wrote below these."));
        return;
      }
      options(left, found, found.includes(first) ? first : found[0]);
      options(right, found, found.includes(second) ? second : found.find((name) => name !== left.select.value));
      await load();
    } catch (error) { trouble(error.message); }
  })();
}

function options(chooser, values, wanted) {
  chooser.select.replaceChildren(...values.map((value) => make("option", { value }, value)));
  if (values.includes(wanted)) chooser.select.value = wanted;
}

function versusTable(answer, left, right, list) {
  const cell = (write, score, ...more) => make("td", {}, make("b", {}, write(score.mean)),
    make("small", {}, ` ${write(score.low)} to ${write(score.high)}`), more.filter(Boolean).map((words) => make("small", { class: "also" }, words)));
  const plain = (score) => show(score, 2);
  const side = (row, i) => cell(plain, i ? row.right : row.left, tokenWords(row.tokens[i]), row.gaps && row.gaps[i] !== null ? `order gains ${signed(row.gaps[i])}` : "");
  const longer = ([first, second]) => (first === null || second === null || first === second ? "" : `${first > second ? "+" : ""}${tokenWords(first - second)}`);
  const count = (row, who, n) => make("td", {}, n ? make("button", { type: "button", class: "title", click: () => list(row, who) }, show(n)) : "0");
  const groups = new Map();
  for (const row of answer.rows) {
    const key = JSON.stringify([row.benchmark, row.group]);
    groups.set(key, [...(groups.get(key) || []), row]);
  }
  const heads = [["questions", ""], ["", "picture"], [left, "ordered", "left"], [right, "shuffled", "right"], ["left minus right", ""], ["left wins", ""], ["right wins", ""]];
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Scores" }, headed(make("table", { class: "scores versus" },
    make("caption", {}, "Mean scores over the questions that both have answered, with 95 % bootstrap intervals; that of the difference is paired."),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, ""), heads.map(([name, style, short]) => make("th", { scope: "col", class: style, dir: "auto", "data-short": short }, style === "picture" ? make("span", { class: "ends" }, ["0", "0.5", "1"].map((end) => make("span", {}, end))) : name)))),
    [...groups.values()].map((rows) => make("tbody", {},
      rows[0].group || rows[0].benchmark ? make("tr", { class: "part" }, make("th", { scope: "rowgroup", colspan: 8, dir: "auto" }, [rows[0].benchmark, GROUP_NAMES[rows[0].group]].filter(Boolean).join(" · "))) : "",
      rows.map((row) => make("tr", {}, make("th", { scope: "row", dir: "auto" }, rowName(row)), make("td", {}, show(row.questions)), make("td", { class: "picture" }, pairPlot(row)),
        side(row, 0), side(row, 1), cell(signed, row.difference, longer(row.tokens)), count(row, "left", row.wins), count(row, "right", row.losses))))))));
}

const rowName = (row) => (row.group === "order" ? (row.name === "ordered" ? "in order" : row.name) : row.name || `all, ${row.frames} frames`);
const tokenWords = (count) => (count === null ? "" : `${show(count)} tokens`);

/** Both scores with their intervals on a line from 0 to 1. */
function pairPlot(row) {
  const [width, height, edge] = [200, 24, 5];
  const x = (value) => edge + Math.max(0, Math.min(1, value)) * (width - 2 * edge);
  const marks = [["left", 7, "var(--ordered)"], ["right", 17, "var(--shuffled)"]].flatMap(([side, y, paint]) => [
    draw("line", { class: "bar", stroke: paint, x1: x(row[side].low), x2: x(row[side].high), y1: y, y2: y }), draw("circle", { cx: x(row[side].mean), cy: y, r: 3.4, fill: paint })]);
  return draw("svg", { class: "dotplot", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, [0, 0.5, 1].map((v) => draw("line", { class: "grid", x1: x(v), x2: x(v), y1: 0, y2: height })), ...marks);
}

function questionNode(item, left, right) {
  const row = item.row;
  const side = (name, output, style) => make("section", { class: `column ${style}`, "aria-label": name }, make("h4", { dir: "auto" }, name), make("div", { class: "cards" }, card(output, [])));
  const clip = make("div", {});
  // Twenty players at once would read twenty files: a clip comes when somebody wants to see it.
  if (row) {
    const shown = { manifest: row.manifest, row: row.row };
    clip.append(make("button", { type: "button", click: () => clip.replaceChildren(player(shown, row.media === "image", row)) }, row.media === "image" ? "Show the image" : "Show the clip"),
      " ", make("a", { href: `#/ask/${encodeURIComponent(row.manifest)}/${row.row}` }, "Ask a model about it"));
  }
  return make("article", { class: "group versus-question", "aria-label": `Question ${item.id}` },
    make("p", { class: "facts", dir: "auto" }, [`question ${item.id}`, item.type, item.task, row ? row.manifest : "in no manifest below these folders"].filter(Boolean).join(" · ")),
    row ? make("h3", { class: "question", dir: "auto" }, row.problem) : "",
    row && row.options.length ? make("ul", { class: "options" }, row.options.map((option) => make("li", { class: isRight(option, item.answer) ? "right" : null, dir: "auto" }, option))) : "",
    make("p", { class: "answer", dir: "auto" }, make("span", {}, "Right answer "), item.answer), row ? oneOfSeveral(row) : "", clip,
    make("div", { class: "columns" }, side(left, item.left, "ordered"), side(right, item.right, "shuffled")));
}
