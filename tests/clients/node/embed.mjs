// Embeds its arguments after the first two (the gateway's base URL and the folder of the package) with OpenAI's client as it is.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [baseURL, folder, ...texts] = process.argv.slice(2);
const found = createRequire(`${folder}/`).resolve("openai");
const { default: OpenAI } = await import(pathToFileURL(found).href);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const answer = await client.embeddings.create({ model: "default", input: texts });
const floats = await client.embeddings.create({ model: "default", input: texts, encoding_format: "float" });
const models = [];
for await (const model of client.models.list()) models.push(model.id);
let refused = null;
try {
  await client.embeddings.create({ model: "another", input: "x" });
} catch (error) {
  refused = { kind: error.constructor.name, status: error.status, code: error.code };
}
console.log(
  JSON.stringify({
    vectors: answer.data.map((each) => Array.from(each.embedding)),
    floats: floats.data.map((each) => each.embedding),
    tokens: answer.usage.total_tokens,
    models,
    refused,
  }),
);
