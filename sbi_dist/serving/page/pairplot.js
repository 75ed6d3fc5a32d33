// The pair plot on a canvas: marginals on the diagonal, highest-density regions below it.

import { cellsFor, column, contourRings, density2d, histogram, inside, plotWindow } from './density.js';
import { fitTicks } from './ticks.js';

export const MASSES = [0.68, 0.95];
const GAP = 6;
const MIN_FOR_CONTOURS = 300;
const MAX_POINTS = 5000;
const MIN_PANEL = 74;
const MAX_PANEL = 230;
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

/** Colours for a screen as it is set, from the style sheet; or those of print. */
export function palette(print = false) {
  const style = getComputedStyle(document.documentElement);
  const names = ['posterior', 'prior', 'prior-fill', 'truth', 'ink', 'soft', 'frame', 'paper'];
  return Object.fromEntries(
    names.map((name) => [name, style.getPropertyValue(`--${print ? 'print' : 'plot'}-${name}`).trim()]),
  );
}

/** Ready to draw, whatever the size and colours: the slow part, done once an observation. */
export function prepare({ draws, size, which, priors, truth }) {
  const columns = which.map((index) => {
    const each = column(draws, size, index);
    const { bounds, density } = priors[index];
    const mark = truth?.[index] ?? null;
    const window = plotWindow(each, bounds, mark);
    const range = inside(window, bounds);
    const bars = cellsFor(each, range, each.values.length >= 2000 ? 30 : 18, 160);
    return { ...each, window, range, bounds, density, truth: mark, heights: histogram(each, range, bars) };
  });
  const many = draws.length / size >= MIN_FOR_CONTOURS;
  const panels = new Map();
  for (let j = 1; j < columns.length && many; j += 1) {
    for (let k = 0; k < j; k += 1) panels.set(`${j},${k}`, regions(columns[k], columns[j]));
  }
  return { columns, panels, many };
}

function regions(x, y) {
  const wide = cellsFor(x, x.range, 48, 160);
  const tall = cellsFor(y, y.range, 48, 160);
  const { grid, levels } = density2d(x, y, x.range, y.range, wide, tall, MASSES);
  const at = ([low, high], cells) => (cell) => low + (cell * (high - low)) / cells;
  const [toX, toY] = [at(x.range, wide), at(y.range, tall)];
  return levels.map((level) =>
    contourRings(grid, wide, tall, level).map((ring) => ring.map(([a, b]) => [toX(a), toY(b)])),
  );
}

/** Draw; `width` in CSS pixels is what there is, the canvas may need more and then scrolls. */
export function drawPairs(canvas, prepared, { labels, width, scale, colours }) {
  const { columns } = prepared;
  const size = columns.length;
  const small = width < 480 || size > 6;
  const type = small ? 11 : 12;
  const context = canvas.getContext('2d');
  const font = (pixels, weight = 400) => `${weight} ${pixels}px ${FONT}`;
  context.font = font(type);
  const widthOf = (text) => context.measureText(text).width;
  const most = size <= 3 ? 5 : size <= 5 ? 4 : 3;
  const ticksFor = (length) =>
    columns.map(({ window: [low, high] }) => fitTicks(low, high, length, most, widthOf, type));

  const nameLine = type + 4;
  let lines = 2; // of a parameter's name
  const layout = (ticks) => {
    const widest = Math.max(0, ...ticks.slice(1).flatMap((each) => each.ticks.map((tick) => widthOf(tick.label))));
    const left = size === 1 ? 12 : widest + 12 + lines * nameLine;
    const top = size === 1 ? 30 : 4;
    const room = (width - left - 8 - GAP * (size - 1)) / size;
    const panel = size === 1 ? Math.min(width - left - 8, 460) : Math.max(MIN_PANEL, Math.min(MAX_PANEL, room));
    const tall = size === 1 ? Math.min(panel * 0.55, 240) : panel;
    return { left, top, panel, tall };
  };
  let place = layout(ticksFor(Math.max(MIN_PANEL, (width - 60) / size - GAP)));
  const ticks = ticksFor(place.panel);
  place = layout(ticks);
  const names = labels.map((label, i) => nameLines(label, ticks[i].factor, place.panel, widthOf));
  lines = Math.max(...names.map((each) => each.length));
  place = layout(ticks);
  const { left, top, panel, tall } = place;
  const full = Math.ceil(left + size * panel + (size - 1) * GAP + 8);
  const high = Math.ceil(top + size * tall + (size - 1) * GAP + type + 12 + lines * nameLine);

  canvas.width = Math.round(full * scale);
  canvas.height = Math.round(high * scale);
  canvas.style.width = `${full}px`;
  canvas.style.height = `${high}px`;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.fillStyle = colours.paper;
  context.fillRect(0, 0, full, high);
  context.lineJoin = 'round';

  for (let j = 0; j < size; j += 1) {
    for (let k = 0; k <= j; k += 1) {
      const box = { x: left + k * (panel + GAP), y: top + j * (tall + GAP), width: panel, height: tall };
      const toX = scaleOf(columns[k].window, box.x, panel);
      const toY = scaleOf(columns[j].window, box.y + tall, -tall);
      context.save();
      context.beginPath();
      context.rect(box.x, box.y, box.width, box.height);
      context.clip();
      if (j === k) drawMarginal(context, columns[j], box, toX, colours);
      else drawPair(context, prepared, j, k, toX, toY, colours);
      context.restore();
      drawFrame(context, box, j === k, colours);
      context.font = font(type);
      drawTicks(context, box, ticks[k], toX, j !== k ? ticks[j] : null, toY, { last: j === size - 1, first: k === 0 }, colours);
    }
  }
  context.fillStyle = colours.ink;
  context.textAlign = 'center';
  context.textBaseline = 'top';
  context.font = font(type + 0.5);
  for (let j = 0; j < size; j += 1) {
    const below = top + size * tall + (size - 1) * GAP + type + 9;
    names[j].forEach((line, i) => context.fillText(line, left + j * (panel + GAP) + panel / 2, below + i * nameLine));
    if (j === 0) continue;
    context.save();
    context.translate(0, top + j * (tall + GAP) + tall / 2);
    context.rotate(-Math.PI / 2);
    names[j].forEach((line, i) => context.fillText(line, 0, 2 + (i + lines - names[j].length) * nameLine));
    context.restore();
  }
  context.font = font(type);
  // Where a picture is wider than its frame, within what is seen at first.
  const corner = { x: Math.min(full, Math.max(width, left + 3 * panel)) - 8, y: top + 10, across: false };
  drawLegend(context, prepared, size === 1 ? { x: left, y: 8, across: true } : corner, type, colours);
}

const scaleOf = ([low, high], origin, length) => (value) => origin + ((value - low) / (high - low)) * length;

function drawMarginal(context, each, box, toX, colours) {
  const { heights, range, density, window } = each;
  const floor = box.y + box.height;
  const prior = density === null ? null : curve(density, window, box.width);
  const tallest = Math.max(...heights, ...(prior ?? []).map(([, y]) => y)) || 1;
  const up = (value) => floor - (value / tallest) * (box.height - 8);
  const step = (range[1] - range[0]) / heights.length;
  context.fillStyle = colours.posterior;
  context.globalAlpha = 0.55;
  context.beginPath();
  context.moveTo(toX(range[0]), floor);
  heights.forEach((height, i) => {
    context.lineTo(toX(range[0] + i * step), up(height));
    context.lineTo(toX(range[0] + (i + 1) * step), up(height));
  });
  context.lineTo(toX(range[1]), floor);
  context.fill();
  context.globalAlpha = 1;
  if (prior !== null) {
    context.strokeStyle = colours.prior;
    context.lineWidth = 1.3;
    context.beginPath();
    prior.forEach(([x, y]) => context.lineTo(toX(x), up(y)));
    context.stroke();
  }
  vertical(context, toX(each.median), box, colours.posterior, [4, 3], 1.3);
  if (each.truth !== null) vertical(context, toX(each.truth), box, colours.truth, [], 1.6);
}

/** Points of a density, with a step where the prior ends. */
function curve(density, [low, high], pixels) {
  const steps = Math.ceil(pixels);
  const points = [];
  for (let i = 0; i <= steps; i += 1) {
    const x = low + (i * (high - low)) / steps;
    const y = density(x);
    const before = points.at(-1);
    if (before !== undefined && (y === 0) !== (before[1] === 0)) points.push([y === 0 ? before[0] : x, 0]);
    points.push([x, y]);
  }
  return points;
}

function vertical(context, x, box, colour, dash, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.setLineDash(dash);
  context.beginPath();
  context.moveTo(x, box.y);
  context.lineTo(x, box.y + box.height);
  context.stroke();
  context.setLineDash([]);
}

function drawPair(context, { columns, panels, many }, j, k, toX, toY, colours) {
  const [x, y] = [columns[k], columns[j]];
  if (x.bounds.concat(y.bounds).some(Number.isFinite)) {
    context.fillStyle = colours['prior-fill'];
    const [a, b, c, d] = [toX(x.range[0]), toX(x.range[1]), toY(y.range[1]), toY(y.range[0])];
    context.fillRect(a, c, b - a, d - c);
  }
  context.fillStyle = context.strokeStyle = colours.posterior;
  if (many) {
    const [inner, outer] = panels.get(`${j},${k}`);
    fillRings(context, outer, toX, toY, 0.35);
    fillRings(context, inner, toX, toY, 0.75);
    context.lineWidth = 1;
    for (const ring of [...outer, ...inner]) {
      tracePath(context, [ring], toX, toY);
      context.stroke();
    }
  } else {
    context.globalAlpha = 0.5;
    const count = Math.min(x.values.length, MAX_POINTS);
    for (let i = 0; i < count; i += 1) {
      context.beginPath();
      context.arc(toX(x.values[i]), toY(y.values[i]), 1.6, 0, 2 * Math.PI);
      context.fill();
    }
    context.globalAlpha = 1;
  }
  cross(context, toX(x.median), toY(y.median), colours.paper);
  if (x.truth === null || y.truth === null) return;
  context.strokeStyle = colours.truth;
  context.lineWidth = 1;
  context.globalAlpha = 0.7;
  context.beginPath();
  context.moveTo(toX(x.truth), -1e4);
  context.lineTo(toX(x.truth), 1e5);
  context.moveTo(-1e4, toY(y.truth));
  context.lineTo(1e5, toY(y.truth));
  context.stroke();
  context.globalAlpha = 1;
  dot(context, toX(x.truth), toY(y.truth), colours);
}

function cross(context, x, y, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 1.4;
  context.beginPath();
  context.moveTo(x - 3.5, y);
  context.lineTo(x + 3.5, y);
  context.moveTo(x, y - 3.5);
  context.lineTo(x, y + 3.5);
  context.stroke();
}

function dot(context, x, y, colours) {
  context.fillStyle = colours.truth;
  context.strokeStyle = colours.paper;
  context.lineWidth = 1;
  context.beginPath();
  context.arc(x, y, 3.6, 0, 2 * Math.PI);
  context.fill();
  context.stroke();
}

function tracePath(context, rings, toX, toY) {
  context.beginPath();
  for (const ring of rings) {
    ring.forEach(([x, y], i) => (i === 0 ? context.moveTo(toX(x), toY(y)) : context.lineTo(toX(x), toY(y))));
    context.closePath();
  }
}

function fillRings(context, rings, toX, toY, opacity) {
  context.globalAlpha = opacity;
  tracePath(context, rings, toX, toY);
  context.fill('evenodd');
  context.globalAlpha = 1;
}

function drawFrame(context, box, open, colours) {
  context.strokeStyle = colours.frame;
  context.lineWidth = 1;
  context.beginPath();
  if (open) {
    context.moveTo(box.x, box.y + box.height);
    context.lineTo(box.x + box.width, box.y + box.height);
  } else context.rect(box.x, box.y, box.width, box.height);
  context.stroke();
}

function drawTicks(context, box, across, toX, upward, toY, { last, first }, colours) {
  context.strokeStyle = colours.frame;
  context.fillStyle = colours.ink;
  context.lineWidth = 1;
  context.beginPath();
  const floor = box.y + box.height;
  for (const { value } of across.ticks) {
    context.moveTo(toX(value), floor);
    context.lineTo(toX(value), floor + 3);
  }
  for (const { value } of upward?.ticks ?? []) {
    context.moveTo(box.x, toY(value));
    context.lineTo(box.x - 3, toY(value));
  }
  context.stroke();
  if (last) {
    context.textAlign = 'center';
    context.textBaseline = 'top';
    for (const { value, label } of across.ticks) context.fillText(label, toX(value), floor + 6);
  }
  if (first && upward !== null) {
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    for (const { value, label } of upward.ticks) context.fillText(label, box.x - 6, toY(value));
  }
}

/** A name and the factor of its ticks on at most two lines that fit a panel. */
function nameLines(name, factor, width, widthOf) {
  const whole = factor ? `${name} (${factor})` : name;
  if (widthOf(whole) <= width) return [whole];
  const second = factor ? `(${factor})` : null;
  if (second !== null && widthOf(name) <= width) return [name, second];
  const breaks = [...name.matchAll(/[_\s]+/g)].map((match) => match.index + match[0].length);
  const fitting = breaks.filter((at) => widthOf(name.slice(0, at).trim()) <= width);
  if (second !== null || fitting.length === 0) return [cut(name, width, widthOf), second].filter(Boolean);
  const at = fitting.at(-1);
  return [name.slice(0, at).trim(), cut(name.slice(at), width, widthOf)];
}

function cut(text, width, widthOf) {
  if (widthOf(text) <= width) return text;
  let length = text.length;
  while (length > 1 && widthOf(`${text.slice(0, length)}…`) > width) length -= 1;
  return `${text.slice(0, length)}…`;
}

function drawLegend(context, { columns, many }, { x, y, across }, type, colours) {
  const alone = columns.length === 1;
  const entries = [['Posterior', 'posterior']];
  if (!alone && many) entries.splice(0, 1, ['68 %', 'inner'], ['95 %', 'outer']);
  if (columns.some((each) => each.density !== null)) entries.push(['Prior', 'prior']);
  entries.push(['Median', 'median']);
  if (columns.some((each) => each.truth !== null)) entries.push(['True value', 'truth']);
  const line = type + 9;
  const widest = Math.max(...entries.map(([label]) => context.measureText(label).width));
  let [at, top] = [across ? x : x - widest - 30, y];
  context.textAlign = 'left';
  context.textBaseline = 'middle';
  for (const [label, kind] of entries) {
    swatch(context, kind, at, top, colours);
    context.fillStyle = colours.ink;
    context.fillText(label, at + 30, top + 5);
    if (across) at += 30 + context.measureText(label).width + 20;
    else top += line;
  }
}

function swatch(context, kind, x, y, colours) {
  const middle = y + 5;
  if (kind === 'inner' || kind === 'outer' || kind === 'posterior') {
    context.fillStyle = context.strokeStyle = colours.posterior;
    // The inner region is drawn over the outer one.
    for (const alpha of kind === 'inner' ? [0.35, 0.75] : kind === 'outer' ? [0.35] : [0.55]) {
      context.globalAlpha = alpha;
      context.fillRect(x, y, 22, 10);
    }
    context.globalAlpha = 1;
    context.lineWidth = 1;
    if (kind !== 'posterior') context.strokeRect(x + 0.5, y + 0.5, 21, 9);
    return;
  }
  context.strokeStyle = { prior: colours.prior, median: colours.posterior, truth: colours.truth }[kind];
  context.lineWidth = kind === 'truth' ? 1.6 : 1.3;
  context.setLineDash(kind === 'median' ? [4, 3] : []);
  context.beginPath();
  context.moveTo(x, middle);
  context.lineTo(x + 22, middle);
  context.stroke();
  context.setLineDash([]);
  if (kind === 'truth') dot(context, x + 11, middle, colours);
}
