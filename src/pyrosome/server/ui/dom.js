// Elements are made here and nowhere from text: nothing in this page reads a string as markup.

const MOST_NOTICES = 3;
const SVG = "http://www.w3.org/2000/svg";

/**
 * An element.
 * @param {Object} attributes `true` is an empty attribute, `false` and null are none, `onclick: f` listens.
 * @param children nodes, or strings, which become text.
 */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child != null && child !== false));
  return made;
}

/** One of the page's own drawings, by the id of its symbol in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with a drawing; its name is read out and shown on hovering. */
export function iconButton(name, label, onclick, attributes = {}) {
  const usual = { type: "button", class: "icon-button", "aria-label": label, title: label, onclick };
  return el("button", { ...usual, ...attributes }, icon(name));
}

/** An element that may have to be scrolled, and so is reached by the keyboard and has a name. */
export function region(name, label, attributes, ...children) {
  return el(name, { tabindex: 0, role: "region", "aria-label": label, ...attributes }, ...children);
}

export const byId = (id) => document.getElementById(id);

/** Tell those who listen rather than look; the same words twice are said twice. */
export function announce(text) {
  const region = byId("announcer");
  region.textContent = "";
  requestAnimationFrame(() => { region.textContent = text; });
}

/** Words at the foot of the page until they are closed; the last few at most. */
export function notice(text) {
  const box = byId("notices");
  const close = iconButton("close", "Close this notice", () => line.remove());
  const line = el("div", { class: "notice" }, el("span", {}, text), close);
  box.append(line);
  while (box.children.length > MOST_NOTICES) box.firstChild.remove();
}

/** Put text on the clipboard; says whether it worked. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
    return true;
  } catch {
    notice("The browser does not let this page copy; select the text and copy it by hand.");
    return false;
  }
}

/** Hand a text to the user as a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
