// The adapters: where they are, how they are, and what they cost.

import { choose } from "./chat.js";
import { find, make, makeTable } from "./elements.js";
import { read } from "./server.js";

const PAGE = 200; // adapters
const HEADINGS = ["adapter", "tier", "state", "lora_rank", "size", "tokens", "running", "waiting", "used", ""];
const NUMBERS = new Set(HEADINGS.slice(3));
let limit = PAGE;
let shown = "";

/** Shows them as they are now. */
export async function showAdapters() {
  const [adapters, { usage }] = await Promise.all([read(`adapters?limit=${limit}`), read("usage")]);
  const now = JSON.stringify([adapters, usage]);
  if (now === shown) return; // what is selected stays selected
  shown = now;
  const focused = document.activeElement?.dataset?.adapter;
  const rows = adapters.map((adapter) => row(adapter, usage));
  find("adapter-table").replaceChildren(makeTable(HEADINGS, NUMBERS, rows));
  if (focused) find("adapter-table").querySelector(`[data-adapter="${CSS.escape(focused)}"]`)?.focus();
  find("more").hidden = adapters.length < limit;
}

function row(adapter, usage) {
  const targets = adapter.targets.map(({ adapter, percent }) => `${adapter} (${percent}%)`).join(" or ");
  const remarks = [adapter.reason, targets && `stands for ${targets}`, ...adapter.warnings].filter(Boolean);
  const name = make("div", {}, make("strong", {}, adapter.id), ...remarks.map((remark) => make("small", {}, remark)));
  const used = usage.filter((one) => one.adapter === adapter.id); // by each tenant
  const tokens = used.reduce((sum, one) => sum + one.prompt_tokens + one.generated_tokens, 0);
  const chat = () => {
    choose(adapter.id);
    location.hash = "chat";
  };
  return [
    name,
    (adapter.tier ?? "") + (adapter.pinned ? ", pinned" : ""),
    adapter.total_bytes ? `${adapter.state} ${percent(adapter.fetched_bytes / adapter.total_bytes)}` : adapter.state,
    String(adapter.lora_rank ?? ""),
    adapter.size_bytes === null ? "" : bytes(adapter.size_bytes),
    tokens.toLocaleString(),
    String(adapter.running_sequences),
    String(adapter.waiting_sequences),
    adapter.last_used === null ? "" : new Date(adapter.last_used * 1000).toLocaleTimeString(),
    adapter.state === "broken" ? "" : make("button", { onclick: chat, "data-adapter": adapter.id }, "Chat"),
  ];
}

const percent = (part) => `${Math.round(100 * part)}%`;

function bytes(size) {
  const units = ["B", "kB", "MB", "GB"];
  const unit = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, size)) / 3));
  return `${(size / 1000 ** unit).toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

find("more").addEventListener("click", () => {
  limit += PAGE;
  showAdapters().catch(() => {}); // it will be tried again
});
