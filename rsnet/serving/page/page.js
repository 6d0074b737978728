// Texts of others (class names, messages) go in by textContent alone, never as HTML.
"use strict";

const by = (id) => document.getElementById(id);
const element = (name, text = "", attributes = {}) => {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const percent = (share) => `${(100 * share).toFixed(1)} %`;
// In three digits, never as 1.2e+3.
const milliseconds = (ms) => String(Number(ms.toPrecision(3)));

let info = null;
let rows = new Map(); // by size
let newest = 0; // of the images that were sent

async function answer(response) {
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(content.detail || `the server says ${response.status}`);
  return content;
}

function say(text, isError = false) {
  by("status").textContent = text;
  by("status").className = isError ? "error" : "";
}

function makeRow(size) {
  const row = element("tr", "", { "data-size": size });
  const top1 = info.accuracy ? `${info.accuracy[size].top1.toFixed(1)} %` : "not known";
  row.append(
    element("th", `${size} × ${size}`, { scope: "row" }),
    element("td", top1, { "data-name": "accuracy" }),
    element("td", "", { class: "class" }),
    element("td", "", { "data-name": "confidence" }),
    element("td", milliseconds(info.latency.ms[size].p95), { "data-name": "ms" }),
  );
  by("rows").append(row);
  rows.set(size, row);
}

function emptyRows() {
  for (const row of rows.values()) {
    const [, , name, confidence] = row.children;
    name.replaceChildren();
    confidence.replaceChildren();
  }
}

function fillRow({ size, ms, top }) {
  const [, , name, confidence] = rows.get(size).children;
  const list = element("ol");
  for (const one of top) list.append(element("li", `${one.class} ${percent(one.probability)}`));
  const details = element("details");
  details.append(element("summary", top[0].class), list);
  details.append(element("p", `This image took ${milliseconds(ms)} ms.`));
  name.replaceChildren(details);
  const meter = element("meter", "", { min: 0, max: 1, "aria-label": `confidence at size ${size}` });
  meter.value = top[0].probability;
  confidence.replaceChildren(meter, ` ${percent(top[0].probability)}`);
}

// The slider is logarithmic, from half of what the fastest size takes to twice the slowest.
function budget() {
  const ms = Object.values(info.latency.ms).map((one) => one.p95);
  const [low, high] = [Math.min(...ms) / 2, Math.max(...ms) * 2];
  return low * (high / low) ** (by("budget").value / 1000);
}

function showChosen() {
  const ms = budget();
  const shown = `${milliseconds(ms)} ms`;
  by("budget-ms").textContent = shown;
  by("budget").setAttribute("aria-valuetext", shown);
  const chosen = info.choices.find((one) => one.from_ms <= ms);
  by("chosen").textContent = chosen
    ? `Size ${chosen.size} would be chosen.`
    : "No size is as fast as that.";
  for (const [size, row] of rows) {
    if (chosen && size === chosen.size) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  }
}

function showImage(file) {
  const image = by("image");
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.alt = `Your image ${file.name}`;
  image.hidden = false;
}

async function classify(file) {
  const number = ++newest;
  if (!info) return;
  emptyRows();
  showImage(file);
  if (file.size > info.max_bytes) {
    say(`The image is too large: ${info.max_bytes / 1e6} MB are allowed.`, true);
    return;
  }
  say("Classifying…");
  try {
    const found = await answer(await fetch("compare", { method: "POST", body: file }));
    if (number !== newest) return;
    found.forEach(fillRow);
    say(`${file.name}: ${found.length} sizes.`);
  } catch (error) {
    if (number === newest) say(`${file.name}: ${error.message}`, true);
  }
}

function listen() {
  const drop = by("drop");
  by("file").addEventListener("change", (event) => {
    if (event.target.files.length) classify(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  for (const name of ["dragover", "drop"]) {
    window.addEventListener(name, (event) => event.preventDefault()); // beside the field, too
  }
  drop.addEventListener("dragover", () => drop.classList.add("over"));
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) classify(event.dataTransfer.files[0]);
  });
  window.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) classify(event.clipboardData.files[0]);
  });
  by("budget").addEventListener("input", showChosen);
}

async function start() {
  try {
    info = await answer(await fetch("info"));
  } catch (error) {
    by("about").textContent = `The server does not answer: ${error.message}`;
    return;
  }
  by("about").textContent = `${info.classes} classes at ${info.sizes.join(", ")} pixels.`;
  for (const place of document.querySelectorAll(".batch")) {
    place.textContent = `batch of ${info.latency.batch_size}`;
  }
  info.sizes.forEach(makeRow);
  showChosen();
  listen();
}

start();
