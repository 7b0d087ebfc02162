// How much of the model's context the next prompt takes: what was said, as the server counts it, and the draft.

import { Problem, tokensOfPrompt, tokensOfText } from "./api.js";
import { bodyOf } from "./conversation.js";
import { byId } from "./dom.js";
import { count } from "./words.js";

const PAUSE_MS = 300; // the draft is counted when nothing was typed for so long

export class Meter {
  #most = null;
  #said = 0; // null: the server does not say
  #draft = 0;
  #files = 0;
  #counting = new AbortController();
  #timer = 0;
  #counted = "";

  /** @param most tokens of the model's context. */
  setMost(most) {
    this.#most = most;
    this.#paint();
  }

  /** Tokens that are left, or null where that is not known. */
  get room() {
    return this.#most === null || this.#said === null ? null : this.#most - this.#said - this.#draft - this.#files;
  }

  /** Count what was said up to a conversation's last message. */
  async countSaid(conversation, model) {
    this.#counting.abort();
    this.#counting = new AbortController();
    const { signal } = this.#counting;
    const body = bodyOf(conversation.settings, conversation.path(), model);
    try {
      this.#said = body.messages.length ? await tokensOfPrompt(body, signal) : 0;
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      this.#said = null;
    }
    this.#paint();
  }

  /** Count a draft, soon. */
  countDraft(text) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#countNow(text), text ? PAUSE_MS : 0);
  }

  setFiles(tokens) {
    this.#files = tokens;
    this.#paint();
  }

  async #countNow(text) {
    this.#counted = text;
    let tokens = 0;
    try {
      tokens = text ? await tokensOfText(text) : 0;
    } catch (error) {
      if (!(error instanceof Problem)) throw error; // it is counted with the next change
    }
    if (this.#counted !== text) return;
    this.#draft = tokens;
    this.#paint();
  }

  #paint() {
    const meter = byId("meter");
    meter.hidden = this.#most === null || this.#said === null;
    if (meter.hidden) return;
    const used = this.#said + this.#draft + this.#files;
    const share = Math.min(1, used / this.#most);
    meter.setAttribute("aria-valuenow", Math.round(share * 100));
    meter.setAttribute("aria-valuetext", `${count(used)} of ${count(this.#most)} tokens of the context`);
    meter.title = "Tokens of the model's context that the next prompt takes";
    meter.classList.toggle("is-full", share > 0.9);
    byId("meter-bar").style.width = `${share * 100}%`;
    byId("meter-text").textContent = `${count(used)} / ${count(this.#most)}`;
  }
}
