// How one message is shown, and what can be done with it.

import { copy, el, icon, iconButton, region } from "./dom.js";
import { Growing } from "./markdown.js";
import { CallsView } from "./tools.js";
import { bytes, factsOf, headingOf, many, seconds, sentence } from "./words.js";

const LEAST_MS = 50; // thoughts that came within less were not watched by anybody

/**
 * @param page what a message asks of the page: edit, regenerate, fork, resume, step, giveResults, siblings, resultsOf,
 *   canAsk, painting (a function that paints, in a place that keeps to the end of the text).
 */
export class MessageView {
  #isScheduled = false;
  #next = 0; // before this time it is not painted again, so that long answers leave time for everything else

  constructor(message, page) {
    this.message = message;
    this.page = page;
    this.turn = null;
    this.element = el("article", { class: `message ${message.role}`, "data-id": message.id });
    this.body = el("div", { class: "body" });
    this.foot = el("footer", { class: "foot" });
    this.element.append(el("h2", { class: "visually-hidden" }, this.heading), this.body, this.foot);
  }

  /** Paint soon: at the next frame, or a little later where the last painting was slow. */
  schedule() {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    const paint = () => requestAnimationFrame(() => {
      this.#isScheduled = false;
      const began = performance.now();
      this.page.painting(() => this.paint());
      const ended = performance.now();
      this.#next = ended + 3 * (ended - began);
    });
    setTimeout(paint, Math.max(0, this.#next - performance.now()));
  }

  /** The buttons, in place of those that were there; the focus stays on the one that has it. */
  paintFoot(actions) {
    const focused = this.foot.contains(document.activeElement) ? document.activeElement.dataset.action : null;
    this.foot.replaceChildren(this.#steps(), ...actions.map(([name, label, act, drawing]) =>
      iconButton(drawing, label, act, { "data-action": name })));
    if (focused) this.focusAction(focused);
  }

  focusAction(name) {
    (this.foot.querySelector(`[data-action="${name}"]`) ?? this.foot.querySelector("button"))?.focus();
  }

  /** Change the text in place; `done` gets it. */
  edit(label, done) {
    const field = el("textarea", { class: "edit", "aria-label": label, rows: 3, dir: "auto" });
    const close = (text) => {
      box.replaceWith(this.body);
      this.foot.hidden = false;
      if (text === null) this.focusAction("edit");
      else done(text);
    };
    const keys = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close(null);
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        close(field.value);
      }
    };
    const submit = (event) => {
      event.preventDefault();
      close(field.value);
    };
    const box = el("form", { class: "editing", onkeydown: keys, onsubmit: submit },
      field,
      el("div", { class: "row" }, el("button", { class: "primary" }, label),
        el("button", { type: "button", onclick: () => close(null) }, "Cancel"),
        el("span", { class: "hint" }, `Ctrl+Enter: ${label.toLowerCase()}. Esc: leave it as it was.`)));
    field.value = this.message.content;
    this.body.replaceWith(box);
    this.foot.hidden = true;
    field.style.height = `${Math.min(field.scrollHeight + 4, innerHeight / 2)}px`;
    field.focus();
  }

  #steps() {
    const all = this.page.siblings(this.message);
    if (all.length < 2) return "";
    const at = all.indexOf(this.message);
    const step = (by, label, drawing) => iconButton(drawing, label, () => this.page.step(all[at + by]), {
      "data-action": label, disabled: !all[at + by],
    });
    return el("span", { class: "steps", role: "group", "aria-label": "Versions of this message" },
      step(-1, "Earlier version", "left"), el("span", {}, `${at + 1} / ${all.length}`),
      step(1, "Later version", "right"));
  }
}

export class UserView extends MessageView {
  get heading() { return "You"; }

  paint() {
    const { message } = this;
    const files = (message.files ?? []).map((file) => el("details", { class: "file" },
      el("summary", {}, icon("file"), el("span", { class: "name" }, file.name),
        el("span", { class: "size" }, sizeOf(file))),
      region("pre", `Text of ${file.name}`, {}, file.text)));
    const text = message.content && el("div", { class: "text", dir: "auto" }, message.content);
    this.body.replaceChildren(...files, text);
    const edit = () => this.edit("Send", (changed) => this.page.edit(message, changed));
    this.paintFoot([
      ["copy", "Copy this message", () => copy(message.content), "copy"],
      ...(this.page.canAsk() ? [["edit", "Edit this message", edit, "edit"]] : []),
      ["fork", "Fork: a new conversation up to here", () => this.page.fork(message), "fork"],
    ]);
  }
}

/** A file's size in bytes and in tokens. */
export function sizeOf(file) {
  return `${bytes(file.bytes)} · ${file.tokens === null ? "tokens not counted" : many(file.tokens, "token")}`;
}

export class AssistantView extends MessageView {
  #shownThoughts = 0;
  #shownAnswer = "";
  #isWhole = false;
  #isTouched = false; // the user has opened or closed the thoughts, and that is not undone
  #wasThinking = false;

  constructor(message, page) {
    super(message, page);
    this.thoughts = document.createTextNode("");
    this.summary = el("span");
    this.details = el("details", { class: "thoughts", hidden: true },
      el("summary", { onclick: () => { this.#isTouched = true; } }, icon("thought"), this.summary),
      el("div", { class: "thought-text", dir: "auto" }, this.thoughts));
    this.answer = el("div", { class: "answer" });
    this.growing = new Growing(this.answer);
    this.calls = new CallsView((results) => this.page.giveResults(this.message, results));
    this.waiting = el("p", { class: "waiting", hidden: true });
    this.problem = el("div", { class: "problem", hidden: true });
    this.facts = el("p", { class: "facts", hidden: true });
    this.body.append(this.details, this.answer, this.calls.element, this.waiting, this.problem, this.facts);
  }

  get heading() { return "Answer"; }

  paint() {
    const isRunning = this.turn !== null;
    this.element.setAttribute("aria-busy", String(isRunning));
    this.#paintThoughts();
    this.#paintAnswer(isRunning);
    const calls = this.message.calls ?? [];
    const results = this.page.resultsOf(this.message);
    this.calls.element.hidden = !calls.length;
    this.calls.show(calls, results, this.#isAwaited(calls, results, isRunning));
    this.#paintWaiting();
    this.#paintProblem(isRunning);
    this.#paintFacts(isRunning ? this.#factsSoFar() : factsOf(this.message));
    if (isRunning) this.foot.replaceChildren();
    else this.#paintActions();
  }

  #isAwaited(calls, results, isRunning) {
    const isOver = !isRunning && this.message.facts?.finish === "tool_calls";
    return isOver && calls.length > 0 && !results && this.page.canAsk();
  }

  #paintThoughts() {
    const { message, turn } = this;
    const text = message.reasoning ?? "";
    this.details.hidden = !text;
    if (text.length < this.#shownThoughts) { // another answer in the same place
      this.thoughts.data = "";
      this.#shownThoughts = 0;
    }
    this.thoughts.appendData(text.slice(this.#shownThoughts));
    this.#shownThoughts = text.length;
    const isThinking = turn?.state === "thinking";
    if (isThinking !== this.#wasThinking && !this.#isTouched) this.details.open = isThinking;
    this.#wasThinking = isThinking;
    this.details.classList.toggle("thinking", isThinking);
    this.summary.textContent = isThinking
      ? `Thinking… ${seconds(performance.now() - turn.thoughtBegan)}`
      : this.#thought();
  }

  #thought() {
    const { thinkMs, reasoningTokens } = this.message.facts ?? {};
    const time = thinkMs > LEAST_MS ? `Thought for ${seconds(thinkMs)}` : "Thoughts";
    return reasoningTokens ? `${time} · ${many(reasoningTokens, "token")}` : time;
  }

  #paintAnswer(isRunning) {
    const text = this.message.content;
    if (text === this.#shownAnswer && this.#isWhole === !isRunning) return;
    if (this.#isWhole || !text.startsWith(this.#shownAnswer)) { // it goes on, or is another one in the same place
      this.answer.replaceChildren();
      this.growing = new Growing(this.answer);
    }
    this.growing.show(text, !isRunning);
    this.#shownAnswer = text;
    this.#isWhole = !isRunning;
  }

  #paintWaiting() {
    const { turn } = this;
    this.waiting.hidden = turn?.state !== "waiting";
    if (this.waiting.hidden) return;
    const { progress } = turn;
    this.waiting.textContent = progress
      ? `Reading the prompt: ${progress.computed.toLocaleString("en")} of ${many(progress.prompt, "token")}`
      : "Waiting for the first token…";
  }

  #factsSoFar() {
    return this.turn.rate ? [`about ${this.turn.rate.toFixed(0)} tokens/s`] : [];
  }

  #paintFacts(facts) {
    this.facts.replaceChildren(...facts.flatMap((fact, n) => [n ? " · " : "", el("span", {}, fact)]));
    this.facts.hidden = !facts.length;
  }

  #paintProblem(isRunning) {
    const { problem } = this.message;
    this.problem.hidden = !problem || isRunning;
    if (this.problem.hidden) return;
    const wait = problem.retryAfter ? ` It says to wait ${many(problem.retryAfter, "second")}.` : "";
    const again = () => this.page.regenerate(this.message);
    const retry = this.page.canAsk() ? el("button", { type: "button", onclick: again }, "Try again") : "";
    const text = el("p", {}, sentence(problem.text) + wait);
    this.problem.replaceChildren(el("strong", {}, headingOf(problem)), text, retry);
  }

  #paintActions() {
    const { message, page } = this;
    const actions = [];
    if (message.content) actions.push(["copy", "Copy this answer", () => copy(message.content), "copy"]);
    if (page.canAsk()) {
      actions.push(["regenerate", "Regenerate: another answer", () => page.regenerate(message), "again"]);
      if (page.canResume(message)) {
        actions.push(["resume", "Continue this answer", () => page.resume(message), "resume"]);
      }
      const edit = () => this.edit("Keep", (text) => page.edit(message, text));
      actions.push(["edit", "Edit this answer", edit, "edit"]);
    }
    actions.push(["fork", "Fork: a new conversation up to here", () => page.fork(message), "fork"]);
    this.paintFoot(actions);
  }
}
