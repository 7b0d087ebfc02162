// One answer while it comes: its message is filled, and whoever shows it is told.

import { answer, Problem, tokensOfText } from "./api.js";

const SAVE_MS = 1000;
const LEAST_MS = 50; // an answer that comes within less has no rate worth telling

/** Runs an answer into `message`. Events: "part" whenever something came, "end" when no more does. */
export class Turn extends EventTarget {
  #stopper = new AbortController();
  #saved = 0;

  /** @param save ({isQuiet}) => promise, called now and then (then it is quiet) and at the end. */
  constructor(message, body, save) {
    super();
    this.message = message;
    this.body = body;
    this.save = save;
    this.state = "waiting"; // then "thinking" and "answering"
    this.progress = null; // {computed, prompt}: how much of the prompt is read
    this.numParts = 0;
    this.began = performance.now();
    this.thoughtBegan = null;
    this.firstAt = null;
    this.lastAt = null;
    this.isStopped = false;
    this.before = (message.reasoning ?? "").length + message.content.length; // characters it has already
  }

  /** End it; what was said stays. */
  stop() {
    this.isStopped = true;
    this.#stopper.abort();
  }

  /** Parts a second so far: a part is one token or a few, so this is the least the rate can be. */
  get rate() {
    const ms = this.lastAt - this.firstAt;
    return this.numParts > 1 && ms > 500 ? ((this.numParts - 1) * 1000) / ms : 0;
  }

  async run() {
    const { message } = this;
    const before = message.facts ?? {}; // of an answer that is continued
    message.facts = { thinkMs: before.thinkMs };
    message.problem = null;
    try {
      for await (const part of answer(this.body, this.#stopper.signal)) {
        this.#take(part);
        this.dispatchEvent(new Event("part"));
        await this.#saveNowAndThen();
      }
    } catch (error) {
      if (!this.isStopped) message.problem = asRecord(error);
    }
    if (this.isStopped) message.facts.finish = "stopped";
    this.#closeThoughts();
    if (message.facts.completionTokens == null) await this.#countWhatCame();
    this.#measure();
    for (const name of ["completionTokens", "reasoningTokens"]) {
      if (before[name] && message.facts[name] != null) message.facts[name] += before[name];
    }
    this.state = "ended";
    await this.save({ isQuiet: false });
    this.dispatchEvent(new Event("end"));
  }

  #take(part) {
    const { message } = this;
    const { facts } = message;
    if (part.begun) Object.assign(facts, { mode: part.begun.mode, seed: part.begun.seed });
    if (part.progress) this.progress = part.progress;
    if (part.reasoning) {
      this.#count("thinking");
      this.thoughtBegan ??= performance.now();
      message.reasoning = (message.reasoning ?? "") + part.reasoning;
    }
    if (part.content) {
      this.#count("answering");
      this.#closeThoughts();
      message.content += part.content;
    }
    if (part.call) {
      this.#count("answering");
      this.#closeThoughts();
      takeCall((message.calls ??= []), part.call);
    }
    if (part.finish) facts.finish = part.finish;
    if (part.told) Object.assign(facts, { mode: part.told.mode, seed: part.told.seed ?? facts.seed });
    if (part.usage) {
      facts.promptTokens = part.usage.prompt_tokens;
      facts.completionTokens = part.usage.completion_tokens;
      facts.cachedTokens = part.usage.prompt_cache_hit_tokens ?? part.usage.prompt_tokens_details?.cached_tokens ?? 0;
      facts.reasoningTokens = part.usage.completion_tokens_details?.reasoning_tokens ?? 0;
    }
  }

  #count(state) {
    this.state = state;
    this.numParts += 1;
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
  }

  #closeThoughts() {
    if (this.thoughtBegan === null) return;
    this.message.facts.thinkMs = (this.message.facts.thinkMs ?? 0) + performance.now() - this.thoughtBegan;
    this.thoughtBegan = null;
  }

  /** An answer that broke off came without its usage; the tokenizer says how much there is. */
  async #countWhatCame() {
    const { message } = this;
    if (this.firstAt === null) return;
    const text = ((message.reasoning ?? "") + message.content).slice(this.before);
    try {
      message.facts.completionTokens = await tokensOfText(text);
    } catch (error) {
      if (!(error instanceof Problem)) throw error; // the server is gone: then it is not told
    }
  }

  #measure() {
    const { facts } = this.message;
    if (this.firstAt === null) return;
    facts.firstMs = this.firstAt - this.began;
    facts.totalMs = performance.now() - this.began;
    const ms = this.lastAt - this.firstAt;
    const isMeasured = facts.completionTokens > 1 && ms > LEAST_MS;
    facts.tokensPerSecond = isMeasured ? ((facts.completionTokens - 1) * 1000) / ms : null;
  }

  async #saveNowAndThen() {
    if (performance.now() - this.#saved < SAVE_MS) return;
    this.#saved = performance.now();
    await this.save({ isQuiet: true });
  }
}

function takeCall(calls, part) {
  const call = (calls[part.index] ??= { id: part.id, name: part.function.name, arguments: "" });
  call.arguments += part.function?.arguments ?? "";
}

function asRecord(error) {
  if (error instanceof Problem) return { text: error.message, status: error.status, retryAfter: error.retryAfter };
  return { text: `This page could not read the answer: ${error.message}`, status: 0, retryAfter: null };
}
