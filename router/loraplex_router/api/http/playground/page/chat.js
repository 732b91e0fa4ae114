// The chat: who answers, what is asked of them, and their answers side by side.

import { showCalls } from "./calls.js";
import { find, make } from "./elements.js";
import { readRequest } from "./request.js";
import { call, events, read } from "./server.js";
import { TokenText, watchTokens } from "./tokens.js";

const MOST_ADAPTERS = 4; // with the base model five streams, and browsers have six connections to a server
const SHOWN = 8; // adapters with a button of their own
const LISTED = 1000; // names to complete what is typed; others can be typed as well

const models = new Map(); // by the name that requests use: the adapter's id (null: the base model) and its tier
const chosen = new Set(); // names
const turns = []; // the conversation: each question with the answers by name
let running = null; // the AbortController of the answers that are arriving

/** Reads which models there are, and where they are now. */
export async function loadModels() {
  const { data } = await read(`v1/models?limit=${LISTED}`);
  if (!models.size) chosen.add(data[0].id);
  const others = [...models].filter(([name]) => chosen.has(name) && !data.some(({ id }) => id === name));
  models.clear();
  for (const { id, root, parent, tier } of data) {
    if (parent || id === data[0].id) models.set(id, { adapter: parent && root, tier }); // not the base's other names
  }
  for (const [name, { adapter }] of others) models.set(name, { adapter, tier: null });
  find("names").replaceChildren(...[...models.keys()].map((value) => make("option", { value })));
  showChoices();
}

/** Lets an adapter answer, too: a listed one or any id, for example of a hub repository. */
export function choose(adapter) {
  const listed = [...models].find(([, model]) => model.adapter === adapter);
  const name = listed ? listed[0] : adapter;
  if (!listed) models.set(name, { adapter, tier: null });
  const fits = chosen.has(name) || !isFull();
  if (fits) chosen.add(name);
  find("status").textContent = fits ? "" : `${MOST_ADAPTERS} adapters answer already.`;
  showChoices();
}

const isFull = () => [...chosen].filter((name) => models.get(name).adapter).length >= MOST_ADAPTERS;

function showChoices() {
  const names = [...models.keys()];
  const shown = new Set([...names.slice(0, SHOWN + 1), ...chosen]);
  const buttons = [...shown].map((name) => {
    const { adapter, tier } = models.get(name);
    const pressed = chosen.has(name);
    const toggle = () => {
      if (!chosen.delete(name)) chosen.add(name);
      showChoices();
    };
    const disabled = !pressed && adapter !== null && isFull();
    const state = { "aria-pressed": String(pressed), disabled, "data-name": name };
    const parts = [adapter === null ? "base model" : name, make("small", {}, tier ?? "")];
    return make("button", { type: "button", onclick: toggle, ...state }, ...parts);
  });
  const focused = document.activeElement?.dataset?.name;
  find("choices").replaceChildren(...buttons);
  buttons.find((button) => button.dataset.name === focused)?.focus();
  find("other").disabled = isFull();
  find("send").disabled = !chosen.size || running !== null;
}

async function send() {
  const question = find("question").value.trim();
  if (!question || running || !chosen.size) return;
  let requests;
  try {
    requests = [...chosen].map((name) => [name, readRequest(find("composer"), name, history(name), question)]);
  } catch (error) {
    find("status").textContent = error.message;
    return;
  }
  const turn = { question, answers: new Map() };
  turns.push(turn);
  const answers = make("div", { class: "answers" });
  find("turns").append(make("div", { class: "turn" }, make("p", { class: "question" }, question), answers));
  find("question").value = "";
  find("hint").hidden = true;
  scrollTo(0, document.body.scrollHeight);
  begin(new AbortController());
  const { signal } = running;
  await Promise.all(requests.map(async ([name, request]) => {
    const shown = showAnswer(name, request);
    answers.append(shown.card);
    const text = await receive(request, shown, signal);
    if (text) turn.answers.set(name, text);
  }));
  if (running?.signal === signal) begin(null);
  find("status").textContent = signal.aborted ? "Stopped." : "All have answered.";
  loadModels().catch(() => {}); // where the adapters are now
}

/** Begins answers, or ends them with null. */
function begin(controller) {
  running = controller;
  find("stop").hidden = !controller;
  find("send").disabled = !!controller || !chosen.size;
  find("status").textContent = "";
}

/** What one of the models has been asked and has answered. */
function history(name) {
  return turns.filter((turn) => turn.answers.has(name)).flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answers.get(name) },
  ]);
}

function showAnswer(name, request) {
  const { adapter } = models.get(name);
  const thoughts = make("div", { class: "text", tabindex: 0, role: "group", "aria-label": "Thoughts" });
  const content = make("div", { class: "text", tabindex: 0, role: "group", "aria-label": "Answer" });
  const thinking = make("details", { open: true, hidden: true }, make("summary", {}, "Thoughts"), thoughts);
  const figures = make("p", { class: "figures" }, "waiting");
  const code = make("button", { type: "button", onclick: () => showCalls(request, adapter) }, "Code");
  const heading = make("header", {}, make("h2", {}, adapter === null ? "base model" : name), code);
  const card = make("article", { "aria-label": adapter ?? "base model" }, heading, thinking, content, figures);
  return { card, thinking, figures, text: new TokenText(thoughts, content) };
}

/** Shows an answer as it arrives, and returns its text. What arrived before an error or a stop counts, too. */
async function receive(request, { card, thinking, figures, text }, signal) {
  const begun = performance.now();
  const extra = { stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: 5 };
  let answer = "", first = null, reason = null, usage = null;
  try {
    const response = await call("v1/chat/completions", { ...request, ...extra }, signal);
    const warning = response.headers.get("X-Loraplex-Warning");
    if (warning) card.insertBefore(make("p", { class: "warning" }, warning), thinking);
    for await (const chunk of events(response)) {
      usage = chunk.usage ?? usage;
      for (const { delta, logprobs, finish_reason } of chunk.choices) {
        reason = finish_reason ?? reason;
        if (delta.reasoning_content) thinking.hidden = false;
        if (delta.content || delta.reasoning_content) first ??= performance.now();
        answer += delta.content ?? "";
        const follow = innerHeight + scrollY > document.body.scrollHeight - 80; // the end is in view
        text.add(delta, logprobs?.content ?? []);
        if (follow) scrollTo(0, document.body.scrollHeight);
      }
    }
    figures.textContent = describe(usage, reason, begun, first);
  } catch (error) {
    figures.textContent = signal.aborted ? "stopped" : "";
    if (!signal.aborted) card.append(make("p", { class: "problem", role: "alert" }, error.message));
  }
  return answer;
}

function describe(usage, reason, begun, first) {
  const found = [];
  if (reason === "length") found.push("cut off");
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    found.push(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`, `${cached} cached`);
  }
  if (first) {
    const seconds = (performance.now() - first) / 1000;
    found.push(`first token ${Math.round(first - begun)} ms`);
    if (usage?.completion_tokens > 1 && seconds > 0) {
      found.push(`${((usage.completion_tokens - 1) / seconds).toFixed(0)} tokens/s`);
    }
  }
  return found.join(" · ");
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
find("other").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  if (event.target.value.trim()) choose(event.target.value.trim());
  event.target.value = "";
});
find("stop").addEventListener("click", () => running?.abort());
find("clear").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  find("turns").replaceChildren();
  find("hint").hidden = false;
  find("question").focus();
});
watchTokens(find("turns"), find("probabilities"));
