// How much memory the model takes: counted where it is allocated, since browsers do not tell.

/** Starts counting; call it before onnxruntime-web is loaded. Returns a function: {heap, gpu} in bytes. */
export function countMemory() {
  const heaps = [];
  const RealMemory = WebAssembly.Memory;
  WebAssembly.Memory = new Proxy(RealMemory, {
    construct(target, args) {
      const made = new target(...args);
      heaps.push(made);
      return made;
    },
  });
  let gpu = 0;
  if (globalThis.GPUDevice) {
    const sizes = new WeakMap();
    const { createBuffer } = GPUDevice.prototype;
    const { destroy } = GPUBuffer.prototype;
    GPUDevice.prototype.createBuffer = function (descriptor) {
      const buffer = createBuffer.call(this, descriptor);
      sizes.set(buffer, descriptor.size);
      gpu += descriptor.size;
      return buffer;
    };
    GPUBuffer.prototype.destroy = function () {
      gpu -= sizes.get(this) ?? 0;
      sizes.delete(this);
      destroy.call(this);
    };
  }
  return () => ({ heap: heaps.reduce((sum, { buffer }) => sum + buffer.byteLength, 0), gpu });
}
