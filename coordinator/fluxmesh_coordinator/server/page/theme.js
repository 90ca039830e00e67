// Light or dark: as the system has it, until somebody chooses.

import { $, memory } from "./dom.js";

const system = matchMedia("(prefers-color-scheme: dark)");

function apply() {
  const chosen = memory.get("theme");
  const isDark = chosen ? chosen === "dark" : system.matches;
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  $("theme").setAttribute("aria-label", isDark ? "Light colours" : "Dark colours");
  $("theme").title = isDark ? "Light colours" : "Dark colours";
}

export function startTheme() {
  apply();
  system.addEventListener("change", apply);
  $("theme").addEventListener("click", () => {
    const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    // Who goes back to what the system says follows it again.
    memory.set("theme", (other === "dark") === system.matches ? null : other);
    apply();
  });
}
