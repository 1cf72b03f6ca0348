// Files of the package: fetched with progress, kept in the browser's cache storage.

const STORE = "faq-onnx";

/** Where a file is kept; its version is part of the name, so a new model is never mixed with an old one. */
const address = (config, name) => new URL(`${name}?v=${config.version}`, import.meta.url).href;

/** Storage that survives the visit; null where the browser has none (insecure pages, private windows). */
async function openStore() {
  try {
    return await caches.open(STORE);
  } catch {
    return null;
  }
}

/** Remove models of this folder that have another version. */
async function dropOld(store, config) {
  const here = new URL(".", import.meta.url).href;
  for (const request of await store.keys()) {
    const old = request.url.startsWith(here) && !request.url.endsWith(`?v=${config.version}`);
    if (old) await store.delete(request);
  }
}

/** The files that a provider needs, with their sizes. */
export const filesFor = (config, provider) =>
  config.files.filter((entry) => !entry.provider || entry.provider === provider);

/** Whether everything lies in the browser's storage already. */
export async function isStored(config, provider) {
  const store = await openStore();
  if (!store) return false;
  for (const { file } of filesFor(config, provider)) {
    if (!(await store.match(address(config, file)))) return false;
  }
  return true;
}

async function readBody(response, { file, bytes }, onBytes) {
  const whole = new Uint8Array(bytes);
  let filled = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (filled + value.length > bytes) {
      throw new Error(`${file} is longer than the ${bytes} bytes that were packaged; reload the page`);
    }
    whole.set(value, filled);
    filled += value.length;
    onBytes(value.length);
  }
  if (filled !== bytes) {
    throw new Error(`${file} ended after ${filled} of ${bytes} bytes; check the connection and try again`);
  }
  return whole;
}

/**
 * Fetch all that a provider needs: {name: Uint8Array}.
 * @param config model.json
 * @param provider "webgpu" or "wasm"
 * @param onProgress called with ({loaded, total, stored}) in bytes
 */
export async function fetchFiles(config, provider, onProgress) {
  const store = await openStore();
  if (store) await dropOld(store, config);
  const wanted = filesFor(config, provider);
  const total = wanted.reduce((sum, { bytes }) => sum + bytes, 0);
  let loaded = 0;
  const files = {};
  for (const entry of wanted) {
    const url = address(config, entry.file);
    const kept = store && (await store.match(url));
    const response = kept || (await fetch(url));
    if (!response.ok) throw new Error(`${entry.file}: the server answered ${response.status}`);
    files[entry.file] = await readBody(response, entry, (count) => {
      loaded += count;
      onProgress({ loaded, total, stored: Boolean(kept) });
    });
    if (store && !kept) {
      // No room is no reason to fail: the next visit downloads again.
      await store.put(url, new Response(files[entry.file])).catch(() => {});
    }
  }
  return files;
}
