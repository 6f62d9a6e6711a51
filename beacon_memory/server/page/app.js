// What the buttons, keys and dialogs of the page do.

import { get, keepKey, onKeyNeeded } from "./api.js";
import { ask, startAnew, stop } from "./conversation.js";
import { addFile, addText, list, watchUnfinished, whenChosen } from "./documents.js";
import { find, notice } from "./element.js";

const told = (work) => work.catch((error) => notice(error.message));

let asking = null; // several requests may need the key at a time
onKeyNeeded((wrong) => (asking ??= new Promise((resolve) => {
  const dialog = find("key-dialog");
  find("key-error").hidden = !wrong;
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  find("key-form").addEventListener("submit", () => {
    keepKey(find("key").value.trim());
    asking = null;
    resolve();
  }, { once: true });
  dialog.showModal();
})));

whenChosen((ids) => {
  find("chosen").textContent = `Chosen (${ids.length})`;
  const from = ids.length ? "chosen" : "found";
  document.querySelector(`input[name=from][value=${from}]`).checked = true;
});

// Asking

find("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = find("question").value.trim();
  if (!question || find("send").hidden) return;
  find("question").value = "";
  if (!(await ask(question))) find("question").value = question;
});
find("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("ask").requestSubmit();
});
find("stop").addEventListener("click", stop);
find("new").addEventListener("click", startAnew);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});

// Documents

let typing;
find("prefix").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => told(list()), 200);
});
find("more").addEventListener("click", () => told(list({ more: true })));

const adding = find("adding");
find("add").addEventListener("click", () => {
  find("add-form").reset();
  find("add-error").hidden = true;
  adding.showModal();
});
find("add-cancel").addEventListener("click", () => adding.close());
find("add-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const files = [...find("files").files];
  const [name, text] = [find("name").value.trim(), find("text").value];
  const tags = find("tags").value.split(",").map((tag) => tag.trim()).filter(Boolean);
  try {
    if (!files.length && !text.trim()) throw new Error("Choose a file, or write a text.");
    if (text.trim() && !name) throw new Error("Give the text a name.");
    if (text.trim()) await addText(name, text, tags);
    await addFiles(files, tags, text.trim() ? "" : name);
    adding.close();
  } catch (error) {
    find("add-error").textContent = error.message;
    find("add-error").hidden = false;
  }
});

/** Adds files, all that can be; throws the first reason why one could not. `name`: of a single one. */
async function addFiles(files, tags = [], name = "") {
  let failed = null;
  for (const file of files) {
    try {
      await addFile(file, files.length === 1 && name ? name : file.name, tags);
    } catch (error) {
      failed ??= new Error(`${file.name}: ${error.message}`);
    }
  }
  if (failed) throw failed;
}

const withFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!withFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("is-dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("is-dropping");
});
document.addEventListener("drop", (event) => {
  if (!withFiles(event)) return;
  event.preventDefault();
  document.body.classList.remove("is-dropping");
  told(addFiles([...event.dataTransfer.files]));
});

told(list().then(watchUnfinished));
told(get("/v1/models").then((models) => (find("about").textContent = `Answers by ${models.data[0].id}`)));
