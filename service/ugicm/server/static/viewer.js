"use strict";

const $ = (id) => document.getElementById(id);
const PSNR_MAX_PIXELS = 4e6; // a larger picture would hold up the page
const edges = [1 / 3, 2 / 3];
const state = { file: null, original: null, result: null, encoding: false, opening: false };
let current = new AbortController(); // of what the page does; what comes next ends it

// Requests

function headers(more = {}) {
  const key = $("key").value;
  return key ? { "X-API-Key": key, ...more } : more;
}

async function request(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error(`The server cannot be asked (${error.message}).`);
  });
  if (response.ok) return response;
  if (response.status === 401 || response.status === 403) $("key-label").hidden = false;
  const problem = (await response.json().catch(() => null)) || {};
  const wait = problem.retry_after_s ? ` (try again in ${problem.retry_after_s} s)` : "";
  const detail = problem.detail ? problem.detail + wait : `the server answered ${response.status}`;
  const error = new Error(response.status === 401 ? "This server asks for an API key." : detail);
  error.status = response.status;
  throw error;
}

function milliseconds(response) {
  const header = response.headers.get("Server-Timing") || "";
  return [...header.matchAll(/dur=([\d.]+)/g)].reduce((sum, match) => sum + Number(match[1]), 0);
}

// Pictures

async function picture(blob) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
  } catch (error) {
    URL.revokeObjectURL(image.src);
    throw error;
  }
  return image;
}

function show(id, image) {
  const old = $(id).src;
  $(id).src = image.src;
  if (old.startsWith("blob:") && old !== image.src) URL.revokeObjectURL(old);
}

function samples(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}

function psnr(one, other) {
  const sameSize = one.naturalWidth === other.naturalWidth && one.naturalHeight === other.naturalHeight;
  if (!sameSize || one.naturalWidth * one.naturalHeight > PSNR_MAX_PIXELS) return "–";
  const a = samples(one), b = samples(other);
  let sum = 0;
  for (let i = 0; i < a.length; i += 4) {
    for (let c = i; c < i + 3; c++) sum += (a[c] - b[c]) ** 2;
  }
  const mse = sum / (0.75 * a.length);
  return mse ? `${(10 * Math.log10(255 ** 2 / mse)).toFixed(2)} dB` : "∞";
}

function kilobytes(size) {
  return `${(size / 1000).toFixed(1)} kB`;
}

// Encode, then decode both views

async function attempt(work) {
  current.abort();
  const own = (current = new AbortController());
  state.encoding = state.opening = false;
  try {
    await work(own.signal);
  } catch (error) {
    if (own.signal.aborted) return;
    const lasting = state.opening || (error.status < 500 && ![404, 408, 429].includes(error.status));
    state.encoding = state.opening = false;
    say(error.message, true);
    $("again").hidden = lasting;
  }
}

async function encode() {
  if (!state.file || state.opening) return; // a photo that opens will be encoded
  await attempt(async (signal) => {
    state.result = null;
    state.encoding = true;
    say("Encoding …");
    const body = await state.file.arrayBuffer().catch(() => {
      $("file").value = ""; // so that choosing it again is a change
      throw new Error(`${state.file.name} can no longer be read: choose it again.`);
    });
    const response = await request(`encode?quality=${$("quality").value}`, { method: "POST", body, signal });
    const result = await response.json();
    signal.throwIfAborted();
    if (!result.stored) throw new Error("the server’s cache did not keep the bitstream (it is down, or too small), so the views cannot be fetched by id");
    state.result = { ...result, encode_ms: milliseconds(response) };
    state.encoding = false;
    await decode(signal);
  });
}

async function prefer() {
  if (state.encoding || state.opening) return; // it will ask for the views
  if (!state.result) return encode(); // the last attempt failed
  await attempt(async (signal) => {
    try {
      await decode(signal);
    } catch (error) {
      if (error.status !== 404) throw error;
      await encode(); // the server has dropped the bitstream
    }
  });
}

async function view(strength, signal) {
  const path = `bitstreams/${state.result.id}/image?strength=${strength}&format=png`;
  const response = await request(path, { signal });
  const image = await picture(await response.blob());
  const timing = response.headers.get("Server-Timing") || "";
  return { image, time: timing.includes("synthesis") ? `${milliseconds(response).toFixed(0)} ms` : "kept" };
}

async function decode(signal) {
  say("Decoding …");
  const name = strengthName(), views = [];
  try {
    // One after the other: together they might be more pixels than the server takes.
    for (const strength of [0, $("strength").value]) views.push(await view(strength, signal));
    signal.throwIfAborted();
  } catch (error) {
    for (const { image } of views) URL.revokeObjectURL(image.src);
    throw error;
  }
  const [human, machine] = views;
  document.querySelector('.label[data-view="machine"]').textContent = name;
  show("human", human.image);
  show("machine", machine.image);
  $("stage").hidden = $("facts").hidden = false;
  layout();
  facts(human, machine, name);
  say(`Drag the two borders: original | human | ${name}.`);
}

function facts(human, machine, name) {
  const { size, bpp, width, height, quality, id, encode_ms } = state.result;
  const rows = {
    Size: `${width} × ${height}`,
    Quality: quality,
    "Original file": kilobytes(state.file.size),
    Bitstream: `${kilobytes(size)}, ${bpp.toFixed(3)} bpp`,
    "PSNR human": psnr(state.original, human.image),
    [`PSNR ${name}`]: psnr(state.original, machine.image),
    "Encode, decode": `${encode_ms.toFixed(0)} ms, ${human.time}`,
    Id: id.slice(0, 12),
    Save: [
      saver("bitstream", `${id.slice(0, 8)}.ugic`, () => savedBitstream(id)),
      saver("human", `${id.slice(0, 8)}-human.png`, () => $("human").src),
      saver(name, `${id.slice(0, 8)}-${name}.png`, () => $("machine").src),
    ],
  };
  $("facts").replaceChildren(
    ...Object.entries(rows).map(([name, value]) => {
      const row = document.createElement("div");
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name;
      dd.append(...[value].flat());
      row.append(dt, dd);
      return row;
    }),
  );
}

function saver(text, download, find) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", async () => {
    try {
      Object.assign(document.createElement("a"), { download, href: await find() }).click();
    } catch (error) {
      if (error.status === 404) return encode(); // the server has dropped the bitstream
      say(error.message, true);
    }
  });
  return button;
}

async function savedBitstream(id) {
  // Not a link: that would send no key.
  const url = URL.createObjectURL(await (await request(`bitstreams/${id}`)).blob());
  setTimeout(() => URL.revokeObjectURL(url), 60e3);
  return url;
}

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").className = isError ? "error" : "";
  $("again").hidden = true;
}

// The two borders

function layout() {
  const [first, second] = edges.map((edge) => 100 * edge);
  $("human").style.clipPath = `inset(0 ${100 - second}% 0 ${first}%)`;
  $("machine").style.clipPath = `inset(0 0 0 ${second}%)`;
  document.querySelectorAll(".handle").forEach((handle, index) => {
    handle.style.left = `${100 * edges[index]}%`;
    handle.setAttribute("aria-valuenow", Math.round(100 * edges[index]));
  });
  const centres = { original: first / 2, human: (first + second) / 2, machine: (second + 100) / 2 };
  const widths = { original: first, human: second - first, machine: 100 - second };
  document.querySelectorAll(".label").forEach((label) => {
    label.style.left = `${centres[label.dataset.view]}%`;
    label.hidden = widths[label.dataset.view] < 8;
  });
  const { naturalWidth, naturalHeight } = $("original");
  const whole = `min(100%, max(16rem, ${(85 * naturalWidth) / naturalHeight}vh))`; // of a tall one, too
  $("frame").style.width = $("actual").checked ? `${naturalWidth / devicePixelRatio}px` : whole;
  $("frame").classList.toggle("actual", $("actual").checked);
}

function move(index, edge) {
  edges[index] = Math.min(1, Math.max(0, edge));
  if (index === 0) edges[1] = Math.max(edges[0], edges[1]);
  else edges[0] = Math.min(edges[0], edges[1]);
  layout();
}

document.querySelectorAll(".handle").forEach((handle) => {
  const index = Number(handle.dataset.edge);
  handle.addEventListener("pointerdown", (event) => handle.setPointerCapture(event.pointerId));
  handle.addEventListener("pointermove", (event) => {
    if (!handle.hasPointerCapture(event.pointerId)) return;
    const box = $("frame").getBoundingClientRect();
    move(index, (event.clientX - box.left) / box.width);
  });
  handle.addEventListener("keydown", (event) => {
    const steps = {
      ArrowLeft: -0.02, ArrowDown: -0.02, PageDown: -0.1, Home: -1,
      ArrowRight: 0.02, ArrowUp: 0.02, PageUp: 0.1, End: 1,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    move(index, edges[index] + steps[event.key]);
  });
});

// Controls

function strengthName() {
  const strength = Number($("strength").value);
  return { 0: "human", 1: "machine" }[strength] || strength.toFixed(2);
}

function nameStrength() {
  $("strength-value").textContent = strengthName();
  $("strength").setAttribute("aria-valuetext", strengthName());
}

async function open(file) {
  await attempt(async (signal) => {
    state.opening = true;
    say("Opening …");
    const original = await picture(file).catch(() => {
      $("file").value = ""; // its box would name another photo than the one that stays
      throw new Error(`${file.name} is not a picture that this browser can show`);
    });
    if (signal.aborted) return URL.revokeObjectURL(original.src);
    Object.assign(state, { file, original, result: null, opening: false });
    $("stage").hidden = $("facts").hidden = true; // they show another photo
    show("original", original);
    await encode();
  });
}

$("file").addEventListener("change", () => $("file").files[0] && open($("file").files[0]));
$("quality").addEventListener("input", () => { $("quality-value").textContent = $("quality").value; });
$("quality").addEventListener("change", encode);
$("strength").addEventListener("input", nameStrength);
$("strength").addEventListener("change", prefer);
$("actual").addEventListener("change", layout);
addEventListener("resize", layout); // the browser's zoom changes how many pixels one is
$("again").addEventListener("click", () => {
  $("message").focus(); // as the button goes
  prefer();
});
$("key").addEventListener("change", () => {
  describe();
  encode();
});
$("controls").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (!take(event.dataTransfer.files)) say("That is no file: save the picture, then drop it.", true);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));

function take([file]) {
  if (!file) return false;
  const one = new DataTransfer();
  one.items.add(file);
  $("file").files = one.files; // its box shows the name, and choosing another is a change
  open(file);
  return true;
}

async function describe() {
  const said = $("message").textContent;
  const tell = (...words) => $("message").textContent === said && say(...words); // else there is something newer
  try {
    const { version, model } = await (await request("info")).json();
    $("model").textContent = `${model.name} on ${model.device}, version ${version}`;
    if (!state.file) tell("Choose a photo, drop one anywhere, or paste it.");
  } catch (error) {
    tell(error.message, true);
  }
}

nameStrength();
describe();
