// The settings of answers, in a dialog.

import { element } from "../shared/text.js";
import { say } from "./words.js";

const NUMBERS = {
  temperature: (value) => value >= 0 && value <= 100,
  top_p: (value) => value > 0 && value <= 1,
  max_new_tokens: (value) => Number.isInteger(value) && value >= 1 && value <= 131072,
  seed: (value) => Number.isSafeInteger(value),
};

/** Show the settings; `onDone` gets new ones. */
export function openSettings(dialog, settings, defaults, onDone) {
  const system = element("textarea", { id: "set-system", rows: "2", maxlength: "20000", placeholder: say("systemHint") });
  const fields = Object.fromEntries(Object.keys(NUMBERS).map((name) => [name, numberField(name)]));
  const fill = (values) => {
    system.value = values.system;
    for (const [name, { input }] of Object.entries(fields)) input.value = String(values[name]);
  };
  const done = () => {
    const read = Object.fromEntries(Object.entries(fields).map(([name, { input }]) => [name, input.value.trim() === "" ? NaN : Number(input.value)]));
    const bad = Object.keys(fields).filter((name) => !NUMBERS[name](read[name]));
    for (const [name, { input, problem }] of Object.entries(fields)) {
      problem.hidden = !bad.includes(name);
      input.setAttribute("aria-invalid", String(bad.includes(name)));
    }
    if (bad.length) return fields[bad[0]].input.focus();
    dialog.close();
    onDone({ system: system.value.trim(), ...read });
  };
  const form = element("form", { novalidate: true, onsubmit: (event) => (event.preventDefault(), done()) },
    element("h2", { id: "settings-title" }, say("settings")),
    element("label", { className: "field whole" }, element("span", {}, say("system")), system),
    element("div", { className: "fields" }, ...Object.values(fields).map(({ box }) => box)),
    element("div", { className: "buttons" },
      element("button", { type: "button", id: "defaults", onclick: () => fill(defaults) }, say("defaults")),
      element("button", { type: "button", onclick: () => dialog.close() }, say("cancel")),
      element("button", { type: "submit", className: "main", id: "set" }, say("done"))));
  fill(settings);
  dialog.replaceChildren(form);
  dialog.showModal();
}

function numberField(name) {
  const input = element("input", { id: `set-${name}`, inputmode: name === "seed" || name === "max_new_tokens" ? "numeric" : "decimal", autocomplete: "off", "aria-describedby": `about-${name} bad-${name}` });
  const problem = element("small", { id: `bad-${name}`, className: "failed", role: "alert", hidden: true }, say("bad")[name]);
  const box = element("div", { className: "field" }, element("label", { for: `set-${name}` }, say(name)), input, problem, element("small", { id: `about-${name}`, className: "soft" }, say("about")[name]));
  return { box, input, problem };
}
