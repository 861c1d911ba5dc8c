// The server's API: which model it has, and streamed answers. Errors come in plain words.

import { NUMBERS, pathOf } from "./store.js";

const KEY = "numballama.api-key";

export class ApiError extends Error {
  constructor(text, { key = false, loading = false } = {}) {
    super(text);
    this.key = key; // an API key is missing or wrong
    this.loading = loading;
  }
}

let keyWithoutStorage = "";

/** The API key: for as long as the tab is open. */
export const apiKey = {
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return keyWithoutStorage; // storage is blocked
    }
  },
  set(key) {
    keyWithoutStorage = key;
    try {
      if (key) sessionStorage.setItem(KEY, key);
      else sessionStorage.removeItem(KEY);
    } catch {
      // the key lasts as long as the page
    }
  },
};

/** Addresses are relative to the page, which may stand behind a prefix. */
export async function request(path, { method = "GET", headers = {}, body = undefined, signal = undefined } = {}) {
  const key = apiKey.get();
  if (key) headers = { ...headers, Authorization: `Bearer ${key}` };
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Check that numballama serve is still running.");
  }
  if (!response.ok) throw await explain(response);
  return response;
}

async function explain(response) {
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    // an answer of something between here and the server
  }
  said = typeof said === "string" ? said : "";
  const detail = said ? ` The server says: ${said}` : "";
  const seconds = Number(response.headers.get("retry-after"));
  switch (response.status) {
    case 401:
    case 403:
      return new ApiError("The server wants an API key, or does not know the one in the settings.", { key: true });
    case 404:
      return new ApiError(`The server does not have what was asked for.${detail}`);
    case 413:
      return new ApiError(`The conversation is too large for the server.${detail}`);
    case 429:
      return new ApiError(`The server is busy. Try again ${seconds ? `in ${seconds} s` : "in a moment"}.`);
    case 503:
      return new ApiError("The server is not ready: it is loading the model, or shutting down.", { loading: true });
  }
  if (response.status >= 500) return new ApiError(`Something failed in the server (${response.status}).${detail}`);
  return new ApiError(`The server cannot do this (${response.status}).${detail}`);
}

/** {model, context, max_sequences, defaults} of the server; null is not known. */
export async function serverFacts() {
  const models = await (await request("v1/models")).json();
  const facts = { model: String(models.data?.[0]?.id ?? ""), context: null, max_sequences: null, defaults: {} };
  try {
    const props = await (await request("props")).json();
    facts.context = props.context ?? null;
    facts.max_sequences = props.max_sequences ?? props.total_slots ?? null;
    facts.defaults = props.default_generation_settings ?? {};
  } catch (error) {
    if (error.loading) throw error;
  }
  return facts;
}

/** What is sent for a conversation up to a message. Fields that are not set are left to the server. */
export function bodyOf(conversation, leaf, model) {
  const settings = conversation.settings;
  const messages = pathOf(conversation, leaf).map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (settings[name] !== null) body[name] = settings[name];
  if (settings.format === "json") {
    const schema = JSON.parse(settings.schema);
    body.response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
  }
  if (settings.format === "regex") body.regex = settings.regex;
  return body;
}

/** Fill `node` with a streamed answer; calls `changed` after each part. Throws ApiError or AbortError. */
export async function streamAnswer(body, node, { signal, changed }) {
  const start = performance.now();
  let first = null;
  let last = start;
  let parts = 0;
  let usage = null;
  let complete = false;
  const measure = () => {
    const tokens = usage?.completion_tokens ?? parts;
    node.stats = {
      first: first === null ? null : (first - start) / 1000,
      seconds: first === null ? null : (last - first) / 1000,
      tokens,
      exact: usage !== null,
      prompt: usage?.prompt_tokens ?? null,
      cached: usage?.prompt_tokens_details?.cached_tokens ?? null,
    };
  };
  try {
    const response = await request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(`The server stopped: ${chunk.error.message ?? "no reason given"}`);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      const content = choice?.delta?.content ?? "";
      const reasoning = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? "";
      if (content || reasoning) {
        last = performance.now();
        first ??= last;
        parts += 1;
        node.content += content;
        node.reasoning += reasoning;
      }
      if (choice?.finish_reason) {
        node.finish = choice.finish_reason;
        complete = true;
      }
      if (content || reasoning) changed();
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    if (error instanceof SyntaxError) throw new ApiError("The server sent something that is not JSON.");
    throw new ApiError("The connection broke before the answer was complete.");
  } finally {
    measure();
  }
  if (!complete) throw new ApiError("The connection ended before the answer was complete.");
}

/** The data of each server-sent event. Lines that start with a colon keep the connection open and say nothing. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) {
        if (rest.startsWith("data:")) yield rest.slice(5).trim();
        return;
      }
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
