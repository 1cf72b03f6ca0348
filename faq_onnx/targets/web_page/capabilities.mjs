// What this browser can run the model on, and why it cannot use the rest.

const mebibytes = (bytes) => `${Math.round(bytes / 2 ** 20)} MiB`;

/** {reason: ""} where WebGPU can run the model, else why it cannot, as the end of a sentence. */
async function checkWebGpu(config) {
  if (!globalThis.isSecureContext) return { reason: "browsers offer WebGPU to https pages and localhost only" };
  if (!navigator.gpu) return { reason: "this browser has no WebGPU" };
  let adapter = null;
  try {
    adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  } catch {
    // some browsers throw instead of giving none
  }
  if (!adapter) return { reason: "WebGPU finds no graphics processor here" };
  if (config.float16 && !adapter.features.has("shader-f16")) {
    return { reason: "the graphics processor has no float16 (shader-f16), which this model computes in" };
  }
  const limit = Math.min(adapter.limits.maxStorageBufferBindingSize, adapter.limits.maxBufferSize);
  if (config.largest > limit) {
    return {
      reason: `a weight of ${mebibytes(config.largest)} is larger than the graphics processor's buffers (${mebibytes(limit)})`,
    };
  }
  const { vendor, architecture, description } = adapter.info ?? {};
  return { reason: "", adapter: description || [vendor, architecture].filter(Boolean).join(" ") };
}

/**
 * Whether weights may be unpacked: three times their floats are needed for a moment.
 * Phones end a page that takes too much, without an error that it could catch.
 */
function hasRoom({ unpacked }) {
  const floats = unpacked.reduce((sum, { rows, width }) => sum + 4 * rows * width, 0);
  const mobile = navigator.userAgentData?.mobile ?? /Mobi/.test(navigator.userAgent);
  const share = mobile ? 1 / 8 : 1 / 2;
  return 3 * floats <= (navigator.deviceMemory ?? 4) * 2 ** 30 * share;
}

/** {webgpu: {reason, adapter}, threads, roomy}: threads for WebAssembly, 1 where the page is not isolated. */
export async function findCapabilities(config) {
  const cores = navigator.hardwareConcurrency || 1;
  const threads = globalThis.crossOriginIsolated ? Math.max(1, Math.min(8, Math.floor(cores / 2) || 1)) : 1;
  return { webgpu: await checkWebGpu(config), threads, roomy: hasRoom(config) };
}
