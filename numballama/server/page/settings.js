// The settings panel: what is sent with the messages of a conversation, and the facts about the server.

import { apiKey } from "./api.js";
import { $, el } from "./dom.js";
import { NUMBERS } from "./store.js";

const EXAMPLE = {
  type: "object",
  properties: { name: { type: "string" }, year: { type: "integer" }, tags: { type: "array", items: { type: "string" } } },
  required: ["name", "year", "tags"],
  additionalProperties: false,
};

export class Settings {
  /** `changed` is called when a value was changed, `keyChanged` when the API key was. */
  constructor({ changed, keyChanged }) {
    this.form = $("settings-form");
    this.changed = changed;
    this.settings = null;
    this.form.addEventListener("input", () => this.read());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    $("schema-example").addEventListener("click", () => {
      this.form.elements.schema.value = JSON.stringify(EXAMPLE, null, 2);
      this.read();
    });
    $("api-key").value = apiKey.get();
    $("api-key").addEventListener("change", (event) => {
      apiKey.set(event.target.value.trim());
      keyChanged();
    });
    $("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      apiKey.set($("api-key").value.trim());
      keyChanged();
    });
  }

  /** Edit these settings. */
  show(settings) {
    this.settings = settings;
    const fields = this.form.elements;
    for (const name of NUMBERS) fields[name].value = settings[name] ?? "";
    for (const name of ["system", "schema", "regex", "format"]) fields[name].value = settings[name];
    this.check();
  }

  read() {
    const fields = this.form.elements;
    for (const name of NUMBERS) {
      if (fields[name].validity.valid) this.settings[name] = fields[name].value === "" ? null : fields[name].valueAsNumber;
    }
    for (const name of ["system", "schema", "regex", "format"]) this.settings[name] = fields[name].value;
    this.check();
    this.changed();
  }

  /** Mark the fields that cannot be sent. Returns the first of them, or null. */
  check() {
    const wrong = [];
    for (const name of NUMBERS) {
      const field = this.form.elements[name];
      const isWrong = !field.validity.valid;
      field.setAttribute("aria-invalid", isWrong);
      $(`${name}-hint`).classList.toggle("bad", isWrong);
      if (isWrong) wrong.push(field);
    }
    const { format, schema, regex } = this.form.elements;
    $("schema-field").hidden = format.value !== "json";
    $("regex-field").hidden = format.value !== "regex";
    const checks = { json: [schema, schemaTrouble(schema.value), "schema"], regex: [regex, regex.value ? null : "Write an expression.", "regex"] };
    if (checks[format.value]) {
      const [field, trouble, name] = checks[format.value];
      field.setAttribute("aria-invalid", trouble !== null);
      $(`${name}-check`).textContent = trouble ?? (name === "schema" ? "This is valid JSON." : "");
      $(`${name}-check`).classList.toggle("bad", trouble !== null);
      if (trouble) wrong.push(field);
    }
    return wrong[0] ?? null;
  }

  showServer(facts) {
    for (const name of NUMBERS) {
      if (Number.isFinite(facts.defaults[name])) this.form.elements[name].placeholder = `Default: ${facts.defaults[name]}`;
    }
    const rows = [["Model", facts.model]];
    if (facts.context) rows.push(["Context", `${facts.context.toLocaleString("en")} tokens`]);
    if (facts.max_sequences) rows.push(["Answers at a time", String(facts.max_sequences)]);
    $("server-facts").replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }
}

/** What is wrong with a JSON Schema as far as a browser can tell; the server checks the rest. */
function schemaTrouble(text) {
  if (!text.trim()) return "Write a JSON Schema.";
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) return "A JSON Schema is an object: {…}.";
  return null;
}
