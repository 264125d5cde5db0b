// Reads safetensors: 8 bytes of header length (little-endian), a JSON header, raw data.
// https://huggingface.co/docs/safetensors

const WIDTHS = { BOOL: 1, U8: 1, I8: 1, U16: 2, I16: 2, F16: 2, U32: 4, I32: 4, F32: 4, I64: 8, U64: 8, F64: 8 };

const VIEWS = {
  BOOL: Uint8Array,
  U8: Uint8Array,
  I8: Int8Array,
  U16: Uint16Array,
  I16: Int16Array,
  F16: Uint16Array,
  U32: Uint32Array,
  I32: Int32Array,
  F32: Float32Array,
  I64: BigInt64Array,
  U64: BigUint64Array,
  F64: Float64Array,
};

/**
 * One file, whose arrays are decoded on first use.
 * F16 becomes Float32Array, I64 and U64 Float64Array (exact below 2^53).
 */
export class Tensors {
  /** @param {ArrayBuffer} buffer */
  constructor(buffer) {
    if (buffer.byteLength < 8) throw new Error(`a safetensors file has at least 8 bytes, this one has ${buffer.byteLength}`);
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    if (8 + length > buffer.byteLength) {
      throw new Error(`a safetensors header of ${length} bytes doesn't fit in a file of ${buffer.byteLength}`);
    }
    const { __metadata__: metadata, ...entries } = JSON.parse(
      new TextDecoder().decode(new Uint8Array(buffer, 8, length)),
    );
    this.metadata = metadata ?? {};
    this.byteLength = buffer.byteLength;
    this._buffer = buffer;
    this._start = 8 + length;
    this._entries = entries;
    this._decoded = new Map();
  }

  get names() {
    return Object.keys(this._entries);
  }

  has(name) {
    return Object.hasOwn(this._entries, name);
  }

  /** @returns {number[]} */
  shape(name) {
    return this._entry(name).shape;
  }

  /** The values, flat, in C order. */
  array(name) {
    let values = this._decoded.get(name);
    if (!values) {
      values = this._decode(name);
      this._decoded.set(name, values);
    }
    return values;
  }

  _entry(name) {
    if (!this.has(name)) throw new Error(`the file has no array ${name}, only ${this.names.join(", ")}`);
    return this._entries[name];
  }

  _decode(name) {
    const { dtype, shape, data_offsets: [start, end] } = this._entry(name);
    const width = WIDTHS[dtype];
    if (!width) throw new Error(`${name} has the dtype ${dtype}, which the explorer can't read`);
    const length = shape.reduce((a, b) => a * b, 1);
    if (end - start !== length * width || this._start + end > this._buffer.byteLength) {
      throw new Error(`${name} should have ${length} values of ${width} bytes, but has ${end - start} bytes`);
    }
    const from = this._start + start;
    const View = VIEWS[dtype];
    const view =
      from % width === 0
        ? new View(this._buffer, from, length)
        : new View(this._buffer.slice(from, this._start + end));
    if (dtype === "F16") return halves(view);
    if (dtype === "I64" || dtype === "U64") return Float64Array.from(view, Number);
    return view;
  }
}

let table = null;
/** Converts half floats to floats, with a table of all 65,536 values. */
function halves(bits) {
  if (!table) {
    table = new Float32Array(65536);
    for (let i = 0; i < 65536; i++) {
      const sign = i & 0x8000 ? -1 : 1;
      const exponent = (i >> 10) & 0x1f;
      const fraction = i & 0x3ff;
      if (exponent === 0) table[i] = sign * fraction * 2 ** -24;
      else if (exponent === 31) table[i] = fraction ? NaN : sign * Infinity;
      else table[i] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
    }
  }
  const values = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) values[i] = table[bits[i]];
  return values;
}
