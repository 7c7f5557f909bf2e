"use strict";
// The forest: levels as columns, children under parents. Only the rows in sight are in the page.

const ROW = 34; // pixels, as in page.css

const orders = {
  variety: { title: "variety of children", of: (latent, parent) => (parent < 0 ? variety[latent] : 2 * index.distinct[latent] + index.coverage[latent]) },
  evidence: { title: "evidence", of: (latent, parent) => (parent < 0 ? strength[latent] : index.information[latent]) },
  frequency: { title: "frequency", of: (latent) => index.fired[latent] },
  children: { title: "number of children", of: (latent) => drawnChildren[latent].length },
  number: { title: "latent number", of: (latent) => -latent },
};
const forest = { order: "variety", all: false, query: "", open: new Set(), rows: [], active: -1 };
let strength; // bits that a latent's drawn edges say of its children
let variety; // how many such children a latent has, unless it is dense

function prepareForest() {
  drawnChildren = index.fired.map(() => []);
  strength = new Float64Array(index.fired.length);
  index.parent.forEach((parent, latent) => {
    if (parent < 0) return;
    drawnChildren[parent].push(latent);
    strength[parent] += index.information[latent];
  });
  prepareVariety();
  if (index.has_words) return;
  delete orders.variety;
  forest.order = "evidence";
}

// As `tree.families.variety` counts, which the command prints by.
function prepareVariety() {
  variety = drawnChildren.map((children, latent) =>
    (isDense(latent) ? 0 : children.filter((child) => index.distinct[child]).length) + strength[latent] / (1 + strength[latent]));
}

function sorted(latents, { of } = orders[forest.order]) {
  return latents
    .map((latent) => [of(latent, index.parent[latent]), latent])
    .sort((a, b) => b[0] - a[0] || a[1] - b[1])
    .map((pair) => pair[1]);
}

function visibleRows() {
  if (forest.query) return found(forest.query);
  const rows = [];
  const add = (latent) => {
    rows.push(latent);
    if (forest.open.has(latent)) sorted(drawnChildren[latent]).forEach(add);
  };
  const tops = [];
  index.parent.forEach((parent, latent) => {
    if (parent < 0 && (forest.all || drawnChildren[latent].length)) tops.push(latent);
  });
  sorted(tops).forEach(add);
  return rows;
}

// Latents by number, label or token, the best matches first.
function found(query) {
  const wanted = query.toLowerCase();
  const scores = new Map();
  index.fired.forEach((_, latent) => {
    const texts = [String(latent), labels[latent] || "", ...(index.words[latent] || [])];
    const score = Math.max(
      ...texts.map((text, i) => {
        const lower = text.toLowerCase();
        if (lower === wanted) return i ? 4 : 5;
        if (i === 0) return 0;
        return (lower.startsWith(wanted) ? 2 : lower.includes(wanted) ? 1 : 0) + (i === 1 && lower.includes(wanted));
      }),
    );
    if (score > 0) scores.set(latent, score);
  });
  return sorted([...scores.keys()]).sort((a, b) => scores.get(b) - scores.get(a));
}

function forestView() {
  const search = h("input", {
    type: "search", id: "search", placeholder: "Token, label or latent number", value: forest.query,
    "aria-label": "Search by token, label or latent number", autocomplete: "off", spellcheck: "false",
    oninput: (event) => {
      forest.query = event.target.value.trim();
      forest.active = -1;
      scroller().scrollTop = 0;
      refreshForest();
    },
    onkeydown: (event) => {
      if (event.key !== "ArrowDown" && event.key !== "Enter") return;
      event.preventDefault();
      if (!forest.rows.length) return;
      setActive(0);
      if (event.key === "Enter") location.hash = latentAddress(forest.rows[0]);
      else scroller().focus();
    },
  });
  const order = h("select", { id: "order", onchange: (event) => {
    forest.order = event.target.value;
    refreshForest();
  } }, Object.entries(orders).map(([name, { title }]) =>
    h("option", { value: name, selected: name === forest.order ? "" : undefined }, title)));
  const all = h("input", { type: "checkbox", id: "all", onchange: (event) => {
    forest.all = event.target.checked;
    refreshForest();
  }, title: "also those without a parent and children" });
  all.checked = forest.all;
  const heads = hasLevels() ? startOfLevel.map((_, level) =>
    h("span", { class: `badge c${level % 6}`, title: levelTitle(level), style: `--column:${level}` }, level + 1)) : [];
  return h("div", { id: "forest", style: `--columns:${startOfLevel.length}` },
    h("div", { class: "tools" }, search,
      h("label", {}, "sorted by ", order),
      h("label", {}, all, " all latents")),
    h("div", { class: "row heads" }, h("span", { class: "levels" }, heads),
      h("span", { class: "cell kin", title: "latents that stand under it" }, "children"),
      h("span", { class: "cell covers", title: "on how many of its tokens its parent fires too" }, "with parent"),
      h("span", { class: "cell fires", title: "of all tokens" }, "fires on")),
    h("p", { id: "found", class: "quiet", role: "status" }),
    h("div", { id: "rows", role: "tree", tabindex: "0", "aria-label": "Latents", onscroll: drawRows, onkeydown: forestKey },
      h("div", { id: "space" })));
}

const scroller = () => document.getElementById("rows");
const levelTitle = (level) =>
  `level ${level + 1}: latents ${startOfLevel[level]} to ${(startOfLevel[level + 1] ?? index.fired.length) - 1}`;

function refreshForest() {
  if (!scroller()) return;
  forest.rows = visibleRows();
  document.getElementById("space").style.height = `${forest.rows.length * ROW}px`;
  const n = forest.rows.length;
  document.getElementById("found").textContent = forest.query
    ? n ? counted(n, "latent", "latents") : `No latent has “${forest.query}” as its number, in its label or among its words.`
    : n ? "" : index.fired.length ? "No edge passed the tests, so there are no families to show." : "This SAE has no latents.";
  drawRows();
}

function drawRows() {
  const box = scroller();
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 10);
  const last = Math.min(forest.rows.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 10);
  const rows = [];
  for (let i = first; i < last; i++) rows.push(forestRow(forest.rows[i], i));
  document.getElementById("space").replaceChildren(...rows);
  if (forest.active >= first && forest.active < last)
    box.setAttribute("aria-activedescendant", `row-${forest.rows[forest.active]}`);
  else box.removeAttribute("aria-activedescendant");
}

function forestRow(latent, i) {
  const children = drawnChildren[latent].length;
  const isOpen = forest.open.has(latent) && !forest.query;
  const above = forest.query ? [] : ancestors(latent);
  const parent = index.parent[latent];
  const isSelected = state().latent === String(latent);
  return h("div", {
    class: `row ${colour(latent)}${above.length || forest.query ? "" : " root"}${i === forest.active ? " active" : ""}${isSelected ? " selected" : ""}`,
    id: `row-${latent}`, role: "treeitem", "aria-level": above.length + 1, "aria-selected": isSelected ? "true" : "false",
    "aria-expanded": children && !forest.query ? String(isOpen) : undefined,
    style: `top:${i * ROW}px;--column:${columnOf(latent)}`,
    onclick: () => {
      setActive(i);
      location.hash = latentAddress(latent);
    },
  },
  above.map((ancestor) => h("i", { class: `guide ${colour(ancestor)}`, style: `--column:${columnOf(ancestor)}` })),
  above.length ? h("i", { class: `branch ${colour(parent)}`, style: `--from:${columnOf(parent)}` }) : null,
  h("span", { class: "caret", "aria-hidden": "true", onclick: (event) => {
    if (!children || forest.query) return;
    event.stopPropagation();
    toggle(latent);
    setActive(forest.rows.indexOf(latent));
  } }, children && !forest.query ? (isOpen ? "▾" : "▸") : ""),
  h("span", { class: "dot" }),
  h("span", { class: "who" }, h("b", {}, latent), " ", nameOf(latent),
    forest.query && parent >= 0 ? h("span", { class: "quiet" }, " under ", parent, " ", nameOf(parent)) : null),
  h("span", { class: "cell kin" }, children ? [count(children), h("span", { class: "sr" }, " children")] : ""),
  h("span", { class: "cell covers" }, parent >= 0 ? shareBar(index.coverage[latent]) : ""),
  h("span", { class: "cell fires" }, percent(index.fired[latent] / index.summary.n_tokens)));
}

const shareBar = (value) => [
  h("span", { class: "meter", "aria-hidden": "true" }, h("span", { style: `width:${100 * value}%` })),
  h("span", { class: "number" }, percent(value)),
];

function toggle(latent) {
  if (!forest.open.delete(latent)) forest.open.add(latent);
  refreshForest();
}

function setActive(i) {
  forest.active = i;
  const box = scroller();
  if (i * ROW < box.scrollTop) box.scrollTop = i * ROW;
  else if ((i + 1) * ROW > box.scrollTop + box.clientHeight) box.scrollTop = (i + 1) * ROW - box.clientHeight;
  drawRows();
}

function forestKey(event) {
  const last = forest.rows.length - 1;
  if (last < 0) return;
  const i = Math.max(0, forest.active);
  const latent = forest.rows[i];
  const isOpen = forest.open.has(latent);
  const canOpen = drawnChildren[latent].length > 0 && !forest.query;
  const moves = { ArrowDown: forest.active + 1, ArrowUp: i - 1, Home: 0, End: last, PageDown: i + 12, PageUp: i - 12 };
  if (event.key in moves) setActive(Math.min(last, Math.max(0, moves[event.key])));
  else if (event.key === "Enter") location.hash = latentAddress(latent);
  else if (event.key === "ArrowRight" && canOpen) isOpen ? setActive(i + 1) : toggle(latent);
  else if (event.key === "ArrowLeft" && isOpen) toggle(latent);
  else if (event.key === "ArrowLeft" && forest.rows.includes(index.parent[latent]))
    setActive(forest.rows.indexOf(index.parent[latent]));
  else return;
  event.preventDefault();
}

// Open the families above a latent and scroll to its row.
function reveal(latent) {
  if (!forest.query) ancestors(latent).forEach((ancestor) => forest.open.add(ancestor));
  refreshForest();
  const i = forest.rows.indexOf(latent);
  if (i < 0) return;
  const box = scroller();
  const isInSight = i * ROW >= box.scrollTop && (i + 1) * ROW <= box.scrollTop + box.clientHeight;
  if (!isInSight) box.scrollTop = i * ROW - box.clientHeight / 2;
  setActive(i);
}
