// Clips as a browser plays them: whole, or frame by frame in another order.

/** The address of a clip that the server plays: {upload} or {manifest, row}. */
function clipAddress(clip) {
  const address = new URL("/api/clip", location.origin);
  for (const [name, value] of Object.entries(clip)) address.searchParams.set(name, value);
  return address.href;
}

const BACKWARDS_FPS = 4; // frames a second of a file that is played backwards
const BEGINNING = 0.001; // seconds: some browsers draw no frame of a clip before it plays unless they are sent to one

const stripAddress = (strip) => URL.createObjectURL(new Blob([Uint8Array.from(atob(strip), (letter) => letter.charCodeAt(0))], { type: "image/jpeg" }));

/** In place of a file that this browser does not play: the frames that a model gets. group: its frames are shown anyway. */
function unplayable(clip, group) {
  const say = (text) => make("p", { class: "quiet" }, `This browser does not play the file. ${text}`);
  if (group) return say("Below are its frames.");
  const node = make("div", {}, say("Decoding its frames …"));
  ask("/api/stills", clip).then((found) => node.replaceChildren(say("These are the frames that a model gets:"),
    tiles({ ...found, strip: stripAddress(found.strip), shuffled: [] }, "ordered")), (error) => node.replaceChildren(say(error.message)));
  return node;
}

/**
 * The clip or image of a row as a browser plays it, or a word of why it does not; several beside each other. group: the
 * recorded one, whose shape the clip has before it has come.
 */
function player(clip, isImage, row = {}, group = null) {
  if (row.media === "text") return "";
  const files = row.files ?? [null];
  return besideEachOther(isImage ? "Image" : "Clip", files.map((frames, i) =>
    filePlayer({ ...clip, ...(i ? { file: i } : {}) }, isImage, row, frames, group)));
}

const besideEachOther = (name, players) => (players.length === 1 ? players[0]
  : make("div", { class: "players" }, players.map((node, i) => make("figure", {}, node, make("figcaption", { class: "quiet" }, `${name} ${i + 1} of ${players.length}`)))));

/** One file. frames: of a folder of them. Folders, and clips that are played backwards, are shown frame by frame. */
function filePlayer(clip, isImage, row, frames, group) {
  const backwards = row.play === "reversed";
  if (frames || backwards) {
    const fps = frames?.fps ?? BACKWARDS_FPS;
    const times = (count) => {
      const all = Array.from({ length: count }, (_, i) => i / fps).filter((time) => time >= (row.start ?? 0) && time < (row.end ?? Infinity));
      return backwards ? all.reverse() : all;
    };
    return framePlayer(clip, frames ? times(frames.count) : (seconds) => times(Math.ceil(seconds * fps)), 1000 / fps, frames, group, playedHow(row));
  }
  const times = `#t=${row.start || BEGINNING}${row.end ? `,${row.end}` : ""}`;
  const failed = () => node.replaceWith(unplayable(clip, group));
  const screen = isImage
    ? make("img", { src: clipAddress(clip), alt: "the image", error: failed })
    : make("video", { src: clipAddress(clip) + times, controls: true, muted: true, playsinline: true, preload: "metadata", error: failed });
  const node = make("div", { class: "player" }, screen);
  holdPlace(screen, group);
  return node;
}

/** Gives a screen the shape of a group's frames, so that nothing moves when the clip comes. */
function holdPlace(screen, group) {
  if (group?.count) screen.style.aspectRatio = `${group.width} / ${group.height}`;
}

/**
 * Frames of a clip at their times, one after the other: of a file that seeks, or the pictures of a folder (`frames`).
 * times: or a function of a file's seconds; how: `playedHow`.
 */
function framePlayer(clip, times, pace, frames, group, how = "") {
  const failed = () => node.replaceWith(unplayable(clip, group));
  const picture = (time) => clipAddress({ ...clip, frame: Math.max(0, Math.min(frames.count - 1, Math.round(time * frames.fps))) });
  const screen = frames
    ? make("img", { src: picture(times[0] ?? 0), alt: "a frame", error: failed })
    // An address of its own: a browser lets one request for a file wait for the other.
    : make("video", { src: clipAddress({ ...clip, shown: "frames" }), muted: true, playsinline: true, preload: "auto", error: failed });
  const said = make("output", { class: "quiet" }, group ? "" : how && ` ${how}`); // a group's facts say it
  const name = how ? "Play backwards" : frames ? "Play the frames" : "Play in this order";
  let at = -1;
  let timer = 0;
  const step = () => {
    if (!node.isConnected) { clearInterval(timer); return; }
    at = (at + 1) % times.length;
    if (frames) screen.src = picture(times[at]); else screen.currentTime = times[at];
    said.textContent = ` ${show(at + 1)} of ${show(times.length)}: ${clock(times[at])}`;
  };
  const play = make("button", { type: "button", disabled: typeof times === "function", click: () => {
    if (timer) { clearInterval(timer); timer = 0; } else { step(); timer = setInterval(step, pace); }
    play.textContent = timer ? "Pause" : name;
  } }, name);
  const node = make("div", { class: "player" }, screen, make("p", { class: "control" }, play, said));
  screen.addEventListener("loadedmetadata", () => {
    if (typeof times === "function") times = times(screen.duration);
    play.disabled = !times.length;
    if (at < 0 && times.length) screen.currentTime = times[0];
  });
  holdPlace(screen, group);
  return node;
}

/** That the row is one of several with this question: how many more there are. */
const oneOfSeveral = (row) => (row.others
  ? make("p", { class: "quiet" }, `This is row ${show(row.row + 1)} of ${row.manifest}; ${plural(row.others, "other row")} may be meant as well.`) : "");

/** The clips of a recorded group above their frames, in order or as the contrast shows them. */
function groupClip(group, order) {
  const { clip } = group;
  if (!clip || clip.media !== "video") return "";
  const place = { manifest: clip.manifest, row: clip.row };
  if (order === "ordered") return [oneOfSeveral(clip), player(place, false, clip, group)];
  const told = group.timestamps.filter((time) => time !== null).length === group.count;
  if (!group.permutation?.length || !told || clip.files.length !== (group.clips?.length || 1)) return "";
  return besideEachOther("Clip", clip.files.map((frames, i) => {
    const isOf = (frame) => partOf(group, frame).clip === i;
    const shown = group.permutation.filter(isOf);
    const own = group.timestamps.filter((_, frame) => isOf(frame));
    const inFile = (time) => (clip.play === "reversed" ? own[0] + own[own.length - 1] - time : time); // the model was told times that count on
    const times = shown.map((frame) => (clip.start ?? 0) + inFile(group.timestamps[frame]));
    const pace = paceOf(own);
    return framePlayer({ ...place, ...(i ? { file: i } : {}) }, times, pace, frames, group);
  }));
}
