// Markdown as DOM nodes. Text only ever becomes text nodes, so that whatever an answer holds is shown and never run.

// Each part has a longest length: without one, an answer of nothing but stars would take minutes to look through.
const INLINE = /(`{1,9})([^]{0,600}?[^`])\1(?!`)|\*\*(\S(?:[^]{0,600}?\S)?)\*\*|__(\S(?:[^]{0,600}?\S)?)__(?!\w)|\*(?!\s)([^*]{0,600}?[^*\s])\*|(?<!\w)_(?!\s)([^_]{0,600}?[^_\s])_(?!\w)|~~(\S(?:[^]{0,600}?\S)?)~~|\[([^\]\n]{1,300})\]\((https?:\/\/[^\s)]{1,600})\)|(https?:\/\/[^\s<>"')\]]{1,600}[^\s<>"')\].,;:!?])/;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const BULLET = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const ROW = /^\s*\|?(.+\|.*?)\|?\s*$/;
const RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;
const DEEPEST = 8;

export function element(name, how = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(how)) {
    if (value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key === "className" ? "class" : key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== undefined && child !== null));
  return made;
}

/** A text as its author formatted it. */
export function formatted(text) {
  return block(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

/** A text as it is. */
export function plain(text) {
  return element("pre", { className: "plain" }, text);
}

/** The language that a text is in, as far as lines and letters should know. */
export function languageOf(text) {
  const letters = text.match(/\p{L}/gu)?.length ?? 0;
  const hangul = text.match(/[가-힣]/g)?.length ?? 0;
  return letters > 0 && hangul * 2 >= letters ? "ko" : undefined;
}

function block(lines, depth) {
  const made = document.createDocumentFragment();
  let at = 0;
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) made.append(element("p", {}, inline(paragraph.join("\n"), 0)));
    paragraph = [];
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(FENCE);
    const heading = line.match(/^ {0,3}(#{1,6})\s+(.*?)\s*#*$/);
    if (fence) {
      flush();
      const end = lines.findIndex((other, place) => place > at && other.trim().startsWith(fence[1]) && other.trim().replaceAll(fence[1][0], "") === "");
      const last = end === -1 ? lines.length : end;
      made.append(code(lines.slice(at + 1, last).join("\n"), fence[2]));
      at = last + 1;
    } else if (!line.trim()) {
      flush();
      at += 1;
    } else if (!paragraph.length && /^( {4}|\t)/.test(line)) {
      const from = at;
      while (at < lines.length && (/^( {4}|\t)/.test(lines[at]) || !lines[at].trim())) at += 1;
      made.append(code(lines.slice(from, at).map((indented) => indented.replace(/^( {4}|\t)/, "")).join("\n").trimEnd(), ""));
    } else if (heading) {
      flush();
      made.append(element(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2], 0)));
      at += 1;
    } else if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      flush();
      made.append(element("hr"));
      at += 1;
    } else if (depth < DEEPEST && /^ {0,3}>/.test(line)) {
      flush();
      const from = at;
      while (at < lines.length && /^ {0,3}>/.test(lines[at])) at += 1;
      made.append(element("blockquote", {}, block(lines.slice(from, at).map((quoted) => quoted.replace(/^ {0,3}> ?/, "")), depth + 1)));
    } else if (depth < DEEPEST && BULLET.test(line)) {
      flush();
      at = list(lines, at, made, depth);
    } else if (ROW.test(line) && RULE.test(lines[at + 1] ?? "")) {
      flush();
      at = table(lines, at, made);
    } else {
      paragraph.push(line);
      at += 1;
    }
  }
  flush();
  return made;
}

function code(text, name) {
  const box = element("pre", { className: "code", tabindex: "0" }, element("code", {}, text));
  if (name) box.dataset.language = name;
  return box;
}

function list(lines, at, made, depth) {
  const [, indent, mark] = lines[at].match(BULLET);
  const ordered = /\d/.test(mark);
  const box = element(ordered ? "ol" : "ul", ordered && parseInt(mark, 10) !== 1 ? { start: parseInt(mark, 10) } : {});
  while (at < lines.length) {
    const found = lines[at].match(BULLET);
    if (!found || found[1].length !== indent.length || /\d/.test(found[2]) !== ordered) break;
    const inner = [found[3]];
    const width = found[0].length - found[3].length;
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const deep = line.length - line.trimStart().length;
      const goesOn = line.trim() ? deep > indent.length : (lines[at + 1] ?? "").length - (lines[at + 1] ?? "").trimStart().length > indent.length;
      if (!goesOn && (!line.trim() || BULLET.test(line) || !inner.at(-1).trim() || FENCE.test(line) || /^ {0,3}(#|>)/.test(line))) break;
      inner.push(line.slice(Math.min(deep, width)));
      at += 1;
    }
    box.append(element("li", {}, tight(block(inner, depth + 1))));
    while (at < lines.length && !lines[at].trim() && BULLET.test(lines[at + 1] ?? "") && lines[at + 1].match(BULLET)[1].length === indent.length) at += 1;
  }
  made.append(box);
  return at;
}

/** A list item of one paragraph needs none around it. */
function tight(content) {
  const first = content.firstElementChild;
  if (first?.tagName === "P") first.replaceWith(...first.childNodes);
  return content;
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines, at, made) {
  const head = cells(lines[at]);
  const body = element("tbody");
  at += 2;
  while (at < lines.length && ROW.test(lines[at])) {
    const row = cells(lines[at]);
    body.append(element("tr", {}, ...head.map((_, place) => element("td", {}, inline(row[place] ?? "", 0)))));
    at += 1;
  }
  const top = element("thead", {}, element("tr", {}, ...head.map((cell) => element("th", { scope: "col" }, inline(cell, 0)))));
  made.append(element("div", { className: "wide", tabindex: "0" }, element("table", {}, top, body)));
  return at;
}

function inline(text, depth) {
  const made = document.createDocumentFragment();
  let rest = text;
  while (rest) {
    const found = depth < DEEPEST ? rest.match(INLINE) : null;
    if (!found) break;
    made.append(broken(rest.slice(0, found.index)));
    const [whole, , ticked, strong, strong2, soft, soft2, struck, label, target, bare] = found;
    if (ticked !== undefined) made.append(element("code", {}, ticked.replace(/^ (.*) $/s, "$1")));
    else if (strong ?? strong2) made.append(element("strong", {}, inline(strong ?? strong2, depth + 1)));
    else if (soft ?? soft2) made.append(element("em", {}, inline(soft ?? soft2, depth + 1)));
    else if (struck) made.append(element("s", {}, inline(struck, depth + 1)));
    else made.append(element("a", { href: target ?? bare, target: "_blank", rel: "noopener noreferrer nofollow", title: target ?? bare }, label ?? bare));
    rest = rest.slice(found.index + whole.length);
  }
  made.append(broken(rest));
  return made;
}

/** Text with the line ends that its author made. */
function broken(text) {
  const made = document.createDocumentFragment();
  text.split("\n").forEach((line, number) => {
    if (number) made.append(element("br"));
    made.append(line.replace(/\\([\\`*_{}[\]()#+.!|>~-])/g, "$1"));
  });
  return made;
}
