// The documents: listed, chosen, added with their progress, and forgotten.

import { events, get, pathOf, request, send } from "./api.js";
import { count, element, find, megabytes, notice, number } from "./element.js";

const PAGE = 50;
const TYPES = {
  md: "text/markdown", markdown: "text/markdown", html: "text/html", htm: "text/html", xhtml: "application/xhtml+xml",
  pdf: "application/pdf",
  docx: "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
  txt: "text/plain", text: "text/plain", rst: "text/plain", "": "text/plain",
};

const chosen = new Set();
const watched = new Set();
let last = "";
let listing = 0;
let onChosen = () => {};

/** Calls back with the ids of the documents that are chosen, whenever they change. */
export function whenChosen(call) {
  onChosen = call;
}

export const chosenIds = () => [...chosen];

function choose(id, wanted) {
  if (wanted) chosen.add(id);
  else chosen.delete(id);
  onChosen([...chosen]);
}

/** Shows the first documents anew, or with `more` those behind them. */
export async function list({ more = false } = {}) {
  const turn = ++listing; // of two that run at a time, the later one counts
  const query = new URLSearchParams({ prefix: find("prefix").value, after: more ? last : "", limit: PAGE });
  const page = await get(`/v1/documents?${query}`);
  if (turn !== listing) return;
  const rows = page.data.filter((row) => !row.tags.includes("session")).map(shown);
  if (more) find("rows").append(...rows);
  else find("rows").replaceChildren(...rows);
  last = page.last_id ?? last;
  find("more").hidden = !page.has_more;
  const empty = !find("rows").childElementCount;
  find("none").hidden = !empty;
  find("none").textContent = find("prefix").value ? "No id begins like that." : "Nothing is stored yet. Add a document.";
}

function shown(row) {
  const box = element("input", { type: "checkbox", checked: chosen.has(row.id) });
  const facts = `${count(row.tokens, "token")}, ${count(row.slots, "slot")}, ${megabytes(row.bytes)} `;
  const tags = row.tags.map((tag) => element("span", { className: "tag" }, tag));
  const label = element(
    "label", {}, box,
    element("span", {},
      element("span", { className: "id", dir: "auto" }, row.id), element("span", { className: "facts" }, facts, ...tags)),
  );
  const forget = element("button", { type: "button", className: "icon", title: "Forget", textContent: "×" });
  forget.setAttribute("aria-label", `Forget ${row.id}`);
  const item = element("li", { className: box.checked ? "is-chosen" : "" }, label, forget);
  box.addEventListener("change", () => {
    item.classList.toggle("is-chosen", box.checked);
    choose(row.id, box.checked);
  });
  forget.addEventListener("click", () => forgetAfterAsking(row.id));
  return item;
}

function forgetAfterAsking(id) {
  const dialog = find("removing");
  find("removing-id").textContent = id;
  dialog.returnValue = "";
  dialog.addEventListener("close", async () => {
    if (dialog.returnValue !== "yes") return;
    try {
      await request(pathOf(id), { method: "DELETE" });
      choose(id, false);
      await list();
      notice(`${id} is forgotten.`);
    } catch (error) {
      notice(error.message);
    }
  }, { once: true });
  dialog.showModal();
}

/** Sends a text; returns when the server has taken it, and shows how far it is read. */
export async function addText(id, text, tags) {
  const reply = await send("PUT", pathOf(id), tags.length ? { text, tags } : { text });
  watch(await reply.json());
}

/** Sends a file as it is; the server reads its text. */
export async function addFile(file, id, tags) {
  const ending = file.name.includes(".") ? file.name.split(".").pop().toLowerCase() : "";
  const type = TYPES[ending] ?? (file.type || "application/octet-stream");
  const query = new URLSearchParams(tags.map((tag) => ["tag", tag]));
  const options = { method: "PUT", headers: { "Content-Type": type }, body: file };
  const reply = await request(`${pathOf(id)}${tags.length ? `?${query}` : ""}`, options);
  watch(await reply.json());
}

/** Shows the progress of documents that were on their way before the page was opened. */
export async function watchUnfinished() {
  for (const status of ["running", "queued"]) {
    for (const job of (await get(`/v1/jobs?status=${status}`)).data) watch(job);
  }
}

async function watch(job) {
  if (watched.has(job.id)) return;
  watched.add(job.id);
  const bar = element("progress", { max: 1 });
  const state = element("span", { className: "facts" });
  bar.setAttribute("aria-label", `Reading ${job.document}`);
  const cancel = element("button", { type: "button", className: "icon", title: "Cancel", textContent: "×" });
  cancel.setAttribute("aria-label", `Cancel reading ${job.document}`);
  cancel.addEventListener("click", () => {
    request(`/v1/jobs/${job.id}`, { method: "DELETE" }).catch((error) => notice(error.message));
  });
  const name = element("span", { className: "id", dir: "auto" }, job.document);
  const item = element("li", {}, element("div", { className: "job" }, name, state, bar), cancel);
  find("jobs").append(item);
  tell(job, bar, state);
  try {
    for await (const told of events(await request(`/v1/jobs/${job.id}/events`))) {
      job = told;
      tell(job, bar, state);
    }
    if (job.status === "failed") notice(`${job.document} was not stored: ${job.error?.message ?? "it failed"}`);
  } catch (error) {
    notice(error.message);
  }
  item.remove();
  watched.delete(job.id);
  list().catch((error) => notice(error.message));
}

function tell(job, bar, state) {
  if (job.status === "running" && job.tokens) {
    bar.value = job.tokens_read / job.tokens;
    state.textContent = `${number(job.tokens_read)} of ${count(job.tokens, "token")} read`;
  } else {
    bar.removeAttribute("value");
    state.textContent = job.status === "queued" ? "waits for its turn" : "begins";
  }
}
