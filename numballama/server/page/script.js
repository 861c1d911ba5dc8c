// The page to chat on: connects the parts.

import { Announcer } from "./announce.js";
import { ApiError, bodyOf, serverFacts, streamAnswer } from "./api.js";
import { $, el, fitHeight, icon, setIcon, toast } from "./dom.js";
import { closePanels, openPanel, setUpPanels } from "./panels.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";

const SAVE_EVERY = 2000; // ms, while an answer grows
let conversations = store.loadAll();
let current = conversations[0] ?? store.newConversation(store.defaultSettings());
let facts = { model: "", context: null, max_sequences: null, defaults: {} };
const runs = new Map(); // conversation id → AbortController

const announcer = new Announcer($("announcements"));
const sidebar = new Sidebar({ open, create, rename, remove, add });
const settings = new Settings({ changed: () => saveIfListed(current), keyChanged: connect });
const thread = new Thread({ edit, regenerate, retry: regenerate, choose, askForKey });

// ---- conversations

function saveIfListed(conversation) {
  if (conversations.includes(conversation)) save(conversation);
}

function save(conversation) {
  const trouble = store.save(conversation);
  if (trouble) toast(trouble);
}

function refresh() {
  sidebar.show(conversations, current);
  $("title").textContent = current.title;
  document.title = conversations.includes(current) ? `${current.title} · numballama` : "numballama";
  showRunning();
  showContext();
}

function open(conversation) {
  current = conversation;
  thread.show(current);
  thread.toEnd();
  settings.show(current.settings);
  refresh();
  closePanels({ narrowOnly: true });
}

function create() {
  open(conversations.includes(current) || current.nodes.length ? store.newConversation(current.settings) : current);
  $("message").focus();
}

function rename(conversation, title) {
  conversation.title = title;
  conversation.named = true;
  saveIfListed(conversation);
  refresh();
}

function remove(conversation) {
  runs.get(conversation.id)?.abort();
  const place = conversations.indexOf(conversation);
  conversations = conversations.filter((one) => one !== conversation);
  store.forget(conversation.id);
  if (conversation === current) open(conversations[place] ?? conversations.at(-1) ?? store.newConversation(current.settings));
  refresh();
  const undo = () => {
    conversations.splice(place, 0, conversation);
    save(conversation);
    open(conversation);
  };
  toast("Conversation deleted", { label: "Undo", run: undo });
}

function add(found) {
  const known = new Set(conversations.map((one) => one.id));
  for (const conversation of found) if (known.has(conversation.id)) conversation.id = store.newId();
  conversations = [...found, ...conversations].sort((a, b) => b.updated - a.updated);
  found.forEach(save);
  if (found.length) open(found[0]);
  toast(`${found.length} ${found.length === 1 ? "conversation" : "conversations"} imported`);
}

// ---- messages

function send(text) {
  const wrong = settings.check();
  if (wrong) {
    openPanel("settings");
    wrong.focus();
    toast("A setting cannot be sent. It is marked.");
    return false;
  }
  store.addNode(current, current.leaf, "user", text);
  answer(current, current.leaf);
  return true;
}

function edit(node, text) {
  stop();
  current.leaf = node.parent;
  if (send(text)) return;
  store.chooseBranch(current, node);
  thread.show(current);
}

function regenerate(node) {
  stop();
  const wrong = settings.check();
  if (wrong) {
    openPanel("settings");
    wrong.focus();
    return;
  }
  if (node.error && !node.content && !node.reasoning) store.removeNode(current, node);
  answer(current, node.parent);
}

function choose(node) {
  store.chooseBranch(current, node);
  thread.show(current);
  saveIfListed(current);
  showContext();
}

function stop() {
  runs.get(current.id)?.abort();
}

async function answer(conversation, parent) {
  const control = new AbortController();
  const node = store.addNode(conversation, parent, "assistant", "");
  node.state = "running";
  node.format = conversation.settings.format === "json" ? "json" : "text";
  conversation.updated = Date.now();
  conversations = [conversation, ...conversations.filter((one) => one !== conversation)];
  runs.set(conversation.id, control);
  save(conversation);
  thread.show(current);
  thread.toEnd();
  refresh();
  announcer.start();
  announcer.say("The model is answering");
  const isTouched = matchMedia("(pointer: coarse)").matches; // the message box would show a keyboard over the answer
  $(isTouched ? "send" : "message").focus({ preventScroll: true });

  let saved = performance.now();
  const draw = perFrame(() => {
    if (node.state !== "running") return;
    thread.update(conversation, node);
    if (conversation === current) announcer.feed(node.content);
    if (performance.now() - saved > SAVE_EVERY) {
      saved = performance.now();
      saveIfListed(conversation);
    }
  });
  let note = "End of the answer";
  try {
    const body = bodyOf(conversation, parent, facts.model);
    await streamAnswer(body, node, { signal: control.signal, changed: draw });
    node.state = "done";
  } catch (error) {
    if (error.name === "AbortError") {
      node.state = "stopped";
      note = "Stopped";
    } else {
      node.state = "failed";
      node.error = { text: error instanceof ApiError ? error.message : `The page failed: ${error.message}`, key: error.key === true };
      note = "";
    }
  }
  if (runs.get(conversation.id) === control) runs.delete(conversation.id);
  saveIfListed(conversation);
  thread.update(conversation, node);
  if (conversation === current) announcer.finish(node.content, note);
  showRunning();
  showContext();
}

/** Call `draw` at most once a frame; in a hidden tab, where there are no frames, five times a second. */
function perFrame(draw) {
  let isPlanned = false;
  const run = () => {
    isPlanned = false;
    draw();
  };
  return () => {
    if (isPlanned) return;
    isPlanned = true;
    if (document.hidden) setTimeout(run, 200);
    else requestAnimationFrame(run);
  };
}

function showRunning() {
  const isRunning = runs.has(current.id);
  const label = isRunning ? "Stop generating" : "Send";
  $("send").classList.toggle("stops", isRunning);
  $("send").setAttribute("aria-label", label);
  $("send").title = label;
  setIcon($("send"), isRunning ? "stop" : "send");
}

function showContext() {
  const stats = store.pathOf(current).findLast((node) => node.stats?.prompt)?.stats;
  const used = stats ? stats.prompt + stats.tokens : 0;
  const of = facts.context ? ` of ${facts.context.toLocaleString("en")}` : "";
  $("context").textContent = used ? `${used.toLocaleString("en")}${of} tokens of context used` : "";
}

// ---- the server

let retryTimer = 0;

async function connect() {
  clearTimeout(retryTimer);
  try {
    facts = await serverFacts();
    $("model").textContent = facts.model;
    $("banner").hidden = true;
    settings.showServer(facts);
    showContext();
  } catch (error) {
    const buttons = [el("button", { type: "button", class: "button", onclick: connect }, icon("again"), "Try again")];
    if (error.key) buttons.unshift(el("button", { type: "button", class: "button", onclick: askForKey }, "Enter an API key"));
    const text = error instanceof ApiError ? error.message : "The server’s answer could not be read.";
    $("banner").replaceChildren(el("p", {}, text), el("div", { class: "buttons" }, ...buttons));
    $("banner").hidden = false;
    if (error.loading) retryTimer = setTimeout(connect, 2000);
  }
}

function askForKey() {
  openPanel("settings");
  $("api-key").focus();
}

// ---- the message box and keys

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (runs.has(current.id)) stop();
  else submit();
});

function submit() {
  const area = $("message");
  if (runs.has(current.id) || !area.value.trim()) return;
  if (!send(area.value)) return;
  area.value = "";
  fitHeight(area);
}

$("message").addEventListener("input", (event) => fitHeight(event.target));
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (thread.cancelEditing() || closePanels({ narrowOnly: true })) return;
  stop();
});

// another tab of this browser changed a conversation
window.addEventListener("storage", (event) => {
  if (!store.isConversationKey(event.key)) return;
  const id = store.idOfKey(event.key);
  if (runs.has(id)) return;
  const other = event.newValue === null ? null : store.loadOne(id);
  const mine = conversations.find((one) => one.id === id);
  conversations = conversations.filter((one) => one !== mine);
  if (other) conversations = [other, ...conversations].sort((a, b) => b.updated - a.updated);
  if (mine === current) open(other ?? store.newConversation(current.settings));
  else refresh();
});

window.addEventListener("pagehide", () => conversations.filter((one) => runs.has(one.id)).forEach(save));

setUpPanels();
open(current);
connect();
$("message").focus();
