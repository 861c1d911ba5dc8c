// Small helpers for elements. Text is always set as text.

export const $ = (id) => document.getElementById(id);

/** A new element. An attribute that is a function is a listener: {onclick: …}; false and null leave it out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#icon-${name}`);
}

export function iconButton(name, label, onclick) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick }, icon(name));
}

/** A text area is as high as its text. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  // plain http from another machine: browsers offer only the old way
  const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("the browser did not allow it");
}

export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    try {
      await copyText(text());
      setIcon(button, "check");
      toast("Copied");
    } catch {
      toast("Copying failed. Select the text and copy it by hand.");
    }
    setTimeout(() => setIcon(button, "copy"), 1500);
  });
  return button;
}

let toastTimer = 0;

/** A short message at the lower edge, with an action such as Undo. */
export function toast(text, action = null) {
  clearTimeout(toastTimer);
  const box = $("toast");
  box.replaceChildren(el("span", {}, text));
  if (action) {
    const run = () => {
      box.replaceChildren();
      action.run();
    };
    box.append(el("button", { type: "button", class: "button", onclick: run }, action.label));
  }
  toastTimer = setTimeout(() => box.replaceChildren(), action ? 10_000 : 2500);
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
