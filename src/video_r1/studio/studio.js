// The page's frame: asking the server, which view is open, and what every view begins with.

/** The answer of an address as JSON. Throws an Error with what the server said. */
async function ask(path, query = {}, body = null) {
  const address = new URL(path, location.origin);
  for (const [name, value] of Object.entries(query)) for (const each of [value].flat()) address.searchParams.append(name, each);
  const request = body ? { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json", "X-Video-R1": "1" } } : {};
  let answer;
  try {
    answer = await fetch(address, request);
  } catch {
    throw new Error("The server does not answer: is video-r1 studio still running?");
  }
  const said = (answer.headers.get("content-type") || "").includes("json") ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(said.error || `the server answered ${answer.status}`);
  return said;
}

/** Posts and gives the server-sent events of the answer to `hear`. Throws the server's error, and what `hear` throws. */
async function stream(path, body, hear, signal) {
  const answer = await fetch(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json", "X-Video-R1": "1" }, signal });
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error || `the server answered ${answer.status}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) hear(JSON.parse(event.replace(/^data: /, "")));
  }
}

function trouble(message) {
  const node = document.getElementById("trouble");
  node.hidden = !message;
  node.textContent = message || "";
}

const pause = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
const shown = () => (document.hidden ? new Promise((done) => document.addEventListener("visibilitychange", done, { once: true })) : null);

/** Calls `step` for as long as the view is open: again after the seconds that it returns. What fails is said, and tried again. */
async function follow(view, step) {
  while (view.open) {
    let wait = 2;
    try {
      wait = await step();
      trouble("");
    } catch (error) {
      trouble(error.message);
    }
    await pause(wait);
    await shown();
  }
}

const PLACES = [["", "Runs"], ["ask", "Ask"], ["data", "Data"], ["evaluations", "Evaluations"]];

function header(title, ...about) {
  document.title = `${title} · video-r1 studio`;
  const here = location.hash.split("/")[1] ?? "";
  const current = PLACES.some(([name]) => name === here) ? here : ""; // a run is one of the list
  document.getElementById("header").replaceChildren(
    make("p", { class: "over places" }, "video-r1 studio", PLACES.map(([address, name]) => make("a", { href: `#/${address}`, "aria-current": address === current ? "page" : null }, name))),
    make("h1", { dir: "auto" }, title), ...about.filter(Boolean));
}

// A view is a function of the words of an address behind #/, and of {open}, which turns false when it is left.
const VIEWS = { "": listView, run: runView, compare: compareView, ask: askView, data: dataView, evaluations: versusView };
let present = { open: false };

function route() {
  present.open = false;
  present = { open: true };
  trouble("");
  const [name, ...words] = location.hash.replace(/^#\/?/, "").split("/");
  const view = Object.hasOwn(VIEWS, name) ? VIEWS[name] : listView;
  document.getElementById("main").replaceChildren(make("p", { class: "lead" }, "Reading …"));
  view(present, words.map((word) => { try { return decodeURIComponent(word); } catch { return word; } }));
}

addEventListener("hashchange", (event) => {
  if (new URL(event.newURL).hash.startsWith("#/") || !new URL(event.newURL).hash) { route(); scrollTo(0, 0); document.getElementById("main").focus({ preventScroll: true }); }
});
route();
