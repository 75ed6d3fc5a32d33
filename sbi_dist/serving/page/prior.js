// The prior from the data in a model's bundle: bounds, densities and a line of text a parameter.
//
// Kinds without a formula here, and priors that are not products, have bounds only where known.

const normal = (x, loc, scale) => Math.exp(-0.5 * ((x - loc) / scale) ** 2) / (scale * Math.sqrt(2 * Math.PI));

/** Kind -> [parameters in order, bounds, density, range that holds nearly everything]. */
const KINDS = {
  Uniform: {
    names: ['low', 'high'],
    bounds: (low, high) => [low, high],
    density: (x, low, high) => (x < low || x > high ? 0 : 1 / (high - low)),
  },
  Normal: {
    names: ['loc', 'scale'],
    density: normal,
    reach: (loc, scale) => [loc - 9 * scale, loc + 9 * scale],
  },
  Laplace: {
    names: ['loc', 'scale'],
    density: (x, loc, scale) => Math.exp(-Math.abs(x - loc) / scale) / (2 * scale),
    reach: (loc, scale) => [loc - 30 * scale, loc + 30 * scale],
  },
  LogNormal: {
    names: ['loc', 'scale'],
    bounds: () => [0, Infinity],
    density: (x, loc, scale) => (x <= 0 ? 0 : normal(Math.log(x), loc, scale) / x),
  },
  HalfNormal: {
    names: ['scale'],
    bounds: () => [0, Infinity],
    density: (x, scale) => (x < 0 ? 0 : 2 * normal(x, 0, scale)),
    reach: (scale) => [0, 9 * scale],
  },
  Exponential: {
    names: ['rate'],
    bounds: () => [0, Infinity],
    density: (x, rate) => (x < 0 ? 0 : rate * Math.exp(-rate * x)),
    reach: (rate) => [0, 40 / rate],
  },
  Gamma: {
    names: ['concentration', 'rate'],
    bounds: () => [0, Infinity],
    density: (x, a, rate) =>
      x <= 0 ? 0 : Math.exp(a * Math.log(rate) + (a - 1) * Math.log(x) - rate * x - logGamma(a)),
  },
  Beta: {
    names: ['concentration1', 'concentration0'],
    bounds: () => [0, 1],
    density: (x, a, b) =>
      x <= 0 || x >= 1
        ? 0
        : Math.exp(
            (a - 1) * Math.log(x) + (b - 1) * Math.log1p(-x) + logGamma(a + b) - logGamma(a) - logGamma(b),
          ),
  },
};
const POSITIVE = new Set('Chi2 FisherSnedecor HalfCauchy InverseGamma Pareto Weibull'.split(' '));

/** Lanczos' approximation, good to ten digits. */
function logGamma(z) {
  const terms = [
    76.18009172947146, -86.50532032941677, 24.01409824083091, -1.231739572450155, 1.208650973866179e-3,
    -5.395239384953e-6,
  ];
  const sum = terms.reduce((total, term, i) => total + term / (z + 1 + i), 1.000000000190015);
  return Math.log((2.5066282746310005 * sum) / z) - (z + 5.5) + (z + 0.5) * Math.log(z + 5.5);
}

const UNKNOWN = { bounds: [-Infinity, Infinity], density: null, text: 'not known' };
const short = (value) => String(Number(Number(value).toPrecision(4)));

/** One {bounds, density or null, text} for each of `size` parameters. */
export function priorMarginals(data, size) {
  let marginals = null;
  try {
    marginals = read(data);
  } catch {
    // A kind of a newer version: the plot does without.
  }
  return marginals?.length === size ? marginals : Array(size).fill(UNKNOWN);
}

function read(data) {
  switch (data.kind) {
    case 'BoxUniform':
      return read({ ...data, kind: 'Uniform' });
    case 'Product':
      return data.blocks.flatMap(read);
    case 'Independent':
      return read(data.base);
    case 'Truncated':
      return [truncated(data)];
    case 'MultivariateNormal':
      return data.loc.map((loc, i) =>
        plain('Normal', { loc, scale: Math.hypot(...data.scale_tril[i]) }, 'part of a multivariate normal'),
      );
    case 'opaque':
      return data.low.map((low, i) => {
        const bounds = [low ?? -Infinity, data.high[i] ?? Infinity];
        return { bounds, density: null, text: `${interval(bounds)}, of no known form` };
      });
    default: {
      const { kind, ...rest } = data;
      const length = Math.max(1, ...Object.values(rest).map((each) => (Array.isArray(each) ? each.length : 1)));
      return Array.from({ length }, (_, i) => {
        const each = ([name, value]) => [name, Array.isArray(value) ? (value[i] ?? value[0]) : value];
        return plain(kind, Object.fromEntries(Object.entries(rest).map(each)));
      });
    }
  }
}

function plain(kind, named, remark = '') {
  const known = KINDS[kind];
  if (known === undefined) {
    const text = `${kind}(${Object.entries(named).map(([name, value]) => `${name} ${short(value)}`).join(', ')})`;
    return { bounds: [POSITIVE.has(kind) ? 0 : -Infinity, Infinity], density: null, text };
  }
  const values = known.names.map((name) => named[name]);
  const labels = known.names.map((name, i) => `${name} ${short(values[i])}`).join(', ');
  const bounds = known.bounds?.(...values) ?? [-Infinity, Infinity];
  return {
    bounds,
    density: (x) => known.density(x, ...values),
    reach: known.reach?.(...values) ?? null,
    text: kind === 'Uniform' ? `uniform on ${interval(bounds)}` : `${kind}(${labels})${remark && `, ${remark}`}`,
  };
}

function truncated(data) {
  const [base] = read(data.base);
  const bounds = [
    Math.max(data.low ?? -Infinity, base.bounds[0]),
    Math.min(data.high ?? Infinity, base.bounds[1]),
  ];
  const text = `${base.text} on ${interval(bounds)}`;
  const low = Math.max(bounds[0], base.reach?.[0] ?? -Infinity);
  const high = Math.min(bounds[1], base.reach?.[1] ?? Infinity);
  if (base.density === null || !Number.isFinite(high - low) || low >= high) return { bounds, density: null, text };
  const steps = 4000;
  let mass = 0;
  for (let i = 0; i < steps; i += 1) {
    mass += base.density(low + ((i + 0.5) * (high - low)) / steps) * ((high - low) / steps);
  }
  const density = (x) => (x < bounds[0] || x > bounds[1] ? 0 : base.density(x) / mass);
  return { bounds, density: mass > 0 ? density : null, reach: [low, high], text };
}

function interval([low, high]) {
  const end = (value) => (Number.isFinite(value) ? short(value).replace('-', '−') : value > 0 ? '∞' : '−∞');
  return `${low === -Infinity ? '(' : '['}${end(low)}, ${end(high)}${high === Infinity ? ')' : ']'}`;
}
