// The page: which conversation is open, which answers are on their way, and what each button does.

import { health, models } from "./api.js";
import { Composer } from "./composer.js";
import { bodyOf, Conversation, defaultSettings } from "./conversation.js";
import { askForKeys, changeSettings, closeByButtons, confirm, listenToSettings } from "./dialogs.js";
import { announce, byId, download, notice } from "./dom.js";
import { AssistantView, UserView } from "./message.js";
import { Meter } from "./meter.js";
import { Sidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import { exported, imported } from "./transfer.js";
import { Turn } from "./turn.js";
import { headingOf, many } from "./words.js";

const MODE = "pyrosome.mode"; // the last one chosen, which a new conversation begins with
const POLL_MS = 2000;
const NEAR_PX = 80; // so close to the end of the log, new text is followed
const NOT_READY = {
  loading: "The model is being loaded…",
  restarting: "The engine is being started again…",
  failed: "The model could not be loaded",
};
const NOTHING_KEPT = "This browser keeps no data for this page: conversations are gone when it is closed.";
const STATES = { thinking: "Thinking", answering: "Answering" };
const READ_OUT = 800; // characters of a finished answer that are read out

class Page {
  meter = new Meter();
  model = null; // as /v1/models lists it
  conversation = null;
  #records = []; // of all conversations, the last changed first
  #known = new Map(); // conversations that were opened, by id
  #turns = new Map(); // answers on their way, by conversation
  #views = new Map(); // by message
  #gone = new Set(); // ids of conversations that were deleted, and must not come back with the end of an answer

  async begin() {
    askForKeys();
    closeByButtons();
    listenToSettings();
    this.composer = new Composer(this);
    this.sidebar = new Sidebar(this);
    this.#listen();
    this.store = await openStore();
    if (!this.store.isKept) notice(NOTHING_KEPT);
    this.store.onChange((id) => this.#changedElsewhere(id));
    this.#records = await this.store.conversations();
    await this.#openNamed();
    await this.#meet();
  }

  // Conversations

  /** A new conversation; it is kept once something is said. */
  start() {
    this.#show(Conversation.blank(this.#newSettings()));
    if (matchMedia("(hover: hover)").matches) byId("draft").focus(); // on a phone that would open its keyboard
  }

  async remove(record) {
    const name = record.title || "Without a title";
    const question = `Delete “${name}” with all its branches? It is kept nowhere else.`;
    if (!(await confirm(question, "Delete"))) return;
    this.#gone.add(record.id);
    this.#turns.get(record.id)?.stop();
    this.#records = this.#records.filter(({ id }) => id !== record.id);
    this.#known.delete(record.id);
    await this.store.remove(record.id);
    if (record.id === this.conversation.id) this.start();
    else this.#paintSidebar();
    announce("Deleted");
  }

  async exportOne(record) {
    download(`${fileName(record.title)}.json`, exported([await this.#load(record)]), "application/json");
  }

  async exportAll() {
    const all = await Promise.all(this.#records.map((record) => this.#load(record)));
    download("pyrosome-conversations.json", exported(all), "application/json");
  }

  async importFile(file) {
    let found;
    try {
      found = imported(await file.text());
    } catch (error) {
      notice(`${file.name} was not imported. ${error.message}`);
      return;
    }
    for (const conversation of found) await this.#keep(conversation, [...conversation.messages.values()]);
    announce(`${many(found.length, "conversation")} imported`);
    if (found.length) this.#show(found[0]);
  }

  async fork(message) {
    const fork = this.conversation.forkedAt(message);
    this.#show(fork);
    byId("draft").focus();
    announce("A new conversation, up to that message");
    await this.#keep(fork, [...fork.messages.values()]);
  }

  // Messages

  canAsk() { return !this.#turns.has(this.conversation.id); }

  /** Whether an answer that broke off can be continued where it stopped. */
  canResume(message) {
    const { facts, content, reasoning, calls } = message;
    const isCut = ["length", "stopped"].includes(facts?.finish) || message.problem;
    return isCut && Boolean(content || reasoning) && !calls?.length && this.conversation.last === message;
  }

  siblings(message) { return this.conversation.siblings(message); }

  resultsOf(message) {
    const path = this.conversation.path();
    const next = path[path.indexOf(message) + 1];
    return next?.role === "results" ? next.results : null;
  }

  send(fields) {
    const asked = this.conversation.add(this.conversation.last?.id ?? null, { role: "user", ...fields });
    return this.#answer(asked);
  }

  /** Another answer to the same question; one that failed before it said anything is replaced. */
  regenerate(message) {
    if (message.problem && !message.content && !message.reasoning) return this.#run(message, message.parent);
    return this.#answer(this.conversation.messages.get(message.parent));
  }

  resume(message) { return this.#run(message, message.id, { continues: true }); }

  giveResults(message, results) {
    return this.#answer(this.conversation.add(message.id, { role: "results", results }));
  }

  /** Another version of a message; the user's is answered anew. */
  async edit(message, content) {
    const { role, parent, files, reasoning } = message;
    if (role === "user") {
      if (!content.trim() && !files) return;
      await this.#answer(this.conversation.add(parent, files ? { role, content, files } : { role, content }));
    } else {
      const facts = { mode: message.facts?.mode, isEdited: true };
      const edited = this.conversation.add(parent, { role, content, reasoning, facts });
      this.#show(this.conversation);
      this.#views.get(edited.id).focusAction("edit");
      await this.#keep(this.conversation, [edited]);
    }
  }

  /** Show another version of a message, and what was said below it. */
  async step(message) {
    const action = document.activeElement?.dataset.action;
    this.conversation.show(message);
    this.#show(this.conversation);
    this.#views.get(message.id)?.focusAction(action);
    await this.#keep(this.conversation);
  }

  setMode(mode) {
    this.conversation.settings.mode = mode;
    localStorage.setItem(MODE, mode);
    return this.#keepSettings();
  }

  stop() { this.#turns.get(this.conversation.id)?.stop(); }

  /** Paint, and keep to the end of the log where the reader is there. */
  painting(paint) {
    const log = byId("log");
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
    paint();
    if (isAtEnd) log.scrollTop = log.scrollHeight;
    this.#paintToEnd();
  }

  #answer(asked) {
    const message = this.conversation.add(asked.id, { role: "assistant", reasoning: "" });
    return this.#run(message, asked.id, { kept: [asked] });
  }

  async #run(message, upTo, { continues = false, kept = [] } = {}) {
    const { conversation } = this;
    if (this.#turns.has(conversation.id)) return;
    const body = bodyOf(conversation.settings, conversation.path(upTo), this.model?.id, { continues });
    const turn = new Turn(message, body, (how) => this.#keep(conversation, [message], how));
    this.#turns.set(conversation.id, turn);
    let state = "";
    turn.addEventListener("part", () => {
      if (turn.state !== state && conversation === this.conversation) announce(STATES[turn.state] ?? "");
      state = turn.state;
      this.#views.get(message.id)?.schedule();
    });
    this.#show(conversation);
    this.#toEnd();
    await this.#keep(conversation, [...kept, message]);
    await turn.run();
    this.#turns.delete(conversation.id);
    this.#ended(conversation, message);
  }

  #ended(conversation, message) {
    this.#paintSidebar();
    if (!this.model && !message.problem) this.#meet();
    if (conversation !== this.conversation) return;
    this.painting(() => this.#paintLog());
    this.composer.setBusy(false);
    this.meter.countSaid(conversation, this.model?.id);
    const view = this.#views.get(message.id);
    if (message.problem) announce(`${headingOf(message.problem)}. ${message.problem.text}`);
    else announce(`${view?.answer.textContent.slice(0, READ_OUT) ?? ""} End of the answer.`);
  }

  // What is kept, and what is shown

  async #keep(conversation, messages = [], how = {}) {
    if (this.#gone.has(conversation.id)) return;
    this.#known.set(conversation.id, conversation);
    if (!this.#records.some(({ id }) => id === conversation.id) && !conversation.messages.size) return;
    this.#records = [conversation.record, ...this.#records.filter(({ id }) => id !== conversation.id)];
    this.#records.sort((a, b) => b.updated - a.updated);
    try {
      await this.store.put(conversation.record, messages, how);
    } catch (error) {
      notice(`The browser could not keep this: ${error.message}. Export the conversation, or delete others.`);
    }
    this.#paintSidebar();
  }

  async #keepSettings() {
    this.meter.countSaid(this.conversation, this.model?.id);
    await this.#keep(this.conversation);
  }

  #newSettings() { return defaultSettings(localStorage.getItem(MODE) ?? this.model?.default_mode); }

  async #load(record) {
    if (!this.#known.has(record.id)) {
      this.#known.set(record.id, new Conversation(record, await this.store.messages(record.id)));
    }
    return this.#known.get(record.id);
  }

  async #openNamed() {
    const record = this.#records.find(({ id }) => `#${id}` === location.hash);
    if (record?.id === this.conversation?.id && record) return;
    if (record) this.#show(await this.#load(record));
    else this.start();
  }

  async #changedElsewhere(id) {
    if (this.#turns.has(id)) return;
    this.#known.delete(id);
    this.#records = await this.store.conversations();
    const record = this.#records.find((other) => other.id === id);
    if (id !== this.conversation.id) return this.#paintSidebar();
    if (!record) return this.start();
    const at = byId("log").scrollTop;
    this.#show(await this.#load(record));
    byId("log").scrollTop = at;
    return undefined;
  }

  #show(conversation) {
    const isOther = conversation !== this.conversation;
    this.conversation = conversation;
    if (isOther) {
      this.#views.clear();
      byId("messages").replaceChildren();
    }
    const isKept = conversation.messages.size > 0;
    history.replaceState(null, "", isKept ? `#${conversation.id}` : location.pathname + location.search);
    this.#paintLog();
    this.#paintSidebar();
    this.composer.showMode(conversation.settings.mode);
    this.composer.setBusy(this.#turns.has(conversation.id));
    this.meter.countSaid(conversation, this.model?.id);
    if (isOther) this.#toEnd();
  }

  #paintLog() {
    const messages = this.conversation.path().filter(({ role }) => role !== "results");
    const shown = new Set(messages.map(({ id }) => id));
    const turn = this.#turns.get(this.conversation.id) ?? null;
    for (const [id, view] of this.#views) {
      if (shown.has(id)) continue;
      view.element.remove();
      this.#views.delete(id);
    }
    const list = byId("messages");
    messages.forEach((message, n) => {
      const View = message.role === "user" ? UserView : AssistantView;
      const view = this.#views.get(message.id) ?? new View(message, this);
      this.#views.set(message.id, view);
      view.turn = turn?.message === message ? turn : null;
      if (list.children[n] !== view.element) list.insertBefore(view.element, list.children[n] ?? null);
      view.paint();
    });
    byId("welcome").hidden = messages.length > 0;
    const { title } = this.conversation.record;
    byId("title").value = title;
    byId("title").hidden = !messages.length;
    document.title = title ? `${title} – pyrosome` : "pyrosome";
    this.#paintToEnd();
  }

  #paintSidebar() {
    this.sidebar.paint(this.#records, this.conversation?.id, new Set(this.#turns.keys()));
  }

  #toEnd() {
    const log = byId("log");
    log.scrollTop = log.scrollHeight;
  }

  #paintToEnd() {
    const log = byId("log");
    byId("to-end").hidden = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  }

  // The server

  /** Learn what is served; while it is not ready, ask again. */
  async #meet() {
    for (;;) {
      const { status, reason } = await health();
      if (status === "ready" || status === "draining") break;
      byId("state").textContent = (NOT_READY[status] ?? "The server does not answer") + (reason ? `: ${reason}` : "");
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    try {
      [this.model] = await models();
    } catch (error) {
      byId("state").textContent = error.message;
      return;
    }
    byId("state").textContent = `${this.model.id} · ${many(this.model.max_model_len, "token")}`;
    byId("model").textContent = this.model.id;
    this.meter.setMost(this.model.max_model_len);
    if (!this.conversation.messages.size) {
      this.conversation.settings.mode = this.#newSettings().mode;
      this.composer.showMode(this.conversation.settings.mode);
    }
    this.meter.countSaid(this.conversation, this.model.id);
  }

  #listen() {
    addEventListener("hashchange", () => this.#openNamed());
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    });
    byId("log").addEventListener("scroll", () => this.#paintToEnd(), { passive: true });
    byId("to-end").addEventListener("click", () => this.#toEnd());
    byId("open-settings").addEventListener("click", async () => {
      if (await changeSettings(this.conversation.settings)) await this.#keepSettings();
    });
    byId("title").addEventListener("change", async (event) => {
      this.conversation.record.title = event.target.value.trim().slice(0, 200);
      await this.#keep(this.conversation);
    });
    byId("skip").addEventListener("click", (event) => {
      event.preventDefault();
      byId("draft").focus();
    });
    setInterval(() => { // so that the time of thinking is seen to pass
      const turn = this.#turns.get(this.conversation?.id);
      if (turn?.state === "thinking") this.#views.get(turn.message.id)?.schedule();
    }, 1000);
  }
}

const fileName = (title) => title.replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "conversation";

new Page().begin();
