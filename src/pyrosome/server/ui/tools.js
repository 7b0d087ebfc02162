// Tool calls: what the model wants done, and what the user says came of it.  The page itself carries nothing out.

import { el, region } from "./dom.js";
import { count, indented } from "./words.js";

/** The list of an answer's calls, filled as they come. */
export class CallsView {
  element = el("ul", { class: "calls", "aria-label": "Tool calls" });
  #cards = [];
  #form = null;

  /** @param give (results by call id) => sends them to the model. */
  constructor(give) { this.give = give; }

  /**
   * @param results by call id, once they are given; else null.
   * @param isAwaited they can be given now.
   */
  show(calls, results, isAwaited) {
    calls.forEach((call, n) => {
      const card = (this.#cards[n] ??= this.#card(call));
      card.arguments.textContent = indented(call.arguments);
      const result = results?.[call.id];
      card.result.hidden = result === undefined;
      card.text.textContent = result ?? "";
      card.size.textContent = result === undefined ? "" : ` · ${count(result.length)} characters`;
    });
    if (isAwaited && !this.#form) this.element.after((this.#form = this.#askFor(calls)));
    if (!isAwaited && this.#form) {
      this.#form.remove();
      this.#form = null;
    }
  }

  #card(call) {
    const made = {
      arguments: region("pre", `Arguments of ${call.name}`),
      text: region("pre", `Result of ${call.name}`),
      size: el("span"),
    };
    made.result = el("details", { class: "result", open: true }, el("summary", {}, "Result", made.size), made.text);
    const label = el("span", { class: "label" }, "Tool call");
    const name = el("div", { class: "call-name" }, label, el("code", {}, call.name));
    this.element.append(el("li", { class: "call" }, name, made.arguments, made.result));
    return made;
  }

  #askFor(calls) {
    const plain = { rows: 2, spellcheck: "false", autocomplete: "off" };
    const fields = calls.map((call) => [call.id, el("textarea", plain)]);
    const labels = calls.map((call, n) => el("label", {}, `Result of ${call.name}`, fields[n][1]));
    const send = (event) => {
      event.preventDefault();
      this.give(Object.fromEntries(fields.map(([id, field]) => [id, field.value])));
    };
    const button = el("button", { class: "primary" }, "Give the results");
    return el("form", { class: "give", onsubmit: send }, labels, button);
  }
}

/** What is wrong with a list of tools as JSON text, or "". */
export function problemOfTools(text) {
  if (!text.trim()) return "";
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    return `This is no JSON: ${error.message}`;
  }
  if (!Array.isArray(found)) return 'A list of tools is expected: [{"type": "function", "function": {"name": …}}]';
  const wrong = found.findIndex((tool) => typeof tool?.function?.name !== "string");
  return wrong < 0 ? "" : `Tool ${wrong + 1} has no function with a name.`;
}
