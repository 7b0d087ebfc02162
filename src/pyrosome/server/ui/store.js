// Conversations are kept in this browser alone, in IndexedDB: whole records of conversations and of their messages.

const NAME = "pyrosome";

/** What is kept, or, where the browser keeps nothing, what is held while the page is open (`isKept` is false). */
export async function openStore() {
  try {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("conversations", { keyPath: "id" });
      asked.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    return new Store(await done(asked));
  } catch {
    return new Held();
  }
}

class Store {
  isKept = true;
  #database;
  #channel = new BroadcastChannel(NAME);

  constructor(database) {
    this.#database = database;
    database.onversionchange = () => database.close();
  }

  /** Be told, with a conversation's id, of what other tabs have changed. */
  onChange(listener) {
    this.#channel.onmessage = (event) => listener(event.data);
  }

  /** All records, the last changed first. */
  async conversations() {
    const found = await done(this.#in("conversations", "readonly").getAll());
    return found.sort((a, b) => b.updated - a.updated);
  }

  async messages(conversation) {
    return done(this.#in("messages", "readonly").index("conversation").getAll(conversation));
  }

  /** @param isQuiet other tabs need not be told: there is more to come. */
  async put(record, messages, { isQuiet = false } = {}) {
    const transaction = this.#database.transaction(["conversations", "messages"], "readwrite");
    transaction.objectStore("conversations").put(record);
    for (const message of messages) transaction.objectStore("messages").put(message);
    await finished(transaction);
    if (!isQuiet) this.#channel.postMessage(record.id);
  }

  async remove(conversation) {
    const transaction = this.#database.transaction(["conversations", "messages"], "readwrite");
    transaction.objectStore("conversations").delete(conversation);
    const messages = transaction.objectStore("messages");
    for (const id of await done(messages.index("conversation").getAllKeys(conversation))) messages.delete(id);
    await finished(transaction);
    this.#channel.postMessage(conversation);
  }

  #in(name, mode) {
    return this.#database.transaction(name, mode).objectStore(name);
  }
}

/** The same, in memory. */
class Held {
  isKept = false;
  #records = new Map();
  #messages = new Map();

  onChange() {}

  async conversations() {
    return [...this.#records.values()].sort((a, b) => b.updated - a.updated);
  }

  async messages(conversation) {
    return [...this.#messages.values()].filter((message) => message.conversation === conversation);
  }

  async put(record, messages) {
    this.#records.set(record.id, record);
    for (const message of messages) this.#messages.set(message.id, message);
  }

  async remove(conversation) {
    this.#records.delete(conversation);
    for (const { id } of await this.messages(conversation)) this.#messages.delete(id);
  }
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds an older version of the page open"));
  });
}

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}
