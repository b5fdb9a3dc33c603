// The language of a page: English or Korean, as the browser says or the person chose.

const KEY = "leyden-language";
const LANGUAGES = ["en", "ko"];
const kept = () => {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
};

let language = [kept(), ...(navigator.languages ?? []).map((name) => name.slice(0, 2))].find((name) => LANGUAGES.includes(name)) ?? "en";

export const current = () => language;

export function choose(name) {
  language = LANGUAGES.includes(name) ? name : "en";
  document.documentElement.lang = language;
  try {
    localStorage.setItem(KEY, language);
  } catch {
    // A browser that keeps nothing: the choice is this page's alone.
  }
}

/** Gives what a page says by name, with values at {0}, {1}. `words` has a dictionary for each language. */
export const speaking = (words) => (name, ...values) => {
  const text = words[language][name] ?? words.en[name] ?? name;
  return typeof text === "string" ? text.replace(/\{(\d)\}/g, (_, place) => values[place] ?? "") : text;
};
