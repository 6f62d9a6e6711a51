// Why an answer came out as it did: what was loaded, what it cost, and the text, shaded by how much of it is loaded.

import { send } from "./api.js";
import { count, element, megabytes, number } from "./element.js";

const PLACES = {
  remote: "fetched from object storage",
  cold: "read from its file",
  ram: "was ready in memory",
  device: "was ready on the device",
};
const percent = (share) => `${Math.round(100 * share)} %`;

/** Returns what was loaded for an answer and what it took, as a table, and behind it the shaded text. */
export async function explained(question, memory, budget) {
  const part = element("div", { className: "why" }, costs(memory));
  if (!memory.document_ids.length) return part;
  const body = { question, document_ids: memory.document_ids, ...(budget ? { budget } : {}) };
  const explanation = await (await send("POST", "/v1/documents:explain", body)).json();
  part.append(legend());
  for (const id of explanation.ids) {
    const passages = explanation.passages.filter((passage) => passage.document === id);
    part.append(element("h3", { dir: "auto" }, id), ...together(passages));
  }
  return part;
}

function costs(memory) {
  const head = element("tr", {}, ...["document", "passages", "slots", "size", ""].map((name) => element("th", {}, name)));
  const rows = memory.documents.map((one) => element(
    "tr", {},
    ...[one.id, number(one.passages), number(one.slots), megabytes(one.bytes), PLACES[one.place]].map(
      (text) => element("td", { dir: "auto" }, text),
    ),
  ));
  const told = [];
  if (memory.evidence) {
    told.push(`${percent(memory.evidence.words)} of the question's words stand in one passage that was loaded`);
    if (memory.evidence.likelihood !== null) told.push(`the model was ${percent(memory.evidence.likelihood)} sure`);
  } else if (!rows.length) {
    told.push("No document was loaded");
  }
  return element("div", {},
    ...(rows.length ? [element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))] : []),
    element("p", { className: "faint" }, told.length ? `${told.join("; ")}.` : ""));
}

function legend() {
  const words = [["none", 0], ["half", 0.5], ["all", 1]].map(([word, share]) => shaded(word, share));
  return element("p", { className: "faint" }, "Shades: how much of a word is loaded, from ", words[0], " over ", words[1],
    " to ", words[2], ".");
}

/** Returns passages in the order of the text; those of which nothing is loaded are folded. */
function together(passages) {
  const parts = [];
  for (let n = 0; n < passages.length; ) {
    let end = n + 1;
    const loaded = passages[n].loaded > 0;
    while (!loaded && end < passages.length && passages[end].loaded === 0) end += 1;
    parts.push(loaded ? figure(passages[n]) : folded(passages.slice(n, end)));
    n = end;
  }
  return parts;
}

function figure(passage) {
  const relevance = passage.relevance ? `, relevance ${passage.relevance.toFixed(1)}` : "";
  const about = `${percent(passage.loaded)} loaded, ${count(Math.round(passage.slots), "slot")}, `
    + `${megabytes(passage.bytes)}${relevance}`;
  const text = element("div", { className: "text", dir: "auto" }, ...pieces(passage));
  return element("figure", {}, element("figcaption", {}, about), text);
}

function folded(passages) {
  const text = passages.map((passage) => passage.text).join("");
  return element("details", {},
    element("summary", {}, `${count(passages.length, "passage")} of which nothing is loaded`),
    element("div", { className: "text", dir: "auto" }, text));
}

/** Returns the text of a passage in pieces, words where it has any. Places are counted in characters, as Python does. */
function pieces(passage) {
  const characters = [...passage.text];
  const cut = (start, stop) => characters.slice(start - passage.start, stop - passage.start).join("");
  if (!passage.words.length) return [shaded(passage.text, passage.loaded)];
  const parts = [];
  let done = passage.start;
  for (const word of passage.words) {
    if (word.start > done) parts.push(cut(done, word.start));
    const text = cut(word.start, word.stop);
    const blank = text.length - text.trimStart().length; // not shaded, so that words stay apart
    parts.push(text.slice(0, blank), shaded(text.slice(blank), word.loaded));
    done = word.stop;
  }
  parts.push(cut(done, passage.stop));
  return parts;
}

function shaded(text, share) {
  const mark = element("mark", {}, text);
  mark.style.setProperty("--loaded", share.toFixed(2));
  return mark;
}
