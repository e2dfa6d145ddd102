// The frames of a recorded group: cut from its strip, in either order, large and played.

const SMALL_FRAME = 84; // pixels across

const playedHow = ({ play }) => (play === "reversed" ? "played backwards" : "");

/** Which of a question's clips a frame is of (`clip`), the place that it has there, and how many they are. */
function partOf(group, frame) {
  const clips = group.clips?.length ? group.clips : [group.count];
  let clip = 0, first = 0;
  while (frame - first >= clips[clip]) first += clips[clip++];
  return { clip, place: frame - first, count: clips[clip], clips: clips.length };
}

function frameName(group, frame) {
  const { clip, place, count, clips } = partOf(group, frame);
  if (count > 1) return `${clips > 1 ? `clip ${clip + 1}, ` : ""}frame ${place + 1} of ${count}`;
  return clips > 1 ? `image ${clip + 1} of ${clips}` : "the image";
}

/** One frame on a canvas of the size in which it is stored, cut from the strip, with its boxes (places.js). */
function frameCanvas(group, strip, frame, marks) {
  const canvas = make("canvas", { width: group.width, height: group.height, role: "img", "aria-label": frameName(group, frame) });
  const cut = () => {
    canvas.getContext("2d").drawImage(strip, frame * group.width, 0, group.width, group.height, 0, 0, group.width, group.height);
    drawMarks(canvas, marks);
  };
  if (strip.complete) cut();
  else strip.addEventListener("load", cut);
  return canvas;
}

/** A frame over the page; its neighbours in this order follow with the arrow keys, or play at the clip's pace. */
function enlargeFrame(group, order, strip, frames, place) {
  const holder = make("div", { class: "large-frame" });
  const caption = make("output", { "aria-live": "polite" });
  const turn = (by) => {
    place = (place + by + frames.length) % frames.length;
    const time = timeAt(group, frames, place);
    holder.replaceChildren(frameCanvas(group, strip, frames[place], frameMarks(group, order, frames[place], time)));
    caption.textContent = [frameName(group, frames[place]), clock(time)].filter(Boolean).join(" · ");
  };
  const button = (text, by) => make("button", { type: "button", click: () => turn(by) }, text);
  const pace = paceOf(group.timestamps);
  let timer = 0;
  const play = make("button", { type: "button", click: () => {
    if (timer) clearInterval(timer);
    timer = timer ? 0 : setInterval(turn, pace, 1);
    play.textContent = timer ? "Pause" : "Play";
  } }, "Play");
  const dialog = showLarge(frameName(group, frames[place]), holder,
    make("p", { class: "control" }, frames.length > 1 ? [button("← Previous", -1), play, button("Next →", 1)] : "", caption));
  dialog.addEventListener("close", () => clearInterval(timer));
  dialog.addEventListener("keydown", (event) => {
    if (frames.length > 1 && event.key === "ArrowLeft") turn(-1);
    if (frames.length > 1 && event.key === "ArrowRight") turn(1);
  });
  turn(0);
}

/** Milliseconds between frames that are shown one after the other: as many as lie between them, within what an eye follows. */
function paceOf(timestamps) {
  const times = timestamps.filter((time) => time !== null);
  const steps = times.slice(1).map((time, i) => time - times[i]).filter((step) => step > 0); // each clip begins at 0 again
  return Math.max(100, Math.min(1000, (1000 * steps.reduce((sum, step) => sum + step, 0)) / steps.length || 250));
}

/** The time that the model is told of a place: a contrast that leaves frames out keeps each frame's own. */
const timeAt = (group, frames, place) => group.timestamps[frames.length < group.count ? frames[place] : place];

const clock = (time) => (time === null || time === undefined ? "" : `${time.toFixed(time < 100 ? 1 : 0)} s`);

/** Frames cut from the strip, clip by clip. The bar below each grows stronger with the frame's place in its clip. */
function tiles(group, order) {
  if (group.media === "text") return make("p", { class: "quiet" }, "A question without pictures.");
  if (!group.strip) return make("p", { class: "quiet" }, "The frames of this question are not in the run folder.");
  const frames = order === "shuffled" && group.permutation ? group.permutation : Array.from({ length: group.count }, (_, i) => i);
  if (!frames.length) return make("p", { class: "quiet" }, "The question alone, without its clip.");
  const picture = new Image();
  picture.src = group.strip;
  const still = partOf(group, 0).count === 1;
  const list = make("ol", { class: "tiles" }, frames.flatMap((frame, place) => {
    const part = partOf(group, frame);
    const bar = make("span", { class: "place" });
    bar.style.opacity = String(0.12 + (0.88 * part.place) / Math.max(1, part.count - 1));
    const button = make("button", { type: "button", class: "frame", title: "Show larger", click: () => enlargeFrame(group, order, picture, frames, place) },
      frameCanvas(group, picture, frame, frameMarks(group, order, frame, timeAt(group, frames, place))));
    const tile = make("li", { class: "tile" }, button, still ? "" : bar,
      still ? (part.clips > 1 ? make("span", { class: "time" }, frameName(group, frame)) : "")
        : make("span", { class: "time" }, clock(timeAt(group, frames, place)), make("em", {}, ` f${part.place + 1}`)));
    tile.dataset.frame = String(frame);
    const begins = part.clips > 1 && !still && (!place || partOf(group, frames[place - 1]).clip !== part.clip);
    return begins ? [make("li", { class: "which" }, `Clip ${part.clip + 1} of ${part.clips}`), tile] : [tile];
  }));
  // Half of the page has room for four frames in which a reader sees something, or for eight as small as the lab's.
  const columns = Math.min(frames.length, group.shuffled.length && group.width > SMALL_FRAME ? 4 : 8);
  list.style.setProperty("--columns", String(columns));
  list.style.setProperty("--columns-narrow", String(Math.min(columns, group.width > SMALL_FRAME ? 2 : 4)));
  list.style.maxWidth = `${columns * Math.max(148, still ? Math.max(280, group.width) : 0)}px`;
  return list;
}
