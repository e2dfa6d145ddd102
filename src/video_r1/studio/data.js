// Manifests: pages of their rows, a row with its clip, and how many there are of each kind.

const ROW_FILTERS = [["type", "Type"], ["media", "Media"], ["source", "Source"]];
const LONGEST_BARS = 14;

function dataView(view, [wanted]) {
  header("Data");
  const manifest = make("select", { id: "data-manifest", change: () => { location.hash = `#/data/${encodeURIComponent(manifest.value)}`; } });
  const words = make("input", { type: "search", id: "data-words", placeholder: "in any field", input: () => filter() });
  const keep = make("input", { type: "text", id: "data-keep", placeholder: "ordered - shuffled > 0.1", autocomplete: "off", change: () => filter() });
  const problems = make("input", { type: "checkbox", id: "data-problems", change: () => filter() });
  const filters = Object.fromEntries(ROW_FILTERS.map(([name, label]) => [name, choice(`data-${name}`, label, [["", "any"]], () => filter())]));
  const lead = make("p", { class: "lead", "aria-live": "polite" });
  const notes = make("ul", { class: "notes", "aria-label": "Problems of the file" });
  const body = make("tbody", { keydown: step });
  const stage = make("div", { class: "stage" });
  const pictures = make("div", {});
  const position = make("output", { class: "position", "aria-live": "polite" });
  const previous = make("button", { type: "button", click: () => turn(-1) }, "← Previous");
  const next = make("button", { type: "button", click: () => turn(1) }, "Next →");
  const keepField = make("span", { class: "choice" }, make("label", { for: "data-keep" }, "Pass rates"), keep);
  const list = make("table", { class: "rows" },
    make("thead", {}, make("tr", {}, ["row", "question", "type", "source", "pass rates", ""].map((name) => make("th", { scope: "col" }, name)))), body);
  const table = wholeRows(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Rows; the arrow keys go from one to the next" }, list), 750);
  document.getElementById("main").replaceChildren(
    make("div", { class: "controls" }, make("span", { class: "choice" }, make("label", { for: "data-manifest" }, "Manifest"), manifest)), lead, notes,
    make("div", { class: "controls" }, make("span", { class: "choice" }, make("label", { for: "data-words" }, "Find"), words),
      ...ROW_FILTERS.map(([name]) => filters[name].node), keepField,
      make("label", { class: "choice", for: "data-problems" }, problems, "with problems")),
    make("div", { class: "controls pager" }, previous, next, position), make("div", { class: "browsing" }, table, stage), pictures);

  let starts = [0]; // of the pages up to this one
  let shown = [];
  let following = null; // where the next page begins, null at the end
  let asked = 0;
  let life = 0;
  let rowsKnown = -1;
  let more = true;
  let chosen = null;

  const query = () => {
    const given = { manifest: manifest.value, at: starts[starts.length - 1] };
    for (const [name] of ROW_FILTERS) if (filters[name].select.selectedIndex > 0) given[name] = filters[name].select.value;
    if (words.value.trim()) given.words = words.value;
    if (keep.value.trim()) given.keep = keep.value;
    if (problems.checked) given.problems = 1;
    return given;
  };

  function filter() { starts = [0]; chosen = null; load(); }

  function turn(by) {
    if (by > 0 && following !== null) starts.push(following);
    else if (by < 0 && starts.length > 1) starts.pop();
    chosen = null;
    load();
  }

  async function load() {
    const number = ++asked;
    try {
      const answer = await ask("/api/rows", query());
      if (number !== asked || !view.open) return;
      // Half a search that found nothing goes on by itself.
      if (answer.total === null && !answer.shown.length && answer.next !== null) {
        starts[starts.length - 1] = answer.next;
        position.textContent = `searching from row ${show(answer.next)} …`;
        setTimeout(load, 0);
        return;
      }
      take(answer);
      trouble("");
    } catch (error) { if (number === asked) trouble(error.message); }
  }

  function take(answer) {
    more = answer.more;
    following = answer.next;
    lead.textContent = `${plural(answer.rows, "row")}${more ? `, and ${show(Math.ceil(answer.behind / 1e6))} MB still to be read` : ""}; `
      + `${answer.bad ? `${show(answer.bad)} with problems; data check also decodes the media` : "none has a problem; data check also decodes the media"}.`;
    notes.replaceChildren(...answer.notes.map((note) => make("li", {}, note)));
    keepField.hidden = !answer.rates.length;
    list.classList.toggle("no-rates", !answer.rates.length);
    keep.title = `rates: ${answer.rates.join(", ")}`;
    if (answer.life !== life || answer.rows !== rowsKnown) count(answer);
    [life, rowsKnown] = [answer.life, answer.rows];
    const place = answer.total === null ? `page ${show(starts.length)}` : `${show(Math.min(starts[starts.length - 1] + 1, answer.total))} to ${show(starts[starts.length - 1] + answer.shown.length)} of ${show(answer.total)}`;
    position.textContent = answer.shown.length ? place : "nothing matches";
    previous.disabled = starts.length < 2;
    next.disabled = following === null;
    if (JSON.stringify(shown) !== JSON.stringify(answer.shown) || !body.children.length) {
      shown = answer.shown;
      body.replaceChildren(...shown.map(rowNode));
    }
    if (chosen === null || !shown.some((item) => item.row === chosen)) open(shown[0]);
  }

  /** The list has one stop of the Tab key, its open row; from there the arrow keys go on. */
  function step(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const row = by && body.rows[[...body.rows].indexOf(event.target.closest("tr")) + by];
    if (!row) return;
    event.preventDefault();
    row.querySelector("button").focus();
    row.querySelector("button").click();
  }

  function rowNode(item) {
    const rates = Object.entries(item.rates).map(([name, rate]) => `${name} ${show(rate)}`).join(", ");
    const button = make("button", { type: "button", class: "title", click: () => open(item) }, item.problem || "(no question)");
    const node = make("tr", {}, make("td", {}, show(item.row + 1)), make("th", { scope: "row", dir: "auto" }, button),
      make("td", { dir: "auto" }, item.type, item.media === "image" ? make("small", {}, " image") : ""), make("td", { dir: "auto" }, item.source), make("td", {}, rates),
      make("td", {}, item.problems.length ? make("span", { class: "alert-count", title: item.problems.join("\n") }, plural(item.problems.length, "problem")) : ""));
    node.dataset.row = String(item.row);
    return node;
  }

  function open(item) {
    for (const node of body.rows) {
      const isOpen = Boolean(item) && node.dataset.row === String(item.row);
      node.classList.toggle("chosen", isOpen);
      node.querySelector("button").tabIndex = isOpen ? 0 : -1;
    }
    chosen = item ? item.row : null;
    if (!item) { stage.replaceChildren(); return; }
    const playable = !item.problems.length;
    stage.replaceChildren(make("article", { class: "group", "aria-label": `Row ${item.row + 1}` },
      playable ? player({ manifest: manifest.value, row: item.row }, item.media === "image", item) : "",
      item.problems.length ? make("ul", { class: "alerts", role: "list", "aria-label": "Problems" }, item.problems.map((problem) => make("li", {}, problem))) : "",
      make("p", { class: "facts", dir: "auto" }, [`row ${show(item.row + 1)}`, `question ${item.id}`, item.type, item.source, item.path,
        item.start !== null || item.end !== null ? `${show(item.start ?? 0)} to ${item.end === null ? "the end" : `${show(item.end)} s`}` : "", playedHow(item)].filter(Boolean).join(" · ")),
      make("h3", { class: "question", dir: "auto" }, item.problem),
      item.options.length ? make("ul", { class: "options" }, item.options.map((option) => make("li", { class: isRight(option, item.answer) ? "right" : null, dir: "auto" }, option))) : "",
      make("p", { class: "answer", dir: "auto" }, make("span", {}, "Right answer "), item.answer),
      item.process ? make("div", { class: "text", dir: "auto" }, styled(item.process)) : "",
      playable ? make("p", {}, make("a", { href: `#/ask/${encodeURIComponent(manifest.value)}/${item.row}` }, "Ask a model about it")) : ""));
  }

  /** Choices of the filters, and pictures of how many there are. */
  function count(answer) {
    for (const [name] of ROW_FILTERS) {
      const entries = Object.entries(answer.counts[name]).sort((a, b) => b[1] - a[1]);
      const select = filters[name].select;
      const before = select.selectedIndex > 0 ? select.value : null;
      select.replaceChildren(make("option", {}, "any"), ...entries.map(([value, n]) => make("option", { value }, `${value || "(none)"} · ${show(n)}`)));
      if (before !== null) select.value = before;
      if (select.selectedIndex < 0) select.selectedIndex = 0;
    }
    const { warnings } = answer.counts;
    pictures.replaceChildren(section("balance", "Balance",
      warnings.length ? make("ul", { class: "alerts", role: "list", "aria-label": "Warnings" }, warnings.map((warning) => make("li", {}, warning))) : "",
      make("div", { class: "pictures" },
      bars("Types", Object.entries(answer.counts.type)), bars("Media", Object.entries(answer.counts.media)), bars("Sources", Object.entries(answer.counts.source)), Object.keys(answer.counts.answer).length ? bars("Right answers of multiple choice", Object.entries(answer.counts.answer)) : "")));
  }

  (async () => {
    try {
      const found = (await ask("/api/choices")).manifests;
      if (!view.open) return;
      if (!found.length) {
        document.getElementById("main").replaceChildren(make("p", { class: "lead" }, "There is no manifest below these folders: a .json or .jsonl file whose rows have problem_id, problem, solution and path."));
        return;
      }
      manifest.replaceChildren(...found.map((item) => make("option", { value: item }, item)));
      manifest.value = found.includes(wanted) ? wanted : found[0];
      await load();
      follow(view, async () => { if (more) await load(); return more ? 0.3 : 3; });
    } catch (error) { trouble(error.message); }
  })();
}

/** Counts as bars, the largest first. */
function bars(title, counts) {
  const all = [...counts].sort((a, b) => b[1] - a[1]);
  const rest = all.slice(LONGEST_BARS);
  const kept = rest.length ? [...all.slice(0, LONGEST_BARS), [`${show(rest.length)} more`, rest.reduce((sum, [, n]) => sum + n, 0)]] : all;
  const most = Math.max(1, ...kept.map(([, n]) => n));
  const sum = all.reduce((total, [, n]) => total + n, 0);
  return make("figure", { class: "bars" }, make("figcaption", {}, title), make("table", {}, make("tbody", {}, kept.map(([name, n]) =>
    make("tr", {}, make("th", { scope: "row", dir: "auto" }, name || "(none)"),
      make("td", {}, draw("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, draw("rect", { width: ((100 * n) / most).toFixed(2), height: 10 }))),
      make("td", {}, show(n), make("small", {}, ` ${sum ? percent(n / sum) : 0} %`)))))));
}
