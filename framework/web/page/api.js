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

/** Something of one person and store that outlives a reload. */
export class Kept {
  constructor(kind, store, person) {
    this.key = `leyden ${kind} ${store} ${person}`;
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

/** Votes on their way. Each has an id of its own, so that one which is sent twice is stored once. */
export class Outbox {
  constructor(kept, path, onWaiting, onRefused) {
    Object.assign(this, { kept, path, onWaiting, onRefused, votes: kept.get([]), tries: 0, sending: null });
  }
  add(vote) {
    this.votes.push(vote);
    this.kept.set(this.votes);
  }
  /** Send all of them, however long it takes; gives the server's answer to the last one. */
  flush() {
    this.sending ??= this.#flush().finally(() => (this.sending = null));
    return this.sending;
  }
  async #flush() {
    let last = null;
    while (this.votes.length) {
      try {
        last = await asked(this.path, this.votes[0]);
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
      this.votes.shift();
      this.kept.set(this.votes.length ? this.votes : null);
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
