// One run that may still go on: its curves, its recorded groups, what it skipped; and several over each other.

/** The columns of a run as far as the server has read them. */
class Columns {
  constructor(name) {
    Object.assign(this, { name, stamp: "", notes: [], changed: false, points: { averaged: 1, steps: [], times: [], series: {}, bad: {} } });
  }

  /** Takes what is new. Returns the seconds after which to ask again. */
  async read() {
    const answer = await ask("/api/curves", { run: this.name, stamp: this.stamp });
    this.changed = answer.stamp !== this.stamp;
    Object.assign(this, answer);
    return answer.more ? 0.05 : 1;
  }

  run(kind, axis, config = {}) { return charted({ name: this.name, kind, about: [], points: this.points, config }, axis); }
}

const AXIS_COLUMNS = { step: "steps", time: "times" };

function axisChoice(onChange) {
  return choice("pick-axis", "Across", [["step", "steps"], ["time", "time"]], onChange);
}

/** The section of curves, made anew only when there are series that it has no chart for. */
class CurveHolder {
  constructor(node, build) {
    Object.assign(this, { node, build, section: null, axis: "step" });
  }

  draw(run, options) {
    if (!chartSpecs(run).length) {
      this.node.replaceChildren(make("p", { class: "lead" }, "There is nothing to draw yet: curves begin with the second logged step."));
      this.section = null;
    } else if (!this.section || this.section.axis !== this.axis || !this.section.update(run)) {
      const radius = this.section ? this.section.radius() : null;
      this.section = curves(run, { ...options, radius, axis: AXES[this.axis] });
      this.section.axis = this.axis;
      this.node.replaceChildren(this.section);
    }
  }
}

function runView(view, [name]) {
  const columns = new Columns(name);
  const about = make("div", { "aria-live": "polite" });
  const above = make("div", {});
  const left = make("ul", { class: "notes", "aria-label": "Problems of the files" });
  const drawn = make("div", {});
  const recorded = make("div", {});
  const aside = make("div", {});
  const holder = new CurveHolder(drawn);
  let run = null;
  let following = false; // of groups, which come after the curves
  const axis = axisChoice((value) => { holder.axis = value; redraw(); });
  header(name, about);
  const controls = make("div", { class: "controls" }, axis.node);
  document.getElementById("main").replaceChildren(above, controls, left, drawn, recorded, aside);

  const redraw = () => {
    if (run) holder.draw(columns.run(run.kind, AXIS_COLUMNS[holder.axis], run.config), {});
  };

  let before = "";
  async function readRun() {
    const { written, ...answer } = await ask("/api/run", { run: name });
    const now = JSON.stringify(answer);
    if (now === before || !view.open) return;
    before = now;
    run = answer;
    about.replaceChildren(make("p", { class: "about" }, stateNode(run), run.why ? ` ${run.why}` : "", " · ", KINDS[run.kind] || "",
      [progressText(run), run.left ? `${run.left} left` : "", run.taken && `${run.state === "running" ? "" : "took "}${run.taken}${run.state === "running" ? " so far" : ""}`].filter(Boolean).map((part) => ` · ${part}`)), progressBar(run),
      run.figures.length ? make("dl", { class: "figures" }, run.figures.map((figure) => make("div", {}, make("dt", {}, figure.caption), make("dd", {}, figure.value)))) : "",
      run.figures.length && run.step !== null ? make("p", { class: "about" }, "Means over the last ten logged lines.") : "");
    above.replaceChildren(run.alerts.length ? make("ul", { class: "alerts", "aria-label": "Alerts", role: "list" }, run.alerts.map((alert) =>
      make("li", {}, make("b", {}, alert.title), make("span", {}, alert.advice)))) : "");
    const tables = { ...run, skippedUpdates: run.skipped_updates, leftOut: run.left_out };
    const open = [...aside.querySelectorAll("details[open]")].length > 0;
    const places = Object.fromEntries([...aside.querySelectorAll(".scroll")].map((node) => [node.ariaLabel, node.scrollTop]));
    aside.replaceChildren(...[leftOut([tables]), quarantine([tables]), skippedUpdates([tables]), settings([tables])].filter(Boolean));
    if (open) aside.querySelectorAll("details").forEach((node) => { node.open = true; });
    aside.querySelectorAll(".scroll").forEach((node) => { node.scrollTop = places[node.ariaLabel] ?? 0; });
  }

  follow(view, async () => {
    const [wait] = await Promise.all([columns.read(), run ? null : readRun()]);
    if (!view.open) return 1;
    if (run.kind === "evaluation") {
      controls.hidden = true;
      await ownPanel(view, name, drawn);
      return 1e6;
    }
    if (view.open && (columns.changed || !drawn.firstChild)) redraw();
    if (!following) setTimeout(() => followGroups(view, name, recorded), 200); // when the curves are painted
    following = true;
    if (left.children.length !== columns.notes.length) left.replaceChildren(...columns.notes.map((note) => make("li", {}, note)));
    return wait;
  });
  follow(view, async () => { if (run) await readRun(); return 2; });
}

/** The run's recorded groups, as they are written. */
function followGroups(view, name, node) {
  const run = { name, groups: [] };
  const numbers = new Map(); // of entries
  const live = { clip: groupClip, load: (_, entry) => ask("/api/group", { run: name, life, at: numbers.get(entry) }) };
  let life = 0;
  let section = null;
  follow(view, async () => {
    const answer = await ask("/api/entries", { run: name, life, have: run.groups.length });
    if (!view.open) return 1;
    if (answer.life !== life || answer.from < run.groups.length) {
      run.groups.length = 0;
      numbers.clear();
      section = null;
      node.replaceChildren();
    }
    life = answer.life;
    for (const entry of answer.entries) { numbers.set(entry, run.groups.length); run.groups.push(entry); }
    if (run.groups.length && !section) {
      section = rollouts([run], live);
      node.replaceChildren(section);
    } else if (section && answer.entries.length) section.update();
    return answer.more ? 0.05 : 1;
  });
}

function compareView(view, names) {
  const all = [...new Set(names)].slice(0, 8).map((name) => new Columns(name));
  const drawn = make("div", {});
  const table = make("div", {});
  const holders = new Map();
  let axis = "step";
  const picked = axisChoice((value) => { axis = value; redraw(); });
  const kinds = new Map();
  header(`${all.length} runs`, make("ul", { class: "key" }, all.map((columns, i) => make("li", {}, swatch(paintOf(i)), make("a", { href: runAddress(columns.name), dir: "auto" }, columns.name)))));
  document.getElementById("main").replaceChildren(make("div", { class: "controls" }, picked.node), drawn, table);

  const redraw = () => {
    for (const kind of new Set(kinds.values())) {
      if (!holders.has(kind)) {
        const node = make("div", {});
        drawn.append(node);
        holders.set(kind, new CurveHolder(node));
      }
      const holder = holders.get(kind);
      holder.axis = axis;
      const runs = all.filter((columns) => kinds.get(columns.name) === kind).map((columns) => columns.run(kind, AXIS_COLUMNS[axis]));
      holder.draw({ name: KINDS[kind] || kind, kind, about: [], series: {}, specs: overlaySpecs(runs) }, { overlay: true, several: true });
    }
  };

  follow(view, async () => {
    if (!kinds.size) {
      const runs = (await ask("/api/runs")).runs;
      for (const columns of all) {
        const found = runs.find((run) => run.name === columns.name);
        if (!found) throw new Error(`There is no run ${columns.name} any more.`);
        kinds.set(columns.name, found.kind);
      }
      const { differing } = await ask("/api/compare", { run: all.map((columns) => columns.name) });
      table.replaceChildren(section("comparison", "Settings",
        differing.length ? plainTable("Settings that differ", differing) : make("p", { class: "lead" }, "These runs have the same settings.")));
    }
    const waits = await Promise.all(all.map((columns) => columns.read()));
    if (view.open && all.some((columns) => columns.changed)) redraw();
    return Math.min(...waits);
  });
}
