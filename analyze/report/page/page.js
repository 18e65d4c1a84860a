"use strict";
// Text of the corpus, of tokens and of explanations only ever becomes text nodes (spell, textContent): never markup.

// In the order of the page: kinds of contexts.file.KINDS, and what they are called.
const KINDS = [[1, "Strongest"], [0, "Chosen by the published rule, besides"], [2, "Sample: strongest third"],
  [3, "Sample: middle third"], [4, "Sample: weakest third"]];
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
  const layerOf = ({ run, latent }) => run.layer ? run.layer[latent] : shared.runs[run.number].layer;
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

// The list of an SAE's latents: a column for each property.
function listOf(number) {
  if (!lists.has(number)) lists.set(number, unpack("list-" + number).then((run) => {
    run.number = number;
    run.name = shared.runs[number].name;
    run.density = run.active.map((count) => count / run.readings);
    run.latent = run.active.map((_, latent) => latent);
    run.text = run.words.map((words, latent) => folded("\n" + words + "\n\n" + (run.explained?.[latent]?.[2] ?? "")));
    return run;
  }));
  return lists.get(number);
}

// ---------------------------------------------------------------------------------------------- the list

// runs: whose latents are listed. pairs: of the SAE beside them, if one is chosen. order: what is listed, as entries
// {run, latent, strength: on the word that was searched for}; at: the one that is marked. opened: the panes, as entries.
let shared, runs = [], pairs = null, order = [], at = 0, opened = [], ascending = false, drawn = "", rowHeight = 44;

// Text as it is searched: the same letters may be written whole or as letter and mark.
const folded = (text) => text.normalize().toLowerCase();
const numberIn = (text) => /^#?\d+$/.test(text) ? Number(text.replace("#", "")) : null;
const browsable = () => shared.runs.flatMap((one, number) => one.browsable ? [number] : []);

function* matching(run, text) {
  const whole = text.match(/^["“”'](.+)["“”']$/);
  const part = whole ? "\n" + whole[1] + "\n" : text, wanted = numberIn(text);
  for (const latent of run.latent) {
    const found = text ? run.text[latent].indexOf(part) : -1;
    if (text && found < 0 && latent !== wanted) continue;
    const lines = run.text[latent].slice(0, Math.max(0, found)).split("\n").length; // a word each, the strongest first
    yield { run, latent, strength: found < 0 ? null : run.on[latent][lines - (whole ? 1 : 2)] ?? null };
  }
}

// What can be shown of every latent and sorted by: [key, heading, value of an entry, its text].
function columns() {
  const text = folded($("search").value.trim()), searched = text && numberIn(text) === null;
  const found = [["density", "density", ({ run, latent }) => run.density[latent], short],
    ["max", searched ? "on it" : "max", ({ run, latent, strength }) => searched ? strength : run.max[latent], short]];
  if (pairs) found.push(["cosine", "cosine", ({ latent }) => pairs.cosine[latent], (value) => value.toFixed(2)]);
  if (runs.some((run) => run.layer)) found.push(["layer", "layer", layerOf, plain]);
  if (runs.some((run) => run.score)) found.push(["score", "score", ({ run, latent }) => run.score?.[latent], plain]);
  return found;
}

const layerOf = ({ run, latent }) => run.layer ? run.layer[latent] : shared.runs[run.number].layer;
const plain = (value) => String(value ?? "–");

function arrange(keep) {
  const text = folded($("search").value.trim()), key = $("sort").value, sign = ascending ? 1 : -1;
  const value = columns().find(([name]) => name === key)?.[2] ?? (({ latent }) => latent);
  order = [];
  for (const run of runs)
    for (const entry of matching(run, text))
      if (!$("kept").checked || run.kept[entry.latent]) order.push(Object.assign(entry, { value: value(entry) }));
  const wanted = numberIn(text); // the latent of that number first, tokens of those digits behind it
  order.sort((a, b) => {
    if (wanted !== null && (a.latent === wanted) !== (b.latent === wanted)) return a.latent === wanted ? -1 : 1;
    if (a.value == null || b.value == null) return (a.value == null) - (b.value == null) || byNumber(a, b);
    return sign * (a.value - b.value) || byNumber(a, b);
  });
  const total = runs.reduce((sum, run) => sum + run.latent.length, 0).toLocaleString("en");
  const count = order.length.toLocaleString("en");
  $("count").textContent = count === total ? total + " latents" : count + " of " + total;
  heads();
  $("rows").style.height = order.length * rowHeight + "px";
  at = keep ? Math.max(0, order.findIndex((entry) => same(entry, keep))) : 0;
  drawn = "";
  $("list").scrollTop = keep ? Math.max(0, (at - 3) * rowHeight) : 0;
  draw();
}

const byNumber = (a, b) => a.run.number - b.run.number || a.latent - b.latent;
const same = (a, b) => Boolean(a && b) && a.run === b.run && a.latent === b.latent;

function heads() {
  const shown = columns().map(([key, heading]) => {
    const head = make("span", key === $("sort").value ? "sorted" : "", heading);
    head.dataset.key = key;
    return head;
  });
  $("heads").replaceChildren(make("span", "", "latent"), make("span", "", "active on"), ...shown);
  $("listing").style.setProperty("--columns", "64px minmax(0, 1fr)" + " 66px".repeat(shown.length));
  for (const option of $("sort").options)
    option.hidden = option.disabled = option.value !== "latent" && !columns().some(([key]) => key === option.value);
}

function draw() {
  const list = $("list");
  const first = Math.max(0, Math.floor(list.scrollTop / rowHeight) - OVERSCAN);
  const after = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / rowHeight) + OVERSCAN);
  const now = [first, after, at].join();
  if (now === drawn) return;
  drawn = now;
  const rows = [], shown = columns();
  for (let i = first; i < after; i++) rows.push(row(i, shown));
  $("rows").replaceChildren(...rows);
  if (order.length && at >= first && at < after) list.setAttribute("aria-activedescendant", "row-" + at);
  else list.removeAttribute("aria-activedescendant");
}

const dot = (number) => make("i", "series-" + (number % 8) + (number >= 8 ? " again" : ""));

function row(i, shown) {
  const { run, latent } = order[i];
  const id = make("span", "id", ...(runs.length > 1 ? [dot(run.number)] : []), String(latent));
  const words = wordsOf(run, latent, 8);
  const element = make("div", "latent", id, words);
  if (pairs) words.append(make("span", "other", String(pairs.latent[latent]), wordsOf(pairs.run, pairs.latent[latent], 6)));
  for (const [key, , value, text] of shown) {
    const cell = make("span", key === $("sort").value ? "sorted" : "", text(value(order[i])));
    cell.dataset.key = key;
    element.append(cell);
  }
  element.id = "row-" + i;
  element.dataset.latent = latent;
  element.dataset.at = i;
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
  if (opened.length) choose(order[at], true);
}

// ---------------------------------------------------------------------------------------------- latents by their links

// #latents/0/12 is latent 12 of the first SAE; #latents/0/12/1/7 is it beside latent 7 of the second.
const linkTo = (...entries) => "#latents/" + entries.map(({ run, latent }) => run.number + "/" + latent).join("/");

function go(link, replaced) {
  if (link === location.hash) return;
  history[replaced ? "replaceState" : "pushState"](null, "", link);
  show();
}

// An entry of the list, beside its pair where an SAE is chosen for that.
function choose(entry, replaced) {
  go(linkTo(entry, ...(pairs ? [{ run: pairs.run, latent: pairs.latent[entry.latent] }] : [])), replaced);
}

async function asked(link) {
  const numbers = link.match(/^#latents\/(\d+)\/(\d+)(?:\/(\d+)\/(\d+))?$/)?.slice(1).filter((part) => part).map(Number);
  const entries = [];
  for (let i = 0; numbers && i < numbers.length; i += 2) {
    if (!shared.runs[numbers[i]]?.browsable || numbers[i + 1] >= shared.runs[numbers[i]].latents) return [];
    entries.push({ run: await listOf(numbers[i]), latent: numbers[i + 1] });
  }
  return entries;
}

// Shows what the address says. Every way to a latent, and back, comes here.
async function show() {
  const link = location.hash, entries = await asked(link);
  if (link && !link.startsWith("#latents")) return; // another section
  const data = await Promise.all(entries.map(({ run, latent }) => piece("piece-" + run.number + "-" + Math.floor(latent / shared.piece))));
  if (link !== location.hash) return; // something else was asked for meanwhile
  opened = entries;
  const detail = $("detail"), [first] = entries;
  detail.classList.toggle("open", entries.length > 0);
  $("browser").classList.toggle("two", entries.length > 1);
  if (!first) {
    detail.replaceChildren(make("p", "empty", "Choose a latent to see what it is active on."));
  } else {
    if (!runs.includes(first.run)) await scope(first.run.number);
    if (!order.some((entry) => same(entry, first))) $("search").value = "", $("kept").checked = false;
    if (!same(order[at], first)) arrange(first);
    const panes = await Promise.all(entries.map((entry, i) => pane(entry, data[i])));
    if (link !== location.hash) return;
    detail.replaceChildren(...panes);
    detail.scrollTop = 0;
    const box = $("browser").getBoundingClientRect();
    if (box.top > innerHeight || box.bottom < 0) $("latents").scrollIntoView();
  }
  if (own) ask();
}

async function pane({ run, latent }, data) {
  const place = latent % shared.piece, parts = [title(run, latent), stats(run, latent), explanation(run, latent)];
  const [strongest, ...others] = contexts(run, latent, data);
  parts.push(histogram(data.histogram[place]), ...strongest);
  if (data.promoted) parts.push(make("h3", "", "Logit effect"), effects(data.promoted[place], data.suppressed[place]));
  parts.push(make("h3", "", "Nearest by decoder cosine"),
    neighbours(data.near[place].map((other, i) => [data.cosine[place][i], { run, latent: other }])));
  const twins = await Promise.all(shared.runs[run.number].pairs.map(async (number) => {
    const [of, other] = [await piece("pairs-" + run.number + "-" + number), await listOf(number)];
    return [of.cosine[latent], { run: other, latent: of.latent[latent] }];
  }));
  if (twins.length) parts.push(make("h3", "", "Nearest in the other SAEs, to look at side by side"),
    neighbours(twins, { run, latent }));
  parts.push(...others.flat());
  return make("div", "pane", ...parts.filter(Boolean));
}

function title(run, latent) {
  const heading = make("h3", "", "Latent " + latent);
  if (shared.runs.length > 1) heading.append(make("small", "", dot(run.number), make("bdi", "", run.name)));
  const button = make("button", "", "✕");
  button.type = "button";
  button.setAttribute("aria-label", "Close");
  const others = opened.filter((entry) => !same(entry, { run, latent }));
  button.addEventListener("click", () => others.length ? go(linkTo(...others)) : close());
  return make("div", "title", heading, button);
}

function close() {
  go("#latents");
  $("list").focus({ preventScroll: true });
}

function stats(run, latent) {
  const list = make("dl", "stats");
  const facts = [["density", short(run.density[latent])], ["active", run.active[latent].toLocaleString("en") + "×"],
    ["max", short(run.max[latent])], ["mean", short(run.mean[latent])], ["layer", run.layer && plain(run.layer[latent])],
    ["published rule", run.kept[latent] ? "keeps it" : "leaves it out"]];
  for (const [name, value] of facts)
    if (value) list.append(make("div", "", make("dt", "", name), make("dd", "", value)));
  return list;
}

function explanation(run, latent) {
  const found = run.explained?.[latent];
  if (!found) return null;
  const [outcome, category, text] = found;
  const score = run.score[latent] == null ? "" : " · score " + run.score[latent];
  return make("div", "explanation", spell(make("bdi"), text),
    spell(make("small"), outcome === "answered" ? category + score : outcome));
}

// Of its activations, in bins of a quarter of an octave: [number of the first bin, counts …].
function histogram([first, ...counts]) {
  if (!counts.length) return null;
  const most = Math.max(...counts), edge = (bin) => short(2 ** (bin / 4));
  const bars = counts.map((count, i) => {
    const bar = make("span");
    bar.style.height = (count ? Math.max(2, count / most * 100) : 0) + "%";
    bar.title = edge(first + i) + " to " + edge(first + i + 1) + ": " + count.toLocaleString("en") + "×";
    return bar;
  });
  const common = first + counts.indexOf(most), end = first + counts.length;
  const figure = make("figure", "histogram", make("div", "bars", ...bars),
    make("figcaption", "", make("span", "", edge(first)), make("span", "", "activation, log scale"), make("span", "", edge(end))));
  figure.setAttribute("role", "img");
  figure.setAttribute("aria-label", `Activations from ${edge(first)} to ${edge(end)}, most between ${edge(common)} and ${edge(common + 1)}`);
  return figure;
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toPrecision(3);

function effects(promoted, suppressed) {
  const most = Math.max(...[...promoted, ...suppressed].map(([, value]) => Math.abs(value)), 1e-9);
  const column = (name, heading, tokens) => {
    const list = make("ol");
    for (const [text, value] of tokens) {
      const item = make("li", "", spell(make("bdi"), text), make("i", "bar"), make("span", "", signed(value)));
      item.style.setProperty("--share", Math.abs(value) / most);
      list.append(item);
    }
    return make("div", name, make("h4", "", heading), list);
  };
  return make("div", "effects", column("promoted", "likelier", promoted),
    column("suppressed", "less likely", suppressed));
}

// found: [cosine, entry] each. beside: the entry that they are shown beside, if any.
function neighbours(found, beside) {
  const list = make("div", "near");
  for (const [cosine, entry] of found) {
    const link = make("a", "", make("span", "cosine", cosine.toFixed(2)),
      make("span", "id", ...(beside ? [dot(entry.run.number)] : []), String(entry.latent)),
      wordsOf(entry.run, entry.latent, 6));
    link.href = linkTo(...(beside ? [beside] : []), entry);
    if (beside) link.title = entry.run.name;
    list.append(link);
  }
  return list;
}

// The parts of each kind, under a heading.
function contexts(run, latent, data) {
  const found = data.contexts[latent] ?? [];
  const peak = Math.max(...found.map((context) => context[1] ?? 0), 1e-9);
  const parts = KINDS.map(([kind, heading]) => {
    const ofKind = found.filter((context) => context[0] === kind);
    return ofKind.length ? [make("h3", "", heading), ...ofKind.map((one) => context(one, data.words, peak, run.layer))] : [];
  });
  if (!found.length)
    parts[0] = [make("p", "empty", run.active[latent] ? "No context was kept of it." : "It is active on no token.")];
  return parts;
}

function context([, activation, layer, row, position, [document_, about, place], marked, words, active, values], texts, peak, several) {
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
  const where = make("small", "", several && layer != null ? "layer " + layer : "");
  const side = make("div", "activation", short(activation), where);
  side.title = (document_ == null ? "" : "document " + document_ + ", ") + "row " + row + ", position " + position;
  if (texts[place]) side.title += ", " + texts[place];
  const known = texts[about] ? [spell(make("small", "about"), texts[about])] : [];
  return make("div", "context", side, make("div", "", text, ...known));
}

// ---------------------------------------------------------------------------------------------- one's own text

let own = false, asking = 0, pressedToken = 0; // own: whether there is a server to ask

// Colours the text's tokens by the latent that is open, or else by the strongest of each.
async function ask() {
  const text = $("text").value, number = ++asking, first = opened[0], run = first?.run ?? runs[0];
  if (!text.trim()) return $("tokens").replaceChildren(), $("strongest").replaceChildren();
  const body = JSON.stringify({ run: run.number, text, latent: first?.latent ?? null });
  const answer = await fetch("latents", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  const found = await answer.json();
  if (number !== asking) return; // more was typed meanwhile
  if (found.error) return $("tokens").replaceChildren(make("span", "empty", found.error));
  const values = found.values ?? found.top.map((of) => of[0]?.[1] ?? 0), peak = Math.max(...values, 1e-9);
  $("tokens").replaceChildren(...found.tokens.map((token, i) => {
    const button = spell(make("button"), token);
    button.type = "button";
    button.title = short(values[i]);
    button.style.setProperty("--share", values[i] / peak);
    button.addEventListener("click", () => strongest(run, found.top, i));
    return button;
  }));
  strongest(run, found.top, Math.min(pressedToken, found.tokens.length - 1));
}

function strongest(run, top, at) {
  pressedToken = at;
  [...$("tokens").children].forEach((button, i) => button.setAttribute("aria-pressed", i === at));
  $("strongest").replaceChildren(neighbours(top[at].map(([latent, value]) => [value, { run, latent }])));
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
  const target = event.target, typing = target.matches("input[type=search], select, textarea");
  if (event.key === "Escape" && $("list")) {
    if (opened.length) close();
    else if (typing) $("list").focus();
    return event.preventDefault();
  }
  if (target === $("search") && ["Enter", "ArrowDown"].includes(event.key)) {
    $("list").focus();
    if (event.key === "Enter" && order.length) choose(order[at]);
    return event.preventDefault();
  }
  if (typing) return;
  if (event.key === "d") return switchTheme();
  if (!runs.length) return;
  const page = Math.max(1, Math.floor($("list").clientHeight / rowHeight) - 1);
  const onList = target === $("list");
  const steps = { j: 1, k: -1, ...(onList ? { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page,
    Home: -Infinity, End: Infinity } : {}) };
  if (event.key === "/") $("search").select(), $("search").focus();
  else if (event.key in steps) move(at + steps[event.key]);
  else if (event.key === "Enter" && (onList || target === document.body) && order.length) choose(order[at]);
  else return;
  event.preventDefault();
}

// Lists the latents of one SAE, or of all.
async function scope(which) {
  runs = await Promise.all(which === "all" ? browsable().map(listOf) : [listOf(Number(which))]);
  $("run").value = which;
  const others = which === "all" ? [] : shared.runs[which].pairs;
  for (const option of $("beside").options) option.hidden = option.disabled = option.value !== "" && !others.includes(Number(option.value));
  $("beside").parentElement.hidden = !others.length;
  if (own) ask();
  await pairWith("");
}

// Lists with each latent the one nearest to it in another SAE.
async function pairWith(number) {
  $("beside").value = number;
  pairs = number === "" ? null : { ...await unpack("pairs-" + runs[0].number + "-" + number), run: await listOf(Number(number)) };
  $("listing").classList.toggle("pairs", Boolean(pairs));
  turn(pairs ? "cosine" : $("sort").value === "cosine" ? "max" : $("sort").value, false);
}

// Sorts by a column; up: ascending.
function turn(key, up) {
  $("sort").value = key;
  ascending = up;
  $("direction").textContent = up ? "↑" : "↓";
  $("direction").setAttribute("aria-label", up ? "Ascending; press for descending" : "Descending; press for ascending");
  arrange(opened[0]);
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
    for (const select of [$("run"), $("beside")]) {
      const option = make("option", "", one.name);
      option.value = number;
      select.append(option);
    }
  });
  if (!$("list")) return;
  const several = browsable().length > 1;
  if (several) $("run").append(Object.assign(make("option", "", "all SAEs"), { value: "all" }));
  $("run").parentElement.hidden = !several;
  rowHeight = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
  listen();
  await scope(browsable()[0]);
  performance.mark("routesae-list");
  if (location.hash.startsWith("#latents/")) await show();
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
    at = Number(found.dataset.at);
    draw();
    choose(order[at]);
  });
  addEventListener("hashchange", show);
  if ($("own") && location.protocol === "http:") {
    own = true;
    $("own").hidden = false;
    $("text").addEventListener("input", ask);
  }
  $("search").addEventListener("input", () => arrange());
  $("kept").addEventListener("change", () => arrange());
  $("run").addEventListener("change", async () => { await scope($("run").value); if (opened.length) go("#latents"); });
  $("beside").addEventListener("change", () => pairWith($("beside").value));
  $("sort").addEventListener("change", () => turn($("sort").value, ["layer", "latent"].includes($("sort").value)));
  $("direction").addEventListener("click", () => turn($("sort").value, !ascending));
  $("heads").addEventListener("click", ({ target }) => {
    const { key } = target.dataset;
    if (key) turn(key, $("sort").value === key ? !ascending : key === "layer");
  });
  addEventListener("resize", () => {
    rowHeight = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    if (runs.length) arrange(opened[0] ?? order[at]);
  });
}

start().catch((error) => {
  document.querySelector("#latents .empty, #latents").append(make("p", "empty", "This page could not be read: " + error.message));
  throw error;
});
