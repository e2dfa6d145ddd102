// Where and when an answer says something is: boxes on the frames, spans as bars. A `place` is {time, boxes} as the
// answer's JSON has it: boxes is one box, or a table of boxes by their second.

const SIDE = 1000; // of a picture, in the unit of boxes
const NEAR = 0.5; // seconds between a frame and a box that is shown on it

/** The boxes of a place on the frame at a time; the seconds of tracking are counted from 1. */
function boxesAt(place, time, type) {
  if (!place?.boxes) return [];
  if (Array.isArray(place.boxes)) return [place.boxes];
  const near = Object.entries(place.boxes)
    .map(([second, box]) => [Math.abs(Number(second) - (type === "tracking" ? 1 : 0) - time), box])
    .filter(([distance]) => distance <= NEAR).sort((a, b) => a[0] - b[0]);
  return near.length ? [near[0][1]] : [];
}

/** What is drawn on a frame: the boxes of an order's answers by the time that the frame has in it, and the right one
 * by the frame's own time. */
function frameMarks(group, order, frame, time) {
  const said = (group[order] || []).flatMap((completion) => boxesAt(completion.place, time ?? 0, group.type));
  const right = boxesAt(group.place, group.timestamps[frame] ?? 0, group.type);
  return [...said.map((box) => ({ box, name: order })), ...right.map((box) => ({ box, name: "good" }))];
}

function drawMarks(canvas, marks) {
  const pen = canvas.getContext("2d");
  const colours = getComputedStyle(document.documentElement);
  const thin = Math.max(1, Math.round(canvas.width / 200));
  for (const { box, name } of marks) {
    pen.lineWidth = name === "good" ? 2 * thin : thin;
    pen.strokeStyle = colours.getPropertyValue(`--${name}`);
    const [left, top, right, bottom] = box.map((side, i) => Math.round((side * (i % 2 ? canvas.height : canvas.width)) / SIDE) + (pen.lineWidth % 2) / 2);
    pen.strokeRect(left, top, right - left, bottom - top);
  }
}

/** The span of an answer as a bar below that of the truth, where it is known, from the clip's beginning to its end. */
function spanBars(group, completion) {
  const [right, said] = [group.place?.time, completion.place?.time];
  if (!right && !said) return "";
  const times = group.timestamps.filter((time) => time !== null);
  const end = Math.max(right ? right[1] : 0, (times[times.length - 1] ?? 0) + (times.length > 1 ? times[1] - times[0] : 0));
  const bar = (span, name) => {
    const share = (time) => (100 * Math.min(end, Math.max(0, time))) / end;
    const node = make("span", { class: `span ${name}` });
    node.style.left = `${share(span[0])}%`;
    node.style.width = `${Math.max(0.5, share(span[1]) - share(span[0]))}%`;
    return make("span", { class: "lane" }, node);
  };
  const words = (span) => `${clock(span[0])} to ${clock(span[1])}`;
  const told = [said ? `answered ${words(said)}` : "no span answered", right ? `right is ${words(right)}` : ""].filter(Boolean).join("; ");
  return make("p", { class: "spans", role: "img", "aria-label": told, title: told },
    right ? bar(right, "true") : "", said ? bar(said, "said") : make("span", { class: "lane" }));
}

/** How far answers that say where and when overlap the truth, for each checkpoint, type and order of the frames. */
function overlapTable(scores) {
  const rows = scores.flatMap((row) => (row.overlaps || []).map((overlap) => ({ checkpoint: row.name, ...overlap })));
  if (!rows.length) return "";
  const caption = "Overlap with the truth: the mean, and the shares of questions with at least so much";
  const shares = Object.keys(rows[0].shares);
  const cell = (score) => make("td", {}, score ? [make("b", {}, show(score.mean, 2)), make("small", {}, rangeOf(score))] : "–");
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, headed(make("table", { class: "scores" },
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ["checkpoint", "overlap", "mean", ...shares].map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, make("th", { scope: "row", dir: "auto" }, row.checkpoint),
      make("td", { class: row.order }, `${row.name}, ${row.order}`), cell(row.mean), shares.map((share) => cell(row.shares[share]))))))));
}
