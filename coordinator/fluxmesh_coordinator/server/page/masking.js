// The brush: strokes over a picture, which become a mask that is white where it is painted anew.
// By pointer, by finger, or by keys: arrows move it, Space puts it down and lifts it again.

import { $ } from "./dom.js";

const TINT = "rgb(110 70 255)"; // seldom a colour of the picture
const SHOWN = 0.55; // how much of the tint lies over the picture
const ROOM = 900; // pixels: the window's width at most
const MARGIN = 32; // around the picture
const TOOLS = 250; // above and below it
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const NEAR = 1 / 50; // of the shorter side, that an arrow moves the brush
const FAR = 1 / 8; // with Shift
const KEYS = "Arrows move the brush, with Shift further. Space puts it down, E erases, [ and ] change its size.";
const DOWN = "The brush is down: arrows paint. Space lifts it.";
const DOWN_ERASING = "The eraser is down: arrows erase. Space lifts it.";

class Mask {
  constructor(picture) {
    this.picture = picture;
    this.strokes = []; // {points: [[x, y], …], size, erases}: in pixels of the picture
    this.layer = document.createElement("canvas");
    this.layer.width = picture.naturalWidth;
    this.layer.height = picture.naturalHeight;
  }

  /** Paints the strokes in one colour onto the layer, from nothing. */
  draw(colour) {
    const pen = this.layer.getContext("2d");
    pen.globalCompositeOperation = "source-over";
    pen.clearRect(0, 0, this.layer.width, this.layer.height);
    pen.lineCap = pen.lineJoin = "round";
    pen.strokeStyle = pen.fillStyle = colour;
    for (const { points, size, erases } of this.strokes) {
      pen.globalCompositeOperation = erases ? "destination-out" : "source-over";
      pen.lineWidth = size;
      pen.beginPath(); // a tap is a line without length, which is not drawn: a dot is
      pen.arc(...points[0], size / 2, 0, 2 * Math.PI);
      pen.fill();
      pen.beginPath();
      for (const point of points) pen.lineTo(...point);
      pen.stroke();
    }
  }

  /** Whether anything of it is painted. */
  get isEmpty() {
    return !this.strokes.some(({ erases }) => !erases);
  }

  /** The mask as PNG: white where it is painted anew, black elsewhere. */
  async png() {
    this.draw("#fff");
    const whole = document.createElement("canvas");
    whole.width = this.layer.width;
    whole.height = this.layer.height;
    const pen = whole.getContext("2d");
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, whole.width, whole.height);
    pen.drawImage(this.layer, 0, 0);
    return new Promise((made) => whole.toBlob(made, "image/png"));
  }
}

/** Lets somebody brush over `picture` (an image element); resolves to {blob, strokes}, or null. */
export function brush(picture, strokes = []) {
  const dialog = $("masking");
  const canvas = $("mask-canvas");
  const mask = new Mask(picture);
  mask.strokes = [...strokes];
  const { naturalWidth: width, naturalHeight: height } = picture;
  // As large as there is room, small pictures too, so that a finger finds its way.
  const scale = Math.min((Math.min(innerWidth, ROOM) - MARGIN) / width, (innerHeight - TOOLS) / height);
  canvas.style.width = `${Math.floor(width * scale)}px`;
  const fine = Math.max(1, Math.ceil(scale * devicePixelRatio)); // what is drawn over a small one is smooth
  canvas.width = width * fine;
  canvas.height = height * fine;
  const pen = canvas.getContext("2d");
  pen.scale(fine, fine); // from here on all is in pixels of the picture
  const stops = new AbortController();
  const on = (element, kind, hear) => element.addEventListener(kind, hear, { signal: stops.signal });
  let cursor = null;
  let stroke = null; // of the pointer
  let held = null; // of the keys

  const size = () => (Number($("mask-size").value) / 100) * Math.min(width, height);
  const show = () => {
    mask.draw(TINT);
    pen.clearRect(0, 0, width, height);
    pen.globalAlpha = 1;
    pen.drawImage(picture, 0, 0);
    pen.globalAlpha = SHOWN;
    pen.drawImage(mask.layer, 0, 0);
    pen.globalAlpha = 1;
    if (cursor) { // light on dark: it is seen on any picture
      const hair = width / Math.max(1, canvas.clientWidth);
      for (const [thick, colour] of [[3.5, "#0009"], [1.5, "#fff"]]) {
        pen.beginPath();
        pen.arc(...cursor, size() / 2, 0, 2 * Math.PI);
        pen.lineWidth = thick * hair;
        pen.strokeStyle = colour;
        pen.stroke();
      }
    }
    $("mask-undo").disabled = $("mask-clear").disabled = !mask.strokes.length;
    $("mask-done").disabled = mask.isEmpty;
  };
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  };
  const lift = () => {
    held = null;
    $("mask-keys").textContent = KEYS;
  };
  const undo = () => {
    lift();
    mask.strokes.pop();
    show();
  };
  const middle = () => [width / 2, height / 2];
  const move = ([right, down], isFar) => {
    const step = (isFar ? FAR : NEAR) * Math.min(width, height);
    const [x, y] = cursor ?? middle();
    cursor = [Math.min(width, Math.max(0, x + right * step)), Math.min(height, Math.max(0, y + down * step))];
    if (held) held.points.push(cursor);
  };
  const press = () => {
    if (held) return lift();
    cursor ??= middle();
    held = { points: [cursor], size: size(), erases: $("mask-erase").checked };
    mask.strokes.push(held);
    $("mask-keys").textContent = held.erases ? DOWN_ERASING : DOWN;
  };

  on(canvas, "pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    lift();
    stroke = { points: [at(event)], size: size(), erases: $("mask-erase").checked };
    mask.strokes.push(stroke);
    show();
  });
  on(canvas, "pointermove", (event) => {
    cursor = event.pointerType === "touch" ? null : at(event);
    const moves = event.getCoalescedEvents?.() ?? [];
    if (stroke) stroke.points.push(...(moves.length ? moves : [event]).map(at));
    show();
  });
  for (const kind of ["pointerup", "pointercancel"]) on(canvas, kind, () => { stroke = null; });
  on(canvas, "pointerleave", () => { cursor = null; show(); });
  on($("mask-undo"), "click", undo);
  on($("mask-clear"), "click", () => { lift(); mask.strokes = []; show(); });
  on(canvas, "keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (ARROWS[event.key]) move(ARROWS[event.key], event.shiftKey);
    else if (event.key === " ") event.repeat || press();
    else if (event.key.toLowerCase() === "e") { lift(); $("mask-erase").checked = !$("mask-erase").checked; }
    else return;
    event.preventDefault();
    show();
  });
  on(canvas, "focus", () => {
    if (canvas.matches(":focus-visible")) cursor ??= middle(); // whoever came by keys sees where it is
    show();
  });
  on(canvas, "blur", () => { lift(); cursor = null; show(); });
  on($("mask-size"), "input", show);
  on(dialog, "cancel", (event) => {
    if (!held) return;
    event.preventDefault(); // Escape lifts the brush first
    lift();
  });
  on(dialog, "keydown", (event) => {
    const resized = { "[": -2, "]": 2 }[event.key];
    if (resized) {
      $("mask-size").value = Number($("mask-size").value) + resized;
      show();
    } else if ((event.ctrlKey || event.metaKey) && event.key === "z") {
      event.preventDefault();
      undo();
    }
  });
  $("mask-erase").checked = false;
  lift();
  dialog.showModal();
  canvas.focus();
  show();

  return new Promise((decided) => {
    let made = null;
    on($("mask-done"), "click", async () => {
      made = { blob: await mask.png(), strokes: mask.strokes };
      dialog.close();
    });
    on($("mask-cancel"), "click", () => dialog.close());
    on(dialog, "close", () => {
      stops.abort();
      decided(made);
    });
  });
}
