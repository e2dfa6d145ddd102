// Groups and questions that taught a run nothing: no variance, or media that could not be used.

const SKIP_REASONS = { replaced: "replaced", tried: "tried as a replacement", "no variance": "no variance, kept", media: "media" };
const SKIP_PAGE = 50;

/** The reason of a row. */
function whySkipped(row) {
  if (row.reason === "media") return row.why;
  const same = `no variance: all answers earn ${row.reward === null ? "the same" : show(row.reward)}`;
  if (row.reason === "tried") return `${same}; tried as a replacement in round ${show(row.round)}`;
  return row.reason === "replaced" ? `${same}; replaced by question ${row.by}` : `${same}; not replaced`;
}

/** The list below the rollouts; it grows with the run. */
function followSkipped(view, name, node) {
  let at = 0;
  let before = "";
  const reason = choice("pick-skipped", "Reason", [["", "any"]], () => { at = 0; load(); });
  const previous = make("button", { type: "button", click: () => { at -= SKIP_PAGE; load(); } }, "← Newer");
  const next = make("button", { type: "button", click: () => { at += SKIP_PAGE; load(); } }, "Older →");
  const position = make("output", { class: "quiet", "aria-live": "polite" });
  const body = make("tbody", {});
  const notes = make("ul", { class: "notes" });
  const heads = ["step", "question", "type", "right in order", "with the contrast"];
  const made = section("skipped", "Skipped groups",
    make("p", { class: "lead" }, "Questions that taught the run nothing, the newest first: groups whose answers all earn the same, failed replacements, and media that could not be used."),
    make("div", { class: "controls" }, previous, next, position, reason.node), notes,
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Skipped groups" }, make("table", { class: "skipped" },
      make("thead", {}, make("tr", {}, heads.map((head) => make("th", { scope: "col" }, head)))), body)));

  async function load() {
    const answer = await ask("/api/skipped", { run: name, reason: reason.select.value, at });
    const now = JSON.stringify(answer);
    if (!view.open || now === before) return answer.more;
    before = now;
    const all = Object.values(answer.counts).reduce((sum, n) => sum + n, 0);
    if (all && !made.isConnected) node.replaceChildren(made);
    const chosen = reason.select.value;
    reason.select.replaceChildren(make("option", { value: "" }, `any · ${show(all)}`),
      ...Object.entries(SKIP_REASONS).map(([value, said]) => make("option", { value, disabled: !answer.counts[value] }, `${said} · ${show(answer.counts[value])}`)));
    reason.select.value = chosen;
    previous.disabled = at === 0;
    next.disabled = at + SKIP_PAGE >= answer.total;
    position.textContent = answer.total ? `${show(at + 1)} to ${show(at + answer.rows.length)} of ${show(answer.total)}` : "none";
    notes.replaceChildren(...answer.notes.map((note) => make("li", {}, note)));
    body.replaceChildren(...answer.rows.map((row) => make("tr", {}, make("td", {}, row.step === null ? "" : show(row.step)),
      make("td", { dir: "auto" }, `${row.id} · ${row.problem}`, make("small", {}, whySkipped(row))), make("td", { dir: "auto" }, row.type, make("small", {}, row.source)),
      make("td", {}, row.accuracy === null ? "" : show(row.accuracy)), make("td", {}, row.contrast === null ? "" : show(row.contrast)))));
    return answer.more;
  }

  follow(view, async () => ((await load()) ? 0.1 : 2));
}
