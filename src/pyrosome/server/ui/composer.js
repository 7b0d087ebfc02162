// Where a message is written: text, files, mode, and the buttons that send and stop.

import { announce, byId, el, iconButton, notice } from "./dom.js";
import { readFile, Refusal } from "./files.js";
import { sizeOf } from "./message.js";

export class Composer {
  files = [];
  #isBusy = false;

  /** @param page {meter, send({content, files}), stop(), setMode(mode)} */
  constructor(page) {
    this.page = page;
    this.draft = byId("draft");
    this.draft.addEventListener("input", () => this.#changed());
    this.draft.addEventListener("keydown", (event) => this.#key(event));
    this.draft.addEventListener("paste", (event) => this.#pasted(event));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => page.stop());
    byId("attach").addEventListener("click", () => byId("file-input").click());
    byId("file-input").addEventListener("change", (event) => {
      this.add([...event.target.files]);
      event.target.value = ""; // so that the same file can be chosen again
    });
    byId("modes").addEventListener("change", (event) => page.setMode(event.target.value));
    this.#catchDrops();
  }

  /** Whether an answer is on its way: then there is a button to stop it in place of the one to send. */
  setBusy(isBusy) {
    const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
    this.#isBusy = isBusy;
    byId("send").hidden = isBusy;
    byId("stop").hidden = !isBusy;
    if (hadFocus) this.draft.focus();
  }

  showMode(mode) {
    for (const choice of byId("modes").querySelectorAll("input")) choice.checked = choice.value === mode;
  }

  /** Take files into the message, one after the other, so that each is measured against what room is left. */
  async add(files) {
    for (const file of files) {
      try {
        this.files.push(await readFile(file, this.page.meter.room));
      } catch (error) {
        if (!(error instanceof Refusal)) throw error;
        notice(error.message);
      }
      this.#paintFiles();
    }
    this.draft.focus();
  }

  #send() {
    const content = this.draft.value.trim() ? this.draft.value : "";
    if (this.#isBusy) announce("An answer is on its way; Escape stops it");
    if (this.#isBusy || (!content && !this.files.length)) return;
    const { files } = this;
    this.draft.value = "";
    this.files = [];
    this.#paintFiles();
    this.#changed();
    this.page.send(files.length ? { content, files } : { content });
  }

  #key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.#send();
  }

  #pasted(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    this.add(files);
  }

  #changed() {
    const { draft } = this;
    draft.style.height = "auto";
    draft.style.height = `${Math.min(draft.scrollHeight, innerHeight * 0.4)}px`;
    this.page.meter.countDraft(draft.value);
  }

  #paintFiles() {
    const chips = this.files.map((file) => el("li", { class: "chip" },
      el("span", { class: "name" }, file.name), el("span", { class: "size" }, sizeOf(file)),
      iconButton("close", `Leave out ${file.name}`, () => {
        this.files = this.files.filter((other) => other !== file);
        this.#paintFiles();
        this.draft.focus();
      })));
    byId("chips").replaceChildren(...chips);
    byId("chips").hidden = !chips.length;
    this.page.meter.setFiles(this.files.reduce((sum, file) => sum + (file.tokens ?? 0), 0));
  }

  #catchDrops() {
    const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
    const show = (isOver) => { byId("drop").hidden = !isOver; };
    addEventListener("dragover", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      show(true);
    });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) show(false); });
    addEventListener("drop", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault(); // or the browser would leave the page for the file
      show(false);
      this.add([...event.dataTransfer.files]);
    });
  }
}
