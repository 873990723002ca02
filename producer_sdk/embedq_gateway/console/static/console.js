// The console: asks this gateway alone, and writes what it is told as text, never as markup.

const POLL_MS = 1000;
const POLL_AFTER_ERROR_MS = 5000;
const MOST_IN_MATRIX = 60;
const HOT = 0.61; // from here on a cell's text takes its other color; both have a contrast of 4.5 or more then
const STEPS = ["validate", "load", "warm_up", "check", "drain", "swap"];
const KEY = "embedq-key";

const $ = (id) => document.getElementById(id);

function make(tag, { text, className, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// -- the gateway ------------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function ask(path, body) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const answer = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
  });
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  const { code = "", message = answer.statusText } = found.error ?? {};
  throw new Refused(answer.status, code, message);
}

function why(error) {
  if (!(error instanceof Refused)) return "The gateway does not answer.";
  if (error.status === 401) return "An API key is needed: enter one above.";
  return error.message;
}

// -- replicas ---------------------------------------------------------------------------------------------------------

function badge(kind, text) {
  return make("span", { className: `badge ${kind}`, text });
}

function reloadCell(replica) {
  const cell = make("td");
  if (replica.version === null) {
    cell.append(STEPS.includes(replica.step) ? steps(replica) : "none yet");
    return cell;
  }
  const kinds = { READY: ["good", "done"], FAILED: ["bad", "refused"], LOADING: ["wait", stepName(replica.step)] };
  const [kind, words] = kinds[replica.outcome] ?? ["wait", replica.outcome ?? replica.step];
  cell.append(badge(kind, words), ` command ${replica.version}`);
  if (replica.outcome === "LOADING") cell.append(steps(replica));
  if (replica.error) cell.append(make("div", { className: "note bad", text: replica.error }));
  return cell;
}

function stepName(step) {
  return step.replace("_", " ");
}

function steps(replica) {
  const at = STEPS.indexOf(replica.step);
  const list = make("ol", { className: "steps", "aria-label": `step ${at + 1} of ${STEPS.length}: ${stepName(replica.step)}` });
  STEPS.forEach((step, index) => {
    list.append(make("li", { className: index < at ? "past" : index === at ? "now" : "", title: stepName(step) }));
  });
  return list;
}

function showReplicas(status) {
  const rows = status.replicas.map((replica) => {
    const serves = replica.state === "READY" ? badge("good", "yes") : badge("wait", stepName(replica.step));
    const version = replica.model_version;
    return make(
      "tr",
      {},
      make("th", { scope: "row", text: replica.replica }),
      make("td", { text: replica.pool ? `${replica.alias} (pool ${replica.pool})` : replica.alias }),
      make("td", {}, serves),
      make("td", {}, version ? make("code", { text: shortVersion(version), title: version }) : "none"),
      reloadCell(replica),
    );
  });
  $("replicas").tBodies[0].replaceChildren(...rows);
  $("replicas-note").textContent = status.fresh
    ? rows.length === 0 ? "No replica is alive. Jobs wait in Kafka until one starts." : ""
    : "Kafka does not answer: this is what was known last.";
}

function shortVersion(version) {
  const digest = version.replace(/^sha256:/, "");
  return digest.length > 16 ? `${digest.slice(0, 12)}…` : digest;
}

function summary(status) {
  // A replica has a status for each of its aliases, and serves if it serves all of them.
  const names = new Set(status.replicas.map((replica) => replica.replica));
  const waits = new Set(status.replicas.filter((replica) => replica.state !== "READY").map((replica) => replica.replica));
  const reloading = status.replicas.filter((replica) => replica.outcome === "LOADING").length;
  const byAlias = new Map();
  for (const { alias, model_version: version } of status.replicas) {
    if (version) byAlias.set(alias, (byAlias.get(alias) ?? new Set()).add(version));
  }
  const versions = Math.max(0, ...[...byAlias.values()].map((found) => found.size));
  const parts = [`${names.size - waits.size} of ${names.size} replicas serve`];
  if (reloading) parts.push(`${reloading} reloading`);
  if (versions > 1) parts.push(`${versions} model versions`);
  if (status.keys?.fault) parts.push("the key file is broken");
  return parts.join(" · ");
}

function say(element, text, bad = false) {
  if (element.textContent !== text) element.textContent = text; // a screen reader repeats what is written again
  element.classList.toggle("bad", bad);
}

// -- the last minutes -------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, TOP, BOTTOM] = [460, 150, 46, 10, 22];

function svg(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function short(number) {
  return Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(number);
}

function plot(target, now, points, curves, unit) {
  if (points.length < 2) {
    target.replaceChildren(make("p", { className: "note", text: "Nothing to draw yet: a point comes every 5 seconds." }));
    return;
  }
  const from = Math.min(points[0].at, now - 60);
  const values = curves.flatMap((curve) => points.map(curve.value)).filter((value) => value !== null);
  const most = Math.max(1, ...values);
  const x = (at) => LEFT + ((at - from) / (now - from)) * (WIDTH - LEFT - 4);
  const y = (value) => TOP + (1 - value / most) * (HEIGHT - TOP - BOTTOM);
  const drawn = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "xMinYMid", role: "img" });
  const told = curves.map((curve) => {
    const seen = points.map(curve.value).filter((value) => value !== null);
    return `${curve.name} now ${short(seen.at(-1) ?? 0)}, at most ${short(Math.max(0, ...seen))}`;
  });
  drawn.setAttribute("aria-label", `${unit}: ${told.join("; ")}; in the last ${duration(now - from)}`);
  for (const value of [0, most]) {
    drawn.append(svg("line", { class: "axis", x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }));
    drawn.append(svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  drawn.append(svg("text", { x: LEFT, y: HEIGHT - 4 }, `${duration(now - from)} ago`));
  drawn.append(svg("text", { x: WIDTH - 4, y: HEIGHT - 4, "text-anchor": "end" }, "now"));
  for (const curve of curves) {
    drawn.append(svg("path", { class: `curve ${curve.className}`, d: path(points, curve.value, x, y) }));
  }
  target.replaceChildren(drawn);
}

function path(points, value, x, y) {
  let pen = "M";
  return points
    .map((point) => {
      const found = value(point);
      if (found === null) {
        pen = "M"; // a gap where nothing is known
        return "";
      }
      const drawn = `${pen}${x(point.at).toFixed(1)} ${y(found).toFixed(1)}`;
      pen = "L";
      return drawn;
    })
    .join("");
}

function duration(seconds) {
  return seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

function showMinutes(status) {
  const lane = (name) => (point) => (point.lag === null ? null : point.lag[name]);
  plot($("lag-plot"), status.at, status.history, [
    { name: "interactive", className: "first", value: lane("interactive") },
    { name: "bulk", className: "second", value: lane("bulk") },
  ], "Jobs waiting");
  plot($("tokens-plot"), status.at, status.history, [
    { name: "tokens a second", className: "first", value: (point) => point.tokens_per_s },
  ], "Throughput");
}

// -- polling ----------------------------------------------------------------------------------------------------------

let timer = 0;
let polls = 0;

async function poll() {
  clearTimeout(timer);
  const mine = ++polls;
  let next = POLL_MS;
  try {
    const status = await ask("admin/status");
    if (mine !== polls) return;
    showReplicas(status);
    showMinutes(status);
    showModels(status.models.map((model) => model.alias));
    say($("summary"), summary(status), Boolean(status.keys?.fault));
  } catch (error) {
    if (mine !== polls) return;
    next = POLL_AFTER_ERROR_MS;
    const refused = error instanceof Refused && (error.status === 401 || error.status === 403);
    say($("summary"), why(error), !refused);
    if (refused) {
      say($("replicas-note"), "Replicas and plots need a key with the scope admin.");
      next = 0; // until another key is entered
      if (error.status === 403) await fillModels();
    }
  }
  if (next && !document.hidden) timer = setTimeout(poll, next);
}

async function fillModels() {
  try {
    showModels((await ask("v1/models")).data.map((model) => model.id));
  } catch (error) {
    say($("summary"), why(error), true);
  }
}

function showModels(aliases) {
  const select = $("model");
  const known = [...select.options].slice(1).map((option) => option.value);
  if (known.join("\n") === aliases.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(select.options[0], ...aliases.map((alias) => make("option", { text: alias, value: alias })));
  select.value = aliases.includes(chosen) ? chosen : "";
}

// -- the box to try ---------------------------------------------------------------------------------------------------

function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

function cosine(a, b) {
  let [dot, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i += 1) {
    dot += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return dot / Math.sqrt(aa * bb);
}

async function embed(input, inputType) {
  const body = { input, encoding_format: "base64" };
  if ($("model").value) body.model = $("model").value;
  if ($("prompts").checked) body.input_type = inputType;
  const answer = await ask("v1/embeddings", body);
  return { ...answer, vectors: answer.data.map((datum) => floats(datum.embedding)) };
}

async function compare(event) {
  event?.preventDefault();
  const texts = $("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const query = $("query").value.trim();
  const button = document.querySelector("#try-form button");
  if (texts.length === 0) {
    say($("try-status"), "Enter a text first.", true);
    $("texts").focus();
    return;
  }
  button.disabled = true;
  say($("try-status"), "Computing…");
  const began = performance.now();
  try {
    const [documents, asked] = await Promise.all([embed(texts, "document"), query ? embed([query], "query") : null]);
    const milliseconds = Math.round(performance.now() - began);
    const mixed = asked && asked.model_version !== documents.model_version;
    showNeighbors(query, texts, documents.vectors, asked?.vectors[0]);
    showMatrix(query, texts, documents.vectors, asked?.vectors[0]);
    $("results").hidden = false;
    const version = documents.model_version ? `, model version ${shortVersion(documents.model_version)}` : "";
    say(
      $("try-status"),
      mixed
        ? "The model was reloaded in between: the query's similarities mean nothing. Compare again."
        : `${texts.length} texts of ${documents.vectors[0].length} dimensions in ${milliseconds} ms${version}`,
      Boolean(mixed),
    );
  } catch (error) {
    say($("try-status"), why(error), true);
  } finally {
    button.disabled = false;
  }
}

function showNeighbors(query, texts, vectors, asked) {
  const list = $("neighbors");
  list.hidden = $("neighbors-title").hidden = !asked;
  if (!asked) return;
  const ranked = texts
    .map((text, index) => ({ text, score: cosine(vectors[index], asked) }))
    .sort((a, b) => b.score - a.score);
  list.replaceChildren(
    ...ranked.slice(0, 10).map(({ text, score }) => {
      const share = make("span");
      share.style.setProperty("--share", `${Math.max(0, score) * 100}%`);
      return make(
        "li",
        {},
        make(
          "div",
          { className: "row" },
          make("span", { text: cut(text, 160) }),
          make("span", { className: "bar", "aria-hidden": "true" }, share),
          make("span", { className: "number", text: score.toFixed(3) }),
        ),
      );
    }),
  );
}

function showMatrix(query, texts, vectors, asked) {
  const shown = texts.slice(0, MOST_IN_MATRIX).map((text, index) => ({ name: String(index + 1), text, vector: vectors[index] }));
  if (asked) shown.unshift({ name: "Q", text: query, vector: asked });
  const scores = shown.map((a) => shown.map((b) => cosine(a.vector, b.vector)));
  const others = scores.flatMap((row, i) => row.filter((_, j) => i !== j));
  const low = Math.min(0.99, ...others);
  const head = make("tr", {}, make("td", { className: "corner" }));
  for (const each of shown) head.append(make("th", { scope: "col", title: each.text, text: each.name }));
  const rows = shown.map((each, i) => {
    const row = make("tr", {}, make("th", { scope: "row" }, make("b", { text: each.name }), ` ${cut(each.text, 60)}`));
    scores[i].forEach((score, j) => {
      const heat = Math.min(1, Math.max(0, (score - low) / (1 - low)));
      const cell = make("td", { text: score.toFixed(2), className: heat > HOT ? "hot" : "", title: `${each.name} and ${shown[j].name}` });
      cell.style.setProperty("--heat", `${(heat * 100).toFixed(1)}%`);
      row.append(cell);
    });
    return row;
  });
  $("matrix").replaceChildren(
    make("thead", {}, head),
    make("tbody", {}, ...rows),
  );
  const left = texts.length - MOST_IN_MATRIX;
  $("matrix-range").textContent =
    `Colors run from ${low.toFixed(2)} to 1.00.` + (left > 0 ? ` The last ${left} texts are left out.` : "");
}

function cut(text, most) {
  return text.length > most ? `${text.slice(0, most)}…` : text;
}

// -- beginning --------------------------------------------------------------------------------------------------------

$("key").value = sessionStorage.getItem(KEY) ?? "";
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  say($("replicas-note"), "");
  poll();
});
$("try-form").addEventListener("submit", compare);
$("try-form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) compare(event);
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
poll();
