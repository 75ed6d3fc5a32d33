// Numbers as text: ticks whose labels keep clear of each other, and values to their uncertainty.

const CLEARANCE = 6;
const STEPS = [1, 2, 2.5, 5, 10];

/**
 * As many ticks, at most `most`, as have room side by side on an axis of `length` pixels.
 *
 * `factor` is what the labels are to be multiplied by or added to, as text; often empty.
 */
export function fitTicks(low, high, length, most, widthOf, height) {
  let best = { ticks: [], factor: '' };
  for (let number = most + 2; number > 0; number -= 1) {
    const { positions, labels, factor } = ticksOf(low, high, number);
    const ticks = positions
      .map((value, i) => {
        const half = Math.max(widthOf(labels[i]), height) / 2;
        return { value, label: labels[i], centre: ((value - low) / (high - low)) * length, half };
      })
      .filter(({ centre, half }) => centre >= half && centre <= length - half);
    const apart = ticks.every(
      (tick, i) => i === 0 || tick.centre - ticks[i - 1].centre >= tick.half + ticks[i - 1].half + CLEARANCE,
    );
    if (apart && ticks.length > best.ticks.length && ticks.length <= most) best = { ticks, factor };
  }
  return best;
}

function ticksOf(low, high, number) {
  const rough = (high - low) / number;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = STEPS.find((each) => each * power >= rough * (1 - 1e-9)) * power;
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  const places = Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => first + i);
  const largest = Math.max(Math.abs(low), Math.abs(high));
  const magnitude = Math.floor(Math.log10(largest));
  const fine = Math.floor(Math.log10(step) + 1e-9);
  let offset = 0;
  let exponent = 0;
  if (magnitude - fine > 4) offset = Math.floor((low + high) / 2 / (step * 100)) * step * 100;
  const reach = offset === 0 ? magnitude : Math.floor(Math.log10(Math.max(high - offset, offset - low)));
  if (reach >= 4 || reach < -2) exponent = reach;
  const unit = 10 ** exponent;
  const digits = Math.max(0, decimalsOf(step / unit));
  const factor =
    (exponent === 0 ? '' : `×10${superscript(exponent)}`) +
    (offset === 0 ? '' : ` ${offset > 0 ? '+' : '−'} ${Number(Math.abs(offset).toPrecision(12))}`);
  return {
    positions: places.map((place) => place * step),
    labels: places.map((place) => minus(((place * step - offset) / unit + 0).toFixed(digits))),
    factor: factor.trim(),
  };
}

function decimalsOf(step) {
  for (let digits = 0; digits < 12; digits += 1) {
    if (Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) < 1e-6 * step * 10 ** digits) {
      return digits;
    }
  }
  return 12;
}

const minus = (text) => (/^-0(\.0*)?$/.test(text) ? text.slice(1) : text.replace('-', '−'));
const superscript = (number) =>
  [...String(number)].map((digit) => (digit === '-' ? '⁻' : '⁰¹²³⁴⁵⁶⁷⁸⁹'[Number(digit)])).join('');

/** A value rounded to two significant digits of its uncertainty, as in the report. */
export function rounded(value, uncertainty) {
  if (value === null || value === undefined) return '–';
  if (!Number.isFinite(value)) return String(value);
  if (!(Number.isFinite(uncertainty) && uncertainty > 0)) return minus(String(Number(value.toPrecision(4))));
  // Draws are float32: more digits than it has say nothing.
  if (uncertainty < 1e-7 * Math.abs(value)) return minus(String(Number(value.toPrecision(8))));
  const decimals = 1 - Math.floor(Math.log10(uncertainty));
  if (decimals > 6 || Math.abs(value) >= 1e7) {
    const size = Math.abs(value) || uncertainty;
    const digits = Math.min(Math.max(0, decimals + Math.floor(Math.log10(size))), 15);
    return minus(value.toExponential(digits));
  }
  if (decimals >= 0) return minus(value.toFixed(decimals));
  const unit = 10 ** -decimals;
  return minus(String(Math.round(value / unit) * unit));
}
