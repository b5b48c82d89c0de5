"use strict";
// The page of the server: from a dropped MR, or one of its studies, to the synthetic CT in the viewer.

const element = (id) => document.getElementById(id);
let session = null; // of the last upload, removed with the next one
let busy = false;

function say(step, share) {
  element("work").hidden = !step;
  element("step").textContent = step;
  if (share === undefined) element("progress").removeAttribute("value");
  else element("progress").value = share;
}

// All files of what was dropped, those in folders too.
async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), found = [];
  for (;;) {
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) break;
    found.push(...some);
  }
  return (await Promise.all(found.map(filesOf))).flat();
}

async function answerOf(response) {
  if (response.ok) return response;
  const text = await response.text();
  let detail = text;
  try { detail = JSON.parse(text).detail; } catch { /* not JSON */ }
  throw new Error(typeof detail === "string" ? detail : JSON.stringify(detail));
}

// Upload, with progress; returns the id of the session.
function upload(files) {
  const form = new FormData();
  const single = files.length === 1;
  files.forEach((file, n) => form.append("files", file, single ? file.name : `${n}_${file.name}`));
  const zip = single && /\.zip$/i.test(files[0].name);
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("PUT", `/session/?uncompress=${zip}`);
    request.upload.onprogress = (event) => say("sending the MR", event.loaded / event.total);
    request.upload.onload = () => say("reading the MR");
    request.onerror = () => failed(new Error("the server does not answer"));
    request.onload = () => answerOf(new Response(request.response, { status: request.status }))
      .then((response) => response.json()).then((answer) => done(answer.session_id), failed);
    request.send(form);
  });
}

// The options are those of the request: samples, seed and the format of the answer.
async function synthesise(query, options) {
  const started = Date.now();
  const clock = setInterval(() => say(`synthesising, ${Math.round((Date.now() - started) / 1000)} s`), 500);
  say("synthesising");
  try {
    const form = new FormData();
    form.append("params", JSON.stringify(options));
    const response = await answerOf(await fetch(`/infer/synthetic_ct?${query}`, { method: "POST", body: form }));
    const parts = await response.formData();
    return { answer: JSON.parse(parts.get("params")), sct: parts.get("image") };
  } finally {
    clearInterval(clock);
  }
}

async function volume(name, kind, address) {
  const response = await answerOf(await fetch(address));
  return { name, kind, file: `${kind}.nii.gz`, data: new Uint8Array(await response.arrayBuffer()) };
}

function save(blob, file) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: file });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// A DICOM CT series of the same synthetic CT, which the server makes again from the same seed.
function dicomButton(stem, query, options) {
  const button = Object.assign(document.createElement("button"), {
    type: "button", className: "button", textContent: "Download synthetic CT (DICOM)", title: "a CT series in a zip; the server synthesises it again",
  });
  button.onclick = () => alone(async () => {
    const { sct } = await synthesise(query, { ...options, result_extension: ".zip" });
    save(sct, `${stem}_sct_dicom.zip`);
  });
  return button;
}

async function show(name, query, options, answer, sct) {
  say("opening the viewer");
  const stem = name.replace(/\.(nii|nii\.gz|nrrd|mha|zip)$/i, "");
  const data = new Uint8Array(await sct.arrayBuffer());
  const layers = [await volume("MR", "MR", `/volume?${query}`), { name: "synthetic CT", kind: "HU", file: "HU.nii.gz", data }];
  const downloads = { "synthetic CT (NIfTI)": [URL.createObjectURL(new Blob([data])), `${stem}_sct.nii.gz`] };
  for (const [title, address] of Object.entries(answer.files ?? {})) downloads[title] = [address, ""];
  if (answer.files?.SD) {
    layers.push(await volume("SD", "SD", answer.files.SD));
    downloads.SD[1] = `${stem}_sct_sd.nii.gz`;
  }
  element("name").textContent = name;
  element("warnings").replaceChildren(...answer.warnings.map((text) => {
    const line = document.createElement("p");
    line.className = "warning";
    line.textContent = text;
    return line;
  }));
  element("downloads").replaceChildren(...Object.entries(downloads).flatMap(([title, [address, file]]) => {
    const link = Object.assign(document.createElement("a"), { href: address, download: file, textContent: `Download ${title}` });
    return [link, " "];
  }), dicomButton(stem, query, options));
  element("record").textContent = JSON.stringify(answer, null, 1);
  element("result").hidden = false;
  if (element("result-viewer")) await openViewer(element("result-viewer"), layers);
}

// One task at a time; a failure is said on the page.
async function alone(task) {
  if (busy) { element("problem").textContent = "One MR at a time: wait until this one is finished."; return; }
  busy = true;
  element("problem").textContent = "";
  try {
    await task();
  } catch (error) {
    element("problem").textContent = error.message;
  } finally {
    busy = false;
    say("");
  }
}

function work(name, files, image) {
  return alone(async () => {
    let query = `image=${encodeURIComponent(image)}`;
    if (files) {
      const size = files.reduce((sum, file) => sum + file.size, 0), limit = +element("drop").dataset.limit;
      if (!files.length) throw new Error("there is no file in it");
      if (size > limit) throw new Error(`${name} has ${(size / 1e9).toFixed(1)} GB, more than ${limit / 1e9}; drop a smaller MR`);
      forget();
      element("result").hidden = true; // its MR is gone from the server
      session = await upload(files);
      query = `session_id=${session}`;
    }
    const options = { num_samples: +element("samples").value, seed: +element("seed").value };
    const { answer, sct } = await synthesise(query, { ...options, result_extension: ".nii.gz" });
    await show(name, query, options, answer, sct);
  });
}

function forget() {
  if (session) fetch(`/session/${session}`, { method: "DELETE", keepalive: true });
  session = null;
}

async function listStudies() {
  const answer = await (await answerOf(await fetch("/datastore/?output=all"))).json();
  const items = Object.keys(answer.objects ?? {}).sort().map((image) => {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "button", textContent: image });
    button.onclick = () => work(image, null, image);
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  element("studies").replaceChildren(...(items.length ? items : ["none"]));
}

addEventListener("DOMContentLoaded", () => {
  const drop = element("drop");
  addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", () => drop.classList.remove("over"));
  addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    const files = entries.length ? (await Promise.all(entries.map(filesOf))).flat() : [...event.dataTransfer.files];
    work(entries[0]?.name ?? files[0]?.name ?? "", files);
  });
  for (const id of ["file", "folder"]) {
    element(id).onchange = (event) => {
      const files = [...event.target.files];
      work(files[0]?.webkitRelativePath.split("/")[0] || files[0]?.name || "", files);
      event.target.value = "";
    };
  }
  addEventListener("pagehide", forget);
  listStudies().catch((error) => { element("studies").textContent = error.message; });
});
