// Low-bit weights to float32, once: WebAssembly's MatMulNBits would do it again for every token.

/** A tensor's bytes as an array of a type. */
function read(place, files, Kind) {
  if (place.base64) return new Kind(Uint8Array.from(atob(place.base64), (c) => c.charCodeAt(0)).buffer);
  const { buffer, byteOffset } = files[place.file];
  return new Kind(buffer, byteOffset + place.offset, place.bytes / Kind.BYTES_PER_ELEMENT);
}

const SCALES = { float32: Float32Array, int8: Int8Array, uint8: Uint8Array };

/** Float32 [rows, width] of a weight that model.json describes. */
export function unpack(weight, files) {
  const { rows, width, bits, block } = weight;
  const codes = read(weight.codes, files, Uint8Array);
  const scales = read(weight.scales, files, SCALES[weight.scale_type]);
  const units = weight.units && read(weight.units, files, Float32Array);
  const zeros = weight.zeros && read(weight.zeros, files, Uint8Array);
  const blocks = Math.ceil(width / block);
  const codeBytes = (blocks * block * bits) / 8;
  const zeroBytes = Math.ceil((blocks * bits) / 8);
  const mask = 2 ** bits - 1;
  const whole = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    const unit = units ? units[row] : 1;
    for (let at = 0; at < blocks; at++) {
      const scale = Math.fround(scales[row * blocks + at] * unit);
      const bit = at * bits;
      const zero = zeros ? (zeros[row * zeroBytes + (bit >> 3)] >> (bit & 7)) & mask : 2 ** (bits - 1);
      const end = Math.min(block, width - at * block);
      const from = row * codeBytes + (at * block * bits) / 8;
      const to = row * width + at * block;
      for (let k = 0, place = 0; k < end; k++, place += bits) {
        whole[to + k] = (((codes[from + (place >> 3)] >> (place & 7)) & mask) - zero) * scale;
      }
    }
  }
  return whole;
}
