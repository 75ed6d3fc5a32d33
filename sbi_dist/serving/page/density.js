// Numbers behind the pictures: windows, histograms, smoothed densities and their contours.

/** Quantile with linear interpolation, as `numpy.quantile` has it; `ordered` ascending. */
export function quantile(ordered, level) {
  const place = level * (ordered.length - 1);
  const below = Math.floor(place);
  const above = Math.min(below + 1, ordered.length - 1);
  return ordered[below] + (place - below) * (ordered[above] - ordered[below]);
}

/** One parameter's draws and what is needed of them again and again. */
export function column(draws, size, index) {
  const count = draws.length / size;
  const values = new Float32Array(count);
  for (let i = 0, at = index; i < count; i += 1, at += size) values[i] = draws[at];
  const ordered = Float32Array.from(values).sort();
  let mean = 0;
  for (const value of values) mean += value / count;
  let square = 0;
  for (const value of values) square += (value - mean) ** 2 / Math.max(count - 1, 1);
  const middle = (quantile(ordered, 0.75) - quantile(ordered, 0.25)) / 1.349;
  const sd = Math.sqrt(square);
  const spread = middle > 0 ? Math.min(sd, middle) : sd;
  return { values, ordered, mean, sd, spread, median: quantile(ordered, 0.5) };
}

/** Range to plot: the bulk of the draws, cut at the prior's support, grown to true values. */
export function plotWindow({ ordered }, [floor, ceiling], truth) {
  let low = quantile(ordered, 0.001);
  let high = quantile(ordered, 0.999);
  if (high - low <= 1e-7 * Math.max(Math.abs(low), Math.abs(high)) || high === low) {
    const half = low === 0 ? 0.5 : 0.05 * Math.abs(low);
    [low, high] = [low - half, high + half];
  }
  const width = high - low;
  // A little of the prior is shown on both sides.
  low = Math.max(low - 0.12 * width, floor);
  high = Math.min(high + 0.12 * width, ceiling);
  if (low >= high) [low, high] = [low - width, high + width];
  if (truth !== null) {
    low = Math.min(low, truth - 0.08 * width);
    high = Math.max(high, truth + 0.08 * width);
  }
  return [low, high];
}

/** The part of a window within the prior's support. */
export const inside = ([low, high], [floor, ceiling]) =>
  floor < high && ceiling > low ? [Math.max(low, floor), Math.min(high, ceiling)] : [low, high];

/** Number of cells so that the bulk of the draws is resolved however wide the range is. */
export function cellsFor({ ordered }, [low, high], across, most) {
  const bulk = quantile(ordered, 0.999) - quantile(ordered, 0.001);
  return Math.round(Math.max(across / 2, Math.min(most, bulk > 0 ? (across * (high - low)) / bulk : across)));
}

/** Heights of a histogram with area 1 (less what lies outside the range). */
export function histogram({ values }, [low, high], cells) {
  const heights = new Float64Array(cells);
  const scale = cells / (high - low);
  for (const value of values) {
    const cell = Math.floor((value - low) * scale);
    if (cell >= 0 && cell < cells) heights[cell] += 1;
    else if (value === high) heights[cells - 1] += 1;
  }
  for (let i = 0; i < cells; i += 1) heights[i] *= scale / values.length;
  return heights;
}

/**
 * Smoothed density of two parameters on a grid of columns x rows, row after row upward, and the
 * densities above which each of the `masses` lies.
 *
 * These are quantiles of the density at the draws (Hyndman 1996, The American Statistician 50), so
 * that a region holds its part of the draws however much was smoothed.
 */
export function density2d(x, y, xRange, yRange, columns, rows, masses) {
  const grid = new Float64Array(columns * rows);
  const xScale = columns / (xRange[1] - xRange[0]);
  const yScale = rows / (yRange[1] - yRange[0]);
  const count = x.values.length;
  for (let i = 0; i < count; i += 1) {
    // The upper ends belong to the last cells: draws may lie on the prior's bound.
    const a = x.values[i] === xRange[1] ? columns - 1 : Math.floor((x.values[i] - xRange[0]) * xScale);
    const b = y.values[i] === yRange[1] ? rows - 1 : Math.floor((y.values[i] - yRange[0]) * yScale);
    if (a >= 0 && a < columns && b >= 0 && b < rows) grid[b * columns + a] += 1;
  }
  // Scott's rule in two dimensions, narrower across a ridge.
  const bandwidth = count ** (-1 / 6) * (1 - Math.min(correlation(x, y) ** 2, 0.99)) ** 0.25;
  smooth(grid, rows, columns, columns, 1, Math.max(bandwidth * x.spread * xScale, 0.8));
  smooth(grid, columns, rows, 1, columns, Math.max(bandwidth * y.spread * yScale, 0.8));
  const place = (value, low, scale, cells) =>
    Math.min(Math.max((value - low) * scale - 0.5, 0), cells - 1);
  const at = new Float64Array(count);
  for (let i = 0; i < count; i += 1) {
    const u = x.values[i];
    const v = y.values[i];
    if (u < xRange[0] || u > xRange[1] || v < yRange[0] || v > yRange[1]) continue;
    at[i] = between(grid, columns, rows, place(u, xRange[0], xScale, columns), place(v, yRange[0], yScale, rows));
  }
  at.sort();
  // Draws that are all the same lie in the middle of a cell, above any level below its density.
  return { grid, levels: masses.map((mass) => quantile(at, 1 - mass) * (1 - 1e-9)) };
}

/** Value between the centres of cells. */
function between(grid, columns, rows, a, b) {
  const i = Math.min(Math.floor(a), columns - 2);
  const j = Math.min(Math.floor(b), rows - 2);
  const s = a - i;
  const t = b - j;
  const corner = j * columns + i;
  return (
    (1 - t) * ((1 - s) * grid[corner] + s * grid[corner + 1]) +
    t * ((1 - s) * grid[corner + columns] + s * grid[corner + columns + 1])
  );
}

function correlation(x, y) {
  if (!(x.sd > 0 && y.sd > 0)) return 0;
  let sum = 0;
  for (let i = 0; i < x.values.length; i += 1) sum += (x.values[i] - x.mean) * (y.values[i] - y.mean);
  return sum / (x.values.length * x.sd * y.sd);
}

/** Gaussian smoothing along one axis; mirrored at the ends, which may be bounds of the prior. */
function smooth(grid, lines, length, lineStep, step, sd) {
  const reach = Math.min(Math.ceil(3 * sd), length - 1);
  const kernel = Array.from({ length: 2 * reach + 1 }, (_, i) => Math.exp(-0.5 * ((i - reach) / sd) ** 2));
  const total = kernel.reduce((a, b) => a + b, 0);
  const padded = new Float64Array(length + 2 * reach);
  for (let line = 0; line < lines; line += 1) {
    const start = line * lineStep;
    for (let i = 0; i < length; i += 1) padded[reach + i] = grid[start + i * step];
    for (let i = 0; i < reach; i += 1) {
      padded[reach - 1 - i] = padded[reach + i];
      padded[reach + length + i] = padded[reach + length - 1 - i];
    }
    for (let i = 0; i < length; i += 1) {
      let value = 0;
      for (let k = 0; k < kernel.length; k += 1) value += kernel[k] * padded[i + k];
      grid[start + i * step] = value / total;
    }
  }
}

/**
 * Closed rings around where a grid is above a level, by marching squares.
 *
 * Corners are the centres of cells. A rim of the outermost values and one of nothing are put
 * around, both at the grid's edge, so that regions that reach the edge end there.
 * Points are in cells: (0, 0) is the lower left corner of the grid.
 */
export function contourRings(grid, columns, rows, level) {
  const wide = columns + 4;
  const tall = rows + 4;
  const clamp = (i, n) => Math.min(Math.max(i, 0), n - 1);
  const padded = new Float64Array(wide * tall).fill(-1);
  for (let j = 1; j < tall - 1; j += 1) {
    const row = clamp(j - 2, rows) * columns;
    for (let i = 1; i < wide - 1; i += 1) padded[j * wide + i] = grid[row + clamp(i - 2, columns)];
  }
  const place = (i, n) => Math.min(Math.max(i - 1.5, 0), n);
  const crossing = (i, j, upward) => {
    const a = padded[j * wide + i];
    const b = padded[upward ? (j + 1) * wide + i : j * wide + i + 1];
    const part = (level - a) / (b - a);
    const x0 = place(i, columns);
    const y0 = place(j, rows);
    return upward
      ? [x0, y0 + part * (place(j + 1, rows) - y0)]
      : [x0 + part * (place(i + 1, columns) - x0), y0];
  };
  // Crossings are named by their grid edge: 2 * corner for rightward, + 1 for upward edges.
  const next = new Map();
  for (let j = 0; j < tall - 1; j += 1) {
    for (let i = 0; i < wide - 1; i += 1) {
      const corner = j * wide + i;
      const ll = padded[corner];
      const lr = padded[corner + 1];
      const ur = padded[corner + wide + 1];
      const ul = padded[corner + wide];
      const code = (ll >= level) | ((lr >= level) << 1) | ((ur >= level) << 2) | ((ul >= level) << 3);
      if (code === 0 || code === 15) continue;
      const [bottom, left] = [2 * corner, 2 * corner + 1];
      const [top, right] = [2 * (corner + wide), 2 * (corner + 1) + 1];
      const joined = ll + lr + ur + ul >= 4 * level; // of a saddle
      for (const [from, to] of segments(code, joined, bottom, right, top, left)) next.set(from, to);
    }
  }
  const rings = [];
  for (const first of [...next.keys()]) {
    const ring = [];
    for (let edge = first; next.has(edge); ) {
      const following = next.get(edge);
      next.delete(edge);
      const corner = edge >> 1;
      ring.push(crossing(corner % wide, Math.floor(corner / wide), edge % 2 === 1));
      edge = following;
    }
    if (ring.length > 2) rings.push(ring);
  }
  return rings;
}

/** Segments through a square, with what is above the level on their left. */
function segments(code, joined, bottom, right, top, left) {
  switch (code) {
    case 1: return [[bottom, left]];
    case 2: return [[right, bottom]];
    case 3: return [[right, left]];
    case 4: return [[top, right]];
    case 5: return joined ? [[bottom, right], [top, left]] : [[bottom, left], [top, right]];
    case 6: return [[top, bottom]];
    case 7: return [[top, left]];
    case 8: return [[left, top]];
    case 9: return [[bottom, top]];
    case 10: return joined ? [[left, bottom], [right, top]] : [[right, bottom], [left, top]];
    case 11: return [[right, top]];
    case 12: return [[left, right]];
    case 13: return [[bottom, right]];
    default: return [[left, bottom]];
  }
}
