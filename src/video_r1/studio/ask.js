// Questions about one clip: in order, and beside it with other orders of the frames.

const ORDER_TITLES = { ordered: "Frames in order", ...CONTRASTS };
const CARDS_SHOWN = 2;
const CHECKED = ["shuffled", "reversed", "frozen", "blind"];

const IMAGE_NAME = /\.(jpe?g|jpe|png|webp|bmp|tiff?|ppm|avif|gif)$/i;

function field(id, label, node, hint = "") {
  node.id = id;
  return make("div", { class: "field" }, make("label", { for: id }, label), node, hint ? make("small", {}, hint) : "");
}

function askView(view, [manifest, row]) {
  header("Ask", make("p", { class: "lead" }, "One question, asked with the frames in order and in other orders. If the answers survive shuffling, the model is not using frame order."));
  const checkpoint = make("select", {});
  const engine = make("input", { type: "text", placeholder: "http://127.0.0.1:8000/v1", autocomplete: "off" });
  const served = make("input", { type: "text", placeholder: "the one that it serves", autocomplete: "off" });
  const manifests = make("select", {}, make("option", { value: "" }, "a file of mine"));
  const file = make("input", { type: "file", accept: "video/*,image/*" });
  const words = make("input", { type: "search", placeholder: "words of a question" });
  const rows = make("select", { size: 6, "aria-label": "Question of the manifest" });
  const question = make("textarea", { rows: 2, placeholder: "Which way does the ball roll?" });
  const options = make("textarea", { rows: 5, placeholder: "one option a line; none: a free answer" });
  const type = make("select", {}, make("option", { value: "" }, "by the options"));
  const answer = make("input", { type: "text", autocomplete: "off" });
  const samples = make("input", { type: "number", min: 1, max: 64, value: 8 });
  const temperature = make("input", { type: "number", min: 0, max: 2, step: 0.1, placeholder: "1" });
  const tokens = make("input", { type: "number", min: 1, max: 16384, value: 512 });
  const contrasts = make("div", { class: "checks", role: "group", "aria-label": "Other orders" });
  const look = make("input", { type: "checkbox", id: "ask-look" });
  const preview = make("div", {});
  const inManifest = make("div", {}, field("ask-words", "Find", words), rows);
  const ownFile = field("ask-file", "File", file, "or drop one here; it is kept by this server until it ends");
  const said = make("p", { class: "state-line", role: "status" });
  const results = make("div", {});
  const go = make("button", { type: "button", class: "primary", click: () => (running ? running.abort() : start()) }, "Ask");
  const addButton = make("button", { type: "button", click: () => keep() }, "Add to manifest");
  let clip = null;
  let isImage = false;
  let shownRows = [];
  let running = null;

  const engineFields = make("details", {}, make("summary", {}, "an engine's address instead"),
    field("ask-engine", "Address", engine, "an OpenAI-compatible endpoint has a path, such as /v1; without one it is a server of video-r1 serve, with the checkpoint above"),
    field("ask-served", "Model", served, "its name, where an endpoint serves several"));
  const asking = make("div", { class: "asking" },
    make("section", { class: "panel", "aria-label": "Model and clip" },
      field("ask-checkpoint", "Checkpoint", checkpoint), engineFields,
      field("ask-manifest", "Clip from", manifests), inManifest, ownFile, preview),
    make("section", { class: "panel", "aria-label": "What is asked" },
      field("ask-question", "Question", question), field("ask-options", "Options", options),
      make("div", { class: "beside" }, field("ask-type", "Type", type), field("ask-answer", "Right answer", answer, "if you know it")),
      make("div", { class: "field" }, make("span", {}, "Beside the clip's own order"), contrasts),
      make("div", { class: "field" }, make("div", { class: "checks" }, make("label", { for: "ask-look" }, look, "the model may look at a stretch of the clip again"))),
      make("div", { class: "beside" }, field("ask-samples", "Answers to each", samples), field("ask-temperature", "Temperature", temperature), field("ask-tokens", "Tokens at most", tokens)),
      make("p", { class: "control" }, go, addButton, said)));
  document.getElementById("main").replaceChildren(asking, results);
  // Enter asks; in the question, Shift and Enter begin a new line.
  asking.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.target === options || event.target === words || !event.target.matches("textarea, input:not([type=file])")) return;
    event.preventDefault();
    if (!running) start();
  });

  function choose(chosen, image, window) {
    if (JSON.stringify(chosen) !== JSON.stringify(clip)) { // answers about another clip go
      running?.abort();
      results.replaceChildren();
    }
    clip = chosen;
    isImage = image;
    const text = window?.media === "text";
    contrasts.querySelectorAll("input").forEach((box) => { box.disabled = text || (image && box.value !== "blind"); });
    look.disabled = text;
    for (const node of [contrasts, look]) node.closest(".field").hidden = text;
    preview.replaceChildren(clip ? player(clip, image, window) : "");
  }

  /** The row that is asked about, where the list has it. */
  const select = () => { rows.selectedIndex = clip ? shownRows.findIndex((item) => item.row === clip.row) : -1; };

  function take(item) {
    choose({ manifest: manifests.value, row: item.row }, item.media === "image", item);
    select();
    question.value = item.problem;
    options.value = item.options.join("\n");
    type.value = [...type.options].some((option) => option.value === item.type) ? item.type : "";
    answer.value = item.answer;
  }

  async function find(at = 0) {
    const name = manifests.value;
    try {
      const found = await ask("/api/rows", { manifest: name, words: words.value, at });
      if (!view.open || manifests.value !== name) return;
      shownRows = found.shown;
      rows.replaceChildren(...shownRows.map((item, i) => make("option", { value: i }, `${item.row + 1} · ${item.problem.slice(0, 90)}`)));
      select();
      if (!shownRows.length && found.more) setTimeout(find, 500, at);
      else if (!shownRows.length && found.next) setTimeout(find, 0, found.next);
      else if (!shownRows.length) rows.replaceChildren(make("option", { disabled: true }, "no row has these words"));
      trouble("");
    } catch (error) { trouble(error.message); }
  }

  function source() {
    inManifest.hidden = !manifests.value;
    ownFile.hidden = Boolean(manifests.value);
    choose(null, false);
    if (manifests.value) find();
  }
  manifests.addEventListener("change", source);
  words.addEventListener("input", () => find());
  rows.addEventListener("change", () => take(shownRows[Number(rows.value)]));
  file.addEventListener("change", () => { if (file.files[0]) send(file.files[0]); });
  for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    asking.addEventListener(name, (event) => { event.preventDefault(); asking.classList.toggle("dropping", over); });
  }
  asking.addEventListener("drop", ({ dataTransfer }) => {
    if (!dataTransfer.files.length) return;
    manifests.value = "";
    source();
    send(dataTransfer.files[0]);
  });

  async function send(chosen) {
    say(`Sending ${chosen.name} …`);
    try {
      const answered = await fetch(`/api/upload?name=${encodeURIComponent(chosen.name)}`, { method: "POST", body: chosen, headers: { "X-Video-R1": "1" } });
      const told = await answered.json();
      if (!answered.ok) throw new Error(told.error);
      choose({ upload: told.upload }, IMAGE_NAME.test(told.upload) && !told.upload.endsWith(".gif"));
      say("");
    } catch (error) { say(error.message, true); }
  }

  function say(text, bad = false) {
    said.classList.toggle("bad", bad);
    said.textContent = text;
  }

  const asked = () => ({
    checkpoint: checkpoint.value, engine: engineFields.open ? engine.value : "", model: served.value, clip, question: question.value,
    options: options.value.split("\n"), type: type.value, answer: answer.value,
    contrasts: [...contrasts.querySelectorAll("input:checked:enabled")].map((box) => box.value),
    tools: look.checked && !look.disabled, samples: Number(samples.value), temperature: temperature.value === "" ? null : Number(temperature.value), tokens: Number(tokens.value),
  });

  async function start() {
    if (!clip) { say("Choose a clip first.", true); return; }
    running = new AbortController();
    go.textContent = "Stop";
    const result = answerView(asked());
    results.prepend(result.node);
    say("Asking …");
    try {
      await stream("/api/ask", asked(), (event) => {
        if (event.event === "state") say(`${event.text[0].toUpperCase()}${event.text.slice(1)} …`);
        else if (event.event === "error") throw new Error(event.error);
        else result[event.event]?.(event);
      }, running.signal);
      say("");
    } catch (error) {
      say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
      if (!result.begun()) result.node.remove();
    }
    running = null;
    go.textContent = "Ask";
  }

  async function keep() {
    if (!clip) { say("Choose a clip first.", true); return; }
    try {
      const added = await ask("/api/add", {}, asked());
      say(`Added to ${added.manifest} as ${added.problem_id}.`);
    } catch (error) { say(error.message, true); }
  }

  /** What can be chosen, of which there may be more by and by: a run that trains saves checkpoints. */
  function offer(found) {
    for (const [select, names, first] of [[checkpoint, found.checkpoints, []], [manifests, found.manifests, [...manifests.options].slice(0, 1)]]) {
      const before = select.value;
      select.replaceChildren(...first, ...names.map((name) => make("option", { value: name }, name)));
      if ([...select.options].some((option) => option.value === before)) select.value = before;
    }
  }

  async function begin(found) {
    type.append(...found.types.map((name) => make("option", { value: name }, name)));
    contrasts.replaceChildren(...found.contrasts.map((name) => {
      const box = make("input", { type: "checkbox", value: name, id: `ask-${name}` });
      box.checked = CHECKED.includes(name);
      return make("label", { for: box.id }, box, name);
    }));
    if (manifest && found.manifests.includes(manifest)) manifests.value = manifest;
    else if (found.manifests.length) manifests.value = found.manifests[0];
    source();
    if (row !== undefined) {
      for (let page = null; view.open && !page?.shown.length && page?.more !== false;) {
        page = await ask("/api/rows", { manifest, at: Number(row) });
        if (page.shown.length) take(page.shown[0]);
      }
    }
  }

  let offered = "";
  follow(view, async () => {
    const found = await ask("/api/choices");
    const now = JSON.stringify(found);
    if (!view.open || now === offered) return 5;
    const first = !offered;
    offered = now;
    offer(found);
    if (first) await begin(found);
    return 5;
  });
}

/** What came back for one question, filled as it comes: a column for each order of the frames. */
function answerView(asked) {
  const columns = make("div", { class: "views" });
  const verdict = make("p", { class: "verdict", "aria-live": "polite" });
  const node = make("section", { class: "answers", "aria-label": asked.question },
    make("h3", { class: "question", dir: "auto" }, asked.question), verdict, columns);
  const parts = [];
  return {
    node,
    begun: () => parts.length > 0,
    frames(event) {
      const strip = stripAddress(event.strip);
      node.dataset.decoded = String(event.decoded);
      for (const item of event.views) {
        const group = { ...event, strip, permutation: item.permutation, shuffled: [item] };
        const order = item.order === "ordered" ? "ordered" : "shuffled";
        const text = make("div", { class: "text", dir: "auto" });
        const cards = make("div", { class: "cards" }, make("article", { class: "card" }, text));
        const tally = make("p", { class: "tally" });
        const frames = make("div", {}, tiles(group, order));
        parts.push({ order: item.order, column: order, group, frames, text, cards, tally, written: "" });
        columns.append(make("section", { class: `column ${order}`, "aria-label": ORDER_TITLES[item.order] },
          make("h4", {}, (order === "ordered" && MEDIA_TITLES[event.media]) || ORDER_TITLES[item.order]), frames, tally, cards));
      }
    },
    text(event) {
      const part = parts[event.view];
      part.written += event.text;
      part.text.replaceChildren(...styled(part.written));
    },
    answers(event) {
      const word = event.right ? "right" : "as most in order";
      event.views.forEach((item, i) => {
        const part = parts[i];
        part.group[part.column] = item.completions;
        if (item.completions.some((completion) => completion.place?.boxes)) part.frames.replaceChildren(tiles(part.group, part.column));
        const cards = item.completions.map((completion) => card({ ...completion, advantage: null, total: null,
          rewards: event.right ? { accuracy: Number(completion.counted) } : {} }, [], spanBars(part.group, completion)));
        const rest = cards.slice(CARDS_SHOWN);
        part.cards.replaceChildren(...cards.slice(0, CARDS_SHOWN),
          rest.length ? make("details", {}, make("summary", {}, plural(rest.length, "more answer")), rest) : "");
        part.tally.replaceChildren(shareBar(item.share), make("b", {}, `${item.counted} of ${item.completions.length}`), ` ${word}`,
          make("span", { class: "quiet" }, `, ${percent(item.share.low)} to ${percent(item.share.high)} % · answers: ${counted(item.completions)}`),
          item.gap ? make("span", { class: "gap" }, gainWords(item.gap, `in order − ${part.order}:`)) : "");
      });
      verdict.textContent = event.verdict;
    },
  };
}

const percent = (share) => Math.round(100 * share);

function counted(completions) {
  const counts = new Map();
  for (const { answer } of completions) counts.set(answer || "none", (counts.get(answer || "none") || 0) + 1);
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  return sorted.slice(0, 4).map(([answer, count]) => `${answer.slice(0, 40)}${count > 1 ? ` ×${count}` : ""}`).join(", ") + (sorted.length > 4 ? ", …" : "");
}

/** A share as a point with its interval on a line from 0 to 1. */
function shareBar(share) {
  const [width, edge] = [150, 5];
  const x = (value) => edge + value * (width - 2 * edge);
  return draw("svg", { class: "share", width, height: 16, viewBox: `0 0 ${width} 16`, "aria-hidden": "true" },
    draw("line", { class: "grid", x1: x(0), x2: x(1), y1: 8, y2: 8 }), draw("line", { class: "interval", x1: x(share.low), x2: x(share.high), y1: 8, y2: 8 }),
    draw("circle", { cx: x(share.mean), cy: 8, r: 4 }));
}
