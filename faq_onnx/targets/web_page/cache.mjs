// The key/value cache between steps: handed on by the graph, or in buffers that it writes into.

const FLOAT_ARRAYS = { float32: Float32Array, float16: globalThis.Float16Array ?? Uint16Array };
const ELEMENT_BYTES = { float32: 4, float16: 2 };
const FIRST_CAPACITY = 256; // tokens; doubled when they are full, up to the context of the model

/** A cache that each step makes anew, longer by what it read: any graph, on any provider. */
export class GrowingCache {
  /** @param entries config.cache */
  constructor(ort, entries) {
    this.ort = ort;
    this.entries = entries;
    this.clear();
  }

  /** Forget everything. */
  clear() {
    const old = this.tensors ?? {};
    this.tensors = {};
    for (const { past, heads, width, type } of this.entries) {
      this.tensors[past] = new this.ort.Tensor(type, new FLOAT_ARRAYS[type](0), [1, heads, 0, width]);
    }
    for (const tensor of Object.values(old)) tensor.dispose?.();
  }

  /** Run a session on what is cached and on these feeds; its outputs, those of the cache excepted. */
  async run(session, feeds) {
    const outputs = await session.run({ ...feeds, ...this.tensors });
    const old = this.tensors;
    this.tensors = {};
    for (const { past, present } of this.entries) this.tensors[past] = outputs[present];
    for (const tensor of Object.values(old)) tensor.dispose?.();
    return outputs;
  }
}

/**
 * Buffers on the graphics processor that are past and present at once: a step writes its keys and values
 * behind the others, and nothing is copied. For graphs whose GroupQueryAttention has the whole cache.
 */
export class SharedCache {
  /** @param device of ort.env.webgpu */
  constructor(ort, device, config) {
    this.ort = ort;
    this.device = device;
    this.entries = config.cache;
    this.context = config.context;
    this.capacity = 0; // tokens
    this.buffers = {};
    this.tensors = {};
  }

  /** Nothing to do: what a mask does not count is never read, and will be written over. */
  clear() {}

  /** As that of GrowingCache; `used` tokens are cached, `total` will be. */
  async run(session, feeds, used, total) {
    if (total > this.capacity) this.#grow(used, total);
    const outputs = { logits: null };
    for (const { past, present } of this.entries) outputs[present] = this.tensors[past];
    return session.run({ ...feeds, ...this.tensors }, outputs);
  }

  /** Larger buffers with the same first `used` tokens of each head. */
  #grow(used, total) {
    let capacity = Math.max(this.capacity, FIRST_CAPACITY);
    while (capacity < total) capacity *= 2;
    capacity = Math.max(Math.min(capacity, this.context), total);
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    const commands = this.device.createCommandEncoder();
    const old = this.buffers;
    this.buffers = {};
    for (const { past, heads, width, type } of this.entries) {
      const token = width * ELEMENT_BYTES[type];
      const buffer = this.device.createBuffer({ size: heads * capacity * token, usage });
      for (let head = 0; used > 0 && head < heads; head++) {
        const [from, to] = [this.capacity, capacity].map((tokens) => head * tokens * token);
        commands.copyBufferToBuffer(old[past], from, buffer, to, used * token);
      }
      this.buffers[past] = buffer;
      const dims = [1, heads, capacity, width];
      this.tensors[past] = this.ort.Tensor.fromGpuBuffer(buffer, { dataType: type, dims });
    }
    this.device.queue.submit([commands.finish()]);
    for (const buffer of Object.values(old)) buffer.destroy();
    this.capacity = capacity;
  }
}
