// Conversations: a tree of messages each, kept in localStorage, exported and imported as JSON.
//
// A conversation is {id, title, named, updated, settings, nodes, leaf}. A node is a message with its parent's id; editing
// or regenerating adds a sibling. The path from the root to `leaf` is what is shown and sent.

const PREFIX = "numballama.conversation.";
const FORMAT = "numballama conversations";
const MAX_IMPORT = 5_000_000;

export const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];
const TEXTS = ["system", "schema", "regex"];

export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function defaultSettings() {
  const numbers = Object.fromEntries(NUMBERS.map((name) => [name, null]));
  return { system: "", ...numbers, format: "text", schema: "", regex: "" };
}

export function newConversation(settings) {
  const copy = { ...settings, format: "text" };
  return { id: newId(), title: "New chat", named: false, updated: Date.now(), settings: copy, nodes: [], leaf: null };
}

export function addNode(conversation, parent, role, content) {
  const node = { id: newId(), parent, role, content, reasoning: "", state: "done", format: "text", finish: null, stats: null, error: null };
  conversation.nodes.push(node);
  conversation.leaf = node.id;
  if (role === "user" && !conversation.named) conversation.title = titleOf(pathOf(conversation)[0].content);
  return node;
}

export function removeNode(conversation, node) {
  conversation.nodes = conversation.nodes.filter((other) => other !== node);
  conversation.leaf = node.parent;
}

function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 48 ? `${line.slice(0, 47).trimEnd()}…` : line || "New chat";
}

/** The shown messages, the first one first. */
export function pathOf(conversation, leaf = conversation.leaf) {
  const byId = new Map(conversation.nodes.map((node) => [node.id, node]));
  const path = [];
  for (let node = byId.get(leaf); node && path.length <= byId.size; node = byId.get(node.parent)) path.unshift(node);
  return path;
}

export function siblingsOf(conversation, node) {
  return conversation.nodes.filter((other) => other.parent === node.parent);
}

/** Show the branch of a node, down to its newest message. */
export function chooseBranch(conversation, node) {
  let leaf = node;
  for (let next = leaf; next; next = conversation.nodes.findLast((other) => other.parent === leaf.id)) leaf = next;
  conversation.leaf = leaf.id;
}

export function isConversationKey(key) {
  return key !== null && key.startsWith(PREFIX);
}

export function idOfKey(key) {
  return key.slice(PREFIX.length);
}

/** All stored conversations, the newest first. */
export function loadAll() {
  const found = [];
  try {
    for (let n = 0; n < localStorage.length; n++) {
      const key = localStorage.key(n);
      if (isConversationKey(key)) found.push(parse(localStorage.getItem(key)));
    }
  } catch {
    // storage is blocked: conversations last as long as the page
  }
  return found.filter((one) => one !== null).sort((a, b) => b.updated - a.updated);
}

export function loadOne(id) {
  return parse(localStorage.getItem(PREFIX + id));
}

function parse(text) {
  try {
    return checked(JSON.parse(text));
  } catch {
    return null;
  }
}

/** Returns null, or in plain words why it was not stored. */
export function save(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return null;
  } catch (error) {
    if (error.name !== "QuotaExceededError") return "This browser does not let the page store conversations.";
    return "The browser’s storage for this page is full. Export conversations and delete some.";
  }
}

export function forget(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // nothing was stored
  }
}

export function exportText(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The conversations of an exported file. Throws an Error in plain words. */
export function importText(text) {
  if (text.length > MAX_IMPORT) throw new Error("The file is larger than 5 MB.");
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error("The file holds no conversations of this page.");
  }
  return file.conversations.map((one, n) => {
    const conversation = checked(one);
    if (!conversation) throw new Error(`Conversation ${n + 1} of the file is damaged.`);
    return conversation;
  });
}

const isText = (value) => typeof value === "string";
const isId = (value) => isText(value) && /^[\w-]{1,64}$/.test(value);
const numberOr = (value, other) => (Number.isFinite(value) ? value : other);
const textOr = (value, other) => (isText(value) ? value : other);

/** A copy with the known fields only, or null. What is read was written by another version, or by hand. */
function checked(one) {
  if (!isId(one?.id) || !Array.isArray(one.nodes) || !one.nodes.every(isNode)) return null;
  const nodes = one.nodes.map(checkedNode);
  const known = new Set(nodes.map((node) => node.id));
  if (known.size < nodes.length || nodes.some((node) => node.parent !== null && !known.has(node.parent))) return null;
  const settings = defaultSettings();
  for (const name of NUMBERS) settings[name] = numberOr(one.settings?.[name], null);
  for (const name of TEXTS) settings[name] = textOr(one.settings?.[name], "");
  if (["json", "regex"].includes(one.settings?.format)) settings.format = one.settings.format;
  return {
    id: one.id,
    title: textOr(one.title, "Untitled").slice(0, 200),
    named: one.named === true,
    updated: numberOr(one.updated, 0),
    settings,
    nodes,
    leaf: known.has(one.leaf) ? one.leaf : (nodes.at(-1)?.id ?? null),
  };
}

function isNode(node) {
  const role = node?.role === "user" || node?.role === "assistant";
  return role && isId(node.id) && isText(node.content) && (node.parent === null || isId(node.parent));
}

function checkedNode(node) {
  const stats = node.stats && typeof node.stats === "object" ? {} : null;
  if (stats) {
    for (const name of ["first", "seconds", "tokens", "prompt", "cached"]) stats[name] = numberOr(node.stats[name], null);
    stats.exact = node.stats.exact === true;
  }
  return {
    id: node.id,
    parent: node.parent,
    role: node.role,
    content: node.content,
    reasoning: textOr(node.reasoning, ""),
    state: node.state === "stopped" || node.state === "running" ? "stopped" : node.state === "failed" ? "failed" : "done",
    format: node.format === "json" ? "json" : "text",
    finish: textOr(node.finish, null),
    stats,
    error: checkedError(node.error),
  };
}

function checkedError(error) {
  return isText(error?.text) ? { text: error.text, key: error.key === true } : null;
}
