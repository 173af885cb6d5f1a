"use strict";

const EVERY = 2000; // milliseconds between two snapshots
const WINDOW = 60; // seconds that rates and quantiles are about
const KEY = "funnel-key"; // in the tab's memory, which ends with the tab
const PARTS = { total: "whole request", tokenization: "tokenising", queue: "in the queue", inference: "running" };

const snapshots = []; // of the last minute, the oldest first
const at = (id) => document.getElementById(id);

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const reply = await fetch(path, { ...options, headers, cache: "no-store" });
  if (reply.status === 401) at("key-form").hidden = false;
  const content = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(content.error), { status: reply.status });
  return content;
}

// What is shown once.

function pairs(list, facts) {
  list.replaceChildren(...Object.entries(facts).flatMap(([name, fact]) => [element("dt", name), element("dd", fact)]));
}

function element(name, text = "", ...children) {
  const made = document.createElement(name);
  made.append(text, ...children);
  return made;
}

// What changes.

function show({ status, model, numbers }) {
  at("state").className = `state ${status.status}`;
  at("state").textContent =
    status.status === "compiling" ? `compiling: ${status.compiled} of ${status.programs} programs` : status.status;
  at("progress").hidden = !["loading", "compiling"].includes(status.status);
  if (status.status === "compiling" && status.programs) {
    at("progress").max = status.programs;
    at("progress").value = status.compiled;
  }
  at("shown").hidden = !model;
  if (!model) return;
  at("name").textContent = document.title = model.name;
  at("funnel").textContent = model.funnel === "none" ? "without a funnel" : `with the funnel ${model.funnel}`;
  for (const list of ["facts", "backends", "limits"]) pairs(at(list), model[list]);
  at("cosines").dataset.why = model.no_comparison;
  remember(numbers);
}

function remember(numbers) {
  if (snapshots.length && numbers.seconds < snapshots.at(-1).seconds) snapshots.length = 0; // another process
  snapshots.push(numbers);
  while (snapshots.length > 2 && numbers.seconds - snapshots[1].seconds >= WINDOW) snapshots.shift();
  const before = snapshots[0];
  const seconds = numbers.seconds - before.seconds;
  const grown = (name) => numbers[name] - before[name];
  const rate = (name) => (seconds ? amount(grown(name) / seconds) : "–");
  const computed = grown("tokens") + grown("padding_rows");
  const lost = grown("failures");
  const tiles = [
    ["tokens per second", rate("tokens")],
    ["requests per second", rate("requests")],
    ["rows in the queue", amount(numbers.waiting_rows)],
    ["requests in the queue", amount(numbers.waiting_requests)],
    ["sequences in a batch", grown("batches") ? amount(grown("sequences") / grown("batches")) : "–"],
    ["padding", computed ? `${amount((100 * grown("padding_rows")) / computed)} %` : "–"],
    ["refused, last minute", amount(lost), lost > 0],
    ["compiled after warm-up", amount(numbers.compilations_after_warmup), numbers.compilations_after_warmup > 0],
  ];
  at("tiles").replaceChildren(
    ...tiles.map(([name, value, isBad]) => {
      const shown = element("dd", value);
      shown.classList.toggle("bad", Boolean(isBad));
      return element("div", "", element("dt", name), shown);
    }),
  );
  draw();
  quantiles(before, numbers);
}

function draw() {
  const end = snapshots.at(-1).seconds;
  const points = snapshots.slice(1).map((each, index) => {
    const before = snapshots[index];
    return [600 - (10 * 60 * (end - each.seconds)) / WINDOW, (each.tokens - before.tokens) / (each.seconds - before.seconds)];
  });
  const most = Math.max(0, ...points.map(([, value]) => value));
  at("peak").textContent = most ? `at most ${amount(most)}` : "";
  const path = points.map(([x, value]) => `${x.toFixed(1)},${(57 - (54 * value) / (most || 1)).toFixed(1)}`).join("L");
  at("line").setAttribute("d", points.length ? `M${path}` : "");
  at("area").setAttribute("d", points.length ? `M${points[0][0].toFixed(1)},60L${path}L600,60Z` : "");
}

function quantiles(before, numbers) {
  const recent = (part) => numbers.latency[part].map((count, index) => count - before.latency[part][index]);
  const isIdle = recent("total").at(-1) === 0; // then those since the start say more than nothing
  const rows = Object.entries(PARTS).map(([part, name]) => {
    const counts = isIdle ? numbers.latency[part] : recent(part);
    const heading = element("th", name);
    heading.scope = "row";
    const cells = [0.5, 0.9, 0.99].map((share) => element("td", duration(quantile(share, counts, numbers.bounds))));
    return element("tr", "", heading, ...cells);
  });
  at("latency").replaceChildren(...rows);
  const count = amount(isIdle ? numbers.latency.total.at(-1) : recent("total").at(-1));
  at("latency-of").textContent = `${count} requests ${isIdle ? "since the start" : "in the last minute"}`;
}

// The value below which this share of the observations lies. `counts` has, for each bound and for infinity, how many are
// not above it.
function quantile(share, counts, bounds) {
  const wanted = share * counts.at(-1);
  if (!wanted) return null;
  const index = counts.findIndex((count) => count >= wanted);
  if (index === bounds.length) return Infinity;
  const [low, before] = index ? [bounds[index - 1], counts[index - 1]] : [0, 0];
  return low + ((bounds[index] - low) * (wanted - before)) / (counts[index] - before);
}

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds === Infinity) return "> 10 s";
  return seconds < 1 ? `${amount(1000 * seconds)} ms` : `${amount(seconds)} s`;
}

function amount(value) {
  return value.toLocaleString("en", value < 100 ? { maximumSignificantDigits: 3 } : { maximumFractionDigits: 0 });
}

// The texts.

async function compare() {
  const body = JSON.stringify({
    inputs: { source_sentence: at("first").value, sentences: [at("second").value] },
    parameters: { truncate: true },
  });
  const list = at("cosines");
  const why = list.dataset.why;
  list.replaceChildren();
  await cosine(list, "with this server's funnel", "similarity", body);
  if (why) list.append(element("p", why));
  else await cosine(list, "without a funnel", "page/similarity", body);
}

async function cosine(list, name, path, body) {
  const value = element("span", "running; the first time it is compiled");
  const bar = document.createElement("div");
  bar.style.width = 0;
  list.append(element("dt", name, value), element("dd", "", bar));
  try {
    const [found] = await ask(path, { method: "POST", body });
    value.replaceChildren("cosine ", element("b", found.toFixed(4)));
    bar.style.width = `${100 * Math.max(0, found)}%`;
  } catch (error) {
    value.textContent = error.message;
    value.className = "trouble";
  }
}

at("texts").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("compare").disabled = true;
  await compare();
  at("compare").disabled = false;
});

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  at("key-form").hidden = true;
  update();
});

async function update() {
  let trouble = "";
  try {
    show(await ask("page.json"));
  } catch (error) {
    const needsKey = error.status === 401;
    at("state").className = needsKey ? "state" : "state unreachable";
    at("state").textContent = needsKey ? "needs a key" : error.status ? "refused" : "unreachable";
    trouble = needsKey && !sessionStorage.getItem(KEY) ? "" : error.message; // a key was sent, and it is wrong
  }
  at("trouble").textContent = trouble;
  at("trouble").hidden = !trouble;
}

async function poll() {
  const isWaiting = !at("key-form").hidden;
  if (!document.hidden && !isWaiting) await update();
  setTimeout(poll, EVERY);
}

poll();
