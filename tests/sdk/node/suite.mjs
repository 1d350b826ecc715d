// The official Node SDK against a server: BASE_URL, API_KEY. Prints one JSON object, {name: "ok" or what went wrong}.
import assert from "node:assert/strict";
import OpenAI from "openai";

const options = { baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0 };
const client = new OpenAI(options);
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Count: 1, 2, 3," }];
const request = { model, messages, max_tokens: 12, temperature: 0 };

const tests = {
  async chat() {
    const answer = await client.chat.completions.create(request);
    assert.equal(answer.object, "chat.completion");
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 12);
  },
  async stream() {
    const whole = await client.chat.completions.create(request);
    const stream = await client.chat.completions.create({
      ...request,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.total_tokens, whole.usage.total_tokens);
  },
  async streamHelper() {
    const runner = client.chat.completions.stream(request);
    const final = await runner.finalChatCompletion();
    assert.equal(final.choices[0].message.content, await runner.finalContent());
  },
  async abort() {
    const stream = await client.chat.completions.create({ ...request, max_tokens: 2000, stream: true });
    for await (const _ of stream) {
      stream.controller.abort();
      break;
    }
    const started = Date.now();
    await client.chat.completions.create({ ...request, max_tokens: 2 });
    assert.ok(Date.now() - started < 10_000);
  },
  async completion() {
    const answer = await client.completions.create({ model, prompt: ["1 2 3", "a b c"], max_tokens: 4 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
  },
  async logprobs() {
    const answer = await client.chat.completions.create({ ...request, logprobs: true, top_logprobs: 2 });
    assert.equal(answer.choices[0].logprobs.content.length, 12);
  },
  async models() {
    assert.equal((await client.models.retrieve(model)).id, model);
  },
  async rawResponse() {
    const { data, response } = await client.chat.completions.create(request).withResponse();
    assert.equal(response.status, 200);
    assert.ok(response.headers.get("x-request-id"));
    assert.equal(data.choices.length, 1);
  },
  async errors() {
    await assert.rejects(client.chat.completions.create({ ...request, temperature: 3 }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, "temperature");
      return true;
    });
    await assert.rejects(client.chat.completions.create({ ...request, model: "nobody" }), OpenAI.NotFoundError);
    await assert.rejects(new OpenAI({ ...options, apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
  },
  async timeout() {
    const slow = client.chat.completions.create({ ...request, max_tokens: 2000 }, { timeout: 300 });
    await assert.rejects(slow, OpenAI.APIConnectionTimeoutError);
  },
};

const results = {};
for (const [name, test] of Object.entries(tests)) {
  try {
    await test();
    results[name] = "ok";
  } catch (error) {
    results[name] = String(error?.stack ?? error);
  }
}
console.log(JSON.stringify(results));
