// Observations as people paste them: JSON, CSV, columns, what NumPy prints. No files, no requests.
//
// Every reader gives {rows, ids, notes, problems}: rows of `size` numbers (null: missing, NaN or
// infinite), names of the rows or null, remarks, and what has to be put right first.

const NUMBER = /^[-+]?(\d+\.?\d*|\.\d+)([eEdD][-+]?\d+)?$/;
const DECIMAL_COMMA = /^[-+]?\d*,\d+([eE][-+]?\d+)?$/;
const MISSING = /^([-+]?(nan|inf|infinity|1\.#inf|1\.#ind)|na|n\/a|null|none|)$/i;
const ID_NAMES = new Set(['observation_id', 'id']);
const SHOWN = 4;

const product = (shape) => shape.reduce((total, length) => total * length, 1);
export const numbers = (count, noun = 'number') =>
  `${count.toLocaleString('en')} ${noun}${count === 1 ? '' : 's'}`;
const nothing = (problem) => ({ rows: [], ids: null, notes: [], problems: [problem] });

/** Rows of text, for a model that takes arrays of `shape`; `what` a row is called in messages. */
export function readText(text, shape, what = 'Row') {
  const clean = text.replace(/^\ufeff/, '').trim();
  if (clean === '') return { rows: [], ids: null, notes: [], problems: [] };
  if (clean.startsWith('PAR1')) return nothing(PARQUET);
  if (/^[[{]/.test(clean)) return readJson(clean, shape, what);
  if (/^(np\.|numpy\.|torch\.)?(array|tensor)\(/.test(clean)) return readPrinted(clean, shape, what);
  return readTable(clean, shape, what);
}

export const PARQUET =
  'Parquet files are not read on this page, and this one was sent nowhere. Use the Python client, ' +
  'or save the observations as .csv or .npy.';

// ---- JSON -----------------------------------------------------------------------------------

function readJson(text, shape, what) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return readNearlyJson(text, shape, what, error);
  }
  return fromValue(value, shape, what);
}

function readNearlyJson(text, shape, what, error) {
  const strict = text.replace(/[-+]?\b(NaN|Infinity)\b/g, 'null'); // as Python writes them
  for (const candidate of [strict, `[${strict.split(/\r\n?|\n/).filter(Boolean).join(',')}]`]) {
    try {
      return fromValue(JSON.parse(candidate), shape, what);
    } catch {
      // Neither that.
    }
  }
  if (text.startsWith('[') && text.split('[').length === text.split(']').length) {
    return readPrinted(text, shape, what);
  }
  return nothing(`This is not valid JSON: ${error.message}.`);
}

function fromValue(value, shape, what) {
  const size = product(shape);
  let ids = null;
  if (value !== null && typeof value === 'object' && !Array.isArray(value)) {
    if (!('x' in value)) {
      return nothing('This JSON object has no field "x"; give an array of numbers, or {"x": [...]}.');
    }
    ids = Array.isArray(value.observation_ids) ? value.observation_ids.map(String) : null;
    value = value.x;
  }
  if (!Array.isArray(value)) return nothing('This JSON holds no array; give [[…], […]] or […].');
  const flat = value.every((each) => !Array.isArray(each));
  const one = (flat && size !== 1) || (shape.length > 1 && sameShape(value, shape));
  const rows = (one ? [value] : value).map((row) => (Array.isArray(row) ? row.flat(Infinity) : [row]));
  const result = check(rows, size, what, jsonNumber);
  if (ids !== null && ids.length !== rows.length) {
    result.problems.push(`observation_ids has ${ids.length} names for ${numbers(rows.length, 'row')}.`);
  }
  return { ...result, ids: rows.length ? ids : null };
}

function sameShape(value, shape) {
  if (shape.length === 0) return !Array.isArray(value);
  return (
    Array.isArray(value) &&
    value.length === shape[0] &&
    value.every((each) => sameShape(each, shape.slice(1)))
  );
}

function jsonNumber(value) {
  if (value === null) return null;
  if (typeof value !== 'number') return undefined;
  return Number.isFinite(value) ? value : null;
}

// ---- what NumPy and torch print -------------------------------------------------------------

function readPrinted(text, shape, what) {
  if (text.includes('...')) {
    return nothing('Numbers were left out of this text ("..."); print the whole array, or open a .npy file.');
  }
  let rows = [...text.matchAll(/\[([^[\]]*)\]/g)].map((match) => match[1].split(/[\s,]+/).filter(Boolean));
  if (rows.length === 0) return nothing('This text holds no array in brackets.');
  const size = product(shape);
  const all = rows.flat();
  if ((shape.length > 1 && all.length % size === 0) || (rows.length === 1 && size === 1)) {
    rows = Array.from({ length: all.length / size }, (_, i) => all.slice(i * size, (i + 1) * size));
  }
  return { ...check(rows, size, what, textNumber), ids: null };
}

// ---- tables ---------------------------------------------------------------------------------

function readTable(text, shape, what) {
  const size = product(shape);
  const notes = [];
  let lines = text
    .split(/\r\n?|\n/)
    .map((line, index) => ({ text: line.trim(), number: index + 1 }))
    .filter((line) => line.text !== '' && !line.text.startsWith('#'));
  if (lines.length === 0) return nothing('There are only comments here, no numbers.');
  const split = splitter(lines);
  for (const line of lines) {
    line.cells = split(line.text).map((cell) => cell.trim().replace(/^(["'])(.*)\1$/, '$2').trim());
    const last = line.cells.length - 1;
    if (line.cells.length === size + 1 && line.cells[last] === '') line.cells.pop();
  }
  if (lines.some((line) => line.cells.some((cell) => DECIMAL_COMMA.test(cell)))) {
    notes.push('Commas within numbers are read as decimal commas.');
  }

  let header = null;
  if (isHeader(lines[0].cells)) {
    header = lines[0].cells;
    lines = lines.slice(1);
    if (lines.length === 0) return nothing('There is only a header here, no row of numbers.');
    notes.push('The first line is read as a header.');
  }
  const column = idColumn(header, lines, size);
  let ids = null;
  if (column !== -1) {
    ids = lines.map((line) => line.cells[column] ?? '');
    for (const line of lines) line.cells.splice(column, 1);
    notes.push(`Column ${column + 1} is read as the observations' names.`);
  }
  if (size > 1 && lines.length === size && lines.every((line) => line.cells.length === 1) && !ids) {
    notes.push('One number a line is read as one observation.');
    lines = [{ cells: lines.map((line) => line.cells[0]), number: 1 }];
  }
  // A row's number in messages counts observations; editors count lines.
  const where = (row) =>
    lines[row].number === row + 1 ? `${what} ${row + 1}` : `${what} ${row + 1} (line ${lines[row].number})`;
  const columnOf = (index) => (column !== -1 && index >= column ? index + 2 : index + 1);
  const cells = lines.map((line) => line.cells);
  const result = check(cells, size, what, textNumber, where, columnOf);
  return { ...result, notes: [...notes, ...result.notes], ids };
}

function splitter(lines) {
  const has = (character) => lines.some((line) => line.text.includes(character));
  if (has(';')) return (text) => text.split(';');
  if (has('\t')) return (text) => text.split('\t').map((cell) => cell.replace(/,\s*$/, ''));
  if (has(',')) return (text) => text.split(',');
  return (text) => text.split(/\s+/);
}

const isNumber = (cell) => NUMBER.test(cell) || DECIMAL_COMMA.test(cell);

function isHeader(cells) {
  const filled = cells.filter((cell) => cell !== '');
  return filled.some((cell) => !MISSING.test(cell)) && !filled.some(isNumber);
}

function idColumn(header, lines, size) {
  const named = header?.findIndex((name) => ID_NAMES.has(name.toLowerCase())) ?? -1;
  if (named !== -1) return named;
  const texts = lines.every(({ cells }) => cells.length === size + 1 && !isNumber(cells[0]) && cells[0] !== '');
  return texts ? 0 : -1;
}

function textNumber(cell) {
  if (MISSING.test(cell)) return null;
  if (NUMBER.test(cell)) return finite(Number(cell.replace(/[dD]/, 'e')));
  if (DECIMAL_COMMA.test(cell)) return finite(Number(cell.replace(',', '.')));
  return undefined;
}

const finite = (value) => (Number.isFinite(value) ? value : null);

// ---- what all have in common ----------------------------------------------------------------

function check(
  rows,
  size,
  what,
  read,
  where = (row) => `${what} ${row + 1}`,
  columnOf = (index) => index + 1,
) {
  const problems = [];
  const missing = [];
  const checked = rows.map((row, i) => {
    if (row.length !== size) {
      problems.push(`${where(i)} has ${numbers(row.length)}; ${size} ${size === 1 ? 'is' : 'are'} needed.`);
      return row;
    }
    return row.map((cell, j) => {
      const value = read(cell);
      if (value === undefined) {
        problems.push(`${where(i)}, column ${columnOf(j)}: ${quoted(cell)} is not a number.`);
      } else if (value === null) missing.push({ row: i, column: j, cell });
      return value;
    });
  });
  if (rows.length === 0) problems.push('There is no row of numbers here.');
  const notes = [];
  if (missing.length) {
    const [{ row, column, cell }] = missing;
    const count = new Set(missing.map((each) => each.row)).size;
    notes.push(
      `${where(row)}, column ${columnOf(column)}: ${quoted(cell)} is not finite` +
        (count > 1 ? `, as is a number in ${numbers(count - 1, 'more row')}` : '') +
        '; nothing is drawn for such a row.',
    );
  }
  return { rows: checked, ids: null, notes, problems };
}

function quoted(cell) {
  if (cell === '' || cell === null) return 'an empty cell';
  const text = typeof cell === 'string' ? cell : JSON.stringify(cell);
  return `“${text.length > 24 ? `${text.slice(0, 24)}…` : text}”`;
}

/** The first few problems, and how many more there are. */
export function shortened(problems) {
  if (problems.length <= SHOWN + 1) return problems;
  return [...problems.slice(0, SHOWN), `And ${problems.length - SHOWN} more such problems.`];
}

/** Text to fill in: a header and a row of zeros. */
export function template(size, names = null) {
  const header = names ?? Array.from({ length: size }, (_, i) => `x_${i + 1}`);
  const row = Array(size).fill('0').join(', ');
  return size <= 100 ? `${header.join(', ')}\n${row}\n` : `${row}\n`;
}
