"use strict";
// Text of the corpus, of tokens and of explanations only ever becomes text nodes (spell, textContent): never markup.

const KINDS = ["Chosen by the published rule, besides", "Strongest", "Sample: strongest third", "Sample: middle third", "Sample: weakest third"];
const OVERSCAN = 8; // rows drawn above and below those in sight
const PIECES_HELD = 32;
// What nobody would see. Joiners in emoji and in scripts that are written with them, and emoji selectors, are text.
const JOINED = ["Extended_Pictographic", "Emoji_Modifier", "M", "Script=Arab", "Script=Syrc", "Script=Mong", "Script=Deva",
  "Script=Beng", "Script=Guru", "Script=Gujr", "Script=Orya", "Script=Taml", "Script=Telu", "Script=Knda", "Script=Mlym",
  "Script=Sinh"].map((property) => `\\p{${property}}`).join("");
const UNSEEN = new RegExp(`(?!(?<=[${JOINED}\\uFE0F])[\\u200C\\u200D](?=[${JOINED}])|(?<=\\p{Emoji})\\uFE0F)`
  + "[\\p{Cc}\\p{Cf}\\p{Cs}\\p{Zl}\\p{Zp}\\p{Default_Ignorable_Code_Point}]", "gu");
const $ = (id) => document.getElementById(id);

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// Appends text with what nobody would see made visible: line breaks, zero-width and direction characters.
function spell(parent, text) {
  let done = 0;
  for (const found of text.matchAll(UNSEEN)) {
    parent.append(text.slice(done, found.index));
    done = found.index + found[0].length;
    const code = found[0].codePointAt(0);
    const name = "U+" + code.toString(16).toUpperCase().padStart(4, "0");
    const mark = make("span", "invisible", { 9: "⇥", 10: "↵", 13: "␍" }[code] ?? name);
    mark.title = name;
    parent.append(mark);
  }
  parent.append(text.slice(done));
  return parent;
}

// A token class: one of blanks alone would leave a hole.
const classOf = (word) => spell(make("bdi"), word.trim() ? word : "␣".repeat(word.length));

function wordsOf(run, latent, most) {
  const place = make("span", "words");
  const words = run.words[latent];
  if (words) for (const word of words.split("\n").slice(0, most)) place.append(classOf(word));
  else place.append(make("span", "none", run.active[latent] ? "no context" : "never active"));
  return place;
}

const short = (value) =>
  value == null ? "–" : value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1)
    : String(Number(value.toPrecision(3)));

// ---------------------------------------------------------------------------------------------- reading

async function unpack(id) {
  if (!$(id) && document.readyState === "loading")
    await new Promise((done) => document.addEventListener("DOMContentLoaded", done, { once: true }));
  const text = $(id).textContent;
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(text);
  else {
    const binary = atob(text);
    bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  }
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(plain).json();
}

const held = new Map(); // pieces by id, the one used last at the end

function piece(id) {
  const found = held.get(id) ?? unpack(id);
  held.delete(id);
  held.set(id, found);
  if (held.size > PIECES_HELD) held.delete(held.keys().next().value);
  return found;
}

const lists = new Map();

async function listOf(number) {
  if (!lists.has(number)) {
    const run = await unpack("list-" + number);
    run.number = number;
    run.density = run.active.map((count) => count / run.readings);
    run.latent = run.active.map((_, latent) => latent);
    run.found = run.words.map((words, latent) => folded("\n" + words + "\n\n" + (run.explained[latent]?.[2] ?? "")));
    lists.set(number, run);
  }
  return lists.get(number);
}

// ---------------------------------------------------------------------------------------------- the list

let shared, run, order = [], at = 0, opened = null, ascending = false, drawn = "", rowHeight = 44;

// Text as it is searched: the same letters may be written whole or as letter and mark.
const folded = (text) => text.normalize().toLowerCase();

function matching(query) {
  const text = folded(query.trim());
  if (!text) return run.latent.slice();
  const whole = text.match(/^["“”'](.+)["“”']$/);
  const part = whole ? "\n" + whole[1] + "\n" : text;
  const number = /^#?\d+$/.test(text) ? Number(text.replace("#", "")) : null;
  return run.latent.filter((latent) => latent === number || run.found[latent].includes(part));
}

function arrange(keep) {
  const key = $("sort").value, values = run[key], sign = ascending ? 1 : -1;
  order = matching($("search").value).sort((a, b) => {
    const x = values[a], y = values[b];
    if (x == null || y == null) return x == null && y == null ? a - b : x == null ? 1 : -1;
    return sign * (x - y) || a - b;
  });
  const number = $("search").value.trim().match(/^#?(\d+)$/);
  if (number) { // the latent of that number first, tokens of those digits behind it
    const place = order.indexOf(Number(number[1]));
    if (place > 0) order.unshift(order.splice(place, 1)[0]);
  }
  const total = run.latent.length.toLocaleString("en");
  $("count").textContent = order.length === run.latent.length ? total + " latents"
    : order.length.toLocaleString("en") + " of " + total;
  for (const head of document.querySelectorAll(".head [data-key]"))
    head.classList.toggle("sorted", head.dataset.key === key);
  $("rows").style.height = order.length * rowHeight + "px";
  at = keep === undefined ? 0 : Math.max(0, order.indexOf(keep));
  drawn = "";
  $("list").scrollTop = keep === undefined ? 0 : Math.max(0, (at - 3) * rowHeight);
  draw();
}

function draw() {
  const list = $("list");
  const first = Math.max(0, Math.floor(list.scrollTop / rowHeight) - OVERSCAN);
  const after = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / rowHeight) + OVERSCAN);
  const now = [run.number, first, after, at, $("sort").value].join();
  if (now === drawn) return;
  drawn = now;
  const rows = [];
  for (let i = first; i < after; i++) rows.push(row(i));
  $("rows").replaceChildren(...rows);
  if (order.length && at >= first && at < after) list.setAttribute("aria-activedescendant", "row-" + at);
  else list.removeAttribute("aria-activedescendant");
}

function row(i) {
  const latent = order[i], key = $("sort").value;
  const element = make("div", "latent", make("span", "id", String(latent)), wordsOf(run, latent, 8));
  for (const [name, text] of [["density", short(run.density[latent])], ["max", short(run.max[latent])],
    ["layer", run.layer[latent] ?? "–"], ["score", run.score[latent] ?? "–"]]) {
    const cell = make("span", name === key ? "sorted" : "", String(text));
    cell.dataset.key = name;
    element.append(cell);
  }
  element.id = "row-" + i;
  element.dataset.latent = latent;
  element.style.top = i * rowHeight + "px";
  element.setAttribute("role", "option");
  element.setAttribute("aria-posinset", i + 1);
  element.setAttribute("aria-setsize", order.length);
  element.setAttribute("aria-selected", i === at);
  return element;
}

function move(to) {
  if (!order.length) return;
  at = Math.min(order.length - 1, Math.max(0, to));
  const list = $("list"), top = at * rowHeight;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + rowHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + rowHeight - list.clientHeight;
  draw();
  if (opened !== null) open(order[at]);
}

// ---------------------------------------------------------------------------------------------- one latent

async function open(latent) {
  const from = run;
  opened = latent;
  history.replaceState(null, "", "#latents/" + from.number + "/" + latent);
  const data = await piece("piece-" + from.number + "-" + Math.floor(latent / shared.piece));
  if (opened !== latent || run !== from) return; // another was asked for meanwhile
  const place = latent % shared.piece;
  const parts = [title(latent), stats(latent), explanation(latent)];
  if (data.promoted) parts.push(make("h3", "", "Logit effect"), effects(data.promoted[place], data.suppressed[place]));
  parts.push(make("h3", "", "Nearest by decoder cosine"), neighbours(data.near[place], data.cosine[place]));
  parts.push(...contexts(latent, data));
  const detail = $("detail");
  detail.replaceChildren(...parts.filter(Boolean));
  detail.classList.add("open");
  detail.scrollTop = 0;
}

function close() {
  opened = null;
  $("detail").classList.remove("open");
  $("detail").replaceChildren(make("p", "empty", "Choose a latent to see what it is active on."));
  history.replaceState(null, "", "#latents");
  $("list").focus({ preventScroll: true });
}

function title(latent) {
  const button = make("button", "", "✕");
  button.type = "button";
  button.setAttribute("aria-label", "Close");
  button.addEventListener("click", close);
  return make("div", "title", make("h3", "", "Latent " + latent), button);
}

function stats(latent) {
  const list = make("dl", "stats");
  const facts = [["density", short(run.density[latent])], ["active", run.active[latent].toLocaleString("en") + "×"],
    ["max", short(run.max[latent])], ["mean", short(run.mean[latent])], ["layer", run.layer[latent] ?? "–"],
    ["published rule", run.kept[latent] ? "keeps it" : "leaves it out"]];
  for (const [name, value] of facts)
    list.append(make("div", "", make("dt", "", name), make("dd", "", String(value))));
  return list;
}

function explanation(latent) {
  const found = run.explained[latent];
  if (!found) return null;
  const [outcome, category, text] = found;
  const score = run.score[latent] == null ? "" : " · score " + run.score[latent];
  return make("div", "explanation", spell(make("bdi"), text),
    spell(make("small"), outcome === "answered" ? (category ?? "") + score : outcome ?? ""));
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toPrecision(3);

function effects(promoted, suppressed) {
  const most = Math.max(...[...promoted, ...suppressed].map(([, value]) => Math.abs(value)), 1e-9);
  const column = (name, heading, tokens) => {
    const list = make("ol");
    for (const [text, value] of tokens) {
      const item = make("li", "", spell(make("bdi"), text), make("span", "", signed(value)));
      item.style.setProperty("--share", Math.abs(value) / most);
      list.append(item);
    }
    return make("div", name, make("h4", "", heading), list);
  };
  return make("div", "effects", column("promoted", "likelier", promoted),
    column("suppressed", "less likely", suppressed));
}

function neighbours(latents, cosines) {
  const list = make("div", "near");
  latents.forEach((latent, i) => {
    const button = make("button", "", make("span", "cosine", cosines[i].toFixed(2)),
      make("span", "id", String(latent)), wordsOf(run, latent, 6));
    button.type = "button";
    button.addEventListener("click", () => go(latent));
    list.append(button);
  });
  return list;
}

function go(latent) {
  if (!order.includes(latent)) $("search").value = "";
  arrange(latent);
  open(latent);
}

function contexts(latent, data) {
  const parts = [], found = data.contexts[latent] ?? [];
  const peak = Math.max(...found.map((context) => context[1] ?? 0), 1e-9);
  [1, 0, 2, 3, 4].forEach((kind) => {
    const heading = KINDS[kind];
    const ofKind = found.filter((context) => context[0] === kind);
    if (ofKind.length) parts.push(make("h3", "", heading), ...ofKind.map((one) => context(one, data.words, peak)));
  });
  if (!parts.length)
    parts.push(make("p", "empty", run.active[latent] ? "No context was kept of it." : "It is active on no token."));
  return parts;
}

function context([, activation, layer, row, position, document_, marked, words, active, values], texts, peak) {
  const text = make("p");
  text.dir = "auto";
  const on = new Map(active.map((token, i) => [token, values[i]]));
  words.forEach((word, i) => {
    if (!on.has(i) && i !== marked) return spell(text, texts[word]);
    const token = spell(make("span", i === marked ? "on at" : "on"), texts[word]);
    token.style.setProperty("--share", Math.min(1, (on.get(i) ?? 0) / peak));
    token.title = short(on.get(i));
    text.append(token);
  });
  const where = make("small", "", layer == null ? "" : "layer " + layer);
  const side = make("div", "activation", short(activation), where);
  side.title = (document_ == null ? "" : "document " + document_ + ", ") + "row " + row + ", position " + position;
  return make("div", "context", side, text);
}

// ---------------------------------------------------------------------------------------------- the rest of the page

function routes(number, { name, routes: by }) {
  const head = make("tr", "", make("th", "", ""), make("th", "", "tokens"));
  for (const layer of by.layers) head.append(make("th", "", String(layer)));
  const body = make("tbody");
  by.classes.forEach((word, i) => {
    const line = make("tr", "", make("th"), make("td", "n", by.counts[i].toLocaleString("en")));
    line.firstChild.scope = "row";
    line.firstChild.append(classOf(word));
    for (const share of by.shares[i]) {
      const cell = make("td", "", share >= 0.095 ? String(Math.round(share * 100)) : "");
      cell.style.setProperty("--share", share);
      cell.title = (share * 100).toFixed(1) + " %";
      line.append(cell);
    }
    body.append(line);
  });
  const table = make("table", "classes", make("thead", "", head), body);
  table.style.setProperty("--series", "var(--series-" + (number % 8) + ")");
  const place = make("div", "wide", table);
  place.tabIndex = 0;
  place.setAttribute("role", "region");
  place.setAttribute("aria-label", "Routing by token");
  const heading = make("h3", "", make("bdi", "", name), ": layers of the most frequent tokens, in % of each");
  return [heading, place];
}

function sortable(table) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" || !head.classList.contains("number")
      && head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (line) => line.children[column].dataset.value;
    const lines = [...table.tBodies[0].rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (up ? 1 : -1) * (head.classList.contains("number") ? x - y : x.localeCompare(y));
    });
    table.tBodies[0].append(...lines);
  }));
}

function remembered(theme) { // a browser may forbid a page from disk to keep anything
  try {
    if (theme) localStorage.setItem("routesae-theme", theme);
    return localStorage.getItem("routesae-theme");
  } catch {
    return null;
  }
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  remembered(root.dataset.theme);
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target, typing = target.matches("input, select, textarea");
  if (event.key === "Escape" && $("list")) {
    if (opened !== null) close();
    else if (typing) $("list").focus();
    return event.preventDefault();
  }
  if (target === $("search") && ["Enter", "ArrowDown"].includes(event.key)) {
    $("list").focus();
    if (event.key === "Enter" && order.length) open(order[at]);
    return event.preventDefault();
  }
  if (typing) return;
  if (event.key === "d") return switchTheme();
  if (!run) return;
  const page = Math.max(1, Math.floor($("list").clientHeight / rowHeight) - 1);
  const onList = target === $("list");
  const steps = { j: 1, k: -1, ...(onList ? { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page,
    Home: -Infinity, End: Infinity } : {}) };
  if (event.key === "/") $("search").select(), $("search").focus();
  else if (event.key in steps) move(at + steps[event.key]);
  else if (event.key === "Enter" && (onList || target === document.body) && order.length) open(order[at]);
  else return;
  event.preventDefault();
}

async function choose(number, latent) {
  if (opened !== null) close();
  run = await listOf(number);
  $("run").value = number;
  arrange(latent);
  if (latent !== undefined) open(latent);
}

async function start() {
  const theme = remembered();
  if (theme) document.documentElement.dataset.theme = theme;
  $("theme").addEventListener("click", switchTheme);
  document.addEventListener("keydown", pressed);
  sortable($("compare"));
  if (!window.DecompressionStream) throw new Error("the latents need a browser of 2023 or later");
  shared = await unpack("shared");
  shared.runs.forEach((one, number) => {
    if (one.routes) $("classes").append(...routes(number, one));
    if (!one.browsable) return;
    const option = make("option", "", one.name);
    option.value = number;
    $("run").append(option);
  });
  if (!$("list")) return;
  rowHeight = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
  listen();
  const asked = location.hash.match(/^#latents\/(\d+)\/(\d+)$/);
  const first = shared.runs.findIndex((one) => one.browsable);
  if (asked && shared.runs[asked[1]]?.browsable && asked[2] < shared.runs[asked[1]].latents) {
    await choose(Number(asked[1]), Number(asked[2]));
    $("latents").scrollIntoView();
  } else await choose(first);
  performance.mark("routesae-list");
}

function listen() {
  let waiting = false;
  $("list").addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }, { passive: true });
  $("list").addEventListener("click", (event) => {
    const found = event.target.closest(".latent");
    if (!found) return;
    at = order.indexOf(Number(found.dataset.latent));
    draw();
    open(order[at]);
  });
  $("search").addEventListener("input", () => arrange());
  $("run").addEventListener("change", () => choose(Number($("run").value)));
  const turn = (up) => {
    ascending = up;
    $("direction").textContent = up ? "↑" : "↓";
    $("direction").setAttribute("aria-label", up ? "Ascending; press for descending" : "Descending; press for ascending");
    arrange(opened ?? undefined);
  };
  $("sort").addEventListener("change", () => turn(["layer", "latent"].includes($("sort").value)));
  $("direction").addEventListener("click", () => turn(!ascending));
  document.querySelector(".head").addEventListener("click", ({ target }) => {
    const { key } = target.dataset;
    if (!key) return;
    const same = $("sort").value === key;
    $("sort").value = key;
    turn(same ? !ascending : key === "layer");
  });
  addEventListener("resize", () => {
    rowHeight = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    if (run) arrange(opened ?? order[at]);
  });
}

start().catch((error) => {
  document.querySelector("#latents .empty, #latents").append(make("p", "empty", "This page could not be read: " + error.message));
  throw error;
});
