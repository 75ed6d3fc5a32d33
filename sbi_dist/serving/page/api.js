// The service's HTTP interface: requests, the token, problems, and waiting where it is busy.

/** Where the application is mounted, whatever the prefix. */
export const root = new URL('../', import.meta.url);

const KEY = `sbi-dist token ${root.pathname}`;
const TRIES = 8;
const BUSY = new Set([429, 503]);
let remembered = null; // where session storage is blocked

export function token() {
  try {
    return sessionStorage.getItem(KEY) ?? remembered;
  } catch {
    return remembered;
  }
}

export function setToken(value) {
  remembered = value;
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  } catch {
    // Blocked by the browser's settings: the token lasts as long as the page.
  }
}

/** What went wrong, in the service's own words. */
export class Problem extends Error {
  constructor({ status = 0, title, detail = '', requestId = null, retryAfter = null }) {
    super(title);
    Object.assign(this, { status, title, detail, requestId, retryAfter });
  }
}

/** One request; resolves to the parsed JSON. Throws Problem, or AbortError where cancelled. */
export async function ask(path, { body = null, signal = null } = {}) {
  const headers = { Accept: 'application/json' };
  if (body !== null) headers['Content-Type'] = 'application/json';
  if (token() !== null) headers.Authorization = `Bearer ${token()}`;
  let response;
  try {
    response = await fetch(new URL(path, root), {
      method: body === null ? 'GET' : 'POST',
      headers,
      body,
      signal,
      cache: 'no-store',
      credentials: 'same-origin',
    });
    if (response.ok) return await response.json();
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    const answered = response !== undefined;
    throw new Problem({
      title: answered ? 'The answer broke off' : 'The service cannot be reached',
      detail: answered
        ? 'The connection ended before the answer did. Try again; if it happens again, ask for fewer draws.'
        : 'Check that it is running and that this machine has a connection to it, then try again.',
      requestId: response?.headers.get('X-Request-ID') ?? null,
    });
  }
  throw await problemOf(response);
}

async function problemOf(response) {
  let document = {};
  try {
    document = JSON.parse(await response.text()) ?? {};
  } catch {
    // A proxy before the service answers in HTML; the status has to do.
  }
  const text = (value) => (typeof value === 'string' ? value : '');
  return new Problem({
    status: response.status,
    title: text(document.title) || `The service answered ${response.status}`,
    detail: text(document.detail),
    requestId: response.headers.get('X-Request-ID') ?? (text(document.instance) || null),
    retryAfter: seconds(response.headers.get('Retry-After')),
  });
}

function seconds(header) {
  if (header === null) return null;
  const value = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(value) ? Math.max(1, Math.ceil(value)) : null;
}

/** As `ask`; where the service is busy, waits as long as it says and asks again. */
export async function askPatiently(path, { body = null, signal = null, onWait = () => {} } = {}) {
  for (let tried = 1; ; tried += 1) {
    try {
      return await ask(path, { body, signal });
    } catch (error) {
      if (!BUSY.has(error.status) || tried === TRIES) throw error;
      for (let left = error.retryAfter ?? Math.min(2 ** tried, 30); left > 0; left -= 1) {
        onWait(left, error);
        await sleep(1000, signal);
      }
      onWait(0, error);
    }
  }
}

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const cancelled = () => {
      clearTimeout(timer);
      reject(new DOMException('cancelled', 'AbortError'));
    };
    if (signal?.aborted) return reject(new DOMException('cancelled', 'AbortError'));
    const timer = setTimeout(() => {
      signal?.removeEventListener('abort', cancelled);
      resolve();
    }, milliseconds);
    signal?.addEventListener('abort', cancelled, { once: true });
  });
}

export const modelPath = (id, operation = '') =>
  `v1/models/${encodeURIComponent(id)}${operation && `/${operation}`}`;
