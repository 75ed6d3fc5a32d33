// NumPy's format: arrays of real numbers read from a file's bytes, and float32 arrays written.

const MAGIC = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59]; // \x93NUMPY
const READERS = {
  f8: (view, at, little) => view.getFloat64(at, little),
  f4: (view, at, little) => view.getFloat32(at, little),
  f2: (view, at, little) => half(view.getUint16(at, little)),
  i8: (view, at, little) => Number(view.getBigInt64(at, little)),
  u8: (view, at, little) => Number(view.getBigUint64(at, little)),
  i4: (view, at, little) => view.getInt32(at, little),
  u4: (view, at, little) => view.getUint32(at, little),
  i2: (view, at, little) => view.getInt16(at, little),
  u2: (view, at, little) => view.getUint16(at, little),
  i1: (view, at) => view.getInt8(at),
  u1: (view, at) => view.getUint8(at),
};

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** {shape, values}: values is a Float64Array in C order. Throws Error with a sentence. */
export function readNpy(buffer) {
  const bytes = new Uint8Array(buffer);
  if (bytes.length < 10 || MAGIC.some((byte, i) => bytes[i] !== byte)) {
    throw new Error('this is not a .npy file');
  }
  const view = new DataView(buffer);
  const long = bytes[6] >= 2;
  const start = long ? 12 : 10;
  if (bytes.length < start) throw new Error('its header is cut off');
  const length = long ? view.getUint32(8, true) : view.getUint16(8, true);
  if (start + length > bytes.length) throw new Error('its header is cut off');
  const header = new TextDecoder().decode(bytes.subarray(start, start + length));
  const type = /'descr':\s*'([<>|=])([a-zA-Z]\d*)'/.exec(header);
  const order = /'fortran_order':\s*(True|False)/.exec(header);
  const shaped = /'shape':\s*\(([\d,\s]*)\)/.exec(header);
  if (type === null && /'descr':/.test(header)) throw new Error('it holds no plain numbers');
  if (type === null || order === null || shaped === null) throw new Error('its header is damaged');
  const read = READERS[type[2]];
  if (read === undefined) throw new Error(`its dtype ${type[1]}${type[2]} is not a real number`);
  const shape = shaped[1].split(',').map((part) => part.trim()).filter(Boolean).map(Number);
  const count = shape.reduce((total, each) => total * each, 1);
  const width = Number(type[2].slice(1));
  const offset = start + length;
  if (!Number.isSafeInteger(count) || bytes.length < offset + count * width) {
    throw new Error(`it ends before the last number of an array of shape (${shape.join(', ')})`);
  }
  const little = type[1] !== '>';
  const values = new Float64Array(count);
  const place = order[1] === 'True' ? columnMajor(shape) : null;
  for (let i = 0; i < count; i += 1) {
    values[place === null ? i : place(i)] = read(view, offset + i * width, little);
  }
  return { shape, values };
}

/** Index in C order of the i-th number in Fortran order. */
function columnMajor(shape) {
  const strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((total, each) => total * each, 1));
  return (index) => {
    let rest = index;
    let place = 0;
    for (let axis = 0; axis < shape.length; axis += 1) {
      place += (rest % shape[axis]) * strides[axis];
      rest = Math.floor(rest / shape[axis]);
    }
    return place;
  };
}

/** The rows of an array for a model that takes arrays of `xShape`, as `readText` gives them. */
export function rowsOfNpy(buffer, xShape, what = 'Row') {
  const result = { rows: [], ids: null, notes: [], problems: [] };
  let array;
  try {
    array = readNpy(buffer);
  } catch (error) {
    return { ...result, problems: [`The file cannot be read: ${error.message}.`] };
  }
  const size = xShape.reduce((total, each) => total * each, 1);
  const shape = array.shape.length ? array.shape : [1];
  const same = (a, b) => a.length === b.length && a.every((each, i) => each === b[i]);
  const one = same(shape, xShape) ? size !== 1 : size !== 1 && same(shape, [size]);
  const each = shape.slice(1);
  const fits = one || same(each, xShape) || same(each, [size]) || (size === 1 && each.length === 0);
  if (!fits || array.values.length === 0) {
    const wanted = `(${['B', ...xShape].join(', ')})`;
    result.problems.push(
      `The file holds an array of shape (${array.shape.join(', ')}); B observations have shape ${wanted}.`,
    );
    return result;
  }
  const count = array.values.length / size;
  const bad = [];
  for (let i = 0; i < count; i += 1) {
    const row = Array.from(array.values.subarray(i * size, (i + 1) * size));
    const at = row.findIndex((value) => !Number.isFinite(value));
    if (at !== -1) bad.push([i, at, row[at]]);
    result.rows.push(row.map((value) => (Number.isFinite(value) ? value : null)));
  }
  if (bad.length) {
    const more = bad.length > 1 ? `, as is a number in ${bad.length - 1} more row${bad.length > 2 ? 's' : ''}` : '';
    result.notes.push(
      `${what} ${bad[0][0] + 1}, column ${bad[0][1] + 1}: “${bad[0][2]}” is not finite${more}; nothing is drawn for such a row.`,
    );
  }
  return result;
}

/** The bytes of a float32 array in C order, as `numpy.save` writes them. */
export function writeNpy(values, shape) {
  const tuple = shape.length === 1 ? `(${shape[0]},)` : `(${shape.join(', ')})`;
  const header = `{'descr': '<f4', 'fortran_order': False, 'shape': ${tuple}, }`;
  const total = Math.ceil((10 + header.length + 1) / 64) * 64;
  const buffer = new ArrayBuffer(total + 4 * values.length);
  const bytes = new Uint8Array(buffer);
  bytes.set(MAGIC);
  bytes.set([1, 0], 6);
  const view = new DataView(buffer);
  view.setUint16(8, total - 10, true);
  bytes.set(new TextEncoder().encode(`${header.padEnd(total - 11)}\n`), 10);
  for (let i = 0; i < values.length; i += 1) view.setFloat32(total + 4 * i, values[i], true);
  return buffer;
}
