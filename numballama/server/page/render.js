// Shows Markdown. The server turns it into HTML, in which everything that the model wrote is escaped; what the server has
// not rendered yet is shown as plain text behind it. No other place of the page makes HTML out of a string.

import { request } from "./api.js";
import { copyButton, el } from "./dom.js";

const policy = window.trustedTypes?.createPolicy("rendered-markdown", { createHTML: (html) => html });
const MAX_BYTES = 256 * 1024;
const MOST_REQUESTS = 2;
const KEPT = 300;
const kept = new Map(); // text → HTML, the oldest first
const waiting = []; // the newest is rendered first: it is at the end of the conversation, where one looks
let running = 0;

function renderOnServer(text) {
  if (kept.has(text)) return Promise.resolve(kept.get(text));
  return new Promise((resolve, reject) => {
    waiting.push({ text, resolve, reject });
    next();
  });
}

async function next() {
  if (running >= MOST_REQUESTS || !waiting.length) return;
  running += 1;
  const { text, resolve, reject } = waiting.pop();
  try {
    const headers = { "Content-Type": "text/markdown" };
    const response = await request("render", { method: "POST", headers, body: text });
    resolve(await response.text());
  } catch (error) {
    reject(error);
  }
  running -= 1;
  next();
}

function keep(text, html) {
  kept.delete(text);
  kept.set(text, html);
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
}

export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.rendered = ""; // the start of the text that is shown as HTML
    this.blocks = []; // {html, node} of each element of it
    this.tail = null; // the node that shows the rest
    this.space = ""; // what stands before it
    this.live = false;
    this.busy = false;
    this.took = 0; // ms of the last rendering
  }

  /** Show a text; `live` says that more will come. */
  show(text, live) {
    this.live = live;
    if (text !== this.text) {
      this.text = text;
      if (!text.startsWith(this.rendered)) this.put("", "");
      if (kept.has(text)) this.put(text, kept.get(text));
      else this.showTail();
    }
    this.schedule();
  }

  schedule() {
    const isDone = this.rendered === this.text || this.text.length > MAX_BYTES;
    if (this.busy || isDone) return;
    this.busy = true;
    // a fast server is asked three times a second, a slow one less often: rendering takes time from the model
    const pause = this.live ? Math.min(Math.max(300, 10 * this.took), 5000) : 0;
    this.wake = () => {
      clearTimeout(timer);
      this.wake = null;
      this.renderNow();
    };
    const timer = setTimeout(() => this.wake?.(), pause);
  }

  /** The text is complete: do not wait for the pause to end. */
  finish() {
    this.live = false;
    this.wake?.();
  }

  async renderNow() {
    const text = this.text;
    const start = performance.now();
    try {
      const html = await renderOnServer(text);
      if (!this.live) keep(text, html);
      if (this.text.startsWith(text)) this.put(text, html);
      this.took = performance.now() - start;
      this.busy = false;
      this.schedule();
    } catch {
      this.busy = false; // the text stays as it is; the next part of an answer tries again
      this.took = 1000;
    }
  }

  /** Show `html`, which the server made of `text`. Elements that did not change stay, and with them what is selected. */
  put(text, html) {
    this.removeTail();
    const template = document.createElement("template");
    template.innerHTML = policy ? policy.createHTML(html) : html;
    const blocks = [...template.content.children].map((node) => ({ html: node.outerHTML, node }));
    let same = 0;
    while (same < blocks.length && blocks[same].html === this.blocks[same]?.html) same += 1;
    for (const { node } of this.blocks.slice(same)) node.remove();
    for (const block of blocks.slice(same)) {
      block.node = decorate(block.node);
      this.element.append(block.node);
    }
    this.blocks = [...this.blocks.slice(0, same), ...blocks.slice(same)];
    this.rendered = text;
    this.showTail();
  }

  removeTail() {
    this.tail?.remove();
    this.tail = null;
  }

  /** The text that is not rendered yet, where its first word belongs: in the last paragraph, item or code. */
  showTail() {
    const rest = this.text.slice(this.rendered.length);
    if (this.tail) {
      this.tail.textContent = this.space + rest;
      return;
    }
    if (!rest) return;
    const code = this.blocks.at(-1)?.node.querySelector(":scope > pre > code");
    const isOpenCode = code && !/(`{3,}|~{3,})\s*$/.test(this.rendered);
    this.tail = el("span", { class: "tail" });
    if (isOpenCode) {
      this.blocks.at(-1).html = null; // changed by hand
      if (!this.rendered.endsWith("\n")) code.textContent = code.textContent.replace(/\n$/, "");
      code.append(this.tail);
    } else {
      const parent = /\n\s*\n\s*$/.test(this.rendered) || code ? null : lastParagraph(this.element);
      if (!parent) this.tail = el("p", { class: "tail" });
      (parent ?? this.element).append(this.tail);
    }
    this.space = !isOpenCode && /[ \n]$/.test(this.rendered) ? " " : ""; // HTML of a paragraph ends without its space
    this.tail.textContent = this.space + rest;
  }
}

const CONTAINERS = new Set(["UL", "OL", "LI", "BLOCKQUOTE", "TABLE", "TBODY", "TR", "DIV"]);
const PARAGRAPHS = new Set(["P", "LI", "H1", "H2", "H3", "H4", "H5", "H6", "TD"]);

function lastParagraph(element) {
  let last = element.lastElementChild;
  while (last && CONTAINERS.has(last.tagName) && CONTAINERS.has(last.lastElementChild?.tagName)) last = last.lastElementChild;
  const inner = last?.lastElementChild;
  if (inner && CONTAINERS.has(last.tagName) && PARAGRAPHS.has(inner.tagName)) last = inner;
  return last && PARAGRAPHS.has(last.tagName) ? last : null;
}

/** Code gets a bar with its language and a button to copy it; tables get a frame that scrolls. */
function decorate(node) {
  if (node.tagName === "PRE") return codeBlock(node);
  if (node.tagName === "TABLE") return el("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": "Table" }, node);
  for (const pre of node.querySelectorAll("pre")) {
    const place = document.createComment("");
    pre.replaceWith(place);
    place.replaceWith(codeBlock(pre));
  }
  return node;
}

export function codeBlock(pre) {
  const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "";
  pre.tabIndex = 0;
  const bar = el("div", { class: "code-bar" }, el("span", {}, language), copyButton("Copy code", () => pre.textContent.replace(/\n$/, "")));
  return el("div", { class: "code-block" }, bar, pre);
}
