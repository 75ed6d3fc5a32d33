// What came out: one observation at a time, its table, pair plot, downloads and how to repeat it.

import { Problem, modelPath, root, token } from './api.js';
import { csvOf, jsonOf, npyOf, save } from './download.js';
import { copyButton, h } from './elements.js';
import { labelled } from './models.js';
import { drawPairs, palette, prepare } from './pairplot.js';
import { priorMarginals } from './prior.js';
import { curlCommand, LEVELS, summaryOf } from './sampling.js';
import { rounded } from './ticks.js';
import { outcome, reason, typicality } from './words.js';

const PLOTTED = 8; // parameters at first; more panels than that say little
const PRINT_WIDTH = 900;

/** Show a run in a section; returns a function that takes it down. */
export function showResults(section, run, { link }) {
  const { about } = run;
  const size = about.num_parameters;
  const labels = labelled(about);
  const priors = priorMarginals(about.prior ?? {}, size);
  const flagged = run.statuses.flatMap((status, i) =>
    status !== 'ok' || (run.ps[i] !== null && run.ps[i] < 0.01) ? [i] : [],
  );
  let index = 0;
  let which = labels.map((_, i) => i).slice(0, PLOTTED);
  let prepared = null;
  let asking = null;
  const summaries = new Map();

  // ---- what stays while observations change ----

  const total = run.draws.length;
  const title = h('h2', { id: 'results-title' });
  const place = h('input', {
    type: 'number',
    min: 1,
    max: total,
    step: 1,
    value: 1,
    'aria-label': `Observation, 1 to ${total}`,
    onchange: () => go(Math.round(Number(place.value)) - 1),
  });
  const previous = h('button', { type: 'button', onclick: () => go(index - 1) }, '‹ Previous');
  const next = h('button', { type: 'button', onclick: () => go(index + 1) }, 'Next ›');
  const nextFlagged = h(
    'button',
    { type: 'button', onclick: () => go(flagged.find((i) => i > index) ?? flagged[0]) },
    'Next with a warning',
  );
  nextFlagged.hidden = flagged.length === 0;
  const navigator = h(
    'nav',
    { class: 'row navigator', 'aria-label': 'Observations' },
    previous,
    h('span', { class: 'row' }, place, h('span', {}, `of ${total.toLocaleString('en')}`)),
    next,
    nextFlagged,
  );
  navigator.hidden = total === 1;
  const verdict = h('div', { 'aria-live': 'polite' });
  const table = h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Summary of the posterior' });
  const canvas = h('canvas', { role: 'img' });
  const frame = h('div', { class: 'frame', tabindex: 0, role: 'region', 'aria-label': 'Pair plot' }, canvas);
  const caption = h('figcaption');
  const pictures = h('div', {}, h('h3', {}, 'Pair plot'), chooser(), h('figure', {}, frame, caption));
  const scope = h(
    'select',
    { 'aria-label': 'Draws of' },
    h('option', { value: 'this' }, 'This observation'),
    h('option', { value: 'all' }, `All ${total.toLocaleString('en')} observations`),
  );
  scope.hidden = total === 1;
  const saveButton = (label, make, ending) => h('button', { type: 'button', onclick: () => saveDraws(make, ending) }, label);
  const png = h('button', { type: 'button', onclick: savePicture }, 'Plot as PNG');
  const command = h('pre', { class: 'mono', tabindex: 0, 'aria-label': 'Command that repeats this' });
  const facts = h('p', { id: 'reproduce' });
  const currentCommand = () =>
    curlCommand(run, index, new URL(modelPath(about.model, 'sample'), root).href, token() !== null);

  section.replaceChildren(
    title,
    ...(outcome(run) ? [h('p', { class: 'meta' }, outcome(run))] : []),
    navigator,
    verdict,
    table,
    pictures,
    h('h3', {}, 'Downloads'),
    h(
      'div',
      { class: 'row' },
      scope,
      saveButton('CSV', csvOf, 'csv'),
      saveButton('JSON', jsonOf, 'json'),
      saveButton('NumPy .npy', npyOf, 'npy'),
      png,
    ),
    h('h3', {}, 'Reproduce'),
    facts,
    command,
    h('div', { class: 'row' }, copyButton('Copy command', currentCommand), copyButton('Copy link to this page', link)),
  );
  section.hidden = false;

  // ---- one observation ----

  function go(to) {
    index = Math.min(Math.max(Number.isFinite(to) ? to : 0, 0), total - 1);
    place.value = index + 1;
    for (const [button, end] of [[previous, index === 0], [next, index === total - 1]]) {
      // Not disabled: a button that is loses the keyboard's focus.
      button.setAttribute('aria-disabled', end);
    }
    const name = run.ids[index];
    title.textContent = run.named ? `Posterior for ${name}` : total > 1 ? `Posterior for observation ${name}` : 'Posterior';
    facts.replaceChildren(
      'Model ',
      h('span', { class: 'mono' }, about.model),
      `, seed ${run.seed}, ${run.count.toLocaleString('en')} draws. Draws depend on the model, the ` +
        'observation and the seed alone, so that this gives the same numbers:',
    );
    command.textContent = currentCommand();
    const drawn = run.draws[index] !== null;
    verdict.replaceChildren(...judge());
    table.hidden = pictures.hidden = !drawn;
    png.disabled = !drawn;
    prepared = null;
    if (!drawn) return;
    plot();
    tabulate();
  }

  function judge() {
    const status = run.statuses[index];
    if (status !== 'ok') return [h('p', { class: 'box warning' }, reason(status))];
    const { text, warn } = typicality(run.ps[index], run.scores[index]);
    return [h('p', { class: warn ? 'box warning' : 'typical' }, text)];
  }

  async function tabulate() {
    asking?.abort();
    const shown = index;
    if (!summaries.has(shown)) {
      table.replaceChildren(summaryTable(labels, null, run.truths?.[shown]));
      asking = new AbortController();
      try {
        summaries.set(shown, await summaryOf(run, shown, asking.signal));
      } catch (error) {
        if (error.name === 'AbortError') return;
        const why = error instanceof Problem ? `${error.title}. ${error.detail}` : String(error);
        if (shown === index) table.replaceChildren(h('p', { class: 'problem' }, `There is no summary: ${why}`));
        return;
      }
    }
    if (shown === index) table.replaceChildren(summaryTable(labels, summaries.get(shown), run.truths?.[shown]));
  }

  // ---- the picture ----

  function plot() {
    performance.mark('pairplot');
    prepared ??= prepare({ draws: run.draws[index], size, which, priors, truth: run.truths?.[index] ?? null });
    drawPairs(canvas, prepared, {
      labels: which.map((i) => labels[i]),
      width: frame.clientWidth,
      scale: Math.min(window.devicePixelRatio || 1, 3),
      colours: palette(),
    });
    performance.measure('pairplot', 'pairplot');
    canvas.setAttribute('aria-label', `Pair plot of ${which.map((i) => labels[i]).join(', ')}; the table has its numbers.`);
    caption.textContent = captionOf(prepared);
  }

  function redraw() {
    if (prepared !== null && which.length) plot();
  }

  function chooser() {
    if (size < 3) return null;
    const text = () => `Parameters shown (${which.length} of ${size})`;
    const summary = h('summary', {}, text());
    const boxes = labels.map((label, i) => {
      const input = h('input', { type: 'checkbox', checked: which.includes(i) });
      input.addEventListener('change', () => {
        const chosen = labels.map((_, j) => j).filter((j) => boxes[j].input.checked);
        if (chosen.length === 0) input.checked = true;
        else which = chosen;
        summary.textContent = text();
        prepared = null;
        plot();
      });
      return { input, label: h('label', {}, input, ` ${label}`) };
    });
    return h('details', { class: 'chooser' }, summary, h('div', { class: 'row' }, ...boxes.map((each) => each.label)));
  }

  let lastWidth = 0;
  const resized = new ResizeObserver(() => {
    if (frame.clientWidth === lastWidth) return;
    lastWidth = frame.clientWidth;
    requestAnimationFrame(redraw);
  });
  resized.observe(frame);
  const scheme = window.matchMedia('(prefers-color-scheme: dark)');
  scheme.addEventListener('change', redraw);

  // ---- files ----

  function nameOf(ending, all = false) {
    return `${about.experiment}-${about.model}-${all ? 'all' : run.ids[index]}-seed${run.seed}.${ending}`;
  }

  function saveDraws(make, ending) {
    const all = scope.value === 'all' && total > 1;
    save(make(run, all ? run.draws.map((_, i) => i) : [index]), nameOf(ending, all));
  }

  function savePicture() {
    const paper = document.createElement('canvas');
    drawPairs(paper, prepared, {
      labels: which.map((i) => labels[i]),
      width: PRINT_WIDTH,
      scale: 2,
      colours: palette(true),
    });
    paper.toBlob((blob) => save(blob, nameOf('png')), 'image/png');
  }

  go(0);
  return () => {
    asking?.abort();
    resized.disconnect();
    scheme.removeEventListener('change', redraw);
    section.replaceChildren();
    section.hidden = true;
  };
}

function captionOf({ many, columns }) {
  if (columns.length === 1) return 'Marginal posterior distribution.';
  return many
    ? 'Marginal and joint posterior distributions. Regions hold 68 % and 95 % of the probability.'
    : 'Marginal and joint posterior distributions; each point is a draw.';
}

/** Mean, sd and quantiles, one row a parameter; dashes until the summary is there. */
function summaryTable(labels, summary, truth) {
  const heads = ['mean', 'sd', ...LEVELS.map((level) => `${Math.round(100 * level)} %`), ...(truth ? ['truth'] : [])];
  const rows = labels.map((label, i) => {
    const values = [
      summary?.mean?.[i],
      summary?.sd?.[i],
      ...LEVELS.map((_, q) => summary?.quantiles?.[q]?.[i]),
      ...(truth ? [truth[i]] : []),
    ];
    const cells = values.map((value, j) => {
      const text = rounded(value, summary?.sd?.[i]);
      const known = value !== null && value !== undefined;
      return h('td', { class: j >= 5 ? 'num truth' : 'num' }, known ? h('data', { value }, text) : text);
    });
    return h('tr', {}, h('th', { scope: 'row' }, label), ...cells);
  });
  return h(
    'table',
    { class: 'posterior', 'aria-busy': summary === null },
    h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, 'parameter'), ...heads.map((head) => h('th', { scope: 'col', class: 'num' }, head)))),
    h('tbody', {}, ...rows),
  );
}
