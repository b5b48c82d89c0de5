"use strict";
// One viewer of volumes on one grid: two layers at a time, the upper faded over the lower.

const WINDOWS = { soft: [-160, 240], bone: [-450, 1050], lung: [-1350, 150] }; // 400/40, 1500/300, 1500/-600 HU
const DIVERGING = { R: [0, 60, 255, 230, 120], G: [30, 130, 255, 90, 0], B: [120, 255, 255, 60, 20],
                    A: [230, 200, 0, 200, 230], I: [0, 90, 128, 166, 255] };
const STEPS = { ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
                PageUp: [0, 0, 1], PageDown: [0, 0, -1] }; // voxels to the right, front and head; the right is on the left

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

// NiiVue is kept packed until the first viewer is opened.
async function loadNiivue() {
  if (globalThis.Niivue) return;
  const packed = document.getElementById("niivue");
  if (!packed) throw new Error("this page was made without the viewer");
  const stream = new Blob([bytes(packed.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

class Viewer {
  // root: an element made by the template viewer.html; layers: [{name, kind, high, data: Uint8Array, file}]
  constructor(root, layers) {
    this.root = root;
    this.layers = layers;
    this.window = "soft";
    this.find = (name) => root.querySelector(`[data-part=${name}]`);
  }

  async open() {
    await loadNiivue();
    const canvas = this.find("canvas");
    if (!canvas.getContext("webgl2")) throw new Error("this browser has no WebGL 2");
    const nv = new Niivue({
      isRadiologicalConvention: true, isColorbar: true, backColor: [0, 0, 0, 1], crosshairWidth: 0.6,
      multiplanarShowRender: 0, isSliceMM: false, isResizeCanvas: true, dragAndDropEnabled: false, logLevel: "error",
      isNearestInterpolation: true, loadingText: "", showAllOrientationMarkers: true, crosshairColor: [0.3, 0.75, 1, 0.7],
      multiplanarPadPixels: 24, sagittalNoseLeft: true, fontColor: [0.85, 0.85, 0.85, 1],
    });
    this.nv = nv;
    await nv.attachToCanvas(canvas, false);
    nv.addColormap("difference", DIVERGING);
    for (const layer of this.layers) await nv.loadFromArrayBuffer(layer.data.slice().buffer, layer.file);
    this.images = [...nv.volumes];
    nv.onLocationChange = () => this.tell();
    nv.setSliceType(nv.sliceTypeMultiplanar);
    this.fill();
    this.show(0, Math.min(1, this.layers.length - 1));
    this.root.dataset.state = "open";
  }

  fill() {
    for (const part of ["below", "above"]) {
      const select = this.find(part);
      select.replaceChildren(...this.layers.map((layer, n) => new Option(layer.name, n)));
      select.onchange = () => this.show(+this.find("below").value, +this.find("above").value);
    }
    this.find("fade").oninput = () => this.fade();
    for (const button of this.root.querySelectorAll("[data-window]")) {
      button.onclick = () => { this.window = button.dataset.window; this.show(this.below, this.above); };
    }
    const difference = this.layers.findIndex((layer) => layer.kind === "error");
    this.find("difference").hidden = difference < 0;
    this.find("difference").onclick = () => this.difference(difference);
    this.root.onkeydown = (event) => this.key(event);
    this.find("canvas").tabIndex = 0;
  }

  // Show two layers; each is on the screen with the window of its kind.
  show(below, above) {
    [this.below, this.above] = [below, above];
    [this.find("below").value, this.find("above").value] = [below, above];
    const shown = below === above ? [below] : [below, above];
    this.nv.volumes = shown.map((n) => this.images[n]);
    for (const n of shown) this.adjust(this.images[n], this.layers[n]);
    for (const button of this.root.querySelectorAll("[data-window]")) {
      button.setAttribute("aria-pressed", button.dataset.window === this.window);
    }
    this.find("difference").setAttribute("aria-pressed", this.layers[above].kind === "error");
    this.fade();
  }

  adjust(image, layer) {
    const [low, high] = layer.kind === "HU" ? WINDOWS[this.window]
      : layer.kind === "error" ? [-layer.high, layer.high] : [0, layer.high];
    image.colormap = { error: "difference", SD: "inferno" }[layer.kind] || "gray"; // resets the window
    image.cal_min = low;
    image.cal_max = high;
  }

  fade() {
    const share = this.find("fade").value / 100;
    this.nv.volumes[0].opacity = 1;
    if (this.nv.volumes[1]) this.nv.volumes[1].opacity = share;
    this.find("share").textContent = `${Math.round(100 * share)} %`;
    this.nv.updateGLVolume();
    this.tell();
  }

  difference(layer) {
    if (this.layers[this.above].kind === "error") this.show(this.below, this.before ?? Math.min(1, layer - 1));
    else { this.before = this.above; this.show(this.below, layer); }
  }

  // Position and values under the crosshair, read from the volumes, not from the screen.
  values() {
    const mm = this.nv.frac2mm(this.nv.scene.crosshairPos, 0, true); // true: of oblique volumes too
    const vox = this.images[0].mm2vox([mm[0], mm[1], mm[2]]);
    const values = this.images.map((image) => image.getValue(...vox));
    return { mm: [...mm].slice(0, 3), vox: [...vox].slice(0, 3), values };
  }

  tell() {
    const { mm, values } = this.values();
    const unit = (layer) => (layer.kind === "MR" ? "" : " HU");
    const texts = this.layers.map((layer, n) => `${layer.name} ${Math.round(values[n])}${unit(layer)}`);
    const sides = [mm[0] < 0 ? "L" : "R", mm[1] < 0 ? "P" : "A", mm[2] < 0 ? "I" : "S"];
    const place = mm.map((x, n) => `${sides[n]} ${Math.abs(x).toFixed(1)}`).join("  ");
    this.find("place").textContent = `${place} mm`;
    this.find("values").textContent = texts.join("  ·  ");
  }

  key(event) {
    if (event.target.matches("input, select")) return;
    const index = { 1: "soft", 2: "bone", 3: "lung" }[event.key];
    if (STEPS[event.key]) this.nv.moveCrosshairInVox(...STEPS[event.key]);
    else if (index) { this.window = index; this.show(this.below, this.above); }
    else if (event.key === "d" && !this.find("difference").hidden) this.find("difference").click();
    else if (event.key === " ") { const fade = this.find("fade"); fade.value = fade.value > 50 ? 0 : 100; this.fade(); }
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  close() {
    this.find("canvas").replaceWith(this.find("canvas").cloneNode());
    this.nv?.gl?.getExtension("WEBGL_lose_context")?.loseContext();
    delete this.root.dataset.state;
  }
}

// Opens the viewer of an element; what keeps it from opening is said in its place. Browsers allow few at a time.
async function openViewer(root, layers) {
  globalThis.viewer?.close();
  globalThis.viewer = null;
  root.dataset.state = "loading";
  const viewer = new Viewer(root, layers);
  try {
    await viewer.open();
    globalThis.viewer = viewer;
  } catch (error) {
    root.dataset.state = "failed";
    root.querySelector("[data-part=problem]").textContent =
      `The interactive viewer cannot be shown: ${error.message}. The pictures show the same volumes.`;
  }
}

function storedLayers(root) {
  return [...document.getElementById(root.dataset.layers).content.children].map((element) => ({
    ...element.dataset, high: +element.dataset.high, data: bytes(element.textContent),
  }));
}

addEventListener("DOMContentLoaded", () => {
  for (const root of document.querySelectorAll(".viewer[data-layers]")) {
    const open = () => openViewer(root, storedLayers(root));
    root.querySelector("[data-part=open]").onclick = open;
    if (root.dataset.now) open();
  }
});
