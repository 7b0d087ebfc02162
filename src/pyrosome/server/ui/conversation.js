// A conversation is a tree of messages: an edit or another answer is a sibling, and nothing that was said is lost.
//
// A message is {id, conversation, parent, role, created, content}; of the user also `files`, of the assistant
// `reasoning`, `calls`, `facts`, `problem`, and with role "results" the `results` of its parent's calls.

import { titleOf } from "./words.js";

const NO_RESULT = "The user gave no result for this call.";

export class Conversation {
  constructor(record, messages = []) {
    this.record = record;
    this.messages = new Map();
    this.below = new Map(); // ids of children, oldest first
    for (const message of [...messages].sort((a, b) => a.created - b.created)) this.#put(message);
  }

  static blank(settings) {
    const now = Date.now();
    return new Conversation({ id: newId(), title: "", created: now, updated: now, leaf: null, settings });
  }

  get id() { return this.record.id; }
  get settings() { return this.record.settings; }
  get last() { return this.messages.get(this.record.leaf) ?? null; }

  /** Messages from the first to that one, by default to the one that is shown last. */
  path(id = this.record.leaf) {
    const found = [];
    for (let message = this.messages.get(id); message; message = this.messages.get(message.parent)) found.push(message);
    return found.reverse();
  }

  /** All messages that stand where this one stands, itself among them. */
  siblings(message) {
    return (this.below.get(message.parent) ?? []).map((id) => this.messages.get(id));
  }

  /** Add a message below `parent` and show it last. */
  add(parent, fields) {
    const latest = Math.max(0, ...(this.below.get(parent) ?? []).map((id) => this.messages.get(id).created));
    const created = Math.max(Date.now(), latest + 1); // the order of siblings is that of their times
    const message = { id: newId(), conversation: this.id, parent, created, content: "", ...fields };
    this.#put(message);
    this.record.leaf = message.id;
    if (!this.record.title && message.role === "user") {
      this.record.title = titleOf(message.content || message.files?.[0]?.name || "");
    }
    this.touch();
    return message;
  }

  /** Show that message, and below it what was said last. */
  show(message) {
    let id = message.id;
    while (this.below.get(id)?.length) id = this.below.get(id).at(-1);
    this.record.leaf = id;
    this.touch();
  }

  touch() { this.record.updated = Date.now(); }

  /** A conversation of its own that holds what was said up to that message. */
  forkedAt(message) {
    const fork = Conversation.blank({ ...this.settings });
    const copies = structuredClone(this.path(message.id));
    const ids = new Map(copies.map((copy) => [copy.id, newId()]));
    for (const copy of copies) {
      fork.#put({ ...copy, id: ids.get(copy.id), conversation: fork.id, parent: ids.get(copy.parent) ?? null });
    }
    fork.record.leaf = ids.get(message.id);
    fork.record.title = this.record.title;
    return fork;
  }

  #put(message) {
    this.messages.set(message.id, message);
    if (!this.below.has(message.parent)) this.below.set(message.parent, []);
    this.below.get(message.parent).push(message.id);
  }
}

/** 128 random bits.  (`randomUUID` is to be had over TLS and on this machine alone.) */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * The body of a chat request that asks for what comes after `path`.
 * @param continues the last message of the path is an answer that broke off; ask for the rest of it.
 */
export function bodyOf(settings, path, model, { continues = false } = {}) {
  const messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  path.forEach((message, n) => messages.push(...asSent(message, path[n + 1])));
  if (continues) messages.at(-1).prefix = true;
  const body = { model, messages, ...modeFields(settings.mode) };
  if (settings.temperature !== null) body.temperature = settings.temperature;
  if (settings.maxTokens !== null) body.max_tokens = settings.maxTokens;
  if (settings.seed !== null) body.seed = settings.seed;
  if (settings.tools) body.tools = JSON.parse(settings.tools);
  return body;
}

function modeFields(mode) {
  if (mode === "off") return { thinking: { type: "disabled" } };
  return { thinking: { type: "enabled" }, reasoning_effort: mode };
}

function asSent(message, next) {
  if (message.role === "user") return [{ role: "user", content: withFiles(message) }];
  if (message.role === "results") return []; // they stand behind their calls already
  const calls = message.calls ?? [];
  if (!message.content && !message.reasoning && !calls.length) return [];
  const said = { role: "assistant", content: message.content };
  if (message.reasoning) said.reasoning_content = message.reasoning;
  if (!calls.length) return [said];
  said.tool_calls = calls.map((call) => ({
    id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
  }));
  const given = next?.role === "results" ? next.results : {};
  return [said, ...calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: given[id] ?? NO_RESULT }))];
}

/** What the user wrote, behind the files that go with it, each between marks with its name. */
export function withFiles({ content, files = [] }) {
  const shown = files.map(({ name, text }) =>
    `[file name]: ${name}\n[file content begin]\n${text}\n[file content end]`);
  return [...shown, content].filter(Boolean).join("\n");
}

export const MODE_NAMES = ["off", "high", "max"];

export function defaultSettings(mode) {
  const known = MODE_NAMES.includes(mode) ? mode : "high";
  return { system: "", mode: known, temperature: null, maxTokens: null, seed: null, tools: "" };
}
