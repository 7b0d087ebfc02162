// Files that are dropped, chosen or pasted: text goes into the message, anything else is refused with its reason.

import { Problem, tokensOfText } from "./api.js";
import { bytes, count } from "./words.js";

export const MOST_BYTES = 16e6;

/** Why a file is not taken. */
export class Refusal extends Error {}

/**
 * A file as a message holds it: {name, bytes, text, tokens}; tokens are null where the server does not count them.
 * @param room tokens there is room for in the model's context; null: not known.
 * Raises Refusal.
 */
export async function readFile(file, room) {
  if (file.size > MOST_BYTES) {
    throw new Refusal(`${file.name} has ${bytes(file.size)}; files of up to ${bytes(MOST_BYTES)} are taken.`);
  }
  let text;
  try {
    text = textOf(new Uint8Array(await file.arrayBuffer()));
  } catch (error) {
    if (error instanceof Refusal) throw new Refusal(`${file.name} ${error.message}`);
    throw new Refusal(`${file.name} could not be read: ${error.message}`); // a folder, or a file that is gone
  }
  const tokens = await countOf(text);
  if (tokens !== null && room !== null && tokens > room) {
    const left = count(Math.max(0, room));
    throw new Refusal(`${file.name} has ${count(tokens)} tokens; there is room for ${left} in this conversation.`);
  }
  return { name: file.name, bytes: file.size, text, tokens };
}

function textOf(data) {
  if (!data.length) throw new Refusal("is empty.");
  const isWide = (data[0] === 0xff && data[1] === 0xfe) || (data[0] === 0xfe && data[1] === 0xff);
  const encoding = !isWide ? "utf-8" : data[0] === 0xff ? "utf-16le" : "utf-16be";
  try {
    const text = new TextDecoder(encoding, { fatal: true }).decode(data);
    if (!text.includes("\0")) return text;
  } catch {
    // Not what it was taken for; said below.
  }
  throw new Refusal("is not text, and this model reads nothing else. Save it as plain text first.");
}

async function countOf(text) {
  try {
    return await tokensOfText(text);
  } catch (error) {
    if (error instanceof Problem) return null;
    throw error;
  }
}
