"use strict";
// What the numbers mean, and where to start.

function aboutView() {
  const { summary, settings } = index;
  const { rules, source } = settings;
  const roots = index.parent.map((_, latent) => latent).filter((latent) => index.parent[latent] < 0 && drawnChildren[latent].length);
  const first = sorted(roots, index.has_words ? orders.variety : orders.evidence).slice(0, 8);
  return h("article", { id: "about" },
    h("a", { class: "back", href: address(withoutLatent()) }, "‹ back"),
    h("h2", {}, "Which latents specialise which"),
    h("p", {}, "A latent is one direction that the sparse autoencoder has learned. It fires on tokens whose activation contains that " +
      "direction. A child specialises its parent: nearly wherever the child fires the parent fires too, and the parent also elsewhere."),
    first.length ? [h("h3", {}, "Start here"), h("p", {}, index.has_words
      ? "General latents whose children differ most, and three of these. Click one for its examples, and there the bar of a parent or a child for the evidence. The words are the tokens that a latent fires on most often among its examples."
      : "The latents that say most about their children."),
      h("ul", { class: "plain" }, first.map(startingPoint))] : null,
    hasLevels() ? [h("h3", {}, "Levels"),
      h("p", {}, "The first latents reconstruct the activation alone, and so learn what is general; each level adds latents that learn what is left."),
      h("ul", { class: "plain" }, startOfLevel.map((_, level) =>
        h("li", {}, h("span", {}, h("span", { class: `badge c${level % 6}` }, level + 1), ` ${levelTitle(level)}`))))]
      : h("p", { class: "warning" }, "This SAE has no levels: a parent is any latent that fires more often, and columns are generations."),
    h("h3", {}, "What an edge has to pass"),
    h("p", {}, `${count(summary.n_looked_at)} pairs of a ${hasLevels() ? "parent of an inner level" : "more frequent parent"} and a rarer child were ` +
      `looked at. In ${count(summary.n_tested)} the parent fires on at least ${percent(rules.min_coverage)} of the child's tokens; ` +
      `${count(summary.n_passed)} of them pass.`),
    rules.edges === "tested" ? h("ol", {},
      h("li", {}, h("b", {}, "Coverage. "), "The share of the child's tokens where the parent fires, beyond how often it fires anyway."),
      h("li", {}, h("b", {}, "Not only the topic. "), "Beyond how often the parent fires on the tokens around, where the child is silent."),
      h("li", {}, h("b", {}, "Not chance. "), "A p-value for two latents that keep their rate and their clusters, corrected for all pairs."),
      h("li", {}, h("b", {}, "Presence. "), "Where the child fires, the activations really contain the parent's direction."),
      h("li", {}, h("b", {}, "Direction. "), "The parent's decoder row is among the nearest to the direction in which the activations differ where the child fires."))
      : h("p", { class: "warning" }, "Only coverage was asked for: these edges did not have to pass any other test."),
    h("p", {}, nullSentence()),
    h("p", { class: "quiet" }, "An edge says that one latent's tokens are nearly all tokens of another, and nothing about what they mean. " +
      "Read the examples. In the forest a latent stands under its strongest parent alone; its own page lists all. “Variety of children”, by which the forest is sorted, counts the children with words that neither the parent nor a stronger child has; dense latents, which fire on more than a tenth of the tokens, come last. “Evidence” is the mutual information of the two firings in bits per token, summed over the children."),
    h("h3", {}, "Latents that can't be tested"),
    h("p", {}, `${count(summary.n_dead)} never fire on these tokens; ${count(summary.n_rare)} fire on fewer than ${rules.min_firings}.`),
    h("h3", {}, "Characters in several tokens"),
    h("p", {}, "Some tokens are only a part of a character, as of an emoji. In a text the character stands at its first token, and · at the others. A token alone " +
      "is shown by its bytes, as ⟨E2 80⟩. ↵ is the end of a line, ␣ a space."),
    h("h3", {}, "Keys"),
    h("p", {}, h("kbd", {}, "/"), " searches; in the forest ", h("kbd", {}, "↑"), " ", h("kbd", {}, "↓"), " move, ", h("kbd", {}, "→"), " ",
      h("kbd", {}, "←"), " open and close a family, ", h("kbd", {}, "Enter"), " shows a latent, ", h("kbd", {}, "Esc"), " clears the search."),
    h("p", { class: "quiet" }, source.dataset ? `Texts: ${source.dataset}. Model: ${source.model}. ` : `Activations: ${source.activations}. `,
      `Nothing on this page is loaded from a network. ${whereLabelsAre}`));
}

// A general latent and three of its children, those with words of their own first.
function startingPoint(latent) {
  const children = sorted(drawnChildren[latent], index.has_words ? orders.variety : orders.evidence).slice(0, 3);
  return h("li", { class: "start" }, latentLink(latent), h("span", { class: "cell" }, counted(drawnChildren[latent].length, "child", "children")),
    h("div", { class: "some quiet" }, children.map((child) => h("div", {}, "↳ ", latentLink(child)))));
}
