// Requests to the server, and votes that wait on this page until they are there.

const WAITS = [1, 2, 4, 8, 15];

/** What a request was refused with; `name` is one of the page's words, and `person` who the browser is, where that matters. */
export class Refused extends Error {
  constructor(name, text, status, person) {
    super(text || name);
    this.name = name;
    this.status = status;
    this.person = person;
  }
}

export async function ask(path, sent, signal) {
  const how = { credentials: "same-origin", cache: "no-store", signal };
  if (sent !== undefined) {
    Object.assign(how, { method: "POST", headers: { "content-type": "application/json", "x-leyden": "1" }, body: JSON.stringify(sent) });
  }
  let answer;
  try {
    answer = await fetch(path, how);
  } catch {
    throw new Refused("offline", "", 0);
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Refused(told.error ?? "offline", told.text, answer.status, told.person);
}

export const asked = async (path, sent) => (await ask(path, sent)).json();

/** Show the token behind `#` once, and take it out of the address. */
export async function enter() {
  const token = location.hash.slice(1);
  if (!token) return;
  history.replaceState(null, "", location.pathname);
  await asked("/api/enter", { token });
}

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** Something of one store that outlives a reload: whose it is, or what. */
export class Kept {
  constructor(kind, store, name) {
    this.key = `leyden ${kind} ${store} ${name}`;
  }
  get(otherwise) {
    try {
      return JSON.parse(localStorage.getItem(this.key)) ?? otherwise;
    } catch {
      return otherwise;
    }
  }
  set(value) {
    try {
      if (value === null) localStorage.removeItem(this.key);
      else localStorage.setItem(this.key, JSON.stringify(value));
    } catch {
      // A browser that keeps nothing: the vote is still in this page's memory.
    }
  }
}

/** Votes of a person on their way. Each has an id of its own, so that one which is sent twice is stored once; it is kept under
 * that id, so that no tab overwrites what another one keeps. */
export class Outbox {
  constructor(store, person, path, onWaiting, onRefused) {
    Object.assign(this, { store, person, path, onWaiting, onRefused, own: new Map(), tries: 0, sending: null });
  }
  #kept(id) {
    return new Kept("vote", this.store, id);
  }
  /** What waits, the oldest first, also what other tabs of this person keep: a later vote replaces an earlier one. */
  get votes() {
    const all = new Map(this.own);
    const start = this.#kept("").key;
    let keys = [];
    try {
      keys = Object.keys(localStorage).filter((key) => key.startsWith(start));
    } catch {
      // A browser that keeps nothing.
    }
    for (const id of keys.map((key) => key.slice(start.length))) {
      const vote = this.#kept(id).get(null);
      if (vote?.person === this.person) all.set(id, { ...vote, id });
    }
    return [...all.values()].sort((one, other) => one.at - other.at);
  }
  add(vote) {
    const made = { id: newId(), person: this.person, at: Date.now(), ...vote };
    this.own.set(made.id, made);
    this.#kept(made.id).set(made);
  }
  #remove(id) {
    this.own.delete(id);
    this.#kept(id).set(null);
  }
  /** Send all of them, however long it takes; gives the server's answer to the last one. */
  flush() {
    this.sending ??= this.#flush().finally(() => (this.sending = null));
    return this.sending;
  }
  async #flush() {
    let last = null;
    for (let vote = this.votes[0]; vote; vote = this.votes[0]) {
      try {
        last = await asked(this.path, vote);
        this.tries = 0;
      } catch (problem) {
        if (![400, 410, 413].includes(problem.status)) {
          this.onWaiting(problem);
          await new Promise((done) => setTimeout(done, 1000 * WAITS[Math.min(this.tries, WAITS.length - 1)]));
          this.tries += 1;
          continue;
        }
        this.onRefused(problem);
        last = null;
      }
      this.#remove(vote.id);
    }
    return last;
  }
}

/** The lines of JSON of an answer, as they come. */
export async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines.filter(Boolean).map((line) => JSON.parse(line));
  }
}
