// The page: what the user sees and does. The model lives in worker.mjs.

import { findCapabilities } from "./capabilities.mjs";
import { filesFor, isStored } from "./download.mjs";

const $ = (id) => document.getElementById(id);
const show = (id, visible) => ($(id).hidden = !visible);

const query = new URLSearchParams(location.search);
let config;
let abilities;
let worker;
let turns = [];
let answering = null; // the <li> that is being written

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const speedText = (count, seconds) => (seconds > 0 ? `${(count / seconds).toFixed(1)} tokens/s` : "–");

function showProblem(title, text, { again = false } = {}) {
  $("problem-title").textContent = title;
  $("problem-text").textContent = text;
  show("problem-command", false);
  show("again", again);
  show("problem", true);
  $("problem").scrollIntoView({ block: "nearest" });
}

/** Messages of errors that people meet, in their words. */
function explain(message) {
  if (/allocat|out of memory|OutOfMemory|memory access|std::bad_alloc/i.test(message)) {
    return `The model does not fit into this device's memory; close other tabs or choose a smaller model. (${message})`;
  }
  if (/Failed to fetch|NetworkError|Load failed/i.test(message)) {
    return `The connection broke off; check it and try again. (${message})`;
  }
  return message;
}

function memoryText({ heap, gpu }) {
  const parts = [];
  if (gpu) parts.push(`${megabytes(gpu)} GPU`);
  parts.push(gpu ? `${megabytes(heap)} wasm` : megabytes(heap));
  return parts.join(" + ");
}

const shown = {
  progress({ loaded, total, stored }) {
    $("loading-text").textContent = stored ? "Reading from this browser's storage" : "Downloading";
    $("bar").value = loaded / total;
    $("loading-detail").textContent = `${megabytes(loaded)} of ${megabytes(total)}`;
  },
  preparing() {
    $("loading-text").textContent = "Preparing the model";
    $("bar").removeAttribute("value");
    $("loading-detail").textContent = "some seconds";
  },
  ready({ provider, threads, memory }) {
    show("loading", false);
    for (const id of ["log", "footer", "anew"]) show(id, true);
    const cores = threads === 1 ? "1 thread" : `${threads} threads`;
    $("where").textContent = provider === "webgpu" ? `WebGPU (${abilities.webgpu.adapter || "graphics"})` : `processor, ${cores}`;
    $("memory").textContent = memoryText(memory);
    document.body.dataset.state = "ready";
    $("text").focus();
  },
  reading({ done, total }) {
    if (answering) answering.dataset.doing = done < total ? `Reading ${done} of ${total} tokens` : "Thinking";
  },
  piece({ text, used, count, seconds, memory }) {
    const log = $("log").parentElement;
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    answering.textContent += text;
    if (follows) log.scrollTop = log.scrollHeight;
    $("speed").textContent = speedText(count - 1, seconds);
    $("memory").textContent = memoryText(memory);
    $("used").textContent = `${used} of ${config.context}`;
  },
  done({ reason, text, count, seconds, prompt, readSeconds, memory }) {
    answering.textContent += text;
    const said = answering.textContent;
    turns.push({ role: "assistant", content: said });
    $("speed").textContent = speedText(count - 1, seconds);
    $("speed").title = `${prompt} tokens in ${readSeconds.toFixed(1)} s, then ${count} in ${seconds.toFixed(1)} s`;
    $("memory").textContent = memoryText(memory);
    $("used").textContent = `${prompt + count} of ${config.context}`;
    if (!said) answering.remove();
    if (reason === "stopped") addNote("stopped");
    if (reason === "length") addNote("cut off at the longest answer");
    if (reason === "end" && !said) addNote("the model has nothing to add");
    $("said").textContent = `Answer: ${said}`;
    finish();
  },
  full({ tokens, context }) {
    answering.remove();
    turns.pop();
    finish();
    showProblem("This conversation is too long", `It has ${tokens} tokens and the model reads ${context}. Begin a new chat, or write less.`);
  },
  failed({ command, message }) {
    if (command === "load") {
      stopWorker();
      show("loading", false);
      show("welcome", true);
      showProblem("The model could not be started", explain(message), { again: true });
      document.body.dataset.state = "failed";
      return;
    }
    answering?.remove();
    turns.pop();
    finish();
    worker.postMessage({ command: "forget" });
    showProblem("The answer broke off", explain(message));
  },
};

function addMessage(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  $("log").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

const addNote = (text) => addMessage("note", text);

function finish() {
  answering?.removeAttribute("aria-busy");
  answering = null;
  document.body.dataset.state = "ready";
  $("anew").disabled = false;
  show("stop", false);
  show("send", true);
  $("text").focus();
}

function stopWorker() {
  worker?.terminate();
  worker = null;
}

/** {provider, packed} as chosen in the settings. */
function chosenProvider() {
  const chosen = $("provider").value;
  if (chosen === "auto" && !abilities.webgpu.reason) return { provider: "webgpu", packed: false };
  const packed = chosen === "packed" || (chosen === "auto" && !abilities.roomy);
  return { provider: chosen === "webgpu" ? "webgpu" : "wasm", packed };
}

/** Say on the button what it will cost. */
async function labelStart() {
  const { provider } = chosenProvider();
  const bytes = filesFor(config, provider).reduce((sum, file) => sum + file.bytes, 0);
  const stored = await isStored(config, provider);
  $("load").textContent = stored ? "Start" : `Download and start (${megabytes(bytes)})`;
  $("kept").textContent = stored ? "The model is in this browser's storage." : "It is kept in this browser for the next visit.";
}

function load() {
  const { provider, packed } = chosenProvider();
  for (const id of ["welcome", "problem"]) show(id, false);
  show("loading", true);
  document.body.dataset.state = "loading";
  stopWorker();
  worker = new Worker("worker.mjs", { type: "module" });
  worker.onmessage = ({ data: { event, ...values } }) => shown[event]?.(values);
  worker.onerror = (event) => {
    event.preventDefault();
    shown.failed({ command: "load", message: event.message || "a part of this page could not be loaded" });
  };
  const wish = Number(query.get("threads")) || abilities.threads;
  const threads = globalThis.crossOriginIsolated ? wish : 1;
  worker.postMessage({ command: "load", provider, threads, packed });
}

function send() {
  const text = $("text").value.trim();
  if (!text || answering) return;
  show("problem", false);
  $("text").value = "";
  resize();
  const system = $("system").value.trim();
  if (!turns.length && system) turns.push({ role: "system", content: system });
  turns.push({ role: "user", content: text });
  addMessage("user", text);
  answering = addMessage("assistant", "");
  answering.setAttribute("aria-busy", "true");
  answering.dataset.doing = "Reading";
  document.body.dataset.state = "answering";
  $("anew").disabled = true;
  show("send", false);
  show("stop", true);
  $("speed").textContent = "–";
  const length = Math.max(1, Number($("longest").value) || 512);
  worker.postMessage({ command: "answer", turns, length, temperature: Number($("temperature").value) });
}

function beginAnew() {
  turns = [];
  $("log").replaceChildren();
  $("used").textContent = "–";
  show("problem", false);
  $("text").focus();
}

function resize() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function listen() {
  $("load").onclick = load;
  $("provider").onchange = labelStart;
  $("again").onclick = load;
  $("anew").onclick = beginAnew;
  $("stop").onclick = () => worker.postMessage({ command: "stop" });
  $("form").onsubmit = (event) => (event.preventDefault(), send());
  $("text").oninput = resize;
  $("text").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  document.onkeydown = (event) => {
    if (event.key === "Escape" && answering) worker.postMessage({ command: "stop" });
  };
  $("temperature").oninput = () => ($("temperature-shown").textContent = $("temperature").value);
}

function offerProviders() {
  const { reason, adapter } = abilities.webgpu;
  const automatic = reason ? "processor" : "WebGPU";
  const choices = [
    ["auto", `Automatic (${automatic})`, false],
    ["webgpu", reason ? "WebGPU: not here" : `WebGPU${adapter ? `, ${adapter}` : ""}`, Boolean(reason)],
    ["wasm", `Processor (WebAssembly, ${abilities.threads === 1 ? "1 thread" : `${abilities.threads} threads`})`, false],
  ];
  $("provider").replaceChildren(
    ...choices.map(([value, text, disabled]) => Object.assign(document.createElement("option"), { value, text, disabled })),
  );
  if (config.unpacked.length) {
    const text = "Processor, less memory and slower";
    $("provider").append(Object.assign(document.createElement("option"), { value: "packed", text }));
    choices.push(["packed", text, false]);
  }
  const wish = query.get("provider");
  if (choices.some(([value, , disabled]) => value === wish && !disabled)) $("provider").value = wish;
  if (!reason) return;
  $("note").textContent = `The model will run on the processor, which is slower than WebGPU: ${reason}.`;
  show("note", true);
}

async function start() {
  const response = await fetch("model.json");
  if (!response.ok) throw new Error(`model.json: the server answered ${response.status}`);
  config = await response.json();
  document.title = config.name;
  $("name").textContent = config.name;
  abilities = await findCapabilities(config);
  if (!config.template) $("text").placeholder = "Text to continue";
  offerProviders();
  listen();
  await labelStart();
  show("welcome", true);
  document.body.dataset.state = "welcome";
  $("load").focus();
}

start().catch((error) => showProblem("This page is incomplete", explain(String(error?.message ?? error))));
