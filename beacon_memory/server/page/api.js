// Requests to the server that this page is from, with the key if it needs one.

const KEY = "beacon-memory-key";
let askForKey = async () => {};

/** Says how to get a key from the person; `wrong` tells whether the one before was refused. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Sends a request, again with a key if the server wants one; throws an Error with the server's reason. */
export async function request(path, options = {}) {
  const given = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(given ? { Authorization: `Bearer ${given}` } : {}) };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (reply.status === 401) {
    if (sessionStorage.getItem(KEY) === given) await askForKey(given !== null); // else another request has got one
    return request(path, options);
  }
  if (!reply.ok) throw new Error(await reason(reply));
  return reply;
}

async function reason(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answered ${reply.status}.`;
  }
}

export async function get(path) {
  return (await request(path)).json();
}

export async function send(method, path, body, options = {}) {
  const headers = { "Content-Type": "application/json", ...options.headers };
  return request(path, { ...options, method, headers, body: JSON.stringify(body) });
}

/** The path of a document; slashes stay what they are. */
export function pathOf(id) {
  return `/v1/documents/${id.split("/").map(encodeURIComponent).join("/")}`;
}

/** Yields the data of server-sent events, as they come. */
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split("\n\n");
      buffer = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
        if (data.length && data[0] !== "[DONE]") yield JSON.parse(data.join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // who stops listening ends the answer
  }
}
