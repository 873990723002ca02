// Parses the AsyncAPI document named first with the AsyncAPI project's own parser; the folder that holds its
// node_modules is named second. References to files beside the document are followed. Prints what the parser found as JSON; exits with 1 if there are errors.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [path, modules] = process.argv.slice(2);
const { Parser } = createRequire(resolve(modules, "package.json"))("@asyncapi/parser");

const { document, diagnostics } = await new Parser().parse(await readFile(path, "utf8"), { source: path });
const errors = diagnostics.filter(({ severity }) => severity === 0);
const found = {
  errors: errors.map(({ path, message }) => `${path.join("/")}: ${message}`),
  warnings: diagnostics
    .filter(({ severity }) => severity === 1)
    .map(({ path, message }) => `${path.join("/")}: ${message}`),
  version: document?.version(),
  topics: document?.channels().all().map((channel) => channel.address()) ?? [],
  operations: document?.operations().all().map((operation) => operation.id()) ?? [],
};
console.log(JSON.stringify(found, null, 2));
process.exitCode = errors.length > 0 || document === undefined ? 1 : 0;
