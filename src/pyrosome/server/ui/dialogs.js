// What the page asks for in a dialog: a key, a yes, and the settings of a conversation.

import { asking, key } from "./api.js";
import { byId } from "./dom.js";
import { problemOfTools } from "./tools.js";

const NUMBERS = ["temperature", "maxTokens", "seed"];

/** Open a dialog; true where it was left by its first button. */
function opened(dialog) {
  return new Promise((resolve) => {
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    dialog.showModal();
  });
}

/** Forms in dialogs are never sent: their buttons close the dialog with their value. */
export function closeByButtons() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close(event.submitter?.value ?? "yes");
    });
    for (const button of dialog.querySelectorAll("[data-close]")) {
      button.addEventListener("click", () => dialog.close(""));
    }
  }
}

let asked = null; // several requests that need a key ask for it once

/** Ask for a key when the server wants one. */
export function askForKeys() {
  asking.forKey = (why) => {
    asked ??= askForKey(why).finally(() => { asked = null; });
    return asked;
  };
}

async function askForKey(why) {
  const field = byId("key");
  field.value = "";
  byId("key-why").textContent = why;
  byId("key-why").hidden = !why;
  if (!(await opened(byId("key-dialog"))) || !field.value.trim()) return false;
  key.set(field.value.trim().replace(/[^\x21-\x7e]/g, "")); // what a header can hold; a key has nothing else
  field.value = "";
  return true;
}

export function confirm(question, button) {
  byId("confirm-question").textContent = question;
  byId("confirm-yes").textContent = button;
  return opened(byId("confirm"));
}

/** Let the user change settings; true where they did. */
export async function changeSettings(settings) {
  byId("system").value = settings.system;
  byId("tools").value = settings.tools;
  for (const name of NUMBERS) byId(name).value = settings[name] ?? "";
  byId("forget-key").hidden = !key.get();
  checkTools();
  if (!(await opened(byId("settings")))) return false;
  settings.system = byId("system").value;
  settings.tools = byId("tools").value.trim();
  for (const name of NUMBERS) settings[name] = byId(name).value === "" ? null : Number(byId(name).value);
  return true;
}

export function listenToSettings() {
  byId("tools").addEventListener("input", checkTools);
  byId("forget-key").addEventListener("click", () => {
    key.set("");
    byId("forget-key").hidden = true;
  });
}

function checkTools() {
  const problem = problemOfTools(byId("tools").value);
  byId("tools").setCustomValidity(problem);
  byId("tools").setAttribute("aria-invalid", String(problem !== ""));
  byId("tools-problem").textContent = problem;
}
