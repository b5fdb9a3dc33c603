// The conversation: questions, and the answers of each model. It is kept in the browser.

const SETTINGS = ["system", "temperature", "top_p", "max_new_tokens", "seed"];

export class Talk {
  /** `defaults` are the settings of the command; only what a person changed is kept. */
  constructor(kept, columns, defaults) {
    Object.assign(this, { kept, columns, defaults });
    const { turns, numbers, changed } = kept.get({});
    this.turns = Array.isArray(turns) ? turns : [];
    this.numbers = Array.isArray(numbers) ? numbers : Array(columns).fill(0);
    this.changed = changed ?? {};
    for (const answer of this.turns.flatMap((turn) => turn.answers)) answer.reason ||= "stopped"; // the page was closed
  }

  get settings() {
    return { ...this.defaults, ...this.changed };
  }

  set(settings) {
    this.changed = Object.fromEntries(SETTINGS.filter((name) => settings[name] !== this.defaults[name]).map((name) => [name, settings[name]]));
    this.keep();
  }

  keep() {
    this.kept.set({ turns: this.turns, numbers: this.numbers, changed: this.changed });
  }

  ask(question) {
    this.turns.push({ question, answers: Array.from({ length: this.columns }, () => blank()) });
    this.keep();
  }

  /** What takes the place of an answer, with another noise. */
  renew(turn, column) {
    turn.answers[column] = blank();
    return turn.answers[column];
  }

  clear() {
    const before = { turns: this.turns, numbers: this.numbers };
    this.turns = [];
    this.numbers = Array(this.columns).fill(0);
    this.keep();
    return before;
  }

  bringBack(before) {
    Object.assign(this, before);
    this.keep();
  }

  /** The messages of a model's conversation, up to a turn's question. What it did not answer is left out. */
  messages(column, turn) {
    const { system } = this.settings;
    const before = this.turns.slice(0, turn ? this.turns.indexOf(turn) : undefined).filter(({ answers }) => isGood(answers[column]));
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...before.flatMap(({ question, answers }) => [{ role: "user", content: question }, { role: "assistant", content: answers[column].text }]),
      ...(turn ? [{ role: "user", content: turn.question }] : []),
    ];
  }

  /** A row of instruction data; null where nothing was answered. */
  row(column) {
    const messages = this.messages(column);
    return messages.some(({ role }) => role === "assistant") ? `${JSON.stringify({ messages })}\n` : null;
  }
}

/** `reason` is empty while it is written. */
const blank = () => ({ text: "", reason: "", tokens: 0, seconds: 0, dropped: 0, waiting: 0, failed: null });

export const isGood = (answer) => Boolean(answer.text.trim()) && answer.failed === null;
