// The model, in a thread of its own so that the page stays alive: {command, ...} in, {event, ...} out.

import { Decoder, draw } from "./decoder.mjs";
import { fetchFiles } from "./download.mjs";
import { countMemory } from "./memory.mjs";
import { TextCodec } from "./text.mjs";

const memory = countMemory(); // before onnxruntime-web allocates anything
const PREFILL = 128; // tokens read at once: between two of them progress is told and a stop is heard

const LIBRARIES = {
  webgpu: ["ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify"],
  wasm: ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded"],
};

let config = null;
let decoder = null;
let codec = null;
let stopped = false;

const tell = (event, values = {}) => postMessage({ event, ...values });

/** Let messages in: promises alone would starve them. */
const breathe = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), resolve());
    port2.postMessage(0);
  });

const readJson = async (name) => {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
  return response.json();
};

async function load({ provider, threads }) {
  config = await readJson("model.json");
  const start = performance.now();
  const files = await fetchFiles(config, (progress) => tell("progress", progress));
  tell("preparing");
  const [library, binary] = LIBRARIES[provider];
  const ort = await import(`./lib/${library}`);
  ort.env.wasm.wasmPaths = {
    mjs: new URL(`lib/${binary}.mjs`, import.meta.url).href,
    wasm: new URL(`lib/${binary}.wasm`, import.meta.url).href,
  };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const where = provider === "webgpu" ? "gpu-buffer" : "cpu";
  const session = await ort.InferenceSession.create(files[config.model], {
    executionProviders: [provider],
    externalData: config.data.map((path) => ({ path, data: files[path] })),
    preferredOutputLocation: Object.fromEntries(config.cache.map(({ present }) => [present, where])),
  });
  decoder = new Decoder(ort, session, config);
  codec = new TextCodec(await readJson("tokenizer.json"), await readJson("tokenizer_config.json"), config);
  tell("ready", { provider, threads, seconds: (performance.now() - start) / 1000, memory: memory() });
}

/** Read a prompt in pieces; logits behind it, or null where it was stopped. */
async function readPrompt(ids) {
  let done = decoder.keepPrefix(ids);
  const fresh = ids.length - done;
  let logits = null;
  while (done < ids.length) {
    const piece = ids.slice(done, done + PREFILL);
    logits = await decoder.read(piece);
    done += piece.length;
    tell("reading", { done: fresh - (ids.length - done), total: fresh });
    await breathe();
    if (stopped) return null;
  }
  return logits;
}

async function answer({ turns, length, temperature }) {
  stopped = false;
  const prompt = codec.encodeTurns(turns);
  const room = config.context - prompt.length;
  if (room < 1) {
    tell("full", { tokens: prompt.length, context: config.context });
    return;
  }
  const begun = performance.now();
  let logits = await readPrompt(prompt);
  const readSeconds = (performance.now() - begun) / 1000;
  const started = performance.now();
  const stream = codec.stream();
  const longest = Math.min(length, room);
  let count = 0;
  let reason = "stopped";
  while (logits && !stopped) {
    const token = draw(logits, temperature);
    if (config.ends.includes(token)) {
      reason = "end";
      break;
    }
    count += 1;
    const seconds = (performance.now() - started) / 1000;
    tell("piece", { text: stream(token), count, seconds, memory: memory() });
    if (count === longest) {
      reason = "length";
      break;
    }
    await breathe();
    if (stopped) break;
    logits = await decoder.read([token]);
  }
  const seconds = (performance.now() - started) / 1000;
  tell("done", { reason, count, seconds, prompt: prompt.length, readSeconds, memory: memory() });
}

/** Best tokens behind a prompt of ids, for `faq-onnx verify`. */
async function prove({ ids, steps, pieces }) {
  decoder.reset();
  const started = performance.now();
  let logits = null;
  for (let at = 0; at < ids.length; at += pieces) logits = await decoder.read(ids.slice(at, at + pieces));
  const readSeconds = (performance.now() - started) / 1000;
  const tokens = [];
  const begun = performance.now();
  for (;;) {
    tokens.push(draw(logits, 0));
    if (tokens.length === steps) break;
    logits = await decoder.read([tokens.at(-1)]);
  }
  const seconds = (performance.now() - begun) / 1000;
  decoder.reset();
  tell("proof", { tokens, readSeconds, seconds, memory: memory(), text: codec.decode(tokens) });
}

const encode = ({ turns }) => tell("encoded", { ids: codec.encodeTurns(turns) });

const COMMANDS = { load, answer, prove, encode, forget: () => decoder?.reset() };

onmessage = async ({ data }) => {
  if (data.command === "stop") {
    stopped = true;
    return;
  }
  try {
    await COMMANDS[data.command](data);
  } catch (error) {
    tell("failed", { command: data.command, message: String(error?.message ?? error) });
  }
};
