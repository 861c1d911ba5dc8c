// Light or dark, set before the page is drawn. This file is no module, because modules run after that.
"use strict";

(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("numballama.theme");
  } catch {
    // storage is blocked: the system's colours are used
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
