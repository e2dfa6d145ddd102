// Clips as a browser plays them: whole, or frame by frame in another order.

/** The address of a clip that the server plays: {upload} or {manifest, row}. */
function clipAddress(clip) {
  const address = new URL("/api/clip", location.origin);
  for (const [name, value] of Object.entries(clip)) address.searchParams.set(name, value);
  return address.href;
}

const BEGINNING = 0.001; // seconds: some browsers draw no frame of a clip before it plays unless they are sent to one

const unplayable = () => make("p", { class: "quiet" }, "This browser does not play the file. The model may still read it.");

/** A clip as a browser plays it, or a word of why it does not; of a row with several `files` the first. */
function player(clip, isImage, row = {}, group = null) {
  const node = firstPlayer(clip, isImage, row, group);
  if (row.files > 1) node.append(make("p", { class: "quiet" }, `The first of ${row.files} ${isImage ? "images" : "clips"}.`));
  return node;
}

/**
 * A folder of frames (`frames` of its row) is shown frame by frame. group: the recorded one, whose frames stand there until
 * the clip's own have come.
 */
function firstPlayer(clip, isImage, row, group) {
  if (row.frames) {
    const { count, fps } = row.frames;
    const times = Array.from({ length: count }, (_, i) => i / fps).filter((time) => time >= (row.start ?? 0) && time < (row.end ?? Infinity));
    return framePlayer(clip, times, 1000 / fps, row.frames, group);
  }
  const times = `#t=${row.start || BEGINNING}${row.end ? `,${row.end}` : ""}`;
  const failed = () => node.replaceChildren(unplayable());
  const screen = isImage
    ? make("img", { src: clipAddress(clip), alt: "the image", error: failed })
    : make("video", { src: clipAddress(clip) + times, controls: true, muted: true, playsinline: true, preload: "metadata", error: failed });
  const node = make("div", { class: "player" }, screen);
  if (group) standIn(group, 0, screen, "loadeddata");
  return node;
}

/** Gives a screen the shape of a group's frames, and a video one of them to show until the `event` that it has its own. */
function standIn(group, frame, screen, event) {
  screen.style.aspectRatio = `${group.width} / ${group.height}`;
  if (!group.strip || screen.tagName !== "VIDEO") return;
  let address = "";
  let needed = true;
  const strip = new Image();
  strip.addEventListener("load", () => frameCanvas(group, strip, frame, []).toBlob((picture) => {
    if (needed && picture) screen.poster = address = URL.createObjectURL(picture);
  }));
  strip.src = group.strip;
  screen.addEventListener(event, () => {
    needed = false;
    screen.removeAttribute("poster");
    URL.revokeObjectURL(address);
  }, { once: true });
}

/**
 * Frames of a clip at their times, one after the other: of a file that seeks, or the pictures of a folder (`frames`).
 * group: as of `player`, whose frames are those of these times by its permutation.
 */
function framePlayer(clip, times, pace, frames = null, group = null) {
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
  screen.addEventListener("loadedmetadata", () => { if (at < 0) screen.currentTime = times[0]; });
  if (group) standIn(group, group.permutation?.[0] ?? 0, screen, "seeked");
  return node;
}

/** The clip of a recorded group above its frames, in order or as the contrast shows it. */
function groupClip(group, order) {
  const { clip } = group;
  if (!clip || group.media === "image") return "";
  const place = { manifest: clip.manifest, row: clip.row };
  if (order === "ordered") return player(place, false, clip, clip.files > 1 ? null : group);
  const times = group.timestamps.filter((time) => time !== null);
  if (!group.permutation?.length || times.length < group.count || clip.files > 1) return "";
  const pace = Math.max(120, Math.min(1000, (1000 * (times[times.length - 1] - times[0])) / (times.length - 1) || 300));
  return framePlayer(place, group.permutation.map((frame) => (clip.start ?? 0) + times[frame]), pace, clip.frames, group);
}
