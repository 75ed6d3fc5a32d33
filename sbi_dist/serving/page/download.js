// Files made in the browser: draws as CSV, JSON and NumPy's format, and what saves them.

import { writeNpy } from './npy.js';

/** The shortest text that reads back as the same float32. */
export function float32Text(value) {
  for (let digits = 6; digits < 9; digits += 1) {
    const rounded = Number(value.toPrecision(digits));
    if (Math.fround(rounded) === value) return String(rounded);
  }
  return String(Number(value.toPrecision(9)));
}

const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

/** One line a draw: the observation's name and the parameters. */
export function csvOf(run, indices) {
  const names = run.about.parameter_names;
  const parts = [`${['observation_id', ...names].map(cell).join(',')}\n`];
  for (const index of indices) {
    const draws = run.draws[index];
    if (draws === null) continue;
    const lines = [];
    for (let at = 0; at < draws.length; at += names.length) {
      const values = Array.from(draws.subarray(at, at + names.length), float32Text);
      lines.push(`${cell(run.ids[index])},${values.join(',')}\n`);
    }
    parts.push(lines.join(''));
  }
  return new Blob(parts, { type: 'text/csv' });
}

/** As the service answers, with the observations themselves. */
export function jsonOf(run, indices) {
  const size = run.about.parameter_names.length;
  const head = {
    model: run.about.model,
    parameter_names: run.about.parameter_names,
    num_samples: run.count,
    seed: run.seed,
  };
  const parts = [`${JSON.stringify(head).slice(0, -1)},"observations":[`];
  indices.forEach((index, i) => {
    const about = {
      observation_id: run.ids[index],
      x: run.rows[index],
      status: run.statuses[index],
      out_of_distribution: run.scores[index],
      out_of_distribution_p: run.ps[index],
    };
    parts.push(`${i ? ',' : ''}\n${JSON.stringify(about).slice(0, -1)},"draws":${arrays(run.draws[index], size)}}`);
  });
  parts.push(']}\n');
  return new Blob(parts, { type: 'application/json' });
}

function arrays(draws, size) {
  if (draws === null) return 'null';
  const rows = [];
  for (let at = 0; at < draws.length; at += size) {
    rows.push(`[${Array.from(draws.subarray(at, at + size), float32Text).join(',')}]`);
  }
  return `[${rows.join(',')}]`;
}

/** float32 of shape (N, D), or (B, N, D) for several; NaN where nothing was drawn. */
export function npyOf(run, indices) {
  const size = run.about.parameter_names.length;
  const each = run.count * size;
  const values = new Float32Array(indices.length * each).fill(NaN);
  indices.forEach((index, i) => run.draws[index] && values.set(run.draws[index], i * each));
  const shape = indices.length === 1 ? [run.count, size] : [indices.length, run.count, size];
  return new Blob([writeNpy(values, shape)], { type: 'application/octet-stream' });
}

/** Save under a name without characters that file systems dislike. */
export function save(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name.replace(/[^\w.+-]+/g, '_');
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
