// A ranking while it is made: a number for each answer, and what it was before.

export class Ranking {
  constructor(keys, vote) {
    this.keys = keys;
    this.now = { ranks: { ...(vote?.ranks ?? {}) }, allBad: vote?.all_bad ?? false };
    this.past = [];
  }
  rankOf(key) {
    return this.now.ranks[key];
  }
  get allBad() {
    return this.now.allBad;
  }
  get whole() {
    return this.keys.every((key) => this.now.ranks[key] !== undefined);
  }
  get canSubmit() {
    return this.whole || this.allBad;
  }
  get canUndo() {
    return this.past.length > 0;
  }
  /** The ranked answers, the best first; those of one rank together. */
  get tiers() {
    const ranks = [...new Set(Object.values(this.now.ranks))].sort((a, b) => a - b);
    return ranks.map((rank) => this.keys.filter((key) => this.now.ranks[key] === rank));
  }
  get unranked() {
    return this.keys.filter((key) => this.now.ranks[key] === undefined);
  }
  #change(next) {
    this.past.push(this.now);
    this.now = { ...this.now, ...next };
  }
  rank(key, number) {
    const ranks = { ...this.now.ranks };
    if (number) ranks[key] = number;
    else delete ranks[key];
    this.#change({ ranks });
  }
  toggleAllBad() {
    this.#change({ allBad: !this.allBad });
  }
  /** Put an answer into a tier, or between two: `join` says which. */
  place(key, tier, join) {
    const own = join ? this.tiers[tier] : [];
    const tiers = this.tiers.map((keys, at) => (join && at === tier ? own : keys));
    for (const keys of tiers) if (keys.includes(key)) keys.splice(keys.indexOf(key), 1);
    if (!join) tiers.splice(tier, 0, own);
    own.push(key);
    const left = tiers.filter((keys) => keys.length);
    const ranks = {};
    left.forEach((keys, at) => keys.forEach((one) => (ranks[one] = at + 1)));
    this.#change({ ranks });
  }
  undo() {
    this.now = this.past.pop() ?? this.now;
  }
  /** What is sent: ranks of all answers, or of none. */
  get sent() {
    return { ranks: this.whole ? this.now.ranks : {}, all_bad: this.allBad };
  }
}
