// Elements, and words for numbers. Text becomes text nodes, never HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children. `data` sets data-…, `vars` CSS variables, `aria` aria-…. */
export function make(tag, { data = {}, vars = {}, aria = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(data)) element.dataset[name] = value;
  for (const [name, value] of Object.entries(vars)) element.style.setProperty(`--${name}`, value);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Makes these the children of an element. What is there already is not taken out on the way. */
export function arrange(parent, children) {
  const kept = new Set(children);
  const focused = document.activeElement;
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  children.forEach((child, k) => {
    if (parent.children[k] !== child) parent.insertBefore(child, parent.children[k] ?? null);
  });
  if (parent.contains(focused)) focused.focus({ preventScroll: true }); // it may have been moved
}

/** One of the page's own icons. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Says something to who listens to the page instead of looking at it. */
export function tell(text) {
  $("told").textContent = text;
}

export function showError(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

export function duration(seconds) {
  if (!(seconds > 0)) return "";
  if (seconds < 1) return "a moment";
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function bytes(count) {
  if (count >= 1e9) return `${(count / 1e9).toFixed(count >= 1e10 ? 0 : 1)} GB`;
  return `${(count / 1e6).toFixed(count >= 1e7 ? 0 : 1)} MB`;
}

export function ordinal(number) {
  const tens = number % 100;
  const end = tens >= 11 && tens <= 13 ? "th" : (["th", "st", "nd", "rd"][number % 10] ?? "th");
  return `${number}${end}`;
}

export const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** What a browser remembers for this page; one that remembers nothing is no reason to fail. */
export const memory = {
  get(name) {
    try {
      return localStorage.getItem(`fluxmesh.${name}`);
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      if (value === null) localStorage.removeItem(`fluxmesh.${name}`);
      else localStorage.setItem(`fluxmesh.${name}`, value);
    } catch {
      // private windows
    }
  },
};
