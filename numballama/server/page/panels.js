// The two panels beside the thread, and the switch between light and dark.

import { $ } from "./dom.js";

const THEME = "numballama.theme";
const isNarrow = { sidebar: matchMedia("(max-width: 800px)"), settings: matchMedia("(max-width: 1150px)") };
const opener = { sidebar: "open-sidebar", settings: "open-settings" };

const isOpen = (name) => (name === "settings" ? !$("settings").hidden : $("sidebar").classList.contains("shown"));

function set(name, open) {
  if (name === "settings") $("settings").hidden = !open;
  else $("sidebar").classList.toggle("shown", open);
  $(opener[name]).setAttribute("aria-expanded", open);
  const covers = ["sidebar", "settings"].some((one) => isOpen(one) && isNarrow[one].matches);
  $("scrim").hidden = !covers;
  document.querySelector("main").inert = covers; // what is covered cannot be reached by keyboard
}

export function openPanel(name) {
  if (isNarrow.sidebar.matches) set(name === "settings" ? "sidebar" : "settings", false);
  set(name, true);
}

/** Close panels; with `narrowOnly` those only that cover the thread. Returns whether one was closed. */
export function closePanels({ narrowOnly = false } = {}) {
  const open = ["sidebar", "settings"].filter((name) => isOpen(name) && (isNarrow[name].matches || !narrowOnly));
  for (const name of open) {
    const hadFocus = $(name).contains(document.activeElement);
    set(name, false);
    if (hadFocus) $(opener[name]).focus();
  }
  return open.length > 0;
}

export function setUpPanels() {
  for (const name of ["sidebar", "settings"]) {
    $(opener[name]).addEventListener("click", () => {
      if (isOpen(name)) return closePanels();
      openPanel(name);
      $(name).querySelector("button:not([hidden])").focus();
    });
    $(`close-${name}`).addEventListener("click", () => {
      set(name, false);
      $(opener[name]).focus();
    });
    isNarrow[name].addEventListener("change", () => set(name, isOpen(name)));
  }
  $("scrim").addEventListener("click", () => closePanels({ narrowOnly: true }));
  setUpTheme();
}

/** The choice is kept only where it differs from the system's. */
function setUpTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => $("theme").setAttribute("aria-pressed", isDark());
  $("theme").addEventListener("click", () => {
    const wanted = isDark() ? "light" : "dark";
    const isSystems = (wanted === "dark") === system.matches;
    if (isSystems) delete root.dataset.theme;
    else root.dataset.theme = wanted;
    try {
      if (isSystems) localStorage.removeItem(THEME);
      else localStorage.setItem(THEME, wanted);
    } catch {
      // storage is blocked: the choice lasts as long as the page
    }
    show();
  });
  system.addEventListener("change", show);
  show();
}
