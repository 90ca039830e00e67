// fluxmesh's page: a form, what is being painted, what is finished, and the hosts behind it.
//
// Everything comes from this server; nothing is built. `server.js` asks, `composer.js` is the form
// (with `sizes.js`, `attachments.js` and the brush of `masking.js`), `jobs.js` what is being painted,
// `gallery.js` what is finished, `mesh.js` the hosts, `dom.js` and `theme.js` what all of them need.

import { ask } from "./server.js";
import { Composer, isEditor } from "./composer.js";
import { $, make, memory, tell } from "./dom.js";
import { Gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";
import { MeshView } from "./mesh.js";
import { startTheme } from "./theme.js";

const VARIED = 0.6; // how much changes of a picture that is varied
const RETRY = 3000; // milliseconds until a server that did not answer is asked again
const SETTINGS = ["steps", "guidance", "adapters"]; // of a recipe, as a request has them
const OF_THE_MODEL = ["negative_prompt", "cfg", "bits", "text_bits", "dtype", "cache", "t5_padding", "fuse_adapters"]; // another may take none
const EXAMPLES = [
  "a red apple to the left of a dog on a yellow background",
  "two cats on a blue background",
  "a green house on a pink background",
];

startTheme();
const composer = new Composer(send, showHint);
const gallery = new Gallery({ again, vary, edit, reuse }, (name) => composer.guided(name));
const jobs = new Jobs({
  ended: showFinished,
  changed: () => mesh.look(),
  view: (name) => gallery.open(name),
});
const mesh = new MeshView({
  heard: ({ queue }) => jobs.hear(queue),
  cancel: (id) => jobs.cancel(id).catch((error) => tell(error.message)),
});

let asking = 0;

/** The newest pictures, however long the server can't be reached. */
function showFinished() {
  clearTimeout(asking);
  gallery.load().catch(() => { asking = setTimeout(showFinished, RETRY); });
}

/** How a picture was painted, as a request; another seed is drawn for it. */
function request({ recipe, width, height }) {
  const { prompt, model } = recipe;
  const known = composer.models.some(({ name }) => name === model);
  const names = known ? [...SETTINGS, ...OF_THE_MODEL] : SETTINGS;
  const said = names.map((name) => [name, recipe[name]]).filter(([, value]) => value !== null && value !== "" && value?.length !== 0);
  return { prompt, model: known ? model : undefined, width, height, ...Object.fromEntries(said), n_images: 1 };
}

/** Sends a request. Throws `ApiError`. */
async function send(fields) {
  try {
    await jobs.submit(fields);
  } catch (error) {
    if (error.code === "model_not_found") composer.load().catch(() => {}); // there are others now
    throw error;
  }
}

async function submit(fields) {
  try {
    await send(fields);
    scrollTo({ top: 0 });
    $("prompt").focus({ preventScroll: true });
  } catch (error) {
    composer.fail(error.message, error.setting);
    scrollTo({ top: 0 });
  }
}

function again(picture) {
  return submit(request(picture));
}

async function pixels(picture) {
  const response = await fetch(picture.url);
  if (!response.ok) throw new Error("The picture can't be read any more.");
  return response.blob();
}

async function vary(picture) {
  const blob = await pixels(picture).catch((error) => composer.fail(error.message));
  if (!blob) return;
  const data = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let k = 0; k < data.length; k += 8192) text += String.fromCharCode(...data.subarray(k, k + 8192));
  await submit({ ...request(picture), image: btoa(text), strength: VARIED });
}

async function edit(picture) {
  composer.attachments.clear();
  composer.fill(picture.recipe, { seed: false });
  try {
    const { editor, model } = composer;
    const role = editor && editor === model ? "references" : "image";
    await composer.attachments.add(await pixels(picture), role);
  } catch (error) {
    composer.fail(error.message);
  }
}

function reuse(picture) {
  composer.fill(picture.recipe);
}

function showExamples() {
  $("examples").replaceChildren(
    ...EXAMPLES.map((prompt) => {
      const button = make("button", { type: "button", textContent: prompt });
      button.addEventListener("click", () => {
        $("prompt").value = prompt;
        $("prompt").dispatchEvent(new Event("input"));
        $("prompt").focus();
      });
      return make("li", {}, button);
    }),
  );
}

/** What the chosen model is, where there are none but those that come with fluxmesh. */
function showHint() {
  const { model, models } = composer;
  $("hint").hidden = !model || !models.every(({ embedded }) => embedded) || memory.get("hint") === "seen";
  if ($("hint").hidden) return;
  const { width, height } = model.size;
  const edits = isEditor(model) ? ", and edits what it has painted: “make the background blue”" : "";
  $("hint-words").replaceChildren(
    make("strong", { textContent: model.name }),
    ` is a small model that comes with fluxmesh, to try everything out. It paints everyday things at ${width} × ${height}${edits}. For FLUX, run `,
    make("code", { textContent: "fluxmesh models pull klein" }),
    " in a terminal.",
  );
}

$("hint-close").addEventListener("click", () => {
  memory.set("hint", "seen");
  showHint();
  $("prompt").focus();
});

// Meanwhile others may have painted, and models may have come.
document.addEventListener("visibilitychange", () => {
  if (document.hidden || !document.documentElement.dataset.ready) return;
  showFinished();
  composer.load().catch(() => {});
});

async function start() {
  try {
    await composer.load();
    await gallery.load();
  } catch (error) {
    if (error.code !== "offline") composer.fail(error.message);
    setTimeout(start, RETRY);
    return;
  }
  showExamples();
  mesh.look();
  document.documentElement.dataset.ready = "yes";
}

// A finger does not want a keyboard over half of the page before it has asked for one.
if (matchMedia("(hover: hover)").matches) $("prompt").focus();
start();
export { ask, composer, gallery, jobs };
