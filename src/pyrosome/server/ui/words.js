// Numbers, names and errors as people read them.

export const MODES = { off: "Non-Think", low: "Think Low", high: "Think High", max: "Think Max" };

const number = new Intl.NumberFormat("en");

export const count = (value) => number.format(value);

/** "1 token", "2 tokens". */
export const many = (value, one) => `${count(value)} ${one}${value === 1 ? "" : "s"}`;

export function seconds(ms) {
  if (ms < 95) return `${Math.round(ms)} ms`;
  if (ms < 9950) return `${(ms / 1000).toFixed(1)} s`;
  const whole = Math.round(ms / 1000);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

export function bytes(value) {
  if (value < 1000) return `${value} B`;
  if (value < 1e6) return `${(value / 1000).toFixed(1)} kB`;
  return `${(value / 1e6).toFixed(1)} MB`;
}

/** What a turn cost and how it went, fact by fact. */
export function factsOf(message) {
  const facts = message.facts ?? {};
  const said = [];
  if (facts.mode) said.push(MODES[facts.mode] ?? facts.mode);
  if (facts.completionTokens != null) {
    const thoughts = facts.reasoningTokens ? `, ${count(facts.reasoningTokens)} of them thoughts` : "";
    said.push(many(facts.completionTokens, "token") + thoughts);
  }
  if (facts.tokensPerSecond) said.push(`${facts.tokensPerSecond.toFixed(1)} tokens/s`);
  if (facts.firstMs != null) said.push(`first after ${seconds(facts.firstMs)}`);
  if (facts.promptTokens != null) {
    said.push(`${count(facts.cachedTokens ?? 0)} of ${many(facts.promptTokens, "prompt token")} from the cache`);
  }
  if (facts.seed != null) said.push(`seed ${facts.seed}`);
  if (facts.finish === "length") said.push("cut at the limit of tokens");
  if (facts.finish === "stopped") said.push("stopped by you");
  if (facts.isEdited) said.push("edited");
  return said;
}

/** A text with a full stop, where it has none of its own. */
export const sentence = (text) => (/[.!?…]\s*$/.test(text) ? text : `${text}.`);

/** A problem's heading, by the status it came with; 0 is none. */
export function headingOf(problem) {
  const { status } = problem;
  if (status === 0) return "The connection failed";
  if (status === 401 || status === 403) return "The server did not let you in";
  if (status === 402) return "The budget of this key is spent";
  if (status === 413) return "That is too large";
  if (status === 429) return "The server is busy";
  if (status === 503) return "The server is not ready";
  return status >= 500 ? "The server failed" : "The server did not take this";
}

/** The first words of a message, as a title. */
export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

/** A tool call's arguments, indented where they are JSON. */
export function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
