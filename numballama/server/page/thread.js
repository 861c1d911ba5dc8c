// The messages of a conversation, each a view that is updated in place.

import { $, copyButton, el, fitHeight, icon, iconButton } from "./dom.js";
import { codeBlock, MarkdownView } from "./render.js";
import { pathOf, siblingsOf } from "./store.js";

const number = new Intl.NumberFormat("en");
const rate = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export class Thread {
  /** `actions` are called with a message: edit(node, text), regenerate(node), retry(node), choose(node), askForKey(). */
  constructor(actions) {
    this.actions = actions;
    this.views = [];
    this.scroller = $("scroller");
    this.follows = true; // the end of the thread stays in view
    this.scroller.addEventListener("scroll", () => this.noteScroll());
    new ResizeObserver(() => this.follow()).observe($("thread"));
    new ResizeObserver(() => this.follow()).observe(this.scroller);
    $("to-end").addEventListener("click", () => this.toEnd());
  }

  show(conversation) {
    const nodes = pathOf(conversation);
    let same = 0;
    while (same < nodes.length && this.views[same]?.node === nodes[same]) same += 1;
    for (const view of this.views.splice(same)) view.element.remove();
    for (const node of nodes.slice(same)) {
      const view = new MessageView(node, this.actions);
      this.views.push(view);
      $("thread").append(view.element);
    }
    for (const view of this.views) view.update(conversation);
    $("empty").hidden = nodes.length > 0;
  }

  update(conversation, node) {
    this.views.find((view) => view.node === node)?.update(conversation);
  }

  cancelEditing() {
    return this.views.some((view) => view.stopEditing());
  }

  noteScroll() {
    const { scrollTop, clientHeight, scrollHeight } = this.scroller;
    this.follows = scrollTop + clientHeight > scrollHeight - 60;
    $("to-end").hidden = this.follows;
  }

  follow() {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.noteScroll();
  }

  toEnd() {
    this.follows = true;
    this.follow();
    $("to-end").hidden = true;
  }
}

class MessageView {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.body = el("div", { class: "body" });
    this.foot = el("div", { class: "message-foot" });
    this.parts = [this.body];
    if (node.role === "assistant") this.makeAnswer();
    const name = el("h2", { class: "visually-hidden" }, node.role === "user" ? "You" : "Model");
    this.element = el("article", { class: `message ${node.role}` }, name, ...this.parts, this.foot);
  }

  makeAnswer() {
    this.thought = el("div", { class: "thought" });
    this.summary = el("summary", {}, "Reasoning");
    this.reasoning = el("details", { class: "reasoning", hidden: true }, this.summary, this.thought);
    this.waiting = el("p", { class: "waiting" }, el("span", { class: "dots", "aria-hidden": "true" }), "Waiting for the first token");
    this.trouble = el("div", { class: "trouble", role: "alert", hidden: true });
    this.markdown = new MarkdownView(this.body);
    this.parts = [this.reasoning, this.waiting, this.body, this.trouble];
  }

  update(conversation) {
    if (this.editor) return;
    if (this.node.role === "user") this.body.textContent = this.node.content;
    else this.updateAnswer();
    const isRunning = this.node.state === "running";
    this.element.classList.toggle("running", isRunning);
    if (!isRunning) this.updateFoot(conversation);
    else this.foot.replaceChildren();
  }

  updateAnswer() {
    const { content, reasoning, state, error, format } = this.node;
    const isRunning = state === "running";
    this.waiting.hidden = !isRunning || Boolean(content || reasoning);
    this.reasoning.hidden = !reasoning;
    this.summary.textContent = isRunning && !content ? "Reasoning…" : "Reasoning";
    if (this.thought.textContent !== reasoning) this.thought.textContent = reasoning;
    if (format === "json") this.showJson(content);
    else {
      this.markdown.show(content, isRunning);
      if (!isRunning) this.markdown.finish();
    }
    this.trouble.hidden = error === null;
    if (error && this.trouble.dataset.text !== error.text) this.showTrouble(error);
  }

  showJson(text) {
    if (!text) return;
    if (!this.json) {
      this.json = el("code", { class: "language-json" });
      this.body.replaceChildren(codeBlock(el("pre", {}, this.json)));
    }
    let shown = text;
    if (this.node.state !== "running") {
      try {
        shown = JSON.stringify(JSON.parse(text), null, 2);
      } catch {
        // cut short: shown as it came
      }
    }
    this.json.textContent = shown;
  }

  showTrouble(error) {
    this.trouble.dataset.text = error.text;
    const retry = el("button", { type: "button", class: "button", onclick: () => this.actions.retry(this.node) }, icon("again"), "Try again");
    const key = el("button", { type: "button", class: "button", onclick: () => this.actions.askForKey() }, "Enter an API key");
    this.trouble.replaceChildren(el("p", {}, error.text), el("div", { class: "buttons" }, retry, ...(error.key ? [key] : [])));
  }

  updateFoot(conversation) {
    const { node, actions } = this;
    const buttons = el("div", { class: "actions" });
    const siblings = siblingsOf(conversation, node);
    if (siblings.length > 1) buttons.append(this.versions(siblings));
    if (node.content) buttons.append(copyButton("Copy message", () => node.content));
    if (node.role === "user") buttons.append(iconButton("pencil", "Edit message", () => this.edit()));
    else if (!node.error) buttons.append(iconButton("again", "Regenerate answer", () => actions.regenerate(node)));
    const figures = node.role === "assistant" ? describe(node) : "";
    this.foot.replaceChildren(buttons, ...(figures ? [el("p", { class: "figures" }, figures)] : []));
  }

  versions(siblings) {
    const place = siblings.indexOf(this.node);
    const to = (step) => () => this.actions.choose(siblings[place + step]);
    const back = iconButton("left", "Previous version", to(-1));
    const forward = iconButton("right", "Next version", to(1));
    back.disabled = place === 0;
    forward.disabled = place === siblings.length - 1;
    const label = el("span", { "aria-label": `Version ${place + 1} of ${siblings.length}`, role: "img" }, `${place + 1}/${siblings.length}`);
    return el("div", { class: "versions" }, back, label, forward);
  }

  edit() {
    const area = el("textarea", { "aria-label": "Edit message", rows: "1", oninput: () => fitHeight(area) });
    area.value = this.node.content;
    const send = () => {
      if (!area.value.trim()) return;
      this.stopEditing();
      this.actions.edit(this.node, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    const buttons = [
      el("button", { type: "button", class: "button", onclick: () => this.stopEditing() }, "Cancel"),
      el("button", { type: "button", class: "button main", onclick: send }, "Send"),
    ];
    this.editor = el("div", { class: "editor" }, area, el("div", { class: "buttons" }, ...buttons));
    this.body.replaceChildren(this.editor);
    this.element.classList.add("editing");
    fitHeight(area);
    area.focus();
  }

  /** Returns whether the message was being edited. */
  stopEditing() {
    if (!this.editor) return false;
    this.editor = null;
    this.body.textContent = this.node.content;
    this.element.classList.remove("editing");
    this.foot.querySelector("[aria-label='Edit message']")?.focus();
    return true;
  }
}

/** The figures under an answer. */
function describe({ stats, state, finish }) {
  const parts = [];
  if (state === "stopped") parts.push("Stopped");
  else if (finish === "length") parts.push("Cut off at the token limit");
  if (stats && stats.first !== null) {
    const about = stats.exact ? "" : "about ";
    if (stats.tokens !== null) parts.push(`${about}${number.format(stats.tokens)} ${stats.tokens === 1 ? "token" : "tokens"}`);
    if (stats.tokens > 1 && stats.seconds > 0) parts.push(`${about}${rate.format((stats.tokens - 1) / stats.seconds)} tokens/s`);
    const wait = stats.first < 1 ? `${Math.round(1000 * stats.first)} ms` : `${rate.format(stats.first)} s`;
    parts.push(`first token after ${wait}`);
    if (stats.cached !== null && stats.prompt) parts.push(`${number.format(stats.cached)} of ${number.format(stats.prompt)} prompt tokens cached`);
  }
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}
