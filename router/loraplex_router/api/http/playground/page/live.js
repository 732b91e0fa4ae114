// What the server is doing now, from its metrics: the picture of `loraplex top`.

import { bar, find, make, makeTable } from "./elements.js";
import { call } from "./server.js";

const MOST_ADAPTERS = 20; // rows
const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\\\": "\\", "\\n": "\n", '\\"': '"' };
const QUEUES = ["running", "waiting"];
const STEPS = ["steps/s", "step", "prefill", "decode", "adapters"];
const REPLICA = ["replica", ...QUEUES, "KV cache", "device", "host", ...STEPS];
const ADAPTER = ["adapter", ...QUEUES, "requests/s", "prompt tokens/s", "tokens/s", "wait"];

/** One reading of /metrics. */
class Samples {
  time = performance.now() / 1000;
  #found = [];

  constructor(text) {
    for (const line of text.split("\n")) {
      const [, name, labels, value] = LINE.exec(line) ?? [];
      if (!name) continue; // a comment
      const unescape = (text) => text.replace(/\\./g, (found) => ESCAPES[found] ?? found);
      const pairs = [...(labels ?? "").matchAll(LABEL)].map(([, label, text]) => [label, unescape(text)]);
      this.#found.push({ name, labels: Object.fromEntries(pairs), value: Number(value) });
    }
  }

  find(name, labels = {}) {
    const has = (sample) => Object.entries(labels).every(([label, value]) => sample.labels[label] === value);
    return this.#found.filter((sample) => sample.name === name && has(sample));
  }

  sum(name, labels) {
    return this.find(name, labels).reduce((sum, sample) => sum + sample.value, 0);
  }

  values(name, label) {
    const found = this.find(name).filter((sample) => label in sample.labels);
    return [...new Set(found.map((sample) => sample.labels[label]))].sort();
  }
}

/** What changed between two readings. */
class Change {
  constructor(before, now) {
    Object.assign(this, { before, now });
  }

  growth(name, labels) {
    return Math.max(0, this.now.sum(name, labels) - this.before.sum(name, labels)); // 0 if a counter was reset
  }

  rate(name, labels) {
    return this.growth(name, labels) / Math.max(1e-9, this.now.time - this.before.time);
  }

  mean(histogram, labels) {
    const count = this.growth(`${histogram}_count`, labels);
    return count ? this.growth(`${histogram}_sum`, labels) / count : null;
  }
}

const milliseconds = (seconds) => (seconds === null ? "-" : `${(seconds * 1000).toFixed(1)} ms`);

function summary(change) {
  const ended = change.rate("loraplex_requests_total");
  const prompt = change.growth("loraplex_prompt_tokens_total");
  const hits = change.growth("loraplex_prefix_hit_tokens_total");
  return {
    running: change.now.sum("loraplex_sequences", { state: "running" }),
    waiting: change.now.sum("loraplex_sequences", { state: "waiting" }),
    "requests/s": ended.toFixed(1),
    "not finished/s": (ended - change.rate("loraplex_requests_total", { outcome: "finished" })).toFixed(1),
    "tokens/s": change.rate("loraplex_generated_tokens_total").toFixed(1),
    "first token": milliseconds(change.mean("loraplex_time_to_first_token_seconds")),
    "between tokens": milliseconds(change.mean("loraplex_inter_token_seconds")),
    "prefix hits": prompt ? `${Math.round((100 * hits) / prompt)}%` : "-",
  };
}

function replicaRow(change, replica) {
  const { now } = change;
  const sequences = (state) => String(now.sum("loraplex_sequences", { replica, state }));
  const adapters = (tier) => now.sum("loraplex_adapters", { replica, tier });
  const steps = Math.max(1, change.growth("loraplex_step_duration_seconds_count", { replica }));
  const tokens = (phase) => (change.growth("loraplex_step_tokens_total", { replica, phase }) / steps).toFixed(1);
  return [
    replica,
    sequences("running"),
    sequences("waiting"),
    cacheBar(now, replica),
    `${adapters("device")}/${now.sum("loraplex_adapter_slots", { replica })}`,
    String(adapters("host")),
    change.rate("loraplex_step_duration_seconds_count", { replica }).toFixed(1),
    milliseconds(change.mean("loraplex_step_duration_seconds", { replica })),
    tokens("prefill"),
    tokens("decode"),
    change.mean("loraplex_step_adapters", { replica })?.toFixed(1) ?? "-",
  ];
}

/** Blocks in use, blocks that cache prefixes, and free blocks. */
function cacheBar(now, replica) {
  const blocks = (state) => now.sum("loraplex_kv_blocks", { replica, state });
  const [used, cached, free] = ["used", "cached", "free"].map(blocks);
  const total = Math.max(1, used + cached + free);
  const title = `${used} blocks in use, ${cached} cached, ${free} free`;
  const parts = [["used", used / total], ["cached", cached / total]];
  return make("div", { class: "cache", title }, bar(parts), `${Math.round((100 * used) / total)}%`);
}

function adapterRows(change) {
  const found = change.now.values("loraplex_adapter_sequences", "adapter").map((adapter) => {
    const sequences = QUEUES.map((state) => change.now.sum("loraplex_adapter_sequences", { adapter, state }));
    const names = ["requests", "adapter_prompt_tokens", "adapter_generated_tokens"];
    const rates = names.map((name) => change.rate(`loraplex_${name}_total`, { adapter }));
    return { adapter, sequences, rates, busy: [sequences[0] + sequences[1], rates[2], rates[0]] };
  });
  const busier = (a, b) => b.busy.map((value, at) => value - a.busy[at]).find((difference) => difference) ?? 0;
  found.sort(busier); // adapters that are as busy stay in the order of their names
  const rows = found.slice(0, MOST_ADAPTERS).map(({ adapter, sequences, rates }) => [
    adapter,
    ...sequences.map(String),
    ...rates.map((rate) => rate.toFixed(1)),
    milliseconds(change.mean("loraplex_queue_wait_seconds", { adapter })),
  ]);
  return [rows, found.length - rows.length];
}

let before = null;

/** Shows what has happened since the last call. */
export async function showLive() {
  const now = new Samples(await (await call("metrics")).text());
  if (before && now.time - before.time < 1) return; // too short for rates
  const change = new Change(before ?? now, now);
  before = now;
  const [rows, others] = adapterRows(change);
  const replicaRows = now.values("loraplex_sequences", "replica").map((name) => replicaRow(change, name));
  const figure = ([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)));
  find("figures").replaceChildren(...Object.entries(summary(change)).map(figure));
  find("replicas").replaceChildren(makeTable(REPLICA, new Set(REPLICA.slice(1)), replicaRows));
  find("busiest").replaceChildren(makeTable(ADAPTER, new Set(ADAPTER.slice(1)), rows));
  find("others").textContent = others > 0 ? `and ${others} more` : "";
}
