// The same request for other clients, as code to copy. Keys are read from the environment.

import { find, make } from "./elements.js";
import { BASE, hasKey } from "./server.js";

const OPENAI = ["model", "messages", "temperature", "max_tokens", "top_p", "seed", "stop", "response_format"];
const LANGUAGES = { curl, "Python (loraplex)": python, "Python (openai)": openai, gRPC: grpc };
const GRPC = `${BASE.hostname}:50051`;

/** Opens the dialog with the calls that equal this chat completion. `adapter` is null for the base model. */
export function showCalls(request, adapter) {
  const dialog = find("calls"), tabs = dialog.querySelector(".tabs");
  const show = (chosen) => {
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab.textContent === chosen));
    dialog.querySelector("pre").textContent = LANGUAGES[chosen](request, adapter);
    dialog.querySelector("p").hidden = ![python, grpc].includes(LANGUAGES[chosen]);
  };
  tabs.replaceChildren(...Object.keys(LANGUAGES).map((name) =>
    make("button", { type: "button", onclick: () => show(name) }, name)));
  show(tabs.firstChild.textContent);
  dialog.showModal();
}

function curl(request) {
  return `curl ${quoted(`${BASE}v1/chat/completions`)} \\
  -H 'Content-Type: application/json' \\${header()}
  -d ${quoted(json(request))}`;
}

function openai(request) {
  const own = Object.entries(request).filter(([name]) => OPENAI.includes(name));
  const others = Object.entries(request).filter(([name]) => !OPENAI.includes(name)); // such as top_k
  if (others.length) own.push(["extra_body", Object.fromEntries(others)]);
  return `${imports()}from openai import OpenAI

client = OpenAI(base_url=${literal(`${BASE}v1`)}, api_key=${key() ?? '"none"'})
answer = client.chat.completions.create(
${keywords(own)})
print(answer.choices[0].message.content)`;
}

function python(request, adapter) {
  const { model, messages, max_tokens, response_format, ...sampling } = request;
  const options = Object.entries({ adapter, max_new_tokens: max_tokens, ...sampling });
  const schema = response_format?.json_schema.schema;
  const grammar = schema ? `    grammar=JsonSchema(${literal(schema)}),\n` : "";
  return `${imports()}from loraplex import Client${schema ? ", JsonSchema" : ""}

client = Client(${literal(GRPC)}${key() ? `, api_key=${key()}` : ""})
answer = client.generate(
    ${literal(messages)},
${keywords(options)}${grammar})
print(answer.text)`;
}

function grpc(request, adapter) {
  const { model, messages, max_tokens, stop, response_format, ...sampling } = request;
  const body = {
    chat: { messages },
    adapter: adapter && { id: adapter },
    sampling,
    stopping: { max_new_tokens: max_tokens, stop },
    grammar: response_format && { json_schema: JSON.stringify(response_format.json_schema.schema) },
  };
  return `buf curl --protocol grpc --http2-prior-knowledge \\${header()}
  -d ${quoted(json(body))} \\
  http://${GRPC}/loraplex.v1.GenerationService/Generate`;
}

const key = () => (hasKey() ? 'os.environ["LORAPLEX_API_KEY"]' : null);
const imports = () => (hasKey() ? "import os\n\n" : "");
const header = () => (hasKey() ? '\n  -H "Authorization: Bearer $LORAPLEX_API_KEY" \\' : "");
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // for the shell
const given = (options) => options.filter(([, value]) => value != null);
const keywords = (options) => given(options).map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");

/** JSON with a line for each field. */
function json(body) {
  const fields = given(Object.entries(body)).map(([name, value]) => `  "${name}": ${JSON.stringify(value)}`);
  return `{\n${fields.join(",\n")}\n}`;
}

/** Python's literal of a value of JSON. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value === null || typeof value === "boolean") return { null: "None", true: "True", false: "False" }[value];
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, item]) => `${literal(name)}: ${literal(item)}`).join(", ")}}`;
}

find("copy").addEventListener("click", async () => {
  const code = find("calls").querySelector("pre");
  getSelection().selectAllChildren(code);
  if (navigator.clipboard) await navigator.clipboard.writeText(code.textContent);
  else document.execCommand("copy"); // a page without TLS has no clipboard
});
