"use strict";
// A text: each token's latents by level, and what each level adds to the reconstruction.

const textState = { level: -1 }; // −1: all levels together

async function textView(number, place) {
  const text = await load(`text-${number}`);
  const { latent } = state();
  const base = latent === undefined ? { text: number } : { text: number, latent };
  const nLevels = text.total.length;
  const run = text.tokens.map((_, i) => i).filter((i) => text.latents[i]);
  const chosen = run.includes(place) ? place : undefined;
  const choose = (i) => location.replace(address({ ...base, token: i }));
  const gain = (shares, level) => shares[level] - (level ? shares[level - 1] : 0);
  const largest = Math.max(1e-9, ...run.map((i) => gain(text.explained[i], textState.level)));
  const share = (i) => textState.level < 0 ? text.explained[i][nLevels - 1] : gain(text.explained[i], textState.level);
  const shade = (i) => textState.level < 0 ? share(i) / 2 : share(i) / largest;
  const picker = h("select", { id: "texts", "aria-label": "Text", onchange: (event) => (location.hash = address({ ...base, text: event.target.value })) },
    index.texts.map((start, i) => h("option", { value: i, selected: i === number ? "" : undefined },
      `${i + 1}. ${visible(start).trim().slice(0, 60)}…`)));
  const chips = [-1, ...text.total.keys()].slice(0, nLevels > 1 ? nLevels + 1 : 1).map((level) =>
    h("button", { class: `level c${Math.max(0, level) % 6}`, "aria-pressed": String(level === textState.level), onclick: () => {
      textState.level = level;
      refreshText();
    } }, level < 0 ? "all levels" : `level ${level + 1}`));
  const tokens = h("p", {
    class: `text ${textState.level < 0 ? "c0" : `c${textState.level % 6}`}`, id: "tokens", dir: "auto", tabindex: "0", role: "group",
    "aria-label": "The text; arrow keys move from token to token",
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const i = run.indexOf(chosen) + step;
      if (i >= 0 && i < run.length) choose(run[i]);
    },
  }, text.tokens.map((token, i) => text.latents[i]
    ? shaded(visible(token), shade(i), i === chosen, `${percent(Math.max(0, share(i)))}`, { onclick: () => choose(i), "data-token": i })
    : h("span", { class: "quiet" }, visible(token))));
  return h("div", { id: "text" },
    h("div", { class: "tools" }, picker),
    h("p", { class: "quiet" }, "Each token is shaded by how much of its activation is explained: 1 − ‖x − x̂‖² / ‖x − mean‖², " +
      "by all levels, or by what one level adds, relative to the most. Grey tokens were left out of training, so the SAE is not run on them. Click a token, or use the arrow keys."),
    h("div", { class: "tools", role: "group", "aria-label": "Shade by" }, chips),
    tokens,
    levelBars("This text", text.total),
    place !== undefined && chosen === undefined ? h("p", { class: "quiet" }, "The SAE is not run on this token.") : null,
    chosen === undefined ? null : h("div", { id: "token" },
      h("h3", {}, "Token ", h("bdi", { class: "chip" }, visible(text.tokens[chosen]))),
      levelBars("This token", text.explained[chosen]),
      tokenLatents(text.latents[chosen])));
}

// Explained so far, as one bar of a part per level.
function levelBars(title, shares) {
  const gains = shares.map((value, i) => value - (i ? shares[i - 1] : 0));
  const last = shares[shares.length - 1];
  return h("div", { class: "levels-added" },
    h("p", {}, `${title}: ${last < 0 ? "nothing" : percent(last)} explained`),
    h("div", { class: "stack", "aria-hidden": "true" }, gains.map((gain, i) =>
      h("span", { class: `c${i % 6}`, style: `width:${Math.max(0, 100 * gain)}%` }))),
    shares.length > 1 && h("p", { class: "quiet gains" }, gains.map((gain, i) => h("span", {},
      h("span", { class: `badge c${i % 6}` }, i + 1), `${gain < 0 ? "−" : "+"}${percent(Math.abs(gain))}`))));
}

function tokenLatents(flat) {
  const byLevel = startOfLevel.map(() => []);
  for (let i = 0; i < flat.length; i += 2) byLevel[levelOf(flat[i])].push([flat[i], flat[i + 1]]);
  return byLevel.map((latents, level) => latents.length ? [
    hasLevels() ? h("h4", {}, `Level ${level + 1}`) : null,
    h("ul", { class: "plain" }, latents.map(([latent, activation]) =>
      h("li", {}, latentLink(latent), h("span", { class: "cell" }, short(activation)))))] : null);
}

async function refreshText() {
  const { text, token } = state();
  const view = await textView(Number(text), token === undefined ? undefined : Number(token));
  const hadFocus = document.activeElement && document.activeElement.id === "tokens";
  document.getElementById("left").replaceChildren(view);
  if (hadFocus) document.getElementById("tokens").focus();
}
