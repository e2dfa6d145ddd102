// What a run learnt nothing from: groups without variance, and questions whose media could not be used.

const LEFT_REASONS = { replaced: "replaced", tried: "tried for another's place", "no variance": "no variance, kept", media: "media" };
const LEFT_PAGE = 50;

/** Why a row is in the list. */
function whyLeft(row) {
  if (row.reason === "media") return row.why;
  const same = `no variance: all answers earn ${row.reward === null ? "the same" : show(row.reward)}`;
  if (row.reason === "tried") return `${same}; asked in round ${show(row.round)} for the place of another one`;
  return row.reason === "replaced" ? `${same}; question ${row.by} took its place` : `${same}; it kept its place`;
}

/** The list below the rollouts, as it grows. */
function followLeftOut(view, name, node) {
  let at = 0;
  let before = "";
  const reason = choice("pick-left", "Reason", [["", "any"]], () => { at = 0; load(); });
  const previous = make("button", { type: "button", click: () => { at -= LEFT_PAGE; load(); } }, "← Newer");
  const next = make("button", { type: "button", click: () => { at += LEFT_PAGE; load(); } }, "Older →");
  const position = make("output", { class: "quiet", "aria-live": "polite" });
  const body = make("tbody", {});
  const notes = make("ul", { class: "notes" });
  const heads = ["step", "question", "type", "right in order", "with the contrast"];
  const made = section("left-out", "Left out",
    make("p", { class: "lead" }, "Questions from which the run learnt nothing, the last first: groups whose answers all earn the same, what was asked in their place, and media that could not be used."),
    make("div", { class: "controls" }, previous, next, position, reason.node), notes,
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Left out" }, make("table", { class: "left-out" },
      make("thead", {}, make("tr", {}, heads.map((head) => make("th", { scope: "col" }, head)))), body)));

  async function load() {
    const answer = await ask("/api/left", { run: name, reason: reason.select.value, at });
    const now = JSON.stringify(answer);
    if (!view.open || now === before) return answer.more;
    before = now;
    const all = Object.values(answer.counts).reduce((sum, n) => sum + n, 0);
    if (all && !made.isConnected) node.replaceChildren(made);
    const chosen = reason.select.value;
    reason.select.replaceChildren(make("option", { value: "" }, `any · ${show(all)}`),
      ...Object.entries(LEFT_REASONS).map(([value, said]) => make("option", { value, disabled: !answer.counts[value] }, `${said} · ${show(answer.counts[value])}`)));
    reason.select.value = chosen;
    previous.disabled = at === 0;
    next.disabled = at + LEFT_PAGE >= answer.total;
    position.textContent = answer.total ? `${show(at + 1)} to ${show(at + answer.rows.length)} of ${show(answer.total)}` : "none";
    notes.replaceChildren(...answer.notes.map((note) => make("li", {}, note)));
    body.replaceChildren(...answer.rows.map((row) => make("tr", {}, make("td", {}, row.step === null ? "" : show(row.step)),
      make("td", { dir: "auto" }, `${row.id} · ${row.problem}`, make("small", {}, whyLeft(row))), make("td", { dir: "auto" }, row.type, make("small", {}, row.source)),
      make("td", {}, row.accuracy === null ? "" : show(row.accuracy)), make("td", {}, row.contrast === null ? "" : show(row.contrast)))));
    return answer.more;
  }

  follow(view, async () => ((await load()) ? 0.1 : 2));
}
