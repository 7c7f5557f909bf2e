"use strict";
// One latent: family, examples, histogram, promoted tokens, neighbours.

const FIRST_SHOWN = 12; // relations of a kind, before a button shows all

async function detailOf(latent) {
  const file = await load(`latents-${Math.floor(latent / index.chunk)}`);
  return { ...file.latents[latent % index.chunk], wordsOfFile: file.words };
}

async function latentView(latent) {
  const detail = await detailOf(latent);
  const { n_tokens: n } = index.summary;
  const fired = index.fired[latent];
  const label = h("input", {
    id: "label", type: "text", value: labels[latent] || "", placeholder: "Type a label of your own", "aria-label": "Label",
    oninput: (event) => {
      setLabel(latent, event.target.value);
      refreshForest();
    },
  });
  return h("article", { id: "latent", class: colour(latent) },
    h("a", { class: "back", href: address(withoutLatent()) }, "‹ back"),
    h("h2", {}, badge(latent), `Latent ${latent}`),
    hasLevels() && h("p", { class: "quiet" }, levelTitle(levelOf(latent))),
    h("p", { class: "big" }, (index.words[latent] || []).map((word) => [h("bdi", { class: "chip" }, visible(word).trim() || "␣"), " "])),
    label,
    warnings(latent, fired),
    h("p", {}, `Fires on ${percent(fired / n)} of the tokens (${count(fired)} of ${count(n)}).`,
      fired ? ` Mean activation there ${short(detail.mean)}, largest ${short(detail.max)}.` : ""),
    ablated(detail, fired),
    family(latent, detail),
    examples(detail),
    fired ? histogram(detail) : null,
    promoted(detail),
    h("h3", {}, "Nearest decoder rows"),
    h("p", { class: "quiet" }, "By cosine, over all latents. 1 is the same direction, 0 none in common. A parent need not be among them: it " +
      "fires as well, and writes what both share."),
    h("ul", { class: "plain" }, detail.neighbours.map(([other, cosine]) =>
      h("li", {}, latentLink(other), h("span", { class: "cell" }, cosine.toFixed(2))))));
}

function withoutLatent() {
  const { latent: _, about: __, ...others } = state();
  return others;
}

// The change of the loss, if it was measured.
function ablated({ ablation }, fired) {
  if (ablation === undefined || !fired) return null;
  const change = ablation === null ? "an unknown number of" : `${ablation < 0 ? "−" : "+"}${short(Math.abs(ablation))}`;
  return h("p", { id: "ablation" }, `Ablated on one token where it fires, it would change the loss of the text that follows by ${change} nats, ` +
    `on the mean of ${counted(fired, "token", "tokens")}. Estimated by gradient: trust its sign and order more than its size.`);
}

function warnings(latent, fired) {
  const least = index.settings.rules.min_firings;
  if (!fired) return h("p", { class: "warning" }, "Dead: it fires on none of these tokens.");
  if (fired < least)
    return h("p", { class: "warning" }, `Rare: it fires on fewer than ${least} tokens, so it was not tested for a family.`);
  if (isDense(latent))
    return h("p", { class: "warning" }, "Dense: it fires on more than a tenth of all tokens, as few concepts do.");
  return null;
}

function family(latent, detail) {
  const rows = (values, make) => values.map((value) => make(edgeOf(value)));
  const asParent = (edge) => edgeRow(edge, edge.other, latent, edge.other);
  const asChild = (edge) => edgeRow(edge, latent, edge.other, edge.other);
  const passed = detail.parents.filter((value) => edgeOf(value).passed);
  const failed = detail.parents.filter((value) => !edgeOf(value).passed);
  const children = [...detail.children].sort((a, b) => placeOf(edgeOf(b)) - placeOf(edgeOf(a)));
  const nDrawn = children.filter((value) => edgeOf(value).strongest).length;
  const nElsewhere = children.length - nDrawn;
  const siblings = h("div", { id: "siblings" });
  const parent = index.parent[latent];
  if (parent >= 0)
    detailOf(parent).then((of) => {
      const others = of.children.filter((value) => edgeOf(value).other !== latent);
      siblings.append(...group("Siblings", `Other children of ${parent}, its strongest parent. The bar shows how often ${parent} fires where they do.`,
        rows(others, (edge) => edgeRow(edge, parent, edge.other, edge.other))));
    }, showError);
  return h("div", { id: "family" },
    group("Parents", "More general: where this latent fires, they mostly do too. The bar shows how often; click it for the evidence.", rows(passed, asParent)),
    group("Children", "More special: where they fire, this latent mostly does too. The bar shows how often; click it for the evidence." +
      (nDrawn > 1 ? " Those with words of their own come first." : "") +
      (!nElsewhere ? "" : nDrawn ? ` The first ${nDrawn} stand under it in the forest; the other ${nElsewhere} have a stronger parent.`
        : " In the forest they stand under a stronger parent."), rows(children, asChild)),
    siblings,
    passed.length || detail.children.length ? null
      : h("p", { class: "quiet" }, "No edge to or from this latent passed the tests."),
    failed.length ? h("details", { class: "refused" },
      h("summary", {}, `Parents that were tested and refused`), rows(failed, asParent)) : null);
}

// As the forest has them: those with words of their own first, last those that stand under another parent.
const placeOf = ({ strongest, other, coverage }) => (strongest ? 1 + 2 * index.distinct[other] + coverage : 0);

function group(title, note, rows) {
  if (!rows.length) return [];
  const list = h("div", {}, rows.slice(0, FIRST_SHOWN));
  const more = rows.length > FIRST_SHOWN && h("button", { onclick: (event) => {
    list.append(...rows.slice(FIRST_SHOWN));
    event.target.remove();
  } }, `show all ${rows.length}`);
  return [h("h3", {}, title, h("small", {}, ` ${rows.length}`)), h("p", { class: "quiet" }, note), list, more].filter(Boolean);
}

function examples(detail) {
  if (!detail.top.length) return null;
  const shown = (list) => list.map((values) => example(values, detail));
  const fifths = detail.quantiles.filter((list) => list.length);
  return h("div", { id: "examples" },
    h("h3", {}, "Where it fires most"),
    h("p", { class: "quiet" }, "Shaded by its activation, relative to its largest. The token in question is underlined."),
    index.has_words ? null : h("p", { class: "quiet" }, "The tree was built from activations, so there are no texts, only token numbers."),
    shown(detail.top.slice(0, 6)),
    detail.top.length > 6 ? h("details", {}, h("summary", {}, "more"), shown(detail.top.slice(6))) : null,
    fifths.length < 2 ? null : [h("h3", {}, "Over its whole range"),
      fifths.map((list, i) => [h("h4", {}, fifthTitle(i, fifths.length)), shown(list)])]);
}

function fifthTitle(i, n) {
  if (i === 0) return "Strongest fifth of its activations";
  return i === n - 1 ? "Weakest fifth" : `${["", "Second", "Third", "Fourth"][i] || `${i + 1}th`} fifth`;
}

// `parent`: the latent whose tokens get a line above.
function example([row, peak, words, flat, ofParent], detail, parent) {
  const strengths = new Map();
  const also = new Set(parent === undefined ? [] : ofParent);
  for (let i = 0; i < flat.length; i += 2) strengths.set(flat[i], flat[i + 1]);
  if (!words.length) return h("p", { class: "example" }, `token ${count(row)}: activation ${short(flat[1])}`);
  const parts = [];
  words.forEach((word, place) => {
    const text = visible(detail.wordsOfFile[word]);
    const strength = strengths.get(place);
    const token = strength === undefined && place !== peak ? text
      : shaded(text, (strength || 0) / detail.max, place === peak, `activation ${short(strength || 0)}`);
    parts.push(also.has(place) ? h("span", { class: "also", style: `--above:var(--${colour(parent)})`, title: `${parent} fires too` }, token) : token);
  });
  return h("p", { class: "example", dir: "auto" }, parts);
}

const shaded = (text, share, isPeak, title, attributes) =>
  h("span", { class: isPeak ? "token peak" : "token", title, style: `--share:${Math.max(0, Math.min(1, share)).toFixed(3)}`, ...attributes }, text);

function histogram(detail) {
  const largest = Math.max(...detail.histogram);
  const n = detail.histogram.length;
  const bars = detail.histogram.map((tokens, i) => {
    const height = tokens ? Math.max(1, (60 * tokens) / largest) : 0;
    return h("rect", { x: i * 8, y: 60 - height, width: 7, height });
  });
  return h("div", { id: "histogram" },
    h("h3", {}, "Activations"),
    h("svg", { viewBox: `0 0 ${n * 8} 60`, role: "img", preserveAspectRatio: "none",
      "aria-label": `Histogram of its activations from 0 to ${short(detail.max)}; most tokens in a bin: ${count(largest)}` }, bars),
    h("p", { class: "axis quiet" }, h("span", {}, "0"), h("span", {}, "activation, where it fires"), h("span", {}, short(detail.max))));
}

function promoted(detail) {
  if (!detail.promoted.length)
    return h("p", { class: "quiet" }, "Promoted tokens need a model whose unembedding is known, and an SAE of the residual stream.");
  const list = (title, tokens) => h("div", {}, h("h4", {}, title), h("ul", { class: "plain tokens" }, tokens.map(([word, value]) =>
    h("li", {}, h("bdi", { class: "chip" }, visible(detail.wordsOfFile[word])), h("span", { class: "cell" }, value.toFixed(1))))));
  return h("div", { id: "promoted" },
    h("h3", {}, "Tokens it promotes and suppresses"),
    h("p", { class: "quiet" }, "Its decoder row through the final norm's scale and the unembedding: how many standard deviations a token's " +
      "logit lies above the mean of the vocabulary. Layers in between are left out, so early layers say little here."),
    h("div", { class: "two" }, list("promotes", detail.promoted), list("suppresses", detail.suppressed)));
}
