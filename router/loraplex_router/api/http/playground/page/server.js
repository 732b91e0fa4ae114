// Calls to the server that the page is from.

export const BASE = new URL(".", location.href); // the page may be below a path of a proxy
const KEY = "loraplex-api-key"; // the key stays in this tab
const session = crypto.getRandomValues(new Uint32Array(2)).join("-"); // an alias keeps its adapter for a conversation

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const useKey = (key) => sessionStorage.setItem(KEY, key);

/** Sends a GET, or a POST if there is a body. Throws an Error with the server's own words. */
export async function call(path, body, signal) {
  const headers = { "X-Session-Id": session };
  if (hasKey()) headers.Authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const request = { method, headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(new URL(path, BASE), request).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  });
  if (response.ok) return response;
  if (response.status === 401) window.dispatchEvent(new Event("key-needed"));
  throw new Error(describe(await response.text()) || `${response.status} ${response.statusText}`);
}

export const read = async (path) => (await call(path)).json();

/** The data of server-sent events, as they arrive. */
export async function* events(response) {
  let rest = "";
  for await (const text of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(describe(line.slice(6)));
      yield data;
    }
  }
}

async function* pieces(stream) { // not every browser iterates over a stream
  const reader = stream.getReader();
  for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
}

function describe(text) {
  try {
    const { error } = JSON.parse(text);
    return error.message ?? error;
  } catch {
    return text.slice(0, 500);
  }
}
