// The page: who it is, what is asked next, and what happens to votes.

import { asked, enter, Kept, Outbox, Refused } from "../shared/api.js";
import { ItemView } from "./item.js";
import { element } from "../shared/text.js";
import { choose, current } from "../shared/language.js";
import { say } from "./words.js";

const part = (name) => document.getElementById(name);
const main = part("main");
let state = null; // what the server last said: person, store, progress, item
let view = null;
let outbox = null;
let draft = null;
let before = null; // the number of the vote that is being changed

/** Show a line above everything; one of the kind `kept` stays for a while, whatever is shown below. */
function notice(text, kind = "") {
  const box = part("notice");
  if (kind.includes("kept")) setTimeout(() => box.textContent === text && notice(""), 8000);
  box.hidden = !text;
  box.textContent = text;
  box.className = `notice ${kind}`;
}

/** Take the line away, unless it is one that stays for a while. */
const quiet = () => part("notice").classList.contains("kept") || notice("");

function announce(text, aloud = false) {
  part("said").textContent = text;
  if (aloud) {
    notice(text);
    setTimeout(() => part("notice").textContent === text && notice(""), 3000);
  }
}

/** Said with each request: the cookie alone may be someone else's by now, whose link was opened in another tab. */
const me = () => ({ person: state.person });

const wordFor = (problem) => (problem.name === "person" ? say("person", problem.person, state.person) : ["offline", "full", "often", "store"].includes(problem.name) ? say(problem.name) : problem.message);

/** The line for a request that is tried again. */
const waiting = (problem) => (problem.name === "person" ? wordFor(problem) : say("waiting", wordFor(problem)));

function frame() {
  const { done, total } = state.progress;
  const bar = part("progress");
  bar.hidden = Boolean(state.live);
  bar.setAttribute("aria-valuemax", total);
  bar.setAttribute("aria-valuenow", done);
  bar.firstElementChild.style.width = `${total ? (100 * done) / total : 0}%`;
  part("count").textContent = state.live ? "" : say("of", done, total);
  bar.setAttribute("aria-label", say("of", done, total));
  part("person").textContent = state.person;
}

function labels() {
  const other = current() === "ko" ? "en" : "ko";
  part("language").textContent = other === "ko" ? "한국어" : "English";
  part("language").lang = other;
  part("help").setAttribute("aria-label", say("keysTitle"));
  const rows = say("keys").map(([key, what]) => element("div", {}, element("dt", {}, element("kbd", {}, key)), element("dd", {}, what)));
  const close = element("button", { type: "button", onclick: () => part("keys").close() }, say("close"));
  part("keys").replaceChildren(element("h2", { id: "keys-title" }, say("keysTitle")), element("dl", {}, ...rows), close);
}

function show(item, earlier = false) {
  frame();
  window.scrollTo(0, 0);
  if (!item) return finished();
  const kept = draft.get(null);
  const given = !earlier && kept?.item === item.id ? { ...item, vote: kept } : item;
  view = new ItemView(given, {
    earlier, onVote: (vote) => send(vote), onBefore: () => goBack(), onLeave: () => load(),
    onDraft: (what) => earlier || draft.set(what), onSaid: announce,
  });
  main.replaceChildren(view.box);
  view.shown();
  main.focus({ preventScroll: true });
}

function finished() {
  view = null;
  const { done, total, skipped } = state.progress;
  const back = element("button", { type: "button", id: "back", onclick: () => goBack() }, say("goBack"));
  main.replaceChildren(element("section", { className: "end-page" }, element("h1", {}, say("done")), element("p", {}, say("doneMore", done, total, skipped)), done + skipped ? back : null));
}

async function send(vote) {
  view.wait(true);
  outbox.add(vote);
  await delivered(await outbox.flush());
}

/** After votes were sent: what the server answered, or a new question where it refused them. */
async function delivered(answer) {
  before = null;
  draft.set(null);
  quiet();
  if (!answer) return load();
  state = { ...state, ...answer };
  if (state.live) return live.voted(answer);
  show(state.item);
}

async function goBack() {
  let found;
  try {
    found = await asked(`/api/before?${new URLSearchParams({ ...me(), ...(before === null ? {} : { before }) })}`);
  } catch (problem) {
    return announce(wordFor(problem), true);
  }
  if (!found.item) return announce(say("nothingToUndo"), true);
  before = found.number;
  show(found.item, true);
}

let live = null;

async function load() {
  before = null;
  let tries = 0;
  for (;;) {
    try {
      state = await asked(`/api/next${state ? `?${new URLSearchParams(me())}` : ""}`);
      break;
    } catch (problem) {
      if (problem instanceof Refused && ["token", "host"].includes(problem.name)) return stranger(problem.name);
      notice(waiting(problem), "bad");
      await new Promise((done) => setTimeout(done, 1000 * Math.min(15, 2 ** tries++)));
    }
  }
  quiet();
  outbox ??= new Outbox(state.store, state.person, "/api/vote",
    (problem) => (["token", "host"].includes(problem.name) ? notice(say(problem.name), "bad") : notice(waiting(problem), "bad waiting")),
    (problem) => notice(["gone", "used"].includes(problem.name) ? say(problem.name) : say("refused", problem.message), "bad kept"));
  draft ??= new Kept("draft", state.store, state.person);
  if (outbox.votes.length) return delivered(await outbox.flush());
  if (state.live) {
    const { Live } = await import("./chat.js");
    live ??= new Live({ main, frame, notice, announce, send, wordFor, me, setView: (shown) => (view = shown), state: () => state });
    frame();
    return live.show();
  }
  show(state.item);
}

function stranger(name) {
  view = null;
  main.replaceChildren(element("section", { className: "end-page" }, element("h1", {}, "Leyden"), element("p", {}, say(name))));
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("textarea, input");
  if (part("keys").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && view && !event.isComposing) return event.preventDefault(), view.submit();
  if (event.key === "Escape" && typing) return typing.blur(), main.focus({ preventScroll: true });
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.key === "?") return event.preventDefault(), part("keys").showModal();
  if (view ? view.key(event) : event.code === "KeyZ" && state && !state.live && (goBack(), true)) event.preventDefault();
});
part("help").addEventListener("click", () => part("keys").showModal());
part("language").addEventListener("click", () => {
  choose(current() === "ko" ? "en" : "ko");
  labels();
  if (!state) return;
  frame();
  if (!view || state.live) return state.live ? live.show() : finished();
  const kept = view.draft;
  const { earlier } = view.how;
  draft.set(earlier ? draft.get(null) : kept);
  show({ ...view.item, vote: kept }, earlier);
});
addEventListener("resize", () => view?.shown());

choose(current());
labels();
main.replaceChildren(element("p", { className: "end-page soft" }, say("noItem")));
try {
  await enter();
  await load();
} catch (problem) {
  stranger(problem.name === "host" ? "host" : "token");
}
