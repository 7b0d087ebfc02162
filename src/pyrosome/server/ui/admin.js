// Keys, accounts, invites and usage: at `account` for whoever has a key, at `admin` for whoever runs the server.
// Whatever anybody named a thing is shown as text.  The key is kept for this tab and sent as a header, never as a cookie.

import { key } from "./api.js";
import { byId, copy, download, el, notice } from "./dom.js";

const isAdmin = location.pathname.replace(/\/+$/, "").endsWith("admin");
const base = isAdmin ? "admin" : "account";
const SCOPES = {
  generate: "talk to the model", sessions: "keep conversations computed", account: "manage its account’s keys",
  metrics: "read the server’s metrics", admin: "manage everybody’s keys",
};
const LIMITS = [
  ["requests_per_min", "Requests a minute"], ["tokens_per_min", "Tokens a minute"], ["max_concurrent", "Requests at once"],
  ["budget_micro", "Money a month"],
];
const PRICES = [["prompt_micro", "Prompt"], ["cached_micro", "Cached"], ["output_micro", "Output"]];

let me = null; // the account and key of whoever looks, where the key has the scope for it
let accounts = []; // all of them, for an admin
let keys = [];

// Asking the server

/** An answer's JSON, or its text; raises an Error in the server's words. */
async function call(method, path, body) {
  const headers = { Authorization: `Bearer ${key.get()}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, cache: "no-store", body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Error("The server could not be reached. See that it runs, then try again.");
  }
  if (response.ok) return (response.headers.get("content-type") ?? "").includes("json") ? response.json() : response.text();
  const told = await response.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `The server answered ${response.status}.`);
  error.status = response.status;
  throw error;
}

const get = async (path) => (await call("GET", path)).data;

/** Do something, and say what went wrong above everything else. */
async function attempt(work) {
  byId("problem").textContent = "";
  try {
    await work();
  } catch (error) {
    if (error.status === 401) showDoor(key.get() ? error.message : "");
    else byId("problem").textContent = error.message;
  }
}

// Money: millionths, as whole numbers

function shown(micro) {
  const part = String(micro % 1000000).padStart(6, "0").replace(/0+$/, "").padEnd(2, "0");
  return `${Math.floor(micro / 1000000)}.${part}`;
}

function microOf(text, what) {
  const found = text.trim().match(/^(\d{1,9})(?:\.(\d{1,6}))?$/);
  if (!found) throw new Error(`${what} is “${text}”; a number like 12.50 was expected.`);
  return Number(found[1]) * 1000000 + Number((found[2] ?? "").padEnd(6, "0"));
}

// Tables

const tag = (text) => el("span", { class: `tag ${text}` }, text);
const day = (time) => (time ? time.slice(0, 10) : "–");
const date = (time) => el("span", { class: "whole" }, day(time));
const count = (number) => number.toLocaleString("en");

function limitsIn(of) {
  const found = LIMITS.filter(([name]) => of.limits[name] !== null)
    .map(([name, title]) => `${title.toLowerCase()} ${name === "budget_micro" ? shown(of.limits[name]) : count(of.limits[name])}`);
  if (of.price) found.push(`price ${PRICES.map(([name]) => shown(of.price[name])).join(" / ")}`);
  return found.length ? found.map((text) => el("div", {}, text)) : "–";
}

/** Rows of cells under titles; one that begins with # is of numbers, one with * is only read out. */
function table(place, titles, rows, nothing, total = null) {
  if (!rows.length) {
    place.replaceChildren(el("p", { class: "nothing" }, nothing));
    return;
  }
  const kinds = titles.map((title) => ({ "#": "number", "*": "acts" })[title[0]] ?? null);
  const names = titles.map((title) => title.replace(/^[#*]/, ""));
  const head = (name, n) => (kinds[n] === "acts" ? el("span", { class: "visually-hidden" }, name) : name);
  const cells = (row) => row.map((cell, n) => el("td", { class: kinds[n], "data-title": names[n] }, cell !== "" && el("div", {}, cell)));
  place.replaceChildren(el("table", {},
    el("thead", {}, el("tr", {}, names.map((name, n) => el("th", { class: kinds[n], scope: "col" }, head(name, n))))),
    el("tbody", {}, rows.map((row) => el("tr", {}, cells(row)))),
    total && el("tfoot", {}, el("tr", {}, cells(total)))));
}

function act(label, of, onclick) {
  return el("button", { type: "button", "aria-label": `${label} ${of.name}`, onclick }, label);
}

const accountName = (id) => accounts.find((account) => account.id === id)?.name ?? id;

function showKeys() {
  const isShown = (one) => one.state === "active" || byId("show-ended").checked;
  const rows = keys.filter(isShown).map((one) => [
    [one.name, el("small", {}, `${one.prefix}…`)],
    ...(isAdmin ? [accountName(one.account)] : []),
    one.scopes.map(tag), tag(one.state), date(one.expires), date(one.last_used), limitsIn(one),
    one.state === "revoked" ? "" : el("div", { class: "row" },
      act("Change", one, () => changeKey(one)), act("Rotate", one, () => rotateKey(one)), act("Revoke", one, () => revokeKey(one))),
  ]);
  const titles = ["Name", ...(isAdmin ? ["Account"] : []), "May", "State", "Ends", "Last used", "Limits", "*Actions"];
  table(byId("keys"), titles, rows, "There are no keys yet.");
}

function showAccounts() {
  const rows = accounts.map((one) => [
    [one.name, el("small", {}, one.id)], tag(one.closed ? "closed" : "open"), limitsIn(one), shown(one.spent_micro),
    el("div", { class: "row" }, act("Change", one, () => changeAccount(one)),
      act(one.closed ? "Open" : "Close", one, () => closeAccount(one))),
  ]);
  table(byId("accounts"), ["Name", "State", "Limits", "#Spent this month", "*Actions"], rows, "There are no accounts yet.");
}

function showInvites(invites) {
  const rows = invites.map((one) => [
    [one.name, el("small", {}, one.id)], tag(one.state), count(one.uses_left), date(one.expires), one.scopes.map(tag), limitsIn(one),
    one.state === "open" ? el("div", { class: "row" }, act("Revoke", one, () => revokeInvite(one))) : "",
  ]);
  table(byId("invites"), ["Name", "State", "#Uses left", "Ends", "May", "Limits", "*Actions"], rows, "There are no invites.");
}

async function showUsage() {
  const by = byId("by").value;
  const found = await call("GET", `${base}/usage?${days()}&by=${by}`);
  byId("from").value = found.from;
  byId("to").value = found.to;
  const most = Math.max(1, ...found.data.map((row) => row.requests));
  const name = (id) => (by === "key" ? keys.find((one) => one.id === id)?.name ?? id : by === "account" ? accountName(id) : id) || "without a key";
  const numbers = (row) => [count(row.requests), count(row.prompt_tokens), count(row.cached_tokens), count(row.output_tokens), row.cost];
  const rows = found.data.map((row) => [
    name(row[by]), el("progress", { max: most, value: row.requests, "aria-label": `Requests of ${name(row[by])}` }), ...numbers(row),
  ]);
  const titles = [byId("by").selectedOptions[0].text, "*Share", "#Requests", "#Prompt tokens", "#of them cached", "#Output tokens", "#Cost"];
  table(byId("usage"), titles, rows, "Nothing was used in these days.", ["Together", "", ...numbers(found.total)]);
}

const days = () => new URLSearchParams(["from", "to"].filter((n) => byId(n).value).map((n) => [n, byId(n).value])).toString();

// Dialogs

/** Ask for fields; `done(fields)` sends them, and what it raises is shown in the dialog. */
function ask(title, yes, fields, done) {
  byId("form-title").textContent = title;
  byId("form-yes").textContent = yes;
  byId("form-problem").textContent = "";
  byId("form-fields").replaceChildren(...fields);
  const dialog = byId("form");
  dialog.querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    byId("form-yes").disabled = true;
    try {
      await done(Object.fromEntries([...dialog.querySelectorAll("[name]")].map((field) => [field.name, field])));
      dialog.close();
      await attempt(load);
    } catch (error) {
      byId("form-problem").textContent = error.message;
    } finally {
      byId("form-yes").disabled = false;
    }
  };
  dialog.showModal();
}

/** Show a secret until the dialog is closed; then it is nowhere in the page. */
function showSecret(what, text) {
  byId("secret-what").textContent = what;
  byId("secret-text").value = text;
  byId("secret").showModal();
  byId("secret-text").select();
}

const field = (name, label, value = "", more = {}) => el("label", {}, label, el("input", { name, value, autocomplete: "off", ...more }));

function scopeFields(chosen, allowed) {
  const boxes = allowed.map((scope) => el("label", { class: "check" },
    el("input", { type: "checkbox", name: `scope-${scope}`, checked: chosen.includes(scope) }), `${scope}: ${SCOPES[scope]}`));
  return el("fieldset", {}, el("legend", {}, "It may"), boxes);
}

function termFields(of) {
  const money = (value) => (value == null ? "" : shown(value));
  const limit = ([name, title]) => field(name, title, name === "budget_micro" ? money(of.limits?.[name]) : of.limits?.[name] ?? "",
    { placeholder: "no limit of its own", inputmode: "decimal" });
  const price = ([name, title]) => field(name, title, money(of.price?.[name]), { placeholder: "the server’s", inputmode: "decimal" });
  const fields = [el("div", { class: "two" }, LIMITS.map(limit))];
  if (isAdmin) fields.push(el("div", { class: "legend" }, "Price of a million tokens"), el("div", { class: "three" }, PRICES.map(price)));
  return fields;
}

const ends = (of) => field("expires", "It ends", of.expires ? day(of.expires) : "", { placeholder: "never; or 30d, or 2030-01-31" });

/** What the fields of a dialog say, as the server takes it. */
function termsIn(fields) {
  const body = { name: fields.name.value, limits: {} };
  for (const [name, title] of LIMITS) {
    const text = fields[name].value.trim();
    if (text && name !== "budget_micro" && !/^\d{1,12}$/.test(text)) throw new Error(`${title} is “${text}”; a whole number was expected.`);
    body.limits[name] = !text ? null : name === "budget_micro" ? microOf(text, title) : Number(text);
  }
  if (isAdmin) {
    const given = PRICES.filter(([name]) => fields[name].value.trim());
    if (given.length && given.length < PRICES.length) throw new Error("A price has three parts: prompt, cached and output.");
    body.price = given.length ? Object.fromEntries(PRICES.map(([name, title]) => [name, microOf(fields[name].value, title)])) : null;
  }
  if (fields.expires) body.expires = fields.expires.value.trim() || null;
  const scopes = Object.keys(SCOPES).filter((scope) => fields[`scope-${scope}`]?.checked);
  if (Object.keys(fields).some((name) => name.startsWith("scope-"))) body.scopes = scopes;
  return body;
}

function newKey() {
  const allowed = isAdmin ? Object.keys(SCOPES) : me.key.scopes;
  const chosen = ["generate", "sessions"].filter((scope) => allowed.includes(scope));
  const account = isAdmin && el("label", {}, "Account",
    el("select", { name: "account" }, accounts.filter((one) => !one.closed).map((one) => el("option", { value: one.id }, one.name))));
  const fields = [field("name", "Name", "", { required: true, maxlength: 100 }), account, scopeFields(chosen, allowed), ends({}), ...termFields({})];
  ask("New key", "Make it", fields.filter(Boolean), async (given) => {
    const body = termsIn(given);
    if (isAdmin) body.account = given.account.value;
    const made = await call("POST", `${base}/keys`, body);
    showSecret(made.name, made.secret);
  });
}

function changeKey(one) {
  const allowed = isAdmin ? Object.keys(SCOPES) : Object.keys(SCOPES).filter((s) => me.key.scopes.includes(s) || one.scopes.includes(s));
  const fields = [field("name", "Name", one.name, { required: true, maxlength: 100 }), scopeFields(one.scopes, allowed), ends(one), ...termFields(one)];
  ask(`Change ${one.name}`, "Keep", fields, async (given) => {
    const body = termsIn(given);
    if (body.expires === (one.expires ? day(one.expires) : null)) delete body.expires; // a day that was not touched has its hour
    await call("PATCH", `${base}/keys/${encodeURIComponent(one.id)}`, body);
  });
}

function rotateKey(one) {
  const choices = [["0m", "at once"], ["1h", "in an hour"], ["1d", "in a day"], ["7d", "in a week"]];
  const grace = el("label", {}, "The old secret ends", el("select", { name: "grace" }, choices.map(([value, text]) => el("option", { value }, text))));
  ask(`A new secret for ${one.name}`, "Rotate", [grace], async (given) => {
    const made = await call("POST", `${base}/keys/${encodeURIComponent(one.id)}/rotate`, { grace: given.grace.value });
    if (me?.key.id === one.id && given.grace.value === "0m") key.set(made.secret);
    showSecret(made.name, made.secret);
  });
}

function revokeKey(one) {
  const text = el("p", {}, "It ends at once and for ever, and with it every key that was made with it.");
  ask(`Revoke ${one.name}?`, "Revoke", [text], () => call("POST", `${base}/keys/${encodeURIComponent(one.id)}/revoke`));
}

function newAccount() {
  ask("New account", "Make it", [field("name", "Name", "", { required: true, maxlength: 100 }), ...termFields({})],
    (given) => call("POST", "admin/accounts", termsIn(given)));
}

function changeAccount(one) {
  ask(`Change ${one.name}`, "Keep", [field("name", "Name", one.name, { required: true, maxlength: 100 }), ...termFields(one)],
    (given) => call("PATCH", `admin/accounts/${encodeURIComponent(one.id)}`, termsIn(given)));
}

function closeAccount(one) {
  const text = el("p", {}, one.closed ? "Its keys are let in again." : "None of its keys is let in until it is opened again. Its usage stays.");
  ask(`${one.closed ? "Open" : "Close"} ${one.name}?`, one.closed ? "Open" : "Close", [text],
    () => call("PATCH", `admin/accounts/${encodeURIComponent(one.id)}`, { closed: !one.closed }));
}

function newInvite() {
  const fields = [field("name", "Name", "", { required: true, maxlength: 100 }), field("uses", "Accounts that can be made with it", "1", { inputmode: "numeric" }),
    ends({}), scopeFields(["generate", "sessions", "account"], Object.keys(SCOPES)), ...termFields({})];
  ask("New invite", "Make it", fields, async (given) => {
    const made = await call("POST", "admin/invites", { ...termsIn(given), uses: Number(given.uses.value) });
    showSecret(`Invite ${made.name}`, made.code);
  });
}

function revokeInvite(one) {
  const text = el("p", {}, "No more accounts are made with it. Those there are stay.");
  ask(`Revoke ${one.name}?`, "Revoke", [text], () => call("POST", `admin/invites/${encodeURIComponent(one.id)}/revoke`));
}

// The whole

/** Ask for a key; `why` says what was wrong with the last. */
async function showDoor(why) {
  byId("inside").hidden = true;
  byId("forget").hidden = true;
  byId("problem").textContent = why;
  byId("door").hidden = false;
  byId("door-hint").textContent = isAdmin ? "The first one comes from the command “pyrosome keys create --admin”." : "";
  byId("door-key").focus();
  const about = await call("GET", "account/about").catch(() => null);
  byId("sign-up").hidden = isAdmin || !about?.sign_up;
}

async function load() {
  if (isAdmin) {
    accounts = await get("admin/accounts");
    keys = await get("admin/keys");
    showAccounts();
    showInvites(await get("admin/invites"));
    byId("summary").textContent = "";
  } else {
    me = await call("GET", "account/me");
    keys = await get("account/keys");
    const spent = me.spent ?? me.spent_by_key;
    byId("summary").textContent = `${me.account.name}, with the key ${me.key.name}. Spent in ${me.month}: ${spent}.`;
  }
  showKeys();
  await showUsage();
  byId("door").hidden = true;
  byId("inside").hidden = false;
  byId("forget").hidden = false;
}

function start() {
  document.title = isAdmin ? "Administration · pyrosome" : "Account · pyrosome";
  byId("title").textContent = isAdmin ? "Administration" : "Your account";
  byId(isAdmin ? "to-admin" : "to-account").setAttribute("aria-current", "page");
  byId("accounts-part").hidden = byId("invites-part").hidden = !isAdmin;
  if (isAdmin) byId("by").append(el("option", { value: "account" }, "Account"));
  byId("door-form").onsubmit = (event) => {
    event.preventDefault();
    key.set(byId("door-key").value.trim());
    byId("door-key").value = "";
    attempt(load);
  };
  byId("sign-up").onsubmit = (event) => {
    event.preventDefault();
    attempt(async () => {
      const made = await call("POST", "account/sign-up", { code: byId("sign-up-code").value, name: byId("sign-up-name").value });
      key.set(made.secret);
      byId("sign-up").reset();
      await load();
      showSecret(made.key.name, made.secret);
    });
  };
  byId("forget").onclick = () => {
    key.set("");
    showDoor("");
  };
  byId("show-ended").onchange = showKeys;
  byId("new-key").onclick = newKey;
  byId("new-account").onclick = newAccount;
  byId("new-invite").onclick = newInvite;
  byId("form-cancel").onclick = () => byId("form").close();
  byId("form").onclose = () => byId("form-fields").replaceChildren();
  byId("secret-copy").onclick = async () => {
    byId("secret-text").select();
    if (await copy(byId("secret-text").value)) notice("Copied.");
  };
  byId("secret").onclose = () => { byId("secret-text").value = ""; };
  byId("usage-form").onsubmit = (event) => {
    event.preventDefault();
    attempt(showUsage);
  };
  byId("csv").onclick = () => attempt(async () => {
    download("usage.csv", await call("GET", `${base}/usage.csv?${days()}`), "text/csv");
  });
  if (key.get()) attempt(load);
  else showDoor("");
}

start();
