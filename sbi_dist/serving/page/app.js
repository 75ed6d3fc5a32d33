// The page: choosing a model, reading observations, asking for draws. Modules beside it do the rest.

import { ask, askPatiently, modelPath, Problem, setToken, token } from './api.js';
import { byId, h } from './elements.js';
import { describeModel, listModels, observationWords, SHOWN } from './models.js';
import { rowsOfNpy } from './npy.js';
import { numbers, PARQUET, readText, shortened, template } from './parse.js';
import { showResults } from './results.js';
import { fill, MOST_NUMBERS, newRun } from './sampling.js';

const MOST_FILE_BYTES = 100e6;
const MOST_LINK_CHARACTERS = 4000;

const state = {
  models: [],
  abouts: new Map(),
  chosen: null,
  all: false,
  file: null, // {name, read: (shape) => rows} of an opened file
  running: null, // AbortController
  takeDown: () => {},
};
const about = () => state.abouts.get(state.chosen) ?? null;

// ---- problems and the token -----------------------------------------------------------------

function showProblem(error, again) {
  const box = byId('problem');
  if (error === null) return box.replaceChildren();
  if (error.name === 'AbortError') return undefined;
  if (error.status === 401) return askForToken(again);
  const known = error instanceof Problem;
  if (!known) console.error(error);
  const lines = [
    h('p', { class: 'strong' }, known ? error.title : 'Something went wrong on this page'),
    h('p', {}, known ? error.detail : String(error)),
    known && error.requestId
      ? h('p', { class: 'hint' }, 'Request ', h('span', { class: 'mono' }, error.requestId), error.status ? `, status ${error.status}` : '')
      : null,
    h('button', { type: 'button', onclick: () => { showProblem(null); again(); } }, 'Try again'),
  ];
  return box.replaceChildren(h('div', { class: 'box warning' }, ...lines.filter(Boolean)));
}

let afterToken = () => {};

function askForToken(again) {
  const form = byId('token-form');
  byId('token-hint').textContent =
    token() === null
      ? 'This service asks for a token. It is kept in this tab only, until the tab is closed.'
      : 'The service did not accept this token. Check it, or ask whoever runs the service for another.';
  setToken(null);
  afterToken = again;
  form.hidden = false;
  byId('token').value = '';
  byId('token').focus();
}

byId('token-form').addEventListener('submit', (event) => {
  event.preventDefault();
  const value = byId('token').value.trim();
  // What can't stand in a header would fail before it is sent.
  if (!/^[\x21-\x7e]+$/.test(value)) {
    byId('token-hint').textContent = 'A token has letters, digits and signs only, without spaces.';
    return;
  }
  setToken(value);
  byId('token').value = '';
  byId('token-form').hidden = true;
  afterToken();
});

// ---- models ---------------------------------------------------------------------------------

async function loadModels() {
  try {
    const { models } = await askPatiently('v1/models', { onWait: waiting });
    state.models = models;
    const wanted = fromLink().get('model');
    const usable = models.filter((each) => each.refused === null || each.refused === undefined);
    const pick = usable.find((each) => each.model === wanted) ?? usable.find((each) => each.promoted) ?? usable[0];
    if (pick === undefined) {
      byId('models').replaceChildren(h('p', {}, 'This service has no model yet. Train one and promote it; it then appears here.'));
      if (models.length) renderModels();
      return;
    }
    await choose(pick.model);
    // Describing a model loads it: those that are not in memory wait until they are chosen.
    for (const each of usable.filter(({ loaded }) => loaded).slice(0, SHOWN)) await describe(each.model);
  } catch (error) {
    byId('models').replaceChildren(h('p', { class: 'meta' }, 'The models are not known.'));
    showProblem(error, loadModels);
  }
}

function renderModels() {
  listModels(byId('models'), {
    ...state,
    onChoose: tryToChoose,
    onAll: () => {
      state.all = true;
      renderModels();
    },
  });
}

async function tryToChoose(id) {
  const before = state.chosen;
  showProblem(null);
  try {
    await choose(id);
  } catch (error) {
    if (state.chosen === id) state.chosen = state.abouts.has(before) ? before : null;
    // Whether a model is fit to be served shows when it is loaded.
    if (error.status === 409) state.models = (await ask('v1/models')).models;
    renderModels();
    showProblem(error, () => tryToChoose(id));
  }
}

async function describe(id) {
  if (!state.abouts.has(id)) {
    state.abouts.set(id, await askPatiently(modelPath(id), { onWait: waiting }));
    say('');
    renderModels();
  }
  return state.abouts.get(id);
}

async function choose(id) {
  state.chosen = id;
  renderModels();
  const found = await describe(id);
  if (state.chosen !== id) return;
  describeModel(byId('about'), found);
  const size = sizeOf(found);
  const limit = found.limits?.max_draws;
  if (limit) byId('draws').max = limit;
  byId('observations-hint').textContent = `${observationWords(found.x_shape)} each, as JSON, CSV or columns of text.`;
  byId('observations').placeholder =
    size <= 12 ? `${Array(size).fill('0.0').join(', ')}\n${Array(size).fill('0.0').join(', ')}` : '';
  byId('truth').placeholder = found.parameter_names.join(', ');
  byId('sample').disabled = state.running !== null;
  validate();
}

const sizeOf = ({ x_shape: shape }) => shape.reduce((total, each) => total * each, 1);

// ---- reading the form -----------------------------------------------------------------------

/** Rows of the observations' field or file, and of the true parameters'. */
function readForm() {
  const found = about();
  const x = state.file ? state.file.read(found.x_shape) : readText(byId('observations').value, found.x_shape);
  const truth = readText(byId('truth').value, [found.num_parameters], 'True parameters, row');
  if (!truth.problems.length && truth.rows.some((row) => row.includes(null))) {
    truth.problems = truth.notes.map((note) => note.replace(/ is not finite.*$/, ' is not finite.'));
  }
  truth.notes = [];
  if (!truth.problems.length && truth.rows.length > 1 && x.rows.length && truth.rows.length !== x.rows.length) {
    truth.problems.push(
      `There are ${numbers(truth.rows.length, 'row')} of true parameters for ${numbers(x.rows.length, 'observation')}; ` +
        'give one row, or as many as observations.',
    );
  }
  return { x, truth };
}

function wholeNumber(field, name) {
  const { value, min, max } = byId(field);
  const number = Number(value);
  if (value.trim() !== '' && Number.isSafeInteger(number) && number >= Number(min) && (!max || number <= Number(max))) {
    return { number, problem: '' };
  }
  const top = max && Number(max) < 1e15 ? ` to ${Number(max).toLocaleString('en')}` : ' or more';
  return { number: NaN, problem: `${name}: a whole number, ${Number(min).toLocaleString('en')}${top}.` };
}

function validate() {
  if (about() === null) return null;
  const { x, truth } = readForm();
  const good = x.rows.length && !x.problems.length ? [`${numbers(x.rows.length, 'observation')} of ${numbers(sizeOf(about()))}.`] : [];
  report('observations', x.problems, [...good, ...x.notes]);
  report('truth', truth.problems, []);
  const draws = wholeNumber('draws', 'Draws of each');
  const seed = wholeNumber('seed', 'Seed');
  report('draws', draws.problem ? [draws.problem] : [], []);
  report('seed', seed.problem ? [seed.problem] : [], []);
  return { x, truth, draws, seed };
}

function report(field, problems, notes) {
  byId(field).setAttribute('aria-invalid', problems.length > 0);
  const lines = problems.length
    ? shortened(problems).map((text) => h('p', { class: 'problem' }, text))
    : notes.map((text) => h('p', { class: 'hint' }, text));
  const box = byId(`${field}-state`);
  // Said again only when it has changed.
  if (box.textContent !== lines.map((line) => line.textContent).join('')) box.replaceChildren(...lines);
}

let timer = 0;
function validateSoon() {
  clearTimeout(timer);
  timer = setTimeout(validate, 150);
}
for (const id of ['observations', 'truth', 'draws', 'seed']) byId(id).addEventListener('input', validateSoon);

byId('template').addEventListener('click', () => {
  if (about() === null) return;
  closeFile();
  byId('observations').value = template(sizeOf(about()));
  byId('observations').focus();
  validate();
});
byId('clear').addEventListener('click', () => {
  closeFile();
  byId('observations').value = byId('truth').value = '';
  validate();
});

// ---- files ----------------------------------------------------------------------------------

byId('file').addEventListener('change', async () => {
  const [file] = byId('file').files;
  byId('file').value = ''; // so that the same file can be opened again, changed
  if (file) await openFile(file);
});
byId('file-remove').addEventListener('click', () => {
  closeFile();
  byId('observations').focus();
  validate();
});

async function openFile(file) {
  const refused = (problem) => ({ rows: [], ids: null, notes: [], problems: [problem] });
  let read;
  if (/\.(parquet|pq)$/i.test(file.name)) read = () => refused(PARQUET);
  else if (file.size > MOST_FILE_BYTES) {
    const size = `${Math.round(file.size / 1e6).toLocaleString('en')} MB`;
    read = () => refused(`The file has ${size}; this page opens up to ${MOST_FILE_BYTES / 1e6} MB. Use the Python client for more.`);
  } else if (/\.npy$/i.test(file.name)) {
    const bytes = await file.arrayBuffer();
    read = (shape) => rowsOfNpy(bytes, shape);
  } else {
    const text = await file.text();
    read = text.includes('\0') && !text.startsWith('PAR1')
      ? () => refused('This file is not text. Open a .csv, .json or .npy file.')
      : (shape) => (text.trim() === '' ? refused('The file is empty.') : readText(text, shape));
  }
  // Read once for a model, not at every key.
  let [last, result] = [null, null];
  state.file = {
    name: file.name,
    read: (shape) => {
      if (last !== shape) [last, result] = [shape, read(shape)];
      return result;
    },
  };
  byId('file-name').textContent = file.name;
  byId('file-chosen').hidden = false;
  byId('observations').hidden = true;
  validate();
}

function closeFile() {
  state.file = null;
  byId('file-chosen').hidden = true;
  byId('observations').hidden = false;
}

// ---- sampling -------------------------------------------------------------------------------

byId('ask').addEventListener('submit', (event) => {
  event.preventDefault();
  if (state.running === null && about() !== null) sample();
});
byId('cancel').addEventListener('click', () => state.running?.abort());

async function sample() {
  showProblem(null);
  clearTimeout(timer); // it would take away what is said here
  const form = validate();
  if (!form.x.rows.length && !form.x.problems.length) {
    report('observations', ['Paste at least one observation, or open a file.'], []);
    form.x.problems.push('none');
  }
  const bad = [
    ['observations', form.x.problems.length],
    ['truth', form.truth.problems.length],
    ['draws', form.draws.problem],
    ['seed', form.seed.problem],
  ].find(([, problem]) => problem);
  if (bad) {
    if (bad[0] === 'truth') byId('truth-field').open = true;
    return byId(bad[0]).focus();
  }
  const { rows, ids } = form.x;
  const count = form.draws.number;
  if (rows.length * count * about().num_parameters > MOST_NUMBERS) {
    const most = Math.floor(MOST_NUMBERS / (count * about().num_parameters)).toLocaleString('en');
    report('draws', [`That is more than this page holds: at most ${most} observations with so many draws. Use the Python client for more.`], []);
    return byId('draws').focus();
  }
  const truths = form.truth.rows.length === 1 ? rows.map(() => form.truth.rows[0]) : form.truth.rows;
  const run = newRun({ about: about(), rows, ids, truths: truths.length ? truths : null, count, seed: form.seed.number });
  return draw(run);
}

async function draw(run) {
  state.running = new AbortController();
  busy(true);
  const started = performance.now();
  const total = run.rows.length;
  try {
    await fill(run, {
      signal: state.running.signal,
      onWait: waiting,
      onProgress: (done) => {
        byId('progress').max = total;
        // Without a value the bar moves: one request says nothing until it is done.
        if (done === 0) byId('progress').removeAttribute('value');
        else byId('progress').value = done;
        say(total > 1 ? `${done.toLocaleString('en')} of ${numbers(total, 'observation')}` : 'Drawing…');
      },
    });
    const seconds = ((performance.now() - started) / 1000).toPrecision(2);
    say(`${numbers(total * run.count, 'draw')} in ${Number(seconds)} s.`);
  } catch (error) {
    if (error.name === 'AbortError') {
      const done = run.draws.length;
      say(done ? `Cancelled after ${done.toLocaleString('en')} of ${numbers(total, 'observation')}; these are shown.` : 'Cancelled.');
    } else {
      say('');
      showProblem(error, sample);
    }
  } finally {
    state.running = null;
    busy(false);
  }
  if (run.draws.length) {
    state.takeDown();
    state.takeDown = showResults(byId('results'), run, { link: () => linkTo(run) });
    byId('results').focus({ preventScroll: true });
    byId('results').scrollIntoView({ block: 'nearest' });
    if (byId('results').getBoundingClientRect().top > window.innerHeight / 2) byId('results').scrollIntoView();
  }
}

function busy(now) {
  byId('sample').disabled = now;
  byId('cancel').hidden = byId('progress').hidden = !now;
  // What is shown meanwhile is of the last time.
  for (const id of ['ask', 'results']) byId(id).setAttribute('aria-busy', now);
}

const say = (text) => {
  byId('status').textContent = text;
};

function waiting(left, problem) {
  say(left ? `${problem.title}: trying again in ${left} s.` : 'Trying again…');
}

// ---- links to the page ----------------------------------------------------------------------

const fromLink = () => new URLSearchParams(location.hash.slice(1));

/** The page with the run's settings; its observations too where they are short. */
function linkTo({ about: { model }, count, seed, rows }) {
  const settings = new URLSearchParams({ model, draws: count, seed });
  const x = JSON.stringify(rows);
  if (x.length <= MOST_LINK_CHARACTERS) settings.set('x', x);
  return `${location.origin}${location.pathname}#${settings}`;
}

function fillFromLink() {
  const link = fromLink();
  for (const [name, field] of [['draws', 'draws'], ['seed', 'seed'], ['x', 'observations']]) {
    if (link.has(name)) byId(field).value = link.get(name);
  }
}

fillFromLink();
loadModels();
