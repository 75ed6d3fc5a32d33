// Asking for draws in pieces: progress, cancelling, and the service's limits. No page elements.
//
// Draws are a function of (model, observation, seed), so pieces give what one request would.

import { askPatiently, modelPath, Problem } from './api.js';

/** Numbers in one answer: about 2 MB of JSON, which comes and is parsed in a moment. */
const ANSWER_NUMBERS = 200_000;
const DIGITS = 22; // of a number in a request, at most
/** Numbers that a browser's tab holds without trouble. */
export const MOST_NUMBERS = 50_000_000;

/** How many observations to ask for at once. */
export function pieceSize({ limits, num_parameters: size, x_shape: shape }, count) {
  const body = (limits?.max_body_mb ?? 16) * 1e6;
  const length = shape.reduce((total, each) => total * each, 1);
  return Math.max(
    1,
    Math.floor(
      Math.min(
        limits?.max_observations ?? 10_000,
        (limits?.max_total_draws ?? 1e6) / count,
        ANSWER_NUMBERS / (count * size),
        (0.8 * body) / (DIGITS * length),
      ),
    ),
  );
}

/** An empty run, to be filled by `fill`. */
export const newRun = ({ about, rows, ids, truths, count, seed }) => ({
  about,
  rows,
  named: ids !== null,
  ids: ids ?? rows.map((_, i) => String(i + 1)),
  truths,
  count,
  seed,
  statuses: [],
  scores: [],
  ps: [],
  draws: [],
});

/** Fill a run piece after piece; what is there when it is cancelled stays good. */
export async function fill(run, { signal, onProgress, onWait }) {
  const { about, rows, count, seed } = run;
  const piece = pieceSize(about, count);
  for (let start = 0; start < rows.length; start += piece) {
    onProgress(start, rows.length);
    const x = rows.slice(start, start + piece);
    const body = JSON.stringify({ x, num_samples: count, seed });
    const answer = await askPatiently(modelPath(about.model, 'sample'), { body, signal, onWait });
    if (answer.observations?.length !== x.length) {
      throw new Problem({ title: 'The answer does not fit the question', detail: 'It holds another number of observations.' });
    }
    for (const each of answer.observations) {
      run.statuses.push(each.status);
      run.scores.push(each.out_of_distribution ?? null);
      run.ps.push(each.out_of_distribution_p ?? null);
      run.draws.push(each.draws === null ? null : flatten(each.draws, about.num_parameters));
    }
  }
  onProgress(rows.length, rows.length);
}

function flatten(draws, size) {
  const flat = new Float32Array(draws.length * size);
  draws.forEach((draw, i) => flat.set(draw, i * size));
  return flat;
}

export const LEVELS = [0.05, 0.5, 0.95];

/** The service's summary of one observation of a run. */
export async function summaryOf(run, index, signal) {
  const { about, count, seed } = run;
  const body = JSON.stringify({ x: [run.rows[index]], num_samples: count, seed, quantiles: LEVELS });
  const answer = await askPatiently(modelPath(about.model, 'summary'), { body, signal });
  return answer.observations[0];
}

/** A command that asks for the same draws again. */
export function curlCommand(run, index, url, withToken) {
  const body = JSON.stringify({ x: [run.rows[index]], num_samples: run.count, seed: run.seed });
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  return [
    `curl -sS ${quoted(url)}`,
    ...(withToken ? ['-H "Authorization: Bearer $TOKEN"'] : []),
    "-H 'Content-Type: application/json'",
    `-d ${quoted(body)}`,
  ].join(' \\\n  ');
}
