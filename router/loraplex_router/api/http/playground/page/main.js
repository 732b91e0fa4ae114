// Starts the page: its views, the API key, and the model that the server has.

import { showAdapters } from "./adapters.js";
import { loadModels } from "./chat.js";
import { find } from "./elements.js";
import { showLive } from "./live.js";
import { read, useKey } from "./server.js";

const VIEWS = { chat: null, adapters: showAdapters, live: showLive };
const SECONDS = 2; // between two looks at the server

const view = () => (Object.hasOwn(VIEWS, location.hash.slice(1)) ? location.hash.slice(1) : "chat");

/** Shows the current view. What it shows of the server is read anew while somebody may be looking. */
async function refresh() {
  for (const name of Object.keys(VIEWS)) find(`${name}-view`).hidden = name !== view();
  for (const link of document.querySelectorAll("nav a")) {
    link.setAttribute("aria-current", link.hash === `#${view()}` ? "page" : "false");
  }
  if (VIEWS[view()] && !document.hidden) await report(VIEWS[view()]);
}

/** Runs something that asks the server, and shows what goes wrong. */
async function report(run) {
  const problem = find("problem");
  try {
    await run();
    problem.hidden = true;
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
  }
}

async function start() {
  const info = await read("info");
  find("model").textContent = info.model_id;
  if (info.model_pipeline_tag !== "text-generation") {
    find("hint").textContent = `This model does not chat: it is for ${info.model_pipeline_tag}.`;
    find("composer").hidden = true;
  } else {
    await loadModels();
  }
}

window.addEventListener("key-needed", () => {
  if (!find("key-form").hidden) return;
  find("key-form").hidden = false;
  find("key").focus();
});
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(find("key").value.trim());
  find("key").value = "";
  find("key-form").hidden = true;
  report(start).then(refresh);
});
window.addEventListener("hashchange", refresh);
report(start).then(async () => {
  for (;;) {
    await refresh();
    await new Promise((wake) => setTimeout(wake, SECONDS * 1000));
  }
});
