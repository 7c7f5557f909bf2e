"use strict";
// Loading, elements, numbers, and the state in the address: what every view needs.

const files = new Map(); // name: {promise, resolve}
let index; // data/index.js
let startOfLevel; // the first latent of each level
let drawnChildren; // of each latent, those that are drawn under it

// Called by every file of data/.
function receive(name, value) {
  files.get(name).resolve(value);
}

// A file of data/: as a script, because a page opened from a disk may not fetch; or from the page itself.
function load(name) {
  if (!files.has(name)) {
    const file = {};
    const inside = document.getElementById(`data-${name}`);
    file.promise = new Promise((resolve, reject) => {
      file.resolve = resolve;
      if (inside) return resolve(JSON.parse(inside.textContent));
      const onerror = () => {
        files.delete(name);
        reject(new Error(`data/${name}.js can't be read: keep the folder data beside index.html.`));
      };
      document.head.append(h("script", { src: `data/${name}.js`, onerror }));
    });
    files.set(name, file);
  }
  return files.get(name).promise;
}

// An element. Texts become text nodes, so nothing in them is read as HTML.
function h(tag, attributes, ...children) {
  const node = document.createElementNS(
    tag === "svg" || tag === "rect" ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml",
    tag,
  );
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((c) => c !== undefined && c !== null && c !== false));
  return node;
}

// Text of tokens: line ends and other control characters as signs.
const visible = (text) => text.replace(/\n/g, "↵").replace(/[\x00-\x1f\x7f-\x9f]/g, "·");

const count = (n) => n.toLocaleString("en");
const counted = (n, one, many) => `${count(n)} ${n === 1 ? one : many}`;
const short = (x) => (x === null ? "unknown" : String(Number(x.toPrecision(3))));

function percent(share) {
  if (share === null) return "unknown";
  const value = 100 * share;
  const digits = value === 0 || value >= 99.95 ? 0 : value >= 10 ? 0 : value >= 1 ? 1 : 2;
  return value > 0 && value < 0.01 ? "<0.01\u00a0%" : `${value.toFixed(value > 99 && value < 99.95 ? 1 : digits)}\u00a0%`;
}

function levelOf(latent) {
  let level = 0;
  while (level + 1 < startOfLevel.length && startOfLevel[level + 1] <= latent) level++;
  return level;
}

const isDense = (latent) => index.fired[latent] > index.summary.n_tokens / 10;

const hasLevels = () => index.settings.rules.parents_by_level;

// Its column in the forest: its level, or without levels the number of its ancestors.
function columnOf(latent) {
  return hasLevels() ? levelOf(latent) : ancestors(latent).length;
}

// The parents it is drawn under, the nearest first.
function ancestors(latent) {
  const found = [];
  for (let p = index.parent[latent]; p >= 0; p = index.parent[p]) found.push(p);
  return found;
}

const colour = (latent) => `c${columnOf(latent) % 6}`;

// The state is in the address, so that every view has a link: #latent=23&text=0&token=5
const state = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const address = (values) => "#" + new URLSearchParams(values);

function latentAddress(latent) {
  const { about: _, ...others } = state();
  return address({ ...others, latent });
}

// Labels: from a file, and those typed here, which the browser keeps by the SAE's weights.
let labels = {};
let whereLabelsAre = "Labels stay in this browser until you export them."; // live.js says otherwise
const labelsKey = () => `sae-tree-labels ${index.settings.source.weights}`;

function readLabels() {
  let typed;
  try {
    typed = JSON.parse(localStorage.getItem(labelsKey()));
  } catch {
    typed = {}; // storage is off, or holds something else
  }
  labels = { ...index.labels, ...typed };
}

function setLabel(latent, text) {
  labels[latent] = text.trim(); // empty: a label of the file is taken away
  const typed = Object.entries(labels).filter(([key, label]) => label !== (index.labels[key] || ""));
  try {
    localStorage.setItem(labelsKey(), JSON.stringify(Object.fromEntries(typed)));
  } catch {
    // they can still be exported while the page is open
  }
}

function exportLabels() {
  const written = Object.fromEntries(Object.entries(labels).filter(([, label]) => label));
  const values = { format_version: 1, sae: index.name, weights: index.settings.source.weights, labels: written };
  const url = URL.createObjectURL(new Blob([JSON.stringify(values, null, 1)], { type: "application/json" }));
  h("a", { href: url, download: "labels.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// What a latent is called: its label, or the tokens of its examples.
function nameOf(latent) {
  if (labels[latent]) return h("bdi", { class: "label" }, labels[latent]);
  const words = index.words[latent] || [];
  if (!index.fired[latent]) return h("span", { class: "quiet" }, "never fires");
  return h("span", { class: "words" }, words.map((word) => [h("bdi", {}, visible(word).trim() || "␣"), " "]));
}

const badge = (latent) =>
  hasLevels() &&
  h("span", { class: `badge ${colour(latent)}`, title: `level ${levelOf(latent) + 1}` }, levelOf(latent) + 1);

const latentLink = (latent) =>
  h("a", { class: "latent", href: latentAddress(latent) }, badge(latent), h("b", {}, latent), " ", nameOf(latent));
