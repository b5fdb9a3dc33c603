// The page: what people type, and the answers of one or two models while they are written.

import { ask, asked, enter, Kept, linesOf } from "../shared/api.js";
import { choose, current } from "../shared/language.js";
import { element, plain } from "../shared/text.js";
import { Card } from "./card.js";
import { openSettings } from "./settings.js";
import { isGood, Talk } from "./talk.js";
import { say } from "./words.js";

const part = (name) => document.getElementById(name);
const main = part("main");
const KNOWN = ["offline", "often", "big", "crowded", "token", "host"];
const KEEP_EVERY = 500; // milliseconds, while answers are written
let models = [];
let talk = null;
let cards = new Map(); // answer -> its card
let draft = ""; // what stands in the field, over a redrawing
let editing = false;
const writing = new Map(); // answer -> what stops it

// -- answers ----------------------------------------------------------------------------------------------------------

/** Ask a model for its answer to a turn, and show it while it comes. */
async function write(turn, column) {
  const answer = turn.answers[column];
  const stopping = new AbortController();
  writing.set(answer, stopping);
  let since = 0;
  let kept = performance.now();
  try {
    const number = talk.numbers[column]++;
    const sent = { model: column, number, messages: talk.messages(column, turn), language: current(), ...talk.settings };
    const { body } = await ask("/api/answer", sent, stopping.signal);
    for await (const line of linesOf(body)) {
      if (line.text !== undefined) Object.assign(answer, { text: answer.text + line.text, tokens: line.tokens });
      else if (line.waiting !== undefined) {
        answer.waiting = line.waiting;
        since = performance.now();
      } else if (line.failed !== undefined) Object.assign(answer, { failed: line.failed, reason: "failed" });
      else Object.assign(answer, line);
      cards.get(answer)?.update(scrolled());
      if (performance.now() - kept > KEEP_EVERY) {
        kept = performance.now();
        talk.keep();
      }
    }
    if (!answer.reason) Object.assign(answer, { failed: say("broken"), reason: "failed" });
  } catch (problem) {
    if (stopping.signal.aborted) Object.assign(answer, { reason: "stopped", seconds: since ? (performance.now() - since) / 1000 : 0 });
    else Object.assign(answer, { failed: KNOWN.includes(problem.name) ? say(problem.name) : problem.status ? problem.message : say("broken"), reason: "failed" });
  }
  answer.waiting = 0;
  writing.delete(answer);
  talk.keep();
  cards.get(answer)?.update(scrolled());
  announce(answer.failed === null ? say("answered", models[column].name, say("tokens", answer.tokens)) : `${models[column].name}: ${answer.failed || say("failed")}`);
  buttons();
}

/** What keeps the end of the page in view, where it is there now. */
const scrolled = () => {
  const isAtEnd = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 80;
  return () => isAtEnd && window.scrollTo(0, document.documentElement.scrollHeight);
};

function send(question) {
  talk.ask(question);
  draft = "";
  show();
  writeAll();
}

function writeAll() {
  const turn = talk.turns.at(-1);
  for (const column of models.keys()) write(turn, column);
  buttons();
}

function again(turn, column) {
  if (writing.has(turn.answers[column])) return;
  talk.renew(turn, column);
  write(turn, column);
  show();
}

function stop() {
  for (const stopping of writing.values()) stopping.abort();
}

// -- what is shown ----------------------------------------------------------------------------------------------------

function show() {
  const isAtEnd = scrolled();
  cards = new Map();
  const turns = talk.turns.map((turn, place) => turnBox(turn, place === talk.turns.length - 1));
  const hello = element("p", { className: "hello" }, models.length > 1 ? say("helloTwo", ...models.map(({ name }) => name)) : say("hello"));
  main.replaceChildren(element("div", { className: "item" }, ...(turns.length ? turns : [hello]), dock()));
  buttons();
  grow();
  isAtEnd();
}

function turnBox(turn, isLast) {
  const grid = element("div", { className: `answers of-${models.length}` });
  for (const [column, { name }] of models.entries()) {
    const answer = turn.answers[column];
    const card = new Card(answer, name, { onStop: () => writing.get(answer)?.abort(), onCopy: copy, onAgain: isLast ? () => again(turn, column) : null });
    cards.set(answer, card);
    grid.append(card.box);
  }
  return element("section", { className: "turn-box" }, isLast && editing ? editBox(turn) : questionBox(turn, isLast), grid);
}

function questionBox(turn, isLast) {
  const edit = isLast ? element("button", { type: "button", id: "edit", className: "quiet", "aria-label": say("editLast"), onclick: () => edited(true) }, say("edit")) : null;
  return element("div", { className: "question" }, element("span", { className: "role" }, say("you")), element("div", { className: "asked" }, plain(turn.question)), edit);
}

function editBox(turn) {
  const field = element("textarea", { id: "edited", rows: "2", maxlength: "100000", "aria-label": say("editLast") });
  field.value = turn.question;
  const put = () => {
    const question = field.value.trim();
    if (!question || writing.size) return;
    editing = false;
    talk.turns.pop();
    send(question);
    part("ask").focus();
  };
  field.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) event.preventDefault(), put();
    if (event.key === "Escape") event.preventDefault(), event.stopPropagation(), edited(false);
  });
  const buttonsBox = element("div", { className: "buttons" }, element("button", { type: "button", className: "quiet", onclick: () => edited(false) }, say("cancel")), element("button", { type: "button", id: "put", className: "main", onclick: put }, say("send")));
  return element("div", { className: "question editing" }, element("span", { className: "role" }, say("you")), element("div", { className: "asked" }, field, buttonsBox));
}

function edited(is) {
  if (is && (writing.size || !talk.turns.length)) return;
  editing = is;
  show();
  const field = part(is ? "edited" : "ask");
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

function dock() {
  const field = element("textarea", { id: "ask", rows: "1", maxlength: "100000", placeholder: say("hint"), "aria-label": say("hint") });
  field.value = draft;
  field.addEventListener("input", () => {
    draft = field.value;
    grow();
  });
  field.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) event.preventDefault(), submit();
    if (event.key === "ArrowUp" && !field.value) event.preventDefault(), edited(true);
  });
  const { temperature, top_p, max_new_tokens, seed, system } = talk.settings;
  const summary = say("summary", ...[temperature, top_p, max_new_tokens, seed].map((value) => value.toLocaleString(current(), { useGrouping: false, maximumFractionDigits: 6 })));
  const settings = element("button", { type: "button", id: "set-open", className: "quiet", "aria-haspopup": "dialog", onclick: settingsShown }, element("strong", {}, say("settings")), ` ${summary}${system ? ` · ${say("withSystem")}` : ""}`);
  return element("div", { className: "dock" },
    element("div", { className: "inner ask" }, field,
      element("button", { type: "button", id: "send", className: "main", onclick: submit }, say("send")),
      element("button", { type: "button", id: "stop", onclick: stop }, say("stop"))),
    element("div", { className: "under" }, settings));
}

/** Enter while an input method puts a syllable together belongs to the syllable. Safari tells of it by its number alone. */
const isComposing = (event) => event.isComposing || event.keyCode === 229;

function submit() {
  const question = part("ask").value.trim();
  if (!question || writing.size) return;
  editing = false;
  send(question);
  part("ask").focus();
}

function settingsShown() {
  openSettings(part("settings"), talk.settings, talk.defaults, (settings) => {
    talk.set(settings);
    show();
    part("set-open").focus();
  });
}

/** Which buttons can be pressed now. */
function buttons() {
  const isBusy = writing.size > 0;
  for (const [name, is] of [["send", isBusy], ["stop", !isBusy]]) if (part(name)) part(name).hidden = is;
  if (part("edit")) part("edit").hidden = isBusy;
  part("anew").disabled = !talk.turns.length;
  part("save").disabled = isBusy || !talk.turns.some((turn) => turn.answers.some(isGood));
}

/** Browsers without field-sizing: the field is as high as its text. */
function grow() {
  const field = part("ask");
  if (!field || CSS.supports("field-sizing", "content")) return;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function anew() {
  stop();
  editing = false;
  const before = talk.clear();
  show();
  const back = element("button", { type: "button", id: "back", onclick: () => {
    talk.bringBack(before);
    notice("");
    show();
  } }, say("back"));
  notice(say("cleared"), "", back);
  setTimeout(() => back.isConnected && notice(""), 10000);
  part("ask").focus();
}

function save() {
  if (models.length === 1) return download(0);
  const choices = models.map(({ name }, column) => element("button", { type: "button", disabled: talk.row(column) === null, onclick: () => (part("saving").close(), download(column)) }, name));
  part("saving").replaceChildren(element("h2", { id: "saving-title" }, say("saveTitle")), element("p", {}, say("saveAbout")), element("div", { className: "buttons" }, ...choices), element("div", { className: "buttons" }, element("button", { type: "button", onclick: () => part("saving").close() }, say("cancel"))));
  part("saving").showModal();
}

function download(column) {
  const row = talk.row(column);
  if (row === null) return notice(say("nothing"));
  const address = URL.createObjectURL(new Blob([row], { type: "application/jsonl" }));
  element("a", { href: address, download: `chat-${models[column].name.replace(/[^\p{L}\p{N}._-]+/gu, "-")}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    announce(say("copied"), true);
  } catch {
    announce(say(copiedByHand(text) ? "copied" : "notCopied"), true);
  }
}

/** Pages that come by http from another machine have no clipboard of their own. */
function copiedByHand(text) {
  const field = element("textarea", { className: "unseen", readonly: true });
  const focused = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isDone;
}

function notice(text, kind = "", ...more) {
  const box = part("notice");
  box.hidden = !text;
  box.className = `notice ${kind}`;
  box.replaceChildren(text, ...more);
}

function announce(text, aloud = false) {
  part("said").textContent = text;
  if (!aloud) return;
  notice(text);
  setTimeout(() => part("notice").textContent === text && notice(""), 2500);
}

function labels() {
  const other = current() === "ko" ? "en" : "ko";
  part("language").textContent = other === "ko" ? "한국어" : "English";
  part("language").lang = other;
  part("anew").textContent = say("anew");
  part("save").textContent = say("save");
  part("help").setAttribute("aria-label", say("keysTitle"));
  part("models").textContent = models.map(({ name, parameters }) => `${name} (${short(parameters)})`).join(" · ");
  const rows = say("keys").map(([key, what]) => element("div", {}, element("dt", {}, element("kbd", {}, key)), element("dd", {}, what)));
  part("keys").replaceChildren(element("h2", { id: "keys-title" }, say("keysTitle")), element("dl", {}, ...rows), element("button", { type: "button", onclick: () => part("keys").close() }, say("close")));
}

const short = (parameters) => (parameters >= 1e9 ? `${(parameters / 1e9).toFixed(1)}B` : `${(parameters / 1e6).toFixed(parameters < 1e7 ? 1 : 0)}M`);

function stranger(name) {
  main.replaceChildren(element("section", { className: "end-page" }, element("h1", {}, "Leyden"), element("p", {}, say(name))));
}

// -- the start --------------------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (!talk || isComposing(event) || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && writing.size) return event.preventDefault(), stop();
  const isTyping = event.target.closest?.("textarea, input");
  if (event.key === "?" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) event.preventDefault(), part("keys").showModal();
});
part("help").addEventListener("click", () => part("keys").showModal());
part("anew").addEventListener("click", anew);
part("save").addEventListener("click", save);
part("language").addEventListener("click", () => {
  choose(current() === "ko" ? "en" : "ko");
  labels();
  if (talk) show();
});
addEventListener("pagehide", () => talk?.keep());

choose(current());
labels();
main.replaceChildren(element("p", { className: "end-page soft" }, say("loading")));
try {
  await enter();
  const about = await asked("/api/chat");
  ({ models } = about);
  document.body.classList.toggle("one", models.length === 1);
  const names = models.map(({ name }) => name).join(", ");
  document.title = `${names} · Leyden`;
  talk = new Talk(new Kept("chat", names, about.person), models.length, about.settings);
  labels();
  show();
  window.scrollTo(0, document.documentElement.scrollHeight);
  if (matchMedia("(pointer: fine)").matches) part("ask").focus({ preventScroll: true });
} catch (problem) {
  stranger(["host", "offline"].includes(problem.name) ? problem.name : "token");
}
