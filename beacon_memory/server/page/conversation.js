// The conversation: questions, and answers as they come.

import { events, send } from "./api.js";
import { chosenIds } from "./documents.js";
import { count, element, find, megabytes, notice, number, seconds } from "./element.js";
import { explained } from "./explanation.js";

let turns = []; // of the conversation, as the server takes them
let answering = null; // what ends the answer that is coming

/** Asks a question, and shows the answer as it comes. */
export async function ask(question) {
  const from = document.querySelector("input[name=from]:checked").value;
  const budget = find("budget").value;
  if (from === "chosen" && !chosenIds().length) {
    notice("No document is chosen: tick some, or let them be found.");
    return false;
  }
  find("welcome")?.remove();
  const text = element("div", { className: "text", dir: "auto" });
  const answer = element("article", { className: "answer is-coming" }, text);
  find("turns").append(element("div", { className: "asked" }, element("p", { dir: "auto" }, question)), answer);
  follow(true);
  const messages = [...turns, { role: "user", content: question }];
  const ids = { chosen: { document_ids: chosenIds() }, none: { document_ids: [] }, found: {} }[from];
  answering = new AbortController();
  begin(true);
  let whole = "";
  let memory = null;
  try {
    const body = { model: "beacon-memory", messages, stream: true, stream_options: { include_usage: true }, ...ids,
      ...(budget ? { budget } : {}) };
    const reply = await send("POST", "/v1/chat/completions", body, { signal: answering.signal });
    let usage = null;
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0]?.delta.content ?? "";
      whole += piece;
      text.append(piece);
      memory = chunk.memory ?? memory;
      usage = chunk.usage ?? usage;
      follow();
    }
    if (memory) answer.append(...beneath(question, memory, usage, budget));
  } catch (error) {
    const stopped = error.name === "AbortError";
    const said = stopped ? "Stopped." : error.message;
    answer.append(element("p", { className: stopped ? "costs" : "error", role: "alert" }, said));
  }
  answer.classList.remove("is-coming");
  answering = null;
  begin(false);
  if (whole) turns = [...messages, { role: "assistant", content: whole }];
  find("new").hidden = !turns.length;
  follow();
  return true;
}

export function stop() {
  answering?.abort();
}

export function startAnew() {
  stop();
  turns = [];
  find("turns").replaceChildren();
  find("new").hidden = true;
  find("question").focus();
}

function begin(asked) {
  find("send").hidden = asked;
  find("stop").hidden = !asked;
}

/** Keeps the end in view, unless the person has scrolled up to read. */
function follow(always = false) {
  const place = getComputedStyle(find("turns")).overflowY === "visible" ? document.documentElement : find("turns");
  const below = place.scrollHeight - place.scrollTop - place.clientHeight;
  if (always || below < 160) place.scrollTop = place.scrollHeight;
}

/** Returns what stands beneath an answer: doubt, costs, and the way to the explanation. */
function beneath(question, memory, usage, budget) {
  const parts = [];
  if (memory.supported === false) {
    parts.push(element("p", { className: "doubt" }, "Perhaps this is not in memory: check the passages."));
  }
  const bytes = memory.documents.reduce((sum, one) => sum + one.bytes, 0);
  const from = memory.document_ids.length
    ? `From ${memory.document_ids.join(", ")}: ${count(memory.slots, "slot")}, ${megabytes(bytes)}`
    : "From no document";
  const prompt = usage ? `${number(usage.prompt_tokens - memory.slots)} prompt and ${number(usage.completion_tokens)} answer tokens` : "";
  const took = `first token after ${seconds(memory.time_to_first_token)}, all after ${seconds(memory.seconds)}`;
  parts.push(element("p", { className: "costs", dir: "auto" }, [from, prompt, took].filter(Boolean).join(" · ")));
  parts.push(why(question, memory, budget));
  return parts;
}

function why(question, memory, budget) {
  const button = element("button", { type: "button", className: "plain" }, "Why this answer?");
  button.setAttribute("aria-expanded", "false");
  let part = null;
  button.addEventListener("click", async () => {
    if (!part) {
      button.disabled = true;
      try {
        part = await explained(question, memory, budget);
        part.hidden = true;
        button.after(part);
      } catch (error) {
        notice(error.message);
        return;
      } finally {
        button.disabled = false;
      }
    }
    part.hidden = !part.hidden;
    button.setAttribute("aria-expanded", String(!part.hidden));
  });
  return button;
}
