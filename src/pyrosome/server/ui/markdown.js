// Markdown to elements.  The parser gives a list of tokens; each known kind makes one fixed element, and every text
// becomes a text node.  No kind makes an element that runs, loads or embeds anything: HTML in an answer is its own
// text, an image is a link to it, and a link leads to the web or to mail or is text.

import MarkdownIt from "./vendor/markdown-it.mjs";
import { copy, el, region } from "./dom.js";

const parser = new MarkdownIt({ html: false, linkify: true });
parser.validateLink = (text) => addressOf(text) !== null; // any other link is shown as it was written

const PLAIN = {
  paragraph: "p", blockquote: "blockquote", bullet_list: "ul", list_item: "li", thead: "thead", tbody: "tbody",
  tr: "tr", em: "em", strong: "strong", s: "s",
};
const LINE_END = /\r\n|\n|\r/g;

/** Text that grows; what is complete is made once and not touched again. */
export class Growing {
  #root;
  #targets = {}; // of links, as far as they are told in settled blocks
  #start = 0; // characters whose blocks are settled
  #open = []; // nodes of the rest, made anew each time

  constructor(root) { this.#root = root; }

  /** Show that text, which begins with the one shown before; `isWhole`: and it grows no more. */
  show(text, isWhole) {
    for (const node of this.#open) node.remove();
    const rest = text.slice(this.#start);
    const { tokens, targets } = parsed(rest, this.#targets);
    const settled = isWhole ? { tokens: tokens.length, characters: rest.length } : settledIn(rest, tokens);
    fill(this.#root, nodesOf(tokens.slice(0, settled.tokens), true));
    this.#open = nodesOf(tokens.slice(settled.tokens), false);
    fill(this.#root, this.#open);
    this.#start += settled.characters;
    if (!Object.keys(targets).length) return;
    if (isWhole) { // a link's target may have been told after the link
      this.#root.replaceChildren();
      fill(this.#root, nodesOf(parsed(text, {}).tokens, true));
    } else if (settled.characters) {
      this.#targets = parsed(rest.slice(0, settled.characters), this.#targets).targets;
    }
  }
}

/** A whole text as nodes. */
export function rendered(text) {
  const made = document.createDocumentFragment();
  new Growing(made).show(text, true);
  return made;
}

function parsed(text, known) {
  const env = { references: { ...known } };
  const tokens = parser.parse(text, env);
  const isTooDeep = tokens.some((token) => token.level >= parser.options.maxNesting - 1); // it leaves out what is below
  return { tokens: isTooDeep ? [asCode(text)] : tokens, targets: env.references };
}

const asCode = (text) => ({ type: "code_block", content: text, level: 0, nesting: 0, map: [0, 0] });

// How many tokens, and how many characters, belong to blocks that no further text can change: all blocks before the
// last one, once its first line is complete.  Before that its line may still turn out to belong to the block above.
function settledIn(text, tokens) {
  const begins = tokens.flatMap((token, n) => (token.level === 0 && token.nesting >= 0 && token.map ? [n] : []));
  const ends = [...text.matchAll(LINE_END)].map((match) => match.index + match[0].length);
  for (const n of begins.reverse()) {
    const line = tokens[n].map[0];
    if (line < ends.length) return { tokens: n, characters: line ? ends[line - 1] : 0 };
  }
  return { tokens: 0, characters: 0 };
}

function nodesOf(tokens, isSettled) {
  const root = { children: [] };
  const stack = [root];
  for (const token of tokens) {
    if (token.nesting < 0) {
      const { node, wrap, isText, children } = stack.pop();
      if (node) fill(node, children);
      if (isText) node.dir = "auto"; // now: with each child that comes later the browser would look through all others
      addAll(stack.at(-1).children, node ? [wrap ? wrap(node) : node] : children);
    } else if (token.nesting > 0) {
      stack.push({ ...opened(token), children: [] });
    } else {
      addAll(stack.at(-1).children, single(token, isSettled));
    }
  }
  return root.children;
}

// One by one: an answer may have more nodes than a call may have arguments.
function fill(node, children) {
  for (const child of children) node.append(child);
}

function addAll(list, more) {
  for (const one of more) list.push(one);
}

/** The element of a token that holds others; without `node` it is left out, and what it holds stays. */
function opened(token) {
  const name = token.type.replace(/_open$/, "");
  if (token.hidden) return {}; // the paragraphs of a tight list
  if (name in PLAIN) return { node: el(PLAIN[name]), isText: name === "paragraph" || name === "list_item" };
  if (name === "heading") return { node: el(`h${Math.min(6, Number(token.tag[1]) + 2)}`), isText: true };
  if (name === "ordered_list") return { node: el("ol", { start: token.attrGet("start") }) };
  if (name === "table") return { node: el("table"), wrap: scrolling };
  if (name === "th" || name === "td") {
    return { node: el(name, { class: aligned(token.attrGet("style")) }), isText: true };
  }
  if (name === "link") {
    const address = addressOf(token.attrGet("href"));
    return address ? { node: link(address) } : {};
  }
  return {};
}

function single(token, isSettled) {
  if (token.type === "inline") return nodesOf(token.children, isSettled);
  if (token.type === "softbreak") return [document.createTextNode("\n")];
  if (token.type === "hardbreak") return [el("br")];
  if (token.type === "hr") return [el("hr")];
  if (token.type === "code_inline") return [el("code", {}, token.content)];
  if (token.type === "fence") return [codeBlock(token.content, token.info.trim().split(/\s+/)[0], isSettled)];
  if (token.type === "code_block") return [codeBlock(token.content, "", isSettled)];
  if (token.type === "image") return [image(token)];
  return [document.createTextNode(token.content)]; // text, and whatever else there may be
}

function codeBlock(text, language, isSettled) {
  const shown = text.replace(/\n$/, "");
  // While the block grows it is made anew all the time: a button in it would slip from under the finger.
  const onclick = () => copyFrom(button, text);
  const button = isSettled && el("button", { type: "button", class: "copy", onclick }, "Copy");
  const head = el("figcaption", {}, el("span", {}, language.slice(0, 40) || "text"), button);
  const label = language ? `Code, ${language.slice(0, 40)}` : "Code";
  return el("figure", { class: "code" }, head, region("pre", label, {}, el("code", {}, shown)));
}

async function copyFrom(button, text) {
  if (!(await copy(text))) return;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

/** Nothing is fetched from whatever address an answer names: that alone would tell its server something. */
function image(token) {
  const address = addressOf(token.attrGet("src"));
  const name = token.content || "without a name";
  return address ? link(address, `image: ${name}`) : document.createTextNode(`[image: ${name}]`);
}

function link(address, ...children) {
  const { href } = address;
  return el("a", { href, target: "_blank", rel: "noopener noreferrer", title: href }, ...children);
}

/** A URL where one may go, or null.  Relative ones are none: they would lead about in this server. */
function addressOf(text) {
  try {
    const address = new URL(text);
    return ["http:", "https:", "mailto:"].includes(address.protocol) ? address : null;
  } catch {
    return null;
  }
}

const scrolling = (table) => region("div", "Table", { class: "scroll" }, table);

const aligned = (style) => (style ? style.replace(/^text-align:\s*/, "") : null);
