// This server's own API, and its errors in words.  Addresses are relative, so the page works below any path.

const KEY = "pyrosome.key";
const UNREACHABLE = "The server could not be reached. See that it runs, then try again.";
const BROKEN = "The connection broke off before the answer was complete. What came is kept.";

/** What went wrong: `status` 0 is that no answer came; `retryAfter` are seconds, or null. */
export class Problem extends Error {
  constructor(text, status = 0, retryAfter = null) {
    super(text);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The user's key; it is kept for this tab alone, and gone when that is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Asks the user for a key: (why) => whether one was given.  The page sets it. */
export const asking = { forKey: async () => false };

/** The models, as `/v1/models` lists them. */
export async function models() {
  return (await (await send("v1/models")).json()).data;
}

/** How the server is: {status, reason}; the status is "" where no answer came. */
export async function health() {
  try {
    return await (await fetch("health", { cache: "no-store" })).json();
  } catch {
    return { status: "" };
  }
}

/** How many tokens a text has. */
export async function tokensOfText(text, signal) {
  return (await (await send("tokenize", { text }, signal, { isQuiet: true })).json()).count;
}

/** How many tokens the prompt of a chat request has. */
export async function tokensOfPrompt(body, signal) {
  return (await (await send("tokenize", body, signal, { isQuiet: true })).json()).count;
}

/**
 * An answer as it comes: `{begun}`, `{progress}`, `{reasoning}`, `{content}`, `{call}`, and `{finish, usage, told}`.
 * Raises a Problem where it is refused, fails or breaks off; and what `signal` raises.
 */
export async function* answer(body, signal) {
  const response = await send("v1/chat/completions", { ...body, stream: true }, signal);
  yield { begun: { mode: response.headers.get("x-pyrosome-mode"), seed: response.headers.get("x-pyrosome-seed") } };
  let isWhole = false;
  for await (const event of events(response.body, signal)) {
    if (event.comment) {
      const found = event.comment.match(/(\d+) of (\d+) prompt tokens/);
      if (found) yield { progress: { computed: Number(found[1]), prompt: Number(found[2]) } };
    } else if (event.data === "[DONE]") {
      isWhole = true; // and the body is read to its end, so that the connection can be used again
    } else {
      yield* partsOf(JSON.parse(event.data));
    }
  }
  if (!isWhole) throw new Problem(BROKEN);
}

function* partsOf(chunk) {
  if (chunk.error) throw new Problem(chunk.error.message ?? "It did not say why.", 500);
  for (const { delta, finish_reason: finish } of chunk.choices ?? []) {
    if (delta?.reasoning_content) yield { reasoning: delta.reasoning_content };
    if (delta?.content) yield { content: delta.content };
    for (const call of delta?.tool_calls ?? []) yield { call };
    if (finish) yield { finish };
  }
  if (chunk.usage) yield { usage: chunk.usage };
  if (chunk.pyrosome) yield { told: chunk.pyrosome };
}

async function send(path, body, signal, { isQuiet = false } = {}) {
  for (;;) {
    const response = await fetched(path, body, signal);
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (response.status !== 401 || isQuiet || !(await asking.forKey(key.get() ? problem.message : ""))) throw problem;
  }
}

async function fetched(path, body, signal) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const asked = { headers, signal, cache: "no-store", credentials: "omit", redirect: "error" };
  if (body) {
    Object.assign(asked, { method: "POST", body: JSON.stringify(body) });
    headers["Content-Type"] = "application/json";
  }
  try {
    return await fetch(path, asked);
  } catch (error) {
    throw signal?.aborted ? error : new Problem(UNREACHABLE);
  }
}

async function problemOf(response) {
  let text = `It answered with status ${response.status} and no reason.`;
  try {
    const { error } = await response.json();
    text = (typeof error === "string" ? error : error.message) || text;
  } catch {
    // Something in between, which speaks another language: the status is all there is to tell.
  }
  const wait = Number(response.headers.get("retry-after"));
  return new Problem(text, response.status, Number.isFinite(wait) && wait > 0 ? wait : null);
}

async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) yield* readBlock(block);
    }
  } catch (error) {
    throw signal?.aborted || error instanceof Problem ? error : new Problem(BROKEN);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function* readBlock(block) {
  const lines = block.split("\n");
  const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
  for (const line of lines) if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
  if (data.length) yield { data: data.join("\n") };
}
