// Small pieces of the page: nothing here ever reads text as HTML.

/** Makes an element: its tag, its properties, and what is in it. */
export function element(tag, properties = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...inside);
  return made;
}

export const find = (id) => document.getElementById(id);

export const number = (value) => value.toLocaleString("en");

export const megabytes = (bytes) => (bytes < 1e5 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

export const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 0)} s`;

export const count = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;

let hiding;

/** Tells something at the bottom of the page for a while. */
export function notice(text) {
  const place = find("notice");
  place.textContent = text;
  place.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => (place.hidden = true), 8000);
}
