// Clips as a browser plays them: whole, or frame by frame in another order.

/** The address of a clip that the server plays: {upload} or {manifest, row}. */
function clipAddress(clip) {
  const address = new URL("/api/clip", location.origin);
  for (const [name, value] of Object.entries(clip)) address.searchParams.set(name, value);
  return address.href;
}

const unplayable = () => make("p", { class: "quiet" }, "This browser does not play the file. The model may still read it.");

/** A clip as a browser plays it, or a word of why it does not. A folder of frames (`frames` of its row) is shown frame by frame. */
function player(clip, isImage, row = {}) {
  if (row.frames) {
    const { count, fps } = row.frames;
    const times = Array.from({ length: count }, (_, i) => i / fps).filter((time) => time >= (row.start ?? 0) && time < (row.end ?? Infinity));
    return framePlayer(clip, times, 1000 / fps, row.frames);
  }
  const times = row.start || row.end ? `#t=${row.start ?? 0}${row.end ? `,${row.end}` : ""}` : "";
  const failed = () => node.replaceChildren(unplayable());
  const node = make("div", { class: "player" }, isImage
    ? make("img", { src: clipAddress(clip), alt: "the image", error: failed })
    : make("video", { src: clipAddress(clip) + times, controls: true, muted: true, playsinline: true, preload: "metadata", error: failed }));
  return node;
}

/** Frames of a clip at their times, one after the other: of a file that seeks, or the pictures of a folder (`frames`). */
function framePlayer(clip, times, pace, frames = null) {
  const failed = () => node.replaceChildren(unplayable());
  const picture = (time) => clipAddress({ ...clip, frame: Math.max(0, Math.min(frames.count - 1, Math.round(time * frames.fps))) });
  const screen = frames
    ? make("img", { src: picture(times[0] ?? 0), alt: "a frame", error: failed })
    // An address of its own: a browser lets one request for a file wait for the other.
    : make("video", { src: clipAddress({ ...clip, shown: "frames" }), muted: true, playsinline: true, preload: "auto", error: failed });
  const said = make("output", { class: "quiet" });
  const name = frames ? "Play the frames" : "Play in this order";
  let at = -1;
  let timer = 0;
  const step = () => {
    if (!node.isConnected) { clearInterval(timer); return; }
    at = (at + 1) % times.length;
    if (frames) screen.src = picture(times[at]); else screen.currentTime = times[at];
    said.textContent = ` ${show(at + 1)} of ${show(times.length)}: ${clock(times[at])}`;
  };
  const play = make("button", { type: "button", click: () => {
    if (timer) { clearInterval(timer); timer = 0; } else { step(); timer = setInterval(step, pace); }
    play.textContent = timer ? "Pause" : name;
  } }, name);
  const node = make("div", { class: "player" }, screen, make("p", { class: "control" }, play, said));
  return node;
}

/** The clip of a recorded group above its frames, in order or as the contrast shows it. */
function groupClip(group, order) {
  const { clip } = group;
  if (!clip || group.media === "image") return "";
  const place = { manifest: clip.manifest, row: clip.row };
  if (order === "ordered") return player(place, false, clip);
  const times = group.timestamps.filter((time) => time !== null);
  if (!group.permutation?.length || times.length < group.count) return "";
  const pace = Math.max(120, Math.min(1000, (1000 * (times[times.length - 1] - times[0])) / (times.length - 1) || 300));
  return framePlayer(place, group.permutation.map((frame) => (clip.start ?? 0) + times[frame]), pace, clip.frames);
}
