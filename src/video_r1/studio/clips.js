// Clips as a browser plays them: whole, or frame by frame in another order.

/** The address of a clip that the server plays: {upload} or {manifest, row}. */
function clipAddress(clip) {
  const address = new URL("/api/clip", location.origin);
  for (const [name, value] of Object.entries(clip)) address.searchParams.set(name, value);
  return address.href;
}

const unplayable = () => make("p", { class: "quiet" }, "This browser does not play the file. The model may still read it.");

/** A clip as a browser plays it, or a word of why it does not. */
function player(clip, isImage, window = {}) {
  const times = window.start || window.end ? `#t=${window.start ?? 0}${window.end ? `,${window.end}` : ""}` : "";
  const failed = () => node.replaceChildren(unplayable());
  const node = make("div", { class: "player" }, isImage
    ? make("img", { src: clipAddress(clip), alt: "the image", error: failed })
    : make("video", { src: clipAddress(clip) + times, controls: true, muted: true, playsinline: true, preload: "metadata", error: failed }));
  return node;
}

/** The same file, shown at the times of its sampled frames, one after the other, in the order of a contrast. */
function framePlayer(clip, times, pace) {
  const failed = () => node.replaceChildren(unplayable());
  const video = make("video", { src: clipAddress(clip), muted: true, playsinline: true, preload: "auto", error: failed });
  const said = make("output", { class: "quiet" });
  let at = -1;
  let timer = 0;
  const step = () => {
    if (!node.isConnected) { clearInterval(timer); return; }
    at = (at + 1) % times.length;
    video.currentTime = times[at];
    said.textContent = ` ${show(at + 1)} of ${show(times.length)}: ${clock(times[at])}`;
  };
  const play = make("button", { type: "button", click: () => {
    if (timer) { clearInterval(timer); timer = 0; } else { step(); timer = setInterval(step, pace); }
    play.textContent = timer ? "Pause" : "Play in this order";
  } }, "Play in this order");
  const node = make("div", { class: "player" }, video, make("p", { class: "control" }, play, said));
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
  return framePlayer(place, group.permutation.map((frame) => (clip.start ?? 0) + times[frame]), pace);
}
