// One item on the page: the conversation, the answers, the ranking below them, and what keys do.

import { draggable } from "./drag.js";
import { Ranking } from "./ranking.js";
import { element, formatted, languageOf, plain } from "../shared/text.js";
import { say } from "./words.js";

const LETTERS = "ABCDEFGH";
const TALL = 460;
let isPlain = false;

/** The text of a turn or an answer, folded where it is long. */
function textBox(text) {
  const box = element("div", { className: "text", lang: languageOf(text) });
  const fill = () => box.replaceChildren(text.trim() ? (isPlain ? plain(text) : formatted(text)) : element("p", { className: "soft" }, say("empty")));
  fill();
  return { box, fill };
}

/** A button that unfolds a text which is taller than it may be. */
function foldable(box) {
  const button = element("button", { type: "button", className: "fold quiet", "aria-expanded": "false", hidden: true }, say("more"));
  const set = (open) => {
    box.classList.toggle("open", open);
    button.setAttribute("aria-expanded", String(open));
    button.textContent = say(open ? "less" : "more");
  };
  const measure = () => {
    const tall = box.scrollHeight > TALL + 60;
    box.classList.toggle("folded", tall);
    button.hidden = !tall;
  };
  button.addEventListener("click", () => set(!box.classList.contains("open")));
  return { button, measure, toggle: () => !button.hidden && set(!box.classList.contains("open")) };
}

/** The turns before the answers. */
export function conversation(messages, isChat = false) {
  const single = messages.length === 1 && !isChat;
  const box = element("section", { className: "prompt", "aria-label": say(single ? "question" : "conversation") });
  const folds = [];
  for (const turn of messages) {
    const { box: text } = textBox(String(turn.content ?? ""));
    const fold = foldable(text);
    folds.push(fold);
    const role = element("span", { className: "role" }, single ? say("question") : say(turn.role));
    box.append(element("div", { className: `turn ${turn.role}` }, role, element("div", { className: "said" }, text, fold.button)));
  }
  return { box, measure: () => folds.forEach((fold) => fold.measure()) };
}

export class ItemView {
  /**
   * @param item as the server gives it
   * @param how what the page does: onSubmit(vote), onSkip(), onBefore(), and `earlier`, whether an old vote is changed
   */
  constructor(item, how) {
    this.item = item;
    this.how = how;
    this.keys = item.answers.map((answer) => answer.key);
    this.ranking = new Ranking(this.keys, item.vote);
    this.busy = false;
    this.cards = new Map();
    this.#build();
    this.update();
  }

  letter(key) {
    return LETTERS[this.keys.indexOf(key)];
  }

  #build() {
    const { answers, messages } = this.item;
    this.asked = how_asked(this.how, messages);
    this.grid = element("section", { className: `answers of-${answers.length}`, "aria-label": say("answers") }, ...answers.map((answer) => this.#card(answer)));
    this.reason = element("textarea", { id: "reason", rows: "1", maxlength: "4000", placeholder: say("reasonHint"), oninput: () => this.changed() });
    this.reason.value = this.item.vote?.reason ?? "";
    const why = element("label", { className: "reason" }, element("span", {}, say("reason")), this.reason);
    this.board = element("div", { className: "board", role: "group", "aria-label": say("ranking") });
    const act = (name, run, kind = "") => element("button", { type: "button", id: name, className: kind, onclick: run }, say(name));
    this.bad = act("allBad", () => this.toggleBad());
    this.next = act("submit", () => this.submit(), "main");
    const buttons = element("div", { className: "actions" }, this.bad, act("skip", () => this.skip()), act("undo", () => this.undo()), this.next);
    const dock = element("div", { className: "dock" }, element("div", { className: "inner" }, this.board, buttons));
    const banner = this.how.earlier
      ? element("p", { className: "banner" }, say("earlier"), " ", element("button", { type: "button", className: "quiet", onclick: () => this.how.onLeave() }, say("leave")))
      : this.item.vote && !Object.keys(this.item.vote.ranks).length && !this.item.vote.all_bad ? element("p", { className: "banner" }, say("again")) : null;
    this.box = element("div", { className: "item" }, banner, this.asked?.box, this.grid, why, dock);
  }

  #card(answer) {
    const letter = this.letter(answer.key);
    const { box, fill } = textBox(answer.text);
    const fold = foldable(box);
    const grip = this.#chip(answer.key);
    const numbers = this.keys.map((_, at) =>
      element("button", { type: "button", className: "number", "aria-pressed": "false", onclick: () => this.rank(answer.key, at + 1, false) }, String(at + 1)));
    const ranks = element("div", { className: "numbers", role: "group", "aria-label": say("rank", letter) }, ...numbers);
    const card = element("article", { className: "card", tabindex: "0", "aria-label": say("answer", letter), "data-key": answer.key },
      element("header", {}, grip, ranks), box, fold.button);
    this.cards.set(answer.key, { card, numbers, fold, fill });
    return card;
  }

  /** A letter that can be dragged into the ranking. */
  #chip(key) {
    const chip = element("button", { type: "button", className: "chip", title: say("drag"), tabindex: "-1", "aria-label": say("answer", this.letter(key)) }, this.letter(key));
    draggable(chip, () => this.board.querySelectorAll(".zone"), (zone) => this.#drop(key, zone), () => this.focus(key));
    return chip;
  }

  #drop(key, zone) {
    if (zone.dataset.tray !== undefined) this.ranking.rank(key, 0);
    else this.ranking.place(key, Number(zone.dataset.tier), zone.dataset.join !== undefined);
    this.changed(key);
  }

  /** Called when it stands on the page: only then are texts known to be long. */
  shown() {
    this.asked?.measure();
    this.cards.forEach(({ fold }) => fold.measure());
  }

  update() {
    for (const [key, { card, numbers }] of this.cards) {
      const rank = this.ranking.rankOf(key);
      card.classList.toggle("ranked", rank !== undefined);
      card.setAttribute("aria-label", say("answer", this.letter(key)) + (rank === undefined ? "" : `, ${say("ranked", this.letter(key), rank)}`));
      numbers.forEach((button, at) => button.setAttribute("aria-pressed", String(at + 1 === rank)));
    }
    this.#drawBoard();
    this.bad.setAttribute("aria-pressed", String(this.ranking.allBad));
    this.next.classList.toggle("ready", this.ranking.canSubmit);
    this.next.setAttribute("aria-disabled", String(!this.ranking.canSubmit || this.busy));
  }

  #drawBoard() {
    const tiers = this.ranking.tiers;
    const gap = (tier) => element("span", { className: "zone gap", "data-tier": String(tier) });
    const made = tiers.flatMap((keys, tier) => [
      gap(tier),
      element("span", { className: "zone tier", "data-tier": String(tier), "data-join": true, title: keys.length > 1 ? say("tie") : undefined },
        element("span", { className: "place" }, String(tier + 1)), ...keys.map((key) => this.#chip(key))),
    ]);
    if (tiers.length) made.push(gap(tiers.length));
    else made.push(element("span", { className: "zone gap first", "data-tier": "0" }, say("dropHere")));
    const left = this.ranking.unranked;
    const tray = element("span", { className: "zone tray", "data-tray": true, "aria-label": say("tray") }, ...left.map((key) => this.#chip(key)));
    const scale = element("span", { className: "scale" }, element("span", { className: "end" }, say("best")), ...made, element("span", { className: "end" }, say("worst")));
    this.board.replaceChildren(scale, tray);
  }

  changed(key) {
    this.update();
    this.how.onDraft?.(this.draft);
    if (key) this.how.onSaid?.(this.ranking.rankOf(key) === undefined ? say("unranked", this.letter(key)) : say("ranked", this.letter(key), this.ranking.rankOf(key)));
  }

  get draft() {
    return { item: this.item.id, ranks: this.ranking.now.ranks, all_bad: this.ranking.allBad, reason: this.reason.value };
  }

  rank(key, number, goOn = true) {
    if (this.busy) return;
    this.ranking.rank(key, number);
    this.changed(key);
    const left = this.ranking.unranked;
    if (goOn && number && left.length) this.focus(left.find((other) => this.keys.indexOf(other) > this.keys.indexOf(key)) ?? left[0]);
  }

  toggleBad() {
    if (this.busy) return;
    this.ranking.toggleAllBad();
    this.changed();
  }

  undo() {
    if (this.busy) return;
    if (this.ranking.canUndo) {
      this.ranking.undo();
      this.changed();
    } else this.how.onBefore();
  }

  skip() {
    if (!this.busy) this.how.onVote({ item: this.item.id, ranks: {}, all_bad: false, reason: this.reason.value.trim() });
  }

  submit() {
    if (this.busy) return;
    if (this.ranking.canSubmit) this.how.onVote({ item: this.item.id, ...this.ranking.sent, reason: this.reason.value.trim() });
    else {
      this.how.onSaid?.(say("rankFirst"), true);
      this.focus(this.ranking.unranked[0]);
    }
  }

  /** While a vote is on its way nothing can be changed. */
  wait(busy) {
    this.busy = busy;
    this.box.classList.toggle("busy", busy);
    this.reason.disabled = busy;
    this.update();
  }

  focus(key) {
    const { card } = this.cards.get(key);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }

  /** What a key does; whether it did something. */
  key(event) {
    const focused = document.activeElement?.closest?.(".card")?.dataset.key ?? null;
    const digit = event.code?.match(/^(?:Digit|Numpad)(\d)$/)?.[1] ?? (/^\d$/.test(event.key) ? event.key : undefined);
    if (digit !== undefined) {
      const key = focused ?? this.ranking.unranked[0] ?? this.keys[0];
      if (Number(digit) <= this.keys.length) this.rank(key, Number(digit));
      return true;
    }
    const letter = (/^[a-z]$/i.test(event.key) ? event.key : (event.code ?? "").replace("Key", "")).toUpperCase();
    if (letter.length === 1 && this.keys[LETTERS.indexOf(letter)]) return this.focus(this.keys[LETTERS.indexOf(letter)]), true;
    const steps = { ArrowRight: 1, ArrowLeft: -1 };
    if (event.key in steps) {
      const from = focused ? this.keys.indexOf(focused) : steps[event.key] > 0 ? -1 : 0;
      return this.focus(this.keys[(from + steps[event.key] + this.keys.length) % this.keys.length]), true;
    }
    const acts = {
      X: () => this.toggleBad(), S: () => this.skip(), Z: () => this.undo(), R: () => this.reason.focus(),
      O: () => (focused ? [focused] : this.keys).forEach((key) => this.cards.get(key).fold.toggle()), T: () => this.togglePlain(),
    };
    if (event.key === "Enter" && !document.activeElement?.closest("button, a, summary")) return this.submit(), true;
    if (!acts[letter]) return false;
    acts[letter]();
    return true;
  }

  togglePlain() {
    isPlain = !isPlain;
    this.cards.forEach(({ fill, fold }) => (fill(), fold.measure()));
  }
}

function how_asked(how, messages) {
  return how.isChat ? null : conversation(messages);
}
