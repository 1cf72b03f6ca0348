// A decoder with its key/value cache in onnxruntime-web: token ids in, logits of the last position out.

/** A float16 bit pattern as a number. */
function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

function asFloat32(data) {
  if (data instanceof Float32Array) return data;
  if (data instanceof Uint16Array) return Float32Array.from(data, halfToNumber);
  return Float32Array.from(data);
}

export class Decoder {
  /**
   * @param ort the onnxruntime-web module
   * @param session an InferenceSession whose cache outputs stay where the provider wants them
   * @param config model.json
   * @param cache a GrowingCache or SharedCache
   */
  constructor(ort, session, config, cache) {
    this.ort = ort;
    this.session = session;
    this.config = config;
    this.cache = cache;
    this.ids = []; // what the cache holds
  }

  /** Forget everything that was read. */
  reset() {
    this.cache.clear();
    this.ids = [];
  }

  /**
   * How many of these tokens are in the cache already; begins anew where they do not continue it.
   * One token at least is left to be read, since logits come from reading.
   */
  keepPrefix(ids) {
    const kept = this.ids.length;
    if (kept < ids.length && this.ids.every((id, index) => id === ids[index])) return kept;
    this.reset();
    return 0;
  }

  /** Read further tokens; logits [vocabulary] behind the last one. */
  async read(ids) {
    const used = this.ids.length;
    const outputs = await this.cache.run(this.session, this.#feeds(ids), used, used + ids.length);
    this.ids.push(...ids);
    const logits = outputs.logits;
    const [, positions, vocabulary] = logits.dims;
    const data = await logits.getData();
    return asFloat32(data.subarray((positions - 1) * vocabulary, positions * vocabulary));
  }

  #feeds(ids) {
    const past = this.ids.length;
    const total = past + ids.length;
    const values = {
      input_ids: [ids, [1, ids.length]],
      attention_mask: [Array(total).fill(1), [1, total]],
      position_ids: [ids.map((_, index) => past + index), [1, ids.length]],
    };
    const feeds = {};
    for (const [name, type] of Object.entries(this.config.inputs)) {
      const [numbers, dims] = values[name];
      const data = type === "int64" ? BigInt64Array.from(numbers, BigInt) : Int32Array.from(numbers);
      feeds[name] = new this.ort.Tensor(type, data, dims);
    }
    return feeds;
  }
}

/** Index of the largest logit. */
export function best(logits) {
  let index = 0;
  for (let other = 1; other < logits.length; other++) if (logits[other] > logits[index]) index = other;
  return index;
}

/** A token drawn at a temperature; 0 takes the best one. */
export function draw(logits, temperature, random = Math.random) {
  if (!(temperature > 0)) return best(logits);
  const largest = logits[best(logits)];
  const weights = logits.map((value) => Math.exp((value - largest) / temperature));
  let rest = random() * weights.reduce((sum, weight) => sum + weight, 0);
  for (let index = 0; index < weights.length; index++) {
    rest -= weights[index];
    if (rest < 0) return index;
  }
  return best(logits);
}
