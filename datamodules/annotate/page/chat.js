// A chat with models: the person asks, every model answers, the person ranks, and the best answer goes on.

import { ask, asked, linesOf } from "../shared/api.js";
import { conversation, ItemView } from "./item.js";
import { element, formatted, languageOf } from "../shared/text.js";
import { say } from "./words.js";

const LETTERS = "ABCDEFGH";

export class Live {
  constructor(page) {
    this.page = page;
    this.told = "";
  }

  /** The conversation as far as the server knows it. */
  show() {
    const { messages, item } = this.page.state();
    this.page.frame();
    this.page.setView(null);
    if (item) return this.#rank(item);
    const talk = conversation(messages, true);
    const note = this.told ? element("p", { className: "banner" }, this.told) : null;
    this.told = "";
    const hello = messages.some((turn) => turn.role !== "system") ? null : element("p", { className: "hello" }, say("hello"));
    const box = element("div", { className: "item" }, talk.box, hello, note, this.#askBox(messages.length > 0));
    this.page.main.replaceChildren(box);
    talk.measure();
    window.scrollTo(0, document.body.scrollHeight);
    this.input.focus({ preventScroll: true });
  }

  #askBox(begun) {
    this.input = element("textarea", { id: "ask", rows: "1", maxlength: "20000", placeholder: say("askHint"), "aria-label": say("askHint") });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) return event.preventDefault(), this.#send();
    });
    const send = element("button", { type: "button", id: "send", className: "main", onclick: () => this.#send() }, say("send"));
    const anew = element("button", { type: "button", id: "anew", onclick: () => this.#anew() }, say("anew"));
    return element("div", { className: "dock" }, element("div", { className: "inner ask" }, begun ? anew : null, this.input, send));
  }

  async #anew() {
    try {
      Object.assign(this.page.state(), await asked("/api/new", this.page.me()));
    } catch (problem) {
      return this.page.announce(this.page.wordFor(problem), true);
    }
    this.show();
  }

  async #send() {
    const text = this.input.value.trim();
    if (!text) return;
    const talk = conversation([...this.page.state().messages, { role: "user", content: text }], true);
    const grid = element("section", { className: "answers", "aria-label": say("answers"), "aria-busy": "true" });
    this.page.main.replaceChildren(element("div", { className: "item" }, talk.box, grid));
    talk.measure();
    try {
      const answer = await ask("/api/ask", { text, ...this.page.me() });
      const result = await this.#read(answer.body, grid);
      if (!result) throw new Error(say("offline"));
      if (result.ended === "busy") throw new Error(say("busy"));
      Object.assign(this.page.state(), result);
      this.told = result.ended ? say(result.ended === "same" ? "allSame" : "allFailed") : "";
      this.show();
      if (result.ended === "failed") this.input.value = text;
    } catch (problem) {
      this.show();
      if (this.input) this.input.value = text;
      this.page.announce(problem.name === "Error" ? problem.message : this.page.wordFor(problem), true);
    }
  }

  /** Show what models write while they do; gives the last line. */
  async #read(body, grid) {
    const texts = [];
    const boxes = [];
    let last = null;
    for await (const line of linesOf(body)) {
      if (line.slots) {
        grid.classList.add(`of-${line.slots}`);
        for (let slot = 0; slot < line.slots; slot += 1) {
          texts.push("");
          boxes.push(element("div", { className: "text writing" }));
          grid.append(element("article", { className: "card" }, element("header", {}, element("span", { className: "chip" }, LETTERS[slot])), boxes[slot]));
        }
        grid.scrollIntoView({ block: "nearest" });
      } else if (line.slot !== undefined) {
        if (line.failed) boxes[line.slot].replaceChildren(element("p", { className: "failed" }, say("oneFailed")));
        else {
          texts[line.slot] += line.text;
          boxes[line.slot].lang = languageOf(texts[line.slot]) ?? "";
          boxes[line.slot].replaceChildren(formatted(texts[line.slot]));
        }
        boxes[line.slot].classList.toggle("writing", !line.failed);
      } else last = line;
    }
    return last;
  }

  #rank(item) {
    const talk = conversation(item.messages, true);
    const view = new ItemView(item, { isChat: true, onVote: (vote) => this.page.send(vote), onBefore: () => {}, onSaid: this.page.announce });
    view.box.prepend(talk.box);
    this.page.main.replaceChildren(view.box);
    this.page.setView(view);
    view.shown();
    talk.measure();
    view.focus(view.keys[0]);
    this.asked = item.messages.length;
  }

  voted() {
    const { messages } = this.page.state();
    this.told = messages.length > this.asked ? "" : say("takenBack");
    this.show();
  }
}
