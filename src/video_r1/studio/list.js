// The list of runs.

const STATES = { running: "running", finished: "finished", stopped: "stopped", failed: "failed" };
const runAddress = (name) => `#/run/${encodeURIComponent(name)}`;

function sparkline({ name, values }) {
  if (values.length < 2) return "";
  const [width, height] = [120, 28];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const points = values.map((value, i) => `${i ? "L" : "M"}${((i / (values.length - 1)) * width).toFixed(1)} ${(2 + (1 - (value - low) / (high - low || 1)) * (height - 4)).toFixed(1)}`);
  return [draw("svg", { class: "spark", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name}: from ${show(values[0])} to ${show(values[values.length - 1])}` },
    draw("path", { d: points.join("") })), make("small", {}, name)];
}

function progressText(run) {
  if (run.step === null) return "";
  return `step ${show(run.step)}${run.steps ? ` of ${show(run.steps)}` : ""}`;
}

function progressBar(run) {
  if (!run.steps || run.step === null) return "";
  const inner = make("i", {});
  inner.style.width = `${Math.min(100, (100 * run.step) / run.steps).toFixed(1)}%`;
  return make("div", { class: "bar", "aria-hidden": "true" }, inner);
}

const stateNode = (run) => make("span", { class: `state ${STATES[run.state] || ""}` }, run.state);

function listView(view) {
  const chosen = new Set();
  let rows = [];
  header("Runs");
  const search = make("input", { type: "search", id: "search", placeholder: "part of a name", input: () => fillRows() });
  const compare = make("button", { type: "button", click: () => { location.hash = `#/compare/${[...chosen].map(encodeURIComponent).join("/")}`; } }, "Compare");
  const body = make("tbody", {});
  const lead = make("p", { class: "lead", "aria-live": "polite" });
  const table = make("table", { class: "runs" },
    make("thead", {}, make("tr", {}, ["run", "state", "progress", "figures", "", ""].map((name) => make("th", { scope: "col" }, name)))), body);
  document.getElementById("main").replaceChildren(lead,
    make("div", { class: "controls" }, make("span", { class: "choice" }, make("label", { for: "search" }, "Find"), search), compare),
    table);

  function fillRows() {
    const wanted = search.value.toLowerCase();
    const found = rows.filter((run) => run.name.toLowerCase().includes(wanted));
    const count = (state) => rows.filter((run) => run.state === state).length;
    lead.textContent = rows.length
      ? `${plural(rows.length, "run")}: ${Object.keys(STATES).filter(count).map((state) => `${count(state)} ${state}`).join(", ")}.`
      : "There is no run below these folders yet. It appears here when a training writes its first line.";
    compare.disabled = chosen.size < 2;
    const focus = document.activeElement?.id;
    body.replaceChildren(...found.map(row));
    if (focus) document.getElementById(focus)?.focus();
  }

  function row(run, i) {
    const box = make("input", { type: "checkbox", id: `choose-${slug(run.name)}-${i}`, "aria-label": `compare ${run.name}`, disabled: run.step === null, title: run.step === null ? "without curves" : null,
      change: () => { box.checked ? chosen.add(run.name) : chosen.delete(run.name); compare.disabled = chosen.size < 2; } });
    box.checked = chosen.has(run.name);
    return make("tr", {},
      make("th", { scope: "row" }, make("label", {}, box, make("a", { href: runAddress(run.name), dir: "auto" }, run.name)),
        make("small", {}, Object.hasOwn(KINDS, run.kind) ? KINDS[run.kind] : run.kind, run.demo ? " · of a demo" : "")),
      make("td", {}, stateNode(run), run.why ? make("span", { class: "why", dir: "auto" }, run.why) : ""),
      make("td", {}, progressText(run), progressBar(run), make("small", {}, run.left ? `${run.left} left` : run.taken || "")),
      make("td", { class: "figure" }, run.figures.slice(0, 4).map((figure) => make("span", {}, `${figure.caption} `, make("b", {}, figure.value)))),
      make("td", {}, sparkline(run.spark)),
      make("td", {}, run.alerts.length ? make("span", { class: "alert-count", title: run.alerts.map((alert) => alert.title).join("\n") }, plural(run.alerts.length, "alert")) : ""));
  }

  let before = "";
  follow(view, async () => {
    const answer = await ask("/api/runs");
    const now = JSON.stringify(answer.runs);
    if (view.open && now !== before) {
      rows = answer.runs;
      before = now;
      fillRows();
    }
    return 2;
  });
}
