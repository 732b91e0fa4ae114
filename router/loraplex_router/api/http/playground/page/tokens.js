// An answer's text as it arrives, and how likely each of its tokens was.

import { bar, make } from "./elements.js";

const groups = new WeakMap(); // by element: the tokens that it shows, several if a character takes several

/** The thoughts and the content of one answer. The server says what their text is; tokens are found in it. */
export class TokenText {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #waiting = []; // groups whose text has not arrived
  #partial = [];
  #lost = false; // the text is not that of the tokens, for example because a parser changed it

  constructor(thoughts, content) {
    [this.thoughts, this.content] = [thoughts, content].map((element) => {
      const tail = document.createTextNode(""); // the text without tokens so far
      element.append(tail);
      return { element, tail, begun: false };
    });
  }

  /** Takes a chunk's delta, and the tokens that came with it. */
  add(delta, tokens) {
    for (const token of tokens) {
      this.#partial.push(token);
      const text = this.#decoder.decode(new Uint8Array(token.bytes ?? []), { stream: true });
      if (!text) continue;
      this.#waiting.push({ text, tokens: this.#partial });
      this.#partial = [];
    }
    if (delta.reasoning_content) this.#show(this.thoughts, delta.reasoning_content);
    if (delta.content) this.#show(this.content, delta.content);
  }

  #show(section, text) {
    const { element, tail } = section;
    tail.data += text;
    while (!this.#lost && this.#waiting.length && tail.data) {
      const { text, tokens } = this.#waiting[0];
      const shown = section.begun || tail.data.startsWith(text) ? text : text.trimStart();
      if (shown && tail.data.startsWith(shown)) {
        const span = make("span", { class: "token", "data-level": level(tokens) }, shown);
        groups.set(span, tokens);
        element.insertBefore(span, tail);
        tail.data = tail.data.slice(shown.length);
        section.begun = true;
      } else if (shown.startsWith(tail.data)) {
        return; // the rest is to come
      } else {
        this.#lost = section.begun; // before the text there may be tags of thoughts, which are not shown
      }
      this.#waiting.shift();
    }
  }
}

const likelihood = (tokens) => Math.exp(tokens.reduce((sum, token) => sum + token.logprob, 0));
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`;

/** How unlikely: 0 to 2, for the colour. */
const level = (tokens) => [0.3, 0.1].filter((limit) => likelihood(tokens) < limit).length;

/** Shows a token's probabilities in `tip` when the pointer is on it, or when the arrow keys come to it. */
export function watchTokens(root, tip) {
  let current = null;
  const show = (span) => {
    current?.classList.remove("current");
    current = span;
    tip.hidden = !span;
    if (!span) return;
    span.classList.add("current");
    tip.replaceChildren(...describe(groups.get(span)));
    const { left, bottom } = span.getClientRects()[0];
    tip.style.left = `${Math.max(0, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${bottom + tip.offsetHeight > innerHeight ? bottom - tip.offsetHeight - 30 : bottom + 4}px`;
  };
  root.addEventListener("pointerover", (event) => show(event.target.closest(".token")));
  root.addEventListener("click", (event) => show(event.target.closest(".token"))); // a finger is no longer over it
  root.addEventListener("pointerleave", () => show(null));
  root.addEventListener("focusout", () => show(null));
  root.addEventListener("keydown", (event) => {
    const text = event.target.closest(".text");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") show(null);
    if (!text || !step) return;
    event.preventDefault();
    const tokens = [...text.querySelectorAll(".token")];
    const next = tokens.indexOf(current) + step;
    if (tokens.length) show(tokens[Math.max(0, Math.min(next, tokens.length - 1))]);
  });
}

function describe(tokens) {
  const [first] = tokens;
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣");
  const heading = tokens.length > 1 ? `${tokens.length} tokens` : visible(first.token);
  const rows = tokens.length > 1 ? tokens : first.top_logprobs;
  return [
    make("strong", {}, `${heading}  ${percent(likelihood(tokens))}`),
    ...rows.map(({ token, logprob }) => {
      const share = Math.exp(logprob);
      const cells = [make("span", {}, visible(token)), bar([["used", share]]), percent(share)];
      return make("div", { class: token === first.token ? "chosen" : null }, ...cells);
    }),
  ];
}
