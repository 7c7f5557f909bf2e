"use strict";
// An edge, with its tests in words.

const edgeOf = (values) => Object.fromEntries(index.edge_columns.map((name, i) => [name, values[i]]));

const ordinal = (n) => {
  if (n === 1) return "the nearest";
  const ending = n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] || "th";
  return `the ${count(n)}${ending} nearest`;
};

// Each test: whether the edge passes it, its name, and the numbers in a sentence.
function tests(edge, parent, child) {
  const { rules, sae } = index.settings;
  const rate = index.fired[parent] / index.summary.n_tokens;
  const way = (share, from) => `The lower end of the interval lies ${percent(Math.max(0, share))} of the way from these ${percent(from)} to 100\u00a0%; ` +
    `at least ${percent(rules.min_excess)} is needed.`;
  return [
    [edge.coverage >= rules.min_coverage && edge.excess_low >= rules.min_excess, "Coverage",
      `${child} fires on ${count(index.fired[child])} tokens. On ${count(edge.n_both)} of them, ${percent(edge.coverage)}, ` +
      `${parent} fires too (95 % interval: ${percent(edge.coverage_low)} to ${percent(edge.coverage_high)}). ` +
      `On all tokens ${parent} fires on ${percent(rate)}. ${way(edge.excess_low, rate)}`],
    [edge.nearby_excess_low >= rules.min_excess, "Not only the topic",
      edge.nearby === null ? `There are no tokens near those of ${child} where it is silent.`
        : `On the tokens around those of ${child}, within blocks of ${rules.nearby_block}, where ${child} is silent, ${parent} fires on ` +
          `${percent(edge.nearby)}. ${way(edge.nearby_excess_low, edge.nearby)}`],
    [edge.p_corrected < rules.alpha, "Not chance",
      `Shifted along the text, so that each keeps its rate and its clusters, the two would meet on ` +
      `${short(edge.n_expected)} ± ${short(edge.n_expected_sd)} tokens. They meet on ${count(edge.n_both)}: ` +
      `p = ${edge.p_corrected === 0 ? "0 (below the smallest number)" : edge.p_corrected.toExponential(0)}, corrected for ` +
      `${count(index.summary.n_looked_at)} pairs; below ${rules.alpha} is needed.`],
    [edge.presence >= rules.min_presence, "Presence",
      `Where ${child} fires, the activations go ${short(edge.presence)} times as far along the direction of ${parent} as ` +
      `where ${parent} fires; at least ${rules.min_presence} is needed.`],
    [edge.direction_rank <= rules.max_rank, "Direction",
      `Of the decoder rows of the ${count(sae.d_sae - 1)} other latents, that of ${parent} is ${ordinal(edge.direction_rank)} to the ` +
      `direction in which the activations differ where ${child} fires; it has to be among the ${rules.max_rank} nearest.`],
  ].slice(0, rules.edges === "tested" ? 5 : 1);
}

// A row that opens to its tests, which are written when it does. `shown` is the parent or the child
// that it leads to.
function edgeRow(edge, parent, child, shown) {
  const failed = edge.passed ? [] : tests(edge, parent, child).filter(([ok]) => !ok).map(([, name]) => name.toLowerCase());
  const row = h("details", { class: `edge ${colour(shown)}`, ontoggle: () => {
    if (row.children.length > 1) return;
    const firing = h("div", { class: "firing" });
    row.append(firing, ...evidence(edge, parent, child));
    if (!index.has_words) return;
    const isDrawn = index.parent[child] === parent; // only then the child's examples say where the parent fires
    const latents = isDrawn && shown !== child ? [child, shown] : [shown];
    Promise.all(latents.map(detailOf)).then((details) => details.forEach((detail, i) => {
      const withParent = isDrawn && latents[i] === child;
      firing.append(
        h("p", { class: "quiet" }, `Where ${latents[i]} fires most${withParent ? `; a line above the tokens where ${parent} fires too` : ""}:`),
        ...detail.top.slice(0, 3).map((values) => example(values, detail, withParent ? parent : undefined)));
    }), showError);
  } },
  h("summary", {}, latentLink(shown),
    failed.length ? h("span", { class: "quiet" }, `fails: ${failed.join(", ")}`) : null,
    h("span", { class: "cell" }, shareBar(edge.coverage))));
  return row;
}

function evidence(edge, parent, child) {
  return [
    h("p", { class: "quiet" }, `Evidence that ${child} specialises ${parent}:`),
    h("ul", { class: "tests" }, tests(edge, parent, child).map(([ok, name, sentence]) =>
      h("li", { class: ok ? "ok" : "failed" }, h("b", {}, `${ok ? "✓" : "✗"} ${name}. `), sentence))),
    h("p", { class: "quiet" },
      `${child} fires on ${percent(edge.of_parent)} of the tokens of ${parent}. `,
      edge.passed && !edge.direct ? "Another passed way leads from one to the other, over latents between them. " : "",
      nullSentence()),
  ];
}

function nullSentence() {
  const { n_shifted_tested: tested, n_shifted_passed: passed } = index.summary;
  return `The null, over all pairs: in a copy of the data whose children are shifted along the text, ${counted(tested, "pair reaches", "pairs reach")} ` +
    `the coverage to be tested, and ${count(passed)} of them ${passed === 1 ? "passes" : "pass"}. In the data ${count(index.summary.n_tested)} reach it, ` +
    `and ${count(index.summary.n_passed)} pass.`;
}
