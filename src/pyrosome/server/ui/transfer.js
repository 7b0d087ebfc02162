// Conversations as a file, and back.  A file is whatever somebody hands over, so nothing in it is taken on trust.

import { Conversation, defaultSettings, MODE_NAMES, newId } from "./conversation.js";

const FORMAT = "pyrosome conversations";
const VERSION = 1;
const NUMBERS = [
  "promptTokens", "completionTokens", "cachedTokens", "reasoningTokens", "firstMs", "totalMs", "thinkMs",
  "tokensPerSecond",
];

/** JSON text of conversations with all their branches. */
export function exported(conversations) {
  const written = conversations.map(({ record, messages }) => ({ ...record, messages: [...messages.values()] }));
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations: written }, null, 1);
}

/** Conversations of a file's text, under new ids.  Raises an Error that says what is wrong with it. */
export function imported(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is no file of conversations: ${error.message}.`);
  }
  if (found?.format !== FORMAT) throw new Error("This is no file of conversations that this page has exported.");
  if (found.version !== VERSION) {
    throw new Error(`The file has version ${found.version}; this page reads version ${VERSION}.`);
  }
  must(Array.isArray(found.conversations), "its list of conversations is missing");
  return found.conversations.map(conversationOf);
}

function conversationOf(found) {
  must(isObject(found) && Array.isArray(found.messages), "a conversation has no messages");
  const made = Conversation.blank(settingsOf(found.settings));
  made.record.title = string(found.title).slice(0, 200);
  const ids = new Map(found.messages.map((message) => [string(message?.id), newId()]));
  must(ids.size === found.messages.length, "two messages have the same id");
  const messages = found.messages.map((message) => messageOf(message, made.id, ids));
  mustAllEnd(messages);
  const whole = new Conversation(made.record, messages);
  made.record.leaf = ids.get(found.leaf) ?? null;
  if (!made.record.leaf && messages.length) whole.show(messages[0]);
  return whole;
}

function messageOf(found, conversation, ids) {
  must(["user", "assistant", "results"].includes(found.role), `a message has the role ${JSON.stringify(found.role)}`);
  must(found.parent == null || ids.has(found.parent), "a message follows one that is missing");
  const message = {
    id: ids.get(found.id), conversation, parent: ids.get(found.parent) ?? null, role: found.role,
    created: number(found.created) ?? Date.now(), content: string(found.content),
  };
  if (Array.isArray(found.files)) message.files = found.files.map(fileOf);
  if (found.reasoning) message.reasoning = string(found.reasoning);
  if (Array.isArray(found.calls)) message.calls = found.calls.map(callOf);
  if (isObject(found.results)) {
    message.results = Object.fromEntries(Object.entries(found.results).map(([id, text]) => [id, string(text)]));
  }
  if (isObject(found.facts)) message.facts = factsOf(found.facts);
  return message;
}

const fileOf = (file) => ({
  name: string(file?.name), bytes: number(file?.bytes) ?? 0, text: string(file?.text), tokens: number(file?.tokens),
});

const callOf = (call) => ({ id: string(call?.id), name: string(call?.name), arguments: string(call?.arguments) });

function factsOf(found) {
  const facts = {};
  for (const name of NUMBERS) {
    if (number(found[name]) !== null) facts[name] = found[name];
  }
  for (const name of ["mode", "finish"]) if (typeof found[name] === "string") facts[name] = found[name].slice(0, 40);
  if (["string", "number"].includes(typeof found.seed)) facts.seed = String(found.seed).slice(0, 40);
  if (found.isEdited === true) facts.isEdited = true;
  return facts;
}

function settingsOf(found) {
  const settings = defaultSettings("high");
  if (!isObject(found)) return settings;
  if (MODE_NAMES.includes(found.mode)) settings.mode = found.mode;
  settings.system = string(found.system);
  for (const name of ["temperature", "maxTokens", "seed"]) settings[name] = number(found[name]);
  try {
    if (Array.isArray(JSON.parse(string(found.tools)))) settings.tools = found.tools;
  } catch {
    settings.tools = ""; // tools that are no JSON were never sent either
  }
  return settings;
}

/** No message follows itself, however far up: a path of them would have no beginning. */
function mustAllEnd(messages) {
  const all = new Map(messages.map((message) => [message.id, message]));
  const ends = new Set();
  for (const message of messages) {
    const path = new Set();
    for (let at = message; at && !ends.has(at.id); at = all.get(at.parent)) {
      must(!path.has(at.id), "a message follows itself");
      path.add(at.id);
    }
    for (const id of path) ends.add(id);
  }
}

function must(condition, what) {
  if (!condition) throw new Error(`The file is damaged: ${what}.`);
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const string = (value) => (typeof value === "string" ? value : "");
const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
