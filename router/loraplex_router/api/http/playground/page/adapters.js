// The adapters: where they are, how they are, and what they cost.

import { fillTable, find, make } from "./elements.js";
import { read } from "./server.js";

const PAGE = 200; // adapters
const HEADINGS = ["adapter", "tier", "state", "lora_rank", "size", "running", "waiting", "used", ""];
const NUMBERS = new Set(["lora_rank", "size", "running", "waiting", "used", ""]);
let limit = PAGE;

/** Shows them as they are now. `compare` takes an adapter's id into the chat. */
export async function showAdapters(compare) {
  const adapters = await read(`adapters?limit=${limit}`);
  const focused = document.activeElement?.dataset?.adapter;
  fillTable(find("adapter-table"), HEADINGS, NUMBERS, adapters.map((adapter) => row(adapter, compare)));
  if (focused) find("adapter-table").querySelector(`[data-adapter="${CSS.escape(focused)}"]`)?.focus();
  find("more").hidden = adapters.length < limit;
}

function row(adapter, compare) {
  const remarks = [adapter.reason, ...adapter.warnings, adapter.targets.map(share).join(" or ")].filter(Boolean);
  const name = make("div", {}, make("strong", {}, adapter.id), ...remarks.map((remark) => make("small", {}, remark)));
  const button = { type: "button", onclick: () => compare(adapter.id), "data-adapter": adapter.id };
  return [
    name,
    (adapter.tier ?? "") + (adapter.pinned ? ", pinned" : ""),
    adapter.state,
    String(adapter.lora_rank ?? ""),
    adapter.size_bytes === null ? "" : bytes(adapter.size_bytes),
    String(adapter.running_sequences),
    String(adapter.waiting_sequences),
    adapter.last_used === null ? "" : new Date(adapter.last_used * 1000).toLocaleTimeString(),
    adapter.state === "broken" ? "" : make("button", button, "Chat"),
  ];
}

const share = ({ adapter, percent }) => `stands for ${adapter} (${percent} %)`;

function bytes(size) {
  const units = ["B", "kB", "MB", "GB"];
  const unit = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, size)) / 3));
  return `${(size / 1000 ** unit).toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

find("more").addEventListener("click", () => {
  limit += PAGE;
});
