// Makes elements of the page. Text always becomes text, never HTML.

/** An element with properties (`class`, `on...` and attributes) and children: elements or texts. */
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A bar whose parts, each with a class and a share, fill it from the left. */
export function bar(parts) {
  const made = parts.map(([name, share]) => {
    const part = make("span", { class: name });
    part.style.width = `${100 * share}%`;
    return part;
  });
  return make("span", { class: "bar" }, ...made);
}

export const find = (id) => document.getElementById(id);

/** A table. A cell is a text or an element; columns with numbers are aligned on the right. */
export function makeTable(headings, numbers, rows) {
  const cell = (tag, content, column) => make(tag, { class: numbers.has(column) ? "number" : null }, content);
  const head = headings.map((heading) => cell("th", heading, heading));
  const body = rows.map((row) => make("tr", {}, ...row.map((content, at) => cell("td", content, headings[at]))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
}
