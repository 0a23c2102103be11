"use strict";
// The journey of `journey.py` with OpenAI's client for Node; the same steps, the same words.

const assert = require("node:assert/strict");
const OpenAI = require("openai");

const PATIENCE_MS = 120_000;
const TERMINAL = ["succeeded", "failed", "cancelled"];
// What the client's types call required.
const REQUIRED = {
  "fine_tuning.job": [
    "id", "created_at", "error", "fine_tuned_model", "finished_at", "hyperparameters", "model", "organization_id",
    "result_files", "seed", "status", "trained_tokens", "training_file", "validation_file",
  ],
  "fine_tuning.job.event": ["id", "created_at", "level", "message"],
  "fine_tuning.job.checkpoint": [
    "id", "created_at", "fine_tuned_model_checkpoint", "fine_tuning_job_id", "metrics", "step_number",
  ],
  file: ["id", "bytes", "created_at", "filename", "purpose", "status"],
  upload: ["id", "bytes", "created_at", "expires_at", "filename", "purpose", "status"],
  "upload.part": ["id", "created_at", "upload_id"],
  model: ["id", "created", "owned_by"],
  "chat.completion": ["id", "choices", "created", "model"],
  "chat.completion.chunk": ["id", "choices", "created", "model"],
};

function whole(thing) {
  for (const name of thing.deleted ? ["id", "object"] : REQUIRED[thing.object]) {
    assert.notEqual(thing[name], undefined, `${name} is missing from ${JSON.stringify(thing)}`);
  }
  return thing;
}

async function all(page) {
  const items = [];
  for await (const item of page) items.push(whole(item));
  return items;
}

async function until(ask, happened) {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    const answer = whole(await ask());
    if (happened(answer)) return answer;
    assert(Date.now() < deadline, `not within ${PATIENCE_MS} ms: ${JSON.stringify(answer)}`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

async function refused(kind, ask) {
  const error = await ask().then(() => assert.fail(`${kind.name} was not thrown`), (e) => e);
  assert(error instanceof kind, `${error}`);
  assert(error.requestID && error.code && error.error.message.length > 20);
  return error;
}

async function begin(client, order, data, steps, more) {
  const hyperparameters = { batch_size: 4, n_epochs: "auto", learning_rate_multiplier: 1 };
  return whole(
    await client.fineTuning.jobs.create({
      model: order.model,
      training_file: data,
      seed: 3,
      method: { type: "supervised", supervised: { hyperparameters } },
      sat: {
        mode: "on",
        train: { max_steps: steps, max_seq_len: 32 },
        eval: { every: 0, forgetting_sequences: 0 },
        checkpoints: { every: 0 },
      },
      ...more,
    }),
  );
}

async function upload(client, rows) {
  const file = whole(
    await client.files.create({ file: await OpenAI.toFile(rows, "train.jsonl"), purpose: "fine-tune" }),
  );
  assert.equal(whole(await client.files.waitForProcessing(file.id)).status, "processed");
  assert.equal(await (await client.files.content(file.id)).text(), rows.toString());
  const listed = await all(client.files.list({ purpose: "fine-tune", limit: 1 }));
  assert(listed.some((item) => item.id === file.id));

  const announce = { mime_type: "text/jsonl", purpose: "fine-tune" };
  const announced = whole(
    await client.uploads.create({ ...announce, bytes: rows.length, filename: "parts.jsonl" }),
  );
  const middle = rows.indexOf("\n", rows.length / 2);
  const parts = [];
  for (const data of [rows.subarray(0, middle), rows.subarray(middle)]) {
    const part = await client.uploads.parts.create(announced.id, {
      data: await OpenAI.toFile(data, "part"),
    });
    parts.push(whole(part).id);
  }
  const done = whole(await client.uploads.complete(announced.id, { part_ids: parts }));
  assert.deepEqual([done.status, done.file.bytes], ["completed", rows.length]);
  const other = await client.uploads.create({ ...announce, bytes: 1, filename: "none.jsonl" });
  assert.equal(whole(await client.uploads.cancel(other.id)).status, "cancelled");
  return [file.id, done.file.id];
}

async function errors(client, order, rows, file) {
  const broken = Buffer.concat([rows, Buffer.from("{broken\n")]);
  const bad = await refused(OpenAI.BadRequestError, async () =>
    client.files.create({ file: await OpenAI.toFile(broken, "bad.jsonl"), purpose: "fine-tune" }),
  );
  assert.deepEqual([bad.code, bad.param], ["dataset_invalid", "file"]);
  assert.equal(bad.error.problems[0].line, order.rows.length + 1);
  const typo = await refused(OpenAI.BadRequestError, () =>
    client.fineTuning.jobs.create({ model: order.model, training_file: file, sat: { omision_rate: {} } }),
  );
  assert.equal(typo.code, "unknown_parameter");
  assert(typo.error.message.includes("omission_rate"));
  const none = await refused(OpenAI.NotFoundError, () => client.fineTuning.jobs.retrieve("ftjob-none"));
  assert.equal(none.code, "job_not_found");
  const stranger = client.withOptions({ apiKey: "wrong" });
  const key = await refused(OpenAI.AuthenticationError, async () => stranger.models.list());
  assert.equal(key.code, "invalid_api_key");
  const used = await refused(OpenAI.ConflictError, () => client.files.delete(file));
  assert.equal(used.code, "file_in_use");
}

async function chat(client, model) {
  const asked = { model, messages: [{ role: "user", content: "a b c" }], max_tokens: 8, temperature: 0 };
  const answer = whole(await client.chat.completions.create(asked));
  assert(["stop", "length"].includes(answer.choices[0].finish_reason));
  assert(answer.usage.completion_tokens >= 1);
  const stream = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  const chunks = await all(stream);
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, answer.choices[0].message.content ?? "");
  assert.equal(chunks.at(-1).usage.completion_tokens, answer.usage.completion_tokens);
}

async function* journey(client, order) {
  const jobs = client.fineTuning.jobs;
  const when = (job, happened) => until(() => jobs.retrieve(job.id), happened);
  const stepped = (job) => job.progress?.step ?? 0;

  const rows = Buffer.from(order.rows.map((row) => JSON.stringify(row) + "\n").join(""));
  const [file, parts] = await upload(client, rows);
  yield "upload";

  const metadata = { client: order.name };
  const long = await begin(client, order, file, 100_000, { suffix: "long", metadata });
  const short = await begin(client, order, parts, 3, { validation_file: file });
  assert.deepEqual([long.object, long.user_provided_suffix], ["fine_tuning.job", "long"]);
  assert.equal(long.hyperparameters.batch_size, 4);
  await errors(client, order, rows, file);
  yield "create, and what is refused";

  const listed = await all(jobs.list({ metadata, limit: 1 }));
  assert.deepEqual(listed.map((job) => job.id), [long.id]);
  const every = (await all(jobs.list({ limit: 1 }))).map((job) => job.id);
  assert(every.includes(long.id) && every.includes(short.id));
  await when(long, (job) => job.status === "running" && stepped(job) > 0);
  const events = await all(jobs.listEvents(long.id, { limit: 2 }));
  assert(events.length > 2 && new Set(events.map((event) => event.id)).size === events.length);
  yield "list, events";

  assert.equal(whole(await jobs.pause(long.id)).id, long.id);
  const paused = await when(long, (job) => job.status_detail.state === "by_user");
  assert.equal(paused.status, "paused");
  const [checkpoint] = await all(jobs.checkpoints.list(long.id));
  assert(checkpoint.step_number >= 1);
  yield "pause, checkpoints";

  const ended = await when(short, (job) => TERMINAL.includes(job.status));
  assert.equal(ended.status, "succeeded", JSON.stringify(ended.error));
  assert.notEqual(ended.hyperparameters.n_epochs, "auto");
  const table = await (await client.files.content(ended.result_files[0])).text();
  assert(table.startsWith("step,train_loss"));
  const model = ended.fine_tuned_model;
  assert.equal(whole(await client.models.retrieve(model)).id, model);
  const models = (await all(client.models.list())).map((item) => item.id);
  assert(models.includes(order.model) && models.includes(model));
  yield "result, models";

  await chat(client, model);
  await chat(client, checkpoint.fine_tuned_model_checkpoint);
  yield "chat";

  assert.equal(whole(await jobs.resume(long.id)).id, long.id);
  await when(long, (job) => job.status === "running" && stepped(job) > checkpoint.step_number);
  yield "resume";

  await jobs.cancel(long.id);
  const gone = await when(long, (job) => TERMINAL.includes(job.status));
  assert.deepEqual([gone.status, gone.error], ["cancelled", null]);
  const over = await refused(OpenAI.ConflictError, () => jobs.resume(long.id));
  assert.equal(over.code, "job_terminal");
  yield "cancel";

  assert(whole(await client.models.delete(model)).deleted);
  await refused(OpenAI.NotFoundError, () => client.models.retrieve(model));
  for (const name of [file, parts]) assert(whole(await client.files.delete(name)).deleted);
  yield "delete";
}

async function* oneJob(client, order) {
  const asked = { model: order.model, training_file: order.file };
  const { data, response } = await client.fineTuning.jobs.create(asked).withResponse();
  yield JSON.stringify({ id: whole(data).id, headers: Object.fromEntries(response.headers) });
}

async function main(order) {
  const client = new OpenAI({ baseURL: order.base_url, apiKey: order.api_key });
  for await (const done of { journey, one_job: oneJob }[order.do](client, order)) console.log(done);
}

main(JSON.parse(process.argv[2])).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
