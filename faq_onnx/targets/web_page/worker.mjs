// The model, in a thread of its own so that the page stays alive: {command, ...} in, {event, ...} out.

import { GrowingCache, SharedCache } from "./cache.mjs";
import { Decoder, draw } from "./decoder.mjs";
import { fetchFiles } from "./download.mjs";
import { countMemory } from "./memory.mjs";
import { TextCodec } from "./text.mjs";
import { unpack } from "./unpack.mjs";

const memory = countMemory(); // before onnxruntime-web allocates anything
const PREFILL = 128; // tokens read at once: between two of them progress is told and a stop is heard

const LIBRARIES = {
  webgpu: ["ort.webgpu.bundle.min.mjs", "lib/ort-wasm-simd-threaded.asyncify"],
  wasm: ["ort.wasm.bundle.min.mjs", "lib/ort-wasm-simd-threaded"],
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

/** Graph and weights of a session; unpacked: more memory, fewer steps. */
function chooseGraph(files, unpacked) {
  const externalData = config.data.map((path) => ({ path, data: files[path] }));
  if (!unpacked) return { graph: files[config.model], externalData };
  for (const weight of config.unpacked) {
    externalData.push({ path: weight.file, data: new Uint8Array(unpack(weight, files).buffer) });
  }
  return { graph: files[config.unpacked_graph], externalData };
}

/**
 * provider: webgpu or wasm; threads: of WebAssembly;
 * packed: keep low-bit weights as they are, even where WebAssembly is faster without.
 */
async function load({ provider, threads, packed }) {
  const response = await fetch(new URL("model.json", import.meta.url));
  if (!response.ok) throw new Error(`model.json: the server answered ${response.status}`);
  config = await response.json();
  const start = performance.now();
  const files = await fetchFiles(config, provider, (progress) => tell("progress", progress));
  tell("preparing");
  const [library, binary] = LIBRARIES[provider];
  const ort = await import(`./lib/${library}`);
  ort.env.wasm.wasmPaths = { mjs: new URL(`${binary}.mjs`, import.meta.url).href };
  ort.env.wasm.wasmBinary = files[`${binary}.wasm`];
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const where = provider === "webgpu" ? "gpu-buffer" : "cpu";
  const unpacked = provider === "wasm" && !packed && config.unpacked.length > 0;
  const { graph, externalData } = chooseGraph(files, unpacked);
  const session = await ort.InferenceSession.create(graph, {
    executionProviders: [provider],
    externalData,
    preferredOutputLocation: Object.fromEntries(config.cache.map(({ present }) => [present, where])),
  });
  const shares = provider === "webgpu" && config.shares_cache;
  const cache = shares
    ? new SharedCache(ort, await ort.env.webgpu.device, config)
    : new GrowingCache(ort, config.cache);
  decoder = new Decoder(ort, session, config, cache);
  const parse = (name) => (files[name] ? JSON.parse(new TextDecoder().decode(files[name])) : {});
  codec = new TextCodec(parse("tokenizer.json"), parse("tokenizer_config.json"), config);
  tell("ready", { provider, threads, unpacked, seconds: (performance.now() - start) / 1000, memory: memory() });
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
    tell("piece", { text: stream.push(token), used: prompt.length + count, count, seconds, memory: memory() });
    if (count === longest) {
      reason = "length";
      break;
    }
    await breathe();
    if (stopped) break;
    logits = await decoder.read([token]);
  }
  const seconds = (performance.now() - started) / 1000;
  tell("done", { reason, text: stream.rest(), count, seconds, prompt: prompt.length, readSeconds, memory: memory() });
}

/** Best tokens behind a prompt of ids, as many as the seconds allow: `faq-onnx verify` asks for them. */
async function prove({ ids, steps, pieces, seconds: limit }) {
  decoder.reset();
  const started = performance.now();
  const elapsed = (since) => (performance.now() - since) / 1000;
  let logits = null;
  for (let at = 0; at < ids.length; at += pieces) logits = await decoder.read(ids.slice(at, at + pieces));
  const readSeconds = elapsed(started);
  const tokens = [];
  const begun = performance.now();
  for (;;) {
    tokens.push(draw(logits, 0));
    if (tokens.length === steps || elapsed(started) > limit) break;
    logits = await decoder.read(tokens.slice(-1));
  }
  tell("proof", { tokens, readTokens: ids.length, readSeconds, seconds: elapsed(begun), memory: memory() });
  decoder.reset();
}

/** Token ids of a plain text, for the same. */
const encode = ({ text }) => tell("encoded", { ids: codec.encode(text, { add_special_tokens: false }) });

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
