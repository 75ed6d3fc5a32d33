// The list of models to choose from, and what is known about the chosen one.

import { h } from './elements.js';
import { numbers } from './parse.js';
import { priorMarginals } from './prior.js';
import { duration, when } from './words.js';

/** How many of a long list are shown at first. */
export const SHOWN = 8;
const VERDICTS = { pass: 'passed', warn: 'warning', fail: 'failed', none: 'not done' };

/** A calibration's verdict as a badge; the words say what the colour does. */
export function badge(calibration, named = true) {
  const verdict = calibration?.verdict in VERDICTS ? calibration.verdict : 'none';
  const text = named ? `Calibration ${VERDICTS[verdict]}` : VERDICTS[verdict];
  return h('span', { class: `badge ${verdict}`, title: calibration?.summary || null }, text);
}

/** Fill the list; `abouts` maps ids to what is known so far. */
export function listModels(box, { models, abouts, chosen, all, onChoose, onAll }) {
  const order = [...models].sort((a, b) => b.promoted - a.promoted || (a.refused !== null) - (b.refused !== null));
  const shown = all ? order : order.filter((each, i) => i < SHOWN || each.model === chosen);
  const focused = box.contains(document.activeElement) ? document.activeElement.value : null;
  const items = shown.map((each) => choice(each, abouts.get(each.model), each.model === chosen, onChoose));
  const list = h('fieldset', { class: 'models' }, h('legend', { class: 'sr' }, 'Model'), ...items);
  const more = order.length - shown.length;
  const button = more ? h('button', { type: 'button', onclick: onAll }, `Show ${numbers(more, 'more model')}`) : null;
  box.replaceChildren(list, ...(button ? [button] : []));
  box.removeAttribute('aria-busy');
  if (focused) box.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
}

function choice({ model, promoted, refused }, about, checked, onChoose) {
  const refusedToo = refused !== null && refused !== undefined;
  const input = h('input', {
    type: 'radio',
    name: 'model',
    value: model,
    checked,
    disabled: refusedToo,
    onchange: () => onChoose(model),
  });
  const tags = [
    promoted ? h('span', { class: 'badge promoted' }, 'Promoted') : null,
    about ? badge(about.calibration) : null,
    refusedToo ? h('span', { class: 'badge fail' }, 'Refused') : null,
  ];
  const facts = about
    ? `${about.experiment} · ${numbers(about.num_parameters, 'parameter')} · ${when(about.created)}`
    : checked
      ? 'Loading…'
      : 'Not loaded; choose it to see what it is';
  return h(
    'label',
    { class: `model${refusedToo ? ' refused' : ''}` },
    input,
    h(
      'span',
      { class: 'what' },
      h('span', { class: 'tags' }, h('span', { class: 'mono' }, model), ...tags.filter(Boolean)),
      h('span', { class: refusedToo ? 'hint problem' : 'hint' }, refusedToo ? refused : facts),
    ),
  );
}

/** What is known about a model, as a list of facts. */
export function describeModel(section, about) {
  const units = about.parameter_units ?? [];
  const labels = labelled(about);
  const priors = priorMarginals(about.prior ?? {}, about.num_parameters);
  const calibration = h('span', {}, badge(about.calibration, false), ' ', about.calibration?.summary ?? '');
  const entries = [
    ['Model', h('span', { class: 'mono' }, about.model)],
    ['Experiment', about.experiment],
    ['Calibration', calibration],
    [units.some(Boolean) ? 'Parameters and priors' : 'Parameters', priorList(labels, priors)],
    ['Observation', observationWords(about.x_shape)],
    ['Estimator', estimatorWords(about.estimator)],
    ['Training', trainingWords(about.training)],
    ['Dataset', datasetWords(about.dataset)],
    ['Created', when(about.created)],
    ['Sampling', about.how],
    ['Limits', limitWords(about.limits)],
  ];
  const list = h('dl', { class: 'facts' });
  for (const [term, value] of entries) if (value) list.append(h('dt', {}, term), h('dd', {}, value));
  section.replaceChildren(h('h2', { id: 'about-title' }, 'About the model'), list);
  section.hidden = false;
}

/** Names with their units where there are any: `alpha [1/yr]`. */
export const labelled = ({ parameter_names: names, parameter_units: units }) =>
  names.map((name, i) => (units?.[i] ? `${name} [${units[i]}]` : name));

function priorList(labels, priors) {
  return h('ul', { class: 'plain' }, ...labels.map((label, i) => h('li', {}, h('span', { class: 'mono' }, label), ` ${priors[i].text}`)));
}

export function observationWords(shape) {
  const size = shape.reduce((total, each) => total * each, 1);
  return shape.length > 1 ? `${numbers(size)}, an array of ${shape.join(' × ')}` : numbers(size);
}

function estimatorWords(estimator) {
  if (!estimator?.estimator) return '';
  const { transforms, hidden_features: hidden, ensemble, embedding } = estimator;
  const parts = [String(estimator.estimator).toUpperCase()];
  if (transforms) parts.push(numbers(transforms, 'transform'));
  if (hidden) parts.push(numbers(hidden, 'hidden feature'));
  if (embedding && embedding !== 'none') parts.push(`embedding ${embedding}`);
  if (ensemble > 1) parts.push(`ensemble of ${ensemble}`);
  return parts.join(', ');
}

function trainingWords(training) {
  if (!training) return '';
  const { best_validation_loss: loss, training_simulations: count, seconds } = training;
  const parts = [];
  if (Number.isFinite(count)) parts.push(numbers(count, 'simulation'));
  if (Number.isFinite(seconds)) parts.push(duration(seconds));
  if (Number.isFinite(loss)) parts.push(`validation loss ${loss.toFixed(3).replace('-', '−')} nats`);
  return parts.join(', ');
}

function datasetWords(dataset) {
  if (!dataset?.id) return '';
  const rest = [];
  if (dataset.snapshot) rest.push(`snapshot ${dataset.snapshot}`);
  if (dataset.round > 1) rest.push(`round ${dataset.round}`);
  return h('span', {}, h('span', { class: 'mono' }, dataset.id), rest.length ? `, ${rest.join(', ')}` : '');
}

function limitWords(limits) {
  if (!limits) return '';
  const parts = [];
  if (limits.max_draws) parts.push(`${numbers(limits.max_draws, 'draw')} of each observation`);
  if (limits.max_total_draws) parts.push(`${numbers(limits.max_total_draws, 'draw')} a request`);
  return parts.join(', ');
}
