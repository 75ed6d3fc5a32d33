// The page's sentences, made from numbers; those on observations are the report's.

import { numbers } from './parse.js';

const REASONS = {
  nonfinite: 'This observation has numbers that are not finite, so nothing was drawn for it.',
  null: 'This observation has numbers that are missing or not finite, so nothing was drawn for it.',
  wrong_length: 'This observation has another number of values than the model takes, so nothing was drawn for it.',
  failed: 'Drawing failed for this observation; the others are not touched by that. The service’s log says why.',
};

/** How an observation compares with simulations: {text, warn}. */
export function typicality(p, score) {
  if (p === null || p === undefined) {
    return { text: 'How typical the observation is was not measured: the model carries no reference.', warn: false };
  }
  const shown = `p = ${Number(p.toPrecision(2))}`;
  const measured = typeof score === 'number' ? `, score ${Number(score.toPrecision(3))}` : '';
  if (p < 0.01) {
    return {
      text:
        `The observation is unlike the simulations that the model was trained on (${shown}${measured}): ` +
        'the simulator may be wrong about it, and the posterior too.',
      warn: true,
    };
  }
  if (p < 0.05) return { text: `The observation is at the edge of what was simulated (${shown}${measured}).`, warn: false };
  return { text: `The observation is like the simulations (${shown}${measured}).`, warn: false };
}

export const reason = (status) => REASONS[status] ?? `Nothing was drawn for this observation (status ${status}).`;

/** What became of all observations, in one line. */
export function outcome(run) {
  const total = run.statuses.length;
  if (total === 1) return '';
  const bad = run.statuses.filter((status) => status !== 'ok').length;
  const unlike = run.ps.filter((p) => p !== null && p < 0.01).length;
  const parts = [numbers(total, 'observation')];
  parts.push(bad ? `${bad.toLocaleString('en')} without draws` : 'all with draws');
  if (unlike) parts.push(`${unlike.toLocaleString('en')} unlike the simulations`);
  return `${parts.join(', ')}.`;
}

/** A time as the model's bundle has it, for people; as it is where it is no time. */
export function when(created) {
  const time = new Date(created ?? '');
  if (Number.isNaN(time.getTime())) return created ?? 'not known';
  return time.toLocaleString('en-GB', { dateStyle: 'medium', timeStyle: 'short' });
}

export function duration(seconds) {
  if (seconds < 1) return `${Number((1000 * seconds).toPrecision(3))} ms`;
  if (seconds < 59.5) return `${Number(seconds.toPrecision(2))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
