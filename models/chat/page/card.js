// An answer on the page, also while it is written.

import { current } from "../shared/language.js";
import { element, formatted, languageOf } from "../shared/text.js";
import { say } from "./words.js";

export class Card {
  /** `how` has onStop, onAgain (null where the answer is not the last) and onCopy. */
  constructor(answer, name, how) {
    Object.assign(this, { answer, name, how, drawn: 0 });
    this.text = element("div", { className: "text" });
    this.note = element("p", { className: "note" });
    this.count = element("span", { className: "soft count" });
    this.copy = element("button", { type: "button", className: "quiet copy", "aria-label": say("copyOf", name), onclick: () => how.onCopy(answer.text) }, say("copy"));
    this.again = element("button", { type: "button", className: "quiet again", "aria-label": say("againOf", name), onclick: () => how.onAgain() }, say("again"));
    this.stop = element("button", { type: "button", className: "quiet stop", "aria-label": say("stopOf", name), onclick: () => how.onStop() }, say("stop"));
    const foot = element("footer", {}, this.count, this.stop, this.copy, this.again);
    this.box = element("article", { className: "card", "aria-label": name }, element("h2", { className: "name" }, name), this.text, this.note, foot);
    this.draw();
  }

  /** Draw what is new with the next frame. */
  update(then = () => {}) {
    this.drawn ||= requestAnimationFrame(() => {
      this.draw();
      then();
    });
  }

  draw() {
    cancelAnimationFrame(this.drawn);
    this.drawn = 0;
    const { text, reason, tokens, seconds, waiting, failed } = this.answer;
    const isOpen = !reason;
    const hint = waiting ? say("waiting", waiting) : text ? "" : say("reading");
    this.box.setAttribute("aria-busy", String(isOpen));
    this.text.classList.toggle("writing", isOpen && !waiting);
    this.text.lang = languageOf(text) ?? "";
    this.text.replaceChildren(text ? formatted(text) : element("p", { className: "soft" }, isOpen ? hint : reason === "failed" ? "" : say("empty")));
    this.text.hidden = !text && reason === "failed";
    const notes = this.notes();
    this.note.hidden = !notes;
    this.note.textContent = notes;
    this.note.classList.toggle("failed", failed !== null);
    const speed = reason && seconds > 0 && tokens > 0 ? ` · ${say("speed", (tokens / seconds).toLocaleString(current(), { maximumFractionDigits: 1 }))}` : "";
    this.count.textContent = tokens ? say("tokens", tokens.toLocaleString(current())) + speed : "";
    this.stop.hidden = !isOpen;
    this.copy.hidden = isOpen || !text;
    this.again.hidden = isOpen || !this.how.onAgain;
  }

  notes() {
    const { reason, tokens, dropped, failed } = this.answer;
    if (failed !== null) return failed || say("failed");
    const ended = reason === "length" ? say("length", tokens.toLocaleString(current())) : ["stopped", "positions"].includes(reason) ? say(reason) : "";
    return [dropped ? say("dropped", dropped) : "", ended].filter(Boolean).join(" · ");
  }
}
