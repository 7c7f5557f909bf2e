"use strict";
// The page: which views the address asks for.

function showError(error) {
  document.getElementById("right").replaceChildren(h("p", { class: "warning" }, error.message));
}

const narrow = matchMedia("(max-width: 820px)"); // as in page.css
let shown = {}; // the state that is drawn

async function show() {
  const now = state();
  const latent = /^\d+$/.test(now.latent) && Number(now.latent) < index.fired.length ? Number(now.latent) : undefined;
  const isText = now.text in index.texts;
  document.body.className = latent !== undefined || "about" in now ? "detail" : "";
  try {
    if (isText) await refreshText();
    else if (!document.getElementById("forest")) {
      document.getElementById("left").replaceChildren(forestView());
      refreshForest();
    }
    if (!isText) latent === undefined ? drawRows() : reveal(latent);
    if (shown.latent !== now.latent || shown.latent === undefined) {
      const view = latent === undefined ? aboutView() : await latentView(latent);
      if (state().latent !== now.latent) return; // another was chosen meanwhile
      if (now.latent !== undefined && latent === undefined)
        view.prepend(h("p", { class: "warning" }, `There is no latent ${now.latent}: they go from 0 to ${index.fired.length - 1}.`));
      const right = document.getElementById("right");
      right.replaceChildren(view);
      right.scrollTop = 0;
      if (document.body.className === "detail") scrollTo(0, 0);
    }
    shown = now;
    drawNav(isText);
  } catch (error) {
    showError(error);
  }
}

function drawNav(isText) {
  const { text: _, token: __, about: ___, ...wide } = state();
  const others = narrow.matches ? {} : wide; // a phone shows a latent instead of the forest or the text
  const link = (title, href, isHere) => h("a", { href, "aria-current": isHere ? "page" : undefined }, title);
  document.getElementById("nav").replaceChildren(
    link("Forest", address(others), !isText && !(narrow.matches && "about" in state())),
    index.texts.length ? link("Texts", address({ ...others, text: 0 }), isText) : "",
    link("Guide", address({ about: 1 }), "about" in state()),
    h("button", { onclick: exportLabels }, "Export labels"));
}

document.addEventListener("keydown", (event) => {
  const search = document.getElementById("search");
  if (!search) return;
  const isTyping = event.target.matches("input[type=text], input[type=search]");
  if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    search.focus();
    search.select();
  } else if (event.key === "Escape" && forest.query) {
    search.value = forest.query = "";
    const { latent } = state();
    latent === undefined ? refreshForest() : reveal(Number(latent));
  }
});
addEventListener("hashchange", show);
addEventListener("resize", () => scroller() && drawRows());
narrow.addEventListener("change", () => drawNav(state().text in index.texts));

load("index").then((value) => {
  index = value;
  startOfLevel = [0, ...index.settings.sae.widths.slice(0, -1)];
  readLabels();
  prepareForest();
  if (narrow.matches && !location.hash) return location.replace(address({ about: 1 })); // beside the forest on wide screens
  return show();
}).catch(showError);
