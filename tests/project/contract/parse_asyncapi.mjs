// Parses AsyncAPI documents with the AsyncAPI project's own parser; the folder that holds its node_modules is named
// first. References to files beside a document are followed. Prints what the parser found as a JSON list, one for each.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [modules, ...paths] = process.argv.slice(2);
const { Parser } = createRequire(resolve(modules, "package.json"))("@asyncapi/parser");

const found = [];
for (const path of paths) {
  const { document, diagnostics } = await new Parser().parse(await readFile(path, "utf8"), { source: path });
  const of = (wanted) =>
    diagnostics
      .filter(({ severity }) => severity === wanted)
      .map(({ path, message }) => `${path.join("/")}: ${message}`);
  found.push({
    understood: document !== undefined,
    errors: of(0),
    warnings: of(1),
    version: document?.version(),
    topics: document?.channels().all().map((channel) => channel.address()) ?? [],
    operations: document?.operations().all().map((operation) => operation.id()) ?? [],
  });
}
console.log(JSON.stringify(found, null, 2));
