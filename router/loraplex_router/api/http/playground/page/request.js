// The body of a chat completion, from the form.

const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

/** The request for one model. Throws an Error that names what cannot be sent. */
export function readRequest(form, model, history, question) {
  const fields = new FormData(form);
  const text = (name) => fields.get(name).trim();
  const system = text("system") ? [{ role: "system", content: text("system") }] : [];
  const request = { model, messages: [...system, ...history, { role: "user", content: question }] };
  for (const name of NUMBERS) {
    if (form.elements[name].validity.badInput) throw new Error(`${name} is not a number.`);
    if (text(name)) request[name] = Number(text(name));
  }
  if (fields.get("stop")) request.stop = [fields.get("stop")];
  if (text("schema")) {
    request.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parse(text("schema")) } };
  }
  return request;
}

function parse(schema) {
  try {
    return JSON.parse(schema);
  } catch (error) {
    throw new Error(`The JSON schema is not JSON: ${error.message}`);
  }
}
