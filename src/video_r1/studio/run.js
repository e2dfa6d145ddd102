// One run that may still go on: its curves, its recorded groups, what it set aside; and several over each other.

/** The columns of a run as the server hands them out, and how much of them is here. */
class Columns {
  constructor(name) {
    Object.assign(this, { name, life: 0, width: 0, averaged: 1, steps: [], times: [], tokens: [], series: {}, bad: {}, notes: [], changed: false });
  }

  /** Takes what is new. Returns the seconds after which to ask again. */
  async read() {
    const answer = await ask("/api/curves", { run: this.name, life: this.life, have: this.life < 0 ? 0 : this.steps.length, width: this.width });
    const begin = answer.from;
    const kept = answer.life === this.life && begin > 0 ? begin : 0;
    const sketchedBefore = answer.life < 0 && this.life < 0;
    this.changed = !sketchedBefore && (answer.life !== this.life || answer.steps.length !== this.steps.length - kept);
    for (const name of ["steps", "times", "tokens"]) this[name] = [...this[name].slice(0, kept), ...answer[name]];
    const series = {};
    for (const [name, values] of Object.entries(answer.series)) {
      const before = kept && Object.hasOwn(this.series, name) ? this.series[name].slice(0, kept) : new Array(kept).fill(null);
      Object.defineProperty(series, name, { value: [...before, ...values], enumerable: true, writable: true, configurable: true });
    }
    if (!this.changed && !sketchedBefore) this.changed = JSON.stringify(Object.keys(series)) !== JSON.stringify(Object.keys(this.series)) || answer.steps.some((_, i) => Object.keys(series).some((name) => series[name][kept + i] !== this.series[name][kept + i]));
    Object.assign(this, { series, life: answer.life, width: answer.width, averaged: answer.averaged, bad: answer.bad, notes: answer.notes });
    return answer.life < 0 ? 0.05 : 1;
  }

  /** As the report's charts take a run: each series with those points alone that it has. axis: steps, times or tokens. */
  run(kind, axis, config = {}) {
    const axes = [];
    const series = {};
    const known = new Map();
    for (const [name, values] of Object.entries(this.series)) {
      const places = values.flatMap((value, i) => (value === null ? [] : [i]));
      const key = places.join();
      if (!known.has(key)) { known.set(key, axes.length); axes.push(places.map((i) => this[axis][i])); }
      const data = { axis: known.get(key), y: places.map((i) => values[i]), bad: Object.hasOwn(this.bad, name) ? this.bad[name] : 0, averaged: this.averaged };
      Object.defineProperty(series, name, { value: data, enumerable: true, configurable: true });
    }
    return { name: this.name, kind, about: [], axes, series, config };
  }
}

const AXIS_COLUMNS = { step: "steps", time: "times", tokens: "tokens" };

/** Which axes there are: tokens only where a run counts them. */
function axisChoice(onChange) {
  return choice("pick-axis", "Across", [["step", "steps"], ["time", "time"], ["tokens", "sampled tokens"]], onChange);
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
  const skipped = make("div", {});
  const aside = make("div", {});
  const holder = new CurveHolder(drawn);
  let run = null;
  let following = false; // of groups, which come after the curves
  const axis = axisChoice((value) => { holder.axis = value; redraw(); });
  header(name, about);
  document.getElementById("main").replaceChildren(above, make("div", { class: "controls" }, axis.node), left, drawn, recorded, skipped, aside);

  const redraw = () => {
    axis.select.querySelector("[value=tokens]").disabled = !columns.tokens.some((count) => count > 0);
    holder.draw(columns.run(run.kind, AXIS_COLUMNS[holder.axis], run.config), {});
  };

  let before = "";
  async function readRun() {
    const { written, ...answer } = await ask("/api/run", { run: name });
    const now = JSON.stringify(answer);
    if (now === before || !view.open) return;
    before = now;
    run = answer;
    about.replaceChildren(make("p", { class: "about" }, stateNode(run), run.why ? ` ${run.why}` : "", " · ", KINDS[run.kind] || "",
      [progressText(run), run.left ? `${run.left} left` : "", run.taken ? `${run.taken} so far` : ""].filter(Boolean).map((part) => ` · ${part}`)), progressBar(run),
      run.figures.length ? make("dl", { class: "figures" }, run.figures.map((figure) => make("div", {}, make("dt", {}, figure.caption), make("dd", {}, figure.value)))) : "");
    above.replaceChildren(run.alerts.length ? make("ul", { class: "alerts", "aria-label": "Alerts", role: "list" }, run.alerts.map((alert) =>
      make("li", {}, make("b", {}, alert.title), make("span", {}, alert.advice)))) : "");
    const tables = { ...run, skippedUpdates: run.skipped_updates };
    const open = [...aside.querySelectorAll("details[open]")].length > 0;
    aside.replaceChildren(...[skippedUpdates([tables]), settings([tables])].filter(Boolean));
    if (open) aside.querySelectorAll("details").forEach((node) => { node.open = true; });
  }

  follow(view, async () => {
    const [wait] = await Promise.all([columns.read(), run ? null : readRun()]);
    if (view.open && (columns.changed || !drawn.firstChild)) redraw();
    if (!following) setTimeout(() => { followGroups(view, name, recorded); followSkipped(view, name, skipped); }, 200); // when the curves are painted
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
  header(`${all.length} runs`, make("ul", { class: "key" }, all.map((columns, i) => make("li", {}, swatch(`var(--line${i % 8})`), make("a", { href: runAddress(columns.name), dir: "auto" }, columns.name)))));
  document.getElementById("main").replaceChildren(make("div", { class: "controls" }, picked.node), drawn, table);

  const redraw = () => {
    picked.select.querySelector("[value=tokens]").disabled = !all.every((columns) => columns.tokens.some((count) => count > 0));
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
