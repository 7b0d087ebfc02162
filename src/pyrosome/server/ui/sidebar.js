// The list of conversations, and how it is put away on a narrow screen.

import { byId, el, iconButton } from "./dom.js";

const NARROW = matchMedia("(max-width: 860px)");

export class Sidebar {
  #painted = "";

  /** @param page {start(), remove(record), exportOne(record), exportAll(), importFile(file)} */
  constructor(page) {
    this.page = page;
    byId("new").addEventListener("click", () => {
      page.start();
      this.close();
    });
    byId("export-all").addEventListener("click", () => page.exportAll());
    byId("import").addEventListener("click", () => byId("import-input").click());
    byId("import-input").addEventListener("change", async (event) => {
      const [file] = event.target.files;
      event.target.value = "";
      if (file) await page.importFile(file);
    });
    byId("menu").addEventListener("click", () => this.#set(!this.isOpen));
    byId("shade").addEventListener("click", () => this.close());
    byId("side").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.isOpen) return;
      event.stopPropagation();
      this.close();
    });
    NARROW.addEventListener("change", () => this.#set(false));
    this.#set(false);
  }

  get isOpen() { return byId("side").classList.contains("is-open"); }

  /** On a narrow screen: show the conversation again. */
  close() {
    if (!this.isOpen) return;
    this.#set(false);
    byId("menu").focus();
  }

  /**
   * @param open the id of the one that is shown.
   * @param running ids of those whose answer is on its way.
   */
  paint(records, open, running) {
    const wanted = JSON.stringify([records.map(({ id, title }) => [id, title]), open, [...running]]);
    if (wanted === this.#painted) return;
    this.#painted = wanted;
    const focused = document.activeElement?.closest("#conversations") ? document.activeElement.dataset.name : null;
    byId("conversations").replaceChildren(...records.map((record) => {
      const name = record.title || "Without a title";
      const named = (what) => ({ "data-name": `${what} ${record.id}` });
      const attributes = {
        href: `#${record.id}`, title: name, "aria-current": record.id === open ? "page" : null,
        onclick: () => this.close(), ...named("open"),
      };
      const isRunning = running.has(record.id);
      const mark = isRunning && el("span", { class: "visually-hidden" }, " (an answer is on its way)");
      return el("li", { class: isRunning ? "is-running" : null },
        el("a", attributes, name, mark),
        iconButton("export", `Export ${name}`, () => this.page.exportOne(record), named("export")),
        iconButton("delete", `Delete ${name}`, () => this.page.remove(record), named("delete")));
    }));
    if (focused) byId("conversations").querySelector(`[data-name="${focused}"]`)?.focus();
    byId("nothing").hidden = records.length > 0;
  }

  #set(isOpen) {
    const side = byId("side");
    side.classList.toggle("is-open", isOpen);
    side.inert = NARROW.matches && !isOpen; // put away, it is out of reach of the keyboard too
    byId("shade").hidden = !isOpen;
    byId("menu").setAttribute("aria-expanded", String(isOpen));
    if (isOpen) byId("new").focus();
  }
}
