// The official client for Node: a stream, a tool call and a typed error.  Arguments: a server with the built-in model, one that plays a part.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, agent] = process.argv.slice(2);
const at = (server) => new OpenAI({ baseURL: `${server}/v1`, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const client = at(url);
const asked = {
  model: "builtin:nano",
  messages: [{ role: "user", content: "? falcon" }],
  max_tokens: 256,
  temperature: 0,
};

const whole = await client.chat.completions.create(asked);
let said = "";
let thought = "";
let usage = null;
const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  said += chunk.choices[0]?.delta.content ?? "";
  thought += chunk.choices[0]?.delta.reasoning_content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(said, whole.choices[0].message.content);
assert.equal(thought, whole.choices[0].message.reasoning_content);
assert.ok(said && thought && usage.completion_tokens > 0);

const parameters = { type: "object", properties: { place: { type: "string" } }, required: ["place"] };
const runner = at(agent).chat.completions.runTools({
  model: "m",
  messages: [{ role: "user", content: "the weather in Oslo and Lima" }],
  stream: true,
  tools: [
    {
      type: "function",
      function: {
        name: "weather",
        parameters,
        parse: JSON.parse,
        function: ({ place }) => `the word is ${place === "Oslo" ? "snow" : "fog"}`,
      },
    },
  ],
});
assert.equal(await runner.finalContent(), "It says snow and fog.");

await assert.rejects(client.chat.completions.create({ ...asked, temperature: 9 }), OpenAI.BadRequestError);
console.log("done");
