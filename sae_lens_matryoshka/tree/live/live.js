"use strict";
// The served page: read a text of your own, steer latents, keep labels in a file. Comes after the page's own scripts.

const CHANGES = { add: "add to the activation", set: "set the activation to", scale: "scale the activation by", ablate: "ablate" };
const WHAT = { latent: "alone", family: "and its children", level: "and its whole level" };
const steering = { mode: "add", latent: undefined, changes: [] }; // the latent seen last; of {what, latent, value, max}

const style = new CSSStyleSheet();
style.replaceSync(`
  #live { border-top: 1px solid var(--line); padding: .5rem 1.75rem .7rem; max-height: 62vh; overflow-y: auto; flex: none; }
  #live > summary { cursor: pointer; color: var(--quiet); font-size: .9rem; }
  #live textarea { width: 100%; height: 3.6rem; margin: .6rem 0 .3rem; resize: vertical; font: inherit; color: inherit;
    background: var(--panel); border: 1px solid var(--line); border-radius: 7px; padding: .4rem .65rem; }
  #live input[type=number] { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line); border-radius: 7px; padding: .2rem .4rem; width: 5.5rem; }
  #live .tools { padding: .35rem 0; }
  #live #live-status:empty { display: none; }
  #changes li { justify-content: flex-start; }
  #changes input[type=range] { flex: 0 1 14rem; min-width: 5rem; accent-color: var(--level); }
  #changes .latent { flex: 0 1 24rem; }
  #written { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0 1.5rem; }
  #written h3 { margin: .5rem 0 .1rem; }
  #written p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; }
  @media ${narrow.media} {
    #live { padding: .4rem 1rem .5rem; }
    #written { grid-template-columns: 1fr; }
    #changes li { flex-wrap: wrap; }
    #changes .latent { flex-basis: 100%; }
    #changes input[type=range] { flex: 1 1 5rem; }
  }
`);
document.adoptedStyleSheets = [style];

async function ask(path, values) {
  const response = await fetch(path, values && {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

const byId = (id) => document.getElementById(id);
const say = (text) => (byId("live-status").textContent = text);

// Runs a request of a button, one at a time, and says how it goes.
async function busy(text, work) {
  const buttons = [byId("read"), byId("generate")];
  buttons.forEach((button) => (button.disabled = true));
  say(text);
  try {
    await work();
    say("");
  } catch (error) {
    say(error.message);
  }
  buttons.forEach((button) => (button.disabled = false));
}

const readText = () => busy("Reading the text …", async () => {
  const text = byId("prompt").value;
  const answer = await ask("live/text", { text });
  const number = index.texts.push(text.slice(0, 120)) - 1;
  files.set(`text-${number}`, { promise: Promise.resolve(answer) });
  location.hash = address({ text: number });
});

const generate = () => busy("Generating three texts …", async () => {
  const { mode, changes } = steering;
  if (!changes.length) throw new Error("Choose a latent in the forest and add it to the list first.");
  const answer = await ask("live/steer", {
    prompt: byId("prompt").value, mode, changes: changes.map(({ what, latent, value }) => ({ what, latent, value })),
    new_tokens: Number(byId("new-tokens").value), seed: Number(byId("seed").value),
  });
  const others = answer.control_latents;
  const control = others.length > 4 ? `${count(others.length)} random latents` : `latent ${others.join(", ")}`;
  const column = (id, title, note, text) => h("div", { id },
    h("h3", {}, title), h("p", { class: "quiet" }, note), h("p", { dir: "auto" }, text));
  byId("written").replaceChildren(
    column("unsteered", "Unsteered", "the model as it is", answer.unsteered),
    column("steered", "Steered", CHANGES[mode], answer.steered),
    column("control", "Control", `${control} of the same level, a change of the same norm`, answer.control));
});

async function addChange() {
  const { latent } = steering;
  if (latent === undefined) return say("Choose a latent in the forest first.");
  const { max } = await detailOf(latent);
  const change = { what: byId("what").value, latent, max: Math.max(1, Math.ceil(max)) };
  steering.changes = steering.changes.filter((other) => other.what !== change.what || other.latent !== change.latent);
  steering.changes.push({ ...change, value: startOf(change) });
  say("");
  drawChanges();
}

const startOf = ({ max }) => (steering.mode === "scale" ? 2 : max);

function drawChanges() {
  byId("changes").replaceChildren(...steering.changes.map((change) => {
    const isScale = steering.mode === "scale";
    const most = isScale ? 5 : 2 * change.max;
    const range = { min: steering.mode === "add" ? -most : 0, max: most, step: isScale ? 0.1 : 0.5, value: change.value };
    const inputs = ["range", "number"].map((type) => h("input", {
      type, ...range, "aria-label": `Value for latent ${change.latent}`, oninput: (event) => {
        change.value = Number(event.target.value);
        inputs.forEach((input) => input !== event.target && (input.value = change.value));
      },
    }));
    inputs[1].removeAttribute("min");
    inputs[1].removeAttribute("max");
    return h("li", { class: colour(change.latent) }, latentLink(change.latent),
      change.what === "latent" ? null : h("span", { class: "quiet" }, WHAT[change.what]),
      steering.mode === "ablate" ? null : inputs,
      h("button", { "aria-label": `Remove latent ${change.latent}`, onclick: () => {
        steering.changes = steering.changes.filter((other) => other !== change);
        drawChanges();
      } }, "×"));
  }));
}

function noteLatent() {
  const { latent } = state();
  if (latent in index.fired) steering.latent = Number(latent);
  byId("seen").textContent = steering.latent === undefined ? "a latent that you choose in the forest" : `latent ${steering.latent}`;
}

function livePanel(limits) {
  const options = (texts) => Object.entries(texts).map(([value, text]) => h("option", { value }, text));
  const mode = h("select", { id: "mode", onchange: (event) => {
    steering.mode = event.target.value;
    steering.changes.forEach((change) => (change.value = startOf(change)));
    drawChanges();
  } }, options(CHANGES));
  return h("details", { id: "live", open: narrow.matches ? undefined : "" },
    h("summary", {}, "Live: the latents of a text of your own, and steering"),
    h("textarea", { id: "prompt", maxlength: limits.text, "aria-label": "Text", placeholder: "Type a text, for instance: The weather today is" }),
    h("div", { class: "tools" },
      h("button", { id: "read", onclick: readText }, "Show its latents"),
      h("button", { id: "generate", onclick: generate }, "Continue it, steered"),
      h("label", {}, "up to ", h("input", { id: "new-tokens", type: "number", min: 1, max: limits.new_tokens, value: 30 }), " tokens"),
      h("label", {}, "seed ", h("input", { id: "seed", type: "number", min: 0, value: 0 })),
      h("span", { id: "live-status", role: "status" })),
    h("div", { class: "tools" },
      h("label", {}, "Steer with ", h("b", { id: "seen" }), " ", h("select", { id: "what" }, options(WHAT))),
      h("button", { id: "add", onclick: addChange }, "Add to the list"),
      h("label", {}, "Change: ", mode)),
    h("ul", { id: "changes", class: "plain" }),
    h("div", { id: "written" }));
}

// Labels go to the server, half a second after the last key.
whereLabelsAre = "Labels are saved in labels.json beside the page.";
const setLabelHere = setLabel;
const waiting = new Map();
setLabel = (latent, text) => {
  setLabelHere(latent, text);
  clearTimeout(waiting.get(latent));
  waiting.set(latent, setTimeout(() =>
    ask("live/label", { latent, label: text }).catch((error) => say(`The label was not saved: ${error.message}`)), 500));
};

load("index").then(async () => {
  const { labels: saved, limits } = await ask("live/state");
  document.querySelector("header").after(livePanel(limits));
  noteLatent();
  addEventListener("hashchange", noteLatent);
  labels = saved;
  shown = {}; // drawn again, with these labels
  await show();
}).catch(showError);
