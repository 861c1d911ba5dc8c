// The list of conversations: open, rename, export, delete; and export and import of all.

import { $, download, el, iconButton, toast } from "./dom.js";
import { exportText, importText } from "./store.js";

export class Sidebar {
  /** `actions`: open(conversation), create(), rename(conversation, title), remove(conversation), add(conversations). */
  constructor(actions) {
    this.actions = actions;
    this.conversations = [];
    this.current = null;
    this.renamed = null; // the conversation whose title is being edited
    $("new-chat").addEventListener("click", () => actions.create());
    $("export").addEventListener("click", () => this.export(this.conversations));
    $("import").addEventListener("click", () => $("import-file").click());
    $("import-file").addEventListener("change", () => this.import());
  }

  show(conversations, current) {
    this.conversations = conversations;
    this.current = current;
    if (this.renamed) return; // a field that somebody types into stays
    const focused = document.activeElement?.closest("#conversations li")?.dataset.id;
    $("conversations").replaceChildren(...conversations.map((one) => this.row(one)));
    $("export").disabled = conversations.length === 0;
    if (focused) $("conversations").querySelector(`[data-id="${focused}"] .open`)?.focus();
  }

  row(conversation) {
    const isCurrent = conversation === this.current;
    const attributes = { type: "button", class: "open", "aria-current": isCurrent ? "true" : null, onclick: () => this.actions.open(conversation) };
    const open = el("button", attributes, conversation.title);
    const { title } = conversation;
    const tools = el(
      "div",
      { class: "tools" },
      iconButton("pencil", `Rename “${title}”`, () => this.rename(conversation)),
      iconButton("download", `Export “${title}”`, () => this.export([conversation])),
      iconButton("trash", `Delete “${title}”`, () => this.actions.remove(conversation)),
    );
    return el("li", { "data-id": conversation.id, class: isCurrent ? "current" : null }, open, tools);
  }

  rename(conversation) {
    this.renamed = conversation;
    const row = $("conversations").querySelector(`[data-id="${conversation.id}"]`);
    const field = el("input", { type: "text", "aria-label": "Title of the conversation", maxlength: "200" });
    field.value = conversation.title;
    const end = (keep) => {
      if (this.renamed !== conversation) return;
      this.renamed = null;
      const title = field.value.trim();
      if (keep && title) this.actions.rename(conversation, title);
      else this.show(this.conversations, this.current);
      $("conversations").querySelector(`[data-id="${conversation.id}"] .open`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
    });
    field.addEventListener("blur", () => end(true));
    row.replaceChildren(field);
    field.select();
    field.focus();
  }

  export(conversations) {
    const day = new Date().toISOString().slice(0, 10);
    download(`numballama-${day}.json`, exportText(conversations));
  }

  async import() {
    const field = $("import-file");
    const [file] = field.files;
    field.value = "";
    if (!file) return;
    try {
      const found = importText(await file.text());
      this.actions.add(found);
    } catch (error) {
      toast(`Nothing was imported. ${error.message}`);
    }
  }
}
